"""Which client trains which data in a round.

Rules: PsycheFoundation/psyche, ``shared/coordinator/src/data_selection.rs``,
``shared/core/src/{deterministic_shuffle,lcg}.rs``. The round's interval of data indices is cut into one piece per
trainer, as equal as possible and the larger ones first; the trainers take them in an order shuffled by the round's
seed. The pieces partition the interval exactly.
"""

from __future__ import annotations

from collections.abc import MutableSequence
from typing import Any, Final

from ...errors import CoordinatorError, CoordinatorErrorCode
from ..types import BatchId, Committee, Coordinator, NodeIdentity, Round
from .committee import CommitteeSelection
from .probation import newcomers_share, on_probation
from .schedule import batch_size

__all__ = [
    "assign_data",
    "batch_ids_for_client",
    "batch_ids_for_round",
    "data_index_for_step",
    "lcg_next",
    "lcg_shuffle",
    "round_batch_size",
]

# Knuth's MMIX generator (The Art of Computer Programming, volume 2, section 3.3.4).
_LCG_MULTIPLIER: Final = 6364136223846793005
_LCG_INCREMENT: Final = 1442695040888963407
_U64: Final = 2**64 - 1


def lcg_next(state: int) -> int:
    """The next state, which is also the output, 64 bits."""
    return (state * _LCG_MULTIPLIER + _LCG_INCREMENT) & _U64


def lcg_shuffle(items: MutableSequence[Any], seed: int) -> None:
    """Fisher-Yates from the last place down, in place."""
    state = seed
    for place in range(len(items) - 1, 0, -1):
        state = lcg_next(state)
        other = state % (place + 1)
        items[place], items[other] = items[other], items[place]


def round_batch_size(state: Coordinator, round_: Round) -> int:
    """Sequences that a round trains."""
    return batch_size(state.config, round_.data_index * state.model.max_seq_len)


def assign_data(state: Coordinator, selection: CommitteeSelection | None = None) -> dict[BatchId, NodeIdentity]:
    """The current round's intervals and their owners, in order of the data.

    With fewer sequences than trainers the last ones in the shuffled order get none. Some clients on probation
    get the last few sequences.

    Args:
        state: the run.
        selection: the roles of the current round; computed if left out.

    Raises:
        CoordinatorError: the round elects verifiers or tie breakers, for which Psyche defines no work.
    """
    round_ = state.current_round
    if selection is None:
        selection = CommitteeSelection.for_round(state, round_)
    trainers = []
    for index, client in enumerate(state.epoch_state.clients):
        committee = selection.committee_of(index)
        if committee is not Committee.TRAINER:
            raise CoordinatorError(
                CoordinatorErrorCode.INVALID_COMMITTEE_SELECTION,
                f"client {index} is a {committee.name}, and only trainers have work: set verification_percent to 0",
                state.run_state,
            )
        trainers.append(client.id)
    if not trainers:
        return {}
    newcomers = {state.epoch_state.clients[place].id for place in on_probation(state)}
    lcg_shuffle(trainers, round_.random_seed)
    start, total = round_.data_index, round_batch_size(state, round_)
    if not newcomers:
        return dict(zip(_cut(start, total, len(trainers)), trainers, strict=False))
    regular = [client for client in trainers if client not in newcomers]
    newcomers_first = [client for client in trainers if client in newcomers]
    count, each = newcomers_share(total, len(newcomers_first), round_.random_seed)
    share = count * each
    assigned = dict(zip(_cut(start, total - share, len(regular)), regular, strict=False))
    parts = _cut(start + total - share, share, count)
    return assigned | dict(zip(parts, newcomers_first, strict=False))


def batch_ids_for_round(state: Coordinator, round_: Round, num_trainers: int) -> list[BatchId]:
    """The intervals of a round in order, without their owners."""
    return _cut(round_.data_index, round_batch_size(state, round_), num_trainers)


def batch_ids_for_client(assignment: dict[BatchId, NodeIdentity], client: NodeIdentity) -> list[BatchId]:
    """The intervals that ``client`` owns, in order."""
    return [batch_id for batch_id, owner in assignment.items() if owner == client]


def data_index_for_step(state: Coordinator, step: int) -> int:
    """Where step ``step`` starts in a run of one epoch; 0 for the first step and past the last.

    Epoch ends skip data, so a run of several epochs is further on than this. While the batch grows each step has to be
    gone through; a million take about a second.
    """
    if not 1 < step <= state.config.total_steps:
        return 0
    index = 0
    sequence_length = state.model.max_seq_len
    for done in range(1, step):
        tokens = index * sequence_length
        if tokens >= state.config.global_batch_size_warmup_tokens or not sequence_length:
            return index + (step - done) * batch_size(state.config, tokens)
        index += batch_size(state.config, tokens)
    return index


def _cut(start: int, total: int, pieces: int) -> list[BatchId]:
    """``total`` indices from ``start`` in at most ``pieces`` intervals, none empty, the larger ones first."""
    if pieces <= 0:
        return []
    size, larger = divmod(total, pieces)
    intervals = []
    for piece in range(min(pieces, total)):
        end = start + size + (piece < larger)
        intervals.append(BatchId(start, end - 1))
        start = end
    return intervals
