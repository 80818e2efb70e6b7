"""A recorded run is verified: who trained what it was given, who copied, and who sent its momentum alone."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from distro_optim.buffer import Writer
from distro_optim.cli import main
from distro_optim.client.replay import sender_of
from distro_optim.compress import CompressedUpdate
from distro_optim.compress.wire import SerializedDistroResult, encode_distro_result
from distro_optim.coordinator.formats.text import to_toml
from distro_optim.coordinator.model import LLM, Distro, DummyData, LLMTrainingDataLocation
from distro_optim.coordinator.server.store import read_state_file
from distro_optim.coordinator.types import BatchId
from distro_optim.data.data_file import read_data_file
from distro_optim.models.accumulation import train_batch
from distro_optim.models.batches import collate
from distro_optim.models.causal_lm import CausalLM

LIVE = Path(__file__).parents[1] / "vectors" / "live" / "replay_1"
STEPS, SEQUENCES, TOKENS, RATE = 4, 4, 32, 1e-3
HONEST, OTHER, COPY, IDLE = "aaaaaaaa", "bbbbbbbb", "cccccccc", "dddddddd"
PEERS = (HONEST, OTHER, COPY, IDLE)


def write_data(folder: Path) -> Path:
    """Sequences that are easy to learn: each of tokens that go up by a step of its own."""
    draw = np.random.default_rng(0)
    starts, steps = draw.integers(0, 64, (300, 1)), draw.integers(1, 9, (300, 1))
    tokens = ((starts + steps * np.arange(TOKENS)) % 64).astype("<u2")
    (folder / "tokens").mkdir()
    (folder / "tokens" / "all.bin").write_bytes(tokens.tobytes() + bytes(512))
    seed = ", ".join(["1"] * 32)
    (folder / "data.toml").write_text(
        f'dir = "tokens"\nseq_len = {TOKENS}\ntoken_size = "TwoBytes"\nshuffle_seed = [{seed}]\n'
    )
    return folder / "data.toml"


def write_result(path: Path, update: CompressedUpdate) -> None:
    writer = Writer()
    for entry in update.tensors():
        encode_distro_result(writer, SerializedDistroResult.from_tensor(entry))
    path.write_bytes(writer.finish())


def write_state(folder: Path, location: LLMTrainingDataLocation | None = None) -> LLM:
    state = read_state_file(LIVE / "state.toml")
    assert isinstance(state.model, LLM)
    definition = state.model.optimizer
    assert isinstance(definition, Distro)
    model = replace(state.model, max_seq_len=TOKENS, optimizer=replace(definition, compression_chunk=16))
    if location is not None:
        model = replace(model, data_location=location)
    (folder / "state.toml").write_text(to_toml(replace(state, model=model)))
    return model


def write_config(folder: Path) -> None:
    """A smaller model than the recorded one."""
    config = json.loads((LIVE / "config.json").read_text())
    config.update(vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2)
    (folder / "config.json").write_text(json.dumps(config))


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of Psyche's kind with four trainers, of which two are honest."""
    folder = tmp_path_factory.mktemp("run")
    data = read_data_file(write_data(folder))
    definition = write_state(folder).optimizer
    write_config(folder)
    models = [CausalLM(folder, "HfLlama", max_seq_len=TOKENS, seed=1) for _ in PEERS]
    save_file({name: p.detach().clone() for name, p in models[0].tensors().items()}, folder / "initial.safetensors")
    optimizers = [model.make_optimizer(RATE, definition, arithmetic="psyche") for model in models]
    sent: dict[int, list[CompressedUpdate]] = {}
    for step in range(1, STEPS + 1):
        updates: list[CompressedUpdate] = []
        for number, (name, model, optimizer) in enumerate(zip(PEERS, models, optimizers, strict=True)):
            optimizer.apply(sent.get(step - 2, []), RATE)
            optimizer.lookahead(RATE)
            start = SEQUENCES * (len(PEERS) * step + number)
            batch = BatchId(start, start + SEQUENCES - 1)
            train_batch(model, collate(data.get_samples(batch)))
            if name == IDLE and step > 1:
                for param in model.parameters():
                    param.grad = torch.zeros_like(param)
            update = optimizer.generate(RATE)
            update = updates[1] if name == COPY else update
            updates.append(update)
            path = folder / f"result-{name}-step{step}-batchB[{batch.start}, {batch.end}].vec-postcard"
            write_result(path, update)
        sent[step] = updates
    data.close()
    return folder


def verified(capsys: pytest.CaptureFixture[str], folder: Path, *options: str) -> tuple[int, dict[str, Any]]:
    status = main(["verify", str(folder), "--json", "--data", str(folder / "data.toml"), *options])
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    return status, found


