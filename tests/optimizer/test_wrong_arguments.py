"""A wrong argument fails at construction; the message names it, shows its value and says what to do."""

from __future__ import annotations

import math
import re
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from distro_optim import DisTrO, MemoryExchange
from distro_optim.comm.exchange import Exchange
from distro_optim.errors import ConfigurationError, DistroError

NUMBERS: dict[str, list[Any]] = {
    "lr": [-1e-3, math.nan, math.inf, "fast", None, True, 1j, torch.tensor([0.1, 0.2]), torch.tensor(-1.0)],
    "compression_decay": [0, -0.1, 1.1, 999, math.nan, "0.9", False],
    "gain": [0, -1, math.nan, math.inf, "2", True],
    "momentum": [-0.1, 1, 1.5, math.nan, "0.95", None, False],
    "compression_topk": [0, -1, 8.0, "8", None, True, math.nan, 1 << 40],
    "compression_chunk": [0, -64, 64.0, "64", None, True, 65536],
    "weight_decay": [-0.1, math.nan, math.inf, "0.1", None, True],
}
CHOICES: dict[str, list[Any]] = {
    "direction": ["muon", "", None, 3, ["momentum"]],
    "update": ["adam", "", None, torch.sign],
    "tiling": ["pad", "", None, 3, ["padded"]],
    "transform": ["fft", None, torch.fft],
    "quantize_1bit": [1, 0, None, "yes"],
    "overlap": [1, None, "no"],
    "exchange": ["gloo", 3, Exchange, object()],
    "process_group": ["gloo", 0, -100, object()],
}
ADVICE = re.compile(r"\b(give|use|leave|such as)\b")


def assert_helpful(error: ConfigurationError, name: str, value: Any) -> None:
    assert error.name == name
    assert f"{name}={value!r}" in str(error)
    assert ADVICE.search(str(error))


@pytest.mark.parametrize(
    ("name", "value"),
    [(n, v) for n, values in {**NUMBERS, **CHOICES}.items() for v in values],
    ids=lambda v: str(v)[:20],
)
def test_the_message_names_the_argument_shows_the_value_and_says_what_to_do(name: str, value: Any) -> None:
    if name in ("exchange", "process_group") and value is None:
        pytest.skip("the default")
    with pytest.raises(ConfigurationError) as caught:
        DisTrO([nn.Parameter(torch.ones(2))], **{name: value})
    assert_helpful(caught.value, name, value)


@pytest.mark.parametrize(
    ("name", "value"), [(n, v) for n, values in NUMBERS.items() for v in values], ids=lambda v: str(v)[:20]
)
def test_the_settings_of_a_group_are_checked_too_then_and_later(name: str, value: Any) -> None:
    with pytest.raises(ConfigurationError) as caught:
        DisTrO([{"params": [nn.Parameter(torch.ones(2))], name: value}])
    assert_helpful(caught.value, name, value)
    optimizer = DisTrO([nn.Parameter(torch.ones(2))])
    with pytest.raises(ConfigurationError) as caught:
        optimizer.add_param_group({"params": [nn.Parameter(torch.ones(2))], name: value})
    assert_helpful(caught.value, name, value)
    assert len(optimizer.param_groups) == 1


def test_exchange_and_process_group_exclude_each_other() -> None:
    [exchange] = MemoryExchange.group(1)
    store = torch.distributed.HashStore()
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        group = torch.distributed.new_group([0])
        with pytest.raises(ConfigurationError, match="leave one of them out"):
            DisTrO([nn.Parameter(torch.ones(2))], exchange=exchange, process_group=group)
    finally:
        torch.distributed.destroy_process_group()


