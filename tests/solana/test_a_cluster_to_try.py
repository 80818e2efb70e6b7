"""``distro-optim localnet --solana``: each line that it prints can be typed as it stands."""

from __future__ import annotations

import asyncio
import shlex
from pathlib import Path

import pytest

from client.processes import DISTRO, write_state
from distro_optim.cli import _parser, main
from distro_optim.client.command import options_from
from distro_optim.coordinator.solana.participation import Participation
from distro_optim.coordinator.types import RunState
from distro_optim.errors import ConfigurationError
from distro_optim.operate.localnet import LocalnetOptions, lines_to_type, make_cluster, serve_localnet

pytestmark = pytest.mark.waiting


ANSWERS = {
    "show": "2 of at most 8",
    "rates": "1000 points an epoch: costs 0.000005 SOL",
    "claim": "nothing is to be done",  # nobody has trained
    "pause": "pause the run: costs 0.000005 SOL",
    "create": "make the run 'mine' with the treasury",
    "fund": "give 0.001 tokens of",
}


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
        said: list[str] = []
        until = asyncio.Event()
        options = LocalnetOptions(folder=tmp_path / "my wallets", run_id="a run")
        serving = asyncio.create_task(serve_localnet(options, said.append, until=until))
        while not said:
            await asyncio.sleep(0)
        typed = [shlex.split(text)[1:] for text in said if text.strip().startswith("distro-optim")]
        for words in typed[:2]:
            await join(words)
        assert [words[1] for words in typed[2:]] == ["show", *ANSWERS]
        for words in typed[2:]:
            if "--follow" not in words:
                assert await asyncio.to_thread(main, words) == 0
                assert ANSWERS[words[1]] in capsys.readouterr().out
        until.set()
        await serving

    asyncio.run(check())


def test_a_run_of_ones_own_is_hosted_as_its_file_describes_it(tmp_path: Path) -> None:
    toml = write_state(
        tmp_path / "state.toml",
        init_min_clients=3,
        checkpoint='{ Hub = { repo_id = "a/b" } }',
        data_location='{ Local = "x" }',
        optimizer=DISTRO,
    )
    options = LocalnetOptions(folder=tmp_path, state=toml, model=tmp_path / "my model", data=Path("tokens.bin"))
    made = make_cluster(options)
    assert len(made.files) == 3
    run = made.validator.run("proof").state.coordinator
    assert (run.run_state, run.config.total_steps) == (RunState.WAITING_FOR_MEMBERS, 10)
    lines = lines_to_type(options, "http://127.0.0.1:1", made)
    words = shlex.split(lines[3])
    assert words[words.index("--model") + 1 :] == [str(tmp_path / "my model"), "--data", "tokens.bin"]
    assert any("run resume proof" in line for line in lines)
    with pytest.raises(ConfigurationError, match="--wallets takes 1 to 4, as many as the run's batch has sequences"):
        make_cluster(LocalnetOptions(folder=tmp_path / "other", state=toml, wallets=5))
    with pytest.raises(ConfigurationError, match="cannot read"):
        make_cluster(LocalnetOptions(folder=tmp_path / "other", state=tmp_path / "missing"))


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
