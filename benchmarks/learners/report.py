"""What finished runs say: a table, curves as numbers, and a picture of them."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from learners.base import Method
from learners.results import Result
from learners.settings import EXACT, PLAIN, PLAIN_USED, USED, Setting

__all__ = ["TOLERANCE", "Row", "csv_of_curves", "draw", "markdown", "rows_of"]

TOLERANCE = 0.03

BASELINE = "AdamW + DDP"


@dataclass(frozen=True)
class Row:
    """One method at one rate over all seeds; losses are those at the end, on held-out samples.

    Attributes:
        losses: in float32, one per seed.
        right: shares of images that are recognized, one per seed; empty where there are none.
        behind_adamw: difference of the means; None where AdamW has not run.
        twin_losses: of the plain twin in float32, one per seed.
        twin_gap: the farthest that ours and the plain twin, both in float64, end apart at equal seed.
        rounding: the farthest that ours in float32 and in float64 end apart at equal seed.
    """

    method: Method
    sent_per_step: float
    losses: list[float]
    right: list[float]
    behind_adamw: float | None
    twin_losses: list[float] | None = None
    twin_gap: float | None = None
    rounding: float | None = None

    @property
    def agrees(self) -> bool:
        return self.twin_gap is None or self.twin_gap <= TOLERANCE

    def cells(self, *, twins: bool, images: bool) -> list[str]:
        cells = [
            self.method.name,
            f"{self.method.lr:g}",
            f"{self.sent_per_step:,.0f}",
            with_deviation(self.losses),
            "-" if self.behind_adamw is None else f"{self.behind_adamw:+.3f}",
            str(len(self.losses)),
        ]
        if images:
            cells.append(f"{100 * statistics.mean(self.right):.1f} %")
        if not twins:
            return cells
        if self.twin_losses is None:
            return [*cells, "-", "-", "-", "-"]
        apart = [ours - twin for ours, twin in zip(self.losses, self.twin_losses, strict=True)]
        error = deviation(apart) / math.sqrt(len(apart))
        return [
            *cells,
            with_deviation(self.twin_losses),
            f"{statistics.mean(apart):+.3f} (error {error:.3f})",
            "-" if self.twin_gap is None else f"{self.twin_gap:.1e}",
            "-" if self.rounding is None else f"{self.rounding:.3f}",
        ]


HEADINGS = ("method", "lr", "bytes/step", "loss", "behind AdamW", "seeds")
IMAGE_HEADINGS = ("recognized",)
TWIN_HEADINGS = ("plain twin", "ours minus twin", "float64: from twin", "float64 to float32")


def headings(rows: Sequence[Row]) -> list[str]:
    twins, images = _shown(rows)
    return [*HEADINGS, *(IMAGE_HEADINGS if images else ()), *(TWIN_HEADINGS if twins else ())]


def cells(rows: Sequence[Row]) -> list[list[str]]:
    twins, images = _shown(rows)
    return [row.cells(twins=twins, images=images) for row in rows]


def _shown(rows: Sequence[Row]) -> tuple[bool, bool]:
    return any(row.twin_losses is not None for row in rows), any(row.right for row in rows)


def deviation(losses: Sequence[float]) -> float:
    return statistics.stdev(losses) if len(losses) > 1 else 0.0


def with_deviation(losses: Sequence[float]) -> str:
    mean = f"{statistics.mean(losses):.3f}"
    return f"{mean} ± {deviation(losses):.3f}" if len(losses) > 1 else mean


def rows_of(setting: Setting, results: Sequence[Result]) -> list[Row]:
    """A row for each method, and for each rate of it, of which there is a result as it is used."""

    def of(method: Method, kind: str) -> dict[int, Result]:
        """By seed, in the order of the seeds."""
        found = [r for r in results if (r.run.method, r.run.kind) == (method, kind)]
        return {r.run.seed: r for r in sorted(found, key=lambda r: r.run.seed)}

    def farthest(a: dict[int, Result], b: dict[int, Result]) -> float | None:
        both = [abs(a[seed].final_loss - b[seed].final_loss) for seed in a.keys() & b.keys()]
        return max(both) if both else None

    names = [method.name for method in setting.methods]
    methods = {r.run.method for r in results if r.run.kind == USED and r.run.method.name in names}
    ordered = sorted(methods, key=lambda m: (names.index(m.name), m.lr))
    adamw = [[r.final_loss for r in of(method, USED).values()] for method in ordered if method.name == BASELINE]
    best = min((statistics.mean(losses) for losses in adamw), default=None)
    rows = []
    for method in ordered:
        used = of(method, USED)
        twins = [r.final_loss for seed, r in of(method, PLAIN_USED).items() if seed in used]
        mean = statistics.mean(r.final_loss for r in used.values())
        exact = of(method, EXACT)
        rows.append(
            Row(
                method=method,
                sent_per_step=next(iter(used.values())).sent_per_step,
                losses=[r.final_loss for r in used.values()],
                right=[r.right for r in used.values() if r.right is not None],
                behind_adamw=None if best is None else mean - best,
                twin_losses=twins if len(twins) == len(used) else None,
                twin_gap=farthest(exact, of(method, PLAIN)),
                rounding=farthest(exact, used),
            )
        )
    return rows


def markdown(rows: Sequence[Row]) -> str:
    top = headings(rows)
    lines = ["| " + " | ".join(top) + " |", "|" + "---|" * len(top)]
    return "\n".join([*lines, *("| " + " | ".join(row) + " |" for row in cells(rows))])


def csv_of_curves(results: Iterable[Result]) -> str:
    """The mean loss over the seeds along the way, of each method as it is used: what the documents' picture shows."""
    lines = ["method,samples,bytes_sent,loss"]
    for runs in _by_method(results):
        first = runs[0]
        for place, step in enumerate(first.steps):
            samples = step * first.run.setting.workers * first.run.setting.batch_size
            mean = statistics.mean(r.losses[place] for r in runs)
            lines.append(f"{first.run.method.name},{samples},{step * first.sent_per_step:.0f},{mean:.4f}")
    return "\n".join(lines) + "\n"


def _by_method(results: Iterable[Result]) -> list[list[Result]]:
    found: dict[Method, list[Result]] = {}
    for result in results:
        if result.run.kind == USED:
            found.setdefault(result.run.method, []).append(result)
    return list(found.values())


def draw(results: Sequence[Result], path: Path) -> None:
    """Mean loss over the seeds, in float32, over samples and over bytes that a worker has sent."""
    import matplotlib

    matplotlib.use("Agg")  # no display needed
    from matplotlib import pyplot as plt

    figure, (by_samples, by_bytes) = plt.subplots(1, 2, figsize=(13, 4.8), sharey=True, layout="constrained")
    for runs in _by_method(results):
        first = runs[0]
        means = [statistics.mean(losses) for losses in zip(*(r.losses for r in runs), strict=True)]
        label = f"{first.run.method.name} ({first.sent_per_step:,.0f} B/step)"
        each = first.run.setting.workers * first.run.setting.batch_size
        by_samples.plot([step * each for step in first.steps], means, label=label)
        by_bytes.plot([step * first.sent_per_step for step in first.steps], means)
    by_samples.set(xlabel="samples seen by all workers", ylabel="loss on held-out samples", title="over samples")
    by_bytes.set(xlabel="bytes sent by each worker", xscale="log", title="over bytes")
    for axes in (by_samples, by_bytes):
        axes.grid(alpha=0.3)
    by_samples.legend(fontsize="small")
    figure.savefig(path, dpi=110)
    plt.close(figure)
