"""The coordinator server over real streams: Psyche's bytes in, states out, and nobody who can stop it."""

from __future__ import annotations

import asyncio
import hashlib
import os
import random
import time
from collections.abc import Awaitable, Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from comm.stream_contract import run
from coordinator.coordinator_swarm import METADATA, RUN, frame, key
from distro_optim.comm.framing import ClientLink, LinkState
from distro_optim.comm.serving.limits import ServerLimits
from distro_optim.comm.streams import MemoryListener, Stream, StreamListener, TcpListener, open_tcp
from distro_optim.coordinator.messages import (
    CLIENT_TO_SERVER,
    SERVER_TO_CLIENT,
    Join,
    WarmupStep,
    WitnessMessage,
    WitnessStep,
)
from distro_optim.coordinator.model import P2P, HubRepo
from distro_optim.coordinator.rules.points import Account
from distro_optim.coordinator.server import server as server_module
from distro_optim.coordinator.server.host import EpochEnded, RunHost, restartable
from distro_optim.coordinator.server.ledger_file import LedgerFile, read_ledger
from distro_optim.coordinator.server.server import CoordinatorServer
from distro_optim.coordinator.server.service import CoordinatorService, Disconnected, ServiceEvent
from distro_optim.coordinator.server.store import StateStore
from distro_optim.coordinator.types import Client, Coordinator, NodeIdentity, RunState
from runs import elected, ready, report, waiting_run

pytestmark = pytest.mark.waiting


TICK_SECONDS = 0.02  # in which a second of the run passes: phases last at least one second of the run


class QuickClock:
    """Seconds of a run in quick motion, which pass only while the event loop turns.

    On a busy machine the loop turns slowly; by the clock on the wall peers would then seem to be silent for long.
    """

    def __init__(self) -> None:
        self._now = time.monotonic()

    def __call__(self) -> float:
        return self._now

    async def run(self) -> None:
        while True:
            await asyncio.sleep(TICK_SECONDS)
            self._now += 1


class Site:
    """A running server, what happened at it, and clients that do what they should."""

    def __init__(self, listener: StreamListener, server: CoordinatorServer, events: list[ServiceEvent]) -> None:
        self.listener = listener
        self.server = server
        self.events = events
        self.tasks: list[asyncio.Task[None]] = []

    @property
    def state(self) -> Coordinator:
        return self.server.service.host.state

    async def dial(self) -> Stream:
        if isinstance(self.listener, MemoryListener):
            return await self.listener.connect()
        host, _, port = self.listener.address.rpartition(":")
        return await open_tcp(host, int(port))

    def join(self, *numbers: int) -> None:
        for number in numbers:
            self.tasks.append(asyncio.create_task(self._take_part(number)))

    async def until(self, condition: Callable[[], bool]) -> None:
        while not condition():
            await asyncio.sleep(0.005)

    async def leave(self) -> None:
        for task in self.tasks:
            task.cancel()
        await asyncio.gather(*self.tasks, return_exceptions=True)

    def reasons(self) -> list[str]:
        return [event.reason for event in self.events if isinstance(event, Disconnected)]

    async def _take_part(self, number: int) -> None:
        stream = await self.dial()
        link = ClientLink(key(number), SERVER_TO_CLIENT, CLIENT_TO_SERVER)
        identity = NodeIdentity.from_single_key(key(number).public)
        said: set[Any] = set()
        try:
            while data := await stream.read():
                states = [message.state for message in link.receive(data)]
                if answer := link.data_to_send():
                    await stream.write(answer + frame(Join(RUN)))
                for state in states[-1:]:
                    phase = (state.run_state, state.progress)
                    members = [member.id for member in state.epoch_state.clients]
                    if identity not in members or phase in said:
                        continue
                    said.add(phase)
                    for message in _answers(state, identity, members):
                        await stream.write(frame(message))
        finally:
            await stream.close()


