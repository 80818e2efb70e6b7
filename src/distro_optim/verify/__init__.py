"""Is a peer honest? Each check says what it catches and what it misses.

===============  ==========================================================================================
``commitment``   a result bound to its sender and to its place in the run
``merkle``       a list of results bound to one hash
``bloom``        which peers were heard, which results were seen, in a few hundred bytes
``similarity``   do two peers have the same result but for rounding: Jaccard, Manhattan, Hamming
===============  ==========================================================================================
"""
