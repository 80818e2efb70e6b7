"""How torch should do the work of a step on a kind of device. Nothing else asks what kind of device it is.

Profiles differ in speed, never in the meaning of a result; in ``arithmetic="exact"`` not in a bit of the weights. So
tensors on a CPU may be worked on by an accelerator's profile, which is how its branches are tested.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Final

import torch

__all__ = ["ACCELERATOR", "CPU", "Profile", "profile_of"]


@dataclass(frozen=True)
class Profile:
    """A way of working.

    Attributes:
        block_elements: in a block, which goes through all stages of a step before the next one.
        most_blocks: of a batch; one with more elements has larger blocks. None: any number.
        fewest_blocks: of a batch; one with fewer elements has smaller blocks, but of half the size at the least.
        exact_elements: that are multiplied at a time in :mod:`~distro_optim.compress.exact.products`, unless it gets
            room for a whole block.
        by_threads: several blocks are in work at a time, each in one thread.
        by_numpy: tensors lie in main memory, where numpy multiplies small matrices faster than torch, and reads signs
            without a copy.
        partition_topk: the largest of a row are found by its groups and by numpy, not by :func:`torch.topk`.
        runs_first: elements of several tiles that are neighbours in a tensor are added in its own order, in the cache,
            before they are put in that of the tiles.
        ordered_adds: additions to one place come in any order, so contributors are added one after the other where the
            order decides on the bits.
        float64: there are products in float64, and they are IEEE 754's.
        exact_quotients: a quotient in float32 is rounded as IEEE 754 says.
        keeps_subnormals: numbers below the normal ones are not taken for 0.
    """

    block_elements: int
    most_blocks: int | None
    fewest_blocks: int
    exact_elements: int
    by_threads: bool
    by_numpy: bool
    partition_topk: bool
    runs_first: bool
    ordered_adds: bool
    float64: bool
    exact_quotients: bool
    keeps_subnormals: bool


CPU: Final = Profile(
    # Three such float32 buffers are larger than some second-level caches. But each block takes a hundred calls of torch
    # and numpy, for which threads wait on each other: half of it takes a tenth longer, and twice as much gains nothing.
    block_elements=256 * 4096,
    most_blocks=None,
    fewest_blocks=16,  # so that several threads end at about the same time
    exact_elements=32 * 4096,  # three float64 buffers stay in the cache
    by_threads=True,
    by_numpy=True,
    partition_topk=True,
    runs_first=True,
    ordered_adds=False,
    float64=True,
    exact_quotients=True,
    keeps_subnormals=True,
)
"""Of a CPU."""

ACCELERATOR: Final = Profile(
    block_elements=4096 * 4096,  # enough work in one launch
    most_blocks=16,  # more launches of 10 microseconds than that cost more than memory: 4% of what training takes
    fewest_blocks=1,
    exact_elements=1024 * 4096,  # three buffers take 100 MB
    by_threads=False,
    by_numpy=False,
    partition_topk=False,
    runs_first=False,
    ordered_adds=True,
    float64=True,
    exact_quotients=False,
    keeps_subnormals=False,
)
"""Of a GPU of the kinds that have float64: CUDA and ROCm. Counted on the meta device, too."""

_HAVE_FLOAT64: Final = ("cuda", "meta")
"""Types of accelerators; the others (Apple's, say) get integers in float32."""


def profile_of(device: torch.device) -> Profile:
    """What suits ``device``."""
    if device.type == "cpu":
        return CPU
    return ACCELERATOR if device.type in _HAVE_FLOAT64 else replace(ACCELERATOR, float64=False)
