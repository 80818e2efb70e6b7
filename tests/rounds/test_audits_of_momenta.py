"""Who shows its momentum to whom, what auditors say of it, and every way in which a stranger could do it wrongly."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from typing import Any, Final

import pytest
import torch
from blake3 import blake3
from hypothesis import given
from hypothesis import strategies as st
from typing_extensions import override

from distro_optim.comm.addresses import EndpointAddr
from distro_optim.comm.announcements import Announcement
from distro_optim.comm.signing import SecretKey
from distro_optim.comm.tickets import BlobFormat, BlobTicket
from distro_optim.compress import CompressedUpdate, ParamSpec, make_plan
from distro_optim.coordinator.model import P2P, Hub
from distro_optim.coordinator.rules.checkpoints import audit_fraction_of, audits_momentum, hub_of_peers
from distro_optim.errors import ProtocolError
from distro_optim.strategy.config import RunConfig
from distro_optim.strategy.rounds import actions as act
from distro_optim.strategy.rounds.actions import DropReason
from distro_optim.strategy.rounds.audits.momentum_book import LAST_AUDITS, LIES, NOT_SHOWN, MomentumBook
from distro_optim.strategy.rounds.audits.momentum_messages import (
    MAX_BYTES,
    MAX_GROUPS,
    Distances,
    MomentumMessage,
    MomentumReport,
    MomentumSaid,
    OpeningSaid,
    Outcome,
    decode_momentum_message,
    is_momentum_message,
)
from distro_optim.strategy.rounds.audits.momentum_watch import KEPT_SAID, OPENING_TAG, commits_momentum
from distro_optim.strategy.rounds.audits.reports import is_report
from distro_optim.strategy.rounds.pipeline import RoundPipeline
from distro_optim.testing.updates import random_update
from distro_optim.verify.audit import LEAVES, Challenge, Verdict, is_auditable
from distro_optim.verify.calibrate import SAMPLES_OF_A_PEER, Noise
from distro_optim.verify.opening import max_opening_bytes
from rounds.auditing import AuditedWorld, Auditor
from rounds.simulator import CPU, PLAN, SHAPES

EXACT: Final = make_plan(
    [ParamSpec(shape, torch.float32, CPU, 0, 4, 2) for shape in SHAPES.values()], "divisor", arithmetic="exact"
)
CHEAT, SILENT = 4, 5
SMALL = Noise(jaccard=0.001, hamming=0.0, manhattan=0.001)
FAR = Verdict(reasons=(), jaccard=0.3, hamming=0.0, manhattan=0.6, coefficients=100)
NEAR = Verdict(reasons=(), jaccard=0.001, hamming=0.0, manhattan=0.002, coefficients=100)


class MomentumAuditor(Auditor):
    """Commits to made-up momenta, shows them, and finds in others' what they are said to have."""

    shows: Callable[[int], bytes | None] = staticmethod(lambda step: b"shown in %d" % step)
    found: Verdict = NEAR

    @override
    def gradient(self, action: act.TrainBatch) -> CompressedUpdate:
        return random_update(EXACT, quantized=True, seed=100 * action.step + action.batch.start)

    @override
    def carry_out(self, action: act.Action) -> None:
        now = self.world.now
        match action:
            case act.PublishResult(step) if self.of(act.TrainBatch)[-1].commits:
                root = blake3(b"%d of %d" % (step, self.number)).digest()
                self.do(self.rounds.momentum_committed(step, root, (0.9,), now))
                super().carry_out(action)
            case act.OpenMomentum(step=step):
                if (data := self.shows(step)) is not None:
                    self.do(self.rounds.momentum_opened(step, data, blake3(data).digest(), now))
            case act.PrepareAudit(of_step=step, own=own) if own is not None:
                self.do(self.rounds.own_momentum_audited(step, SMALL, now))
            case act.AuditMomentum(of_step=step, challenge=challenge):
                trainer = next(m for m in self.world.members if m.key.public == challenge.trainer)
                assert isinstance(trainer, MomentumAuditor)
                self.do(self.rounds.momentum_audited(step, challenge.trainer, trainer.found, now))
            case _:
                super().carry_out(action)

    @property
    def liars(self) -> dict[bytes, str]:
        """Peers that have failed by test 2, and why."""
        return {s.trainer: s.words for s in self.settled if not s.passed and "momentum" in s.words}


