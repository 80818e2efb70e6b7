"""Simulated runs train, repeat themselves to the byte, show what trouble costs, and say what they cannot simulate."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest

from distro_optim.cli import main
from distro_optim.coordinator.rules.consensus import results_bank
from distro_optim.coordinator.types import Witness, WitnessBloom, WitnessProof
from distro_optim.errors import ConfigurationError, DistroError
from distro_optim.testing import SimulationOptions, simulate
from distro_optim.testing.simulation.events import EventQueue
from distro_optim.testing.simulation.outcome import Outcome
from distro_optim.testing.simulation.sharing import SharedReader, SharedWork
from distro_optim.verify.bloom import BloomFilter

SMALL = SimulationOptions(peers=3, rounds=5)


def what_the_seed_decides(outcome: Outcome) -> dict[str, object]:
    record = outcome.record()
    return {name: value for name, value in record.items() if "cpu" not in name}


@pytest.mark.slow
def test_a_run_trains_and_the_same_seed_gives_the_same_run() -> None:
    steps: list[int] = []
    outcome = simulate(SMALL, steps.append)
    assert steps == list(range(1, SMALL.rounds + 3))  # the last two apply what was trained before
    assert outcome.equal
    assert outcome.lost_weights == outcome.refused == 0
    assert outcome.loss < outcome.first_loss
    assert outcome.round_seconds >= SMALL.train_seconds * (1 - SMALL.jitter)
    assert outcome.round_seconds <= SMALL.train_seconds * (1 + SMALL.jitter) + 1
    assert outcome.cpu_seconds > 0
    assert outcome.host_cpu_seconds > 0
    assert what_the_seed_decides(simulate(SMALL)) == what_the_seed_decides(outcome)
    assert what_the_seed_decides(simulate(replace(SMALL, seed=1))) != what_the_seed_decides(outcome)


@pytest.mark.slow
def test_large_results_on_slow_lines_take_their_time() -> None:
    result = 8 * 500_000  # bits, with what is charged for 124 million parameters
    slow = simulate(replace(SMALL, parameters=124_000_000, bandwidth=1e6))
    assert slow.equal
    assert slow.bytes_received > 500_000
    # A round cannot be shorter than what each peer receives in it takes on its line.
    assert slow.slowest_round > (SMALL.peers - 1) * result / 1e6


@pytest.mark.slow
def test_a_run_in_trouble_leaves_the_honest_with_equal_weights() -> None:
    options = SimulationOptions(peers=5, rounds=14, liars=4, joiners=1, stragglers=1, loss=0.02)
    outcome = simulate(options)
    assert outcome.equal
    assert outcome.loss < outcome.first_loss
    assert outcome.dropped["WRONG_HASH"] > 0  # the garbler was there
    assert outcome.requests > 1  # and the withholder, and the losses
    assert outcome.slowest_round >= options.straggler_factor * (1 - options.jitter)


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"peers": 0}, "whole number from 1"),
        ({"peers": 250, "joiners": 7}, "room for 256"),
        ({"peers": 2, "stragglers": 2}, "the host is never one"),
        ({"latency": (0.2, 0.1)}, "0 < low <= high"),
        ({"loss": 1.0}, "below 1"),
        ({"bandwidth": 0.0}, "above 0"),
        ({"rounds": 2}, "whole number from 3"),
        ({"parameters": 0}, "whole number from 1"),
    ],
)
def test_what_cannot_be_simulated_is_refused(wrong: dict[str, object], said: str) -> None:
    with pytest.raises(ConfigurationError, match=said):
        SimulationOptions(**wrong)  # type: ignore[arg-type]


@pytest.mark.slow
def test_a_run_in_which_nothing_arrives_is_given_up() -> None:
    with pytest.raises(DistroError, match="stands still"):
        simulate(SimulationOptions(peers=2, rounds=3, latency=(1e6, 2e6)))


@pytest.mark.slow
def test_the_command_prints_a_line_for_each_number_of_peers(capsys: pytest.CaptureFixture[str]) -> None:
    few = ["simulate", "--rounds", "3", "--peers", "1", "--peers", "2"]
    assert main(few) == 0
    header, one, two = capsys.readouterr().out.splitlines()
    assert header.split()[:2] == ["peers", "round"]
    assert (one.split()[0], two.split()[0]) == ("1", "2")
    assert one.endswith("equal")
    assert main([*few, "--json"]) == 0
    records = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [record["peers"] for record in records] == [1, 2]
    assert main(["simulate", "--peers", "300"]) == 2
    assert "room for 256" in capsys.readouterr().err


def test_what_goes_to_many_comes_among_the_rest_in_the_order_of_its_times() -> None:
    queue, happened = EventQueue(), []
    queue.series([1.0, 2.0, 4.0], lambda whom: happened.append((queue.now, whom)), ["a", "b", "c"])
    queue.at(2.0, lambda: happened.append((queue.now, "at the same time, but put in before")))
    queue.after(3.0, lambda: happened.append((queue.now, "between")))
    queue.at(5.0, queue.stop)
    queue.at(6.0, lambda: happened.append((queue.now, "never")))
    queue.run()
    assert happened == [
        (1.0, "a"),
        (2.0, "at the same time, but put in before"),
        (2.0, "b"),
        (3.0, "between"),
        (4.0, "c"),
    ]
    assert queue.count == 6


def test_peers_that_ask_the_same_reports_in_any_order_pay_alike_and_get_what_the_reports_say() -> None:
    items = [bytes([number]) * 32 for number in range(6)]
    witnesses = []
    for number in range(3):
        bloom = BloomFilter.from_entropy(bytes(range(number, number + 64)))
        bloom.add_many(items[number : number + 3])
        witnesses.append(
            Witness(WitnessProof(number, number, True), broadcast_bloom=WitnessBloom(bloom.keys, bloom.words))
        )
    reports = tuple(witnesses)
    seconds = iter(range(1000))
    work = SharedWork(lambda: float(next(seconds)))
    reader = SharedReader(work)
    owed = []
    for asked in (items, items[::-1], [*items[3:], *items[:3]]):
        found = reader.results_filters(reports).ask(asked)
        assert np.array_equal(found, results_bank(reports).ask(asked))
        owed.append(work.settle())
    assert [charged for charged, _ in owed] == [2.0, 2.0, 2.0]
    assert [spent for _, spent in owed] == [2.0, 0.0, 0.0]