@pytest.mark.slow
def test_honest_peers_pass_and_the_others_are_named(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    status, found = verified(capsys, run)
    assert status == 1
    assert len(found["rounds"]) == STEPS * len(PEERS)
    peers = {peer["peer"]: peer for peer in found["peers"]}
    assert [peers[f"peer {name}"]["honest"] for name in PEERS] == [True, True, False, False]
    assert all(peers[f"peer {name}"]["excess"] > 0.1 for name in (HONEST, OTHER))
    assert "model.layers.*.mlp.up_proj.weight" in peers[f"peer {HONEST}"]["groups"]
    # Whose result was copied:
    rather = {one["peer"]: one["rather"] for one in found["rounds"] if one["step"] == STEPS}
    first = SEQUENCES * (len(PEERS) * STEPS + 1)
    assert rather[COPY] == [first, first + SEQUENCES - 1]
    assert rather[HONEST] is None


@pytest.mark.slow
def test_the_table_names_peers_numbers_and_limits(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["verify", str(run), "--data", str(run / "data.toml")]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert any(line.startswith(f"peer {HONEST}: ") and line.endswith("nothing speaks against it") for line in lines)
    assert any(line.startswith(f"peer {COPY}: ") and "FAILS: " in line for line in lines)
    assert any(line.startswith("limits of audits") for line in lines)


@pytest.mark.slow
def test_limits_are_learnt_from_a_run_and_used_for_another(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    honest = tmp_path / "honest"
    shutil.copytree(run, honest)
    for path in honest.glob("result-*"):
        if sender_of(path) in (COPY, IDLE):
            path.unlink()
    learn = ["verify", str(honest), "--data", str(run / "data.toml"), "--learn", str(tmp_path / "limits")]
    assert main(learn) == 2
    assert "16 audits or more, not from 8" in capsys.readouterr().err
    status, found = verified(capsys, run, "--learn", str(tmp_path / "limits"))
    assert (status, found["limits"]["samples"]) == (1, 16)
    assert main(["verify", str(honest), "--data", str(run / "data.toml"), "--limits", str(tmp_path / "limits")]) == 0
    assert "learnt from 16 honest audits" in capsys.readouterr().out


@pytest.mark.slow
def test_results_without_a_sender_stand_for_themselves(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(run, tmp_path / "run")
    (tmp_path / "run" / "results").mkdir()
    for path in (tmp_path / "run").glob("result-*"):
        step, batch = path.name.split("-")[2].removeprefix("step"), path.name.split("[")[1].split("]")[0].split(", ")
        path.rename(tmp_path / "run" / "results" / f"step-{step}-batch-{batch[0]}-{batch[1]}.bin")
    _, found = verified(capsys, tmp_path / "run")
    assert {peer["peer"] for peer in found["peers"]} == {
        f"step {one['step']}, B[{one['batch'][0]}, {one['batch'][1]}]" for one in found["rounds"]
    }
    assert [one["peer"] for one in found["rounds"]] == [None] * STEPS * len(PEERS)


# -- what is missing ---------------------------------------------------------------------------------------------------


def refusal(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    assert main(["verify", *arguments]) in (1, 2)
    return capsys.readouterr().err


def test_data_that_only_members_get_have_to_be_named(capsys: pytest.CaptureFixture[str]) -> None:
    assert "--data PATH" in refusal(capsys, str(LIVE))


@pytest.mark.slow
def test_data_that_are_all_alike_tell_nothing(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.copytree(run, tmp_path / "run")
    write_state(tmp_path / "run", DummyData())
    assert "all alike" in refusal(capsys, str(tmp_path / "run"))


def test_a_folder_without_its_configuration_is_told(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(run, tmp_path / "run")
    (tmp_path / "run" / "config.json").unlink()
    assert "config.json" in refusal(capsys, str(tmp_path / "run"), "--data", str(run / "data.toml"))
    assert "state.toml" in refusal(capsys, str(tmp_path / "nowhere"))


@pytest.mark.parametrize("run", ["some.host:20000", "solana:run"])
def test_who_names_a_run_is_told_how_its_members_audit_and_record_it(
    run: str, capsys: pytest.CaptureFixture[str]
) -> None:
    said = refusal(capsys, run)
    named = run if len(run) < 80 else "TICKET"
    assert "to its members only" in said
    assert f"distro-optim join {named} --audit 1" in said
    assert f"distro-optim join {named} --write-gradients-dir recorded, then distro-optim verify recorded" in said


@pytest.mark.waiting
@pytest.mark.parametrize(
    ("run", "words"),
    [
        ("psyche1" + "abcdefgh" * 30, "is neither a ticket nor host:port/run-id"),
        ("127.0.0.1:1/my-run", "cannot be reached"),
    ],
)
def test_a_run_that_is_not_there_is_not_watched(
    run: str, words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert words in refusal(capsys, run, "--relay", "none", "--bind-addr", "127.0.0.1:0")


def test_a_folder_whose_name_looks_like_a_run_is_a_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "psyche1folder").mkdir()
    monkeypatch.chdir(tmp_path)
    assert "state.toml" in refusal(capsys, "psyche1folder")


def test_other_limits_and_sizes_are_refused(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "limits").write_text("{}")
    assert "of version 1" in refusal(capsys, str(run), "--limits", str(tmp_path / "limits"))
    assert "No such file" in refusal(capsys, str(run), "--limits", str(tmp_path / "nothing"))
    assert "give 1 or more" in refusal(capsys, str(run), "--micro-batch-size", "0")
