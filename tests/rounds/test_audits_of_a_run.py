"""Who audits whom, what auditors say of each other's results, and what comes of it."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from typing_extensions import override

from distro_optim.comm.addresses import EndpointAddr
from distro_optim.comm.announcements import Announcement
from distro_optim.comm.signing import SecretKey
from distro_optim.coordinator.model import P2P, Hub, HubRepo
from distro_optim.coordinator.rules.checkpoints import (
    SHARED_BY_PEERS,
    TRUSTING_PEERS,
    audit_fraction_of,
    believes_host,
    hub_of_peers,
    is_shared_by_peers,
)
from distro_optim.errors import ConfigurationError, ProtocolError
from distro_optim.strategy.config import RunConfig
from distro_optim.strategy.rounds import actions as act
from distro_optim.strategy.rounds.actions import DropReason
from distro_optim.strategy.rounds.audits.book import AuditBook
from distro_optim.strategy.rounds.audits.docket import CONTRADICTIONS
from distro_optim.strategy.rounds.audits.reports import (
    MAX_BYTES,
    AuditReport,
    Compared,
    decode_report,
    encode_report,
    is_report,
)
from distro_optim.strategy.rounds.rounds import Rounds
from distro_optim.verify.audit import draw_results
from distro_optim.verify.recompute import Evidence
from rounds.auditing import AuditedWorld, Auditor, evidence
from rounds.simulator import TICK, Weather

RIDER = 4
STEPS = 18


def run_with_a_rider(
    *, fraction: float = 1.0, kinds: dict[int, type[Auditor]] | None = None, steps: int = STEPS, **settings: Any
) -> tuple[AuditedWorld, list[Auditor]]:
    world = AuditedWorld(fraction, total_steps=200, epoch_time=400, min_clients=2, **settings)
    world.riders = {RIDER}
    members = [(kinds or {}).get(number, Auditor)(world, number) for number in range(1, 6)]
    world.until(lambda state: state.progress.step >= steps)
    return world, members


@cache
def usual_run() -> tuple[AuditedWorld, list[Auditor]]:
    return run_with_a_rider()


@pytest.mark.slow
def test_a_free_rider_is_named_by_all_and_dropped_and_nobody_else_is() -> None:
    world, members = usual_run()
    rider = members[RIDER - 1]
    for member in members:
        if member is not rider:
            assert member.named == {rider.key.public}
            assert member.rounds.audits[rider.key.public].failed == 1
            assert all(member.rounds.audits[other.key.public].passed for other in members if other is not rider)
    assert rider.id not in {client.id for client in world.state.epoch_state.clients}
    assert not world.host.is_allowed(rider.key.public)
    assert not any(member.of(act.Desynced) for member in members if member is not rider)


@pytest.mark.slow
def test_that_holds_in_bad_weather_and_where_one_of_four_results_is_audited() -> None:
    weather = Weather(gossip_loss=0.3, fetch_loss=0.1)
    _, members = run_with_a_rider(weather=weather, fraction=0.25, steps=60)
    assert members[0].named == {members[RIDER - 1].key.public}


def test_without_audits_nobody_is_asked_and_nothing_is_said() -> None:
    _, members = run_with_a_rider(fraction=0.0, steps=6)
    for member in members:
        assert not member.of(act.AuditResults)
        assert not member.of(act.AuditSettled)
        assert not any(is_report(said.data) for said in member.of(act.AnnounceWeights))
        assert member.rounds.audits == {}


def test_all_draw_the_same_auditors_and_a_result_is_audited_at_the_weights_of_two_steps_later() -> None:
    _, members = usual_run()
    asked: dict[tuple[int, bytes], int] = {}
    for member in members:
        for action in member.of(act.AuditResults):
            assert action.step == action.of_step + 2
            assert action.own is not None
            assert member.key.public not in {each.trainer for each in action.audited}
            assert action.control not in {each.batch for each in action.audited}
            for each in action.audited:
                asked[action.of_step, each.trainer] = asked.get((action.of_step, each.trainer), 0) + 1
    assert max(asked.values()) == 3


class Cunning(Auditor):
    """Waits with its result for as long as it may, and trains only if the newest seed of then would ask for it."""

    def __init__(self, *args: Any, **settings: Any) -> None:
        self.trained: dict[int, bool] = {}
        super().__init__(*args, **settings)

    @override
    def carry_out(self, action: act.Action) -> None:
        if isinstance(action, act.PublishResult):
            self.later(TICK, lambda: self.decide(action))
        else:
            super().carry_out(action)

    def decide(self, action: act.PublishResult) -> list[act.Action]:
        state = self.world.state
        if state.progress.step == action.step:
            self.later(TICK, lambda: self.decide(action))
            return []
        assert state.progress.step == action.step + 1, "later it would not count"
        seed, me = state.current_round.random_seed, self.key.public
        self.trained[action.step] = bool(draw_results(seed, action.step, [me], [], self.audited_world.fraction))
        return self.rounds.publish(self.world.now)

    @override
    def has_trained(self, step: int) -> bool:
        return self.trained[step]


def test_who_trains_only_what_it_will_be_asked_about_cannot_know_what_that_is() -> None:
    world, members = run_with_a_rider(kinds={RIDER: Cunning}, fraction=0.25, steps=4)
    cunning = members[RIDER - 1]
    assert isinstance(cunning, Cunning)
    world.until(lambda state: bool(members[0].named) or state.progress.step >= 100)
    assert members[0].named == {cunning.key.public}
    assert any(cunning.trained.values()), "it is no mere free rider"
    in_time = [cunning.key.public in {each.owner for each in a.counted} for a in members[0].of(act.ApplyResults)]
    assert sum(in_time) > 0.8 * len(in_time), "its results counted"


def test_an_audit_is_asked_for_before_the_results_are_applied() -> None:
    _, members = usual_run()
    for action, following in zip(members[1].log, members[1].log[1:], strict=False):
        if isinstance(action, act.AuditResults):
            assert isinstance(following, act.ApplyResults)


class Slanderer(Auditor):
    """Says of everybody that they train nothing."""

    @override
    def answer(self, step: int, trainer: bytes, found: Evidence, own: Evidence | None) -> None:
        super().answer(step, trainer, evidence(0.5), own)


class QuietSlanderer(Auditor):
    """The same, in the numbers that others cannot compare with theirs."""

    @override
    def answer(self, step: int, trainer: bytes, found: Evidence, own: Evidence | None) -> None:
        super().answer(step, trainer, evidence(0.4, agree=found.assigned.share), evidence(1.0))


@pytest.mark.slow
@pytest.mark.parametrize("liar", [Slanderer, QuietSlanderer])
def test_one_auditor_that_lies_harms_nobody(liar: type[Auditor]) -> None:
    world, members = run_with_a_rider(kinds={2: liar}, steps=12)
    for member in members:
        assert member.named <= {members[RIDER - 1].key.public}
    assert len(world.state.epoch_state.clients) >= 4


class Silent(Auditor):
    @override
    def audit(self, action: act.AuditResults) -> None:
        pass


def test_one_auditor_alone_decides_nothing() -> None:
    _, members = run_with_a_rider(kinds=dict.fromkeys((2, 3, 4, 5), Silent), steps=10)
    assert not any(member.settled for member in members)


class Alone(Auditor):
    """Of a run of Psyche's: audits by itself."""

    @override
    def _new_rounds(self) -> Rounds:
        address = EndpointAddr(self.key.public)
        return Rounds(identity=self.id, key=self.key, address=address, draw=self.world.rng.randbytes, audit_alone=1.0)