def _answers(state: Coordinator, identity: NodeIdentity, members: list[NodeIdentity]) -> list[Any]:
    if state.run_state is RunState.WARMUP:
        return [WitnessMessage(WarmupStep(ready(members.index(identity))))]
    if state.run_state is RunState.ROUND_TRAIN:
        return [
            WitnessMessage(WitnessStep(report(proof, members), METADATA))
            for witness, proof in elected(state)
            if witness == identity
        ]
    return []


def small_run(**config: int) -> Coordinator:
    settings = {"witness_nodes": 0, "epoch_time": 30, "warmup_time": 10, "max_round_train_time": 10, **config}
    return waiting_run(RUN, P2P(HubRepo("org/model")), **settings)


def serve(
    work: Callable[[Site], Awaitable[None]],
    *,
    state: Coordinator | None = None,
    store: StateStore | None = None,
    ledger: LedgerFile | None = None,
    memory: bool = False,
    limits: ServerLimits | None = None,
) -> None:
    """Runs ``work`` against a server of its own, in quick motion."""

    async def inside() -> None:
        listener: StreamListener = MemoryListener() if memory else await TcpListener.bind("127.0.0.1", 0)
        clock = QuickClock()
        service = CoordinatorService(
            RunHost(restartable(state or small_run(), now=int(clock())), account=None if ledger is None else Account()),
            draw=os.urandom,
            unix_offset=0.0,
            limits=limits,
        )
        events: list[ServiceEvent] = []
        server = CoordinatorServer(
            service,
            [listener],
            store=store,
            ledger=ledger,
            on_event=events.append,
            clock=clock,
            tick_seconds=TICK_SECONDS,
        )
        site = Site(listener, server, events)
        passing = asyncio.create_task(clock.run())
        try:
            async with server:
                await work(site)
        finally:
            passing.cancel()
            await site.leave()

    run(inside)


@pytest.mark.slow
@pytest.mark.parametrize("memory", [False, True], ids=["tcp", "memory"])
def test_a_swarm_trains_epoch_after_epoch(memory: bool) -> None:
    async def work(site: Site) -> None:
        site.join(1, 2, 3)
        await site.until(lambda: site.state.progress.epoch >= 2)
        assert site.events.count(EpochEnded()) == 2
        assert len(site.server.service.clients) == 3

    serve(work, memory=memory)


@pytest.mark.slow
def test_what_clients_did_in_an_epoch_is_in_the_ledger(tmp_path: Path) -> None:
    with StateStore(tmp_path, RUN) as store:
        ledger = LedgerFile(tmp_path, RUN, key(9))

        async def work(site: Site) -> None:
            site.join(1, 2, 3)
            await site.until(lambda: site.state.progress.epoch >= 1)

        serve(work, store=store, ledger=ledger, memory=True)
    totals = read_ledger(ledger.path, host=key(9).public.hex())
    assert (totals.run, totals.lines) == (RUN, 1)
    assert totals.clients.keys() == {key(number).public for number in (1, 2, 3)}
    assert all(one.healthy and one.batches > 0 and one.equal > 0 for one in totals.clients.values())


def test_a_client_of_psyche_is_understood_byte_for_byte() -> None:
    """The frames of its handshake and its join, put together by hand."""

    async def work(site: Site) -> None:
        stream = await site.dial()
        opening = await _read(stream, 37)
        assert opening[:5] == bytes.fromhex("0000002100")
        me = key(1)
        challenge = opening[5:]
        signed = me.public + b"\x20" + challenge + me.sign(challenge)
        await stream.write(bytes.fromhex("00000084008101") + signed)
        await stream.write((4 + len(RUN) - 1).to_bytes(4, "big") + b"\x01\x00" + bytes([len(RUN)]) + RUN.encode())
        length = int.from_bytes(await _read(stream, 4), "big")
        assert (await _read(stream, length))[:2] == b"\x01\x00"
        await site.until(lambda: len(site.server.service.host.pending) == 1)
        await stream.close()
        await site.until(lambda: not site.server.service.host.pending)

    serve(work)


