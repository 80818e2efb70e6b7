"""A causal language model with the loss that Psyche trains, for any training loop.

::

    model = CausalLM.from_folder("my-llama", "HfLlama")
    optimizer = model.make_optimizer(lr=4e-4)
    for batch in loader:
        loss = train_batch(model, batch, micro_batch_size=8)
        optimizer.step()
    model.save_pretrained("my-llama-trained")

The loss (PsycheFoundation/psyche ``shared/modeling/src/causal_language_model.rs``): logits in float32, position t asked
for token t+1, the mean of the cross-entropies over the labels that are not -100, divided by ``loss_scale``.

Packed documents. Psyche's own models take ``position_ids`` for the rotary embedding alone, and ``sequence_lengths`` for
who sees whom (``attention.rs`` ``create_cu_seqlens``; there with flash attention only). Its transformers models get
``position_ids`` and no ``sequence_lengths``; transformers takes positions that begin again for a new document. Each
architecture does here as it does there.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, NamedTuple, Self, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from typing_extensions import override

from ..coordinator.model import LLM, LLMArchitecture, OptimizerDefinition
from ..errors import ConfigurationError, ModelConfigError, ModelWeightsError, ProtocolError
from .batches import IGNORED, TokenBatch
from .building import build_empty, build_fresh, build_shapes, persistent_buffers, sorted_parameters, tied_sources
from .config import ConfigSource, LanguageModelConfig, read_config
from .memory import check_memory, too_large
from .optimization import DEFAULT_OPTIMIZER, make_optimizer
from .saving import COMPANIONS, MAX_SHARD_BYTES, save_folder
from .weights import FolderTensors, GivenTensors, TensorSource, copy_weights

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from ..comm.model_exchange import SharedModel
    from ..optimizer import DisTrO

__all__ = ["CausalLM", "CausalLMOutput"]

_TOKENIZER: Final = "tokenizer.json"
_MAX_COMPANION: Final = 64 << 20
"""A tokenizer of a peer is bounded where it arrives; a file beside a model here. The largest have some 20 MB."""

_Result = TypeVar("_Result")


class CausalLMOutput(NamedTuple):
    """What a forward pass gives.

    Attributes:
        logits: ``(batch, tokens, vocabulary)``.
        loss: 0-D float32.
    """

    logits: Tensor
    loss: Tensor


class CausalLM(nn.Module):
    """A model of transformers, its parts under the names they have in its files.

    Args:
        config: see :data:`~distro_optim.models.config.ConfigSource`, or one that was read.
        architecture: of the run: ``"HfLlama"``, ``"HfDeepseek"`` or ``"HfAuto"``.
        weights: where they come from; None for new ones.
        seed: of new ones.
        max_seq_len: tokens of a sequence, where a run says so.
        dtype: of the parameters.
        gradient_checkpointing: compute activations twice instead of keeping them.
        memory: what is checked to fit before anything is allocated: ``"training"``, ``"inference"`` or ``"unchecked"``.
        accumulation: whether gradients of micro-batches will be added, which takes memory too.

    Raises:
        ModelConfigError: no model can be made of ``config``, or not the one that Psyche's peers have.
        ModelWeightsError: the weights are not this model's.
        ModelTooLargeError: it does not fit in memory.

    Attributes:
        config: the configuration, checked.
    """

    config: LanguageModelConfig
    _network: PreTrainedModel

    def __init__(
        self,
        config: ConfigSource | LanguageModelConfig,
        architecture: LLMArchitecture | str = LLMArchitecture.HF_AUTO,
        *,
        weights: TensorSource | None = None,
        seed: int = 0,
        max_seq_len: int | None = None,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.bfloat16,
        gradient_checkpointing: bool = False,
        memory: str = "training",
        accumulation: bool = False,
    ) -> None:
        super().__init__()
        if not isinstance(config, LanguageModelConfig):
            config = read_config(config, architecture, max_seq_len=max_seq_len)
        if memory not in ("training", "inference", "unchecked"):
            raise ConfigurationError(
                f"memory={memory!r}: give 'training', 'inference' or 'unchecked'", name="memory", value=memory
            )
        device = torch.device(device)
        if memory != "unchecked":
            shapes = build_shapes(config, dtype)
            parameters = sorted_parameters(shapes).values()
            training = memory == "training"
            check_memory(parameters, device, buffers=shapes.buffers(), training=training, accumulation=accumulation)
        try:
            if weights is None:
                network = build_fresh(config, seed, device, dtype)
            else:
                network = build_empty(config, device, dtype)
                copy_weights(_state(network), weights, stand_ins=tied_sources(network, config))
        except torch.OutOfMemoryError as error:
            raise too_large(sorted_parameters(build_shapes(config, dtype)).values(), device) from error
        if gradient_checkpointing:
            _checkpoint_activations(network)
        self.config = config
        self.companions: dict[str, bytes] = {}
        self._adopt(network)

    @classmethod
    def around(cls, config: LanguageModelConfig, network: PreTrainedModel) -> Self:
        """The model whose parts are those of a network that is there already."""
        model = cls.__new__(cls)
        nn.Module.__init__(model)
        model.config, model.companions = config, {}
        model._adopt(network)
        return model

    @property
    def root(self) -> PreTrainedModel:
        """The module that is called in a forward pass; its parts are ours."""
        return self._network

    def read_companions(self, folder: Path) -> None:
        """Takes what lies beside the weights in a folder, such as the tokenizer."""
        for name in COMPANIONS:
            file = folder / name
            if file.is_file() and file.stat().st_size <= _MAX_COMPANION:
                self.companions[name] = file.read_bytes()

    def _adopt(self, network: PreTrainedModel) -> None:
        """Takes the network's parts as own ones, so that parameters have no prefix to the names in files."""
        # Not through nn.Module, or everything would be there twice.
        object.__setattr__(self, "_network", network)
        taken = [name for name, _ in network.named_children() if hasattr(self, name)]
        own = [name for name, _ in [*network.named_parameters(recurse=False), *network.named_buffers(recurse=False)]]
        if taken or own:
            raise ModelConfigError(
                f"a {self.config.model_type!r} has a part {(taken or own)[0]!r}, which is taken: this kind of model is "
                "not supported",
                name="model_type",
                value=self.config.model_type,
            )
        for name, child in network.named_children():
            self.add_module(name, child)

    # -- where models come from ----------------------------------------------------------------------------------------

    @classmethod
    def from_folder(
        cls, folder: str | Path, architecture: LLMArchitecture | str = LLMArchitecture.HF_AUTO, **settings: Any
    ) -> Self:
        """The model in a folder in the layout of Hugging Face; also how training resumes.

        Raises:
            ModelConfigError, ModelWeightsError, ModelTooLargeError: as the class.
        """
        path = Path(folder)
        max_seq_len = settings.pop("max_seq_len", None)
        config = read_config(path, architecture, max_seq_len=max_seq_len)
        model = cls(config, weights=FolderTensors(path), **settings)
        model.read_companions(path)
        return model

    @classmethod
    def from_shared(
        cls, shared: SharedModel, architecture: LLMArchitecture | str = LLMArchitecture.HF_AUTO, **settings: Any
    ) -> Self:
        """The model that peers sent, verified: names, shapes and types are those of its configuration.

        Raises:
            ProtocolError: configuration and parameters do not make a model, or not the same one.
            ModelTooLargeError: it does not fit in memory.
        """
        max_seq_len = settings.pop("max_seq_len", None)
        try:
            if not shared.config.lstrip().startswith("{"):
                raise ModelConfigError("config.json is not a JSON object", name="config")
            config = read_config(shared.config, architecture, max_seq_len=max_seq_len, from_peer=True)
            model = cls(config, weights=GivenTensors(shared.parameters), **settings)
        except (ModelConfigError, ModelWeightsError) as error:
            raise ProtocolError(f"the peers' model cannot be used: {error}") from error
        if shared.tokenizer:
            model.companions[_TOKENIZER] = shared.tokenizer.encode()
        return model

    @classmethod
    def from_run(cls, run: LLM, source: SharedModel | str | Path, **settings: Any) -> Self:
        """The model that a run trains, from peers or from a folder.

        Raises:
            ModelConfigError, ModelWeightsError, ModelTooLargeError, ProtocolError: as above.
        """
        settings = {"max_seq_len": run.max_seq_len, **settings}
        if isinstance(source, str | Path):
            return cls.from_folder(source, run.architecture, **settings)
        return cls.from_shared(source, run.architecture, **settings)

    # -- and where they go ---------------------------------------------------------------------------------------------

    def save_pretrained(
        self,
        folder: str | Path,
        *,
        max_shard_bytes: int = MAX_SHARD_BYTES,
        state_dict: Mapping[str, Tensor] | None = None,
    ) -> None:
        """Writes the model to ``folder``, in place of what is there, so that transformers loads it without us.

        Args:
            state_dict: other values for its tensors, all of them.

        Raises:
            ModelWeightsError: it cannot be written; what was there is untouched.
        """
        save_folder(
            Path(folder),
            self.tensors() if state_dict is None else dict(state_dict),
            self.config.to_json(),
            self.companions,
            max_shard_bytes=max_shard_bytes,
        )

    def shared_model(self) -> SharedModel:
        """A copy for peers, on the CPU, which does not change while training goes on."""
        from ..comm.model_exchange import SharedModel

        tensors = {name: tensor.detach().to("cpu", copy=True) for name, tensor in self.tensors().items()}
        return SharedModel(self.config.to_json(), self.companions.get(_TOKENIZER, b"").decode(), tensors)

    @torch.no_grad()
    def load_shared(self, shared: SharedModel) -> None:
        """Takes the weights of ``shared`` into this model.

        Raises:
            ProtocolError: they are not this model's; its own are untouched unless one of theirs is not finite.
        """
        try:
            copy_weights(self.tensors(), GivenTensors(shared.parameters))
        except ModelWeightsError as error:
            raise ProtocolError(f"the peers' model cannot be used: {error}") from error

    def tensors(self) -> dict[str, Tensor]:
        """All that makes up the model, by name, sorted: parameters, and buffers that are not mere caches."""
        return _state(self._network)

    def sorted_parameters(self) -> dict[str, nn.Parameter]:
        """Parameters by name in the order of every Psyche peer: that of results, commitments and weights."""
        return sorted_parameters(self._network)

    def make_optimizer(self, lr: float, definition: OptimizerDefinition = DEFAULT_OPTIMIZER, **settings: Any) -> DisTrO:
        """DisTrO as a run defines it; see :func:`~distro_optim.models.optimization.make_optimizer`."""
        return make_optimizer(self.sorted_parameters(), definition, lr, **settings)

    # -- forward -------------------------------------------------------------------------------------------------------

    @override
    def forward(self, batch: object, *, loss_scale: float | None = None) -> CausalLMOutput:
        """Logits and loss.

        Args:
            batch: see :meth:`TokenBatch.of`, on the model's device.
            loss_scale: what the loss is divided by: the number of micro-batches.

        Raises:
            ConfigurationError: a token outside the vocabulary (where that can be seen without waiting for a GPU).
        """
        batch = TokenBatch.of(batch)
        if batch.input_ids.device.type == "cpu":
            batch.check_vocabulary(self.config.vocab_size)
        labels = batch.input_ids if batch.labels is None else batch.labels
        inputs: dict[str, Any] = {} if self.config.is_native else {"labels": labels}
        if self.config.is_native:
            inputs["attention_mask"] = _attention(batch)
        elif batch.position_ids is None:
            # Says nothing new, but without it DeepSeek in transformers 4.57 lets tokens see those behind them.
            inputs["attention_mask"] = torch.ones_like(batch.input_ids)
        done = self._network(
            input_ids=batch.input_ids, position_ids=batch.position_ids, use_cache=False, return_dict=True, **inputs
        )
        # Models of transformers may add to the cross-entropy what balances their experts.
        loss = _cross_entropy(done.logits, labels) if self.config.is_native else done.loss
        return CausalLMOutput(done.logits, loss if loss_scale is None else loss / loss_scale)

    # -- inside --------------------------------------------------------------------------------------------------------

    @override
    def _apply(self, fn: Callable[[Tensor], _Result], recurse: bool = True) -> Self:
        """As in the base class; caches such as rotary frequencies keep their precision in ``model.bfloat16()``."""
        persistent = {id(buffer) for buffer in persistent_buffers(self._network).values()}
        kept = [
            (module, name, buffer)
            for module in self._network.modules()
            for name, buffer in module._buffers.items()
            if buffer is not None and buffer.is_floating_point() and id(buffer) not in persistent
        ]
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for module, name, before in kept:
            after = module._buffers[name]
            if after is not None and after.dtype != before.dtype:
                module._buffers[name] = before.to(after.device)
        return self

    @override
    def train(self, mode: bool = True) -> Self:
        super().train(mode)
        self._network.train(mode)
        return self


