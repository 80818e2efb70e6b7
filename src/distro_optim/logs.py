"""The log of a process in a file that does not grow without end: levels, rotation, text or JSON lines.

The logger is ``distro_optim``: DEBUG for single messages, INFO for what happens, WARNING for what a person should know.
Commands have ``--log-file``, ``--log-level``, ``--log-rotate`` and ``--log-format``. A script that is in a run has the
variables :data:`LOG`, :data:`LOG_LEVEL`, :data:`LOG_ROTATE` and :data:`LOG_FORMAT`, which commands understand as well.

What is written is one line for each record, cut and printable whoever it quotes; a traceback has lines of its own, each
indented. That a log cannot be written is said once, and never stops anything.
"""

from __future__ import annotations

import json
import logging
import re
import sys
from argparse import ArgumentParser, Namespace
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from logging.handlers import RotatingFileHandler
from pathlib import Path
from typing import Final

from typing_extensions import override

from .errors import ConfigurationError
from .words import shown

__all__ = [
    "LOG",
    "LOG_FORMAT",
    "LOG_LEVEL",
    "LOG_ROTATE",
    "LogOptions",
    "add_log_options",
    "log_options",
    "logging_to",
    "start_logging",
]

LOG: Final = "DISTRO_OPTIM_LOG"
"""A path: the file to which log lines are added."""

LOG_LEVEL: Final = "DISTRO_OPTIM_LOG_LEVEL"
"""``debug``, ``info``, ``warning`` or ``error``; info by default."""

LOG_ROTATE: Final = "DISTRO_OPTIM_LOG_ROTATE"
"""Size and number of older files, such as ``50MB:5``, which is the default; ``none`` leaves it to others."""

LOG_FORMAT: Final = "DISTRO_OPTIM_LOG_FORMAT"
"""``text`` or ``json``."""

LEVELS: Final = ("debug", "info", "warning", "error")

FORMATS: Final = ("text", "json")

MAX_CHARACTERS: Final = 4000
"""Of a message. Whole states of a run are logged at level debug, and have less."""

MAX_TRACEBACK_LINES: Final = 200
"""Of an exception; the last ones."""

DEFAULT_BYTES: Final = 50_000_000
DEFAULT_OLDER: Final = 5
"""So a log takes 300 MB. Chosen arbitrarily."""

_MIN_BYTES: Final = 10_000
"""Less would lose what has just been written."""

_MAX_OLDER: Final = 1000

_UNITS: Final = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9}

_SIZE: Final = re.compile(r"(\d{1,12})\s*([KMG]?)B?(?::(\d{1,6}))?", re.IGNORECASE)

_logger: Final = logging.getLogger("distro_optim")


@dataclass(frozen=True, kw_only=True)
class LogOptions:
    """Where a log goes, and what.

    Attributes:
        file: added to.
        level: of :data:`LEVELS`.
        max_bytes: size at which a new file begins; 0 for never.
        older: how many of the older files stay, as ``FILE.1``, ``FILE.2`` and so on.
        form: of :data:`FORMATS`.
    """

    file: Path
    level: str = "info"
    max_bytes: int = DEFAULT_BYTES
    older: int = DEFAULT_OLDER
    form: str = "text"

    @classmethod
    def read(
        cls,
        file: str | Path,
        level: str | None = None,
        rotate: str | None = None,
        form: str | None = None,
        *,
        names: tuple[str, str, str] = (LOG_LEVEL, LOG_ROTATE, LOG_FORMAT),
    ) -> LogOptions:
        """Reads what a user wrote; None stands for what was not said.

        Args:
            file: its path.
            level: see :data:`LOG_LEVEL`.
            rotate: see :data:`LOG_ROTATE`.
            form: see :data:`LOG_FORMAT`.
            names: what the last three are called in messages.

        Raises:
            ConfigurationError: one is wrong.
        """
        options = cls(file=Path(file))
        if level is not None:
            options = replace(options, level=_one_of(level, LEVELS, names[0]))
        if form is not None:
            options = replace(options, form=_one_of(form, FORMATS, names[2]))
        if rotate is not None:
            size, older = _rotation(rotate, names[1])
            options = replace(options, max_bytes=size, older=older)
        return options

    @classmethod
    def from_environment(cls, environ: Mapping[str, str]) -> LogOptions | None:
        """What the variables say; None if they name no file.

        Raises:
            ConfigurationError: one is wrong.
        """
        file, level, rotate, form = (environ.get(name, "").strip() for name in (LOG, LOG_LEVEL, LOG_ROTATE, LOG_FORMAT))
        return cls.read(file, level or None, rotate or None, form or None) if file else None

    def variables(self) -> dict[str, str]:
        """The environment variables that say this."""
        rotate = f"{self.max_bytes}:{self.older}" if self.max_bytes else "none"
        return {LOG: str(self.file), LOG_LEVEL: self.level, LOG_ROTATE: rotate, LOG_FORMAT: self.form}

    def beside(self, name: str) -> LogOptions:
        """The same for another process: ``run.log`` becomes ``run-NAME.log``."""
        return replace(self, file=self.file.with_name(f"{self.file.stem}-{name}{self.file.suffix}"))


