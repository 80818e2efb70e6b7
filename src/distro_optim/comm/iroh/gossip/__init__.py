"""Messages of a few hundred bytes to everybody in a topic, as iroh-gossip speaks it.

Without I/O:

==================  ====================================================
``messages``        the ten messages and their bytes
``frames``          frames on a stream
``peer_data``       what peer data says: where a peer can be reached
``config``          what can be set; nothing is negotiated
``events``          what goes into the state machines and what comes out
``timers``          a queue of things to do later, without a clock
``random_choice``   random choice from a source that the caller owns
``hyparview``       who is whose neighbour
``plumtree``        how a message reaches everybody
``lazy_queue``      what neighbours are still to be told that there is
``link_evidence``   when a link is worth changing
``gate``            a share of messages and bytes for each author, before anything is passed on
``topic``           one topic of one node: both halves put together
``protocol``        all topics of one node
==================  ====================================================

With I/O:

=================  ===================================================================
``links``          the connections to one peer
``net``            gossip on a node: the state machines, a clock, the links
``subscription``   what the application holds of a topic
``feed``           what a member hears, told to those that watch and are in no gossip
=================  ===================================================================

The wire and the bounds on one page: ``docs/gossip.md``.
"""
