"""What test 1 of the verification sees of results by the published rules, and of those by the recipe.

    python benchmarks/siding.py          # a minute of one core

Four workers train the byte-level transformer. Now and then the signs of each result are compared with the gradients of
the batch that was trained and of another one, at the true weights, as an auditor does it. Of the positions at which the
two gradients have different signs, the share that sides with the batch that was trained is what test 1 goes by: one
half says nothing.
"""

from __future__ import annotations

import argparse
import statistics

import torch
from learners.base import gradients
from learners.settings import DISTRO, RECIPE
from learners.swarm import DistroWorkers
from learners.tasks import BYTES, data_of
from rich.console import Console
from rich.table import Table

from distro_optim.verify.recompute import Evidence, compare

WORKERS = 4
BATCH_SIZE = 2
WARM_UP = 20
CONTROL = WORKERS  # the number of a worker that does not exist


class Audited(DistroWorkers):
    """Their steps in verbs, so that what they send can be looked at."""

    def __init__(self, *arguments: object) -> None:
        super().__init__(*arguments)  # type: ignore[arg-type]
        self._arrived: list[object] = []

    def audit(self, step: int, lr: float, *, look: bool) -> list[Evidence]:
        """A step of all workers; with ``look``, what there is to say of their results."""
        data, found, updates = data_of(BYTES.name, 0), [], []
        for worker, (weights, optimizer) in enumerate(zip(self.weights, self.optimizers, strict=True)):
            batch = data.batch(step, worker, BATCH_SIZE)
            for weight, gradient in zip(weights, gradients(BYTES, self._model, weights, batch), strict=True):
                weight.grad = gradient
            updates.append(optimizer.generate(lr))
            if look:
                true = [weight.detach() for weight in weights]
                control = data.batch(step, CONTROL, BATCH_SIZE)
                both = (gradients(BYTES, self._model, true, one) for one in (batch, control))
                found.append(compare(updates[-1], *both))
        for optimizer in self.optimizers:
            if self._arrived:
                optimizer.apply(self._arrived)
            optimizer.lookahead()
        self._arrived = updates
        return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=120)
    parser.add_argument("--every", type=int, default=20, help="steps from one look to the next (%(default)s)")
    args = parser.parse_args()
    torch.set_num_threads(1)
    table = Table(title="Share of the telling positions that side with the batch that was trained")
    for heading in ("rules", "mean", "least and most of a result", "telling positions of a result", "by step"):
        table.add_column(heading)
    for method in (DISTRO, RECIPE):
        torch.manual_seed(0)
        workers = Audited(BYTES, method, WORKERS)
        shares: dict[int, list[float]] = {}
        telling = []
        for step in range(args.steps):
            rate = method.lr * min(1.0, (step + 1) / WARM_UP)
            for one in workers.audit(step, rate, look=(step + 1) % args.every == 0):
                told = one.only_assigned + one.only_control
                telling.append(told)
                shares.setdefault(step + 1, []).append(one.only_assigned / told)
        every = [share for of_step in shares.values() for share in of_step]
        table.add_row(
            method.name,
            f"{statistics.mean(every):.3f}",
            f"{min(every):.3f} {max(every):.3f}",
            f"{statistics.mean(telling):.0f}",
            ", ".join(f"{step}: {statistics.mean(of_step):.3f}" for step, of_step in shares.items()),
        )
    Console(width=160).print(table)


if __name__ == "__main__":
    main()
