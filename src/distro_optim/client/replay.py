"""A recorded run once more: from its first weights and everybody's results to the weights of each step.

A recording is a folder. ``join --write-gradients-dir`` leaves one; Psyche's clients leave the results only, and the
rest is put beside them:

==============================================  ====================================================================
``state.toml``                                  the run
``config.json``                                 its model; read where not all of its tensors are trained
``initial.safetensors``                         weights before the first result. Of a run of our own kind its metadata
                                                say ``tiling``, ``arithmetic`` and ``order`` (of the tensors, JSON);
                                                ``step`` is the one that begins with them (1)
``results/step-S-batch-A-B.bin``                a result: a sequence of Psyche's ``SerializedDistroResult``, one per
                                                parameter in the order of their names' bytes, without a count
``result-ID-stepS-batchB[A, B].vec-postcard``   the same as Psyche's client names it, in the folder or in ``results``
``client-C-step-N.safetensors``                 what client C had at the end of step N, to compare with
==============================================  ====================================================================

A step N of a run begins with the results of step N-2, in ascending order of their batches, at the learning rate of N;
whoever trains in it decays the weights after that, at the same rate. So weights "of step N" have all results up to N-2
in them. Not in a recording is which results its witnesses agreed on: all of them are applied.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final, get_args

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ..buffer import Reader
from ..compress import (
    UPDATES,
    Arithmetic,
    CompressedUpdate,
    ParamSpec,
    TilePlan,
    Tiling,
    UpdateRule,
    make_plan,
)
from ..compress.engine import BlockEngine
from ..compress.engine.parts import ARITHMETICS
from ..compress.exact.precision import true_float32
from ..compress.wire import SerializedDistroResult, decode_distro_result
from ..coordinator.model import Distro, LLMArchitecture
from ..coordinator.rules.checkpoints import is_run_of_psyche
from ..coordinator.rules.schedule import effective_learning_rate
from ..coordinator.server.store import read_state_file
from ..coordinator.types import BatchId, Coordinator
from ..errors import ConfigurationError, InvalidDataError, ModelWeightsError, ProtocolError
from ..models.building import build_shapes, sorted_parameters
from ..models.config import one_line, read_config
from ..models.optimization import distro_settings
from ..optim.weight_decay import shrink
from ..strategy.rounds.results import max_result_size

__all__ = ["Beginning", "Comparison", "Recording", "Replayed", "compare", "read_update", "replay", "sender_of"]

STATE_FILE: Final = "state.toml"
INITIAL_FILE: Final = "initial.safetensors"
RESULTS_FOLDER: Final = "results"

_RESULT_NAMES: Final = (
    re.compile(r"step-(?P<step>\d{1,10})-batch-(?P<start>\d{1,20})-(?P<end>\d{1,20})\.bin"),
    re.compile(
        r"result-(?P<sender>[0-9a-f]+)-step(?P<step>\d{1,10})-batch"
        r"B(?:\[(?P<start>\d{1,20}), (?P<end>\d{1,20})\]|(?P<only>\d{1,20}))\.vec-postcard"
    ),
)
_CHECKPOINT_NAME: Final = re.compile(r"client-(?P<client>[A-Za-z0-9]+)-step-(?P<step>\d{1,10})\.safetensors")

_DELAY: Final = 2
"""Steps from a result to the weights (PsycheFoundation/psyche ``shared/client/src/state/train.rs``)."""

MAX_RESULT_BYTES: Final = 1 << 32
"""Of a result before the model is known; chosen arbitrarily, far above any."""

_NEAR_ULPS: Final = 2
"""So many units in the last place may a weight be off by what clients do to it alone: Psyche's take their lookahead off
by adding what they subtracted, which rounds."""


@dataclass(frozen=True)
class Recording:
    """A folder that can be replayed.

    Attributes:
        state: of the run, as it began.
        settings: of its optimizer.
        as_psyche: the run is one of Psyche's clients; otherwise one of our own kind.
        results: files by step and batch.
        checkpoints: files by client and step, in ascending order of steps.
    """

    folder: Path
    state: Coordinator
    settings: Distro
    as_psyche: bool
    results: Mapping[int, Mapping[BatchId, Path]]
    checkpoints: Mapping[tuple[str, int], Path]

    @classmethod
    def open(cls, folder: Path) -> Recording:
        """Looks at a folder, without reading what is large.

        Raises:
            ConfigurationError: something is missing or cannot be replayed; says what.
        """
        state = read_state_file(folder / STATE_FILE)
        definition = state.model.optimizer
        distro_settings(definition)  # refuses what is not trained with
        if not isinstance(definition, Distro):
            raise TypeError(definition)
        results: dict[int, dict[BatchId, Path]] = {}
        checkpoints: dict[tuple[str, int], Path] = {}
        for path in sorted([*folder.iterdir(), *_listed(folder / RESULTS_FOLDER)]):
            if match := _CHECKPOINT_NAME.fullmatch(path.name):
                checkpoints[match["client"], int(match["step"])] = path
            elif found := _result_of(path):
                step, batch = found
                before = results.setdefault(step, {}).setdefault(batch, path)
                if before != path and before.read_bytes() != path.read_bytes():
                    raise ConfigurationError(
                        f"{before.name} and {path.name} are two results for the same batch: remove the one that the "
                        "witnesses did not agree on",
                        name="folder",
                        value=folder,
                    )
        if not results:
            raise ConfigurationError(
                f"{folder} holds no results: they are called step-S-batch-A-B.bin, in the folder {RESULTS_FOLDER}",
                name="folder",
                value=folder,
            )
        return cls(
            folder=folder,
            state=state,
            settings=definition,
            as_psyche=is_run_of_psyche(state),
            results={step: dict(sorted(results[step].items())) for step in sorted(results)},
            checkpoints=dict(sorted(checkpoints.items(), key=lambda item: (item[0][1], item[0][0]))),
        )

    @property
    def steps(self) -> list[int]:
        """Steps after which there are other weights, or weights to compare with; in ascending order."""
        applied = {step + _DELAY for step in self.results}
        return sorted({*self.results, *applied, *(step for _, step in self.checkpoints)})

    def rate(self, step: int) -> float:
        """The learning rate of a step."""
        return effective_learning_rate(self.state, step)


@dataclass(frozen=True)
class Replayed:
    """The weights of a step. They are changed in place when the next one is asked for."""

    step: int
    weights: Mapping[str, Tensor]


@dataclass(frozen=True)
class Beginning:
    """With what the trainers of a step begin. The weights are changed in place afterwards.

    Attributes:
        step: of the run.
        weights: by name, with everything in them that was applied up to now, and before this step's decay.
        names: of the tensors that results speak of, in their order.
        plan: how these are tiled.
    """

    step: int
    weights: Mapping[str, Tensor]
    names: Sequence[str]
    plan: TilePlan


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """A client's checkpoint beside the weights of the same step.

    Attributes:
        client, step: of the checkpoint.
        elements: weights compared.
        differ: of them are not equal.
        beyond: of those, how many cannot be a matter of rounding: by more than 2 units in the last place and by more
            than half the learning rate of the step; in a run of our own kind, all.
        max: the largest difference; infinite where a number stands beside none.
    """

    client: str
    step: int
    elements: int
    differ: int
    beyond: int
    max: float

    def record(self) -> dict[str, object]:
        """For JSON, which knows no infinity: null."""
        client = int(self.client) if self.client.isdecimal() else self.client
        largest = self.max if math.isfinite(self.max) else None
        return {**vars(self), "client": client, "max": largest}


def replay(
    recording: Recording,
    *,
    progress: Callable[[int, int], None] | None = None,
    begins: Callable[[Beginning], None] | None = None,
) -> Iterator[Replayed]:
    """The weights of each step of :attr:`Recording.steps`.

    Args:
        recording: from :meth:`Recording.open`.
        progress: told the step that is done, and the last one.
        begins: told with what the training of each step begins.

    Raises:
        ConfigurationError, ModelWeightsError: the model cannot be read.
        InvalidDataError: a result does not fit the model; names the file.
    """
    weights, terms = _initial(recording)
    first = next(path for files in recording.results.values() for path in files.values())
    names = terms.order if terms.order is not None else _trained(recording, weights, len(_read(first)))
    if recording.as_psyche:  # whose clients train in bfloat16, whatever the file has
        weights.update({name: weights[name].to(torch.bfloat16) for name in names})
    params = [weights[name] for name in names]
    plan = _plan(recording.settings, params, terms)
    engine = BlockEngine(plan, "dct")
    for step in recording.steps:
        rate = recording.rate(step)
        if step < terms.step:
            continue
        files = recording.results.get(step - _DELAY, {}) if step > terms.step else {}
        with true_float32():
            engine.merge([read_update(path, plan) for path in files.values()], params, lr=[rate])
        if begins is not None:
            begins(Beginning(step, weights, names, plan))
        if recording.settings.weight_decay and step in recording.results:
            for param in params:
                shrink(param, 1 - rate * recording.settings.weight_decay)
        if progress is not None:
            progress(step, recording.steps[-1])
        yield Replayed(step, weights)


def compare(recording: Recording, replayed: Replayed) -> list[Comparison]:
    """The checkpoints of the step that was replayed, beside its weights.

    Raises:
        ModelWeightsError: a checkpoint cannot be read, or is of another model.
    """
    found = []
    for (client, step), path in recording.checkpoints.items():
        if step != replayed.step:
            continue
        theirs, _ = _tensors(path)
        if theirs.keys() != replayed.weights.keys():
            odd = sorted(theirs.keys() ^ replayed.weights.keys())[0]
            raise ModelWeightsError(f"{path.name} and {INITIAL_FILE} do not both have {odd}: they are of two models")
        near = recording.rate(step) / 2 if recording.as_psyche else None
        counts = [_differences(ours, theirs[name], near, name) for name, ours in replayed.weights.items()]
        found.append(
            Comparison(
                client=client,
                step=step,
                elements=sum(ours.numel() for ours in replayed.weights.values()),
                differ=sum(differ for differ, _, _ in counts),
                beyond=sum(beyond for _, beyond, _ in counts),
                max=max(largest for _, _, largest in counts),
            )
        )
    return found


def read_update(path: Path, plan: TilePlan) -> CompressedUpdate:
    """The result in a file.

    Raises:
        InvalidDataError: it is none, or not one of this plan; names the file.
    """
    entries = _read(path, max_result_size(plan))
    try:
        # Psyche's clients send NaN and infinities, and apply them.
        return CompressedUpdate.from_tensors(plan, [entry.to_tensor() for entry in entries], finite=False)
    except ProtocolError as error:
        raise InvalidDataError(f"{path} does not fit the model of {INITIAL_FILE}: {error}") from error


def sender_of(path: Path) -> str | None:
    """The beginning of the key of a result's sender, in hexadecimal; None where the file's name does not say it."""
    match = _RESULT_NAMES[1].fullmatch(path.name)
    return None if match is None else match["sender"]


# -- inside ------------------------------------------------------------------------------------------------------------


def _listed(folder: Path) -> list[Path]:
    return list(folder.iterdir()) if folder.is_dir() else []


def _result_of(path: Path) -> tuple[int, BatchId] | None:
    """Step and batch of a file with a result; None for another file."""
    for pattern in _RESULT_NAMES:
        if match := pattern.fullmatch(path.name):
            fields = match.groupdict()
            start = int(fields.get("only") or fields["start"])
            return int(fields["step"]), BatchId(start, int(fields.get("end") or start))
    return None


@dataclass(frozen=True)
class _Terms:
    """What a run of our own kind does not say in its state, and a recording of it in the metadata of its first weights.

    Attributes:
        order: names of the tensors in the order of results; None is that of their bytes.
        step: with which the weights begin: they have everything in them that came before it.
        update, gain: the rule of a step.
    """

    tiling: Tiling
    arithmetic: Arithmetic
    order: list[str] | None
    step: int = 0
    update: UpdateRule = "sign"
    gain: float = 1.0

    @classmethod
    def of(cls, metadata: Mapping[str, str], names: Collection[str], path: Path) -> _Terms:
        """From the metadata of a file; Psyche's where it has none."""
        if not {"tiling", "arithmetic", "order"} <= metadata.keys():
            return cls("divisor", "psyche", None)
        tiling = next((known for known in get_args(Tiling) if known == metadata["tiling"]), None)
        arithmetic = next((known for known in ARITHMETICS if known == metadata["arithmetic"]), None)
        try:
            order, step = json.loads(metadata["order"]), int(metadata.get("step", "0"))
            gain = float(metadata.get("gain", "1"))
        except ValueError:
            order, step, gain = None, 0, 1.0
        update = next((known for known in UPDATES if known == metadata.get("update", "sign")), None)
        if (
            update is None
            or tiling is None
            or arithmetic is None
            or not isinstance(order, list)
            or set(order) - set(names)
        ):
            raise ModelWeightsError(f"{path} has metadata of another version of distro-optim, or they are damaged")
        return cls(tiling, arithmetic, order, step, update, gain)


