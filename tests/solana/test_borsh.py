"""Borsh as Psyche's programs read and write it."""

from __future__ import annotations

import contextlib
import hashlib
from dataclasses import dataclass
from typing import Annotated, Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from distro_optim.comm.postcard import F32, I32, U8, U16, Fixed, Limit
from distro_optim.coordinator.formats import borsh
from distro_optim.coordinator.model import Gcs, GcsRepo, Hub, HubRepo
from distro_optim.coordinator.solana import arguments as args
from distro_optim.coordinator.types import (
    Committee,
    CoordinatorConfig,
    MerkleRoot,
    NodeIdentity,
    RunState,
    Witness,
    WitnessBloom,
    WitnessEvalResult,
    WitnessMetadata,
    WitnessProof,
)
from distro_optim.errors import ConfigurationError, LimitExceededError, ProtocolError, TruncatedError
from distro_optim.verify.bloom import BloomFilter

K, P = bytes(range(32)), bytes(range(32, 64))


@dataclass(frozen=True)
class Everything:
    """One field of each kind."""

    text: str
    fixed_text: Annotated[str, Limit(4)]
    blob: bytes
    raw: Annotated[bytes, Fixed(2)]
    numbers: tuple[U16, ...]
    slots: Annotated[tuple[I32, ...], Limit(3)]
    pair: Annotated[tuple[U8, ...], Fixed(2)]
    maybe: U8 | None
    yes: bool
    state: RunState
    number: F32


EVERYTHING = Everything("äb", "xy", b"\x01", b"\x02\x03", (4, 5), (-1,), (6, 7), 8, True, RunState.PAUSED, 0.5)
BYTES = bytes.fromhex(
    "03000000c3a46278790000010000000102030200000004000500ffffffff000000000000000001000000000000000607010801070000003f"
)


def test_each_kind_of_field_has_its_bytes() -> None:
    assert borsh.encode(EVERYTHING) == BYTES
    assert borsh.decode(Everything, BYTES) == EVERYTHING


@pytest.mark.parametrize("length", range(len(BYTES)))
def test_what_is_cut_is_refused(length: int) -> None:
    with pytest.raises((TruncatedError, LimitExceededError)):
        borsh.decode(Everything, BYTES[:length])


@given(st.binary(max_size=80))
def test_arbitrary_bytes_never_crash(data: bytes) -> None:
    with contextlib.suppress(ProtocolError):
        found = borsh.decode(Everything, data)
        assert borsh.decode(Everything, borsh.encode(found)) == found


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d: d.__setitem__(slice(0, 4), b"\xff\xff\xff\xff"), "announced"),
        (lambda d: d.__setitem__(4, 0xFF), "UTF-8"),
        (lambda d: d.__setitem__(38, 4), "room is for 3"),
        (lambda d: d.__setitem__(48, 2), "option"),
        (lambda d: d.__setitem__(50, 2), "truth value"),
        (lambda d: d.__setitem__(51, 8), "variant 8"),
        (lambda d: d.__setitem__(slice(52, 56), b"\x00\x00\xc0\x7f"), "NaN"),
        (lambda d: d.append(0), "1 bytes follow"),
    ],
)
def test_what_is_wrong_is_named(change: Any, message: str) -> None:
    data = bytearray(BYTES)
    change(data)
    with pytest.raises(ProtocolError, match=message):
        borsh.decode(Everything, data)


def test_text_of_fixed_size_keeps_whatever_bytes_it_has() -> None:
    data = bytes(borsh.encode(EVERYTHING)).replace(b"xy\0\0", b"\xff\0z\0")
    assert borsh.encode(borsh.decode(Everything, data)) == data


@pytest.mark.parametrize("value", [-1, 256])
def test_a_number_that_does_not_fit_is_refused(value: int) -> None:
    with pytest.raises(ConfigurationError, match="u8") as caught:
        borsh.encode(Everything("", "", b"", b"ab", (), (), (1, 2), value, True, RunState.PAUSED, 0.0))
    assert caught.value.name == "maybe"


# -- golden data of the real programs ----------------------------------------------------------------------------------


def digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


