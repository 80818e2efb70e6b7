"""torch.distributed.checkpoint saves and restores the optimizer like any other, and it continues bit for bit."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import pytest
import torch.distributed.checkpoint as dcp
import torch.multiprocessing as mp
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    get_state_dict,
    set_optimizer_state_dict,
    set_state_dict,
)

from distro_optim import DisTrO
from optimizer import ranks
from optimizer.models import STEPS, EveryShape, all_same_bits, copies
from optimizer.process_group_ranks import forks_of_one_that_has_loaded_torch

# The single-process mode announces itself, and torch's own planner uses what torch deprecates.
pytestmark = [
    pytest.mark.waiting,
    pytest.mark.filterwarnings("ignore:torch.distributed is (disabled, )?unavailable or uninitialized"),
    pytest.mark.filterwarnings("ignore::FutureWarning:torch.distributed"),
    pytest.mark.filterwarnings("ignore:TypedStorage is deprecated"),  # by the checkpoints of PyTorch 2.5
]


def trained(style: str, steps: int = 4, overlap: bool = True) -> tuple[EveryShape, DisTrO]:
    model = EveryShape()
    optimizer = DisTrO(model.parameters(), lr=0.01, overlap=overlap)
    for step in range(steps):
        STEPS[style](model, optimizer, step)
    return model, optimizer


def assert_they_go_on_alike(a: tuple[EveryShape, DisTrO], b: tuple[EveryShape, DisTrO], style: str) -> None:
    for step in range(4, 8):
        STEPS[style](*a, step)
        STEPS[style](*b, step)
        assert all_same_bits(copies(a[0].parameters()), copies(b[0].parameters()))


@pytest.mark.parametrize("style", STEPS)
@pytest.mark.parametrize("overlap", [False, True], ids=["blocking", "overlap"])
@pytest.mark.parametrize("flat", [False, True], ids=["nested", "flattened"])
def test_the_state_goes_through_by_parameter_name(style: str, overlap: bool, flat: bool) -> None:
    options = StateDictOptions(flatten_optimizer_state_dict=flat)
    run, other = trained(style, overlap=overlap), trained(style, 0, overlap)
    state = get_optimizer_state_dict(*run, options=options)
    at = state if flat else cast("dict[str, Any]", state["state"])["conv.weight"]
    assert ("state.conv.weight.delta" if flat else "delta") in at
    other[0].load_state_dict(run[0].state_dict())
    set_optimizer_state_dict(*other, optim_state_dict=state, options=options)
    assert_they_go_on_alike(run, other, style)


def test_a_frozen_parameter_which_is_left_out_does_not_cost_the_others_what_is_in_flight() -> None:
    run, other = trained("plain", 0), trained("plain", 0)
    for model, _ in (run, other):
        model.conv.requires_grad_(False)
    for step in range(4):
        STEPS["plain"](*run, step)
    state = get_optimizer_state_dict(*run)
    other[0].load_state_dict(run[0].state_dict())
    set_optimizer_state_dict(*other, optim_state_dict=state)
    assert_they_go_on_alike(run, other, "plain")


@pytest.mark.parametrize("style", STEPS)
@pytest.mark.parametrize("into", ["fresh", "trained"])
def test_a_checkpoint_on_disk_is_loaded_in_place(style: str, into: str, tmp_path: Path) -> None:
    run = trained(style)
    model_state, optimizer_state = get_state_dict(*run)
    dcp.save({"model": model_state, "optimizer": optimizer_state}, checkpoint_id=tmp_path)
    other = trained("plain", 0 if into == "fresh" else 3)
    model_state, optimizer_state = get_state_dict(*other)
    state: dict[str, Any] = {"model": model_state, "optimizer": optimizer_state}
    dcp.load(state, checkpoint_id=tmp_path)
    set_state_dict(*other, model_state_dict=state["model"], optim_state_dict=state["optimizer"])
    assert_they_go_on_alike(run, other, style)


@pytest.mark.slow
def test_two_ranks_save_and_resume_each_its_own_momentum(tmp_path: Path) -> None:
    forks_of_one_that_has_loaded_torch()
    mp.start_processes(ranks.save_and_resume, args=(2, str(tmp_path)), nprocs=2, start_method="forkserver")