class MomentumWorld(AuditedWorld):
    def __init__(self, *, momentum: bool = True) -> None:
        super().__init__(1.0, total_steps=200, epoch_time=900, min_clients=5)
        model = replace(
            self.host.state.model, checkpoint=Hub(hub_of_peers(audit_fraction=1.0, audit_momentum=momentum))
        )
        self.host.state = replace(self.host.state, model=model)


def run(steps: int, *, momentum: bool = True, **of_cheat: Any) -> tuple[MomentumWorld, list[MomentumAuditor]]:
    """Five members, the fourth of which has these attributes."""
    world = MomentumWorld(momentum=momentum)
    members = [MomentumAuditor(world, number) for number in range(1, 6)]
    for name, value in of_cheat.items():
        setattr(members[CHEAT - 1], name, value)
    world.until(lambda state: state.progress.step >= steps)
    return world, members


@pytest.fixture(autouse=True)
def exact(monkeypatch: pytest.MonkeyPatch) -> None:
    assert not is_auditable(PLAN)
    assert is_auditable(EXACT)
    monkeypatch.setattr("rounds.simulator.PLAN", EXACT)


@cache
def usual_run() -> tuple[MomentumWorld, list[MomentumAuditor]]:
    world, members = run(8, found=FAR)
    world.until(lambda state: bool(members[0].liars) or state.progress.step > 24)
    world.until(lambda state, step=world.state.progress.step: state.progress.step > step)  # type: ignore[misc]
    return world, members


@pytest.mark.slow
def test_a_peer_whose_momentum_is_another_one_is_named_and_dropped_and_nobody_else_is() -> None:
    world, members = usual_run()
    cheat = members[CHEAT - 1]
    for member in members:
        if member is not cheat:
            assert set(member.liars) <= {cheat.key.public}, "whoever had one audit less of it has no more of them"
            assert all(member.rounds.audits[o.key.public].passed for o in members if o is not cheat)
    host = members[0]
    assert "Manhattan distance of the momentum 0.600" in host.liars[cheat.key.public]
    assert host.rounds.audits[cheat.key.public].failed == 1
    assert cheat.id not in {client.id for client in world.state.epoch_state.clients}


def test_what_is_not_as_it_was_committed_to_counts_as_a_lie() -> None:
    _, members = run(10, found=Verdict(reasons=("leaf 3 is not the one that it committed to",)))
    assert "not what it had committed to" in members[0].liars[members[CHEAT - 1].key.public]


@pytest.mark.slow
def test_who_has_no_gradients_and_says_so_is_no_liar() -> None:
    skipped = CompressedUpdate.empty(EXACT, quantized=True)
    _, members = run(10, gradient=lambda action: skipped, found=FAR)
    cheat = members[CHEAT - 1].key.public
    applied = [action for action in members[0].of(act.ApplyResults) if cheat in {one.owner for one in action.counted}]
    assert len(applied) > 5, "its results count"
    for member in members:
        assert member.liars == {}
        assert not any(audit.challenge.trainer == cheat for audit in member.of(act.AuditMomentum))


@pytest.mark.slow
def test_who_shows_nothing_fails_with_its_sixth_audit_and_not_before() -> None:
    world, members = run(5 + NOT_SHOWN, shows=lambda step: None)
    cheat = members[CHEAT - 1].key.public
    assert members[0].liars == {}
    world.until(lambda state: state.progress.step >= 18)
    assert "was not shown" in members[0].liars[cheat]
    assert f"({NOT_SHOWN} of its last {NOT_SHOWN} audits" in members[0].liars[cheat]


