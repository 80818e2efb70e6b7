"""Tensors from a folder or from peers into a model: all of them, of the right shapes and types, or none.

Everything is compared before the first value is copied. A folder is read a tensor at a time, from memory-mapped
safetensors; nothing is unpickled.
"""

from __future__ import annotations

import json
import sys
from abc import ABC, abstractmethod
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from typing_extensions import override

from ..errors import ModelWeightsError
from .config import one_line

__all__ = ["FolderTensors", "GivenTensors", "TensorSource", "compare_weights", "copy_weights"]

INDEX_FILE: Final = "model.safetensors.index.json"
SINGLE_FILE: Final = "model.safetensors"
_MAX_INDEX: Final = 64 << 20
"""An index names each tensor and its file: some 150 bytes each, for 100 000 tensors."""

_FLOATS: Final = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32, "F64": torch.float64}
"""Types that weights may have, by their names in safetensors; nobody means it when others are cast."""

_SHOWN: Final = 3
"""Names shown in a message."""


class TensorSource(ABC):
    """Where the weights of a model come from."""

    strict: bool = False
    """Whether tensors that the model does not have are an error."""

    @abstractmethod
    def names(self) -> frozenset[str]:
        """Of all tensors."""

    @abstractmethod
    def describe(self, name: str) -> tuple[tuple[int, ...], str]:
        """Shape and type of a tensor, without reading it."""

    @abstractmethod
    def read(self, name: str) -> Tensor:
        """A tensor, on the CPU."""


class GivenTensors(TensorSource):
    """Tensors in memory, as model sharing delivers them. Values that are not finite are refused."""

    strict = True

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        self._tensors = tensors

    @override
    def names(self) -> frozenset[str]:
        return frozenset(self._tensors)

    @override
    def describe(self, name: str) -> tuple[tuple[int, ...], str]:
        tensor = self._tensors[name]
        known = {dtype: kind for kind, dtype in _FLOATS.items()}
        return tuple(tensor.shape), known.get(tensor.dtype, str(tensor.dtype).removeprefix("torch."))

    @override
    def read(self, name: str) -> Tensor:
        tensor = self._tensors[name].detach()
        if not bool(tensor.isfinite().all()):
            raise ModelWeightsError(f"{name} has values that are not finite")
        return tensor


class FolderTensors(TensorSource):
    """The safetensors of a folder in the layout of Hugging Face.

    ``model.safetensors.index.json`` says what is where; without it, ``model.safetensors``, or all safetensors there
    are.

    Raises:
        ModelWeightsError: there are none, or they cannot be read.
    """

    def __init__(self, folder: Path) -> None:
        self._files: dict[str, Path] = {}
        self._descriptions: dict[str, tuple[tuple[int, ...], str]] = {}
        index = folder / INDEX_FILE
        listed = _weight_map(index) if index.is_file() else None
        for path in sorted({folder / name for name in listed.values()}) if listed is not None else _all_files(folder):
            for name, description in _header(path).items():
                if listed is None or listed.get(name) == path.name:
                    self._files[name], self._descriptions[name] = path, description
        absent = sorted(set(listed or ()) - set(self._files))
        if absent:
            raise ModelWeightsError(
                f"{index} lists {_some(absent)}, which the files do not have: download the folder again"
            )

    @override
    def names(self) -> frozenset[str]:
        return frozenset(self._files)

    @override
    def describe(self, name: str) -> tuple[tuple[int, ...], str]:
        return self._descriptions[name]

    @override
    def read(self, name: str) -> Tensor:
        path = self._files[name]
        try:
            with safe_open(path, framework="pt") as file:
                tensor: Tensor = file.get_tensor(name)
        except (SafetensorError, OSError) as error:
            raise _unreadable(path, error) from error
        return tensor


@torch.no_grad()
def copy_weights(
    targets: Mapping[str, Tensor], source: TensorSource, *, stand_ins: Mapping[str, str] | None = None
) -> None:
    """Fills ``targets`` from ``source``. Each target keeps its type and shape: floats of other types are converted.

    Args:
        targets: the model's tensors by name, of any shapes.
        stand_ins: for a tensor that the source may lack, another whose values it takes.

    Raises:
        ModelWeightsError: a tensor is missing, too many, of another shape, not of a float type, or unreadable.
    """
    origin = compare_weights(targets, source, stand_ins=stand_ins)
    for name, target in targets.items():
        target.copy_(source.read(origin[name]))


