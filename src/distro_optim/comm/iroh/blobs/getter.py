"""A getter without I/O: one stream to one provider, and a download that goes from provider to provider.

What a provider sends proves itself or is thrown away, so providers need no trust: a download tries them in order,
keeps what was proven when one fails, and asks the next only for the rest.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Sequence
from enum import Enum
from typing import Final, Generic, TypeVar

from ....errors import BlobUnavailableError, SizeConflictError, TruncatedError
from .decoder import Decoder, Piece
from .outboard import MutableBuffer, zeroed_outboard
from .prefix import PrefixVerifier
from .ranges import ALL, LAST_CHUNK, ChunkRanges
from .request import GetRequest, push_request
from .tree import CHUNK_LEN, GROUP_LEN, Buffer

__all__ = ["Attempt", "Download", "Purpose", "missing_ranges"]

P = TypeVar("P", bound=Hashable)

MAX_SIZE_PROOFS: Final = 1
"""How often one provider is asked to prove its size in one download."""


class Purpose(Enum):
    """Why a provider is asked."""

    DATA = "the blob, or what is missing of it"
    SIZE_PROOF = "the last chunk, because its size differs from that of an earlier provider"


def missing_ranges(prefix: PrefixVerifier | None) -> ChunkRanges:
    """The chunks behind a proven beginning. Of a blob that ends in mid-group the beginning is whole groups."""
    if prefix is None:
        return ALL
    return ChunkRanges.span(prefix.length // GROUP_LEN * (GROUP_LEN // CHUNK_LEN))


class Attempt(Generic[P]):
    """One request to one provider.

    Feed it what arrives: :meth:`receive` for bytes, :meth:`receive_end` when the stream ends in whatever way. Iterate
    both to their ends and store what they yield.

    Attributes:
        provider: whom to ask.
        request: what to write before closing our direction of the stream.
        purpose: if it is not DATA, the pieces are not to be stored.
        was_silent: set when the connection to the provider did not answer, which says nothing about the provider: it
            is asked once more, over another one.
    """

    def __init__(self, provider: P, purpose: Purpose, request: bytes, decoder: Decoder) -> None:
        self.provider = provider
        self.purpose = purpose
        self.request = request
        self._decoder = decoder
        self.received = 0
        self.was_silent = False

    @property
    def is_complete(self) -> bool:
        """Whether everything asked for arrived and was proven; the stream's end need not be waited for."""
        return self._decoder.is_complete

    @property
    def prefix(self) -> PrefixVerifier | None:
        """The proven beginning, see :class:`~.decoder.Decoder`."""
        return self._decoder.prefix

    def receive(self, data: Buffer) -> Iterator[Piece]:
        """Raises ProtocolError (mostly HashMismatchError): have nothing more to do with this provider's stream."""
        self.received += len(data)
        return self._decoder.receive(data)

    def receive_end(self) -> Iterator[Piece]:
        """Raises TruncatedError if something is missing: the provider has not got it, or the connection was cut."""
        return self._decoder.finish()


class Download(Generic[P]):
    """The plan of a download: whom to ask next, and for what.

    ::

        while (attempt := download.next_attempt()) is not None:
            ...  # dial, write attempt.request, feed what arrives, append pieces to the partial blob
            download.ended(attempt, error)  # None if all went well
        download.raise_if_failed()

    Args:
        root: the blob's hash, 32 bytes.
        providers: whom to ask, best first.
        max_size: largest size to accept, in bytes.
        prefix: what is already there.
        new_outboard: see :class:`~.decoder.Decoder`.

    Attributes:
        prefix: the proven beginning so far.
        must_discard: set when what was stored is worth nothing: drop it, outboard included, then unset this.
        failures: (provider, error) of the attempts that failed.
    """

    def __init__(
        self,
        root: bytes,
        providers: Sequence[P],
        *,
        max_size: int,
        prefix: PrefixVerifier | None = None,
        new_outboard: Callable[[int], MutableBuffer] = zeroed_outboard,
    ) -> None:
        self.root = root
        self.prefix = prefix
        self.must_discard = False
        self.failures: list[tuple[P, Exception]] = []
        self._max_size = max_size
        self._new_outboard = new_outboard
        self._queue: list[tuple[P, Purpose]] = [(provider, Purpose.DATA) for provider in reversed(providers)]
        self._size_proofs: dict[P, int] = {}
        self._asked_again: set[P] = set()

    @property
    def is_complete(self) -> bool:
        """Whether the whole blob is proven."""
        return self.prefix is not None and self.prefix.is_complete

    def next_attempt(self) -> Attempt[P] | None:
        """Whom to ask for what; None when the blob is complete or nobody is left."""
        if self.is_complete or not self._queue:
            return None
        provider, purpose = self._queue.pop()
        if purpose is Purpose.SIZE_PROOF:
            ranges, decoder = LAST_CHUNK, Decoder(self.root, LAST_CHUNK, max_size=self._max_size)
        else:
            ranges = missing_ranges(self.prefix)
            decoder = Decoder(
                self.root, ranges, max_size=self._max_size, prefix=self.prefix, new_outboard=self._new_outboard
            )
        return Attempt(provider, purpose, push_request(GetRequest.blob(self.root, ranges)), decoder)

    def ended(self, attempt: Attempt[P], error: Exception | None) -> None:
        """Takes note of how an attempt went: None, or what it failed with."""
        provider = attempt.provider
        if attempt.purpose is Purpose.SIZE_PROOF:
            ours, proven = self.prefix, attempt.prefix
            if error is None and attempt.is_complete and ours and proven and ours.size != proven.size:
                # This provider's size is right, so what we have came from a liar's tree: start again, with this one.
                self.prefix = None
                self.must_discard = True
                self._queue.append((provider, Purpose.DATA))
            else:
                self._note(provider, error)
            return
        self.prefix = attempt.prefix
        if self.prefix is not None and self.prefix.length == 0 and not self.is_complete:
            # Nothing but somebody's word for the size: not worth a conflict with the next one's.
            self.prefix = None
            self.must_discard = True
        if isinstance(error, SizeConflictError) and self._size_proofs.get(provider, 0) < MAX_SIZE_PROOFS:
            self._size_proofs[provider] = self._size_proofs.get(provider, 0) + 1
            self._queue.append((provider, Purpose.SIZE_PROOF))
        elif attempt.was_silent and not self.is_complete and provider not in self._asked_again:
            self._asked_again.add(provider)
            self._queue.append((provider, Purpose.DATA))
        elif not self.is_complete:
            self._note(provider, error)

    def raise_if_failed(self) -> None:
        """Raises BlobUnavailableError, with what each provider did, unless the blob is complete."""
        if self.is_complete:
            return
        attempts = tuple((_name(provider), error) for provider, error in self.failures)
        told = "; ".join(f"{name}: {error}" for name, error in attempts) or "there was nobody to ask"
        raise BlobUnavailableError(f"blob {self.root.hex()} could not be fetched: {told}", attempts=attempts)

    def _note(self, provider: P, error: Exception | None) -> None:
        self.failures.append((provider, error or TruncatedError("the provider's answer is not complete")))


def _name(provider: Hashable) -> str:
    """A provider as text; endpoint ids are bytes."""
    return provider.hex() if isinstance(provider, bytes) else str(provider)
