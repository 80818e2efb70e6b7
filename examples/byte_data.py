"""The Python standard library's own source files, as bytes to train on: on every machine already."""

from __future__ import annotations

import sysconfig
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.utils.data import Dataset

__all__ = ["SourceBytes", "SourceWindows"]

# Every so many files is kept for validation.
HOLD_OUT_EVERY = 20
# Not the standard library, or not everywhere: installed packages, and the tests that some distributions leave out.
SKIPPED_FOLDERS = {"site-packages", "dist-packages", "test", "tests", "idle_test"}
# Below this a distribution has left the sources out; the standard library is about 13 MB.
LEAST_BYTES = 1_000_000


class SourceBytes:
    """Windows of source code. What a worker gets depends on nothing but ``seed``, the step and its number.

    Args:
        context: bytes that a window predicts.
        seed: of the order.
        folder: with the ``.py`` files; by default the running interpreter's standard library.
    """

    def __init__(self, *, context: int = 128, seed: int = 0, folder: Path | None = None) -> None:
        root = Path(sysconfig.get_path("stdlib")) if folder is None else folder
        files = sorted(p for p in root.rglob("*.py") if not SKIPPED_FOLDERS.intersection(p.relative_to(root).parts))
        held_out = files[HOLD_OUT_EVERY // 2 :: HOLD_OUT_EVERY]
        self.training = _read(sorted(set(files) - set(held_out)))
        self.validation = _read(held_out)
        if len(self.training) < LEAST_BYTES:
            raise SystemExit(f"{root} holds {len(self.training)} bytes of .py files: too few to train on")
        self.context = context
        self.seed = seed

    def batch(self, step: int, worker: int, size: int) -> tuple[Tensor, Tensor]:
        """Inputs and targets for one worker's step, each ``(size, context) int64``."""
        generator = np.random.default_rng((self.seed, step, worker))
        starts = generator.integers(0, len(self.training) - self.context, size)
        return self._windows(self.training, starts)

    def __len__(self) -> int:
        """Windows that do not overlap, which a sampler can number."""
        return (len(self.training) - 1) // self.context

    def windows(self, numbers: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Inputs and targets of these windows, each ``(len(numbers), context) int64``."""
        return self._windows(self.training, np.asarray(numbers, dtype=np.int64) * self.context)

    def held_out(self, size: int) -> tuple[Tensor, Tensor]:
        """``size`` windows spread evenly over the held-out files: the same ones at every call."""
        starts = np.linspace(0, len(self.validation) - self.context - 1, size).astype(np.int64)
        return self._windows(self.validation, starts)

    def _windows(self, text: npt.NDArray[np.uint8], starts: npt.NDArray[np.int64]) -> tuple[Tensor, Tensor]:
        rows = text[starts[:, None] + np.arange(self.context + 1)]
        windows = torch.from_numpy(rows.astype(np.int64))
        return windows[:, :-1], windows[:, 1:]


class SourceWindows(Dataset[tuple[Tensor, Tensor]]):
    """All windows of the training files, one after the other, as a dataset that knows its length.

    Args:
        context: bytes that a window predicts.
    """

    def __init__(self, *, context: int = 128) -> None:
        self._source = SourceBytes(context=context)

    def __len__(self) -> int:
        return len(self._source)

    def __getitem__(self, number: int) -> tuple[Tensor, Tensor]:
        """Inputs and targets, each ``(context,) int64``."""
        inputs, targets = self._source.windows([number])
        return inputs[0], targets[0]

    def held_out(self, size: int) -> tuple[Tensor, Tensor]:
        """Windows of files not trained on; see :meth:`SourceBytes.held_out`."""
        return self._source.held_out(size)


def _read(files: list[Path]) -> npt.NDArray[np.uint8]:
    return np.frombuffer(b"".join(file.read_bytes() for file in files), dtype=np.uint8)
