"""Who trains what when: the state of a run, and both sides of its protocol.

=======================  =======================================================================
``types``                the run state as dataclasses, from which every other form of it follows
``model``                the part of it that describes the model, its data and its schedules
``messages``             what client and server say to each other
``why_closed``           why a client was turned away, as it asks and a coordinator answers
``watchers``             who may watch without being in the run, as a host says and its members ask
``remembering_codec``    what is sent again and again is decoded only once
``solana_options``       what a script says about a run on Solana
``solana_clusters``      where clusters of Solana are reached
``solana_deployments``   which programs coordinate runs there
``ledger``               points for what clients did, epoch by epoch, chained and signed
``unconfirmed_report``   a report that the coordinator may never have got
``ticket``               one string that says which run and where
``ticket_text``          how it is written, and what people make of it when they copy it
=======================  =======================================================================

``rules`` are functions from state to state, ``formats`` what the state looks like elsewhere, ``client`` is a
participant's side over any stream, ``server`` a run and those who take part in it, ``solana`` a run of which a
blockchain keeps the state. The command that serves a run is :mod:`distro_optim.serve`.
"""
