"""What a run trains and on what: its model and its data, made here, or refused in one sentence before we join.

A peer that joins and then finds that it cannot train leaves an epoch that others have begun with it. So everything that
can be seen from the run's state alone is seen to first: the model, if it is on this machine, and the data. Only a model
that nobody but peers has comes after joining, since they give it to members.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Final

import torch

from ..comm.model_exchange import SharedModel
from ..comm.signing import SecretKey
from ..console import narrated
from ..coordinator.model import (
    DummyCheckpoint,
    DummyData,
    DummyOptimizer,
    HttpLLMTrainingDataLocation,
    LLMTrainingDataLocation,
    LocalData,
    PreprocessedData,
    ServerData,
    WeightedHttpData,
)
from ..coordinator.rules.outlook import first_data_index
from ..coordinator.rules.schedule import learning_rate
from ..coordinator.types import BatchId, Coordinator
from ..data.dummy import DummyTokens
from ..data.opening import open_token_data
from ..data.provider import TokenProvider
from ..errors import (
    ConfigurationError,
    DataUnavailableError,
    InvalidDataError,
    ModelWeightsError,
    ProtocolError,
    RunError,
)
from ..models.building import build_shapes
from ..models.causal_lm import CausalLM
from ..models.config import read_config
from ..models.locations import find_checkpoint
from ..models.optimization import distro_settings
from ..optimizer import DisTrO
from ..strategy.port import RunAccess
from .first_model import FirstModel, comes_through_peers
from .tokenizers import TOKENIZER_FILE, tokens_of

__all__ = ["Prepared", "advised", "beginning_rate", "data_location", "is_without_tensors", "load_libraries", "prepare"]

_ANY_RATE: Final = 1e-3
"""DisTrO wants a rate above 0; in a run the rates of its schedule count."""


@dataclass
class Prepared:
    """All that training takes.

    Attributes:
        access: to the run, for the session; see :mod:`.first_model`.
    """

    model: CausalLM
    optimizer: DisTrO
    data: TokenProvider
    access: RunAccess


def load_libraries() -> None:
    """Imports the large libraries. Called before joining: it takes seconds, which a warm-up has not got to spare.

    Raises:
        MissingDependencyError: transformers is not installed.
    """
    build_shapes(read_config("llama-20m", "HfLlama"))


def is_without_tensors(state: Coordinator) -> bool:
    """Whether it is one of Psyche's test runs, in which nothing is computed."""
    return isinstance(state.model.optimizer, DummyOptimizer)


def prepare(
    access: RunAccess,
    state: Coordinator,
    *,
    key: SecretKey,
    device: torch.device,
    make: Callable[[SharedModel | str | Path], CausalLM] | None = None,
    devices: int = 1,
    folder: Path | None,
    data: Path | None = None,
    mirrors: Sequence[str] = (),
    progress: Callable[[int, int], None],
    tell: Callable[[str], None],
) -> Prepared:
    """Makes the run's model and opens its data.

    Nothing that only the run names is read from this disk, but for what was downloaded from the hub: a run is a
    stranger's, and what is trained on is given to peers in one form or another.

    Args:
        access: to the run; looked at. It is started if the model comes from peers; otherwise that is left to the
            session.
        state: of the run.
        make: makes the model of what peers sent or of a folder; None makes it on ``device``.
        devices: so many of which hold it together.
        folder: with the model, in place of what the run calls it; None takes the run's own name.
        data: file or folder with the training data of a run whose data are on the disk of each client.
        mirrors: where else the run's data are (:func:`.open_token_data`).
        progress: parameters downloaded, and in all.
        tell: told the news.

    Raises:
        ConfigurationError: the run has an optimizer, a model or data of a kind that is not supported.
        ModelWeightsError: the model is not available anywhere.
        ModelTooLargeError: it does not fit in memory.
        DataError: the data are not available, or cannot be trained on.
        RunError: the run ended meanwhile.
    """
    run = state.model
    make_model = make if make is not None else partial(CausalLM.from_run, run, device=device)
    # Refuses what cannot be optimized with, or trained on, before anything is loaded.
    distro_settings(run.optimizer)
    location = data_location(run.data_location, data)
    model = None
    if folder is None and isinstance(run.checkpoint, DummyCheckpoint):
        raise RunError(
            "the run has no model (its checkpoint is Dummy) and yet an optimizer: name a folder with a model by --model"
        )
    try:
        where = folder if folder is not None else find_checkpoint(run.checkpoint, paths=False)
        tell(f"the model comes from {where}")
        with narrated("reading the model", tell):
            model = make_model(where)
    except ModelWeightsError:
        if folder is not None or not comes_through_peers(state, access.facts.identity):
            raise
    if model is not None:
        _check_tokenizer(model, tell)
        tokens = _open(location, state, key, model.config.vocab_size, mirrors, tell)
        return Prepared(model, _optimizer(model, state), tokens, access)
    _open(location, state, key, None, mirrors, tell).close()
    tell("the model comes from peers")
    access.life.start()
    if (wait := access.facts.view().waits_for) is not None:
        tell(f"waiting for {wait}")
    first = FirstModel(access, run, device, devices=devices)
    while model is None:
        shared = first.download(progress)
        try:
            with narrated("making the model", tell):
                model = make_model(shared)
        except ProtocolError as error:  # its parts came from several peers, one of whom may have lied
            first.refuse(str(error))
    _check_tokenizer(model, tell)
    tokens = _open(location, state, key, model.config.vocab_size, mirrors, tell)
    return Prepared(model, _optimizer(model, state), tokens, first.access)


