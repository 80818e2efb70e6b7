"""A peer writes how it is doing, one JSON line after the other, and whoever watches it reads them."""

from __future__ import annotations

import hashlib
import json
import logging
import os
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from distro_optim.strategy import run_report
from distro_optim.strategy.environment import RunEnvironment
from distro_optim.strategy.run_report import (
    ENDED,
    EVENT,
    JOINED,
    MAX_LINE,
    ROUND,
    ReportLine,
    ReportReader,
    RunReporter,
    ddp_bytes,
    weights_hash,
)

pytestmark = pytest.mark.waiting


PARAMETERS = 1000


def finish_round(reporter: RunReporter, step: int, **changes: Any) -> None:
    facts: dict[str, Any] = {
        "epoch": 1,
        "step": step,
        "total_steps": 100,
        "run_state": "Training",
        "num_peers": 2,
        "loss": 2.5,
        "bytes_sent": 100 * step,
        "bytes_received": 300 * step,
        "seconds_training": 0.5 * step,
        "seconds_waiting": 0.25 * step,
        "weights_hash": "ab" * 32,
    }
    reporter.round(**(facts | changes))


def reporter_to(path: Path | None) -> RunReporter:
    return RunReporter(path, name="peer 1", peer=bytes(range(32)), num_parameters=PARAMETERS)


def test_every_round_and_event_is_a_line_that_is_complete_in_itself(tmp_path: Path) -> None:
    path = tmp_path / "report.jsonl"
    with reporter_to(path) as reporter:
        reporter.joined(run_state="Warmup", epoch=1, step=1, num_peers=2)
        finish_round(reporter, 1)
        finish_round(reporter, 2, loss=2.25)
        reporter.tell("a peer left")
        reporter.ended(
            step=3,
            run_state="Finished",
            bytes_sent=250,
            bytes_received=650,
            seconds_training=1.0,
            seconds_waiting=0.5,
            weights_hash="cd" * 32,
        )
    records = [json.loads(line) for line in path.read_text().splitlines()]
    assert [record["kind"] for record in records] == [JOINED, ROUND, ROUND, EVENT, ENDED]
    assert all(record["name"] == "peer 1" and record["peer"] == bytes(range(32)).hex() for record in records)
    assert all(record["time"] > 1.7e9 for record in records)
    assert records[2] | {"time": 0} == {
        "kind": ROUND,
        "time": 0,
        "name": "peer 1",
        "peer": bytes(range(32)).hex(),
        "epoch": 1,
        "step": 2,
        "total_steps": 100,
        "run_state": "Training",
        "num_peers": 2,
        "loss": 2.25,
        "bytes_sent": 200,
        "bytes_received": 600,
        "ddp_bytes": 2 * 2 * PARAMETERS,
        "seconds_training": 1.0,
        "seconds_waiting": 0.5,
        "weights_hash": "ab" * 32,
        "text": "",
    }
    assert (records[3]["text"], records[3]["step"], records[3]["bytes_sent"]) == ("a peer left", 2, 200)
    assert (records[4]["weights_hash"], records[4]["epoch"]) == ("cd" * 32, 1)


def test_a_reader_follows_a_report_while_it_is_written(tmp_path: Path) -> None:
    path = tmp_path / "report.jsonl"
    reader = ReportReader(path)
    assert reader.read() == []
    with reporter_to(path) as reporter:
        finish_round(reporter, 1)
        assert [line.step for line in reader.read()] == [1]
        assert reader.read() == []
        finish_round(reporter, 2)
        finish_round(reporter, 3)
        assert [line.step for line in reader.read()] == [2, 3]


def test_half_a_line_waits_for_its_other_half(tmp_path: Path) -> None:
    path = tmp_path / "report.jsonl"
    line = ReportLine(kind=ROUND, step=7).to_json() + "\n"
    reader = ReportReader(path)
    path.write_text(line[:40])
    assert reader.read() == []
    path.write_text(line)
    assert [found.step for found in reader.read()] == [7]


def test_after_a_kill_in_the_middle_of_a_line_only_that_line_is_lost(tmp_path: Path) -> None:
    path = tmp_path / "report.jsonl"
    with reporter_to(path) as reporter:
        finish_round(reporter, 1)
    path.write_bytes(path.read_bytes() + b'{"kind": "rou')
    with reporter_to(path) as reporter:
        finish_round(reporter, 2)
    reader = ReportReader(path)
    assert [line.step for line in reader.read()] == [1, 2]
    assert reader.skipped == 1


def test_a_line_that_never_ends_does_not_fill_the_memory(tmp_path: Path) -> None:
    path = tmp_path / "report.jsonl"
    path.write_bytes(b"x" * (4 * MAX_LINE))
    reader = ReportReader(path)
    assert reader.read() == []
    with open(path, "ab") as file:
        file.write(b"x" * MAX_LINE + b"\n" + ReportLine(kind=ROUND, step=9).to_json().encode() + b"\n")
    assert [line.step for line in reader.read()] == [9]
    assert reader.skipped == 1
    assert len(reader._rest) <= MAX_LINE


