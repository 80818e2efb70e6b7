"""Finished runs, each in a file of its own, so that a benchmark that was stopped goes on where it was."""

from __future__ import annotations

import hashlib
import json
import re
import subprocess
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from learners.settings import Run

__all__ = ["Result", "Results"]

_HERE = Path(__file__).parent
_CODE = ("src", "benchmarks", "examples")

_UNSAID = {"chunk": 64, "momentum": 0.95, "ahead": None, "variation": None}
"""What methods did not say when the first results were kept: left out where it is this, so that those are found."""


@dataclass(frozen=True)
class Result:
    """What came of a run.

    Attributes:
        steps, losses: the loss on held-out samples along the way, in nats per byte or per image. The last is the end.
        sent_per_step: bytes of a worker.
        right: share of held-out images that are recognized at the end; None where there are no images.
        cpu_seconds: that it took.
    """

    run: Run
    steps: list[int]
    losses: list[float]
    sent_per_step: float
    right: float | None
    cpu_seconds: float

    @property
    def final_loss(self) -> float:
        return self.losses[-1]


class Results:
    """A folder of them.

    Files say which settings a run had and of which revision the code was; a run with the same settings is not done
    again, whatever the revision. Delete files to have their runs done again.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def find(self, run: Run) -> Result | None:
        """What came of it, if it is finished."""
        path = self._path(run)
        if not path.exists():
            return None
        kept = json.loads(path.read_text(encoding="utf-8"))
        return Result(run, **kept["result"])

    def keep(self, result: Result) -> None:
        """Writes it, at once or not at all."""
        told = asdict(result)
        kept = {
            "settings": told.pop("run"),
            "result": told,
            "revision": _revision(),
            "torch": torch.__version__,
            "date": time.strftime("%Y-%m-%d", time.gmtime()),
        }
        path = self._path(result.run)
        path.parent.mkdir(parents=True, exist_ok=True)
        unfinished = path.with_suffix(".part")
        unfinished.write_text(json.dumps(kept, indent=1) + "\n", encoding="utf-8")
        unfinished.replace(path)

    def _path(self, run: Run) -> Path:
        settings = _told(run)
        digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:8]
        names = (run.setting.name, f"{run.method.name} {run.method.lr:g} {run.kind} seed {run.seed} {digest}")
        folder, name = (re.sub(r"[^\w.=]+", "-", name) for name in names)
        return self._folder / folder / f"{name}.json"


def _told(run: Run) -> dict[str, Any]:
    """What decides how a run ends: not what else is compared in its setting."""
    told = asdict(run)
    for name in ("methods", "seeds", "tried"):
        del told["setting"][name]
    for name, value in _UNSAID.items():
        if told["method"][name] == value:
            del told["method"][name]
    return told


def _revision() -> str:
    """Of the code, with a plus sign where something of it is not committed."""

    def git(*arguments: str) -> str:
        done = subprocess.run(["git", *arguments], cwd=_HERE, capture_output=True, text=True, check=False)
        return done.stdout.strip()

    top = git("rev-parse", "--show-toplevel")
    changed = git("-C", top, "status", "--porcelain", "--", *_CODE) if top else ""
    return (git("rev-parse", "--short=12", "HEAD") or "unknown") + ("+" if changed else "")
