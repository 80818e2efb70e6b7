"""What a peer must have in common with the others before it trains with them, as text that travels with the model.

The text is the ``config.json`` of model sharing: JSON, in which ours is the entry ``"distro_optim"``. Beside it a
model of transformers has the entries of its own configuration, so that the text serves as its ``config.json`` too.

::

    {"distro_optim": {"format": 2, "version": "0.1.0", "torch": "2.13.0",
                      "epoch": 3, "step": 120, "weights": "<64 hex digits>",
                      "tensors": [["layer.weight", "trained", "float32", [32, 16]], ...],
                      "optimizer": {"tiling": "padded", "transform": "dct", "quantize_1bit": true,
                                    "arithmetic": "exact",
                                    "groups": [{"parameters": 2, "lr": 0.001, "weight_decay": 0.0, ...}]},
                      "data": {"size": 60000, "seed": 123}, "protocols": [1, 1],
                      "machine": {"merge": "<64 hex digits>", "device": "cpu", "torch": "2.13.0", ...}}, ...}
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain
from typing import Any, Final, Literal, get_args

import torch
from torch import Tensor, nn

from ..._version import __version__
from ...errors import ConfigurationError, ModelMismatchError, ProtocolError
from ...optim.rules import PUBLISHED
from ...optimizer import DisTrO
from ...protocol import SILENT, Speaks, common, why_apart
from ...verify.merkle import merkle_root
from ...words import MAX_SHOWN, shown
from ..sample_order import HOW_TO_TAKE_BY_DATA_INDEX
from .machine import FACTS, MAX_FACT, MERGE, explain_difference
from .named_tensors import NamedTensors

__all__ = ["ENTRY", "FORMAT", "ModelIdentity", "TensorIdentity", "describe", "some_names", "weights_root"]

FORMAT: Final = 2
"""Version of the text that travels with a model. Format 1 had SHA-256 where BLAKE3 stands now."""

ENTRY: Final = "distro_optim"
"""Our key in a model's configuration."""

_ROOT_BYTES: Final = 32
"""Of a Merkle root."""

_MAX_INTEGER: Final = 2**64 - 1
"""The largest number in the text: steps are u32 on the wire, dataset sizes and seeds have 64 bits."""

_SHOWN: Final = 3
"""Names of tensors in a message."""

_MAX_NAME: Final = 1024
"""Characters of a tensor's name. Those of large models have some hundred."""

_MAX_SETTINGS: Final = 64
"""Entries of an object of settings. We write a handful."""

_MAX_GROUPS: Final = 65_536
"""Parameter groups; some scripts have one for each tensor."""

Kind = Literal["trained", "frozen", "buffer"]
_KINDS: Final[tuple[str, ...]] = get_args(Kind)

_SHARED_SETTINGS: Final = ("compression_chunk", "compression_topk", "weight_decay")
"""Settings of a parameter group that all peers must have, in the order in which they are compared."""

_MAX_RULE: Final = 32
"""Characters of a rule's name."""

_SAME_KINDS: Final = "freeze and train the same parameters"

_PRIVATE_SETTINGS: Final = ("compression_decay",)
"""Those that may differ: they shape what a peer sends, not what is made of it."""


_ASSUMED_SETTINGS: Final = {"arithmetic": "float"}
"""What counts for peers that do not say it: older versions knew no other arithmetic."""


@dataclass(frozen=True)
class TensorIdentity:
    """A tensor without its values.

    Attributes:
        dtype: as torch writes it, without ``torch.``.
    """

    name: str
    kind: str
    dtype: str
    shape: tuple[int, ...]


