"""A small trainer of transformers in a run: a model of a few hundred weights, and data that say which they are."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset
from transformers import LlamaConfig, LlamaForCausalLM, TrainerCallback, TrainingArguments
from typing_extensions import override

from distro_optim.integrations.huggingface import SwarmTrainer

VOCABULARY, LENGTH = 32, 8


class Tokens(Dataset[dict[str, Tensor]]):
    """Sequences whose first token is their number."""

    def __init__(self, size: int = 24) -> None:
        self.rows = torch.randint(VOCABULARY, (size, LENGTH), generator=torch.Generator().manual_seed(1))
        self.rows[:, 0] = torch.arange(size) % VOCABULARY

    def __len__(self) -> int:
        return len(self.rows)

    @override
    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {"input_ids": self.rows[index], "labels": self.rows[index]}


def new_model(seed: int = 0) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=8,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=LENGTH,
        tie_word_embeddings=False,
    )
    return LlamaForCausalLM(config)


class Seen(TrainerCallback):
    """What callbacks of a script see: steps, places in epochs, and learning rates."""

    def __init__(self) -> None:
        self.steps: list[int] = []
        self.epochs: list[float] = []
        self.ends_of_epochs: list[float] = []
        self.total = 0

    @override
    def on_step_end(self, args: Any, state: Any, control: Any, **more: Any) -> None:
        self.steps.append(state.global_step)
        self.epochs.append(state.epoch)
        self.total = state.max_steps

    @override
    def on_epoch_end(self, args: Any, state: Any, control: Any, **more: Any) -> None:
        self.ends_of_epochs.append(state.epoch)


class Noting(SwarmTrainer):
    """Notes the samples of each forward pass, before which it calls ``before``."""

    def __init__(self, *args: Any, before: Any = None, **kwargs: Any) -> None:
        self.batches: list[list[int]] = []
        self.seen = Seen()
        self.before = before
        super().__init__(*args, callbacks=[self.seen, *kwargs.pop("callbacks", [])], **kwargs)

    @override
    def compute_loss(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        if self.before is not None:
            self.before(self)
        self.batches.append(inputs["input_ids"][:, 0].tolist())
        return super().compute_loss(model, inputs, *args, **kwargs)

    def rates(self) -> dict[int, float]:
        """Of the learning rate, by step."""
        return {
            int(entry["step"]): entry["learning_rate"] for entry in self.state.log_history if "learning_rate" in entry
        }


def new_trainer(folder: Path, *, model: nn.Module | None = None, kind: Any = Noting, **settings: Any) -> Any:
    """A trainer of six steps in two epochs, unless ``settings`` say otherwise; some are of ``TrainingArguments``."""
    options = {
        name: settings.pop(name)
        for name in ("run", "config", "optimizers", "callbacks", "before", "train_dataset", "checkpoint_dir")
        if name in settings
    }
    arguments = {
        "num_train_epochs": 2,
        "per_device_train_batch_size": 4,
        "gradient_accumulation_steps": 2,
        "learning_rate": 0.01,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": [],
        "use_cpu": True,
        "disable_tqdm": True,
        **settings,
    }
    options.setdefault("train_dataset", Tokens())
    return kind(model or new_model(), TrainingArguments(output_dir=str(folder), **arguments), **options)


def weights(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)
