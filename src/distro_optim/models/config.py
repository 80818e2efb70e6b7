"""``config.json`` of a language model: checked, and in a form that Psyche's clients and transformers both read.

Psyche's own Llama and DeepSeek read few fields, want some of them to be there, and pass on others than transformers
does (PsycheFoundation/psyche ``shared/modeling/src/models/llama.rs``, ``deepseek.rs``):

- A client that got its model from peers sends a ``config.json`` without ``model_type``, and with null for what it
  does not have. The architecture of the run says what it is.
- transformers 5 writes ``rope_parameters``. Psyche reads ``rope_theta`` and ``rope_scaling``, and takes another
  theta, or stops, where they are not there. So does transformers 4. We write those two, which all understand.
- A DeepSeek-V3 without experts, such as Consilience, has no ``n_routed_experts``. transformers would give it 256, and
  knows "no experts" only as ``first_k_dense_replace = num_hidden_layers``. Psyche accepts that too.

``config.json`` may come from a stranger: no value makes us run code, fetch anything, or build without end.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from ..coordinator.model import LLMArchitecture
from ..errors import ModelConfigError
from .strangers import OUR_ENTRY, check_strangers_config, is_base, is_ordinary
from .trial import try_to_build

if TYPE_CHECKING:
    from transformers import PretrainedConfig

__all__ = ["ConfigSource", "LanguageModelConfig", "packaged_configs", "read_config"]

ConfigSource = Mapping[str, Any] | str | Path
"""A mapping, JSON text, a path of a file or folder, or the name of a packaged config."""

CONFIG_FILE: Final = "config.json"
_MAX_TEXT: Final = 4 << 20
"""Text of a config.json that is read at most; that of a model of thousands of experts has some 10 kB."""

_MAX_SIZE: Final = 1 << 30
"""Bound of any integer, chosen so that the product of two does not overflow; what is too large for the memory is found
out without allocating it."""

# Modules are made before the first shape is known, so their number is bounded apart: several times as many layers as
# any known model has, and as many experts of all layers as there may be names of parameters from a peer.
_MAX_LAYERS: Final = 1024
_MAX_EXPERTS: Final = 100_000

_UNSAFE: Final = ("auto_map", "attn_implementation", "experts_implementation", "use_kernels", "backbone")
"""Where code, kernels or other repositories are named, and notes of a transformers process to itself."""

_SPECIAL: Final = "__float__"
_SPECIAL_FLOATS: Final = {"Infinity": float("inf"), "-Infinity": float("-inf"), "NaN": float("nan")}
"""How transformers 5 writes numbers that JSON does not have (``_encode_special_floats``): limits of Mamba's steps."""

_NATIVE_TYPES: Final = {LLMArchitecture.HF_LLAMA: "llama", LLMArchitecture.HF_DEEPSEEK: "deepseek_v3"}
_CLASSES: Final = {LLMArchitecture.HF_LLAMA: "LlamaForCausalLM", LLMArchitecture.HF_DEEPSEEK: "DeepseekV3ForCausalLM"}
_SIZES: Final = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
_MLA_SIZES: Final = ("kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim")
_EXPERTS: Final = ("n_routed_experts", "num_local_experts", "num_experts")
_MOE_ONLY: Final = (
    *_EXPERTS,
    "n_shared_experts",
    "num_experts_per_tok",
    "moe_intermediate_size",
    "moe_layer_freq",
    "n_group",
    "topk_group",
    "norm_topk_prob",
    "routed_scaling_factor",
    "scoring_func",
    "topk_method",
)
"""Without experts these say nothing, and transformers does not accept null for some of them."""

_DEFAULT_ROPE_THETA: Final = 10_000.0
"""``default_rope`` (shared/modeling/src/models/llama.rs), and transformers' default."""

_DEFAULT_POSITIONS: Final = 2048
"""Transformers' default of PretrainedConfig.max_position_embeddings for Llama."""


