"""Trains a small byte-level transformer on the Python standard library's source files, with several processes.

    python examples/train_bytes.py --launch 4                    # starts four workers itself
    torchrun --nproc-per-node 4 examples/train_bytes.py          # the same
    python examples/train_bytes.py                               # one process alone

An ordinary training loop: with AdamW it differs in the line that makes the optimizer, and in nothing else. (Several
workers with AdamW would also need DistributedDataParallel around the model, which sends every gradient. DisTrO sends
a few bits per hundred parameters, and the model stays as it is.)

Ends with status 1 if the loss on files not trained on stays above the target, or if two ranks end with different
weights.
"""

# ruff: noqa: E402
from __future__ import annotations

import signal

# PyTorch takes seconds to load: Ctrl-C ends the process in that time as well, without a traceback.
signal.signal(signal.SIGINT, signal.SIG_DFL)

import argparse
import hashlib
import logging
import math
import os
import sys
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
from byte_data import SourceBytes
from byte_model import ByteTransformer, next_byte_loss
from byte_report import LossPoint, Report, Summary, plot_losses
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from distro_optim import DisTrO

BATCH_SIZE = 4  # windows of 128 bytes, per worker and step
WARMUP_STEPS = 50
FINAL_LR_FRACTION = 0.1
VALIDATION_EVERY = 50
VALIDATION_WINDOWS = 32  # at each look, divided among the workers
FINAL_VALIDATION_WINDOWS = 256
BF16_BYTES = 2
INTERRUPTED = 128 + signal.SIGINT  # what a shell reports after Ctrl-C


def train(args: argparse.Namespace) -> int:
    rank, workers = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    if workers > 1:
        dist.init_process_group("gloo")
    torch.manual_seed(args.seed)
    data = SourceBytes(seed=args.seed)
    model = ByteTransformer()
    optimizer = DisTrO(model.parameters(), lr=1e-3, compression_decay=0.99)  # or torch.optim.AdamW(..., lr=3e-3)
    schedule = LambdaLR(optimizer, partial(warmup_then_cosine, steps=args.steps))

    parameters = sum(p.numel() for p in model.parameters())
    gradient_bytes = parameters * BF16_BYTES
    started = time.monotonic()
    with Report(args.steps, gradient_bytes, shown=rank == 0) as report:
        first_loss = validate(model, data, VALIDATION_WINDOWS, rank, workers)
        points = [LossPoint(0, first_loss, first_loss)]
        report.checkpoint(points[0], 0)
        for step in range(1, args.steps + 1):
            inputs, targets = data.batch(step, rank, BATCH_SIZE)
            loss = optimizer.step(partial(backward, model, optimizer, inputs, targets))
            schedule.step()

            report.step(loss, sent_per_step(optimizer, step))
            if step % VALIDATION_EVERY == 0 or step == args.steps:
                validation = validate(model, data, VALIDATION_WINDOWS, rank, workers)
                points.append(LossPoint(step, report.smoothed_loss, validation))
                report.checkpoint(points[-1], sent_per_step(optimizer, step))

    summary = Summary(
        workers=workers,
        steps=args.steps,
        seconds=time.monotonic() - started,
        parameters=parameters,
        first_loss=first_loss,
        validation_loss=validate(model, data, FINAL_VALIDATION_WINDOWS, rank, workers),
        target=args.target,
        sent_per_step=sent_per_step(optimizer, args.steps),
        gradient_bytes=gradient_bytes,
        hashes=hashes_of_all_ranks(model, workers),
    )
    report.console.print(summary.table())
    if rank == 0:
        plot = args.out / "train_bytes.png"
        drawn = plot_losses(points, summary, plot)
        report.console.print(f"loss plot: {plot}" if drawn else "no plot: pip install 'distro-optim[plot]' draws one")
    if workers > 1:
        dist.barrier()  # torchrun ends all workers when the first fails, and rank 0 may still be drawing
        dist.destroy_process_group()
    return 0 if summary.succeeded else 1


