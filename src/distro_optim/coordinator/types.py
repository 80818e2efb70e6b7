"""The state of a run, and what its clients report.

Names, order and limits: PsycheFoundation/psyche, ``shared/coordinator/src/coordinator.rs``. Each field is declared
once; postcard (what travels), TOML and JSON (what is configured and saved) and the layout of the on-chain account all
come from the annotation. All instances are immutable, so a state can be passed on and kept.

Times are seconds, timestamps Unix seconds, batch sizes sequences. Steps count from 1.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass, field
from typing import Annotated, Final

from typing_extensions import override

from ..comm.declarations import raw_width
from ..comm.postcard import F32, I32, U8, U16, U32, U64, Bytes32, Fixed, Limit, Via
from ..verify.bloom import BLOOM_KEYS, BLOOM_WORDS
from .model import (
    LLM,
    P2P,
    AdamW,
    Checkpoint,
    ConstantLR,
    CosineLR,
    Distro,
    DontShuffle,
    DummyCheckpoint,
    DummyData,
    DummyOptimizer,
    Ephemeral,
    Gcp,
    Gcs,
    GcsRepo,
    HttpLLMTrainingDataLocation,
    HttpTrainingDataLocation,
    Hub,
    HubRepo,
    LearningRateSchedule,
    LinearLR,
    LLMArchitecture,
    LLMTrainingDataLocation,
    LLMTrainingDataType,
    LocalData,
    Model,
    NumberedFiles,
    OptimizerDefinition,
    P2PGcs,
    PreprocessedData,
    Seeded,
    ServerData,
    Shuffle,
    SingleUrl,
    TokenSize,
    WarmupStableDecayLR,
    WeightedHttpData,
)

__all__ = [
    "BIT_ORDER",
    "EVAL_NAME_MAX_LEN",
    "LLM",
    "MAX_EVALS",
    "MAX_NUM_CLIENTS",
    "MAX_NUM_WITNESSES",
    "MAX_TOKENS_TO_SEND",
    "NUM_STORED_ROUNDS",
    "ON_PROBATION",
    "P2P",
    "ROUND_PHASES",
    "RUN_ID_MAX_LEN",
    "AdamW",
    "BatchId",
    "Checkpoint",
    "Client",
    "ClientState",
    "Committee",
    "CommitteeProof",
    "ConstantLR",
    "Coordinator",
    "CoordinatorConfig",
    "CoordinatorEpochState",
    "CoordinatorProgress",
    "CosineLR",
    "Distro",
    "DontShuffle",
    "DummyCheckpoint",
    "DummyData",
    "DummyOptimizer",
    "Ephemeral",
    "Gcp",
    "Gcs",
    "GcsRepo",
    "HttpLLMTrainingDataLocation",
    "HttpTrainingDataLocation",
    "Hub",
    "HubRepo",
    "LLMArchitecture",
    "LLMTrainingDataLocation",
    "LLMTrainingDataType",
    "LearningRateSchedule",
    "LinearLR",
    "LocalData",
    "MerkleRoot",
    "Model",
    "NodeIdentity",
    "NumberedFiles",
    "OptimizerDefinition",
    "P2PGcs",
    "PreprocessedData",
    "Round",
    "RunState",
    "Seeded",
    "ServerData",
    "Shuffle",
    "SingleUrl",
    "SmallBoolean",
    "TokenSize",
    "WarmupStableDecayLR",
    "WeightedHttpData",
    "Witness",
    "WitnessBloom",
    "WitnessEvalResult",
    "WitnessMetadata",
    "WitnessProof",
]

MAX_NUM_CLIENTS: Final = 256
"""``SOLANA_MAX_NUM_CLIENTS``: clients of an epoch."""

MAX_NUM_WITNESSES: Final = 32
"""``SOLANA_MAX_NUM_WITNESSES``: reports kept of a round."""

NUM_STORED_ROUNDS: Final = 4
"""The ring of rounds."""

RUN_ID_MAX_LEN: Final = 32
"""``SOLANA_RUN_ID_MAX_LEN``: bytes of a run's name."""

MAX_TOKENS_TO_SEND: Final = 16
"""Tokens of a sample answer in a witness's report."""

MAX_EVALS: Final = 8
"""Evaluations in a witness's report (``WitnessMetadata::evals``)."""

