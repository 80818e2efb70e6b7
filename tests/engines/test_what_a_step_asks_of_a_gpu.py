"""Launches and waits of a step, counted without a GPU; and that no step needs float64 where there is none."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from typing_extensions import override

from distro_optim import DisTrO
from distro_optim.optim import momentum
from distro_optim.optim.rules import PUBLISHED
from distro_optim.testing.launches import Launches
from engines.conftest import ACCELERATORS
from engines.large_models import GPT2, LLAMA, Shapes
from optimizer.models import EveryShape, set_gradients


def counted(
    shapes: Shapes,
    contributors: int,
    monkeypatch: pytest.MonkeyPatch,
    dtype: torch.dtype = torch.float32,
    **settings: Any,
) -> tuple[int, int]:
    """Launches and waits of one step, of Psyche's kind, gradients taken at weights that look ahead, or by settings."""
    # Parameters without memory are refused, since nobody could train them.
    monkeypatch.setattr(momentum, "check_param", lambda param: None)
    params = [nn.Parameter(torch.empty(shape, dtype=dtype, device="meta")) for shape in shapes]
    for param in params:
        param.grad = torch.empty_like(param)
    optimizer = DisTrO(params, lr=1e-3, weight_decay=0.1, tiling="divisor", **{**PUBLISHED, **settings})
    with Launches():  # the first step makes room
        optimizer.decode([])
    with Launches() as launches:
        if settings.get("overlap", True):
            optimizer.lookahead()
            optimizer.undo_lookahead()
        update = optimizer.generate()
        assert all(update.present)
        optimizer.apply([update] * contributors)
    return launches.count, launches.waits.total()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("contributors", "dtype"),
    [(1, torch.float32), (16, torch.float32), (1, torch.bfloat16)],
    ids=["alone", "with 15 others", "in bfloat16"],
)
def test_a_step_of_a_large_model_is_at_most_1500_launches(
    contributors: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    launches, waits = counted(LLAMA, contributors, monkeypatch, dtype)
    assert launches <= 1500
    assert waits == 2  # are gradients finite, and is something said about each tensor


@pytest.mark.slow
@pytest.mark.parametrize("contributors", [1, 4, 16])
def test_so_is_a_step_of_the_published_demo(contributors: int, monkeypatch: pytest.MonkeyPatch) -> None:
    launches, waits = counted(LLAMA, contributors, monkeypatch, overlap=False, quantize_1bit=False, compression_topk=32)
    assert launches <= 1500
    assert waits == 1  # are gradients finite


@pytest.mark.slow
def test_many_small_tensors_are_looked_at_together(monkeypatch: pytest.MonkeyPatch) -> None:
    launches, waits = counted(GPT2, 1, monkeypatch)
    assert launches <= 600
    assert waits == 3  # and has anybody written to small tensors


def test_launches_are_counted_as_a_gpu_has_them() -> None:
    def of(work: Callable[[], object]) -> dict[str, int]:
        with Launches() as launches:
            work()
        return dict(launches.kernels)

    one, many = torch.empty(100, device="meta"), [torch.empty(100, device="meta") for _ in range(130)]
    assert of(lambda: one.view(10, 10).t().add_(1)) == {"add_": 1}
    assert of(lambda: torch.empty(3, device="cpu").add_(1)) == {}
    assert of(lambda: torch._foreach_mul_(many, 2.0)) == {"_foreach_mul_": 2}
    large = [torch.empty(100 * 65536, device="meta") for _ in range(7)]
    assert of(lambda: torch._foreach_mul_(large, 2.0)) == {"_foreach_mul_": 3}
    halves = [tensor.to(torch.bfloat16) for tensor in many]
    assert of(lambda: torch._foreach_add_(many, halves)) == {"_foreach_add_": 130}
    with Launches(reads=3.0) as launches:
        assert one.sum().item() == 3.0
        assert one.tolist() == [3.0] * 100
        assert bool(one.any())
        assert one.cpu().device.type == "cpu"
    assert launches.waits.total() == 4


# -- without float64 ---------------------------------------------------------------------------------------------------


class WithoutFloat64(TorchDispatchMode):
    """As Apple's GPUs: nothing that an operation gets or gives is float64."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]

    @override
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves((args, kwargs, out)):
            if leaf is torch.float64 or (isinstance(leaf, torch.Tensor) and leaf.dtype == torch.float64):
                raise TypeError(f"Cannot convert a MPS Tensor to float64 dtype: {func}")
        return out


RULES: dict[str, dict[str, Any]] = {
    "signs": {},
    "values": {"quantize_1bit": False},
    "at once": {"overlap": False, "quantize_1bit": False},
    "of a fixed size": {"direction": "orthogonal", "update": "rms", "quantize_1bit": False},
}


@pytest.mark.parametrize("arithmetic", ["exact", "float"])
@pytest.mark.parametrize("rules", RULES.values(), ids=RULES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_step_takes_no_float64_where_there_is_none(
    arithmetic: Any, rules: dict[str, Any], dtype: torch.dtype, work: Callable[[Any], None]
) -> None:
    def trained() -> list[torch.Tensor]:
        model = EveryShape(dtype)
        params = [*model.parameters(), nn.Parameter(torch.ones(90, 70, dtype=dtype))]
        optimizer = DisTrO(params, lr=0.01, weight_decay=0.1, arithmetic=arithmetic, **{**PUBLISHED, **rules})
        for step in range(3):
            set_gradients(params, step)
            optimizer.step()
        optimizer.flush()
        return [param.detach() for param in params]

    work(ACCELERATORS["as a GPU"])
    expected = trained()
    work(ACCELERATORS["as Apple's"])
    with WithoutFloat64():
        without = trained()
    assert all(map(torch.equal, without, expected))


def test_a_tensor_of_float64_is_found() -> None:
    with WithoutFloat64(), pytest.raises(TypeError, match="float64"):
        torch.ones(3).to(torch.float64)
