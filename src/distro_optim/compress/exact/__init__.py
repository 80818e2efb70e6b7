"""The definition ``exact-1``: everybody's coefficients to the signs of a step, in integers, with equal bits everywhere.

Every intermediate result is an integer below the bounds that a number type holds exactly, so that neither the order of
additions nor fused operations, threads or kernels can change it. ``docs/exact.md`` specifies it.

==============  ===================================================================================
``definition``  the constants, the integer basis and the mean of signs
``oracle``      the whole definition in Python integers, slow and clear
``means``       coefficients of all contributors to integers, in tensors
``products``    integer coefficients to the signs of their tiles: in float64
``filtered``    the same in float32, where the signs are proven, and in float64 where they are not
``limbs``       the same without float64, for devices that have none
``precision``   products of float32 that are just that, whatever a script has set
``rms``         the size of a step that is not made of signs: from the squares of integers
``merge``       :class:`~.merge.ExactMerge`: chooses among them
==============  ===================================================================================
"""

from __future__ import annotations

from .merge import ExactMerge, check_sums

__all__ = ["ExactMerge", "check_sums"]
