"""A peer's momentum, bound to one hash before anybody knows which part of it will be asked for.

The momentum is cut into its tiles, in the order of the plan, and every four tiles of a shape are a leaf. A leaf's
digest is BLAKE3 over its number and its elements; the digests are the items of a Merkle tree (:mod:`.merkle`). Since
the number goes into the digest, a leaf cannot be shown in another one's place. The root travels in a
:class:`MomentumCommitment`.

A :class:`Snapshot` is made after a step has generated its update. From then until the next one the momentum rests, so
another thread may make it beside the next forward and backward pass: copying and hashing let go of the interpreter. It
is as large as the momentum, and has to be kept for as long as questions about it may come: three steps. Copying is
done when it has been made; the tree is hashed when it is first asked for.

Four tiles, and not more, because an opening holds whole leaves: of a model of 124 million parameters, in tiles of 64 x
64, a leaf has 64 KiB, and 16 of them before and after a step have 2 MiB.
"""

from __future__ import annotations

import bisect
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Final

import numpy as np
import torch
from blake3 import blake3
from torch import Tensor

from ..buffer import Reader, Writer
from ..compress import TilePlan
from ..compress.plan import Batch
from ..errors import ConfigurationError, ProtocolError
from .merkle import MerkleTree, leaf_hash, node_hash

__all__ = ["TILES_PER_LEAF", "Leaves", "MomentumCommitment", "Snapshot", "leaf_digest", "leaves_of", "root_from"]

TILES_PER_LEAF: Final = 4

_LEAF: Final = b"distro-optim momentum leaf 1"
_VERSION: Final = 1

_HEAD: Final = 16 << 10
"""Bytes of a leaf, its name included, that are hashed first. BLAKE3 takes as many chunks of 1,024 bytes side by side as
there are before them: after a name of 32 bytes alone it would begin with single ones."""

Bytes = bytes | bytearray | memoryview


@dataclass(frozen=True)
class Leaves:
    """The leaves of a plan; made by :func:`leaves_of`.

    Attributes:
        first: of each batch of the plan, and one past the last leaf of all.
        elements_before: elements of all leaves before each one, and of all.
    """

    plan: TilePlan
    first: tuple[int, ...]
    elements_before: tuple[int, ...]

    def __len__(self) -> int:
        return self.first[-1]

    @property
    def depth(self) -> int:
        """Siblings on the way from a leaf to the root."""
        return max(0, len(self) - 1).bit_length()

    def place(self, number: int) -> tuple[int, int, int]:
        """The number of its batch, and its tiles ``[start, stop)`` there."""
        batch = bisect.bisect_right(self.first, number) - 1
        start = (number - self.first[batch]) * TILES_PER_LEAF
        return batch, start, min(start + TILES_PER_LEAF, self.plan.batches[batch].tiles)

    def size(self, number: int) -> int:
        """Bytes of a leaf."""
        batch = self.plan.batches[self.place(number)[0]]
        return (self.elements_before[number + 1] - self.elements_before[number]) * batch.compute_dtype.itemsize

    def holding(self, element: int) -> int:
        """The leaf in which an element is, counted through all leaves."""
        return bisect.bisect_right(self.elements_before, element) - 1


def leaves_of(plan: TilePlan) -> Leaves:
    """How the momentum of a plan is cut; computed once for a plan."""
    return plan.derived(_leaves_of)


def _leaves_of(plan: TilePlan) -> Leaves:
    first, before = [0], [0]
    for batch in plan.batches:
        for start in range(0, batch.tiles, TILES_PER_LEAF):
            before.append(before[-1] + min(TILES_PER_LEAF, batch.tiles - start) * batch.tile_size)
        first.append(len(before) - 1)
    return Leaves(plan, tuple(first), tuple(before))


@dataclass(frozen=True)
class MomentumCommitment:
    """What a trainer says of its momentum after a step, to be sent signed. A fixed number of bytes.

    Attributes:
        step: after whose update; that before the first one for a trainer that has just come.
        layout: of the plan, 32 bytes.
        root: 32 bytes.
    """

    step: int
    layout: bytes
    root: bytes

    def encode(self) -> bytes:
        """A version, the step as four bytes, little endian, and the two hashes."""
        writer = Writer()
        writer.push_u8(_VERSION)
        writer.push_u32(self.step)
        writer.push_bytes(self.layout)
        writer.push_bytes(self.root)
        return writer.finish()

    @classmethod
    def decode(cls, data: Bytes) -> MomentumCommitment:
        """The inverse.

        Raises:
            ProtocolError: it is none, or of another version.
        """
        reader = Reader(data)
        if reader.pull_u8() != _VERSION:
            raise ProtocolError("a commitment to a momentum of another version", offset=0)
        commitment = cls(reader.pull_u32(), bytes(reader.pull_bytes(32)), bytes(reader.pull_bytes(32)))
        reader.expect_end()
        return commitment


