"""Is a peer honest? Each check says what it catches and what it misses.

===============  ==========================================================================================
``commitment``   a result bound to its sender and to its place in the run
``merkle``       a list of results bound to one hash
``bloom``        which peers were heard, which results were seen, in a few hundred bytes
``filter_bank``  such reports of all witnesses, asked together
``similarity``   do two peers have the same result but for rounding: Jaccard, Manhattan, Hamming
``recompute``    test 1: does a result agree with the gradient of the batch that its sender was given
``quiet``        gradients for that beside a training, of which nothing can be seen afterwards
``momentum``     what a trainer remembers, bound to one hash, leaf by leaf
``opening``      some of these leaves, as bytes, for an auditor
``audit``        test 2: does the momentum follow from the one before, by the batch that the trainer was given
``sequential``   many small audits of one peer by test 1, added up until they say something
``calibrate``    limits learnt from honest noise, and verdicts by them
===============  ==========================================================================================
"""
