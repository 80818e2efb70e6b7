"""Who trains what when: the state of a run, its state machine, and both sides of its protocol.

The state, and what it looks like elsewhere:

===================  ======================================================================================
``types``            the run state as dataclasses, from which every other form of it follows
``model``            the part of it that describes the model, its data and its schedules
``messages``         what client and server say to each other
``text``             ``state.toml`` and JSON
``raw``, ``account`` the layout in memory, and the on-chain account that holds it; read only
``validation``       what a configuration must satisfy before a run starts with it
===================  ======================================================================================

The rules, as functions from state to state:

===================  ======================================================================================
``machine``          what each input does
``transitions``      which input is legal when, which phase follows which: two tables
``steps``            the small steps that ``machine`` is made of
``committee``        who trains, verifies, witnesses
``assignment``       who trains on which data
``schedule``         learning rate, growth of the batch, warm-up
``consensus``        quorum, health, which result counts
``checkpoints``      where the weights are
===================  ======================================================================================

A run and those who take part; the first half does no I/O:

===================  ======================================================================================
``host``             a run with its members: joins, departures, refusals
``service``          a host behind connections, each of them a ``session`` within ``limits``
``session_service``  what ``stream_server`` needs of a service
``status``           how the run is doing
``stream_server``    sockets for any service
``server``           sockets for a ``service``, and files for its run
``store``            the files
``client``           a participant's side, over any stream
``embedded``         host and clients in one process
``ticket``           one string that says which run and where
===================  ======================================================================================

The command ``distro-optim serve`` is ``serve``, and shows itself by ``console``. Training data beside a run are
a room of their own, :mod:`distro_optim.data`.
"""
