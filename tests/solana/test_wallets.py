"""Wallet files are read with care, and the peers' key follows from wallet and run."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from solders.keypair import Keypair

from distro_optim.comm.signing import SecretKey
from distro_optim.coordinator.solana.participation import Participation
from distro_optim.coordinator.solana.wallet import (
    RAW_WALLET,
    derive_peer_secret,
    find_wallet,
    parse_wallet,
    read_wallet,
)
from distro_optim.coordinator.solana_options import DEFAULT_WALLET, SolanaOptions
from distro_optim.errors import ConfigurationError

WALLET = Keypair.from_seed(bytes(range(32)))


def file_with(tmp_path: Path, text: str, mode: int = 0o600) -> Path:
    file = tmp_path / "wallet.json"
    file.write_text(text, encoding="utf-8")
    file.chmod(mode)
    return file


def test_a_wallet_file_is_a_list_of_64_numbers(tmp_path: Path) -> None:
    assert read_wallet(file_with(tmp_path, json.dumps(list(bytes(WALLET))))) == WALLET


def test_the_text_of_a_wallet_may_be_base58() -> None:
    assert parse_wallet(f" {WALLET} \n") == WALLET


@pytest.mark.parametrize("text", [str(WALLET), json.dumps(list(bytes(WALLET)))])
def test_a_wallet_may_stand_in_the_variable_of_psyches_containers(
    text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert find_wallet(DEFAULT_WALLET, {RAW_WALLET: text}) == WALLET
    other = Keypair.from_seed(bytes(32))
    file = file_with(tmp_path, json.dumps(list(bytes(other))))
    assert find_wallet(file, {RAW_WALLET: text}) == other, "a file that is named goes first"
    monkeypatch.setenv("RAW_WALLET_PRIVATE_KEY", text)
    assert Participation("a-run", SolanaOptions()).identity(bytes(32)).signer == bytes(WALLET.pubkey())


def test_a_variable_that_holds_no_wallet_is_not_shown() -> None:
    with pytest.raises(ConfigurationError, match="what stands in RAW_WALLET_PRIVATE_KEY is no wallet") as caught:
        find_wallet(DEFAULT_WALLET, {RAW_WALLET: "secret" * 10})
    assert "secretsecret" not in str(caught.value)


@pytest.mark.parametrize("mode", [0o644, 0o640, 0o602])
def test_a_wallet_that_others_can_read_is_refused(tmp_path: Path, mode: int) -> None:
    with pytest.raises(ConfigurationError, match="chmod 600"):
        read_wallet(file_with(tmp_path, json.dumps(list(bytes(WALLET))), mode))


def test_a_wallet_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match=r"none\.json cannot be read"):
        read_wallet(tmp_path / "none.json")


@pytest.mark.parametrize(
    "text",
    ["", "[]", "[1, 2]", "{}", "[" + "256, " * 63 + "1]", "[true" + ", 1" * 63 + "]", "0" * 88, "x" * 5000, "[" * 3000],
)
def test_what_is_no_wallet_is_refused_without_showing_it(tmp_path: Path, text: str) -> None:
    with pytest.raises(ConfigurationError, match="wallet") as caught:
        read_wallet(file_with(tmp_path, text))
    assert len(text) < 5 or text not in str(caught.value)


def test_a_public_key_of_another_secret_is_refused() -> None:
    mixed = list(bytes(WALLET)[:32]) + list(bytes(Keypair())[32:])
    with pytest.raises(ConfigurationError, match="no wallet"):
        parse_wallet(json.dumps(mixed))


def test_the_peers_key_is_that_of_psyche() -> None:
    assert bytes(WALLET.pubkey()).hex().startswith("03a107bf")
    secret = derive_peer_secret("test", WALLET)
    assert secret.hex() == "85441c6b739dd6093cf98bf4719f37642c66da75fd08f7353d9fbc07b550e5f6"
    public = SecretKey(secret).public
    assert public.hex() == "e9beec1e38206d5d439f8b5b69ca36c6649cf75f3c3a66d7d79ed65b492ea4a7"
    assert derive_peer_secret("other", WALLET) != secret
