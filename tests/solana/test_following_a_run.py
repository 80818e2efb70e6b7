"""``distro-optim run show --follow``: the run as it goes on, in a terminal, in a pipe and for programs."""

from __future__ import annotations

import asyncio
import io
import json
import os
import signal
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from client.processes import Process
from distro_optim.console import JsonLines, LivePicture, PlainLines, display_for, make_console
from distro_optim.coordinator.solana.rpc import RpcClient
from distro_optim.coordinator.solana_options import SolanaOptions
from distro_optim.coordinator.types import RunState
from distro_optim.errors import ConfigurationError, CoordinatorLinkError
from distro_optim.operate.following import FORMS, Following, follow
from distro_optim.operate.looking import LookOptions, watch
from distro_optim.testing import Validator, dummy_run
from distro_optim.testing.coordinator import joined, training, until_true
from solana.cluster import Cluster
from solana.solana_arena import OPERATOR, QUICK, RUN, SolanaArena, in_arena

pytestmark = pytest.mark.waiting


class Followed:
    """A run that is shown in the background."""

    def __init__(self, arena: SolanaArena, display: PlainLines[Following] | JsonLines[Following]) -> None:
        self.rpc = RpcClient([arena.server.url], retrying=QUICK)
        sockets, programs = [arena.server.websocket_url], arena.validator.programs
        self.task = asyncio.create_task(follow(self.rpc, sockets, programs, arena.run_id, display))

    async def end(self) -> BaseException | None:
        """What it ended with; it is cancelled if it goes on."""
        self.task.cancel()
        (found,) = await asyncio.gather(self.task, return_exceptions=True)
        await self.rpc.close()
        return found if not isinstance(found, asyncio.CancelledError) else None


def test_a_line_tells_what_has_changed_and_reports_alone_tell_nothing() -> None:
    async def check(arena: SolanaArena) -> None:
        said = io.StringIO()
        followed = Followed(arena, PlainLines(FORMS, said))
        await until_true(lambda: said.getvalue().count("\n") == 1)
        await training(arena)
        await until_true(lambda: "RoundTrain; epoch 0, step 1 of 1000; 3 in the epoch" in said.getvalue())
        lines = [line.split(" ", 1)[1] for line in said.getvalue().splitlines()]
        assert lines[0].startswith("WaitingForMembers; epoch 0, step 1 of 1000; 0 in the epoch; 0 waiting")
        assert len(lines) == len(set(lines))
        arena.process(arena.instructions.set_paused(OPERATOR.pubkey(), True), payer=OPERATOR)
        await until_true(lambda: "RoundTrain, to be paused; epoch 0" in said.getvalue())
        assert await followed.end() is None

    in_arena(check)


def test_it_ends_when_the_run_is_finished() -> None:
    async def check(arena: SolanaArena) -> None:
        said = io.StringIO()
        followed = Followed(arena, JsonLines(FORMS, said))
        await followed.task
        assert await followed.end() is None
        assert json.loads(said.getvalue())["coordinator"]["run_state"] == "Finished"

    in_arena(check, SolanaArena(replace(dummy_run(), run_state=RunState.FINISHED)))


def test_it_ends_when_the_run_is_closed() -> None:
    async def check(arena: SolanaArena) -> None:
        followed = Followed(arena, PlainLines(FORMS, io.StringIO()))
        await until_true(lambda: arena.server.subscriptions == 1)
        arena.process(arena.instructions.set_paused(OPERATOR.pubkey(), True), payer=OPERATOR)
        arena.process(arena.instructions.free(OPERATOR.pubkey(), OPERATOR.pubkey()), payer=OPERATOR)
        arena.server.faults.silent = True
        await arena.server.drop_websockets()
        with pytest.raises(CoordinatorLinkError, match="was closed by its operator"):
            await asyncio.wait_for(followed.task, 20)
        await followed.end()

    in_arena(check)


def test_the_picture_has_the_figures_and_the_latest_events() -> None:
    async def check(arena: SolanaArena) -> None:
        said = io.StringIO()
        console = make_console(said, force_terminal=True, width=120)
        with LivePicture(FORMS, console) as display:
            followed = Followed(arena, display)  # type: ignore[arg-type]
            await joined(arena, 1)
            await until_true(lambda: "1 waiting to be in it" in said.getvalue())
            assert await followed.end() is None
        assert "ever joined" in said.getvalue()

    in_arena(check)


def test_only_one_run_is_followed() -> None:
    request = LookOptions(None, SolanaOptions())
    with pytest.raises(ConfigurationError, match="only one run can be followed"):
        asyncio.run(watch(request, display_for("none", FORMS)))


def test_a_pipe_that_goes_away_ends_it() -> None:
    async def check(arena: SolanaArena) -> None:
        reader, writer = os.pipe()
        pipe = os.fdopen(writer, "w")
        followed = Followed(arena, PlainLines(FORMS, pipe))
        await until_true(lambda: arena.server.subscriptions == 1)
        assert b"WaitingForMembers" in os.read(reader, 1000)
        os.close(reader)
        arena.process(arena.instructions.set_paused(OPERATOR.pubkey(), True), payer=OPERATOR)
        await asyncio.wait_for(followed.task, 20)
        assert await followed.end() is None
        with pytest.raises(BrokenPipeError):
            pipe.close()

    in_arena(check)


# -- a process ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def cluster() -> Iterator[Cluster]:
    validator = Validator()
    key = OPERATOR.pubkey()
    validator.host(dummy_run("shown"), RUN.pubkey(), main_authority=key, join_authority=key)
    with Cluster(validator) as made:
        yield made


@pytest.mark.slow
@pytest.mark.skipif(os.name == "nt", reason="Ctrl-C is a signal")
def test_ctrl_c_ends_it_without_a_word(cluster: Cluster, tmp_path: Path) -> None:
    shown = Process(tmp_path / "log", "run", "show", "shown", "--follow", "--rpc", cluster.server.url)
    try:
        shown.until(lambda: cluster.do(lambda: cluster.server.subscriptions) == 1, "subscription")
        shown.send(signal.SIGINT)
        assert shown.wait() == 130
        (line,) = shown.log.read_text().splitlines()
        assert "WaitingForMembers; epoch 0" in line
    finally:
        shown.end()
