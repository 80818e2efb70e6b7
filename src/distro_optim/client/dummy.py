"""Test runs without any tensors: ``optimizer = "Dummy"`` of Psyche's ``config/test``.

Everything that belongs to a round takes place but the mathematics: batches are assigned, results without a single
tensor are announced, fetched and witnessed (PsycheFoundation/psyche ``shared/modeling/src/trainer.rs``, where a Dummy
optimizer gives an empty list).
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Final

from ..compress import CompressedUpdate, make_plan
from ..errors import RunError
from ..strategy.monitor.figures import Progress
from ..strategy.polling import POLL_SECONDS
from ..strategy.port import Note, RunPort
from ..strategy.rounds import actions as act

__all__ = ["train_dummy"]

DUMMY_LOSS: Final = 1.0
"""``shared/modeling/src/dummy.rs``."""


def train_dummy(
    port: RunPort,
    progress: Progress,
    *,
    seconds: float = 0.0,
    tell: Callable[[str], None],
    clock: Callable[[], float] = time.monotonic,
    sleep: Callable[[float], None] = time.sleep,
) -> None:
    """Takes part to the end of the run.

    Args:
        port: started.
        progress: told what is done.
        seconds: that a batch takes.
        tell: told the news.

    Raises:
        RunError: the run cannot go on with us.
    """
    plan = make_plan([], "divisor")
    while True:
        action = port.next_action(1.0)
        for event in port.take_events():
            tell(event.text if isinstance(event, Note) else f"step {event.step}: {event}")
        match action:
            case act.Initialize():
                port.initialized(plan, ())
            case act.HashWeights(step=step):
                port.weights_hashed(step, [])
            case act.TrainBatch(step=step, batch=batch):
                progress.begins(step, batch)
                end = clock() + seconds
                while clock() < end and not port.is_cancelled(step):
                    sleep(min(POLL_SECONDS, max(0.0, end - clock())))
                if port.is_cancelled(step):
                    port.cancelled(step)
                    progress.ends(None)
                else:
                    port.trained(step, CompressedUpdate.empty(plan, quantized=False), step, loss=DUMMY_LOSS)
                    progress.ends(DUMMY_LOSS)
            case act.RunEnded(error=None):
                return
            case act.RunEnded(step=step, error=error):
                raise RunError(f"the run ended at step {step}: {error}")