@dataclass(frozen=True)
class ModelIdentity:
    """See the module.

    Attributes:
        epoch, step: for which the weights are.
        weights: root over the hashes of trained and frozen tensors, in their order. Not of buffers, which each peer
            counts for itself.
        tensors: trained ones in the optimizer's order, then frozen ones, then buffers.
        settings: of the whole optimizer.
        groups: settings of each parameter group, with its rules where they are other than the published;
            ``lr`` is that of the step, if the script decides it.
        data: size of the dataset and seed of its order, where they are known.
        machine: the self-test of the peer's arithmetic, and what it may depend on; see :mod:`.machine`. Empty where it
            is not said.
        version, torch_version: of this package and of PyTorch.
        protocols: the oldest and the newest that the peer speaks in a run of our own kind; None where it does not say.
    """

    epoch: int
    step: int
    weights: bytes
    tensors: tuple[TensorIdentity, ...]
    settings: Mapping[str, str | bool]
    groups: tuple[Mapping[str, float | int | str], ...]
    data: Mapping[str, int] = field(default_factory=dict)
    machine: Mapping[str, str] = field(default_factory=dict)
    version: str = __version__
    torch_version: str = torch.__version__
    protocols: tuple[int, int] | None = None

    # -- text ----------------------------------------------------------------------------------------------------------

    def encode(self, model: nn.Module | None = None) -> str:
        """The text; with the configuration of ``model``, if it is one of transformers."""
        entry = {
            "format": FORMAT,
            "version": self.version,
            "torch": self.torch_version,
            "epoch": self.epoch,
            "step": self.step,
            "weights": self.weights.hex(),
            "tensors": [[t.name, t.kind, t.dtype, list(t.shape)] for t in self.tensors],
            "optimizer": {**self.settings, "groups": [dict(group) for group in self.groups]},
            "data": dict(self.data),
            "machine": dict(self.machine),
        }
        if self.protocols is not None:
            entry["protocols"] = list(self.protocols)
        return json.dumps({**_transformers_config(model), ENTRY: entry})

    @classmethod
    def decode(cls, text: str) -> ModelIdentity | None:
        """What a peer says; None if it is not of our kind, as Psyche's are not.

        Raises:
            ProtocolError: the text is malformed, or of a format that we do not know.
        """
        try:
            # Python would read NaN, and numbers of any length.
            whole = json.loads(text, parse_constant=_refuse)
        except (ValueError, RecursionError) as error:
            raise ProtocolError(f"the configuration is not JSON: {shown(str(error))}") from None
        if not isinstance(whole, dict):
            raise ProtocolError("the configuration is not a JSON object")
        if ENTRY not in whole:
            return None
        return _decode_entry(_Fields(whole[ENTRY], ENTRY))

    @property
    def speaks(self) -> Speaks:
        """Its version, and the protocols that count for it."""
        return Speaks(*(self.protocols or (SILENT.oldest, SILENT.newest)), self.version)

    # -- comparing -----------------------------------------------------------------------------------------------------

    def first_difference(self, theirs: ModelIdentity) -> ModelMismatchError | None:
        """The first thing that would make our weights differ from those of a run; None if there is none."""
        apart = why_apart(self.speaks, theirs.speaks, us="this machine", them="a peer of the run")
        if apart is not None:
            return ModelMismatchError(apart, what="protocol", ours=self.protocols, theirs=theirs.protocols)
        for what, ours, other, advice in chain(self._compare_tensors(theirs), self._compare_settings(theirs)):
            if ours != other:
                return ModelMismatchError(
                    f"the run trains something else: {what} is {_show(ours)} here and {_show(other)} in the run; "
                    f"{advice}",
                    what=what,
                    ours=ours,
                    theirs=other,
                )
        return None

    def first_other_tensor(self, saved: ModelIdentity) -> str | None:
        """In words, the first tensor that is not as in what was ``saved``; None if all are."""
        for what, ours, other, _ in self._compare_tensors(saved):
            if ours != other:
                return f"{what} is {_show(ours)} in the model and {_show(other)} in the checkpoint"
        return None

    def _compare_tensors(self, theirs: ModelIdentity) -> Iterator[tuple[str, object, object, str]]:
        same_model = "build the same model as the others"
        own, other = [t.name for t in self.tensors], [t.name for t in theirs.tensors]
        if own != other:
            missing = [name for name in other if name not in set(own)]
            extra = [name for name in own if name not in set(other)]
            if missing or extra:
                yield "what only one side has", some_names(extra), some_names(missing), same_model
            yield "number of tensors", len(own), len(other), same_model
            kinds = {t.name: t.kind for t in theirs.tensors}
            for t in self.tensors:  # which also changes their order
                yield f"kind of {t.name}", t.kind, kinds.get(t.name, t.kind), _SAME_KINDS
            place = next(n for n, (a, b) in enumerate(zip(own, other, strict=True)) if a != b)
            yield f"tensor {place}", own[place], other[place], "give the optimizer its parameters in the same order"
        for a, b in zip(self.tensors, theirs.tensors, strict=True):
            yield f"shape of {a.name}", a.shape, b.shape, same_model
            yield f"dtype of {a.name}", a.dtype, b.dtype, "use the same precision for the weights"
            yield f"kind of {a.name}", a.kind, b.kind, _SAME_KINDS

    def _compare_settings(self, theirs: ModelIdentity) -> Iterator[tuple[str, object, object, str]]:
        same_optimizer = "use the same settings of DisTrO as the others"
        for name in sorted({*self.settings, *theirs.settings}):
            assumed = _ASSUMED_SETTINGS.get(name)
            yield name, self.settings.get(name, assumed), theirs.settings.get(name, assumed), same_optimizer
        yield "number of parameter groups", len(self.groups), len(theirs.groups), same_optimizer
        for number, (ours_, theirs_) in enumerate(zip(self.groups, theirs.groups, strict=True)):
            where = f" of parameter group {number}" if len(self.groups) > 1 else ""
            for name in sorted({*ours_, *theirs_} - set(_PRIVATE_SETTINGS)):
                assumed = PUBLISHED.get(name)
                yield (
                    f"{name}{where}",
                    ours_.get(name, assumed),
                    theirs_.get(name, assumed),
                    (
                        f"at step {self.step}: use the same schedule, and let it follow the run (session.follow)"
                        if name == "lr"
                        else same_optimizer
                    ),
                )
        same_data = "use the same dataset as the others"
        for name, what in (("size", "length of the dataset"), ("seed", "seed of the data's order")):
            size_or_seed, other = self.data.get(name), theirs.data.get(name)
            is_one_without = (size_or_seed is None) is not (other is None)
            advice = f"{same_data}; {HOW_TO_TAKE_BY_DATA_INDEX}" if is_one_without else same_data
            yield what, size_or_seed, other, advice

    def harmless_differences(self, theirs: ModelIdentity) -> list[str]:
        """What differs and does not make weights differ, or not for certain; one sentence each."""
        other_steps = explain_difference(self.machine, theirs.machine)
        found = [other_steps] if other_steps is not None else []
        for number, (ours_, theirs_) in enumerate(zip(self.groups, theirs.groups, strict=False)):
            for name in _PRIVATE_SETTINGS:
                if ours_.get(name) != theirs_.get(name):
                    found.append(
                        f"{name} of parameter group {number} is {ours_.get(name)} here and {theirs_.get(name)} in the "
                        "run; that is allowed"
                    )
        if self.version != theirs.version:
            by = common(self.speaks, theirs.speaks)
            found.append(
                f"distro_optim is {self.version} here and {theirs.version} in the run: both speak protocol {by}"
            )
        if self.torch_version != theirs.torch_version and self.settings.get("arithmetic") == "float":
            found.append(
                f"PyTorch is {self.torch_version} here and {theirs.torch_version} in the run: weights may come out "
                "differently, which would be noticed"
            )
        return found


