"""Checkpoints of a run: one folder for each saved step, whole or not there at all.

::

    step-00000120/
        model.safetensors      weights and buffers (a model of transformers: as save_pretrained writes it,
                               config.json and shards included)
        momentum.safetensors   this peer's own momentum, by parameter; no other peer has the same
        run.toml               the coordinator's state, in the form of ``distro_optim.coordinator.formats.text``
        distro_optim.json      run, step, hash of the weights, what the tensors are; written last

In a run of Psyche's the folder is called as Psyche's client calls it, ``{run_id}-step119`` for the same weights: it
names the last step that is in them, we the one that comes next. Either name is found when a run is resumed.

Nothing of this package is needed to use the weights: ``safetensors.torch.load_model(model, ".../model.safetensors")``,
or ``from_pretrained(".../step-00000120")``.

A folder is written under another name, its files are synced, and then it gets its name: a process that is killed in the
middle, or runs out of disk, leaves the checkpoints before as they were.
"""

from __future__ import annotations

import json
import logging
import os
import re
import shutil
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from ..._version import __version__
from ...coordinator.formats.text import to_toml
from ...coordinator.rules.checkpoints import is_run_of_psyche
from ...coordinator.server.store import read_state_file
from ...coordinator.types import Coordinator
from ...errors import ConfigurationError, ModelWeightsError, ProtocolError
from ...models.locations import checkpoint_folder
from ...optim.sharding import is_sharded
from ...verify.calibrate import MAX_BYTES as LIMITS_BYTES
from ...verify.calibrate import Limits
from ...words import shown
from .identity import ENTRY, FORMAT, ModelIdentity
from .named_tensors import NamedTensors, plain_name

__all__ = ["Checkpoint", "CheckpointStore"]

# Files of a checkpoint.
_MODEL: Final = "model.safetensors"
_INDEX: Final = "model.safetensors.index.json"
_MOMENTUM: Final = "momentum.safetensors"
_RUN: Final = "run.toml"
_ABOUT: Final = "distro_optim.json"

_METADATA: Final = {"format": "pt"}
"""As the Hugging Face libraries expect it."""

_NAME: Final = re.compile(r"step-(\d{8,10})")
"""Of a checkpoint's folder: the step that comes next."""

_PSYCHES_NAME: Final = re.compile(r"(?!\.).+-step(\d{1,10})", re.DOTALL)
"""The same in a run of Psyche's: the last step (``shared/client/src/state/cooldown.rs``). None is hidden: what we have
not finished is."""

AUDIT_LIMITS: Final = "audit-limits.json"
"""In the folder of a checkpoint, as ``distro-optim verify --limits`` reads them, too."""

_UNFINISHED: Final = ".unfinished-"
"""What the name of a folder begins with while it is written."""

_REPLACED: Final = ".replaced-"
"""What the name of a folder begins with that another one takes the place of."""

MAX_JSON_BYTES: Final = 64 * 1024 * 1024
"""A description of a hundred thousand tensors has about ten megabytes."""

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Checkpoint:
    """A saved step.

    Attributes:
        run_id: the run.
        identity: of the model; its step is the run's next.
        state: of the coordinator; None if it was not known.
    """

    path: Path
    run_id: str
    identity: ModelIdentity
    state: Coordinator | None

    @property
    def step(self) -> int:
        """The run's step that comes next."""
        return self.identity.step

    def weights(self, model: nn.Module, tensors: NamedTensors) -> dict[str, Tensor]:
        """The saved values of ``tensors``, by their names.

        Raises:
            ConfigurationError: the files are damaged, or a tensor is missing.
        """
        saved = _read_tensors(self._model_files())
        aliases: dict[int, list[str]] = {}
        for name, tensor in [*model.named_parameters(remove_duplicate=False), *model.named_buffers()]:
            aliases.setdefault(id(tensor), []).append(plain_name(name))
        values = {}
        for name, tensor in tensors.all.items():
            # Of a tensor with several names, each library keeps the one it likes.
            found = next((alias for alias in aliases.get(id(tensor), [name]) if alias in saved), None)
            if found is None:
                raise ConfigurationError(f"{self.path} has no tensor {name}: it is of another model", name="resume")
            values[name] = saved[found]
        return values

    def momentum(self) -> dict[str, Tensor]:
        """This peer's momentum by parameter.

        Raises:
            ConfigurationError: the file is damaged.
        """
        return _read_tensors([self.path / _MOMENTUM])

    def audit_limits(self) -> Limits | None:
        """By which momenta were judged in the run; None if it had learnt none, or they cannot be read: it learns them
        anew then."""
        path = self.path / AUDIT_LIMITS
        try:
            return Limits.decode(path.read_bytes()) if path.stat().st_size <= LIMITS_BYTES else None
        except (OSError, ProtocolError):
            return None

    def _model_files(self) -> list[Path]:
        index = self.path / _INDEX
        if not index.exists():
            return [self.path / _MODEL]
        weight_map = _read_json(index).get("weight_map")
        if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
            raise ConfigurationError(f"{index} is damaged", name="resume", value=index)
        return [self.path / Path(name).name for name in sorted(set(weight_map.values()))]


