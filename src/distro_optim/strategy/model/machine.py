"""Does this machine make of the same updates what the others make of them? A self-test, and what it may depend on.

Peers stay equal because all turn the same coefficients into the same step, bit for bit. So each merges fixed updates
into fixed weights, with the settings and the arithmetic of its optimizer, and says what the result hashes to, in the
text that travels with the model. A joiner whose hash is another learns before it trains which library is the likely
reason. It is told, not turned away: the text is a stranger's, and what is really different shows in the weights.

The updates come from integers, since generators of random numbers differ between libraries as well. Half of them
come in pairs that cancel, so that many sums are zero: there rounding decides the sign.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Final

import numpy as np
import torch
from blake3 import blake3
from torch import Tensor

from ...compress import CompressedUpdate
from ...optim.workers import workers_of_a_step
from ...optimizer import DisTrO
from ..rounds.weights import tensor_digest

__all__ = ["FACTS", "MAX_FACT", "MERGE", "explain_difference", "machine_facts", "merge_hash"]

MERGE: Final = "merge"
"""Among the facts: the hash of the self-test, in hexadecimal."""

FACTS: Final = {
    "device": "the kind of device",
    "torch": "PyTorch",
    "blas": "the matrix library that PyTorch uses",
    "cpu": "the instructions that PyTorch takes of the processor",
    "numpy": "NumPy",
}
"""What the arithmetic may depend on, the most likely first."""

MAX_FACT: Final = 80
"""Characters of a fact, of which each is printable ASCII. A hash has 64; chosen arbitrarily above that."""

_LARGEST_CHUNK: Final = 128
"""Longest side of the tiles that are tested; longer ones are no different."""

_CONTRIBUTORS: Final = (4, 16)
"""To each of two merges: few coefficients are decoded in another way than many."""

_RATE: Final = 2.0**-9
_DECAY: Final = 0.1


def machine_facts(optimizer: DisTrO) -> dict[str, str]:
    """The self-test's hash with the settings of ``optimizer``, on its device, and what it may depend on.

    Takes some milliseconds the first time, and none afterwards.
    """
    params = [param for group in optimizer.param_groups for param in group["params"]]
    group = optimizer.param_groups[0]
    device, dtype = params[0].device, params[0].dtype
    digest = merge_hash(
        optimizer.tiling,
        optimizer.transform,
        optimizer.quantize_1bit,
        optimizer.arithmetic,
        group["update"],
        int(group["compression_chunk"]),
        int(group["compression_topk"]),
        device,
        dtype,
    )
    facts = {
        MERGE: digest,
        "device": _device_name(device),
        "torch": torch.__version__,
        "blas": _blas(),
        "cpu": torch.backends.cpu.get_cpu_capability(),
        "numpy": np.__version__,
    }
    return {name: _plain(fact) for name, fact in facts.items()}


def explain_difference(ours: Mapping[str, str], theirs: Mapping[str, str]) -> str | None:
    """In a sentence, what is the likely reason why the self-test gives another hash here; None if it does not.

    Args:
        ours, theirs: of :func:`machine_facts`; empty where a peer says nothing.
    """
    if MERGE not in ours or MERGE not in theirs or ours[MERGE] == theirs[MERGE]:
        return None
    differing = [
        f"{what} ({ours.get(name, 'unknown')} here, {theirs.get(name, 'unknown')} in the run)"
        for name, what in FACTS.items()
        if ours.get(name) != theirs.get(name)
    ]
    if differing:
        reason = f"most likely because of {differing[0]}"
        reason += f"; also different: {', '.join(differing[1:])}" if differing[1:] else ""
    else:
        reason = "with the same libraries, so test the memory and the processor of both machines"
    return (
        f"self-test: this machine makes another step of the same updates than the run does, {reason}. Its weights will "
        "come to differ from those of the others"
    )


@lru_cache(maxsize=8)
def merge_hash(
    tiling: str,
    transform: str,
    quantize: bool,
    arithmetic: str,
    update: str,
    chunk: int,
    topk: int,
    device: torch.device,
    dtype: torch.dtype,
) -> str:
    """The self-test alone: 64 hexadecimal digits, kept for each set of settings."""
    side = min(chunk, _LARGEST_CHUNK)
    # Whole tiles, tiles that are filled up, and a vector.
    shapes = [(3 * side, 2 * side), (side + side // 2, max(1, side - 4)), (4 * side + 1,)]
    params = [_weights(number, shape).to(device=device, dtype=dtype) for number, shape in enumerate(shapes)]
    optimizer = DisTrO(
        params,
        _RATE,
        direction="momentum",
        update=update,  # type: ignore[arg-type]
        weight_decay=_DECAY,
        compression_chunk=side,
        compression_topk=topk,
        quantize_1bit=quantize,
        overlap=False,
        tiling=tiling,  # type: ignore[arg-type]
        transform=transform,  # type: ignore[arg-type]
        arithmetic=arithmetic,  # type: ignore[arg-type]
    )
    digest = blake3()
    for contributors in _CONTRIBUTORS:
        updates = [_update(optimizer, quantize, 100 * contributors + part) for part in range(contributors)]
        optimizer.decay_weights()
        if arithmetic == "float":
            # Few signs depend on the last bits of floats, but in a run some do sooner or later.
            for tensor in _decoded(optimizer, updates):
                digest.update(tensor_digest("decoded", tensor))
        optimizer.apply(updates)
    for param in params:
        digest.update(tensor_digest("merged", param))
    return digest.hexdigest()


def _decoded(optimizer: DisTrO, updates: Sequence[CompressedUpdate]) -> list[Tensor]:
    """The updates before their sign, on one thread as in a merge: sums on several threads have other last bits."""
    decoded: list[Tensor] = []
    workers_of_a_step().run(lambda these, _: decoded.extend(optimizer.decode(these)), [updates])
    return decoded


def _weights(number: int, shape: tuple[int, ...]) -> Tensor:
    """Multiples of 1/64 between -1 and 1."""
    count = torch.Size(shape).numel()
    return ((torch.arange(count) * (37 + 2 * number) % 129).float() / 64 - 1).view(shape)


def _update(optimizer: DisTrO, quantize: bool, number: int) -> CompressedUpdate:
    """A contribution. In every second square tile coefficients come in pairs, each with its mirror image of the other
    sign: on the tile's diagonal they cancel, and all that is left there is what rounding makes of zero."""
    plan = optimizer.plan
    index, value = [], []
    for batch in plan.batches:
        places, numbers = [], []
        for tile in range(batch.tiles):
            mirrored = batch.h == batch.w and 2 * batch.k <= batch.tile_size and tile % 2 == 0
            drawn = _draw(number * 1009 + tile, batch.k, batch.h, batch.w, mirrored=mirrored)
            places.append([place for place, _ in drawn])
            numbers.append([size for _, size in drawn])
        sizes = torch.tensor(numbers, dtype=torch.float64, device="cpu")
        index.append(torch.tensor(places, dtype=torch.int32, device="cpu"))
        value.append(sizes < 0 if quantize else sizes.to(batch.compute_dtype))
    return CompressedUpdate(plan, tuple(index), tuple(value), (True,) * len(plan))


