"""Network threads never touch a device: updates are in main memory until the thread that trains uploads them."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor
from typing_extensions import override

from distro_optim.compress import CompressedUpdate, ParamSpec, TilePlan, make_plan
from distro_optim.compress.engine import BlockEngine, Intake
from distro_optim.compress.engine.transfer import Uploads
from distro_optim.compress.flat import decode_flat, encode_flat
from distro_optim.coordinator.types import BatchId
from distro_optim.strategy.network.runtime import Runtime
from distro_optim.strategy.rounds.results import encode_own_result, read_any_result, read_result
from distro_optim.strategy.session import SwarmSession
from distro_optim.testing.updates import random_update, same_update
from rounds.simulator import secret
from runtime.memory import MemoryRun, MemorySource
from session.scripts import SAMPLES, batched, new_model, new_optimizer, samples

CPU, ELSEWHERE = torch.device("cpu"), torch.device("meta")
SHAPES = ((70, 40), (300, 256), (40,), (), (16, 16))


def plan_on(device: torch.device, dtype: torch.dtype = torch.float32) -> TilePlan:
    # Chunks of 256 make tiles of up to 65,536 elements: positions that fill 16 bits.
    return make_plan([ParamSpec(shape, dtype, device, 0, 256, 6) for shape in SHAPES], "padded", arithmetic="exact")


def devices_of(update: CompressedUpdate) -> set[str]:
    return {tensor.device.type for tensor in (*update.index, *update.value)}


@pytest.mark.parametrize("quantized", [True, False], ids=["signs", "values"])
def test_what_comes_from_the_network_is_in_main_memory_wherever_the_model_is(quantized: bool) -> None:
    plan = plan_on(ELSEWHERE)
    sent = random_update(plan, quantized=quantized, present=[True, True, False, True, True], seed=3)
    assert devices_of(sent) == {"cpu"}
    batch = BatchId(0, 3)
    own = encode_own_result(sent, step=1, trainer_nonce=2, batch=batch, plan=plan)
    announced: dict[str, Any] = {"step": 1, "batch": batch, "data_hash": own.data_hash, "plan": plan}
    arrived = [
        own.result.update,
        read_result(own.blob, **announced).update,
        read_any_result(own.blob, **announced).update,
        decode_flat(encode_flat(sent), plan),
    ]
    for update in arrived:
        assert devices_of(update) == {"cpu"}
        assert same_update(update, sent)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("quantized", [True, False], ids=["signs", "values"])
def test_one_buffer_carries_all_of_a_step(quantized: bool, dtype: torch.dtype) -> None:
    plan = plan_on(CPU, dtype)
    uploads = Uploads(plan, CPU)
    largest = 0
    for contributors in (1, 5, 2):  # the buffer grows, and is used again
        updates = [random_update(plan, quantized=quantized, seed=10 * contributors + n) for n in range(contributors)]
        arrived = uploads.upload(updates)
        for number, parts in arrived.items():
            for update, (index, value) in zip(updates, parts, strict=True):
                assert index.dtype == torch.int32
                assert torch.equal(index, update.index[number])
                assert value.dtype == update.value[number].dtype
                assert torch.equal(value, update.value[number])
                largest = max(largest, int(index.max()))
        kept = [(index.clone(), index) for parts in arrived.values() for index, _ in parts]
        uploads.upload([random_update(plan, quantized=quantized, seed=99)])
        assert all(torch.equal(before, now) for before, now in kept)
    assert largest > 1 << 15


def test_an_engine_uploads_only_what_is_not_there() -> None:
    plan = plan_on(ELSEWHERE)
    engine = BlockEngine(plan, "dct")
    here = random_update(plan, quantized=True, present=[True, False, True, True, True])
    there = CompressedUpdate.empty(plan, quantized=True, on_devices=True)
    first, second = engine.upload([here, there])
    assert devices_of(first) == devices_of(second) == {"meta"}
    assert first.present == here.present
    assert all(a.shape == b.shape and a.dtype == b.dtype for a, b in zip(first.index, here.index, strict=True))
    assert all(a is b for a, b in zip(second.index, there.index, strict=True))
    on_cpu = BlockEngine(plan_on(CPU), "dct")
    assert on_cpu.upload([here])[0] is here
    assert on_cpu.download(here) is here


# -- a real run --------------------------------------------------------------------------------------------------------


class OnDevice(Tensor):
    """Stands in for what lies on a GPU: remembers in which threads anything is done with it."""

    touched: ClassVar[set[str]] = set()

    @classmethod
    @override
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        cls.touched.add(threading.current_thread().name)
        return super().__torch_function__(func, types, args, kwargs or {})  # type: ignore[no-untyped-call]


def moved(update: CompressedUpdate, kind: type[Tensor]) -> CompressedUpdate:
    index, value = (tuple(part.clone().as_subclass(kind) for part in parts) for parts in (update.index, update.value))
    return CompressedUpdate(update.plan, index, value, update.present)


def on_device(update: CompressedUpdate) -> bool:
    return all(isinstance(part, OnDevice) for part in (*update.index, *update.value))


@pytest.fixture
def devices(monkeypatch: pytest.MonkeyPatch) -> set[str]:
    """Engines that make and take updates on a device; the threads that have touched it."""
    extract, merge = BlockEngine.extract, BlockEngine.merge

    def making(self: BlockEngine, intake: Intake) -> CompressedUpdate:
        return moved(extract(self, intake), OnDevice)

    def taking(self: BlockEngine, updates: Sequence[CompressedUpdate], params: Any, *, lr: Any) -> None:
        assert all(map(on_device, updates))
        merge(self, [moved(update, Tensor) for update in updates], params, lr=lr)

    def upload(self: BlockEngine, updates: Sequence[CompressedUpdate]) -> list[CompressedUpdate]:
        return [moved(update, OnDevice) for update in updates]

    def download(self: BlockEngine, update: CompressedUpdate) -> CompressedUpdate:
        assert on_device(update)
        return moved(update, Tensor)

    for name, method in {"extract": making, "merge": taking, "upload": upload, "download": download}.items():
        monkeypatch.setattr(BlockEngine, name, method)
    monkeypatch.setattr(OnDevice, "touched", set())
    return OnDevice.touched


def test_a_thread_that_touches_a_device_is_found(devices: set[str]) -> None:
    update = BlockEngine(plan_on(CPU), "dct").upload([random_update(plan_on(CPU), quantized=True)])[0]
    thread = threading.Thread(target=encode_flat, args=(update,), name="network")
    thread.start()
    thread.join()
    assert devices == {"network"}


@pytest.mark.waiting
def test_only_the_threads_that_train_touch_devices_in_a_run(devices: set[str]) -> None:
    weights: list[list[Tensor]] = []

    def train(number: int) -> None:
        model = new_model(number)
        optimizer = new_optimizer(model)
        port = Runtime(MemorySource(run, secret(number)), loop=run.loop)
        data = samples(torch.float32)
        with SwarmSession(model, optimizer, port=port, dataset_size=SAMPLES) as session:
            for round_ in session.rounds():
                for indices in batched(round_.indices):
                    x = data[indices]
                    ((model(x) - x.flip(1)).pow(2).mean() / 4).backward()
                round_.finish()
        weights.append([p.detach().clone() for p in model.parameters()])

    with MemoryRun(total_steps=6, min_peers=2) as run:
        threads = [threading.Thread(target=train, args=(n,), name=f"trains {n}", daemon=True) for n in (1, 2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
            assert not thread.is_alive()
    assert len(weights) == 2
    assert all(map(torch.equal, *weights))
    assert devices == {"trains 1", "trains 2"}
