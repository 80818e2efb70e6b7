"""What a step by the kernels asks of a GPU, counted without one: launches and waits."""

from __future__ import annotations

import importlib.util
from collections import Counter
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import Parameter
from typing_extensions import override

from distro_optim import DisTrO
from distro_optim.comm.exchange import LocalExchange
from distro_optim.compress import CompressedUpdate, OwnPart, ParamSpec, TilePlan, make_plan
from distro_optim.compress.engine import Intake
from distro_optim.compress.merging import Ahead
from distro_optim.optim import momentum
from distro_optim.optim.rules import PUBLISHED
from distro_optim.testing.launches import Launches
from engines.large_models import LLAMA

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="Triton is not installed: pip install 'distro-optim[gpu]'"
)

META = torch.device("meta")


class Kernel:
    """In the place of a kernel: remembers its launches."""

    def __init__(self, name: str, launches: Counter[str]) -> None:
        self._name = name
        self._launches = launches

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        def launch(*args: Any, **options: Any) -> None:
            self._launches[self._name] += 1

        return launch


@pytest.fixture
def kernels(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """Launches of kernels from now on; tensors on the meta device are taken for those of a GPU."""
    from distro_optim.compress.engine.triton import engine, launching

    launches: Counter[str] = Counter()
    for name in ("check_kernel", "extract_kernel", "merge_kernel", "put_back_kernel", "shift_kernel"):
        monkeypatch.setattr(launching, name, Kernel(name, launches))
    monkeypatch.setattr(launching, "device_type", lambda: "meta")
    # What is done without memory cannot be compared.
    for trial in ("extraction_differs", "merge_differs"):
        monkeypatch.setattr(engine, trial, lambda *args: None)
    return launches


def _plan(shapes: Sequence[tuple[int, ...]], dtype: torch.dtype) -> TilePlan:
    return make_plan([ParamSpec(shape, dtype, META, 0, 64, 8) for shape in shapes], "padded", arithmetic="exact")


@pytest.mark.parametrize("contributors", [1, 16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_step_at_1_2_billion_is_at_most_20_launches_and_never_waits(
    kernels: Counter[str], contributors: int, dtype: torch.dtype
) -> None:
    from distro_optim.compress.engine.triton.engine import TritonEngine

    plan = _plan(LLAMA, dtype)
    assert sum(torch.Size(shape).numel() for shape in LLAMA) > 1.2e9
    engine = TritonEngine(plan, "dct")

    def like(kind: torch.dtype) -> list[Tensor]:
        return [torch.empty(shape, dtype=kind, device=META) for shape in LLAMA]

    grads, weights, shifted, momenta = like(dtype), like(dtype), like(dtype), like(torch.float32)
    own = []
    for number, grid in enumerate(plan.grids):
        k = plan.topk[number]
        index = torch.empty(grid.tiles, k, dtype=torch.int32, device=META)
        own.append(OwnPart(index, torch.empty(grid.tiles, k, device=META)))
    intake = Intake(grads, momenta, [False] * len(plan), [1e-3], [0.999], True, own)

    def step() -> None:
        usable = engine.usable(grads)
        update = engine.room(quantize=True)
        spoken = engine.extract_into(update, intake, usable)
        # The others' flags come with their updates.
        flags = {n: torch.stack([spoken[n]] * contributors) for n in spoken}
        engine.merge_into([update] * contributors, flags, weights, [1e-3], ahead=Ahead(shifted, [1e-3]))

    step()  # tables are made
    kernels.clear()
    with Launches() as operations:
        step()
    assert kernels == {"check_kernel": 2, "extract_kernel": 2, "merge_kernel": 2}
    assert kernels.total() + operations.count <= 20, operations.kernels
    assert operations.waits.total() == 0


@pytest.fixture
def optimizer(kernels: Counter[str], monkeypatch: pytest.MonkeyPatch) -> DisTrO:
    """Of 1.2 billion parameters with gradients."""
    # Parameters without memory are refused, since nobody could train them.
    monkeypatch.setattr(momentum, "check_param", lambda param: None)
    params = [Parameter(torch.empty(shape, device=META)) for shape in LLAMA]
    for param in params:
        param.grad = torch.empty_like(param)
    return DisTrO(params, lr=1e-3, engine="triton", **PUBLISHED)


class Alone16(LocalExchange):
    """What is published is collected 16 times over, as if by 16 peers."""

    @override
    def collect(self) -> list[CompressedUpdate]:
        return super().collect() * 16


@pytest.mark.parametrize("contributors", [1, 16])
@pytest.mark.parametrize("scaled", [False, True], ids=["", "with a GradScaler"])
def test_a_step_of_an_optimizer_is_at_most_20_launches_and_never_waits(
    kernels: Counter[str], optimizer: DisTrO, contributors: int, scaled: bool
) -> None:
    optimizer.exchange = LocalExchange() if contributors == 1 else Alone16()
    if scaled:  # as it does for optimizers that unscale
        optimizer.found_inf = torch.empty(1, device=META)  # type: ignore[attr-defined]
        optimizer.grad_scale = torch.empty((), device=META)  # type: ignore[attr-defined]
    with Launches():
        for _ in range(3):  # the first shifts the weights, the second has an update to apply
            optimizer.step()
    kernels.clear()
    with Launches() as operations:
        optimizer.step()
    assert kernels == {"check_kernel": 2, "extract_kernel": 2, "merge_kernel": 2}
    assert kernels.total() + operations.count <= 20, operations.kernels
    assert operations.waits.total() == 0, operations.waits
    assert optimizer.param_groups[0]["looks_ahead"]
    with Launches(reads=4.0) as operations:
        assert optimizer.quarantined == 0
    assert operations.waits.total() == 1  # for the numbers of all tensors


@pytest.mark.parametrize("contributors", [1, 16])
def test_the_verbs_of_an_optimizer_are_at_most_20_launches_and_never_wait(
    kernels: Counter[str], optimizer: DisTrO, contributors: int
) -> None:
    def step() -> CompressedUpdate:
        optimizer.lookahead()
        optimizer.undo_lookahead()
        update = optimizer.generate()
        optimizer.apply([update] * contributors)
        return update

    with Launches():
        step()  # tables are made
    kernels.clear()
    with Launches() as operations:
        update = step()
    by_name = {"shift_kernel": 1, "put_back_kernel": 1, "check_kernel": 2, "extract_kernel": 2, "merge_kernel": 2}
    assert kernels == by_name
    assert kernels.total() + operations.count <= 20, operations.kernels
    assert operations.waits.total() == 0
    with Launches() as operations:
        assert all(update.present)
        assert all(update.present)
    assert operations.waits.total() == 1  # for bytes that travel