@dataclass(frozen=True)
class LanguageModelConfig:
    """A model's ``config.json``; made by :func:`read_config`.

    Attributes:
        architecture: of the run. ``HF_LLAMA`` and ``HF_DEEPSEEK`` are models of Psyche itself, ``HF_AUTO`` is any
            causal language model of transformers.
        values: what is in the file. Tied embeddings are untied.
        source_ties: whether the source tied its embeddings, so that its weights may lack those of the output; None
            where it does not say, and transformers' default for the model counts.
    """

    architecture: LLMArchitecture
    values: Mapping[str, Any]
    source_ties: bool | None = False

    @cached_property
    def vocab_size(self) -> int:
        """Tokens that the model knows.

        Raises:
            ModelConfigError: neither the file nor transformers says so.
        """
        size = self.values.get("vocab_size")
        if not _is_int(size):  # under another name, in a model within the model, or left to the default
            size = getattr(self.to_transformers().get_text_config(), "vocab_size", None)
        if not isinstance(size, int):
            raise ModelConfigError(f"{CONFIG_FILE} has no vocab_size: add it", name="vocab_size", value=size)
        return size

    @property
    def model_type(self) -> str:
        """The kind of model, by its name in transformers."""
        return str(self.values["model_type"])

    @property
    def is_native(self) -> bool:
        """Whether Psyche's peers run it on their own implementation, not on transformers."""
        return self.architecture in _NATIVE_TYPES

    def to_json(self) -> str:
        """Text for ``config.json``, and for peers."""
        return json.dumps(dict(self.values), indent=2, sort_keys=True) + "\n"

    def to_transformers(self) -> PretrainedConfig:
        """As transformers has it.

        Raises:
            ModelConfigError: transformers does not accept it.
        """
        import transformers
        from transformers.models.auto.configuration_auto import CONFIG_MAPPING
        from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

        if self.model_type not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES or self.model_type not in CONFIG_MAPPING:
            raise ModelConfigError(
                f"transformers {transformers.__version__} has no causal language model of model_type "
                f"{self.model_type!r}: install a version that has it",
                name="model_type",
                value=self.model_type,
            )
        try:
            made: PretrainedConfig = CONFIG_MAPPING[self.model_type].from_dict(self._for_transformers())
        # Each version and each model has its own: TypeError, ValueError, KeyError, errors of dataclasses.
        except Exception as error:
            raise ModelConfigError(
                f"transformers {transformers.__version__} does not accept {CONFIG_FILE}: {one_line(error)}",
                name=CONFIG_FILE,
            ) from error
        return made

    def _for_transformers(self) -> dict[str, Any]:
        values = {key: _special(value) for key, value in self.values.items() if key != "torch_dtype"}
        if not self.is_native:
            return values
        kept = {key: value for key, value in values.items() if value is not None}
        if self.architecture is LLMArchitecture.HF_LLAMA:
            return kept
        heads = values["num_attention_heads"]
        # Null is a value here: queries without compression.
        rank = {"q_lora_rank": values.get("q_lora_rank")}
        return {**kept, **rank, "num_key_value_heads": heads, "num_nextn_predict_layers": 0}


