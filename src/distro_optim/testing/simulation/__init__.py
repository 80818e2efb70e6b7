"""A run over a network that is not there: the real rounds and the real coordinator, in virtual time.

:func:`distro_optim.testing.simulate` runs it. Nothing here reads a clock or draws a random number that does
not come from the seed, so a simulation can be repeated event by event; only the CPU seconds in it are measured.

============  =====================================================================================
``settings``  what is simulated: peers, lines, trouble
``events``    virtual time: what happens, in its order
``inboxes``   what comes to one of many peers within a few milliseconds, read together
``network``   lines with latency and bandwidth, gossip over a tree, losses, and counted bytes
``sharing``   bytes that all peers read are read once, and each is charged for it
``model``     a model of a few hundred weights that really trains
``peer``      a client that carries out what its rounds want done
``liars``     clients that say something else
``run``       coordinator, peers, joiners: the run from its beginning to its end
``outcome``   what it cost, as numbers, a table and JSON
============  =====================================================================================
"""
