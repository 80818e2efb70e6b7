"""One peer as a process of its own, for tests that kill it: ``python one_process.py FOLDER STEPS [TICKET]``.

It trains slowly, saves in mid-epoch as often as it can, and leaves ``trained.txt`` in its folder: a line for each round
with the step and the hash of the weights, and at the end the word ``end``.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from distro_optim.strategy.config import RunConfig
from distro_optim.strategy.model import between_epochs
from distro_optim.strategy.session import SwarmSession
from session.scripts import SAMPLES, new_model, new_optimizer, samples

SECONDS = 0.15
"""Of a round's training."""

between_epochs.SECONDS = 0.0  # type: ignore[misc]
between_epochs.SHARE = 1e9  # type: ignore[misc]


def main() -> None:
    folder, steps, *tickets = sys.argv[1:]
    model = new_model(0)
    optimizer = new_optimizer(model)
    config = RunConfig(
        run_id="killed",
        total_steps=int(steps),
        global_batch_size=12,
        min_peers=3,
        keep_peers=2,
        epoch_time=1000,
        warmup_time=30,
        max_round_train_time=20,
        joiner_wait_time=1,
        succession_after=5,
    )
    session = SwarmSession(
        model,
        optimizer,
        run=tickets[0] if tickets else None,
        config=None if tickets else config,
        checkpoint_dir=folder,
        resume=True,
        relay="none",
        bind_addr="127.0.0.1:0",
        dataset_size=SAMPLES,
        on_event=lambda text: print(text, flush=True),
    )

    def root() -> str:
        found = session.view().weights_root
        return "" if found is None else found.hex()

    data = samples(next(model.parameters()).dtype)
    path = Path(folder) / "trained.txt"
    with session:
        print("ticket:", session.ticket, flush=True)
        for round_ in session.rounds():
            x = data[round_.indices]
            (model(x) - x.flip(1)).pow(2).mean().backward()
            time.sleep(SECONDS)
            if round_.finish():
                with path.open("a") as file:
                    file.write(f"{round_.step} {root()}\n")
        with path.open("a") as file:
            file.write(f"end {root()}\n")


if __name__ == "__main__":
    main()
