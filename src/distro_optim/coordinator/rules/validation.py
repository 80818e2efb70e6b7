"""What a configuration must satisfy before a run starts with it.

PsycheFoundation/psyche, ``CoordinatorConfig::check_error`` and ``Model::check`` in ``shared/coordinator/src``.
"""

from __future__ import annotations

from collections.abc import Iterator

from ...errors import ConfigurationError
from ..model import (
    LLM,
    P2P,
    DummyOptimizer,
    Ephemeral,
    Gcp,
    Gcs,
    HttpLLMTrainingDataLocation,
    Hub,
    NumberedFiles,
    P2PGcs,
    PreprocessedData,
    ServerData,
    SingleUrl,
    WeightedHttpData,
)
from ..types import MAX_NUM_CLIENTS, MAX_NUM_WITNESSES, Coordinator, CoordinatorConfig
from .steps import last_trained_step

__all__ = ["check_run", "config_problems", "model_problems"]


def config_problems(config: CoordinatorConfig, *, prompt: bool = False) -> Iterator[tuple[str, str]]:
    """Problems as pairs of field and advice, in the order in which Psyche checks (it stops at the first).

    Args:
        config: the rules of a run.
        prompt: allow rounds without a fixed time for reports, as only our own coordinator can have them.
    """
    if config.epoch_time == 0:
        yield "epoch_time", "must be at least 1 second"
    if config.warmup_time >= config.epoch_time:
        yield "warmup_time", f"must be below epoch_time, which is {config.epoch_time}"
    if not 0 < config.max_round_train_time < config.epoch_time:
        yield "max_round_train_time", f"must be at least 1 second and below epoch_time, which is {config.epoch_time}"
    if config.round_witness_time == 0 and not prompt:
        yield "round_witness_time", "must be at least 1 second"
    if config.min_clients == 0:
        yield "min_clients", "must be at least 1"
    if not config.min_clients <= config.init_min_clients <= MAX_NUM_CLIENTS:
        yield "init_min_clients", f"must be from min_clients, which is {config.min_clients}, to {MAX_NUM_CLIENTS}"
    if config.global_batch_size_start == 0:
        yield "global_batch_size_start", "must be at least 1"
    if config.global_batch_size_end < max(1, config.global_batch_size_start):
        yield "global_batch_size_end", "must not be below global_batch_size_start"
    if config.total_steps == 0:
        yield "total_steps", "must be at least 1"
    elif config.round_witness_time == 0 and last_trained_step(config) < 1:
        least = config.total_steps + 1 - last_trained_step(config)
        yield "total_steps", f"must be at least {least}: steps count from 1, and the last ones train nothing"
    if config.witness_nodes > min(config.min_clients, MAX_NUM_WITNESSES):
        yield "witness_nodes", f"must not be above min_clients, nor above {MAX_NUM_WITNESSES}"
    if config.cooldown_time == 0:
        yield "cooldown_time", "must be at least 1 second"
    if config.waiting_for_members_extra_time == 0:
        yield "waiting_for_members_extra_time", "must be at least 1 second"
    if config.verification_percent != 0:
        # Psyche accepts it and panics as soon as the first verifier is drawn.
        yield "verification_percent", "must be 0: no implementation has verifiers yet"


def model_problems(model: LLM) -> Iterator[tuple[str, str]]:
    """Problems that keep strangers from training this model, as pairs of field and advice. A test run may have them."""
    if model.max_seq_len == 0:
        yield "max_seq_len", "must be at least 1"
    match model.data_location:
        case ServerData(place) | WeightedHttpData(place) | PreprocessedData(place):
            if not place:
                yield "data_location", "must not be empty"
        case HttpLLMTrainingDataLocation(location):
            if not _is_complete(location):
                yield "data_location", "must name at least one file"
    match model.checkpoint:
        case Ephemeral():
            yield "checkpoint", "must be one that joiners can get, not Ephemeral"
        case Hub(repo) | P2P(repo):
            if not repo.repo_id:
                yield "checkpoint", "must name a repository"
        case Gcs(bucket) | P2PGcs(bucket):
            if not bucket.bucket:
                yield "checkpoint", "must name a bucket"
    if isinstance(model.optimizer, DummyOptimizer):
        yield "optimizer", "must not be Dummy"


def _is_complete(location: SingleUrl | NumberedFiles | Gcp) -> bool:
    match location:
        case SingleUrl(url):
            return bool(url)
        case NumberedFiles(url_template, _, _, num_files):
            return bool(url_template) and num_files > 0
        case Gcp(bucket_name, _):
            return bool(bucket_name)


def check_run(state: Coordinator, *, prompt: bool = False) -> None:
    """Refuses a state that a coordinator could not run. Models for tests pass, as in Psyche's own server.

    Args:
        state: the run.
        prompt: see :func:`config_problems`.

    Raises:
        ConfigurationError: names the field, shows its value and says what it must be.
    """
    for field, advice in config_problems(state.config, prompt=prompt):
        value = getattr(state.config, field)
        raise ConfigurationError(f"config.{field} is {value}, but {advice}", name=f"config.{field}", value=value)
    if not state.run_id:
        raise ConfigurationError("run_id is empty, but joiners have to name it", name="run_id", value="")
    if state.progress.step == 0:
        raise ConfigurationError("progress.step is 0, but steps count from 1", name="progress.step", value=0)
    steps = state.model.cold_start_warmup_steps
    room = (state.config.epoch_time - state.config.warmup_time) // state.config.max_round_train_time
    if steps > room:
        raise ConfigurationError(
            f"model.cold_start_warmup_steps is {steps}, but an epoch has room for {room} rounds",
            name="model.cold_start_warmup_steps",
            value=steps,
        )
