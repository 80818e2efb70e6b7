"""How far honest results are from each other, and so which distance is too far: limits learnt from honest noise.

Training does not repeat exactly: another micro-batch size, bfloat16 in place of float32, other kernels, and the last
bits differ. How much depends on the model, the batch and the phase of training, so nobody can write the limits down
beforehand. Instead every peer audits *itself* now and then, by other arithmetic than it trained with, and what it finds
is a :class:`Noise`. :func:`learn` takes the noise of many peers and says where one honest audit in a thousand would be.

Two kinds of bounds keep liars and accidents out. However much noise is reported, limits never go beyond those of
:data:`LOOSEST`, beyond which nobody honest is: a peer that reports absurd noise gains nothing. And however little is
reported they are never tighter than :data:`TIGHTEST`: peers with one kind of hardware find no noise at all, and must
not drop the first one with another. A peer counts with at most :data:`SAMPLES_OF_A_PEER` samples.

What it does not do: tell honest noise from noise that was made up within these bounds.
"""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Final

from ..errors import ConfigurationError, ProtocolError
from .recompute import Evidence

__all__ = [
    "LOOSEST",
    "MAX_BYTES",
    "MIN_COEFFICIENTS",
    "SAMPLES_OF_A_PEER",
    "TIGHTEST",
    "Limits",
    "Noise",
    "is_within_reach",
    "judge",
    "learn",
    "of_peers",
    "of_the_quieter_half",
]

VERSION: Final = 1
"""Of the file."""

MAX_BYTES: Final = 4096
"""Of the file; it has some 300."""

FALSE_ALARMS: Final = 1e-3
"""Share of honest audits that would be beyond the learnt limit, before the margin."""

MARGIN: Final = 0.25
"""What is added to that, as a part of the distance from the median. Chosen arbitrarily."""

MIN_SAMPLES: Final = 16
"""Fewer say nothing about rare noise. Chosen arbitrarily."""

SAMPLES_OF_A_PEER: Final = 64
"""Of one identity that count, the latest. Chosen arbitrarily."""

SIGMAS: Final = 6.0
"""Standard errors above chance that an honest agreement has at least. A tossed coin gets there once in 10**9."""

MIN_COEFFICIENTS: Final = 400
"""With fewer, 6 standard errors are more than 0.15 and chance is too near to honesty: nothing is decided."""


@dataclass(frozen=True, kw_only=True)
class Noise:
    """What an honest peer found when it audited itself; None where that test was not made.

    Attributes:
        agreement, excess, imbalance: of test 1, see :class:`~.recompute.Evidence`.
        jaccard, hamming, manhattan: distances of test 2, see :mod:`.audit`.
    """

    agreement: float | None = None
    excess: float | None = None
    imbalance: float | None = None
    jaccard: float | None = None
    hamming: float | None = None
    manhattan: float | None = None

    @classmethod
    def of(cls, evidence: Evidence) -> Noise:
        """That of test 1."""
        return cls(agreement=evidence.assigned.share, excess=evidence.excess, imbalance=evidence.imbalance)


