"""What ranks that hold a model together tell each other.

===============  ========================================================================
``ranks``        the ranks of a mesh: something to all of them, or to each something else
``routes``       which elements of tensors travel from whom to whom
``placing``      which elements of a DTensor are here
``matrices``     Muon's direction: whole matrices, dealt out to the ranks
===============  ========================================================================
"""