def compare_weights(
    targets: Mapping[str, Tensor], source: TensorSource, *, stand_ins: Mapping[str, str] | None = None
) -> dict[str, str]:
    """For each of ``targets`` its name in ``source``, of which nothing is read yet. As :func:`copy_weights`."""
    names = source.names()
    origin = {n: n if n in names else (stand_ins or {}).get(n, n) for n in targets}
    missing = sorted(n for n, o in origin.items() if o not in names)
    extra = sorted(names - set(origin.values())) if source.strict else []
    if missing or extra:
        parts = [f"lack {_some(missing)}"] * bool(missing) + [f"have {_some(extra)} too many"] * bool(extra)
        what = " and ".join(parts) + _hint(missing, names)
        raise ModelWeightsError(f"the weights are not this model's: they {what}{_made_by()}")
    for name, target in targets.items():
        shape, kind = source.describe(origin[name])
        if shape != tuple(target.shape):
            raise ModelWeightsError(
                f"the weights are not this model's: {name} has shape {shape}, by config.json {tuple(target.shape)}"
                + _made_by()
            )
        if target.dtype.is_floating_point and kind not in _FLOATS:
            raise ModelWeightsError(
                f"{name} is stored as {kind}, which cannot be trained: take the weights in bfloat16"
            )
    return origin


def _weight_map(index: Path) -> dict[str, str]:
    try:
        if index.stat().st_size > _MAX_INDEX:
            raise ValueError(f"larger than {_MAX_INDEX} bytes")
        listed: Any = json.loads(index.read_text("utf-8"))["weight_map"]
        if not isinstance(listed, dict):
            raise ValueError("weight_map is not an object")
        for name, file in listed.items():
            # The folder may come from a stranger: no path leads out of it.
            if not isinstance(file, str) or Path(file).name != file or not file.endswith(".safetensors"):
                raise ValueError(f"{name!r} is said to be in {file!r}")
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise _unreadable(index, error) from error
    return listed


def _all_files(folder: Path) -> list[Path]:
    single = folder / SINGLE_FILE
    files = [single] if single.is_file() else sorted(folder.glob("*.safetensors"))
    if not files:
        pickled = sorted(path.name for path in [*folder.glob("*.bin"), *folder.glob("*.pt"), *folder.glob("*.pth")])
        advice = f"; {pickled[0]} is a pickle, which is not read: convert it to safetensors" if pickled else ""
        raise ModelWeightsError(f"no safetensors in {folder}{advice}")
    return files


def _header(path: Path) -> dict[str, tuple[tuple[int, ...], str]]:
    try:
        with safe_open(path, framework="pt") as file:
            slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118 - not a mapping
            return {name: (tuple(part.get_shape()), str(part.get_dtype())) for name, part in slices.items()}
    except (SafetensorError, OSError) as error:
        raise _unreadable(path, error) from error


def _unreadable(path: Path, error: Exception) -> ModelWeightsError:
    if isinstance(error, FileNotFoundError):
        return ModelWeightsError(f"{path} is not there: download the folder again")
    return ModelWeightsError(f"{path} is damaged ({one_line(error)}): download it again")


def _some(names: list[str]) -> str:
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(names[:_SHOWN]) + more


def _made_by() -> str:
    """The version of transformers here, which decides on names and shapes; nothing where it made no model yet."""
    version = getattr(sys.modules.get("transformers"), "__version__", None)
    return f" (here transformers {version} makes the model: all peers need one that makes the same)" if version else ""


def _hint(missing: list[str], names: frozenset[str]) -> str:
    """transformers 5 holds all experts of a layer in one tensor, under a name that no file and no Psyche peer has."""
    if any(name.endswith((".experts.gate_up_proj", ".experts.down_proj")) for name in missing) and any(
        ".experts.0." in name for name in names
    ):
        return "; transformers 5 joins the experts of a layer in one tensor: install transformers<5 for this model"
    return ""
