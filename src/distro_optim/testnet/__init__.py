"""``distro-optim testnet``: a whole run on one machine, the same script in several processes, watched and disturbed.

==============  ==========================================================
``command``     its options
``network``     runs the peers and disturbs them as planned
``processes``   each in a group of its own, and none left behind
``faults``      what goes wrong, and when: plain data
``watching``    what the reports of all peers say together
``display``     a live table, lines, or JSON
``summary``     a table, a plot, a record
``disturbed``   the way into a run with something between us and its peers
``weather``     announcements are lost, peers are cut off
``lies``        a peer that announces something else than what it trained
==============  ==========================================================
"""
