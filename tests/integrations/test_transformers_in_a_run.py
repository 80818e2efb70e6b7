"""A script with ``transformers.Trainer`` in a run: samples, steps, schedules and checkpoints follow the run."""

from __future__ import annotations

import json
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import IterableDataset

pytest.importorskip("accelerate", reason="transformers.Trainer needs accelerate")

from transformers import LlamaForCausalLM, Trainer, TrainerCallback, TrainingArguments
from typing_extensions import override

from distro_optim import DisTrO, RunConfig
from distro_optim.errors import ConfigurationError, RunLostError
from distro_optim.integrations.huggingface import SwarmTraining
from distro_optim.strategy.frameworks import run_ahead
from distro_optim.strategy.session import SwarmSession
from frameworks.audited_run import AuditedRun, connect_to
from frameworks.lightning_runs import Runs, quiet_runs
from integrations.small_trainer import Noting, Tokens, new_model, new_trainer, same, weights
from session.world import SessionWorld, SimulatedPort

JOINS = "localhost:20000/quiet"


@pytest.fixture
def runs(monkeypatch: pytest.MonkeyPatch) -> Runs:
    return quiet_runs(monkeypatch)


@pytest.mark.slow
def test_a_host_trains_each_sample_once_in_an_epoch(runs: Runs, tmp_path: Path, capsys: Any) -> None:
    trainer = new_trainer(tmp_path)
    first = weights(trainer.model)
    output = trainer.train()
    assert [len(batch) for batch in trainer.batches] == [4] * 12, "per_device_train_batch_size is a forward pass"
    for epoch in (trainer.batches[:6], trainer.batches[6:]):
        assert sorted(sample for batch in epoch for sample in batch) == list(range(24))
    assert trainer.seen.steps == [1, 2, 3, 4, 5, 6]
    assert trainer.seen.ends_of_epochs == [1.0, 2.0]
    assert (runs.port.started, runs.port.closed) == (1, 1)
    assert runs.port.ended, "the last results are applied before train() returns"
    assert not same(weights(trainer.model), first)
    assert output.training_loss == pytest.approx(sum(loss or 0.0 for loss in runs.port.losses.values()) / 6)
    assert "run='psyche1quiet'" in capsys.readouterr().out
    assert trainer.view().run_id == "quiet", "what was to be seen remains"
    assert trainer.summary().startswith("the run 'quiet'")
    assert (trainer.args.gradient_accumulation_steps, trainer.args.max_steps) == (2, -1), "as the script had them"
    assert trainer.session is None