@dataclass(frozen=True, kw_only=True)
class Limits:
    """Beyond which a result is not honest.

    Attributes:
        agreement: with the assigned batch, at least.
        excess: of this over the agreement with the control batch, at least.
        imbalance: between the halves of the batch, at most.
        coverage: the share of the expected coefficients, at least.
        jaccard, hamming, manhattan: distances of test 2, at most.
        samples: of noise from which they were learnt; 0 if they were not.
    """

    agreement: float
    excess: float
    imbalance: float
    coverage: float
    jaccard: float
    hamming: float
    manhattan: float
    samples: int = 0

    def encode(self) -> bytes:
        """JSON with a version, for a file."""
        return json.dumps({"version": VERSION, **asdict(self)}, indent=1).encode()

    @classmethod
    def decode(cls, data: bytes) -> Limits:
        """The inverse. What is looser than :data:`LOOSEST` is refused, whoever wrote the file.

        Raises:
            ProtocolError: it is none of ours, of another version, or beyond its bounds.
        """
        if len(data) > MAX_BYTES:
            raise ProtocolError(f"limits of audits have at most {MAX_BYTES} bytes, not {len(data)}")
        try:
            values = json.loads(data)
        except (ValueError, RecursionError) as error:
            raise ProtocolError("limits of audits are not JSON") from error
        if not isinstance(values, dict) or values.pop("version", None) != VERSION:
            raise ProtocolError(f"limits of audits are of version {VERSION}: learn them again with this version")
        names = {f.name for f in fields(cls)}
        if values.keys() != names:
            raise ProtocolError(f"limits of audits have the numbers {', '.join(sorted(names))}, and no others")
        samples = values["samples"]
        if type(samples) is not int or not 0 <= samples < 1 << 32:
            raise ProtocolError("the number of samples is no whole number", field="samples")
        for name in names - {"samples"}:
            value = values[name]
            if type(value) not in (int, float) or not 0 <= value <= 1:
                raise ProtocolError("a limit is a number from 0 to 1", field=name)
            loosest = getattr(LOOSEST, name)
            if (value < loosest) if name in _AT_LEAST else (value > loosest):
                raise ProtocolError(f"{value} is looser than {loosest}, which nobody honest needs", field=name)
        return cls(**values)

    def table(self) -> str:
        """For people."""
        origin = f"learnt from {self.samples} honest audits" if self.samples else "not learnt from honest audits"
        rows = [
            ("test 1", "agreement with the assigned batch", ">=", self.agreement),
            ("", "excess over the control batch", ">=", self.excess),
            ("", "imbalance between the halves", "<=", self.imbalance),
            ("", "coefficients sent of those expected", ">=", self.coverage),
            ("test 2", "Jaccard distance of positions", "<=", self.jaccard),
            ("", "Hamming distance of signs", "<=", self.hamming),
            ("", "Manhattan distance, relative", "<=", self.manhattan),
        ]
        return "\n".join(
            [f"limits of audits, {origin}", *(f"  {t:6}  {w:36} {sign} {v:.4f}" for t, w, sign, v in rows)]
        )


_AT_LEAST: Final = frozenset({"agreement", "excess", "coverage"})
"""Numbers of which honest peers have much; of the others they have little."""

_DISTANCES: Final = ("jaccard", "hamming", "manhattan")
"""Numbers of test 2."""

LOOSEST: Final = Limits(
    agreement=0.5, excess=0.0, imbalance=1.0, coverage=0.5, jaccard=0.5, hamming=0.25, manhattan=0.5
)
"""Nobody honest is beyond these. To the agreement :func:`judge` adds 6 standard errors. The noise that was measured
between bfloat16 and float32 was a Jaccard distance of 0.02 and a relative Manhattan distance of 0.02; those of cheats
began at 0.16 and 0.2."""

TIGHTEST: Final = Limits(
    agreement=0.99, excess=0.5, imbalance=0.02, coverage=0.98, jaccard=0.05, hamming=0.005, manhattan=0.05
)
"""Limits are never tighter than these: two to three times the noise that was measured between bfloat16 and float32."""


def learn(noise: Mapping[bytes, Sequence[Noise]]) -> Limits:
    """Limits beyond which one honest audit in a thousand is, and a margin.

    Args:
        noise: found by each identity, in the order of time.

    Raises:
        ConfigurationError: there are fewer than 16 samples.
    """
    samples = [sample for peer in noise.values() for sample in peer[-SAMPLES_OF_A_PEER:]]
    if len(samples) < MIN_SAMPLES:
        raise ConfigurationError(
            f"limits are learnt from {MIN_SAMPLES} audits or more, not from {len(samples)}: audit more rounds first",
            name="noise",
        )
    learnt: dict[str, float] = {"coverage": TIGHTEST.coverage}
    for name in ("agreement", "excess", "imbalance", "jaccard", "hamming", "manhattan"):
        loosest, tightest = getattr(LOOSEST, name), getattr(TIGHTEST, name)
        values = [v for sample in samples if (v := getattr(sample, name)) is not None and math.isfinite(v)]
        if len(values) < MIN_SAMPLES:
            learnt[name] = loosest
            continue
        edge = _edge(values, low=name in _AT_LEAST)
        learnt[name] = min(max(edge, min(loosest, tightest)), max(loosest, tightest))
    return Limits(**learnt, samples=len(samples))


