"""``distro-optim doctor`` finds out how things are, and each line says what to do."""

from __future__ import annotations

import argparse
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from distro_optim import DisTrO
from distro_optim.cli import main
from distro_optim.client import doctor, probing
from distro_optim.client.findings import Facts, Finding, HostFacts, PeerFacts, examine
from distro_optim.client.probing import NTP_EPOCH, count_parameters, offset_in
from distro_optim.client.round_cost import Line, RoundFacts, result_bytes, round_seconds
from distro_optim.comm.addresses import SocketAddr
from distro_optim.compress.wire_layout import KnownLayouts
from distro_optim.errors import ConfigurationError
from distro_optim.strategy.model.machine import MERGE, machine_facts
from runtime.live import config, live_run

OURS = SocketAddr.parse("192.168.1.5:4433")
OUTSIDE = SocketAddr.parse("9.9.9.9:4433")
SIX = SocketAddr.parse("[2620:fe::fe]:4433")
GOOD = Facts(
    port=4433,
    own=frozenset({"192.168.1.5"}),
    seen=(OURS, OUTSIDE, SIX),
    relay="https://relay.example/",
    clock_offset=0.1,
    arithmetic="ab",
    arithmetic_expected="ab",
    disk_free=1 << 40,
    memory_free=1 << 40,
)
HOST = HostFacts(
    name="it", run_id="run", phase="ROUND_TRAIN", num_clients=3, path="direct", rtt=0.05, line=Line(2.5e6, 5e6)
)


def of(facts: Facts, about: str) -> Finding:
    (found,) = [finding for finding in examine(facts) if finding.about == about]
    return found


def test_where_all_is_well_nothing_is_to_be_done() -> None:
    assert {finding.verdict for finding in examine(GOOD)} == {"good"}
    assert all(finding.to_do.startswith("nothing") for finding in examine(GOOD))


@pytest.mark.parametrize(
    ("change", "about", "verdict", "advice"),
    [
        ({"bind_error": "refused"}, "UDP", "bad", "firewall"),
        ({"seen": (OURS,), "clock_offset": None}, "UDP", "bad", "let UDP out"),
        ({"seen": (OURS,), "clock_offset": None, "relay": None}, "UDP", "note", "--relay none"),
        ({"relay": None}, "relay", "bad", "--relay URL"),
        ({"seen": (OURS, OUTSIDE)}, "addresses", "note", "IPv6"),
        ({"seen": (OURS,)}, "NAT", "note", "--external-addr"),
        ({"seen": (replace(OUTSIDE, port=9),)}, "NAT", "note", "forward a port"),
        ({"seen": (OUTSIDE,), "own": frozenset({"9.9.9.9"})}, "NAT", "good", "firewall"),
        ({"clock_offset": None}, "clock", "note", "look whether"),
        ({"clock_offset": -90.0}, "clock", "bad", "set it"),
        ({"arithmetic": "cd"}, "arithmetic", "bad", "memory of this machine"),
        ({"disk_free": 1000, "round": RoundFacts(parameters=10**6)}, "disk", "bad", "--checkpoint-dir"),
        ({"memory_free": 1000, "memory_needed": 1001}, "memory", "bad", "smaller model"),
        ({"host": HostFacts(name="it", error="it cannot be reached")}, "host", "bad", "latest ticket"),
        ({"host": replace(HOST, path="relayed")}, "line to the host", "note", "direct path"),
        ({"host": replace(HOST, line=None, line_error="busy")}, "line to the host", "note", "over iroh"),
        ({"host": replace(HOST, clock_ahead=60.0)}, "clock of the host", "note", "set the one that is wrong"),
        (
            {"host": replace(HOST, peers=(PeerFacts(key=b"k" * 32, error="no answer"),))},
            "peer 6b6b6b6b",
            "note",
            "host",
        ),
        ({"host": HOST, "round": RoundFacts(parameters=10**9, peers=10)}, "a round", "note", "global_batch_size"),
        ({"round": RoundFacts(parameters=10**12)}, "a round", "bad", "max_round_train_time"),
    ],
)
def test_each_trouble_is_named_with_what_to_do(
    change: dict[str, object], about: str, verdict: str, advice: str
) -> None:
    found = of(replace(GOOD, **change), about)  # type: ignore[arg-type]
    assert found.verdict == verdict
    assert advice in found.to_do