@pytest.mark.slow
def test_who_is_slow_now_and_then_does_not_fail() -> None:
    _, members = run(26, shows=lambda step: None if step % 3 == 0 else b"shown in %d" % step)
    assert members[0].liars == {}
    assert members[0].rounds.audits[members[CHEAT - 1].key.public].passed > 5


def test_each_audit_is_of_two_rounds_before_and_of_a_result_with_one_before_it() -> None:
    _, members = usual_run()
    first = min(action.step for action in members[0].of(act.TrainBatch))
    for member in members:
        asked = [action.step for action in member.of(act.OpenMomentum)]
        assert min(asked) == first + 1, "nobody has committed to what was before the first round"
        for prepared in member.of(act.PrepareAudit):
            assert prepared.step == prepared.of_step + 2
        for audit in member.of(act.AuditMomentum):
            assert (audit.before.step, audit.after.step) == (audit.of_step - 1, audit.of_step)
            assert member.key.public in audit.challenge.auditors
            assert audit.opening == b"shown in %d" % audit.of_step
    for member in members:
        for following, prepared in zip(member.log[1:], member.log, strict=False):
            if isinstance(prepared, act.PrepareAudit):
                assert isinstance(following, act.AuditResults | act.ApplyResults), "the weights are still those of then"


def test_only_openings_of_the_right_size_are_fetched_and_only_from_who_was_asked() -> None:
    _, members = usual_run()
    keys = {member.key.public for member in members}
    for member in members:
        for fetch in member.of(act.FetchBlob):
            if fetch.tag.startswith(OPENING_TAG):
                assert fetch.max_size == max_opening_bytes(EXACT, LEAVES)
                assert fetch.ticket.addr.id in keys - {member.key.public}
                assert fetch.providers == ()


@pytest.mark.slow
def test_what_is_too_large_is_not_taken_and_so_not_shown() -> None:
    _, members = run(19, shows=lambda step: bytes(1 + max_opening_bytes(EXACT, LEAVES)) + b"%d" % step)
    cheat = members[CHEAT - 1].key.public
    assert not any(a.challenge.trainer == cheat for m in members for a in m.of(act.AuditMomentum))
    assert "was not shown" in members[0].liars[cheat]


def test_without_it_in_the_runs_state_nobody_commits_or_asks() -> None:
    _, members = run(7, momentum=False)
    for member in members:
        assert not any(action.commits for action in member.of(act.TrainBatch))
        assert not member.of(act.OpenMomentum)
        assert not member.of(act.PrepareAudit)
        assert not any(is_momentum_message(said.data) for said in member.of(act.AnnounceWeights))
        assert any(is_report(said.data) for m in members for said in m.of(act.AnnounceWeights))


# -- what a stranger may try -------------------------------------------------------------------------------------------


def ticket_of(peer: bytes, data: bytes = b"x", kind: BlobFormat = BlobFormat.RAW) -> BlobTicket:
    return BlobTicket(EndpointAddr(peer), kind, blake3(data).digest())


@cache
def quiet_run() -> tuple[MomentumWorld, list[MomentumAuditor]]:
    """Nobody shows anything, so that all audits are under way."""
    world, members = run(7, shows=lambda step: None)
    for member in members:
        member.shows = lambda step: None
    world.until(lambda state: state.progress.step >= 9)
    return world, members


@pytest.fixture
def case() -> Any:
    return Case(*quiet_run())


