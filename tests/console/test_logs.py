"""Logs in files: levels, rotation, printable lines, JSON; and what a terminal shows stays what it was."""

from __future__ import annotations

import json
import logging
from argparse import ArgumentParser
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from distro_optim import logs
from distro_optim.cli import main
from distro_optim.errors import ConfigurationError
from distro_optim.logs import (
    LOG,
    LOG_LEVEL,
    LOG_ROTATE,
    LogOptions,
    add_log_options,
    log_options,
    logging_to,
    start_logging,
)

logger = logging.getLogger("distro_optim.strategy.somewhere")


def asked(*arguments: str, **environ: str) -> LogOptions | None:
    parser = ArgumentParser()
    add_log_options(parser)
    return log_options(parser.parse_args(arguments), environ)


def test_options_go_before_the_environment() -> None:
    assert asked() is None
    options = asked("--log-file", "a.log", "--log-rotate", "2 MB:3", **{LOG: "b.log", LOG_LEVEL: "Warning"})
    assert options == LogOptions(file=Path("a.log"), level="warning", max_bytes=2_000_000, older=3)


@pytest.mark.parametrize(
    ("text", "size", "older"), [("50MB", 50_000_000, 5), ("10k:1", 10_000, 1), ("1G:2", 10**9, 2), ("none", 0, 0)]
)
def test_sizes_are_read_as_people_write_them(text: str, size: int, older: int) -> None:
    options = LogOptions.read("a.log", rotate=text)
    assert (options.max_bytes, options.older) == (size, older)
    assert LogOptions.from_environment(options.variables()) == options


@pytest.mark.parametrize(
    ("arguments", "environ", "says"),
    [
        (["--log-level", "debug"], {}, "give --log-file"),
        (["--log-file", "x", "--log-level", "loud"], {}, "--log-level must be one of debug, info"),
        (["--log-file", "x"], {LOG_LEVEL: "loud"}, f"^{LOG_LEVEL} must be one of"),
        (["--log-file", "x", "--log-format", "xml"], {}, "text, json"),
        (["--log-file", "x", "--log-rotate", "many"], {}, "such as 50MB:5"),
        (["--log-file", "x", "--log-rotate", "10"], {}, "at least 10000 bytes"),
        (["--log-file", "x", "--log-rotate", "1MB:0"], {}, "such as 50MB:5"),
        (["--log-file", "x"], {LOG_ROTATE: "1TB"}, f"^{LOG_ROTATE} must be"),
    ],
)
def test_what_makes_no_sense_is_told_by_its_name(arguments: list[str], environ: dict[str, str], says: str) -> None:
    with pytest.raises(ConfigurationError, match=says):
        asked(*arguments, **environ)


def test_a_file_that_cannot_be_written_is_told_before_anything_else(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["serve", "--state", "nowhere.toml", "--log-file", str(tmp_path / "no" / "run.log")]) == 2
    assert "--log-file" in capsys.readouterr().err


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "run.log"


@pytest.fixture(autouse=True)
def _as_before() -> Iterator[None]:
    ours = logging.getLogger("distro_optim")
    before = (ours.level, ours.propagate, list(ours.handlers))
    yield
    assert (ours.level, ours.propagate, list(ours.handlers)) == before


def test_a_log_has_what_its_level_asks_for(file: Path) -> None:
    with logging_to(LogOptions(file=file, level="info")):
        logger.debug("a message came")
        logger.info("the run goes on")
    logger.info("nobody listens any more")
    (line,) = file.read_text().splitlines()
    assert line.endswith("INFO distro_optim.strategy.somewhere: the run goes on")


def test_what_a_stranger_says_stays_in_its_line(file: Path) -> None:
    with logging_to(LogOptions(file=file)):
        logger.info("joined: %s", "x\x1b[2J\n2026-01-01 ERROR distro_optim: all is lost\u202e" + "y" * 10_000)
        try:
            raise ValueError("first\n\x1b[2Jsecond")
        except ValueError:
            logger.info("failed", exc_info=True)
    text = file.read_text(encoding="utf-8")
    assert all(line.isprintable() for line in text.splitlines())
    first, second, *traceback = text.splitlines()
    assert len(first) <= logs.MAX_CHARACTERS
    assert "failed" in second
    assert traceback
    assert all(line.startswith("  ") for line in traceback)


def test_lines_of_json_are_whole_objects(file: Path) -> None:
    with logging_to(LogOptions(file=file, form="json")):
        logger.warning('a "quote" and\na line')
        try:
            raise ValueError("broken")
        except ValueError:
            logger.info("failed", exc_info=True)
    first, second = [json.loads(line) for line in file.read_text().splitlines()]
    assert (first["level"], first["message"]) == ("warning", 'a "quote" and?a line')
    assert first["logger"] == "distro_optim.strategy.somewhere"
    assert abs(first["time"] - second["time"]) < 60
    assert second["exception"][-1] == "ValueError: broken"


def test_a_log_takes_no_more_than_it_may(file: Path) -> None:
    with logging_to(LogOptions(file=file, max_bytes=10_000, older=2)):
        for number in range(400):
            logger.info("%d %s", number, "x" * 100)
    files = sorted(path.name for path in file.parent.iterdir())
    assert files == ["run.log", "run.log.1", "run.log.2"]
    assert all((file.parent / name).stat().st_size <= 10_000 for name in files)
    assert "399 " in file.read_text()


def test_a_full_disk_is_said_once_and_stops_nothing(
    file: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with logging_to(LogOptions(file=file)):
        handler = logs._writing[file.absolute()]

        def full(record: Any) -> str:
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(handler, "format", full)
        logger.info("one")
        logger.info("two")
    assert capsys.readouterr().err.count("No space left") == 1


@pytest.mark.parametrize("level", ["error", "debug"])
def test_others_are_told_neither_more_nor_less_than_without_a_file(
    level: str, file: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with logging_to(LogOptions(file=file, level=level)):
        logger.debug("a message came")
        logger.warning("the weights differ")
    assert [record.getMessage() for record in caplog.records] == ["the weights differ"]


def test_where_nobody_listens_python_still_shows_warnings(
    file: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(logging.getLogger(), "handlers", [])
    with logging_to(LogOptions(file=file)):
        logger.warning("the weights differ")
        logger.info("all is well")
    assert capsys.readouterr().err == "the weights differ\n"


def test_a_command_and_a_session_in_it_write_each_line_once(file: Path) -> None:
    options = LogOptions(file=file)
    with logging_to(options):
        start_logging(options)
        logger.info("the run goes on")
    assert len(file.read_text().splitlines()) == 1


def test_a_command_logs_how_it_ends(file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["serve", "--state", "nowhere.toml", "--log-file", str(file)]) == 2
    begins, ends = file.read_text().splitlines()
    assert "distro-optim" in begins
    assert "ends with ConfigurationError: cannot read nowhere.toml" in ends


def test_each_peer_of_a_test_network_has_a_file_beside_its_own() -> None:
    assert LogOptions(file=Path("logs/run.log")).beside("peer-2").file == Path("logs/run-peer-2.log")