def test_in_a_run_of_psyches_a_client_that_wants_to_audits_by_itself_and_tells_nobody() -> None:
    world = AuditedWorld(0.0, total_steps=200, epoch_time=400, round_witness_time=2)
    model = replace(world.host.state.model, checkpoint=Hub(HubRepo("somebody/model")))
    world.host.state = replace(world.host.state, model=model)
    world.riders = {2}
    members = [(Alone if number == 1 else Auditor)(world, number) for number in range(1, 4)]
    for member in members:
        member.number += 10  # nobody of them hosts
    world.riders = {12}
    world.until(lambda state: state.progress.step >= 14)
    alone, rider, other = members
    assert alone.named == {rider.key.public}
    assert alone.rounds.audits[other.key.public].passed
    assert not other.of(act.AuditResults)
    assert not any(is_report(said.data) for member in members for said in member.of(act.AnnounceWeights))


# -- reports -----------------------------------------------------------------------------------------------------------

KEYS = [SecretKey(bytes([number]) * 32) for number in range(1, 5)]
FOUND = Compared.of(evidence(0.7))


def report(key: SecretKey, step: int = 9, trainer: bytes = KEYS[0].public, found: Compared = FOUND) -> AuditReport:
    return AuditReport(0, step, trainer, found, FOUND).signed(key, "run")


