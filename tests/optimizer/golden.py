"""Reading recorded runs, and comparing with them."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor


class GoldenRun:
    """A safetensors file of a recorded run."""

    def __init__(self, path: Path) -> None:
        with safe_open(path, framework="pt") as file:
            self.meta: dict[str, str] = file.metadata()
            self._tensors: dict[str, Tensor] = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (no mapping)
        self.names = sorted(key.removeprefix("init/") for key in self._tensors if key.startswith("init/"))

    def __getitem__(self, key: str) -> Tensor:
        return self._tensors[key]

    def __contains__(self, key: str) -> bool:
        return key in self._tensors


def assert_close(ours: Tensor, recorded: Tensor, what: str, *, relative: float = 1e-5, floor: float = 1e-12) -> None:
    """Equal within ``relative`` of the largest recorded magnitude (or of ``floor``), element by element."""
    scale = recorded.abs().max().clamp(min=floor)
    worst = (ours.float() - recorded.float()).abs().max() / scale
    assert worst <= relative, f"{what}: off by {worst:.2e} of the largest element"


def assert_same_picks(index: Tensor, value: Tensor, recorded_index: Tensor, recorded_value: Tensor) -> None:
    """The same set of coefficients in each tile (ties aside), and the same value for each of them."""
    ours, order = index.long().sort(dim=-1)
    values = value.gather(-1, order)
    assert ours.shape == recorded_index.shape
    same = (ours == recorded_index).all(dim=-1)
    torch.testing.assert_close(values[same], recorded_value[same], rtol=1e-5, atol=1e-9)
    # Where the picks differ, the odd ones must be as large as each other: a tie.
    for row in (~same).reshape(-1).nonzero().flatten().tolist():
        a = ours.reshape(-1, ours.shape[-1])[row].tolist()
        b = recorded_index.reshape(-1, ours.shape[-1])[row].tolist()
        va = dict(zip(a, values.reshape(-1, ours.shape[-1])[row].abs().tolist(), strict=True))
        vb = dict(zip(b, recorded_value.reshape(-1, ours.shape[-1])[row].abs().tolist(), strict=True))
        only_a, only_b = sorted(va[i] for i in set(a) - set(b)), sorted(vb[i] for i in set(b) - set(a))
        torch.testing.assert_close(torch.tensor(only_a), torch.tensor(only_b), rtol=1e-4, atol=1e-9)
