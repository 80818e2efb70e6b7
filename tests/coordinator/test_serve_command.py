"""``distro-optim serve`` and ``validate``, as a user types them."""

from __future__ import annotations

import asyncio
import io
import json
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console

import warm_python
from coordinator.coordinator_swarm import METADATA, frame, key
from distro_optim.cli import main
from distro_optim.comm.addresses import SocketAddr
from distro_optim.comm.framing import ClientLink
from distro_optim.comm.iroh.endpoint import Node
from distro_optim.comm.iroh.introduction import introduce
from distro_optim.console import JsonLines, LivePicture, PlainLines, make_console
from distro_optim.coordinator.client.remote import RemoteCoordinator
from distro_optim.coordinator.formats.text import to_toml
from distro_optim.coordinator.messages import (
    CLIENT_TO_SERVER,
    SERVER_TO_CLIENT,
    Join,
    WarmupStep,
    WitnessMessage,
    WitnessStep,
)
from distro_optim.coordinator.model import DummyCheckpoint, HubRepo, ServerData
from distro_optim.coordinator.server.host import Joined, PhaseChanged, Refused
from distro_optim.coordinator.server.service import Connected, Disconnected
from distro_optim.coordinator.ticket import RunTicket, connector
from distro_optim.coordinator.types import Coordinator, NodeIdentity, RunState
from distro_optim.errors import ConfigurationError
from distro_optim.protocol import OURS, SILENT, Speaks
from distro_optim.serve.console import FORMS, Reporter, Situation, render, reporter_for
from distro_optim.serve.guests import read_allow_list
from distro_optim.serve.status import ClientStatus, RunStatus
from distro_optim.strategy.config import RunConfig
from runs import client, elected, ready, report, waiting_run

pytestmark = pytest.mark.waiting


RUN = "demo"
PATIENCE_SECONDS = 40


def quick_run() -> Coordinator:
    """An epoch of a few seconds for a single client."""
    return waiting_run(
        RUN,
        DummyCheckpoint(HubRepo("none")),
        init_min_clients=1,
        min_clients=1,
        witness_nodes=0,
        warmup_time=1,
        max_round_train_time=1,
        round_witness_time=1,
        cooldown_time=1,
        epoch_time=2,
        waiting_for_members_extra_time=1,
    )


def state_file(tmp_path: Path, state: Coordinator | None = None) -> Path:
    path = tmp_path / "state.toml"
    path.write_text(to_toml(state or quick_run()))
    return path