def read_config(
    source: ConfigSource,
    architecture: LLMArchitecture | str = LLMArchitecture.HF_AUTO,
    *,
    max_seq_len: int | None = None,
    from_peer: bool = False,
) -> LanguageModelConfig:
    """Reads and checks a model's configuration.

    Args:
        source: see :data:`ConfigSource`.
        architecture: of the run; ``"HfLlama"``, ``"HfDeepseek"`` or ``"HfAuto"``.
        max_seq_len: tokens of a sequence, where the run says so.
        from_peer: bounds everything as :mod:`.strangers` does, and tries what that is not enough for as :mod:`.trial`
            does, which takes some seconds.

    Raises:
        ModelConfigError: there is none, or no model can be made of it, or Psyche's peers would make another one.
    """
    kind = _architecture(architecture)
    values: dict[str, Any] = _without_code(_mapping(source))
    model_type = values.get("model_type") or _NATIVE_TYPES.get(kind)
    if not isinstance(model_type, str):
        raise ModelConfigError(f"{CONFIG_FILE} has no model_type, which HfAuto goes by: add it", name="model_type")
    if model_type != _NATIVE_TYPES.get(kind, model_type):
        raise ModelConfigError(
            f"{CONFIG_FILE} describes a {model_type!r}, an {kind.value} run trains a {_NATIVE_TYPES[kind]!r}: give the "
            "model of the run, or use HfAuto in a run of your own",
            name="model_type",
            value=model_type,
        )
    if values.get("quantization_config"):
        raise ModelConfigError(
            "the model is quantized and cannot be trained: take the unquantized one", name="quantization_config"
        )
    values["model_type"] = model_type
    values = _with_classic_rope(values)
    if max_seq_len is not None:
        values["max_position_embeddings"] = max_seq_len
    if from_peer:
        values.pop(OUR_ENTRY, None)
        check_strangers_config(values)
    _check_sizes(values)
    if kind is LLMArchitecture.HF_LLAMA:
        values = _llama(values)
    elif kind is LLMArchitecture.HF_DEEPSEEK:
        values = _deepseek(values)
    # What transformers 4 and 5 both read; the weights of a run are bfloat16.
    values.pop("dtype", None)
    values["torch_dtype"] = "bfloat16"
    ties = values.get("tie_word_embeddings")
    if kind in _NATIVE_TYPES and ties:
        raise ModelConfigError(
            f"the model ties its embeddings, which Psyche's {kind.value} refuses: set tie_word_embeddings to false and "
            "give lm_head.weight",
            name="tie_word_embeddings",
            value=True,
        )
    values["tie_word_embeddings"] = False
    config = LanguageModelConfig(kind, values, None if ties is None and kind not in _NATIVE_TYPES else bool(ties))
    if from_peer and not is_ordinary(values):
        try_to_build(config.to_json(), kind.value)
    return config


def packaged_configs() -> tuple[str, ...]:
    """Names of the configs that come with the package, for :func:`read_config`."""
    folder = resources.files(__package__) / "configs"
    return tuple(sorted(entry.name.removesuffix(".json") for entry in folder.iterdir() if entry.name.endswith(".json")))


def one_line(error: object) -> str:
    """What an error says, for our own messages: bounded, without line ends."""
    return " ".join(str(error).split())[:300] or type(error).__name__


def _architecture(architecture: LLMArchitecture | str) -> LLMArchitecture:
    names = [kind.value for kind in LLMArchitecture if kind is not LLMArchitecture.TORCHTITAN]
    try:
        kind = LLMArchitecture(architecture)
    except ValueError:
        raise ModelConfigError(
            f"architecture={architecture!r}: give one of {', '.join(names)}", name="architecture", value=architecture
        ) from None
    if kind is LLMArchitecture.TORCHTITAN:
        raise ModelConfigError(
            "the run trains with Torchtitan, whose parameters have names and shapes of their own: not supported; join "
            f"a run of {', '.join(names)}",
            name="architecture",
            value=kind.value,
        )
    return kind


def _mapping(source: ConfigSource) -> dict[str, Any]:
    if isinstance(source, Mapping):
        # Through JSON, so that whatever is accepted can also be saved and sent.
        try:
            return _parse(json.dumps(dict(source)))
        except (TypeError, ValueError) as error:
            raise ModelConfigError(f"the configuration is not JSON: {one_line(error)}", name="config") from None
    if isinstance(source, str) and source.lstrip().startswith("{"):
        return _parse(source)
    if isinstance(source, str) and source in packaged_configs():
        return _parse((resources.files(__package__) / "configs" / f"{source}.json").read_text("utf-8"))
    path = Path(source)
    if path.is_dir():
        path = path / CONFIG_FILE
    try:
        if path.stat().st_size > _MAX_TEXT:
            raise ModelConfigError(
                f"{path} is larger than {_MAX_TEXT} bytes, so it is not a {CONFIG_FILE}", name="config"
            )
        text = path.read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = "is not there" if isinstance(error, FileNotFoundError) else f"cannot be read ({one_line(error)})"
        raise ModelConfigError(
            f"{path} {reason}: give a folder that holds {CONFIG_FILE}, or one of {', '.join(packaged_configs())}",
            name="config",
            value=str(source),
        ) from None
    return _parse(text, str(path))