def describe(
    tensors: NamedTensors,
    optimizer: DisTrO,
    *,
    epoch: int,
    step: int,
    weights: bytes,
    script_rates: bool,
    data: Mapping[str, int],
) -> ModelIdentity:
    """The identity of a model and its optimizer as they are now.

    Args:
        weights: see :func:`weights_root`.
        script_rates: the learning rates of the groups are common to all peers.
        data: see :class:`ModelIdentity`.
    """
    kinds: dict[str, Kind] = {
        **dict.fromkeys(tensors.trained, "trained"),
        **dict.fromkeys(tensors.frozen, "frozen"),
        **dict.fromkeys(tensors.buffers, "buffer"),
    }
    own = tensors.all
    names = [*_SHARED_SETTINGS, *_PRIVATE_SETTINGS, *(["lr"] if script_rates else [])]
    return ModelIdentity(
        epoch=epoch,
        step=step,
        weights=weights,
        tensors=tuple(
            TensorIdentity(name, kinds[name], str(tensor.dtype).removeprefix("torch."), tuple(tensor.shape))
            for name, tensor in own.items()
        ),
        settings={
            "tiling": optimizer.tiling,
            "transform": optimizer.transform,
            "quantize_1bit": optimizer.quantize_1bit,
            "arithmetic": optimizer.arithmetic,
        },
        groups=tuple(
            {
                "parameters": len(group["params"]),
                **{name: group[name] for name, published in PUBLISHED.items() if group[name] != published},
                **{name: _plain(group[name]) for name in names},
            }
            for group in optimizer.param_groups
        ),
        data=data,
    )


