"""How well audits tell honest peers from cheats: both tests, limits learnt on the way, on models of 1M and 20M.

    python benchmarks/verification.py                   # both models: a quarter of an hour of a core
    python benchmarks/verification.py --models 1M --steps 30
    python benchmarks/verification.py --models 1M --honest 2000     # honest peers alone, for false alarms
    python benchmarks/verification.py --models 1M --honest 500 --seed 1     # others; in parts, beside each other
    python benchmarks/verification.py --models 1M --honest 2000 --only-test-1       # in less than half of the time

Three honest peers train a byte model, each by other arithmetic: float32, products of bfloat16, and float32 with
micro-batches of one window. (Factors, results and gradients of products are rounded to bfloat16 and added in float32,
as GPUs do it; autocast on a CPU without such instructions takes sixteen times as long.) Beside them, at the same
weights, cheats make what they would send in the place of the first; it counts for nothing, so that all of them can be
looked at in one run. Each step every result is audited, those of honest peers by each kind of arithmetic in turn.
What honest peers find of each other is the noise from which limits are learnt; the results of a step are judged by the
limits that were learnt before it.

The table shows false alarms and misses per audit, and after how many rounds a cheat was found, at the most, from
whichever round one begins to look. "In a run" is what a run makes of test 1: audits of a peer are added up until they
say something (`verify/sequential.py`), here from its first one on and again after each verdict. Table and numbers go
to ``out/``, and so does a picture with --plot. What was counted in each audit by test 1 is among the numbers, for
``benchmarks/many_audits.py``, which weighs it in other orders and by other rules.
"""

from __future__ import annotations

import sys
from pathlib import Path

# For what is not installed: the model and the data of the examples.
sys.path.insert(0, str(Path(__file__).parents[1]))

import argparse
import json
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Final

import torch
from examples.byte_data import SourceBytes
from examples.byte_model import ByteTransformer, next_byte_loss
from torch import Tensor, nn
from torch.nn import functional as F
from typing_extensions import override

from distro_optim import DisTrO
from distro_optim.compress import CompressedUpdate
from distro_optim.errors import ConfigurationError
from distro_optim.optim.rules import PUBLISHED
from distro_optim.strategy.rounds.audits.reports import Compared
from distro_optim.verify.audit import check, draw, looking_ahead
from distro_optim.verify.calibrate import LOOSEST, SAMPLES_OF_A_PEER, Limits, Noise, judge, learn
from distro_optim.verify.momentum import Snapshot
from distro_optim.verify.opening import encode_opening, make_opening
from distro_optim.verify.quiet import mean_of, quiet_gradients
from distro_optim.verify.recompute import Evidence, compare
from distro_optim.verify.sequential import SAMPLES_OF_A_PEER as SIDINGS_OF_A_PEER
from distro_optim.verify.sequential import Balance, Usual, usual_of

LR, DECAY, TOPK = 1e-3, 0.99, 8
ARITHMETICS: Final = ("float32", "bfloat16", "micro-batches")
HONEST: Final = "honest"
CONTROL_WORKER, OTHER_WORKER = 1000, 2000
UNJUDGED = 6
"""Rounds until limits are learnt from three honest peers."""

Batch = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Size:
    """A model, and how much is done with it."""

    width: int
    layers: int
    windows: int
    context: int
    steps: int
    seed: int = 0


SIZES: Final = {
    "1M": Size(width=160, layers=3, windows=4, context=64, steps=48),
    "20M": Size(width=512, layers=6, windows=4, context=32, steps=24),
}


@dataclass
class Found:
    """What the audits of one kind of peer found.

    Attributes:
        alarms: of each audit, by test: whether something spoke against it; None before limits were learnt.
        numbers: of each audit, for the picture.
        seconds: of a core that an audit took with its gradients, by test; of honest peers alone, since those of a
            batch are computed once for all cheats.
        verdicts: of a run: how many audits it took, and whether the peer passed.
        compared: of each audit, the step, the peer and the counts of test 1, as auditors report them.
    """

    alarms: dict[str, list[bool | None]] = field(default_factory=lambda: {"test 1": [], "test 2": []})
    numbers: dict[str, list[float]] = field(
        default_factory=lambda: {name: [] for name in ("agreement", "excess", "jaccard", "hamming", "manhattan")}
    )
    seconds: dict[str, list[float]] = field(default_factory=lambda: {"test 1": [], "test 2": []})
    verdicts: list[tuple[int, bool]] = field(default_factory=list)
    compared: list[tuple[int, int, dict[str, int]]] = field(default_factory=list)
    balances: dict[int, Balance] = field(default_factory=dict, repr=False)

    def weigh(self, peer: int, side: float | None, usual: Usual | None) -> None:
        """One more audit of a peer, as a run adds them up."""
        if side is None or usual is None:
            return
        balance = self.balances.setdefault(peer, Balance())
        audits = balance.audits + 1
        if (passed := balance.add(side, usual)) is not None:
            self.verdicts.append((audits, passed))