def test_a_report_comes_back_as_it_was_and_is_signed_for_one_run() -> None:
    one = report(KEYS[1])
    assert decode_report(encode_report(one)) == one
    assert one.is_signed_by(KEYS[1].public, "run")
    assert one.again().is_signed_by(KEYS[1].public, "run"), "how often it was said is not signed"
    assert encode_report(one.again()) != encode_report(one)
    assert not one.is_signed_by(KEYS[1].public, "another run")
    assert not one.is_signed_by(KEYS[2].public, "run")
    assert not replace(one, trainer=KEYS[3].public).is_signed_by(KEYS[1].public, "run")


def test_the_largest_report_fits() -> None:
    most = Compared(*[0xFFFF_FFFF] * 8)
    one = AuditReport(0xFFFF, 0xFFFF_FFFF, bytes(32), most, most, bytes(64), 0xFFFF_FFFF)
    assert decode_report(encode_report(one)) == one
    assert len(encode_report(one)) <= MAX_BYTES


@given(st.binary(max_size=300))
def test_any_bytes_are_a_report_or_our_own_error(data: bytes) -> None:
    for given_bytes in (data, encode_report(report(KEYS[1]))[:5] + data):
        try:
            decoded = decode_report(given_bytes)
        except ProtocolError:
            continue
        assert decode_report(encode_report(decoded)) == decoded


@pytest.mark.parametrize(
    "wrong",
    [{"agree": 1001}, {"control_agree": 1001}, {"only_assigned": 900}, {"only_control": 900}, {"sent": 10}],
)
def test_numbers_that_contradict_each_other_are_no_report(wrong: dict[str, int]) -> None:
    with pytest.raises(ProtocolError, match="report of an audit"):
        decode_report(encode_report(report(KEYS[1], found=replace(FOUND, **wrong))))


@pytest.mark.slow
def test_reports_of_who_was_not_drawn_of_another_run_and_twice_are_dropped() -> None:
    world, members = run_with_a_rider(kinds=dict.fromkeys(range(1, 6), Silent), steps=10)
    listener = members[0]

    def drop(sender: bytes, data: bytes) -> DropReason | None:
        actions = listener.rounds.receive_weights(Announcement(sender, data), world.now)
        dropped = [action for action in actions if isinstance(action, act.Dropped)]
        return dropped[0].reason if dropped else None

    asked = members[1].of(act.AuditResults)[-1]
    trainer = next(each.trainer for each in asked.audited if each.trainer != listener.key.public)
    one = AuditReport(world.state.progress.epoch, asked.of_step, trainer, FOUND, FOUND)
    true = encode_report(one.signed(members[1].key, "run"))
    assert drop(members[1].key.public, true[:-1]) is DropReason.MALFORMED
    assert drop(trainer, true) is DropReason.WRONG_STEP, "it would be about itself"
    assert drop(members[1].key.public, encode_report(one.signed(members[1].key, "b"))) is DropReason.BAD_SIGNATURE
    old = replace(one, step=1).signed(members[1].key, "run")
    assert drop(members[1].key.public, encode_report(old)) is DropReason.WRONG_STEP
    assert drop(members[1].key.public, true) is None
    assert drop(members[1].key.public, true) is DropReason.DUPLICATE


# -- the book ----------------------------------------------------------------------------------------------------------


def settle(book: AuditBook, step: int, found: dict[int, Compared]) -> Any:
    auditors = tuple(key.public for key in KEYS[1:])
    book.expect(0, step, [(KEYS[0].public, auditors)])
    settled = None
    for number, compared in found.items():
        settled = book.add(KEYS[number].public, report(KEYS[number], step, found=compared))
    return settled


def test_an_auditor_that_others_contradict_again_and_again_has_no_weight() -> None:
    book = AuditBook(lambda key: True)
    untrue = Compared.of(evidence(0.5))
    liar = KEYS[3].public
    for step in range(CONTRADICTIONS):
        assert book.has_weight(liar)
        settle(book, step, {1: FOUND, 2: FOUND, 3: untrue})
    assert not book.has_weight(liar)
    assert book.has_weight(KEYS[1].public)
    settle(book, 50, {1: untrue, 3: untrue})  # both of them against one: but one does not count
    assert settle(book, 51, {1: untrue, 3: untrue, 2: FOUND}) is None


