"""A transformers model from its configuration: as shapes on no device, with memory but without values, or fresh.

Names and order. Psyche's clients keep the parameters of a model sorted by the bytes of their names, and everything
that travels is in that order (PsycheFoundation/psyche ``shared/modeling/src/variable.rs``
``StableVarStoreIterator::new``; for models of transformers ``python_causal_lm.rs``
``StablePythonParametersIterator::new``). So ``layers.10`` comes before ``layers.2``, and ``lm_head`` before ``model``.
``named_parameters()`` has the order of construction; :func:`sorted_parameters` is the one to use.

Tied embeddings. Psyche's own models refuse them. Its transformers models lose the tie when they are moved from no
device to one (``hf_transformers.py``, ``to_empty`` makes one tensor for each place): the two are trained apart from
then on, under both names. So it is here.

Types. What is trained and what travels has the type of the run, not the one that transformers prefers. For example,
5.24 makes the router of DeepSeek's experts in float32 whatever it is asked for, and 5.23 does not: such peers would
send different bytes. So each parameter gets its type the moment a module registers it, before it has values; first
weights are drawn in that type as well. Tensors of the state that are not trained follow when the model is complete.
(Psyche's transformers models do it with ``model.to(dtype)``.)

Rotary frequencies are not parameters and not in any file; they are computed when the model is made, and stay float32.
(Psyche's transformers models round them to bfloat16, ``model.to(dtype)`` before ``reinit_rope``; its own do not.)
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Final

import torch
from torch import Tensor, nn

from ..errors import MissingDependencyError, ModelConfigError
from .config import LanguageModelConfig, one_line
from .initialization import initialize
from .native_shapes import check_native_shapes

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = [
    "Shape",
    "build_empty",
    "build_fresh",
    "build_shapes",
    "build_with_buffers",
    "persistent_buffers",
    "sorted_parameters",
    "tied_sources",
]

_BUILDING: Final = threading.RLock()
"""Held while the default type, or what a module does with parameters, is not what it is: both are of all threads, and
two that built at a time would leave each other's behind."""

Shape = tuple[int, ...]


