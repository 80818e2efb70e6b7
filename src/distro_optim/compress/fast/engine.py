"""The two halves of a step by compiled kernels: for tiles of up to 64 x 64, float32 weights on a CPU, and ``exact-1``.

Other tiles, and blocks with tensors of other kinds, are left to the classes that these are derived from. The weights
get the same bits either way. The momentum, which is a peer's own, gets the same numbers but for rounding.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from typing_extensions import override

from ..dct import DCT, Transform, dct_basis
from ..exact import ExactMerge
from ..exact.definition import VALUE_BITS, integer_basis, mean_of_signs
from ..extraction import Extraction
from ..merging import Ahead
from ..plan import Batch, Block
from ..update import CompressedUpdate
from .loading import kernel, setting

__all__ = [
    "FastExtraction",
    "FastMerge",
    "can_look",
    "can_shift",
    "has_kernels",
    "shift_part",
    "squares_of_part",
]

_SIDE: Final = 64
"""Longest side of the tiles that kernels are made for: the default of ``compression_chunk``."""

_SHORTEST: Final = 16
"""Side: they work in arrays of 64 x 64, of which a small tile leaves most empty."""

_PITCH: Final = 80
"""From row to row of a basis; the kernels' :data:`~distro_optim.compress.fast.decoding.PITCH`."""

_MOST_CHOSEN: Final = 128
"""Coefficients of a tile: with more of them, half of the groups by which they are searched would be chosen."""

_FEWEST_TILES: Final = 64
"""In a batch. Below a quarter of a million weights, loading numba takes longer than some hundred steps."""


_NO_VALUES: Final = np.zeros((0, 1), np.float32)
_NO_SIGNS: Final = np.zeros((0, 1), np.bool_)


def has_kernels(batch: Batch, transform: Transform, name: str) -> bool:
    """Whether the kernel ``name`` is for this batch, wanted and there; loads it."""
    said = setting()
    return (
        said != "0"
        and (batch.tiles_of_all >= _FEWEST_TILES or said == "1")
        and min(batch.h, batch.w) >= _SHORTEST
        and max(batch.h, batch.w) <= _SIDE
        and batch.k <= _MOST_CHOSEN
        and batch.profile.by_threads
        and batch.value_dtype == batch.compute_dtype == torch.float32
        and isinstance(transform, DCT)
        and kernel(name) is not None
    )


def _padded(basis: npt.NDArray[Any], dtype: npt.DTypeLike) -> npt.NDArray[Any]:
    """Of a basis, row = position, column = frequency, the transpose in ``(64, _PITCH)``, 0 beyond it."""
    size = len(basis)
    rows: npt.NDArray[Any] = np.zeros((_SIDE, _PITCH), dtype)
    rows[:size, :size] = basis.T
    return rows


@lru_cache(maxsize=64)
def _decoding_basis(size: int) -> npt.NDArray[np.float32]:
    return _padded(dct_basis(size, torch.float32, torch.device("cpu")).numpy(), np.float32)


