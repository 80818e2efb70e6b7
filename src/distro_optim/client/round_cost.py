"""What a round of a model costs on a line: bytes and seconds. No I/O."""

from __future__ import annotations

import math
from dataclasses import dataclass

__all__ = ["Line", "RoundFacts", "result_bytes", "round_seconds"]


@dataclass(frozen=True)
class Line:
    """A line, in bytes a second."""

    up: float
    down: float


@dataclass(frozen=True, kw_only=True)
class RoundFacts:
    """A model in a run, and how it is trained.

    Attributes:
        parameters: elements of the model.
        element_bytes: of one.
        chunk, topk, quantized: of the optimizer.
        peers: in the run.
    """

    parameters: int
    element_bytes: int = 4
    chunk: int = 64
    topk: int = 8
    quantized: bool = True
    peers: int = 2


def result_bytes(model: RoundFacts) -> int:
    """Bytes of a result, about: those of the wire's form (docs/update-bytes.md) without what frames them.

    A tensor whose sides are no multiples of the chunk has some more tiles than are counted here.
    """
    tile = model.chunk * model.chunk
    tiles = math.ceil(model.parameters / tile)
    index = next((size for size, most in ((1, 1 << 8), (2, 1 << 16), (4, 1 << 32)) if tile <= most), 8)
    kept = tiles * min(model.topk, tile)
    return kept * index + (math.ceil(kept / 8) if model.quantized else kept * model.element_bytes)


def round_seconds(model: RoundFacts, line: Line, rtt: float = 0.0) -> tuple[float, float]:
    """Seconds that the results of a round take on our line, at least: to send, and to receive.

    Each of the others fetches ours from us, as it is in runs of up to 16 peers, and we fetch each of theirs.
    """
    total = result_bytes(model) * (model.peers - 1)
    return total / line.up + 2 * rtt, total / line.down + 2 * rtt
