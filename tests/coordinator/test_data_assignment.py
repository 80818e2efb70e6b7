"""Data intervals: the reference's lists, and that they partition the batch whatever the numbers."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from distro_optim.coordinator.rules.assignment import (
    assign_data,
    batch_ids_for_client,
    batch_ids_for_round,
    data_index_for_step,
    lcg_next,
    lcg_shuffle,
)
from distro_optim.coordinator.rules.schedule import batch_size
from distro_optim.coordinator.types import Client, Coordinator, CoordinatorEpochState, NodeIdentity, Round, RunState
from distro_optim.errors import CoordinatorError
from runs import CONFIG, waiting_run


def node(number: int) -> NodeIdentity:
    return NodeIdentity.from_single_key(number.to_bytes(2, "little") + bytes(30))


def training_run(num_clients: int, batch: int, seed: int, data_index: int, percent: int = 0) -> Coordinator:
    state = waiting_run(
        witness_nodes=0, global_batch_size_start=batch, global_batch_size_end=batch, verification_percent=percent
    )
    round_ = Round(random_seed=seed, data_index=data_index, clients_len=num_clients)
    epoch_state = CoordinatorEpochState(
        rounds=(round_, Round(), Round(), Round()), clients=tuple(Client(node(i)) for i in range(num_clients))
    )
    return replace(state, run_state=RunState.ROUND_TRAIN, epoch_state=epoch_state)


def test_numbers_of_the_generator() -> None:
    def first(seed: int) -> list[int]:
        numbers = []
        for _ in range(3):
            seed = lcg_next(seed)
            numbers.append(seed)
        return numbers

    assert first(12345) == [2021368500568277588, 4895494634720187923, 16336879138292273062]
    assert first(0) == [1442695040888963407, 1876011003808476466, 11166244414315200793]


@pytest.mark.parametrize(
    ("count", "seed", "expected"),
    [
        (5, 42, [1, 4, 2, 0, 3]),
        (5, 43, [2, 4, 0, 1, 3]),
        (10, 12345, [1, 7, 3, 9, 0, 2, 4, 6, 5, 8]),
        (8, 2**64 - 1, [4, 5, 3, 6, 1, 0, 7, 2]),
    ],
)
def test_shuffles_of_the_reference(count: int, seed: int, expected: list[int]) -> None:
    items = list(range(count))
    lcg_shuffle(items, seed)
    assert items == expected


@pytest.mark.parametrize(
    ("num_clients", "batch", "seed", "index", "expected"),
    [
        (4, 100, 0, 0, [(0, 24, 0), (25, 49, 2), (50, 74, 1), (75, 99, 3)]),
        (5, 13, 0, 0, [(0, 2, 3), (3, 5, 0), (6, 8, 1), (9, 10, 4), (11, 12, 2)]),
        (5, 13, 7, 1000, [(1000, 1002, 4), (1003, 1005, 3), (1006, 1008, 2), (1009, 1010, 1), (1011, 1012, 0)]),
        (3, 2, 99, 10, [(10, 10, 2), (11, 11, 1)]),
        (
            10,
            32,
            0xDEADBEEFCAFEBABE,
            5,
            [
                *[(5, 8, 0), (9, 12, 5), (13, 15, 4), (16, 18, 3), (19, 21, 8)],
                *[(22, 24, 9), (25, 27, 2), (28, 30, 7), (31, 33, 6), (34, 36, 1)],
            ],
        ),
    ],
)
def test_assignments_of_the_reference(
    num_clients: int, batch: int, seed: int, index: int, expected: list[tuple[int, int, int]]
) -> None:
    assignment = assign_data(training_run(num_clients, batch, seed, index))
    found = [(b.start, b.end, int.from_bytes(owner.signer[:2], "little")) for b, owner in assignment.items()]
    assert found == expected


@pytest.mark.slow
@given(st.integers(1, 256), st.integers(1, 2**16 - 1), st.integers(0, 2**64 - 1), st.integers(0, 2**40))
def test_the_intervals_partition_the_batch(num_clients: int, batch: int, seed: int, index: int) -> None:
    state = training_run(num_clients, batch, seed, index)
    assignment = assign_data(state)
    expected = index
    for batch_id in assignment:
        assert batch_id.start == expected
        expected = batch_id.end + 1
    assert expected == index + batch
    sizes = [len(batch_id) for batch_id in assignment]
    assert max(sizes) - min(sizes) <= 1
    assert sizes == sorted(sizes, reverse=True)
    assert len(set(assignment.values())) == len(assignment) == min(num_clients, batch)
    assert batch_ids_for_round(state, state.current_round, num_clients) == list(assignment)


def test_a_client_knows_its_own_intervals() -> None:
    assignment = assign_data(training_run(3, 2, 99, 10))
    assert [(b.start, b.end) for b in batch_ids_for_client(assignment, node(2))] == [(10, 10)]
    assert batch_ids_for_client(assignment, node(0)) == []


def test_a_round_without_clients_has_no_intervals() -> None:
    assert assign_data(training_run(0, 4, 1, 0)) == {}
    state = training_run(1, 4, 1, 0)
    assert batch_ids_for_round(state, state.current_round, 0) == []


@pytest.mark.parametrize("clients_len", [0, 2, 3])
def test_a_state_that_lists_more_clients_than_its_round_had_is_refused(clients_len: int) -> None:
    state = training_run(4, 8, 1, 0)
    rounds = (replace(state.current_round, clients_len=clients_len), *state.epoch_state.rounds[1:])
    with pytest.raises(CoordinatorError, match="InvalidCommitteeSelection"):
        assign_data(replace(state, epoch_state=replace(state.epoch_state, rounds=rounds)))


def test_verifiers_have_no_work_and_are_refused() -> None:
    with pytest.raises(CoordinatorError, match="verification_percent"):
        assign_data(training_run(10, 32, 1, 0, percent=50))


RAMP = replace(
    CONFIG,
    global_batch_size_start=12288,
    global_batch_size_end=32768,
    global_batch_size_warmup_tokens=549755813888,
    total_steps=50_000,
)


@pytest.mark.parametrize(
    ("tokens", "size"),
    [(0, 12288), (13421772, 12288), (13421773, 12289), (274877906944, 22528), (549755813887, 32768), (2**60, 32768)],
)
def test_the_batch_ramp_of_the_reference(tokens: int, size: int) -> None:
    assert batch_size(RAMP, tokens) == size


def test_halves_round_up_and_not_to_even() -> None:
    config = replace(CONFIG, global_batch_size_start=2, global_batch_size_end=3, global_batch_size_warmup_tokens=2)
    assert batch_size(config, 1) == 3
    assert batch_size(replace(config, global_batch_size_start=1, global_batch_size_end=2), 1) == 2


@pytest.mark.parametrize(
    ("step", "index"),
    [
        (0, 0),
        (1, 0),
        (2, 12288),
        (3, 24577),
        (100, 1221071),
        (1000, 12755109),
        (22000, 568019580),
        (40000, 1157843580),
        (50_001, 0),
    ],
)
def test_where_a_step_starts(step: int, index: int) -> None:
    state = waiting_run()
    state = replace(state, config=RAMP, model=replace(state.model, max_seq_len=2048))
    assert data_index_for_step(state, step) == index
