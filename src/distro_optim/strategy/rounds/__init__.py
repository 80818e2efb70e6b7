"""A client's side of a run, round by round. Nothing here does I/O or reads a clock.

=====================  ============================================================================
``rounds``             takes every input, and gives back the actions that come of it: start here
``phases``             from phase to phase with the coordinator: warm-up, rounds, the end
``warm_up``            loads the model, and hears which peers are ready
``pipeline``           what happens inside a round: apply, train, finish, witness
``choose_result``      the rule that decides which result of a batch counts
``choose_providers``   which peers are asked for the model before an epoch
``downloads``          fetches the results that peers announce
``own_result``         our own result, until it is announced
``reading``            makes of a peer's bytes what they say
``results``            from a result to the bytes of a blob, and back, checked
``round_state``        what is known of one round
``waiting``            how long a round waits for results of the one before
``weights``            do all peers have the same weights? Which of them are right?
``repair``             some tensors are wrong: when they are fetched again, and from whom
``witness_reports``    what a client reports to the coordinator
``admission``          who may talk to us, and which messages are taken
``announcer``          what we announce, and repeat
``broadcasts``         what clients tell each other by gossip
``actions``            what is to be done, as plain data, and the outbox for it
``moment``             the time and the coordinator's state, as each input meets them
=====================  ============================================================================

``trust`` says who is believed about the weights, ``audits`` whether a peer trains what it is given.
"""
