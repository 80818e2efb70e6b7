"""``transformers.Trainer`` trains with DisTrO, and what it saves are the true weights, evaluated or not."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from typing_extensions import override

from distro_optim import DisTrO

pytest.importorskip("accelerate", reason="transformers.Trainer needs accelerate")
transformers = pytest.importorskip("transformers")

pytestmark = [pytest.mark.waiting, pytest.mark.slow]

STEPS = 6


class LooksAheadBetweenSteps(DisTrO):
    """As in a loop that knows nothing of ``train()``."""

    @override
    def train(self) -> None:
        if not self.param_groups[0]["training"]:
            super().train()


class TrueWeights(transformers.TrainerCallback):  # type: ignore[misc, name-defined]
    """Keeps the weights after each step, without the lookahead."""

    def __init__(self, optimizer: DisTrO) -> None:
        self.optimizer = optimizer
        self.after: dict[int, dict[str, Tensor]] = {}

    def on_step_end(self, args: Any, state: Any, control: Any, **more: Any) -> None:
        self.optimizer.undo_lookahead()
        self.after[state.global_step] = {n: w.clone() for n, w in more["model"].state_dict().items()}
        self.optimizer.lookahead()


def new_model() -> Any:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=32,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=16,
        tie_word_embeddings=False,
    )
    return transformers.LlamaForCausalLM(config)


def samples() -> list[dict[str, Tensor]]:
    tokens = torch.randint(32, (24, 12), generator=torch.Generator().manual_seed(1))
    return [{"input_ids": row, "labels": row} for row in tokens]


def trainer(folder: Path, kind: type[DisTrO] = DisTrO, callback: Any = None, **settings: Any) -> Any:
    model = new_model()
    optimizer = kind(model.parameters(), lr=0.01)
    arguments = transformers.TrainingArguments(
        output_dir=str(folder),
        max_steps=STEPS,
        per_device_train_batch_size=4,
        gradient_accumulation_steps=2,
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        lr_scheduler_type="constant",  # which lets the lookahead be put on again at the same rate
        **settings,
    )
    return transformers.Trainer(
        model,
        arguments,
        train_dataset=samples(),
        optimizers=(optimizer, None),
        callbacks=[] if callback is None else [callback(optimizer)],
    )


def saved(folder: Path) -> dict[str, Tensor]:
    state: dict[str, Tensor] = transformers.LlamaForCausalLM.from_pretrained(folder).state_dict()
    return state


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_what_is_saved_without_evaluation_are_the_true_weights(tmp_path: Path) -> None:
    looking_ahead = trainer(tmp_path / "a", LooksAheadBetweenSteps, TrueWeights, save_strategy="no")
    looking_ahead.train()
    [true] = [c.after for c in looking_ahead.callback_handler.callbacks if isinstance(c, TrueWeights)]
    saving = trainer(tmp_path / "b", save_steps=2)
    saving.train()
    for step in (2, 4, 6):
        assert same(saved(tmp_path / "b" / f"checkpoint-{step}"), true[step])
    saving.save_model(str(tmp_path / "last"))
    assert same(saved(tmp_path / "last"), true[STEPS])
    assert not same(looking_ahead.model.state_dict(), true[STEPS])
    silent = trainer(tmp_path / "c", save_strategy="no")
    silent.train()
    assert same(silent.model.state_dict(), saving.model.state_dict())
    resumed = trainer(tmp_path / "b", save_strategy="no")
    resumed.train(resume_from_checkpoint=str(tmp_path / "b" / "checkpoint-4"))
    assert same(resumed.model.state_dict(), saving.model.state_dict())
