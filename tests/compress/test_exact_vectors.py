"""The test vectors of ``docs/exact.md``: steps written down once, for us and for other implementations.

``python -m compress.test_exact_vectors`` in ``tests/``, with ``src`` on the path, writes them again, by the oracle.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from distro_optim.compress import CompressedUpdate, ParamSpec, make_plan
from distro_optim.compress.engine import BlockEngine

from .exact_cases import CPU, GAIN, LR, Case, by_the_oracle, digest

FOLDER = Path(__file__).parents[1] / "vectors" / "exact"

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "float64": torch.float64}

CASES = [
    Case(shapes=((8, 8),), chunk=8, k=3, contributors=1, absent=False, seed=1),
    Case(shapes=((8, 8),), chunk=8, k=8, contributors=4, absent=False, seed=2),
    Case(shapes=((10, 6), (5,)), chunk=4, k=3, contributors=3, seed=3),
    Case(shapes=((10, 6), (5,)), chunk=4, k=3, contributors=3, tiling="divisor", seed=4),
    Case(shapes=((6, 6),), chunk=6, k=4, contributors=2, kind="values", absent=False, seed=5),
    Case(shapes=((6, 6),), chunk=6, k=5, contributors=3, kind="extreme", absent=False, seed=6),
    Case(shapes=((6, 6),), chunk=6, k=4, contributors=2, dtype=torch.bfloat16, absent=False, seed=7),
    Case(shapes=((6, 6),), chunk=6, k=4, contributors=2, kind="values", dtype=torch.float16, absent=False, seed=8),
    Case(shapes=((4, 4),), chunk=4, k=3, contributors=2, kind="extreme", dtype=torch.float64, absent=False, seed=9),
    Case(shapes=((8, 8),), chunk=8, k=8, contributors=2, pattern="pairs", absent=False, seed=10),
]

FILES = {"steps.json": CASES, "rms_steps.json": [replace(case, update="rms") for case in CASES]}


def bits(tensor: torch.Tensor) -> list[str]:
    """Each element's bits in hex, most significant digit first."""
    size = tensor.element_size()
    integers = tensor.contiguous().view(-1).view({2: torch.int16, 4: torch.int32, 8: torch.int64}[size])
    return [f"{number & ((1 << 8 * size) - 1):0{2 * size}x}" for number in integers.tolist()]


def tensor_of(texts: list[str], dtype: torch.dtype) -> torch.Tensor:
    size = len(texts[0]) // 2
    numbers = [int(text, 16) for text in texts]
    signed = [number - (1 << 8 * size) if number >> (8 * size - 1) else number for number in numbers]
    return torch.tensor(signed, dtype={2: torch.int16, 4: torch.int32, 8: torch.int64}[size]).view(dtype)


def written(case: Case) -> dict[str, Any]:
    plan, (signs, after) = case.plan(), by_the_oracle(case)
    name = next(name for name, dtype in DTYPES.items() if dtype == case.dtype)
    contributors: list[list[Any]] = []
    for update in case.updates(plan):
        entries: list[Any] = []
        for number, entry in enumerate(update.tensors()):
            k = plan.topk[number]
            if not update.present[number]:
                entries.append(None)
                continue
            value = entry.value
            signs_or_bits = value.view(-1).int().tolist() if value.dtype == torch.bool else bits(value)
            rows = [signs_or_bits[n : n + k] for n in range(0, len(signs_or_bits), k)]
            entries.append({"index": entry.index.reshape(-1, k).tolist(), "value": rows})
        contributors.append(entries)
    rule = {"update": "rms", "gain": GAIN} if case.update == "rms" else {}
    return {
        **rule,
        "dtype": name,
        "tiling": case.tiling,
        "compression_chunk": case.chunk,
        "lr": LR,
        "shapes": [list(shape) for shape in case.shapes],
        "tiles": [[grid.h, grid.w] for grid in plan.grids],
        "contributors": contributors,
        "signs": [sign.reshape(-1).tolist() for sign in signs],
        "before": [bits(weight) for weight in case.weights()],
        "after": [bits(weight) for weight in after],
        "sha256": digest(after),
    }


def read(file: str) -> list[dict[str, Any]]:
    content: list[dict[str, Any]] = json.loads((FOLDER / file).read_text())
    return content


@pytest.mark.parametrize("file", FILES)
@pytest.mark.parametrize("number", range(len(CASES)))
def test_a_step_that_is_written_down_comes_out_again(number: int, file: str) -> None:
    """From the file alone: what stands there is all that another implementation needs."""
    vector = read(file)[number]
    dtype = DTYPES[vector["dtype"]]
    shapes = [tuple(shape) for shape in vector["shapes"]]
    k = max(len(e["index"][0]) for update in vector["contributors"] for e in update if e is not None)
    rule = vector.get("update", "sign"), vector.get("gain", 1.0)
    specs = [ParamSpec(shape, dtype, CPU, 0, vector["compression_chunk"], k, *rule) for shape in shapes]
    plan = make_plan(specs, vector["tiling"], arithmetic="exact")
    assert [[grid.h, grid.w] for grid in plan.grids] == vector["tiles"]
    weights = [tensor_of(w, dtype).view(shape) for w, shape in zip(vector["before"], shapes, strict=True)]
    quantized = isinstance(next(e for e in vector["contributors"][0] if e is not None)["value"][0][0], int)
    updates = []
    for entries in vector["contributors"]:
        update = CompressedUpdate.empty(plan, quantized=quantized)
        for tensor, entry in enumerate(entries):
            home = plan.home[tensor]
            assert home is not None
            start, stop = plan.batches[home].ranges[tensor]
            if entry is not None:
                update.index[home][start:stop] = torch.tensor(entry["index"], dtype=torch.int32)
                flat = [v for row in entry["value"] for v in row]
                value = torch.tensor(flat, dtype=torch.bool) if quantized else tensor_of(flat, dtype)
                update.value[home][start:stop] = value.view(stop - start, -1)
        updates.append(CompressedUpdate(plan, update.index, update.value, tuple(e is not None for e in entries)))
    engine = BlockEngine(plan, "dct")
    for decoded, signs in zip(engine.decode(updates), vector["signs"], strict=True):
        assert decoded.sign().int().view(-1).tolist() == signs
    engine.merge(updates, weights, lr=[vector["lr"]])
    assert [bits(weight) for weight in weights] == vector["after"]
    assert digest(weights) == vector["sha256"]


@pytest.mark.parametrize("file", FILES)
def test_the_file_is_what_the_oracle_writes(file: str) -> None:
    assert read(file) == [written(case) for case in FILES[file]]


if __name__ == "__main__":
    for name, cases in FILES.items():
        (FOLDER / name).write_text("[\n" + ",\n".join(json.dumps(written(case)) for case in cases) + "\n]\n")
