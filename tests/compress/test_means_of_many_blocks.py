"""On an accelerator, values of many blocks become means together: the same bits, and fewer launches."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from distro_optim.compress import ParamSpec, UpdateRule, make_plan
from distro_optim.compress.engine.blocks import BlockEngine
from distro_optim.compress.exact import merge
from distro_optim.compress.profile import ACCELERATOR, CPU, Profile
from distro_optim.testing.launches import Launches
from distro_optim.testing.updates import random_update

SHAPES = ((48, 64), (7, 5), (40, 40), (100,), (64, 64))
SMALL = replace(ACCELERATOR, block_elements=7 * 64)
"""Blocks of at most seven tiles."""


def merged(
    profile: Profile, contributors: int, update: UpdateRule, device: str = "cpu", counts: list[int] | None = None
) -> list[Tensor]:
    specs = [ParamSpec(shape, torch.float32, torch.device(device), 0, 8, 32, update) for shape in SHAPES]
    plan = make_plan(specs, "padded", arithmetic="exact", profile=lambda _: profile)
    updates = [
        # Everybody is silent about something else, and the last one sends signs.
        random_update(plan, quantized=n == 5, present=[n % 5 != tensor for tensor in range(5)], seed=n)
        for n in range(contributors)
    ]
    engine = BlockEngine(plan, "dct")
    weights = [torch.linspace(-1, 1, max(1, torch.Size(s).numel()), device=device).view(s) for s in SHAPES]
    with Launches() as launches:
        engine.merge(engine.upload(updates), weights, lr=[0.25])
    if counts is not None:
        counts.append(launches.count)
    return weights + engine.decode(engine.upload(updates))


@pytest.mark.parametrize("update", ["sign", "rms"])
@pytest.mark.parametrize("contributors", [1, 4, 33])
@pytest.mark.parametrize("blocks", [3, 100])
def test_however_many_blocks_are_done_together(
    blocks: int, contributors: int, update: UpdateRule, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = merged(CPU, contributors, update)
    monkeypatch.setattr(merge, "_VALUES_OF_AN_ELEMENT", blocks * contributors / 2)  # k is half of a tile
    assert all(map(torch.equal, merged(SMALL, contributors, update), expected))


@pytest.mark.slow
def test_it_saves_launches(monkeypatch: pytest.MonkeyPatch) -> None:
    counts: list[int] = []
    monkeypatch.setattr(merge, "_VALUES_OF_AN_ELEMENT", 100)
    merged(SMALL, 4, "sign", "meta", counts)
    monkeypatch.setattr(merge, "_VALUES_OF_AN_ELEMENT", 0)
    merged(SMALL, 4, "sign", "meta", counts)
    together, one_by_one = counts
    assert 0 < together < one_by_one / 1.5
