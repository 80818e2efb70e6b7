"""The same training data at several places, of which any may be gone, slow or lying.

===========  =====================================================
``tokens``   a provider: reads from one place after the other
``source``   one place: opened beside the reading, asked, dropped
``ranking``  which place comes first, and what most say; no I/O
``places``   what a user calls a place
===========  =====================================================
"""
