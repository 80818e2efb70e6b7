"""Runs for tests of the coordinator: small states, and clients known by a number."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import replace
from typing import Any

from distro_optim.coordinator.model import (
    LLM,
    P2P,
    Checkpoint,
    ConstantLR,
    DummyData,
    DummyOptimizer,
    HubRepo,
    LLMArchitecture,
    LLMTrainingDataType,
)
from distro_optim.coordinator.rules.committee import CommitteeSelection
from distro_optim.coordinator.types import (
    Coordinator,
    CoordinatorConfig,
    NodeIdentity,
    RunState,
    Witness,
    WitnessBloom,
    WitnessProof,
)
from distro_optim.verify.bloom import BloomFilter

CONFIG = CoordinatorConfig(
    warmup_time=10,
    cooldown_time=5,
    max_round_train_time=15,
    round_witness_time=3,
    global_batch_size_warmup_tokens=0,
    epoch_time=40,
    total_steps=100,
    init_min_clients=2,
    min_clients=2,
    witness_nodes=1,
    global_batch_size_start=4,
    global_batch_size_end=4,
    verification_percent=0,
    waiting_for_members_extra_time=3,
)


def client(number: int) -> NodeIdentity:
    return NodeIdentity.from_single_key(number.to_bytes(4, "little") + bytes(28))


def clients(*numbers: int) -> list[NodeIdentity]:
    return [client(number) for number in numbers]


def waiting_run(
    run_id: str = "", checkpoint: Checkpoint | None = None, cold_start_warmup_steps: int = 0, **config: Any
) -> Coordinator:
    """A run that waits for members; keyword arguments replace settings of ``CONFIG``."""
    model = LLM(
        max_seq_len=16,
        cold_start_warmup_steps=cold_start_warmup_steps,
        architecture=LLMArchitecture.HF_LLAMA,
        checkpoint=checkpoint or P2P(HubRepo("")),
        data_type=LLMTrainingDataType.PRETRAINING,
        data_location=DummyData(),
        lr_schedule=ConstantLR(0.0, 0.0, 0),
        optimizer=DummyOptimizer(),
    )
    return Coordinator(run_id, RunState.WAITING_FOR_MEMBERS, model, replace(CONFIG, **config))


def bloom_of(participants: Iterable[NodeIdentity]) -> WitnessBloom:
    bloom = BloomFilter(range(1, 9))
    bloom.add_many([hashlib.sha256(identity.signer).digest() for identity in participants])
    return WitnessBloom(bloom.keys, bloom.words)


def elected(state: Coordinator) -> list[tuple[NodeIdentity, WitnessProof]]:
    """The witnesses of the current round with their proofs."""
    selection = CommitteeSelection.for_round(state, state.current_round)
    proofs = [selection.get_witness(index) for index in range(len(state.epoch_state.clients))]
    return [(state.epoch_state.clients[proof.index].id, proof) for proof in proofs if proof.witness]


def report(proof: WitnessProof, participants: Iterable[NodeIdentity]) -> Witness:
    return Witness(proof, participant_bloom=bloom_of(participants))


def ready(index: int) -> Witness:
    """What a client sends at the end of its warm-up."""
    return Witness(WitnessProof(position=index, index=index, witness=False))
