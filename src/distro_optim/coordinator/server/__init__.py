"""A run and those who take part in it. The first seven do no I/O.

====================  ==================================================================
``host``              a run with its members: joins, departures, refusals
``joiner_patience``   when an epoch ends because somebody waits for the next one
``probation``         who is on probation, and for whom a round does not wait any longer
``holding``           ... for how long one is held for those
``warming_up``        ... and the warm-up
``purses``            ... out of what: seconds that fill up again
``in_process``        participants in the host's own process, without bytes between them
``service``           a host behind connections
``server``            sockets for a service, and files for its run
``store``             the files
``acting``            what its host can do to a run: pause, resume, kick, ban; for a session and for a page
``ledger_file``       what clients did in each epoch, signed, beside the saved states
``control``           how an operator pauses, resumes and changes a run that is kept in a folder
``embedded``          a host for the participants of one process, and nobody else
====================  ==================================================================
"""
