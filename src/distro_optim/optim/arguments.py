"""Checks of what a user passes to :class:`~distro_optim.optimizer.DisTrO`.

Every message names the argument, shows its value and says what to do. Values out of range raise ConfigurationError
(a ValueError); a ``params`` that holds no tensors raises TypeError, as in torch.optim.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from numbers import Integral, Real
from typing import Any, Final

import torch
from torch import Tensor, nn
from torch.nn.parameter import UninitializedParameter

from ..comm.exchange import Exchange
from ..compress import UPDATES
from ..errors import ConfigurationError
from .rules import AHEAD, DIRECTIONS, with_defaults
from .sharding import check_sharded, is_sharded

__all__ = [
    "check_choice",
    "check_exchange",
    "check_flag",
    "check_param",
    "check_process_group",
    "check_rate",
    "normal_settings",
    "unique_params",
]

_MAX_CHUNK: Final = 65535
"""Psyche's wire holds the sides of a tile in 16 bits."""

_MAX_TOPK: Final = 1 << 31
"""More than any tile has: positions are held as int32."""

_BELOW_ONE: Final = math.nextafter(1, 0)

TORCH_KEEPS_NAMES: Final = tuple(map(int, torch.__version__.split(".")[:2])) >= (2, 6)
"""Whether ``torch.optim.Optimizer`` takes ``(name, tensor)`` and keeps the names; before 2.6 it refuses them."""

_DTYPES: Final = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def unique_params(params: Iterable[Any]) -> list[Any]:
    """Each tensor once: a tied weight that is listed twice is still one weight. Entries may be named, or groups.

    Names are left out where PyTorch is too old to keep them (:data:`TORCH_KEEPS_NAMES`).

    Raises:
        TypeError: not an iterable of tensors, of ``(name, tensor)`` or of dicts.
        ConfigurationError: there is nothing in it.
    """
    if isinstance(params, nn.Module):
        raise TypeError(f"params is a module, {type(params).__name__}: give module.parameters()")
    if isinstance(params, Tensor):
        raise TypeError("params is a single tensor: give an iterable of tensors, such as [tensor]")
    if not isinstance(params, Iterable):
        raise TypeError(f"params={params!r}: give an iterable of tensors, such as model.parameters()")
    _require_order(params)
    seen: set[int] = set()

    def is_new(item: Any) -> bool:
        if isinstance(item, tuple) and len(item) != 2:
            raise TypeError(f"params holds {item!r}: give tensors, or tuples of name and tensor")
        tensor = item[1] if isinstance(item, tuple) else item
        known = id(tensor) in seen
        seen.add(id(tensor))
        return not known

    entries = list(params)
    if not entries:
        raise ConfigurationError(
            "params is empty: give model.parameters(); a generator can be used only once", name="params", value=entries
        )
    if not isinstance(entries[0], dict):
        return _as_torch_takes_them([e for e in entries if is_new(e)])
    groups = []
    for number, group in enumerate(entries):
        if not isinstance(group, dict) or "params" not in group:
            raise TypeError(f'params[{number}]={group!r}: give a dict with the key "params", as for its neighbours')
        members = group["params"]
        _require_order(members)
        if isinstance(members, nn.Module) or not isinstance(members, Iterable):
            raise TypeError(f'params[{number}]["params"]={members!r}: give tensors, such as module.parameters()')
        members = [members] if isinstance(members, Tensor) else list(members)
        kept = _as_torch_takes_them([m for m in members if is_new(m)])
        # A group of which nothing is left must still say that it had names: torch wants all groups with or without.
        is_named = TORCH_KEEPS_NAMES and bool(members) and isinstance(members[0], tuple)
        names: dict[str, Any] = {"param_names": []} if is_named and not kept else {}
        groups.append({**group, **names, "params": kept})
    return groups


def _as_torch_takes_them(members: list[Any]) -> list[Any]:
    if TORCH_KEEPS_NAMES:
        return members
    return [member[1] if isinstance(member, tuple) else member for member in members]


def _require_order(params: object) -> None:
    if isinstance(params, set | frozenset):
        raise TypeError("params is a set, whose order differs from peer to peer: give a list")


def check_param(param: object) -> None:
    """Checks that ``param`` can be trained.

    Raises:
        TypeError: it is not a tensor.
        ConfigurationError: it is of a kind that cannot be compressed; the message says what to do.
    """
    if not isinstance(param, Tensor):
        raise TypeError(f"params holds {param!r}: give tensors, such as model.parameters()")
    if isinstance(param, UninitializedParameter):
        raise ConfigurationError(
            "params: a parameter of a lazy module has no shape yet: make the optimizer after a forward pass through "
            "the model",
            name="params",
        )
    if param.is_complex():
        raise ConfigurationError(
            f"params: a tensor of {param.dtype} cannot be compressed: use torch.view_as_real on it", name="params"
        )
    if param.dtype not in _DTYPES:
        known = ", ".join(str(d).removeprefix("torch.") for d in _DTYPES)
        raise ConfigurationError(f"params: a tensor of {param.dtype} cannot be trained: use {known}", name="params")
    if param.is_meta:
        raise ConfigurationError(
            "params: a tensor is on the meta device: make the optimizer after model.to_empty(), which puts new "
            "parameters in the place of the old ones",
            name="params",
        )
    if is_sharded(param):
        check_sharded(param)
    if param.layout != torch.strided:
        raise ConfigurationError(
            f"params: a tensor with layout {param.layout} cannot be compressed: use to_dense()", name="params"
        )


