"""The thread of the network: what ``rounds`` decides is carried out here.

===================  ===========================================================
``runtime``          a run in a thread of its own, beside the thread that trains
``driver``           rounds in an event loop: bytes and answers in, actions out
``to_peers``         what is said to them, and what leaves together
``mailbox``          between the two threads: one queue
``way_in``           which of the ways into a run it is, as the arguments say
``link``             what a runtime needs to be in a run
``hosting``          ... where the run is hosted here
``coordinating``     ... its coordinator, open to others
``moving``           ... the host's own link to it
``keeping``          ... and who hosts it when the host is gone
``newest``           ... and how far its peers are, if it starts again
``finding_the_host`` who that is by now, asked of its peers
``joining``          ... where it is somebody else's
``observing``        ... or is only looked at
``on_solana``        ... or a blockchain coordinates it
``journal``          counters, the last events in words, a witness's numbers
``contributions``    what each identity has given to the run
``uploads``          copies of what is saved, in a thread of their own
``upload_queue``     ... which is next, and what became of the others
``upload_carriers``  ... by a command, or to a store
===================  ===========================================================
"""
