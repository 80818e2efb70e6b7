"""Which class does which half of a step for a block: one definition for all peers, and of its classes the fastest."""

from __future__ import annotations

from typing import Final

from ..dct import Transform
from ..exact import ExactMerge
from ..extraction import Extraction
from ..fast import FastExtraction, FastMerge, has_kernels
from ..merging import FloatMerge, Merge
from ..plan import Arithmetic, Batch
from ..psyche import PsycheMerge

__all__ = ["ARITHMETICS", "extraction_class", "make_merge"]

_MERGES: Final[dict[Arithmetic, type[Merge]]] = {"exact": ExactMerge, "float": FloatMerge, "psyche": PsycheMerge}
"""The plain engine of each definition."""

ARITHMETICS: Final[tuple[Arithmetic, ...]] = tuple(_MERGES)


def make_merge(arithmetic: Arithmetic, number: int, batch: Batch, transform: Transform, workers: int) -> Merge:
    """What merges batch ``number`` of a plan; arguments as for :class:`~distro_optim.compress.merging.Merge`."""
    merge = _MERGES[arithmetic]
    # The kernel knows signs only; steps of a fixed size are torch's.
    if merge is ExactMerge and batch.update == "sign" and has_kernels(batch, transform, "merge"):
        merge = FastMerge
    return merge(number, batch, transform, workers)


def extraction_class(
    arithmetic: Arithmetic,
    batch: Batch,
    transform: Transform,
    *,
    in_coefficients: bool,
    overlap: bool,
    quantize: bool,
) -> type[Extraction]:
    """What takes gradients into the momentum of a batch and the largest coefficients out of it.

    Args:
        arithmetic: of the plan. The kernels are for ``exact`` only: with the others, results are compared with those
            of other programs.
        batch: of the plan.
        transform: of its tiles.
        in_coefficients: the momentum is kept as coefficients.
        overlap: what was sent leaves the momentum a step later.
        quantize: signs are sent.

    Returns:
        a class that is made with the fields of :class:`~distro_optim.compress.extraction.Extraction`. Engines may pick
        other coefficients where rounding decides: what a peer sends is its own.
    """
    kernel = "extract_from_coefficients" if in_coefficients else "extract_from_weights"
    return FastExtraction if arithmetic == "exact" and has_kernels(batch, transform, kernel) else Extraction
