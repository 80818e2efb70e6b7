"""Checkpoints are whole or not there, load without this package, and lose nothing when something goes wrong."""

from __future__ import annotations

import errno
import json
import os
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, load_model

import warm_python
from distro_optim.coordinator.model import Hub, HubRepo
from distro_optim.coordinator.rules.checkpoints import SHARED_BY_PEERS
from distro_optim.coordinator.types import Coordinator
from distro_optim.errors import ConfigurationError
from distro_optim.models.locations import checkpoint_folder
from distro_optim.strategy.model import checkpoint as checkpoint_module
from distro_optim.strategy.model.checkpoint import Checkpoint, CheckpointStore
from distro_optim.strategy.model.identity import describe, weights_root
from distro_optim.strategy.model.named_tensors import NamedTensors
from distro_optim.strategy.model.trainer import SwarmTrainer
from distro_optim.verify.calibrate import TIGHTEST, Limits
from runs import waiting_run

from .scripts import Net, new_model, new_optimizer

pytestmark = pytest.mark.waiting


OURS = waiting_run("friends", Hub(SHARED_BY_PEERS))
PSYCHES = waiting_run("friends", Hub(HubRepo("somebody/model")))


class Peer:
    """A model, its optimizer with some momentum, and a way to save them."""

    def __init__(self, model: torch.nn.Module | None = None, dtype: torch.dtype = torch.float32) -> None:
        self.model = model if model is not None else new_model(3, dtype)
        self.optimizer = new_optimizer(self.model)
        self.trainer = SwarmTrainer(NamedTensors.of(self.model, self.optimizer), self.optimizer)
        for param in self.optimizer.param_groups[0]["params"]:
            param.grad = torch.ones_like(param)
        self.optimizer.generate()

    def save(
        self,
        store: CheckpointStore,
        step: int = 40,
        state: Coordinator | None = OURS,
        run: str = "friends",
        audit_limits: Limits | None = None,
    ) -> Path:
        tensors = self.trainer.tensors
        identity = describe(
            tensors,
            self.optimizer,
            epoch=1,
            step=step,
            weights=weights_root(tensors),
            script_rates=True,
            data={},
        )
        return store.save(
            self.model,
            tensors.copies(),
            self.trainer.momentum(),
            run_id=run,
            identity=identity,
            state=state,
            audit_limits=audit_limits,
        )


def latest(directory: Path) -> Checkpoint:
    found = CheckpointStore(directory).latest()
    assert found is not None
    return found


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weights_buffers_momentum_and_run_come_back_bit_for_bit(tmp_path: Path, dtype: torch.dtype) -> None:
    peer, other = Peer(dtype=dtype), Peer(new_model(9, dtype))
    peer.save(CheckpointStore(tmp_path))
    found = latest(tmp_path)
    other.trainer.load(found.weights(other.model, other.trainer.tensors))
    other.trainer.load_momentum(found.momentum())
    assert weights_root(other.trainer.tensors) == weights_root(peer.trainer.tensors) == found.identity.weights
    assert all(torch.equal(a, b) for a, b in zip(peer.model.buffers(), other.model.buffers(), strict=True))
    assert all(
        torch.equal(a, b)
        for a, b in zip(peer.trainer.momentum().values(), other.trainer.momentum().values(), strict=True)
    )
    assert any(bool(delta.any()) for delta in other.trainer.momentum().values())
    assert (found.run_id, found.step) == ("friends", 40)
    assert found.state == OURS


def test_limits_of_audits_come_back_and_damaged_ones_are_learnt_anew(tmp_path: Path) -> None:
    peer, limits = Peer(), replace(TIGHTEST, manhattan=0.07, samples=30)
    store = CheckpointStore(tmp_path)
    peer.save(store)
    assert latest(tmp_path).audit_limits() is None
    path = peer.save(store, audit_limits=limits)
    assert latest(tmp_path).audit_limits() == limits
    for damaged in (b"{}", b"\xff", b" " * 100_000):
        (path / "audit-limits.json").write_bytes(damaged)
        assert latest(tmp_path).audit_limits() is None


