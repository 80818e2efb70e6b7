"""One suite for all engines: what a step picks, what stays in the momentum, what becomes of the weights.

Weights come out with the same bits from all of them, those of the plain definition. What a peer sends is its own:
there an engine may round in its own way, and is held against sums in float64.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor

from compress.exact_cases import LR, Case, by_the_oracle, digest
from distro_optim.compress import OwnPart, ParamSpec, TilePlan, compute_dtype, make_plan
from distro_optim.compress.dct import dct_basis
from distro_optim.compress.engine import Engine, EngineName, Intake, make_engine
from distro_optim.compress.tiling import Tiling
from distro_optim.errors import ConfigurationError
from engines.conftest import PROFILES

CPU = torch.device("cpu")


@dataclass(frozen=True)
class Arena:
    """An engine, and where its tensors lie."""

    name: EngineName
    device: torch.device

    def engine(self, plan: TilePlan) -> Engine:
        try:
            return make_engine(self.name, plan, "dct")
        except ConfigurationError as error:
            pytest.skip(str(error))

    def put(self, tensors: list[Any]) -> list[Any]:
        return [None if tensor is None else tensor.to(self.device) for tensor in tensors]


@pytest.fixture(params=["blocks, as a CPU", "blocks, as a GPU", "blocks, as Apple's", "triton, interpreted", "triton"])
def arena(request: pytest.FixtureRequest, work: Callable[[Any], None]) -> Arena:
    kind, _, way = request.param.partition(", ")
    if kind == "blocks":
        work(PROFILES[way])
        return Arena("torch", CPU)
    if way:
        if os.environ.get("TRITON_INTERPRET") != "1":
            pytest.skip("Triton's interpreter is chosen before it is imported: TRITON_INTERPRET=1")
        return Arena("triton", CPU)
    if not torch.cuda.is_available():
        pytest.skip("no GPU")
    return Arena("triton", torch.device("cuda"))


# -- coefficients to weights -------------------------------------------------------------------------------------------

MERGES = [
    Case(k=1, contributors=1),
    Case(k=8, contributors=1, kind="values", absent=False, seed=3),
    Case(k=16, contributors=4, seed=1),
    Case(k=4, contributors=3, kind="values", seed=2),
    Case(k=6, contributors=3, kind="extreme", seed=4),
    Case(k=4, contributors=2, dtype=torch.bfloat16, seed=7),
    Case(k=4, contributors=2, kind="values", dtype=torch.bfloat16, seed=8),
    Case(k=4, contributors=2, kind="extreme", dtype=torch.float16, seed=9),
    Case(shapes=((12, 14), (3, 6, 6)), k=2, contributors=5, tiling="divisor", seed=11),
    Case(shapes=((43, 13), (29,)), chunk=43, k=5, contributors=2, seed=17),
    Case(shapes=((16, 16), (16,)), k=16, contributors=7, pattern="all", seed=12),
    Case(shapes=((16, 16),), k=16, contributors=2, pattern="pairs", absent=False, seed=13),
    Case(shapes=((64, 64),), chunk=64, k=64, contributors=2, seed=14),
    Case(shapes=((20, 20),), k=3, contributors=64, seed=15),
]


@pytest.fixture(scope="module")
def expected() -> dict[Case, str]:
    return {case: digest(by_the_oracle(case)[1]) for case in MERGES}


@pytest.mark.parametrize("case", MERGES, ids=lambda case: f"{case.contributors}x{case.k}-{case.kind}-{case.seed}")
def test_weights_are_those_of_the_definition_in_every_bit(arena: Arena, case: Case, expected: dict[Case, str]) -> None:
    here = case.plan()
    plan = make_plan(
        [replace(spec, device=arena.device) for spec in here.specs], case.tiling, arithmetic=here.arithmetic
    )
    engine, updates = arena.engine(plan), case.updates(here)
    for order in ([*range(len(updates))], [*reversed(range(len(updates)))]):
        weights = arena.put(case.weights())
        versions = [weight._version for weight in weights]
        engine.merge(engine.upload([updates[n] for n in order]), weights, lr=[LR])
        assert digest([weight.cpu() for weight in weights]) == expected[case]
        assert all(weight._version > before for weight, before in zip(weights, versions, strict=True))
    engine.merge([], weights, lr=[LR])
    assert digest([weight.cpu() for weight in weights]) == expected[case]


# -- gradients to coefficients -----------------------------------------------------------------------------------------

SHAPES = ((40, 70), (40,), (16, 16), (), (9, 5, 3), (33,))
DECAY, RATE = 0.9, 0.25


@dataclass(frozen=True)
class Setting:
    """How gradients are taken in."""

    dtype: torch.dtype = torch.float32
    tiling: Tiling = "padded"
    k: int = 4
    quantize: bool = True
    overlap: bool = True
    chunk: int = 16


SETTINGS = [
    Setting(),
    Setting(quantize=False),
    Setting(overlap=False),
    Setting(overlap=False, quantize=False),
    Setting(dtype=torch.bfloat16),
    Setting(dtype=torch.bfloat16, quantize=False),
    Setting(tiling="divisor"),
    Setting(k=64),
    Setting(chunk=43, k=9, quantize=False),
]


class Peer:
    """Momentum and what was sent, of one peer; and its twin in float64.

    What the engine rounds differently from one step to the next is not held against it: the twin begins each step where
    the engine is.
    """

    def __init__(self, arena: Arena, setting: Setting) -> None:
        self.arena, self.setting = arena, setting
        self.plan = make_plan(
            [ParamSpec(shape, setting.dtype, arena.device, 0, setting.chunk, setting.k) for shape in SHAPES],
            setting.tiling,
            arithmetic="exact",
        )
        self.engine = arena.engine(self.plan)
        compute = compute_dtype(setting.dtype)
        make: dict[str, Any] = {"device": arena.device}
        self.momenta = [torch.zeros(shape, dtype=compute, **make) for shape in SHAPES]
        self.own = [
            OwnPart(
                torch.zeros(grid.tiles, k, dtype=torch.int32, **make),
                torch.zeros(grid.tiles, k, dtype=compute, **make),
            )
            for grid, k in zip(self.plan.grids, self.plan.topk, strict=True)
        ]

    def step(self, grads: list[Tensor | None], *, rate: float = RATE, **beside: Any) -> Any:
        intake = Intake(
            self.arena.put(grads),
            self.momenta,
            in_coefficients=[False] * len(SHAPES),
            lr=[rate],
            decay=[DECAY],
            quantize=self.setting.quantize,
            own=self.own if self.setting.overlap else None,
            **beside,
        )
        return self.engine.download(self.engine.extract(intake))

    def tiles(self, tensor: Tensor, number: int) -> Tensor:
        """``(tiles, h, w)`` in float64, 0 beyond the edges."""
        batch, _, rows = self._place(number)
        out = torch.zeros(len(rows), batch.h, batch.w, dtype=torch.float64)
        flat = tensor.detach().cpu().double().reshape(-1)
        for row, (_, offset, distance, height, width, at) in enumerate(batch.places[rows].tolist()):
            window = flat.as_strided((height, width), (distance, 1), offset)
            out[at if len(rows) == len(out) else row, :height, :width] = window
        return out

    def _place(self, number: int) -> tuple[Any, int, range]:
        home = self.plan.home[number]
        assert home is not None
        batch = self.plan.batches[home]
        return batch, home, range(*batch.ranges[number])

    def coefficients(self, tiles: Tensor, number: int) -> Tensor:
        batch, _, _ = self._place(number)
        fh, fw = (dct_basis(n, torch.float64, CPU) for n in (batch.h, batch.w))
        return (fh.T @ tiles @ fw).flatten(1)

    def decoded(self, index: Tensor, value: Tensor, number: int) -> Tensor:
        batch, _, _ = self._place(number)
        fh, fw = (dct_basis(n, torch.float64, CPU) for n in (batch.h, batch.w))
        dense = torch.zeros(len(index), batch.h * batch.w, dtype=torch.float64)
        dense.scatter_(1, index.cpu().long(), value.cpu().double())
        return fh @ dense.view(-1, batch.h, batch.w) @ fw.T

    def inside(self, number: int) -> Tensor:
        return self.tiles(torch.ones(SHAPES[number]), number)


def gradients(setting: Setting, seed: int) -> list[Tensor | None]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator).to(setting.dtype) for shape in SHAPES]


@pytest.mark.parametrize("setting", SETTINGS, ids=str)
def test_a_step_sends_the_largest_coefficients_and_keeps_the_rest(arena: Arena, setting: Setting) -> None:
    peer = Peer(arena, setting)
    for step in range(3):
        grads = gradients(setting, step)
        silent = step  # another tensor each time has no gradient
        grads[silent] = None
        before = [peer.tiles(momentum, n) for n, momentum in enumerate(peer.momenta)]
        leaving = [peer.decoded(part.index, part.value, n) * peer.inside(n) for n, part in enumerate(peer.own)]
        update = peer.step(grads)
        assert update.present == tuple(n != silent for n in range(len(SHAPES)))
        for number, grad in enumerate(grads):
            left = before[number] - (leaving[number] if setting.overlap else 0)
            momentum = peer.tiles(peer.momenta[number], number)
            if grad is None:
                torch.testing.assert_close(momentum, left, rtol=1e-5, atol=1e-5)
                assert not setting.overlap or not bool(peer.own[number].value.any())
                continue
            wanted = DECAY * left + RATE * peer.tiles(grad, number)
            _, home, rows = peer._place(number)
            index, value = update.index[home][rows.start : rows.stop], update.value[home][rows.start : rows.stop]
            exact = peer.coefficients(wanted, number)
            k = peer.plan.topk[number]
            assert all(len(set(row)) == k and min(row) >= 0 and max(row) < exact.shape[1] for row in index.tolist())
            chosen = exact.gather(1, index.long())
            # No smaller than the k-th largest, but for rounding.
            bound = exact.abs().topk(k, dim=1).values[:, -1:]
            assert bool((chosen.abs() >= bound - 1e-5).all())
            certain = chosen.abs() > 1e-5
            if setting.quantize:
                assert value.dtype == torch.bool
                assert bool(((chosen < 0) == value)[certain].all())
            else:
                precision = 1e-5 if setting.dtype == torch.float32 else 1e-2
                torch.testing.assert_close(value.double(), chosen, rtol=precision, atol=precision)
            if setting.overlap:
                own = peer.own[number]
                assert torch.equal(own.index.cpu(), index)
                sent = own.value.cpu().double()
                assert setting.quantize or torch.equal(sent, value.double())
                torch.testing.assert_close(sent, chosen, rtol=1e-2, atol=1e-2 if not setting.quantize else 1e-5)
                torch.testing.assert_close(momentum, wanted, rtol=1e-5, atol=1e-5)
            else:
                sent = chosen if setting.quantize else value.double()
                rest = wanted - peer.decoded(index, sent, number) * peer.inside(number)
                torch.testing.assert_close(momentum, rest, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("quantize", [True, False], ids=["signs", "values"])
def test_of_equals_any_are_taken_and_of_nothing_no_sign(arena: Arena, quantize: bool) -> None:
    peer = Peer(arena, Setting(quantize=quantize))
    grads: list[Tensor | None] = [torch.zeros(shape) for shape in SHAPES]
    grads[2] = torch.ones(SHAPES[2])  # one coefficient, and zeros that are all alike
    corner = torch.zeros(SHAPES[0])
    corner[0, 0] = 1.0  # a tile whose coefficients come in pairs, and others of zeros
    grads[0] = corner
    update = peer.step(grads)
    spoken = {0, 2} if quantize else set(range(len(SHAPES)))
    assert {n for n, present in enumerate(update.present) if present} == spoken
    for batch, index, value in zip(peer.plan.batches, update.index, update.value, strict=True):
        assert all(len(set(row)) == batch.k for row in index.tolist())
        assert int(index.min()) >= 0
        assert int(index.max()) < batch.tile_size
        assert quantize or bool(value.isfinite().all())
    _, home, rows = peer._place(2)
    assert 0 in update.index[home][rows.start].tolist()
    assert all(bool(momentum.isfinite().all()) for momentum in peer.momenta)


def test_what_only_a_device_knows_of_gradients_counts_as_if_the_host_knew_it(arena: Arena) -> None:
    peer, twin = (Peer(arena, Setting(chunk=64)) for _ in range(2))
    if not peer.engine.defers:
        assert peer.engine.finite(arena.put(gradients(peer.setting, 0))) is None
        return
    for seed in range(2):  # in the first step the host looks all the same
        grads = gradients(peer.setting, seed)
        grads[4][0, 0, 0] = torch.inf  # type: ignore[index]
        grads[3] = None
        usable = peer.engine.finite(arena.put(grads))
        assert usable is not None
        assert usable.tolist() == [1, 1, 1, 0, 0, 1]
        scale = torch.tensor(4.0, device=arena.device)
        update = peer.step(grads, rate=4 * RATE, usable=usable, scale=scale)
        grads[4] = None
        known = twin.step(grads)
        assert update.present == known.present == (True, True, True, False, False, True)
        for number, present in enumerate(update.present):
            _, home, rows = peer._place(number)
            place = slice(rows.start, rows.stop)
            if present:
                assert torch.equal(update.index[home][place], known.index[home][place])
                assert torch.equal(update.value[home][place], known.value[home][place])
            assert torch.equal(peer.momenta[number], twin.momenta[number])


# -- the lookahead -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("whole", [False, True], ids=["signs", "directions"])
def test_weights_look_ahead_and_come_back_bit_for_bit(arena: Arena, dtype: torch.dtype, whole: bool) -> None:
    generator = torch.Generator().manual_seed(1)
    shapes = [*SHAPES, (300, 300)]
    true = [torch.randn(shape, generator=generator).to(dtype) for shape in shapes]
    directions = [torch.randn(shape, generator=generator) for shape in shapes]
    directions[2][3] = 0.0
    true[0] = true[0].t().contiguous().t()  # in another order
    params, saved = arena.put([weight.clone() for weight in true]), arena.put([torch.empty_like(w) for w in true])
    plan = make_plan([ParamSpec(s, dtype, arena.device, 0, 16, 4) for s in shapes], "padded", arithmetic="exact")
    rates = [0.01 * (1 + n % 2) for n in range(len(shapes))]
    arena.engine(plan).shift(params, arena.put(directions), saved, rates, [whole] * len(shapes))
    for weight, direction, rate, kept, ahead in zip(true, directions, rates, saved, params, strict=True):
        assert torch.equal(kept.cpu(), weight)
        wanted = weight.clone().add_(direction if whole else direction.sign(), alpha=-rate)
        if whole:
            torch.testing.assert_close(ahead.cpu(), wanted)
        else:
            assert torch.equal(ahead.cpu(), wanted)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_merge_that_looks_ahead_is_a_merge_and_a_lookahead_or_nothing(arena: Arena, dtype: torch.dtype) -> None:
    peer = Peer(arena, Setting(dtype=dtype, chunk=64))
    engine = peer.engine
    updates = engine.upload([peer.step(gradients(peer.setting, seed)) for seed in range(2)])
    true = [torch.randn(shape, generator=torch.Generator().manual_seed(5)).to(dtype) for shape in SHAPES]
    weights, ahead = arena.put([weight.clone() for weight in true]), arena.put([w.clone() for w in true])
    frozen = 2
    shifted = [None if n == frozen else weight for n, weight in enumerate(ahead)]
    versions = [weight._version for weight in (*weights, *ahead)]
    done = engine.merge_ahead(updates, weights, shifted, lr=[LR], ahead_lr=[0.02])
    assert done == engine.merges_ahead
    twins, saved = arena.put([w.clone() for w in true]), arena.put([torch.empty_like(w) for w in true])
    if done:
        engine.merge(updates, twins, lr=[LR])
        engine.shift(twins, peer.momenta, saved, [0.0 if n == frozen else 0.02 for n in range(len(true))], [False] * 6)
        twins[frozen] = arena.put(true)[frozen]
        changed = [weight._version for weight in (*weights, *ahead)]
        assert [n for n, (a, b) in enumerate(zip(versions, changed, strict=True)) if a == b] == [len(true) + frozen]
    else:
        saved = arena.put(true)
    assert all(map(torch.equal, weights, saved))
    assert all(map(torch.equal, ahead, twins))


def test_kernels_take_weights_and_the_next_lookahead_in_one_pass(arena: Arena) -> None:
    plan = make_plan([ParamSpec((16, 16), torch.float32, arena.device, 0, 16, 4)], "padded", arithmetic="exact")
    assert arena.engine(plan).merges_ahead == (arena.name == "triton")
