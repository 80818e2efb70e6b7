"""BLAKE3 and the verified-stream encoding written for reading: one block at a time, recursion as in the paper.

The twin of ``distro_optim.comm.iroh.blobs.tree``, ``.outboard`` and ``.encoder``. Slow on purpose.
"""

from __future__ import annotations

import struct

IV = [0x6A09E667, 0xBB67AE85, 0x3C6EF372, 0xA54FF53A, 0x510E527F, 0x9B05688C, 0x1F83D9AB, 0x5BE0CD19]
PERMUTATION = [2, 6, 3, 10, 7, 0, 4, 13, 1, 11, 12, 5, 9, 14, 15, 8]
CHUNK_START, CHUNK_END, PARENT, ROOT = 1, 2, 4, 8


def rotate_right(x: int, n: int) -> int:
    return (x >> n | x << (32 - n)) & 0xFFFFFFFF


def mix(v: list[int], a: int, b: int, c: int, d: int, x: int, y: int) -> None:
    v[a] = (v[a] + v[b] + x) & 0xFFFFFFFF
    v[d] = rotate_right(v[d] ^ v[a], 16)
    v[c] = (v[c] + v[d]) & 0xFFFFFFFF
    v[b] = rotate_right(v[b] ^ v[c], 12)
    v[a] = (v[a] + v[b] + y) & 0xFFFFFFFF
    v[d] = rotate_right(v[d] ^ v[a], 8)
    v[c] = (v[c] + v[d]) & 0xFFFFFFFF
    v[b] = rotate_right(v[b] ^ v[c], 7)


def compress(cv: list[int], block: bytes, counter: int, flags: int) -> list[int]:
    m = list(struct.unpack("<16I", block.ljust(64, b"\0")))
    v = [*cv, *IV[:4], counter & 0xFFFFFFFF, counter >> 32, len(block), flags]
    for round_number in range(7):
        mix(v, 0, 4, 8, 12, m[0], m[1])
        mix(v, 1, 5, 9, 13, m[2], m[3])
        mix(v, 2, 6, 10, 14, m[4], m[5])
        mix(v, 3, 7, 11, 15, m[6], m[7])
        mix(v, 0, 5, 10, 15, m[8], m[9])
        mix(v, 1, 6, 11, 12, m[10], m[11])
        mix(v, 2, 7, 8, 13, m[12], m[13])
        mix(v, 3, 4, 9, 14, m[14], m[15])
        if round_number < 6:
            m = [m[p] for p in PERMUTATION]
    return [v[i] ^ v[i + 8] for i in range(8)]


def chunk_cv(chunk: bytes, index: int, root: int = 0) -> bytes:
    blocks = [chunk[i : i + 64] for i in range(0, len(chunk), 64)] or [b""]
    cv = IV
    for i, block in enumerate(blocks):
        flags = (CHUNK_START if i == 0 else 0) | (CHUNK_END | root if i == len(blocks) - 1 else 0)
        cv = compress(cv, block, index, flags)
    return struct.pack("<8I", *cv)


def parent_cv(left: bytes, right: bytes, root: int = 0) -> bytes:
    return struct.pack("<8I", *compress(IV, left + right, 0, PARENT | root))


def left_len(size: int) -> int:
    """Bytes on the left of a node: the largest power of two of chunks that leaves something on the right."""
    chunks = 1
    while chunks * 2 * 1024 < size:
        chunks *= 2
    return chunks * 1024


def subtree_cv(data: bytes, start: int = 0, root: int = 0) -> bytes:
    if len(data) <= 1024:
        return chunk_cv(data, start, root)
    cut = left_len(len(data))
    return parent_cv(subtree_cv(data[:cut], start), subtree_cv(data[cut:], start + cut // 1024), root)


def blake3(data: bytes) -> bytes:
    return subtree_cv(data, root=ROOT)


def selected(boundaries: tuple[int, ...], chunk: int) -> bool:
    return sum(b <= chunk for b in boundaries) % 2 == 1


def encode(data: bytes, boundaries: tuple[int, ...]) -> bytes:
    """The response for these boundaries: a node is sent whole from group level down, else by its children."""
    last = max(0, (len(data) - 1) // 1024)
    chosen = [selected(boundaries, c) for c in range(last + 1)]
    if any(b > last for b in boundaries[::2]):
        # A span that begins behind the end means the last chunk.
        chosen[last] = True

    def node(start: int, piece: bytes) -> bytes:
        wanted = chosen[start : start + max(1, -(-len(piece) // 1024))]
        if not any(wanted):
            return b""
        if len(piece) <= 1024 or (len(piece) <= 16384 and all(wanted)):
            return piece
        cut = left_len(len(piece))
        left, right = piece[:cut], piece[cut:]
        middle = start + cut // 1024
        pair = subtree_cv(left, start) + subtree_cv(right, middle)
        return pair + node(start, left) + node(middle, right)

    return struct.pack("<Q", len(data)) + node(0, data)
