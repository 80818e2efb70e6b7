"""Random walks and a crowd of 258 wallets on Psyche's own program: the twin gives the same after every call."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from distro_optim.coordinator.formats.account import CoordinatorAccount
from distro_optim.coordinator.formats.raw import layout_of
from distro_optim.coordinator.types import RunState
from distro_optim.testing import CoordinatorTwin
from distro_optim.testing.solana import coordinator_twin
from solana.recorded import WALKS, lines_of

ACCOUNT_BYTES = 119160
EVERY = 97
"""Calls between two looks at the raw account; reading it takes longer than the call."""


def call(twin: CoordinatorTwin, line: dict[str, Any]) -> dict[str, Any]:
    """What the twin says after a call, in the words of the recording."""
    result = twin.call(
        bytes.fromhex(line["data"]),
        signer=bytes.fromhex(line["signer"]),
        unix_timestamp=line["unix_timestamp"],
        slot=line["slot"],
    )
    coordinator = twin.account.state.coordinator
    return {
        "error": None if result.error is None else {"code": result.error.code, "name": result.error.name},
        "panic": result.panic,
        "nonce": twin.account.nonce,
        "run_state": list(RunState).index(coordinator.run_state),
        "step": coordinator.progress.step,
        "epoch": coordinator.progress.epoch,
        "state_borsh_sha256": twin.digest(),
    }


def differences(file: Path) -> Iterator[int]:
    """Numbers of the calls after which twin and program differ."""
    twin = CoordinatorTwin()
    for number, line in enumerate(lines_of(file)[1:]):
        said = call(twin, line)
        if said != {key: line[key] for key in said}:
            yield number


def test_there_are_walks() -> None:
    assert len(WALKS) >= 4


@pytest.mark.slow
@pytest.mark.parametrize("file", WALKS, ids=lambda file: file.name.split(".")[0])
def test_every_call_of_a_walk_ends_like_the_programs_own(file: Path) -> None:
    assert list(differences(file)) == []


@pytest.mark.slow
@pytest.mark.parametrize("file", WALKS, ids=lambda file: file.name.split(".")[0])
def test_the_raw_account_of_the_program_holds_what_the_twin_holds(file: Path) -> None:
    twin, raw, layout = CoordinatorTwin(), bytearray(ACCOUNT_BYTES), layout_of(CoordinatorAccount)
    for number, line in enumerate(lines_of(file)[1:]):
        call(twin, line)
        for at, data in line["diff"]:
            raw[at : at + len(data) // 2] = bytes.fromhex(data)
        if number % EVERY == 0:
            assert layout.read(raw, 8) == twin.account


def test_the_comparison_bites(monkeypatch: pytest.MonkeyPatch) -> None:
    """Points that are shared by one client too many show from the end of the first epoch on."""
    right = coordinator_twin._with_points

    def one_point_less(client: Any, earned: int, slashed: int) -> Any:
        return right(client, max(0, earned - 1), slashed)

    monkeypatch.setattr(coordinator_twin, "_with_points", one_point_less)
    assert any(next(differences(file), None) is not None for file in WALKS)


# -- the interface -----------------------------------------------------------------------------------------------------


def test_what_is_no_instruction_has_anchors_numbers() -> None:
    twin = CoordinatorTwin()
    for data, code in ((b"", 101), (b"12345678", 101), (bytes.fromhex("48a07d666a86f64b") + b"short", 102)):
        result = twin.call(data, signer=bytes(32), unix_timestamp=0, slot=0)
        assert result.error is not None
        assert result.error.code == code


def test_a_refused_call_leaves_the_account_alone() -> None:
    twin, refused = CoordinatorTwin(), 0
    (file,) = [file for file in WALKS if "walk_1" in file.name]
    for line in lines_of(file)[1:]:
        before = twin.account
        if call(twin, line)["error"] is not None:
            refused += 1
            assert twin.account is before
    assert refused > 10
