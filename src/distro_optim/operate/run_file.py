"""The TOML in which an operator describes a run, as Psyche's operators write it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from ..coordinator.formats.text import from_toml
from ..coordinator.model import Model
from ..coordinator.types import CoordinatorConfig
from ..errors import ConfigurationError, ProtocolError

__all__ = ["RunFile", "read_run_file"]


@dataclass(frozen=True)
class RunFile:
    """``[config]`` and ``[model.LLM]``; what stands there besides is passed over."""

    config: CoordinatorConfig
    model: Model


def read_run_file(file: Path) -> RunFile:
    """Reads such a file.

    Raises:
        ConfigurationError: it cannot be read, or does not describe a run; says which field is wrong.
    """
    try:
        return from_toml(RunFile, file.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigurationError(f"{file} cannot be read: {error}", name="file") from None
    except ProtocolError as error:
        raise ConfigurationError(f"{file} does not describe a run: {error}", name="file") from None
