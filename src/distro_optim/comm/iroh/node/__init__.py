"""The parts of a node, each of which owns its state; :class:`~distro_optim.comm.iroh.endpoint.Node` puts them together.

=============  ======================================================================
``opening``    how an endpoint is opened, where it listens, what is told of that
``allowing``   who may connect, and be dialled
``holding``    the connections that are open
``accepting``  connections that others make, within limits, and who serves them
``dialling``   by which way a peer is dialled, and which ways are given up
``vigil``      which connections do not answer
=============  ======================================================================
"""