@pytest.mark.parametrize(
    ("params", "kind", "message"),
    [
        (nn.Linear(2, 2), TypeError, r"a module, Linear: give module\.parameters\(\)"),
        (torch.ones(2), TypeError, r"single tensor.*\[tensor\]"),
        (3, TypeError, "params=3: give an iterable"),
        ({nn.Parameter(torch.ones(2))}, TypeError, "a set, whose order differs.*give a list"),
        ([{"params": {nn.Parameter(torch.ones(2))}}], TypeError, "a set, whose order differs.*give a list"),
        (["weight"], TypeError, "params holds 'weight': give tensors"),
        ([{"weights": []}], TypeError, 'params.0.=.*key "params"'),
        ([{"params": []}, nn.Parameter(torch.ones(2))], TypeError, '(?s)params.1.=.*key "params"'),
        ([], ConfigurationError, "params is empty: give"),
        (iter(()), ConfigurationError, "generator can be used only once"),
        ([torch.ones(2, dtype=torch.complex64)], ConfigurationError, "complex64.*view_as_real"),
        ([torch.ones(2, dtype=torch.int64)], ConfigurationError, "int64.*use float32"),
        ([torch.ones(2).to(torch.float8_e4m3fn)], ConfigurationError, "float8_e4m3fn.*use float32"),
        ([torch.ones(2, 2).to_sparse()], ConfigurationError, r"layout.*to_dense\(\)"),
        ([torch.ones(2, device="meta")], ConfigurationError, r"meta device.*to_empty\(\)"),
        ([nn.Parameter(torch.ones(2)) * 2], ValueError, "non-leaf"),
    ],
    ids=lambda v: getattr(v, "__name__", None),
)
def test_wrong_parameters_are_refused_with_advice(params: Any, kind: type[Exception], message: str) -> None:
    with pytest.raises(kind, match=message):
        DisTrO(params)


@pytest.mark.parametrize("group", [[nn.Parameter(torch.ones(2))], None, {"lr": 0.1}], ids=["list", "none", "no params"])
def test_a_group_that_is_none_is_refused(group: Any) -> None:
    optimizer = DisTrO([nn.Parameter(torch.ones(2))])
    with pytest.raises(TypeError, match='give a dict with the key "params"'):
        optimizer.add_param_group(group)


def test_an_engine_that_cannot_be_had_is_told_before_the_first_step(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ConfigurationError, match="engine='triton'") as caught:
        DisTrO([nn.Parameter(torch.ones(2))], engine="triton")
    assert caught.value.name == "engine"
    assert "give" in str(caught.value)
    with pytest.raises(ConfigurationError, match="engine='cuda': give one of auto, torch, triton"):
        DisTrO([nn.Parameter(torch.ones(2))], engine="cuda")  # type: ignore[arg-type]


def test_a_misspelt_argument_is_a_type_error() -> None:
    with pytest.raises(TypeError, match="compresion_topk"):
        DisTrO([nn.Parameter(torch.ones(2))], compresion_topk=8)  # type: ignore[call-arg]
    with pytest.raises(TypeError):
        DisTrO([nn.Parameter(torch.ones(2))], 1e-3, 0.999)  # type: ignore[call-arg, arg-type]


def test_the_limits_themselves_are_allowed() -> None:
    DisTrO(
        [nn.Parameter(torch.ones(2))],
        lr=0,
        compression_decay=1,
        compression_topk=1,
        compression_chunk=65535,
        weight_decay=0,
    ).step()


def test_numpy_scalars_become_numbers_that_a_checkpoint_can_hold() -> None:
    optimizer = DisTrO(
        [nn.Parameter(torch.ones(2))],
        lr=np.float32(0.5),  # type: ignore[arg-type]
        compression_topk=np.int64(4),  # type: ignore[arg-type]
        weight_decay=np.float64(0.25),
    )
    group = optimizer.param_groups[0]
    assert (group["lr"], group["compression_topk"], group["weight_decay"]) == (0.5, 4, 0.25)
    assert (type(group["lr"]), type(group["compression_topk"])) == (float, int)


def test_every_error_of_a_setting_is_also_a_value_error_and_one_of_ours() -> None:
    with pytest.raises(ValueError) as caught:
        DisTrO([nn.Parameter(torch.ones(2))], lr=-1)
    assert isinstance(caught.value, DistroError)
    assert isinstance(caught.value, ConfigurationError)
    assert caught.value.value == -1


def test_updates_for_other_parameters_are_refused() -> None:
    a, b = DisTrO([nn.Parameter(torch.ones(2))]), DisTrO([nn.Parameter(torch.ones(3))])
    with pytest.raises(ConfigurationError, match=r"updates\[0\] was made for other parameters"):
        a.apply([b.generate()])
    with pytest.raises(ConfigurationError, match=r"updates\[1\] was made for other parameters"):
        a.decode([a.generate(), b.generate()])
