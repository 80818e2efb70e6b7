"""Steps of a fixed size are exact too: one factor for a tensor, one product and one difference for a weight."""

from __future__ import annotations

import math
import random
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from distro_optim.compress import profile
from distro_optim.compress.engine import BlockEngine
from distro_optim.compress.exact import merge, oracle
from distro_optim.compress.exact.rms import exponent_of, factor_of
from distro_optim.errors import ConfigurationError

from .exact_cases import BY_RMS, GAIN, LARGE, LR, Case, by_the_oracle, digest, merged
from .test_exact_arithmetic import RefusesFloat64

SOME_LARGE = [replace(case, update="rms") for case in LARGE if case.k <= 64][:12]


@pytest.fixture(scope="module")
def expected() -> list[str]:
    return [digest(by_the_oracle(case)[1]) for case in BY_RMS]


@pytest.mark.parametrize("float64", [True, False], ids=["in float64", "without it"])
def test_every_engine_takes_the_step_of_the_oracle(
    float64: bool, expected: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(profile, "CPU", replace(profile.CPU, float64=float64))
    for case, wanted in zip(BY_RMS, expected, strict=True):
        assert digest(merged(case)) == wanted, case


def test_the_engine_for_devices_without_float64_does_without(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(profile, "CPU", replace(profile.CPU, float64=False))
    case = replace(BY_RMS[0], kind="values")
    plan, weights = case.plan(), case.weights()
    updates = case.updates(plan)
    with RefusesFloat64():
        BlockEngine(plan, "dct").merge(updates, weights, lr=[LR])
    assert digest(weights) == digest(by_the_oracle(case)[1])


@pytest.mark.slow
def test_neither_engine_nor_the_order_of_peers_nor_compiled_kernels_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    def digests(order: int) -> list[str]:
        return [digest(merged(case, range(case.contributors)[::order])) for case in SOME_LARGE]

    monkeypatch.setenv("DISTRO_OPTIM_FAST", "0")
    plain = digests(1)
    assert digests(-1) == plain
    monkeypatch.setattr(profile, "CPU", replace(profile.CPU, float64=False))
    assert digests(1) == plain
    monkeypatch.setattr(profile, "CPU", replace(profile.CPU, float64=True))
    monkeypatch.setenv("DISTRO_OPTIM_FAST", "1")
    assert digests(1) == plain


def test_the_factor_is_rounded_as_the_oracle_says() -> None:
    draw = random.Random(1)
    for _ in range(300):
        squares, tiles = draw.getrandbits(draw.randrange(1, 63)), draw.randrange(1, 10**6)
        h, w = draw.choice([1, 2, 64]), draw.choice([1, 2, 64])
        rate, double = draw.random() * 10.0 ** -draw.randrange(6), draw.random() < 0.5
        ours = factor_of(squares, tiles, exponent_of(h, w), rate, double=double)
        assert ours == oracle.rms_factor(squares, tiles, h, w, rate, double=double)


@pytest.mark.parametrize("shape", [(64, 64), (64, 1), (1, 64), (64,), (1,), ()])
def test_a_step_has_the_size_that_is_asked_for(shape: tuple[int, ...]) -> None:
    case = Case(shapes=(shape,), chunk=64, k=8, contributors=3, absent=False, dtype=torch.float64, update="rms")
    steps = [before - after for before, after in zip(case.weights(), merged(case), strict=True)]
    # The basis has 12 bits, so that Parseval's identity holds to some ten-thousandths.
    assert float(steps[0].square().mean().sqrt()) == pytest.approx(GAIN * LR, rel=1e-3)


def weights_after(lr: float, weight: float) -> Tensor:
    case = Case(shapes=((9, 9),), chunk=9, k=2, contributors=2, absent=False, pattern="pairs", update="rms")
    plan, weights = case.plan(), [torch.full((9, 9), weight)]
    BlockEngine(plan, "dct").merge(case.updates(plan), weights, lr=[lr])
    return weights[0]


def test_where_nothing_moves_even_the_sign_of_zero_stays() -> None:
    """Opposite coefficients that cancel, in tiles of an odd side, whose basis has zeros: products of -0."""
    assert torch.signbit(weights_after(LR, -0.0)).all()
    assert torch.signbit(weights_after(0.0, -0.0)).all()


def test_steps_that_some_devices_could_not_tell_from_none_are_none() -> None:
    assert factor_of(2520**2, 1, 46, 1e-30, double=False) == 0.0
    assert factor_of(2520**2, 1, 46, 1e-10, double=False) > 2.0**-102
    assert factor_of(0, 1, 46, 1e-3, double=False) == 0.0
    assert math.isfinite(factor_of(1, 1 << 22, 24, 1e3, double=False))


def test_tensors_beyond_the_proof_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    case = Case(shapes=((256, 64),), chunk=64, k=8, update="rms")  # 4 tiles of at most 2,048 coefficients
    BlockEngine(case.plan(), "dct")
    monkeypatch.setattr(merge, "MAX_SQUARES", 4 * 2048 - 1)
    with pytest.raises(ConfigurationError, match="give it a group with update='sign'"):
        BlockEngine(case.plan(), "dct")