def test_the_weights_load_without_this_package(tmp_path: Path) -> None:
    peer, fresh = Peer(), new_model(9)
    path = peer.save(CheckpointStore(tmp_path))
    load_model(fresh, path / "model.safetensors")
    assert all(
        torch.equal(a, b) for a, b in zip(peer.model.state_dict().values(), fresh.state_dict().values(), strict=True)
    )


class AsCompiled(torch.nn.Module):
    """What torch.compile makes of a model, as far as names go."""

    def __init__(self, model: torch.nn.Module) -> None:
        super().__init__()
        self._orig_mod = model


def test_a_compiled_model_is_saved_under_its_plain_names(tmp_path: Path) -> None:
    peer = Peer(AsCompiled(new_model()))
    path = peer.save(CheckpointStore(tmp_path))
    assert "first.weight" in load_file(path / "model.safetensors")


@pytest.mark.slow
def test_a_model_of_transformers_is_saved_as_from_pretrained_reads_it(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(n_layer=1, n_head=2, n_embd=16, vocab_size=40, n_positions=8)
    torch.manual_seed(0)
    peer = Peer(transformers.GPT2LMHeadModel(config))
    path = peer.save(CheckpointStore(tmp_path))
    loaded = transformers.GPT2LMHeadModel.from_pretrained(path)
    pairs = zip(peer.model.parameters(), loaded.parameters(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)
    found = latest(tmp_path)
    values = found.weights(peer.model, peer.trainer.tensors)
    assert weights_root(peer.trainer.tensors, values) == found.identity.weights


def test_sharded_weights_are_put_together_again(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(n_layer=2, n_head=2, n_embd=16, vocab_size=40, n_positions=8)
    model = transformers.GPT2LMHeadModel(config)
    whole = model.save_pretrained
    model.save_pretrained = lambda folder: whole(folder, max_shard_size="10KB")
    peer = Peer(model)
    path = peer.save(CheckpointStore(tmp_path))
    assert (path / "model.safetensors.index.json").exists()
    values = latest(tmp_path).weights(peer.model, peer.trainer.tensors)
    assert weights_root(peer.trainer.tensors, values) == weights_root(peer.trainer.tensors)


def test_the_newest_stay(tmp_path: Path) -> None:
    store, peer = CheckpointStore(tmp_path, keep=2), Peer()
    for step in (8, 9, 100_000_000):
        peer.save(store, step)
    assert [path.name for path in store.saved()] == ["step-00000009", "step-100000000"]


def test_going_back_keeps_what_was_saved_later(tmp_path: Path) -> None:
    store, peer = CheckpointStore(tmp_path, keep=1), Peer()
    peer.save(store, 50)
    peer.save(store, 20)
    assert [path.name for path in store.saved()] == ["step-00000020", "step-00000050"]


def test_in_a_run_of_psyches_they_are_called_as_its_client_calls_them(tmp_path: Path) -> None:
    """By the last step that is in the weights."""
    store, peer = CheckpointStore(tmp_path, keep=2), Peer()
    for step in (9, 10, 11):
        peer.save(store, step, PSYCHES)
    assert [path.name for path in store.saved()] == ["friends-step9", "friends-step10"]
    assert checkpoint_folder(tmp_path, "friends", 10) == store.saved()[-1]
    assert latest(tmp_path).step == 11
    found = store.of_step(10, "friends")
    assert found is not None
    assert found.step == 10
    assert store.of_step(9, "friends") is store.of_step(10, "others") is None


def test_names_of_before_are_found_and_go_when_their_time_has_come(tmp_path: Path) -> None:
    store, peer = CheckpointStore(tmp_path, keep=2), Peer()
    for step in (8, 9):
        peer.save(store, step)  # as all were called once
    assert latest(tmp_path).step == 9
    found = store.of_step(9, "friends")
    assert found is not None
    assert found.path.name == "step-00000009"
    peer.save(store, 10, PSYCHES)
    assert [path.name for path in store.saved()] == ["step-00000009", "friends-step9"]
    assert latest(tmp_path).step == 10


def test_what_psyches_client_saved_in_the_same_folder_is_left_alone(tmp_path: Path) -> None:
    store, peer = CheckpointStore(tmp_path, keep=1), Peer()
    theirs = tmp_path / "friends-step900"
    theirs.mkdir()
    (theirs / "model.safetensors").write_bytes(b"weights")
    assert store.latest() is None
    for step in (9, 10):
        peer.save(store, step, PSYCHES)
    assert [path.name for path in store.saved()] == ["friends-step9"]
    assert (theirs / "model.safetensors").read_bytes() == b"weights"
    assert store.of_step(901, "friends") is None


@pytest.mark.parametrize("run", ["../outside", "a/b", "a\0b", ".unfinished-x", ".replaced-x", ".."])
def test_a_run_whose_name_cannot_be_that_of_a_folder_is_saved_all_the_same(tmp_path: Path, run: str) -> None:
    store, peer = CheckpointStore(tmp_path / "inside"), Peer()
    peer.save(store, 9, PSYCHES, run)
    assert [path.name for path in tmp_path.iterdir()] == ["inside"]
    assert [path.name for path in CheckpointStore(tmp_path / "inside").saved()] == ["step-00000009"]
    assert latest(tmp_path / "inside").run_id == run
    assert store.of_step(9, run) is not None


def test_saving_a_step_again_replaces_it(tmp_path: Path) -> None:
    store, peer = CheckpointStore(tmp_path), Peer()
    peer.save(store)
    with torch.no_grad():
        peer.model.get_parameter("first.bias").fill_(5)
    peer.save(store)
    assert latest(tmp_path).identity.weights == weights_root(peer.trainer.tensors)
    assert len(list(tmp_path.iterdir())) == 1


# -- trouble -----------------------------------------------------------------------------------------------------------


def contents(directory: Path) -> dict[str, bytes]:
    return {str(p.relative_to(directory)): p.read_bytes() for p in directory.rglob("*") if p.is_file()}


def test_a_full_disk_leaves_what_was_saved_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store, peer = CheckpointStore(tmp_path), Peer()
    peer.save(store, 10)
    before = contents(tmp_path)

    def full(*args: Any, **kwargs: Any) -> None:
        Path(args[1]).write_bytes(b"half")
        raise SafetensorError("Error while serializing: I/O error: No space left on device")

    monkeypatch.setattr(checkpoint_module, "save_file", full)
    with pytest.raises(OSError, match="No space left"):
        peer.save(store, 20)
    assert contents(tmp_path) == before


def test_a_full_disk_is_known_as_such_when_files_are_synced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store, peer = CheckpointStore(tmp_path), Peer()

    def full(handle: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        peer.save(store, 20)
    assert not contents(tmp_path)


KILLED_WHILE_SAVING = """
import os, signal, sys
from pathlib import Path
from session.test_checkpoints import DEATHS, Peer
from distro_optim.strategy.model import checkpoint
from distro_optim.strategy.model.checkpoint import CheckpointStore

def die(*_):
    os.kill(os.getpid(), signal.SIGKILL)

def killed(folder, where, step):
    peer, store = Peer(), CheckpointStore(folder)
    peer.save(store, 10)
    peer.model.get_parameter("first.bias").data.fill_(5)
    save, replace, moves = checkpoint._save_tensors, os.replace, []

    def replace_or_die(a, b):
        moves.append(a)
        die() if len(moves) == 2 else replace(a, b)

    if where == "sync":
        checkpoint._sync = die
    elif where == "momentum":
        checkpoint._save_tensors = lambda values, path: die() if "momentum" in path.name else save(values, path)
    else:
        os.replace = replace_or_die
    peer.save(store, step)

for where, step in DEATHS:
    child = os.fork()
    if not child:
        try:
            killed(Path(sys.argv[1]) / f"{where}-{step}", where, step)
        finally:
            os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL, where
"""

DEATHS = [("momentum", 20), ("sync", 20), ("sync", 10), ("swap", 10)]


@pytest.fixture(scope="module")
def killed_in(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folders of processes that died while they saved; they are children of one, since loading PyTorch takes long."""
    folder = tmp_path_factory.mktemp("killed")
    warm_python.run(
        [sys.executable, "-c", KILLED_WHILE_SAVING, str(folder)],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"},
        timeout=200,
        check=True,
    )
    return folder


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no kill -9")
@pytest.mark.parametrize(("where", "step"), DEATHS)
def test_kill_9_while_saving_leaves_the_checkpoint_before(killed_in: Path, where: str, step: int) -> None:
    folder = killed_in / f"{where}-{step}"
    assert [path.name for path in folder.iterdir()] != ["step-00000010"], "it was killed too early to prove anything"
    found = latest(folder)
    assert found.step == 10
    peer = Peer()
    values = found.weights(peer.model, peer.trainer.tensors)
    assert weights_root(peer.trainer.tensors, values) == found.identity.weights == weights_root(peer.trainer.tensors)
    assert [path.name for path in folder.iterdir()] == ["step-00000010"], "what was half done is cleaned up"


def test_a_folder_that_cannot_be_written_is_refused_at_once(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_text("")
    with pytest.raises(ConfigurationError, match=r"checkpoints cannot be saved in .*name a folder that can be written"):
        CheckpointStore(file / "inside")


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may write anywhere")
def test_a_read_only_folder_is_refused_at_once(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    with pytest.raises(ConfigurationError, match="Permission denied"):
        CheckpointStore(tmp_path)


@pytest.mark.parametrize("keep", [0, -1, True, 1.5])
def test_at_least_one_is_kept(tmp_path: Path, keep: Any) -> None:
    with pytest.raises(ConfigurationError, match="at least 1"):
        CheckpointStore(tmp_path, keep=keep)


@pytest.mark.parametrize(
    ("file", "spoil"),
    [
        ("distro_optim.json", lambda path: path.unlink()),
        ("distro_optim.json", lambda path: path.write_text("[1, 2]")),
        ("distro_optim.json", lambda path: path.write_text('{"run_id": "friends", "model": {}}')),
        ("run.toml", lambda path: path.write_text("run_id = 3")),
    ],
)
def test_a_damaged_checkpoint_is_named_and_nothing_older_is_taken(tmp_path: Path, file: str, spoil: Any) -> None:
    peer, store = Peer(), CheckpointStore(tmp_path)
    peer.save(store, 10)
    spoil(peer.save(store, 20) / file)
    with pytest.raises(ConfigurationError, match="step-00000020"):
        store.latest()


def test_damaged_weights_are_named(tmp_path: Path) -> None:
    peer = Peer()
    path = peer.save(CheckpointStore(tmp_path)) / "model.safetensors"
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(ConfigurationError, match=r"model\.safetensors cannot be read"):
        latest(tmp_path).weights(peer.model, peer.trainer.tensors)


def test_a_checkpoint_of_another_model_says_what_it_lacks(tmp_path: Path) -> None:
    class More(Net):
        def __init__(self) -> None:
            super().__init__()
            self.more = torch.nn.Linear(2, 2)

    Peer().save(CheckpointStore(tmp_path))
    other = Peer(More())
    with pytest.raises(ConfigurationError, match=r"has no tensor more\.weight"):
        latest(tmp_path).weights(other.model, other.trainer.tensors)


def test_an_index_that_leads_out_of_the_folder_is_not_followed(tmp_path: Path) -> None:
    peer = Peer()
    path = peer.save(CheckpointStore(tmp_path / "own"))
    (tmp_path / "elsewhere.safetensors").write_bytes((path / "model.safetensors").read_bytes())
    index = {"weight_map": {"first.weight": "../../elsewhere.safetensors"}}
    (path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ConfigurationError, match="cannot be read"):
        latest(tmp_path / "own").weights(peer.model, peer.trainer.tensors)