def backward(model: nn.Module, optimizer: Optimizer, inputs: Tensor, targets: Tensor) -> float:
    """The usual closure of an optimizer: gradients of the loss, and the loss."""
    optimizer.zero_grad()
    loss = next_byte_loss(model, inputs, targets)
    loss.backward()
    return loss.item()


def warmup_then_cosine(step: int, *, steps: int) -> float:
    """The learning rate's factor: up to 1 in a straight line, then down to a tenth along half a cosine."""
    if step < WARMUP_STEPS:
        return (step + 1) / WARMUP_STEPS
    done = min(1.0, (step - WARMUP_STEPS) / max(1, steps - WARMUP_STEPS))
    return FINAL_LR_FRACTION + (1 - FINAL_LR_FRACTION) * (1 + math.cos(math.pi * done)) / 2


@torch.no_grad()
def validate(model: nn.Module, data: SourceBytes, windows: int, rank: int, workers: int) -> float:
    """Mean loss on files not trained on, nats per byte; every rank computes a part of it."""
    inputs, targets = data.held_out(windows)
    total = torch.zeros(2, dtype=torch.float64)
    for row in range(rank, windows, workers):
        total += torch.tensor([next_byte_loss(model, inputs[row : row + 1], targets[row : row + 1]).item(), 1])
    if workers > 1:
        dist.all_reduce(total)
    return float(total[0] / total[1])


def sent_per_step(optimizer: Optimizer, step: int) -> float:
    """Bytes that this rank has handed to its peers, per step; 0 alone."""
    exchange = getattr(optimizer, "exchange", None)
    return exchange.bytes_sent / step if exchange is not None else 0.0


def hashes_of_all_ranks(model: nn.Module, workers: int) -> list[str]:
    """SHA-256 of the weights, of every rank, in hexadecimal."""
    digest = hashlib.sha256(b"".join(p.detach().numpy().tobytes() for p in model.parameters())).digest()
    mine = torch.frombuffer(bytearray(digest), dtype=torch.uint8)
    everybody = [torch.empty_like(mine) for _ in range(workers)]
    if workers > 1:
        dist.all_gather(everybody, mine)
    else:
        everybody = [mine]
    return [bytes(h.tolist()).hex() for h in everybody]


def launch(workers: int, script_args: Sequence[str]) -> int:
    """Runs this script under torchrun and returns its exit status."""
    # Else every worker takes all cores.
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // workers)))
    logging.disable()  # of torchrun about its children's ends: they say themselves why
    from torch.distributed.elastic.multiprocessing import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.run import main as torchrun

    try:
        torchrun(["--standalone", "--nproc-per-node", str(workers), __file__, *script_args])
    except SignalException as stopped:
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # torchrun's handler raises, and there is nobody left to catch it
        print(f"\nstopped by {stopped.sigval.name}", file=sys.stderr)
        return 128 + stopped.sigval
    except ChildFailedError as failed:
        return max(1, failed.get_first_failure()[1].exitcode)
    return 0


def positive(text: str) -> int:
    """For argparse, which turns the error into one line with the option's name."""
    if (number := int(text)) < 1:
        raise argparse.ArgumentTypeError(f"{number} is below 1")
    return number


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--launch", type=positive, metavar="N", help="start N workers on this machine")
    parser.add_argument("--steps", type=positive, default=600)
    parser.add_argument("--target", type=float, default=2.4, help="validation loss to reach, nats per byte")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("out"), help="folder for the plot")
    args = parser.parse_args()
    if args.launch is not None:
        forwarded = ["--steps", args.steps, "--target", args.target, "--seed", args.seed, "--out", args.out]
        return launch(args.launch, [str(a) for a in forwarded])
    if int(os.environ.get("RANK", "0")) == 0:
        # This rank tidies up the terminal. The others just end, even inside a collective, and that wakes this one.
        signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        return train(args)
    except KeyboardInterrupt:
        return INTERRUPTED


if __name__ == "__main__":
    sys.exit(main())
