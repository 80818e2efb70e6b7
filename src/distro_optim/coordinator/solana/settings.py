"""What an operator changes of a halted run, and which of it goes together. No I/O."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Final

from ...errors import ConfigurationError, ProtocolError
from ..formats import borsh
from ..formats.account import CoordinatorAccount, RunMetadata
from ..model import P2P, Checkpoint, DummyCheckpoint, Gcs, GcsRepo, Hub, HubRepo, Model, P2PGcs
from ..rules.assignment import data_index_for_step
from ..types import CoordinatorConfig, CoordinatorProgress
from .arguments import RunUpdate

__all__ = ["Settings", "changes_of", "check_version", "repository_of", "words_for"]

MAX_VERSION_BYTES: Final = 96
"""Of the name of a client; the program cuts what is longer when it makes a run, and panics when it changes one."""

_WORDS: Final = {
    "metadata": "what people read about it",
    "config": "config",
    "model": "model",
    "progress": "step",
    "client_version": "client version",
}


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What is to change; None leaves it.

    Attributes:
        config: all settings.
        model: the whole model.
        name: what people call the run.
        description: what it is about, in at most 280 bytes.
        num_parameters: of the model, for people.
        vocab_size: likewise.
        client_version: which client the run is for.
        restart_from_step: the step that comes next.
        switch_to_hub: the weights come from the hub or the bucket again, and no longer from peers.
    """

    config: CoordinatorConfig | None = None
    model: Model | None = None
    name: str | None = None
    description: str | None = None
    num_parameters: int | None = None
    vocab_size: int | None = None
    client_version: str | None = None
    restart_from_step: int | None = None
    switch_to_hub: bool = False


def changes_of(account: CoordinatorAccount, wanted: Settings) -> list[RunUpdate]:
    """What differs from the run as it is, in changes that can be made one after the other.

    Raises:
        ConfigurationError: a value has no place in the account.
    """
    state = account.state
    model = wanted.model
    if wanted.switch_to_hub:
        model = _from_the_hub(state.coordinator.model if model is None else model)
    config = None if wanted.config == state.coordinator.config else wanted.config
    model = None if model == state.coordinator.model else model
    progress = None
    if wanted.restart_from_step is not None:
        after = replace(
            state.coordinator,
            config=config or state.coordinator.config,
            model=model or state.coordinator.model,
        )
        step = wanted.restart_from_step
        if not 0 < step <= after.config.total_steps:
            raise ConfigurationError(
                f"the run has the steps 1 to {after.config.total_steps}, and cannot go on with {step}",
                name="restart_from_step",
                value=step,
            )
        progress = CoordinatorProgress(state.coordinator.progress.epoch, step, data_index_for_step(after, step))
    version = wanted.client_version
    if version is not None:
        check_version(version)
    changes = [
        RunUpdate(config=config, model=model, progress=progress),
        RunUpdate(metadata=_metadata(state.metadata, wanted)),
        RunUpdate(client_version=None if version == state.client_version else version),
    ]
    return [change for change in changes if change != RunUpdate()]


def words_for(change: RunUpdate) -> str:
    """What a change sets, for people."""
    return "set " + ", ".join(word for name, word in _WORDS.items() if getattr(change, name) is not None)


def check_version(version: str) -> None:
    """Raises ConfigurationError if a client's name is too long for the account."""
    if len(version.encode()) > MAX_VERSION_BYTES:
        raise ConfigurationError(
            f"the name of a client has at most {MAX_VERSION_BYTES} bytes", name="client_version", value=version
        )


def repository_of(checkpoint: Checkpoint) -> HubRepo | GcsRepo | None:
    """Where a checkpoint's weights are, or were before the peers had them."""
    return getattr(checkpoint, "repo", None)


def _metadata(before: RunMetadata, wanted: Settings) -> RunMetadata | None:
    names = ("name", "description", "num_parameters", "vocab_size")
    given = {name: value for name in names if (value := getattr(wanted, name)) is not None}
    after = replace(before, **given)
    if after == before:
        return None
    try:
        borsh.encode(after)
    except (ProtocolError, ConfigurationError) as error:
        raise ConfigurationError(f"that cannot be said about a run: {error}", name="metadata") from None
    return after


def _from_the_hub(model: Model) -> Model:
    checkpoint = model.checkpoint
    match checkpoint:
        case P2P(repo) | DummyCheckpoint(repo):
            return replace(model, checkpoint=Hub(repo))
        case P2PGcs(repo):
            return replace(model, checkpoint=Gcs(repo))
    return model
