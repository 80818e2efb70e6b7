"""``exact-1``: every engine takes the step that Python's integers take, whatever is set around it."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves
from typing_extensions import override

from distro_optim.compress import CompressedUpdate, ParamSpec, make_plan, profile
from distro_optim.compress.engine import BlockEngine, parts
from distro_optim.compress.exact import definition, filtered, means, merge
from distro_optim.cosine import cosine, rounded_cosine
from distro_optim.errors import ConfigurationError
from torch_settings import default_device, default_dtype, matmul_precision

from .exact_cases import CPU, LARGE, LR, SMALL, Case, by_the_oracle, digest, merged

BASIS_SHA256 = "b8f74caea9af237e82c9626d68db916778fc69d6a7331f5e5b54da80f24af7ae"


@pytest.fixture(autouse=True)
def by_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not by the compiled kernels, which other tests hold against these engines."""
    monkeypatch.setenv("DISTRO_OPTIM_FAST", "0")


# -- the basis ---------------------------------------------------------------------------------------------------------


def test_the_basis_of_every_side_is_the_same_for_ever() -> None:
    digest_ = hashlib.sha256()
    for n in range(1, 129):
        digest_.update(definition.integer_basis(n).astype("<i2").tobytes())
    assert digest_.hexdigest() == BASIS_SHA256


@pytest.mark.parametrize("n", [1, 2, 3, 7, 43, 64, 128])
def test_the_basis_is_the_rounded_cosine(n: int) -> None:
    for j in range(n):
        for f in range(n):
            factor = math.sqrt(0.5) if f == 0 and n > 1 else 1.0
            exact = 4096 * factor * math.cos(math.pi * (2 * j + 1) * f / (2 * n))
            assert abs(definition.integer_basis(n)[j, f] - exact) <= 0.5 + 1e-9


