"""How well four workers learn from the same bytes: AdamW on averaged gradients, DeMo, and DisTrO.

    python benchmarks/convergence.py --quick        # about two minutes, to see that it runs
    python benchmarks/convergence.py                # three seeds

Each of our variants runs beside its plain twin in ``tests/reference`` (one tensor at a time, every formula written
out) from the same weights on the same bytes, and must end within 0.03 nats per byte of it; otherwise the status is 1.

The two are compared with weights and momentum in float64. In float32 two runs of the very same method part after some
ten steps, twin or not: where two coefficients are nearly equal, the last bit decides which one is sent, and that
changes the signs of a whole tile. How far rounding alone moves the end of a run is in the table too, as is how far
each method, in float32 as it is used, is from AdamW. Losses over steps and a plot go to ``out/``.
"""

from __future__ import annotations

import sys
from pathlib import Path

# For what is not installed: the model and the data of the examples, the plain twins.
sys.path.insert(0, str(Path(__file__).parents[1]))

import argparse
import functools
import json
import math
import multiprocessing
import os
import statistics
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass

import torch
from byte_workers import WORKERS, AdamWWorkers, DistroWorkers, Method, PlainWorkers, Workers
from examples.byte_data import SourceBytes
from examples.byte_model import next_byte_loss
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from torch import nn

BATCH_SIZE = 2  # windows of 128 bytes, per worker and step
WARMUP_FRACTION = 1 / 12
FINAL_LR_FRACTION = 0.1
FULL_STEPS, QUICK_STEPS = 300, 30
FULL_SEEDS, QUICK_SEEDS = 3, 1
VALIDATION_WINDOWS = 32
FINAL_VALIDATION_WINDOWS = 256
LOOKS = 15  # validations along the way
TOLERANCE = 0.03

ADAMW = Method("AdamW + DDP", lr=3e-3)
OURS = (
    Method("DeMo k=32 values", lr=1e-3, topk=32, decay=0.999),
    Method("DeMo k=32 1-bit", lr=1e-3, topk=32, decay=0.999, quantize=True),
    Method("DisTrO k=8 1-bit overlap", lr=1e-3, topk=8, decay=0.99, quantize=True, overlap=True),
)

ADAMW_RUN, USED, EXACT, PLAIN = "baseline", "float32", "float64", "plain twin, float64"


@dataclass(frozen=True)
class Run:
    """One training.

    Attributes:
        kind: AdamW; ours as it is used; ours and its plain twin without the chance of rounding.
    """

    method: Method
    kind: str
    seed: int
    steps: int


@dataclass(frozen=True)
class Result:
    """Validation losses in nats per byte, along the way and, on more windows, at the end."""

    run: Run
    steps: list[int]
    losses: list[float]
    final_loss: float
    sent_per_step: float


# ------------------------------------------------------------------ one run


def learning_rate(peak: float, step: int, steps: int) -> float:
    """Up in a straight line, then down to a tenth along half a cosine."""
    warmup = max(1, round(steps * WARMUP_FRACTION))
    if step < warmup:
        return peak * (step + 1) / warmup
    done = (step - warmup) / max(1, steps - warmup)
    return peak * (FINAL_LR_FRACTION + (1 - FINAL_LR_FRACTION) * (1 + math.cos(math.pi * done)) / 2)


@functools.cache
def source_bytes(seed: int) -> SourceBytes:
    return SourceBytes(seed=seed)


@torch.no_grad()
def validation_loss(model: nn.Module, data: SourceBytes, windows: int) -> float:
    return next_byte_loss(model, *data.held_out(windows)).item()


