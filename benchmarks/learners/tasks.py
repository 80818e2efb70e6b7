"""What is learned: the next byte or token of source code; handwritten digits, by convolutions and by a transformer."""

from __future__ import annotations

import functools
import sys
from pathlib import Path
from typing import Protocol

# For what is not installed: the model and the data of the examples.
sys.path.insert(0, str(Path(__file__).parents[2]))

import torch
from examples.byte_data import SourceBytes
from examples.byte_model import ByteTransformer, next_byte_loss
from torch import Tensor, nn
from torch.nn import functional as F
from typing_extensions import override

from learners.base import Batch, Task
from learners.package_text import CONTEXT, VOCABULARY, PackageText

__all__ = ["BYTES", "CONVOLUTIONS", "LLAMA", "TASKS", "VISION_TRANSFORMER", "Data", "data_of", "right_answers"]


class Data(Protocol):
    """What a worker gets depends on nothing but a seed, the step and its number."""

    def batch(self, step: int, worker: int, size: int) -> Batch: ...

    def held_out(self, size: int) -> Batch:
        """Samples that are not trained on, the same at every call."""
        ...


class Digits:
    """scikit-learn's 1,797 digits of 8 by 8 pixels, of which every fifth is held out."""

    def __init__(self, seed: int) -> None:
        from sklearn.datasets import load_digits

        bunch = load_digits()
        images = torch.tensor(bunch.images, dtype=torch.float32).unsqueeze(1) / 8 - 1
        labels = torch.tensor(bunch.target)
        is_held_out = torch.arange(len(labels)) % 5 == 4
        self._training = images[~is_held_out], labels[~is_held_out]
        self._held_out = images[is_held_out], labels[is_held_out]
        self._seed = seed

    def batch(self, step: int, worker: int, size: int) -> Batch:
        generator = torch.Generator().manual_seed(self._seed * 1_000_003 + step * 101 + worker)
        chosen = torch.randint(len(self._training[1]), (size,), generator=generator)
        return self._training[0][chosen], self._training[1][chosen]

    def held_out(self, size: int) -> Batch:
        return self._held_out[0][:size], self._held_out[1][:size]


class ConvNet(nn.Sequential):
    """Three convolutions and a head: 65,994 parameters."""

    def __init__(self) -> None:
        super().__init__(
            nn.Conv2d(1, 32, 3, padding=1), nn.ReLU(),
            nn.Conv2d(32, 64, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
            nn.Conv2d(64, 64, 3, padding=1), nn.ReLU(), nn.Flatten(),
            nn.Linear(64 * 4 * 4, 10),
        )  # fmt: skip


class ViT(nn.Module):
    """A transformer over 16 patches of 2 by 2 pixels: 152,074 parameters, biases and norms among them."""

    def __init__(self, *, width: int = 64, layers: int = 3, heads: int = 4) -> None:
        super().__init__()
        self.patches = nn.Conv2d(1, width, 2, stride=2)
        self.positions = nn.Parameter(0.02 * torch.randn(16, width))
        self.blocks = nn.Sequential(
            *(
                nn.TransformerEncoderLayer(
                    width, heads, 4 * width, dropout=0.0, activation="gelu", batch_first=True, norm_first=True
                )
                for _ in range(layers)
            )
        )
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, 10)

    @override
    def forward(self, x: Tensor) -> Tensor:
        """``(batch, 1, 8, 8)`` to logits ``(batch, 10)``."""
        tokens = self.patches(x).flatten(2).transpose(1, 2) + self.positions
        logits: Tensor = self.head(self.norm(self.blocks(tokens)).mean(1))
        return logits


def llama() -> nn.Module:
    """20,848,512 parameters, of which the embedding and the head are 1,572,864 each."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=384, intermediate_size=1024, num_hidden_layers=10, num_attention_heads=6,
        num_key_value_heads=6, max_position_embeddings=CONTEXT, tie_word_embeddings=False,
    )  # fmt: skip
    return LlamaForCausalLM(config)


def next_token_loss(model: nn.Module, inputs: Tensor, targets: Tensor) -> Tensor:
    """In nats per token. Weights are float32; products are of bfloat16, for every method alike."""
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logits: Tensor = model(input_ids=inputs).logits
    return F.cross_entropy(logits.float().flatten(0, 1), targets.flatten())


def cross_entropy(model: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(model(images), labels)


@torch.no_grad()
def right_answers(model: nn.Module, images: Tensor, labels: Tensor) -> float:
    """The share of them."""
    return (model(images).argmax(-1) == labels).float().mean().item()


BYTES = Task("bytes", ByteTransformer, next_byte_loss)
CONVOLUTIONS = Task("digits by convolutions", ConvNet, cross_entropy)
VISION_TRANSFORMER = Task("digits by a transformer", ViT, cross_entropy)
LLAMA = Task("Llama 20M", llama, next_token_loss)
TASKS = {task.name: task for task in (BYTES, CONVOLUTIONS, VISION_TRANSFORMER, LLAMA)}


@functools.cache
def data_of(task: str, seed: int) -> Data:
    if task == BYTES.name:
        return SourceBytes(seed=seed)
    return PackageText(seed=seed) if task == LLAMA.name else Digits(seed)
