"""BLAKE3 chaining values of chunks, chunk groups and parents: the hash tree below the plain hash.

The ``blake3`` package hashes whole inputs only; a verified stream also needs the 32-byte chaining value (CV) of every
inner node. Blobs cut their tree at 16 KiB: a *chunk group* is 16 chunks of 1024 bytes, the last one shorter.

Source: the BLAKE3 paper, section 2, and BLAKE3-team/BLAKE3 ``reference_impl``; the cut at 16 KiB is iroh-blobs'
``IROH_BLOCK_SIZE``. Many chunks are hashed in lock-step, one numpy lane each; ``tests/reference/plain_blake3.py`` is
the plain twin.
"""

from __future__ import annotations

from typing import Final, TypeAlias

import numpy as np
import numpy.typing as npt
from blake3 import blake3

__all__ = [
    "CHUNK_LEN",
    "GROUP_CHUNKS",
    "GROUP_LEN",
    "HASH_LEN",
    "LANES",
    "PAIR_LEN",
    "Buffer",
    "chunk_count",
    "chunk_cvs",
    "fold_cvs",
    "group_count",
    "group_cvs",
    "pair_up",
    "parent_cv",
    "parent_cvs",
    "root_hash",
    "subtree_cv",
]

Buffer: TypeAlias = bytes | bytearray | memoryview
_U32: TypeAlias = npt.NDArray[np.uint32]
_U8: TypeAlias = npt.NDArray[np.uint8]

CHUNK_LEN: Final = 1024
GROUP_CHUNKS: Final = 16
GROUP_LEN: Final = CHUNK_LEN * GROUP_CHUNKS
HASH_LEN: Final = 32
PAIR_LEN: Final = 2 * HASH_LEN
"""The CVs of two children, left then right: what stands for an inner node on the wire."""

_BLOCK_LEN: Final = 64
_BLOCKS: Final = CHUNK_LEN // _BLOCK_LEN
_CHUNK_START: Final = 1
_CHUNK_END: Final = 2
_PARENT: Final = 4
_ROOT: Final = 8
_IV: Final = (
    0x6A09E667,
    0xBB67AE85,
    0x3C6EF372,
    0xA54FF53A,
    0x510E527F,
    0x9B05688C,
    0x1F83D9AB,
    0x5BE0CD19,
)
_PERMUTATION: Final = (2, 6, 3, 10, 7, 0, 4, 13, 1, 11, 12, 5, 9, 14, 15, 8)
_ROUNDS: Final = 7
_MASK: Final = 0xFFFFFFFF

LANES: Final = 4096
"""Chunks hashed in lock-step. 4096 keep the working set near 8 MiB; 16384 would be a fifth faster (measured)."""


def _schedules() -> list[list[int]]:
    """For each round, which message word stands at each of the 16 places."""
    schedule = [list(range(16))]
    for _ in range(_ROUNDS - 1):
        schedule.append([schedule[-1][p] for p in _PERMUTATION])
    return schedule


_SCHEDULES: Final = _schedules()
# Message words of the four column (diagonal) mixings of a round: first operands, second operands.
_COLUMN_X: Final = [np.array(s[0:8:2]) for s in _SCHEDULES]
_COLUMN_Y: Final = [np.array(s[1:8:2]) for s in _SCHEDULES]
_DIAGONAL_X: Final = [np.array(s[8:16:2]) for s in _SCHEDULES]
_DIAGONAL_Y: Final = [np.array(s[9:16:2]) for s in _SCHEDULES]
_IV_COLUMN: Final = np.array(_IV, dtype=np.uint32)[:, None]
_SHIFT: Final = [np.uint32(n) for n in range(32)]


