"""A run is watched by one that is not in it: it hears what members hear, gets what they get, and can say nothing.

=========  ==============================================
``swarm``  the run's peers as one that watches sees them
=========  ==============================================

What it hears comes from :mod:`~distro_optim.comm.iroh.gossip.feed`.
"""
