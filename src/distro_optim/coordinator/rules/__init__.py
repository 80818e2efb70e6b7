"""The rules of a run, as functions from state to state: no I/O, no clock.

================  ================================================================
``machine``       what each input does
``transitions``   which input is legal when, which phase follows which: two tables
``steps``         the small steps that ``machine`` is made of
``committee``     who trains, verifies, witnesses
``assignment``    who trains on which data
``probation``     who is not waited for, has small work and does not witness, in runs of our own kind
``schedule``      learning rate, growth of the batch, warm-up
``consensus``     quorum, health, which result of a batch counts
``points``        what each client has done in an epoch, and the points for it
``checkpoints``   where the weights are
``outlook``       what a newcomer sees: whether it can take part, and what it will wait for
``validation``    what a configuration must satisfy before a run starts with it
================  ================================================================
"""