def test_bytes_of_a_result_are_those_of_the_wire() -> None:
    parameter = torch.nn.Parameter(torch.zeros(512, 1024))
    for quantized in (True, False):
        layout = KnownLayouts(DisTrO([parameter], 1e-3, quantize_1bit=quantized).plan).complete(quantized=quantized)
        assert layout is not None
        told = result_bytes(RoundFacts(parameters=parameter.numel(), quantized=quantized))
        assert told <= layout.size <= told + 100


def test_seconds_of_a_round_are_those_of_the_slower_direction() -> None:
    model = RoundFacts(parameters=64 * 64 * 100, peers=5)
    up, down = round_seconds(model, Line(up=1000.0, down=4000.0), rtt=0.5)
    assert up == pytest.approx(4 * result_bytes(model) / 1000 + 1)
    assert down == pytest.approx(result_bytes(model) / 1000 + 1)


def test_the_self_test_gives_here_what_is_expected_everywhere() -> None:
    facts = machine_facts(DisTrO([torch.nn.Parameter(torch.zeros(2, 2))], 1e-3))
    assert facts[MERGE] == probing.EXPECTED_HASH


def test_an_answer_of_a_time_server_is_read_and_others_are_not() -> None:
    def stamp(unix: float) -> bytes:
        return int((unix + NTP_EPOCH) * 2**32).to_bytes(8, "big")

    cookie = b"8 bytes!"
    answer = bytes([0b00_100_100, 2]) + bytes(22) + cookie + stamp(1_000_000_010.0) + stamp(1_000_000_010.5)
    assert offset_in(answer, cookie, 1_000_000_000.0, 1_000_000_000.5) == pytest.approx(-10.0, abs=1e-3)
    for wrong in (answer[:47], b"\x23" + answer[1:], answer[:1] + b"\0" + answer[2:]):
        assert offset_in(wrong, cookie, 0.0, 0.0) is None
    assert offset_in(answer, b"another!", 0.0, 0.0) is None


def test_parameters_are_counted_in_a_models_files(tmp_path: Path) -> None:
    save_file({"a": torch.zeros(3, 4, dtype=torch.bfloat16)}, tmp_path / "model-1.safetensors")
    save_file({"b": torch.zeros(5, dtype=torch.bfloat16)}, tmp_path / "model-2.safetensors")
    assert count_parameters(tmp_path) == (17, 2)
    (tmp_path / "model-3.safetensors").write_bytes(b"\xff" * 20)
    with pytest.raises(ConfigurationError, match="is not a file of weights"):
        count_parameters(tmp_path)


@pytest.mark.parametrize(("text", "count"), [("124M", 124_000_000), ("1.5b", 1_500_000_000), ("1_000", 1000)])
def test_parameters_are_written_as_people_do(text: str, count: int) -> None:
    assert doctor._count(text) == count


@pytest.mark.parametrize("text", ["", "many", "-5", "0", "1T"])
def test_other_numbers_of_parameters_are_refused(text: str) -> None:
    with pytest.raises(argparse.ArgumentTypeError, match="124M"):
        doctor._count(text)


@pytest.fixture
def no_time_server(monkeypatch: pytest.MonkeyPatch) -> None:
    async def silent(server: str | None) -> None:
        return None

    monkeypatch.setattr(probing, "_clock_offset", silent)


@pytest.mark.waiting
@pytest.mark.usefixtures("no_time_server")
def test_a_host_is_reached_and_its_line_measured(capsys: pytest.CaptureFixture[str]) -> None:
    with live_run() as run:
        host = run.host(config(min_peers=2))
        ticket = host.port.ticket
        assert ticket is not None
        status = main(["doctor", ticket, "--relay", "none", "--parameters", "1M", "--json"])
    said = {finding["about"]: finding for finding in json.loads(capsys.readouterr().out)["findings"]}
    assert status == 0
    assert said["host"]["verdict"] == "good"
    assert "Mbit/s up" in said["line to the host"]["found"]
    assert "on the measured line" in said["a round"]["found"]


@pytest.mark.waiting
@pytest.mark.usefixtures("no_time_server")
def test_a_host_that_is_gone_is_told_and_the_status_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", "127.0.0.1:9/run", "--relay", "none"]) == 1
    assert "!! host" in capsys.readouterr().out