def _state(network: nn.Module) -> dict[str, Tensor]:
    tensors: Mapping[str, Tensor] = {**sorted_parameters(network), **persistent_buffers(network)}
    return {name: tensors[name] for name in sorted(tensors, key=str.encode)}


def _checkpoint_activations(network: PreTrainedModel) -> None:
    # Renamed in transformers 5, where the old name warns. Not reentrant, so that frozen inputs do not matter.
    enable: Any = getattr(network, "activation_checkpointing_enable", None) or network.gradient_checkpointing_enable
    enable({"use_reentrant": False})


def _cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """The mean over labels that count; not a number where none does, as in Psyche."""
    shifted = logits.float()[:, :-1].flatten(0, 1)
    return F.cross_entropy(shifted, labels[:, 1:].flatten(), ignore_index=IGNORED)


def _attention(batch: TokenBatch) -> Tensor:
    """Which tokens each token sees: those before it, and itself, within its document.

    Returns:
        ``(batch, tokens) int64`` of ones, or ``(batch, 1, tokens, tokens) bool`` where documents are packed.
    """
    rows, tokens = batch.input_ids.shape
    device = batch.input_ids.device
    if batch.sequence_lengths is None:
        # Not None: transformers would look at the positions then, and cut where they begin again.
        return torch.ones(rows, tokens, dtype=torch.int64, device=device)
    numbers = torch.stack(
        [
            torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths, dtype=torch.int64))
            for lengths in batch.sequence_lengths
        ]
    ).to(device)
    same = numbers[:, :, None] == numbers[:, None, :]
    before = torch.ones(tokens, tokens, dtype=torch.bool, device=device).tril()
    return (same & before)[:, None]
