"""``distro-optim simulate``, and the same from Python: a run over a network that is not there, in virtual time.

::

    outcome = simulate(SimulationOptions(peers=64, rounds=20, liars=3))
    assert outcome.equal
"""

from __future__ import annotations

import argparse
import gc
import json
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Final

from ..errors import ConfigurationError

if TYPE_CHECKING:
    from .simulation.outcome import Outcome
    from .simulation.settings import SimulationOptions

__all__ = ["SIZES", "add_options", "run", "simulate"]

SIZES: Final = (4, 8, 16, 32, 64, 128, 256)
"""Numbers of peers that are simulated if none are named."""

GARBAGE_THRESHOLD: Final = 200_000
"""Objects between two searches for garbage. Chosen arbitrarily."""

MILLION: Final = 1_000_000


def simulate(options: SimulationOptions, progress: Callable[[int], object] = lambda step: None) -> Outcome:
    """Runs a simulation.

    Args:
        options: what is simulated.
        progress: called at the beginning of each round with its number.

    Raises:
        DistroError: the run does not come to its end.
    """
    import torch

    from .simulation.outcome import outcome_of
    from .simulation.run import SimulatedRun

    threads, thresholds = torch.get_num_threads(), gc.get_threshold()
    torch.set_num_threads(1)  # the tensors are small
    gc.set_threshold(GARBAGE_THRESHOLD)  # hundreds of peers are many objects to go through in vain
    try:
        simulated = SimulatedRun(options, time.thread_time, progress)
        simulated.finish()
        return outcome_of(simulated)
    finally:
        torch.set_num_threads(threads)
        gc.set_threshold(*thresholds)


def add_options(parser: argparse.ArgumentParser) -> None:
    """Adds the command's options to its parser."""
    parser.add_argument(
        "--peers",
        type=int,
        action="append",
        metavar="N",
        help=f"peers at the beginning; may be repeated ({', '.join(map(str, SIZES))})",
    )
    parser.add_argument("--rounds", type=int, default=10, metavar="N", help="to train (%(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of all that is random (%(default)s)")
    parser.add_argument(
        "--train-seconds", type=float, default=1.0, metavar="S", help="that a peer trains in a round (%(default)s)"
    )
    parser.add_argument(
        "--jitter", type=float, default=0.1, metavar="SHARE", help="by which that differs (%(default)s)"
    )
    parser.add_argument(
        "--latency",
        type=float,
        nargs=2,
        default=(0.01, 0.1),
        metavar=("LOW", "HIGH"),
        help="one-way seconds between two peers (0.01 0.1)",
    )
    parser.add_argument(
        "--bandwidth", type=float, default=50.0, metavar="MBIT", help="a second, in each direction (%(default)s)"
    )
    parser.add_argument(
        "--loss", type=float, default=0.0, metavar="CHANCE", help="that a message does not reach a peer (%(default)s)"
    )
    parser.add_argument("--stragglers", type=int, default=0, metavar="N", help="peers that train slowly (%(default)s)")
    parser.add_argument(
        "--straggler-factor", type=float, default=3.0, metavar="X", help="how much longer they take (%(default)s)"
    )
    parser.add_argument("--joiners", type=int, default=0, metavar="N", help="peers that come later (%(default)s)")
    parser.add_argument("--liars", type=int, default=0, metavar="N", help="peers that lie (%(default)s)")
    parser.add_argument(
        "--parameters",
        type=float,
        metavar="MILLIONS",
        help="of the model whose results the lines are charged for (those of the small model that is trained)",
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object a line")


def run(options: argparse.Namespace) -> int:
    """Simulates one run after the other; 0 if all honest peers had equal weights in each of them, 1 if not.

    Raises:
        ConfigurationError: an option cannot work.
        DistroError: a run does not come to its end.
    """
    from .simulation.outcome import HEADER, row_of
    from .simulation.settings import SimulationOptions

    if options.parameters is not None and not options.parameters > 0:
        raise ConfigurationError(f"--parameters must be above 0, got {options.parameters:g}", name="parameters")
    asked = SimulationOptions(
        peers=1 + options.stragglers,
        rounds=options.rounds,
        seed=options.seed,
        train_seconds=options.train_seconds,
        jitter=options.jitter,
        latency=tuple(options.latency),
        bandwidth=options.bandwidth * MILLION,
        loss=options.loss,
        stragglers=options.stragglers,
        straggler_factor=options.straggler_factor,
        joiners=options.joiners,
        liars=options.liars,
        parameters=None if options.parameters is None else max(1, round(options.parameters * MILLION)),
    )
    simulations = [replace(asked, peers=peers) for peers in options.peers or SIZES]
    equal = True
    for number, simulation in enumerate(simulations):
        if number == 0 and not options.json:
            print(HEADER, flush=True)
        outcome = simulate(simulation, _progress(simulation))
        equal = equal and outcome.equal
        print(json.dumps(outcome.record()) if options.json else row_of(outcome), flush=True)
    return 0 if equal else 1


def _progress(options: SimulationOptions) -> Callable[[int], object]:
    """Shows on a terminal how far it is; stays out of files."""
    if not sys.stderr.isatty():
        return lambda step: None

    def show(step: int) -> None:
        print(f"\r{options.peers} peers, round {step} \r", end="", file=sys.stderr, flush=True)

    return show
