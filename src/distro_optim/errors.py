"""Every exception this package raises on purpose.

::

    Exception
    └── DistroError                     catch this to catch every error that the package raises on purpose
        ├── ConfigurationError          an argument or a setting is wrong (also a ValueError)
        │   └── ModelConfigError        no model can be built from a config.json, or a different one than the peers'
        ├── MissingDependencyError      an optional package is not installed (also an ImportError)
        ├── ModelWeightsError           weights are missing, cannot be read or written, or belong to another model
        ├── ModelTooLargeError          a model does not fit in memory (also a MemoryError)
        ├── ProtocolError               bytes or messages from a peer break the protocol
        │   ├── TruncatedError          they end too early: more bytes might complete them
        │   ├── HashMismatchError       data does not match its hash: the sender is broken or lies
        │   ├── SizeConflictError       two peers announce different sizes for one blob: one of them lies
        │   ├── InvalidResultError      a training result matches its commitment, but does not fit this model
        │   └── LimitExceededError      a length or a count is above its stated bound
        ├── CoordinatorError            the coordinator refuses an input in its present state
        ├── DataError                   training data cannot be read as they should be
        │   ├── DataUnavailableError    not now: the source does not answer, is too slow, or refuses us
        │   ├── InvalidDataError        they are there and wrong: cut, beyond the vocabulary, of another size
        │   └── OutOfDataError          they end before this index (also an IndexError)
        ├── CoordinatorLinkError        the coordinator cannot be reached, or the link to it is lost for good
        │   ├── JoinRefusedError        it was reached, and does not let us into the run
        │   └── PaymentError            the run costs fees, and the wallet cannot or may not pay any more
        ├── RunError                    this peer cannot go on in the run
        │   ├── RunLostError            the run's coordinator is gone; what was trained is still here
        │   └── ModelMismatchError      our model is not the run's; carries the first difference
        └── ExchangeError               peers could not be reached, or did not answer in time
            ├── PeerUnreachableError    no connection to the peer could be made
            ├── PeerTimeoutError        the peer did not answer in time (also a TimeoutError)
            ├── PeerRefusedError        the peer does not allow this connection, or we do not
            ├── NotSharedError          the peer does not have, or does not give, what it was asked for
            ├── ConnectionLostError     the connection ended while it was in use
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
    "PaymentError",
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
    """Base class of all exceptions of :mod:`distro_optim`; raised itself where a call comes at the wrong time.

    The message then says what to call first, such as ``optimizer.train()``.
    """


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
    """A ``config.json`` is missing, or no model can be built from it, or Psyche's peers would build a different one.

    The message names the file and the entry: correct it, or take the run's own.
    """


class ModelWeightsError(DistroError):
    """Weights are missing, cannot be read or written, or have other names, shapes or types than the model.

    The message names the file or the first tensor: give the folder or the repository that belongs to this model.
    """


class ModelTooLargeError(DistroError, MemoryError):
    """A model does not fit in memory: take a smaller one, shorter sequences, or a machine with more memory.

    Attributes:
        needed: bytes.
        available: bytes, where known, else None.
    """

    def __init__(self, message: str, *, needed: int, available: int | None = None) -> None:
        super().__init__(message)
        self.needed = needed
        self.available = available


class MissingDependencyError(DistroError, ImportError):
    """An optional package is needed and not installed. The message holds the ``pip install`` line."""


class ProtocolError(DistroError):
    """What a peer sent breaks the protocol. The only exception that our decoders raise, whatever the bytes.

    The fault is the sender's: drop the message, or the peer. If every peer's messages fail, versions differ.

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
    """The input ends before the value does. Read more bytes if there are any; otherwise the message was cut."""


class HashMismatchError(ProtocolError):
    """Data, or the hashes that should prove it, do not belong to the blob that was asked for. Ask another provider.

    Attributes:
        at: offset in the blob in bytes; nothing that the peer sent from there on is proven.
    """

    def __init__(self, message: str, *, at: int) -> None:
        super().__init__(message)
        self.at = at


class SizeConflictError(ProtocolError):
    """A peer announces another size for a blob than the peer before it. Which of them lies is not known yet.

    Fetching goes on with other providers; nothing has to be done.
    """


class InvalidResultError(ProtocolError):
    """A training result matches its commitment but is useless: a shape, type, index or value does not fit the model.

    All peers leave it out, so nothing has to be done.
    """


class LimitExceededError(ProtocolError):
    """A declared length, count or size is above its bound; nothing was allocated for it.

    Where the bound is an argument (``max_size``, ``max_results``), raise it if you expect as much.
    """


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

    A message that came too late is refused like this: wait for the next state, and send what belongs to it.

    Attributes:
        code: the reason, by Psyche's names.
        run_state: the phase it was in, where the phase matters.
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
    """The coordinator cannot be reached, does not answer in time, or the link to it is lost for good.

    Check the address or the ticket, and whether the host still runs. Temporary losses are reconnected without an error.
    """