def is_within_reach(noise: Mapping[bytes, Sequence[Noise]]) -> bool:
    """Whether test 2 says anything in a run: for most peers, what they find in their own momentum is nearer than
    :data:`LOOSEST`, but for one in :data:`SAMPLES_OF_A_PEER` times at most: two such audits of the last eight fail an
    honest peer. It is not where a script trains by another gradient than that of the loss function that it audits with,
    always or now and then: gradients are clipped or scaled, dropout is on, or norms see other pieces of a batch.

    Args:
        noise: found by each identity; each has one voice.
    """
    voices = []
    for samples in noise.values():
        far = [
            any((value := getattr(sample, name)) is not None and value > getattr(LOOSEST, name) for name in _DISTANCES)
            for sample in samples
        ]
        if far:
            voices.append(sum(far) * SAMPLES_OF_A_PEER <= len(far))
    return 2 * sum(voices) > len(voices)


def of_the_quieter_half(noise: Mapping[bytes, Sequence[Noise]]) -> dict[bytes, Sequence[Noise]]:
    """Of those that report noise of test 2, the ones that mostly report the least: half of them and one more.

    A cheat that looks at itself finds its own cheating, and limits learnt from that would let it pass. So they are
    learnt from most peers, and what a few others need besides is up to :data:`TIGHTEST`.
    """

    def usual(samples: Sequence[Noise]) -> float:
        """In parts of what is too much."""
        values = [
            statistics.median(found) / getattr(LOOSEST, name)
            for name in _DISTANCES
            if (found := [v for sample in samples if (v := getattr(sample, name)) is not None])
        ]
        return max(values, default=0.0)

    reporting = sorted((peer for peer in noise if noise[peer]), key=lambda peer: (usual(noise[peer]), peer))
    return {peer: noise[peer] for peer in reporting[: len(reporting) // 2 + 1]}


def of_peers(evidence: Iterable[Evidence]) -> Limits:
    """Limits from the results of all peers of a run, where nobody has learnt any: half of what most of them have, of
    the excess and of what their agreement has above chance. Right where more than half of the peers are honest.
    """
    found = [e for e in evidence if e.assigned.total >= MIN_COEFFICIENTS]
    if not found:
        return LOOSEST
    # The upper one where their number is even.
    agreement, excess = (
        sorted(values)[len(found) // 2] for values in ([e.assigned.share for e in found], [e.excess for e in found])
    )
    usual = {"agreement": max(0.5, (0.5 + agreement) / 2), "excess": max(0.0, excess / 2)}
    return Limits(**{**asdict(LOOSEST), **usual})


def judge(evidence: Evidence, limits: Limits, *, sigmas: float = 0.0) -> list[str] | None:
    """What speaks against a result, in words; empty if nothing does, None if there is too little to decide.

    Args:
        evidence: of one result, or of several of a peer that are added up.
        limits: of the run.
        sigmas: so many standard errors beyond the limits it has to be; for those that were not learnt from results
            of this size.
    """
    if evidence.expected and evidence.coverage < limits.coverage:
        share = (
            f"{evidence.coverage:.2f} of the coefficients that the batch has were sent, {limits.coverage:.2f} expected"
        )
        return [share]
    if evidence.assigned.total < MIN_COEFFICIENTS:
        return None
    reasons = []
    agreement = evidence.assigned.share
    least = max(limits.agreement - sigmas * evidence.assigned.error, 0.5 + SIGMAS * evidence.assigned.error)
    if agreement < least:
        reasons.append(f"agreement {agreement:.3f} with the assigned batch, at least {least:.3f} expected")
    # Where both batches say the same at every position, nothing tells them apart.
    error = evidence.excess_error
    if math.isfinite(error) and evidence.excess + sigmas * error < limits.excess:
        reasons.append(f"excess {evidence.excess:.3f} over the control batch, at least {limits.excess:.3f} expected")
    apart = evidence.imbalance
    if apart is not None and apart > limits.imbalance:
        reasons.append(
            f"imbalance {apart:.3f} between the halves of the batch, at most {limits.imbalance:.3f} expected"
        )
    return reasons


def _edge(values: Sequence[float], *, low: bool) -> float:
    """Where one value in a thousand would be, and the margin, on the low side or on the high one.

    The lowest of n values is about the quantile 1/(n+1). From there to the quantile of 0.001 it is as far as in a
    normal distribution, measured from the median.
    """
    middle = statistics.median(values)
    normal = statistics.NormalDist()
    count = len(values)
    rank = max(1, math.floor(FALSE_ALARMS * (count + 1)))
    ordered = sorted(values, reverse=not low)
    further = normal.inv_cdf(FALSE_ALARMS) / normal.inv_cdf(min(rank / (count + 1), 0.49))
    return middle + (ordered[rank - 1] - middle) * (max(1.0, further) + MARGIN)