@pytest.mark.parametrize("n", [2, 5, 64, 128])
def test_the_basis_is_as_symmetric_as_cosines_are(n: int) -> None:
    basis = definition.integer_basis(n)
    assert (basis[::-1] == basis * (-1) ** np.arange(n)).all()
    if n > 2 and n % 2 == 0:
        assert (basis[: n // 2, ::2] == definition.integer_basis(n // 2)).all()


def test_cosines_are_the_nearest_doubles() -> None:
    angles = [n * 0.001 for n in range(-7000, 7000, 7)] + [1e6, 3.25e9, math.pi, math.pi / 2]
    for angle in angles:
        assert abs(cosine(angle) - math.cos(angle)) <= math.ulp(math.cos(angle))
    # Values whose last bit libraries dispute, from 60 decimal digits of the cosine.
    assert cosine(0.1) == 0.9950041652780258
    assert cosine(math.pi / 2) == 6.123233995736766e-17
    assert [rounded_cosine(n, 3, 12) for n in range(7)] == [4096, 2048, -2048, -4096, -2048, 2048, 4096]


@pytest.fixture(autouse=True)
def plain_engines(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where compiled kernels are installed, which have tests of their own."""
    monkeypatch.setattr(parts, "has_kernels", lambda *_: False)


# -- engines -----------------------------------------------------------------------------------------------------------


def by_float64(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(merge, "fits_filter", lambda *_: False)


def by_limbs(monkeypatch: pytest.MonkeyPatch) -> None:
    by_float64(monkeypatch)
    monkeypatch.setattr(profile, "CPU", replace(profile.CPU, float64=False))


def as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    pass


def doubting_everything(monkeypatch: pytest.MonkeyPatch) -> None:
    """The filter proves much less, so that what it does with the rest is seen: tile by tile in float64."""
    monkeypatch.setattr(filtered, "_EXTRA_ROUNDINGS", 1 << 18)


def doubting_by_terms(monkeypatch: pytest.MonkeyPatch) -> None:
    doubting_everything(monkeypatch)
    monkeypatch.setattr(filtered, "_MANY", 1 << 20)
    monkeypatch.setattr(filtered, "_SPARSE_LIMIT", 1 << 20)


def doubting_by_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    doubting_everything(monkeypatch)
    monkeypatch.setattr(filtered, "_MANY", 1 << 20)
    monkeypatch.setattr(filtered, "_SPARSE_LIMIT", 0)
    monkeypatch.setattr(merge, "SPARSE_LIMIT", 0)  # as in a block with so many coefficients


Engine = Callable[[pytest.MonkeyPatch], None]
ENGINES: list[Engine] = [
    as_it_is,
    by_float64,
    by_limbs,
    doubting_everything,
    doubting_by_terms,
    doubting_by_rows,
]


@pytest.fixture(scope="module")
def expected() -> list[tuple[list[Tensor], list[Tensor]]]:
    return [by_the_oracle(case) for case in SMALL]


@pytest.mark.parametrize("engine", ENGINES, ids=lambda engine: engine.__name__)
def test_every_engine_takes_the_step_of_the_oracle(
    engine: Engine, expected: list[tuple[list[Tensor], list[Tensor]]], monkeypatch: pytest.MonkeyPatch
) -> None:
    engine(monkeypatch)
    for case, (_, after) in zip(SMALL, expected, strict=True):
        for weight, right in zip(merged(case), after, strict=True):
            assert torch.equal(weight.view(-1).view(torch.uint8), right.view(-1).view(torch.uint8)), case


def test_what_is_decoded_has_the_signs_of_the_oracle_and_nearly_the_values_of_the_transform(
    expected: list[tuple[list[Tensor], list[Tensor]]],
) -> None:
    for case, (signs, _) in zip(SMALL, expected, strict=True):
        plan = case.plan()
        decoded = BlockEngine(plan, "dct").decode(case.updates(plan))
        floats = case.plan("float")
        usual = BlockEngine(floats, "dct").decode(case.updates(floats))
        for ours, sign, theirs in zip(decoded, signs, usual, strict=True):
            assert torch.equal(ours.sign(), sign.to(ours.dtype)), case
            assert float((ours - theirs).norm()) <= 1e-3 * float(theirs.norm()), case


@pytest.mark.slow
def test_all_engines_agree_on_large_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    # Summing thousands of terms for each element is what the filter avoids.
    cases = [case for case in LARGE if case.k * case.contributors <= 256]
    by_engine: dict[str, list[str]] = {}
    for engine in ENGINES:
        with monkeypatch.context() as patch:
            engine(patch)
            by_engine[engine.__name__] = [digest(merged(case)) for case in cases]
    for case, hashes in zip(cases, zip(*by_engine.values(), strict=True), strict=True):
        assert len(set(hashes)) == 1, (case, dict(zip(by_engine, hashes, strict=True)))


def test_the_filter_proves_most_signs_and_is_not_always_right_by_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is doubtful is little, and some of it is wrong in float32: the filter is worth its cost, and needed."""
    case = Case(shapes=((512, 512),), chunk=64, k=32, contributors=16, seed=40, absent=False)
    seen = []
    complete = filtered._complete

    def count(doubtful: Any, runs: Any, means: Any, q: Tensor, tiles: Tensor, coefficients: Tensor) -> None:
        seen.append(int((tiles == 0).sum()))
        complete(doubtful, runs, means, q, tiles, coefficients)

    monkeypatch.setattr(filtered, "_complete", count)
    merged(case)
    assert 0 < sum(seen) < 512 * 512 // 200
    # Exact zeros are never proven.
    zeros = Case(shapes=((64, 64),), chunk=64, k=64, contributors=2, pattern="pairs", absent=False)
    seen.clear()
    assert all(torch.equal(a, b) for a, b in zip(merged(zeros), zeros.weights(), strict=True))


# -- without float64 ---------------------------------------------------------------------------------------------------


class RefusesFloat64(TorchFunctionMode):
    """As Apple's GPUs do: nothing that is given to an operation, or comes out of it, is float64."""

    @override
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        _refuse_float64(func, (args, kwargs, out))
        return out


def _refuse_float64(func: Any, values: Any) -> None:
    for leaf in tree_leaves(values):
        if leaf is torch.float64 or (isinstance(leaf, Tensor) and leaf.dtype == torch.float64):
            raise TypeError(f"Cannot convert a MPS Tensor to float64 dtype: {func}")


@pytest.mark.parametrize("case", [case for case in SMALL if case.dtype != torch.float64], ids=lambda c: f"{c.seed}")
def test_one_engine_uses_no_float64(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    right = merged(case)
    by_limbs(monkeypatch)
    plan, weights = case.plan(), case.weights()
    updates = case.updates(plan)
    for cached in (definition.basis, definition.basis_rows):
        cached.cache_clear()
    with RefusesFloat64():
        BlockEngine(plan, "dct").merge(updates, weights, lr=[LR])
    assert digest(weights) == digest(right)


def test_float64_is_really_refused() -> None:
    with pytest.raises(TypeError, match="float64"), RefusesFloat64():
        torch.zeros(3).to(torch.float64)


# -- settings around it ------------------------------------------------------------------------------------------------


SURROUNDINGS: dict[str, Callable[[], AbstractContextManager[Any]]] = {
    "medium precision": lambda: matmul_precision("medium"),
    "high precision": lambda: matmul_precision("high"),
    "autocast": lambda: torch.autocast("cpu", dtype=torch.bfloat16),
    "default float64": lambda: default_dtype(torch.float64),
    "default bfloat16": lambda: default_dtype(torch.bfloat16),
    "inference mode": torch.inference_mode,
    "default device": lambda: default_device("meta"),
}
FEW = [SMALL[1], SMALL[4], SMALL[8], LARGE[5]]


@pytest.mark.parametrize("engine", [as_it_is, by_float64, by_limbs], ids=lambda engine: engine.__name__)
@pytest.mark.parametrize("surroundings", SURROUNDINGS)
def test_settings_of_torch_change_nothing(engine: Engine, surroundings: str, monkeypatch: pytest.MonkeyPatch) -> None:
    engine(monkeypatch)
    right = [digest(merged(case)) for case in FEW]
    prepared = [(case.plan(), case.updates(case.plan()), case.weights()) for case in FEW]
    for cached in (definition.basis, definition.basis_rows, means._table):
        cached.cache_clear()
    with SURROUNDINGS[surroundings]():
        for plan, updates, weights in prepared:
            BlockEngine(plan, "dct").merge(updates, weights, lr=[LR])
    assert [digest(weights) for _, _, weights in prepared] == right


@pytest.mark.parametrize("case", [SMALL[1], SMALL[4], LARGE[6], LARGE[7]], ids=lambda c: f"{c.kind}{c.contributors}")
def test_the_order_of_contributors_changes_nothing(case: Case) -> None:
    backwards = list(range(case.contributors))[::-1]
    assert digest(merged(case)) == digest(merged(case, backwards))


# -- the edges of the definition ---------------------------------------------------------------------------------------


def test_a_weight_of_minus_zero_keeps_its_sign_where_the_step_is_zero() -> None:
    case = Case(shapes=((64, 64), (5,)), chunk=64, k=1, contributors=2, absent=False)
    plan = case.plan()
    opposite = [CompressedUpdate.empty(plan, quantized=True) for _ in range(2)]
    opposite[1] = CompressedUpdate(plan, opposite[1].index, tuple(v | True for v in opposite[1].value), (True, True))
    opposite[0] = replace(opposite[0], present=(True, True))
    for zero in (0.0, -0.0):
        weights = [torch.full((64, 64), zero), torch.full((5,), zero)]
        BlockEngine(plan, "dct").merge(opposite, weights, lr=[LR])
        assert [bool(w.signbit().all()) for w in weights] == [math.copysign(1, zero) < 0] * 2


def test_subnormal_values_count_as_zero_beside_nothing_else() -> None:
    case = Case(shapes=((16, 16),), k=2, contributors=1, kind="values", absent=False)
    plan = case.plan()
    tiny = CompressedUpdate(plan, case.updates(plan)[0].index, (torch.full((1, 2), 1e-42),), (True,))
    weights = case.weights()
    BlockEngine(plan, "dct").merge([tiny], weights, lr=[LR])
    assert digest(weights) == digest(case.weights())


def test_more_updates_than_are_proven_are_refused() -> None:
    case = Case(shapes=((8,),), chunk=8, k=1, contributors=1, absent=False)
    plan = case.plan()
    updates = case.updates(plan) * 257
    with pytest.raises(ConfigurationError, match="257 updates in one step: arithmetic='exact' is proven for at most"):
        BlockEngine(plan, "dct").merge(updates, case.weights(), lr=[LR])
    BlockEngine(plan, "dct").merge(updates[:256], case.weights(), lr=[LR])


def test_larger_tiles_than_are_proven_are_refused() -> None:
    def plan(chunk: int, k: int) -> BlockEngine:
        return BlockEngine(
            make_plan([ParamSpec((400, 400), torch.float32, CPU, 0, chunk, k)], "padded", arithmetic="exact"), "dct"
        )

    with pytest.raises(ConfigurationError, match="give a smaller compression_chunk or compression_topk"):
        plan(400, 600)
    plan(400, 512)
    plan(362, 600)


def test_signs_and_values_together_are_values_of_one() -> None:
    values = Case(k=3, contributors=2, kind="values", absent=False)
    signs = replace(values, kind="signs", seed=3)
    plan = values.plan()
    mixed = [values.updates(plan)[0], signs.updates(plan)[0]]
    as_values = [mixed[0], replace(mixed[1], value=tuple(torch.where(v, -1.0, 1.0) for v in mixed[1].value))]
    results = []
    for updates in (mixed, as_values):
        weights = values.weights()
        BlockEngine(plan, "dct").merge(updates, weights, lr=[LR])
        results.append(digest(weights))
    assert results[0] == results[1] != digest(values.weights())
