"""Gradients on the side: by the user's own loss function, without a trace in the training that goes on.

A peer that audits another one computes gradients between two of its own batches, with its own model object. Nothing of
that may be seen afterwards, or the run of somebody who audits would be another one than that of somebody who does not.
What is kept as it was, bit by bit:

=============================  =======================================================================================
parameters, their gradients,   the audit computes with copies in their places; also where weights are tied, and in
hooks on them                  recurrent networks, which keep a list of their own
buffers                        copies too: statistics of norms, counters
attributes of modules          put back to the objects they were: caches, counters, ``training``; generators to their
                               state
hooks of modules, global ones  set aside, but for those by which torch computes weights (``weight_norm``,
                               ``spectral_norm``, ``prune``): a hook that counts would count the audit
random generators              of torch on every device, of numpy, of Python
autocast                       its state; its cache is not used
=============================  =======================================================================================

Dropout is off while the audit computes, because the peer's masks are unknown; norms compute as in training. What a
loss function does elsewhere (it logs, it appends to a list, it moves a data loader) is not seen from here, and stays.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Final, TypeVar

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.modules import module as torch_module
from torch.nn.modules.dropout import _DropoutNd

from ..errors import ConfigurationError
from .recompute import Gradients

__all__ = ["mean_of", "quiet_gradients", "untouched"]

_Batch = TypeVar("_Batch")

_HOOKS: Final = (
    "_forward_hooks",
    "_forward_pre_hooks",
    "_backward_hooks",
    "_backward_pre_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_pre_hooks_with_kwargs",
    "_forward_hooks_always_called",
)
"""Where a module keeps its hooks, and which of them want what."""

_GLOBAL_HOOKS: Final = (
    "_global_forward_hooks",
    "_global_forward_pre_hooks",
    "_global_backward_hooks",
    "_global_backward_pre_hooks",
    "_global_forward_hooks_with_kwargs",
    "_global_forward_hooks_always_called",
)
"""Where torch keeps those of all modules."""

_MAKES_WEIGHTS: Final = ("torch.nn.utils.",)
"""Where the classes of hooks come from without which a module has no weights."""


def quiet_gradients(
    module: nn.Module,
    parameters: Mapping[str, Tensor],
    loss: Callable[[_Batch], Tensor],
    batches: Sequence[_Batch],
    *,
    weights: Mapping[str, Tensor] | None = None,
    dropout: bool = False,
) -> list[list[Tensor | None]]:
    """Gradients of a loss, one list per batch, in the order of ``parameters``; see the module for what stays.

    Args:
        module: all that computes.
        parameters: of the module, by name; those to have gradients of.
        loss: calls the module on a batch and returns the mean loss, a scalar.
        batches: what ``loss`` takes. Two halves of a batch tell more than the whole (:func:`mean_of` adds them up).
        weights: values to compute with in place of those that the parameters have, by the same names. Others keep
            theirs.
        dropout: leave it on.

    Raises:
        ConfigurationError: a name or a shape is not the module's, or the loss does not depend on the parameters.
    """
    with untouched(module, parameters, weights=weights, dropout=dropout) as copies:
        found: list[list[Tensor | None]] = []
        for batch in batches:
            value = loss(batch)
            if not isinstance(value, Tensor) or value.numel() != 1 or not value.requires_grad:
                raise ConfigurationError(
                    "the loss function of an audit gave no scalar that depends on the model's parameters: it has to "
                    "call the model itself and to return the loss as a tensor",
                    name="loss",
                )
            gradients = torch.autograd.grad(value.sum(), copies, allow_unused=True)
            found.append([None if gradient is None else gradient.detach() for gradient in gradients])
        return found


@torch.no_grad()
def mean_of(parts: Sequence[Gradients], sizes: Sequence[int]) -> list[Tensor | None]:
    """The gradient of a batch from those of its parts, each the mean over so many samples; in new tensors."""
    whole: list[Tensor | None] = [None] * len(parts[0])
    for part, size in zip(parts, sizes, strict=True):
        for number, gradient in enumerate(part):
            if gradient is not None:
                share = gradient.to(torch.promote_types(gradient.dtype, torch.float32)) * (size / sum(sizes))
                before = whole[number]
                whole[number] = share if before is None else before.add_(share)
    return whole


@contextlib.contextmanager
def untouched(
    module: nn.Module,
    parameters: Mapping[str, Tensor],
    *,
    weights: Mapping[str, Tensor] | None = None,
    dropout: bool = False,
) -> Iterator[list[Tensor]]:
    """Inside, the module computes with copies; afterwards everything is as it was.

    Args:
        module, parameters, weights, dropout: as in :func:`quiet_gradients`.

    Yields:
        the copies of ``parameters``, in their order; they require gradients.

    Raises:
        ConfigurationError: a name or a shape is not the module's.
    """
    with contextlib.ExitStack() as stack:
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.enable_grad())
        stack.enter_context(_random_numbers(module))
        stack.enter_context(_autocast({"cpu", *(p.device.type for p in module.parameters())}))
        stack.enter_context(_global_hooks_aside())
        stack.enter_context(_attributes(module))
        _set_hooks_aside(module)
        copies = _copies(module, parameters, weights or {})
        stack.enter_context(_in_place_of(module, copies))
        if not dropout:
            for part in module.modules():
                if isinstance(part, _DropoutNd):
                    part.training = False
        yield [copies[id(parameter)] for parameter in parameters.values()]


# -- inside ------------------------------------------------------------------------------------------------------------


def _copies(
    module: nn.Module, parameters: Mapping[str, Tensor], weights: Mapping[str, Tensor]
) -> dict[int, nn.Parameter]:
    """A copy of every parameter of the module, by the identity of the original; tied ones stay tied."""
    originals = {id(p): p for p in module.parameters()}
    for name, parameter in parameters.items():
        if id(parameter) not in originals:
            raise ConfigurationError(f"{name} is not a parameter of the module that is audited with", name="parameters")
    if unknown := weights.keys() - parameters.keys():
        raise ConfigurationError(f"there is no parameter {min(unknown)} to give weights to", name="weights")
    wanted = {id(parameter) for parameter in parameters.values()}
    copies = {
        key: nn.Parameter(p.detach().clone(), requires_grad=key in wanted or p.requires_grad)
        for key, p in originals.items()
    }
    with torch.no_grad():
        for name, value in weights.items():
            copy = copies[id(parameters[name])]
            if copy.shape != value.shape:
                raise ConfigurationError(
                    f"the weights of {name} have shape {tuple(value.shape)}, the parameter {tuple(copy.shape)}",
                    name="weights",
                )
            copy.copy_(value)
    return copies


@contextlib.contextmanager
def _in_place_of(module: nn.Module, copies: Mapping[int, nn.Parameter]) -> Iterator[None]:
    """The copies, and copies of the buffers, where modules look for their own."""
    # By setattr: modules with a list of their parameters (nn.LSTM) follow it.
    places = [(part, name, p) for part in module.modules() for name, p in part._parameters.items() if p is not None]
    # The lists themselves, whose contents setattr changes and a layer that is compressed anew could miss.
    lists = [
        (value, list(value))
        for part in module.modules()
        if isinstance(value := part.__dict__.get("_flat_weights"), list)
    ]
    buffers = {id(b): b.clone() for b in module.buffers()}
    try:
        for part, name, p in places:
            setattr(part, name, copies[id(p)])
        for part in module.modules():
            part._buffers.update({n: buffers[id(b)] for n, b in part._buffers.items() if b is not None})
        yield
    finally:
        for part, name, p in places:
            part._parameters[name] = p
        for kept, before in lists:
            kept[:] = before


@contextlib.contextmanager
def _attributes(module: nn.Module) -> Iterator[None]:
    """Puts every attribute of every module back to the object that it was, and what modules register."""
    before = [(part, dict(part.__dict__)) for part in module.modules()]
    registered = [
        (content, dict(content)) for part, _ in before for content in (part._parameters, part._buffers, part._modules)
    ]
    try:
        yield
    finally:
        for part, attributes in before:
            part.__dict__.clear()
            part.__dict__.update(attributes)
        for content, entries in registered:
            content.clear()
            content.update(entries)  # type: ignore[arg-type]


def _set_hooks_aside(module: nn.Module) -> None:
    """Leaves those hooks that torch computes weights by; :func:`_attributes` brings the others back."""
    for part in module.modules():
        for name in _HOOKS:
            hooks = part.__dict__.get(name)
            if hooks:
                kept = {key: hook for key, hook in hooks.items() if _makes_weights(part, key)}
                part.__dict__[name] = type(hooks)(kept)


def _makes_weights(part: nn.Module, key: int) -> bool:
    hook = part._forward_pre_hooks.get(key)
    return hook is not None and type(hook).__module__.startswith(_MAKES_WEIGHTS)


@contextlib.contextmanager
def _global_hooks_aside() -> Iterator[None]:
    tables = [table for name in _GLOBAL_HOOKS if (table := getattr(torch_module, name, None)) is not None]
    before = [(table, dict(table)) for table in tables]
    try:
        for table in tables:
            table.clear()
        yield
    finally:
        for table, hooks in before:
            table.clear()
            table.update(hooks)


@contextlib.contextmanager
def _autocast(devices: set[str]) -> Iterator[None]:
    """As it is, without its cache, in which copies would stay; as it was afterwards, whatever the loss turns on."""
    with contextlib.ExitStack() as stack:
        for device in sorted(devices - {"meta"}):
            stack.enter_context(
                torch.autocast(
                    device,
                    dtype=torch.get_autocast_dtype(device),
                    enabled=torch.is_autocast_enabled(device),
                    cache_enabled=False,
                )
            )
        yield


@contextlib.contextmanager
def _random_numbers(module: nn.Module) -> Iterator[None]:
    """Puts back the state of every generator that a loss function is likely to draw from."""
    generators = [g for part in module.modules() for g in part.__dict__.values() if isinstance(g, torch.Generator)]
    states = [(g, g.get_state()) for g in generators]
    cpu = torch.get_rng_state()
    # A device that nobody has used yet has drawn nothing, and asking would start it.
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else None
    # The generator from which scripts draw without naming one.
    numbers = np.random.get_state()  # noqa: NPY002
    # Not imported here: if nobody has imported it, nobody has drawn from it.
    python: Any = sys.modules.get("random")
    drawn = python.getstate() if python is not None else None
    try:
        yield
    finally:
        for generator, state in states:
            generator.set_state(state)
        torch.set_rng_state(cpu)
        if cuda is not None:
            torch.cuda.set_rng_state_all(cuda)
        np.random.set_state(numbers)  # noqa: NPY002
        if python is not None:
            python.setstate(drawn)
