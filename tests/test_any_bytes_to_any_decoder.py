"""Each target of the fuzzer, for a moment: changed inputs raise ProtocolError or nothing.

Bounded by a number of inputs and not by seconds, so that the same ones are tried on every machine; ``make fuzz`` is for
seconds.
"""

from __future__ import annotations

import importlib
import random

import pytest

from fuzz import fuzz_decoders

CHANGED = 150
"""Inputs of each target. All of them together take some five seconds; with ten seconds each it would be minutes."""


@pytest.fixture(scope="module")
def seeds() -> dict[str, list[bytes]]:
    return fuzz_decoders.seeds()


def test_every_target_begins_with_valid_inputs(seeds: dict[str, list[bytes]]) -> None:
    assert seeds.keys() == fuzz_decoders.TARGETS.keys()
    assert all(seeds.values())


@pytest.mark.parametrize("name", fuzz_decoders.TARGETS)
def test_changed_inputs_are_read_or_refused(name: str, seeds: dict[str, list[bytes]]) -> None:
    assert fuzz_decoders.try_changed(name, seeds[name], random.Random(name), count=CHANGED) < CHANGED


@pytest.mark.parametrize("module", fuzz_decoders.INSTRUMENTED)
def test_what_the_fuzzer_watches_is_there(module: str) -> None:
    importlib.import_module(f"distro_optim.{module}")