def test_a_report_that_is_full_begins_anew_and_a_reader_follows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run_report, "MAX_BYTES", 3000)
    path = tmp_path / "report.jsonl"
    reader, steps = ReportReader(path), []
    with reporter_to(path) as reporter:
        for step in range(1, 31):
            finish_round(reporter, step)
            if step % 2:
                steps += [line.step for line in reader.read()]
    assert {file.name for file in tmp_path.iterdir()} == {"report.jsonl", "report.jsonl.1"}
    assert all(file.stat().st_size < 4000 for file in tmp_path.iterdir())
    assert len(steps) > 20
    assert steps == sorted(set(steps))
    assert reader.skipped == 0


def test_without_a_path_nothing_is_written_and_everything_may_be_called(tmp_path: Path) -> None:
    with RunReporter.from_environment(RunEnvironment()) as reporter:
        finish_round(reporter, 1)
        reporter.tell("nobody hears it")
        assert not reporter.is_writing


def test_the_environment_says_where_the_report_goes_and_who_writes_it(tmp_path: Path) -> None:
    path = tmp_path / "report.jsonl"
    with RunReporter.from_environment(RunEnvironment(report=path, peer_name="anna")) as reporter:
        assert reporter.is_writing
        reporter.tell("here")
    assert [line.name for line in ReportReader(path).read()] == ["anna"]


def test_a_report_that_cannot_be_written_is_logged_once_and_stops_nothing(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING), reporter_to(tmp_path / "missing" / "report.jsonl") as reporter:
        finish_round(reporter, 1)
        finish_round(reporter, 2)
    assert [record.getMessage().split(":")[0] for record in caplog.records] == [
        f"no report is written to {tmp_path}/missing/report.jsonl"
    ]


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="this system has no /dev/full")
def test_a_full_disk_stops_nothing(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "report.jsonl"
    path.symlink_to("/dev/full")
    with caplog.at_level(logging.WARNING), reporter_to(path) as reporter:
        finish_round(reporter, 1)
        finish_round(reporter, 2)
        assert not reporter.is_writing
    assert len(caplog.records) == 1


@pytest.mark.parametrize("loss", [float("nan"), float("inf"), None])
def test_a_loss_that_is_no_number_is_told_as_none(tmp_path: Path, loss: float | None) -> None:
    path = tmp_path / "report.jsonl"
    with reporter_to(path) as reporter:
        finish_round(reporter, 1, loss=loss)
    assert [line.loss for line in ReportReader(path).read()] == [None]


def test_words_of_strangers_reach_no_terminal_as_commands() -> None:
    line = ReportLine.from_json(ReportLine(kind=EVENT, text="\x1b]0;owned\x07" + "a" * 10_000).to_json())
    assert line is not None
    assert line.text.startswith("?]0;owned?")
    assert len(line.text) <= 500


def test_ddp_sends_each_gradient_almost_twice_around_the_ring() -> None:
    assert [ddp_bytes(1000, peers) for peers in (1, 2, 4)] == [0, 2000, 3000]


def test_the_hash_of_a_model_is_that_of_its_tensors_hashes_in_order() -> None:
    digests = [bytes([number]) * 32 for number in range(3)]
    assert weights_hash(digests) == hashlib.sha256(b"".join(digests)).hexdigest()
    assert weights_hash(digests) != weights_hash(digests[::-1])


TEXTS = st.text(st.characters(min_codepoint=32, max_codepoint=126), max_size=50)
COUNTS = st.integers(0, 2**63)
SECONDS = st.floats(0, 1e9)


@given(
    st.builds(
        ReportLine,
        kind=st.sampled_from([JOINED, ROUND, EVENT, ENDED]),
        time=SECONDS.map(lambda value: round(value, 3)),
        name=TEXTS,
        peer=TEXTS,
        epoch=COUNTS,
        step=COUNTS,
        run_state=TEXTS,
        num_peers=COUNTS,
        loss=st.none() | st.floats(-1e9, 1e9),
        bytes_sent=COUNTS,
        bytes_received=COUNTS,
        ddp_bytes=COUNTS,
        seconds_training=SECONDS,
        seconds_waiting=SECONDS,
        weights_hash=TEXTS,
        text=TEXTS,
    )
)
def test_what_is_written_is_read(line: ReportLine) -> None:
    assert ReportLine.from_json(line.to_json()) == line


JSON = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5) | st.lists(st.none(), max_size=2)
LINES = st.dictionaries(st.sampled_from(["kind", "step", "loss", "time", "text", "other"]), JSON)


@given(st.binary(max_size=100) | LINES.map(lambda record: json.dumps(record | {"kind": ROUND}).encode()))
def test_any_line_is_read_or_none(line: bytes) -> None:
    found = ReportLine.from_json(line)
    if found is not None:
        assert ReportLine.from_json(found.to_json()) is not None