def data_location(location: LLMTrainingDataLocation, own: Path | None) -> LLMTrainingDataLocation:
    """Where to read a run's training data.

    Args:
        location: in the words of the run.
        own: what the user named; wanted where the run names something on the disk of its clients, and only there.

    Raises:
        ConfigurationError: the user named none, or one that the run has no use for.
    """
    match location:
        case LocalData(path) if own is None:
            raise ConfigurationError(
                f"the run's data are on the disk of each client, it calls them {path!r}: name yours with --data PATH",
                name="data",
            )
        case PreprocessedData(place) if own is None and Path(place).exists():
            raise ConfigurationError(
                f"the run names a folder of this machine, {place!r}, as its data: name the folder yourself with "
                "--data if you want to train on it",
                name="data",
            )
        case LocalData() if own is not None:
            return LocalData(str(own))
        case PreprocessedData() if own is not None:
            if not own.is_dir():
                raise ConfigurationError(f"--data {own}: the run wants a folder of parquet files", name="data")
            return PreprocessedData(str(own))
        case _ if own is not None:
            raise ConfigurationError(
                f"--data {own}: the run's data are of the kind {location_kind(location)}, which everybody reads at the "
                "same place; leave it out",
                name="data",
                value=own,
            )
    return location


@contextmanager
def advised(location: LLMTrainingDataLocation, mirrors: Sequence[str], tell: Callable[[str], None]) -> Iterator[None]:
    """Tells what to do if the one place that the run names fails or lies."""
    try:
        yield
    except (DataUnavailableError, InvalidDataError):
        remote = isinstance(location, ServerData | HttpLLMTrainingDataLocation | WeightedHttpData)
        if remote and not mirrors:
            tell(
                "if you know another place with the same data, name it with --data-mirror: it is read where this fails"
            )
        raise


def location_kind(location: LLMTrainingDataLocation) -> str:
    """As a state file calls it."""
    return type(location).__name__.removesuffix("LLMTrainingDataLocation").removesuffix("Data")


def _open(
    location: LLMTrainingDataLocation,
    state: Coordinator,
    key: SecretKey,
    vocab_size: int | None,
    mirrors: Sequence[str],
    tell: Callable[[str], None],
) -> TokenProvider:
    """The data, of which the first, the last and the next sequence that the run will train could be read."""
    seq_len = state.model.max_seq_len
    if isinstance(location, DummyData) and not mirrors:
        # As long as the model takes; Psyche's are always 2048 tokens, which many models do not.
        return DummyTokens(seq_len)
    with narrated("opening the training data", tell):
        tokens = open_token_data(location, seq_len, vocab_size=vocab_size, key=key, mirrors=mirrors, tell=tell)
        try:
            tokens.probe()
            # What a server of Psyche's has it gives to members only.
            if not isinstance(location, ServerData):
                following = first_data_index(state)
                tokens.get_samples(BatchId(following, following))
        except BaseException:
            tokens.close()
            raise
    return tokens


def _check_tokenizer(model: CausalLM, tell: Callable[[str], None]) -> None:
    """Tells if the tokenizer that came with the model knows tokens that the model does not.

    That need not be wrong: some tokenizers have spare ones. Whatever is trained on is checked itself.
    """
    text = model.companions.get(TOKENIZER_FILE)
    known = None if text is None else tokens_of(text)
    if known is not None and known > model.config.vocab_size:
        tell(
            f"the tokenizer beside the model knows {known} tokens, the model {model.config.vocab_size}: data that have "
            "the others cannot be trained on"
        )


def beginning_rate(state: Coordinator) -> float:
    """With which an optimizer is made."""
    lr = learning_rate(state.model.lr_schedule, state.progress.step)
    return lr if lr > 0 else _ANY_RATE


def _optimizer(model: CausalLM, state: Coordinator) -> DisTrO:
    return model.make_optimizer(beginning_rate(state), state.model.optimizer)
