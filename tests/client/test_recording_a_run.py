"""What ``join --write-gradients-dir`` leaves: each result that was seen, and all that a replay needs."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

from distro_optim import DisTrO
from distro_optim.client.recording import MIN_FREE_BYTES, Recorder
from distro_optim.client.replay import Recording, replay
from distro_optim.comm.signing import SecretKey
from distro_optim.compress import CompressedUpdate
from distro_optim.compress.wire import TransmittableDistroResult, encode_download
from distro_optim.coordinator.server.store import read_state_file
from distro_optim.errors import ConfigurationError
from distro_optim.optim.rules import PUBLISHED

LIVE = Path(__file__).parents[1] / "vectors" / "live"
STATE = read_state_file(LIVE / "replay_1" / "state.toml")
KEY = SecretKey(bytes(31) + b"\1")  # its public key begins with 4cb5abf6
OTHER = "downloaded-distro-result-0badcafe_{step}"
OWN = "distro-result_{step}"


def make_optimizer() -> tuple[dict[str, torch.nn.Parameter], DisTrO]:
    generator = torch.Generator().manual_seed(0)
    shapes = {"a": (64, 44), "b": (16,)}
    params = {n: torch.nn.Parameter(torch.randn(s, generator=generator).bfloat16()) for n, s in shapes.items()}
    optimizer = DisTrO(
        list(params.items()),
        lr=1e-3,
        compression_topk=8,
        compression_chunk=64,
        compression_decay=0.5,
        tiling="divisor",
        arithmetic="psyche",
        **PUBLISHED,
    )
    return params, optimizer


def blob(update: CompressedUpdate, step: int, batch: tuple[int, int]) -> bytes:
    return encode_download(TransmittableDistroResult.from_update(update, step=step, trainer_nonce=step, batch_id=batch))


def make_updates(optimizer: DisTrO, params: dict[str, torch.nn.Parameter]) -> Iterator[CompressedUpdate]:
    while True:
        for param in params.values():
            param.grad = torch.randn_like(param)
        yield optimizer.generate(1e-3)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_results_are_called_as_psyches_client_calls_them(tmp_path: Path) -> None:
    params, optimizer = make_optimizer()
    update = next(make_updates(optimizer, params))
    told: list[str] = []
    with Recorder(tmp_path, KEY, keep=None, tell=told.append) as recorder:
        recorder.see(OWN.format(step=3), blob(update, 3, (12, 17)))
        recorder.see(OTHER.format(step=3), blob(update, 3, (18, 18)))
        recorder.see(OTHER.format(step=4), blob(update, 3, (19, 20)))  # of another step than announced
        recorder.see(OTHER.format(step=3), b"no result")
    assert names(tmp_path) == [
        "result-0badcafe-step3-batchB18.vec-postcard",
        "result-4cb5abf6-step3-batchB[12, 17].vec-postcard",
    ]
    assert told == []


def test_only_the_latest_steps_are_kept(tmp_path: Path) -> None:
    params, optimizer = make_optimizer()
    update = next(make_updates(optimizer, params))
    with Recorder(tmp_path, KEY, keep=2, tell=print) as recorder:
        for step in range(1, 6):
            recorder.see(OWN.format(step=step), blob(update, step, (step, step)))
    assert names(tmp_path) == [f"result-4cb5abf6-step{step}-batchB{step}.vec-postcard" for step in (4, 5)]


@pytest.mark.parametrize("ahead", [False, True])
def test_a_recording_is_replayed_from_the_step_in_which_it_began(tmp_path: Path, ahead: bool) -> None:
    params, optimizer = make_optimizer()
    updates = make_updates(optimizer, params)
    sent = {step: next(updates) for step in range(1, 5)}
    with Recorder(tmp_path, KEY, keep=None, tell=print) as recorder:
        for step in range(1, 7):
            if step > 2:
                optimizer.apply([sent[step - 2]], 1e-3)
            if step == 4:
                if ahead:
                    optimizer.lookahead(1e-3)
                recorder.begin(STATE, "{}", params, optimizer, step)
                optimizer.undo_lookahead()
            recorder.begin(STATE, "{}", params, optimizer, step) if step > 4 else None  # changes nothing
            if step <= 4:
                recorder.see(OWN.format(step=step), blob(sent[step], step, (step, step)))
    *_, last = replay(Recording.open(tmp_path))
    assert last.step == 6
    assert all(torch.equal(last.weights[name], param) for name, param in params.items())
    assert not torch.equal(load_file(tmp_path / "initial.safetensors")["a"], params["a"])


def test_a_folder_that_cannot_be_written_to_is_refused_at_once(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ConfigurationError, match="--write-gradients-dir"):
        Recorder(tmp_path / "file", KEY, keep=None, tell=print)


def test_a_recording_never_fills_the_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[str] = []
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: SimpleNamespace(free=MIN_FREE_BYTES - 1))
    with Recorder(tmp_path, KEY, keep=None, tell=told.append) as recorder:
        for _ in range(2):
            recorder.see("distro-result_5", b"what it is does not matter")
    assert list(tmp_path.iterdir()) == []
    assert len(told) == 1
    assert "--gradients N" in told[0]


def test_a_disk_that_fails_is_told_once_and_ends_nothing(tmp_path: Path) -> None:
    params, optimizer = make_optimizer()
    update = next(make_updates(optimizer, params))
    told: list[str] = []
    folder = tmp_path / "folder"
    with Recorder(folder, KEY, keep=None, tell=told.append) as recorder:
        folder.rmdir()
        for step in (1, 2):
            recorder.see(OWN.format(step=step), blob(update, step, (1, 1)))
        recorder.begin(STATE, "{}", params, optimizer, 1)
    assert len(told) == 1
    assert "cannot be written" in told[0]
