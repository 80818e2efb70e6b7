"""A run of five real processes on this machine, with everything going wrong at once, beside one in which nothing does.

    python benchmarks/chaos.py                      # 400 rounds, 200 of them disturbed: a quarter of an hour on 2 cores
    python benchmarks/chaos.py --rounds 300         # shorter
    python benchmarks/chaos.py --kill-hosts 100 --rounds 600    # nothing but the host, every 100 rounds

What goes wrong is planned as data: :func:`planned_faults` kills processes (``kill -9``) and starts them again with
nothing left, :func:`planned_cuts` makes partitions of 20 seconds. Besides, each peer loses 30 % of all announcements
after the gossip, which would have repaired the loss. One peer is slow. One announces, in turns, results of the wrong
shape, of NaN, of 8 MB, replayed, badly signed, and other results than it committed to. In the last 200 rounds only
these two go on.

With ``--kill-hosts N`` whoever hosts is killed (``kill -9``) every N rounds, and started again 10 rounds later, to
join; nothing else goes wrong, and 200 more rounds follow, in which the last one comes back. Then the longest time
between two rounds may be 20 seconds and what a round takes.

Ends with status 1 unless all honest peers end with equal weights, every difference on the way was noticed and repaired,
no round took longer than its time limit, and the loss on files not trained on is within 2 % of the undisturbed run's.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import time
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from distro_optim.console import PlainLines
from distro_optim.errors import ConfigurationError
from distro_optim.strategy.run_report import EVENT, ROUND, ReportLine, ReportReader
from distro_optim.testnet.display import FORMS
from distro_optim.testnet.faults import Fault, Kill, KillHost, Restart, RestartHost
from distro_optim.testnet.network import LocalNetwork, NetworkOptions, Outcome
from distro_optim.testnet.watching import SwarmWatch
from distro_optim.testnet.weather import Weather, write_weather

PEERS = 5
MORTAL, SLOW, LIAR = (1, 2), 3, 4  # and 0, which hosts
LOSS = 0.3
CUT_SECONDS = 20.0
LOSS_TOLERANCE = 1.02
WINDOWS_PER_PEER = 4

ROUND_SECONDS = 10  # max_round_train_time
REPORT_SECONDS = 3  # coordinator/rules/machine.py
WARMUP_SECONDS = 30
# Beyond its limit, for an epoch's end, for waiting, and for a machine that is busy.
SLACK_SECONDS = 10
NOTICED_WITHIN = 3  # rounds
QUIET_ROUNDS = 200
"""At the end all but the liar and the slow one behave, so that the last peer to come back is in an epoch again: a peer
that was dropped twice waits a minute, and after many epochs that were ended for joiners, the next one is ended for them
only after a quarter of an epoch."""
LEAST_TROUBLE = 60  # rounds
RESTART_AFTER = 10  # rounds
GAP_SECONDS = 20.0
"""Between two rounds, where a host is killed."""
HOSTS_JOINER_SECONDS = 5
"""Where only hosts are killed: a hundred rounds are over in as many seconds as a host is missed."""
EPOCH_SECONDS = 120

SETTINGS: dict[str, Any] = {
    "global_batch_size": WINDOWS_PER_PEER * PEERS,
    "min_peers": 2,
    "max_round_train_time": ROUND_SECONDS,
    "warmup_time": WARMUP_SECONDS,
    "epoch_time": EPOCH_SECONDS,
    "joiner_wait_time": 15,
}


@dataclass(frozen=True)
class Cut:
    """From ``step`` on, for :data:`CUT_SECONDS`, these peers reach only each other."""

    step: int
    peers: tuple[int, ...]


def planned_faults(rounds: int, rng: random.Random) -> list[Fault]:
    """Every 25 rounds a peer is killed, and 10 rounds later started again."""
    faults: list[Fault] = []
    for step in range(15, rounds - QUIET_ROUNDS - 10, 25):
        peer = rng.choice(MORTAL)
        faults += [Kill(peer=peer, step=step), Restart(peer=peer, step=step + 10)]
    return faults


def planned_deaths_of_hosts(rounds: int, every: int) -> list[Fault]:
    """The host is killed every so many rounds, and 10 rounds later started again, as a peer."""
    steps = range(every, rounds + 1, every)
    return [fault for step in steps for fault in (KillHost(step=step), RestartHost(step=step + RESTART_AFTER))]


def planned_cuts(rounds: int, rng: random.Random) -> list[Cut]:
    """Every 50 rounds the network falls apart, one or two peers on the smaller side."""
    everybody = (*MORTAL, SLOW)
    return [
        Cut(step, tuple(rng.sample(everybody, rng.choice((1, 2))))) for step in range(30, rounds - QUIET_ROUNDS, 50)
    ]


class Sky:
    """Makes the weather that all peers look at.

    Args:
        path: where they look.
        cuts: in the order of their steps.
        loss: of announcements.
        clear_from: the step from which on nothing is lost any more.
    """

    def __init__(self, path: Path, cuts: Sequence[Cut], loss: float, clear_from: int) -> None:
        self._path = path
        self._pending = list(cuts)
        self._until = 0.0
        self._groups: tuple[tuple[bytes, ...], ...] = ()
        self._loss = loss
        self._clear_from = clear_from
        self.cuts = 0
        self._write()

    def __call__(self, watch: SwarmWatch) -> None:
        now = time.monotonic()
        if self._groups and now >= self._until:
            self._groups = ()
            self._write()
        if self._loss and watch.step >= self._clear_from:
            self._loss = 0.0
            self._write()
        if self._pending and watch.step >= self._pending[0].step and not self._groups:
            cut = self._pending.pop(0)
            self._groups = (tuple(bytes.fromhex(watch.peers[n].key) for n in cut.peers if watch.peers[n].key),)
            self._until = now + CUT_SECONDS
            self.cuts += 1
            self._write()

    def _write(self) -> None:
        write_weather(self._path, Weather(loss=self._loss, groups=self._groups))


@dataclass
class Result:
    """What came of one run."""

    outcome: Outcome
    lines: dict[int, list[ReportLine]]
    ends: dict[int, dict[str, Any]]
    cuts: int = 0
    problems: list[str] = field(default_factory=list)

    @property
    def honest(self) -> list[int]:
        return [number for number in self.lines if number != LIAR]

    @property
    def validation_loss(self) -> float:
        return next((float(end["validation_loss"]) for _, end in sorted(self.ends.items())), float("nan"))

    def rounds(self) -> list[tuple[int, int, float]]:
        """Step, epoch, and when the first peer was done with it."""
        first: dict[int, tuple[int, float]] = {}
        for lines in self.lines.values():
            for line in lines:
                if line.kind == ROUND and (line.step not in first or line.time < first[line.step][1]):
                    first[line.step] = (line.epoch, line.time)
        return [(step, *first[step]) for step in sorted(first)]

    def gaps(self) -> tuple[list[float], list[tuple[float, int]]]:
        """Seconds from one round to the next: within an epoch, and from one epoch to another with how many there were.

        There is more than one where an epoch came to nothing, since nobody in it had the weights.
        """
        within, between = [], []
        rounds = self.rounds()
        for (_, epoch, at), (_, next_epoch, then) in pairwise(rounds):
            if epoch == next_epoch:
                within.append(then - at)
            else:
                between.append((then - at, next_epoch - epoch))
        return within, between

    def differences(self) -> dict[int, list[set[int]]]:
        """Steps at which honest peers had different weights, and which peers had the same."""
        told: defaultdict[int, dict[int, str]] = defaultdict(dict)
        for number in self.honest:
            for line in self.lines[number]:
                if line.kind == ROUND and line.weights_hash:
                    told[line.step][number] = line.weights_hash
        differing = {}
        for step, hashes in told.items():
            groups: defaultdict[str, set[int]] = defaultdict(set)
            for number, text in hashes.items():
                groups[text].add(number)
            if len(groups) > 1:
                differing[step] = list(groups.values())
        return differing

    def unnoticed(self) -> list[tuple[int, list[int]]]:
        """Steps, and peers that had different weights then and did not mention it within some rounds.

        One group is right, and need not say anything.
        """
        found = []
        for step, groups in self.differences().items():
            silent = [{number for number in group if not self._mentions(number, step)} for group in groups]
            if sum(map(bool, silent)) > 1:
                found.append((step, sorted(set.union(*silent))))
        return found

    def _mentions(self, number: int, step: int) -> bool:
        """Whether a peer said that its weights were wrong, soon after ``step`` or at it."""
        return any(line.kind == EVENT and step - 1 <= line.step <= step + NOTICED_WITHIN for line in self.lines[number])

    def count(self, key: str) -> Counter[str]:
        """Sums over honest peers of what they left behind."""
        total: Counter[str] = Counter()
        for number in self.honest:
            value = self.ends.get(number, {}).get(key, {})
            total.update(value if isinstance(value, dict) else {key: value})
        return total


def run(args: argparse.Namespace, name: str, *, disturbed: bool) -> Result:
    """One run of all peers; its logs and reports go to a folder of its own."""
    out = args.out / name
    out.mkdir(parents=True, exist_ok=True)
    weather = out.absolute() / "weather"
    rng = random.Random(args.seed)
    only_hosts = args.kill_hosts is not None
    rounds = args.rounds + QUIET_ROUNDS if only_hosts else args.rounds  # the last one to be killed comes back as well
    faults, cuts = [], []
    if disturbed and only_hosts:
        faults = planned_deaths_of_hosts(args.rounds, args.kill_hosts)
    elif disturbed:
        faults, cuts = planned_faults(args.rounds, rng), planned_cuts(args.rounds, rng)
    stormy = disturbed and not only_hosts
    sky = Sky(weather, cuts, LOSS if stormy else 0.0, rounds - QUIET_ROUNDS)
    troublemakers = ("--liar", f"peer {LIAR}", "--slow", f"peer {SLOW}") if stormy else ()
    for old in out.glob("peer-*.json"):
        old.unlink()
    options = NetworkOptions(
        script=Path(__file__).with_name("chaos_peer.py"),
        arguments=("--steps", str(rounds), "--weather", str(weather), *troublemakers),
        peers=PEERS,
        faults=tuple(faults),
        out=out,
        settings=SETTINGS | ({"joiner_wait_time": HOSTS_JOINER_SECONDS} if only_hosts else {}),
        timeout=args.timeout,
    )
    outcome = LocalNetwork(options, PlainLines(FORMS), meanwhile=sky).run()
    numbers = [peer.number for peer in outcome.watch.peers]
    reports = {number: ReportReader(out / f"peer-{number}.jsonl").read() for number in numbers}
    left = {number: out / f"peer-{number}.json" for number in numbers}
    ends = {number: json.loads(path.read_text()) for number, path in left.items() if path.exists()}
    return Result(outcome, reports, ends, sky.cuts)


def judge(calm: Result, stormy: Result) -> list[str]:
    """Why the run was not good enough; empty if it was."""
    problems = [f"undisturbed: {problem}" for problem in calm.outcome.problems]
    # Whether the liar ends with the weights of the others is its own affair.
    problems += [problem for problem in stormy.outcome.problems if "same weights" not in problem]
    finals = {stormy.outcome.watch.peers[number].final_hash for number in stormy.honest}
    if len(finals) != 1 or not all(finals):
        problems.append(f"honest peers end with different weights: {sorted(finals)}")
    if unnoticed := stormy.unnoticed():
        problems.append(f"differences that nobody noticed within {NOTICED_WITHIN} rounds: {unnoticed}")
    within, between = stormy.gaps()
    if max(within, default=0.0) > ROUND_SECONDS + REPORT_SECONDS + SLACK_SECONDS:
        problems.append(f"a round took {max(within):.0f} s")
    limit = ROUND_SECONDS + REPORT_SECONDS + WARMUP_SECONDS + SLACK_SECONDS
    problems += [f"it took {seconds:.0f} s to begin {n} epoch(s)" for seconds, n in between if seconds > n * limit]
    if not stormy.validation_loss <= LOSS_TOLERANCE * calm.validation_loss:
        problems.append(f"the loss is {stormy.validation_loss:.3f}, undisturbed it is {calm.validation_loss:.3f}")
    if not (told := stormy.ends.get(LIAR, {}).get("told")):
        problems.append(f"the liar told no lies: {told}")
    return problems


def judge_deaths(calm: Result, stormy: Result) -> list[str]:
    """Likewise, where only hosts were killed."""
    problems = [f"undisturbed: {problem}" for problem in calm.outcome.problems]
    problems += stormy.outcome.problems
    if unnoticed := stormy.unnoticed():
        problems.append(f"differences that nobody noticed within {NOTICED_WITHIN} rounds: {unnoticed}")
    within, between = stormy.gaps()
    usual = sorted(within)[len(within) // 2] if within else 0.0
    longest = max([*within, *(seconds for seconds, _ in between)], default=0.0)
    if longest > GAP_SECONDS + usual:
        problems.append(f"{longest:.0f} s went by between two rounds")
    if not stormy.validation_loss <= LOSS_TOLERANCE * calm.validation_loss:
        problems.append(f"the loss is {stormy.validation_loss:.3f}, undisturbed it is {calm.validation_loss:.3f}")
    return problems


def table(calm: Result, stormy: Result) -> Table:
    result = Table(title=f"{PEERS} processes, undisturbed and disturbed", show_lines=False)
    for name, justify in (("", "left"), ("undisturbed", "right"), ("disturbed", "right")):
        result.add_column(name, justify=justify, overflow="fold")  # type: ignore[arg-type]

    def row(name: str, *values: object) -> None:
        result.add_row(name, *(f"{value:.3f}" if isinstance(value, float) else str(value) for value in values))

    both = (calm, stormy)
    row("rounds with training", *(len(r.rounds()) for r in both))
    row("seconds", *(f"{r.outcome.seconds:.0f}" for r in both))
    gaps = [r.gaps() for r in both]
    row("seconds per round, median", *(sorted(within)[len(within) // 2] for within, _ in gaps))
    row("longest round, seconds", *(max(within, default=0.0) for within, _ in gaps))
    row("epochs", *(len(between) + 1 for _, between in gaps))
    row("longest time between epochs, seconds", *(max(between, default=(0.0, 0))[0] for _, between in gaps))
    row("kill -9", *(sum(isinstance(f, Kill) for f in r.outcome.faults) for r in both))
    row("kill -9 of the host", *(sum(isinstance(f, KillHost) for f in r.outcome.faults) for r in both))
    row("started again", *(sum(isinstance(f, Restart | RestartHost) for f in r.outcome.faults) for r in both))
    row("partitions of 20 s", *(r.cuts for r in both))
    row("announcements lost", *(r.count("lost")["lost"] for r in both))
    row("stopped by partitions", *(r.count("cut")["cut"] for r in both))
    told = stormy.ends.get(LIAR, {}).get("told", {})
    row("lies told", 0, ", ".join(f"{count} {name}" for name, count in sorted(told.items())))
    row("dropped by honest peers", *(_counts(r.count("dropped")) for r in both))
    row("rounds with other weights somewhere", *(len(r.differences()) for r in both))
    row("weights of the honest at the end", *(_final(r) for r in both))
    row("loss on other files at the end, nats per byte", *(r.validation_loss for r in both))
    return result


def _counts(counter: Counter[str]) -> str:
    return ", ".join(f"{count} {name}" for name, count in sorted(counter.items())) or "nothing"


def _final(result: Result) -> str:
    finals = {result.outcome.watch.peers[number].final_hash[:8] or "none" for number in result.honest}
    return f"{finals.pop()}, equal" if len(finals) == 1 else f"DIFFER: {', '.join(sorted(finals))}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=2 * QUIET_ROUNDS)
    parser.add_argument("--seed", type=int, default=1, help="decides which peers are killed and cut off, and when")
    parser.add_argument("--timeout", type=float, default=1800.0, help="seconds for each of the two runs")
    parser.add_argument(
        "--kill-hosts", type=int, metavar="N", help="kill whoever hosts every N of --rounds, and nothing else"
    )
    parser.add_argument("--out", type=Path, default=Path("out/chaos"))
    args = parser.parse_args()
    if args.kill_hosts is not None and not LEAST_TROUBLE // 2 <= args.kill_hosts <= args.rounds:
        raise ConfigurationError(
            f"--kill-hosts {args.kill_hosts}: hosts can be killed every {LEAST_TROUBLE // 2} rounds or more seldom",
            name="kill_hosts",
            value=args.kill_hosts,
        )
    if args.kill_hosts is None and args.rounds < QUIET_ROUNDS + LEAST_TROUBLE:
        raise ConfigurationError(
            f"fewer than {QUIET_ROUNDS + LEAST_TROUBLE} rounds leave no room for trouble",
            name="rounds",
            value=args.rounds,
        )
    calm = run(args, "undisturbed", disturbed=False)
    stormy = run(args, "disturbed", disturbed=True)
    console = Console()
    console.print(table(calm, stormy))
    problems = judge(calm, stormy) if args.kill_hosts is None else judge_deaths(calm, stormy)
    for problem in problems:
        console.print(problem, style="bold red", markup=False)
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
