"""Test 1 on a recorded run: does each result agree with the gradient of the batch that its sender was given?

The folder is that of :mod:`.replay`, with ``config.json``; and the training data have to be at hand. The weights of
each step come from the replay, gradients are computed here, and every result of the step is compared with each of them:
with that of its own batch, with that of a control batch which nobody had in that round, and with those of the others,
which shows who copied from whom.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import torch
from torch import Tensor

from ..coordinator.model import DummyData, LocalData, PreprocessedData, ServerData
from ..coordinator.types import BatchId
from ..data.opening import open_token_data
from ..data.provider import TokenProvider
from ..errors import ConfigurationError, DataError
from ..models.batches import TokenBatch, collate
from ..models.causal_lm import CausalLM
from ..models.config import read_config
from ..models.weights import GivenTensors
from ..verify.quiet import mean_of, quiet_gradients
from ..verify.recompute import Evidence, Signs, compare_signs, expected_of, signs_at
from .replay import Beginning, Recording, read_update, replay, sender_of

__all__ = ["Checked", "open_data", "verify"]

_RATHER: Final = 6.0
"""So many standard errors has the agreement with another's batch to be above that with the own one, to be told."""


@dataclass(frozen=True)
class Checked:
    """One result.

    Attributes:
        step: of the run.
        batch: that its sender was given.
        peer: the beginning of the sender's key; None where the recording does not say it.
        evidence: of test 1.
        rather: a batch of the same round with which it agrees more than with its own; None if there is none.
    """

    step: int
    batch: BatchId
    peer: str | None
    evidence: Evidence
    rather: BatchId | None

    def record(self) -> dict[str, object]:
        """For JSON."""
        rather = None if self.rather is None else [self.rather.start, self.rather.end]
        own = {"step": self.step, "batch": [self.batch.start, self.batch.end], "peer": self.peer, "rather": rather}
        return {**own, **self.evidence.record()}


def open_data(recording: Recording, own: Path | None, vocab_size: int | None) -> TokenProvider:
    """The data of a recorded run.

    Args:
        recording: of the run.
        own: a file or folder on this disk; None takes what the run names, if that can be read by anybody.
        vocab_size: of the model.

    Raises:
        ConfigurationError: the data have to be named; says by what.
        DataError: they are not available.
    """
    location, seq_len = recording.state.model.data_location, recording.state.model.max_seq_len
    if isinstance(location, DummyData):
        raise ConfigurationError(
            "the run trained on Dummy data, whose batches are all alike: nothing tells whether a peer trained its own",
            name="data_location",
        )
    if own is not None:
        location = PreprocessedData(str(own)) if isinstance(location, PreprocessedData) else LocalData(str(own))
    elif isinstance(location, ServerData):
        raise ConfigurationError(
            f"the run had its data from the server {location.address}, which "
            "gives them to members only: name the files with --data PATH (a data.toml says the order, too)",
            name="data",
        )
    elif isinstance(location, LocalData | PreprocessedData):
        raise ConfigurationError(
            "the run's data were on the disk of each client: name yours with --data PATH", name="data"
        )
    return open_token_data(location, seq_len, vocab_size=vocab_size)


def verify(
    recording: Recording,
    data: TokenProvider | Callable[[int], TokenProvider],
    *,
    micro_batch_size: int = 8,
    progress: Callable[[int, int], None] | None = None,
) -> Iterator[Checked]:
    """Every result of a recording, in the order of steps and batches.

    Args:
        recording: from :meth:`Recording.open`.
        data: of the run; or a function of the model's vocabulary that opens them.
        micro_batch_size: sequences at a time.
        progress: told the step that is done, and the last one.

    Raises:
        ConfigurationError, ModelWeightsError, DataError: something is missing, or does not fit; says what.
    """
    config = read_config(recording.folder, recording.state.model.architecture)
    provider = data if isinstance(data, TokenProvider) else data(config.vocab_size)
    with provider:
        found: list[Checked] = []
        auditor: _Auditor | None = None

        def begins(beginning: Beginning) -> None:
            nonlocal auditor
            if beginning.step not in recording.results:
                return
            if auditor is None:
                dtype = beginning.weights[beginning.names[0]].dtype
                model = CausalLM(config, weights=GivenTensors(beginning.weights), dtype=dtype)
                auditor = _Auditor(model, provider, micro_batch_size)
            found.extend(_of_round(recording, beginning, auditor))

        for _ in replay(recording, progress=progress, begins=begins):
            yield from found
            found.clear()


