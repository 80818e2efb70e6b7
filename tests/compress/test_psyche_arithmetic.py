"""Updates are merged as Psyche's clients merge them, to the last bit."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from torch import Tensor

from distro_optim.compress import CompressedUpdate, ParamSpec, TilePlan, make_plan
from distro_optim.compress.dct import dct_basis
from distro_optim.compress.engine import BlockEngine
from distro_optim.compress.psyche import inverse_basis, nearly_zero
from distro_optim.errors import ConfigurationError
from reference import psyche_merge as literal

CPU = torch.device("cpu")
SHAPES = [
    (64,),
    (16,),
    (5,),
    (1,),
    (176, 64),
    (64, 176),
    (3, 64, 44),
    (7, 13),
    (4, 4),
    (2, 3, 5, 6),
    (44, 44),
    (1, 64),
    (64, 1),
]
LR = 1e-3

in_order = partial(literal.decode_by_product, product=literal.product_in_order)


def make_psyche_plan(dtype: torch.dtype, chunk: int, k: int, shapes: Sequence[tuple[int, ...]] = SHAPES) -> TilePlan:
    return make_plan([ParamSpec(s, dtype, CPU, 0, chunk, k) for s in shapes], "divisor", arithmetic="psyche")


def some_update(plan: TilePlan, kind: str, generator: torch.Generator) -> CompressedUpdate:
    """Of signs or values; in a few columns, or at low frequencies, where many share a position."""
    update = CompressedUpdate.empty(plan, quantized=kind != "values" and kind != "no numbers")
    for batch, index, value in zip(plan.batches, update.index, update.value, strict=True):
        chance = torch.rand(batch.tiles, batch.tile_size, generator=generator)
        place = torch.arange(batch.tile_size)
        if kind == "crowded":
            chance -= (place % batch.w % 3) * 2.0
        elif kind == "low":
            chance -= (place % batch.w + place // batch.w) * 0.2
        index.copy_(chance.topk(batch.k, 1).indices)
        if update.quantized:
            value.copy_(torch.rand(value.shape, generator=generator) < 0.5)
            continue
        numbers = torch.randn(value.shape, generator=generator)
        numbers *= torch.exp2(torch.randint(-12, 12, value.shape, generator=generator))
        if kind == "no numbers":
            chance = torch.rand(value.shape, generator=generator)
            numbers[chance < 0.02], numbers[chance > 0.98] = math.inf, -math.inf
            numbers[(chance > 0.5) & (chance < 0.505)] = math.nan
        value.copy_(numbers)
    return CompressedUpdate(plan, update.index, update.value, (True,) * len(plan))


def some_params(dtype: torch.dtype, generator: torch.Generator) -> list[Tensor]:
    params = [torch.randn(s, generator=generator).mul_(0.02).to(dtype) for s in SHAPES]
    for param in params:
        param[param.abs() < 1e-3] = -0.0
    return params


def assert_same_bits(ours: list[Tensor], theirs: list[Tensor]) -> None:
    for shape, a, b in zip(SHAPES, ours, theirs, strict=True):
        assert torch.equal(a.view(torch.int16), b.view(torch.int16)), f"{shape}: {int((a != b).sum())} weights differ"


@pytest.mark.parametrize("kind", ["signs", "crowded", "low", "values", "no numbers"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("parts", "chunk", "k"), [(1, 64, 8), (2, 32, 16), (3, 64, 3), (5, 64, 100)])
def test_a_step_has_the_bits_of_psyches_operations(
    kind: str, dtype: torch.dtype, parts: int, chunk: int, k: int
) -> None:
    generator = torch.Generator().manual_seed(parts)
    plan = make_psyche_plan(dtype, chunk, k)
    updates = [some_update(plan, kind, generator) for _ in range(parts)]
    if parts > 2:  # one who says nothing about some tensors
        present = tuple(bool(number % 3) for number in range(len(plan)))
        updates[1] = CompressedUpdate(plan, updates[1].index, updates[1].value, present)
    ours = some_params(dtype, generator)
    theirs = [param.clone() for param in ours]
    BlockEngine(plan, "dct").merge(updates, ours, lr=[LR])
    literal.apply(theirs, updates, LR, in_order)
    assert_same_bits(ours, theirs)


@pytest.mark.parametrize("exponent", [-130, -80, 126])
def test_values_at_the_ends_of_the_range_have_the_bits_too(exponent: int) -> None:
    generator = torch.Generator().manual_seed(4)
    plan = make_psyche_plan(torch.bfloat16, 64, 6)
    updates = [some_update(plan, "values", generator) for _ in range(2)]
    for update in updates:
        for value in update.value:
            value.copy_(torch.ldexp(value.float(), torch.tensor(exponent)).clamp_(-3e38, 3e38))
    ours = some_params(torch.bfloat16, generator)
    theirs = [param.clone() for param in ours]
    BlockEngine(plan, "dct").merge(updates, ours, lr=[LR])
    literal.apply(theirs, updates, LR, in_order)
    assert_same_bits(ours, theirs)


@pytest.mark.skipif(not literal.sums_in_that_order(), reason="this machine sums products of bfloat16 in another order")
@pytest.mark.parametrize("kind", ["low", "no numbers"])
def test_the_order_of_sums_is_that_of_pytorchs_einsum(kind: str) -> None:
    generator = torch.Generator().manual_seed(7)
    plan = make_psyche_plan(torch.bfloat16, 64, 40)
    update = some_update(plan, kind, generator)
    for entry in update.tensors():
        x = literal.mean_of([entry], torch.bfloat16)
        one, other = literal.decode_by_einsum(x), in_order(x)
        assert torch.equal(one.nan_to_num().view(torch.int16), other.nan_to_num().view(torch.int16)), entry.shape


def test_sums_that_cancel_are_decided_as_psyches_order_decides_them(monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(1)
    shapes = [(44, 44 * 512)]
    plan = make_psyche_plan(torch.bfloat16, 44, 3, shapes)
    update = some_update(plan, "signs", generator)
    update.index[0].copy_(torch.rand(512, 44, generator=generator).topk(3, 1).indices)  # all in the first row
    ours, theirs = torch.zeros(shapes[0], dtype=torch.bfloat16), torch.zeros(shapes[0], dtype=torch.bfloat16)
    literal.apply([theirs], [update], LR, in_order)
    BlockEngine(plan, "dct").merge([update], [ours], lr=[LR])
    assert torch.equal(ours, theirs)

    def in_plain_order(terms: npt.NDArray[np.float32], running: npt.NDArray[np.integer]) -> npt.NDArray[np.float32]:
        total: npt.NDArray[np.float32] = np.add.accumulate(terms, axis=1)[:, -1]
        return total

    monkeypatch.setattr(nearly_zero, "sum_in_order", in_plain_order)
    careless = torch.zeros(shapes[0], dtype=torch.bfloat16)
    BlockEngine(plan, "dct").merge([update], [careless], lr=[LR])
    assert not torch.equal(careless, theirs)


@pytest.mark.parametrize("kind", ["signs", "low"])
def test_a_few_sums_are_done_one_by_one_as_many_are_together(monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    generator = torch.Generator().manual_seed(1)
    shapes = [(44, 44 * 100), (4, 5), (9,)]
    plan = make_psyche_plan(torch.bfloat16, 44, 3, shapes)
    update = some_update(plan, kind, generator)
    for batch, index in zip(plan.batches, update.index, strict=True):  # all in the first row
        index.copy_(torch.rand(batch.tiles, batch.w, generator=generator).topk(index.shape[1], 1).indices)
    theirs = [torch.zeros(shape, dtype=torch.bfloat16) for shape in shapes]
    literal.apply(theirs, [update], LR, in_order)
    repeated: list[int] = []
    signs = nearly_zero.NearlyZero.signs

    def counted(self: nearly_zero.NearlyZero, block: Any, tile: Any, *rest: Any) -> Any:
        repeated.append(len(tile))
        return signs(self, block, tile, *rest)

    monkeypatch.setattr(nearly_zero.NearlyZero, "signs", counted)
    for few in (0, 1 << 20):
        monkeypatch.setattr(nearly_zero, "_FEW", few)
        ours = [torch.zeros(shape, dtype=torch.bfloat16) for shape in shapes]
        BlockEngine(plan, "dct").merge([update], ours, lr=[LR])
        assert all(torch.equal(a.view(torch.int16), b.view(torch.int16)) for a, b in zip(ours, theirs, strict=True))
    assert sum(repeated) > 20


@pytest.mark.parametrize("size", [1, 2, 3, 25, 44, 64])
def test_the_basis_is_the_inverse_dct(size: int) -> None:
    exact = dct_basis(size, torch.float64, CPU).t()
    assert torch.allclose(inverse_basis(size, torch.float32, CPU).double(), exact, atol=2e-7)


def test_zeros_of_the_basis_are_the_noise_that_psyche_has() -> None:
    # Where a cosine is 0, Psyche's basis has what is left of a Fourier transform in float32.
    noise = inverse_basis(44, torch.bfloat16, CPU)[dct_basis(44, torch.float64, CPU).t().abs() < 1e-12]
    assert len(noise) == 20
    assert 0 < float(noise.abs().max()) < 1e-7


def test_float32_parameters_are_merged_up_to_rounding() -> None:
    generator = torch.Generator().manual_seed(2)
    plan = make_psyche_plan(torch.float32, 64, 20)
    updates = [some_update(plan, "values", generator) for _ in range(2)]
    decoded = BlockEngine(plan, "dct").decode(updates)
    for number, ours in enumerate(decoded):
        exact = literal.decode_by_einsum(literal.mean_of([u.tensors()[number] for u in updates], torch.float32))
        assert torch.allclose(ours, exact, rtol=1e-5, atol=1e-5 * float(exact.abs().max()))


def test_psyche_has_no_other_transform() -> None:
    plan = make_psyche_plan(torch.bfloat16, 64, 3)
    update = CompressedUpdate.empty(plan, quantized=True)
    params = [torch.zeros(shape, dtype=torch.bfloat16) for shape in SHAPES]
    with pytest.raises(ConfigurationError, match="leave transform out"):
        BlockEngine(plan, "identity").merge([update], params, lr=[LR])
