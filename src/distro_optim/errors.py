"""Every exception this package raises on purpose.

::

    Exception
    └── DistroError                     catch this to catch everything of ours
        ├── ConfigurationError          an argument or a setting is wrong (also a ValueError)
        │   └── ModelConfigError        no model can be made of a config.json, or not the one that the peers have
        ├── MissingDependencyError      an optional package is not installed (also an ImportError)
        ├── ModelWeightsError           weights are not there, cannot be read or written, or are not this model's
        ├── ModelTooLargeError          a model does not fit in memory (also a MemoryError)
        ├── ProtocolError               bytes or messages from a peer break the protocol
        │   ├── TruncatedError          they end too early: more bytes might complete them
        │   ├── HashMismatchError       data is not what its hash says; whoever sent it is broken or lies
        │   ├── SizeConflictError       two peers announce different sizes for one blob; one of them lies
        │   ├── InvalidResultError      a training result is what was promised, but none of this model
        │   └── LimitExceededError      they ask for more than a stated bound
        ├── CoordinatorError            the coordinator refuses an input in its present state
        ├── DataError                   training data cannot be had as they should be
        │   ├── DataUnavailableError    not now: nobody answers, in time or at all, or we are refused
        │   ├── InvalidDataError        they are there and wrong: cut, beyond the vocabulary, of another size
        │   └── OutOfDataError          they end before this index (also an IndexError)
        ├── CoordinatorLinkError        the coordinator cannot be reached, or the link to it is gone for good
        │   └── JoinRefusedError        it was reached and does not take us into the run
        ├── RunError                    a run cannot go on with us
        │   ├── RunLostError            its coordinator is gone; what was trained is still here
        │   └── ModelMismatchError      our model is not the run's; carries the first difference
        └── ExchangeError               peers could not be reached, or did not answer in time
            ├── PeerUnreachableError    no connection to the peer could be made
            ├── PeerTimeoutError        the peer did not answer in time (also a TimeoutError)
            ├── PeerRefusedError        the peer, or we, do not allow this connection
            ├── NotSharedError          the peer has not, or does not give, what it was asked for
            ├── ConnectionLostError     the connection ended under us
            ├── StreamResetError        the sender gave up this one stream; carries its code
            ├── StreamStoppedError      the receiver wants no more of this one stream; carries its code
            ├── BlobUnavailableError    no provider gave the blob; carries what each one did
            ├── StoreFullError          a blob does not fit within the store's limit
            └── NodeClosedError         our own node is closed
"""

from __future__ import annotations

from enum import Enum

from typing_extensions import override

__all__ = [
    "BlobUnavailableError",
    "ConfigurationError",
    "ConnectionLostError",
    "CoordinatorError",
    "CoordinatorErrorCode",
    "CoordinatorLinkError",
    "DataError",
    "DataUnavailableError",
    "DistroError",
    "ExchangeError",
    "HashMismatchError",
    "InvalidDataError",
    "InvalidResultError",
    "JoinRefusedError",
    "LimitExceededError",
    "MissingDependencyError",
    "ModelConfigError",
    "ModelMismatchError",
    "ModelTooLargeError",
    "ModelWeightsError",
    "NodeClosedError",
    "NotSharedError",
    "OutOfDataError",
    "PeerRefusedError",
    "PeerTimeoutError",
    "PeerUnreachableError",
    "ProtocolError",
    "RunError",
    "RunLostError",
    "SizeConflictError",
    "StoreFullError",
    "StreamResetError",
    "StreamStoppedError",
    "TruncatedError",
]


class DistroError(Exception):
    """Base class of all exceptions of :mod:`distro_optim`."""


class ConfigurationError(DistroError, ValueError):
    """An argument or a setting is wrong. The message names it, shows its value and says what to do.

    Attributes:
        name: the argument, as the caller spelled it, or None.
        value: what was given.
    """

    def __init__(self, message: str, *, name: str | None = None, value: object = None) -> None:
        super().__init__(message)
        self.name = name
        self.value = value