class Case:
    """A listener, an audit in which it is an auditor, and an auditor and a trainer of it."""

    def __init__(self, world: MomentumWorld, members: list[MomentumAuditor]) -> None:
        self.world, self.members = world, members
        self.step = world.state.progress.step - 2
        watch = members[0].rounds._audits.momenta
        for member in members[1:]:
            challenge = watch._book.challenge(self.step, member.key.public)
            if challenge is not None and members[0].key.public in challenge.auditors:
                self.trainer, self.challenge = member, challenge
                break
        keys = {member.key.public: member for member in members}
        self.auditor = next(keys[key] for key in self.challenge.auditors if key != members[0].key.public)
        self.bystander = next(
            m for m in members[1:] if m.key.public not in (*self.challenge.auditors, self.trainer.key.public)
        )

    def hears(self, sender: MomentumAuditor, data: bytes) -> DropReason | None:
        actions = self.members[0].rounds.receive_weights(Announcement(sender.key.public, data), self.world.now)
        self.did = actions
        return next((action.reason for action in actions if isinstance(action, act.Dropped)), None)

    def says(self, sender: MomentumAuditor, message: MomentumMessage, run_id: str = "run") -> DropReason | None:
        return self.hears(sender, message.signed(sender.key, run_id).encode())

    @property
    def epoch(self) -> int:
        return self.world.state.progress.epoch

    def opening(self, **other: Any) -> OpeningSaid:
        own = OpeningSaid(self.epoch, self.step, bytes(64), 0, ticket_of(self.trainer.key.public))
        return replace(own, **other)

    def report(self, **other: Any) -> MomentumReport:
        trainer = self.trainer.key.public
        own = MomentumReport(
            self.epoch, self.step, bytes(64), 0, trainer, Outcome.COMPARED, Distances(1, 2, 3), 9, None
        )
        return replace(own, **other)

    def momentum(self, step: int, nonce: int = 0) -> MomentumSaid:
        return MomentumSaid(self.epoch, step, bytes(64), nonce, bytes(32), (0.9,))


@pytest.mark.slow
def test_openings_that_nobody_asked_for_are_dropped_before_anything_is_fetched(case: Case) -> None:
    bad: dict[str, tuple[MomentumAuditor, OpeningSaid, DropReason]] = {
        "another round": (case.trainer, case.opening(step=case.step + 1), DropReason.WRONG_STEP),
        "an old round": (case.trainer, case.opening(step=1), DropReason.WRONG_STEP),
        "another epoch": (case.trainer, case.opening(epoch=case.epoch + 1), DropReason.WRONG_STEP),
        "to somebody else's address": (
            case.trainer,
            case.opening(ticket=ticket_of(case.bystander.key.public)),
            DropReason.MALFORMED,
        ),
        "a list of blobs": (
            case.trainer,
            case.opening(ticket=ticket_of(case.trainer.key.public, kind=BlobFormat.HASH_SEQ)),
            DropReason.MALFORMED,
        ),
    }
    for name, (sender, message, reason) in bad.items():
        assert case.says(sender, message) is reason, name
        assert not any(isinstance(action, act.FetchBlob) for action in case.did), name
    assert case.says(case.trainer, case.opening(), run_id="another") is DropReason.BAD_SIGNATURE
    signed = case.opening().signed(case.trainer.key, "run").encode()
    assert case.hears(case.trainer, signed[:-1]) is DropReason.MALFORMED
    assert case.hears(case.bystander, signed) in (DropReason.MALFORMED, DropReason.WRONG_STEP), "it is another's word"
    assert case.hears(case.trainer, signed) is None
    assert [type(action) for action in case.did] == [act.FetchBlob]
    assert case.hears(case.trainer, signed) is DropReason.DUPLICATE
    other = case.opening(ticket=ticket_of(case.trainer.key.public, b"a second thought"))
    assert case.says(case.trainer, other) is DropReason.DUPLICATE, "what is shown is shown once"
    assert case.did[1:] == []


@pytest.mark.slow
def test_who_shows_the_bytes_of_a_result_keeps_nobody_from_getting_the_result(monkeypatch: pytest.MonkeyPatch) -> None:
    case = Case(*quiet_run.__wrapped__())
    listener = case.members[0].rounds
    got: list[bytes] = []
    monkeypatch.setattr(RoundPipeline, "fetched", lambda self, blob, data: got.append(data))
    ticket = ticket_of(case.trainer.key.public, b"somebody's result")
    assert case.says(case.trainer, case.opening(ticket=ticket)) is None
    actions = listener.fetched(ticket.hash, b"somebody's result", case.world.now)
    assert any(isinstance(action, act.AuditMomentum) for action in actions)
    assert got == [b"somebody's result"]


