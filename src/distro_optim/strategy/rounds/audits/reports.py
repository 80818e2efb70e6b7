"""What an auditor found in one result by test 1, in numbers, signed. Travels where Psyche's clients do not listen.

A report says what was counted and nothing more: whoever has the weights and the data of the step can count again, and
what follows from the numbers everybody computes alike (:mod:`.book`). The auditor's own result of the same step stands
beside the audited one, with the two batches changed round: that is how an honest result looks like at these weights.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Final

from blake3 import blake3

from ....comm import postcard
from ....comm.postcard import U16, U32, Bytes32, Bytes64
from ....comm.signing import SecretKey, is_signed_by
from ....errors import ProtocolError
from ....verify.recompute import Evidence
from ....verify.sequential import siding

__all__ = ["MARK", "MAX_BYTES", "AuditReport", "Compared", "decode_report", "encode_report", "is_report"]

MARK: Final = b"\xff\xff\xff\xff\x01"
"""Before a report on the channel of peers of our own kind. No report on weights begins so: its first number would be
larger than an epoch can be. The last byte is a version."""

MAX_BYTES: Final = 512
"""Of a report with its mark; one with the largest numbers has some 250."""

_DOMAIN: Final = b"distro-optim audit report 1\0"
_LARGEST: Final = 0xFFFF_FFFF


@dataclass(frozen=True)
class Compared:
    """A result beside the gradients of its batch and of another one; counts of coefficients.

    Attributes:
        agree, total: signs that agree with the gradient of its batch, of those that could be compared.
        control_agree, control_total: the same with the other batch.
        only_assigned, only_control: agree with one of the two and not with the other.
        sent, expected: in the result, and in a whole one.
    """

    agree: U32
    total: U32
    control_agree: U32
    control_total: U32
    only_assigned: U32
    only_control: U32
    sent: U32
    expected: U32

    @classmethod
    def of(cls, evidence: Evidence) -> Compared:
        """What test 1 has found. Counts beyond 32 bits, of models that nobody has, are cut off."""
        counts = (
            evidence.assigned.agree,
            evidence.assigned.total,
            evidence.control.agree,
            evidence.control.total,
            evidence.only_assigned,
            evidence.only_control,
            evidence.sent,
            evidence.expected,
        )
        return cls(*(min(count, _LARGEST) for count in counts))

    @property
    def share(self) -> float | None:
        """Of the signs that agree with the gradient of its batch, 0 to 1; None if none could be compared."""
        return self.agree / self.total if self.total else None

    @property
    def siding(self) -> float | None:
        """See :func:`~distro_optim.verify.sequential.siding`."""
        return siding(self.only_assigned, self.only_control, sent=self.sent, expected=self.expected)

    def check(self) -> None:
        """Raises :class:`~distro_optim.errors.ProtocolError` if numbers contradict each other."""
        if self.agree > self.total or self.control_agree > self.control_total:
            raise ProtocolError("a report of an audit has more signs that agree than signs")
        if self.only_assigned > self.agree or self.only_control > self.control_agree:
            raise ProtocolError("a report of an audit has more signs that agree with one batch alone than with it")
        if self.total > self.sent or self.control_total > self.sent:
            raise ProtocolError("a report of an audit compares more coefficients than were sent")


@dataclass(frozen=True)
class AuditReport:
    """One auditor about one result.

    Attributes:
        epoch, step: of the result.
        trainer: public key of who sent it.
        found: in it.
        own: in the auditor's own result of the step; None if there is none.
        signature: of the auditor, over all of the above and the run's name.
        nonce: counts repetitions.
    """

    epoch: U16
    step: U32
    trainer: Bytes32
    found: Compared
    own: Compared | None
    signature: Bytes64 = bytes(64)
    nonce: U32 = 0

    def signed(self, key: SecretKey, run_id: str) -> AuditReport:
        """The same, signed."""
        return replace(self, signature=key.sign(self._to_sign(run_id)))

    def is_signed_by(self, auditor: bytes, run_id: str) -> bool:
        """Whether it is the word of the owner of this public key, about this run."""
        return is_signed_by(auditor, self._to_sign(run_id), self.signature)

    def again(self) -> AuditReport:
        """The same, as a new message."""
        return replace(self, nonce=(self.nonce + 1) & _LARGEST)

    def _to_sign(self, run_id: str) -> bytes:
        body = postcard.encode(replace(self, signature=bytes(64), nonce=0))
        return _DOMAIN + blake3(run_id.encode()).digest() + body


def is_report(data: bytes) -> bool:
    """Whether a message on the channel of our own kind is one of these."""
    return data.startswith(MARK)


def encode_report(report: AuditReport) -> bytes:
    """The message."""
    return MARK + postcard.encode(report)


def decode_report(data: bytes) -> AuditReport:
    """The inverse.

    Raises:
        ProtocolError: it is none, or its numbers contradict each other.
    """
    if not is_report(data) or len(data) > MAX_BYTES:
        raise ProtocolError(f"a report of an audit begins with {MARK.hex()} and has at most {MAX_BYTES} bytes")
    report = postcard.decode(AuditReport, data[len(MARK) :])
    report.found.check()
    if report.own is not None:
        report.own.check()
    return report