def _one_of(text: str, known: tuple[str, ...], name: str) -> str:
    word = text.strip().lower()
    if word not in known:
        raise ConfigurationError(f"{name} must be one of {', '.join(known)}, got {text!r}", name=name, value=text)
    return word


def _rotation(text: str, name: str) -> tuple[int, int]:
    if text.strip().lower() == "none":
        return 0, 0
    match = _SIZE.fullmatch(text.strip())
    size = int(match[1]) * _UNITS[match[2].upper()] if match is not None else 0
    older = int(match[3]) if match is not None and match[3] is not None else DEFAULT_OLDER
    if size < _MIN_BYTES or not 1 <= older <= _MAX_OLDER:
        raise ConfigurationError(
            f"{name} must be a size of at least {_MIN_BYTES} bytes and how many older files stay, such as 50MB:5, or "
            f"none, got {text!r}",
            name=name,
            value=text,
        )
    return size, older


# -- options of commands -----------------------------------------------------------------------------------------------


def add_log_options(parser: ArgumentParser) -> None:
    """Adds the four options to a command."""
    log = parser.add_argument_group("log", "in addition to what is shown; each can be given in the environment as well")
    log.add_argument("--log-file", metavar="FILE", help=f"add log lines to a file (${LOG})")
    log.add_argument("--log-level", metavar="LEVEL", help=f"{', '.join(LEVELS)} (info)")
    log.add_argument(
        "--log-rotate", metavar="SIZE[:COUNT]", help="begin a new file at this size, keep so many (50MB:5)"
    )
    log.add_argument("--log-format", metavar="FORMAT", help="text, or json: one object a line (text)")


def log_options(options: Namespace, environ: Mapping[str, str]) -> LogOptions | None:
    """What was asked for, by options and, where those are silent, by the environment; None for no log.

    Raises:
        ConfigurationError: an option is wrong, or there is no file that it could be about.
    """

    def found(option: str, variable: str) -> tuple[str, str | None]:
        given = getattr(options, option, None)
        if given is not None:
            return "--" + option.replace("_", "-"), str(given)
        return variable, environ.get(variable, "").strip() or None

    _, file = found("log_file", LOG)
    more = [found("log_level", LOG_LEVEL), found("log_rotate", LOG_ROTATE), found("log_format", LOG_FORMAT)]
    if file is None:
        if lonely := next((name for name, value in more if value is not None and name.startswith("--")), None):
            raise ConfigurationError(f"{lonely} says how to log, and not where: give --log-file FILE", name="log_file")
        return None
    (level_name, level), (rotate_name, rotate), (form_name, form) = more
    return LogOptions.read(file, level, rotate, form, names=(level_name, rotate_name, form_name))


# -- writing -----------------------------------------------------------------------------------------------------------

_writing: Final[dict[Path, logging.Handler]] = {}
"""What this process writes, by absolute path."""


