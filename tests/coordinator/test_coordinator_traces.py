"""Random walks of Psyche's own coordinator, replayed: every result, every byte of every state, every derived role.

Each file of ``vectors/coordinator`` starts with a state; each further line is one input, its result there and a digest
of the state after it. Clients are numbers: signer and peer-to-peer key are the number in two bytes, zeros, and a 7.
"""

from __future__ import annotations

import gzip
import hashlib
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from distro_optim.comm import postcard
from distro_optim.coordinator.model import (
    P2P,
    Checkpoint,
    DummyCheckpoint,
    Ephemeral,
    Gcs,
    GcsRepo,
    Hub,
    HubRepo,
    P2PGcs,
)
from distro_optim.coordinator.rules import machine
from distro_optim.coordinator.rules.assignment import assign_data, round_batch_size
from distro_optim.coordinator.rules.committee import CommitteeSelection
from distro_optim.coordinator.rules.schedule import cold_start_bounds
from distro_optim.coordinator.types import (
    Committee,
    CommitteeProof,
    Coordinator,
    MerkleRoot,
    NodeIdentity,
    Witness,
    WitnessBloom,
    WitnessProof,
)
from distro_optim.errors import CoordinatorError
from distro_optim.verify.bloom import BloomFilter

TRACES = sorted((Path(__file__).parents[1] / "vectors" / "coordinator").glob("trace_*.jsonl.gz"))
CHECKPOINTS: dict[str, Callable[[Any], Checkpoint]] = {
    "Dummy": DummyCheckpoint,
    "Hub": Hub,
    "P2P": P2P,
    "Gcs": Gcs,
    "P2PGcs": P2PGcs,
}


def identity(number: int) -> NodeIdentity:
    return NodeIdentity.from_single_key(bytes([number & 255, number >> 8, *[0] * 29, 7]))


def checkpoint_of(said: Any) -> Checkpoint:
    if said == "Ephemeral":
        return Ephemeral()
    ((kind, repo),) = said.items()
    return CHECKPOINTS[kind](HubRepo(**repo) if "repo_id" in repo else GcsRepo(**repo))


def witness_of(line: dict[str, Any]) -> Witness:
    proof = WitnessProof(**line["proof"])
    if "bloom_keys" not in line:
        return Witness(proof)
    participants, broadcasts = BloomFilter(line["bloom_keys"]), BloomFilter(line["bloom_keys"])
    participants.add_many([hashlib.sha256(identity(number).signer).digest() for number in line["participants"]])
    broadcasts.add_many([bytes.fromhex(data_hash) for data_hash in line["broadcasts"]])
    return Witness(
        proof,
        WitnessBloom(participants.keys, participants.words),
        WitnessBloom(broadcasts.keys, broadcasts.words),
        MerkleRoot(bytes.fromhex(line["merkle_root"])),
    )


def checks_of(line: dict[str, Any]) -> list[tuple[NodeIdentity, CommitteeProof]]:
    return [
        (identity(number), CommitteeProof(Committee(committee), position, index))
        for number, committee, position, index in line["checks"]
    ]


def apply(state: Coordinator, line: dict[str, Any]) -> tuple[Coordinator, str]:
    """The input of one line: the state after it and the name of the result."""
    try:
        match line["op"]:
            case "tick":
                pending = None if line["pending"] is None else [identity(number) for number in line["pending"]]
                state, result = machine.tick(state, pending, line["now"], line["random_seed"])
                return state, result.value
            case "warmup_witness":
                sender = identity(line["from"])
                return machine.warmup_witness(state, sender, witness_of(line), line["now"], line["random_seed"]), "Ok"
            case "witness":
                return machine.witness(state, identity(line["from"]), witness_of(line), line["now"]), "Ok"
            case "health_check":
                state, dropped = machine.health_check(state, checks_of(line))
                return state, f"Dropped({dropped})"
            case "checkpoint":
                uploaded = checkpoint_of(line["checkpoint"])
                return machine.checkpoint(state, identity(line["from"]), line["index"], uploaded), "Ok"
            case "withdraw":
                return machine.withdraw(state, line["index"]), "Ok"
            case "pause":
                return machine.pause(state, line["now"]), "Ok"
            case "resume":
                return machine.resume(state, line["now"]), "Ok"
            case other:
                raise AssertionError(f"the trace holds an unknown input {other!r}")
    except CoordinatorError as error:
        return state, error.code.value


def queried(state: Coordinator) -> dict[str, Any]:
    selection = CommitteeSelection.for_round(state, state.current_round)
    places = range(len(state.epoch_state.clients))
    bounds = cold_start_bounds(state)
    return {
        "assignment": [
            [batch.start, batch.end, int.from_bytes(owner.signer[:2], "little")]
            for batch, owner in assign_data(state, selection).items()
        ],
        "batch_size": round_batch_size(state, state.current_round),
        "cold_start_bounds": None if bounds is None else list(bounds),
        "committee_positions": [selection.get_committee(place).position for place in places],
        "witnesses": [place for place in places if selection.get_witness(place).witness],
    }


def lines_of(trace: Path) -> Iterator[dict[str, Any]]:
    with gzip.open(trace, "rt") as file:
        yield from map(json.loads, file)


@pytest.mark.slow
@pytest.mark.parametrize("trace", TRACES, ids=lambda trace: trace.name.split(".")[0])
def test_every_line_of_a_recorded_walk_is_reproduced(trace: Path) -> None:
    lines = lines_of(trace)
    state = postcard.decode(Coordinator, bytes.fromhex(next(lines)["postcard"]))
    count = 0
    for number, line in enumerate(lines, start=2):
        where = f"{trace.name} line {number}: {line['op']}"
        state, result = apply(state, line)
        assert result == line["result"], where
        encoded = postcard.encode(state)
        assert (len(encoded), hashlib.sha256(encoded).hexdigest()) == (line["state"]["len"], line["state"]["sha256"]), (
            where
        )
        if "query" in line:
            assert queried(state) == line["query"], where
        count += 1
    assert count == 300


def test_all_recorded_walks_are_there() -> None:
    assert len(TRACES) == 6
