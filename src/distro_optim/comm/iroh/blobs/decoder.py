"""From the bytes of a response to proven data: nothing leaves here that the blob's hash does not vouch for.

Pairs are compared with the CV that their parent's pair (in the end, the blob's hash) names for them; data with the CV
of its leaf. Checks are gathered for up to a span (1 MiB) because both pairs and data are much cheaper to hash in
company; if a span fails, its items are checked one by one to find, and blame, the first bad one. A span that is there
as a whole is not even taken apart into items, see :mod:`.span`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Final, NamedTuple

import numpy as np

from ....errors import HashMismatchError, LimitExceededError, ProtocolError, SizeConflictError, TruncatedError
from .encoder import SIZE_LEN
from .outboard import MutableBuffer, zeroed_outboard
from .prefix import SPAN_LEN, PrefixVerifier
from .ranges import ChunkRanges
from .span import SPAN_PAIRS, SPAN_WIRE_LEN, expected_in_span, split_span
from .tree import (
    CHUNK_LEN,
    GROUP_CHUNKS,
    GROUP_LEN,
    HASH_LEN,
    PAIR_LEN,
    Buffer,
    group_cvs,
    parent_cv,
    parent_cvs,
    subtree_cv,
)
from .walk import Item, Leaf, Parent, walk

__all__ = ["Decoder", "Piece"]

_MAX_BATCH_ITEMS: Final = 4096
"""Items gathered before a check, for requests that pick so sparsely that a span never fills. Chosen arbitrarily."""


class Piece(NamedTuple):
    """A stretch of proven data: ``data`` stands at byte ``offset`` of the blob."""

    offset: int
    data: memoryview


class _Entry(NamedTuple):
    """An item as it arrived, and the CV it must have."""

    item: Item
    data: memoryview
    expected: bytes


class Decoder:
    """Takes one blob's response as it arrives.

    Args:
        root: the blob's hash, 32 bytes.
        ranges: what was asked for.
        max_size: largest size header to accept, in bytes. The header is a stranger's word until the last chunk is
            proven; it decides about the outboard's allocation (0.4 % of it) and nothing else.
        prefix: the proven beginning, if there is one: what arrives may continue it.
        new_outboard: makes room for the outboard of a blob of so many bytes; called if there is no ``prefix``.
    """

    def __init__(
        self,
        root: bytes,
        ranges: ChunkRanges,
        *,
        max_size: int,
        prefix: PrefixVerifier | None = None,
        new_outboard: Callable[[int], MutableBuffer] = zeroed_outboard,
    ) -> None:
        self._root = root
        self._ranges = ranges
        self._max_size = max_size
        self._known = prefix
        self._new_outboard = new_outboard
        # What has arrived and could not be taken yet: pieces, their length together, the length to wait for.
        self._rest: list[Buffer] = []
        self._rest_len = 0
        self._wanted = SIZE_LEN
        self._body: _Body | None = None
        # Spans are whole where all is asked for from some chunk on.
        self._by_item = len(ranges.boundaries) != 1

    @property
    def prefix(self) -> PrefixVerifier | None:
        """The proven beginning; None until the size header arrived, unless one was given."""
        return self._body.prefix if self._body is not None else self._known

    @property
    def is_complete(self) -> bool:
        """Whether everything asked for arrived and was proven."""
        return self._body.is_complete if self._body is not None else not self._ranges

    def receive(self, data: Buffer) -> Iterator[Piece]:
        """Takes bytes off the stream and yields what they prove; iterate to the end.

        Raises:
            LimitExceededError: the size is above ``max_size``.
            HashMismatchError: an item is not what the blob's hash demands. What was proven before it was yielded.
            SizeConflictError: the size is not the one that the prefix has.
            ProtocolError: bytes behind the end.
        """
        self._rest.append(bytes(data))
        self._rest_len += len(data)
        if self._rest_len < self._wanted and not self.is_complete:
            return
        view = memoryview(self._rest[0] if len(self._rest) == 1 else b"".join(self._rest))
        at = 0
        if self._body is None and not self.is_complete:
            self._body = self._begin(int.from_bytes(view[:SIZE_LEN], "little"))
            at = SIZE_LEN
        body = self._body
        while body is not None and (item := body.next) is not None:
            slot = None if self._by_item else body.slot_of_span(item)
            self._wanted = SPAN_WIRE_LEN if slot is not None else item.size if isinstance(item, Leaf) else PAIR_LEN
            if at + self._wanted > len(view):
                break
            if slot is not None:
                pieces = body.take_span(slot, view[at : at + self._wanted])
                if pieces is None:
                    # Item by item, to find and blame the first bad one.
                    self._by_item = True
                    continue
                yield from pieces
            else:
                body.take(item, view[at : at + self._wanted])
                if body.is_batch_full():
                    yield from body.check_batch()
            at += self._wanted
        self._rest, self._rest_len = [view[at:]], len(view) - at
        if self._rest_len and (body is None or body.next is None):
            raise ProtocolError(f"{self._rest_len} bytes follow the end of a response")

    def finish(self) -> Iterator[Piece]:
        """The stream ended, here or too early: yields what the last bytes prove; iterate to the end.

        Raises:
            HashMismatchError: as :meth:`receive`.
            TruncatedError: something is missing.
        """
        if self._body is not None:
            # What was held back for the rest of a span.
            self._by_item, self._wanted = True, 0
            yield from self.receive(b"")
            yield from self._body.check_batch()
        if not self.is_complete:
            raise TruncatedError("a response ended before all that was asked for had arrived")

    def _begin(self, size: int) -> _Body:
        if size > self._max_size:
            raise LimitExceededError(f"a blob of {size} bytes is announced, at most {self._max_size} are allowed")
        prefix = self._known
        if prefix is None:
            prefix = PrefixVerifier(self._root, size, self._new_outboard(size))
        elif prefix.size != size:
            raise SizeConflictError(f"a blob that began with {prefix.size} bytes is announced to have {size}")
        return _Body(self._root, self._ranges, prefix)


class _Body:
    """What follows the size header: items in the order of the walk, gathered and checked.

    Attributes:
        prefix: the proven beginning.
        next: the item that comes next; None behind the last one.
        is_complete: whether all items arrived and were proven.
    """

    def __init__(self, root: bytes, ranges: ChunkRanges, prefix: PrefixVerifier) -> None:
        self.prefix = prefix
        self.is_complete = False
        self._root = root
        self._items = walk(prefix.size, ranges)
        self.next: Item | None = next(self._items, None)
        self._expected = [root]
        self._batch: list[_Entry] = []
        self._batch_len = 0
        # The chunk from which on all are asked for.
        self._whole_from = ranges.boundaries[0] if len(ranges.boundaries) == 1 else None

    def take(self, item: Item, data: memoryview) -> None:
        """Gathers an item, to be checked with others."""
        self._batch.append(_Entry(item, data, self._expected.pop()))
        if isinstance(item, Parent):
            if item.has_right:
                self._expected.append(data[HASH_LEN:].tobytes())
            if item.has_left:
                self._expected.append(data[:HASH_LEN].tobytes())
        else:
            self._batch_len += item.size
        self.next = next(self._items, None)

    def slot_of_span(self, item: Item) -> int | None:
        """Where the pairs of a whole span belong, if one begins with ``item`` and continues the proven beginning."""
        if item.size != SPAN_LEN or item.is_root or self._batch_len or self._whole_from is None:
            return None
        continues = item.start >= self._whole_from and item.start * CHUNK_LEN == self.prefix.length
        return item.slot if continues and isinstance(item, Parent) else None

    def take_span(self, slot: int, view: memoryview) -> tuple[Piece] | None:
        """Checks a span, with the pairs that came before it. Its data, or None and nothing changed if it is bad."""
        above, offset = self._batch, self.prefix.length
        pairs, data = split_span(view)
        if not self._pairs_hold(above, pairs, self._expected[-1] + expected_in_span(pairs)):
            return None
        for entry in above:
            self._keep_pair(entry)
        self.prefix.outboard[slot * PAIR_LEN : (slot + SPAN_PAIRS) * PAIR_LEN] = pairs
        if not (self.prefix.can_extend_to(offset + SPAN_LEN) and self.prefix.extend(data)):
            return None
        self._batch = []
        self._expected.pop()
        try:
            self.next = self._items.send(True)
        except StopIteration:
            self.next, self.is_complete = None, True
        return (Piece(offset, memoryview(data)),)

    def is_batch_full(self) -> bool:
        """Whether what was gathered is to be checked now."""
        item = self._batch[-1].item
        return (
            self.next is None
            or self._batch_len >= SPAN_LEN
            or len(self._batch) >= _MAX_BATCH_ITEMS
            or (isinstance(item, Leaf) and (item.start * CHUNK_LEN + item.size) % SPAN_LEN == 0)
        )

    def check_batch(self) -> Iterator[Piece]:
        """Checks what was gathered, and yields its data.

        Raises:
            HashMismatchError: an item is not what the blob's hash demands.
        """
        batch, self._batch, self._batch_len = self._batch, [], 0
        if not batch:
            return
        leaves = [entry for entry in batch if isinstance(entry.item, Leaf)]
        stretch: memoryview | None = None
        if self._pairs_hold([entry for entry in batch if isinstance(entry.item, Parent)]):
            for entry in batch:
                self._keep_pair(entry)
            if leaves:
                stretch = self._continue_prefix(leaves)
                if stretch is None and not self._leaves_hold(leaves):
                    yield from self._find_first_bad(batch)
        else:
            yield from self._find_first_bad(batch)
        if self.next is None:
            self.is_complete = True
        if stretch is not None:
            yield Piece(leaves[0].item.start * CHUNK_LEN, stretch)
            return
        for entry in leaves:
            yield Piece(entry.item.start * CHUNK_LEN, entry.data)

    def _pairs_hold(self, entries: list[_Entry], more: bytes = b"", expected: bytes = b"") -> bool:
        """Whether the pairs of ``entries`` have the CVs they must have, and those in ``more`` the ``expected`` ones."""
        if entries and entries[0].item.start == 0 and _is_root(entries[0].item):
            if parent_cv(entries[0].data, is_root=True) != entries[0].expected:
                return False
            entries = entries[1:]
        if not entries and not more:
            return True
        joined = b"".join([*(entry.data for entry in entries), more])
        pairs = np.frombuffer(joined, np.uint8).reshape(-1, PAIR_LEN)
        return parent_cvs(pairs).tobytes() == b"".join([*(entry.expected for entry in entries), expected])

    def _keep_pair(self, entry: _Entry) -> None:
        if isinstance(entry.item, Parent) and entry.item.slot is not None:
            at = entry.item.slot * PAIR_LEN
            self.prefix.outboard[at : at + PAIR_LEN] = entry.data

    def _continue_prefix(self, leaves: list[_Entry]) -> memoryview | None:
        """The leaves' data in one piece, if they are whole groups that continue the proven beginning and prove right.

        In one piece although that is a copy: the hasher lets go of the interpreter lock for each buffer it is given,
        and beside a thread that computes in Python it waits for the lock after each.
        """
        stop = self.prefix.length
        for entry in leaves:
            if entry.item.start * CHUNK_LEN != stop or not self._is_group(entry.item):
                return None
            stop += entry.item.size
        if not self.prefix.can_extend_to(stop):
            return None
        stretch = leaves[0].data if len(leaves) == 1 else memoryview(b"".join(entry.data for entry in leaves))
        return stretch if self.prefix.extend(stretch) else None

    def _is_group(self, item: Item) -> bool:
        aligned = item.start % GROUP_CHUNKS == 0
        return aligned and (item.size == GROUP_LEN or item.start * CHUNK_LEN + item.size == self.prefix.size)

    def _leaves_hold(self, leaves: list[_Entry]) -> bool:
        """Compares leaves by their own CVs, runs of whole groups at once."""
        at = 0
        while at < len(leaves):
            stop = at
            while stop < len(leaves) and self._follows(leaves, at, stop):
                stop += 1
            if stop > at:
                run = leaves[at:stop]
                cvs = group_cvs(b"".join(entry.data for entry in run), run[0].item.start)
                if cvs.tobytes() != b"".join(entry.expected for entry in run):
                    return False
            elif not _holds(leaves[at]):
                return False
            for entry in leaves[at : max(stop, at + 1)]:
                self._extend_prefix(entry)
            at = max(stop, at + 1)
        return True

    def _follows(self, leaves: list[_Entry], first: int, index: int) -> bool:
        item = leaves[index].item
        contiguous = item.start == leaves[first].item.start + (index - first) * GROUP_CHUNKS
        return contiguous and self._is_group(item) and not _is_root(item)

    def _extend_prefix(self, entry: _Entry) -> None:
        """A leaf proven by its CV may still continue the beginning."""
        if entry.item.start * CHUNK_LEN == self.prefix.length and self._is_group(entry.item):
            self.prefix.append_proven(entry.data)

    def _find_first_bad(self, batch: list[_Entry]) -> Iterator[Piece]:
        """Walks a batch that does not hold up to the item to blame; yields the data before it."""
        for entry in batch:
            offset = entry.item.start * CHUNK_LEN
            if not _holds(entry):
                what = "data" if isinstance(entry.item, Leaf) else "a hash pair"
                raise HashMismatchError(f"{what} at byte {offset} of blob {self._root.hex()} is not genuine", at=offset)
            self._keep_pair(entry)
            if isinstance(entry.item, Leaf):
                if offset >= self.prefix.length:
                    self._extend_prefix(entry)
                yield Piece(offset, entry.data)


def _is_root(item: Item) -> bool:
    return item.is_root


def _holds(entry: _Entry) -> bool:
    if isinstance(entry.item, Parent):
        return parent_cv(entry.data, is_root=entry.item.is_root) == entry.expected
    return subtree_cv(entry.data, entry.item.start, is_root=entry.item.is_root) == entry.expected
