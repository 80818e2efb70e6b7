"""Test 2: a trainer's momentum follows from the one before, or it is found that it does not."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from distro_optim import DisTrO
from distro_optim.compress import CompressedUpdate
from distro_optim.errors import ConfigurationError
from distro_optim.optim.rules import PUBLISHED
from distro_optim.verify.audit import AUDITORS, LEAVES, Challenge, Verdict, check, draw, looking_ahead, majority
from distro_optim.verify.calibrate import LOOSEST, TIGHTEST, Limits
from distro_optim.verify.momentum import MomentumCommitment, Snapshot, leaves_of
from distro_optim.verify.opening import Opening, make_opening
from distro_optim.verify.quiet import quiet_gradients

LR, DECAY, STEP = 2e-3, 0.99, 7
LIMITS = replace(LOOSEST, jaccard=TIGHTEST.jaccard, hamming=TIGHTEST.hamming, manhattan=TIGHTEST.manhattan)


def make_net() -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(70, 96), nn.Tanh(), nn.Linear(96, 96), nn.Tanh(), nn.Linear(96, 20))


def loss_of(net: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    return F.cross_entropy(net(batch[0]), batch[1])


def make_batch(seed: int, size: int = 16) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    data = torch.randn(size, 70, generator=generator)
    return data, (data[:, :20] * 2 + data[:, 20:40]).argmax(1)


Train = Callable[[nn.Module, DisTrO, tuple[Tensor, Tensor]], None]


def honestly(net: nn.Module, optimizer: DisTrO, batch: tuple[Tensor, Tensor]) -> None:
    optimizer.lookahead(LR)
    loss_of(net, batch).backward()


@dataclass
class Audited:
    """All that an audit takes of a step of a trainer."""

    net: nn.Module
    weights: dict[str, Tensor]
    batch: tuple[Tensor, Tensor]
    before: Snapshot
    after: Snapshot
    previous: CompressedUpdate
    sent: CompressedUpdate

    def challenge(self) -> Challenge:
        return draw(5, STEP, self.sent.plan, [b"trainer"], [b"one", b"two", b"three"], 1.0)[0]

    def opening(self) -> Opening:
        return make_opening(STEP, self.challenge().leaves, self.before, self.after)

    def check(
        self, opening: Opening | None = None, *, limits: Limits = LIMITS, autocast: bool = False, scale: float = 1.0
    ) -> Verdict:
        opening = opening or self.opening()
        rates = [LR] * len(self.sent.plan)
        parameters = dict(self.net.named_parameters())

        def loss(batch: tuple[Tensor, Tensor]) -> Tensor:
            with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
                return loss_of(self.net, batch) * scale

        [gradients] = quiet_gradients(
            self.net,
            parameters,
            loss,
            [self.batch],
            weights=looking_ahead(self.weights, opening.signs, rates),
        )
        return check(
            opening,
            challenge=self.challenge(),
            step=STEP,
            before=self.before.commitment(STEP - 1),
            after=self.after.commitment(STEP),
            previous=self.previous,
            sent=self.sent,
            gradients=gradients,
            rates=[LR],
            decays=[DECAY],
            limits=limits,
        )


def momenta(optimizer: DisTrO, net: nn.Module) -> list[Tensor]:
    return [optimizer.delta(p) for p in net.parameters()]


def train(train_last: Train = honestly, *, quantize: bool = True, steps: int = 4) -> Audited:
    """Some honest steps, and the one that is audited."""
    net = make_net()
    optimizer = DisTrO(
        net.parameters(), lr=LR, compression_decay=DECAY, compression_chunk=32, quantize_1bit=quantize, **PUBLISHED
    )
    updates: list[CompressedUpdate] = []
    snapshots: list[Snapshot] = []
    for step in range(steps):
        optimizer.apply(updates[-2:-1], LR)
        weights = {name: p.detach().clone() for name, p in net.named_parameters()}
        optimizer.zero_grad()
        (honestly if step + 1 < steps else train_last)(net, optimizer, make_batch(step))
        updates.append(optimizer.generate(LR))
        snapshots.append(Snapshot(optimizer.plan, momenta(optimizer, net)))
    return Audited(net, weights, make_batch(steps - 1), snapshots[-2], snapshots[-1], updates[-2], updates[-1])


def test_an_honest_trainer_passes() -> None:
    verdict = train().check()
    assert verdict.passed
    assert verdict.coefficients > 200
    assert (verdict.jaccard, verdict.hamming) == (0, 0)
    assert verdict.manhattan < 1e-5


def test_an_honest_trainer_passes_where_values_are_sent() -> None:
    verdict = train(quantize=False).check()
    assert verdict.passed
    assert verdict.manhattan < 1e-5


def test_other_arithmetic_is_noise_and_no_lie() -> None:
    verdict = train().check(limits=LOOSEST, autocast=True)
    assert verdict.passed
    assert 0 < verdict.manhattan < 0.1


@pytest.mark.parametrize("scale", [0.0, 1e-12, 1e-6])
def test_an_honest_trainer_passes_where_a_step_adds_next_to_nothing(scale: float) -> None:
    def hardly(net: nn.Module, optimizer: DisTrO, batch: tuple[Tensor, Tensor]) -> None:
        optimizer.lookahead(LR)
        (loss_of(net, batch) * scale).backward()

    verdict = train(hardly).check(scale=scale)
    assert verdict.passed, verdict
    assert verdict.manhattan < TIGHTEST.manhattan / 10
    assert not train(hardly).check().passed, "if its batch has a gradient"


def half(net: nn.Module, optimizer: DisTrO, batch: tuple[Tensor, Tensor]) -> None:
    honestly(net, optimizer, (batch[0][:8], batch[1][:8]))


def other_data(net: nn.Module, optimizer: DisTrO, batch: tuple[Tensor, Tensor]) -> None:
    honestly(net, optimizer, make_batch(99))


def not_ahead(net: nn.Module, optimizer: DisTrO, batch: tuple[Tensor, Tensor]) -> None:
    loss_of(net, batch).backward()


def nothing(net: nn.Module, optimizer: DisTrO, batch: tuple[Tensor, Tensor]) -> None:
    for param in net.parameters():
        param.grad = torch.zeros_like(param)


@pytest.mark.parametrize("cheat", [half, other_data, not_ahead, nothing])
def test_whoever_trains_less_or_otherwise_is_found(cheat: Train) -> None:
    audited = train(cheat)
    verdict = audited.check()
    assert any("Manhattan" in reason for reason in verdict.reasons), verdict
    if cheat is not not_ahead:
        assert not audited.check(limits=LOOSEST).passed


def test_flipped_signs_are_found() -> None:
    audited = train()
    flipped = tuple(
        value ^ (torch.rand(value.shape, generator=torch.Generator().manual_seed(0)) < 0.1)
        for value in audited.sent.value
    )
    audited.sent = CompressedUpdate(audited.sent.plan, audited.sent.index, flipped, audited.sent.present)
    verdict = audited.check()
    assert 0.03 < verdict.hamming < 0.2
    assert [reason.split(" ")[0] for reason in verdict.reasons] == ["Hamming"]


def test_a_copy_of_another_result_is_found_however_honest_the_momentum() -> None:
    audited, other = train(), train(other_data)
    audited.sent = other.sent
    assert audited.check().jaccard > 0.3


def test_a_tensor_that_is_left_out_is_missed() -> None:
    audited = train()
    audited.sent = CompressedUpdate(audited.sent.plan, audited.sent.index, audited.sent.value, (False,) * 6)
    assert audited.check().jaccard == 1


def changed(data: bytes) -> bytes:
    return bytes([data[0] ^ 1]) + data[1:]


def test_what_was_not_committed_to_cannot_be_shown() -> None:
    audited = train()
    good = audited.opening()
    first, second, *rest = good.leaves

    def with_leaves(*leaves: object) -> Opening:
        return Opening(STEP, tuple(leaves), good.signs)  # type: ignore[arg-type]

    bad = {
        "changed before": with_leaves(replace(first, before=changed(first.before)), second, *rest),
        "changed after": with_leaves(replace(first, after=changed(first.after)), second, *rest),
        "changed path": with_leaves(replace(first, path_after=(bytes(32), *first.path_after[1:])), second, *rest),
        "shorter path": with_leaves(replace(first, path_before=first.path_before[1:]), second, *rest),
        "before is after": with_leaves(replace(first, before=first.after, path_before=first.path_after), second, *rest),
        "in another's place": with_leaves(replace(second, number=first.number), second, *rest),
        "one too few": with_leaves(second, *rest),
        "another step": Opening(STEP + 1, good.leaves, good.signs),
    }
    for name, opening in bad.items():
        verdict = audited.check(opening)
        assert len(verdict.reasons) == 1, name
        assert "committed" in verdict.reasons[0] or "other leaves" in verdict.reasons[0], name
    assert audited.check(good).passed


def test_commitments_to_another_step_or_model_do_not_count() -> None:
    audited = train()
    for snapshot, other in ((audited.after, 5), (audited.after, None)):
        commitment = snapshot.commitment(STEP)
        wrong = replace(commitment, step=other) if other else replace(commitment, layout=bytes(32))
        snapshot.commitment = lambda step, wrong=wrong: wrong  # type: ignore[method-assign, misc]
        assert "another step or to another model" in audited.check().reasons[0]


def test_the_lookahead_that_is_told_has_to_be_that_of_the_momentum() -> None:
    audited = train()
    good = audited.opening()
    lied = Opening(STEP, good.leaves, tuple(-signs for signs in good.signs))
    assert "signs it says it looked ahead with" in audited.check(lied).reasons[0]


def test_a_momentum_that_is_not_finite_is_refused() -> None:
    audited = train()
    broken = [torch.full_like(p, torch.nan) for p in audited.net.parameters()]
    audited.after = Snapshot(audited.sent.plan, broken)
    assert "not finite" in audited.check().reasons[0]


def test_gradients_of_another_model_are_refused() -> None:
    audited = train()
    with pytest.raises(ConfigurationError, match="gradients for 6 tensors"):
        check(
            audited.opening(),
            challenge=audited.challenge(),
            step=STEP,
            before=audited.before.commitment(STEP - 1),
            after=audited.after.commitment(STEP),
            previous=None,
            sent=audited.sent,
            gradients=[],
            rates=[LR],
            decays=[DECAY],
            limits=LIMITS,
        )


# -- who is audited ----------------------------------------------------------------------------------------------------

KEYS = [bytes([n]) * 32 for n in range(40)]


def draws(seeds: Sequence[int], fraction: float) -> list[Challenge]:
    plan = train(steps=2).sent.plan
    return [challenge for seed in seeds for challenge in draw(seed, 3, plan, KEYS, KEYS[:10], fraction)]


@pytest.mark.slow
def test_so_many_are_drawn_as_the_run_says_and_nobody_audits_itself() -> None:
    found = draws(range(50), 0.1)
    assert 150 < len(found) < 250
    for challenge in found:
        assert challenge.trainer not in challenge.auditors
        assert len(set(challenge.auditors)) == AUDITORS
        assert set(challenge.auditors) <= set(KEYS[:10])
    assert len({challenge.trainer for challenge in found}) == len(KEYS)
    assert draws([1], 0.0) == []
    assert len(draws([1], 1.0)) == len(KEYS)


def test_everybody_draws_the_same_and_a_peer_more_changes_nobody_elses_draw() -> None:
    plan = train(steps=2).sent.plan
    some = draw(9, 3, plan, KEYS[:20], KEYS, 0.5)
    assert some == draw(9, 3, plan, KEYS[:20][::-1], KEYS[::-1], 0.5)
    more = draw(9, 3, plan, KEYS, KEYS, 0.5)
    assert [challenge for challenge in more if challenge.trainer in KEYS[:20]] == some


@pytest.mark.slow
def test_leaves_are_drawn_by_their_elements() -> None:
    plan = train(steps=2).sent.plan
    table = leaves_of(plan)
    counts = [0] * len(table)
    for challenge in draws(range(5), 1.0):
        assert len(challenge.leaves) == min(LEAVES, len(table))
        assert list(challenge.leaves) == sorted(set(challenge.leaves))
        for leaf in challenge.leaves:
            counts[leaf] += 1
    largest = max(range(len(table)), key=table.size)
    smallest = min(range(len(table)), key=table.size)
    assert counts[largest] >= counts[smallest]


def test_two_of_three_decide() -> None:
    good, bad = Verdict(reasons=()), Verdict(reasons=("lied",))
    assert [majority(v) for v in ([good, good, bad], [bad, good, bad], [bad, good], [good], [])] == [
        True,
        False,
        None,
        None,
        None,
    ]


def test_a_commitment_is_read_as_it_was_written() -> None:
    commitment = MomentumCommitment(7, bytes(range(32)), bytes(range(32, 64)))
    assert MomentumCommitment.decode(commitment.encode()) == commitment
    assert len(commitment.encode()) == 69