class JoinRefusedError(CoordinatorLinkError):
    """The coordinator was reached, and does not let us into the run: another run, a full one, or a key it refuses.

    Attributes:
        wanted: the run that was asked for.
        hosted: the run that the coordinator has, where it said so, else None.
    """

    def __init__(self, message: str, *, wanted: str, hosted: str | None = None) -> None:
        super().__init__(message)
        self.wanted = wanted
        self.hosted = hosted


class PaymentError(CoordinatorLinkError):
    """A run costs fees, and the wallet is empty, or what may be spent is spent. The message says how much is needed."""


class RunError(DistroError):
    """A run cannot go on, or not with this peer.

    Raised in the training thread; the model is as the last action left it, and can be saved.
    """


class RunLostError(RunError):
    """The coordinator of the run is gone for good. What was trained so far is in the model, and can be saved.

    Join again once the host is back; ``resume=True`` goes on from the newest checkpoint. If the money for the fees has
    run out, ``__cause__`` is a :class:`PaymentError`.
    """


class ModelMismatchError(RunError):
    """Our model, optimizer or version is not the run's. All peers of a run must use the same script.

    Attributes:
        what: the first difference, such as ``"shape of layer.weight"``.
        ours, theirs: the two values.
    """

    def __init__(self, message: str, *, what: str, ours: object = None, theirs: object = None) -> None:
        super().__init__(message)
        self.what = what
        self.ours = ours
        self.theirs = theirs


class DataError(DistroError):
    """Training data cannot be read as they should be. The message names the file or the server, and the index."""


class DataUnavailableError(DataError):
    """The data are not available now: their source cannot be reached, is too slow, or refuses us. Try again later."""


class InvalidDataError(DataError):
    """The data are there and wrong: cut, not of this vocabulary, or of another size than was announced.

    Another attempt gives the same: correct the file, or the setting that the message names.
    """


class OutOfDataError(DataError, IndexError):
    """The data end before an index that was asked for: give more data, or train fewer steps.

    Attributes:
        num_sequences: how many sequences there are.
    """

    def __init__(self, message: str, *, num_sequences: int) -> None:
        super().__init__(message)
        self.num_sequences = num_sequences


class ExchangeError(DistroError):
    """An :class:`~distro_optim.comm.exchange.Exchange` could not do its work: peers are gone, late, or it is closed.

    The optimizer can still be saved; make a new exchange before the next step.
    """


class PeerUnreachableError(ExchangeError):
    """No connection to the peer could be made; the message says what was tried. It may be offline, or behind a NAT."""


class PeerTimeoutError(ExchangeError, TimeoutError):
    """The peer did not answer within the time that the caller gave it. Try again, or another peer."""


class PeerRefusedError(ExchangeError):
    """One side does not allow the connection, because the other one is not on its allow-list. Add its key there."""


class NotSharedError(ExchangeError):
    """A peer answered that it does not have, or does not give, what it was asked for. Ask another peer, or later.

    Attributes:
        reason: name of the error in the peer's protocol, such as ``"ParameterUnknown"``.
    """

    def __init__(self, message: str, *, reason: str) -> None:
        super().__init__(message)
        self.reason = reason


class ConnectionLostError(ExchangeError):
    """The connection to a peer ended while it was in use. Another attempt makes a new one."""


class StreamResetError(ExchangeError):
    """The sending peer gave up a stream before its end; the connection stays open.

    Attributes:
        code: the application error code that the peer sent.
    """

    def __init__(self, message: str, *, code: int) -> None:
        super().__init__(message)
        self.code = code


class StreamStoppedError(ExchangeError):
    """The receiving peer wants no more of a stream; the connection stays open.

    Attributes:
        code: the application error code that the peer sent.
    """

    def __init__(self, message: str, *, code: int) -> None:
        super().__init__(message)
        self.code = code


class NodeClosedError(ExchangeError):
    """Our own node was closed, so nothing can be sent, dialled or accepted any more. Make a new one."""


class BlobUnavailableError(ExchangeError):
    """No provider gave a blob. Ask again with more providers, or once one of them is back.

    Attributes:
        attempts: ``(provider, error)`` in the order in which they were tried.
    """

    def __init__(self, message: str, *, attempts: tuple[tuple[str, Exception], ...] = ()) -> None:
        super().__init__(message)
        self.attempts = attempts


class StoreFullError(ExchangeError):
    """A blob does not fit within the store's limit, even after everything untagged was dropped.

    Raise the limit, or remove tags that are no longer needed.
    """
