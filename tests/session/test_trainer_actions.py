"""Trainer actions do to weights and momentum what they say, and no more."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from distro_optim import DisTrO
from distro_optim.compress import CompressedUpdate
from distro_optim.coordinator.types import BatchId
from distro_optim.errors import ConfigurationError, DistroError
from distro_optim.strategy.model.named_tensors import NamedTensors
from distro_optim.strategy.model.trainer import SwarmTrainer
from distro_optim.strategy.rounds.actions import ApplyResults, DecayWeights, TrainBatch
from distro_optim.strategy.rounds.results import encode_result, read_result
from distro_optim.strategy.rounds.weights import tensor_digest

LR, DECAY = 0.01, 0.5


def model(dtype: torch.dtype = torch.float32) -> nn.Sequential:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 4)).to(dtype)


def trainer_of(net: nn.Module | None = None, *, settings: dict[str, Any] | None = None, **options: Any) -> SwarmTrainer:
    net = net if net is not None else model()
    defaults = {"lr": LR, "weight_decay": DECAY, "compression_topk": 3, "compression_chunk": 4}
    optimizer = DisTrO(net.parameters(), **{**defaults, **(settings or {})})
    return SwarmTrainer(NamedTensors.of(net, optimizer), optimizer, **options)


def train(step: int = 5, *, own: object = None, **changes: Any) -> TrainBatch:
    settings: dict[str, Any] = {
        "step": step,
        "batch": BatchId(0, 3),
        "lr": 0.25,
        "previous_lr": 0.125,
        "bounds": None,
        "zero_optim": False,
        "own_previous": own,
    }
    return TrainBatch(**{**settings, **changes})


def decay(step: int = 5, own: object = None) -> DecayWeights:
    return DecayWeights(step=step, lr=0.25, bounds=None, own_previous=own)


def apply(updates: list[CompressedUpdate], step: int = 7, **changes: Any) -> ApplyResults:
    return ApplyResults(**{"step": step, "lr": 0.25, "bounds": None, "updates": tuple(updates), **changes})


def give_gradients(trainer: SwarmTrainer, seed: int = 0) -> None:
    generator = torch.Generator().manual_seed(seed)
    for tensor in trainer.tensors.trained.values():
        tensor.grad = torch.randn(tensor.shape, generator=generator).to(tensor.dtype)


def weights(trainer: SwarmTrainer) -> list[Tensor]:
    return [tensor.detach().clone() for tensor in trainer.tensors.trained.values()]


def deltas(trainer: SwarmTrainer) -> list[Tensor]:
    return list(trainer.momentum().values())


def same(a: list[Tensor], b: list[Tensor]) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def trained(trainer: SwarmTrainer, action: TrainBatch, seed: int = 0) -> CompressedUpdate:
    trainer.begin(action)
    give_gradients(trainer, seed)
    return trainer.finish()[0]


# -- weight decay and lookahead --------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("way", ["finish", "skip", "cancel", "decay"])
def test_weights_decay_once_and_nothing_else_happens_to_them(dtype: torch.dtype, way: str) -> None:
    trainer = trainer_of(model(dtype))
    trained(trainer, train(4))  # so that there is momentum to look ahead by
    before = weights(trainer)
    if way == "decay":
        trainer.decay(decay())
    else:
        trainer.begin(train())
        assert not same(weights(trainer), before), "it looks ahead"
        give_gradients(trainer)
        if way == "cancel":
            trainer.cancel()
        else:
            trainer.finish(skip=way == "skip")
    assert same(weights(trainer), [w * (1 - LR * DECAY) for w in before])


def test_gradients_are_gone_when_training_begins_and_when_it_ends() -> None:
    trainer = trainer_of()
    give_gradients(trainer)
    trainer.begin(train())
    assert all(tensor.grad is None for tensor in trainer.tensors.trained.values())
    give_gradients(trainer)
    trainer.cancel()
    assert all(tensor.grad is None for tensor in trainer.tensors.trained.values())


def test_a_parameter_without_gradient_decays_like_the_others() -> None:
    trainer = trainer_of()
    before = weights(trainer)
    trainer.begin(train())
    give_gradients(trainer)
    first = next(iter(trainer.tensors.trained.values()))
    first.grad = None
    update, _ = trainer.finish()
    assert update.present == (False, True, True, True)
    assert same(weights(trainer), [w * (1 - LR * DECAY) for w in before])


def test_training_cannot_begin_twice_or_end_without_beginning() -> None:
    trainer = trainer_of()
    with pytest.raises(DistroError, match="no training"):
        trainer.finish()
    trainer.begin(train(5))
    with pytest.raises(DistroError, match="step 6 begins, that of 5 is not over"):
        trainer.begin(train(6))


def test_who_leaves_in_mid_round_has_the_true_weights() -> None:
    trainer = trainer_of()
    trained(trainer, train(4))
    before = weights(trainer)
    trainer.begin(train())
    trainer.abandon()
    trainer.abandon()
    assert same(weights(trainer), before)


# -- learning rates --------------------------------------------------------------------------------------------------


def looked_ahead_by(trainer: SwarmTrainer, action: TrainBatch) -> float:
    before = weights(trainer)
    trainer.begin(action)
    shift = max(float((a - b).abs().max()) for a, b in zip(weights(trainer), before, strict=True))
    trainer.cancel()
    return shift


def test_the_scripts_rates_count_times_the_factor_of_a_cold_start() -> None:
    trainer = trainer_of()
    before = weights(trainer)
    trainer.decay(DecayWeights(step=5, lr=0.25, bounds=(3, 7), own_previous=None))
    assert same(weights(trainer), [w * (1 - LR * 0.5 * DECAY) for w in before])


def test_the_runs_rates_count_where_the_run_decides() -> None:
    trainer = trainer_of(script_rates=False)
    before = weights(trainer)
    trainer.decay(decay())
    assert same(weights(trainer), [w * (1 - 0.25 * DECAY) for w in before])


def test_the_lookahead_is_at_the_rate_of_the_step_before() -> None:
    trainer = trainer_of(settings={"weight_decay": 0.0})
    trained(trainer, train(4))
    trainer.optimizer.param_groups[0]["lr"] = 0.03
    assert looked_ahead_by(trainer, train(5)) == pytest.approx(LR)
    assert looked_ahead_by(trainer, train(6)) == pytest.approx(0.03)
    ruled = trainer_of(settings={"weight_decay": 0.0}, script_rates=False)
    trained(ruled, train(4))
    assert looked_ahead_by(ruled, train(5)) == pytest.approx(0.125)


def test_a_rate_that_changes_in_mid_step_counts_from_the_next_step_on() -> None:
    trainer = trainer_of(settings={"weight_decay": 0.0})
    update = trained(trainer, train(4))
    before = weights(trainer)
    trainer.optimizer.param_groups[0]["lr"] = 1.0
    trainer.apply(apply([update], step=4))
    assert max(float((a - b).abs().max()) for a, b in zip(weights(trainer), before, strict=True)) < 2 * LR


def test_groups_keep_their_own_rates() -> None:
    net = model()
    groups = [{"params": [net[0].weight, net[0].bias], "lr": 0.5}, {"params": [net[1].weight, net[1].bias]}]
    optimizer = DisTrO(groups, lr=0.1, weight_decay=0.5)
    trainer = SwarmTrainer(NamedTensors.of(net, optimizer), optimizer)
    before = weights(trainer)
    trainer.decay(decay())
    assert same(weights(trainer), [w * f for w, f in zip(before, [0.75, 0.75, 0.95, 0.95], strict=True)])


# -- what was sent, and what was not -----------------------------------------------------------------------------------


def test_what_was_sent_leaves_the_momentum_in_the_next_training() -> None:
    sent, kept = trainer_of(), trainer_of()
    for trainer in (sent, kept):
        trained(trainer, train(4))
    trained(sent, train(5, own=4), seed=1)
    trained(kept, train(5, own=None), seed=1)
    assert not same(deltas(sent), deltas(kept))
    assert sum(float(d.square().sum()) for d in deltas(sent)) < sum(float(d.square().sum()) for d in deltas(kept))


@pytest.mark.slow
def test_what_was_sent_leaves_the_momentum_whatever_becomes_of_the_next_round() -> None:
    outcomes = []
    for way in ("decay", "cancel", "skip"):
        trainer = trainer_of()
        trained(trainer, train(4))
        if way == "decay":
            trainer.decay(decay(5, own=4))
        else:
            trainer.begin(train(5, own=4))
            if way == "cancel":
                trainer.cancel()
            else:
                trainer.finish(skip=True)
        outcomes.append(deltas(trainer))
    assert same(outcomes[0], outcomes[1])
    assert same(outcomes[0], outcomes[2])
    left = trainer_of()
    trained(left, train(4))
    assert not same(outcomes[0], deltas(left))


def test_what_was_not_sent_stays_in_the_momentum() -> None:
    trainer = trainer_of()
    trained(trainer, train(4))
    before = deltas(trainer)
    trainer.decay(decay(5, own=None))
    trainer.begin(train(6, own=None))
    trainer.cancel()
    assert same(deltas(trainer), before)


def test_a_part_from_another_round_is_not_taken_for_the_last_one() -> None:
    trainer = trainer_of()
    trained(trainer, train(4))
    before = deltas(trainer)
    trainer.decay(decay(9, own=8))
    assert same(deltas(trainer), before)


@pytest.mark.slow
def test_a_cold_start_clears_the_momentum() -> None:
    trainer, fresh = trainer_of(), trainer_of()
    trained(trainer, train(4))
    a = trained(trainer, train(5, zero_optim=True, own=4), seed=1)
    b = trained(fresh, train(5), seed=1)
    assert same(deltas(trainer), deltas(fresh))
    assert all(torch.equal(x, y) for x, y in zip(a.value, b.value, strict=True))


# -- results -----------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_applying_moves_each_weight_by_the_rate_against_the_sign() -> None:
    trainer = trainer_of()
    updates = [trained(trainer_of(), train(), seed=n) for n in range(3)]
    before, expected = weights(trainer), trainer.optimizer.decode(updates)
    trainer.apply(apply(updates))
    pairs = zip(weights(trainer), before, expected, strict=True)
    assert all(torch.equal(after, old - LR * mean.sign()) for after, old, mean in pairs)


def test_applying_nothing_changes_nothing() -> None:
    trainer = trainer_of()
    before = weights(trainer)
    trainer.apply(apply([]))
    assert same(weights(trainer), before)


@pytest.mark.slow
def test_an_empty_contribution_travels_and_has_no_say() -> None:
    trainer, other = trainer_of(), trainer_of()
    trainer.begin(train())
    empty, _ = trainer.finish(skip=True)
    blob, data_hash = encode_result(empty, step=5, trainer_nonce=0, batch=BatchId(0, 3))
    arrived = read_result(blob, step=5, batch=BatchId(0, 3), data_hash=data_hash, plan=other.plan).update
    assert not any(arrived.present)
    update = trained(trainer_of(), train())
    other.apply(apply([arrived, update]))
    alone = trainer_of()
    alone.apply(apply([update]))
    assert same(weights(other), weights(alone))


@pytest.mark.slow
def test_results_in_the_order_of_names_are_those_in_the_optimizers_order() -> None:
    class Names(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(1)
            self.layers = nn.ModuleList(nn.Linear(4, 4) for _ in range(11))

    plain, ordered = trainer_of(Names()), trainer_of(Names(), sorted_by_name=True)
    assert plain.names != ordered.names
    assert list(ordered.names) == sorted(plain.names, key=str.encode)
    assert ordered.names.index("layers.10.bias") < ordered.names.index("layers.2.bias")
    a, b = trained(plain, train()), trained(ordered, train())
    assert not all(x.index.equal(y.index) for x, y in zip(a.tensors(), b.tensors(), strict=True))
    by_name = dict(zip(ordered.names, b.tensors(), strict=True))
    for name, entry in zip(plain.names, a.tensors(), strict=True):
        assert torch.equal(entry.index, by_name[name].index)
        assert torch.equal(entry.value, by_name[name].value)
    plain.apply(apply([a, a]))
    ordered.apply(apply([b, b]))
    assert same(weights(plain), weights(ordered))
    assert sorted(plain.digests()) == sorted(ordered.digests())


def test_gradients_are_clipped_where_the_run_says_so() -> None:
    clipped, scaled = trainer_of(clip_grad_norm=0.5), trainer_of()
    trained(clipped, train())
    scaled.begin(train())
    give_gradients(scaled)
    torch.nn.utils.clip_grad_norm_(scaled.tensors.trained.values(), 0.5)
    scaled.finish()
    assert same(deltas(clipped), deltas(scaled))


def test_digests_are_of_names_and_raw_bits() -> None:
    trainer = trainer_of(model(torch.bfloat16))
    expected = [tensor_digest(name, tensor) for name, tensor in trainer.tensors.trained.items()]
    assert trainer.digests() == expected
    with torch.no_grad():
        trainer.tensors.trained["0.bias"][0] = 0.0
        zero = trainer.digests()
        trainer.tensors.trained["0.bias"][0] = -0.0
    assert trainer.digests() != zero


def test_at_the_end_of_a_psyche_epoch_weights_are_what_bfloat16_can_hold() -> None:
    trainer = trainer_of()
    before = weights(trainer)
    trainer.round_to_bfloat16()
    assert same(weights(trainer), [w.bfloat16().float() for w in before])
    assert not same(weights(trainer), before)


# -- wrong arguments ---------------------------------------------------------------------------------------------------


def test_an_optimizer_without_overlap_is_refused() -> None:
    with pytest.raises(ConfigurationError, match="leave overlap out"):
        trainer_of(settings={"overlap": False})


def test_an_optimizer_of_another_model_is_refused() -> None:
    with pytest.raises(ConfigurationError, match=r"parameter 0 of the optimizer, shape \(8, 8\), is not in the model"):
        NamedTensors.of(model(), DisTrO(model().parameters()))


def test_momentum_of_another_shape_is_refused() -> None:
    with pytest.raises(ConfigurationError, match=r"momentum of 0\.bias has shape \(9,\)"):
        trainer_of().load_momentum({"0.bias": torch.zeros(9)})


def test_the_momentum_of_the_recipe_goes_through_a_checkpoint() -> None:
    def trainer_of(seed: int) -> SwarmTrainer:
        torch.manual_seed(seed)
        net = nn.Linear(4, 4)
        optimizer = DisTrO(net.parameters(), lr=0.1, direction="orthogonal", update="rms")
        for param in net.parameters():
            param.grad = torch.randn_like(param)
        optimizer.generate()
        return SwarmTrainer(NamedTensors.of(net, optimizer), optimizer)

    first, second = trainer_of(1), trainer_of(2)
    saved = first.momentum()
    assert set(saved) == {"weight", "bias", "momentum_buffer/weight", "momentum_buffer/bias"}
    second.load_momentum(saved)
    assert all(torch.equal(value, saved[name]) for name, value in second.momentum().items())
    with pytest.raises(ConfigurationError, match="has shape"):
        second.load_momentum({"momentum_buffer/bias": torch.zeros(3)})
