"""Votes about weights: what counts is having trained, not being there."""

from __future__ import annotations

import pytest
from typing_extensions import override

from distro_optim.comm.addresses import EndpointAddr
from distro_optim.coordinator.model import P2P, Hub
from distro_optim.coordinator.rules.checkpoints import (
    SHARED_BY_PEERS,
    TRUSTING_PEERS,
    believes_host,
    is_shared_by_peers,
)
from distro_optim.errors import ConfigurationError
from distro_optim.strategy.config import RunConfig
from distro_optim.strategy.rounds import actions as act
from distro_optim.strategy.rounds.rounds import Rounds
from distro_optim.strategy.rounds.trust.standing import RESULTS_TO_EARN, SILENT_ROUNDS, Standing
from distro_optim.strategy.rounds.trust.votes import Electorate, decide
from rounds import liars
from rounds.simulator import Member, World, secret
from rounds.vote_simulation import simulate

A, B, C, D, E = (bytes([number]) for number in range(5))


def book(me: bytes, *trained: bytes) -> Standing:
    """That of a peer which has seen these train an epoch."""
    standing = Standing(me)
    standing.begin_epoch([me, *trained])
    for _ in range(RESULTS_TO_EARN):
        standing.end_round([me, *trained], [])
    return standing


# -- standing ----------------------------------------------------------------------------------------------------------


def test_standing_is_earned_by_results_that_count() -> None:
    standing = Standing(A)
    standing.begin_epoch([A, B])
    standing.end_round([A, B], [])
    assert standing.voters((A, B)) == ()
    standing.end_round([A], [])
    assert standing.voters((A, B)) == (A,)
    assert standing.is_ours_earned


def test_newcomers_do_not_vote_beside_those_who_were_in_the_last_epoch() -> None:
    standing = book(A, B)
    standing.begin_epoch([A, B, C, D, E])
    for _ in range(RESULTS_TO_EARN):
        standing.end_round([A, C, D, E], [])
    assert standing.voters((C, D, E, B, A)) == (B, A)
    standing.begin_epoch([A, B, C, D, E])
    assert standing.voters((C, D, E, B, A)) == (B, A, C, D, E), "the longest standing first"


def test_standing_is_lost_by_silence_and_by_being_away() -> None:
    standing = book(A, B, C)
    standing.begin_epoch([A, B, C])
    for _ in range(SILENT_ROUNDS - 1):
        standing.end_round([A], [B])
    standing.end_round([A, B], [])  # late, but there
    for _ in range(SILENT_ROUNDS - 1):
        standing.end_round([A], [B])
    assert standing.has_earned(B)
    standing.end_round([A], [B])
    assert not standing.has_earned(B)
    standing.begin_epoch([A])
    standing.begin_epoch([A, C])
    assert standing.voters((A, C)) == (A,)


# -- the rule ----------------------------------------------------------------------------------------------------------


def test_while_the_host_trains_its_report_is_right_whatever_all_others_say() -> None:
    lies = dict.fromkeys((B, C, D), "lie")
    hosted = Electorate((A, B, C, D, E), (B, C, D, E, A), A)
    assert decide(A, "mine", lies, hosted, final=True).right == "mine"
    assert decide(E, "mine", lies, hosted, final=True).right == "mine", "the host has not spoken yet"
    outcome = decide(E, "other", {**lies, A: "mine"}, hosted, final=False)
    assert (outcome.right, outcome.members, outcome.certain) == ("mine", (A,), True)


def test_reports_that_are_late_count_for_ours_until_they_come() -> None:
    voters = Electorate((A, B, C, D, E), (A, B, C, D, E))
    said = {A: "lie", B: "lie"}
    assert decide(E, "mine", said, voters, final=True).right == "mine"
    assert decide(E, "wrong", {**said, A: "right", B: "right", C: "right"}, voters, final=False).right == "right"


def test_who_has_no_vote_takes_the_word_of_those_who_have() -> None:
    voters = Electorate((A, B, C, D), (A,))
    assert decide(D, "mine", dict.fromkeys((B, C), "lie") | {A: "right"}, voters, final=False).right == "right"
    assert decide(D, "mine", dict.fromkeys((B, C), "lie"), voters, final=True).right == "mine"


def test_of_two_that_differ_the_one_with_the_longer_standing_is_right() -> None:
    voters = Electorate((A, B), (B, A))
    assert decide(A, "a", {B: "b"}, voters, final=True).right == "b"
    assert decide(B, "b", {A: "a"}, voters, final=True).right == "b"


@pytest.mark.slow
@pytest.mark.parametrize(("peers", "lying"), [(2, 1), (3, 1), (3, 2), (4, 1), (4, 2)])
@pytest.mark.parametrize("host", [True, False])
def test_no_sequence_makes_an_honest_peer_with_standing_take_a_liars_weights(
    peers: int, lying: int, host: bool
) -> None:
    total, safe, failed = simulate(peers, lying, host=host)
    assert total
    assert safe or not host
    assert failed == 0


# -- in a run ----------------------------------------------------------------------------------------------------------


class Believing(Member):
    """Knows that the first member hosts the run."""

    @override
    def _new_rounds(self) -> Rounds:
        return Rounds(
            identity=self.id,
            key=self.key,
            address=EndpointAddr(self.key.public),
            draw=self.world.rng.randbytes,
            host=secret(1).public,
        )


class Usurper(liars.LyingReporter, Believing):
    """Says that its weights are others, as do all of its kind."""


@pytest.mark.slow
def test_a_host_keeps_its_weights_though_three_others_report_the_same_false_ones() -> None:
    world = World(total_steps=16, epoch_time=12, max_round_train_time=8)
    host = Believing(world, 1)
    honest = Believing(world, 2)
    for number in range(3, 6):
        Usurper(world, number)
    world.until_finished()
    assert world.state.progress.epoch > 0
    for member in (host, honest):
        assert not member.of(act.Desynced)
        assert len(member.of(act.Initialize)) == 1
    world.members = [host, honest]
    world.assert_equal_weights()


def test_one_that_differs_from_its_host_learns_it_though_liars_agree_with_nobody() -> None:
    world = World(total_steps=16, epoch_time=12, max_round_train_time=8)
    host, honest = Believing(world, 1), Believing(world, 2)
    Usurper(world, 3)
    world.until(lambda state: state.progress.step >= 4)
    for tensor in honest.trainer.weights:
        tensor.view(-1)[0] += 1.0
    world.until_finished()
    assert honest.of(act.Desynced)
    assert not host.of(act.Desynced)
    (again,) = honest.of(act.Initialize)[1:]
    assert again.providers[0] == host.key.public
    assert honest.rounds.fault is None


# -- the operator's word -----------------------------------------------------------------------------------------------


def test_an_operator_may_leave_it_to_the_peers_and_all_learn_it_from_the_runs_state() -> None:
    own = RunConfig(total_steps=5, global_batch_size=4).coordinator_state("run").model.checkpoint
    others = RunConfig(total_steps=5, global_batch_size=4, trust="peers").coordinator_state("run").model.checkpoint
    assert (own, others) == (Hub(SHARED_BY_PEERS), Hub(TRUSTING_PEERS))
    assert believes_host(own)
    assert not believes_host(others)
    assert not believes_host(P2P(TRUSTING_PEERS))
    assert is_shared_by_peers(others)


def test_trust_is_host_or_peers() -> None:
    with pytest.raises(ConfigurationError, match='must be "host" or "peers"'):
        RunConfig(trust="nobody")  # type: ignore[arg-type]
