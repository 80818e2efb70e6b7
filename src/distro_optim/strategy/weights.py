"""Do all peers have the same weights? And if not: who is right, and which tensor differs?

Psyche does not ask. Here peers of our own kind say at the start of each step what their weights hash to. The largest
group of equal reports is right; of equal groups, the one with the first client of the list. What that proves: nothing
about a single peer, which may say what it likes; with more honest reporters than liars of one mind, a peer that left
the common weights learns of it, and where.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor, uint8

from ..verify.merkle import merkle_root
from .broadcasts import MARK_SIZE, MAX_MARKS, WeightsReport

__all__ = ["Verdict", "WeightsTable", "differing_tensors", "tensor_digest", "weights_report"]


@dataclass(frozen=True)
class Verdict:
    """What the reports of a step say about ours.

    Attributes:
        agrees: we are in the group that is right.
        others: reports of other peers that there are.
        right: senders of the group that is right, without us.
        report: one of that group's, where it is not ours.
    """

    agrees: bool
    others: int
    right: tuple[bytes, ...]
    report: WeightsReport | None = None

    @property
    def confirmed(self) -> bool:
        """Somebody else has what we have, and we are right."""
        return self.agrees and bool(self.right)


def tensor_digest(name: str, tensor: Tensor) -> bytes:
    """SHA-256 over name, type, shape and bits of a tensor; -0 is not 0 here."""
    digest = hashlib.sha256(repr((name, str(tensor.dtype), tuple(tensor.shape))).encode())
    digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(uint8).numpy().data)
    return digest.digest()


def weights_report(epoch: int, step: int, digests: Sequence[bytes], nonce: int) -> WeightsReport:
    """The report on tensors with these hashes, in the order of their names."""
    marks = []
    for start, stop in _groups(len(digests)):
        marks.append(hashlib.sha256(b"".join(digests[start:stop])).digest()[:MARK_SIZE])
    return WeightsReport(epoch, step, merkle_root(digests), b"".join(marks), nonce)


def differing_tensors(ours: WeightsReport, theirs: WeightsReport, names: Sequence[str]) -> tuple[str, ...]:
    """Names of the tensors, or of whole groups of them, in which two reports differ."""
    if len(ours.marks) != len(theirs.marks):
        return ()
    differing: list[str] = []
    for place, (start, stop) in enumerate(_groups(len(names))):
        mark = slice(place * MARK_SIZE, (place + 1) * MARK_SIZE)
        if ours.marks[mark] != theirs.marks[mark]:
            differing.extend(names[start:stop])
    return tuple(differing)


def _groups(count: int) -> list[tuple[int, int]]:
    """``count`` tensors in at most MAX_MARKS runs of neighbours."""
    runs = min(count, MAX_MARKS)
    return [(i * count // runs, (i + 1) * count // runs) for i in range(runs)]


class WeightsTable:
    """Reports by step, one of each peer. Its owner admits only clients of the epoch and a few steps."""

    def __init__(self) -> None:
        self._reports: dict[tuple[int, int], dict[bytes, WeightsReport]] = {}

    def add(self, sender: bytes, report: WeightsReport) -> bool:
        """Keeps a report; False if the sender has reported on that step already."""
        of_step = self._reports.setdefault((report.epoch, report.step), {})
        if sender in of_step:
            return False
        of_step[sender] = report
        return True

    def forget_before(self, step: int) -> None:
        for key in [key for key in self._reports if key[1] < step]:
            del self._reports[key]

    def clear(self) -> None:
        self._reports.clear()

    def judge(self, me: bytes, ours: WeightsReport, clients: Iterable[bytes]) -> Verdict:
        """Compares ``ours`` with the reports of ``clients``, which are in the order of the epoch's list."""
        reports: Mapping[bytes, WeightsReport] = self._reports.get((ours.epoch, ours.step), {})
        groups: dict[tuple[bytes, bytes], list[bytes]] = {}
        # Whoever was taken off the list stands last in it.
        for client in dict.fromkeys([*clients, me]):
            report = ours if client == me else reports.get(client)
            if report is not None:
                groups.setdefault((report.root, report.marks), []).append(client)
        # max() keeps the first of equals, and groups stand in the order of their first members.
        right = max(groups.values(), key=len)
        others = sum(map(len, groups.values())) - 1
        peers = tuple(client for client in right if client != me)
        if me in right:
            return Verdict(True, others, peers)
        return Verdict(False, others, peers, reports[right[0]])
