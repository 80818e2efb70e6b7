"""What committing to the momentum in every round costs: GPT-2 small, 124M float32 parameters, forward and backward.

    python benchmarks/momentum_commitment.py                                  # about 3 minutes on 2 cores
    python benchmarks/momentum_commitment.py --rounds 2 --sequences 1 --tokens 64

A round is what a peer of a run with audits does in it: look ahead, forward and backward, generate, commit to the
momentum. Copying and hashing it are done by another thread while the next round trains, as in a run. CPU seconds are
those of the thread that trains, from the call to its end, and of the other thread, from its beginning to the root.
Their share is of the cores that the process has, in a round of so many seconds. At the end 16 leaves are opened.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from collections.abc import Sequence

import torch
from rich.console import Console
from rich.table import Table
from weights_hash import VOCABULARY, Model

from distro_optim import DisTrO
from distro_optim.coordinator.types import BatchId
from distro_optim.optim.rules import PUBLISHED
from distro_optim.strategy.model.audits.keeper import KEPT_STEPS, MomentumKeeper
from distro_optim.strategy.model.named_tensors import NamedTensors
from distro_optim.strategy.model.trainer import SwarmTrainer
from distro_optim.strategy.rounds.actions import TrainBatch
from distro_optim.verify.audit import LEAVES, leaves_to_open


class Peer:
    """Trains and commits, without a network."""

    def __init__(self, sequences: int, tokens: int) -> None:
        torch.manual_seed(0)
        self.model = Model()
        optimizer = DisTrO(self.model.parameters(), lr=1e-4, **PUBLISHED)
        self.trainer = SwarmTrainer(NamedTensors.of(self.model, optimizer), optimizer)
        self.keeper = MomentumKeeper(self._committed, self._opened)
        self.trainer.before_momentum = self.keeper.before_change
        self.data = torch.randint(VOCABULARY, (sequences, tokens))
        self.beside: dict[int, float] = {}
        self.opened: tuple[int, float] = (0, 0.0)
        self.step = 0

    def _committed(self, step: int, root: bytes, decays: Sequence[float]) -> None:
        # The thread lives for this job only, so that its clock began with it.
        self.beside[step] = time.thread_time()

    def _opened(self, step: int, data: bytes) -> None:
        self.opened = len(data), time.thread_time()

    def round(self) -> float:
        """CPU seconds of this thread that the commitment takes."""
        self.step += 1
        own = self.step - 1
        batch = TrainBatch(
            step=self.step,
            batch=BatchId(0, 0),
            previous_lr=1e-4,
            zero_optim=False,
            own_previous=own,
            lr=1e-4,
            bounds=None,
        )
        self.trainer.begin(batch)
        self.model(self.data).backward()
        self.trainer.finish()
        plan, momenta = self.trainer.optimizer.plan, self.trainer.live_momentum()
        began = time.thread_time()
        self.keeper.commit(self.step, plan, momenta, [0.999])
        return time.thread_time() - began

    def open(self) -> None:
        """Shows leaves of the last step."""
        self.keeper.wait()
        plan = self.trainer.optimizer.plan
        self.keeper.open(self.step, leaves_to_open(1, self.step, plan, bytes(32)))
        self.keeper.wait()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=8, help="that are counted, after the first three")
    parser.add_argument("--sequences", type=int, default=2)
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--seconds", type=float, default=15.0, help="of a round, for the share")
    args = parser.parse_args()
    cores = len(os.sched_getaffinity(0))
    peer = Peer(args.sequences, args.tokens)
    own = [peer.round() for _ in range(KEPT_STEPS + args.rounds)]
    peer.open()
    count = sum(p.numel() for p in peer.model.parameters())
    table = Table(title=f"{count / 1e6:.0f}M parameters, {args.sequences} x {args.tokens} tokens, {cores} cores")
    for name in ("", "CPU, s", f"share of {args.seconds:g} s"):
        table.add_column(name, justify="left" if not name else "right")
    fresh = [peer.beside[step] for step in range(1, KEPT_STEPS + 1)]
    later = [peer.beside[step] for step in range(KEPT_STEPS + 1, peer.step + 1)]
    for what, figures in (
        ("thread that trains", own),
        (f"beside it, first {KEPT_STEPS} rounds", fresh),
        ("beside it, later rounds", later),
        ("the most of these", [max(later)]),
    ):
        cpu = statistics.median(figures)
        table.add_row(what, f"{cpu:.4f}", f"{cpu / (cores * args.seconds):.2%}")
    console = Console(width=110)
    console.print(table)
    size, cpu = peer.opened
    console.print(f"an opening of {LEAVES} leaves: {size / 1e6:.1f} MB, {cpu:.2f} CPU s beside the training")


if __name__ == "__main__":
    main()