@pytest.mark.slow
def test_what_somebody_who_was_not_drawn_shows_is_dropped() -> None:
    world, members = run(8)
    peer = members[1]
    quiet = OpeningSaid(world.state.progress.epoch, world.state.progress.step, bytes(64), 0, ticket_of(peer.key.public))
    actions = members[0].rounds.receive_weights(
        Announcement(peer.key.public, quiet.signed(peer.key, "run").encode()), world.now
    )
    assert [action.reason for action in actions if isinstance(action, act.Dropped)] == [DropReason.WRONG_STEP]


def test_reports_of_who_was_not_drawn_of_another_audit_and_twice_are_dropped(case: Case) -> None:
    assert case.says(case.bystander, case.report()) is DropReason.WRONG_STEP
    assert case.says(case.trainer, case.report()) is DropReason.WRONG_STEP, "it would be about itself"
    assert case.says(case.auditor, case.report(step=1)) is DropReason.WRONG_STEP
    assert case.says(case.auditor, case.report(), run_id="b") is DropReason.BAD_SIGNATURE
    lying = case.report(outcome=Outcome.NOT_SHOWN)
    assert case.hears(case.auditor, lying.signed(case.auditor.key, "run").encode()) is DropReason.MALFORMED
    assert case.says(case.auditor, case.report()) is None
    assert case.says(case.auditor, case.report(nonce=1)) is DropReason.DUPLICATE


def test_momenta_that_are_said_too_late_or_twice_are_dropped_and_a_flood_takes_no_room(case: Case) -> None:
    now = case.world.state.progress.step
    sender = case.bystander
    for step in (now - 3, now - 2, now + 2, 0, 0xFFFF_FFFF):
        assert case.says(sender, case.momentum(step)) is DropReason.WRONG_STEP
    watch = case.members[0].rounds._audits.momenta
    before = len(watch._momenta)
    reasons = {case.says(sender, case.momentum(step, nonce)) for step in range(now + 50) for nonce in (5, 6)}
    assert reasons <= {DropReason.WRONG_STEP, DropReason.DUPLICATE, None}
    assert len(watch._momenta) <= before + 3
    assert len(watch._momenta) <= (KEPT_SAID + 3) * len(case.members)
    wrong = replace(case.momentum(now), decays=(1.5,)).signed(sender.key, "run").encode()
    assert case.hears(sender, wrong) is DropReason.MALFORMED


def test_builds_that_know_of_test_1_alone_read_the_same_share_and_drop_what_they_do_not_know() -> None:
    known_before = re.compile(r"(?P<trust>trust-peers)?(?:(?(trust),)audit-(?P<audit>[0-9.e-]{1,24}))?")
    for share in (0.02, 1.0, 1e-05, 0.1234567890123456789, 2.5e-300):
        for trust in (False, True):
            repo = hub_of_peers(trust_peers=trust, audit_fraction=share, audit_momentum=True)
            found = known_before.fullmatch(repo.revision or "")
            assert found is not None
            assert float(found["audit"]) == share == audit_fraction_of(Hub(repo))
            assert audits_momentum(P2P(repo))
            plain = hub_of_peers(trust_peers=trust, audit_fraction=share)
            assert not audits_momentum(Hub(plain))
            assert audit_fraction_of(Hub(plain)) == share
    state = RunConfig(total_steps=5, global_batch_size=4, audit_fraction=0.02).coordinator_state("run")
    assert audits_momentum(state.model.checkpoint)
    off = RunConfig(total_steps=5, global_batch_size=4, audit_fraction=0.02, audit_momentum=False)
    assert not audits_momentum(off.coordinator_state("run").model.checkpoint)
    assert not audits_momentum(RunConfig(total_steps=5, global_batch_size=4).coordinator_state("run").model.checkpoint)


