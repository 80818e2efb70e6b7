"""How well four workers learn from the same bytes: AdamW and Muon on averaged gradients, DeMo, DisTrO, the recipe.

    python benchmarks/convergence.py --quick        # about two minutes, to see that it runs
    python benchmarks/convergence.py                # three seeds
    python benchmarks/convergence.py --alone        # without the plain twins, a fifth of the time
    python benchmarks/convergence.py --search       # the learning rates, on a seed of its own

Each of our variants runs beside its plain twin, ``distro_optim.optim.reference``, twice, from the same weights on the
same bytes. With weights and momentum in float64 it must end within 0.03 nats per byte of the twin at every seed;
otherwise the status is 1. In float32, as it is used, the means over the seeds are shown side by side: there, two runs
of the same method part after some ten steps, twin or not, since the last bit decides which of two nearly equal
coefficients is sent, and that changes the signs of a whole tile. The table also shows how far rounding alone moves the
end of a run. Losses and a plot of them, over steps and over the bytes that a worker has sent, go to ``out/``.
"""

from __future__ import annotations

import sys
from pathlib import Path

# For what is not installed: the model and the data of the examples.
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
from dataclasses import asdict, dataclass, replace

import torch
from byte_workers import WORKERS, AdamWWorkers, DistroWorkers, Method, MuonWorkers, PlainWorkers, Workers
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

SEARCH_SEED = 1000  # not one of the table
SEARCH_LRS = (5e-4, 1e-3, 2e-3, 3e-3)
# Where the best rate lies at an edge of those, the next one beyond is tried too, so long as there is one here.
BELOW, ABOVE = (2.5e-4, 1e-4), (5e-3, 8e-3, 1e-2, 2e-2)

ADAMW = Method("AdamW + DDP", lr=5e-4)
MUON = Method("Muon + DDP", lr=1e-2)
BASELINES = (ADAMW, MUON)
WORKERS_OF = {ADAMW.name: AdamWWorkers, MUON.name: MuonWorkers}
OURS = (
    Method("DeMo k=32 values", lr=1e-3, topk=32, decay=0.999),
    Method("DeMo k=32 1-bit", lr=1e-3, topk=32, decay=0.999, quantize=True),
    Method("DisTrO k=8 1-bit overlap", lr=1e-3, topk=8, decay=0.99, quantize=True, overlap=True),
    Method(
        "recipe k=8 1-bit overlap",
        lr=3e-3,
        topk=8,
        decay=0.7,
        quantize=True,
        overlap=True,
        direction="orthogonal",
        update="rms",
    ),
)

BASELINE, USED, EXACT = "baseline", "float32", "float64"
PLAIN_USED, PLAIN = "plain twin, float32", "plain twin, float64"


