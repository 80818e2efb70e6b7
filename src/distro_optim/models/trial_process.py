"""The process that :mod:`.trial` starts: makes a model of a stranger's configuration, within limits of its own.

It reads a request from its input and writes ``{"problem": null}``, or what kept it from making the model, as JSON.
"""

from __future__ import annotations

import json
import mmap
import os
import sys
from typing import IO, TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["main"]

_MOST_MEMORY: Final = 16 << 30
_LEAST_MEMORY: Final = 1 << 30
_TOKENS: Final = 8
"""Of the forward pass."""

MAX_TENSORS: Final = 100_000
"""As many as have names in a model that peers share."""

MAX_PARAMETERS: Final = 1 << 42
"""Four million millions; the largest known have a quarter."""


def main() -> None:
    """Answers one request."""
    request = json.loads(sys.stdin.buffer.read())
    # Libraries print as they like; only the answer goes to who asked.
    answers = os.fdopen(os.dup(1), "w")
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 1)
    os.dup2(nowhere, 2)
    _answer(answers, _problem(request))


def _problem(request: dict[str, Any]) -> str | None:
    import torch

    from ..coordinator.model import LLMArchitecture
    from ..errors import DistroError
    from .building import build_shapes, build_with_buffers, sorted_parameters
    from .config import LanguageModelConfig

    config = LanguageModelConfig(LLMArchitecture(request["architecture"]), json.loads(request["config"]))
    torch.set_num_threads(1)
    torch.set_grad_enabled(False)
    if not _limit(request["cpu_seconds"], request["memory_bytes"]):
        return "is of a family that is built only in a process with limits, which this system does not have"
    try:
        model = build_shapes(config)
        parameters = sorted_parameters(model)
        if len(parameters) > MAX_TENSORS or sum(p.numel() for p in parameters.values()) > MAX_PARAMETERS:
            return "is beyond any model: it has too many parameters"
        _go_forward(model)
        del model, parameters
        build_with_buffers(config)
    except DistroError as error:
        return f"cannot be made ({error})"
    except MemoryError:
        return "takes more memory to build than there is for it"
    except Exception as error:
        return f"cannot be made ({type(error).__name__}: {error})"
    return None


def _go_forward(model: PreTrainedModel) -> None:
    """One pass over a few tokens, on no device, since some models repeat their layers.

    Many cannot do it there, because what they compute depends on values, which there are none of. That is no reason to
    refuse them; a pass beyond the limits is.
    """
    import torch

    tokens = torch.zeros(1, _TOKENS, dtype=torch.int64, device="meta")
    try:
        with torch.device("meta"):
            model(input_ids=tokens, use_cache=False, return_dict=True)
    except MemoryError:
        raise
    except Exception:
        return


def _limit(cpu_seconds: int, memory_bytes: int | None) -> bool:
    """Bounds what this process takes from now on; False where the system does not keep to it."""
    import resource

    import torch

    from .memory import available_memory

    if memory_bytes is None:
        free = available_memory(torch.device("cpu")) or 0
        memory_bytes = min(_MOST_MEMORY, max(_LEAST_MEMORY, free // 2))
    used = resource.getrusage(resource.RUSAGE_SELF)
    soft = int(used.ru_utime + used.ru_stime) + 1 + cpu_seconds
    try:
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        resource.setrlimit(resource.RLIMIT_CPU, (soft, soft + 1))
        limit = _address_space() + memory_bytes
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    except (ValueError, OSError):
        return False
    # Some systems, such as macOS, take the limit and do nothing. Memory that nobody writes to costs nothing.
    try:
        mmap.mmap(-1, limit).close()
    except (OSError, MemoryError, OverflowError, ValueError):
        return True
    return False


def _address_space() -> int:
    """Bytes that this process has mapped; 0 where that is not known, and the whole is then bounded."""
    try:
        with open("/proc/self/statm", encoding="ascii") as file:
            return int(file.read().split()[0]) * mmap.PAGESIZE
    except (OSError, ValueError, IndexError):
        return 0


def _answer(answers: IO[str], problem: str | None) -> None:
    json.dump({"problem": None if problem is None else " ".join(problem.split())[:1000]}, answers)
    answers.flush()
    # Nothing that was made needs to be taken apart.
    os._exit(0)
