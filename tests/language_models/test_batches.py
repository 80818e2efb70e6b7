"""Samples become batches, batches micro-batches, and what does not fit is told."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from distro_optim.errors import ConfigurationError
from distro_optim.models.batches import TokenBatch, collate
from distro_optim.models.causal_lm import CausalLM
from language_models.small import LLAMA, sentences


@dataclass
class Tokenized:
    """As ``TokenizedData`` of Psyche."""

    input_ids: list[int]
    labels: list[int] | None = None
    position_ids: list[int] | None = None
    sequence_lengths: list[int] | None = field(default=None)


def test_samples_of_any_kind_are_collated_alike() -> None:
    rows = sentences(3, 8)
    kinds: list[list[Any]] = [
        list(rows),
        [row.numpy().astype(np.uint16).astype(np.int64) for row in rows],
        [row.tolist() for row in rows],
        [{"input_ids": row} for row in rows],
        [Tokenized(row.tolist()) for row in rows],
    ]
    for samples in kinds:
        batch = collate(samples)
        assert torch.equal(batch.input_ids, rows)
        assert batch.input_ids.dtype == torch.int64
        assert batch.labels is None


def test_a_field_that_one_sample_lacks_is_left_out_as_in_psyche() -> None:
    whole = Tokenized([1, 2, 3, 4], [1, 2, -100, 4], [0, 1, 0, 1], [2, 2])
    batch = collate([whole, whole])
    assert batch.labels is not None
    assert batch.position_ids is not None
    assert batch.labels[0].tolist() == [1, 2, -100, 4]
    assert batch.sequence_lengths == ((2, 2), (2, 2))
    part = collate([whole, Tokenized([1, 2, 3, 4], None, [0, 1, 2, 3])])
    assert part.labels is None
    assert part.sequence_lengths is None
    assert part.position_ids is not None


@given(st.integers(1, 40), st.integers(1, 40))
def test_micro_batches_are_as_many_as_the_size_asks_for_and_hold_every_row_once(rows: int, size: int) -> None:
    lengths = tuple((1, row % 2, 3 - row % 2) for row in range(rows))
    tokens = torch.arange(rows * 4).view(rows, 4)
    parts = TokenBatch(tokens, tokens + 1, tokens + 2, lengths).micro_batches(size)
    assert len(parts) == -(-rows // size)
    assert all(1 <= len(part) <= size for part in parts)
    # As torch.chunk, by which Psyche cuts.
    assert [len(part) for part in parts] == [len(chunk) for chunk in tokens.chunk(len(parts))]
    assert torch.equal(torch.cat([part.input_ids for part in parts]), tokens)
    assert [row for part in parts for row in part.sequence_lengths or ()] == list(lengths)
    assert all(part.labels is not None and torch.equal(part.labels, part.input_ids + 1) for part in parts)


def test_without_a_size_there_is_one_micro_batch() -> None:
    assert len(TokenBatch(sentences(5)).micro_batches(None)) == 1


def test_a_batch_moves_with_all_its_tensors() -> None:
    rows = sentences(2, 4)
    moved = TokenBatch(rows, rows, rows, ((2, 2), (4,))).to("meta")
    assert all(t is not None and t.device.type == "meta" for t in (moved.input_ids, moved.labels, moved.position_ids))
    assert moved.sequence_lengths == ((2, 2), (4,))
    assert (len(moved), moved.tokens) == (2, 8)


@pytest.mark.parametrize(
    ("batch", "words"),
    [
        (torch.zeros(4), "give \\(batch, tokens\\)"),
        ("text", "a batch of type str"),
        ({"tokens": torch.zeros(1, 4)}, "a dict with input_ids"),
        ({"input_ids": torch.zeros(2, 4), "labels": torch.zeros(2, 3)}, "labels of shape"),
        ({"input_ids": torch.zeros(2, 4), "position_ids": torch.zeros(4)}, "position_ids of shape"),
        ({"input_ids": torch.zeros(2, 4), "sequence_lengths": [[4]]}, "of 1 sequences beside 2"),
        ({"input_ids": torch.zeros(1, 4), "sequence_lengths": [[2, 3]]}, "add up to 5 in a sequence of 4"),
        ({"input_ids": torch.zeros(1, 4), "sequence_lengths": [[-1, 5]]}, "add up to"),
        ({"input_ids": torch.zeros(1, 4), "sequence_lengths": [[]]}, "add up to 0"),
    ],
)
def test_a_batch_whose_parts_do_not_fit_is_refused(batch: object, words: str) -> None:
    with pytest.raises(ConfigurationError, match=words):
        TokenBatch.of(batch)


def test_samples_of_several_lengths_are_refused() -> None:
    with pytest.raises(ConfigurationError, match="input_ids of 3 to 4 tokens in one batch"):
        collate([[1, 2, 3], [1, 2, 3, 4]])


@pytest.mark.parametrize("wrong", [96, 50256, -1])
@pytest.mark.parametrize("where", ["input_ids", "labels"])
def test_a_token_that_is_not_in_the_vocabulary_is_told_before_it_is_computed_with(where: str, wrong: int) -> None:
    values = {"input_ids": sentences(2), "labels": sentences(2)}
    values[where][1, 3] = wrong
    with pytest.raises(ConfigurationError, match=f"the data holds token {wrong}, the model's vocabulary has 96"):
        CausalLM(LLAMA, "HfLlama")(values)


def test_a_batch_without_tokens_is_refused() -> None:
    with pytest.raises(ConfigurationError, match="without tokens"):
        CausalLM(LLAMA, "HfLlama")(torch.zeros(0, 8, dtype=torch.int64))
