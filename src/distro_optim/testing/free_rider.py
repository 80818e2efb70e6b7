"""A peer that does not train, to try audits with::

    python -m distro_optim.testing.free_rider examples/lightning_bytes.py      # joins as the script would

Runs a training script as ``python`` does. In its first three rounds it trains as everybody; from then on its gradients
are thrown away, so that what it sends is what its momentum still has.
"""

from __future__ import annotations

import runpy
import sys
from pathlib import Path
from typing import Any, Final
from unittest import mock

from ..compress import CompressedUpdate
from ..strategy.model.trainer import SwarmTrainer

__all__ = ["main", "riding"]

HONEST_ROUNDS: Final = 3
"""Before it begins: a peer without any momentum has nothing to send."""


def riding(honest_rounds: int = HONEST_ROUNDS) -> Any:
    """While this context manager is open, all peers of this process ride for free, each after so many rounds."""
    finish = SwarmTrainer.finish
    trained: dict[int, int] = {}

    def finish_without_gradients(self: SwarmTrainer, *, skip: bool = False) -> tuple[CompressedUpdate, object]:
        rounds = trained[id(self)] = trained.get(id(self), 0) + 1
        if rounds > honest_rounds:
            for parameter in self.tensors.trained.values():
                if parameter.grad is not None:
                    parameter.grad.zero_()
        return finish(self, skip=skip)

    return mock.patch.object(SwarmTrainer, "finish", finish_without_gradients)


def main(arguments: list[str]) -> None:
    """Runs the script of the first argument with the others as its own."""
    if not arguments:
        raise SystemExit("which script? Write python -m distro_optim.testing.free_rider SCRIPT [ARGUMENTS]")
    script = Path(arguments[0]).resolve()
    sys.argv = [str(script), *arguments[1:]]
    sys.path.insert(0, str(script.parent))
    with riding():
        runpy.run_path(str(script), run_name="__main__")


if __name__ == "__main__":
    main(sys.argv[1:])
