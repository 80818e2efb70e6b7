"""Models that are built at a time, in threads of one process, leave PyTorch's settings as they were."""

from __future__ import annotations

import sys
from concurrent.futures import ThreadPoolExecutor
from threading import Barrier

import pytest
import torch
from torch import nn

from distro_optim.models.building import build_shapes
from distro_optim.models.config import read_config
from language_models.small import LLAMA

THREADS, TURNS = 4, 5


@pytest.mark.slow
def test_the_default_type_is_that_of_before() -> None:
    register, interval = nn.Module.register_parameter, sys.getswitchinterval()
    together = Barrier(THREADS)
    config = read_config(LLAMA, "HfLlama")

    def build(number: int) -> None:
        for turn in range(TURNS):
            together.wait()
            build_shapes(config, (torch.bfloat16, torch.float16)[(number + turn) % 2])

    sys.setswitchinterval(1e-6)
    try:
        with ThreadPoolExecutor(THREADS) as pool:
            list(pool.map(build, range(THREADS)))
    finally:
        sys.setswitchinterval(interval)
    assert torch.get_default_dtype() == torch.float32
    assert nn.Module.register_parameter is register
