"""Parameters and bytes of a round of a model of any size, without its memory."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest
import torch

import warm_python
from distro_optim.coordinator.model import Distro
from distro_optim.errors import ModelTooLargeError
from distro_optim.models.building import build_shapes, sorted_parameters
from distro_optim.models.causal_lm import CausalLM
from distro_optim.models.config import read_config
from distro_optim.models.memory import available_memory, check_memory, training_memory
from distro_optim.models.sizes import model_size
from language_models.small import LLAMA

SOURCES = Path(__file__).parents[2] / "src"

# `config/consilience/state.toml`
CONSILIENCE = Distro(1.0, 0.1, 0.995, 4, 64, True)

# By hand, from the sizes in configs/consilience-40b.json: 128 heads of 128 + 64 and values of 128.
HIDDEN, HEADS, VOCABULARY, LAYERS = 7168, 128, 129280, 65
QUERIES = HIDDEN * 1536 + 1536 + 1536 * HEADS * 192
KEYS_AND_VALUES = HIDDEN * (512 + 64) + 512 + 512 * HEADS * (128 + 128)
LAYER = QUERIES + KEYS_AND_VALUES + HEADS * 128 * HIDDEN + 3 * HIDDEN * 18432 + 2 * HIDDEN
PARAMETERS = LAYERS * LAYER + 2 * VOCABULARY * HIDDEN + HIDDEN


@pytest.mark.slow
def test_consilience_has_forty_billion_parameters() -> None:
    size = model_size(read_config("consilience-40b", "HfDeepseek"), CONSILIENCE)
    assert size.parameters == PARAMETERS == 39_779_785_728
    assert size.weights_bytes == 2 * PARAMETERS
    assert size.tensors == 12 * LAYERS + 3


@pytest.mark.slow
def test_a_round_of_consilience_takes_eighty_three_megabytes_from_each_peer() -> None:
    size = model_size(read_config("consilience-40b", "HfDeepseek"), CONSILIENCE)
    # Every side of every matrix is a multiple of 64: tiles of 4096, with 4 indices of 2 bytes and 4 bits for each.
    # A norm has tiles of 64, with 4 indices of a byte.
    norms = LAYERS * (2 * HIDDEN + 1536 + 512) + HIDDEN
    data = (PARAMETERS - norms) // 4096 * (8 + 0.5) + norms // 64 * (4 + 0.5)
    assert data <= size.result_bytes <= data + 50 * size.tensors
    assert size.result_bytes == 82_644_551
    assert size.weights_bytes / size.result_bytes > 900


@pytest.mark.slow
def test_counting_and_refusing_it_takes_no_memory() -> None:
    program = """
import resource, torch, transformers.models.deepseek_v3.modeling_deepseek_v3
from distro_optim.coordinator.model import Distro
from distro_optim.errors import ModelTooLargeError
from distro_optim.models.causal_lm import CausalLM
from distro_optim.models.config import read_config
from distro_optim.models.sizes import model_size
config = read_config("consilience-40b", "HfDeepseek")
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
model_size(config, Distro(1.0, 0.1, 0.995, 4, 64, True))
try:
    CausalLM(config)
except ModelTooLargeError:
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""
    pytest.importorskip("resource")
    environment = {**os.environ, "PYTHONPATH": str(SOURCES), "OMP_NUM_THREADS": "1"}
    done = warm_python.run(
        [sys.executable, "-W", "ignore", "-c", program],
        env=environment,
        capture_output=True,
        text=True,
        timeout=150,
    )
    assert done.returncode == 0, done.stderr
    if available_memory(torch.device("cpu")) is not None:
        grown = int(done.stdout)  # KiB on Linux, bytes on a Mac
        assert grown < 200 * 1024 * (1024 if sys.platform == "darwin" else 1)


def test_a_model_that_does_not_fit_is_refused_in_one_sentence_before_anything_is_allocated() -> None:
    shapes = sorted_parameters(build_shapes(read_config("consilience-40b", "HfDeepseek"))).values()
    with pytest.raises(ModelTooLargeError) as caught:
        check_memory(shapes, torch.device("cpu"), available=lambda _: 24 << 30)
    message = str(caught.value)
    assert "39.8 billion parameters take 370 GiB" in message
    assert "cpu has 24 GiB left: use a device with more memory, or join a run with a smaller model" in message
    assert "\n" not in message
    assert caught.value.needed == 10 * PARAMETERS
    assert isinstance(caught.value, MemoryError)


def test_a_model_is_weighed_before_it_is_made(monkeypatch: pytest.MonkeyPatch) -> None:
    from distro_optim.models import causal_lm

    monkeypatch.setattr(causal_lm, "build_empty", None)
    monkeypatch.setattr(causal_lm, "build_fresh", None)
    huge = {**LLAMA, "vocab_size": 1 << 30, "hidden_size": 1 << 20}
    if available_memory(torch.device("cpu")) is None:
        pytest.skip("this system does not tell how much memory is left")
    with pytest.raises(ModelTooLargeError):
        CausalLM(huge, "HfLlama")


def test_what_training_takes_is_what_the_optimizer_then_holds() -> None:
    model = CausalLM({**LLAMA, "hidden_size": 256, "intermediate_size": 1024}, "HfLlama")
    need = training_memory(model.parameters())
    optimizer = model.make_optimizer(lr=1e-3)
    held = {key: sum(s[key].nbytes for s in optimizer.state.values()) for key in ("delta", "weight")}
    assert (need["momentum"], need["lookahead"]) == (held["delta"], held["weight"])
    assert need["weights"] == need["gradients"] == sum(p.nbytes for p in model.parameters())


def test_inference_takes_the_weights_alone() -> None:
    shapes = list(sorted_parameters(build_shapes(read_config(LLAMA, "HfLlama"))).values())
    weights = sum(p.numel() * 2 for p in shapes)
    check_memory(shapes, torch.device("cpu"), training=False, available=lambda _: weights)
    with pytest.raises(ModelTooLargeError):
        check_memory(shapes, torch.device("cpu"), available=lambda _: weights)


def test_memory_that_is_gone_after_all_is_told_in_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    from distro_optim.models import causal_lm

    def fail(*_: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate ...")

    monkeypatch.setattr(causal_lm, "build_fresh", fail)
    with pytest.raises(ModelTooLargeError, match="ran out of memory while they were loaded: use a device with more"):
        CausalLM(LLAMA, "HfLlama")


def test_adding_gradients_in_float32_takes_four_bytes_more() -> None:
    shapes = list(sorted_parameters(build_shapes(read_config(LLAMA, "HfLlama"))).values())
    plain, added = (sum(training_memory(shapes, accumulation=value).values()) for value in (False, True))
    assert added - plain == 4 * sum(p.numel() for p in shapes)


@pytest.mark.slow
def test_where_nobody_tells_how_much_is_left_nothing_is_refused() -> None:
    shapes = sorted_parameters(build_shapes(read_config("consilience-40b", "HfDeepseek"))).values()
    check_memory(shapes, torch.device("cpu"), available=lambda _: None)
    assert available_memory(torch.device("meta")) is None
