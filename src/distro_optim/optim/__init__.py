"""The parts of :class:`~distro_optim.optimizer.DisTrO`.

===============  ========================================================================
``reference``    the whole algorithm, slow and clear: read this first
``arguments``    checks of what a user passes
``rules``        the rules of a parameter group: what is sent is made of what, and so is a step; their defaults
``orthogonal``   Muon's direction: matrices of momentum, orthogonalised
``planned``      the parameters: how they are tiled, which part of them is here, what carries out their steps
``momentum``     the mathematics as verbs on them, without any peers
``state``        what is remembered of a parameter, and in which form it is saved
``run``          what is held beside that: where the run stands, and what is on its way
``saving``       saving, loading and copying: bit for bit, with what was on its way
``lookahead``    Psyche's error correction: gradients are taken where the weights will be
``weight_decay`` with the same bits on every device
``quarantine``   which gradients may touch the momentum
``sharding``     which part of a sharded model is here
``shards``       a folder: what ranks that hold a model together tell each other
``sharded_engine``  steps of a sharded model: of its own tiles, and the update of all ranks together
``wrapped``      finds a DistributedDataParallel around the parameters
``uncompiled``  methods that torch.compile leaves as they are
``workers``      threads that share out the blocks of a step among the cores, and true float32 in them
===============  ========================================================================
"""
