"""Gossip: messages of a few hundred bytes to everybody in a topic, as iroh-gossip speaks it.

:mod:`.messages` and :mod:`.frames` are the bytes, :mod:`.hyparview` and :mod:`.plumtree` the two halves of the state
machine, :mod:`.topic` and :mod:`.protocol` put them together; none of these does I/O. The wire and the bounds on one
page: ``docs/gossip.md``.
"""
