"""Roles: the reference's positions, and the fast shuffle beside the plain one."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from distro_optim.coordinator.rules.committee import CommitteeSelection, shuffled_index, shuffled_indices
from distro_optim.coordinator.types import Client, Committee
from distro_optim.errors import CoordinatorError
from runs import client

HUNDRED = CommitteeSelection(10, 20, 30, 100, 12345)


@pytest.mark.parametrize(
    ("seed", "count", "expected"),
    [
        (0, 10, [9, 7, 4, 1, 8, 0, 5, 6, 3, 2]),
        (1, 100, [57, 43, 2, 9, 75, 79, 41, 28, 67, 17]),
        (2, 1000, [629, 382, 107, 108, 613]),
    ],
)
def test_shuffled_places_of_the_reference(seed: int, count: int, expected: list[int]) -> None:
    key = bytes([seed]) * 32
    assert [shuffled_index(index, count, key) for index in range(len(expected))] == expected
    assert shuffled_indices(count, key)[: len(expected)].tolist() == expected


@pytest.mark.slow
@given(st.integers(1, 600), st.binary(min_size=32, max_size=32), st.data())
def test_the_fast_shuffle_is_a_permutation_and_agrees_with_the_plain_one(
    count: int, seed: bytes, data: st.DataObject
) -> None:
    places = shuffled_indices(count, seed)
    assert sorted(places) == list(range(count))
    index = data.draw(st.integers(0, count - 1))
    assert places[index] == shuffled_index(index, count, seed)


def test_a_place_outside_of_the_list_is_refused() -> None:
    with pytest.raises(CoordinatorError, match="InvalidCommitteeSelection"):
        shuffled_index(10, 10, bytes(32))
    with pytest.raises(CoordinatorError, match="InvalidCommitteeSelection"):
        HUNDRED.get_committee(100)


def test_roles_of_a_hundred_clients() -> None:
    assert HUNDRED.seed.hex() == "e1543551249113046932741cc28f36b4bbcc542233eb5094874072d3167f160a"
    assert [HUNDRED.get_committee(i).position for i in range(12)] == [83, 58, 32, 29, 76, 82, 21, 88, 14, 56, 19, 90]
    assert [HUNDRED.get_witness(i).position for i in range(12)] == [58, 86, 21, 7, 69, 31, 63, 29, 11, 88, 12, 73]
    witnesses = [i for i in range(100) if HUNDRED.get_witness(i).witness]
    assert witnesses == [3, 8, 10, 16, 21, 22, 31, 33, 43, 51, 54, 56, 67, 73, 77, 80, 92, 95, 96, 99]
    tie_breakers = [i for i in range(100) if HUNDRED.get_committee(i).committee is Committee.TIE_BREAKER]
    assert tie_breakers == [19, 24, 43, 55, 58, 66, 67, 69, 77, 89]


def test_without_a_number_everybody_witnesses_up_to_32() -> None:
    few = CommitteeSelection(0, 2, 0, 5, 7)
    assert few.seed.hex() == "aae89fc0f03e2959ae4d701a80cc3915918c950b159f6abb6c92c1433b1a8534"
    assert [few.get_committee(i).position for i in range(5)] == [3, 2, 4, 0, 1]
    assert [few.get_witness(i).position for i in range(5)] == [3, 2, 0, 1, 4]
    many = CommitteeSelection(0, 0, 0, 100, 7)
    assert sum(many.get_witness(i).witness for i in range(100)) == 32


@pytest.mark.parametrize(
    ("arguments", "counts"),
    [
        ((10, 20, 30, 100, 12345), (10, 27, 63)),
        ((10, 5, 20, 100, 1), (10, 18, 72)),
        ((100, 5, 20, 100, 1), (100, 0, 0)),
        ((10, 5, 0, 100, 1), (10, 0, 90)),
    ],
)
def test_sizes_of_the_committees(arguments: tuple[int, int, int, int, int], counts: tuple[int, int, int]) -> None:
    selection = CommitteeSelection(*arguments)
    assert (selection.tie_breaker_nodes, selection.verifier_nodes, selection.trainer_nodes) == counts
    roles = Counter(selection.get_committee(i).committee for i in range(100))
    assert tuple(roles[committee] for committee in Committee) == counts


@pytest.mark.parametrize(
    "arguments",
    [(10, 5, 20, 9, 1), (10, 5, 101, 100, 1), (10, 5, 101, 5, 1), (10, 50, 20, 11, 1), (0, 0, 0, 2**64 - 1, 1)],
)
def test_contradicting_numbers_are_refused(arguments: tuple[int, int, int, int, int]) -> None:
    with pytest.raises(CoordinatorError, match="InvalidCommitteeSelection"):
        CommitteeSelection(*arguments)


def test_only_the_true_claim_of_the_true_client_is_verified() -> None:
    listed = tuple(Client(client(i)) for i in range(100))
    for index in range(100):
        committee, witness = HUNDRED.get_committee(index), HUNDRED.get_witness(index)
        assert HUNDRED.verify_committee(client(index), committee, listed)
        assert HUNDRED.verify_witness(client(index), witness, listed)
        assert not HUNDRED.verify_committee(client(index + 1), committee, listed)
        assert not HUNDRED.verify_witness(client(index), replace(witness, witness=not witness.witness), listed)
        assert not HUNDRED.verify_committee(client(index), replace(committee, position=101), listed)
        assert not HUNDRED.verify_committee(client(index), replace(committee, index=2**63), listed)
    assert not HUNDRED.verify_witness(client(99), HUNDRED.get_witness(99), listed[:99])


def test_a_list_longer_than_the_round_had_clients_does_not_reach_past_it() -> None:
    selection = CommitteeSelection(0, 0, 0, 2, 1)
    proof = replace(selection.get_witness(1), index=2)
    assert not selection.verify_witness(client(2), proof, tuple(Client(client(i)) for i in range(3)))


def test_a_proof_holds_if_it_says_what_the_selection_says_of_its_index() -> None:
    other = {Committee.TIE_BREAKER: Committee.TRAINER, Committee.VERIFIER: Committee.TIE_BREAKER}
    for index in range(HUNDRED.total_nodes):
        proof = HUNDRED.get_committee(index)
        assert HUNDRED.holds(proof)
        assert HUNDRED.committee_of(index) is proof.committee
        assert not HUNDRED.holds(replace(proof, position=proof.position + 1))
        assert not HUNDRED.holds(replace(proof, committee=other.get(proof.committee, Committee.VERIFIER)))
    with pytest.raises(CoordinatorError):
        HUNDRED.holds(replace(HUNDRED.get_committee(0), index=HUNDRED.total_nodes))
