"""The work of a CPU in a step, compiled: several times as fast as by torch. Comes with ``distro-optim[fast]``.

Written in numba, with vectors spelled out in LLVM's language (:mod:`~distro_optim.compress.fast.vectors`), for tiles
with sides of 16 to 64 of float32 weights. Everything else, and all of it where numba is missing, is done by torch, with
the same bits in the weights. ``DISTRO_OPTIM_FAST=0`` in the environment turns it off.

=============  =====================================================================================
``engine``     the classes that a step uses; chooses what the kernels can do
``loading``    is numba there? Only then, and not before the first step, is anything below imported
``caching``    compiled once per machine
``vectors``    LLVM's vectors for numba
``memory``     single numbers at an address
``encoding``   the transform of a tile, by split radix
``products``   the same along other sides, by products
``decoding``   a few coefficients back to a tile
``filtering``  its signs by float32 where they are proven, by integers where they are not
``selection``  the largest coefficients of a tile
``passes``     a tile in the memory of its tensor
``places``     where tiles lie there: what is needed next
``momentum``   kernels: gradients to coefficients
``weights``    kernel: everybody's coefficients to weights
``shifting``   kernel: the lookahead
``finiteness`` kernel: is a gradient finite?
=============  =====================================================================================
"""

from __future__ import annotations

from .engine import FastExtraction, FastMerge, can_look, can_shift, has_kernels, shift_part, squares_of_part

__all__ = [
    "FastExtraction",
    "FastMerge",
    "can_look",
    "can_shift",
    "has_kernels",
    "shift_part",
    "squares_of_part",
]
