"""One peer of ``chaos.py``: trains a small byte model through a plain session, in weather that comes from a file.

Started by ``chaos.py``; where the run is and where to report, it learns from the environment as any script does.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import time
from pathlib import Path

# For what is not installed: the model and the data of the examples.
sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
from examples.byte_data import SourceWindows
from examples.byte_model import ByteTransformer, next_byte_loss

from distro_optim import DisTrO
from distro_optim.comm.iroh.reach import parse_relays
from distro_optim.comm.loop import LoopThread
from distro_optim.comm.signing import SecretKey
from distro_optim.comm.swarm import Swarm
from distro_optim.optim.rules import PUBLISHED
from distro_optim.strategy.config import RunConfig
from distro_optim.strategy.environment import RunEnvironment
from distro_optim.strategy.network.hosting import HostedRun
from distro_optim.strategy.network.joining import JoinedRun, NodeOptions, parse_run
from distro_optim.strategy.network.runtime import Runtime
from distro_optim.strategy.session import SwarmSession
from distro_optim.testnet.disturbed import DisturbedRun
from distro_optim.testnet.lies import LIES, LyingSwarm
from distro_optim.testnet.weather import WeatheredSwarm, WeatherFile

RUN_ID = "chaos"
MICRO_BATCH = 8
CONTEXT = 64
VALIDATION_WINDOWS = 512
WARMUP_STEPS = 20
LR = 2e-3
PATIENCE_SECONDS = 60.0


def learning_rate(step: int, steps: int) -> float:
    """Up in a straight line, then down to a tenth."""
    return LR * min((step + 1) / WARMUP_STEPS, 1 - 0.9 * step / steps)


class Peer:
    """What the process is made of.

    Args:
        args: of the command line.
        environment: what ``chaos.py`` says about the run.
    """

    def __init__(self, args: argparse.Namespace, environment: RunEnvironment) -> None:
        self.args = args
        self.environment = environment
        self.key = SecretKey(random.SystemRandom().randbytes(32))
        self.weathered: WeatheredSwarm | None = None
        self.liar: LyingSwarm | None = None
        torch.manual_seed(0)
        self.data = SourceWindows(context=CONTEXT)
        self.model = ByteTransformer(width=64, layers=2, context=CONTEXT)
        self.optimizer = DisTrO(self.model.parameters(), lr=LR, compression_decay=0.99, **PUBLISHED)

    def disturb(self, swarm: Swarm) -> Swarm:
        """Bad weather around the swarm; around that, lies, if it is our part to tell them."""
        weather = WeatherFile(self.args.weather)
        self.weathered = WeatheredSwarm(swarm, weather, random.Random(self.environment.peer_name))
        if self.environment.peer_name != self.args.liar:
            return self.weathered
        self.liar = LyingSwarm(self.weathered, self.key, list(LIES.values()))
        return self.liar

    def connect(self) -> Runtime:
        loop = LoopThread("chaos")
        options = NodeOptions(
            key=self.key, relays=parse_relays(self.environment.relay or "none"), bind_addr="127.0.0.1:0"
        )
        if self.environment.run is not None:
            ticket = parse_run(self.environment.run)
            source = DisturbedRun(JoinedRun(ticket, options, loop=loop, patience=PATIENCE_SECONDS), self.disturb)
        else:
            config = RunConfig(run_id=RUN_ID, total_steps=self.args.steps, **self.environment.config)
            source = DisturbedRun(HostedRun(config, RUN_ID, options, loop=loop), self.disturb)
        return Runtime(source, loop=loop, owns_loop=True)

    def train(self) -> None:
        """Through the whole run."""
        slow = self.args.slow_seconds if self.environment.peer_name == self.args.slow else 0.0
        with SwarmSession(self.model, self.optimizer, port=self.connect(), dataset_size=len(self.data)) as session:
            session.follow_schedule = self.set_learning_rate
            for round_ in session.rounds():
                loss = 0.0
                for indices in round_.micro_batches(MICRO_BATCH):
                    windows = [self.data[index] for index in indices]
                    inputs, targets = (torch.stack(part) for part in zip(*windows, strict=True))
                    part = next_byte_loss(self.model, inputs, targets) * len(indices) / len(round_.indices)
                    part.backward()
                    loss += part.item()
                time.sleep(slow)
                round_.finish(loss)
                self.optimizer.zero_grad()
            self.leave_results(session)

    def set_learning_rate(self, step: int) -> None:
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(step, self.args.steps)

    def leave_results(self, session: SwarmSession) -> None:
        """For ``chaos.py``: the loss on files not trained on, and what was lost, told and dropped on the way."""
        assert self.environment.report is not None
        assert self.weathered is not None
        with torch.no_grad():
            inputs, targets = self.data.held_out(VALIDATION_WINDOWS)
            loss = next_byte_loss(self.model, inputs, targets).item()
        record = {
            "validation_loss": loss,
            "lost": self.weathered.lost,
            "cut": self.weathered.cut,
            "told": dict(self.liar.told) if self.liar is not None else {},
            "dropped": {reason.name: count for reason, count in session.view().dropped.items()},
        }
        self.environment.report.with_suffix(".json").write_text(json.dumps(record))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--weather", type=Path, required=True, help="file with the weather, see testnet/weather.py")
    parser.add_argument("--liar", metavar="NAME", help="the peer that lies")
    parser.add_argument("--slow", metavar="NAME", help="the peer that is slow")
    parser.add_argument("--slow-seconds", type=float, default=0.5, help="by which it is, each round")
    Peer(parser.parse_args(), RunEnvironment.read()).train()


if __name__ == "__main__":
    main()