@pytest.mark.slow
def test_others_are_audited_by_the_loss_that_it_computes_and_it_trains_as_without(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def train(*, audits: bool) -> tuple[dict[str, Tensor], AuditedRun]:
        ports = connect_to(monkeypatch, audits=audits)
        trainer = new_trainer(tmp_path)
        trainer.train()
        return weights(trainer.model), ports[-1]

    audited, run = train(audits=True)
    plain, _ = train(audits=False)
    assert same(audited, plain)
    assert len(run.found) >= 3
    total = sum(run.found[1:], run.found[0])
    assert total.only_assigned > total.only_control, "it tells the batch that was trained from another one"


@pytest.mark.slow
@pytest.mark.parametrize(("per_pass", "passes"), [(8, 1), (3, 2)])
def test_how_a_round_is_cut_in_batches_is_each_peers_own_affair(
    runs: Runs, tmp_path: Path, per_pass: int, passes: int
) -> None:
    """The last batch is shorter, and padding would make its mean count too much: all are of the round's tokens."""
    runs.settings["config"] = RunConfig(total_steps=2, global_batch_size=8)
    losses = []
    for size, accumulate in ((4, 2), (per_pass, passes)):
        trainer = new_trainer(tmp_path, per_device_train_batch_size=size, gradient_accumulation_steps=accumulate)
        trainer.train()
        losses.append(runs.port.losses)
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


@pytest.mark.slow
def test_a_loss_of_the_users_own_counts_by_its_samples(runs: Runs, tmp_path: Path) -> None:
    class OwnLoss(Noting):
        loss_is_scaled_for_ga = False  # as newer versions ask of such a method

        @override
        def compute_loss(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
            self.batches.append(inputs["input_ids"][:, 0].tolist())
            return (model.lm_head.weight * len(self.batches[-1])).sum()  # its gradient is that number everywhere

    gradients: list[float] = []

    class Look(TrainerCallback):
        @override
        def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **more: Any) -> None:
            gradients.append(float(more["model"].lm_head.weight.grad.mean()))

    runs.settings["config"] = RunConfig(total_steps=1, global_batch_size=8)
    trainer = new_trainer(tmp_path, kind=OwnLoss, per_device_train_batch_size=6, max_grad_norm=0.0, callbacks=[Look()])
    trainer.train()
    assert [len(batch) for batch in trainer.batches] == [6, 2]
    assert gradients == pytest.approx([6 * 6 / 8 + 2 * 2 / 8])


@pytest.mark.slow
def test_a_late_joiner_is_at_the_step_of_the_run(runs: Runs, tmp_path: Path) -> None:
    runs.settings.update(
        config=RunConfig(total_steps=9, global_batch_size=8), first_step=5, share_of=2, skipped=[7], cancelled=[8]
    )
    trainer = new_trainer(tmp_path, run=JOINS)
    output = trainer.train()
    assert trainer.seen.steps == [5, 6, 8, 9]
    assert trainer.seen.epochs == pytest.approx([5 / 3, 2, 8 / 3, 3])
    assert trainer.seen.ends_of_epochs == [2.0, 3.0]
    assert trainer.seen.total == 9, "the run's, though the script says two epochs"
    rates = [0.01 * (1 - step / 9) for step in range(9)]
    shown = trainer.rates()
    # What is logged is the rate after the step in versions before 5, the one of the step itself since.
    assert any(
        shown == pytest.approx({step: ([*rates, 0.0])[step - 1 + later] for step in (5, 6, 8, 9)}) for later in (0, 1)
    )
    assert runs.port.stopped == [8]
    assert output.global_step == 9
    assert 1.0 < output.training_loss < 5.0, "of the four steps, not of nine"


@pytest.mark.slow
def test_a_peer_leaves_after_its_own_max_steps(runs: Runs, tmp_path: Path) -> None:
    runs.settings["config"] = RunConfig(total_steps=9, global_batch_size=8)
    trainer = new_trainer(tmp_path, run=JOINS, max_steps=4)
    trainer.train()
    assert trainer.seen.steps == [1, 2, 3, 4]
    assert runs.port.closed
    assert not runs.port.ended
    assert trainer.rates()[4] > 0.004, "the schedule is the run's"


@pytest.mark.slow
def test_what_is_saved_are_true_weights_and_a_host_goes_on_from_them(runs: Runs, tmp_path: Path) -> None:
    straight = new_trainer(tmp_path / "a", save_strategy="steps", save_steps=2)
    straight.train()
    for step in (2, 4, 6):
        place = json.loads((tmp_path / "a" / f"checkpoint-{step}" / "distro_optim.json").read_text())
        assert place == {"run_id": "quiet", "data_index": 8 * step, "dataset_size": 24}
    last = LlamaForCausalLM.from_pretrained(tmp_path / "a" / "checkpoint-6")
    assert same(weights(last), weights(straight.model)), "with all that was trained in it"
    runs.settings["first_step"] = 5
    resumed = new_trainer(tmp_path / "b", model=new_model(seed=5))
    resumed.train(resume_from_checkpoint=str(tmp_path / "a" / "checkpoint-4"))
    begun = runs.port.begins_with
    assert begun is not None
    assert (begun.run_id, begun.progress.step, begun.progress.epoch_start_data_index) == ("quiet", 5, 32)
    assert resumed.seen.steps == [5, 6]
    assert [sorted(b) for b in resumed.batches] == [sorted(b) for b in straight.batches[8:]]


@pytest.mark.slow
def test_a_checkpoint_ahead_of_the_run_is_not_resumed_from(runs: Runs, tmp_path: Path) -> None:
    saving = new_trainer(tmp_path, save_strategy="steps", save_steps=4)
    saving.train()
    runs.settings["config"] = RunConfig(total_steps=9, global_batch_size=8)
    with pytest.raises(ConfigurationError, match=r"of step 6, and the run is at step 1: join it without"):
        new_trainer(tmp_path, run=JOINS).train(resume_from_checkpoint=True)
    assert runs.port.started == 0
    assert runs.port.closed


@pytest.mark.slow
def test_a_model_saved_in_mid_round_has_true_weights(runs: Runs, tmp_path: Path) -> None:
    def save(trainer: Any) -> None:
        if trainer.state.global_step == 2:
            ahead = weights(trainer.model)
            trainer.save_model(str(tmp_path / "mid"))
            assert not same(weights(trainer.model), ahead)

    class True3(TrainerCallback):
        def __init__(self) -> None:
            self.weights: dict[str, Tensor] = {}

        @override
        def on_step_end(self, args: Any, state: Any, control: Any, **more: Any) -> None:
            if state.global_step == 3:
                self.weights = weights(more["model"])

    callback = True3()
    new_trainer(
        tmp_path, before=save, callbacks=[callback], gradient_accumulation_steps=1, per_device_train_batch_size=8
    ).train()
    assert same(weights(LlamaForCausalLM.from_pretrained(tmp_path / "mid")), callback.weights)


@pytest.mark.slow
def test_a_loop_that_dies_leaves_the_run(runs: Runs, tmp_path: Path) -> None:
    runs.settings.update(error=RunLostError("the coordinator is gone"), error_at=3)
    trainer = new_trainer(tmp_path)
    with pytest.raises(RunLostError):
        trainer.train()
    assert runs.port.closed == 1
    trainer.model.zero_grad()
    trainer.accelerator.backward(trainer.model.lm_head.weight.sum())  # as it was
    assert float(trainer.model.lm_head.weight.grad.max()) in (0.5, 1.0)  # versions before 5 let it divide by two


def test_evaluation_and_prediction_need_no_run(runs: Runs, tmp_path: Path) -> None:
    trainer = new_trainer(tmp_path)
    assert trainer.evaluate(Tokens(8))["eval_loss"] > 0
    assert len(trainer.get_train_dataloader()) == 6
    assert runs.ports == []


class Adapter(nn.Module):
    """A low-rank addition to a linear layer that stays as it is, as LoRA makes it."""

    def __init__(self, layer: Any, rank: int = 2) -> None:
        super().__init__()
        self.base = layer
        self.down = nn.Parameter(torch.randn(rank, layer.in_features) * 0.1)
        self.up = nn.Parameter(torch.zeros(layer.out_features, rank))

    @override
    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.base(x) + x @ self.down.T @ self.up.T
        return result


def with_adapters(model: Any) -> Any:
    for param in model.parameters():
        param.requires_grad_(False)
    attention = model.model.layers[0].self_attn
    attention.q_proj, attention.v_proj = Adapter(attention.q_proj), Adapter(attention.v_proj)
    return model


@pytest.mark.slow
def test_only_what_has_gradients_is_trained(runs: Runs, tmp_path: Path) -> None:
    model = with_adapters(new_model())
    before = weights(model)
    new_trainer(tmp_path, model=model, weight_decay=0.1).train()
    changed = {name for name, tensor in weights(model).items() if not torch.equal(tensor, before[name])}
    adapters = {name for name in before if name.endswith((".up", ".down"))}
    assert changed == adapters
    assert set(runs.port.names) == adapters


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # peft asks for it
def test_a_lora_of_peft_is_trained_and_saved_as_an_adapter(runs: Runs, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft", reason="peft makes the LoRA")
    base = new_model()
    before = weights(base)
    lora = peft.get_peft_model(base, peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM"))
    trainer = new_trainer(tmp_path, model=lora, save_strategy="steps", save_steps=6)
    trainer.train()
    loaded = peft.PeftModel.from_pretrained(new_model(), tmp_path / "checkpoint-6")
    assert same(weights(loaded), weights(lora))
    assert same(weights(loaded.unload()), before)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"optimizers": (torch.optim.AdamW([nn.Parameter(torch.ones(2))]), None)}, "AdamW, which has nothing to send"),
        ({"auto_find_batch_size": True}, "a run is joined once"),
        ({"train_dataset": Tokens(0)}, "the training dataset is empty"),
        ({"model": new_model().requires_grad_(False)}, "nothing to train"),
        ({"run": "not a ticket"}, "not a ticket"),
    ],
)
def test_what_cannot_work_is_said_before_the_run(
    runs: Runs, tmp_path: Path, settings: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigurationError, match=message):
        new_trainer(tmp_path, **settings).train()
    assert runs.ports == []


