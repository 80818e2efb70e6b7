"""New models learn, in bfloat16 with DisTrO, and what they send is what a Psyche peer expects of this model."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from distro_optim.comm.memory import MemoryExchange
from distro_optim.compress.wire import TransmittableDistroResult, decode_download, encode_download
from distro_optim.coordinator.model import Distro
from distro_optim.errors import ConfigurationError
from distro_optim.models.accumulation import train_batch
from distro_optim.models.causal_lm import CausalLM
from distro_optim.models.sizes import plan_of, result_size
from language_models.small import DEEPSEEK, EXPERTS, LLAMA, sentences

CONSILIENCE = Distro(
    clip_grad_norm=1.0,
    weight_decay=0.1,
    compression_decay=0.995,
    compression_topk=4,
    compression_chunk=64,
    quantize_1bit=True,
)
MODELS = [
    pytest.param("HfLlama", LLAMA, id="Llama"),
    pytest.param("HfDeepseek", DEEPSEEK, id="DeepSeek"),
    pytest.param("HfAuto", EXPERTS, id="DeepSeek with experts"),
]
STEPS = 30


def trained(model: CausalLM, definition: Distro, steps: int = STEPS) -> list[float]:
    optimizer = model.make_optimizer(lr=4e-3, definition=definition)
    losses = []
    for step in range(steps):
        loss = train_batch(model, sentences(8, seed=step), micro_batch_size=4)
        assert loss is not None
        losses.append(float(loss))
        optimizer.step()
    optimizer.flush()
    return losses


@pytest.mark.slow
@pytest.mark.parametrize(("architecture", "config"), MODELS)
def test_the_loss_falls(architecture: str, config: dict[str, Any]) -> None:
    model = CausalLM(config, architecture, seed=3)
    losses = trained(model, CONSILIENCE)
    assert all(p.dtype == torch.bfloat16 for p in model.parameters())
    # A new model may be surer of wrong tokens than one that says nothing, ln 96.
    assert losses[0] > math.log(96) - 0.2
    assert sum(losses[-5:]) / 5 < 0.7 * losses[0], losses


@pytest.mark.slow
@pytest.mark.parametrize("quantized", [True, False], ids=["signs", "values"])
@pytest.mark.parametrize(("architecture", "config"), MODELS)
def test_an_update_has_an_entry_for_each_parameter_in_the_order_of_names(
    architecture: str, config: dict[str, Any], quantized: bool
) -> None:
    definition = Distro(None, None, 0.999, 8, 64, quantized)
    model = CausalLM(config, architecture)
    optimizer = model.make_optimizer(lr=1e-3, definition=definition, arithmetic="psyche")
    train_batch(model, sentences(4))
    update = optimizer.generate()
    data = encode_download(TransmittableDistroResult.from_update(update, step=7, trainer_nonce=0, batch_id=(0, 3)))
    result = decode_download(data)
    parameters = model.sorted_parameters()
    assert len(result.distro_results) == len(parameters)
    for (name, parameter), entry in zip(parameters.items(), result.distro_results, strict=True):
        assert entry.xshape == tiled(tuple(parameter.shape), 64), name
        assert entry.totalk == tile_of(tuple(parameter.shape), 64), name
        k = min(8, entry.totalk)
        rows = entry.xshape[: len(parameter.shape)] if parameter.dim() > 1 else entry.xshape[:1]
        # With 1 bit: bool, else the type of the parameter (torch's ScalarType).
        assert (entry.sparse_val.dims, entry.sparse_val.kind) == ((*rows, k), 11 if quantized else 15), name
        index_bytes = 1 if entry.totalk <= 256 else 2
        assert len(entry.sparse_idx.data) == math.prod(rows) * k * index_bytes, name
    plan = plan_of(parameters, definition)
    assert plan.layout == optimizer.plan.layout
    assert len(data) == result_size(plan, quantized=quantized, step=7, last_index=3)


def split(side: int, chunk: int) -> int:
    """The largest divisor of a side up to the chunk (`get_smaller_split`, shared/modeling/src/distro.rs)."""
    return max(d for d in range(1, chunk + 1) if side % d == 0)


def tiled(shape: tuple[int, ...], chunk: int) -> tuple[int, ...]:
    """The encoded shape: `(tiles, w)`, or leading dimensions, tiles down, tiles across, h, w."""
    if len(shape) == 1:
        width = split(shape[0], chunk)
        return shape[0] // width, width
    h, w = split(shape[-2], chunk), split(shape[-1], chunk)
    return (*shape[:-2], shape[-2] // h, shape[-1] // w, h, w)


def tile_of(shape: tuple[int, ...], chunk: int) -> int:
    return math.prod(split(side, chunk) for side in shape[-2:])


@pytest.mark.slow
def test_two_peers_that_learn_from_different_data_end_with_the_same_weights() -> None:
    exchanges = MemoryExchange.group(2)
    models = [CausalLM(LLAMA, "HfLlama", seed=5) for _ in exchanges]
    optimizers = [m.make_optimizer(1e-3, CONSILIENCE, exchange=e) for m, e in zip(models, exchanges, strict=True)]
    for step in range(4):
        for peer, model in enumerate(models):
            train_batch(model, sentences(4, seed=2 * step + peer))
        for optimizer in optimizers:
            optimizer.begin_step()
        for optimizer in optimizers:
            optimizer.finish_step()
            optimizer.lookahead()
    for optimizer in optimizers:
        optimizer.eval()
    first, second = (model.tensors() for model in models)
    new = CausalLM(LLAMA, "HfLlama", seed=5).tensors()
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert not all(torch.equal(first[name], new[name]) for name in first)


@pytest.mark.slow
@pytest.mark.parametrize("architecture", ["HfLlama", "HfAuto"])
def test_the_seed_decides_on_the_first_weights_and_leaves_other_random_numbers_alone(architecture: str) -> None:
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    same, again, other = (CausalLM(LLAMA, architecture, seed=seed).tensors() for seed in (1, 1, 2))
    assert torch.equal(torch.rand(3), expected)
    assert all(torch.equal(same[name], again[name]) for name in same)
    assert not torch.equal(same["lm_head.weight"], other["lm_head.weight"])


def test_new_weights_have_the_spread_that_psyche_gives_them() -> None:
    model = CausalLM({**LLAMA, "hidden_size": 256, "intermediate_size": 512, "num_attention_heads": 4}, "HfLlama")
    weights = {name: p.detach().float() for name, p in model.sorted_parameters().items()}
    for name, deviation in {
        "lm_head.weight": 256**-0.5,
        "model.layers.1.mlp.up_proj.weight": 256**-0.5,
        "model.layers.0.mlp.down_proj.weight": (2 * 512 * 1) ** -0.5,
        "model.layers.1.mlp.down_proj.weight": (2 * 512 * 2) ** -0.5,
        "model.layers.1.self_attn.o_proj.weight": (2 * 256 * 2) ** -0.5,
    }.items():
        # Cut off at three standard deviations, a normal distribution keeps 0.987 of its own.
        assert float(weights[name].std()) == pytest.approx(0.987 * deviation, rel=0.03), name
        assert float(weights[name].abs().max()) <= 3 * deviation * 1.01, name
    assert bool((weights["model.norm.weight"] == 1).all())


@pytest.mark.slow
@pytest.mark.parametrize("architecture", ["HfLlama", "HfDeepseek"])
def test_activations_that_are_computed_twice_give_the_same_gradients(architecture: str) -> None:
    config = LLAMA if architecture == "HfLlama" else DEEPSEEK
    plain, twice = (CausalLM(config, architecture, gradient_checkpointing=value) for value in (False, True))
    twice.train()
    assert any(getattr(module, "gradient_checkpointing", False) for module in twice.modules())
    for model in (plain, twice):
        train_batch(model, sentences(2))
    for (name, a), b in zip(plain.sorted_parameters().items(), twice.sorted_parameters().values(), strict=True):
        assert a.grad is not None
        assert b.grad is not None
        assert torch.equal(a.grad, b.grad), name


def test_a_run_whose_optimizer_exchanges_nothing_is_refused() -> None:
    from distro_optim.coordinator.model import AdamW, DummyOptimizer

    model = CausalLM(LLAMA, "HfLlama")
    for definition in (AdamW((0.9, 0.95), 0.1, 1e-8), DummyOptimizer()):
        with pytest.raises(ConfigurationError, match="only Distro is trained with"):
            model.make_optimizer(1e-3, definition)
