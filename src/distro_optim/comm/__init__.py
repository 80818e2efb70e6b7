"""What travels between peers, and the seams that carry it; the implementation over iroh is a folder of its own.

Seams, each with an implementation elsewhere or beside it:

===================  =========================================================================
``exchange``         between an optimizer and a network: publish an update, collect the peers'
``process_group``    an exchange on ``torch.distributed``
``memory``           an exchange between optimizers of one process
``swarm``            what a training client needs of a network of peers
``model_exchange``   how a joiner gets the model
``live_weights``     single tensors of a model in training, from a peer that has them right
``streams``          byte streams that a server accepts and a client opens
``loop``             an event loop in a thread, for callers that have none
===================  =========================================================================

Bytes and what they mean, without I/O:

=================  ==============================================================================
``declarations``   what the annotations of a message class say about its bytes
``framing``        length-delimited frames, and the link with a challenge of Psyche's TCP servers
``changes``        a frame as what has changed since the one before
``question``       our side of a question to a coordinator, in a connection of its own
``signing``        Ed25519 keys and the signed envelope in which peers speak
``announcements``  from the wire to the application: checked, deduplicated, queued
``carrying``       blobs of a few kilobytes that come along with their announcement
``seen``           which messages were here before
``addresses``      where a peer can be reached
``tickets``        one string that says where something is
``backoff``        when to dial a peer that did not answer
``meter``          bytes and bytes per second
=================  ==============================================================================

``postcard`` is serde's format, ``serving`` a server of connections for any protocol, ``iroh`` the internet.
"""
