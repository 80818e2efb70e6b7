"""What is wrong is said in one sentence with the next step, before anything is opened, or right after it failed."""

from __future__ import annotations

import socket
from pathlib import Path
from typing import Any

import pytest

from distro_optim.comm.addresses import EndpointAddr
from distro_optim.comm.signing import SecretKey
from distro_optim.coordinator.ticket import RunTicket
from distro_optim.errors import ConfigurationError, CoordinatorLinkError, ExchangeError, JoinRefusedError
from distro_optim.strategy.config import RunConfig
from distro_optim.strategy.network.runtime import Runtime
from runtime.live import LOOPBACK, config, live_run
from runtime.test_leaving_a_run import threads_of_runs

pytestmark = [pytest.mark.waiting]


@pytest.mark.parametrize(
    "run", ["", "psyche", "psyche1abc", "psyche1" + "a" * 5000, "example.org", "host:0/run", "/run"]
)
def test_what_is_no_ticket_is_told_what_one_looks_like(run: str) -> None:
    with pytest.raises(ConfigurationError, match="host:port/run-id") as error:
        Runtime.connect(run, **LOOPBACK)
    assert error.value.name == "run"


def test_a_ticket_with_a_letter_changed_is_noticed() -> None:
    ticket = str(RunTicket("run", ("example.org:20000",)))
    with pytest.raises(ConfigurationError, match="copied whole"):
        Runtime.connect(ticket[:-3] + ("a" if ticket[-3] != "a" else "b") + ticket[-2:], **LOOPBACK)


@pytest.mark.parametrize(
    ("options", "name"),
    [
        ({"config": config()}, "config"),
        ({"tcp": "127.0.0.1:0"}, "tcp"),
        ({"allow": [bytes(32)]}, "allow"),
        ({"peers": ["no ticket"]}, "peers"),
        ({"relay": "sometimes"}, "relay"),
        ({"relay": ["none", "https://relay.example/"]}, "relay"),
        ({"discovery": "sometimes"}, "discovery"),
        ({"external_addr": "example.org:4433"}, "external_addr"),
        ({"secret_key": b"short"}, "secret_key"),
        ({"bind_addr": "here"}, "address"),
        ({"give_up_seconds": 0.0}, "give_up_seconds"),
    ],
)
def test_an_argument_that_cannot_be_is_named(options: dict[str, Any], name: str) -> None:
    with pytest.raises(ConfigurationError) as error:
        Runtime.connect("example.org:20000/run", **{**LOOPBACK, **options})
    assert error.value.name == name


@pytest.mark.parametrize(
    ("settings", "name"),
    [
        ({"total_steps": 0}, "total_steps"),
        ({"total_steps": 2.5}, "total_steps"),
        ({"global_batch_size": 70_000}, "global_batch_size"),
        ({"min_peers": 0}, "min_peers"),
        ({"min_peers": 300}, "min_peers"),
        ({"witness_nodes": 3}, "witness_nodes"),
        ({"keep_peers": 2}, "keep_peers"),
        ({"epoch_time": 10}, "warmup_time"),
        ({"max_round_train_time": 1000}, "max_round_train_time"),
        ({"run_id": ""}, "run_id"),
        ({"run_id": "ü" * 17}, "run_id"),
        ({"run_id": "a/b"}, "run_id"),
        ({"resume": True}, "resume"),
    ],
)
def test_a_setting_that_cannot_work_is_named_with_what_can(settings: dict[str, Any], name: str) -> None:
    with pytest.raises(ConfigurationError) as error:
        RunConfig(**settings)
    assert error.value.name == name
    assert name in str(error.value)


@pytest.mark.parametrize("missing", ["total_steps", "global_batch_size"])
def test_a_run_needs_its_length_and_its_batch(missing: str) -> None:
    with pytest.raises(ConfigurationError, match=missing):
        Runtime.connect(config=config(**{missing: None}), **LOOPBACK)


def test_a_host_that_nobody_answers_for_is_named_and_nothing_stays_behind() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        port = taken.getsockname()[1]  # bound, but not listening
        with pytest.raises(CoordinatorLinkError, match=rf"127\.0\.0\.1:{port}.*[Ii]s the host still running"):
            Runtime.connect(f"127.0.0.1:{port}/run", **LOOPBACK).start()
    assert threads_of_runs() == []


def test_joining_a_run_that_is_not_hosted_there_names_the_one_that_is() -> None:
    with live_run() as run:
        host = run.host(config(run_id="right"), tcp="127.0.0.1:0")
        assert host.port.ticket is not None
        (address,) = RunTicket.parse(host.port.ticket).tcp
        with pytest.raises(JoinRefusedError, match="hosts the run 'right', not 'wrong'") as error:
            run.join(f"{address}/wrong")
        assert error.value.hosted == "right"


def test_a_key_that_is_not_let_in_is_told_whom_to_ask() -> None:
    with live_run() as run:
        run.host(config(), allow=[])
        with pytest.raises(JoinRefusedError, match="let your key in"):
            run.join()


def test_an_address_that_is_taken_is_named() -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as taken:
        taken.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        with pytest.raises(ExchangeError):
            Runtime.connect(config=config(), relay="none", bind_addr=address).start()
    assert threads_of_runs() == []


def test_a_folder_that_cannot_be_written_stops_a_host_before_it_opens_anything(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_text("")
    with pytest.raises(ConfigurationError, match="name a folder"):
        Runtime.connect(config=config(save_dir=file), **LOOPBACK).start()


@pytest.mark.slow
def test_a_run_that_was_saved_is_gone_on_with_or_left_alone(tmp_path: Path) -> None:
    settings = {"save_dir": tmp_path, "run_id": "kept", "total_steps": 6}
    with live_run() as run:
        host = run.host(config(**settings))
        host.join()
        assert host.error is None
    with pytest.raises(ConfigurationError, match="resume=True"):
        Runtime.connect(config=config(**settings), **LOOPBACK).start()
    with live_run() as run:
        host = run.host(config(**{**settings, "total_steps": 12, "resume": True}))
        host.join()
        assert host.error is None
        steps = [action.step for action in host.log if type(action).__name__ == "TrainBatch"]
        assert steps == list(range(9, 13))


@pytest.mark.slow
def test_a_second_process_with_the_key_of_a_joiner_is_refused_and_the_first_trains_on() -> None:
    key = SecretKey(bytes(31) + b"\x09")
    with live_run() as run:
        host = run.host(config(min_peers=2, total_steps=10_000), step_seconds=0.02)
        first = run.join(secret_key=key, step_seconds=0.02)
        first.until(lambda peer: len(peer.log) > 5)
        second = Runtime.connect(run.peers[0].port.ticket, secret_key=key, **LOOPBACK)
        with pytest.raises(JoinRefusedError, match="is in use by another process"):
            second.start()
        count = len(first.log)
        first.until(lambda peer: len(peer.log) > count + 10)
        assert first.error is None
        assert host.error is None


def test_a_joiner_with_the_key_of_the_host_is_refused_before_anything_is_opened() -> None:
    key = SecretKey(bytes(31) + b"\x07")
    ticket = str(RunTicket("run", (), EndpointAddr(key.public)))
    with pytest.raises(ConfigurationError, match="secret_key is the key of the run's host"):
        Runtime.connect(ticket, secret_key=key)
    Runtime.connect(ticket, secret_key=SecretKey(bytes(31) + b"\x08")).close()
