"""Merkle trees over SHA-256, as a witness commits to everything it received in a round.

Format: PsycheFoundation/psyche, ``shared/core/src/merkle_tree.rs`` (after Solana's ``merkle-tree`` crate).
A leaf is ``sha256(00 || item)``, an inner node ``sha256(01 || left || right)``; the prefixes keep an inner node from
passing for a leaf. The last node of a level of odd length is paired with itself.

What a root catches: the peer that published it cannot claim another list later. What it misses: Psyche's clients hash
in order of arrival, so two honest witnesses differ, and roots of different peers cannot be compared.
Pairing a node with itself also means that a list and the same list with its last item repeated can share a root.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Final

from ..errors import ProtocolError

__all__ = ["EMPTY_ROOT", "HASH_SIZE", "MerkleProof", "MerkleTree", "ProofStep", "leaf_hash", "merkle_root", "node_hash"]

HASH_SIZE: Final = 32

EMPTY_ROOT: Final = bytes(HASH_SIZE)
"""What clients put where there was nothing to hash."""

MAX_PROOF_STEPS: Final = 64
"""A longer path would belong to more than 2**64 leaves."""

_LEAF_PREFIX: Final = b"\x00"
_NODE_PREFIX: Final = b"\x01"

Bytes = bytes | bytearray | memoryview


def leaf_hash(item: Bytes) -> bytes:
    """``sha256(00 || item)``, 32 bytes."""
    digest = hashlib.sha256(_LEAF_PREFIX)
    digest.update(item)
    return digest.digest()


def node_hash(left: bytes, right: bytes) -> bytes:
    """``sha256(01 || left || right)``, 32 bytes, of two hashes of 32 bytes."""
    return hashlib.sha256(_NODE_PREFIX + left + right).digest()


def merkle_root(items: Iterable[Bytes]) -> bytes:
    """Root over the items, 32 zero bytes for none."""
    level = [leaf_hash(item) for item in items]
    while len(level) > 1:
        level = _next_level(level)
    return level[0] if level else EMPTY_ROOT


@dataclass(frozen=True)
class ProofStep:
    """One level of a path: the parent's hash and the one sibling that is needed to compute it.

    Raises:
        ProtocolError: neither or both siblings are given, or a hash does not have 32 bytes.
    """

    target: bytes
    left_sibling: bytes | None = None
    right_sibling: bytes | None = None

    def __post_init__(self) -> None:
        if (self.left_sibling is None) == (self.right_sibling is None):
            raise ProtocolError("a step of a Merkle proof has exactly one sibling")
        for digest in (self.target, self.left_sibling, self.right_sibling):
            if digest is not None and len(digest) != HASH_SIZE:
                raise ProtocolError(f"a hash in a Merkle proof has {HASH_SIZE} bytes, got {len(digest)}")


@dataclass(frozen=True)
class MerkleProof:
    """A path from a leaf to the root.

    Raises:
        ProtocolError: the path has more steps than any tree.
    """

    steps: tuple[ProofStep, ...]

    def __post_init__(self) -> None:
        if len(self.steps) > MAX_PROOF_STEPS:
            raise ProtocolError(f"a Merkle proof has at most {MAX_PROOF_STEPS} steps, got {len(self.steps)}")

    @property
    def root(self) -> bytes | None:
        """Where the path claims to end; None without steps, where the leaf itself is the root."""
        return self.steps[-1].target if self.steps else None

    def is_consistent(self, leaf: bytes) -> bool:
        """Whether the path hashes up from ``leaf`` to its own claimed root (``Proof::verify`` of Psyche).

        A path that its sender made up is consistent too, and one without steps always is:
        use :meth:`verify` with a root that you trust.
        """
        node = leaf
        for step in self.steps:
            if step.left_sibling is not None:
                node = node_hash(step.left_sibling, node)
            elif step.right_sibling is not None:
                node = node_hash(node, step.right_sibling)
            if node != step.target:
                return False
        return True

    def verify(self, item: Bytes, root: bytes) -> bool:
        """Whether ``item`` is a leaf of the tree with this root."""
        leaf = leaf_hash(item)
        return self.is_consistent(leaf) and (self.root or leaf) == root


class MerkleTree:
    """All nodes of the tree over ``items``, to prove any of them."""

    __slots__ = ("_levels",)

    def __init__(self, items: Sequence[Bytes]) -> None:
        level = [leaf_hash(item) for item in items]
        self._levels = [level]
        while len(level) > 1:
            level = _next_level(level)
            self._levels.append(level)

    def __len__(self) -> int:
        """Number of leaves."""
        return len(self._levels[0])

    @property
    def root(self) -> bytes | None:
        """None for a tree without leaves."""
        return self._levels[-1][0] if self._levels[0] else None

    def prove(self, index: int) -> MerkleProof | None:
        """The path of leaf ``index``; None past the end."""
        if not 0 <= index < len(self):
            return None
        steps = []
        for level, above in zip(self._levels, self._levels[1:], strict=False):
            target = above[index // 2]
            if index % 2:
                steps.append(ProofStep(target, left_sibling=level[index - 1]))
            else:
                steps.append(ProofStep(target, right_sibling=level[min(index + 1, len(level) - 1)]))
            index //= 2
        return MerkleProof(tuple(steps))


def _next_level(level: list[bytes]) -> list[bytes]:
    last = len(level) - 1
    return [node_hash(level[i], level[min(i + 1, last)]) for i in range(0, len(level), 2)]