def test_mistakes_of_a_script_with_a_trainer_are_told_in_one_line(
    monkeypatch: Any, tmp_path: Path, capsys: Any
) -> None:
    monkeypatch.setattr(sys, "excepthook", sys.__excepthook__)
    with pytest.raises(ConfigurationError) as caught:
        new_trainer(tmp_path, run="not a ticket")
    sys.excepthook(caught.type, caught.value, None)
    assert capsys.readouterr().err == f"distro_optim: {caught.value}\n"


def test_an_optimizer_that_the_arguments_name_is_not_used_in_silence(runs: Runs, tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match=r"optim='adafactor'\) is not used"):
        new_trainer(tmp_path, optim="adafactor").create_optimizer()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        new_trainer(tmp_path).create_optimizer()


@pytest.mark.slow
def test_a_checkpoint_of_another_optimizer_is_told_with_what_to_do_instead(runs: Runs, tmp_path: Path) -> None:
    model = new_model()
    arguments = TrainingArguments(str(tmp_path), max_steps=1, save_steps=1, report_to=[], use_cpu=True)
    Trainer(model, arguments, train_dataset=Tokens()).train()
    with pytest.raises(ConfigurationError, match="call train\\(\\) without resume_from_checkpoint"):
        new_trainer(tmp_path).train(resume_from_checkpoint=True)
    assert not any(port.started for port in runs.ports)


