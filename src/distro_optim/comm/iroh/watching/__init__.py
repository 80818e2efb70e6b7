"""Whether those at the other end still answer, and by which way to reach them if not. No I/O.

===========  ==========================================================
``silence``  which connections do not answer, by counting their bytes
``beside``   endpoints beside a node's first one, and which one dials
===========  ==========================================================

:mod:`~distro_optim.comm.iroh.node.vigil` carries it out.
"""
