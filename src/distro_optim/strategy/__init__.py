"""Plugs a run into a training loop. Import from the modules; nothing is loaded here.

What a script meets:

=============================  =============================================================
``psyche``                     ``PsycheStrategy``, for Lightning
``psyche_lightning``           the same for ``import lightning.pytorch``
``psyche_pytorch_lightning``   the same for ``import pytorch_lightning``
``fabric``                     ``FabricPsycheStrategy``, for a loop of one's own with Fabric
``session``                    ``SwarmSession``, for any loop
``round``                      a round in which we train
``config``                     the settings of a run that is hosted here
``environment``                what the environment says where the script does not
=============================  =============================================================

What the rooms below share:

=======================  =============================================================
``port``                 what the training thread sees of a run
``connecting``           the way into a run, by arguments and environment
``options``              the arguments that sessions, strategies and connections share
``forwarding``           an access to a run that stands before another one
``polling``              how often a wait looks whether to go on
``session_checks``       what has to hold before a session begins
``session_checkpoints``  where a session's checkpoints come from and go to, and what lies beside them
``sample_order``         which samples the coordinator's data indices mean
``news``                 what a session says of itself
``run_report``           how a peer is doing, as a file of JSON lines
``one_line``             mistakes of a script's, told without a traceback
``upload``               where copies of what is saved go, as a user says it
=======================  =============================================================

``rounds`` decides and does no I/O, ``network`` is the thread that carries it out, ``model`` is what happens to the
model in the training thread, ``ranks`` how several processes are one peer, ``frameworks`` what Lightning and Fabric
need besides, ``monitor`` what people and machines see of a run.
"""