def chunk_count(size: int) -> int:
    """Chunks in ``size`` bytes; the empty blob has one, empty, chunk."""
    return max(1, -(-size // CHUNK_LEN))


def group_count(size: int) -> int:
    """Chunk groups in ``size`` bytes; the empty blob has one, empty, group."""
    return max(1, -(-size // GROUP_LEN))


class _Lanes:
    """The compression function on ``n`` blocks side by side; every temporary is allocated once."""

    def __init__(self, n: int) -> None:
        self.state: _U32 = np.empty((16, n), np.uint32)
        self._rows = tuple(self.state[i : i + 4] for i in (0, 4, 8, 12))
        self._turned: tuple[_U32, ...] = tuple(np.empty((4, n), np.uint32) for _ in range(3))
        self._scratch: _U32 = np.empty((4, n), np.uint32)
        self._words: _U32 = np.empty((4, n), np.uint32)

    def compress(self, cv: _U32, message: _U32, counter: _U32 | int, block_len: int, flags: int) -> None:
        """Replaces ``cv`` (8, n) by the compression of ``message`` (16, n); ``counter`` (n,) or one number for all."""
        state = self.state
        state[:8] = cv
        state[8:12] = _IV_COLUMN[:4]
        # Chunk indices above 2^32 (blobs of 4 TiB) would need the high word; no such blob fits in memory here.
        state[12] = counter
        state[13] = 0
        state[14] = block_len
        state[15] = flags
        a, b, c, d = self._rows
        b2, c2, d2 = self._turned
        for r in range(_ROUNDS):
            self._mix(a, b, c, d, message, _COLUMN_X[r], _COLUMN_Y[r])
            # Rows b, c, d turn by one, two, three places, so that diagonals become columns, and back afterwards.
            b2[:3], b2[3] = b[1:], b[0]
            c2[:2], c2[2:] = c[2:], c[:2]
            d2[0], d2[1:] = d[3], d[:3]
            self._mix(a, b2, c2, d2, message, _DIAGONAL_X[r], _DIAGONAL_Y[r])
            b[1:], b[0] = b2[:3], b2[3]
            c[2:], c[:2] = c2[:2], c2[2:]
            d[3], d[:3] = d2[0], d2[1:]
        np.bitwise_xor(state[:8], state[8:], out=cv)

    def _mix(
        self, a: _U32, b: _U32, c: _U32, d: _U32, message: _U32, x: npt.NDArray[np.int_], y: npt.NDArray[np.int_]
    ) -> None:
        """The G function on four columns at once; ``x`` and ``y`` name the message words of each column."""
        words, scratch = self._words, self._scratch
        for index, first, second in ((x, 16, 12), (y, 8, 7)):
            np.add(a, b, out=a)
            # mode="clip" lets numpy write into `out` without a copy; the indices are in range by construction.
            np.take(message, index, axis=0, out=words, mode="clip")
            np.add(a, words, out=a)
            np.bitwise_xor(d, a, out=d)
            _rotate_right(d, first, scratch)
            np.add(c, d, out=c)
            np.bitwise_xor(b, c, out=b)
            _rotate_right(b, second, scratch)


def _rotate_right(x: _U32, bits: int, scratch: _U32) -> None:
    np.right_shift(x, _SHIFT[bits], out=scratch)
    np.left_shift(x, _SHIFT[32 - bits], out=x)
    np.bitwise_or(x, scratch, out=x)


def _compress_one(cv: tuple[int, ...], block: bytes, counter: int, block_len: int, flags: int) -> tuple[int, ...]:
    """The compression function on one block. For a handful of blocks plain integers beat numpy's call overhead."""
    m = [int.from_bytes(block[i : i + 4], "little") for i in range(0, _BLOCK_LEN, 4)]
    v = [*cv, *_IV[:4], counter & _MASK, counter >> 32, block_len, flags]
    for s in _SCHEDULES:
        for i, (a, b, c, d) in enumerate(_LANES_OF_ROUND):
            x = (v[a] + v[b] + m[s[2 * i]]) & _MASK
            t = v[d] ^ x
            t = (t >> 16 | t << 16) & _MASK
            z = (v[c] + t) & _MASK
            y = v[b] ^ z
            y = (y >> 12 | y << 20) & _MASK
            v[a] = x = (x + y + m[s[2 * i + 1]]) & _MASK
            t ^= x
            v[d] = t = (t >> 8 | t << 24) & _MASK
            v[c] = z = (z + t) & _MASK
            y ^= z
            v[b] = (y >> 7 | y << 25) & _MASK
    return tuple(v[i] ^ v[i + 8] for i in range(8))


_LANES_OF_ROUND: Final = (
    (0, 4, 8, 12),
    (1, 5, 9, 13),
    (2, 6, 10, 14),
    (3, 7, 11, 15),
    (0, 5, 10, 15),
    (1, 6, 11, 12),
    (2, 7, 8, 13),
    (3, 4, 9, 14),
)
"""The state words that each of the eight mixings of a round works on: four columns, then four diagonals."""


def _words_to_bytes(words: tuple[int, ...]) -> bytes:
    return b"".join(word.to_bytes(4, "little") for word in words)


def _last_chunk_cv(data: Buffer, index: int) -> bytes:
    """CV of one chunk of at most 1024 bytes that stands at chunk ``index`` of its blob."""
    cv: tuple[int, ...] = _IV
    last = max(0, len(data) - 1) // _BLOCK_LEN
    for i in range(last + 1):
        block = bytes(data[i * _BLOCK_LEN : (i + 1) * _BLOCK_LEN])
        flags = (_CHUNK_START if i == 0 else 0) | (_CHUNK_END if i == last else 0)
        cv = _compress_one(cv, block.ljust(_BLOCK_LEN, b"\0"), index, len(block), flags)
    return _words_to_bytes(cv)


def chunk_cvs(data: Buffer, start: int = 0) -> _U8:
    """CVs of the chunks of ``data``, which begins at chunk ``start`` of its blob; only the last may be short.

    Returns:
        (chunks, 32) uint8; one row for empty data.
    """
    full = len(data) // CHUNK_LEN
    words = np.frombuffer(data, dtype="<u4", count=full * CHUNK_LEN // 4).reshape(full, _BLOCKS, 16)
    cvs = np.empty((chunk_count(len(data)), HASH_LEN // 4), np.uint32)
    for first in range(0, full, LANES):
        n = min(LANES, full - first)
        # (chunk, block, word) -> (block, word, chunk): each word becomes a contiguous row of lanes.
        blocks = np.ascontiguousarray(words[first : first + n].transpose(1, 2, 0), dtype=np.uint32)
        counter = np.arange(start + first, start + first + n, dtype=np.uint64).astype(np.uint32)
        cv: _U32 = np.repeat(_IV_COLUMN, n, axis=1)
        lanes = _Lanes(n)
        for i in range(_BLOCKS):
            flags = (_CHUNK_START if i == 0 else 0) | (_CHUNK_END if i == _BLOCKS - 1 else 0)
            lanes.compress(cv, blocks[i], counter, _BLOCK_LEN, flags)
        cvs[first : first + n] = cv.T
    rows: _U8 = cvs.astype("<u4", copy=False).view(np.uint8).reshape(-1, HASH_LEN)
    if full < len(cvs):
        rows[full] = np.frombuffer(_last_chunk_cv(data[full * CHUNK_LEN :], start + full), np.uint8)
    return rows


def parent_cvs(pairs: _U8) -> _U8:
    """Non-root CVs of inner nodes: (n, 64) uint8 pairs of child CVs -> (n, 32) uint8."""
    n = len(pairs)
    if n <= 2:  # below that, plain integers are quicker
        rows = [parent_cv(pair.tobytes()) for pair in pairs]
        return np.frombuffer(b"".join(rows), np.uint8).reshape(n, HASH_LEN)
    message = np.ascontiguousarray(np.ascontiguousarray(pairs).view("<u4").T, dtype=np.uint32)
    cv: _U32 = np.repeat(_IV_COLUMN, n, axis=1)
    _Lanes(n).compress(cv, message, 0, _BLOCK_LEN, _PARENT)
    return np.ascontiguousarray(cv.T).astype("<u4", copy=False).view(np.uint8)


def parent_cv(pair: Buffer, *, is_root: bool = False) -> bytes:
    """CV of one inner node from the 64 bytes of its children; with ``is_root`` the hash of the blob."""
    flags = _PARENT | _ROOT if is_root else _PARENT
    return _words_to_bytes(_compress_one(_IV, bytes(pair), 0, _BLOCK_LEN, flags))


def pair_up(cvs: _U8) -> _U8:
    """One level up the tree: neighbours become parents, an odd last node moves up unchanged."""
    n = len(cvs)
    parents = parent_cvs(cvs[: n - n % 2].reshape(-1, PAIR_LEN))
    return parents if n % 2 == 0 else np.concatenate((parents, cvs[-1:]))


def fold_cvs(cvs: _U8) -> bytes:
    """Non-root CV over a run of sibling nodes of one level (the last may be smaller): (n, 32) uint8 -> 32 bytes."""
    while len(cvs) > 1:
        cvs = pair_up(cvs)
    return bytes(cvs[0].tobytes())


def group_cvs(data: Buffer, start: int = 0) -> _U8:
    """Non-root CVs of the chunk groups of ``data``, which begins at chunk ``start``, a multiple of 16.

    Returns:
        (groups, 32) uint8.
    """
    cvs = chunk_cvs(data, start)
    full = len(data) // GROUP_LEN
    nodes = cvs[: full * GROUP_CHUNKS]
    while len(nodes) > full:
        nodes = parent_cvs(nodes.reshape(-1, PAIR_LEN))
    if full == group_count(len(data)):
        return nodes
    last = np.frombuffer(fold_cvs(cvs[full * GROUP_CHUNKS :]), np.uint8).reshape(1, HASH_LEN)
    return np.concatenate((nodes, last))


def subtree_cv(data: Buffer, start: int, *, is_root: bool = False) -> bytes:
    """CV of the subtree over ``data``, which begins at chunk ``start``; with ``is_root`` the hash of the blob."""
    return root_hash(data) if is_root else fold_cvs(chunk_cvs(data, start))


def root_hash(data: Buffer) -> bytes:
    """The BLAKE3 hash of a whole blob: its name in the network."""
    return blake3(data).digest()
