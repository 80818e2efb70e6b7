"""Steps of made-up peers, from integers alone: the same inputs on every machine, whatever its random numbers are."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from distro_optim.compress import CompressedUpdate, ParamSpec, TilePlan, UpdateRule, make_plan
from distro_optim.compress.engine import BlockEngine
from distro_optim.compress.exact import oracle
from distro_optim.compress.tiling import Tiling

CPU = torch.device("cpu")
LR = 1e-3
GAIN = 1.7


@dataclass(frozen=True)
class Case:
    """What a step is made of.

    Attributes:
        kind: ``"signs"``, ``"values"``, or values whose magnitudes are ``"extreme"``.
        pattern: ``"random"`` positions; ``"all"`` positions alike; ``"pairs"`` of opposite coefficients, whose tiles
            have elements that are exactly 0.
        absent: some contributors say nothing about some tensors.
        update: the rule of a step; with ``"rms"``, times :data:`GAIN`.
    """

    shapes: tuple[tuple[int, ...], ...] = ((70, 40), (40,), (16, 16), ())
    chunk: int = 16
    k: int = 4
    contributors: int = 3
    kind: str = "signs"
    dtype: torch.dtype = torch.float32
    tiling: Tiling = "padded"
    pattern: str = "random"
    absent: bool = True
    seed: int = 0
    update: UpdateRule = "sign"

    def plan(self, arithmetic: Any = "exact") -> TilePlan:
        gain = GAIN if self.update == "rms" else 1.0
        specs = [ParamSpec(shape, self.dtype, CPU, 0, self.chunk, self.k, self.update, gain) for shape in self.shapes]
        return make_plan(specs, self.tiling, arithmetic=arithmetic)

    def updates(self, plan: TilePlan) -> list[CompressedUpdate]:
        generator = np.random.Generator(np.random.PCG64(self.seed))
        return [self._update(plan, generator, number) for number in range(self.contributors)]

    def _update(self, plan: TilePlan, generator: np.random.Generator, number: int) -> CompressedUpdate:
        index, value = [], []
        for batch in plan.batches:
            shape = (batch.tiles, batch.k)
            if self.pattern == "random":
                order = generator.integers(0, 1 << 62, (batch.tiles, batch.tile_size)).argsort(axis=1, kind="stable")
                index.append(order[:, : batch.k])
            else:
                index.append(np.broadcast_to(np.arange(batch.k), shape))
            negative = generator.integers(0, 2, shape, dtype=np.int64) == 1
            if self.pattern == "pairs":
                negative = np.broadcast_to(np.arange(batch.k) % 2 == number % 2, shape)
            value.append(self._values(generator, negative, batch.value_dtype))
        present = tuple(not self.absent or bool(generator.integers(0, 4)) for _ in self.shapes)
        return CompressedUpdate(plan, tuple(torch.tensor(i, dtype=torch.int32) for i in index), tuple(value), present)

    def _values(self, generator: np.random.Generator, negative: npt.NDArray[np.bool_], dtype: torch.dtype) -> Tensor:
        if self.kind == "signs":
            return torch.tensor(negative)
        mantissa = generator.integers(1 << 23, 1 << 24, negative.shape).astype(np.float64) * 2.0**-24
        if self.kind == "extreme":
            low, high = (-24, 16) if dtype == torch.float16 else (-149, 128)
            exponent = generator.integers(low, high, negative.shape)
        else:
            exponent = generator.integers(-6, 2, negative.shape)
        values = np.where(negative, -1.0, 1.0) * mantissa * np.exp2(exponent.astype(np.float64))
        return torch.tensor(values, dtype=torch.float64).to(dtype)

    def weights(self) -> list[Tensor]:
        generator = np.random.Generator(np.random.PCG64(self.seed + 1))
        whole = [generator.integers(-(1 << 15), 1 << 15, shape) for shape in self.shapes]
        return [torch.tensor(w.astype(np.float64) * 2.0**-18).to(self.dtype) for w in map(np.asarray, whole)]


def merged(case: Case, order: Sequence[int] | None = None) -> list[Tensor]:
    """The weights after the step, the contributors being in this order."""
    plan, weights = case.plan(), case.weights()
    updates = case.updates(plan)
    BlockEngine(plan, "dct").merge([updates[n] for n in order or range(len(updates))], weights, lr=[LR])
    return weights


def by_the_oracle(case: Case) -> tuple[list[Tensor], list[Tensor]]:
    """The signs of ``X`` of every tensor, and the weights after the step."""
    plan, weights = case.plan(), case.weights()
    updates = case.updates(plan)
    signs, after = [], []
    double = case.dtype == torch.float64
    for number, (grid, home) in enumerate(zip(plan.grids, plan.home, strict=True)):
        assert home is not None
        start, stop = plan.batches[home].ranges[number]
        parts = [u for u in updates if u.present[number]]
        said = [[_contribution(u.index[home][tile], u.value[home][tile]) for u in parts] for tile in range(start, stop)]
        largest = None
        if case.update == "rms" and case.kind != "signs":  # a tensor has one unit
            largest = max((oracle.largest_exponent(c, double=double) for c in said), default=0)
        squares = 0
        whole = torch.zeros(grid.batch, grid.rows * grid.h, grid.cols * grid.w, dtype=torch.int64)
        for tile in range(start, stop):
            contributions = said[tile - start]
            q = (
                oracle.coefficients_of_signs(contributions)
                if case.kind == "signs"
                else oracle.coefficients_of_values(contributions, double=double, largest=largest)
            )
            squares += sum(v * v for v in q.values())
            x = oracle.decoded(q, grid.h, grid.w)
            matrix, rest = divmod(tile - start, grid.rows * grid.cols)
            row, column = divmod(rest, grid.cols)
            place = whole[matrix, row * grid.h : (row + 1) * grid.h, column * grid.w : (column + 1) * grid.w]
            place.copy_(torch.tensor(x))
        exact = whole[:, : grid.height, : grid.width].reshape(case.shapes[number])
        signs.append(exact.sign())
        if case.update == "sign":
            after.append(stepped(weights[number], exact.sign(), LR))
        else:
            factor = oracle.rms_factor(squares, stop - start, grid.h, grid.w, LR * GAIN, double=double)
            after.append(stepped(weights[number], exact, factor))
    return signs, after


def _contribution(index: Tensor, value: Tensor) -> list[tuple[int, int]]:
    positions = index.tolist()
    if value.dtype == torch.bool:
        return [(p, -1 if negative else 1) for p, negative in zip(positions, value.tolist(), strict=True)]
    double = value.dtype == torch.float64
    return [(p, oracle.float_bits(v, double=double)) for p, v in zip(positions, value.tolist(), strict=True)]


def stepped(weight: Tensor, x: Tensor, factor: float) -> Tensor:
    """``weight - factor * x`` by numpy, and for bfloat16 by whole numbers: not by the operations under test."""
    if weight.dtype == torch.float64:
        return torch.from_numpy(np.asarray(weight.numpy() - factor * x.numpy()))
    step = np.float32(factor) * x.numpy().astype(np.float32)
    exact = np.asarray(weight.to(torch.float32).numpy() - step)
    if weight.dtype == torch.float32:
        return torch.from_numpy(exact)
    if weight.dtype == torch.float16:
        return torch.from_numpy(np.asarray(exact.astype(np.float16)))
    return rounded_to_bfloat16(exact)


def rounded_to_bfloat16(values: npt.NDArray[np.float32]) -> Tensor:
    """To the nearest, ties to even, by the bits."""
    # At least one dimension: numpy 1 takes a number alone for one of any type, and shifts no uint64 by an int.
    bits = np.atleast_1d(values).view(np.uint32).astype(np.uint64)
    upper = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16).reshape(np.shape(values))
    return torch.from_numpy(np.asarray(upper.view(np.int16))).view(torch.bfloat16)


def digest(tensors: Sequence[Tensor]) -> str:
    """SHA-256 over the bits."""
    total = hashlib.sha256()
    for tensor in tensors:
        total.update(tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return total.hexdigest()


SMALL = [
    Case(k=1, contributors=1),
    Case(k=16, contributors=4, seed=1),
    Case(k=4, contributors=3, kind="values", seed=2),
    Case(k=8, contributors=1, kind="values", absent=False, seed=3),
    Case(k=6, contributors=3, kind="extreme", seed=4),
    Case(k=4, contributors=3, kind="extreme", dtype=torch.float64, seed=5),
    Case(k=4, contributors=3, dtype=torch.float64, seed=6),
    Case(k=4, contributors=2, dtype=torch.bfloat16, seed=7),
    Case(k=4, contributors=2, kind="values", dtype=torch.bfloat16, seed=8),
    Case(k=4, contributors=2, kind="extreme", dtype=torch.float16, seed=9),
    Case(k=4, contributors=2, tiling="divisor", seed=10),
    Case(shapes=((12, 14), (3, 6, 6)), k=2, contributors=5, tiling="divisor", seed=11),
    Case(shapes=((16, 16),), k=16, contributors=7, pattern="all", seed=12),
    Case(shapes=((16, 16),), k=16, contributors=2, pattern="pairs", absent=False, seed=13),
    Case(shapes=((64, 64),), chunk=64, k=32, contributors=3, seed=14),
]
"""Small enough for Python's integers."""