# -- bytes -------------------------------------------------------------------------------------------------------------

KEYS = [SecretKey(bytes([number]) * 32) for number in range(1, 6)]


def messages() -> list[MomentumMessage]:
    most = 0xFFFF_FFFF
    return [
        MomentumSaid(3, 7, bytes(64), 0, bytes(range(32)), (0.5, 1.0)),
        OpeningSaid(3, 7, bytes(64), 0, ticket_of(KEYS[0].public)),
        MomentumReport(3, 7, bytes(64), 0, bytes(32), Outcome.NOT_SHOWN, Distances(0, 0, 0), 0, Distances(1, 2, 3)),
        MomentumReport(
            0xFFFF, most, bytes(64), most, bytes(32), Outcome.COMPARED, Distances(most, most, most), most, None
        ),
    ]


def test_a_message_comes_back_as_it_was_and_is_signed_for_one_run_and_one_kind() -> None:
    for message in messages():
        one = message.signed(KEYS[1], "run")
        assert decode_momentum_message(one.encode()) == one
        assert one.is_signed_by(KEYS[1].public, "run")
        assert one.again().is_signed_by(KEYS[1].public, "run"), "how often it was said is not signed"
        assert one.again().encode() != one.encode()
        assert not one.is_signed_by(KEYS[1].public, "another")
        assert not one.is_signed_by(KEYS[2].public, "run")
        assert len(one.encode()) <= MAX_BYTES


@given(st.binary(max_size=300), st.sampled_from([2, 3, 4]))
def test_any_bytes_are_a_message_or_our_own_error(data: bytes, kind: int) -> None:
    for given_bytes in (data, b"\xff\xff\xff\xff" + bytes([kind]) + data):
        try:
            decoded = decode_momentum_message(given_bytes)
        except ProtocolError:
            continue
        assert decode_momentum_message(decoded.encode()) == decoded


def test_peers_commit_with_as_many_parameter_groups_as_a_message_has_room_for() -> None:
    said = MomentumSaid(1, 2, bytes(64), 0, bytes(32), (0.999,) * MAX_GROUPS)
    assert len(said.encode()) <= MAX_BYTES
    state, (spec, *_) = MomentumWorld().state, EXACT.specs
    for groups, commits in ((MAX_GROUPS, True), (MAX_GROUPS + 1, False)):
        plan = make_plan([replace(spec, group=number) for number in range(groups)], "divisor", arithmetic="exact")
        assert commits_momentum(state, plan) is commits


def test_distances_that_are_no_numbers_are_the_largest() -> None:
    assert Distances.of(float("nan"), float("inf"), 1e9) == Distances(*[0xFFFF_FFFF] * 3)
    assert Distances.of(0.25, 0.0, 4000.5).noise().jaccard == 0.25


# -- the rule ----------------------------------------------------------------------------------------------------------

TRAINER, *AUDITORS = (key.public for key in KEYS[:4])
HONEST_NOISE = Distances.of(0.001, 0.0, 0.001)


def reports(book: MomentumBook, step: int, said: list[Outcome | float], own: Distances | None = HONEST_NOISE) -> Any:
    book.expect(0, step, Challenge(TRAINER, tuple(AUDITORS), (0,)))
    settled = None
    for auditor, each in zip(AUDITORS, said, strict=False):
        compared = not isinstance(each, Outcome)
        found = Distances.of(0.0, 0.0, each) if not isinstance(each, Outcome) else Distances(0, 0, 0)
        outcome = Outcome.COMPARED if not isinstance(each, Outcome) else each
        report = MomentumReport(0, step, bytes(64), 0, TRAINER, outcome, found, 50 if compared else 0, own)
        assert book.expects(auditor, report)
        settled = book.add(auditor, report)
    return settled


