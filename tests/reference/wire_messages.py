"""Every message of a Psyche run in a plain reading of its layout: a small language of shapes, and the shapes.

Written from descriptions of the formats, and without anything of this package, so that a message which both sides of
this package agree on and Psyche does not would be seen. Strict where the formats have one way to write something: no
byte may be left over, integers are as short as they can be, flags are 0 or 1.

Sources: postcard (``postcard.jamesmunns.com``, wire format); PsycheFoundation/psyche ``shared/network/src``,
``shared/client/src/protocol.rs``, ``shared/coordinator/src``, ``architectures/centralized/shared/src/protocol.rs``.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

Read = Callable[["Cursor"], Any]
Write = Callable[[Any], bytes]


class Malformed(Exception):
    """The bytes are not of this shape."""


@dataclass
class Cursor:
    data: bytes
    at: int = 0

    def take(self, count: int) -> bytes:
        if count > len(self.data) - self.at:
            raise Malformed(f"{count} bytes wanted at {self.at} of {len(self.data)}")
        self.at += count
        return self.data[self.at - count : self.at]


@dataclass(frozen=True)
class Shape:
    read: Read
    write: Write

    def decode(self, data: bytes) -> Any:
        cursor = Cursor(bytes(data))
        value = self.read(cursor)
        if cursor.at != len(cursor.data):
            raise Malformed(f"{len(cursor.data) - cursor.at} bytes are left over")
        return value

    def encode(self, value: Any) -> bytes:
        return self.write(value)


# -- postcard ------------------------------------------------------------------------------------------------------


def _read_varint(cursor: Cursor, bits: int) -> int:
    value = shift = 0
    while True:
        byte = cursor.take(1)[0]
        value |= (byte & 0x7F) << shift
        shift += 7
        if byte < 0x80:
            break
        if shift >= bits + 7:
            raise Malformed("an integer without an end")
    if value >> bits:
        raise Malformed(f"{value} has more than {bits} bits")
    if byte == 0 and shift > 7:
        raise Malformed("an integer that is longer than it needs to be")
    return value


def _write_varint(value: int) -> bytes:
    out = bytearray()
    while value >= 0x80:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*out, value])


def integer(bits: int) -> Shape:
    return Shape(lambda cursor: _read_varint(cursor, bits), _write_varint)


def _zigzag(bits: int) -> Shape:
    def read(cursor: Cursor) -> int:
        value = _read_varint(cursor, bits)
        return value >> 1 ^ -(value & 1)

    return Shape(read, lambda value: _write_varint(value << 1 if value >= 0 else ~value << 1 | 1))


def number(form: str) -> Shape:
    size = struct.calcsize(form)
    # As bytes: not every NaN would survive being a number.
    return Shape(lambda cursor: cursor.take(size), bytes)


def raw(count: int) -> Shape:
    return Shape(lambda cursor: cursor.take(count), bytes)


def octets(limit: int) -> Shape:
    def read(cursor: Cursor) -> bytes:
        count = _read_varint(cursor, 32)
        if count > limit:
            raise Malformed(f"{count} bytes, at most {limit} are allowed")
        return cursor.take(count)

    return Shape(read, lambda value: _write_varint(len(value)) + value)


def text(limit: int) -> Shape:
    inner = octets(limit)

    def read(cursor: Cursor) -> str:
        try:
            return str(inner.read(cursor), "utf-8")
        except UnicodeDecodeError as error:
            raise Malformed(str(error)) from None

    return Shape(read, lambda value: inner.write(value.encode()))


def many(item: Shape, limit: int) -> Shape:
    def read(cursor: Cursor) -> list[Any]:
        count = _read_varint(cursor, 32)
        if count > limit:
            raise Malformed(f"{count} items, at most {limit} are allowed")
        return [item.read(cursor) for _ in range(count)]

    return Shape(read, lambda value: _write_varint(len(value)) + b"".join(map(item.write, value)))


def fixed(item: Shape, count: int) -> Shape:
    return Shape(
        lambda cursor: [item.read(cursor) for _ in range(count)], lambda value: b"".join(map(item.write, value))
    )


def option(item: Shape) -> Shape:
    def read(cursor: Cursor) -> Any:
        return item.read(cursor) if FLAG.read(cursor) else None

    return Shape(read, lambda value: b"\0" if value is None else b"\1" + item.write(value))


def record(**fields: Shape) -> Shape:
    return Shape(
        lambda cursor: {name: shape.read(cursor) for name, shape in fields.items()},
        lambda value: b"".join(shape.write(value[name]) for name, shape in fields.items()),
    )


def either(**variants: Shape) -> Shape:
    """A Rust enum; its values are pairs of a name and a content."""
    names = list(variants)

    def read(cursor: Cursor) -> tuple[str, Any]:
        index = _read_varint(cursor, 32)
        if index >= len(names):
            raise Malformed(f"variant {index} of {len(names)}")
        return names[index], variants[names[index]].read(cursor)

    return Shape(read, lambda value: _write_varint(names.index(value[0])) + variants[value[0]].write(value[1]))


def _flag(cursor: Cursor) -> bool:
    byte = cursor.take(1)[0]
    if byte > 1:
        raise Malformed(f"{byte} is no flag")
    return bool(byte)


def constant(expected: bytes) -> Shape:
    def read(cursor: Cursor) -> bytes:
        found = cursor.take(len(expected))
        if found != expected:
            raise Malformed(f"{found!r} in place of {expected!r}")
        return found

    return Shape(read, bytes)


FLAG = Shape(_flag, lambda value: bytes([value]))
NOTHING = constant(b"")
U8, U16, U32, U64, I32, I64 = raw(1), integer(16), integer(32), integer(64), _zigzag(32), _zigzag(64)
F32, F64 = number("<f"), number("<d")

# -- the state of a run --------------------------------------------------------------------------------------------

IDENTITY = record(signer=raw(32), p2p_identity=raw(32))
BATCH_ID = record(start=U64, end=U64)
COMMITTEE_PROOF = record(
    committee=either(TieBreaker=NOTHING, Verifier=NOTHING, Trainer=NOTHING), position=U64, index=U64
)
# bitvec writes how its words are to be read, each time.
_BITS = constant(b"\x13bitvec::order::Lsb0\x40\x00\x80\x08")
BLOOM = record(keys_count=constant(b"\x08"), keys=fixed(U64, 8), bits=_BITS, words=fixed(U64, 16))
WITNESS = record(
    proof=record(position=U64, index=U64, witness=FLAG),
    participant_bloom=BLOOM,
    broadcast_bloom=BLOOM,
    broadcast_merkle=raw(32),
)
ROUND = record(
    witnesses=many(WITNESS, 32), data_index=U64, random_seed=U64, height=U32, clients_len=U16, tie_breaker_tasks=U16
)
CLIENT = record(
    id=IDENTITY,
    state=either(Healthy=NOTHING, Dropped=NOTHING, Withdrawn=NOTHING, Ejected=NOTHING),
    exited_height=U32,
)
HUB_REPO = record(repo_id=text(64), revision=option(text(64)))
GCS_REPO = record(bucket=text(64), prefix=option(text(64)))
CHECKPOINT = either(Ephemeral=NOTHING, Dummy=HUB_REPO, Hub=HUB_REPO, P2P=HUB_REPO, Gcs=GCS_REPO, P2PGcs=GCS_REPO)
_HTTP = record(
    location=either(
        SingleUrl=text(192),
        NumberedFiles=record(url_template=text(64), start_index=U32, n_left_pad_zeros=U8, num_files=U32),
        Gcp=record(bucket_name=text(64), filter_directory=text(192)),
    ),
    token_size_in_bytes=either(TwoBytes=NOTHING, FourBytes=NOTHING),
    shuffle=either(DontShuffle=NOTHING, Seeded=raw(32)),
)
_ANNEALED = record(base_lr=F64, warmup_init_lr=F64, final_lr=F64, warmup_steps=U32, total_steps=U32)
LLM = record(
    max_seq_len=U32,
    cold_start_warmup_steps=U32,
    architecture=either(HfLlama=NOTHING, HfDeepseek=NOTHING, HfAuto=NOTHING, Torchtitan=NOTHING),
    checkpoint=CHECKPOINT,
    data_type=either(Pretraining=NOTHING, Finetuning=NOTHING),
    data_location=either(
        Dummy=NOTHING, Server=text(64), Local=text(192), Http=_HTTP, WeightedHttp=text(192), Preprocessed=text(192)
    ),
    lr_schedule=either(
        Constant=record(base_lr=F64, warmup_init_lr=F64, warmup_steps=U32),
        Linear=_ANNEALED,
        Cosine=_ANNEALED,
        WarmupStableDecay=record(
            base_lr=F64,
            warmup_init_lr=F64,
            cosine_decay_final_lr=F64,
            linear_decay_final_lr=F64,
            warmup_steps=U32,
            stable_steps=U32,
            cosine_decay_steps=U32,
            linear_decay_steps=U32,
        ),
    ),
    optimizer=either(
        Dummy=NOTHING,
        AdamW=record(betas=fixed(F32, 2), weight_decay=F32, eps=F32, clip_grad_norm=option(F32)),
        Distro=record(
            clip_grad_norm=option(F32),
            weight_decay=option(F32),
            compression_decay=F32,
            compression_topk=U16,
            compression_chunk=U16,
            quantize_1bit=FLAG,
        ),
    ),
)
CONFIG = record(
    **dict.fromkeys(
        (
            "warmup_time",
            "cooldown_time",
            "max_round_train_time",
            "round_witness_time",
            "global_batch_size_warmup_tokens",
            "epoch_time",
        ),
        U64,
    ),
    total_steps=U32,
    **dict.fromkeys(
        ("init_min_clients", "min_clients", "witness_nodes", "global_batch_size_start", "global_batch_size_end"), U16
    ),
    verification_percent=U8,
    waiting_for_members_extra_time=U8,
)
STATE = record(
    run_id=text(32),
    run_state=either(
        **dict.fromkeys(
            (
                "Uninitialized",
                "WaitingForMembers",
                "Warmup",
                "RoundTrain",
                "RoundWitness",
                "Cooldown",
                "Finished",
                "Paused",
            ),
            NOTHING,
        )
    ),
    model=either(LLM=LLM),
    config=CONFIG,
    progress=record(epoch=U16, step=U32, epoch_start_data_index=U64),
    epoch_state=record(
        rounds=fixed(ROUND, 4),
        clients=many(CLIENT, 256),
        exited_clients=many(CLIENT, 256),
        rounds_head=U32,
        start_step=U32,
        last_step=U32,
        start_timestamp=U64,
        first_round=FLAG,
        cold_start_epoch=FLAG,
    ),
    run_state_start_unix_timestamp=U64,
    pending_pause=FLAG,
)

# -- the coordinator's TCP link ------------------------------------------------------------------------------------

SIGNED = record(sender=raw(32), data=octets(1 << 16), signature=raw(64))
WITNESS_METADATA = record(
    step=U32,
    tokens_per_sec=F32,
    bandwidth_per_sec=F32,
    loss=F32,
    evals=many(record(name=text(32), value=F32), 8),
    prompt_results=many(I32, 16),
    prompt_index=U8,
    efficency=F32,
)
TO_SERVER = either(
    ChallengeResponse=octets(1 << 10),
    Else=either(
        Join=text(1 << 10),
        Witness=either(
            WitnessStep=record(witness=WITNESS, metadata=WITNESS_METADATA),
            WarmupStep=record(witness=WITNESS),
        ),
        HealthCheck=many(record(id=IDENTITY, proof=COMMITTEE_PROOF), 256),
        Checkpoint=CHECKPOINT,
    ),
)
TO_CLIENT = either(Challenge=raw(32), Else=either(Coordinator=STATE))

# -- between peers -------------------------------------------------------------------------------------------------

SOCKET_ADDRESS = either(V4=record(ip=raw(4), port=U16), V6=record(ip=raw(16), port=U16))
BLOB_TICKET = record(
    id=raw(32),
    addrs=many(either(Relay=text(1 << 10), Ip=SOCKET_ADDRESS), 64),
    format=either(Raw=NOTHING, HashSeq=NOTHING),
    hash=raw(32),
)
BROADCAST = record(
    step=U32,
    proof=COMMITTEE_PROOF,
    commitment=record(length=constant(b"\x60"), data_hash=raw(32), signature=raw(64)),
    nonce=U32,
    data=either(
        TrainingResult=record(batch_id=BATCH_ID, ticket=BLOB_TICKET),
        Finished=record(broadcast_merkle=raw(32), warmup=FLAG),
    ),
)
# Of this package's own kind of peers; on a topic that Psyche's clients do not enter (docs/rounds.md).
WEIGHTS_REPORT = record(epoch=U16, step=U32, root=raw(32), marks=octets(512 * 6), nonce=U32)
_BLOB = 1 << 32
TENSOR = record(dims=many(I64, 8), kind=U8, requires_grad=FLAG, data=either(Full=octets(_BLOB), OneBit=octets(_BLOB)))
RESULT = record(
    step=U32,
    trainer_nonce=U32,
    batch_id=BATCH_ID,
    distro_results=many(record(sparse_idx=TENSOR, sparse_val=TENSOR, xshape=many(U16, 8), totalk=U32), 1 << 16),
)
BLOB = either(
    DistroResult=RESULT,
    ModelParameter=record(name=octets(1 << 10), value=octets(_BLOB)),
    ModelConfig=record(config=text(1 << 22), tokenizer=text(1 << 26), names=many(text(1 << 10), 1 << 16)),
)
SHARING_REQUEST = either(Config=NOTHING, Parameter=text(1 << 10))
_SAYS = text(1 << 13)
SHARING_ANSWER = either(
    Ok=BLOB_TICKET,
    Err=either(
        TchSerializeError=_SAYS,
        InvalidUpdate=NOTHING,
        ParameterUnknown=_SAYS,
        ParameterAlreadyAdded=NOTHING,
        SerializationError=_SAYS,
        ParametersNotInitialized=NOTHING,
        ParameterNotInitialized=_SAYS,
        ResponseChannelNotInitialized=NOTHING,
        ConnectionIOError=_SAYS,
        DecodeParameterNameError=_SAYS,
        ModelConfigNotInitialized=NOTHING,
        TokenizerConfigNotInitialized=NOTHING,
        ParseConfig=_SAYS,
        SendConfig=NOTHING,
        LoadThreadCrashed=NOTHING,
        P2PAddDownloadError=_SAYS,
    ),
)


def frames(stream: bytes) -> list[bytes]:
    """The payloads of a direction of a TCP link: a length of four bytes, the highest first, before each."""
    cursor = Cursor(stream)
    found = []
    while cursor.at < len(stream):
        try:
            found.append(cursor.take(int.from_bytes(cursor.take(4), "big")))
        except Malformed:
            break  # the link was cut in the middle of the last one
    return found
