"""What the training script shows: a progress bar, a table at the end, a plot of the loss."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table

__all__ = ["LossPoint", "Report", "Summary", "kilobytes", "plot_losses"]

# How much of the smoothed loss is the newest step's.
SMOOTHING = 0.05
DOTS_PER_INCH = 110


def kilobytes(count: float) -> str:
    """``count`` bytes in words, 1 kB being 1000 bytes."""
    digits = 1 if count < 100_000 else 0
    return f"{count / 1000:,.{digits}f} kB" if count else "nothing"


@dataclass(frozen=True)
class LossPoint:
    """Losses in nats per byte after ``step`` steps."""

    step: int
    training: float
    validation: float


@dataclass(frozen=True)
class Summary:
    """How a run ended.

    Attributes:
        validation_loss: in nats per byte, of the weights all ranks end with, on files not trained on.
        sent_per_step: bytes that one rank hands to the network in a step.
        gradient_bytes: bytes of the model's gradients in bf16, which DistributedDataParallel would all-reduce.
        hashes: SHA-256 of every rank's weights.
    """

    workers: int
    steps: int
    seconds: float
    parameters: int
    first_loss: float
    validation_loss: float
    target: float
    sent_per_step: float
    gradient_bytes: int
    hashes: Sequence[str]

    @property
    def equal_weights(self) -> bool:
        return len(set(self.hashes)) == 1

    @property
    def succeeded(self) -> bool:
        return self.equal_weights and self.validation_loss < self.target

    def table(self) -> Table:
        table = Table(title="DisTrO on the Python standard library's source files", show_header=False)
        table.add_column(style="bold")
        table.add_column(justify="right")
        table.add_row("workers", str(self.workers))
        table.add_row("parameters", f"{self.parameters:,}")
        table.add_row("steps, seconds", f"{self.steps:,} in {self.seconds:.0f} s")
        table.add_row("validation loss before", f"{self.first_loss:.3f} nats per byte")
        table.add_row(
            "validation loss after", f"{self.validation_loss:.3f} nats per byte (target: below {self.target:g})"
        )
        table.add_row("sent per step, each worker", kilobytes(self.sent_per_step))
        table.add_row("the same with bf16 gradients", kilobytes(self.gradient_bytes))
        if self.sent_per_step:
            table.add_row("ratio", f"1 : {self.gradient_bytes / self.sent_per_step:,.0f}")
            # An all-gather hands every message to each of the others; a ring all-reduce passes the gradients around
            # twice, in as many pieces as there are workers.
            gathered = self.sent_per_step * (self.workers - 1)
            reduced = self.gradient_bytes * 2 * (self.workers - 1) / self.workers
            table.add_row(
                "traffic in a ring, each worker",
                f"{kilobytes(gathered)} instead of {kilobytes(reduced)} (1 : {reduced / gathered:,.0f})",
            )
        same = "equal on all ranks" if self.equal_weights else "[red]DIFFER[/red] between ranks"
        table.add_row("weights", f"{self.hashes[0][:16]}, {same}")
        return table


class Report:
    """Shows how training goes. On all ranks but one it is made with ``shown=False`` and says nothing.

    Args:
        gradient_bytes: see :class:`Summary`.
    """

    def __init__(self, steps: int, gradient_bytes: int, *, shown: bool) -> None:
        self.console = Console(quiet=not shown)
        self._steps = steps
        self._gradient_bytes = gradient_bytes
        self._smoothed: float | None = None
        self._task: TaskID
        self._progress = Progress(
            TextColumn("[bold]step"),
            MofNCompleteColumn(),
            BarColumn(bar_width=None),
            TextColumn("loss {task.fields[loss]}, {task.fields[sent]}/step (DDP {task.fields[ddp]})"),
            TimeElapsedColumn(),
            TextColumn("ETA"),
            TimeRemainingColumn(),
            console=self.console,
            disable=not shown or not self.console.is_terminal,
            expand=True,
        )

    def __enter__(self) -> Self:
        ddp = kilobytes(self._gradient_bytes)
        self._task = self._progress.add_task("training", total=self._steps, loss="-", sent="-", ddp=ddp)
        self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._progress.stop()

    @property
    def smoothed_loss(self) -> float:
        """Exponential mean of this rank's training losses."""
        return float("nan") if self._smoothed is None else self._smoothed

    def step(self, loss: float, sent_per_step: float) -> None:
        """After every step, with this rank's loss."""
        last = loss if self._smoothed is None else self._smoothed
        self._smoothed = last + SMOOTHING * (loss - last)
        self._progress.update(self._task, advance=1, loss=f"{self._smoothed:.3f}", sent=kilobytes(sent_per_step))

    def checkpoint(self, point: LossPoint, sent_per_step: float) -> None:
        """After a validation; a line of its own where no bar can be drawn, as in a log file."""
        if not self.console.is_terminal:
            self.console.print(
                f"step {point.step}/{self._steps}  loss {point.training:.3f}  validation {point.validation:.3f}  "
                f"{kilobytes(sent_per_step)}/step (DDP {kilobytes(self._gradient_bytes)})",
                soft_wrap=True,
            )


def plot_losses(points: Sequence[LossPoint], summary: Summary, path: Path) -> bool:
    """Draws the losses into the PNG file ``path``; False without matplotlib (``pip install 'distro-optim[plot]'``)."""
    try:
        import matplotlib
    except ImportError:
        return False
    matplotlib.use("Agg")  # no display needed
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(8, 4.5), layout="constrained")
    steps = [p.step for p in points]
    axes.plot(steps, [p.training for p in points], label="training (rank 0, smoothed)", color="tab:gray")
    axes.plot(steps, [p.validation for p in points], label="validation", color="tab:blue", marker=".")
    axes.axhline(summary.target, label=f"target {summary.target:g}", color="tab:red", linestyle=":")
    axes.set(
        xlabel="step",
        ylabel="nats per byte",
        title=f"{summary.workers} workers, each sending {kilobytes(summary.sent_per_step)} a step "
        f"(bf16 gradients: {kilobytes(summary.gradient_bytes)})",
    )
    axes.grid(alpha=0.3)
    axes.legend()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=DOTS_PER_INCH)
    plt.close(figure)
    return True