def weights_root(tensors: NamedTensors, values: Mapping[str, Tensor] | None = None) -> bytes:
    """Root over the hashes of the tensors that are common to all peers; of ``values`` in their place, if given."""
    own = {**tensors.trained, **tensors.frozen}
    if values:
        return merkle_root(tensors.holders.digests_of_values({name: values[name] for name in own}))
    return merkle_root(tensors.holders.digests(own))


def _plain(value: Any) -> float | int:
    number: float | int = value.item() if isinstance(value, Tensor) else value
    return number


def _transformers_config(model: nn.Module | None) -> dict[str, Any]:
    """What ``config.json`` of a model of transformers, or of ours, holds; nothing for other models."""
    config = getattr(model, "config", None)
    to_json = getattr(config, "to_json_string", None) or getattr(config, "to_json", None)
    if to_json is None:
        return {}
    content = json.loads(to_json())
    if not isinstance(content, dict):
        raise ConfigurationError("the model's config does not give a JSON object", name="model")
    return content


def _show(value: object) -> str:
    if value is None:
        return "not set"
    if isinstance(value, tuple):
        return " x ".join(map(str, value)) if value else "a scalar"
    return shown(str(value), 2 * MAX_SHOWN)


def some_names(names: Sequence[str]) -> str:
    """The first names of tensors, and how many more there are."""
    if not names:
        return "nothing"
    first = ", ".join(shown(name) for name in names[:_SHOWN])
    return f"{first} and {len(names) - _SHOWN} more" if len(names) > _SHOWN else first


# -- reading what a stranger wrote -------------------------------------------------------------------------------------


def _refuse(text: str) -> Any:
    raise ValueError(f"{text} is not a number")


class _Fields:
    """A JSON object of known entries; raises ProtocolError where they are not what they should be."""

    def __init__(self, value: object, where: str) -> None:
        if not isinstance(value, dict):
            raise ProtocolError("not an object", field=where)
        self.content: dict[str, object] = value
        self.where = where

    def names(self) -> list[str]:
        """Of all entries, where they are not known in advance."""
        if len(self.content) > _MAX_SETTINGS:
            raise ProtocolError(f"more than {_MAX_SETTINGS} entries", field=self.where)
        return list(self.content)

    def get(self, name: str, *kinds: type) -> Any:
        value = self.content.get(name)
        # A bool is an int to Python.
        if not isinstance(value, kinds) or (isinstance(value, bool) and bool not in kinds):
            raise ProtocolError("missing, or of the wrong type", field=f"{self.where}.{shown(name)}")
        if isinstance(value, int) and not -_MAX_INTEGER <= value <= _MAX_INTEGER:
            raise ProtocolError("out of range", field=f"{self.where}.{shown(name)}")
        return value


