"""``distro-optim localnet --solana``: each line that it prints can be typed as it stands."""

from __future__ import annotations

import asyncio
import shlex
from pathlib import Path

import pytest

from distro_optim.cli import _parser, main
from distro_optim.client.command import options_from
from distro_optim.coordinator.solana.participation import Participation
from distro_optim.errors import ConfigurationError
from distro_optim.operate.localnet import LocalnetOptions, make_cluster, serve_localnet

pytestmark = pytest.mark.waiting


def test_what_is_printed_joins_shows_and_operates_the_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    async def join(words: list[str]) -> None:
        options = options_from(_parser().parse_args(words), {})
        assert (options.run, options.solana is not None) == ("solana:a run", True)
        assert options.solana is not None
        participation = Participation("a run", options.solana)
        client = participation.coordinator(participation.peer_key.public)
        await client.join()
        await client.close()

    async def check() -> None:
        said: asyncio.Queue[str] = asyncio.Queue()
        until = asyncio.Event()
        options = LocalnetOptions(folder=tmp_path / "my wallets", run_id="a run")
        serving = asyncio.create_task(serve_localnet(options, said.put_nowait, until=until))
        typed: list[list[str]] = []
        while len(typed) < 5:
            text = await said.get()
            if text.strip().startswith("distro-optim"):
                typed.append(shlex.split(text)[1:])
        for words in typed[:2]:
            await join(words)
        for words, expected in zip(
            typed[2:], ("2 of at most 8", "1000 points an epoch", "pause the run: costs 0.000005 SOL"), strict=True
        ):
            assert await asyncio.to_thread(main, words) == 0
            assert expected in capsys.readouterr().out
        until.set()
        await serving

    asyncio.run(check())


def test_a_wallet_is_never_overwritten_and_a_batch_has_8_sequences(tmp_path: Path) -> None:
    (tmp_path / "wallet-1.json").write_text("precious")
    with pytest.raises(ConfigurationError, match=r"wallet-1\.json already, and a wallet is never overwritten"):
        make_cluster(LocalnetOptions(folder=tmp_path))
    assert (tmp_path / "wallet-1.json").read_text() == "precious"
    with pytest.raises(ConfigurationError, match="--wallets takes 1 to 8"):
        make_cluster(LocalnetOptions(folder=tmp_path, wallets=9))


def test_a_port_that_is_taken_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    async def check() -> None:
        server = await asyncio.start_server(lambda *_: None, "127.0.0.1", 0)
        port = server.sockets[0].getsockname()[1]
        assert await asyncio.to_thread(main, ["localnet", "--solana", "--port", str(port)]) == 2
        assert f"the port {port} cannot be used" in capsys.readouterr().err
        server.close()

    asyncio.run(check())
