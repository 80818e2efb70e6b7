"""``distro-optim replay``: its options, and what it prints."""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Final

from ..console import narrated
from ..errors import ConfigurationError

__all__ = ["Progress", "add_options", "run"]

PROGRESS_SECONDS: Final = 2.0
"""Between two lines of progress."""


def add_options(parser: argparse.ArgumentParser) -> None:
    """Adds the command's options to its parser."""
    parser.description = (
        "Repeats a recorded run, from its first weights and everybody's results to the weights of each step, and "
        "compares them with every client-C-step-N.safetensors of the recording. Recordings are what "
        "join --write-gradients-dir leaves. The status is 1 if a weight differs by more than rounding: by more than 2 "
        "units in the last place and more than half the learning rate; at all, in a run of our own kind."
    )
    parser.add_argument("folder", type=Path, metavar="FOLDER", help="state.toml, initial.safetensors and results")
    parser.add_argument("--json", action="store_true", help="print a JSON object")
    parser.add_argument("--out", type=Path, metavar="DIR", help="save the weights of each step, step-N.safetensors")


def run(options: argparse.Namespace) -> int:
    """Replays; 0 if all weights are those of the clients, up to rounding, and 1 if not.

    Raises:
        ConfigurationError, DataError, ModelWeightsError: the folder cannot be replayed; says why.
    """
    with narrated("loading PyTorch"):
        from safetensors.torch import save_file

        from .replay import Comparison, Recording, compare, replay

    with narrated("looking through the recording"):
        recording = Recording.open(options.folder)
    clients: list[Comparison] = []
    for replayed in replay(recording, progress=Progress()):
        if options.out is not None:
            target = options.out / f"step-{replayed.step}.safetensors"
            try:
                options.out.mkdir(parents=True, exist_ok=True)
                save_file({name: tensor.contiguous() for name, tensor in replayed.weights.items()}, target)
            except OSError as error:
                raise ConfigurationError(
                    f"--out {options.out}: {error.strerror or error}", name="out", value=options.out
                ) from None
        with narrated(f"comparing the weights of step {replayed.step}"):
            clients += compare(recording, replayed)
    records = [client.record() for client in clients]
    if options.json:
        print(json.dumps({"clients": records}))
    else:
        for record in records:
            print(_line(record))
        if not records:
            print(f"replayed to step {recording.steps[-1]}; there is no client-C-step-N.safetensors to compare with")
    return 1 if any(client.beyond for client in clients) else 0


def _line(record: Mapping[str, object]) -> str:
    return (
        "client {client}, step {step}: {elements} weights, {differ} differ, {beyond} by more than rounding, "
        "the largest difference is {max}".format(**record)
    )


class Progress:
    """Says on stderr how far it is, where that takes long."""

    def __init__(self) -> None:
        self._told = time.monotonic()

    def __call__(self, step: int, last: int) -> None:
        now = time.monotonic()
        if now - self._told >= PROGRESS_SECONDS:
            self._told = now
            print(f"step {step} of {last}", file=sys.stderr, flush=True)
