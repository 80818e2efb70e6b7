"""Do all peers have the same weights? And if not: which of them are right, and which tensors differ? No I/O.

Psyche does not ask. Here peers of our own kind say at the start of each step what their weights hash to. Which reports
are right is decided by the rule of :mod:`.trust.votes`: the host's, or those of the peers that have trained. A peer
whose weights have drifted from theirs learns of it, and in which tensors.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Final

from blake3 import blake3
from torch import Tensor, uint8

from ...comm import postcard
from ...coordinator.rules.checkpoints import believes_host, is_run_of_psyche
from ...coordinator.types import Coordinator
from ...verify.merkle import merkle_root
from .actions import AnnounceWeights, Desynced, HashWeights, Outbox
from .broadcasts import MARK_SIZE, MAX_MARKS, WeightsReport
from .trust.standing import Standing
from .trust.votes import Electorate, decide

__all__ = [
    "Finding",
    "TensorDigest",
    "Verdict",
    "WeightsTable",
    "WeightsWatch",
    "differing_tensors",
    "tensor_digest",
    "weights_report",
]

_U32: Final = 0xFFFF_FFFF


@dataclass(frozen=True)
class Verdict:
    """What the reports of a step say about ours.

    Attributes:
        agrees: we are in the group that is right.
        others: how many other peers have reported, of those that count.
        right: public keys of the group that is right, without ours.
        report: a report of that group; None if we are in it.
        certain: no report that is still out could change it.
    """

    agrees: bool
    others: int
    right: tuple[bytes, ...]
    report: WeightsReport | None = None
    certain: bool = False

    @property
    def confirmed(self) -> bool:
        """Another peer has the same weights as we, and we are right."""
        return self.agrees and bool(self.right)


class TensorDigest:
    """32 bytes: BLAKE3 over name, type, shape and bits of a tensor of any shape and dtype; -0 is not 0 here.

    Args:
        name: of the tensor.
        tensor: whose type and shape are taken; its elements are given to :meth:`update`.

    Attributes:
        name: as above.
    """

    def __init__(self, name: str, tensor: Tensor) -> None:
        self.name = name
        self._hash = blake3(repr((name, str(tensor.dtype), tuple(tensor.shape))).encode())

    def update(self, data: memoryview) -> None:
        """The next bytes, in the order of the elements, as they lie in memory."""
        self._hash.update(data)

    def digest(self) -> bytes:
        """32 bytes, over all that was given."""
        return self._hash.digest()


def tensor_digest(name: str, tensor: Tensor) -> bytes:
    """:class:`TensorDigest` of the whole tensor; of a DTensor, too, whose ranks must all call."""
    digest = TensorDigest(name, tensor)
    gather = getattr(tensor, "full_tensor", None)
    if gather is not None:
        tensor = gather()
    digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(uint8).numpy().data)
    return digest.digest()


def weights_report(epoch: int, step: int, digests: Sequence[bytes], nonce: int) -> WeightsReport:
    """The report on tensors with these hashes of 32 bytes each, in the order of their names."""
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
        self._values: dict[tuple[int, int], set[tuple[bytes, bytes]]] = {}  # that were reported

    def add(self, sender: bytes, report: WeightsReport) -> bool:
        """Keeps a report; False if the sender has reported on that step already."""
        key = report.epoch, report.step
        of_step = self._reports.get(key)
        if of_step is None:
            of_step = self._reports[key] = {}
            self._values[key] = set()
        if sender in of_step:
            return False
        of_step[sender] = report
        self._values[key].add((report.root, report.marks))
        return True

    def is_undisputed(self, ours: WeightsReport) -> bool:
        """Whether nobody has reported anything else on the step of ``ours``."""
        values = self._values.get((ours.epoch, ours.step), ())
        return not values or (len(values) == 1 and (ours.root, ours.marks) in values)

    def forget_before(self, step: int) -> None:
        """Forgets reports on earlier steps."""
        for key in [key for key in self._reports if key[1] < step]:
            del self._reports[key], self._values[key]

    def clear(self) -> None:
        """Forgets all reports."""
        self._reports.clear()
        self._values.clear()

    def judge(self, me: bytes, ours: WeightsReport, electorate: Electorate, *, final: bool) -> Verdict:
        """Compares ``ours`` with the others' reports on its step, by :func:`.trust.votes.decide`.

        Args:
            me: our own public key.
            ours: our report.
            electorate: whose reports count.
            final: no further report is waited for.
        """
        reports: Mapping[bytes, WeightsReport] = self._reports.get((ours.epoch, ours.step), {})
        said = {key: (report.root, report.marks) for key, report in reports.items()}
        outcome = decide(me, (ours.root, ours.marks), said, electorate, final=final)
        agrees = outcome.right == (ours.root, ours.marks)
        report = None if agrees else reports[outcome.members[0]]
        return Verdict(agrees, outcome.heard, outcome.members, report, outcome.certain)


@dataclass(frozen=True)
class Finding:
    """Our weights are wrong.

    Attributes:
        reason: in words.
        right: public keys of peers that have the right ones, as far as known.
        tensors: names of those that differ, as far as known.
    """

    reason: str
    right: tuple[bytes, ...] = ()
    tensors: tuple[str, ...] = ()


class WeightsWatch:
    """Our own reports beside those of the others, and what is known against our weights.

    Args:
        me: our own public key.
        outbox: where what is to be done goes.
        host: public key of the peer that hosts the run; None if we do not know it.

    Attributes:
        fault: why our weights are not those of the others; None if they are, as far as we know.
        standing: who has trained.
    """

    def __init__(self, me: bytes, outbox: Outbox, host: bytes | None = None) -> None:
        self.fault: Desynced | None = None
        self.standing = Standing(me)
        self._me = me
        self._host = host
        self._outbox = outbox
        self._names: tuple[str, ...] = ()
        # The step since which our weights may be wrong because results did not come; None if there is no such doubt.
        self._doubt: int | None = None
        self._asked: dict[int, int] = {}  # step to epoch, until the trainer has answered
        self._ours: dict[int, WeightsReport] = {}
        self._table = WeightsTable()

    def forget_host(self) -> None:
        """The host is gone, and somebody else was elected: from now on the votes count."""
        self._host = None

    @property
    def num_tensors(self) -> int:
        """Of the model that was loaded last."""
        return len(self._names)

    # -- what is known against ours ------------------------------------------------------------------------------------

    def loaded(self, names: Sequence[str]) -> None:
        """Other weights were loaded, of tensors with these names: nothing is known against them."""
        self._names = tuple(names)
        self.fault, self._doubt = None, None
        self._ours.clear()
        self._asked.clear()

    def suspect(self, step: int) -> None:
        """Results are missing: from ``step`` on our weights may be wrong, until a comparison clears them."""
        self._doubt = step

    def condemn(self, fault: Desynced) -> None:
        """Our weights are wrong until others are loaded."""
        self.fault, self._doubt = fault, None
        self._outbox.put(fault)

    # -- our reports ---------------------------------------------------------------------------------------------------

    def hash(self, epoch: int, step: int) -> None:
        """Has our weights at ``step`` hashed, once. (An epoch begins with the weights of its warm-up.)"""
        if step not in self._ours and step not in self._asked:
            self._asked[step] = epoch
            self._outbox.put(HashWeights(step))

    def hashed(self, step: int, digests: Sequence[bytes], nonce: int) -> WeightsReport | None:
        """Our report on ``step``; None if nobody asked for it."""
        epoch = self._asked.pop(step, None)
        if epoch is None:
            return None
        self._ours[step] = weights_report(epoch, step, digests, nonce)
        return self._ours[step]

    def replaced(self, epoch: int, step: int, digests: Sequence[bytes], nonce: int) -> WeightsReport:
        """Our report on ``step``, some of whose tensors were replaced by those of peers that are right."""
        self._ours[step] = weights_report(epoch, step, digests, nonce)
        self._doubt = None
        return self._ours[step]

    def tell(self, report: WeightsReport) -> None:
        """Announces our report, if our weights are not known to be wrong."""
        if self.fault is None:
            self._outbox.put(AnnounceWeights(postcard.encode(report)))

    def tell_again(self) -> None:
        """Announces our latest report with a new nonce."""
        if self._ours:
            step = max(self._ours)
            report = self._ours[step]
            self._ours[step] = replace(report, nonce=(report.nonce + 1) & _U32)
            self.tell(self._ours[step])

    # -- the others' ---------------------------------------------------------------------------------------------------

    def add(self, sender: bytes, report: WeightsReport) -> bool:
        """Keeps a peer's report; False if there is one. The caller admits only the epoch's clients and recent steps."""
        return self._table.add(sender, report)

    def forget_before(self, step: int) -> None:
        """Forgets what is about earlier steps."""
        self._table.forget_before(step)
        self._ours = {old: report for old, report in self._ours.items() if old >= step}
        self._asked = {old: epoch for old, epoch in self._asked.items() if old >= step}

    def clear(self) -> None:
        """An epoch begins."""
        self._table.clear()
        self._ours.clear()
        self._asked.clear()

    def electorate(self, state: Coordinator) -> Electorate:
        """Whose reports count in ``state``."""
        clients = tuple(client.id.p2p_identity for client in state.epoch_state.clients)
        if is_run_of_psyche(state):
            return Electorate(clients)
        host = self._host if self._host in clients and believes_host(state.model.checkpoint) else None
        return Electorate(clients, self.standing.voters(clients), host)

    def is_undisputed(self, step: int) -> bool:
        """Whether nothing can speak against our weights at ``step``: nobody has reported others, and there is no doubt.

        What :meth:`judge` says then, None, is known without counting votes at every report.
        """
        ours = self._ours.get(step)
        return self._doubt is None and (ours is None or self._table.is_undisputed(ours))

    def verdict(self, step: int, electorate: Electorate, *, final: bool) -> Verdict | None:
        """What the reports that have come say of ours at ``step``; None if our own is not there yet."""
        ours = self._ours.get(step)
        return None if ours is None else self._table.judge(self._me, ours, electorate, final=final)

    def judge(self, step: int, electorate: Electorate, *, final: bool) -> Finding | None:
        """What is wrong with our weights at ``step``; None if nothing is known.

        Args:
            step: of the reports.
            electorate: whose reports count.
            final: no further report on that step is waited for.
        """
        if electorate.host == self._me:
            self._doubt = None  # ours are the run's
        verdict = self.verdict(step, electorate, final=final)
        ours = self._ours.get(step)
        if verdict is None or ours is None:
            if final and self._doubt is not None and self._doubt < step:
                return Finding("results are missing, and our weights were never compared")
            return None
        if verdict.report is not None:
            tensors = differing_tensors(ours, verdict.report, self._names)
            count = len(verdict.right)
            reason = f"{count} peer{'s have' if count > 1 else ' has'} other weights at step {step}"
            return Finding(reason, verdict.right, tensors)
        if self._doubt is not None and self._doubt <= step:
            # Where no two peers agree, ours may be right by the rule: if all gave theirs up, nobody would have any.
            deciding = len(electorate.voters or electorate.clients)
            if verdict.confirmed or (final and 2 * (verdict.others + 1) > deciding):
                self._doubt = None
            elif final and verdict.others == 0:
                return Finding("results are missing, and nobody says what weights the others have")
        return None