@pytest.mark.slow
def test_data_without_a_length_need_a_number_of_steps(runs: Runs, tmp_path: Path) -> None:
    class Stream(IterableDataset[dict[str, Tensor]]):
        @override
        def __iter__(self) -> Any:
            return iter([Tokens()[n] for n in range(24)])

    trainer = new_trainer(tmp_path, train_dataset=Stream(), max_steps=3)
    with pytest.warns(UserWarning, match="peers take turns by counting"):
        trainer.train()
    assert trainer.seen.steps == [1, 2, 3]


@pytest.mark.slow
def test_a_class_of_the_users_own_trainer_trains_in_a_run(runs: Runs, tmp_path: Path) -> None:
    class Own(Trainer):
        pass

    class SwarmOwn(SwarmTraining, Own):
        pass

    trainer = new_trainer(tmp_path, kind=SwarmOwn, optimizers=(None, None))
    trainer.train()
    assert trainer.state.global_step == 6


class Peers:
    """Trainers in a simulated run, each in a thread of its own."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, make_world: Callable[..., SessionWorld], folder: Path) -> None:
        self.world = make_world(total_steps=24, epoch_time=24, init_min_clients=2, min_clients=2)
        self.folder = folder
        self.trainers: list[Any] = []
        self.now: SimulatedPort | None = None
        monkeypatch.setattr(run_ahead, "connect_to_run", lambda *_: self.now)
        monkeypatch.setattr(SwarmSession, "connect", lambda _: self.now)

    def join(self, **settings: Any) -> None:
        number = len(self.trainers) + 1
        port = self.world.port(number)

        def before(trainer: Any) -> None:
            port.compute(1.0, trainer._round.step)

        trainer = new_trainer(
            self.folder / str(number),
            model=new_model(seed=number),
            run=None if number == 1 else JOINS,
            before=before,
            train_dataset=Tokens(60),
            **settings,
        )
        self.trainers.append(trainer)

        def script(port: SimulatedPort) -> None:
            self.now = port  # one thread runs at a time, and connects before it waits
            trainer.train()

        self.world.run(port, script)


@pytest.mark.slow
def test_two_peers_and_a_late_one_end_with_equal_weights(
    monkeypatch: pytest.MonkeyPatch, make_world: Callable[..., SessionWorld], tmp_path: Path
) -> None:
    peers = Peers(monkeypatch, make_world, tmp_path)
    peers.join(config=RunConfig(total_steps=23, global_batch_size=8), warmup_steps=3)
    peers.join(warmup_steps=3, per_device_train_batch_size=3)
    peers.world.until(lambda state: state.progress.step >= 4)
    peers.join(warmup_steps=3)
    peers.world.until_all_ended()
    one, two, late = peers.trainers
    assert same(weights(one.model), weights(two.model))
    assert same(weights(one.model), weights(late.model))
    assert not same(weights(one.model), weights(new_model(seed=1)))
    assert late.seen.steps[0] > 4
    common = one.rates().keys() & late.rates().keys()
    assert common
    assert all(one.rates()[step] == pytest.approx(late.rates()[step]) for step in common)
    assert all(trainer.state.global_step == peers.trainers[0].state.global_step for trainer in peers.trainers)
    peers.world.assert_equal_hashes()


@pytest.mark.slow
def test_a_given_optimizer_and_schedule_are_used(runs: Runs, tmp_path: Path) -> None:
    model = new_model()
    optimizer = DisTrO(model.parameters(), lr=0.02, compression_topk=4)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5**step)
    runs.settings["first_step"] = 3
    trainer = new_trainer(tmp_path, model=model, optimizers=(optimizer, schedule))
    trainer.train()
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0.02 * 0.5**6)
    plateau = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer)
    with pytest.raises(ConfigurationError, match="ReduceLROnPlateau cannot follow a run"):
        new_trainer(tmp_path, model=model, optimizers=(optimizer, plateau)).train()
