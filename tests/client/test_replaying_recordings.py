"""A recorded run is repeated, and its weights are those that its clients had."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from distro_optim import DisTrO
from distro_optim.buffer import Writer
from distro_optim.cli import main
from distro_optim.compress import CompressedUpdate, ParamSpec, make_plan
from distro_optim.compress.wire import SerializedDistroResult, encode_distro_result
from distro_optim.coordinator.formats.text import to_toml
from distro_optim.coordinator.model import LLM, CosineLR, Distro, Hub, LearningRateSchedule
from distro_optim.coordinator.rules.checkpoints import SHARED_BY_PEERS
from distro_optim.coordinator.rules.schedule import learning_rate
from distro_optim.coordinator.server.store import read_state_file
from distro_optim.optim.rules import PUBLISHED
from reference import psyche_merge as literal

LIVE = Path(__file__).parents[1] / "vectors" / "live"
RATES = CosineLR(base_lr=1e-2, warmup_init_lr=1e-3, warmup_steps=3, total_steps=9, final_lr=1e-3)


def replayed(capsys: pytest.CaptureFixture[str], folder: Path, *options: str) -> tuple[int, list[dict[str, Any]]]:
    status = main(["replay", str(folder), "--json", *options])
    clients: list[dict[str, Any]] = json.loads(capsys.readouterr().out)["clients"]
    return status, clients


def write_result(path: Path, update: CompressedUpdate) -> None:
    writer = Writer()
    for entry in update.tensors():
        encode_distro_result(writer, SerializedDistroResult.from_tensor(entry))
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(writer.finish())


def write_state(folder: Path, *, checkpoint: Hub | None = None, lr: LearningRateSchedule = RATES) -> Distro:
    """A run with a schedule and weight decay. Returns what its optimizer is."""
    state = read_state_file(LIVE / "replay_2" / "state.toml")
    assert isinstance(state.model, LLM)
    model = replace(state.model, lr_schedule=lr)
    if checkpoint is not None:
        model = replace(model, checkpoint=checkpoint)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "state.toml").write_text(to_toml(replace(state, model=model)))
    assert isinstance(model.optimizer, Distro)
    return model.optimizer


@pytest.mark.parametrize("recording", ["replay_1", "replay_2"])
def test_recorded_clients_of_psyche_have_the_same_weights(
    recording: str, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    status, clients = replayed(capsys, LIVE / recording, "--out", str(tmp_path))
    step = {"replay_1": 8, "replay_2": 13}[recording]
    assert [(c["client"], c["step"], c["elements"], c["beyond"]) for c in clients] == [
        (1, step, 133_440, 0),
        (2, step, 133_440, 0),
    ]
    assert all(0 < c["differ"] < 1200 and c["max"] < 5e-4 for c in clients)  # their lookahead's rounding
    assert status == 0
    saved = load_file(tmp_path / f"step-{step}.safetensors")
    theirs = load_file(LIVE / recording / f"client-1-step-{step}.safetensors")
    apart = [(saved[name].float() - theirs[name].float()).abs().max() for name in theirs]
    assert max(apart) == clients[0]["max"]


def test_a_weight_that_is_a_step_off_is_found(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    shutil.copytree(LIVE / "replay_1", tmp_path / "run")
    path = tmp_path / "run" / "client-2-step-8.safetensors"
    weights = load_file(path)
    weights["model.norm.weight"][5] += 0.5
    save_file(weights, path)
    status, clients = replayed(capsys, tmp_path / "run")
    assert status == 1
    assert [c["beyond"] for c in clients] == [0, 1]
    assert clients[1]["max"] == pytest.approx(0.5, abs=0.01)


def test_tensors_that_are_not_trained_are_told_by_the_configuration(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    shutil.copytree(LIVE / "replay_1", tmp_path / "run")
    for name in ("initial", "client-1-step-8", "client-2-step-8"):
        path = tmp_path / "run" / f"{name}.safetensors"
        save_file({**load_file(path), "a.bias.of.experts": torch.ones(4)}, path)
    status, clients = replayed(capsys, tmp_path / "run")
    assert status == 0
    assert [(c["elements"], c["beyond"]) for c in clients] == [(133_444, 0)] * 2
    (tmp_path / "run" / "config.json").unlink()
    assert main(["replay", str(tmp_path / "run")]) != 0
    assert "config.json" in capsys.readouterr().err


def psyche_run(folder: Path, *, flat: bool) -> dict[str, Tensor]:
    """Three steps of two trainers by Psyche's own operations, with a schedule and decay. Returns the weights."""
    settings = write_state(folder)
    assert settings.weight_decay is not None
    generator = torch.Generator().manual_seed(0)
    names = ["layers.10.w", "layers.2.w", "norm"]
    weights = {
        name: torch.randn(shape, generator=generator).mul_(0.02).bfloat16()
        for name, shape in zip(names, [(96, 44), (64, 64), (40,)], strict=True)
    }
    save_file(weights, folder / "initial.safetensors")
    params = list(weights.values())
    specs = [ParamSpec(tuple(p.shape), p.dtype, p.device, 0, 32, 16) for p in params]
    plan = make_plan(specs, "divisor", arithmetic="psyche")
    sent: dict[int, list[CompressedUpdate]] = {}
    for step in range(1, 6):
        rate = learning_rate(RATES, step)
        literal.apply(params, sent.get(step - 2, []), rate)
        if step > 3:
            continue
        for param in params:
            param.mul_(1.0 - rate * settings.weight_decay)
        for number in range(2):
            update = CompressedUpdate.empty(plan, quantized=False)
            for batch, index, value in zip(plan.batches, update.index, update.value, strict=True):
                index.copy_(torch.rand(batch.tiles, batch.tile_size, generator=generator).topk(batch.k).indices)
                value.copy_(torch.randn(value.shape, generator=generator))
            update = CompressedUpdate(plan, update.index, update.value, (True,) * len(params))
            first = 6 * (2 * step + number)
            name = f"step-{step}-batch-{first}-{first + 5}.bin"
            if flat:
                name = f"result-0{number}abcdef-step{step}-batchB[{first}, {first + 5}].vec-postcard"
            write_result(folder / ("" if flat else "results") / name, update)
            sent.setdefault(step, []).append(update)
    return weights