BY_RMS = [
    replace(case, update="rms")
    for case in (
        *SMALL,
        Case(shapes=((5, 1), (1, 7), (1,), (9, 15)), chunk=5, k=2, contributors=2, seed=15),
        Case(shapes=((5, 1), (1, 7), (1,), (9, 15)), chunk=5, k=2, contributors=2, kind="values", seed=16),
    )
]
"""The same and others, by steps of a fixed size."""

LARGE = [
    *(
        Case(shapes=((128, 64), (200,)), chunk=chunk, k=k, contributors=contributors, kind=kind, seed=seed)
        for seed, (chunk, k, contributors, kind) in enumerate(
            [
                (64, 1, 1, "signs"),
                (64, 8, 4, "signs"),
                (64, 8, 16, "signs"),
                (64, 64, 4, "values"),
                (64, 64, 16, "signs"),
                (128, 8, 4, "signs"),
                (128, 64, 8, "values"),
                (128, 32, 16, "extreme"),
            ]
        )
    ),
    *(
        Case(shapes=((130, 70),), chunk=64, k=8, contributors=4, kind=kind, dtype=dtype, seed=20)
        for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64)
        for kind in ("signs", "values", "extreme")
    ),
    Case(shapes=((64, 64),), chunk=64, k=2, contributors=256, seed=29),
    # Everybody names all positions, with signs that add up as far as they can; and exact zeros everywhere.
    Case(shapes=((64, 64),), chunk=64, k=64, contributors=256, pattern="all", absent=False, seed=30),
    Case(shapes=((64, 64),), chunk=64, k=64, contributors=2, pattern="pairs", absent=False, seed=31),
    Case(shapes=((64, 64),), chunk=64, k=4096, contributors=3, kind="extreme", seed=32),
    replace(Case(shapes=((64, 64),), chunk=64, k=4096, contributors=1, pattern="all", seed=33), absent=False),
]
"""Large enough for products in several blocks, kernels and ways."""
