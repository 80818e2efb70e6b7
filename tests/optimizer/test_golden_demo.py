"""Recorded runs of the published DeMo optimizer are reproduced step by step: picks, values, momenta, weights.

By the optimizer, and by its plain twin.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from distro_optim import DisTrO
from distro_optim.compress import CompressedUpdate
from distro_optim.optim.reference import ReferenceTensor, Sent
from optimizer.golden import GoldenRun, assert_close, assert_same_picks

FILES = sorted((Path(__file__).parents[1] / "vectors" / "demo").glob("*.safetensors"))


def make(run: GoldenRun) -> tuple[dict[str, torch.nn.Parameter], DisTrO]:
    meta = run.meta
    params = {name: torch.nn.Parameter(run[f"init/{name}"].clone()) for name in run.names}
    optimizer = DisTrO(
        params.values(),
        lr=float(meta["lr"]),
        compression_decay=float(meta["decay"]),
        compression_topk=int(meta["topk"]),
        compression_chunk=int(meta["chunk"]),
        weight_decay=float(meta["wd"]),
        quantize_1bit=False,
        overlap=False,
        tiling="divisor",
        arithmetic="float",
    )
    return params, optimizer


@pytest.mark.slow
@pytest.mark.parametrize("path", FILES, ids=lambda p: p.stem)
def test_every_step_of_every_rank_is_reproduced(path: Path) -> None:
    run = GoldenRun(path)
    world = int(run.meta["world"])
    ranks = [make(run) for _ in range(world)]
    for step in range(int(run.meta["steps"])):
        updates: list[CompressedUpdate] = []
        for rank, (params, optimizer) in enumerate(ranks):
            at = f"rank{rank}/step{step}"
            for name, param in params.items():
                param.grad = run[f"{at}/grad/{name}"].clone()
            updates.append(optimizer.generate())
            for name, param, entry in zip(params, params.values(), updates[-1].tensors(), strict=True):
                assert_same_picks(entry.index, entry.value, run[f"{at}/idx/{name}"], run[f"{at}/val/{name}"])
                # What is left of a tile that was sent whole is rounding noise of what went in.
                entered = float(run.meta["lr"]) * float(run[f"{at}/grad/{name}"].abs().max())
                delta = optimizer.delta(param)
                assert_close(delta, run[f"{at}/delta/{name}"], f"{at} delta {name}", floor=entered)
        for params, optimizer in ranks:
            decoded = optimizer.decode(updates)
            optimizer.apply(updates)
            for name, update in zip(params, decoded, strict=True):
                expected = run[f"step{step}/update_before_sign/{name}"]
                certain = expected.abs() > 1e-6
                assert certain.any()
                assert torch.equal(update.sign()[certain], expected.sign()[certain])
                moved = run[f"step{step}/param/{name}"]
                assert_close(params[name][certain], moved[certain], f"step {step} param {name}")
                # A sign of noise is not defined: go on from the recorded weights.
                with torch.no_grad():
                    params[name].copy_(moved)


@pytest.mark.slow
@pytest.mark.parametrize("path", FILES, ids=lambda p: p.stem)
def test_every_step_of_every_rank_is_reproduced_by_the_plain_twin(path: Path) -> None:
    run = GoldenRun(path)
    meta = run.meta
    lr = float(meta["lr"])
    ranks = [
        {
            name: ReferenceTensor(
                run[f"init/{name}"].clone(),
                torch.zeros_like(run[f"init/{name}"]),
                decay=float(meta["decay"]),
                topk=int(meta["topk"]),
                chunk=int(meta["chunk"]),
                tiling="divisor",
                quantize=False,
                overlap=False,
                weight_decay=float(meta["wd"]),
            )
            for name in run.names
        }
        for _ in range(int(meta["world"]))
    ]
    for step in range(int(meta["steps"])):
        sent: dict[str, list[Sent]] = {name: [] for name in run.names}
        for rank, twins in enumerate(ranks):
            at = f"rank{rank}/step{step}"
            for name, twin in twins.items():
                grad = run[f"{at}/grad/{name}"]
                message = twin.generate(grad, lr)
                assert message is not None
                sent[name].append(message)
                picks = run[f"{at}/idx/{name}"]
                index, value = (part.view(picks.shape) for part in message)
                assert_same_picks(index, value, picks, run[f"{at}/val/{name}"])
                entered = lr * float(grad.abs().max())
                assert_close(twin.delta, run[f"{at}/delta/{name}"], f"{at} delta {name}", floor=entered)
        for twins in ranks:
            for name, twin in twins.items():
                expected = run[f"step{step}/update_before_sign/{name}"]
                certain = expected.abs() > 1e-6
                assert certain.any()
                assert torch.equal(twin.decoded(sent[name]).sign()[certain], expected.sign()[certain])
                twin.apply(sent[name], lr)
                moved = run[f"step{step}/param/{name}"]
                assert_close(twin.param[certain], moved[certain], f"step {step} param {name}")
                twin.param.copy_(moved)  # a sign of noise is not defined: go on from the recorded weights


def test_the_vectors_are_there() -> None:
    assert len(FILES) == 3
