"""What a run does to the model, in the thread that trains.

======================  ======================================================================
``participant``         one peer's part in a run, from joining to leaving
``held_interrupts``     Ctrl-C waits until the weights are those of a step again
``trainer``             carries out what the run wants done: begin, finish, apply, decay
``still_weights``       the weights of a step where they lie still, for other threads to read
``weights_hash``        hashes them there, in another thread
``audits``              others' results are audited, beside the training and without a trace in it
``repair``              tensors that are wrong are replaced; tensors that are right are given
``named_tensors``       the tensors of a model by name
``psyche_settings``     settings of an optimizer and those of a coordinator's state
``schedules``           the script's learning-rate schedulers at the run's step
``loading``             the weights with which a peer begins
``handover``            the model on its way between peers
``identity``            what peers must have in common, as text that travels with the model
``machine``             does this machine compute what the others compute? The self-test
``checkpoint``          checkpoints, whole or not there at all
``checkpoint_place``    a folder for each process of a machine that was given the same one
``between_epochs``      what a host saves in mid-epoch
``checkpoint_keeper``   what a session begins from, and what it saves
``resuming``            a run that was interrupted, as its host begins it again
======================  ======================================================================
"""
