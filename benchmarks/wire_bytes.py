"""Bytes that one worker sends in a step: gradients, DeMo's tensors, Psyche's form, and our process group's.

    python benchmarks/wire_bytes.py

Nothing is estimated. A byte-level transformer is trained for some steps on Python sources by four workers, the update
of the last step is encoded in every form, and its length compared with what the format's definition says. Ends with
status 1 if one differs, or if an update does not come back from its bytes as it was.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

# For what is not installed: the model and the data of the examples.
sys.path.insert(0, str(Path(__file__).parents[1]))

import argparse
import math
import zlib

import torch
from examples.byte_data import SourceBytes
from examples.byte_model import ByteTransformer, next_byte_loss
from rich.console import Console
from rich.table import Table

from distro_optim import DisTrO
from distro_optim.comm.memory import MemoryExchange
from distro_optim.compress import CompressedUpdate, TilePlan
from distro_optim.compress.flat import decode_flat, encode_flat
from distro_optim.compress.wire import TransmittableDistroResult, decode_transmittable, encode_transmittable
from distro_optim.optim.rules import PUBLISHED

WORKERS = 4
BATCH_SIZE = 4
LR = 1e-3
SEED = 0
FP32_BYTES, INT64_BYTES, BF16_BYTES = 4, 8, 2
# What the head of a message says, besides the coefficients.
STEP, NONCE, BATCH_ID = 1000, 1000, (64000, 64003)


@dataclass(frozen=True)
class Setting:
    """What is sent of a tile: ``topk`` coefficients, as values or as signs."""

    name: str
    topk: int
    quantize: bool
    overlap: bool


@dataclass(frozen=True)
class Form:
    """A way to write an update.

    Attributes:
        measured: an update as bytes.
        expected: how many they are by the definition of the format, without looking at an update.
        comes_back: the bytes decoded are the update again.
    """

    name: str
    measured: Callable[[CompressedUpdate], bytes]
    expected: Callable[[TilePlan, bool], int]
    comes_back: Callable[[bytes, CompressedUpdate], bool]


def real_update(setting: Setting, steps: int) -> CompressedUpdate:
    """One worker's update after ``steps - 1`` steps of four."""
    data = SourceBytes(seed=SEED)
    torch.manual_seed(SEED)
    models = [ByteTransformer() for _ in range(WORKERS)]
    optimizers = [
        DisTrO(
            model.parameters(),
            lr=LR,
            compression_topk=setting.topk,
            quantize_1bit=setting.quantize,
            overlap=setting.overlap,
            exchange=exchange,
            **PUBLISHED,
        )
        for model, exchange in zip(models, MemoryExchange.group(WORKERS), strict=True)
    ]
    for step in range(steps):
        for worker, (model, optimizer) in enumerate(zip(models, optimizers, strict=True)):
            if worker and step == steps - 1:
                break  # only the first one's last update is looked at
            optimizer.zero_grad()
            next_byte_loss(model, *data.batch(step, worker, BATCH_SIZE)).backward()
            if step < steps - 1:
                optimizer.begin_step()
        if step < steps - 1:
            for optimizer in optimizers:
                optimizer.finish_step()
                if setting.overlap:
                    optimizer.lookahead()
    return optimizers[0].generate()


# -- what the definitions say ------------------------------------------------------------------------------------------


def coefficients(plan: TilePlan) -> list[int]:
    """Of each tensor."""
    return [grid.tiles * k for grid, k in zip(plan.grids, plan.topk, strict=True)]


def index_bytes(tile_size: int) -> int:
    """Of one index in Psyche's form: the smallest of 1, 2 and 4 that holds it."""
    return 1 if tile_size <= 1 << 8 else 2 if tile_size <= 1 << 16 else 4


def demo_size(plan: TilePlan, quantized: bool) -> int:
    """bloc97/DeMo ``demo.py``: int64 indices and float32 values, gathered tensor by tensor without any head."""
    return sum(coefficients(plan)) * (INT64_BYTES + FP32_BYTES)


def data_size(plan: TilePlan, quantized: bool, *, bits_packed_per: Sequence[Sequence[int]]) -> int:
    """Indices and values; signs are packed over each group of tensors in ``bits_packed_per``."""
    counts = coefficients(plan)
    indices = sum(n * index_bytes(grid.tile_size) for n, grid in zip(counts, plan.grids, strict=True))
    if quantized:
        return indices + sum(math.ceil(sum(counts[n] for n in group) / 8) for group in bits_packed_per)
    return indices + sum(counts) * FP32_BYTES


def varint_size(value: int) -> int:
    """postcard: 7 bits a byte."""
    return max(1, math.ceil(value.bit_length() / 7))


def psyche_size(plan: TilePlan, quantized: bool) -> int:
    """PsycheFoundation/psyche ``TransmittableDistroResult``: per tensor two tensors with their shapes, ``xshape`` and
    ``totalk``; a head with the step, the nonce and the batch."""
    head = sum(map(varint_size, (STEP, NONCE, *BATCH_ID, len(plan))))
    for grid, k in zip(plan.grids, plan.topk, strict=True):
        shape = grid.coded_shape
        rows = shape[:-1] if len(shape) == 2 else shape[:-2]
        count, width = grid.tiles * k, index_bytes(grid.tile_size)
        value_bytes = math.ceil(count / 8) if quantized else count * FP32_BYTES
        for dims, size in (((*rows, k * width), count * width), ((*rows, k), value_bytes)):
            head += varint_size(len(dims)) + sum(varint_size(2 * d) for d in dims)  # zigzag doubles a positive number
            head += 3 + varint_size(size)  # kind, requires_grad, variant of data
        head += varint_size(len(shape)) + sum(map(varint_size, shape)) + varint_size(grid.tile_size)
    return head + data_size(plan, quantized, bits_packed_per=[[n] for n in range(len(plan))])