def rounded(x: Tensor) -> Tensor:
    """To bfloat16 and back, the gradient too."""
    return x.bfloat16().float()


def rounded_product(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    return rounded(linear(rounded(x), rounded(weight), bias))


linear = F.linear


def loss_of(net: nn.Module, batch: Batch, arithmetic: str) -> Tensor:
    if arithmetic != "bfloat16":
        return next_byte_loss(net, *batch)
    F.linear = rounded_product  # type: ignore[assignment]
    try:
        return next_byte_loss(net, *batch)
    finally:
        F.linear = linear


def parts_of(batch: Batch, arithmetic: str) -> list[Batch]:
    """The halves of a batch, or its windows one by one."""
    size = 1 if arithmetic == "micro-batches" else (len(batch[0]) + 1) // 2
    return [(batch[0][n : n + size], batch[1][n : n + size]) for n in range(0, len(batch[0]), size)]


# -- who trains --------------------------------------------------------------------------------------------------------


class Peer:
    """Trains, keeps its momentum, and shows it. A cheat overrides what it does."""

    looks_ahead = True
    shows_momentum = True

    def __init__(self, size: Size, arithmetic: str = "float32") -> None:
        torch.manual_seed(size.seed)
        self.net = ByteTransformer(width=size.width, layers=size.layers, heads=4, context=size.context)
        self.optimizer = DisTrO(
            self.net.parameters(),
            lr=LR,
            compression_decay=DECAY,
            compression_topk=TOPK,
            quantize_1bit=True,
            **PUBLISHED,
        )
        self.arithmetic = arithmetic
        self.sent: list[CompressedUpdate] = []
        self.before = self.after = self._show()

    def _show(self) -> Snapshot:
        return Snapshot(self.optimizer.plan, [self.optimizer.delta(p) for p in self.net.parameters()])

    def gradient(self, batch: Batch) -> None:
        parts = parts_of(batch, self.arithmetic)
        for part in parts:
            (loss_of(self.net, part, self.arithmetic) * len(part[0]) / len(batch[0])).backward()

    def train(self, batch: Batch) -> CompressedUpdate:
        self.optimizer.zero_grad()
        if self.looks_ahead:
            self.optimizer.lookahead(LR)
        self.gradient(batch)
        self.sent.append(self.optimizer.generate(LR))
        if self.shows_momentum:
            self.before, self.after = self.after, self._show()
        return self.sent[-1]


class HalfBatch(Peer):
    @override
    def gradient(self, batch: Batch) -> None:
        half = len(batch[0]) // 2
        super().gradient((batch[0][:half], batch[1][:half]))


class NoLookahead(Peer):
    looks_ahead = False


class FreeRider(Peer):
    """Trains four steps, and sends what its momentum has after that."""

    @override
    def gradient(self, batch: Batch) -> None:
        if len(self.sent) < 4:
            super().gradient(batch)
        else:
            for param in self.net.parameters():
                param.grad = torch.zeros_like(param)


class Adaptive(Peer):
    """Saves half of the work and knows both tests: trains every second window, so that the halves of its batch are
    alike, and takes for the others what all peers together sent last, in the size of what it has computed. Its momentum
    is kept with that, so that what it commits to and what it sends fit each other.
    """

    everybody: Sequence[CompressedUpdate] = ()

    @override
    def gradient(self, batch: Batch) -> None:
        super().gradient((batch[0][::2], batch[1][::2]))
        if not self.everybody:
            return
        for param, guess in zip(self.net.parameters(), self.optimizer.decode(self.everybody), strict=True):
            if param.grad is not None and bool(guess.any()):
                param.grad.add_(guess, alpha=0.5 * float(param.grad.norm() / guess.norm()))


def flipped(update: CompressedUpdate, share: float, step: int) -> CompressedUpdate:
    generator = torch.Generator().manual_seed(step)
    values = tuple(value ^ (torch.rand(value.shape, generator=generator) < share) for value in update.value)
    return CompressedUpdate(update.plan, update.index, values, update.present)


def random_update(update: CompressedUpdate, step: int) -> CompressedUpdate:
    generator = torch.Generator().manual_seed(step)
    index = tuple(
        torch.rand(batch.tiles, batch.tile_size, generator=generator).topk(batch.k).indices.int()
        for batch in update.plan.batches
    )
    values = tuple(torch.rand(value.shape, generator=generator) < 0.5 for value in update.value)
    return CompressedUpdate(update.plan, index, values, update.present)


# -- who audits --------------------------------------------------------------------------------------------------------


class Auditor:
    """Both tests, with limits that are learnt on the way."""

    def __init__(self, size: Size) -> None:
        self.net = Peer(size).net
        self.parameters = dict(self.net.named_parameters())
        self.names = list(self.parameters)
        self.noise: dict[bytes, deque[Noise]] = {}
        self.limits: Limits | None = None
        self.sidings: dict[bytes, deque[float]] = {}
        self.usual: Usual | None = None
        self.opening_bytes = 0
        self._computed: dict[tuple[int, str], list[Tensor | None]] = {}

    def learn(self) -> None:
        """Of all steps before this one."""
        self._computed.clear()
        try:
            self.limits = learn({peer: list(noise) for peer, noise in self.noise.items()})
        except ConfigurationError:
            self.limits = None
        self.usual = usual_of({peer: list(of_peer) for peer, of_peer in self.sidings.items()})

    def remember(self, peer: bytes, noise: Noise, side: float | None) -> None:
        self.noise.setdefault(peer, deque(maxlen=SAMPLES_OF_A_PEER)).append(noise)
        if side is not None:
            self.sidings.setdefault(peer, deque(maxlen=SIDINGS_OF_A_PEER)).append(side)

    def parts(self, batch: Batch, weights: dict[str, Tensor], arithmetic: str) -> list[list[Tensor | None]]:
        def loss(part: Batch) -> Tensor:
            return loss_of(self.net, part, arithmetic)

        return quiet_gradients(self.net, self.parameters, loss, parts_of(batch, arithmetic), weights=weights)

    def whole(self, batch: Batch, weights: dict[str, Tensor], arithmetic: str) -> list[Tensor | None]:
        parts = self.parts(batch, weights, arithmetic)
        return mean_of(parts, [1] * len(parts))

    def test_1(
        self, found: Found, sent: CompressedUpdate, parts: Any, control: Any, step: int, peer: int = 0
    ) -> Evidence:
        middle = len(parts) // 2
        halves = mean_of(parts[:middle], [1] * middle), mean_of(parts[middle:], [1] * middle)
        evidence = compare(sent, mean_of(halves, [1, 1]), control, halves=halves)
        reasons = None if self.limits is None else judge(evidence, self.limits)
        found.alarms["test 1"].append(None if reasons is None else bool(reasons))
        found.numbers["agreement"].append(evidence.assigned.share)
        found.numbers["excess"].append(evidence.excess)
        compared = Compared.of(evidence)
        found.compared.append((step, peer, vars(compared)))
        found.weigh(peer, compared.siding, self.usual)
        return evidence

    def test_2(
        self, found: Found, peer: Peer, sent: CompressedUpdate, batch: Batch, weights: Any, arithmetic: str, step: int
    ) -> Noise:
        challenge = draw(step * 7919, step, sent.plan, [b"audited"], [b"auditor"], 1.0)[0]
        opening = make_opening(step, challenge.leaves, peer.before, peer.after)
        if not self.opening_bytes:
            self.opening_bytes = len(encode_opening(opening, sent.plan))
        # Several cheats show the same momentum.
        key = id(peer), arithmetic
        if key not in self._computed:
            there = looking_ahead(weights, opening.signs, [LR] * len(self.names))
            self._computed[key] = self.whole(batch, there, arithmetic)
        verdict = check(
            opening,
            challenge=challenge,
            step=step,
            before=peer.before.commitment(step - 1),
            after=peer.after.commitment(step),
            previous=peer.sent[-2] if len(peer.sent) > 1 else None,
            sent=sent,
            gradients=self._computed[key],
            rates=[LR],
            decays=[DECAY],
            limits=self.limits or LOOSEST,
        )
        found.alarms["test 2"].append(None if self.limits is None else not verdict.passed)
        for name in ("jaccard", "hamming", "manhattan"):
            found.numbers[name].append(getattr(verdict, name))
        return verdict.noise()


def run(
    size: Size,
    steps: int,
    tell: Callable[[str, dict[str, Found]], None],
    *,
    with_cheats: bool = True,
    with_test_2: bool = True,
) -> tuple[dict[str, Found], dict[str, Any]]:
    """One run; what was found of each kind of peer, and facts. Now and then it tells how far it is, and what it has
    found by then."""
    data = SourceBytes(context=size.context, seed=size.seed)
    peers = [Peer(size, arithmetic) for arithmetic in ARITHMETICS]
    cheats: dict[str, Peer] = (
        {
            "momentum, nothing trained": FreeRider(size),
            "other data": Peer(size),
            "half of the batch": HalfBatch(size),
            "no lookahead": NoLookahead(size),
            "adaptive": Adaptive(size),
        }
        if with_cheats
        else {}
    )
    for peer in [*peers, *cheats.values()]:
        peer.shows_momentum = with_test_2
    auditor = Auditor(size)
    found: dict[str, Found] = {}
    on_its_way: list[CompressedUpdate] = []
    facts: dict[str, Any] = {"parameters": sum(p.numel() for p in auditor.parameters.values())}
    for step in range(1, steps + 1):
        weights = {name: p.detach().clone() for name, p in peers[0].net.named_parameters()}
        batches = [data.batch(step, worker, size.windows) for worker in range(len(peers))]
        sent = [peer.train(batch) for peer, batch in zip(peers, batches, strict=True)]
        made: dict[str, tuple[Peer, CompressedUpdate]] = {}
        for name, cheat in cheats.items():
            if isinstance(cheat, Adaptive):
                cheat.everybody = on_its_way
            given = data.batch(step, OTHER_WORKER, size.windows) if name == "other data" else batches[0]
            made[name] = cheat, cheat.train(given)
        if with_cheats:
            idle = cheats["momentum, nothing trained"]
            made["a copy of another result"] = idle, sent[1]
            made["random"] = idle, random_update(sent[0], step)
            made["10 % of the signs flipped"] = peers[0], flipped(sent[0], 0.1, step)
            made["1 % of the signs flipped"] = peers[0], flipped(sent[0], 0.01, step)

        auditor.learn()
        control = auditor.whole(data.batch(step, CONTROL_WORKER, size.windows), weights, "float32")
        noise: list[tuple[bytes, Noise, float | None]] = []
        parts_of_first = None
        for number, (peer, batch) in enumerate(zip(peers, batches, strict=True)):
            kind = ARITHMETICS[(number + step) % len(ARITHMETICS)]
            row = found.setdefault(HONEST, Found())
            began = time.process_time()
            parts = auditor.parts(batch, weights, kind)
            parts_of_first = parts_of_first or parts
            evidence = auditor.test_1(row, sent[number], parts, control, step, number)
            row.seconds["test 1"].append(time.process_time() - began)
            both = Noise.of(evidence)
            if with_test_2:
                began = time.process_time()
                two = auditor.test_2(row, peer, sent[number], batch, weights, kind, step)
                row.seconds["test 2"].append(time.process_time() - began)
                both = replace(both, jaccard=two.jaccard, hamming=two.hamming, manhattan=two.manhattan)
            noise.append((bytes([number]), both, Compared.of(evidence).siding))
        for name, (peer, update) in made.items():
            row = found.setdefault(name, Found())
            auditor.test_1(row, update, parts_of_first, control, step)
            if with_test_2:
                auditor.test_2(row, peer, update, batches[0], weights, "float32", step)
        for who, what, side in noise:
            auditor.remember(who, what, side)
        for peer in [*peers, *cheats.values()]:
            peer.optimizer.apply(on_its_way, LR)
        on_its_way = sent
        if step % max(1, steps // 8) == 0:
            tell(f"step {step} of {steps}", found)
    facts["coefficients"] = sum(int(index.numel()) for index in sent[0].index)
    facts["opening_bytes"] = auditor.opening_bytes
    facts["limits"] = json.loads(auditor.limits.encode()) if auditor.limits is not None else None
    return found, facts


# -- what is shown -----------------------------------------------------------------------------------------------------


def latest(alarms: Sequence[bool | None]) -> int | None:
    """Rounds until a cheat is found, at the most, from whichever round one begins to look; None if it never was."""
    judged = [alarm for alarm in alarms if alarm is not None]
    if not any(judged):
        return None
    longest = current = 0
    for alarm in judged:
        current = 0 if alarm else current + 1
        longest = max(longest, current)
    return longest + 1


def table(found: dict[str, Found]) -> list[str]:
    lines = [
        "| peer | agreement | excess | test 1: alarms | found within | in a run: failed | after audits | "
        "Jaccard | Hamming | Manhattan | test 2: alarms | found within |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for name, row in found.items():
        cells = [name]
        for test, names in (("test 1", ("agreement", "excess")), ("test 2", ("jaccard", "hamming", "manhattan"))):
            for number in names:
                values = sorted(row.numbers[number])
                cells.append(f"{values[len(values) // 2]:.3f}" if values else "")
            judged = [alarm for alarm in row.alarms[test] if alarm is not None]
            within = latest(row.alarms[test])
            cells.append(f"{sum(judged)} of {len(judged)}")
            cells.append("" if name == HONEST else "never" if within is None else f"{within}")
            if test == "test 1":
                took = sorted(audits for audits, passed in row.verdicts if not passed)
                cells.append(f"{len(took)} of {len(row.verdicts)}")
                cells.append(f"{took[0]} to {took[-1]}" if took else "" if name == HONEST else "never")
        lines.append("| " + " | ".join(cells) + " |")
    return lines


def plot(results: dict[str, dict[str, Found]], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")  # no display needed
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(len(results), 2, figsize=(11, 3.6 * len(results)), squeeze=False)
    for row, (model, found) in enumerate(results.items()):
        names = list(found)
        for column, (number, title) in enumerate(
            (("agreement", "test 1: signs that agree"), ("manhattan", "test 2: Manhattan distance"))
        ):
            axis = axes[row][column]
            floor = 1e-7
            axis.boxplot(
                [[max(v, floor) for v in found[name].numbers[number]] for name in names],
                orientation="horizontal",
                whis=(0, 100),
            )
            axis.set_yticks(range(1, len(names) + 1), names if column == 0 else [""] * len(names))
            axis.invert_yaxis()
            axis.set_title(f"{title}, {model}", fontsize=10)
            if number == "manhattan":
                axis.set_xscale("log")
            axis.grid(axis="x", alpha=0.3)
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def save(path: Path, found: dict[str, Found], facts: dict[str, Any]) -> None:
    rows = {name: {key: value for key, value in vars(row).items() if key != "balances"} for name, row in found.items()}
    path.write_text(json.dumps({"facts": facts, "found": rows}))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=list(SIZES), choices=list(SIZES), help="which (all)")
    parser.add_argument("--steps", type=int, help="instead of those of each model")
    parser.add_argument("--honest", type=int, metavar="AUDITS", help="audit honest peers alone, so many times")
    parser.add_argument("--seed", type=int, default=0, help="of the weights and of the samples (0)")
    parser.add_argument("--only-test-1", action="store_true", help="no momentum is audited")
    parser.add_argument("--plot", action="store_true", help="draw out/verification.png; needs matplotlib")
    options = parser.parse_args()
    results: dict[str, dict[str, Found]] = {}
    out = Path("out")
    out.mkdir(exist_ok=True)
    for model in options.models:
        began = time.process_time()
        size = replace(SIZES[model], seed=options.seed)
        steps = options.steps or size.steps
        if options.honest:
            steps = -(-options.honest // len(ARITHMETICS)) + UNJUDGED
        name = f"verification-{model}{'-honest' if options.honest else ''}-{options.seed}.json"

        def tell(text: str, found: dict[str, Found], path: Path = out / name) -> None:
            print("\n".join([text, *table(found)]), flush=True)
            save(path, found, {})

        found, facts = run(
            size,
            steps,
            tell,
            with_cheats=not options.honest,
            with_test_2=not options.only_test_1,
        )
        results[model] = found
        facts["cpu_seconds"] = time.process_time() - began
        print(f"\n{model}: {json.dumps(facts)}\n")
        seconds = {t: sorted(s for row in found.values() for s in row.seconds[t]) for t in ("test 1", "test 2")}
        print({t: f"{1000 * s[len(s) // 2]:.0f} ms of a core" for t, s in seconds.items() if s}, flush=True)
        save(out / name, found, facts)
    if options.plot:
        plot(results, out / "verification.png")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