def _tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """All tensors of a file by name, and its metadata."""
    try:
        with safe_open(path, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in sorted(file.keys(), key=str.encode)}
            return tensors, dict(file.metadata() or {})
    except (OSError, SafetensorError) as error:
        raise ModelWeightsError(f"{path} cannot be read as safetensors: {one_line(error)}") from error


def _initial(recording: Recording) -> tuple[dict[str, Tensor], _Terms]:
    path = recording.folder / INITIAL_FILE
    weights, metadata = _tensors(path)
    terms = _Terms.of(metadata, weights, path)
    if not recording.as_psyche and terms.order is None:
        raise ConfigurationError(
            f"the run is one of our own kind, and {path.name} does not say in which order and tiles its results are: "
            "take the file that --write-gradients-dir has left",
            name="folder",
            value=recording.folder,
        )
    return weights, terms


def _trained(recording: Recording, weights: Mapping[str, Tensor], count: int) -> list[str]:
    """Names of the tensors that results speak of, in the order of their bytes."""
    names = sorted(weights, key=str.encode)
    if len(names) == count:
        return names
    architecture = recording.state.model.architecture
    if architecture is LLMArchitecture.TORCHTITAN:
        raise ConfigurationError(
            "the run is one of Torchtitan, whose results speak of other tensors than its checkpoints hold",
            name="architecture",
            value=architecture,
        )
    model = build_shapes(read_config(recording.folder, architecture))
    trained = [name for name in sorted_parameters(model) if name in weights]
    if len(trained) != count:
        raise ConfigurationError(
            f"results speak of {count} tensors, {INITIAL_FILE} has {len(names)}, of which {len(trained)} are trained: "
            "they are not of one model",
            name="folder",
            value=recording.folder,
        )
    return trained


