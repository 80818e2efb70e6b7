"""Peers find each other and exchange bytes over iroh.

===================  ========================================================================
``endpoint``         a node: one endpoint on an event loop of its own
``connection``       QUIC connections, and whether they answer
``stream_ends``      the two halves of their streams, and the errors of ``iroh`` as ours
``one_question``     a question and its answer, over a connection for nothing else
``pool``             connections dialled when needed, shared, retried
``keys``             a node's identity
``home``             where it is kept, with the ports, from one start to the next
``lock_file``        a file that one process holds at a time
``rendezvous``       where the other peers of a run are
``whereabouts``      who hosts a run, asked of any of its peers
``meeting_place``    the same without I/O, and over TCP
``introduction``     which version a peer is of
``measuring``        how fast the line to a host is
``reach``            how others reach an endpoint: relay servers, discovery, external addresses
``reach_options``    the same as options of our commands
``local_discovery``  the nodes of one machine find each other by files, as Psyche's do
``streams``          byte streams through NATs and relays
``swarm``            announcements by gossip, data by verified blobs
``traffic``          bytes and rates of each peer
``ffi``              makes the ``iroh`` package's foreign-function layer fast, where that is safe
===================  ========================================================================

``node`` has the parts of a node, ``crossing`` those of ``ffi``. ``gossip``, ``blobs`` and ``sharing`` are the three
protocols; ``watching`` has the rules by which connections are taken for dead, and peers dialled anew; ``observing`` is
for those that look at a run without being in it.
"""
