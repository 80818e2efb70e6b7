"""A step needs memory for a few blocks, whatever the size of a tensor; the first one, which looks at the state, too."""

from __future__ import annotations

import pytest
import torch

from distro_optim import DisTrO

pytestmark = pytest.mark.slow

SIDE = 4096
TENSOR_BYTES = 4 * SIDE * SIDE
MOST_BYTES = 32 << 20


def peak_of_steps(optimizer: DisTrO) -> int:
    """Most bytes held at once beyond what stood before, over two steps."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        optimizer.step()
        optimizer.step()
    held = peak = 0
    events = profile.profiler.kineto_results.events()
    for event in sorted((e for e in events if e.name() == "[memory]"), key=lambda e: e.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak


@pytest.mark.parametrize("psyche", [False, True], ids=["DeMo", "Psyche"])
def test_it_does_not_grow_with_the_tensor(psyche: bool) -> None:
    assert TENSOR_BYTES > MOST_BYTES
    param = torch.nn.Parameter(torch.zeros(SIDE, SIDE))
    param.grad = torch.randn(SIDE, SIDE)
    optimizer = DisTrO([param], lr=1e-3, compression_topk=8, quantize_1bit=psyche, overlap=psyche)
    assert 0 < peak_of_steps(optimizer) < MOST_BYTES