def _parse(text: str, where: str = CONFIG_FILE) -> dict[str, Any]:
    def no_number(name: str) -> None:
        raise ValueError(f"{name} is not JSON")

    try:
        if len(text) > _MAX_TEXT:
            raise ValueError(f"longer than {_MAX_TEXT} characters")
        values = json.loads(text, parse_constant=no_number)
        if not isinstance(values, dict):
            raise ValueError("it is not a JSON object")
    except (ValueError, RecursionError) as error:
        raise ModelConfigError(f"{where} is malformed: {one_line(error)}", name="config") from None
    return values


def _without_code(value: Any) -> Any:
    """``value`` of JSON without :data:`_UNSAFE`, also in models within the model."""
    if isinstance(value, dict):
        return {
            key: _without_code(inner)
            for key, inner in value.items()
            if key not in _UNSAFE and (not key.startswith("_") or key == _SPECIAL)
        }
    return [_without_code(inner) for inner in value] if isinstance(value, list) else value


def _special(value: Any) -> Any:
    """``value`` of JSON with infinities for what stands for them."""
    if isinstance(value, dict):
        tag = value.get(_SPECIAL)
        if len(value) == 1 and isinstance(tag, str) and tag in _SPECIAL_FLOATS:
            return _SPECIAL_FLOATS[tag]
        return {key: _special(inner) for key, inner in value.items()}
    return [_special(inner) for inner in value] if isinstance(value, list) else value


def _with_classic_rope(values: dict[str, Any]) -> dict[str, Any]:
    """``rope_parameters`` of transformers 5 as ``rope_theta`` and ``rope_scaling``, where it is not per layer type."""
    rope = values.get("rope_parameters")
    if isinstance(rope, dict) and "rope_theta" in rope and not any(isinstance(v, dict) for v in rope.values()):
        scaling = {key: value for key, value in rope.items() if key != "rope_theta"}
        values = {key: value for key, value in values.items() if key != "rope_parameters"}
        values["rope_theta"] = rope["rope_theta"]
        values["rope_scaling"] = scaling if scaling.get("rope_type", "default") != "default" else None
    if isinstance(values.get("rope_scaling"), dict):
        # Psyche's clients send null for each number that this kind of scaling does not have.
        values["rope_scaling"] = {key: value for key, value in values["rope_scaling"].items() if value is not None}
        kind = values["rope_scaling"].get("rope_type", values["rope_scaling"].get("type", "default"))
        if kind == "default":
            values["rope_scaling"] = None
    return values


def _check_sizes(values: Mapping[str, Any]) -> None:
    """Bounds every number before anything is built with it."""
    for key, value in values.items():
        if isinstance(value, dict):
            _check_sizes(value)
        elif isinstance(value, int) and abs(value) > _MAX_SIZE and not is_base(key):
            raise ModelConfigError(f"{key}={value} is beyond any model", name=key, value=value)
    layers = max(
        (v for k, v in values.items() if k in ("num_hidden_layers", "n_layer", "num_layers") and _is_int(v)), default=1
    )
    experts = max((v for k, v in values.items() if k in _EXPERTS and _is_int(v)), default=1)
    if layers > _MAX_LAYERS or (layers * experts > _MAX_EXPERTS and is_ordinary(values)):
        raise ModelConfigError(f"{layers} layers of {experts} experts are beyond any model", name="num_hidden_layers")


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _require(values: Mapping[str, Any], names: tuple[str, ...]) -> None:
    for name in names:
        value = values.get(name)
        if not isinstance(value, int) or isinstance(value, bool) or value <= 0:
            what = "is missing" if value is None else f"is {value!r}"
            raise ModelConfigError(
                f"{name} {what} in {CONFIG_FILE}: a positive number is needed", name=name, value=value
            )


