"""The Triton kernels take the steps that torch takes, on a CPU, in Triton's interpreter, and move as few bytes."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from typing import Any

import pytest

from distro_optim.compress.engine.triton.bounds import LONGEST_SIDE, largest_high_word, largest_low_word, largest_middle

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        importlib.util.find_spec("triton") is None, reason="Triton is not installed: pip install 'distro-optim[gpu]'"
    ),
]

CASES = (
    "signs, ragged",
    "signs, 64 contributors",
    "signs, without overlap",
    "values of bfloat16",
    "values, as coefficients",
    "values of float16, a convolution",
    "tiles too large for the kernels",
)


@pytest.fixture(scope="module")
def interpreted() -> dict[str, Any]:
    """What ``interpreted.py`` prints."""
    done = subprocess.run(
        [sys.executable, "-m", "engines.interpreted"],
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    answer: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return answer


@pytest.fixture
def found(interpreted: dict[str, Any]) -> dict[str, Any]:
    """By case, see :class:`engines.interpreted_steps.Found`."""
    cases: dict[str, Any] = interpreted["steps"]
    assert set(cases) == set(CASES)
    return cases


@pytest.mark.parametrize("case", CASES)
def test_the_same_coefficients_are_picked_in_ascending_order(found: dict[str, Any], case: str) -> None:
    assert found[case]["tiles"] > 0
    assert found[case]["picks"] == 0
    assert found[case]["presence"] == 0
    if "too large" not in case:
        assert found[case]["unordered"] == 0


def test_a_gradient_that_is_not_finite_is_left_out(found: dict[str, Any]) -> None:
    assert found["signs, ragged"]["quarantined"] == 1
    assert found["signs, 64 contributors"]["quarantined"] == 0


@pytest.mark.parametrize("case", CASES)
def test_what_is_sent_and_what_is_kept_are_the_same_but_for_rounding(found: dict[str, Any], case: str) -> None:
    # Two bfloat16 hold 2**-17 of a number.
    assert found[case]["sent"] < 4e-5
    assert found[case]["momentum"] < 4e-5


@pytest.mark.parametrize("case", CASES)
def test_weights_have_the_same_bits_in_whatever_order_contributors_come(found: dict[str, Any], case: str) -> None:
    assert found[case]["weights"] == 0
    assert found[case]["permuted"] == 0


@pytest.mark.parametrize("case", CASES)
def test_the_lookahead_leads_to_the_same_bits(found: dict[str, Any], case: str) -> None:
    assert found[case]["shifted"] == 0


@pytest.mark.parametrize("case", CASES)
def test_the_first_block_is_no_reason_to_fall_back(found: dict[str, Any], case: str) -> None:
    assert found[case]["warnings"] == []


def test_an_optimizer_takes_a_step_and_the_next_lookahead_in_one_pass_to_the_same_bits(
    interpreted: dict[str, Any],
) -> None:
    [trained] = interpreted["training"].values()
    assert trained["seen"] == 54
    assert trained["weights"] == 0
    assert trained["quarantined"] == [1, 1]
    assert trained["momentum"] < 4e-5
    assert trained["warnings"] == []
    # All but the first, for which nothing has arrived, and the one before which other code wrote to weights.
    assert trained["passes"] == 4


def test_a_step_moves_at_most_32_bytes_for_each_parameter_with_lookahead(interpreted: dict[str, Any]) -> None:
    counted = interpreted["bytes"]
    # Read: a gradient twice, momentum, weight. Written: momentum, weight, shifted weight. And some indices and signs.
    assert 28 < sum(counted["alone"].values()) <= 32
    assert 28 < sum(counted["with 15 others"].values()) <= 32
    assert 18 < sum(counted["in bfloat16"].values()) <= 20
    # The same, and what torch does with flags: nothing goes over the parameters a second time.
    assert 28 < sum(counted["by an optimizer"].values()) <= 32


def test_two_words_hold_every_sum_of_every_tile() -> None:
    for w in range(1, LONGEST_SIDE + 1):
        assert largest_low_word(w) < 2**31
        for h in range(1, LONGEST_SIDE + 1):
            assert largest_middle(h) + 128 < 2**31
            assert largest_high_word(h, w) < 2**31