EVAL_NAME_MAX_LEN: Final = 32

SmallBoolean = Annotated[bool, Via(U8, int, bool)]
"""One byte of which any value but 0 is true; the number 0 or 1 in text."""


OPTIONAL_IN_TEXT: Final = {"optional_in_text": True}
"""Metadata of a field that may be left out of a state file."""


# -- participants ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class NodeIdentity:
    """A participant. Two are equal if their signers are.

    Attributes:
        signer: public key of the wallet, or of the only key there is.
        p2p_identity: public key of the iroh endpoint.
    """

    signer: Bytes32
    p2p_identity: Bytes32 = field(compare=False)

    @classmethod
    def from_single_key(cls, public: bytes) -> NodeIdentity:
        """One key for both, as with a centralized coordinator."""
        return cls(public, public)

    # What dataclasses make of this takes twice as long, and every message asks for it ten times.
    @override
    def __eq__(self, other: object) -> bool:
        return self is other or (isinstance(other, NodeIdentity) and self.signer == other.signer)

    @override
    def __hash__(self) -> int:
        return hash(self.signer)

    @override
    def __str__(self) -> str:
        return self.signer[:4].hex()


@raw_width(1)
class ClientState(enum.Enum):
    """Whether a client is still in its epoch, or why it has left."""

    HEALTHY = "Healthy"
    DROPPED = "Dropped"
    WITHDRAWN = "Withdrawn"
    EJECTED = "Ejected"


ON_PROBATION: Final = 0xFFFF_FFFF
"""``exited_height`` of a client that is still there, in a run of our own kind: it is on probation
(``rules/probation.py``). In states of Psyche's the height of such a client is 0, and no round has this one."""


@dataclass(frozen=True)
class Client:
    """A participant of the epoch.

    Attributes:
        exited_height: the round in which it left, if it has; or :data:`ON_PROBATION`.
    """

    id: NodeIdentity
    state: ClientState = ClientState.HEALTHY
    exited_height: U32 = 0

    __postcard_cached__ = True


class Committee(enum.Enum):
    """The role of a client in a round."""

    TIE_BREAKER = "TieBreaker"
    VERIFIER = "Verifier"
    TRAINER = "Trainer"


@dataclass(frozen=True)
class CommitteeProof:
    """A claim to have a role in a round.

    Attributes:
        position: the client's place after the shuffle.
        index: its place in the list of clients.
    """

    committee: Committee
    position: U64
    index: U64


@dataclass(frozen=True)
class WitnessProof:
    """A claim to be elected as a witness; see :class:`CommitteeProof`."""

    position: U64
    index: U64
    witness: SmallBoolean


# -- what witnesses report ---------------------------------------------------------------------------------------------

BIT_ORDER: Final = "bitvec::order::Lsb0"
"""The type that bitvec names in front of its bits."""

WORD_BITS: Final = 64


@dataclass(frozen=True)
class _BitHead:
    """What bitvec writes before the words of an array: how its bits are ordered, where they begin, how many follow."""

    order: Annotated[str, Limit(len(BIT_ORDER))] = BIT_ORDER
    width: U8 = WORD_BITS
    index: U8 = 0
    bits: U64 = WORD_BITS * BLOOM_WORDS

    # All filters have the same: it is looked up by the order's name, and compared to its end.
    __postcard_cached__ = len(BIT_ORDER)


_BIT_HEAD: Final = _BitHead()


@dataclass(frozen=True)
class _BloomOnWire:
    """Keys, and a ``BitArray<[u64; 16], Lsb0>`` in the serde form of the bitvec crate."""

    keys: Annotated[tuple[U64, ...], Limit(BLOOM_KEYS)]
    head: _BitHead
    words: Annotated[tuple[U64, ...], Fixed(BLOOM_WORDS)]


def _bloom_from_wire(wire: _BloomOnWire) -> WitnessBloom:
    if len(wire.keys) != BLOOM_KEYS:
        raise ValueError(f"a filter has {BLOOM_KEYS} keys, not {len(wire.keys)}")
    if wire.head != _BIT_HEAD:
        raise ValueError(f"the bits of a filter are {_BIT_HEAD.bits} in {BIT_ORDER}, from bit 0 of {WORD_BITS}")
    return WitnessBloom(wire.keys, wire.words)


