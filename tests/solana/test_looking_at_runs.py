"""`distro-optim run show` and `list`: without a wallet, on any cluster."""

from __future__ import annotations

import asyncio
import json

import pytest
from solders.keypair import Keypair

from distro_optim import cli
from distro_optim.coordinator.solana.viewing import printable
from distro_optim.coordinator.solana_clusters import CLUSTERS, cluster_of
from distro_optim.coordinator.solana_options import SolanaOptions
from distro_optim.errors import ConfigurationError, JoinRefusedError
from distro_optim.operate.looking import LookOptions, look
from distro_optim.testing import dummy_run
from distro_optim.testing.coordinator import training
from solana.solana_arena import OPERATOR, SolanaArena, in_arena

pytestmark = [pytest.mark.waiting]


def request(arena: SolanaArena, run_id: str | None, *, as_json: bool = False) -> LookOptions:
    return LookOptions(run_id, SolanaOptions(rpc=(arena.server.url,)), as_json)


def test_a_run_is_shown_with_its_phase_and_its_clients() -> None:
    async def check(arena: SolanaArena) -> None:
        await training(arena)
        (text,) = await look(request(arena, "dummy"))
        lines = dict(line.split("  ", 1) for line in text.splitlines() if "  " in line)
        shown = {name.strip(): value.strip() for name, value in lines.items()}
        assert shown["phase"] == "RoundTrain"
        assert shown["step"] == "1 of 1000"
        assert shown["in the epoch"] == "3"
        assert shown["ever joined"] == "3 of at most 8"
        assert shown["operator"] == str(OPERATOR.pubkey())

    in_arena(check)


def test_a_run_is_told_to_programs() -> None:
    async def check(arena: SolanaArena) -> None:
        (client, *_) = await training(arena)
        (text,) = await look(request(arena, "dummy", as_json=True))
        told = json.loads(text)
        assert told["coordinator"]["run_state"] == "RoundTrain"
        assert told["nonce"] == arena.account.nonce
        assert told["wallets"][0]["peer"] == client.client.identity.p2p_identity.hex()
        assert told["coordinator"]["config"]["total_steps"] == 1000

    in_arena(check)


def test_all_runs_are_listed() -> None:
    async def check(arena: SolanaArena) -> None:
        arena.validator.host(
            dummy_run("another"),
            Keypair.from_seed(b"a" * 32).pubkey(),
            main_authority=OPERATOR.pubkey(),
            join_authority=OPERATOR.pubkey(),
        )
        texts = await look(request(arena, None))
        assert [text.split()[0] for text in texts] == ["another", "dummy"]
        told = [json.loads(text)["run_id"] for text in await look(request(arena, None, as_json=True))]
        assert told == ["another", "dummy"]

    in_arena(check)


def test_a_run_that_is_not_there_is_said_to_be_so() -> None:
    async def check(arena: SolanaArena) -> None:
        with pytest.raises(JoinRefusedError, match="there is no run 'nothing'"):
            await look(request(arena, "nothing"))

    in_arena(check)


def test_the_command_says_in_one_line_what_is_wrong(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["run", "show", "x", "--cluster", "moon"]) == 2
    assert capsys.readouterr().err == "distro-optim: there is no cluster 'moon', only devnet, mainnet, localhost\n"
    assert cli.main(["run", "list", "--program", "short"]) == 2
    assert "no public key" in capsys.readouterr().err


def test_addresses_of_ones_own_take_the_place_of_a_preset() -> None:
    assert cluster_of("devnet") == CLUSTERS["devnet"]
    own = cluster_of("devnet", ["https://example.org/key"])
    assert (own.rpc, own.websockets) == (("https://example.org/key",), ("wss://example.org/key",))
    assert cluster_of("mainnet", ["http://a"], ["ws://b"]).websockets == ("ws://b",)
    with pytest.raises(ConfigurationError):
        cluster_of("moon")
    for wrong in ("your-node.example", "ws://a", "http://", "http://a:x", "http://a:1,http://b", "https://[b"):
        with pytest.raises(ConfigurationError, match="rpc takes addresses that begin with http:// or https:// and"):
            cluster_of("devnet", ["https://secret.example/key", wrong])
    with pytest.raises(ConfigurationError, match="websockets takes addresses that begin with ws:// or wss:// and"):
        cluster_of("devnet", [], ["https://a"])
    with pytest.raises(ConfigurationError, match="rpc takes a list of addresses, also of one"):
        cluster_of("devnet", "https://a")


def test_several_nodes_are_named_with_commas_or_one_by_one(capsys: pytest.CaptureFixture[str]) -> None:
    async def check(arena: SolanaArena) -> None:
        url = arena.server.url
        for given in (["--rpc", f"{url}, {url}"], ["--rpc", url, "--rpc", url]):
            assert await asyncio.to_thread(cli.main, ["run", "list", *given]) == 0
            assert "dummy" in capsys.readouterr().out
        assert await asyncio.to_thread(cli.main, ["run", "list", "--rpc", "nowhere"]) == 2
        assert "and name a host, and number 1 is none" in capsys.readouterr().err

    in_arena(check)


def test_text_of_strangers_cannot_steer_a_terminal() -> None:
    assert printable("a\x1b[2Jb\nc") == "a?[2Jb?c"
