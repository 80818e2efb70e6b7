"""Several devices of a machine are one client: the same gradients as one device gives."""

from __future__ import annotations

import pytest
import torch

from distro_optim.client.devices import LocalTrainers, parse_devices
from distro_optim.errors import ConfigurationError
from distro_optim.models.batches import TokenBatch
from distro_optim.models.causal_lm import CausalLM

pytestmark = pytest.mark.waiting


CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "num_hidden_layers": 1,
    "vocab_size": 50,
    "max_position_embeddings": 32,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def gradients(count: int, batch: TokenBatch) -> tuple[float | None, list[torch.Tensor]]:
    model = CausalLM(CONFIG, "HfLlama", dtype=torch.float64, memory="unchecked")
    trainers = LocalTrainers(model, parse_devices("cpu", count), micro_batch_size=2)
    try:
        loss = trainers.train(batch, lambda: False)
    finally:
        trainers.close()
    return loss, [p.grad for p in model.parameters() if p.grad is not None]


@pytest.mark.parametrize("samples", [1, 4, 6])
def test_three_devices_give_the_gradients_of_one(samples: int) -> None:
    batch = TokenBatch(torch.randint(0, 50, (samples, 8), generator=torch.Generator().manual_seed(1)))
    alone, one = gradients(1, batch)
    together, three = gradients(3, batch)
    assert together == pytest.approx(alone, rel=1e-6)
    assert len(one) == len(three) > 0
    for a, b in zip(one, three, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-6)  # logits are float32


def test_a_round_that_is_over_is_not_computed() -> None:
    model = CausalLM(CONFIG, "HfLlama", memory="unchecked")
    trainers = LocalTrainers(model, parse_devices("cpu", 1), micro_batch_size=1)
    assert trainers.train(TokenBatch(torch.zeros(2, 8, dtype=torch.long)), lambda: True) is None


@pytest.mark.parametrize("device", ["gpu", "cuda:a", "cuda:0,0", "cpu:1"])
def test_devices_that_there_are_not_are_refused(device: str) -> None:
    with pytest.raises(ConfigurationError, match="device"):
        parse_devices(device, 1)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there are such devices here")
def test_a_machine_without_cuda_says_so() -> None:
    with pytest.raises(ConfigurationError, match="0 CUDA devices"):
        parse_devices("cuda", 2)


def test_auto_finds_something() -> None:
    assert len(parse_devices("auto", 1)) == 1
