"""Tokens a second of a Llama of 20 million parameters: alone, in runs of one and of four, and under Lightning's DDP.

    python benchmarks/language_model.py                  # a few minutes
    python benchmarks/language_model.py --steps 4 --sequences 2 --seq-len 64

Everybody does the same forward and backward passes of bfloat16, one thread each, on the same number of sequences a
step: a plain loop with AdamW; peers of a run, each a process, the first of which hosts; and four processes of
Lightning's DDP with gloo. On one machine four of anything share its cores, so compare four with four, and a run of one
with the plain loop: that may take 10 % longer. Shares are of the wall time of a peer's steps; serializing happens
beside the training.

At the end all peers of a run must have the same weights.
"""

from __future__ import annotations

import argparse
import functools
import json
import logging
import os
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

CONFIG = "llama-20m"
PEERS = 4
WARM_UP_STEPS = 2
LR = 1e-4
TARGET = 1.1
SECONDS = 900


def make_model(args: argparse.Namespace) -> Any:
    from distro_optim.models.causal_lm import CausalLM

    torch.set_num_threads(1)
    return CausalLM(CONFIG, "HfLlama", max_seq_len=args.seq_len)


def make_batch(args: argparse.Namespace, index: int, vocab_size: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(index)
    return torch.randint(vocab_size, (args.sequences, args.seq_len), generator=generator)


def speed(args: argparse.Namespace, ends: list[float]) -> float:
    """Tokens a second of one process, from the ends of its steps."""
    seconds = (ends[-1] - ends[WARM_UP_STEPS - 1]) / (len(ends) - WARM_UP_STEPS)
    return args.sequences * args.seq_len / seconds


# -- what is compared --------------------------------------------------------------------------------------------------


def alone(args: argparse.Namespace) -> dict[str, Any]:
    from distro_optim.models.accumulation import train_batch

    model = make_model(args)
    optimizer = torch.optim.AdamW(model.parameters(), lr=LR)
    ends = []
    for step in range(args.steps + WARM_UP_STEPS):
        train_batch(model, make_batch(args, step, model.config.vocab_size))
        optimizer.step()
        optimizer.zero_grad()
        ends.append(time.monotonic())
    return {"tokens": speed(args, ends)}


def ddp(args: argparse.Namespace) -> dict[str, Any]:
    """Four processes; Lightning starts them."""
    with tempfile.TemporaryDirectory() as folder:
        ends = Path(folder) / "ends.json"
        fit_with_ddp(args, ends)
        return {"tokens": PEERS * speed(args, json.loads(ends.read_text()))}


def fit_with_ddp(args: argparse.Namespace, report: Path) -> None:
    import lightning as L

    class Plain(L.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.model = make_model(args)
            self.ends: list[float] = []

        def training_step(self, batch: torch.Tensor, number: int) -> torch.Tensor:
            loss: torch.Tensor = self.model(batch).loss
            return loss

        def on_train_start(self) -> None:
            torch.set_num_threads(1)

        def on_train_batch_end(self, *_: Any) -> None:
            self.ends.append(time.monotonic())

        def on_train_end(self) -> None:
            if self.global_rank == 0:
                report.write_text(json.dumps(self.ends))

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.AdamW(self.parameters(), lr=LR)

    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.ERROR)
    steps = args.steps + WARM_UP_STEPS
    model = Plain()
    batches = [make_batch(args, n, model.model.config.vocab_size) for n in range(steps * PEERS)]
    loader = torch.utils.data.DataLoader(batches, batch_size=None)  # type: ignore[arg-type]
    trainer = L.Trainer(
        accelerator="cpu",
        devices=PEERS,
        strategy="ddp_fork",
        max_steps=steps,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(model, loader)


def peer(args: argparse.Namespace) -> dict[str, Any]:
    """One peer of a run; hosts it if it is told no ticket."""
    from distro_optim.models.accumulation import train_batch
    from distro_optim.strategy.config import RunConfig
    from distro_optim.strategy.rounds import downloads, own_result
    from distro_optim.strategy.session import SwarmSession

    model = make_model(args)
    serializing = Stopwatch()
    own_result.encode_own_result = serializing.watch(own_result.encode_own_result)
    downloads.read_result = serializing.watch(downloads.read_result)
    config = RunConfig(
        total_steps=args.steps + WARM_UP_STEPS,
        global_batch_size=args.sequences * args.peers,
        min_peers=args.peers,
        max_seq_len=args.seq_len,
        max_round_train_time=120,
    )
    session = SwarmSession(
        model,
        model.make_optimizer(LR),
        run=args.run,
        config=None if args.run else config,
        relay="none",
        bind_addr="127.0.0.1:0",
    )
    ends, waited, computing, compressing = [], [], Stopwatch(), Stopwatch()
    with session:
        if args.run is None:
            print(session.ticket, flush=True)
        for round_ in session.rounds():
            batch = torch.cat([make_batch(args, n, model.config.vocab_size)[:1] for n in range(*bounds(round_))])
            loss = computing.watch(train_batch)(model, batch)
            compressing.watch(round_.finish)(loss)
            ends.append(time.monotonic())
            waited.append(session.view().seconds_waiting)
        weights = session.view().weights_root
    wall = ends[-1] - ends[WARM_UP_STEPS - 1]
    shares = {
        "computing": sum(computing.seconds[WARM_UP_STEPS:]) / wall,
        "compression": sum(compressing.seconds[WARM_UP_STEPS:]) / wall,
        "waiting": (waited[-1] - waited[WARM_UP_STEPS - 1]) / wall,
        "serialization": sum(serializing.seconds) / (ends[-1] - ends[0]),
    }
    # What is left: results are decoded and applied, weights are hashed.
    shares["applying"] = max(0.0, 1 - shares["computing"] - shares["compression"] - shares["waiting"])
    return {"tokens": speed(args, ends), "shares": shares, "weights": weights.hex() if weights else None}


def bounds(round_: Any) -> tuple[int, int]:
    return round_.batch.start, round_.batch.end + 1


class Stopwatch:
    """Seconds of each call."""

    def __init__(self) -> None:
        self.seconds: list[float] = []

    def watch(self, work: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(work)
        def watched(*arguments: Any, **settings: Any) -> Any:
            began = time.perf_counter()
            try:
                return work(*arguments, **settings)
            finally:
                self.seconds.append(time.perf_counter() - began)

        return watched


# -- processes ---------------------------------------------------------------------------------------------------------


def start(args: argparse.Namespace, role: str, *more: str) -> subprocess.Popen[str]:
    sizes = ("--steps", str(args.steps), "--sequences", str(args.sequences), "--seq-len", str(args.seq_len))
    return subprocess.Popen(
        [sys.executable, __file__, "--role", role, *sizes, *more],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )


def result_of(process: subprocess.Popen[str]) -> dict[str, Any]:
    out, _ = process.communicate(timeout=SECONDS)
    if process.returncode != 0:
        raise SystemExit(f"a process ended with {process.returncode}")
    result: dict[str, Any] = json.loads(out.splitlines()[-1])
    return result


def run_of(args: argparse.Namespace, count: int) -> list[dict[str, Any]]:
    processes = [start(args, "peer", "--peers", str(count))]
    try:
        assert processes[0].stdout is not None
        ticket = processes[0].stdout.readline().strip()
        processes += [start(args, "peer", "--peers", str(count), "--run", ticket) for _ in range(count - 1)]
        return [result_of(process) for process in processes]
    finally:
        for process in processes:
            if process.poll() is None:
                process.kill()


def show(name: str, tokens: float, beside: float | None, shares: dict[str, float] | None = None) -> None:
    ratio = f"{beside / tokens:5.2f} x the time" if beside is not None else ""
    parts = ", ".join(f"{what} {100 * share:.1f} %" for what, share in (shares or {}).items())
    print(f"{name:32} {tokens:8.0f} tokens/s  {ratio:18}  {parts}", flush=True)


def mean_shares(results: list[dict[str, Any]]) -> dict[str, float]:
    return {name: statistics.mean(r["shares"][name] for r in results) for name in results[0]["shares"]}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=5, help="measured, after two others (%(default)s)")
    parser.add_argument("--sequences", type=int, default=16, help="of a process in a step (%(default)s)")
    parser.add_argument("--seq-len", type=int, default=256, help="tokens of a sequence (%(default)s)")
    parser.add_argument("--role", choices=("alone", "ddp", "peer"), help=argparse.SUPPRESS)
    parser.add_argument("--peers", type=int, default=1, help=argparse.SUPPRESS)
    parser.add_argument("--run", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.role is not None:
        warnings.simplefilter("ignore")
        print(json.dumps({"alone": alone, "ddp": ddp, "peer": peer}[args.role](args)), flush=True)
        return 0

    print(f"{CONFIG}, {args.sequences} sequences of {args.seq_len} tokens a process and step, {args.steps} steps")
    # Before and after, since other programs may use the machine at times.
    before = result_of(start(args, "alone"))["tokens"]
    one = run_of(args, 1)
    after = result_of(start(args, "alone"))["tokens"]
    plain = statistics.mean([before, after])
    show("alone, AdamW", plain, None)
    show("a run of 1", one[0]["tokens"], plain, one[0]["shares"])
    lightning = result_of(start(args, "ddp"))["tokens"]
    show(f"{PEERS} processes, Lightning DDP", lightning, None)
    four = run_of(args, PEERS)
    together = sum(each["tokens"] for each in four)
    show(f"a run of {PEERS}", together, lightning, mean_shares(four))
    if len({each["weights"] for each in four}) != 1:
        print("the peers have different weights")
        return 1
    met = plain / one[0]["tokens"] <= TARGET
    print(f"a run of one takes {plain / one[0]['tokens']:.2f} x the time of plain training; target {TARGET}: ", end="")
    print("met" if met else "missed")
    return 0


if __name__ == "__main__":
    sys.exit(main())
