"""A client's side of a run, round by round. Nothing here does I/O or reads a clock.

=====================  ===========================================================================
``phases``             from phase to phase with the coordinator: warm-up, rounds, the end
``pipeline``           what happens inside a round: apply, train, announce, fetch, finish, witness
``actions``            what they want done, as plain data
``broadcasts``         what clients tell each other by gossip
``admission``          is a broadcast taken?
``round_state``        what is known of one round
``results``            from the bytes of a blob to a result, checked
``applying``           which result of a batch counts, and in which order they are applied
``waiting``            how long a round waits for results of the one before
``repeats``            messages that are said again
``witness_reports``    what a client reports to the coordinator
``weights``            do all peers have the same weights? Who is right?
``choose_providers``   from whom the model is got before an epoch
=====================  ===========================================================================
"""
