"""A client keeps the model without being told to: where, how much, and that no two write to one folder."""

from __future__ import annotations

from pathlib import Path

import pytest

from client.ports import ScriptedPort
from client.processes import DISTRO, TINY_LLAMA, write_state
from distro_optim.cli import main
from distro_optim.client.keeping import kept_in, name_of_folder
from distro_optim.client.options import JoinOptions
from distro_optim.comm.signing import SecretKey
from distro_optim.coordinator.model import P2P, Checkpoint, Hub, HubRepo
from distro_optim.coordinator.server.store import read_state_file
from distro_optim.errors import ConfigurationError
from distro_optim.models.causal_lm import CausalLM
from distro_optim.strategy.model.checkpoint import CheckpointStore
from distro_optim.strategy.network.runtime import Runtime
from distro_optim.strategy.rounds.actions import FinishEpoch, Initialize, RunEnded

NAMED = '{ P2P = { repo_id = "no-such/model-anywhere" } }'
OPTIONS = JoinOptions(run="psyche1abc")


@pytest.fixture(autouse=True)
def working_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_each_run_has_a_folder_of_its_own_below_the_working_directory() -> None:
    with kept_in(OPTIONS, "ours") as ours, kept_in(OPTIONS, "others") as others:
        assert (ours, others) == (Path("out/join/ours"), Path("out/join/others"))
        assert Path("out/join/ours").is_dir()


def test_clients_of_one_run_have_folders_of_their_own_and_take_them_again() -> None:
    for _ in range(2):  # as after a restart: no folder more
        with kept_in(OPTIONS, "ours") as first, kept_in(OPTIONS, "ours") as second:
            assert (first, second) == (Path("out/join/ours"), Path("out/join/ours~2"))
    assert sorted(path.name for path in Path("out/join").iterdir()) == ["ours", "ours~2"]


def test_a_folder_that_was_named_is_taken_as_it_is(tmp_path: Path) -> None:
    with kept_in(JoinOptions(run="psyche1abc", checkpoint_dir=tmp_path / "mine"), "ours") as folder:
        assert folder == tmp_path / "mine"
    assert not Path("out").exists()


def test_nothing_is_written_if_nothing_is_to_be_kept(tmp_path: Path) -> None:
    with kept_in(JoinOptions(run="psyche1abc", no_checkpoints=True), "ours") as folder:
        assert folder is None
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["", ".", "..", "../../etc", "a/b", "a\\b", ".hidden", "a\0b", "x" * 500, "ä\x1b[2J"])
def test_a_strangers_name_stays_below_the_folder(name: str) -> None:
    with kept_in(OPTIONS, name) as folder:
        assert folder is not None
        assert folder.parent == Path("out/join")
        assert folder.resolve().parent == Path("out/join").resolve()
        assert len(folder.name) < 100


def test_names_that_had_to_be_changed_stay_different() -> None:
    names = ["a/b", "a_b", "a\\b", "x" * 65, "x" * 64, "ours~2", "ours"]
    assert len({name_of_folder(name) for name in names}) == len(names)
    assert name_of_folder("ours~2") != "ours~2"


def test_a_directory_that_cannot_be_written_to_is_told_with_a_way_out(tmp_path: Path) -> None:
    (tmp_path / "out").write_text("a file")
    with pytest.raises(ConfigurationError, match="--checkpoint-dir, or keep nothing with --no-checkpoints"):
        kept_in(OPTIONS, "ours").__enter__()


class OneEpoch(ScriptedPort):
    """A run of a peer's model that ends with its epoch."""

    secret_key = SecretKey(bytes(range(32)))

    def __init__(self, folder: Path) -> None:
        checkpoint = P2P(HubRepo("no-such/model-anywhere"))
        self.theirs = CausalLM({**TINY_LLAMA, "vocab_size": 64, "num_hidden_layers": 1}, "HfLlama", seed=3)
        super().__init__(
            [
                Initialize(epoch=0, step=1, checkpoint=checkpoint, providers=(bytes([7]) * 32,)),
                FinishEpoch(step=8),
                RunEnded(step=9),
            ],
            [self.theirs.shared_model()],
        )
        self.state = read_state_file(write_state(folder / "state.toml", checkpoint=NAMED, optimizer=DISTRO))


@pytest.mark.parametrize("options", [[], ["--no-checkpoints"]])
def test_without_any_option_the_command_has_the_model_in_its_folder_when_the_run_is_over(
    options: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "state").mkdir()
    port = OneEpoch(tmp_path / "state")
    monkeypatch.setattr(Runtime, "connect", lambda *_, **__: port)
    assert main(["join", "127.0.0.1:1/proof", "--device", "cpu", "--logs", "console", *options]) == 0
    said = capsys.readouterr().out
    kept = Path("out/join/proof")
    if options:
        assert "the model is not kept: --no-checkpoints" in said
        assert not Path("out").exists()
        return
    assert f"the model is kept in {kept}: the last 3 checkpoints" in said
    saved = CheckpointStore(kept).latest()
    assert saved is not None
    assert saved.step == 9
    weights = CausalLM.from_folder(saved.path, "HfLlama").tensors()
    assert weights.keys() == port.theirs.tensors().keys()
    assert all(weights[name].equal(tensor) for name, tensor in port.theirs.tensors().items())


class AfterAReboot(ScriptedPort):
    """The same run at some step, when its server and all of its peers have been started again."""

    secret_key = SecretKey(bytes(range(32)))

    def __init__(self, folder: Path, step: int) -> None:
        checkpoint: Checkpoint = Hub(HubRepo("no-such/model-anywhere"))
        begins = Initialize(epoch=1, step=step, checkpoint=checkpoint, providers=())
        super().__init__([begins, FinishEpoch(step=15), RunEnded(step=15)], [])
        self.state = read_state_file(write_state(folder / "again.toml", checkpoint=NAMED, optimizer=DISTRO))


@pytest.mark.parametrize("step", [9, 10])
def test_after_a_reboot_the_same_command_goes_on_with_what_was_trained(
    step: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "state").mkdir()
    first = OneEpoch(tmp_path / "state")
    monkeypatch.setattr(Runtime, "connect", lambda *_, **__: first)
    assert main(["join", "127.0.0.1:1/proof", "--device", "cpu", "--logs", "console"]) == 0
    begun_with = CausalLM({**TINY_LLAMA, "vocab_size": 64, "num_hidden_layers": 1}, "HfLlama", seed=4)
    begun_with.save_pretrained(tmp_path / "begun-with")
    monkeypatch.setattr(Runtime, "connect", lambda *_, **__: AfterAReboot(tmp_path / "state", step))
    capsys.readouterr()
    assert main(["join", "127.0.0.1:1/proof", "--device", "cpu", "--logs", "console", "--model", "begun-with"]) == 0
    said = " ".join(capsys.readouterr().out.split())
    saved = CheckpointStore(Path("out/join/proof")).latest()
    assert saved is not None
    assert saved.step == 16
    weights = CausalLM.from_folder(saved.path, "HfLlama").tensors()
    went_on_with = first.theirs if step == 9 else begun_with
    assert all(weights[name].equal(tensor) for name, tensor in went_on_with.tensors().items())
    if step == 9:
        assert "no peer of the run is left: it goes on from out/join/proof/" in said
    else:
        assert "no peer of it is left: it goes on with the weights of no-such/model-anywhere" in said
        assert "name a folder with the weights of this step" in said