class ModelConfigError(ConfigurationError):
    """A ``config.json`` is not there, or no model can be made of it, or Psyche's peers would make another one of it."""


class ModelWeightsError(DistroError):
    """Weights are not there, cannot be read or written, or have other names, shapes or types than the model."""


class ModelTooLargeError(DistroError, MemoryError):
    """A model does not fit in memory.

    Attributes:
        needed: bytes.
        available: bytes, where known.
    """

    def __init__(self, message: str, *, needed: int, available: int | None = None) -> None:
        super().__init__(message)
        self.needed = needed
        self.available = available


class MissingDependencyError(DistroError, ImportError):
    """An optional package is needed for what was asked. The message holds the ``pip install`` line."""


class ProtocolError(DistroError):
    """What a peer sent breaks the protocol. The only exception a decoder of ours raises, whatever the bytes.

    Attributes:
        field: dotted path of the field being read, where known, such as ``"clients[3].id"``.
        offset: position in the input in bytes, where known.
    """

    def __init__(self, message: str, *, field: str | None = None, offset: int | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.field = field
        self.offset = offset

    @override
    def __str__(self) -> str:
        where = []
        if self.field:
            where.append(f"in {self.field}")
        if self.offset is not None:
            where.append(f"at byte {self.offset}")
        return f"{self.message} ({', '.join(where)})" if where else self.message


class TruncatedError(ProtocolError):
    """The input ends before the value does."""


class HashMismatchError(ProtocolError):
    """Data, or the hashes that should prove it, do not belong to the blob that was asked for.

    Attributes:
        at: byte of the blob from which on nothing of what the peer sent is proven.
    """

    def __init__(self, message: str, *, at: int) -> None:
        super().__init__(message)
        self.at = at


class SizeConflictError(ProtocolError):
    """A peer announces another size for a blob than the peer before. Which of them lies is not known yet."""


class InvalidResultError(ProtocolError):
    """A training result keeps its commitment and is of no use: shape, type, index or value do not fit the model."""


class LimitExceededError(ProtocolError):
    """A declared length, count or size lies above its bound; nothing was allocated for it."""


class CoordinatorErrorCode(Enum):
    """Why a coordinator refuses; the values are Psyche's names (``CoordinatorError`` in shared/coordinator)."""

    NO_ACTIVE_ROUND = "NoActiveRound"
    INVALID_WITNESS = "InvalidWitness"
    INVALID_RUN_STATE = "InvalidRunState"
    DUPLICATE_WITNESS = "DuplicateWitness"
    INVALID_HEALTH_CHECK = "InvalidHealthCheck"
    HALTED = "Halted"
    WITNESSES_FULL = "WitnessesFull"
    CANNOT_RESUME = "CannotResume"
    INVALID_WITHDRAW = "InvalidWithdraw"
    INVALID_COMMITTEE_SELECTION = "InvalidCommitteeSelection"
    INVALID_COMMITTEE_PROOF = "InvalidCommitteeProof"


class CoordinatorError(DistroError):
    """The coordinator refuses an input in its present state, which stays as it was.

    Attributes:
        code: why, in Psyche's terms.
        run_state: the phase it was in, where one is concerned.
        input: the name of what was refused, such as ``"witness"``.
    """

    def __init__(
        self, code: CoordinatorErrorCode, message: str, run_state: object = None, input: str | None = None
    ) -> None:
        super().__init__(code, message, run_state, input)
        self.code = code
        self.message = message
        self.run_state = run_state
        self.input = input

    @override
    def __str__(self) -> str:
        subject = f"{self.input} refused" if self.input else "refused"
        where = f" in state {getattr(self.run_state, 'name', self.run_state)}" if self.run_state is not None else ""
        return f"{subject}{where}: {self.code.value}: {self.message}"


class CoordinatorLinkError(DistroError):
    """The coordinator cannot be reached, does not answer in time, or the link to it is gone for good."""


class JoinRefusedError(CoordinatorLinkError):
    """The coordinator was reached and does not take us into the run.

    Attributes:
        wanted: the run that was asked for.
        hosted: the run that the coordinator has, where it said so.
    """

    def __init__(self, message: str, *, wanted: str, hosted: str | None = None) -> None:
        super().__init__(message)
        self.wanted = wanted
        self.hosted = hosted


class RunError(DistroError):
    """A run cannot go on, or not with us. Raised in the training thread; the model is as the last action left it."""


class RunLostError(RunError):
    """The coordinator of the run is gone for good. What was trained so far is in the model, and can be saved."""


class ModelMismatchError(RunError):
    """Our model, optimizer or version is not what the run has.

    Attributes:
        what: what differs first, such as ``"shape of layer.weight"``.
        ours, theirs: the two values.
    """

    def __init__(self, message: str, *, what: str, ours: object = None, theirs: object = None) -> None:
        super().__init__(message)
        self.what = what
        self.ours = ours
        self.theirs = theirs


class DataError(DistroError):
    """Training data cannot be had as they should be. The message names the file or the server, and the index."""


class DataUnavailableError(DataError):
    """Nobody gives the data now: unreachable, too slow, or they refuse us. Another attempt may fare better."""


class InvalidDataError(DataError):
    """There are data, and they are wrong: cut, not of this vocabulary, of another size than was announced. Another
    attempt gives the same."""


class OutOfDataError(DataError, IndexError):
    """The data end before an index that was asked for.

    Attributes:
        num_sequences: how many there are.
    """

    def __init__(self, message: str, *, num_sequences: int) -> None:
        super().__init__(message)
        self.num_sequences = num_sequences


class ExchangeError(DistroError):
    """An :class:`~distro_optim.comm.exchange.Exchange` could not do its work: peers gone, timeout, closed."""


class PeerUnreachableError(ExchangeError):
    """No connection to the peer could be made; the message says what was tried."""


class PeerTimeoutError(ExchangeError, TimeoutError):
    """The peer did not answer within the time the caller gave it."""


class PeerRefusedError(ExchangeError):
    """One of the two sides does not allow the connection: the peer is not on an allow-list."""


class NotSharedError(ExchangeError):
    """A peer answered, in good order, that it has not or does not give what it was asked for.

    Attributes:
        reason: name of the error in the peer's protocol, such as ``"ParameterUnknown"``.
    """

    def __init__(self, message: str, *, reason: str) -> None:
        super().__init__(message)
        self.reason = reason


class ConnectionLostError(ExchangeError):
    """The connection to a peer ended while something was still to be done on it."""


class StreamResetError(ExchangeError):
    """The sending peer gave up a stream before its end; the connection goes on.

    Attributes:
        code: the application error code the peer sent.
    """

    def __init__(self, message: str, *, code: int) -> None:
        super().__init__(message)
        self.code = code


class StreamStoppedError(ExchangeError):
    """The receiving peer wants no more of a stream; the connection goes on.

    Attributes:
        code: the application error code the peer sent.
    """

    def __init__(self, message: str, *, code: int) -> None:
        super().__init__(message)
        self.code = code


class NodeClosedError(ExchangeError):
    """The node was closed, so nothing can be sent, dialled or accepted any more."""


class BlobUnavailableError(ExchangeError):
    """No provider gave a blob.

    Attributes:
        attempts: (provider, error) in the order in which they were tried.
    """

    def __init__(self, message: str, *, attempts: tuple[tuple[str, Exception], ...] = ()) -> None:
        super().__init__(message)
        self.attempts = attempts


class StoreFullError(ExchangeError):
    """A blob does not fit within the store's limit, even after everything untagged is gone."""
