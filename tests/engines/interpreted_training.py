"""Whole steps of an optimizer by the kernels, in Triton's interpreter, and by torch: what differs.

For ``interpreted.py``, a process of its own: TRITON_INTERPRET must be set before Triton is imported for the first time.
"""

from __future__ import annotations

import warnings
from typing import Any, Final

import torch
from torch import Tensor
from torch.nn import Parameter

from distro_optim import DisTrO
from distro_optim.compress.engine.triton.engine import TritonEngine
from distro_optim.optim.rules import PUBLISHED

STEPS: Final = 6


class Counted:
    """How often the kernels took the weights and the next lookahead in one pass."""

    def __init__(self) -> None:
        self.passes = 0
        merge_ahead = TritonEngine.merge_ahead

        def counted(*args: Any, **options: Any) -> bool:
            done = merge_ahead(*args, **options)
            self.passes += done
            return done

        TritonEngine.merge_ahead = counted  # type: ignore[method-assign]


def train(engine: Any, dtype: torch.dtype) -> tuple[list[Tensor], DisTrO]:
    """Every weight that can be seen on the way, and the optimizer at the end."""
    torch.manual_seed(0)
    params = [Parameter((torch.randn(shape) * 0.02).to(dtype)) for shape in ((20, 17), (16,))]
    params.append(Parameter(torch.randn(8, 16).to(dtype), requires_grad=False))
    groups = [{"params": params[:1]}, {"params": params[1:], "lr": 3e-2}]
    optimizer = DisTrO(
        groups, lr=1e-2, engine=engine, weight_decay=0.1, compression_chunk=16, compression_topk=4, **PUBLISHED
    )
    seen: list[Tensor] = []

    def look() -> None:
        seen.extend(param.detach().clone() for param in params)
        seen.extend(optimizer.state[param]["weight"].clone() for param in params)

    for step in range(STEPS):
        generator = torch.Generator().manual_seed(step)
        for param in params:
            param.grad = torch.randn(param.shape, generator=generator).to(dtype) if param.requires_grad else None
        if step == 2:
            params[0].grad = None
            params[1].grad[3] = torch.inf  # type: ignore[index]
            for group in optimizer.param_groups:
                group["weight_decay"] = 0.0  # from now on the device keeps to itself what is finite
        if step == 3:
            with torch.no_grad():
                params[0][0, 0] = 7.0  # written to while it looks ahead: this step looks at all of them
        if step >= 4:  # as with a GradScaler that leaves the unscaling to the optimizer; at last it overflows
            scale = torch.tensor(8.0)
            optimizer.grad_scale = scale  # type: ignore[attr-defined]
            optimizer.found_inf = torch.tensor([float(step == 5)])  # type: ignore[attr-defined]
            for param in params[:2]:
                param.grad = param.grad * scale  # type: ignore[operator]
        optimizer.step()
        look()
        if step == 1:
            optimizer.eval()
            look()
            optimizer.train()
            look()
    optimizer.flush()
    look()
    return seen, optimizer


def training() -> dict[str, dict[str, Any]]:
    """What was found, by type of weights."""
    counted, answer = Counted(), {}
    for dtype in (torch.bfloat16,):
        before = counted.passes
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            ours, optimizer = train("triton", dtype)
        theirs, other = train("torch", dtype)
        answer[str(dtype).removeprefix("torch.")] = {
            "weights": sum(int((a != b).sum()) for a, b in zip(ours, theirs, strict=True)),
            "seen": len(ours),
            "passes": counted.passes - before,
            "quarantined": [optimizer.quarantined, other.quarantined],
            "momentum": max(
                float((optimizer.delta(a) - other.delta(b)).abs().max() / other.delta(b).abs().max().clamp(min=1e-30))
                for a, b in zip(*(o.param_groups[0]["params"] for o in (optimizer, other)), strict=True)
            ),
            "warnings": [str(w.message) for w in caught if "engine=" in str(w.message)],
        }
    return answer
