"""Weights are hashed in another thread while this one trains, and cannot change under it."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor
from typing_extensions import override

from distro_optim.strategy.model import still_weights
from distro_optim.strategy.model.still_weights import StillWeights, WeightsGone
from distro_optim.strategy.model.trainer import SwarmTrainer
from distro_optim.strategy.model.weights_hash import WeightsHasher
from distro_optim.strategy.rounds.weights import TensorDigest, tensor_digest
from session.scripts import Script
from session.test_trainer_actions import apply, decay, give_gradients, train, trained, trainer_of
from session.world import SessionWorld

SECONDS = 60.0
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA"))]
Answers = dict[int, tuple[bytes, ...]]


class WatchedDigest(TensorDigest):
    """Calls ``before`` with each piece, in the thread that hashes."""

    def __init__(self, name: str, tensor: Tensor, before: Callable[[], object]) -> None:
        super().__init__(name, tensor)
        self.before = before

    @override
    def update(self, data: memoryview) -> None:
        self.before()
        super().update(data)


def watched(trainer: SwarmTrainer, before: Callable[[], object]) -> list[WatchedDigest]:
    return [WatchedDigest(name, tensor, before) for name, tensor in trainer.tensors.trained.items()]


def hasher_of(trainer: SwarmTrainer) -> tuple[WeightsHasher, Answers]:
    answers: Answers = {}

    def done(step: int, digests: Sequence[bytes]) -> None:
        answers[step] = tuple(digests)

    hasher = WeightsHasher(trainer.still, done)
    trainer.before_change = hasher.wait
    return hasher, answers


def wait_for(event: threading.Event) -> None:
    assert event.wait(SECONDS)


@pytest.fixture(autouse=True)
def no_thread_is_left() -> Iterator[None]:
    yield
    assert not [thread.name for thread in threading.enumerate() if thread.name.startswith("distro-optim-hash")]


CHANGES: dict[str, Callable[[SwarmTrainer, list[Any]], object]] = {
    "apply": lambda trainer, updates: trainer.apply(apply(updates, step=6)),
    "decay": lambda trainer, _: trainer.decay(decay(6)),
    "load": lambda trainer, _: trainer.load({n: t + 1 for n, t in trainer.tensors.trained.items()}),
    "round": lambda trainer, _: trainer.round_to_bfloat16(),
    "next step": lambda trainer, _: trainer.lay_down(7),
}


@pytest.mark.parametrize("change", CHANGES)
def test_what_changes_weights_waits_for_their_hash(change: str, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = trainer_of()
    update = trained(trainer, train(5))
    hasher, answers = hasher_of(trainer)
    go = threading.Event()
    expected = trainer.digests()

    def wait() -> None:
        go.set()
        hasher.wait()

    def and_then_go(name: str, of: object) -> None:
        change_weights = getattr(of, name)

        def changed(*args: Any, **kwargs: Any) -> None:
            change_weights(*args, **kwargs)
            go.set()

        monkeypatch.setattr(of, name, changed)

    trainer.before_change = wait
    # Whoever did not wait would have changed the weights by the time when the first byte is read.
    and_then_go("apply", trainer.optimizer)
    and_then_go("decay_weights", trainer.optimizer)
    trainer.lay_down(6)
    hasher.start(6, watched(trainer, lambda: wait_for(go)))
    CHANGES[change](trainer, [update])
    assert hasher.wait() == tuple(expected)
    assert answers == {6: tuple(expected)}
    if change != "next step":
        assert trainer.digests() != expected


@pytest.mark.parametrize("device", DEVICES)
def test_the_true_weights_are_hashed_while_they_look_ahead(device: str) -> None:
    trainer = trainer_of(torch.nn.Linear(64, 48).to(device))
    update = trained(trainer, train(5))
    trainer.apply(apply([update], step=6))
    hasher, answers = hasher_of(trainer)
    expected = trainer.digests()
    begun = threading.Event()
    trainer.lay_down(6)
    trainer.begin(train(6))
    begun.set()
    assert trainer.digests() != expected, "nothing looks ahead"
    hasher.start(6, watched(trainer, lambda: wait_for(begun)))
    give_gradients_on(trainer, device)
    trainer.finish()
    assert trainer.digests() != expected, "nothing has decayed"
    trainer.apply(apply([update], step=7))
    assert hasher.wait() == tuple(expected)
    assert answers == {6: tuple(expected)}


def give_gradients_on(trainer: SwarmTrainer, device: str) -> None:
    for tensor in trainer.tensors.trained.values():
        tensor.grad = torch.ones_like(tensor, device=device)


def test_hashing_goes_on_where_it_was_when_weights_are_set_aside_in_the_middle(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(still_weights, "PIECE_BYTES", 64)
    trainer = trainer_of(torch.nn.Linear(256, 64))
    hasher, _ = hasher_of(trainer)
    pieces = sum(-(-tensor.numel() // 16) for tensor in trainer.tensors.trained.values())
    look_ahead = trainer.optimizer.lookahead
    read: list[int] = [0]
    interrupted = 0
    for step in range(5, 60):
        asked, read[0] = threading.Event(), 0
        before_move: list[int] = []

        def count(asked: threading.Event = asked) -> None:
            read[0] += 1
            if read[0] == 3:
                wait_for(asked)

        def lookahead(lr: Any, before_move: list[int] = before_move) -> None:
            before_move.append(read[0])
            look_ahead(lr)
            assert read[0] == before_move[0], "somebody reads while weights move"

        monkeypatch.setattr(trainer.optimizer, "lookahead", lookahead)
        expected = tuple(trainer.digests())
        trainer.lay_down(step)
        hasher.start(step, watched(trainer, count))
        asked.set()
        trainer.begin(train(step))
        assert hasher.wait() == expected
        assert read[0] == pieces
        interrupted += before_move[0] < pieces
        give_gradients(trainer)
        trainer.finish()
        if interrupted > 2:
            return
    raise AssertionError("weights never moved while they were hashed")


def test_a_hash_that_lasts_longer_than_its_round_holds_back_the_next_lookahead() -> None:
    trainer = trainer_of()
    hasher, answers = hasher_of(trainer)
    waits = threading.Event()

    def wait() -> None:
        waits.set()
        hasher.wait()

    trainer.before_change = wait
    expected = tuple(trainer.digests())
    trainer.lay_down(5)
    trainer.begin(train(5))
    hasher.start(5, watched(trainer, lambda: wait_for(waits)))
    give_gradients(trainer)
    trainer.finish()
    assert not waits.is_set(), "nothing changes the weights that were set aside, so nobody waits"
    trainer.begin(train(6))  # without a hash of step 6
    assert answers == {5: expected}
    trainer.cancel()


def test_stopping_does_not_wait_for_the_whole_hash(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(still_weights, "PIECE_BYTES", 64)
    trainer = trainer_of(torch.nn.Linear(256, 64))
    hasher, answers = hasher_of(trainer)
    first, stopping = threading.Event(), threading.Event()
    read: list[int] = []

    def before() -> None:
        read.append(1)
        first.set()
        wait_for(stopping)

    trainer.lay_down(5)
    hasher.start(5, watched(trainer, before))
    wait_for(first)
    wait_for_the_end = hasher.wait

    def wait() -> tuple[bytes, ...]:
        stopping.set()
        return wait_for_the_end()

    monkeypatch.setattr(hasher, "wait", wait)
    hasher.stop()
    assert len(read) == 1
    assert not answers
    trainer.abandon()


def test_what_goes_wrong_with_a_hash_is_raised_where_the_model_is_trained() -> None:
    trainer = trainer_of()
    hasher, _ = hasher_of(trainer)

    def broken() -> None:
        raise MemoryError("no room")

    trainer.lay_down(5)
    hasher.start(5, watched(trainer, broken))
    with pytest.raises(MemoryError):
        hasher.wait()


def test_weights_that_have_moved_on_are_not_read() -> None:
    still = StillWeights()
    tensor = torch.arange(10.0)
    with pytest.raises(WeightsGone):
        still.read(1, "a", bytes)
    still.lay_down(1, {"a": tensor})
    for step, name in ((2, "a"), (1, "b")):
        with pytest.raises(WeightsGone):
            still.read(step, name, bytes)
    still.take_up()
    with pytest.raises(WeightsGone):
        still.read(1, "a", bytes)


def test_weights_whose_move_fails_lie_nowhere() -> None:
    still = StillWeights()
    still.lay_down(1, {"a": torch.ones(3)})
    with pytest.raises(KeyError), still.moving(to=dict):
        raise KeyError
    with pytest.raises(WeightsGone):
        still.read(1, "a", bytes)


@pytest.mark.parametrize(
    "tensor",
    [
        torch.tensor(1.5),
        torch.zeros(0, 3),
        torch.arange(24.0).view(2, 3, 4).permute(2, 0, 1),
        torch.arange(100.0, dtype=torch.float64)[::3],
        torch.ones(33, dtype=torch.bfloat16),
    ],
    ids=["scalar", "empty", "permuted", "with gaps", "bfloat16"],
)
def test_pieces_give_the_digest_of_the_whole(tensor: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(still_weights, "PIECE_BYTES", 16)
    still = StillWeights()
    still.lay_down(3, {"t": tensor})
    digest = TensorDigest("t", tensor)
    still.read(3, "t", digest.update)
    assert digest.digest() == tensor_digest("t", tensor)


def test_a_script_that_is_stopped_in_mid_training_leaves_no_thread(make_world: Callable[..., SessionWorld]) -> None:
    def stop(script: Script) -> None:
        round_ = script.session.round
        if round_ is not None and round_.step == 3:
            raise KeyboardInterrupt

    world = make_world(total_steps=8, epoch_time=200, init_min_clients=1, min_clients=1)
    script = Script(during=stop)
    world.run(world.port(1), script)
    with pytest.raises(KeyboardInterrupt):
        world.until_all_ended()
    # The fixture looks for threads; and the model has its true weights.
    assert not script.optimizer.param_groups[0]["looks_ahead"]
    assert script.trained == [1, 2]


def test_ctrl_c_while_the_thread_starts_is_all_that_is_raised(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(thread: threading.Thread) -> None:
        raise KeyboardInterrupt

    still = StillWeights()
    tensor = torch.ones(8)
    still.lay_down(3, {"t": tensor})
    hasher = WeightsHasher(still, lambda step, digests: None)
    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", interrupted)
        with pytest.raises(KeyboardInterrupt):
            hasher.start(3, [TensorDigest("t", tensor)])
    hasher.stop()