def check_choice(name: str, value: object, choices: Sequence[str]) -> None:
    """Raises ConfigurationError unless ``value`` is one of ``choices``."""
    if value not in choices:
        raise ConfigurationError(f"{name}={value!r}: give one of {', '.join(choices)}", name=name, value=value)


def check_flag(name: str, value: object) -> None:
    """Raises ConfigurationError unless ``value`` is a bool: other values would pass as true, a number of bits too."""
    if not isinstance(value, bool):
        raise ConfigurationError(f"{name}={value!r}: give True or False", name=name, value=value)


def check_exchange(value: object) -> None:
    """Raises ConfigurationError unless ``value`` is an Exchange or None."""
    if value is not None and not isinstance(value, Exchange):
        raise ConfigurationError(
            f"exchange={value!r}: give a distro_optim.Exchange, or None for the default process group",
            name="exchange",
            value=value,
        )


def check_process_group(value: object) -> None:
    """Raises ConfigurationError unless ``value`` is a process group that this process is in, or None."""
    if value is None:
        return
    if not torch.distributed.is_available() or not isinstance(value, torch.distributed.ProcessGroup):
        raise ConfigurationError(
            f"process_group={value!r}: give what torch.distributed.new_group() returned to a member of the group, or "
            "None for the default group",
            name="process_group",
            value=value,
        )


def normal_settings(settings: dict[str, Any]) -> dict[str, Any]:
    """The hyper-parameters of a group, as Python numbers (``lr`` may stay a tensor, as in torch.optim).

    Raises:
        ConfigurationError: for the first one that is out of its range.
    """
    check_choice("direction", settings["direction"], DIRECTIONS)
    check_choice("update", settings["update"], UPDATES)
    settings = with_defaults(settings)
    _check_ahead(settings["ahead"], settings["direction"])
    return {
        "direction": settings["direction"],
        "update": settings["update"],
        "ahead": settings["ahead"],
        "gain": float(_number(settings, "gain", math.nextafter(0, 1), math.inf, "give a factor above 0, such as 2")),
        "momentum": float(_number(settings, "momentum", 0, _BELOW_ONE, "give what stays of it, such as 0.95")),
        "lr": _number(settings, "lr", 0, math.inf, "give a learning rate of 0 or more, such as 4e-4"),
        "compression_decay": _number(
            settings,
            "compression_decay",
            math.nextafter(0, 1),
            1,
            "give what is left of the momentum after a step, above 0 and at most 1, such as 0.999",
        ),
        "compression_topk": _count(
            settings,
            "compression_topk",
            _MAX_TOPK,
            "give a whole number of coefficients per tile, at least 1, such as 8",
        ),
        "compression_chunk": _count(
            settings, "compression_chunk", _MAX_CHUNK, f"give the longest side of a tile, from 1 to {_MAX_CHUNK}"
        ),
        "weight_decay": _number(settings, "weight_decay", 0, math.inf, "give 0 or more, such as 0.1"),
    }


def _check_ahead(ahead: object, direction: str) -> None:
    allowed = AHEAD[direction]
    if ahead not in allowed:
        raise ConfigurationError(
            f"ahead={ahead!r}: with direction={direction!r}, give {' or '.join(map(repr, allowed))}, or None for the "
            "first of these",
            name="ahead",
            value=ahead,
        )


def check_rate(value: Any) -> float:
    """A step's learning rate as a number.

    Raises:
        ConfigurationError: it is not a number, or not finite, which would spoil the momentum.
    """
    return float(_number({"lr": value}, "lr", -math.inf, math.inf, "give a finite learning rate, such as 4e-4"))


def _number(settings: dict[str, Any], name: str, low: float, high: float, advice: str) -> float | Tensor:
    given = settings[name]
    value = given.item() if isinstance(given, Tensor) and given.numel() == 1 else given
    # A numpy scalar is a Real too; as it is, torch.load would refuse it in a checkpoint.
    if isinstance(value, bool) or not isinstance(value, Real):
        raise ConfigurationError(f"{name}={given!r}: not a number; {advice}", name=name, value=given)
    plain = float(value)
    if not (math.isfinite(plain) and low <= plain <= high):
        raise ConfigurationError(f"{name}={given!r}: {advice}", name=name, value=given)
    return given if isinstance(given, Tensor) else plain


def _count(settings: dict[str, Any], name: str, high: int, advice: str) -> int:
    value = settings[name]
    if isinstance(value, bool) or not isinstance(value, Integral) or not 1 <= int(value) <= high:
        raise ConfigurationError(f"{name}={value!r}: {advice}", name=name, value=value)
    return int(value)