@lru_cache(maxsize=64)
def _encoding_basis(size: int) -> npt.NDArray[np.float32]:
    """``(32, 64)``, row = position in the upper half, column = frequency, in the scale of the fast transform."""
    half = (size + 1) // 2
    rows = np.zeros((_SIDE // 2, _SIDE), np.float32)
    rows[:half, :size] = dct_basis(size, torch.float64, torch.device("cpu")).numpy()[:half] * _SIDE**0.5
    if size % 2:
        rows[half - 1] /= 2  # the one in the middle is added to itself
    return rows


@lru_cache(maxsize=64)
def _exact_basis(size: int) -> npt.NDArray[np.float64]:
    return _padded(integer_basis(size), np.float64)


@lru_cache(maxsize=8)
def _means(senders: int) -> npt.NDArray[np.float64]:
    """Of signs, ``((senders + 1)^2,)``: ``[c * c + c + s]`` is that of a sum ``s`` of ``c`` signs."""
    return np.array([mean_of_signs(s, c) for c in range(senders + 1) for s in range(-c, c + 1)], np.float64)


def _addresses(tensors: Iterable[tuple[int, Tensor | None]], count: int) -> npt.NDArray[np.int64]:
    """``(count,)``: where each of the numbered tensors begins in memory; 0 for None, and for those not named."""
    addresses = np.zeros(count, np.int64)
    for number, tensor in tensors:
        if tensor is not None:
            addresses[number] = tensor.data_ptr()
    return addresses


def _usable(tensor: Tensor | None, dtype: torch.dtype = torch.float32) -> bool:
    """Whether a kernel may walk through its memory."""
    return tensor is None or (tensor.dtype == dtype and tensor.is_cpu and tensor.is_contiguous())


# -- gradients to coefficients -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class FastExtraction(Extraction):
    """:class:`Extraction` by a kernel."""

    @property
    @override
    def takes_long_blocks(self) -> bool:
        return self.step is None and self._all_usable

    @override
    def extract(self, block: Block, tiles: Tensor, coefficients: Tensor, spare: Tensor) -> None:
        usable, name, tensors, others = self._arguments
        if self.step is not None or not (self._all_usable or all(piece.param in usable for piece in block.pieces)):
            return super().extract(block, tiles, coefficients, spare)
        kernel(name)(self.batch.places, block.start, block.stop, self.batch.h, self.batch.w, *tensors, *others)
        return None

    @cached_property
    def _all_usable(self) -> bool:
        return self._arguments[0].issuperset(self.batch.ranges)

    @cached_property
    def _arguments(self) -> tuple[frozenset[int], str, list[npt.NDArray[np.int64]], tuple[Any, ...]]:
        """Tensors that a kernel may walk through, its name, their addresses, and what else it takes.

        Of the whole batch, once: for each block it would take as long as some of its tiles.
        """
        numbers, count = list(self.batch.ranges), len(self.grads)
        own = {n: self.own[n] for n in numbers} if self.own is not None else {}
        usable = frozenset(
            n
            for n in numbers
            if _usable(self.grads[n])
            and _usable(self.momenta[n])
            and (n not in own or (_usable(own[n].value) and _usable(own[n].index, torch.int32)))
        )
        lists: list[dict[int, Tensor | None]] = [
            {n: self.grads[n] for n in numbers},
            {n: self.momenta[n] for n in numbers},
        ]
        h, w = self.batch.h, self.batch.w
        bases = [_encoding_basis(h), _encoding_basis(w)]
        name = "extract_from_coefficients"
        if not self.in_coefficients:
            name = "extract_from_weights"
            lists += [{n: part.index for n, part in own.items()}, {n: part.value for n, part in own.items()}]
            bases += [_decoding_basis(h), _decoding_basis(w)]
        quantize = self.value_out.dtype == torch.bool
        values_out, signs_out = (
            (_NO_VALUES, self.value_out.numpy()) if quantize else (self.value_out.numpy(), _NO_SIGNS)
        )
        outputs = self.index_out.numpy(), values_out, signs_out, self.spoken_out.numpy()
        numbers_too = np.float32(self.rate), np.float32(self.keep), self.batch.k
        return (
            usable,
            name,
            [_addresses(tensors.items(), count) for tensors in lists],
            (*numbers_too, *bases, *outputs),
        )


# -- coefficients to weights -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Said:
    """What everybody says about a batch in one step, as the kernel wants it.

    Attributes:
        indices, values: ``(contributors,)`` int64, addresses.
        present: ``(contributors, tensors)`` bool.
        quantized: signs, not values.
        kept: tensors at these addresses, so that they live as long.
    """

    indices: npt.NDArray[np.int64]
    values: npt.NDArray[np.int64]
    present: npt.NDArray[np.bool_]
    quantized: bool
    kept: tuple[list[Tensor], list[Tensor]]


class FastMerge(ExactMerge):
    """:class:`~distro_optim.compress.exact.ExactMerge` by a kernel: the same bits."""

    goes_ahead = True
    _said: tuple[Sequence[CompressedUpdate], _Said | None] | None = None

    @override
    def __init__(self, number: int, batch: Batch, transform: Transform, workers: int) -> None:
        super().__init__(number, batch, transform, workers)
        self._walks: dict[int, tuple[Sequence[Tensor | None], npt.NDArray[np.int64]]] = {}
        self._walkable: Sequence[Tensor] | None = None

    @override
    def check(self, updates: Sequence[CompressedUpdate]) -> None:
        super().check(updates)
        # Once a step, not once a block. The updates themselves are kept to recognise them, so that their memory cannot
        # be that of others meanwhile.
        self._said = updates, self._read(updates)
        self._walks, self._walkable = {}, None

    def _read(self, updates: Sequence[CompressedUpdate]) -> _Said | None:
        """None where the kernel cannot: some send signs and others values, or values of another type."""
        indices = [u.index[self.number].contiguous() for u in updates]
        values = [u.value[self.number].contiguous() for u in updates]
        kinds = {value.dtype for value in values}
        shape = (self.batch.tiles, self.batch.k)
        if (
            kinds not in ({torch.bool}, {torch.float32})
            or any(index.dtype != torch.int32 for index in indices)
            or any(tensor.device.type != "cpu" or tensor.shape != shape for tensor in (*indices, *values))
        ):
            return None
        return _Said(
            np.array([index.data_ptr() for index in indices], np.int64),
            np.array([value.data_ptr() for value in values], np.int64),
            np.array([u.present for u in updates], np.bool_),
            kinds == {torch.bool},
            (indices, values),
        )

    @override
    def takes_long_blocks(self, updates: Sequence[CompressedUpdate], params: Sequence[Tensor]) -> bool:
        if self._said_by(updates) is None or not all(_usable(params[n]) for n in self.batch.ranges):
            return False
        self._walkable = params  # which is kept, so that nothing else is taken for it
        return True

    @override
    def merge_block(
        self,
        block: Block,
        worker: int,
        scratch: Sequence[Tensor],
        updates: Sequence[CompressedUpdate],
        params: Sequence[Tensor],
        lr: float,
    ) -> None:
        said = self._said_by(updates)
        if said is None or not (
            self._walkable is params or all(_usable(params[piece.param]) for piece in block.pieces)
        ):
            return super().merge_block(block, worker, scratch, updates, params, lr)
        return self._merge(block, said, len(updates), params, lr, None)

    @override
    def takes_ahead(self, updates: Sequence[CompressedUpdate], params: Sequence[Tensor], ahead: Ahead) -> bool:
        tensors = (of[n] for n in self.batch.ranges for of in (params, ahead.shifted, ahead.momenta))
        return self._said_by(updates) is not None and all(map(_usable, tensors))

    @override
    def merge_block_ahead(
        self,
        block: Block,
        worker: int,
        updates: Sequence[CompressedUpdate],
        params: Sequence[Tensor],
        lr: float,
        ahead: Ahead,
    ) -> None:
        said = self._said_by(updates)
        assert said is not None, "takes_ahead() is asked first"
        self._merge(block, said, len(updates), params, lr, ahead)

    def _said_by(self, updates: Sequence[CompressedUpdate]) -> _Said | None:
        known = self._said
        return known[1] if known is not None and known[0] is updates else self._read(updates)

    def _merge(
        self, block: Block, said: _Said, contributors: int, params: Sequence[Tensor], lr: float, ahead: Ahead | None
    ) -> None:
        momenta, shifted = ((), ()) if ahead is None else (ahead.momenta, ahead.shifted)
        kernel("merge")(
            self.batch.places,
            block.start,
            block.stop,
            self.batch.h,
            self.batch.w,
            self._walk(params, len(params)),
            np.float32(lr),
            self.batch.k,
            said.indices,
            said.values,
            said.quantized,
            said.present,
            _means(contributors),
            contributors,
            VALUE_BITS,
            _exact_basis(self.batch.h),
            _exact_basis(self.batch.w),
            self._walk(momenta, len(params)),
            self._walk(shifted, len(params)),
            np.float32(0 if ahead is None else ahead.lr[self.batch.group]),
        )
        for tensor in (of[piece.param] for piece in block.pieces for of in (params, shifted) if of):
            # As after any change in place: autograd refuses to go back through what the weights were before.
            if tensor is not None and not tensor.is_inference():
                torch.autograd.graph.increment_version(tensor)

    def _walk(self, tensors: Sequence[Tensor | None], count: int) -> npt.NDArray[np.int64]:
        """Where those of the batch begin, 0 for others; read once a step, for all blocks."""
        known = self._walks.get(id(tensors))
        if known is None or known[0] is not tensors:
            known = tensors, _addresses(((n, tensors[n]) for n in self.batch.ranges if tensors), count)
            # With the tensors: as long as they are here, nothing else has their place in memory.
            self._walks[id(tensors)] = known
        return known[1]


# -- passes over whole tensors ---------------------------------------------------------------------------------------


def can_look(elements: int) -> bool:
    """Whether :func:`squares_of_part` is for tensors with so many elements together, wanted and there; loads it."""
    return _worth_a_kernel(elements) and kernel("squares") is not None


def squares_of_part(grad: Tensor, start: int, stop: int) -> float:
    """The sum of the squares of the elements ``[start, stop)``: finite, unless one of them, or it, is not.

    ``grad`` is float32, contiguous, and on a CPU.
    """
    return float(kernel("squares")(grad.data_ptr() + 4 * start, stop - start))


def _worth_a_kernel(elements: int) -> bool:
    said = setting()
    return said != "0" and (elements >= _FEWEST_TILES * _SIDE * _SIDE or said == "1")


def can_shift(param: Tensor, delta: Tensor, kept: Tensor) -> bool:
    """Whether :func:`shift_part` is for these, wanted and there; loads it."""
    return _worth_a_kernel(param.numel()) and all(map(_usable, (param, delta, kept))) and kernel("shift") is not None


def shift_part(param: Tensor, delta: Tensor, kept: Tensor, start: int, stop: int, rate: float) -> None:
    """``kept = param``, then ``param -= rate * sign(delta)``, for the elements ``[start, stop)``, in the same bits.

    Args:
        param, delta, kept: of the same shape, as :func:`can_shift` wants them; ``param`` and ``kept`` are changed.
        rate: of learning.
    """
    addresses = (tensor.data_ptr() + 4 * start for tensor in (param, delta, kept))
    kernel("shift")(*addresses, stop - start, np.float32(rate))
    if not param.is_inference():
        torch.autograd.graph.increment_version(param)