# -- inside ------------------------------------------------------------------------------------------------------------


class _Auditor:
    """Computes gradients of sequences of the run at any weights."""

    def __init__(self, model: CausalLM, data: TokenProvider, micro_batch_size: int) -> None:
        self._model = model
        self._data = data
        self._size = micro_batch_size

    def halves(self, batch: BatchId, at: Beginning) -> tuple[list[list[Tensor | None]], list[int]]:
        """Gradients of the two halves of a batch and their sizes; of a single sequence there is one."""
        tokens = self.tokens(batch)
        middle = (len(tokens) + 1) // 2
        found, sizes = [], []
        for half in (tokens.rows(0, middle), tokens.rows(middle, len(tokens))):
            if len(half):
                parts = half.micro_batches(self._size)
                parameters = self._model.sorted_parameters()
                missing = [name for name in at.names if name not in parameters]
                if missing:
                    raise ConfigurationError(
                        f"results speak of {missing[0]}, which the model of config.json does not have", name="folder"
                    )
                gradients = quiet_gradients(
                    self._model,
                    {name: parameters[name] for name in at.names},
                    self._loss,
                    parts,
                    weights={name: at.weights[name] for name in at.names},
                )
                found.append(mean_of(gradients, [len(part) for part in parts]))
                sizes.append(len(half))
        return found, sizes

    def tokens(self, batch: BatchId) -> TokenBatch:
        """The sequences of a batch."""
        with torch.no_grad():
            return collate(self._data.get_samples(batch))

    def control(self, taken: Sequence[BatchId], rounds: Iterable[BatchId]) -> BatchId:
        """A batch that nobody had in a round: what follows the recording, precedes it, or is furthest from it.

        Raises:
            DataError: there is none.
        """
        size, all_batches = len(taken[0]), list(rounds)
        last, first = max(b.end for b in all_batches), min(b.start for b in all_batches)
        following = BatchId(last + 1, last + size)
        if self._data.has(following):
            return following
        if first >= size:
            return BatchId(first - size, first - 1)
        free = [b for b in all_batches if b not in taken]
        if not free:
            raise DataError("the data end with the only round of the recording: there is no batch to compare with")
        return max(free, key=lambda b: abs(b.start - taken[0].start))

    def _loss(self, part: TokenBatch) -> Tensor:
        loss: Tensor = self._model(part).loss
        return loss


def _of_round(recording: Recording, at: Beginning, auditor: _Auditor) -> list[Checked]:
    """All results of a step. Of gradients only the signs at the positions of each result are kept."""
    files = recording.results[at.step]
    updates = {batch: read_update(path, at.plan) for batch, path in files.items()}
    every = [batch for step in recording.results.values() for batch in step]
    halves, sizes = auditor.halves(auditor.control(list(files), every), at)
    whole = mean_of(halves, sizes)
    controls = {batch: signs_at(update, whole) for batch, update in updates.items()}
    signs: dict[tuple[BatchId, BatchId], Signs] = {}
    apart: dict[BatchId, tuple[Signs, Signs]] = {}
    expected: dict[BatchId, int] = {}
    for trained in files:
        halves, sizes = auditor.halves(trained, at)
        whole = mean_of(halves, sizes)
        expected[trained] = expected_of(at.plan, whole)
        for batch, update in updates.items():
            signs[batch, trained] = signs_at(update, whole)
        if len(halves) == 2:
            apart[trained] = signs_at(updates[trained], halves[0]), signs_at(updates[trained], halves[1])
    checked = []
    for batch, path in files.items():
        with_own = {
            other: compare_signs(
                updates[batch],
                signs[batch, other],
                controls[batch],
                halves=apart.get(batch) if other == batch else None,
                names=at.names if other == batch else None,
                expected=expected[other],
            )
            for other in files
        }
        own = with_own[batch].assigned
        best = max(files, key=lambda other: with_own[other].assigned.share)
        rather = best if with_own[best].assigned.share > own.share + _RATHER * own.error else None
        checked.append(Checked(at.step, batch, sender_of(path), with_own[batch], rather))
    return checked
