"""Three Lightning scripts as users have them, on models that no setting was chosen with: only one line changes.

    python benchmarks/untuned_models.py                      # all rows, some 30 minutes of a core
    python benchmarks/untuned_models.py --model gru --only tiles

The next byte of English prose: the descriptions of the packages that are installed, of which the last twentieth is held
out. One process trains alone.
"""

from __future__ import annotations

import argparse
import math
import sys
import warnings
from collections.abc import Callable, Iterable
from importlib.metadata import distributions
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from rich.console import Console
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset
from typing_extensions import override

from distro_optim import DisTrO

CONTEXT, BATCH, STEPS, WARMUP = 96, 16, 400, 30
HELD_OUT_WINDOWS = 256
WIDTH = 128

Parameters = Iterable[nn.Parameter]


def _recipe(lr: float, **settings: Any) -> Callable[[Parameters], torch.optim.Optimizer]:
    return lambda params: DisTrO(params, lr=lr, direction="orthogonal", update="rms", **settings)


SMALL_TILES = {"compression_chunk": 16, "compression_topk": 1, "momentum": 0.9, "ahead": "delta"}

OPTIMIZERS: dict[str, Callable[[Parameters], torch.optim.Optimizer]] = {
    **{
        f"AdamW, lr {lr:g}": lambda params, lr=lr: torch.optim.AdamW(params, lr=lr)
        for lr in (1e-3, 3e-3, 5e-3, 1e-2, 2e-2)
    },
    "recipe, lr 0.003": _recipe(3e-3),
    "recipe in tiles of 16, lr 0.003": _recipe(3e-3, **SMALL_TILES),
    "recipe in tiles of 16, lr 0.005": _recipe(5e-3, **SMALL_TILES),
    "recipe in tiles of 16, k=4, lr 0.003": _recipe(3e-3, **{**SMALL_TILES, "compression_topk": 4}),
}


class Windows(Dataset[tuple[Tensor, Tensor]]):
    """Of a text, one after the other."""

    def __init__(self, text: bytes) -> None:
        self._text = torch.tensor(list(text))

    def __len__(self) -> int:
        return (len(self._text) - 1) // CONTEXT

    def __getitem__(self, number: int) -> tuple[Tensor, Tensor]:
        window = self._text[number * CONTEXT : (number + 1) * CONTEXT + 1]
        return window[:-1], window[1:]


class Recurrent(nn.Module):
    """Two layers of GRU: 790,272 parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(256, WIDTH)
        self.gru = nn.GRU(WIDTH, 2 * WIDTH, 2, batch_first=True)
        self.norm = nn.LayerNorm(2 * WIDTH)
        self.head = nn.Linear(2 * WIDTH, 256)

    @override
    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.head(self.norm(self.gru(self.embedding(x))[0]))
        return logits


class Convolutional(nn.Module):
    """Six gated causal convolutions, of growing dilation: 658,688 parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(256, WIDTH)
        self.layers = nn.ModuleList(nn.Conv1d(WIDTH, 2 * WIDTH, 3, dilation=2 ** (n % 5)) for n in range(6))
        self.norms = nn.ModuleList(nn.LayerNorm(WIDTH) for _ in range(6))
        self.head = nn.Linear(WIDTH, 256)

    @override
    def forward(self, x: Tensor) -> Tensor:
        hidden = self.embedding(x)
        for number, (layer, norm) in enumerate(zip(self.layers, self.norms, strict=True)):
            before = F.pad(norm(hidden).transpose(1, 2), (2 * 2 ** (number % 5), 0))
            value, gate = layer(before).chunk(2, 1)
            hidden = hidden + (value * torch.sigmoid(gate)).transpose(1, 2)
        logits: Tensor = self.head(hidden)
        return logits


class Mixer(nn.Module):
    """Four layers that mix the places before each one by a learned matrix, then the channels: 742,144 parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(256, WIDTH)
        self.places = nn.ParameterList(torch.randn(4, CONTEXT, CONTEXT) / CONTEXT for _ in range(4))
        self.channels = nn.ModuleList(
            nn.Sequential(nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 4 * WIDTH), nn.GELU(), nn.Linear(4 * WIDTH, WIDTH))
            for _ in range(4)
        )
        self.norms = nn.ModuleList(nn.LayerNorm(WIDTH) for _ in range(4))
        self.head = nn.Linear(WIDTH, 256)

    @override
    def forward(self, x: Tensor) -> Tensor:
        hidden = self.embedding(x)
        for places, channels, norm in zip(self.places, self.channels, self.norms, strict=True):
            groups = norm(hidden).unflatten(2, (len(places), -1))
            mixed = torch.einsum("gts,bsgc->btgc", places.tril(), groups)
            hidden = hidden + mixed.flatten(2)
            hidden = hidden + channels(hidden)
        logits: Tensor = self.head(hidden)
        return logits


MODELS: dict[str, Callable[[], nn.Module]] = {"gru": Recurrent, "convolutions": Convolutional, "mixer": Mixer}


def schedule(step: int) -> float:
    """Up in a straight line, and down to a tenth along half a cosine."""
    return min(1.0, (step + 1) / WARMUP) * (0.1 + 0.45 * (1 + math.cos(math.pi * min(1.0, step / STEPS))))


class Predictor(LightningModule):
    """As a user writes it."""

    def __init__(self, model: nn.Module, optimizer: Callable[[Parameters], torch.optim.Optimizer]) -> None:
        super().__init__()
        self.model, self._optimizer = model, optimizer

    def loss(self, inputs: Tensor, targets: Tensor) -> Tensor:
        return F.cross_entropy(self.model(inputs).flatten(0, 1), targets.flatten())

    @override
    def training_step(self, batch: tuple[Tensor, Tensor], _: int) -> Tensor:
        return self.loss(*batch)

    @override
    def configure_optimizers(self) -> Any:
        optimizer = self._optimizer(self.parameters())
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, schedule)
        return [optimizer], [{"scheduler": scheduler, "interval": "step"}]


def train(model: str, optimizer: str, text: bytes) -> float:
    """The held-out loss at the end, in nats per byte."""
    torch.manual_seed(0)
    predictor = Predictor(MODELS[model](), OPTIMIZERS[optimizer])
    split = len(text) * 19 // 20
    batches = DataLoader(Windows(text[:split]), batch_size=BATCH, shuffle=True, drop_last=True)
    Trainer(
        max_steps=STEPS, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False,
    ).fit(predictor, batches)  # fmt: skip
    held_out = Windows(text[split:])
    windows = [held_out[n] for n in range(0, len(held_out), max(1, len(held_out) // HELD_OUT_WINDOWS))]
    predictor.eval()
    with torch.no_grad():
        return predictor.loss(torch.stack([x for x, _ in windows]), torch.stack([y for _, y in windows])).item()


def prose() -> bytes:
    found = {str(one.metadata["Name"]): one.read_text("METADATA") or "" for one in distributions()}
    return "".join(text for _, text in sorted(found.items())).encode()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=list(MODELS), action="append", help="only this one")
    parser.add_argument("--only", default="", metavar="WORD", help="only optimizers with this in their names")
    args = parser.parse_args()
    warnings.filterwarnings("ignore", module="lightning")
    torch.set_num_threads(1)
    console, text = Console(width=100), prose()
    console.print(f"{len(text):,} bytes of text, {STEPS} steps")
    for model in args.model or MODELS:
        for optimizer in OPTIMIZERS:
            if args.only in optimizer:
                console.print(f"{model}, {optimizer}: {train(model, optimizer, text):.3f} nats per byte")
    return 0


if __name__ == "__main__":
    sys.exit(main())
