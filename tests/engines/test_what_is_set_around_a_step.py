"""What a script sets for its model changes no bit of a step: precision of products, types, devices, autocast."""

from __future__ import annotations

import copy
import threading
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import pytest
import torch
from torch import nn

from distro_optim import DisTrO
from distro_optim.compress.engine import BlockEngine
from distro_optim.compress.exact.precision import true_float32
from distro_optim.compress.profile import Profile
from distro_optim.optim.rules import PUBLISHED
from optimizer.models import set_gradients
from torch_settings import default_device, default_dtype, matmul_precision

SETTINGS: dict[str, Any] = {
    "products of half the precision": lambda: matmul_precision("medium"),
    "new tensors in float64": lambda: default_dtype(torch.float64),
    "new tensors in float16": lambda: default_dtype(torch.float16),
    "new tensors on another device": lambda: default_device("meta"),
    "autocast": lambda: torch.autocast("cpu", dtype=torch.bfloat16),
    "inference": torch.inference_mode,
}

RULES: dict[str, dict[str, Any]] = {
    "signs": {},
    "values": {"quantize_1bit": False, "compression_topk": 60},
    "floats": {"arithmetic": "float", "quantize_1bit": False, "overlap": False},
    "directions": {"direction": "orthogonal", "update": "rms", "quantize_1bit": False},
    "psyche": {"arithmetic": "psyche"},
}


def trained(around: AbstractContextManager[object], **settings: Any) -> list[torch.Tensor]:
    torch.manual_seed(0)
    # Sides that numpy multiplies, sides that torch does, and vectors.
    model = nn.ParameterList([torch.randn(70, 130), torch.randn(200), torch.randn(9, 5, 3, 3)])
    optimizer = DisTrO(
        model.parameters(), lr=0.01, weight_decay=0.1, compression_chunk=100, **{**PUBLISHED, **settings}
    )
    for step in range(2):
        set_gradients(list(model.parameters()), step)
        with around if step == 1 else nullcontext():
            optimizer.step()
    optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    optimizer.flush()
    return [parameter.detach() for parameter in model.parameters()]


@pytest.mark.parametrize("rules", RULES.values(), ids=RULES)
def test_nothing_that_is_set_changes_a_bit(rules: dict[str, Any], any_profile: Profile) -> None:
    expected = trained(nullcontext(), **rules)
    for name, around in SETTINGS.items():
        if name == "inference" and rules.get("overlap", True):
            continue  # a loop that looks ahead cannot be in it: the next gradient would be
        assert all(map(torch.equal, trained(around(), **rules), expected)), name


def test_a_step_has_true_products_on_any_backend(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where this machine's products would be the same."""
    seen = []
    merge = BlockEngine.merge

    def look(*args: Any, **kwargs: Any) -> None:
        seen.append(precise())
        merge(*args, **kwargs)

    monkeypatch.setattr(BlockEngine, "merge", look)
    with matmul_precision("high"):
        trained(nullcontext())
        assert not precise()
    assert seen
    assert all(seen)


def precise() -> bool:
    """Whether products in float32 are just that."""
    get = getattr(torch._C, "_get_fp32_precision_getter", None)
    if get is None:  # before torch 2.9
        return torch.get_float32_matmul_precision() == "highest"
    return all(get(backend, "matmul") in ("none", "ieee") for backend in ("cuda", "mkldnn"))


def test_the_last_of_several_threads_puts_the_precision_back() -> None:
    inside, leave = threading.Event(), threading.Event()

    def other() -> None:
        with true_float32():
            inside.set()
            leave.wait(60)

    with matmul_precision("high"):
        thread = threading.Thread(target=other)
        with true_float32():
            thread.start()
            assert inside.wait(60)
        assert precise()
        leave.set()
        thread.join(60)
        assert not precise()
    assert precise()
