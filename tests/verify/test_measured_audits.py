"""Audits by test 1 that ``benchmarks/verification.py`` has measured, weighed as a run weighs them."""

from __future__ import annotations

import json
import random
import runpy
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
RUNS = json.loads((ROOT / "tests" / "vectors" / "sidings.json").read_bytes())
OF_1M = {name: audits for name, audits in RUNS.items() if name.startswith("1M")}
BENCHMARK: dict[str, Any] = runpy.run_path(str(ROOT / "benchmarks" / "many_audits.py"))
WEIGHED: dict[str, Any] = BENCHMARK["weighed"](OF_1M)
HONEST = WEIGHED.pop("honest")


def test_none_of_two_thousand_audits_of_honest_peers_fails_one() -> None:
    found = [BENCHMARK["judged"](of_peer) for of_peer in HONEST]
    assert sum(map(len, HONEST)) >= 2000
    assert not any(each.failed for each in found)
    assert all(each.passed for each in found)


@pytest.mark.parametrize("block", [1, 16])
def test_nor_does_one_of_a_hundred_thousand_that_are_drawn_from_them(block: int) -> None:
    for peers in (HONEST, [of_peer[: BENCHMARK["FIRST_ROUNDS"]] for of_peer in HONEST]):
        assert not BENCHMARK["judged"](BENCHMARK["drawn"](peers, 100_000, block, random.Random(block))).failed


def test_unusual_rounds_of_an_honest_peer_do_not_follow_each_other() -> None:
    share, following, longest = BENCHMARK["in_a_row"](HONEST)
    assert 0.02 < share < 0.08
    assert following < 0.1
    assert longest < 4, "four are needed to fail"


@pytest.mark.parametrize(
    ("cheat", "audits"), [("momentum, nothing trained", 20), ("random", 15), ("a copy of another result", 60)]
)
def test_who_trains_nothing_fails_within_some_audits(cheat: str, audits: int) -> None:
    found = BENCHMARK["judged"](BENCHMARK["drawn"](WEIGHED[cheat], 20_000, 1, random.Random(3)))
    assert sorted(found.failed)[int(0.99 * len(found.failed))] <= audits
    assert len(found.failed) > 20 * found.passed


@pytest.mark.parametrize("cheat", ["no lookahead", "10 % of the signs flipped", "1 % of the signs flipped"])
def test_what_this_test_cannot_see_looks_honest_to_it(cheat: str) -> None:
    against = [usual.weigh(siding) < 0 for of_peer in WEIGHED[cheat] for siding, usual in of_peer]
    assert sum(against) < 0.15 * len(against)
