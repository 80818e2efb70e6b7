"""How often an honest peer fails by test 1, and how soon a cheat does: measured audits, weighed again in other orders.

    python benchmarks/verification.py --models 1M --honest 690 --seed 1 --only-test-1      # measures; likewise cheats
    python benchmarks/many_audits.py keep out/verification-1M-*.json                        # into tests/vectors
    python benchmarks/many_audits.py                                                        # a minute of a core

What was counted in each audit of `verification.py` becomes a number, the siding, and each is weighed as a run weighs it
(`distro_optim/verify/sequential.py`): by what honest peers had found of themselves until then, 32 times each. So each
audit has a weight, and those of a peer are added up until it passes or fails. This is done with the audits

- as they came, from the first to the last;
- drawn at random, as many as one likes: a run in which one audit says nothing about the next, as where one of fifty
  results is audited;
- drawn in blocks that came one after another, since rounds in which a peer is unusual may follow each other;
- of the first rounds alone, in which honest results scatter most.

Of a cheat it tells after how many audits it failed: half of the times, nine of ten times, and 99 of 100 times. Then
come other rules, on the same numbers, drawn one by one.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import statistics
from collections import defaultdict, deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import groupby, pairwise
from pathlib import Path
from typing import Any, Final

from typing_extensions import override

from distro_optim.strategy.rounds.audits.reports import Compared
from distro_optim.verify.sequential import SAMPLES_OF_A_PEER, Balance, Usual, usual_of

KEPT: Final = Path(__file__).parents[1] / "tests" / "vectors" / "sidings.json"
HONEST: Final = "honest"
ALONE: Final = "-honest"
"""In the name of a run without cheats."""

IDLE: Final = "momentum, nothing trained"
BLOCKS: Final = (1, 4, 16)
FIRST_ROUNDS: Final = 60
CHEAT_AUDITS: Final = 50_000

Audits = Mapping[str, Sequence[tuple[int, int, float | None]]]
"""Of one run, by the kind of peer: step, peer, and siding if there was one; honest ones of a step before the next."""

Weighed = dict[str, list[list[tuple[float, Usual]]]]
"""By the kind of peer, the sidings of each peer in the order of time, with what was usual then."""


def kept(found: Mapping[str, Mapping[str, Any]]) -> Audits:
    """What is kept of one file of ``verification.py``."""

    def rounded(counts: Mapping[str, int]) -> float | None:
        siding = Compared(**counts).siding
        return None if siding is None else round(siding, 4)

    return {
        kind: [(step, peer, rounded(counts)) for step, peer, counts in row["compared"]] for kind, row in found.items()
    }


def weighed(runs: Mapping[str, Audits]) -> Weighed:
    """The audits of several runs that are judged, each with what was usual."""
    of_kind: Weighed = defaultdict(list)
    longer = {name.replace(ALONE, "") for name in runs if ALONE in name}
    for name, audits in runs.items():
        usual = _usual_by_step(audits[HONEST])
        peers: dict[tuple[str, int], list[tuple[float, Usual]]] = defaultdict(list)
        for kind, of_run in audits.items():
            if kind == HONEST and name in longer:
                continue  # cheats change nothing for honest peers, so these are the same audits
            for step, peer, siding in of_run:
                if siding is not None and (then := usual[step]) is not None:
                    peers[kind, peer].append((siding, then))
        for (kind, _), of_peer in peers.items():
            of_kind[kind].append(of_peer)
    return of_kind


def _usual_by_step(honest: Sequence[tuple[int, int, float | None]]) -> dict[int, Usual | None]:
    """What was usual before each step."""
    found: dict[int, Usual | None] = {}
    samples: dict[bytes, deque[float]] = defaultdict(lambda: deque(maxlen=SAMPLES_OF_A_PEER))
    for step, peer, siding in honest:
        if step not in found:
            found[step] = usual_of({key: list(of_peer) for key, of_peer in samples.items()})
        if siding is not None:
            samples[bytes([peer])].append(siding)
    return found


def drawn(
    peers: Sequence[Sequence[tuple[float, Usual]]], count: int, block: int, draw: random.Random
) -> Iterator[tuple[float, Usual]]:
    """So many audits, in blocks of some that came one after another."""
    while count > 0:
        of_peer = peers[draw.randrange(len(peers))]
        start = draw.randrange(len(of_peer))
        piece = of_peer[start : start + block][:count]
        yield from piece
        count -= len(piece)


@dataclass
class Judged:
    """What came of many audits.

    Attributes:
        failed: how many audits each failure took.
        passed: how often the peer passed.
        furthest: nats against it, where it did not fail.
    """

    failed: list[int] = field(default_factory=list)
    passed: int = 0
    furthest: float = 0.0


def judged(audits: Iterable[tuple[float, Usual]]) -> Judged:
    """Adds up audits as a run does."""
    balance, found = Balance(), Judged()
    for siding, usual in audits:
        count = balance.audits + 1
        verdict = balance.add(siding, usual)
        if verdict is False:
            found.failed.append(count)
        found.passed += verdict is True
        found.furthest = max(found.furthest, -balance.nats)
    return found


def in_a_row(peers: Sequence[Sequence[tuple[float, Usual]]]) -> tuple[float, float, int]:
    """The share of audits that speak against a peer; the share of those that follow one that did; and how many did, one
    after another, at the most."""
    all_audits, following, longest = [], [], 0
    for of_peer in peers:
        against = [usual.weigh(siding) < 0 for siding, usual in of_peer]
        all_audits += against
        following += [second for first, second in pairwise(against) if first]
        longest = max([longest, *(len(list(group)) for speaks, group in groupby(against) if speaks)])
    return statistics.fmean(all_audits), statistics.fmean(following) if following else 0.0, longest


def table(runs: Mapping[str, Audits], audits: int, seed: int) -> list[str]:
    """For people."""
    draw, of_kind = random.Random(seed), weighed(runs)
    honest = of_kind.pop(HONEST)
    real = [judged(of_peer) for of_peer in honest]
    lines = ["| audits of honest peers | failed | passed | nats against one, at the most |", "|---|---|---|---|"]
    failed, passed = sum(len(found.failed) for found in real), sum(found.passed for found in real)
    furthest = max(found.furthest for found in real)
    lines.append(f"| {sum(map(len, honest)):,}, as they came | {failed} | {passed:,} | {furthest:.1f} |")
    early = [of_peer[:FIRST_ROUNDS] for of_peer in honest]
    for name, peers in (("", honest), (f", of the first {FIRST_ROUNDS} rounds", early)):
        for block in BLOCKS:
            found = judged(drawn(peers, audits, block, draw))
            how = "drawn one by one" if block == 1 else f"in blocks of {block}"
            lines.append(f"| {audits:,}{name}, {how} | {len(found.failed)} | {found.passed:,} | {found.furthest:.1f} |")
    share, following, longest = in_a_row(honest)
    mean = statistics.fmean(math.exp(-usual.weigh(siding)) for of_peer in honest for siding, usual in of_peer)
    lines += [
        "",
        f"{100 * share:.1f} % of the audits of honest peers speak against them, {100 * following:.1f} % of those that "
        f"follow such a one, {longest} one after another at the most. Their weights have a mean of {mean:.2f}.",
        "",
    ]
    lines += ["| cheat | audits | against it | failed | passed | of 10 failures, 5 took | 9 took | 99 of 100 |"]
    lines += ["|---|---|---|---|---|---|---|---|"]
    for kind, peers in of_kind.items():
        count = sum(map(len, peers))
        share = sum(usual.weigh(siding) < 0 for of_peer in peers for siding, usual in of_peer) / count
        found = judged(drawn(peers, CHEAT_AUDITS, 1, draw))
        ordered = sorted(found.failed)
        took = [str(ordered[int(q * len(ordered))]) if ordered else "" for q in (0.5, 0.9, 0.99)]
        verdicts = f"{len(ordered):,} | {found.passed:,}"
        lines.append(f"| {kind} | {count} | {share:.2f} | {verdicts} | {' | '.join(took)} |")
    return lines


# -- other rules -------------------------------------------------------------------------------------------------------


class Normal(Usual):
    """The likelihoods of two normal distributions, up to 6 nats an audit: two audits fail a peer."""

    most = 6.0

    @override
    def weigh(self, found: float) -> float:
        nats = (self.middle - 0.5) * (found - self.half_way) / self.scatter**2
        return max(-self.most, min(self.most, nats))


class NormalCut(Normal):
    """The same, up to 3 nats."""

    most = 3.0


class Student(Usual):
    """The likelihoods of two distributions of Student's with 3 degrees of freedom, up to 6 nats an audit."""

    @override
    def weigh(self, found: float) -> float:
        far, near = ((found - middle) / self.scatter for middle in (0.5, self.middle))
        return max(-6.0, min(6.0, 2 * math.log((3 + far * far) / (3 + near * near))))


