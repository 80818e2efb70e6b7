"""``solana:RUN-ID`` as a strategy, a session and the command take it; mistakes are told before any network."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import pytest
from solders.keypair import Keypair

from distro_optim import PsycheStrategy, Runtime
from distro_optim.cli import _parser, main
from distro_optim.client.command import options_from
from distro_optim.client.options import JoinOptions
from distro_optim.comm.signing import SecretKey
from distro_optim.coordinator.solana.wallet import derive_peer_secret
from distro_optim.coordinator.solana_options import SolanaOptions
from distro_optim.coordinator.ticket_text import check_text, run_on_solana
from distro_optim.errors import ConfigurationError, ProtocolError
from solana.solana_arena import wallet

pytestmark = pytest.mark.waiting

ME = wallet(7)


@pytest.fixture
def wallet_file(tmp_path: Path) -> Path:
    return write_wallet(tmp_path / "wallet.json", ME)


def write_wallet(path: Path, keys: Keypair) -> Path:
    path.write_text(json.dumps(list(bytes(keys))))
    path.chmod(0o600)
    return path


@pytest.mark.parametrize(
    ("text", "run_id"),
    [
        ("solana:my-run", "my-run"),
        ("'solana:my-run',", "my-run"),
        ("Solana: my/run", "my/run"),
        ("solana:1/2", None),  # a host that is called so
        ("solana:20000/my-run", None),
        ("example.org:1/solana:x", None),
        ("psyche1abc", None),
    ],
)
def test_which_texts_mean_a_run_on_solana(text: str, run_id: str | None) -> None:
    assert run_on_solana(text) == run_id


@pytest.mark.parametrize("text", ["solana:", "solana: ", "solana:" + 33 * "x", "solana:" + 17 * "ü"])
def test_names_that_no_run_can_have(text: str) -> None:
    with pytest.raises(ProtocolError, match="1 to 32 bytes"):
        check_text(text)
    with pytest.raises(ConfigurationError, match="1 to 32 bytes"):
        PsycheStrategy(run=text)
    with pytest.raises(ConfigurationError, match="1 to 32 bytes"):
        asked(text)


def asked(*arguments: str, **environment: str) -> JoinOptions:
    options: JoinOptions = options_from(_parser().parse_args(["join", *arguments]), environment)
    return options


def test_the_command_takes_psyches_variables_and_its_own_options() -> None:
    options = asked(
        *("solana:my-run", "--wallet", "w.json", "--max-fees", "0.05", "--authorizer", "A"),
        RPC="https://a.example, https://b.example",
        WS_RPC="wss://a.example",
        CLIENT_VERSION="v1",
        AUTHORIZER="B",
    )
    assert options.run == "solana:my-run"
    assert options.solana == SolanaOptions(
        wallet=Path("w.json"),
        rpc=("https://a.example", "https://b.example"),
        websockets=("wss://a.example",),
        authorizer="A",
        client_version="v1",
        max_fees=50_000_000,
    )
    assert asked("solana:", "--run-id", "'my-run'").run == "solana:my-run"
    assert asked("psyche1abc", RPC="https://a.example").solana is None


@pytest.mark.parametrize("amount", ["much", "-1", "0.0000000001", "nan", "inf"])
def test_amounts_that_are_none(amount: str) -> None:
    with pytest.raises(ConfigurationError, match=r"--max-fees .*: give an amount in SOL"):
        asked("solana:my-run", "--max-fees", amount)


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"wallet": "/nowhere/wallet.json"}, "the wallet /nowhere/wallet.json cannot be read"),
        ({"cluster": "moon"}, "there is no cluster 'moon', only devnet, mainnet, localhost"),
        ({"rpc": ["example.org"]}, "rpc takes addresses that begin with http"),
        ({"websockets": ["https://example.org"]}, "websockets takes addresses that begin with ws"),
        ({"authorizer": "me"}, "authorizer is 'me', which is no public key"),
        ({"join_authority": "me"}, "join_authority is 'me'"),
        ({"coordinator_program": "it"}, "coordinator_program is 'it'"),
        ({"main_authority": "me"}, "main_authority is 'me'"),
        ({"max_fees": 4999}, "one transaction costs 5000"),
        ({"max_fees": 5999, "compute_unit_price": 5000}, "one transaction costs 6000"),
        ({"compute_unit_price": -1}, "compute_unit_price is -1 millionths of a lamport: give 0 to"),
    ],
)
def test_options_that_cannot_work(changed: dict[str, object], words: str, wallet_file: Path) -> None:
    options = SolanaOptions(**{"wallet": wallet_file, **changed})  # type: ignore[arg-type]
    with pytest.raises(ConfigurationError, match=words):
        PsycheStrategy(run="solana:my-run", solana=options)
    with pytest.raises(ConfigurationError, match=words):
        Runtime.connect("solana:my-run", solana=options)


def test_a_wallet_that_others_can_read_is_told_in_one_line(
    wallet_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    wallet_file.chmod(0o644)
    assert main(["join", "solana:my-run", "--wallet", str(wallet_file), "--logs", "none"]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert f"chmod 600 {wallet_file}" in error


def test_options_of_solana_without_a_run_there() -> None:
    with pytest.raises(ConfigurationError, match="solana is for runs on Solana"):
        PsycheStrategy(run="example.org:20000/my-run", solana=SolanaOptions())


def test_a_wallet_and_the_key_among_peers_are_two(wallet_file: Path, tmp_path: Path) -> None:
    options = SolanaOptions(wallet=wallet_file)
    identity = Runtime.connect("solana:my-run", solana=options).identity
    assert identity.signer == bytes(ME.pubkey())
    assert identity.p2p_identity == SecretKey(derive_peer_secret("my-run", ME)).public
    own = SecretKey(bytes(range(32)))
    assert Runtime.connect("solana:my-run", solana=options, secret_key=own).identity.p2p_identity == own.public
    assert copy.deepcopy(options) == options
