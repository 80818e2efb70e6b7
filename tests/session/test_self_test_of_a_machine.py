"""A machine that makes another step of the same updates is told so, and by which library, before it trains."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch

from distro_optim import DisTrO
from distro_optim.errors import ProtocolError
from distro_optim.strategy.model import handover
from distro_optim.strategy.model.identity import ModelIdentity
from distro_optim.strategy.model.machine import FACTS, MAX_FACT, MERGE, explain_difference, machine_facts, merge_hash

from .scripts import Script
from .test_peers_stay_equal import begin
from .world import SessionWorld


def optimizer(**settings: Any) -> DisTrO:
    return DisTrO([torch.nn.Parameter(torch.zeros(4, 4))], **settings)


OURS = {MERGE: "00", "device": "cpu", "torch": "2.13.0", "blas": "mkl", "cpu": "AVX2", "numpy": "2.3"}


def test_the_self_test_depends_on_what_decides_a_step_and_on_nothing_else() -> None:
    before = torch.get_rng_state()
    facts = machine_facts(optimizer())
    assert set(facts) == {MERGE, *FACTS}
    assert all(0 < len(fact) <= MAX_FACT for fact in facts.values())
    assert machine_facts(optimizer(lr=0.5, weight_decay=0.3, compression_decay=0.5)) == facts
    assert torch.equal(torch.get_rng_state(), before)
    changes: list[dict[str, Any]] = [
        {"quantize_1bit": False},
        {"compression_topk": 16},
        {"compression_chunk": 32},
        {"tiling": "divisor"},
        {"transform": "identity"},
    ]
    hashes = [machine_facts(optimizer(**change))[MERGE] for change in changes]
    assert len({facts[MERGE], *hashes}) == len(changes) + 1


@pytest.mark.parametrize("arithmetic", ["float", "exact"])
def test_the_number_of_threads_does_not_matter(arithmetic: str) -> None:
    of, hashes, threads = optimizer(arithmetic=arithmetic), set(), torch.get_num_threads()
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            merge_hash.cache_clear()
            hashes.add(machine_facts(of)[MERGE])
    finally:
        torch.set_num_threads(threads)
    assert len(hashes) == 1


@pytest.mark.parametrize("settings", [{"compression_chunk": 4, "compression_topk": 16}, {"compression_topk": 1}])
def test_tiles_that_are_sent_whole_and_single_coefficients_are_tested_as_well(settings: dict[str, Any]) -> None:
    assert machine_facts(optimizer(**settings))[MERGE]


def test_the_result_of_the_merge_is_what_is_hashed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    of = optimizer(compression_topk=5)
    right = machine_facts(of)[MERGE]
    apply = DisTrO.apply

    def wrong(self: DisTrO, updates: Any, lr: Any = None) -> None:
        apply(self, updates, lr)
        self.param_groups[0]["params"][0].view(-1)[77] += 2.0**-20

    monkeypatch.setattr(DisTrO, "apply", wrong)
    assert machine_facts(of)[MERGE] == right
    merge_hash.cache_clear()
    assert machine_facts(of)[MERGE] != right
    merge_hash.cache_clear()


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({}, "with the same libraries, so test the memory and the processor"),
        ({"torch": "2.9.0"}, r"because of PyTorch \(2.13.0 here, 2.9.0 in the run\)\. Its weights"),
        ({"torch": "2.9.0", "cpu": "AVX512"}, r"because of PyTorch \(.*\); also different: the instructions .* \(AVX2"),
        ({"device": "cuda", "torch": "2.9.0"}, r"because of the kind of device \(cpu here, cuda in the run\)"),
        ({"blas": "openblas"}, r"because of the matrix library that PyTorch uses \(mkl here, openblas in the run\)"),
    ],
)
def test_the_likely_reason_is_named(changes: dict[str, str], said: str) -> None:
    sentence = explain_difference(OURS, {**OURS, MERGE: "01", **changes})
    assert sentence is not None
    assert re.search(said, sentence)


def test_where_the_merge_is_the_same_or_unknown_there_is_nothing_to_say() -> None:
    assert explain_difference(OURS, {**OURS, "torch": "1.0"}) is None
    assert explain_difference(OURS, {}) is None
    assert explain_difference({}, OURS) is None


def test_a_joiner_is_told_before_it_trains_and_takes_part(
    make_world: Callable[..., SessionWorld], monkeypatch: pytest.MonkeyPatch
) -> None:
    told_before: list[str] = []

    def facts(of: DisTrO) -> dict[str, str]:
        return OURS if of is scripts[0].optimizer else {**OURS, MERGE: "01", "torch": "2.9.0"}

    monkeypatch.setattr(handover, "machine_facts", facts)
    scripts = [
        Script(seed=0),
        Script(seed=1, during=lambda script: None if told_before else told_before.extend(script.news)),
    ]
    world = make_world(total_steps=6, epoch_time=200, init_min_clients=2, min_clients=2)
    begin(world, *scripts)
    world.until_all_ended()
    assert [text for text in told_before if "self-test" in text and "PyTorch (2.9.0 here, 2.13.0 in the run)" in text]
    assert not scripts[0].news
    assert scripts[1].trained == [1, 2, 3, 4, 5]


@pytest.mark.parametrize(
    "machine", [[], "x", {MERGE: 1}, {"torch": "2" * 81}, {"cpu": "\x1b[2J"}, {"blas": "a\nb"}, {"numpy": "é"}]
)
def test_facts_of_a_stranger_are_short_and_printable_or_refused(machine: object) -> None:
    identity = ModelIdentity(epoch=0, step=1, weights=bytes(32), tensors=(), settings={}, groups=(), machine=OURS)
    content = json.loads(identity.encode())
    assert ModelIdentity.decode(json.dumps(content)) == identity
    content["distro_optim"]["machine"] = machine
    with pytest.raises(ProtocolError, match=r"distro_optim\.machine"):
        ModelIdentity.decode(json.dumps(content))
    content["distro_optim"]["machine"] = {"gpu": "something newer"}
    decoded = ModelIdentity.decode(json.dumps(content))
    assert decoded is not None
    assert decoded.machine == {}


SCRIPT = f"""
import torch
from distro_optim import DisTrO
from distro_optim.strategy.model.machine import machine_facts
print(machine_facts(DisTrO([torch.nn.Parameter(torch.zeros(4, 4))], arithmetic="float"))["{MERGE}"])
"""


@pytest.mark.slow
def test_a_processor_of_another_kind_gives_another_hash_with_floats() -> None:
    if torch.backends.cpu.get_cpu_capability() in {"DEFAULT", "NO AVX"}:
        pytest.skip("there is no other kind here")

    older = {"ATEN_CPU_CAPABILITY": "default", "MKL_CBWR": "COMPATIBLE", "OPENBLAS_CORETYPE": "Prescott"}
    run = subprocess.run(
        [sys.executable, "-c", SCRIPT], env={**os.environ, **older}, capture_output=True, text=True, check=True
    )
    assert len(run.stdout.strip()) == 64
    assert run.stdout.strip() != machine_facts(optimizer(arithmetic="float"))[MERGE]
