"""Logits, loss and gradients are those of Psyche's own Llama and DeepSeek, which a plain twin computes."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from distro_optim.models.batches import TokenBatch
from distro_optim.models.causal_lm import CausalLM
from language_models.small import DEEPSEEK, IS_OLD, LLAMA, OLD, sentences
from reference import psyche_language_models as psyche

MODELS = [
    pytest.param("HfLlama", LLAMA, id="Llama"),
    pytest.param("HfDeepseek", DEEPSEEK, id="DeepSeek"),
    pytest.param("HfDeepseek", {**DEEPSEEK, "q_lora_rank": None}, id="DeepSeek with plain queries"),
    pytest.param("HfDeepseek", {**DEEPSEEK, "v_head_dim": 24}, id="DeepSeek with wide values"),
]

TOKENS = sentences(3, 24)
AGAIN = torch.cat([torch.arange(10), torch.arange(14)]).expand(3, 24).contiguous()  # positions that begin again
PACKED = ((10, 14), (24,), (1, 0, 20, 3))


def twin(model: CausalLM, batch: TokenBatch) -> torch.Tensor:
    return psyche.logits(
        model.config.values, model.sorted_parameters(), batch.input_ids, batch.position_ids, batch.sequence_lengths
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    "batch",
    [
        pytest.param(TokenBatch(TOKENS), id="plain"),
        pytest.param(TokenBatch(TOKENS, position_ids=AGAIN), id="positions begin again"),
        pytest.param(TokenBatch(TOKENS, sequence_lengths=PACKED), id="packed"),
        pytest.param(TokenBatch(TOKENS, position_ids=AGAIN, sequence_lengths=PACKED), id="packed with positions"),
    ],
)
@pytest.mark.parametrize(("architecture", "config"), MODELS)
def test_logits_loss_and_gradients_agree(architecture: str, config: dict[str, Any], batch: TokenBatch) -> None:
    model = CausalLM(config, architecture, dtype=torch.float32)
    found = model(batch)
    wanted = twin(model, batch)
    torch.testing.assert_close(found.logits, wanted, rtol=1e-4, atol=1e-5)
    loss = psyche.loss(wanted, batch.input_ids)
    torch.testing.assert_close(found.loss, loss, rtol=1e-5, atol=1e-6)
    names, parameters = zip(*model.sorted_parameters().items(), strict=True)
    ours, theirs = (torch.autograd.grad(value, parameters) for value in (found.loss, loss))
    for name, a, b in zip(names, ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-6, msg=name)


def test_documents_that_are_packed_do_not_see_each_other() -> None:
    model = CausalLM(LLAMA, "HfLlama", dtype=torch.float32)
    other = TOKENS.clone()
    other[0, :10] = (other[0, :10] + 7) % 96
    before, after = (model(TokenBatch(t, sequence_lengths=PACKED)).logits[0] for t in (TOKENS, other))
    assert torch.equal(before[10:], after[10:])
    assert not torch.equal(before[:10], after[:10])


def test_positions_alone_do_not_part_the_documents_of_a_native_model() -> None:
    model = CausalLM(LLAMA, "HfLlama", dtype=torch.float32)
    other = TOKENS.clone()
    other[0, 0] += 1
    before, after = (model(TokenBatch(t, position_ids=AGAIN)).logits[0, -1] for t in (TOKENS, other))
    assert not torch.equal(before, after)


@pytest.mark.skipif(IS_OLD, reason=OLD)
def test_positions_part_the_documents_of_a_model_of_transformers_and_lengths_mean_nothing() -> None:
    model = CausalLM(LLAMA, "HfAuto", dtype=torch.float32)
    other = TOKENS.clone()
    other[0, 0] += 1
    before, after = (model(TokenBatch(t, position_ids=AGAIN)).logits[0, -1] for t in (TOKENS, other))
    assert torch.equal(before, after)
    lengths = TokenBatch(TOKENS, sequence_lengths=PACKED)
    assert torch.equal(model(lengths).logits, model(TOKENS).logits)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("architecture", "config"), [("HfLlama", LLAMA), ("HfDeepseek", {**DEEPSEEK, "first_k_dense_replace": 2})]
)
def test_psyches_own_models_and_those_of_transformers_agree_where_nothing_is_packed(
    architecture: str, config: dict[str, Any]
) -> None:
    native, auto = (CausalLM(config, kind, seed=1, dtype=torch.float32) for kind in (architecture, "HfAuto"))
    auto.load_state_dict(native.state_dict())
    assert torch.equal(native(TOKENS).loss, auto(TOKENS).loss)


@pytest.mark.parametrize("architecture", ["HfLlama", "HfAuto"])
def test_the_loss_is_the_mean_over_labels_that_count_over_the_scale(architecture: str) -> None:
    model = CausalLM(LLAMA, architecture, dtype=torch.float32)
    labels = TOKENS.clone()
    labels[0, 5:] = -100
    labels[1] = -100
    batch = TokenBatch(TOKENS, labels)
    wanted = psyche.loss(model(batch).logits, labels)
    torch.testing.assert_close(model(batch).loss, wanted)
    torch.testing.assert_close(model(batch, loss_scale=4).loss, wanted / 4)


@pytest.mark.skipif(IS_OLD, reason=OLD)
def test_bfloat16_models_compute_logits_in_bfloat16_and_the_loss_in_float32() -> None:
    found = CausalLM(LLAMA, "HfLlama")(TOKENS)
    assert found.logits.dtype == torch.bfloat16
    assert found.loss.dtype == torch.float32
    torch.testing.assert_close(found.loss, psyche.loss(found.logits, TOKENS))


def test_rotary_frequencies_stay_exact_when_a_model_is_cast() -> None:
    model = CausalLM(LLAMA, "HfLlama", dtype=torch.float32)
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}
    model.bfloat16()
    assert before
    assert all(p.dtype == torch.bfloat16 for p in model.parameters())
    assert all(torch.equal(buffer, before[name]) for name, buffer in model.named_buffers())
