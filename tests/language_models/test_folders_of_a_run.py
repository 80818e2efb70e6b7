"""A run names its checkpoint; here is the folder that it means, or the sentence that says why there is none."""

from __future__ import annotations

from pathlib import Path

import pytest

from distro_optim.coordinator.model import (
    P2P,
    Checkpoint,
    DummyCheckpoint,
    Ephemeral,
    Gcs,
    GcsRepo,
    Hub,
    HubRepo,
    P2PGcs,
)
from distro_optim.errors import ModelWeightsError
from distro_optim.models.causal_lm import CausalLM
from distro_optim.models.locations import checkpoint_folder, find_checkpoint, latest_checkpoint
from language_models.small import LLAMA


@pytest.mark.parametrize("kind", [Hub, P2P])
def test_a_folder_goes_before_a_repository_of_the_same_name(tmp_path: Path, kind: type[Hub] | type[P2P]) -> None:
    assert find_checkpoint(kind(HubRepo(str(tmp_path)))) == tmp_path


def test_a_repository_that_was_downloaded_before_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    asked: dict[str, object] = {}

    def snapshot(repo: str, **settings: object) -> str:
        asked.update(settings, repo=repo)
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot)
    assert find_checkpoint(Hub(HubRepo("emozilla/llama2-20m-init", "abc"))) == tmp_path
    assert (asked["repo"], asked["revision"]) == ("emozilla/llama2-20m-init", "abc")
    assert asked["local_files_only"] is True
    find_checkpoint(Hub(HubRepo("emozilla/llama2-20m-init")), download=True)
    assert asked["local_files_only"] is False


@pytest.mark.parametrize(
    ("checkpoint", "words"),
    [
        (Hub(HubRepo("nobody/no-such-model", "r1")), "'hf download nobody/no-such-model --revision r1'"),
        (P2P(HubRepo("")), "is not a folder"),
        (P2P(HubRepo("../../x")), "is not a folder"),
        (Gcs(GcsRepo("bucket", "run/7")), "gs://bucket/run/7, which is not fetched"),
        (P2PGcs(GcsRepo("bucket")), "gs://bucket/"),
        (Ephemeral(), "Ephemeral"),
        (DummyCheckpoint(HubRepo("")), "dummy"),
    ],
)
def test_what_is_not_here_is_told_with_what_to_do(
    checkpoint: Checkpoint, words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(ModelWeightsError) as caught:
        find_checkpoint(checkpoint)
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.slow
def test_the_highest_step_of_a_run_is_resumed_from(tmp_path: Path) -> None:
    assert latest_checkpoint(tmp_path / "nowhere", "my-run") is None
    model = CausalLM(LLAMA, "HfLlama")
    for step in (9, 10, 100):
        model.save_pretrained(checkpoint_folder(tmp_path, "my-run", step))
    model.save_pretrained(checkpoint_folder(tmp_path, "my-run-b", 500))
    checkpoint_folder(tmp_path, "my-run", 900).mkdir()  # without a model in it
    assert latest_checkpoint(tmp_path, "my-run") == (tmp_path / "my-run-step100", 100)
    assert latest_checkpoint(tmp_path, "my") is None


@pytest.mark.parametrize("run_id", ["../x", "a/b", "/etc", "a\0b"])
def test_the_name_of_a_run_does_not_lead_out_of_the_folder(tmp_path: Path, run_id: str) -> None:
    with pytest.raises(ModelWeightsError, match="cannot be the name of a folder"):
        checkpoint_folder(tmp_path, run_id, 1)