async def _read(stream: Stream, size: int) -> bytes:
    data = b""
    while len(data) < size:
        piece = await stream.read(size - len(data))
        assert piece
        data += piece
    return data


async def _sends_garbage(stream: Stream) -> None:
    await stream.write(random.Random(1).randbytes(2000))


async def _announces_four_gigabytes(stream: Stream) -> None:
    await stream.write(b"\xff\xff\xff\xff")


async def _floods(stream: Stream) -> None:
    link = ClientLink(key(77), SERVER_TO_CLIENT, CLIENT_TO_SERVER)
    while link.state is not LinkState.OPEN:
        link.receive(await stream.read())
    await stream.write(link.data_to_send())
    while True:
        await stream.write(frame(Join(RUN)) * 1000)


async def _never_reads(stream: Stream) -> None:
    link = ClientLink(key(78), SERVER_TO_CLIENT, CLIENT_TO_SERVER)
    while link.state is not LinkState.OPEN:
        link.receive(await stream.read())
    await stream.write(link.data_to_send())
    await asyncio.Event().wait()


async def _never_speaks(stream: Stream) -> None:
    await asyncio.Event().wait()


async def _hangs_up(stream: Stream) -> None:
    await stream.read()
    await stream.close()


ATTACKS = [_sends_garbage, _announces_four_gigabytes, _floods, _never_reads, _never_speaks, _hangs_up]


@pytest.mark.slow
@pytest.mark.parametrize("memory", [False, True], ids=["tcp", "memory"])
def test_strangers_of_every_kind_at_once_do_not_stop_the_run(memory: bool) -> None:
    async def attack(site: Site, how: Callable[[Stream], Awaitable[None]]) -> None:
        while True:
            stream = await site.dial()
            try:
                async with asyncio.timeout(0.3):
                    await how(stream)
            except (OSError, TimeoutError):
                pass
            finally:
                await stream.close()

    async def work(site: Site) -> None:
        site.join(1, 2, 3)
        attackers = [asyncio.create_task(attack(site, how)) for how in ATTACKS]
        try:
            await site.until(lambda: site.state.progress.epoch >= 2)
            await site.until(lambda: any("at most" in reason for reason in site.reasons()))
            members = {member.id for member in site.state.epoch_state.clients}
            assert members == {NodeIdentity.from_single_key(key(number).public) for number in (1, 2, 3)}
        finally:
            for attacker in attackers:
                attacker.cancel()
            await asyncio.gather(*attackers, return_exceptions=True)
        await site.until(lambda: site.server.service.num_connections == 3)

    serve(work, memory=memory, limits=ServerLimits(stall_seconds=10))


@pytest.mark.slow
def test_a_reader_that_stops_is_cut_off_while_states_go_out_to_the_others() -> None:
    async def work(site: Site) -> None:
        stream = await site.dial()
        sleeper = asyncio.create_task(_never_reads(stream))
        site.join(1, 2)
        await site.until(lambda: any("read nothing" in reason for reason in site.reasons()))
        sleeper.cancel()
        await asyncio.gather(sleeper, return_exceptions=True)
        await stream.close()
        assert len(site.server.service.clients) == 2

    # In memory only 64 KiB are in flight; a socket of this machine would take megabytes first.
    serve(work, memory=True, state=_long_state(), limits=ServerLimits(stall_seconds=20))


def _long_state() -> Coordinator:
    """So long that a client which does not read is noticed after one."""
    strangers = tuple(
        Client(NodeIdentity.from_single_key(hashlib.sha256(bytes([n & 255, n >> 8])).digest())) for n in range(256)
    )
    state = small_run()
    return replace(state, epoch_state=replace(state.epoch_state, clients=strangers, exited_clients=strangers))