@pytest.mark.parametrize("flat", [False, True])
def test_schedules_and_decay_are_those_of_the_run(
    flat: bool, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    save_file(psyche_run(tmp_path, flat=flat), tmp_path / "client-7-step-5.safetensors")
    status, [client] = replayed(capsys, tmp_path)
    assert (status, client["differ"], client["max"]) == (0, 0, 0)


def own_run(folder: Path) -> None:
    """Three steps of two peers of our own kind, which apply results two steps later."""
    write_state(folder, checkpoint=Hub(SHARED_BY_PEERS))
    first = [torch.randn(10, 7), torch.randn(33)]
    peers = [[torch.nn.Parameter(t.clone()) for t in first] for _ in range(2)]
    optimizers = [
        DisTrO(
            params,
            lr=1.0,
            compression_topk=16,
            compression_chunk=32,
            quantize_1bit=False,
            weight_decay=0.10000000149011612,  # what a float32 of 0.1 is
            **PUBLISHED,
        )
        for params in peers
    ]
    metadata = {"tiling": optimizers[0].tiling, "arithmetic": optimizers[0].arithmetic, "order": '["z", "a"]'}
    save_file(dict(zip("za", first, strict=True)), folder / "initial.safetensors", metadata=metadata)
    sent: dict[int, Sequence[CompressedUpdate]] = {}
    for step in range(1, 6):
        rate = learning_rate(RATES, step)
        for optimizer in optimizers:
            optimizer.apply(sent.get(step - 2, []), rate)
        if step <= 3:
            for params in peers:
                for param in params:
                    param.grad = torch.randn_like(param)
            sent[step] = [optimizer.generate(rate) for optimizer in optimizers]
            for number, update in enumerate(sent[step]):
                write_result(
                    folder / "results" / f"step-{step}-batch-{10 * step + number}-{10 * step + number}.bin", update
                )
    for number, params in enumerate(peers):
        values = {name: p.detach() for name, p in zip("za", params, strict=True)}
        save_file(values, folder / f"client-{number}-step-5.safetensors")


def test_runs_of_our_own_kind_are_compared_for_equality(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    own_run(tmp_path)
    status, clients = replayed(capsys, tmp_path)
    assert status == 0
    assert [(c["client"], c["differ"]) for c in clients] == [(0, 0), (1, 0)]
    path = tmp_path / "client-1-step-5.safetensors"
    values = load_file(path)
    values["a"][0] = torch.nextafter(values["a"][0], torch.tensor(9.0))
    save_file(values, path)
    status, clients = replayed(capsys, tmp_path)
    assert status == 1
    assert [(c["differ"], c["beyond"]) for c in clients] == [(0, 0), (1, 1)]


def test_a_run_of_our_own_kind_needs_what_its_recorder_noted(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    own_run(tmp_path)
    save_file(load_file(tmp_path / "initial.safetensors"), tmp_path / "initial.safetensors")
    assert main(["replay", str(tmp_path)]) == 2
    assert "does not say in which order" in capsys.readouterr().err


def test_what_is_wrong_with_a_folder_is_said(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert main(["replay", str(tmp_path)]) == 2
    assert "state.toml" in capsys.readouterr().err
    write_state(tmp_path)
    assert main(["replay", str(tmp_path)]) == 2
    assert "holds no results" in capsys.readouterr().err
    psyche_run(tmp_path, flat=False)
    broken = tmp_path / "results" / "step-2-batch-24-29.bin"
    broken.write_bytes(broken.read_bytes()[:-1])
    assert main(["replay", str(tmp_path)]) == 1
    assert "step-2-batch-24-29.bin is not a result" in capsys.readouterr().err
    write_state(tmp_path)
    shutil.copy(next((LIVE / "replay_1" / "results").iterdir()), broken)
    assert main(["replay", str(tmp_path)]) == 1
    assert "does not fit the model" in capsys.readouterr().err


def test_two_results_for_a_batch_are_not_chosen_between(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    psyche_run(tmp_path, flat=True)
    path = next(tmp_path.glob("result-00abcdef-step1-*"))
    same = path.with_name(path.name.replace("00abcdef", "ffffffff"))
    shutil.copy(path, same)
    assert main(["replay", str(tmp_path)]) == 0
    shutil.copy(next(tmp_path.glob("result-00abcdef-step2-*")), same)
    assert main(["replay", str(tmp_path)]) == 2
    assert "two results for the same batch" in capsys.readouterr().err