@pytest.mark.parametrize(
    ("arguments", "data"),
    [
        (args.JoinRun(NodeIdentity(K, P)), "48a07d666a86f64b" + K.hex() + P.hex()),
        (
            args.HealthCheck(NodeIdentity(b"\x09" * 32, b"\x09" * 32), Committee.TRAINER, 1, 130),
            "735a63a88a129d83" + "09" * 64 + "02" + "0100000000000000" + "8200000000000000",
        ),
        (args.CheckpointUploaded(Hub(HubRepo("a/b"))), "d5c813ccf08fb8fc02612f62" + "00" * 61 + "00"),
        (
            args.CheckpointUploaded(Gcs(GcsRepo("b", "p"))),
            "d5c813ccf08fb8fc0462" + "00" * 63 + "0170" + "00" * 63,
        ),
        (args.SetPaused(False), "5b3c7dc0b0e1a6da00"),
        (args.SetFutureEpochRates(444444, None), "ef15a057c7c8b681011cc806000000000000"),
        (args.UpdateClientVersion("test"), "c1152e3c33020dfb0400000074657374"),
        (
            args.InitCoordinator(K, P, "test", "test"),
            "14399449e8857a19" + K.hex() + P.hex() + "0400000074657374" * 2,
        ),
        (
            args.AuthorizationCreate(bytes(32), b"CoordinatorJoinRun"),
            "149dc4b3e7df6d66" + "00" * 32 + "12000000" + b"CoordinatorJoinRun".hex(),
        ),
        (args.AuthorizationGrantorUpdate(True), "1d7441a161bd3af901"),
        (args.AuthorizationGranteeUpdate(False, (K,)), "ba6f7fc75990c1430001000000" + K.hex()),
        (args.RunUpdate(paused=False), "33562e740d42149d" + "00" * 6 + "0100" + "00"),
        (args.ParticipantClaim(1777), "a096e8563b6bad26f106000000000000"),
        (args.Tick(), "5c4f2c0865503f0f"),
    ],
    ids=lambda value: type(value).__name__ if not isinstance(value, str) else "",
)
def test_instructions_have_the_bytes_that_psyche_gives_them(arguments: Any, data: str) -> None:
    assert args.encode_arguments(arguments).hex() == data


def a_report() -> Witness:
    bloom = BloomFilter(tuple(range(1, 9)), (0,) * 16)
    bloom.add_many([hashlib.sha256(b"Hello, world!").digest()])
    seen = WitnessBloom(bloom.keys, bloom.words)
    return Witness(WitnessProof(3, 300, True), seen, WitnessBloom(), MerkleRoot(b"\xab" * 32))


def test_reports_have_the_bytes_that_psyche_gives_them() -> None:
    metadata = WitnessMetadata(7, 1.5, 0.0, float("inf"), (WitnessEvalResult("arc_easy", 0.25),), (1, -1, 300), 2, 0.5)
    assert digest(borsh.encode(metadata)) == "ade2db533956ec5da7b6ef8786fcf6e499612ddf808733f8370a8075dfc0d95d"
    warmup = args.encode_arguments(args.WarmupWitness.of(a_report()))
    assert len(warmup) == 441
    assert digest(warmup) == "0b2d8b27e06a64bc338926d44ea3db33434e3d36384a52b32f1820636015d0a0"
    witness = args.encode_arguments(args.WitnessRound.of(a_report(), metadata))
    assert len(witness) == 830
    assert digest(witness) == "5f49f940391507294ae6ff85dd70841491b056e313fb692a69f4d952c2378ca4"


def test_a_configuration_has_the_bytes_that_psyche_gives_it() -> None:
    config = CoordinatorConfig(15, 30, 15, 1, 0, 60, 25000, 1, 1, 0, 2048, 2048, 0, 3)
    assert borsh.encode(config).hex() == (
        "0f000000000000001e000000000000000f00000000000000010000000000000000000000000000003c00000000000000"
        "a8610000010001000000000800080003"
    )


def test_metadata_that_are_no_numbers_are_refused_before_they_are_sent() -> None:
    metadata = WitnessMetadata(7, 1.5, 0.0, float("nan"), (), (), 2, 0.5)
    with pytest.raises(ConfigurationError, match="NaN") as caught:
        args.encode_arguments(args.WitnessRound.of(a_report(), metadata))
    assert caught.value.name == "metadata.loss"