class CheckpointStore:
    """The checkpoints in one folder, which belongs to one peer.

    Args:
        directory: made if it is not there.
        keep: how many stay.
        keep_every: besides, of each so many steps the first one stays for good; None keeps no more than ``keep``.
        held: whether somebody needs a folder for the moment, so that it stays until a later save.
        writes: False for a process that only reads what another one saves, and puts nothing right.

    Raises:
        ConfigurationError: the folder cannot be written to.
    """

    def __init__(
        self,
        directory: str | os.PathLike[str],
        *,
        keep: int = 3,
        keep_every: int | None = None,
        held: Callable[[Path], bool] | None = None,
        writes: bool = True,
    ) -> None:
        for name, value in (("keep_checkpoints", keep), ("keep_every", keep_every)):
            if value is None and name == "keep_every":
                continue
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ConfigurationError(f"{name}={value!r}: give a whole number of at least 1", name=name, value=value)
        self.directory = Path(directory)
        self._keep = keep
        self._keep_every = keep_every
        self._held = held
        if not writes:
            return
        try:
            self.directory.mkdir(parents=True, exist_ok=True)
            probe = self.directory / f"{_UNFINISHED}{os.getpid()}"
            probe.mkdir(exist_ok=True)
            probe.rmdir()
        except OSError as error:
            raise ConfigurationError(
                f"checkpoints cannot be saved in {directory}: {error.strerror or error}; name a folder that can be "
                "written",
                name="checkpoint_dir",
                value=directory,
            ) from None
        self._clean_up()

    def _clean_up(self) -> None:
        """Puts right what a process left that was killed while it wrote."""
        for leftover in self.directory.glob(f"{_UNFINISHED}*"):
            shutil.rmtree(leftover, ignore_errors=True)
        for replaced in self.directory.glob(f"{_REPLACED}*"):
            place = self.directory / replaced.name.removeprefix(_REPLACED)
            if place.exists():
                shutil.rmtree(replaced, ignore_errors=True)
            else:
                os.replace(replaced, place)

    def saved(self) -> list[Path]:
        """Folders of the saved steps, the latest last."""
        steps = {path: step for path in self.directory.iterdir() if (step := _step_of(path)) is not None}
        return sorted(steps, key=lambda path: (steps[path], path.name))

    def latest(self) -> Checkpoint | None:
        """The latest saved step; None if there is none.

        Raises:
            ConfigurationError: it is damaged. Nothing older is taken in its place unasked.
        """
        saved = self.saved()
        return _read_checkpoint(saved[-1]) if saved else None

    def of_step(self, step: int, run_id: str) -> Checkpoint | None:
        """The one of this step of a run; None if there is none.

        Raises:
            ConfigurationError: it is damaged.
        """
        for path in (self._path_of(step, run_id, as_psyche=True), self._path_of(step, run_id, as_psyche=False)):
            if path.is_dir() and _step_of(path) == step:
                checkpoint = _read_checkpoint(path)
                if checkpoint.run_id == run_id:
                    return checkpoint
        return None

    def _path_of(self, step: int, run_id: str, *, as_psyche: bool) -> Path:
        """Where a step of a run is saved."""
        if as_psyche and not run_id.startswith("."):
            try:
                return checkpoint_folder(self.directory, run_id, step - 1)
            except ModelWeightsError:
                pass  # runs are named by strangers, and not every name can be that of a folder
        return self.directory / f"step-{step:08}"

    def save(
        self,
        model: nn.Module,
        values: Mapping[str, Tensor],
        momentum: Mapping[str, Tensor],
        *,
        run_id: str,
        identity: ModelIdentity,
        state: Coordinator | None,
        audit_limits: Limits | None = None,
    ) -> Path:
        """Saves a step; what was saved of the same step before is replaced.

        Args:
            model: writes its own files if it has ``save_pretrained``; its values must be ``values`` then. Where it is
            sharded, it is given ``values`` as its ``state_dict``.
            values: of all tensors by name, on the CPU.
            momentum: by parameter, on the CPU.
            run_id, identity, state: see :class:`Checkpoint`.
            audit_limits: by which momenta are judged; None if nobody has learnt any.

        Raises:
            OSError: it could not be written; what was saved before is untouched.
        """
        as_psyche = state is not None and is_run_of_psyche(state)
        path = self._path_of(identity.step, run_id, as_psyche=as_psyche)
        unfinished = self.directory / f"{_UNFINISHED}{os.getpid()}-{identity.step}"
        try:
            unfinished.mkdir()
            _write_model(unfinished, model, values)
            _save_tensors(momentum, unfinished / _MOMENTUM)
            if state is not None:
                (unfinished / _RUN).write_text(to_toml(state), encoding="utf-8")
            if audit_limits is not None:
                (unfinished / AUDIT_LIMITS).write_bytes(audit_limits.encode())
            about = {"run_id": run_id, "model": json.loads(identity.encode())}
            (unfinished / _ABOUT).write_text(json.dumps(about), encoding="utf-8")
            for file in unfinished.iterdir():
                _sync(file)
            _sync(unfinished)
            self._put_in_place(unfinished, path)
        except BaseException:
            shutil.rmtree(unfinished, ignore_errors=True)
            raise
        self._rotate(identity.step)
        return path

    def _rotate(self, step: int) -> None:
        """Removes what need not stay, of those up to ``step``."""
        # Not those of a later step: somebody went back on purpose, and may want them.
        older = [(path, at) for path in self.saved() if (at := _step_of(path) or 0) <= step]
        seen: set[int] = set()
        for path, at in older[: -self._keep]:
            if self._keep_every is not None and at // self._keep_every not in seen:
                seen.add(at // self._keep_every)
                continue
            if self._held is None or not self._held(path):
                shutil.rmtree(path, ignore_errors=True)

    def _put_in_place(self, unfinished: Path, path: Path) -> None:
        # No system moves a folder onto one that is not empty.
        replaced = self.directory / f"{_REPLACED}{path.name}"
        if path.exists():
            os.replace(path, replaced)
        os.replace(unfinished, path)
        _sync(self.directory)
        shutil.rmtree(replaced, ignore_errors=True)


def _step_of(path: Path) -> int | None:
    """The step that comes next after a folder's weights; None if it is not one of ours."""
    if (match := _NAME.fullmatch(path.name)) is not None:
        return int(match[1])
    match = _PSYCHES_NAME.fullmatch(path.name)
    # One that Psyche's client wrote has no momentum, and nothing that says what it is.
    return int(match[1]) + 1 if match is not None and (path / _ABOUT).is_file() else None


def _write_model(folder: Path, model: nn.Module, values: Mapping[str, Tensor]) -> None:
    plain = getattr(model, "_orig_mod", model)
    save_pretrained = getattr(plain, "save_pretrained", None)
    if save_pretrained is None:
        _save_tensors(values, folder / _MODEL)
        return
    # Shards of a model are not what is to be saved.
    whole: dict[str, Any] = {"state_dict": dict(values)} if any(map(is_sharded, plain.parameters())) else {}
    try:
        save_pretrained(folder, **whole)
    except SafetensorError as error:
        raise OSError(str(error)) from error


def _save_tensors(values: Mapping[str, Tensor], path: Path) -> None:
    try:
        save_file(dict(values), path, metadata=_METADATA)
    except SafetensorError as error:  # as this a full disk arrives
        raise OSError(str(error)) from error


def _read_checkpoint(path: Path) -> Checkpoint:
    about = _read_json(path / _ABOUT)
    run_id, model = about.get("run_id"), about.get("model")
    _check_format(path, model)
    try:
        identity = ModelIdentity.decode(json.dumps(model))
    except ProtocolError as error:
        raise ConfigurationError(f"{path / _ABOUT} is damaged: {error}", name="resume", value=path) from None
    if identity is None or not isinstance(run_id, str):
        raise ConfigurationError(
            f"{path / _ABOUT} is damaged; remove the folder to resume from the checkpoint before", name="resume"
        )
    run = path / _RUN
    return Checkpoint(path, run_id, identity, read_state_file(run) if run.exists() else None)


def _check_format(path: Path, model: object) -> None:
    """Raises ConfigurationError if another version of this package has saved it, and in another form."""
    entry = model.get(ENTRY) if isinstance(model, dict) else None
    if not isinstance(entry, dict) or not isinstance(entry.get("format"), int) or entry["format"] == FORMAT:
        return  # whatever else is wrong is damage
    raise ConfigurationError(
        f"{path} was saved by distro_optim {shown(str(entry.get('version')))} in format {entry['format']}, and "
        f"distro_optim {__version__} reads format {FORMAT}: go on with that version, or load {_MODEL} from there into "
        "the model, leave out resume, and begin a run with these weights",
        name="resume",
        value=path,
    )


def _read_json(path: Path) -> dict[str, Any]:
    try:
        if path.stat().st_size > MAX_JSON_BYTES:
            raise ValueError(f"more than {MAX_JSON_BYTES} bytes")
        content = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(content, dict):
            raise ValueError("not a JSON object")
    except (OSError, ValueError, RecursionError) as error:
        raise ConfigurationError(
            f"{path} cannot be read: {error}; remove the folder to resume from the checkpoint before",
            name="resume",
            value=path,
        ) from None
    return content


def _read_tensors(paths: Iterable[Path]) -> dict[str, Tensor]:
    values: dict[str, Tensor] = {}
    for path in paths:
        try:
            with safe_open(path, framework="pt") as file:
                values.update({plain_name(name): file.get_tensor(name) for name in file.keys()})  # noqa: SIM118
        except (OSError, SafetensorError) as error:
            raise ConfigurationError(
                f"{path} cannot be read: {error}; remove the folder to resume from the checkpoint before",
                name="resume",
                value=path,
            ) from None
    return values


def _sync(path: Path) -> None:
    """Makes what was written last through a power cut; where folders cannot be synced, the system sees to it."""
    if os.name == "nt" and path.is_dir():
        return
    # Windows syncs only what was opened for writing; elsewhere a folder cannot be opened so.
    handle = os.open(path, os.O_RDWR if os.name == "nt" else os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