@contextmanager
def logging_to(options: LogOptions | None, *, option: str = "--log-file") -> Iterator[None]:
    """Writes the log while it is entered; None writes none.

    Args:
        options: see there.
        option: what the file is called in a message.

    Raises:
        ConfigurationError: the file cannot be written to.
    """
    if options is None or not _begin(options, option):
        yield
        return
    try:
        yield
    finally:
        _end(options)


def start_logging(options: LogOptions | None) -> None:
    """Writes the log from now on, to the end of the process. None, or a file that is written already, changes nothing.

    Raises:
        ConfigurationError: the file cannot be written to.
    """
    if options is not None:
        _begin(options, LOG)


def _begin(options: LogOptions, option: str) -> bool:
    """False if this file is written already."""
    path = options.file.absolute()
    if path in _writing:
        return False
    try:
        handler = _QuietlyRotating(options)
    except OSError as error:
        raise ConfigurationError(
            f"{option} {options.file}: {error.strerror or error}; name a file that can be written",
            name="log_file",
            value=options.file,
        ) from None
    handler.setFormatter(_Json() if options.form == "json" else _Text())
    handler.setLevel(options.level.upper())
    if not _writing:
        _passing_on.begin()
    _logger.addHandler(handler)
    _logger.setLevel(min(handler.level, _logger.level))
    _writing[path] = handler
    return True


def _end(options: LogOptions) -> None:
    handler = _writing.pop(options.file.absolute())
    _logger.removeHandler(handler)
    handler.close()
    if not _writing:
        _passing_on.end()


class _PassingOn(logging.Handler):
    """Hands on to everybody else what they would have had without a file, so that a terminal shows neither more, for
    the file's level, nor less, since Python shows warnings only where nobody handles them."""

    def begin(self) -> None:
        self._before, self._propagated = _logger.level, _logger.propagate
        self.setLevel(_logger.getEffectiveLevel())
        _logger.setLevel(self.level)
        _logger.propagate = False
        _logger.addHandler(self)

    def end(self) -> None:
        _logger.removeHandler(self)
        _logger.propagate = self._propagated
        _logger.setLevel(self._before)

    @override
    def handle(self, record: logging.LogRecord) -> bool:
        if self._propagated and _logger.parent is not None:
            _logger.parent.callHandlers(record)
        return True


_passing_on: Final = _PassingOn()


class _QuietlyRotating(RotatingFileHandler):
    """Says once that it cannot write."""

    def __init__(self, options: LogOptions) -> None:
        super().__init__(options.file, maxBytes=options.max_bytes, backupCount=options.older, encoding="utf-8")
        self._said = False

    @override
    def handleError(self, record: logging.LogRecord) -> None:
        if not self._said and sys.stderr is not None:
            self._said = True
            error = sys.exception()
            try:
                print(f"the log cannot be written to {self.baseFilename}: {error}", file=sys.stderr)
            except (OSError, ValueError):
                pass  # nobody listens


class _Text(logging.Formatter):
    def __init__(self) -> None:
        super().__init__("%(asctime)s %(levelname)s %(name)s: %(message)s")

    @override
    def formatMessage(self, record: logging.LogRecord) -> str:
        return shown(super().formatMessage(record), MAX_CHARACTERS)

    @override
    def formatException(self, ei: object) -> str:
        return _indented(super().formatException(ei))  # type: ignore[arg-type]

    @override
    def formatStack(self, stack_info: str) -> str:
        return _indented(stack_info)


class _Json(logging.Formatter):
    @override
    def format(self, record: logging.LogRecord) -> str:
        line: dict[str, object] = {
            "time": round(record.created, 3),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": shown(record.getMessage(), MAX_CHARACTERS),
        }
        if record.exc_info:
            line["exception"] = _cut(self.formatException(record.exc_info))
        return json.dumps(line)


def _cut(text: str) -> list[str]:
    return [shown(line, MAX_CHARACTERS) for line in text.splitlines()[-MAX_TRACEBACK_LINES:]]


def _indented(text: str) -> str:
    return "\n".join(f"  {line}" for line in _cut(text))