class Bet(Usual):
    """A bet on a mean below half-way, which is fair whatever the distribution is: 1 + 2 * (half-way - siding)."""

    @override
    def weigh(self, found: float) -> float:
        return -math.log(1 + 2 * (self.half_way - found))


def rules(runs: Mapping[str, Audits], audits: int, seed: int) -> list[str]:
    """How some rules compare."""
    lines = ["| rule | mean of exp(nats) | honest peers: failed | idle: of 10 failures, 5 took | 99 of 100 |"]
    lines += ["|---|---|---|---|---|"]
    for rule in (Usual, Normal, NormalCut, Student, Bet):
        of_kind = {
            kind: [[(x, rule(then.middle, then.scatter, then.surprise)) for x, then in of_peer] for of_peer in peers]
            for kind, peers in weighed(runs).items()
        }
        draw, honest = random.Random(seed), of_kind[HONEST]
        mean = statistics.fmean(math.exp(-usual.weigh(siding)) for of_peer in honest for siding, usual in of_peer)
        alarms = len(judged(drawn(honest, audits, 1, draw)).failed)
        ordered = sorted(judged(drawn(of_kind[IDLE], CHEAT_AUDITS, 1, draw)).failed)
        took = [str(ordered[int(q * len(ordered))]) if ordered else "never" for q in (0.5, 0.99)]
        name = "of runs" if rule is Usual else rule.__name__
        lines.append(f"| {name} | {mean:.2f} | {alarms} of {audits:,} | {' | '.join(took)} |")
    return lines


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("keep", nargs="*", metavar="keep FILE", help="of verification.py, to be kept in tests/vectors")
    parser.add_argument("--audits", type=int, default=1_000_000, help="of honest peers to draw (%(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the drawing (%(default)s)")
    options = parser.parse_args()
    if options.keep:
        if options.keep[0] != "keep":
            parser.error("write: many_audits.py keep FILE ..., or no word at all")
        runs = {
            Path(name).stem.removeprefix("verification-"): kept(json.loads(Path(name).read_bytes())["found"])
            for name in options.keep[1:]
        }
        KEPT.write_text(json.dumps(runs, separators=(",", ":")) + "\n")
        return 0
    runs = json.loads(KEPT.read_bytes())
    # Each size of model is another question.
    for model in sorted({name.split("-")[0] for name in runs}):
        print(f"\n{model}\n")
        of_model = {name: audits for name, audits in runs.items() if name.split("-")[0] == model}
        print("\n".join(table(of_model, options.audits, options.seed)))
        print("\n" + "\n".join(rules(of_model, options.audits, options.seed)))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