def taught() -> MomentumBook:
    book = MomentumBook(lambda key: True)
    for step in range(8):
        reports(book, step, [0.001, 0.001, 0.001])
    assert book.limits is not None
    return book


def test_nothing_is_decided_by_distances_before_limits_are_learnt() -> None:
    book = MomentumBook(lambda key: True)
    assert [reports(book, step, [0.9, 0.9, 0.9]) for step in range(3)] == [None] * 3
    assert book.seen() == {}


def test_two_of_three_decide_and_the_second_lie_is_one_too_many() -> None:
    book = taught()
    assert reports(book, 20, [0.9, 0.9, 0.001]) is None, "the first one may be an accident"
    for step in range(21, 21 + LAST_AUDITS):
        assert reports(book, step, [0.001, 0.001, 0.9]).passed
    assert reports(book, 40, [0.9, 0.9, 0.9]) is None, "the other one is forgotten"
    last = reports(book, 41, [0.9, 0.001, 0.9]) or reports(book, 42, [0.9, 0.9, 0.001])
    assert not last.passed
    assert f"({LIES} of" in last.words
    assert reports(book, 43, [0.9, 0.9, 0.9]) is None, "it is said once"


def test_an_accuser_that_two_others_contradict_has_no_weight_any_more() -> None:
    book = taught()
    for step in range(20, 23):
        assert book.has_weight(AUDITORS[2])
        reports(book, step, [0.001, 0.001, 0.9])
    assert not book.has_weight(AUDITORS[2])
    assert all(book.has_weight(auditor) for auditor in AUDITORS[:2])
    assert reports(book, 30, [0.9, Outcome.NOT_SHOWN, 0.9]) is None


def test_that_one_auditor_got_nothing_is_no_contradiction_and_one_of_three_decides_nothing() -> None:
    book = taught()
    for step in range(20, 26):
        assert reports(book, step, [0.001, 0.001, Outcome.NOT_SHOWN]).passed
        assert reports(book, 100 + step, [0.001, Outcome.NOT_SHOWN, Outcome.NOT_AS_SAID]) is None
    assert all(book.has_weight(auditor) for auditor in AUDITORS)


def test_a_cheat_that_says_what_it_finds_in_itself_does_not_loosen_the_limits() -> None:
    book = MomentumBook(lambda key: True)
    for step in range(30):
        book.expect(0, step, Challenge(TRAINER, tuple(AUDITORS), (0,)))
        for number, auditor in enumerate(AUDITORS):
            own = Distances.of(0.4, 0.1, 0.4) if number == 0 else HONEST_NOISE
            book.add(
                auditor,
                MomentumReport(0, step, bytes(64), 0, TRAINER, Outcome.COMPARED, HONEST_NOISE, 50, own),
            )
    assert book.limits is not None
    assert book.limits.manhattan == 0.05
    assert not book.is_beyond_reach


def test_where_most_peers_differ_from_themselves_by_more_than_any_limit_nothing_is_decided() -> None:
    book = MomentumBook(lambda key: True)
    for step in range(30):
        assert reports(book, step, [0.9, 0.9, 0.9], own=Distances.of(0.1, 0.0, 0.9)) is None
    assert book.is_beyond_reach
    assert book.limits is None
    assert book.seen() == {}


def test_where_gradients_are_clipped_now_and_then_nobody_is_accused_of_it() -> None:
    book = taught()
    for step in range(20, 60):
        clipped = step % 3 == 0
        own = Distances.of(0.0, 0.0, 0.8) if step % 3 == 1 else HONEST_NOISE
        settled = reports(book, step, [0.8 if clipped else 0.001] * 3, own=own)
        assert settled is None or settled.passed
    assert book.is_beyond_reach
    for step in range(60, 60 + SAMPLES_OF_A_PEER):
        reports(book, step, [0.001, 0.001, 0.001])
    assert not book.is_beyond_reach, "it was at the beginning of the training"
    assert book.limits is not None