def flat_size(plan: TilePlan, quantized: bool) -> int:
    """``distro_optim.compress.flat``: format, kind, hash of the plan, which tensors, then the data of each batch."""
    head = 1 + 1 + 32 + math.ceil(len(plan) / 8)
    return head + data_size(plan, quantized, bits_packed_per=[list(b.ranges) for b in plan.batches])


def floor_size(plan: TilePlan) -> int:
    """No code for signs is shorter on average, if any ``k`` positions of a tile are as likely as any other."""
    bits = sum(g.tiles * (math.log2(math.comb(g.tile_size, k)) + k) for g, k in zip(plan.grids, plan.topk, strict=True))
    return math.ceil(bits / 8)


# -- what is really written --------------------------------------------------------------------------------------------


def demo_bytes(update: CompressedUpdate) -> bytes:
    parts = []
    for entry in update.tensors():
        parts += [entry.index.to(torch.int64).numpy().tobytes(), entry.value.to(torch.float32).numpy().tobytes()]
    return b"".join(parts)


def demo_comes_back(data: bytes, update: CompressedUpdate) -> bool:
    entries = []
    for entry in update.tensors():
        at, count = entry.index.shape, entry.index.numel()
        index, data = data[: count * INT64_BYTES], data[count * INT64_BYTES :]
        value, data = data[: count * FP32_BYTES], data[count * FP32_BYTES :]
        entries.append(
            replace(
                entry,
                index=torch.frombuffer(bytearray(index), dtype=torch.int64).view(at),
                value=torch.frombuffer(bytearray(value), dtype=torch.float32).view(at),
            )
        )
    return same(CompressedUpdate.from_tensors(update.plan, entries), update)


def psyche_bytes(update: CompressedUpdate) -> bytes:
    return encode_transmittable(
        TransmittableDistroResult.from_update(update, step=STEP, trainer_nonce=NONCE, batch_id=BATCH_ID)
    )


def same(a: CompressedUpdate, b: CompressedUpdate) -> bool:
    return a.present == b.present and all(map(torch.equal, (*a.index, *a.value), (*b.index, *b.value)))


FORMS = {
    "demo": Form("int64 + float32", demo_bytes, demo_size, demo_comes_back),
    "psyche": Form(
        "Psyche's form",
        psyche_bytes,
        psyche_size,
        lambda data, update: same(decode_transmittable(data).to_update(update.plan), update),
    ),
    "flat": Form(
        "flat form",
        encode_flat,
        flat_size,
        lambda data, update: same(decode_flat(data, update.plan), update),
    ),
}
DEMO = Setting("DeMo k=32 values", topk=32, quantize=False, overlap=False)
DEMO_SIGNS = Setting("DeMo k=32 signs", topk=32, quantize=True, overlap=False)
DISTRO = Setting("DisTrO k=8 signs", topk=8, quantize=True, overlap=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=12, help="of training, before an update is measured")
    args = parser.parse_args()
    torch.set_num_threads(1)
    console = Console(width=None if sys.stdout.isatty() else 120)
    parameters = sum(p.numel() for p in ByteTransformer().parameters())
    gradients = parameters * BF16_BYTES

    table = Table(title=f"Bytes sent by each of {WORKERS} workers in a step; {parameters:,} parameters")
    for heading in ("sent", "form", "bytes", "by definition", "after zlib", "bits/parameter", "below bf16"):
        table.add_column(heading, justify="left" if heading in ("sent", "form") else "right")

    def add(what: str, form: str, size: int, expected: str, squeezed: str) -> None:
        table.add_row(
            what, form, f"{size:,}", expected, squeezed, f"{8 * size / parameters:.4f}", f"{gradients / size:,.1f}x"
        )

    add("gradients", "float32", parameters * FP32_BYTES, "-", "-")
    add("gradients", "bfloat16", gradients, "-", "-")
    wrong = []
    for setting, forms in (
        (DEMO, ("demo", "psyche", "flat")),
        (DEMO_SIGNS, ("psyche", "flat")),
        (DISTRO, ("psyche", "flat")),
    ):
        table.add_section()
        update = real_update(setting, args.steps)
        for form in (FORMS[f] for f in forms):
            data = form.measured(update)
            expected = form.expected(update.plan, update.quantized)
            if len(data) != expected:
                wrong.append(f"{setting.name}, {form.name}: {len(data)} bytes, by definition {expected}")
            if not form.comes_back(data, update):
                wrong.append(f"{setting.name}, {form.name}: the decoded update is another")
            add(setting.name, form.name, len(data), f"{expected:,}", f"{len(zlib.compress(data, 9)):,}")
        if update.quantized:
            add(setting.name, "(floor)", floor_size(update.plan), "-", "-")
    console.print(table)
    console.print(
        "flat form: what DisTrO sends on a process group. floor: if any positions in a tile are equally likely.\n"
        "A ring passes gradients around twice, in pieces: 1.5 times these bytes leave each of 4 workers; of updates, "
        "which every worker needs whole, 3 times."
    )
    for line in wrong:
        console.print(f"[red]wrong:[/red] {line}")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
