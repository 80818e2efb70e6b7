"""Mathematics only: tiles, transforms, selection, signs, and what one peer says in one round. No network.

===============  ==========================================================================================
``tiling``       how one tensor is cut into tiles
``profile``      how torch works on a kind of device
``plan``         the tiles of a whole model, in batches that fit in the cache
``planning``     how such a plan is made
``shards``       a part of a tensor, in tiles of the whole: which of them a shard owns, and which it touches
``dct``          orthonormal transforms of a block of tiles
``distinct``     are the indices of a tile distinct?
``topk``         which coefficients are sent; the mean over those who sent one
``sign``         values as single bits
``update``       :class:`CompressedUpdate`: one peer's contribution to one step
``windows``      between tensors and the tiles of a block
``extraction``   gradients into the momentum of a batch, and coefficients out of it
``merging``      coefficients of all contributors into the step on the weights: :class:`~.merging.Merge`
``psyche``       a folder: that step as Psyche's clients do it, to the last bit
``exact``        a folder: the merge in integers, with equal bits on every machine
``fast``         a folder: both halves of a step by compiled kernels, where numba is installed
``engine``       a folder: what carries out the two halves of a step, over all of the above
``coefficients`` a whole tensor as coefficients, and back
``wire``         a contribution as bytes, in Psyche's form
``wire_tensor``  one tensor of it
``wire_layout``  where in the bytes its parts lie
``wire_bulk``    all tensors at once, with numpy
``flat``         a contribution as bytes, for peers that are known to share the plan
===============  ==========================================================================================
"""

from __future__ import annotations

from .coefficients import from_coefficients, to_coefficients
from .extraction import OwnPart
from .plan import UPDATES, Arithmetic, ParamSpec, TilePlan, UpdateRule, compute_dtype
from .planning import make_plan
from .tiling import TileGrid, Tiling, tile_grid
from .update import CompressedTensor, CompressedUpdate

__all__ = [
    "UPDATES",
    "Arithmetic",
    "CompressedTensor",
    "CompressedUpdate",
    "OwnPart",
    "ParamSpec",
    "TileGrid",
    "TilePlan",
    "Tiling",
    "UpdateRule",
    "compute_dtype",
    "from_coefficients",
    "make_plan",
    "tile_grid",
    "to_coefficients",
]