def _common(values: dict[str, Any], kind: LLMArchitecture) -> dict[str, Any]:
    """What both models of Psyche's own want, and what they do not read although transformers would."""
    _require(values, _SIZES)
    values.setdefault("max_position_embeddings", _DEFAULT_POSITIONS)
    _require(values, ("max_position_embeddings",))
    if not isinstance(values.get("rms_norm_eps"), int | float):
        raise ModelConfigError(f"rms_norm_eps is missing in {CONFIG_FILE}", name="rms_norm_eps")
    if values.get("hidden_act") not in (None, "silu"):
        raise ModelConfigError(
            f"hidden_act={values['hidden_act']!r}: Psyche's {kind.value} computes silu",
            name="hidden_act",
            value=values["hidden_act"],
        )
    if values.get("mlp_bias"):
        raise ModelConfigError(
            f"mlp_bias is set: Psyche's {kind.value} has no such biases", name="mlp_bias", value=True
        )
    theta = values.get("rope_theta")
    values["rope_theta"] = float(theta) if isinstance(theta, int | float) else _DEFAULT_ROPE_THETA
    return {**values, "architectures": [_CLASSES[kind]], "hidden_act": "silu"}


def _llama(values: dict[str, Any]) -> dict[str, Any]:
    values = _common(values, LLMArchitecture.HF_LLAMA)
    if values.get("attention_bias"):
        raise ModelConfigError(
            "attention_bias is set: Psyche's HfLlama has no such biases", name="attention_bias", value=True
        )
    hidden, heads = values["hidden_size"], values["num_attention_heads"]
    if hidden % heads or values.get("head_dim") not in (None, hidden // heads):
        raise ModelConfigError(
            f"{heads} heads in a hidden size of {hidden}, head_dim={values.get('head_dim')!r}: Psyche's HfLlama "
            "divides the hidden size evenly among the heads",
            name="head_dim",
            value=values.get("head_dim"),
        )
    if values.get("num_key_value_heads") is None:
        values["num_key_value_heads"] = heads
    _require(values, ("num_key_value_heads",))
    if heads % values["num_key_value_heads"]:
        raise ModelConfigError(
            f"num_key_value_heads={values['num_key_value_heads']} does not divide the {heads} heads",
            name="num_key_value_heads",
        )
    return {**values, "attention_bias": False}


def _deepseek(values: dict[str, Any]) -> dict[str, Any]:
    values = _common(values, LLMArchitecture.HF_DEEPSEEK)
    _require(values, _MLA_SIZES)
    layers = values["num_hidden_layers"]
    dense = values.get("first_k_dense_replace")
    if values.get("n_routed_experts") and not (isinstance(dense, int) and dense >= layers):
        raise ModelConfigError(
            f"the model has {values['n_routed_experts']} experts, which Psyche's HfDeepseek does not train: leave "
            "n_routed_experts out for a dense model, or use HfAuto in a run of your own",
            name="n_routed_experts",
            value=values["n_routed_experts"],
        )
    bias = bool(values.get("attention_bias"))
    if bias and values.get("q_lora_rank") is None:
        raise ModelConfigError(
            "attention_bias without q_lora_rank: Psyche's q_proj has a bias then and that of transformers has none",
            name="attention_bias",
            value=True,
        )
    if values["v_head_dim"] > values["qk_nope_head_dim"] + values["qk_rope_head_dim"]:
        raise ModelConfigError(
            "v_head_dim is larger than a query's head, which Psyche's HfDeepseek does not compute", name="v_head_dim"
        )
    kept = {key: value for key, value in values.items() if key not in _MOE_ONLY}
    return {**kept, "q_lora_rank": values.get("q_lora_rank"), "attention_bias": bias, "first_k_dense_replace": layers}
