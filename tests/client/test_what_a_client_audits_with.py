"""The loss function by which ``distro-optim join --audit`` looks at others' results is the one that it trains with."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from client.processes import TINY_LLAMA, write_tokens
from distro_optim.client.training import audit_loss
from distro_optim.coordinator.model import LocalData
from distro_optim.coordinator.types import BatchId
from distro_optim.data.opening import open_token_data
from distro_optim.models.accumulation import train_batch
from distro_optim.models.batches import collate
from distro_optim.models.causal_lm import CausalLM
from distro_optim.verify.quiet import quiet_gradients

pytestmark = pytest.mark.waiting


def test_gradients_are_those_of_the_training(tmp_path: Path) -> None:
    data, vocab_size = write_tokens(tmp_path, seq_len=32)
    torch.manual_seed(0)
    model = CausalLM({**TINY_LLAMA, "vocab_size": vocab_size}, "HfLlama")
    parameters = model.sorted_parameters()
    with open_token_data(LocalData(str(data)), 32, vocab_size=vocab_size) as provider:
        loss = audit_loss(model, provider, torch.device("cpu"))
        (found,) = quiet_gradients(model, parameters, loss, [[3, 4]])
        with torch.no_grad():
            batch = collate(provider.get_samples(BatchId(3, 4)))
    train_batch(model, batch)
    for gradient, (name, parameter) in zip(found, parameters.items(), strict=True):
        assert (gradient is None) is (parameter.grad is None), name
        if gradient is not None and parameter.grad is not None:
            torch.testing.assert_close(gradient, parameter.grad, rtol=1e-4, atol=1e-6)