def _plan(settings: Distro, params: Sequence[Tensor], terms: _Terms) -> TilePlan:
    specs = [
        ParamSpec(
            tuple(p.shape),
            p.dtype,
            p.device,
            0,
            settings.compression_chunk,
            settings.compression_topk,
            terms.update,
            terms.gain,
        )
        for p in params
    ]
    return make_plan(specs, terms.tiling, arithmetic=terms.arithmetic)


def _read(path: Path, limit: int = MAX_RESULT_BYTES) -> list[SerializedDistroResult]:
    """The parts of a result, one for each tensor.

    Raises:
        InvalidDataError: it is none, or is larger than ``limit``.
    """
    try:
        if path.stat().st_size > limit:
            raise InvalidDataError(f"{path} has {path.stat().st_size} bytes, a result has {limit} at most")
        reader, entries = Reader(path.read_bytes()), []
        while reader.remaining:
            entries.append(decode_distro_result(reader))
    except ProtocolError as error:
        raise InvalidDataError(f"{path} is not a result: {error}") from error
    except OSError as error:
        raise InvalidDataError(f"{path} cannot be read: {error.strerror or error}") from error
    return entries


def _differences(ours: Tensor, theirs: Tensor, near: float | None, name: str) -> tuple[int, int, float]:
    """How many elements differ, how many by more than rounding, and the largest difference.

    Args:
        ours, theirs: of one tensor.
        near: how much is rounding in any case; None: nothing is.
        name: of the tensor.
    """
    if ours.shape != theirs.shape:
        raise ModelWeightsError(f"{name} has shape {tuple(theirs.shape)} in a checkpoint, {tuple(ours.shape)} at first")
    one, other = ours.double(), theirs.double()
    apart = (one - other).abs()
    apart[(one == other) | (one.isnan() & other.isnan())] = 0  # infinities and NaN on both sides
    apart.nan_to_num_(nan=math.inf, posinf=math.inf)
    differ = int((apart > 0).sum())
    if not differ:
        return 0, 0, 0.0
    bound = torch.zeros_like(apart)
    if near is not None and ours.is_floating_point():
        # A float of p bits after the point has units of 2**-p times the power of 2 at or below it.
        power = torch.frexp(torch.maximum(one.abs(), other.abs())).exponent - 1
        bound = torch.ldexp(torch.full_like(apart, _NEAR_ULPS * torch.finfo(ours.dtype).eps), power).clamp_(min=near)
    return differ, int((apart > bound).sum()), float(apart.max())
