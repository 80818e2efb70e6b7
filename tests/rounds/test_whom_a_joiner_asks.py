"""Who comes into a run asks for the model whom the run knows to have it."""

from __future__ import annotations

from dataclasses import replace

from distro_optim.coordinator.model import P2P
from distro_optim.coordinator.rules.checkpoints import SHARED_BY_PEERS
from distro_optim.coordinator.rules.probation import marked
from distro_optim.coordinator.types import Client, Coordinator, NodeIdentity, RunState
from distro_optim.strategy.rounds.choose_providers import whom_to_ask
from distro_optim.strategy.rounds.trust.votes import Electorate
from runs import clients, waiting_run

JOINER = clients(9)[0]


def warm_up(listed: list[NodeIdentity], newcomers: list[NodeIdentity]) -> Coordinator:
    state = waiting_run("run", P2P(SHARED_BY_PEERS), round_witness_time=0, witness_nodes=0)
    epoch = replace(state.epoch_state, clients=marked([Client(id=who) for who in listed], newcomers))
    return replace(state, run_state=RunState.WARMUP, epoch_state=epoch)


def asked(state: Coordinator) -> list[bytes]:
    keys = tuple(client.id.p2p_identity for client in state.epoch_state.clients)
    action = whom_to_ask(
        state,
        JOINER,
        right=(),
        electorate=Electorate(keys),
        has_standing=False,
        ready=(),
        had_the_weights=False,
        vain_attempts=0,
    )
    return list(action.providers)


def test_a_joiner_asks_nobody_on_probation_for_the_model() -> None:
    regular, newcomers = clients(1, 2), clients(3, 4)
    state = warm_up([*regular, *newcomers, JOINER], [*newcomers, JOINER])
    assert asked(state) == [client.p2p_identity for client in regular]


def test_where_nobody_is_on_probation_all_are_asked() -> None:
    assert asked(warm_up([*clients(1, 2, 3), JOINER], [])) == [client.p2p_identity for client in clients(1, 2, 3)]
