"""How well workers learn from the same samples: AdamW and Muon on averaged gradients, DeMo, DisTrO, the recipe, DiLoCo.

    python benchmarks/convergence.py --quick                    # some minutes, to see that it runs
    python benchmarks/convergence.py --alone                    # bytes of source code, three seeds
    python benchmarks/convergence.py                            # the same, and our methods beside their plain twins
    python benchmarks/convergence.py --search                   # the learning rates, on a seed of its own
    python benchmarks/convergence.py --setting "bytes, 16 workers"
    python benchmarks/convergence.py --report                   # only the table of what is finished

A finished run is kept in a file under ``out/convergence/`` and not done again; a benchmark that was stopped goes on.

Each of our variants also runs beside its plain twin, ``distro_optim.optim.reference``, twice, from the same weights on
the same bytes. With weights and momentum in float64 it must end within 0.03 of the twin at every seed; otherwise the
status is 1. In float32, as it is used, the means over the seeds are shown side by side: there, two runs of the same
method part after some ten steps, twin or not, since the last bit decides which of two nearly equal coefficients is
sent, and that changes the signs of a whole tile. The table also shows how far rounding alone moves the end of a run.
"""

from __future__ import annotations

import argparse
import math
import multiprocessing
import os
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import replace
from pathlib import Path

import torch
from learners import report
from learners.base import Method
from learners.results import Result, Results
from learners.settings import EXACT, LADDER, PLAIN, PLAIN_USED, SETTINGS, USED, Run, Setting, has_a_twin, make_workers
from learners.tasks import TASKS, data_of, right_answers
from rich.console import Console
from rich.table import Table

WARMUP_FRACTION = 1 / 12
FINAL_LR_FRACTION = 0.1
QUICK_STEPS = 30
SEARCH_SEED = 1000  # not one of the table


def learning_rate(peak: float, step: int, steps: int) -> float:
    """Up in a straight line, then down to a tenth along half a cosine."""
    warmup = max(1, round(steps * WARMUP_FRACTION))
    if step < warmup:
        return peak * (step + 1) / warmup
    done = (step - warmup) / max(1, steps - warmup)
    return peak * (FINAL_LR_FRACTION + (1 - FINAL_LR_FRACTION) * (1 + math.cos(math.pi * done)) / 2)


def execute(run: Run) -> Result:
    """Trains. Samples, first weights and learning rates depend on the seed, the steps and the method's ``lr`` alone."""
    torch.set_num_threads(1)
    torch.manual_seed(run.seed)
    setting, began = run.setting, time.process_time()
    workers, task, data = make_workers(run), TASKS[setting.task], data_of(setting.task, run.seed)
    held_out = data.held_out(setting.held_out)
    losses = []
    for step in range(setting.steps):
        batches = [data.batch(step, worker, setting.batch_size) for worker in range(setting.workers)]
        workers.step(batches, learning_rate(run.method.lr, step, setting.steps))
        if step + 1 in setting.looks:
            with torch.no_grad():
                losses.append(task.loss(workers.model(), *held_out).item())
    shows_images = held_out[0].is_floating_point()
    right = right_answers(workers.model(), *held_out) if shows_images else None
    seconds = time.process_time() - began
    return Result(run, list(setting.looks), losses, workers.sent_per_step(), right, seconds)


class Bench:
    """Carries out runs that are not finished yet, and says how far it is.

    Args:
        processes: runs at a time; with 1 they are done in this process.
    """

    def __init__(self, results: Results, processes: int, console: Console) -> None:
        self._results, self._processes, self._console = results, processes, console

    def results_of(self, runs: Sequence[Run]) -> list[Result]:
        """Of these runs, in any order."""
        found = [self._results.find(run) for run in runs]
        finished = [result for result in found if result is not None]
        todo = [run for run, result in zip(runs, found, strict=True) if result is None]
        began, samples, done = time.monotonic(), sum(run.samples for run in todo), 0
        for number, result in enumerate(self._executed(todo), 1):
            self._results.keep(result)
            finished.append(result)
            done += result.run.samples
            left = (time.monotonic() - began) / done * (samples - done) / 60
            run = result.run
            self._console.print(
                f"{number} of {len(todo)}, {left:.0f} minutes left: {run.setting.name}, seed {run.seed}, "
                f"{run.method.name}, lr {run.method.lr:g}, {run.kind}: {result.final_loss:.4f} "
                f"({result.cpu_seconds:.0f} s of a core)",
                highlight=False,
            )
        return finished

    def _executed(self, todo: Sequence[Run]) -> Iterator[Result]:
        if self._processes == 1:
            yield from map(execute, todo)
            return
        with ProcessPoolExecutor(self._processes, mp_context=multiprocessing.get_context("spawn")) as pool:
            for done in as_completed([pool.submit(execute, run) for run in todo]):
                yield done.result()


