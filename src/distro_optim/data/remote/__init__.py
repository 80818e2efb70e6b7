"""Training data from a TCP data server, Psyche's or ours.

=============  ==========================================
``client``     a provider: the socket around ``requests``
``requests``   requests out, checked answers in; no I/O
``server``     the server on any kind of stream
``service``    its rules, without sockets or disk
=============  ==========================================
"""
