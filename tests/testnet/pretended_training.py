"""A script as ``distro-optim testnet`` runs it, that trains nothing: it keeps the rules of environment and report.

The host counts steps in a file; the ticket is the path of that file; everybody reports a round for each step it sees.
The host begins when all are there, however long a busy machine takes to start them.
"""

from __future__ import annotations

import argparse
import hashlib
import itertools
import signal
import subprocess
import sys
import time
from pathlib import Path

from distro_optim.strategy.environment import RunEnvironment, write_ticket
from distro_optim.strategy.run_report import RunReporter

STEP_SECONDS = 0.02

parser = argparse.ArgumentParser()
parser.add_argument("--steps", type=int, default=50)
parser.add_argument("--fail", help="a peer that ends with status 3 in the middle")
parser.add_argument("--fail-at-once", help="a peer that ends with status 3 before anything else")
parser.add_argument("--differ", help="a peer that has other weights")
parser.add_argument("--silent", action="store_true", help="nobody reports anything")
parser.add_argument("--stubborn", action="store_true", help="ignore Ctrl-C")
parser.add_argument("--child", type=Path, help="start another process and write its number there")
args = parser.parse_args()

environment = RunEnvironment.read()
name = environment.peer_name or ""
hosts = environment.run is None
if args.stubborn:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
if args.child is not None:
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    args.child.with_name(f"{args.child.name}-{name}").write_text(str(child.pid))
if environment.run is not None:
    Path(environment.run).with_name(f"{name} is here").touch()
if args.fail_at_once == name:
    print("this went wrong")
    sys.exit(3)

if hosts and environment.ticket_file is not None:
    clock = environment.ticket_file.with_name("clock")
    clock.write_text("0")
    write_ticket(environment.ticket_file, str(clock))
else:
    assert environment.run is not None
    clock = Path(environment.run)
print("settings", dict(environment.config))


def weights(step: int) -> str:
    odd = step if args.differ == name else 0
    return hashlib.sha256(f"{step} {odd}".encode()).hexdigest()


def finish(text: str = "") -> None:
    reporter.ended(
        step=args.steps,
        run_state="FINISHED",
        bytes_sent=100 * step,
        bytes_received=200 * step,
        seconds_training=0.01 * step,
        seconds_waiting=0.01 * step,
        weights_hash=weights(args.steps),
        text=text,
    )


key = hashlib.sha256(name.encode()).digest()
with RunReporter.from_environment(
    environment if not args.silent else RunEnvironment(), peer=key, num_parameters=10_000
) as reporter:
    reporter.joined(run_state="WARMUP", epoch=1, step=0, num_peers=2)
    step = 0
    others = int(environment.config.get("peers_to_start", 1)) - 1
    while hosts and len(list(clock.parent.glob("* is here"))) < others:
        time.sleep(STEP_SECONDS)
    for turn in itertools.count():
        time.sleep(STEP_SECONDS)
        if hosts:
            clock.with_name("clock.new").write_text(str(turn))
            clock.with_name("clock.new").replace(clock)
        now = int(clock.read_text())
        if now >= args.steps:
            break
        if now == step:
            continue
        step = now
        if args.fail == name and step > args.steps // 2:
            print("this went wrong")
            sys.exit(3)
        reporter.round(
            epoch=1,
            step=step,
            run_state="ROUND_TRAIN",
            num_peers=2,
            loss=5.0 / (1 + step / 10),
            bytes_sent=100 * step,
            bytes_received=200 * step,
            seconds_training=0.01 * step,
            seconds_waiting=0.01 * step,
            weights_hash=weights(step),
        )
    finish()