@dataclass(frozen=True)
class WitnessBloom:
    """A frozen :class:`~distro_optim.verify.bloom.BloomFilter`: ``BloomFilter(bloom.keys, bloom.words)``."""

    keys: Annotated[tuple[U64, ...], Fixed(BLOOM_KEYS)] = (0,) * BLOOM_KEYS
    words: Annotated[tuple[U64, ...], Fixed(BLOOM_WORDS)] = (0,) * BLOOM_WORDS

    __postcard__ = Via(_BloomOnWire, lambda bloom: _BloomOnWire(bloom.keys, _BIT_HEAD, bloom.words), _bloom_from_wire)


@dataclass(frozen=True)
class MerkleRoot:
    """``HashWrapper`` in Psyche; all zero when there was nothing to hash."""

    inner: Bytes32 = bytes(32)


@dataclass(frozen=True)
class Witness:
    """What one witness saw of a round.

    Attributes:
        participant_bloom: hashes of the public keys whose results came.
        broadcast_bloom: hashes of those results.
        broadcast_merkle: root over all of them in the order of arrival.
    """

    proof: WitnessProof
    participant_bloom: WitnessBloom = WitnessBloom()
    broadcast_bloom: WitnessBloom = WitnessBloom()
    broadcast_merkle: MerkleRoot = MerkleRoot()

    # 48 random words: most of the cost of encoding a state, and they never change.
    __postcard_cached__ = True


@dataclass(frozen=True)
class WitnessEvalResult:
    """The result of one evaluation."""

    name: Annotated[str, Limit(EVAL_NAME_MAX_LEN)]
    value: F32


@dataclass(frozen=True)
class WitnessMetadata:
    """How training goes, for people to look at; nothing is decided by it.

    Attributes:
        tokens_per_sec: of the whole run.
        bandwidth_per_sec: bytes.
        efficency: share of the time spent in training (spelled as in Psyche).
    """

    step: U32
    tokens_per_sec: F32
    bandwidth_per_sec: F32
    loss: F32
    evals: Annotated[tuple[WitnessEvalResult, ...], Limit(MAX_EVALS)]
    prompt_results: Annotated[tuple[I32, ...], Limit(MAX_TOKENS_TO_SEND)]
    prompt_index: U8
    efficency: F32


# -- the run -----------------------------------------------------------------------------------------------------------


@raw_width(1)
class RunState(enum.Enum):
    """The phase of a run."""

    UNINITIALIZED = "Uninitialized"
    WAITING_FOR_MEMBERS = "WaitingForMembers"
    WARMUP = "Warmup"
    ROUND_TRAIN = "RoundTrain"
    ROUND_WITNESS = "RoundWitness"
    COOLDOWN = "Cooldown"
    FINISHED = "Finished"
    PAUSED = "Paused"


ROUND_PHASES: Final = frozenset({RunState.ROUND_TRAIN, RunState.ROUND_WITNESS})
"""The phases of a round: training, and the time for reports after it."""


@dataclass(frozen=True, order=True)
class BatchId:
    """The data that one client trains in one round: indices ``start`` to ``end``, both inside."""

    start: U64
    end: U64

    def __post_init__(self) -> None:
        if self.start > self.end:
            raise ValueError(f"the interval [{self.start}, {self.end}] runs backwards")

    @override
    def __hash__(self) -> int:
        return hash(self.start)  # where the batches of a round differ; sooner than of both

    def __len__(self) -> int:
        """Sequences in it."""
        return self.end - self.start + 1

    @override
    def __str__(self) -> str:
        return f"B{self.start}" if self.start == self.end else f"B[{self.start}, {self.end}]"


@dataclass(frozen=True)
class Round:
    """One round of the ring.

    Attributes:
        data_index: first index of its batch.
        random_seed: decides committees and assignment.
        height: counted from 0 in each epoch.
        clients_len: clients when it began.
    """

    witnesses: Annotated[tuple[Witness, ...], Limit(MAX_NUM_WITNESSES)] = ()
    data_index: U64 = 0
    random_seed: U64 = 0
    height: U32 = 0
    clients_len: U16 = 0
    tie_breaker_tasks: U16 = 0

    # Three of the four in a state are over, and do not change any more.
    __postcard_cached__ = True