def search(setting: Setting, methods: Sequence[Method], bench: Bench, console: Console, out: Path) -> None:
    """Each method at its rate and both neighbours on the ladder, and on as long as the best lies at an edge."""
    losses: dict[str, dict[float, float]] = {method.name: {} for method in methods}

    def wanted(method: Method) -> list[float]:
        tried = losses[method.name]
        if not tried:
            place = LADDER.index(method.lr)
            return list(LADDER[max(0, place - 1) : place + 2])
        best = LADDER.index(min(tried, key=lambda lr: tried[lr]))
        beyond = LADDER[max(0, best - 1) : best + 2]
        return [lr for lr in beyond if lr not in tried]

    while runs := [
        Run(setting, replace(method, lr=lr), USED, SEARCH_SEED) for method in methods for lr in wanted(method)
    ]:
        for result in bench.results_of(runs):
            losses[result.run.method.name][result.run.method.lr] = result.final_loss
    rates = sorted({lr for tried in losses.values() for lr in tried})
    lines = ["| method | " + " | ".join(f"{lr:g}" for lr in rates) + " |", "|---|" + "---|" * len(rates)]
    for name, tried in losses.items():
        cells = [f"{tried[lr]:.3f}" if lr in tried else "-" for lr in rates]
        best = rates.index(min(tried, key=lambda lr: tried[lr]))
        cells[best] = f"**{cells[best]}**"
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    (out / f"{setting.name} rates.md").write_text("\n".join(lines) + "\n", encoding="utf-8")
    console.print("\n".join(lines))


def runs_of(setting: Setting, methods: Sequence[Method], seeds: int, *, alone: bool) -> list[Run]:
    """Every method at its rate, beside its plain twin unless ``alone``."""
    runs = []
    for seed in range(seeds):
        for method in methods:
            rates = (method.lr, *setting.tried) if method.name == report.BASELINE else (method.lr,)
            kinds = (USED,) if alone or not has_a_twin(method) else (PLAIN, EXACT, PLAIN_USED, USED)
            runs += [Run(setting, replace(method, lr=lr), kind, seed) for lr in rates for kind in kinds]
    return runs


def show(setting: Setting, results: Sequence[Result], console: Console, out: Path) -> int:
    """Prints and writes the table; returns the exit status."""
    if not results:
        console.print(f"{setting.name}: nothing is finished")
        return 0
    rows = report.rows_of(setting, results)
    (out / f"{setting.name}.md").write_text(report.markdown(rows) + "\n", encoding="utf-8")
    (out / f"{setting.name}.csv").write_text(report.csv_of_curves(results), encoding="utf-8")
    report.draw(results, out / f"{setting.name}.png")
    table = Table(title=f"{setting.name}: loss after {setting.steps} steps of {setting.workers} workers")
    for heading in report.headings(rows):
        table.add_column(heading, justify="left" if heading == "method" else "right")
    for cells in report.cells(rows):
        table.add_row(*cells)
    console.print(table)
    wrong = [row.method.name for row in rows if not row.agrees]
    for name in wrong:
        console.print(f"[red]wrong:[/red] {name} ends more than {report.TOLERANCE} from its plain twin")
    return 1 if wrong else 0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--setting", choices=list(SETTINGS), default="bytes", help="what is trained (%(default)s)")
    parser.add_argument("--method", action="append", metavar="WORD", help="only methods with this in their names")
    parser.add_argument("--quick", action="store_true", help=f"{QUICK_STEPS} steps and one seed")
    parser.add_argument("--search", action="store_true", help="try learning rates instead")
    parser.add_argument(
        "--alone", action="store_true", help="without the plain twins: nothing is compared, so no check"
    )
    parser.add_argument("--report", action="store_true", help="train nothing, only show what is finished")
    parser.add_argument("--steps", type=int)
    parser.add_argument("--seeds", type=int)
    parser.add_argument("--processes", type=int, default=min(2, os.cpu_count() or 1), help="runs at a time")
    parser.add_argument("--out", type=Path, default=Path("out") / "convergence")
    args = parser.parse_args()
    setting = SETTINGS[args.setting]
    steps = args.steps or (QUICK_STEPS if args.quick else setting.steps)
    setting = setting if steps == setting.steps else setting.at(steps)
    seeds = args.seeds or (1 if args.quick else setting.seeds)
    methods = [m for m in setting.methods if not args.method or any(word in m.name for word in args.method)]
    if not methods:
        parser.error(f"no method of this setting is called so: {', '.join(m.name for m in setting.methods)}")
    args.out.mkdir(parents=True, exist_ok=True)
    console = Console(width=None if sys.stdout.isatty() else 160)
    results = Results(args.out)
    bench = Bench(results, args.processes, console)
    if args.search:
        search(setting, methods, bench, console, args.out)
        return 0
    runs = runs_of(setting, methods, seeds, alone=args.alone)
    if args.report:
        return show(setting, [r for r in map(results.find, runs) if r is not None], console, args.out)
    return show(setting, bench.results_of(runs), console, args.out)


if __name__ == "__main__":
    sys.exit(main())