class Served:
    """A server in a process of its own."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self.process = process

    def line(self, **wanted: Any) -> dict[str, Any]:
        """The next line that has these facts."""
        assert self.process.stdout is not None
        for text in self.process.stdout:
            record: dict[str, Any] = json.loads(text)
            if all(record.get(name) == value for name, value in wanted.items()):
                return record
        raise AssertionError(f"the server ended without saying {wanted}")

    def port(self) -> int:
        while "address" not in (record := self.line(event="server")):
            pass
        return int(record["address"].rpartition(":")[2])

    def end(self, number: signal.Signals) -> int:
        self.process.send_signal(number)
        assert self.process.stdout is not None
        self.process.stdout.read()
        return self.process.wait()


@contextmanager
def served(state: Path, *options: str) -> Iterator[Served]:
    command = [sys.executable, "-m", "distro_optim", "serve", "--state", str(state)]
    command += ["--host", "127.0.0.1", "--port", "0", "--json", *options]
    with warm_python.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        watchdog = threading.Timer(PATIENCE_SECONDS, process.kill)
        watchdog.start()
        try:
            yield Served(process)
        finally:
            watchdog.cancel()
            process.kill()


def take_part(port: int, stop: threading.Event) -> None:
    """One client that does what it should until told to stop, or until its server is killed."""
    with suppress(ConnectionError):
        _take_part(port, stop)


def _take_part(port: int, stop: threading.Event) -> None:
    me = key(1)
    link = ClientLink(me, SERVER_TO_CLIENT, CLIENT_TO_SERVER)
    said: set[Any] = set()
    with socket.create_connection(("127.0.0.1", port), timeout=PATIENCE_SECONDS) as connection:
        while not stop.is_set() and (data := connection.recv(65536)):
            states = [message.state for message in link.receive(data)]
            if answer := link.data_to_send():
                connection.sendall(answer + frame(Join(RUN)))
            for state in states:
                members = [member.id for member in state.epoch_state.clients]
                phase = (state.run_state, state.progress)
                if phase in said or NodeIdentity.from_single_key(me.public) not in members:
                    continue
                said.add(phase)
                if state.run_state is RunState.WARMUP:
                    connection.sendall(frame(WitnessMessage(WarmupStep(ready(0)))))
                if state.run_state is RunState.ROUND_TRAIN:
                    ((_, proof),) = elected(state)
                    connection.sendall(frame(WitnessMessage(WitnessStep(report(proof, members), METADATA))))


@contextmanager
def participant(port: int) -> Iterator[None]:
    stop = threading.Event()
    thread = threading.Thread(target=take_part, args=(port, stop))
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()


@pytest.mark.slow
def test_a_server_killed_after_an_epoch_goes_on_from_it(tmp_path: Path) -> None:
    state, saved = state_file(tmp_path), tmp_path / "saved"
    with served(state, "--save-dir", str(saved)) as server:
        with participant(server.port()):
            server.line(event="epoch_ended")
            server.line(event="phase_changed", after="RoundTrain")
            assert server.end(signal.SIGKILL) == -signal.SIGKILL
    assert main(["serve", "--state", str(state), "--port", "0", "--save-dir", str(saved)]) == 2
    with served(state, "--save-dir", str(saved), "--resume") as server:
        first = server.line(event="server")
        assert first["step"] > 1
        assert "goes on" in first["text"]
        with participant(server.port()):
            server.line(event="epoch_ended")
            assert server.end(signal.SIGTERM) == 0
    assert len(list(saved.glob("demo-step*.toml"))) >= 2


@pytest.mark.slow
def test_each_state_that_a_server_saves_is_copied_before_it_ends(tmp_path: Path) -> None:
    saved, there = tmp_path / "saved", tmp_path / "there"
    there.mkdir()
    with served(state_file(tmp_path), "--save-dir", str(saved), "--upload", f"cp {{path}} '{there}'") as server:
        server.port()
        assert server.end(signal.SIGTERM) == 0
    (copy,) = there.iterdir()
    assert copy.read_bytes() == (saved / copy.name).read_bytes()


@pytest.mark.slow
def test_two_servers_do_not_share_a_run_in_one_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    state, saved = state_file(tmp_path), tmp_path / "saved"
    with served(state, "--save-dir", str(saved)) as server:
        server.port()
        assert main(["serve", "--state", str(state), "--port", "0", "--save-dir", str(saved)]) == 2
        assert "another server keeps run 'demo'" in capsys.readouterr().err
        assert server.end(signal.SIGINT) == 0


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(signal, "SIGUSR1"), reason="this system has no SIGUSR1")
def test_a_signal_pauses_and_resumes_the_run(tmp_path: Path) -> None:
    with served(state_file(tmp_path)) as server:
        server.port()
        server.process.send_signal(signal.SIGUSR1)
        server.line(event="phase_changed", after="Paused")
        server.process.send_signal(signal.SIGUSR1)
        server.line(event="phase_changed", after="WaitingForMembers")
        assert server.end(signal.SIGTERM) == 0


@pytest.mark.slow
def test_training_data_are_served_beside_the_run(tmp_path: Path) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    run = quick_run()
    run = replace(run, model=replace(run.model, data_location=ServerData(f"127.0.0.1:{port}")))
    (tmp_path / "tokens").mkdir()
    (tmp_path / "tokens" / "a.bin").write_bytes(np.arange(1000, dtype="<u2").tobytes())
    data = tmp_path / "data.toml"
    data.write_text(f'dir = "tokens"\ntoken_size = "TwoBytes"\nseq_len = 8\nshuffle_seed = {[0] * 32}\n')
    with served(state_file(tmp_path, run), "--data", str(data)) as server:
        record = server.line(address=f"127.0.0.1:{port}")
        assert "124 sequences" in record["text"]
        with socket.create_connection(("127.0.0.1", port), timeout=PATIENCE_SECONDS) as connection:
            assert connection.recv(5) == bytes.fromhex("0000002100")
        assert server.end(signal.SIGTERM) == 0


@pytest.mark.slow
def test_a_server_is_joined_over_iroh_with_the_ticket_it_prints(tmp_path: Path) -> None:
    saved = tmp_path / "saved"
    external = ("--external-addr", "203.0.113.7:4433")
    options = ("--iroh", "--relay", "none", *external, "--save-dir", str(saved))

    async def joined(ticket: RunTicket) -> Coordinator:
        with Node(bind_addr="127.0.0.1:0", relay="none") as node:
            # Its addresses are tried in any order; here the one of TCP is left out, so that it must be iroh.
            connect = connector(replace(ticket, tcp=()), node)
            async with asyncio.timeout(PATIENCE_SECONDS):
                client = RemoteCoordinator(connect, key(1), ticket.run_id, timeout=PATIENCE_SECONDS)
                state = await client.join()
                await client.close()
        return state

    with served(state_file(tmp_path), *options) as server:
        while "ticket" not in (record := server.line(event="server")):
            pass
        ticket = RunTicket.parse(record["ticket"])
        assert ticket.run_id == RUN
        assert ticket.endpoint is not None
        assert SocketAddr.parse("203.0.113.7:4433") in ticket.endpoint.direct
        assert asyncio.run(joined(ticket)).run_id == RUN
        server.line(event="joined", client=key(1).public.hex())
        assert server.end(signal.SIGTERM) == 0
    assert (saved / "coordinator.key").stat().st_mode & 0o077 == 0
    with served(state_file(tmp_path), "--resume", *options) as server:
        while "ticket" not in (record := server.line(event="server")):
            pass
        again = RunTicket.parse(record["ticket"]).endpoint
        assert again is not None
        assert again.id == ticket.endpoint.id


@pytest.mark.slow
def test_a_server_of_a_run_of_our_own_kind_says_which_protocols_it_speaks(tmp_path: Path) -> None:
    config = RunConfig(total_steps=9, global_batch_size=4, round_witness_time=1)

    async def heard(ticket: RunTicket) -> Speaks | None:
        assert ticket.endpoint is not None
        with Node(bind_addr="127.0.0.1:0", relay="none") as node:
            return await asyncio.wrap_future(node.submit(introduce(node, ticket.endpoint)))

    for state, expected in ((config.coordinator_state(RUN), OURS), (quick_run(), SILENT)):
        with served(state_file(tmp_path, state), "--iroh", "--relay", "none") as server:
            while "ticket" not in (record := server.line(event="server")):
                pass
            assert asyncio.run(heard(RunTicket.parse(record["ticket"]))) == expected
            assert server.end(signal.SIGTERM) == 0


# -- wrong requests ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--allow", "zz"], "neither a key"),
        (["--resume"], "give --save-dir"),
        (["--port", "0", "--upload", "cp {path} there"], "give --save-dir"),
        (["--port", "0", "--upload", "cp here there"], "write {path}"),
        (["--port", "0", "--data", "nowhere.toml"], "cannot read nowhere.toml"),
    ],
)
def test_wrong_options_are_explained(
    tmp_path: Path, options: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["serve", "--state", str(state_file(tmp_path)), *options]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--port", "many"], "argument --port: must be a whole number, got 'many'"),
        (["--port", "65536"], "argument --port: must be from 0 to 65535, got 65536"),
        (["--max-connections", "0"], "argument --max-connections: must be at least 1, got 0"),
        (["--relay", "nearest"], "argument --relay/--iroh-relay: must be default, psyche, none or a URL"),
        (["--relay", "https://"], "got 'https://'"),
        (["--relay", "https://relay.example:many/"], "got 'https://relay.example:many/'"),
        (["--iroh-discovery", "far"], "argument --iroh-discovery: must be n0 (the internet), local"),
        (["--external-addr", "example.org:4433"], "argument --external-addr: must be the IP address and port"),
    ],
)
def test_options_of_the_wrong_kind_are_told_before_anything_is_read(
    options: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit, check=lambda end: end.code == 2):
        main(["serve", "--state", "nowhere.toml", *options])
    assert message in capsys.readouterr().err


def test_a_port_that_is_taken_is_told_with_the_way_out(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = str(other.getsockname()[1])
        assert main(["serve", "--state", str(state_file(tmp_path)), "--host", "127.0.0.1", "--port", port]) == 2
    assert "another program does; name another port" in capsys.readouterr().err


def test_data_without_a_place_in_the_run_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "a.bin").write_bytes(bytes(100))
    data = tmp_path / "data.toml"
    data.write_text(f'dir = "."\ntoken_size = "TwoBytes"\nseq_len = 8\nshuffle_seed = {[0] * 32}\n')
    assert main(["serve", "--state", str(state_file(tmp_path)), "--port", "0", "--data", str(data)]) == 2
    assert "data_location" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"epoch_time": 0}, r"config.epoch_time is 0, but must be at least 1 second"),
        ({"warmup_time": 40}, "config.warmup_time is 40, but must be below epoch_time, which is 40"),
        ({"max_round_train_time": 40}, "config.max_round_train_time"),
        ({"round_witness_time": 0}, "config.round_witness_time"),
        ({"min_clients": 0}, "config.min_clients"),
        ({"init_min_clients": 1}, "config.init_min_clients"),
        ({"init_min_clients": 257}, "config.init_min_clients"),
        ({"global_batch_size_start": 0}, "config.global_batch_size_start"),
        ({"global_batch_size_end": 3}, "config.global_batch_size_end"),
        ({"total_steps": 0}, "config.total_steps"),
        ({"witness_nodes": 3}, "config.witness_nodes"),
        ({"cooldown_time": 0}, "config.cooldown_time"),
        ({"waiting_for_members_extra_time": 0}, "config.waiting_for_members_extra_time"),
        ({"verification_percent": 50}, "config.verification_percent"),
        ({"cold_start_warmup_steps": 3}, "has room for 2 rounds"),
        ({"run_id": ""}, "run_id is empty"),
    ],
)
def test_a_run_that_cannot_go_is_refused_with_advice(
    tmp_path: Path, changes: dict[str, Any], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    state = waiting_run(**{"run_id": RUN, **changes})
    assert main(["validate", str(state_file(tmp_path, state))]) == 2
    assert message in capsys.readouterr().err


def test_a_good_run_is_validated_with_notes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["validate", str(state_file(tmp_path))]) == 0
    output = capsys.readouterr().out
    assert "model.optimizer must not be Dummy" in output
    assert "run 'demo' is in order" in output


def test_the_example_is_a_run_that_can_go(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["validate", str(Path(__file__).parents[2] / "examples" / "demo_run.toml")]) == 0
    assert "run 'demo' is in order" in capsys.readouterr().out


def test_allow_lists_come_from_keys_and_files(tmp_path: Path) -> None:
    keys = [key(number).public for number in (1, 2, 3)]
    path = tmp_path / "keys.txt"
    path.write_text(f"# friends\n{keys[0].hex()}\n\n  {keys[1].hex().upper()}  # second\n")
    assert read_allow_list([str(path), keys[2].hex()]) == frozenset(keys)
    assert read_allow_list([]) is None
    path.write_text("abc\n")
    with pytest.raises(ConfigurationError, match=r"keys\.txt, line 1: 'abc' is not a key"):
        read_allow_list([str(path)])


# -- what is shown -------------------------------------------------------------------------------------------------

STATUS = RunStatus(
    run_id="demo",
    phase="Training",
    phase_seconds=7,
    epoch=2,
    step=41,
    total_steps=1000,
    round=3,
    witnesses=1,
    connected=2,
    pending=2,
    in_epoch=1,
    tokens_per_second=12345.6,
    loss=2.5,
    clients=(
        ClientStatus("ab" * 32, "10.0.0.1:4000", "Healthy", 40, 2.5, 12345.6),
        ClientStatus("cd" * 32, "\x1b[2Jevil", "Pending"),
    ),
)
EVENTS: list[Any] = [
    Connected(client=client(1), address="10.0.0.1:4000"),
    Joined(client=client(1)),
    PhaseChanged(before=RunState.WARMUP, after=RunState.ROUND_TRAIN),
    Refused(client=client(1), reason="\x1b]0;owned\x07"),
    Disconnected(client=None, address="10.0.0.2:1", reason="it left"),
]


def test_lines_for_people_say_what_happens_and_hold_no_control_characters() -> None:
    stream = io.StringIO()
    with Reporter(PlainLines(FORMS, stream)) as reporter:
        for event in EVENTS:
            reporter.event(event)
        reporter.status(STATUS)
        reporter.status(STATUS)
    text = stream.getvalue()
    assert "01000000 joined" in text
    assert "Warmup -> Training" in text
    assert "someone at 10.0.0.2:1 is gone: it left" in text
    assert text.count("step 41 of 1000") == 1
    assert "12346 tokens/s, loss 2.5000" in text
    assert all(char.isprintable() or char == "\n" for char in text)


def test_lines_for_machines_are_json() -> None:
    stream = io.StringIO()
    with Reporter(JsonLines(FORMS, stream)) as reporter:
        for event in EVENTS:
            reporter.event(event)
        reporter.status(STATUS)
    records = [json.loads(line) for line in stream.getvalue().splitlines()]
    assert [record["event"] for record in records] == [
        "connected",
        "joined",
        "phase_changed",
        "refused",
        "disconnected",
        "status",
    ]
    assert records[0]["client"] == client(1).signer.hex()
    assert (records[2]["before"], records[2]["after"]) == ("Warmup", "RoundTrain")
    assert records[4]["client"] is None
    assert records[5]["clients"][0]["state"] == "Healthy"


def test_output_that_goes_away_is_done_without(tmp_path: Path) -> None:
    for kind in (PlainLines, JsonLines):
        with open(tmp_path / "output", "w") as stream:
            reporter = Reporter(kind(FORMS, stream))
            reporter.event(EVENTS[1])
        reporter.event(EVENTS[1])
        reporter.status(STATUS)


def test_a_flood_of_events_fills_no_disk() -> None:
    for kind in (PlainLines, JsonLines):
        stream = io.StringIO()
        with Reporter(kind(FORMS, stream)) as reporter:
            for _ in range(5000):
                reporter.event(EVENTS[1])
            reporter.status(STATUS)
        assert stream.getvalue().count("\n") < 2000
        assert "left out" in stream.getvalue() or "events_left_out" in stream.getvalue()


def test_the_table_shows_run_clients_and_events_without_control_characters() -> None:
    stream = io.StringIO()
    console = Console(file=stream, width=140, force_terminal=False)
    console.print(render(Situation(STATUS, ("12:00:00 something happened",))))
    text = stream.getvalue()
    for part in ("demo", "Training (7 s)", "step 41/1000", "abababab", "Healthy", "12,346", "something happened"):
        assert part in text
    assert "\x1b" not in text


def test_many_clients_are_counted_below_the_table() -> None:
    many = replace(STATUS, clients=STATUS.clients * 100)
    stream = io.StringIO()
    Console(file=stream, width=140).print(render(Situation(many)))
    assert "and 176 more" in stream.getvalue()


def test_the_reporter_suits_the_output() -> None:
    for as_json, start in ((True, '{"time"'), (False, time.strftime("%H:"))):
        output = io.StringIO()
        reporter_for(as_json=as_json, plain=False, stream=output).tell("hello")
        assert output.getvalue().startswith(start)
    stream = io.StringIO()
    with Reporter(LivePicture(FORMS, make_console(stream, force_terminal=True, width=120))) as table:
        table.tell("hello")
        table.event(EVENTS[1])
        table.status(STATUS)
    assert "hello" in stream.getvalue()
    assert "abababab" in stream.getvalue()