def sorted_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Parameters by name, of any shape, in the order in which Psyche's peers have them: that of their names' bytes."""
    named = dict(model.named_parameters(remove_duplicate=False))
    return {name: named[name] for name in sorted(named, key=str.encode)}


def persistent_buffers(model: nn.Module) -> dict[str, Tensor]:
    """Tensors that belong to a model's state and are not trained, such as the routing bias of DeepSeek's experts."""
    buffers = dict(model.named_buffers(remove_duplicate=False))
    return {name: buffers[name] for name in sorted(model.state_dict().keys() & buffers.keys(), key=str.encode)}


def build_shapes(config: LanguageModelConfig, dtype: torch.dtype = torch.bfloat16) -> PreTrainedModel:
    """The model on the meta device: names and shapes, no memory.

    Raises:
        ModelConfigError: transformers cannot make it, or makes another model than the run's peers have.
    """
    meta = torch.device("meta")
    with meta, _parameters_in(dtype):
        model = _construct(config, dtype)
    return _settled(model, config, meta, dtype)


def build_empty(
    config: LanguageModelConfig,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.bfloat16,
    *,
    parameters: torch.device | str | None = None,
) -> PreTrainedModel:
    """The model on a device, its parameters without values and its buffers computed.

    Args:
        parameters: where they lie, if it is elsewhere: on the meta device they take no memory.

    Raises:
        ModelConfigError: transformers cannot make it, or makes another model than the run's peers have.
    """
    model = build_with_buffers(config, dtype)
    for module in model.modules():
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = buffer.to(device)
    return _settled(model, config, torch.device(device if parameters is None else parameters), dtype)


def build_with_buffers(config: LanguageModelConfig, dtype: torch.dtype = torch.bfloat16) -> PreTrainedModel:
    """The model with its parameters on the meta device, as their modules made them, and its buffers computed.

    Raises:
        ModelConfigError: transformers cannot make it.
    """
    with _parameters_in(dtype, torch.device("meta")):
        return _construct(config, dtype)


def build_fresh(
    config: LanguageModelConfig, seed: int, device: torch.device | str = "cpu", dtype: torch.dtype = torch.bfloat16
) -> PreTrainedModel:
    """The model with its first weights; the same seed gives the same ones on the same kind of device.

    Raises:
        ModelConfigError: transformers cannot make it, or makes another model than the run's peers have.
    """
    if config.is_native:
        model = build_empty(config, device, dtype)
        initialize(model, config, torch.Generator(device=device).manual_seed(seed))
        return model
    with _seeded(seed, torch.device(device)), torch.device(device), _parameters_in(dtype):
        model = _construct(config, dtype)
    return _settled(model, config, torch.device(device), dtype, copy=True)


def tied_sources(model: PreTrainedModel, config: LanguageModelConfig) -> dict[str, str]:
    """For each parameter that a file of the model may lack because it ties its embeddings: the one that stands in."""
    ties = config.source_ties
    if ties is None:
        ties = bool(getattr(type(model.config)(), "tie_word_embeddings", False))
    inputs: Any = model.get_input_embeddings()
    outputs: Any = model.get_output_embeddings()  # type: ignore[no-untyped-call]
    if not ties or inputs is None or outputs is None:
        return {}
    names = {id(p): name for name, p in model.named_parameters(remove_duplicate=False)}
    missing, given = names.get(id(outputs.weight)), names.get(id(inputs.weight))
    return {missing: given} if missing is not None and given is not None and missing != given else {}


def _construct(config: LanguageModelConfig, dtype: torch.dtype) -> PreTrainedModel:
    try:
        from transformers import AutoModelForCausalLM
    except ImportError as error:
        raise MissingDependencyError("language models need transformers: pip install 'transformers>=4.45'") from error
    made = config.to_transformers()
    made.dtype = dtype  # transformers 4.56 and later go by it, earlier ones by the default
    try:
        with _default_dtype(dtype):
            # Without a wish for its attention: transformers takes sdpa then, as AttentionImplementation::default() does
            # (shared/modeling/src/auto_config.rs), and "eager" for families that have nothing else.
            model: PreTrainedModel = AutoModelForCausalLM.from_config(made)  # type: ignore[no-untyped-call]
    except (ModelConfigError, MissingDependencyError):
        raise
    # Sizes that do not fit each other come out as whatever the model's constructor stumbles over.
    except Exception as error:
        raise ModelConfigError(
            f"no model can be made of config.json ({config.model_type}): {one_line(error)}", name="config.json"
        ) from error
    return model


@contextmanager
def _default_dtype(dtype: torch.dtype) -> Iterator[None]:
    with _BUILDING:
        before = torch.get_default_dtype()
        torch.set_default_dtype(dtype)
        try:
            yield
        finally:
            torch.set_default_dtype(before)


@contextmanager
def _seeded(seed: int, device: torch.device) -> Iterator[None]:
    """Random numbers from ``seed`` inside, and as if nothing had been drawn outside."""
    devices = [device] if device.type not in ("cpu", "meta") else []
    with torch.random.fork_rng(devices=devices, device_type=device.type if devices else "cuda"):
        torch.manual_seed(seed)
        yield


@contextmanager
def _parameters_in(dtype: torch.dtype, device: torch.device | None = None) -> Iterator[None]:
    """Parameters made in this thread get a type, and a device if one is given, as soon as a module gets them.

    With the meta device they take no memory, while buffers are computed. ``torch.device("meta")`` would take the
    buffers too, and what they hold is known only to each model's code.
    """
    thread = threading.get_ident()

    def register_as_asked(module: nn.Module, name: str, param: nn.Parameter | None) -> None:
        if param is not None and threading.get_ident() == thread:
            wanted = param.detach().to(device=device, dtype=dtype if param.is_floating_point() else None)
            # A parameter that two modules share must stay one, or the model would not know that they are tied.
            if wanted.dtype != param.dtype or wanted.device != param.device or device is not None:
                param = nn.Parameter(wanted, requires_grad=param.requires_grad)
        register(module, name, param)

    with _BUILDING:
        register = nn.Module.register_parameter
        nn.Module.register_parameter = register_as_asked  # type: ignore[method-assign, assignment]
        try:
            yield
        finally:
            nn.Module.register_parameter = register  # type: ignore[method-assign]


def _settled(
    model: PreTrainedModel,
    config: LanguageModelConfig,
    device: torch.device,
    dtype: torch.dtype,
    *,
    copy: bool = False,
) -> PreTrainedModel:
    """The model with parameters of its own on ``device``, all that travels in ``dtype``, and the shapes of the run."""
    _give_each_its_own(model, device, dtype, copy=copy)
    _cast_persistent_buffers(model, dtype)
    if config.is_native:
        check_native_shapes(config, {name: tuple(p.shape) for name, p in sorted_parameters(model).items()})
    return model


def _give_each_its_own(model: nn.Module, device: torch.device, dtype: torch.dtype, *, copy: bool) -> None:
    """A tensor on ``device`` for every place that has a parameter, also where two had the same one.

    Args:
        dtype: of those that hold floats, also where the model's code put one past the registration.
        copy: keep the values. Otherwise they are undefined.
    """
    seen: set[int] = set()
    for module in model.modules():
        for name, param in module._parameters.items():
            if param is None:
                continue
            wanted = dtype if param.is_floating_point() else param.dtype
            if copy and id(param) not in seen and param.dtype == wanted:
                seen.add(id(param))
                continue
            fresh: Any = (
                param.detach().to(wanted, copy=True) if copy else torch.empty_like(param, device=device, dtype=wanted)
            )
            module._parameters[name] = nn.Parameter(fresh, requires_grad=param.requires_grad)


def _cast_persistent_buffers(model: nn.Module, dtype: torch.dtype) -> None:
    """Peers exchange them with the parameters, so they have the run's type too; others, such as caches, keep theirs."""
    travels = {id(buffer) for buffer in persistent_buffers(model).values() if buffer.is_floating_point()}
    for module in model.modules():
        for name, buffer in module._buffers.items():
            if buffer is not None and id(buffer) in travels:
                module._buffers[name] = buffer.to(dtype)
