"""Addresses follow from names and keys, and the small accounts hold what the real programs wrote."""

from __future__ import annotations

import base64
import hashlib
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from solders.pubkey import Pubkey

from coordinator.test_solana_account import account_of_a_run
from distro_optim.coordinator.formats import borsh
from distro_optim.coordinator.formats.account import (
    ACCOUNT_SIZE,
    nonce_of,
    read_account,
    write_account,
)
from distro_optim.coordinator.solana import arguments as args
from distro_optim.coordinator.solana.program_errors import (
    COORDINATOR_ERRORS,
    advice,
    coordinator_error_number,
    error_name,
    name_in_logs,
    refusal_name,
)
from distro_optim.coordinator.solana.programs import (
    EVERYBODY,
    JOIN_SCOPE,
    Programs,
    default_treasurer_index,
    parse_key,
)
from distro_optim.coordinator.solana.small_accounts import (
    INSTANCE_BYTES,
    TREASURY_BYTES,
    Authorization,
    CoordinatorInstance,
    Participant,
    TokenAccount,
    Treasury,
    authorization_bytes,
    deployment_slot,
    mint_decimals,
    program_data_of,
    read_clock,
    read_small_account,
    write_small_account,
)
from distro_optim.errors import ConfigurationError, CoordinatorErrorCode, ProtocolError
from solana.recorded import TRANSACTIONS, lines_of

PROGRAMS = Programs()
K = Pubkey.from_bytes(bytes(range(32)))
SHARED = Path(os.environ.get("DISTRO_OPTIM_VECTORS", Path(__file__).parents[3] / "shared" / "vectors"))
REAL_ACCOUNT = SHARED / "coordinator" / "solana-account-v1.bin"


@pytest.mark.parametrize(
    ("run_id", "address", "bump"),
    [
        ("test", "9L4yCH7TsMn9JfoXYEupuQwtcNPTTtHcyNL6uqDfjwGB", 255),
        ("consilience-40b", "2MV4Zy5ZF1TB4b85ajHiKdin5JD5mKa5tMdfr3MGXdQN", 254),
        ("a" * 32, "8m8XEqzkzLkyNBdHoEDfBNzmnVjGXaryVbWkP19wJSEv", 253),
    ],
)
def test_the_instance_of_a_run_follows_from_its_name(run_id: str, address: str, bump: int) -> None:
    assert PROGRAMS.instance_and_bump(run_id) == (Pubkey.from_string(address), bump)


@pytest.mark.parametrize("run_id", ["", "a" * 33, "ä" * 17])
def test_no_run_can_have_a_name_of_more_than_32_bytes_or_none(run_id: str) -> None:
    with pytest.raises(ConfigurationError, match="1 to 32"):
        PROGRAMS.instance(run_id)


def test_other_addresses_follow_from_keys() -> None:
    assert str(PROGRAMS.authorization(K, EVERYBODY)) == "J1eUsD7xvzVuVg1vEBQKWy2tUPEChjZWbDzaSJFMrAv4"
    assert default_treasurer_index("test") == 7313085519096743583
    treasury = PROGRAMS.treasury(default_treasurer_index("test"))
    assert str(treasury) == "tG3nRngwkJC3JAL9Aq9AMhFtTzr56hr9ZmaSRpD8dT8"
    assert str(PROGRAMS.participant(treasury, K)) == "AxSyPDerbBo1EBxPiMwrVnhDw5SeGiNbRkHo77yWRXSj"


def test_what_is_no_key_is_refused() -> None:
    with pytest.raises(ConfigurationError, match="no public key"):
        parse_key("4SHug")


@pytest.mark.parametrize("file", TRANSACTIONS, ids=lambda file: file.name.split(".")[0])
def test_the_accounts_of_the_real_programs_are_read_and_written_alike(file: Path) -> None:
    kinds: list[tuple[type[Any], Pubkey]] = [
        (CoordinatorInstance, PROGRAMS.coordinator),
        (Authorization, PROGRAMS.authorizer),
        (Treasury, PROGRAMS.treasurer),
        (Participant, PROGRAMS.treasurer),
    ]
    seen = 0
    for line in lines_of(file):
        for account in line["after"]:
            for kind, owner in kinds:
                data = base64.b64decode(account.get("data") or "")
                if account.get("owner") != str(owner) or len(data) > 4096:
                    continue
                try:
                    value = read_small_account(kind, data)
                except ProtocolError:
                    continue  # one of another kind
                assert write_small_account(value, len(data)) == data
                seen += 1
    assert seen


