"""A run that a script does not name can be named by whoever starts the script."""

from __future__ import annotations

from pathlib import Path

import pytest

from distro_optim.errors import ConfigurationError
from distro_optim.logs import LogOptions
from distro_optim.strategy.environment import (
    BIND_ADDR,
    CONFIG,
    DISCOVERY,
    EXTERNAL_ADDR,
    RELAY,
    RUN,
    TICKET_FILE,
    RunEnvironment,
    read_ticket,
    write_ticket,
)

pytestmark = pytest.mark.waiting


FULL = RunEnvironment(
    run="psyche1abc",
    ticket_file=Path("/tmp/ticket"),
    relay="none",
    discovery="local",
    external_addr="203.0.113.7:4433",
    bind_addr="0.0.0.0:4433",
    report=Path("report.jsonl"),
    peer_name="peer 1",
    web="8080",
    config={"total_steps": 100, "min_peers": 2},
    log=LogOptions(file=Path("run.log"), level="debug", max_bytes=20_000, older=2, form="json"),
)


@pytest.mark.parametrize("environment", [FULL, RunEnvironment()])
def test_what_a_parent_writes_a_child_reads(environment: RunEnvironment) -> None:
    assert RunEnvironment.read(environment.variables()) == environment


def test_variables_that_are_not_set_and_empty_ones_say_nothing() -> None:
    assert RunEnvironment.read({}) == RunEnvironment()
    assert RunEnvironment.read({RUN: "  ", TICKET_FILE: "", CONFIG: ""}) == RunEnvironment()


def test_a_child_sees_nothing_of_its_parents_run() -> None:
    parent = FULL.variables()
    assert RunEnvironment.read({**parent, **RunEnvironment(relay="none").variables()}) == RunEnvironment(relay="none")


def test_the_process_environment_is_the_default(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(RUN, "localhost:20000/demo")
    assert RunEnvironment.read().run == "localhost:20000/demo"


@pytest.mark.parametrize("text", ["total_steps=100", "[1]", "7", '"a"', "[" * 100_000, "{"])
def test_settings_that_are_no_json_object_are_refused_by_the_name_of_their_variable(text: str) -> None:
    with pytest.raises(ConfigurationError, match=CONFIG):
        RunEnvironment.read({CONFIG: text})


@pytest.mark.parametrize(
    ("variable", "text"),
    [
        (RELAY, "near"),
        (RELAY, "https://"),
        (DISCOVERY, "near"),
        (EXTERNAL_ADDR, "203.0.113.7"),
        (BIND_ADDR, "4433"),
        (BIND_ADDR, "[::]:4433"),
    ],
)
def test_a_way_to_reach_us_that_cannot_be_is_refused_by_the_name_of_its_variable(variable: str, text: str) -> None:
    with pytest.raises(ConfigurationError, match=f"^{variable} must be") as error:
        RunEnvironment.read({variable: text})
    assert error.value.name == variable


@pytest.mark.parametrize("relay", ["https://relay.example", "psyche", "https://a.example/ http://b.example:3340/"])
def test_a_relay_server_of_ones_own_is_used(relay: str) -> None:
    assert RunEnvironment.read({RELAY: relay}).connection == {"relay": relay}


def test_a_ticket_is_there_whole_or_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / "ticket"
    assert read_ticket(path) is None
    write_ticket(path, "psyche1abc")
    assert read_ticket(path) == "psyche1abc"
    write_ticket(path, "psyche1def")
    assert read_ticket(path) == "psyche1def"
    assert [file.name for file in tmp_path.iterdir()] == ["ticket"]


def test_a_ticket_that_cannot_be_written_is_told(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match=TICKET_FILE):
        write_ticket(tmp_path / "missing" / "ticket", "psyche1abc")


@pytest.mark.parametrize("content", [b"", b"\n", b"\xff\xfe", b"a" * 5000])
def test_a_file_without_a_ticket_is_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "ticket"
    path.write_bytes(content)
    with pytest.raises(ConfigurationError, match="ticket"):
        read_ticket(path)
