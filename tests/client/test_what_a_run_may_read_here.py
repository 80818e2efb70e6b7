"""A run is a stranger's: it reads nothing of this disk that the user has not named."""

from __future__ import annotations

from pathlib import Path

import pytest

from distro_optim.client.preparing import data_location
from distro_optim.coordinator.model import (
    P2P,
    DummyData,
    Hub,
    HubRepo,
    LLMTrainingDataLocation,
    LocalData,
    PreprocessedData,
    ServerData,
    WeightedHttpData,
)
from distro_optim.errors import ConfigurationError, ModelWeightsError
from distro_optim.models.locations import find_checkpoint

pytestmark = pytest.mark.waiting


def test_local_data_are_wanted_by_name(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="name yours with --data"):
        data_location(LocalData(str(tmp_path)), None)
    assert data_location(LocalData("/etc"), tmp_path) == LocalData(str(tmp_path))


def test_a_data_set_of_the_hub_is_no_folder_of_this_disk(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="names a folder of this machine"):
        data_location(PreprocessedData(str(tmp_path)), None)
    assert data_location(PreprocessedData("somebody/texts"), None) == PreprocessedData("somebody/texts")
    assert data_location(PreprocessedData("somebody/texts"), tmp_path) == PreprocessedData(str(tmp_path))


def test_preprocessed_data_are_a_folder(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="wants a folder of parquet files"):
        data_location(PreprocessedData("somebody/texts"), tmp_path / "nothing")


@pytest.mark.parametrize(
    ("location", "kind"),
    [
        (DummyData(), "Dummy"),
        (ServerData("example.org:20001"), "Server"),
        (WeightedHttpData("https://example.org/mixture.json"), "WeightedHttp"),
    ],
)
def test_data_that_everybody_reads_at_one_place_cannot_be_replaced(
    location: LLMTrainingDataLocation, kind: str, tmp_path: Path
) -> None:
    assert data_location(location, None) == location
    with pytest.raises(ConfigurationError, match=f"of the kind {kind}, .* leave it out"):
        data_location(location, tmp_path)


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The hub's downloads on this machine: none."""
    from huggingface_hub import constants

    cache = tmp_path / "hub"
    cache.mkdir()
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
    return cache


@pytest.mark.parametrize("kind", [Hub, P2P])
def test_a_model_in_a_folder_that_only_the_run_names_is_not_touched(
    kind: type[Hub] | type[P2P], hub: Path, tmp_path: Path
) -> None:
    private = tmp_path / "private-model"
    private.mkdir()
    with pytest.raises(ModelWeightsError, match="name the folder yourself"):
        find_checkpoint(kind(HubRepo(str(private))), paths=False)


def test_a_folder_of_the_same_name_does_not_hide_a_download(
    hub: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import huggingface_hub

    monkeypatch.chdir(tmp_path)
    (tmp_path / "somebody" / "llama").mkdir(parents=True)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda repo, **settings: str(hub))
    assert find_checkpoint(Hub(HubRepo("somebody/llama")), paths=False) == hub


@pytest.mark.parametrize("revision", ["../../../private", "/etc", "a/../../b", "x\0y", ""])
def test_a_revision_does_not_lead_out_of_the_downloads(revision: str, hub: Path) -> None:
    with pytest.raises(ModelWeightsError, match="not a revision"):
        find_checkpoint(Hub(HubRepo("somebody/llama", revision)), paths=False)
