"""What the processes of a client do that hold a model together: a module of its own, since new processes import it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from typing_extensions import override

from client.processes import TINY_LLAMA
from distro_optim.client.several.team import Member, ShardTrainers
from distro_optim.errors import ModelWeightsError
from distro_optim.models.accumulation import train_batch
from distro_optim.models.batches import TokenBatch
from distro_optim.models.causal_lm import CausalLM
from distro_optim.models.config import read_config
from distro_optim.models.sharding import build_in_shards

CONFIG = {**TINY_LLAMA, "vocab_size": 50, "num_attention_heads": 8, "num_key_value_heads": 4, "intermediate_size": 52}


class InFloat32(Member):
    """So that gradients can be compared."""

    @override
    def empty_model(self, config: Any) -> CausalLM:
        return build_in_shards(config, self.mesh, self.device, torch.float32)


def whole(tensor: Any) -> torch.Tensor:
    made: torch.Tensor = tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
    return made.detach()


def half_of(tensors: dict[str, torch.Tensor]) -> Callable[[str], torch.Tensor]:
    left = len(tensors) // 2

    def read(name: str) -> torch.Tensor:
        nonlocal left
        left -= 1
        if left < 0:
            raise ModelWeightsError(f"{name} cannot be read")
        return tensors[name]

    return read


def gradients_are_those_of_the_whole_model(rank: int, size: int) -> None:
    config = read_config(CONFIG, "HfLlama")
    plain = CausalLM(config, dtype=torch.float32, memory="unchecked", seed=3)
    tensors = plain.tensors()
    # Of three samples one process has none of its own, or less than the others.
    batches = [
        TokenBatch(torch.randint(0, 50, (count, 8), generator=torch.Generator().manual_seed(count))) for count in (4, 3)
    ]
    for shape in ((2, 2), (4, 1), (1, 4)):
        member = InFloat32(rank, shape, torch.device("cpu"))
        model = member.empty_model(config)
        with pytest.raises(ModelWeightsError, match=r"cannot be read"):  # in all of them: none waits for the rest
            member.fill(model, None if rank else half_of(tensors))
        member.fill(model, None if rank else lambda name: tensors[name])
        assert list(model.tensors()) == list(tensors)
        for name, tensor in model.tensors().items():
            assert torch.equal(whole(tensor), whole(tensors[name])), name
        optimizer = model.make_optimizer(1e-3)
        assert [tuple(p.shape) for p in optimizer.param_groups[0]["params"]] == [
            tuple(p.shape) for p in plain.sorted_parameters().values()
        ]
        for batch in batches:
            loss = ShardTrainers(model, member, micro_batch_size=1).train(batch, lambda: False)
            expected = train_batch(plain, batch, micro_batch_size=1)
            assert loss is not None
            assert expected is not None
            torch.testing.assert_close(loss, float(expected), rtol=1e-5, atol=1e-6)
            for param, own in zip(model.sorted_parameters().values(), plain.sorted_parameters().values(), strict=True):
                torch.testing.assert_close(whole(param.grad), own.grad, rtol=1e-4, atol=1e-6)
                param.grad = None