def execute(run: Run) -> Result:
    """Trains. Bytes, first weights and learning rates depend on the seed, the steps and the method's ``lr`` alone."""
    torch.set_num_threads(1)
    torch.manual_seed(run.seed)
    if run.kind == ADAMW_RUN:
        workers: Workers = AdamWWorkers(run.method)
    elif run.kind == PLAIN:
        workers = PlainWorkers(run.method, torch.float64)
    else:
        workers = DistroWorkers(run.method, torch.float32 if run.kind == USED else torch.float64)
    data = source_bytes(run.seed)
    steps, losses = [0], [validation_loss(workers.model(), data, VALIDATION_WINDOWS)]
    for step in range(run.steps):
        batches = [data.batch(step, worker, BATCH_SIZE) for worker in range(WORKERS)]
        workers.step(batches, learning_rate(run.method.lr, step, run.steps))
        if (step + 1) % max(1, run.steps // LOOKS) == 0:
            steps.append(step + 1)
            losses.append(validation_loss(workers.model(), data, VALIDATION_WINDOWS))
    final = validation_loss(workers.model(), data, FINAL_VALIDATION_WINDOWS)
    return Result(run, steps, losses, final, workers.sent_per_step())


# ------------------------------------------------------------------ all runs, and what they say


@dataclass(frozen=True)
class Row:
    """One method over all seeds; losses are validation losses at the end, in nats per byte.

    Attributes:
        loss, spread: mean and standard deviation, in float32.
        twin_gap: the farthest that ours and the plain twin, both in float64, end apart at equal seed.
        rounding: the farthest that ours in float32 and in float64 end apart at equal seed.
    """

    method: Method
    sent_per_step: float
    loss: float
    spread: float
    behind_adamw: float
    twin_gap: float | None = None
    rounding: float | None = None

    @property
    def agrees(self) -> bool:
        return self.twin_gap is None or self.twin_gap <= TOLERANCE

    def cells(self) -> list[str]:
        return [
            self.method.name,
            f"{self.method.lr:g}",
            f"{self.sent_per_step:,.0f}",
            f"{self.loss:.3f} ± {self.spread:.3f}",
            f"{self.behind_adamw:+.3f}",
            "-" if self.twin_gap is None else f"{self.twin_gap:.1e}",
            "-" if self.rounding is None else f"{self.rounding:.3f}",
        ]


HEADINGS = ("method", "lr", "bytes/step", "loss", "behind AdamW", "from plain twin", "by rounding")


def summarize(results: Sequence[Result]) -> list[Row]:
    def finals(method: Method, kind: str) -> dict[int, float]:
        return {r.run.seed: r.final_loss for r in results if (r.run.method, r.run.kind) == (method, kind)}

    def farthest(a: dict[int, float], b: dict[int, float]) -> float:
        return max(abs(a[seed] - b[seed]) for seed in a)

    adamw = statistics.mean(finals(ADAMW, ADAMW_RUN).values())
    rows = []
    for method, kind in ((ADAMW, ADAMW_RUN), *((m, USED) for m in OURS)):
        used = finals(method, kind)
        exact = finals(method, EXACT)
        loss = statistics.mean(used.values())
        rows.append(
            Row(
                method=method,
                sent_per_step=next(r.sent_per_step for r in results if (r.run.method, r.run.kind) == (method, kind)),
                loss=loss,
                spread=statistics.stdev(used.values()) if len(used) > 1 else 0.0,
                behind_adamw=loss - adamw,
                twin_gap=farthest(exact, finals(method, PLAIN)) if exact else None,
                rounding=farthest(exact, used) if exact else None,
            )
        )
    return rows


def draw(results: Sequence[Result], path: Path) -> None:
    """Mean loss over the seeds against steps; plain twins dotted."""
    import matplotlib

    matplotlib.use("Agg")  # no display needed
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(8, 4.8), layout="constrained")
    for number, method in enumerate((ADAMW, *OURS)):
        for kind in (ADAMW_RUN, USED, PLAIN):
            runs = [r for r in results if (r.run.method, r.run.kind) == (method, kind)]
            if not runs:
                continue
            means = [statistics.mean(losses) for losses in zip(*(r.losses for r in runs), strict=True)]
            label: str | None = f"{method.name} ({runs[0].sent_per_step:,.0f} B/step)"
            if kind == PLAIN:  # one entry in the legend for all twins
                label = "plain twins, float64" if number == 1 else None
            style, color = (":", "black") if kind == PLAIN else ("-", f"C{number}")
            axes.plot(runs[0].steps, means, linestyle=style, color=color, label=label)
    seeds = len({r.run.seed for r in results})
    axes.set(
        xlabel="step",
        ylabel="validation loss, nats per byte",
        title=f"{WORKERS} workers, same bytes, mean of {seeds} seed(s)",
    )
    axes.set_ylim(top=4)
    axes.grid(alpha=0.3)
    axes.legend(fontsize="small")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def markdown(rows: Sequence[Row]) -> str:
    lines = ["| " + " | ".join(HEADINGS) + " |", "|" + "---|" * len(HEADINGS)]
    return "\n".join([*lines, *("| " + " | ".join(row.cells()) + " |" for row in rows)])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help=f"{QUICK_STEPS} steps and one seed")
    parser.add_argument("--steps", type=int)
    parser.add_argument("--seeds", type=int)
    parser.add_argument("--processes", type=int, default=min(2, os.cpu_count() or 1), help="runs at a time")
    parser.add_argument("--out", type=Path, default=Path("out"))
    args = parser.parse_args()
    steps = args.steps or (QUICK_STEPS if args.quick else FULL_STEPS)
    seeds = args.seeds or (QUICK_SEEDS if args.quick else FULL_SEEDS)

    todo = []
    for seed in range(seeds):
        todo += [Run(method, kind, seed, steps) for method in OURS for kind in (PLAIN, EXACT, USED)]
        todo.append(Run(ADAMW, ADAMW_RUN, seed, steps))
    args.out.mkdir(parents=True, exist_ok=True)
    results: list[Result] = []
    console = Console(width=None if sys.stdout.isatty() else 120)
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(args.processes, mp_context=context) as pool, Progress(console=console) as progress:
        task = progress.add_task(f"{len(todo)} runs of {steps} steps", total=len(todo))
        for done in as_completed([pool.submit(execute, run) for run in todo]):
            results.append(result := done.result())
            # After every run, so that a long benchmark that is stopped has not been for nothing.
            (args.out / "convergence.json").write_text(json.dumps([asdict(r) for r in results], indent=1))
            progress.advance(task)
            run = result.run
            progress.print(f"seed {run.seed}, {run.method.name}, {run.kind}: {result.final_loss:.4f}")

    rows = summarize(results)
    (args.out / "convergence.md").write_text(markdown(rows) + "\n")
    draw(results, args.out / "convergence.png")
    table = Table(
        title=f"Validation loss after {steps} steps of {WORKERS} workers, {seeds} seed(s), nats per byte, ± std"
    )
    for heading in HEADINGS:
        table.add_column(heading, justify="left" if heading == "method" else "right")
    for row in rows:
        table.add_row(*row.cells())
    console.print(table)
    wrong = [row.method.name for row in rows if not row.agrees]
    for name in wrong:
        console.print(f"[red]wrong:[/red] {name} ends more than {TOLERANCE} from its plain twin")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