def test_an_accident_is_forgiven() -> None:
    book = AuditBook(lambda key: True)
    for step in range(20):
        untrue = step % 3 == 0
        settle(book, step, {1: FOUND, 2: FOUND, 3: Compared.of(evidence(0.5)) if untrue else FOUND})
    assert book.has_weight(KEYS[3].public)


def test_who_has_no_standing_does_not_count() -> None:
    book = AuditBook(lambda key: key != KEYS[3].public)
    for step in range(10):
        assert settle(book, step, {2: FOUND, 3: FOUND, 1: FOUND}) is None or book.has_weight(KEYS[1].public)
    assert KEYS[0].public in book.seen()
    alone = AuditBook(lambda key: key == KEYS[1].public)
    for step in range(10):
        assert settle(alone, step, {2: FOUND, 3: FOUND, 1: FOUND}) is None
    assert alone.seen() == {}


def test_a_result_without_anything_in_it_is_as_one_that_was_not_trained() -> None:
    book = AuditBook(lambda key: True)
    empty = Compared(0, 0, 0, 0, 0, 0, 0, 1000)
    settled = [settle(book, step, {1: FOUND, 2: FOUND, 3: FOUND}) for step in range(4)]
    assert settled[-1].passed
    failed = [settle(book, step, {1: empty, 2: empty, 3: empty}) for step in range(4, 12)]
    assert any(s is not None and not s.passed for s in failed)


def test_who_has_failed_is_remembered_when_it_is_gone_and_others_are_not() -> None:
    book = AuditBook(lambda key: True)
    for step in range(12):
        settle(book, step, dict.fromkeys((1, 2, 3), Compared.of(evidence(0.5))))
    assert book.seen()[KEYS[0].public].failed
    book.begin_epoch([])
    assert set(book.seen()) == {KEYS[0].public}


def test_who_has_failed_here_is_audited_for_those_that_have_heard_less() -> None:
    book, host = AuditBook(lambda key: True), AuditBook(lambda key: True)
    untrue = dict.fromkeys((1, 2, 3), Compared.of(evidence(0.5)))
    failed: list[Any] = []
    step = 0
    while not failed:
        failed = [settled for settled in [settle(book, step, untrue)] if settled is not None and not settled.passed]
        step += 1
    while not host.seen():
        assert settle(book, step, untrue) is None, "it is said once"
        settle(host, step, untrue)
        step += 1
    assert host.seen()[KEYS[0].public].failed == book.seen()[KEYS[0].public].failed == 1


# -- what a run says ---------------------------------------------------------------------------------------------------


def test_a_run_says_how_much_is_audited_in_its_state() -> None:
    own = RunConfig(total_steps=5, global_batch_size=4, audit_fraction=0.02)
    checkpoint = own.coordinator_state("run").model.checkpoint
    assert audit_fraction_of(checkpoint) == 0.02
    assert is_shared_by_peers(checkpoint)
    assert believes_host(checkpoint)
    both = RunConfig(total_steps=5, global_batch_size=4, audit_fraction=1, trust="peers")
    trusting = both.coordinator_state("run").model.checkpoint
    assert audit_fraction_of(trusting) == 1.0
    assert not believes_host(trusting)
    assert isinstance(trusting, Hub)
    assert audit_fraction_of(P2P(trusting.repo)) == 1.0
    assert (hub_of_peers(), hub_of_peers(trust_peers=True)) == (SHARED_BY_PEERS, TRUSTING_PEERS)


@pytest.mark.parametrize(
    "revision", ["audit-2", "audit--1", "audit-nan", "audit-", "other", "", ",audit-0.5", "audit-1-"]
)
def test_another_revision_is_none_of_ours(revision: str) -> None:
    assert not is_shared_by_peers(Hub(HubRepo(SHARED_BY_PEERS.repo_id, revision)))
    assert audit_fraction_of(Hub(HubRepo(SHARED_BY_PEERS.repo_id, revision))) == 0.0


@pytest.mark.parametrize("fraction", [-0.1, 1.5, float("nan"), True, "0.1"])
def test_a_share_is_between_none_and_all(fraction: Any) -> None:
    with pytest.raises(ConfigurationError, match="audit_fraction"):
        RunConfig(audit_fraction=fraction)
