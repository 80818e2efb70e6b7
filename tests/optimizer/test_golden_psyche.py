"""Recorded rounds of Psyche's optimizer are reproduced: lookahead, momenta, picks, and weights two rounds later.

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

FILES = sorted((Path(__file__).parents[1] / "vectors" / "distro").glob("*.safetensors"))


def make(run: GoldenRun) -> tuple[dict[str, torch.nn.Parameter], DisTrO]:
    meta = run.meta
    assert meta["order"].split(",") == run.names
    params = {name: torch.nn.Parameter(run[f"init/{name}"].clone()) for name in run.names}
    optimizer = DisTrO(
        params.values(),
        compression_decay=float(meta["compression_decay"]),
        compression_topk=int(meta["compression_topk"]),
        compression_chunk=int(meta["compression_chunk"]),
        weight_decay=float(meta["weight_decay"]),
        quantize_1bit=meta["quantize_1bit"] == "True",
        overlap=True,
        tiling="divisor",
        arithmetic="float",
    )
    return params, optimizer


@pytest.mark.slow
@pytest.mark.parametrize("path", FILES, ids=lambda p: p.stem)
def test_every_round_is_reproduced(path: Path) -> None:
    run = GoldenRun(path)
    peers = [make(run) for _ in range(int(run.meta["peers"]))]
    rounds: list[list[CompressedUpdate]] = []
    for height in range(int(run.meta["rounds"])):
        previous_lr, lr = run[f"round{height}/lr"].tolist()
        if height >= 2:
            for params, optimizer in peers:
                decoded = optimizer.decode(rounds[height - 2])
                optimizer.apply(rounds[height - 2], lr=lr)
                for name, update in zip(params, decoded, strict=True):
                    expected = run[f"round{height}/update_before_sign/{name}"]
                    certain = expected.abs() > 1e-6
                    assert certain.any()
                    assert torch.equal(update.sign()[certain], expected.sign()[certain])
                    applied = run[f"round{height}/applied/{name}"]
                    assert_close(params[name][certain], applied[certain], f"round {height} applied {name}")
                    # A sign of noise is not defined: go on from the recorded weights.
                    with torch.no_grad():
                        params[name].copy_(applied)
        rounds.append([])
        for number, (params, optimizer) in enumerate(peers):
            optimizer.lookahead(previous_lr)
            at = f"peer{number}/round{height}"
            for name, param in params.items():
                if number == 0:
                    assert_close(param, run[f"{at}/lookahead/{name}"], f"{at} lookahead {name}")
                param.grad = run[f"{at}/grad/{name}"].clone()
            rounds[-1].append(optimizer.generate(lr))
            for (name, param), entry in zip(params.items(), rounds[-1][-1].tensors(), strict=True):
                state = optimizer.state[param]
                unquantized = state["own_value"].view(entry.index.shape)
                assert_same_picks(entry.index, unquantized, run[f"{at}/idx/{name}"], run[f"{at}/val/{name}"])
                if rounds[-1][-1].quantized:
                    assert torch.equal(entry.value, unquantized.signbit())
                if number == 0:
                    assert_close(state["delta"], run[f"{at}/delta/{name}"], f"{at} delta {name}")
                    assert_close(param, run[f"{at}/param/{name}"], f"{at} param {name}")


@pytest.mark.slow
@pytest.mark.parametrize("path", FILES, ids=lambda p: p.stem)
def test_every_round_is_reproduced_by_the_plain_twin(path: Path) -> None:
    run = GoldenRun(path)
    meta = run.meta
    peers = [
        {
            name: ReferenceTensor(
                run[f"init/{name}"].clone(),
                torch.zeros_like(run[f"init/{name}"]),
                decay=float(meta["compression_decay"]),
                topk=int(meta["compression_topk"]),
                chunk=int(meta["compression_chunk"]),
                tiling="divisor",
                quantize=meta["quantize_1bit"] == "True",
                overlap=True,
                weight_decay=float(meta["weight_decay"]),
            )
            for name in run.names
        }
        for _ in range(int(meta["peers"]))
    ]
    rounds: list[dict[str, list[Sent]]] = []
    for height in range(int(meta["rounds"])):
        previous_lr, lr = run[f"round{height}/lr"].tolist()
        rounds.append({name: [] for name in run.names})
        for number, twins in enumerate(peers):
            at = f"peer{number}/round{height}"
            for name, twin in twins.items():
                if height >= 2:
                    sent = rounds[height - 2][name]
                    expected = run[f"round{height}/update_before_sign/{name}"]
                    certain = expected.abs() > 1e-6
                    assert certain.any()
                    assert torch.equal(twin.decoded(sent).sign()[certain], expected.sign()[certain])
                    twin.apply(sent, lr)
                    applied = run[f"round{height}/applied/{name}"]
                    assert_close(twin.param[certain], applied[certain], f"round {height} applied {name}")
                    twin.param.copy_(applied)  # a sign of noise is not defined: go on from the recorded weights
                if number == 0:
                    ahead = twin.looking_ahead(previous_lr)
                    assert_close(ahead, run[f"{at}/lookahead/{name}"], f"{at} lookahead {name}")
                message = twin.generate(run[f"{at}/grad/{name}"], lr)
                assert message is not None
                assert twin.own is not None
                rounds[-1][name].append(message)
                picks = run[f"{at}/idx/{name}"]
                index, value = (part.view(picks.shape) for part in twin.own)
                assert_same_picks(index, value, picks, run[f"{at}/val/{name}"])
                if twin.quantize:
                    assert torch.equal(message[1], twin.own[1].signbit())
                if number == 0:
                    assert_close(twin.delta, run[f"{at}/delta/{name}"], f"{at} delta {name}")
                    assert_close(twin.param, run[f"{at}/param/{name}"], f"{at} param {name}")


def test_the_vectors_are_there() -> None:
    assert len(FILES) == 2