class Snapshot:
    """The momentum of one moment and its tree.

    Args:
        plan: of the optimizer.
        momenta: one per tensor, shaped as it (``delta``, with ``overlap=True``); read, and not changed.
        in_place_of: an older snapshot of the same plan about which nobody can ask any more; it is overwritten, which
            takes half the time that new memory takes.

    Raises:
        ConfigurationError: they are not those of the plan.

    Attributes:
        tiles: ``(tiles, h, w)`` for each batch of the plan, on the CPU.
    """

    def __init__(self, plan: TilePlan, momenta: Sequence[Tensor], *, in_place_of: Snapshot | None = None) -> None:
        if [tuple(m.shape) for m in momenta] != [spec.shape for spec in plan.specs]:
            raise ConfigurationError("these momenta do not have the shapes of the plan's tensors", name="momenta")
        self.plan = plan
        with torch.no_grad():
            momenta = [momentum.detach().to("cpu").contiguous() for momentum in momenta]
            older = in_place_of is not None and in_place_of.plan is plan
            self.tiles: tuple[Tensor, ...] = in_place_of.tiles if older and in_place_of is not None else _room(plan)
            for batch, tiles in zip(plan.batches, self.tiles, strict=True):
                _fill(batch, tiles, momenta)

    @cached_property
    def _tree(self) -> MerkleTree:
        digests: list[bytes] = []
        for batch, tiles in zip(self.plan.batches, self.tiles, strict=True):
            data, size = _bytes_of(tiles), TILES_PER_LEAF * batch.tile_size * tiles.element_size()
            for start in range(0, len(data), size):
                digests.append(leaf_digest(len(digests), data[start : start + size]))
        return MerkleTree(digests)

    @property
    def root(self) -> bytes:
        """Of the tree."""
        root = self._tree.root
        return bytes(32) if root is None else root

    def commitment(self, step: int) -> MomentumCommitment:
        """To be sent, for the momentum after ``step``."""
        return MomentumCommitment(step, self.plan.layout, self.root)

    def leaf(self, number: int) -> memoryview:
        """The elements of a leaf as bytes, of the order of this machine (little endian on all that torch supports)."""
        batch, start, stop = leaves_of(self.plan).place(number)
        return _bytes_of(self.tiles[batch][start:stop])

    @torch.no_grad()
    def signs(self) -> list[Tensor]:
        """Of the momentum, one per tensor and shaped as it, int8: -1, 0 or 1."""
        found = [torch.zeros(spec.shape, dtype=torch.int8) for spec in self.plan.specs]
        for batch, tiles in zip(self.plan.batches, self.tiles, strict=True):
            for block in batch.blocks:
                signs = tiles[block.start : block.stop].sign().to(torch.int8)
                for piece in block.pieces:
                    for region in piece.regions:
                        region.of_tensor(found[piece.param]).copy_(region.of_block(signs))
        return found

    def path(self, number: int) -> tuple[bytes, ...]:
        """The siblings on the way from a leaf to the root."""
        proof = self._tree.prove(number)
        if proof is None:
            raise ConfigurationError(f"there is no leaf {number}", name="number", value=number)
        return tuple(step.left_sibling or step.right_sibling or b"" for step in proof.steps)


def _room(plan: TilePlan) -> tuple[Tensor, ...]:
    return tuple(torch.empty(b.tiles, b.h, b.w, dtype=b.compute_dtype) for b in plan.batches)


def _fill(batch: Batch, out: Tensor, momenta: Sequence[Tensor]) -> None:
    """The tiles of a batch, ``(tiles, h, w)``, with 0 beyond the edges of tensors, of tensors on the CPU."""
    for block in batch.blocks:
        tiles = out[block.start : block.stop]
        for piece in block.pieces:
            if piece.partial:
                tiles[piece.block_start : piece.block_stop] = 0
            for region in piece.regions:
                # By numpy, which shares nothing out among threads: those of torch are busy with the next step.
                np.copyto(region.of_block(tiles).numpy(), region.of_tensor(momenta[piece.param]).numpy())


def _bytes_of(tiles: Tensor) -> memoryview:
    """The memory of tiles on the CPU, which is not copied."""
    elements: Any = tiles.numpy()
    return memoryview(elements).cast("B")


def leaf_digest(number: int, data: Bytes) -> bytes:
    """32 bytes over a leaf and its place."""
    data = memoryview(data)
    name = _LEAF + number.to_bytes(4, "little")
    head = _HEAD - len(name)
    digest = blake3(b"".join((name, data[:head])))
    digest.update(data[head:])
    return digest.digest()


def root_from(digest: bytes, number: int, path: Sequence[bytes]) -> bytes:
    """The root to which a leaf's digest leads along its siblings; each is of 32 bytes."""
    node = leaf_hash(digest)
    for sibling in path:
        node = node_hash(sibling, node) if number % 2 else node_hash(node, sibling)
        number //= 2
    return node