@dataclass(frozen=True)
class CoordinatorConfig:
    """The rules of a run; see :func:`~distro_optim.coordinator.rules.validation.config_problems` for what is allowed.

    Attributes:
        warmup_time: seconds that clients have to load the model.
        cooldown_time: seconds between two epochs, to save it.
        max_round_train_time: seconds of training in a round.
        round_witness_time: seconds for the reports after it.
        global_batch_size_warmup_tokens: tokens over which the batch grows from start to end.
        epoch_time: seconds after which an epoch ends.
        total_steps: steps of the run.
        init_min_clients: clients needed to begin an epoch.
        min_clients: clients needed to go on.
        witness_nodes: witnesses of a round; 0 elects everybody, up to 32.
        global_batch_size_start: sequences of a batch at first.
        global_batch_size_end: sequences of a batch in the end.
        verification_percent: share of verifiers. Must be 0, since no implementation has them yet.
        waiting_for_members_extra_time: least seconds of waiting for members.
    """

    warmup_time: U64
    cooldown_time: U64
    max_round_train_time: U64
    round_witness_time: U64
    global_batch_size_warmup_tokens: U64
    epoch_time: U64
    total_steps: U32
    init_min_clients: U16
    min_clients: U16
    witness_nodes: U16
    global_batch_size_start: U16
    global_batch_size_end: U16
    verification_percent: U8
    waiting_for_members_extra_time: U8


@dataclass(frozen=True)
class CoordinatorProgress:
    """How far the run is."""

    epoch: U16 = 0
    step: U32 = 1
    epoch_start_data_index: U64 = 0


@dataclass(frozen=True)
class CoordinatorEpochState:
    """What starts from scratch in each epoch.

    Attributes:
        rounds_head: the current round's place in the ring.
        start_step: step with which the epoch began.
        last_step: step with which it will end, once that is known; else 0.
        first_round: whether the first round is not over yet.
        cold_start_epoch: whether the run was paused before this epoch.
    """

    rounds: Annotated[tuple[Round, ...], Fixed(NUM_STORED_ROUNDS)] = (Round(),) * NUM_STORED_ROUNDS
    clients: Annotated[tuple[Client, ...], Limit(MAX_NUM_CLIENTS)] = ()
    exited_clients: Annotated[tuple[Client, ...], Limit(MAX_NUM_CLIENTS)] = ()
    rounds_head: U32 = 0
    start_step: U32 = 0
    last_step: U32 = 0
    start_timestamp: U64 = 0
    first_round: SmallBoolean = True
    cold_start_epoch: SmallBoolean = False

    def __post_init__(self) -> None:
        if self.rounds_head >= NUM_STORED_ROUNDS:
            raise ValueError(f"rounds_head is {self.rounds_head}, but there are {NUM_STORED_ROUNDS} rounds")


@dataclass(frozen=True)
class Coordinator:
    """The whole state of a run, from which every client knows what all of them have to do."""

    run_id: Annotated[str, Limit(RUN_ID_MAX_LEN)]
    run_state: RunState
    model: Model
    config: CoordinatorConfig
    progress: CoordinatorProgress = field(default_factory=CoordinatorProgress, metadata=OPTIONAL_IN_TEXT)
    epoch_state: CoordinatorEpochState = field(default_factory=CoordinatorEpochState, metadata=OPTIONAL_IN_TEXT)
    run_state_start_unix_timestamp: U64 = field(default_factory=int, metadata=OPTIONAL_IN_TEXT)
    pending_pause: SmallBoolean = field(default_factory=bool, metadata=OPTIONAL_IN_TEXT)

    @property
    def current_round(self) -> Round:
        """The round under way, or the last one."""
        return self.epoch_state.rounds[self.epoch_state.rounds_head]

    @property
    def previous_round(self) -> Round | None:
        """The round before the current one, None in the first of an epoch."""
        head = self.epoch_state.rounds_head
        if head == 0 and self.current_round.height == 0:
            return None
        return self.epoch_state.rounds[(head - 1) % NUM_STORED_ROUNDS]

    @property
    def previous_previous_round(self) -> Round | None:
        """The round before the previous one. As in Psyche, in round 1 an empty round stands for "none"."""
        head = self.epoch_state.rounds_head
        if head == 0 and self.current_round.height <= 1:
            return None
        return self.epoch_state.rounds[(head - 2) % NUM_STORED_ROUNDS]
