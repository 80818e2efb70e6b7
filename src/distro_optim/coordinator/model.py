"""What a run trains: the model's settings as the coordinator keeps and sends them.

Names, order and limits: PsycheFoundation/psyche, ``shared/coordinator/src/model.rs`` and
``shared/core/src/definitions.rs``. Each field is declared once; postcard, TOML, JSON and the layout of the on-chain
account all come from the annotation.

A Rust enum is a union here and its variants are classes. Where Rust reuses the name of a variant, ours have names of
their own (``DummyCheckpoint``, ``DummyData``), and :func:`variant` keeps the name that files use.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass
from typing import Annotated

from ..comm.declarations import newtype, raw_order, variant
from ..comm.postcard import F32, F64, U8, U16, U32, Bytes32, Fixed, Limit, OnlyVariant

__all__ = [
    "LLM",
    "P2P",
    "AdamW",
    "Checkpoint",
    "ConstantLR",
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
    "Model",
    "NumberedFiles",
    "OptimizerDefinition",
    "P2PGcs",
    "PreprocessedData",
    "Seeded",
    "ServerData",
    "Shuffle",
    "SingleUrl",
    "Str64",
    "Str192",
    "TokenSize",
    "WarmupStableDecayLR",
    "WeightedHttpData",
]

Str64 = Annotated[str, Limit(64)]
"""``SOLANA_MAX_STRING_LEN`` bytes of UTF-8."""

Str192 = Annotated[str, Limit(192)]
"""``SOLANA_MAX_URL_STRING_LEN`` bytes of UTF-8."""


# -- where the weights are ---------------------------------------------------------------------------------------------


@raw_order("revision", "repo_id")
@dataclass(frozen=True)
class HubRepo:
    """A repository of the Hugging Face hub."""

    repo_id: Str64
    revision: Str64 | None = None


@raw_order("prefix", "bucket")
@dataclass(frozen=True)
class GcsRepo:
    """A bucket of Google Cloud Storage."""

    bucket: Str64
    prefix: Str64 | None = None


@dataclass(frozen=True)
class Ephemeral:
    """A joiner cannot get them anywhere."""


@newtype
@variant("Dummy")
@dataclass(frozen=True)
class DummyCheckpoint:
    """A built-in test model."""

    repo: HubRepo


@newtype
@dataclass(frozen=True)
class Hub:
    """Download them from the hub."""

    repo: HubRepo


@newtype
@dataclass(frozen=True)
class P2P:
    """Ask the peers. The repository is kept for the epoch in which none of them is left."""

    repo: HubRepo


@newtype
@dataclass(frozen=True)
class Gcs:
    """Download them from the bucket."""

    repo: GcsRepo


@newtype
@dataclass(frozen=True)
class P2PGcs:
    """Ask the peers. The bucket is kept for the epoch in which none of them is left."""

    repo: GcsRepo


Checkpoint = Ephemeral | DummyCheckpoint | Hub | P2P | Gcs | P2PGcs


# -- where the data is -------------------------------------------------------------------------------------------------


class TokenSize(enum.Enum):
    """Width of one token in a data file."""

    TWO_BYTES = "TwoBytes"
    FOUR_BYTES = "FourBytes"


@dataclass(frozen=True)
class DontShuffle:
    """Samples in the order of the files."""


@newtype
@dataclass(frozen=True)
class Seeded:
    """Samples in the order of a ChaCha8 shuffle."""

    seed: Bytes32


Shuffle = DontShuffle | Seeded


@newtype
@dataclass(frozen=True)
class SingleUrl:
    """One file."""

    url: Str192


@dataclass(frozen=True)
class NumberedFiles:
    """``url_template`` with ``{}`` replaced by ``start_index`` and the numbers after it."""

    url_template: Str64
    start_index: U32
    n_left_pad_zeros: U8
    num_files: U32


@dataclass(frozen=True)
class Gcp:
    """The files of a bucket of Google Cloud Storage, below ``filter_directory``."""

    bucket_name: Str64
    filter_directory: Str192


HttpTrainingDataLocation = SingleUrl | NumberedFiles | Gcp


@variant("Http")
@dataclass(frozen=True)
class HttpLLMTrainingDataLocation:
    """Files of tokens on a web server."""

    location: HttpTrainingDataLocation
    token_size_in_bytes: TokenSize
    shuffle: Shuffle


@variant("Dummy")
@dataclass(frozen=True)
class DummyData:
    """Generated tokens."""


@newtype
@variant("Server")
@dataclass(frozen=True)
class ServerData:
    """A TCP data server, ``host:port``."""

    address: Str64


@newtype
@variant("Local")
@dataclass(frozen=True)
class LocalData:
    """A folder on the client's disk."""

    path: Str192