@dataclass(frozen=True)
class Run:
    """One training.

    Attributes:
        kind: a baseline; ours as it is used, and its plain twin; both without the chance of rounding.
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


# -- one run -----------------------------------------------------------------------------------------------------------


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
    if run.kind == BASELINE:
        workers: Workers = WORKERS_OF[run.method.name](run.method)
    else:
        dtype = torch.float32 if run.kind in (USED, PLAIN_USED) else torch.float64
        if run.kind in (PLAIN, PLAIN_USED):
            workers = PlainWorkers(run.method, dtype)
        else:
            # In float64 to be compared with the plain twin, whose arithmetic is the published one.
            workers = DistroWorkers(run.method, dtype, "exact" if run.kind == USED else "float")
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


# -- all runs, and what they say ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Row:
    """One method over all seeds; losses are validation losses at the end, in nats per byte.

    Attributes:
        losses: in float32, one per seed.
        behind_adamw: difference of the means.
        twin_losses: of the plain twin in float32, one per seed.
        twin_gap: the farthest that ours and the plain twin, both in float64, end apart at equal seed.
        rounding: the farthest that ours in float32 and in float64 end apart at equal seed.
    """

    method: Method
    sent_per_step: float
    losses: list[float]
    behind_adamw: float
    twin_losses: list[float] | None = None
    twin_gap: float | None = None
    rounding: float | None = None

    @property
    def agrees(self) -> bool:
        return self.twin_gap is None or self.twin_gap <= TOLERANCE

    def cells(self) -> list[str]:
        cells = [
            self.method.name,
            f"{self.method.lr:g}",
            f"{self.sent_per_step:,.0f}",
            with_deviation(self.losses),
            f"{self.behind_adamw:+.3f}",
        ]
        if self.twin_losses is None:
            return [*cells, "-", "-", "-", "-"]
        apart = [ours - twin for ours, twin in zip(self.losses, self.twin_losses, strict=True)]
        error = deviation(apart) / math.sqrt(len(apart))
        return [
            *cells,
            with_deviation(self.twin_losses),
            f"{statistics.mean(apart):+.3f} (error {error:.3f})",
            f"{self.twin_gap:.1e}",
            f"{self.rounding:.3f}",
        ]


HEADINGS = (
    "method",
    "lr",
    "bytes/step",
    "loss",
    "behind AdamW",
    "plain twin",
    "ours minus twin",
    "float64: from twin",
    "float64 to float32",
)


def deviation(losses: Sequence[float]) -> float:
    return statistics.stdev(losses) if len(losses) > 1 else 0.0


def with_deviation(losses: Sequence[float]) -> str:
    return f"{statistics.mean(losses):.3f} ± {deviation(losses):.3f}"


def summarize(results: Sequence[Result]) -> list[Row]:
    def finals(method: Method, kind: str) -> dict[int, float]:
        """Seed to loss, in the order of the seeds."""
        return {
            r.run.seed: r.final_loss
            for r in sorted(results, key=lambda r: r.run.seed)
            if (r.run.method, r.run.kind) == (method, kind)
        }

    def farthest(a: dict[int, float], b: dict[int, float]) -> float:
        return max(abs(a[seed] - b[seed]) for seed in a)

    def sent(method: Method, kind: str) -> float:
        return next(r.sent_per_step for r in results if (r.run.method, r.run.kind) == (method, kind))

    adamw = statistics.mean(finals(ADAMW, BASELINE).values())
    rows = []
    for method in BASELINES:
        losses = list(finals(method, BASELINE).values())
        rows.append(Row(method, sent(method, BASELINE), losses, statistics.mean(losses) - adamw))
    for method in OURS:
        used, exact = finals(method, USED), finals(method, EXACT)
        twins = list(finals(method, PLAIN_USED).values())
        rows.append(
            Row(
                method=method,
                sent_per_step=sent(method, USED),
                losses=list(used.values()),
                behind_adamw=statistics.mean(used.values()) - adamw,
                twin_losses=twins or None,
                twin_gap=farthest(exact, finals(method, PLAIN)) if exact else None,
                rounding=farthest(exact, used) if exact else None,
            )
        )
    return rows


def draw(results: Sequence[Result], path: Path) -> None:
    """Mean loss over the seeds, in float32, against steps and against bytes that a worker has sent; twins dotted."""
    import matplotlib

    matplotlib.use("Agg")  # no display needed
    from matplotlib import pyplot as plt

    figure, (by_steps, by_bytes) = plt.subplots(1, 2, figsize=(13, 4.8), sharey=True, layout="constrained")
    for number, method in enumerate((*BASELINES, *OURS)):
        for kind in (BASELINE, USED, PLAIN_USED):
            runs = [r for r in results if (r.run.method, r.run.kind) == (method, kind)]
            if not runs:
                continue
            means = [statistics.mean(losses) for losses in zip(*(r.losses for r in runs), strict=True)]
            label: str | None = f"{method.name} ({runs[0].sent_per_step:,.0f} B/step)"
            if kind == PLAIN_USED:  # one entry in the legend for all twins
                label = "plain twins" if method is OURS[0] else None
            style, color = (":", "black") if kind == PLAIN_USED else ("-", f"C{number}")
            by_steps.plot(runs[0].steps, means, linestyle=style, color=color, label=label)
            if kind != PLAIN_USED:  # twins send nothing; nor has anybody at step 0
                sent = [step * runs[0].sent_per_step for step in runs[0].steps[1:]]
                by_bytes.plot(sent, means[1:], color=color)
    seeds = len({r.run.seed for r in results})
    by_steps.set(
        xlabel="step",
        ylabel="validation loss, nats per byte",
        title=f"{WORKERS} workers, same bytes of text, mean of {seeds} seed(s)",
    )
    by_bytes.set(xlabel="bytes sent by each worker", xscale="log", title="the same, by what it cost the network")
    by_steps.set_ylim(top=4)
    for axes in (by_steps, by_bytes):
        axes.grid(alpha=0.3)
    by_steps.legend(fontsize="small")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def markdown(rows: Sequence[Row]) -> str:
    lines = ["| " + " | ".join(HEADINGS) + " |", "|" + "---|" * len(HEADINGS)]
    return "\n".join([*lines, *("| " + " | ".join(row.cells()) + " |" for row in rows)])


def run_all(todo: Sequence[Run], pool: ProcessPoolExecutor, console: Console, out: Path) -> list[Result]:
    """Executes the runs, in any order; what is finished is in ``out`` at any time."""
    results: list[Result] = []
    with Progress(console=console) as progress:
        task = progress.add_task(f"{len(todo)} runs", total=len(todo))
        for done in as_completed([pool.submit(execute, run) for run in todo]):
            results.append(result := done.result())
            # After every run, so that a long benchmark that is stopped has not been for nothing.
            out.write_text(json.dumps([asdict(r) for r in results], indent=1))
            progress.advance(task)
            run = result.run
            progress.print(
                f"seed {run.seed}, {run.method.name}, lr {run.method.lr:g}, {run.kind}: {result.final_loss:.4f}"
            )
    return results


# -- the learning rates ------------------------------------------------------------------------------------------------


def search(steps: int, pool: ProcessPoolExecutor, console: Console, out: Path) -> None:
    """Every method at every rate, as it is used; prints and writes a table of the losses at the end."""
    losses: dict[str, dict[float, float]] = {method.name: {} for method in (*BASELINES, *OURS)}

    def wanted(method: Method) -> list[float]:
        tried = losses[method.name]
        if not tried:
            return list(SEARCH_LRS)
        best = min(tried, key=lambda lr: tried[lr])
        beyond = BELOW if best == min(tried) else ABOVE if best == max(tried) else ()
        return [lr for lr in beyond if lr not in tried][:1]

    results: list[Result] = []
    while todo := [
        Run(replace(method, lr=lr), BASELINE if method in BASELINES else USED, SEARCH_SEED, steps)
        for method in (*BASELINES, *OURS)
        for lr in wanted(method)
    ]:
        results += run_all(todo, pool, console, out / "learning_rates.json")
        for result in results:
            losses[result.run.method.name][result.run.method.lr] = result.final_loss
    rates = sorted({lr for tried in losses.values() for lr in tried})
    lines = ["| method | " + " | ".join(f"{lr:g}" for lr in rates) + " |", "|---|" + "---|" * len(rates)]
    for name, tried in losses.items():
        cells = [f"{tried[lr]:.3f}" if lr in tried else "-" for lr in rates]
        best = rates.index(min(tried, key=lambda lr: tried[lr]))
        cells[best] = f"**{cells[best]}**"
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    (out / "learning_rates.md").write_text("\n".join(lines) + "\n")
    console.print("\n".join(lines))


def compare(steps: int, seeds: int, pool: ProcessPoolExecutor, console: Console, out: Path, *, alone: bool) -> int:
    """Every method at its rate, beside its plain twin unless ``alone``; returns the exit status."""
    todo = []
    kinds = (USED,) if alone else (PLAIN, EXACT, PLAIN_USED, USED)
    for seed in range(seeds):
        todo += [Run(method, kind, seed, steps) for method in OURS for kind in kinds]
        todo += [Run(method, BASELINE, seed, steps) for method in BASELINES]
    results = run_all(todo, pool, console, out / "convergence.json")
    return report(results, steps, seeds, console, out)


def report(results: Sequence[Result], steps: int, seeds: int, console: Console, out: Path) -> int:
    rows = summarize(results)
    (out / "convergence.md").write_text(markdown(rows) + "\n")
    draw(results, out / "convergence.png")
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


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help=f"{QUICK_STEPS} steps and one seed")
    parser.add_argument("--search", action="store_true", help="try learning rates instead")
    parser.add_argument(
        "--alone", action="store_true", help="without the plain twins: nothing is compared, so no check"
    )
    parser.add_argument("--steps", type=int)
    parser.add_argument("--seeds", type=int)
    parser.add_argument("--processes", type=int, default=min(2, os.cpu_count() or 1), help="runs at a time")
    parser.add_argument("--out", type=Path, default=Path("out"))
    args = parser.parse_args()
    steps = args.steps or (QUICK_STEPS if args.quick else FULL_STEPS)
    seeds = args.seeds or (QUICK_SEEDS if args.quick else FULL_SEEDS)
    args.out.mkdir(parents=True, exist_ok=True)
    console = Console(width=None if sys.stdout.isatty() else 120)
    with ProcessPoolExecutor(args.processes, mp_context=multiprocessing.get_context("spawn")) as pool:
        if args.search:
            search(steps, pool, console, args.out)
            return 0
        return compare(steps, seeds, pool, console, args.out, alone=args.alone)


if __name__ == "__main__":
    sys.exit(main())