def _draw(seed: int, count: int, h: int, w: int, *, mirrored: bool) -> list[tuple[int, float]]:
    """``count`` distinct places of a tile of ``h * w``, and a number for each: a power of 2 with a sign."""
    state, drawn = seed, dict[int, float]()
    while len(drawn) < count:
        state = (state * 6_364_136_223_846_793_005 + 1_442_695_040_888_963_407) % 2**64  # Knuth's MMIX
        place, bits = (state >> 33) % (h * w), state >> 20
        size = 2.0 ** -(bits % 8) * (1 if bits & 8 else -1)
        mirror = place % w * w + place // w
        if place in drawn or (mirrored and (mirror in drawn or mirror == place)):
            continue
        drawn[place] = size
        if mirrored and len(drawn) < count:
            drawn[mirror] = -size
    return list(drawn.items())


def _device_name(device: torch.device) -> str:
    if device.type != "cuda":
        return device.type
    return f"{torch.cuda.get_device_name(device)}, CUDA {torch.version.cuda}"


def _blas() -> str:
    found = re.search(r"BLAS_INFO=(\w+)", torch.__config__.show())
    kernels = os.environ.get("MKL_CBWR") or os.environ.get("OPENBLAS_CORETYPE")
    name = found[1] if found else "unknown"
    return f"{name} with the kernels {kernels}" if kernels else name


def _plain(fact: str) -> str:
    return "".join(char if " " <= char <= "~" else "?" for char in fact)[:MAX_FACT]
