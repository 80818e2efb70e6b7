"""What Lightning and Fabric need besides a session.

=======================  ===============================================================
``framework_session``    a session inside of a framework's loop
``run_ahead``              the run, looked at before the script is asked for its schedules
``invitation``           what a host tells people so that they can join
``hosting_defaults``     what a hosted run takes from the script
``samples``              batches of a round from the user's own ``DataLoader``
``first_sample``         what a run would give us first, read before we ask to be in it
``round_loader``         a loader whose every batch is a round
``batch_hooks``          hooks of a script see its own batches
``lightning_checks``     what of a script cannot work in a run
``one_device``           a strategy that does without processes where there is one device
``lightning_machine``    one peer of one device or of several
``lightning_passes``     a round of several batches in one step of Lightning's
``lightning_progress``   Lightning's counters and schedules, set to where the run stands
``shards``               a model that the devices of this machine hold together
``whole_file``           checkpoints appear under their name when they are whole
=======================  ===============================================================
"""
