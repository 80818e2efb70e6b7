"""Samples as tensors, cut in micro-batches.

A sample has exactly the sequence length of the run, not one token more: the model is asked at each position for the
next one, and the last has none (PsycheFoundation/psyche ``shared/data-provider/src/traits.rs`` ``TokenizedData``,
``shared/modeling/src/trainer.rs`` ``BatchData::gpu``).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import torch
from torch import Tensor

from ..errors import ConfigurationError

__all__ = ["IGNORED", "TokenBatch", "collate"]

IGNORED: Final = -100
"""A label that does not count (``shared/modeling/src/causal_language_model.rs``)."""

_FIELDS: Final = ("input_ids", "labels", "position_ids", "sequence_lengths")


# Not frozen: Lightning's precision plugins replace the tensors of a copy.
@dataclass(eq=False)
class TokenBatch:
    """Sequences of one length.

    Attributes:
        input_ids: ``(batch, tokens) int64``.
        labels: ``(batch, tokens) int64``, not shifted, or None where they are the tokens themselves.
        position_ids: ``(batch, tokens) int64``, or None for 0, 1, 2, ...
        sequence_lengths: of the documents packed in each sequence, which do not see each other; None for one each.
    """

    input_ids: Tensor
    labels: Tensor | None = None
    position_ids: Tensor | None = None
    sequence_lengths: tuple[tuple[int, ...], ...] | None = None

    def __post_init__(self) -> None:
        if self.input_ids.dim() != 2:
            raise ConfigurationError(
                f"input_ids of shape {tuple(self.input_ids.shape)}: give (batch, tokens)", name="input_ids"
            )
        for name in ("labels", "position_ids"):
            value = getattr(self, name)
            if value is not None and value.shape != self.input_ids.shape:
                raise ConfigurationError(
                    f"{name} of shape {tuple(value.shape)} beside input_ids of {tuple(self.input_ids.shape)}", name=name
                )
        self._check_lengths()

    @classmethod
    def of(cls, batch: object) -> TokenBatch:
        """A batch from a tensor of tokens, a mapping of tensors, or any object with these attributes.

        Raises:
            ConfigurationError: it is none of these, or its parts do not fit each other.
        """
        if isinstance(batch, TokenBatch):
            return batch
        if isinstance(batch, list | tuple) and len(batch) == 1:
            batch = batch[0]  # as a TensorDataset gives it
        values = _fields(batch)
        if not isinstance(values.get("input_ids"), Tensor):
            raise ConfigurationError(
                f"a batch of type {type(batch).__name__}: give a tensor of tokens, or a dict with input_ids and, where "
                "there are any, labels, position_ids and sequence_lengths",
                name="batch",
            )
        lengths = values.get("sequence_lengths")
        if isinstance(lengths, Tensor):
            lengths = lengths.tolist()
        labels, positions = (values.get(name) for name in ("labels", "position_ids"))
        return cls(
            values["input_ids"].long(),
            None if labels is None else labels.long(),
            None if positions is None else positions.long(),
            None if lengths is None else tuple(tuple(int(n) for n in row) for row in lengths),
        )

    def __len__(self) -> int:
        return self.input_ids.shape[0]

    @property
    def tokens(self) -> int:
        """Tokens of all sequences together."""
        return self.input_ids.numel()

    def to(self, *args: Any, **kwargs: Any) -> TokenBatch:
        """As ``Tensor.to``; Lightning moves batches by it."""
        labels, positions = (None if t is None else t.to(*args, **kwargs) for t in (self.labels, self.position_ids))
        return TokenBatch(self.input_ids.to(*args, **kwargs), labels, positions, self.sequence_lengths)

    def pin_memory(self) -> TokenBatch:
        """As ``Tensor.pin_memory``; a DataLoader calls it."""
        labels, positions = (None if t is None else t.pin_memory() for t in (self.labels, self.position_ids))
        return TokenBatch(self.input_ids.pin_memory(), labels, positions, self.sequence_lengths)

    def micro_batches(self, size: int | None) -> list[TokenBatch]:
        """The batch in as few parts as sizes up to ``size`` allow, all alike but the last (``torch.chunk``)."""
        count = 1 if size is None else math.ceil(len(self) / size)
        return list(self._chunks(max(count, 1)))

    def rows(self, start: int, stop: int) -> TokenBatch:
        """The sequences from ``start`` up to ``stop``."""
        rows = slice(start, stop)
        return TokenBatch(
            self.input_ids[rows],
            None if self.labels is None else self.labels[rows],
            None if self.position_ids is None else self.position_ids[rows],
            None if self.sequence_lengths is None else self.sequence_lengths[rows],
        )

    def _chunks(self, count: int) -> Iterator[TokenBatch]:
        step = max(math.ceil(len(self) / count), 1)
        for start in range(0, len(self), step):
            yield self.rows(start, start + step)

    def check_vocabulary(self, vocab_size: int) -> None:
        """Raises ConfigurationError where a token or a label is none of the model's, which a GPU would die of."""
        if not self.tokens:
            raise ConfigurationError("a batch without tokens", name="input_ids")
        low, high = (int(v) for v in self.input_ids.aminmax())
        if self.labels is not None:
            counted = self.labels[self.labels != IGNORED]
            if counted.numel():
                low, high = min(low, int(counted.min())), max(high, int(counted.max()))
        if low < 0 or high >= vocab_size:
            wrong = low if low < 0 else high
            raise ConfigurationError(
                f"the data holds token {wrong}, the model's vocabulary has {vocab_size}: the data was made with "
                "another tokenizer, or its tokens have another size in bytes",
                name="input_ids",
                value=wrong,
            )

    def _check_lengths(self) -> None:
        if self.sequence_lengths is None:
            return
        batch, tokens = self.input_ids.shape
        if len(self.sequence_lengths) != batch:
            raise ConfigurationError(
                f"sequence_lengths of {len(self.sequence_lengths)} sequences beside {batch}", name="sequence_lengths"
            )
        for row in self.sequence_lengths:
            if min(row, default=0) < 0 or sum(row) != tokens:
                raise ConfigurationError(
                    f"sequence_lengths add up to {sum(row)} in a sequence of {tokens} tokens", name="sequence_lengths"
                )


def collate(samples: Sequence[Any]) -> TokenBatch:
    """A batch of samples: sequences of tokens, mappings, or objects such as Psyche's ``TokenizedData``.

    A field that not every sample has is left out, as in Psyche.

    Raises:
        ConfigurationError: samples have different lengths.
    """
    rows = [_fields(sample) for sample in samples]
    columns: dict[str, Any] = {}
    for name in _FIELDS:
        values = [row[name] for row in rows if row.get(name) is not None]
        if not values or len(values) < len(rows):
            continue
        if name == "sequence_lengths":
            columns[name] = tuple(tuple(int(n) for n in value) for value in values)
            continue
        tensors = [torch.as_tensor(value).long() for value in values]
        if len({tuple(t.shape) for t in tensors}) > 1:
            lengths = sorted({t.numel() for t in tensors})
            raise ConfigurationError(f"{name} of {lengths[0]} to {lengths[-1]} tokens in one batch", name=name)
        columns[name] = torch.stack(tensors)
    return TokenBatch.of(columns)


def _fields(sample: object) -> dict[str, Any]:
    if isinstance(sample, Mapping):
        return {name: sample.get(name) for name in _FIELDS}
    if hasattr(sample, "input_ids"):
        return {name: getattr(sample, name, None) for name in _FIELDS}
    return {"input_ids": sample}
