"""A step of made-up peers by the compiled kernels: its weights as a hash, for processes of many kinds.

python tests/compress/fast_step.py            # in this process
python tests/compress/fast_step.py --fork     # here, and then in a fork of this process
python tests/compress/fast_step.py --spawn    # in a new process that this one starts
"""

from __future__ import annotations

import hashlib
import multiprocessing
import sys
from typing import Any

import numpy as np
import torch
from torch import Tensor

from distro_optim.compress import CompressedUpdate, ParamSpec, TilePlan, make_plan
from distro_optim.compress.engine import BlockEngine
from distro_optim.compress.tiling import Tiling
from distro_optim.optim.workers import Workers

SHAPES: tuple[tuple[int, ...], ...] = ((130, 70), (128, 64), (43, 64), (70,), (64, 86), (3, 5))


def plan_of(shapes: tuple[tuple[int, ...], ...], k: int = 8, *, tiling: Tiling = "padded", chunk: int = 64) -> TilePlan:
    """Of float32 tensors on the CPU."""
    specs = [ParamSpec(shape, torch.float32, torch.device("cpu"), 0, chunk, k) for shape in shapes]
    return make_plan(specs, tiling, arithmetic="exact")


def updates_of(
    plan: TilePlan, peers: int, kind: str, *, absent: bool = True, crowded: bool = False
) -> list[CompressedUpdate]:
    """What some peers could send.

    Args:
        plan: of the tensors.
        peers: their number.
        kind: ``signs``, ``values``, or values that are ``extreme``: from subnormal numbers to the largest.
        absent: some say nothing about some tensors.
        crowded: all name the same positions, so that means and sums cancel out.
    """
    r = np.random.default_rng(peers)
    updates = []
    for peer in range(peers):
        index, value = [], []
        for b in plan.batches:
            shape = b.tiles, b.k
            order = r.random((b.tiles, b.tile_size)).argsort(1)[:, : b.k]
            signs = r.random(shape) < 0.5
            if crowded:
                order = np.broadcast_to(np.arange(b.k), shape)
                signs = np.broadcast_to((np.arange(b.k) + peer) % 2 == 0, shape)
            size = np.exp2(r.uniform(-148, 127, shape)) if kind == "extreme" else r.random(shape) + 0.5
            numbers = np.where(signs, -size, size).astype(np.float32)
            index.append(torch.from_numpy(np.ascontiguousarray(order, np.int32)))
            value.append(torch.from_numpy(signs.copy() if kind == "signs" else numbers))
        present = tuple(not absent or bool(r.random() < 0.75) for _ in plan.specs)
        updates.append(CompressedUpdate(plan, tuple(index), tuple(value), present))
    return updates


def weights_after(plan: TilePlan, updates: list[CompressedUpdate]) -> list[Tensor]:
    """Of tensors that took them, in two threads."""
    r = np.random.default_rng(7)
    params = [torch.from_numpy(r.standard_normal(s.shape).astype(np.float32)) for s in plan.specs]
    workers = Workers(2)
    BlockEngine(plan, "dct", workers.run, workers.count).merge(updates, params, lr=[1e-3])
    return params


def digest() -> str:
    """Of the weights after signs and values of five peers."""
    plan, found = plan_of(SHAPES), hashlib.sha256()
    for kind in ("signs", "values"):
        for param in weights_after(plan, updates_of(plan, 5, kind)):
            found.update(param.numpy().tobytes())
    return found.hexdigest()


def _tell(where: Any) -> None:
    where.put(digest())


def main(how: str) -> None:
    if how != "--spawn":
        print(digest())
    if how:
        context: Any = multiprocessing.get_context(how.removeprefix("--"))
        where = context.SimpleQueue()
        process = context.Process(target=_tell, args=(where,))
        process.start()
        process.join(240)
        if process.exitcode != 0:
            raise SystemExit(f"the other process ended with {process.exitcode}")
        print(where.get())


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else "")
