"""A folder in the layout of Hugging Face: written whole, or not at all.

Psyche's clients write the same (PsycheFoundation/psyche ``shared/modeling/src/safetensor_utils.rs``,
``shared/client/src/state/cooldown.rs``): tensors sorted by name, in parts of at most 5 GiB::

    config.json
    model.safetensors                       or, in several parts:
    model-00001-of-00002.safetensors ...    and
    model.safetensors.index.json            {"metadata": {"total_size": bytes}, "weight_map": {tensor: file}}
    tokenizer.json, ...                     where the model came with one

transformers loads it without us. Momentum is not in it, and neither in Psyche.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Final

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from ..errors import ConfigurationError, ModelWeightsError
from .config import CONFIG_FILE, one_line
from .weights import INDEX_FILE

if TYPE_CHECKING:
    from huggingface_hub import StateDictSplit

__all__ = ["COMPANIONS", "MAX_SHARD_BYTES", "save_folder"]

MAX_SHARD_BYTES: Final = 5 << 30
"""``MAX_SAFETENSOR_PART_SIZE`` (``shared/modeling/src/safetensor_utils.rs``)."""

COMPANIONS: Final = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "generation_config.json")
"""Files beside the model that go with it (``shared/client/src/state/init.rs``)."""

_METADATA: Final = {"format": "pt"}
_FILES: Final = "model{suffix}.safetensors"


def save_folder(
    folder: Path,
    tensors: Mapping[str, Tensor],
    config: str,
    companions: Mapping[str, bytes] | None = None,
    *,
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> None:
    """Writes a model beside ``folder`` and puts it in its place, instead of what was there.

    A reader sees the old folder or the new one. (If the machine dies between two renames, neither; the old one is then
    beside it, as ``.NAME.old-*``.)

    Args:
        tensors: on any device; a part at a time is copied to the CPU.
        config: text of ``config.json``.
        companions: other files by name.
        max_shard_bytes: size of a part's tensors at most.

    Raises:
        ModelWeightsError: it cannot be written; what was there is untouched.
        ConfigurationError: a tensor is larger than ``max_shard_bytes``.
    """
    split = _split(tensors, max_shard_bytes)
    folder = folder.absolute()
    if folder.exists() and not folder.is_dir():
        raise ModelWeightsError(f"{folder} is a file: give a folder to save the model in")
    scratch: Path | None = None
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        scratch = Path(tempfile.mkdtemp(prefix=f".{folder.name}.new-", dir=folder.parent))
        _write_parts(scratch, split, tensors)
        for name, content in {CONFIG_FILE: config.encode(), **(companions or {})}.items():
            (scratch / name).write_bytes(content)
        for path in scratch.iterdir():
            _sync(path)
        _sync(scratch)
        scratch.chmod(0o777 & ~_umask())
        _swap(scratch, folder)
    except (OSError, SafetensorError) as error:
        raise ModelWeightsError(
            f"the model cannot be saved in {folder} ({one_line(error)}): make room, or give another folder"
        ) from error
    finally:
        if scratch is not None:
            shutil.rmtree(scratch, ignore_errors=True)


def _split(tensors: Mapping[str, Tensor], limit: int) -> StateDictSplit:
    """Which tensor goes into which file, in the order of their names."""
    from huggingface_hub import split_torch_state_dict_into_shards

    ordered = {name: tensors[name] for name in sorted(tensors, key=str.encode)}
    for name, tensor in ordered.items():
        if tensor.nbytes > limit:
            raise ConfigurationError(
                f"{name} takes {tensor.nbytes} bytes, max_shard_bytes is {limit}: give at least as much",
                name="max_shard_bytes",
                value=limit,
            )
    # Shapes alone: tensors that share memory would be kept together, and each is written as a copy of its own.
    shapes = {name: torch.empty_like(tensor, device="meta") for name, tensor in ordered.items()}
    return split_torch_state_dict_into_shards(shapes, filename_pattern=_FILES, max_shard_size=limit)


def _write_parts(folder: Path, split: StateDictSplit, tensors: Mapping[str, Tensor]) -> None:
    for file, names in split.filename_to_tensors.items():
        # A copy of each: safetensors wants no two that share memory, and the model may train on.
        on_cpu = {n: tensors[n].detach().to("cpu", copy=True, memory_format=torch.contiguous_format) for n in names}
        save_file(on_cpu, folder / file, metadata=dict(_METADATA))
    if split.is_sharded:
        index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
        (folder / INDEX_FILE).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n", "utf-8")


def _swap(new: Path, folder: Path) -> None:
    if not folder.exists():
        new.rename(folder)
    else:
        old = Path(tempfile.mkdtemp(prefix=f".{folder.name}.old-", dir=folder.parent))
        old.rmdir()  # only its name was wanted
        folder.rename(old)
        try:
            new.rename(folder)
        except OSError:
            old.rename(folder)
            raise
        shutil.rmtree(old, ignore_errors=True)
    _sync(folder.parent)


def _sync(path: Path) -> None:
    """To the disk, where the system can: Windows does not open folders, and syncs only what is open for writing."""
    try:
        handle = os.open(path, os.O_RDWR if os.name == "nt" else os.O_RDONLY)
    except OSError:
        if path.is_dir():
            return
        raise
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _umask() -> int:
    current = os.umask(0)
    os.umask(current)
    return current