def test_sizes_are_those_that_the_programs_allot() -> None:
    assert authorization_bytes(len(JOIN_SCOPE), 0) == 108
    longest = CoordinatorInstance(1, bytes(32), bytes(32), bytes(32), "a" * 64)
    assert len(write_small_account(longest, 0)) == INSTANCE_BYTES
    treasury = Treasury(1, 2, bytes(32), bytes(32), bytes(32), bytes(32), bytes(32), 3, 4)
    assert len(write_small_account(treasury, TREASURY_BYTES)) == TREASURY_BYTES


def test_an_authorization_is_for_everybody_for_one_or_for_its_delegates() -> None:
    grantor, one, other = b"g" * 32, b"1" * 32, b"2" * 32
    everybody = Authorization(1, grantor, bytes(32), JOIN_SCOPE, True, (), 0)
    single = Authorization(1, grantor, one, JOIN_SCOPE, True, (), 0)
    delegated = Authorization(1, grantor, one, JOIN_SCOPE, True, (other,), 0)
    inactive = Authorization(1, grantor, bytes(32), JOIN_SCOPE, False, (), 0)
    allowed = [
        [a.is_valid_for(grantor, who, JOIN_SCOPE) for who in (one, other)] for a in (everybody, single, delegated)
    ]
    assert allowed == [[True, True], [True, False], [True, True]]
    assert not inactive.is_valid_for(grantor, one, JOIN_SCOPE)
    assert not everybody.is_valid_for(one, one, JOIN_SCOPE)
    assert not everybody.is_valid_for(grantor, one, b"other")


@pytest.mark.parametrize("data", [b"", bytes(173), b"\x9c" * 8, bytes(2 << 20)])
def test_what_is_no_instance_is_refused(data: bytes) -> None:
    with pytest.raises(ProtocolError):
        read_small_account(CoordinatorInstance, data)


def test_the_accounts_of_the_cluster_are_read() -> None:
    clock = (7).to_bytes(8, "little") + bytes(24) + (-5).to_bytes(8, "little", signed=True)
    assert read_clock(clock) == (7, -5)
    assert TokenAccount.read(b"m" * 32 + b"o" * 32 + (9).to_bytes(8, "little") + bytes(93)).amount == 9
    assert mint_decimals(bytes(44) + b"\x06" + bytes(37)) == 6
    assert program_data_of(b"\2\0\0\0" + bytes(range(32))) == bytes(range(32))
    assert deployment_slot(b"\3\0\0\0" + bytes([7, *bytes(7)]) + b"code") == 7
    for read in (read_clock, TokenAccount.read, mint_decimals, program_data_of, deployment_slot):
        with pytest.raises(ProtocolError):
            read(bytes(3))


# -- the big account ---------------------------------------------------------------------------------------------------


def big_account() -> bytes:
    """A real one where it is there, else one of our own that says the same."""
    if REAL_ACCOUNT.exists():
        return REAL_ACCOUNT.read_bytes()
    return write_account(account_of_a_run())


def test_the_big_account_is_written_as_it_is_read() -> None:
    account = read_account(big_account())
    written = write_account(account)
    assert len(written) == ACCOUNT_SIZE
    assert read_account(written) == account
    assert nonce_of(written) == account.nonce == 2


def test_the_model_of_a_real_account_has_the_bytes_that_psyche_gives_it() -> None:
    state = read_account(big_account()).state.coordinator
    data = borsh.encode(args.Update(None, state.config, state.model, None))
    assert len(data) == 462 - 8
    whole = args.encode_arguments(args.Update(None, state.config, state.model, None))
    assert hashlib.sha256(whole).hexdigest() == "e2d39f515ac2be8b710a9dd7c6c81dff5f6793722a0b9351b74f5ad49ba96cd5"


def test_a_text_that_is_too_long_is_not_written() -> None:
    account = read_account(big_account())
    with pytest.raises(ConfigurationError, match="room is for 96"):
        write_account(replace(account, state=replace(account.state, client_version="v" * 97)))


# -- errors ------------------------------------------------------------------------------------------------------------


def test_every_refusal_of_the_rules_has_a_number() -> None:
    names = {refusal_name(code) for code in CoordinatorErrorCode}
    assert names <= set(COORDINATOR_ERRORS)
    assert coordinator_error_number("CoordinatorErrorHalted") == 6015
    assert error_name(6022) == "MoreClientsThanBatches"
    assert error_name(2003) == "ConstraintRaw"
    assert error_name(6024) is None


def test_logs_name_an_error_whatever_its_number() -> None:
    logs = [
        "Program log: Instruction: JoinRun",
        "Program log: AnchorError caused by account: authorization. Error Code: AccountNotInitialized. Error Number: "
        "3012. Error Message: The program expected this account to be already initialized.",
    ]
    assert name_in_logs(logs) == "AccountNotInitialized"
    assert name_in_logs(logs[:1]) is None
    assert "authorize this wallet" in advice("AccountNotInitialized")
    assert "Unheard" in advice("Unheard")
