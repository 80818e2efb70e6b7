"""One batch of a step's first half: gradients into the momentum, and the largest coefficients out of it.

The momentum is kept in one of two forms. In weight space, shaped as the parameter (``delta``), where Psyche's lookahead
needs its sign, or where tiles reach beyond their tensor; what is sent leaves it as ``k`` rank-one updates per tile
(:meth:`~distro_optim.compress.dct.Transform.decode_sparse`). Or as the coefficients of its tiles, ``(tiles, h, w)``:
the transform is linear, so that momentum can be gathered there as well, and what is sent leaves it by being set to 0.
That saves a sixth of a step.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, Self

import torch
from torch import Tensor

from .dct import Transform
from .plan import Batch, Block
from .topk import select_topk
from .windows import descend, gather, load, store, store_sum, windows_of

__all__ = ["SPARSE_DECODE_LIMIT", "Extraction", "OwnPart", "joined"]

SPARSE_DECODE_LIMIT: Final = 48
"""Up to this many coefficients per tile, summing basis functions one by one is faster than a dense inverse transform:
measured crossover on 64 x 64 tiles between 32 and 64."""


@dataclass(frozen=True)
class OwnPart:
    """What a peer itself sent of one tensor in the round before, unquantised.

    Attributes:
        index: ``(tiles, k) int32``.
        value: ``(tiles, k)`` of the compute dtype; all 0 where nothing was sent.
    """

    index: Tensor
    value: Tensor


@dataclass(frozen=True)
class WholeBatch:
    """What an accelerator does for all blocks of a batch together, since each operation is a launch.

    Attributes:
        index, value: of :class:`OwnPart`, of all tensors one after the other.
        sent: ``(tiles, k)`` of the compute dtype: what is sent now, unquantised.
    """

    index: Tensor
    value: Tensor
    sent: Tensor

    @classmethod
    def of(cls, batch: Batch, own: Sequence[OwnPart]) -> Self:
        """Of a batch, before its first block."""
        index = joined([own[number].index for number in batch.ranges], dim=0)
        value = joined([own[number].value for number in batch.ranges], dim=0)
        return cls(index, value, torch.empty_like(value))


@dataclass(frozen=True)
class Extraction:
    """:meth:`Engine.extract` for one batch.

    Attributes:
        momenta: one per tensor, as coefficients where ``in_coefficients``.
        rate: of learning.
        keep: the decay.
        step: parameters and their learning rate, if they take what is sent at once.
        index_out, value_out: ``(tiles, k)``: what is sent.
        spoken_out: ``(tiles,) bool``: where it is not all 0; only set for signs.
        whole: what is done for all blocks together, before the first one and in :meth:`end`; None: nothing.
    """

    batch: Batch
    transform: Transform
    in_coefficients: bool
    grads: Sequence[Tensor | None]
    momenta: Sequence[Tensor]
    rate: float
    keep: float
    own: Sequence[OwnPart] | None
    step: tuple[Sequence[Tensor], float] | None
    index_out: Tensor
    value_out: Tensor
    spoken_out: Tensor
    whole: WholeBatch | None = None

    @property
    def takes_long_blocks(self) -> bool:
        """Whether :meth:`extract` takes blocks longer than those of the batch, and no scratch memory."""
        return False

    def extract(self, block: Block, tiles: Tensor, coefficients: Tensor, spare: Tensor) -> None:
        """All stages for one block, whose rows of the outputs it fills; the scratch memory is ``(n, h, w)``."""
        stages = self._in_coefficients if self.in_coefficients else self._in_weights
        index, sent = stages(block, tiles, coefficients, spare)
        rows = slice(block.start, block.stop)
        self.index_out[rows].copy_(index)
        if self.whole is None:
            self._send(rows, sent, [(p.param, slice(p.start, p.stop), p.block_start) for p in block.pieces])
        elif sent.data_ptr() != self.whole.sent[rows].data_ptr():
            self.whole.sent[rows].copy_(sent)

    def end(self) -> None:
        """After the last block."""
        if self.whole is not None:
            everything = slice(0, self.batch.tiles)
            tensors = [(n, slice(0, stop - start), start) for n, (start, stop) in self.batch.ranges.items()]
            self._send(everything, self.whole.sent, tensors)

    def _send(self, rows: slice, sent: Tensor, parts: Sequence[tuple[int, slice, int]]) -> None:
        """Fills rows of the outputs, but for the indices, which are there, and keeps what is sent.

        Args:
            rows: of the batch.
            sent: the values in these rows.
            parts: of tensors that are in them: which, which of its own tiles, and where in these rows they begin.
        """
        if self.value_out.dtype == torch.bool:
            torch.any(sent, dim=1, out=self.spoken_out[rows])
            torch.signbit(sent, out=self.value_out[rows])
        else:
            self.value_out[rows].copy_(sent)
        if self.own is None:
            return
        index = self.index_out[rows]
        silent: list[Tensor] = []
        indices: tuple[list[Tensor], list[Tensor]] = [], []
        values: tuple[list[Tensor], list[Tensor]] = [], []
        for number, here, start in parts:
            part, there = self.own[number], slice(start, start + here.stop - here.start)
            if self.grads[number] is None:
                silent.append(part.value[here])
                continue
            for (kept, new), ours, what in ((indices, part.index, index), (values, part.value, sent)):
                kept.append(ours[here])
                new.append(what[there])
        if silent:
            torch._foreach_zero_(silent)
        if values[0]:
            torch._foreach_copy_(*indices)
            torch._foreach_copy_(*values)

    def _in_weights(self, block: Block, tiles: Tensor, coefficients: Tensor, spare: Tensor) -> tuple[Tensor, Tensor]:
        """Returns index and value of what is sent, both ``(n, k)``.

        Tiles hold momentum divided by the decay: then one pass reads both momentum and gradient, and the pass that
        writes it back multiplies.
        """
        sent_before = None if self.own is None else self._decode_own(block, self.own, coefficients, spare)
        runs_first = self.batch.profile.runs_first
        load(
            block,
            self.grads,
            self.momenta,
            tiles,
            spare,
            self.rate / self.keep,
            minus=sent_before,
            runs_first=runs_first,
        )
        if self.own is not None:
            store(block, tiles, self.grads, self.momenta, self.keep, runs_first=runs_first)
        self.transform.encode([tiles], out=coefficients, scratch=spare)
        index, value = self._select(coefficients, spare)
        out = None if self.whole is None else self.whole.sent[block.start : block.stop]
        sent = self._rounded(torch.mul(value, self.keep, out=out))
        if self.own is None:
            leaving = self._decode(index, -sent, coefficients, spare)
            store_sum(block, leaving, tiles, self.grads, self.momenta, self.keep)
            self._descend(block, leaving)
        return index, sent

    def _in_coefficients(
        self, block: Block, tiles: Tensor, coefficients: Tensor, spare: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Returns index and value of what is sent, both ``(n, k)``."""
        present = [
            (p, self.momenta[p.param][p.start : p.stop]) for p in block.pieces if self.grads[p.param] is not None
        ]
        self.transform.encode(self._gradient_tiles(block, tiles), out=coefficients, scratch=spare, scale=self.rate)
        # Where the block is a run of one tensor, its momentum is worked on where it lies.
        held = present[0][1] if len(present) == len(block.pieces) == 1 else coefficients
        for p, momentum in present:
            part = coefficients[p.block_start : p.block_stop]
            torch.add(part, momentum, alpha=self.keep, out=part if held is coefficients else held)
        index, value = self._select(held, spare)
        sent = self._rounded(value)
        left = torch.zeros_like(value) if sent is value else value - sent
        held.flatten(1).scatter_(1, index, left)
        if held is coefficients:
            for p, momentum in present:
                momentum.copy_(coefficients[p.block_start : p.block_stop])
        if self.step is not None:
            self._descend(block, self._decode(index, -sent, coefficients, spare))
        return index, sent

    def _select(self, coefficients: Tensor, spare: Tensor) -> tuple[Tensor, Tensor]:
        """Index and value of the largest coefficients, both ``(n, k)``."""
        return select_topk(coefficients.flatten(1), self.batch.k, scratch=spare.flatten(1), profile=self.batch.profile)

    def _gradient_tiles(self, block: Block, tiles: Tensor) -> list[Tensor]:
        """Where the gradients of a block lie, or ``tiles``, filled with them."""
        grads = [self.grads[p.param] for p in block.pieces]
        if self.transform.takes_views and all(g is not None and g.dtype == tiles.dtype for g in grads):
            return list(windows_of(block, self.grads))
        gather(block, self.grads, tiles)
        return [tiles]

    def _rounded(self, value: Tensor) -> Tensor:
        """The values as they are sent: in the dtype of the tensors, unless signs are sent."""
        if self.value_out.dtype == torch.bool or self.batch.value_dtype == self.batch.compute_dtype:
            return value
        limit = torch.finfo(self.batch.value_dtype).max  # float16 ends at 65504: no coefficient becomes inf
        return value.clamp(-limit, limit).to(self.batch.value_dtype).to(self.batch.compute_dtype)

    def _descend(self, block: Block, leaving: Tensor) -> None:
        """What leaves the momentum, negated, is the whole update of a peer that is alone."""
        if self.step is not None:
            params, rate = self.step
            descend(block, leaving.sign_(), params, -rate, self.grads, runs_first=self.batch.profile.runs_first)

    def _decode(self, index: Tensor, value: Tensor, coefficients: Tensor, spare: Tensor) -> Tensor:
        """Tiles of one contributor's coefficients, in ``coefficients``; overwrites ``spare`` too."""
        if index.shape[1] <= SPARSE_DECODE_LIMIT or self.batch.h == 1:
            return self.transform.decode_sparse(index, value, out=coefficients)
        coefficients.zero_().view(len(index), -1).scatter_(1, index.long(), value)
        # The first of the two products has read all coefficients when the second one overwrites them.
        return self.transform.decode(coefficients, out=coefficients, scratch=spare)

    def _decode_own(self, block: Block, own: Sequence[OwnPart], coefficients: Tensor, spare: Tensor) -> Tensor:
        """What was sent in the round before, as tiles, in ``coefficients``."""
        if self.whole is not None:
            rows = slice(block.start, block.stop)
            return self._decode(self.whole.index[rows], self.whole.value[rows], coefficients, spare)
        index = joined([own[p.param].index[p.start : p.stop] for p in block.pieces], dim=0)
        value = joined([own[p.param].value[p.start : p.stop] for p in block.pieces], dim=0)
        return self._decode(index, value, coefficients, spare)


def joined(parts: list[Tensor], dim: int) -> Tensor:
    """The parts side by side along ``dim``; their shapes may differ there only. A single one is returned as it is."""
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim)