def _decode_entry(entry: _Fields) -> ModelIdentity:
    number = entry.get("format", int)
    version = shown(entry.get("version", str))
    if number != FORMAT:
        raise ProtocolError(
            f"the run speaks format {number} (distro_optim {version}), this is format {FORMAT} ({__version__}): "
            "install the same version as the others"
        )
    try:
        root = bytes.fromhex(entry.get("weights", str))
    except ValueError:
        root = b""
    if len(root) != _ROOT_BYTES:
        raise ProtocolError("no hash", field=f"{entry.where}.weights")
    optimizer = _Fields(entry.get("optimizer", dict), "distro_optim.optimizer")
    settings = {shown(name): _setting(optimizer.get(name, str, bool)) for name in optimizer.names() if name != "groups"}
    data = _Fields(entry.get("data", dict), "distro_optim.data")
    tensors = tuple(_decode_tensor(item) for item in entry.get("tensors", list))
    if len({tensor.name for tensor in tensors}) != len(tensors):
        raise ProtocolError("a tensor is described twice", field="distro_optim.tensors")
    return ModelIdentity(
        epoch=entry.get("epoch", int),
        step=entry.get("step", int),
        weights=root,
        tensors=tensors,
        settings=settings,
        groups=_decode_groups(optimizer.get("groups", list)),
        data={shown(name): data.get(name, int) for name in data.names()},
        machine=_decode_machine(entry.content.get("machine", {})),
        version=version,
        protocols=_decode_protocols(entry.content.get("protocols")),
        torch_version=shown(entry.get("torch", str)),
    )


def _decode_protocols(item: object) -> tuple[int, int] | None:
    if item is None:
        return None
    speaks = Speaks.read(item, "")
    return speaks.oldest, speaks.newest


def _setting(value: str | bool) -> str | bool:
    return shown(value) if isinstance(value, str) else value


def _decode_machine(item: object) -> dict[str, str]:
    """What we know of what is said; all of it in words that can be shown."""
    machine = _Fields(item, "distro_optim.machine")
    facts: dict[str, str] = {name: machine.get(name, str) for name in (MERGE, *FACTS) if name in machine.content}
    if not all(len(fact) <= MAX_FACT and fact.isascii() and fact.isprintable() for fact in facts.values()):
        raise ProtocolError("too long, or not printable", field=machine.where)
    return facts


def _decode_tensor(item: object) -> TensorIdentity:
    match item:
        case [str() as name, str() as kind, str() as dtype, list() as shape] if kind in _KINDS:
            if not 0 < len(name) <= _MAX_NAME or not name.isprintable():
                raise ProtocolError("the name of a tensor is too long, or not printable", field="distro_optim.tensors")
            if all(isinstance(n, int) and not isinstance(n, bool) and 0 <= n <= _MAX_INTEGER for n in shape):
                return TensorIdentity(name, kind, shown(dtype), tuple(shape))
    raise ProtocolError("no description of a tensor", field="distro_optim.tensors")


def _decode_groups(items: list[object]) -> tuple[dict[str, float | int | str], ...]:
    if len(items) > _MAX_GROUPS:
        raise ProtocolError(f"more than {_MAX_GROUPS} groups", field="distro_optim.optimizer.groups")
    return tuple(_decode_group(item) for item in items)


def _decode_group(item: object) -> dict[str, float | int | str]:
    group = _Fields(item, "distro_optim.optimizer.groups")
    settings: dict[str, float | int | str] = {shown(name): group.get(name, int, float, str) for name in group.names()}
    for value in settings.values():
        if isinstance(value, str) and not (len(value) <= _MAX_RULE and value.isascii() and value.isprintable()):
            raise ProtocolError("too long, or not printable", field=group.where)
    return settings