def test_everybody_is_refused_above_the_limit_and_served_again_below_it() -> None:
    async def work(site: Site) -> None:
        first = await site.dial()
        assert await first.read()
        second = await site.dial()
        assert await second.read() == b""
        await first.close()
        await site.until(lambda: site.server.service.num_connections == 0)
        third = await site.dial()
        assert await third.read()
        await second.close()
        await third.close()

    serve(work, limits=ServerLimits(connections=1))


# -- what is kept --------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_state_is_saved_at_the_end_of_each_epoch_and_at_shutdown(tmp_path: Path) -> None:
    async def work(site: Site) -> None:
        site.join(1, 2)
        await site.until(lambda: site.state.progress.epoch >= 1)
        await site.until(lambda: bool(list(tmp_path.glob("*.toml"))))

    with StateStore(tmp_path, RUN) as store:
        serve(work, store=store)
        saved = store.load()
    assert saved is not None
    assert saved.progress.epoch >= 1
    assert saved.run_state is RunState.WAITING_FOR_MEMBERS
    # At shutdown the members were still there: they are saved as such, and may share the model when they return.
    assert len(saved.epoch_state.clients) == 2


@pytest.mark.slow
def test_a_run_goes_on_from_its_file(tmp_path: Path) -> None:
    async def one_epoch(site: Site) -> None:
        before = site.state.progress.epoch
        site.join(1, 2)
        await site.until(lambda: site.state.progress.epoch == before + 1)

    progress = []
    for _ in range(3):
        with StateStore(tmp_path, RUN) as store:
            serve(one_epoch, state=store.load(), store=store)
            saved = store.load()
            assert saved is not None
            progress.append(saved.progress)
    assert [one.epoch for one in progress] == [1, 2, 3]
    assert progress[0].epoch_start_data_index < progress[1].epoch_start_data_index < progress[2].epoch_start_data_index


@pytest.mark.slow
def test_a_full_disk_stops_no_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise OSError(28, "No space left on device")

    async def work(site: Site) -> None:
        site.join(1, 2)
        await site.until(lambda: site.state.progress.epoch >= 2)

    with StateStore(tmp_path, RUN) as store:
        monkeypatch.setattr(store, "save", fail)
        serve(work, store=store)


def test_a_finished_run_is_reported_after_its_clients_were_told() -> None:
    async def work(site: Site) -> None:
        site.join(1, 2)
        await site.server.wait_finished()
        assert site.state.run_state is RunState.FINISHED

    serve(work, state=small_run(total_steps=4))


@pytest.mark.slow
def test_a_spectator_that_fails_stops_nothing(caplog: pytest.LogCaptureFixture) -> None:
    async def work(site: Site) -> None:
        def fail(event: ServiceEvent) -> None:
            raise RuntimeError("a mistake of the spectator")

        site.server._on_event = fail
        site.join(1, 2)
        await site.until(lambda: site.state.progress.epoch >= 1)

    serve(work, memory=True)
    assert "on_event failed" in caplog.text


def test_a_server_that_breaks_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise RuntimeError("a mistake of ours")

    async def work(site: Site) -> None:
        monkeypatch.setattr(site.server.service, "tick", fail)
        with pytest.raises(RuntimeError, match="a mistake of ours"):
            await site.server.wait_failed()

    serve(work)


def test_a_machine_whose_clock_is_set_by_an_hour_keeps_its_phases(monkeypatch: pytest.MonkeyPatch) -> None:
    """The offset to Unix time is taken once, so neither jump reaches the run."""
    wall = time.time
    offset = server_module.unix_offset()
    service = CoordinatorService(RunHost(small_run()), draw=os.urandom, unix_offset=offset)
    now = time.monotonic()
    before = service.unix_time(now)
    for jump in (3600, -3600):
        monkeypatch.setattr(time, "time", lambda jump=jump: wall() + jump)
        assert service.unix_time(now) == before
    assert abs(before - wall()) < 60
