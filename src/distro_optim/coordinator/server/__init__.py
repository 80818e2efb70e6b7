"""A run and those who take part in it. The first three do no I/O.

====================  ===========================================================
``host``              a run with its members: joins, departures, refusals
``joiner_patience``   when an epoch ends because somebody waits for the next one
``service``           a host behind connections
``server``            sockets for a service, and files for its run
``store``             the files
``embedded``          host and clients in one process, without bytes between them
====================  ===========================================================
"""
