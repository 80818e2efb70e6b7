"""Folders by the names under which a run knows them."""

from __future__ import annotations

import re
from pathlib import Path

from ..coordinator.model import P2P, Checkpoint, DummyCheckpoint, Ephemeral, Gcs, Hub, HubRepo, P2PGcs
from ..errors import MissingDependencyError, ModelWeightsError
from .config import CONFIG_FILE, one_line

_REVISION = re.compile(r"(?!/)(?!.*\.\.)[\w./-]+", re.ASCII)
"""Branches, tags and commits; no part of it leads upwards."""

__all__ = ["checkpoint_folder", "find_checkpoint", "latest_checkpoint"]


def checkpoint_folder(parent: Path, run_id: str, step: int) -> Path:
    """Where a client keeps the model at a step (PsycheFoundation/psyche ``shared/client/src/state/cooldown.rs``).

    Raises:
        ModelWeightsError: the name of the run leads out of the folder; runs are named by strangers.
    """
    name = f"{run_id}-step{step}"
    if Path(name).name != name or "\0" in name:
        raise ModelWeightsError(f"the run {run_id!r} cannot be the name of a folder: rename it at its coordinator")
    return parent / name


def latest_checkpoint(parent: Path, run_id: str) -> tuple[Path, int] | None:
    """The folder of the highest step of a run, and the step; None where there is none."""
    pattern = re.compile(re.escape(run_id) + r"-step([0-9]{1,10})")
    found: list[tuple[int, Path]] = []
    for path in parent.iterdir() if parent.is_dir() else ():
        match = pattern.fullmatch(path.name)
        if match and (path / CONFIG_FILE).is_file():
            found.append((int(match[1]), path))
    if not found:
        return None
    step, path = max(found)
    return path, step


def find_checkpoint(checkpoint: Checkpoint, *, download: bool = False, paths: bool = True) -> Path:
    """The folder on this disk that a run's checkpoint names: a path, or what was downloaded from the hub before.

    Args:
        checkpoint: of a run that does not get its model from peers, or did not before.
        download: whether to fetch a repository of the hub that is not here.
        paths: whether a name may be the path of a folder. False where a stranger chose it: a model that is
            trained is shared with peers, and the stranger could name any folder of this machine.

    Raises:
        ModelWeightsError: it is not here, or nowhere.
    """
    match checkpoint:
        case Hub(repo) | P2P(repo):
            return _hub_folder(repo, download, paths)
        case DummyCheckpoint():
            raise ModelWeightsError(
                "the run has a dummy checkpoint: there are no weights, only distro_optim.models.dummy"
            )
        case Ephemeral():
            raise ModelWeightsError(
                "the run's checkpoint is Ephemeral: its weights are with nobody, so nobody can join it"
            )
        case Gcs(repo) | P2PGcs(repo):
            where = f"gs://{repo.bucket}/{repo.prefix or ''}"
            raise ModelWeightsError(
                f"the run's checkpoint is in {where}, which is not fetched: download it, for example with "
                f"'gsutil -m cp -r {where} FOLDER', and give the folder"
            )


def _hub_folder(repo: HubRepo, download: bool, paths: bool) -> Path:
    # As Psyche has it: a folder goes before a repository of the same name, unless a revision is named.
    is_folder = repo.revision is None and repo.repo_id != "" and Path(repo.repo_id).is_dir()
    if is_folder and paths:
        return Path(repo.repo_id)
    # The hub's client looks revisions up as files of its cache.
    if repo.revision is not None and not _REVISION.fullmatch(repo.revision):
        raise ModelWeightsError(f"{repo.revision!r} is not a revision of a repository of the hub")
    try:
        from huggingface_hub import snapshot_download
    except ImportError as error:
        raise MissingDependencyError("the Hugging Face hub needs: pip install huggingface_hub") from error
    try:
        return Path(
            snapshot_download(
                repo.repo_id,
                revision=repo.revision,
                local_files_only=not download,
                allow_patterns=["*.safetensors", "*.json"],
            )
        )
    # The hub's client has an exception for each of dozens of reasons, of several libraries.
    except Exception as error:
        name = repo.repo_id + (f" --revision {repo.revision}" if repo.revision else "")
        if download:
            raise ModelWeightsError(f"{repo.repo_id!r} cannot be fetched from the hub: {one_line(error)}") from error
        if is_folder:
            raise ModelWeightsError(
                f"the run names a folder of this machine, {repo.repo_id!r}, as its model, and training gives "
                "the model to all peers: name the folder yourself (--model) if you want that"
            ) from error
        raise ModelWeightsError(
            f"{repo.repo_id!r} is not a folder and was not downloaded from the hub: 'hf download {name}', or give a "
            "folder"
        ) from error
