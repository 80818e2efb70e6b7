"""What hashing all weights in every round costs the round: GPT-2 small, 124M float32 parameters, forward and backward.

    python benchmarks/weights_hash.py                                  # about 5 minutes on 2 cores
    python benchmarks/weights_hash.py --rounds 2 --sequences 1 --tokens 64

Three kinds of rounds take turns in one process, so that a machine that slows down slows all of them: without any hash,
with the hash in another thread as runs have it, and with SHA-256 in the training thread before each round, as it once
was. A round is what a peer does in it: apply, look ahead, forward and backward, generate. Times are of the wall; CPU
seconds of the training thread from the request for the hash to the training; and CPU seconds of the thread that hashes,
against those of the whole process in a round. On a machine that has other work to do, trust the latter two.
"""

from __future__ import annotations

import argparse
import hashlib
import statistics
import time

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, scaled_dot_product_attention
from torch.utils.checkpoint import checkpoint
from typing_extensions import override

from distro_optim import DisTrO
from distro_optim.compress import CompressedUpdate
from distro_optim.coordinator.types import BatchId
from distro_optim.optim.rules import PUBLISHED
from distro_optim.strategy.model.named_tensors import NamedTensors
from distro_optim.strategy.model.trainer import SwarmTrainer
from distro_optim.strategy.model.weights_hash import WeightsHasher
from distro_optim.strategy.rounds.actions import ApplyResults, TrainBatch
from distro_optim.strategy.rounds.weights import TensorDigest

VOCABULARY, WIDTH, HEADS, LAYERS = 50304, 768, 12, 12
KINDS = ("no hash", "in another thread", "SHA-256 before training")


class Layer(nn.Module):
    """As GPT-2's."""

    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.attention, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.up, self.down = nn.Linear(WIDTH, 4 * WIDTH), nn.Linear(4 * WIDTH, WIDTH)

    @override
    def forward(self, x: Tensor) -> Tensor:
        batch, tokens, _ = x.shape
        q, k, v = self.attention(self.norm1(x)).view(batch, tokens, 3, HEADS, -1).permute(2, 0, 3, 1, 4)
        mixed = scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).reshape(x.shape)
        x = x + self.out(mixed)
        y: Tensor = x + self.down(torch.nn.functional.gelu(self.up(self.norm2(x))))
        return y


class Model(nn.Module):
    """GPT-2 small, its output tied to its embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens, self.places = nn.Embedding(VOCABULARY, WIDTH), nn.Embedding(1024, WIDTH)
        self.layers = nn.ModuleList(Layer() for _ in range(LAYERS))
        self.norm = nn.LayerNorm(WIDTH)

    @override
    def forward(self, x: Tensor) -> Tensor:
        y = self.tokens(x) + self.places(torch.arange(x.shape[1]))
        for layer in self.layers:
            y = checkpoint(layer, y, use_reentrant=False) if x.shape[0] > 1 else layer(y)
        loss: Tensor = cross_entropy((self.norm(y) @ self.tokens.weight.T)[:, :-1].flatten(0, 1), x[:, 1:].flatten())
        return loss


class Timed(TensorDigest):
    """Notes the CPU seconds of the thread that hashes."""

    def __init__(self, inner: TensorDigest, peer: Peer) -> None:
        self.name, self._inner, self._peer = inner.name, inner, peer

    @override
    def update(self, data: memoryview) -> None:
        began = time.thread_time()
        self._inner.update(data)
        self._peer.hash_cpu_seconds += time.thread_time() - began

    @override
    def digest(self) -> bytes:
        return self._inner.digest()


class Peer:
    """Does what a session does in a round, without a network."""

    def __init__(self, sequences: int, tokens: int) -> None:
        torch.manual_seed(0)
        self.model = Model()
        optimizer = DisTrO(self.model.parameters(), lr=1e-4, **PUBLISHED)
        self.trainer = SwarmTrainer(NamedTensors.of(self.model, optimizer), optimizer)
        self.hasher = WeightsHasher(self.trainer.still, lambda step, digests: None)
        self.trainer.before_change = self.hasher.wait
        self.data = torch.randint(VOCABULARY, (sequences, tokens))
        self.update: tuple[CompressedUpdate, ...] = ()
        self.step = 0
        self.late_seconds = 0.0
        self.hash_cpu_seconds = 0.0

    def round(self, kind: str) -> tuple[float, float]:
        """Seconds of the wall, and CPU seconds that the hash takes of this thread."""
        self.step += 1
        began = time.perf_counter()
        rates = {"lr": 1e-4, "bounds": None}
        self.trainer.apply(ApplyResults(step=self.step, updates=self.update, **rates))  # type: ignore[arg-type]
        cpu = time.thread_time()
        if kind == KINDS[1]:
            self.trainer.lay_down(self.step)
            self.hasher.start(self.step, [Timed(d, self) for d in self.trainer.fresh_digests()])
        elif kind == KINDS[2]:
            for tensor in self.trainer.tensors.trained.values():
                hashlib.sha256(tensor.detach().numpy().data).digest()
        cpu = time.thread_time() - cpu
        batch = BatchId(0, 0)
        own = self.step - 1
        self.trainer.begin(
            TrainBatch(
                step=self.step, batch=batch, previous_lr=1e-4, zero_optim=False, own_previous=own, lr=1e-4, bounds=None
            )
        )
        self.model(self.data).backward()
        self.update = (self.trainer.finish()[0],)
        took = time.perf_counter() - began
        if kind == KINDS[1]:
            waits = time.perf_counter()
            self.hasher.wait()  # for the comparison only: the next round would be the one to wait
            self.late_seconds = time.perf_counter() - waits
        return took, cpu


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7, help="of each kind")
    parser.add_argument("--sequences", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=512)
    args = parser.parse_args()
    peer = Peer(args.sequences, args.tokens)
    peer.round(KINDS[0])
    times: dict[str, list[tuple[float, float]]] = {kind: [] for kind in KINDS}
    late: list[float] = []
    shares: list[float] = []
    seconds: list[float] = []
    for _ in range(args.rounds):
        for kind in KINDS:
            cpu, peer.hash_cpu_seconds = time.process_time(), 0.0
            times[kind].append(peer.round(kind))
            if kind == KINDS[1]:
                seconds.append(peer.hash_cpu_seconds)
                late.append(peer.late_seconds)
                shares.append(peer.hash_cpu_seconds / (time.process_time() - cpu))
    count = sum(p.numel() for p in peer.model.parameters())
    table = Table(
        title=f"{count / 1e6:.0f}M parameters, {args.sequences} x {args.tokens} tokens a round, "
        f"{torch.get_num_threads()} threads, torch {torch.__version__}"
    )
    for name in ("", "round, s", "against no hash, turn by turn", "training thread, ms", "share of a round"):
        table.add_column(name, justify="left" if not name else "right")
    for kind in KINDS:
        wall = statistics.median(took for took, _ in times[kind])
        ratio = statistics.median(a[0] / b[0] for a, b in zip(times[kind], times[KINDS[0]], strict=True))
        cpu = statistics.median(cpu for _, cpu in times[kind])
        table.add_row(kind, f"{wall:.2f}", f"{ratio:.3f}", f"{1000 * cpu:.1f}", f"{cpu / wall:.2%}")
    console = Console(width=110)
    console.print(table)
    share, cpu, wait = (statistics.median(figures) for figures in (shares, seconds, late))
    console.print(
        f"in another thread: {cpu:.2f} CPU s a round, {share:.2%} of those of the process; the hash was there "
        f"{wait:.2f} s after the end of the training"
    )


if __name__ == "__main__":
    main()
