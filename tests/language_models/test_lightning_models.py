"""Lightning's Trainer trains a language model as the plain loop does, and a run's settings reach its optimizer."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from distro_optim import DisTrO
from distro_optim.coordinator.model import (
    LLM,
    ConstantLR,
    CosineLR,
    Distro,
    DummyData,
    Hub,
    HubRepo,
    LLMArchitecture,
    LLMTrainingDataType,
)
from distro_optim.errors import ConfigurationError
from distro_optim.models.accumulation import train_batch
from distro_optim.models.batches import TokenBatch, collate
from distro_optim.models.causal_lm import CausalLM
from distro_optim.optim.arguments import TORCH_KEEPS_NAMES
from language_models.small import DEEPSEEK, LLAMA, sentences

if TYPE_CHECKING:
    from distro_optim.models.lightning_module import PsycheCausalLM

pytestmark = [
    # Lightning imports what setuptools and torch deprecate, and has advice for tiny runs.
    pytest.mark.filterwarnings("ignore:pkg_resources is deprecated"),
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),
    pytest.mark.filterwarnings("ignore:You defined a `validation_step` but have no `val_dataloader`"),
    pytest.mark.filterwarnings("ignore:.*is smaller than the logging interval"),
    pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty"),
    pytest.mark.filterwarnings("ignore:.*treespec, LeafSpec.*:FutureWarning"),
    pytest.mark.filterwarnings("ignore:.*isinstance\\(treespec, LeafSpec\\).*"),
]

RUN = LLM(
    max_seq_len=32,
    cold_start_warmup_steps=0,
    architecture=LLMArchitecture.HF_LLAMA,
    checkpoint=Hub(HubRepo("")),
    data_type=LLMTrainingDataType.PRETRAINING,
    data_location=DummyData(),
    lr_schedule=CosineLR(base_lr=4e-3, warmup_init_lr=0.0, final_lr=4e-4, warmup_steps=4, total_steps=40),
    optimizer=Distro(
        clip_grad_norm=0.5,
        weight_decay=0.1,
        compression_decay=0.995,
        compression_topk=4,
        compression_chunk=16,
        quantize_1bit=True,
    ),
)
ROWS = 24  # three batches of eight


@pytest.fixture(scope="module")
def lightning() -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from distro_optim.models import lightning_module
    return lightning_module


@pytest.fixture
def make(lightning: Any) -> Any:
    return lightning.PsycheCausalLM


def data(rows: int = ROWS) -> DataLoader[Any]:
    return DataLoader(list(sentences(rows)), batch_size=8, collate_fn=collate)  # type: ignore[arg-type]


def trainer(folder: Path, **settings: Any) -> Any:
    import lightning.pytorch as pl

    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    return pl.Trainer(
        **{"accelerator": "cpu", "max_epochs": 1, "enable_model_summary": False, **quiet, **settings},
        default_root_dir=folder,
    )


def plain(batches: Iterator[TokenBatch] | DataLoader[Any], steps: int, **settings: Any) -> CausalLM:
    """The same in a plain loop."""
    model = CausalLM(LLAMA, "HfLlama", seed=1)
    optimizer = model.make_optimizer(lr=2e-3)
    for batch, _ in zip(batches, range(steps), strict=False):
        # A loss is a number for the types of torch.optim, and a tensor in every script.
        optimizer.step(partial(closure, model, batch, settings))  # type: ignore[arg-type]
    return model


def closure(model: CausalLM, batch: TokenBatch, settings: dict[str, Any]) -> Tensor:
    loss = train_batch(model, batch, **settings)
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    assert loss is not None
    return loss


@pytest.mark.slow
@pytest.mark.parametrize("micro_batch_size", [None, 4, 3])
def test_the_trainer_ends_with_the_weights_of_the_plain_loop(
    tmp_path: Path, make: type[PsycheCausalLM], micro_batch_size: int | None
) -> None:
    model = make(LLAMA, "HfLlama", seed=1, lr=2e-3, micro_batch_size=micro_batch_size)
    trainer(tmp_path).fit(model, data())
    wanted = plain(data(), 3, micro_batch_size=micro_batch_size).tensors()
    new = CausalLM(LLAMA, "HfLlama", seed=1).tensors()
    assert all(torch.equal(tensor, wanted[name]) for name, tensor in model.tensors().items())
    assert not all(torch.equal(tensor, new[name]) for name, tensor in wanted.items())


@pytest.mark.slow
@pytest.mark.parametrize(("architecture", "config"), [("HfLlama", LLAMA), ("HfDeepseek", DEEPSEEK)])
def test_the_loss_falls_in_bfloat16(
    tmp_path: Path, make: type[PsycheCausalLM], architecture: str, config: dict[str, Any]
) -> None:
    model = make(config, architecture, lr=4e-3, micro_batch_size=4)
    before = [model(batch).loss.item() for batch in data()]
    done = trainer(tmp_path, max_epochs=10)
    done.fit(model, data(), val_dataloaders=data())
    assert float(done.callback_metrics["val_loss"]) < 0.7 * sum(before) / len(before)
    assert {"loss", "val_loss"} <= set(done.callback_metrics)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}


@pytest.mark.slow
def test_gradients_of_several_batches_and_of_their_parts_add_up(tmp_path: Path, make: type[PsycheCausalLM]) -> None:
    found: list[list[Tensor]] = []

    class Watched(make):  # type: ignore[misc, valid-type]
        def on_before_optimizer_step(self, optimizer: Any) -> None:
            found.append([p.grad.clone() for p in self.parameters()])

    for settings in ({"micro_batch_size": 2}, {"micro_batch_size": None}):
        model = Watched(LLAMA, "HfLlama", seed=1, dtype=torch.float32, **settings)
        trainer(tmp_path, accumulate_grad_batches=3, gradient_clip_val=1e9).fit(model, data())
    assert len(found) == 2
    for parts, whole in zip(*found, strict=True):
        torch.testing.assert_close(parts, whole, rtol=1e-3, atol=1e-6)


@pytest.mark.slow
def test_a_strategy_may_weigh_the_loss_of_a_batch_in_parts(make: type[PsycheCausalLM]) -> None:
    parts, whole = (make(LLAMA, "HfLlama", dtype=torch.float32, micro_batch_size=size) for size in (2, None))
    for model in (parts, whole):
        model.log = lambda *_, **__: None  # type: ignore[method-assign]
        (model.training_step(sentences(8)) * 0.25).backward()
    for a, b in zip(parts.parameters(), whole.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-3, atol=1e-6)


@pytest.mark.slow
def test_precision_bf16_true_leaves_rotary_frequencies_exact(tmp_path: Path, make: type[PsycheCausalLM]) -> None:
    model = make(LLAMA, "HfLlama", seed=1, lr=2e-3)
    trainer(tmp_path, precision="bf16-true").fit(model, data())
    assert all(b.dtype == torch.float32 for b in model.buffers())
    wanted = plain(data(), 3).tensors()
    assert all(torch.equal(tensor, wanted[name]) for name, tensor in model.tensors().items())


@pytest.mark.slow
def test_a_run_gives_settings_schedule_and_clipping(tmp_path: Path, make: type[PsycheCausalLM]) -> None:
    CausalLM(LLAMA, "HfLlama").save_pretrained(tmp_path / "model")
    rates: list[float] = []
    norms: list[float] = []

    class Watched(make):  # type: ignore[misc, valid-type]
        def configure_gradient_clipping(self, *args: Any, **settings: Any) -> None:
            super().configure_gradient_clipping(*args, **settings)
            norms.append(torch.nn.utils.get_total_norm([p.grad.float() for p in self.parameters()]).item())

        def on_train_batch_end(self, *_: Any) -> None:
            rates.append(self.trainer.optimizers[0].param_groups[0]["lr"])

    model = Watched.from_run(RUN, tmp_path / "model")
    done = trainer(tmp_path, max_epochs=2)
    done.fit(model, data())
    [optimizer] = done.optimizers
    assert isinstance(optimizer, DisTrO)
    [group] = optimizer.param_groups
    assert group["compression_decay"] == pytest.approx(0.995)
    assert (group["compression_topk"], group["compression_chunk"], group["weight_decay"]) == (4, 16, pytest.approx(0.1))
    assert optimizer.overlap
    assert not TORCH_KEEPS_NAMES or group["param_names"] == list(model.sorted_parameters())
    assert [grid.coded_shape for grid in optimizer.plan.grids][:2] == [(6, 4, 16, 16), (6, 4, 16, 16)]
    # Steps 1, 2, 3 of a rise from 0 to 4e-3 in four steps, the top, and the cosine after it.
    assert rates[:4] == pytest.approx([1e-3, 2e-3, 3e-3, 4e-3])
    assert rates[4] < 4e-3
    assert all(norm <= 0.5 * 1.01 for norm in norms)
    assert len(norms) == 6


@pytest.mark.slow
def test_a_constant_schedule_that_begins_anywhere_is_followed(make: type[PsycheCausalLM], tmp_path: Path) -> None:
    model = make(LLAMA, "HfLlama", lr_schedule=ConstantLR(2e-3, 0.0, 0))
    done = trainer(tmp_path)
    done.fit(model, data())
    assert done.optimizers[0].param_groups[0]["lr"] == pytest.approx(2e-3)


@pytest.mark.slow
def test_lightnings_checkpoints_have_the_names_of_the_files_and_load(
    tmp_path: Path, make: type[PsycheCausalLM]
) -> None:
    model = make(LLAMA, "HfLlama", seed=1, lr=2e-3, micro_batch_size=4)
    done = trainer(tmp_path)
    done.fit(model, data())
    done.save_checkpoint(tmp_path / "some.ckpt")
    saved = torch.load(tmp_path / "some.ckpt", weights_only=True)
    assert set(saved["state_dict"]) == set(model.tensors())
    loaded = make.load_from_checkpoint(tmp_path / "some.ckpt", weights_only=True)
    assert all(torch.equal(tensor, loaded.tensors()[name]) for name, tensor in model.tensors().items())
    assert (loaded.config, loaded.lr, loaded.micro_batch_size) == (model.config, 2e-3, 4)


@pytest.mark.slow
def test_training_resumes_from_a_folder(tmp_path: Path, make: type[PsycheCausalLM]) -> None:
    model = make(LLAMA, "HfLlama", lr=2e-3)
    trainer(tmp_path).fit(model, data())
    model.save_pretrained(tmp_path / "model")
    again = make.from_folder(tmp_path / "model", "HfLlama", lr=2e-3)
    loss = model(sentences(4)).loss.item()
    assert again(sentences(4)).loss.item() == loss
    trainer(tmp_path, max_epochs=3).fit(again, data())
    assert again(sentences(4)).loss.item() < loss


def test_a_token_outside_the_vocabulary_ends_the_fit_with_a_sentence(
    tmp_path: Path, make: type[PsycheCausalLM]
) -> None:
    wrong: DataLoader[Any] = DataLoader([torch.full((8,), 96)], batch_size=1, collate_fn=collate)  # type: ignore[arg-type]
    with pytest.raises(ConfigurationError, match="the data holds token 96, the model's vocabulary has 96"):
        trainer(tmp_path).fit(make(LLAMA, "HfLlama"), wrong)


def test_a_micro_batch_size_of_nothing_is_refused(make: type[PsycheCausalLM]) -> None:
    with pytest.raises(ConfigurationError, match="micro_batch_size=0: give a positive number"):
        make(LLAMA, "HfLlama", micro_batch_size=0)


@pytest.mark.slow
def test_models_can_be_copied_and_go_on_apart(make: type[PsycheCausalLM]) -> None:
    import copy
    import pickle

    model = make(LLAMA, "HfLlama")
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):  # noqa: S301 - our own
        assert torch.equal(twin(sentences(2)).loss, model(sentences(2)).loss)
        with torch.no_grad():
            twin.sorted_parameters()["model.norm.weight"].zero_()
        assert not torch.equal(twin(sentences(2)).loss, model(sentences(2)).loss)