@newtype
@variant("WeightedHttp")
@dataclass(frozen=True)
class WeightedHttpData:
    """A JSON file that lists locations and weights."""

    url: Str192


@newtype
@variant("Preprocessed")
@dataclass(frozen=True)
class PreprocessedData:
    """A folder or a hub dataset of parquet files."""

    url: Str192


LLMTrainingDataLocation = (
    DummyData | ServerData | LocalData | HttpLLMTrainingDataLocation | WeightedHttpData | PreprocessedData
)


# -- how fast it learns ------------------------------------------------------------------------------------------------


@variant("Constant")
@dataclass(frozen=True)
class ConstantLR:
    """A warm-up, then ``base_lr``. Formulas: :func:`~.rules.schedule.learning_rate`."""

    base_lr: F64
    warmup_init_lr: F64
    warmup_steps: U32


@variant("Linear")
@dataclass(frozen=True)
class LinearLR:
    """A warm-up, then a straight line to ``final_lr``."""

    base_lr: F64
    warmup_init_lr: F64
    final_lr: F64
    warmup_steps: U32
    total_steps: U32


@variant("Cosine")
@dataclass(frozen=True)
class CosineLR:
    """A warm-up, then half a cosine to ``final_lr``."""

    base_lr: F64
    warmup_init_lr: F64
    final_lr: F64
    warmup_steps: U32
    total_steps: U32


@variant("WarmupStableDecay")
@dataclass(frozen=True)
class WarmupStableDecayLR:
    """A warm-up, a constant phase, a cosine and a straight line to ``linear_decay_final_lr``."""

    base_lr: F64
    warmup_init_lr: F64
    cosine_decay_final_lr: F64
    linear_decay_final_lr: F64
    warmup_steps: U32
    stable_steps: U32
    cosine_decay_steps: U32
    linear_decay_steps: U32


LearningRateSchedule = ConstantLR | LinearLR | CosineLR | WarmupStableDecayLR


# -- what it learns with -----------------------------------------------------------------------------------------------


@variant("Dummy")
@dataclass(frozen=True)
class DummyOptimizer:
    """No optimizer: rounds run without training."""


@dataclass(frozen=True)
class AdamW:
    """AdamW, with a global gradient norm that is clipped if ``clip_grad_norm`` is given."""

    betas: Annotated[tuple[F32, ...], Fixed(2)]
    weight_decay: F32
    eps: F32
    clip_grad_norm: F32 | None = None


@dataclass(frozen=True)
class Distro:
    """DisTrO; see :class:`distro_optim.DisTrO` for what the settings do."""

    clip_grad_norm: F32 | None
    weight_decay: F32 | None
    compression_decay: F32
    compression_topk: U16
    compression_chunk: U16
    quantize_1bit: bool


OptimizerDefinition = DummyOptimizer | AdamW | Distro


# -- all of it ---------------------------------------------------------------------------------------------------------


class LLMArchitecture(enum.Enum):
    """Which code builds the model."""

    HF_LLAMA = "HfLlama"
    HF_DEEPSEEK = "HfDeepseek"
    HF_AUTO = "HfAuto"
    TORCHTITAN = "Torchtitan"


class LLMTrainingDataType(enum.Enum):
    """What the data is for."""

    PRETRAINING = "Pretraining"
    FINETUNING = "Finetuning"


@dataclass(frozen=True)
class LLM:
    """A language model.

    Attributes:
        max_seq_len: tokens of a sequence.
        cold_start_warmup_steps: steps over which the learning rate rises after a pause.
    """

    max_seq_len: U32
    cold_start_warmup_steps: U32
    architecture: LLMArchitecture
    checkpoint: Checkpoint
    data_type: LLMTrainingDataType
    data_location: LLMTrainingDataLocation
    lr_schedule: LearningRateSchedule
    optimizer: OptimizerDefinition


Model = Annotated[LLM, OnlyVariant()]
"""An enum that has one variant so far."""
