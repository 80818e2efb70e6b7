"""What the ranks of a process group do in tests: a module of its own, since new processes import it by name."""

from __future__ import annotations

import hashlib
import multiprocessing as mp
import queue
import traceback
from collections.abc import Callable, Iterator, Sequence
from datetime import timedelta
from multiprocessing.context import ForkServerContext
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from distro_optim import DisTrO, ProcessGroupExchange
from distro_optim.comm import process_group
from distro_optim.compress import ParamSpec, make_plan
from distro_optim.errors import ExchangeError
from distro_optim.testing.exchange import check_peer
from distro_optim.testing.updates import random_update, same_update

TIMEOUT = timedelta(seconds=60)
PLAN = make_plan([ParamSpec((6, 6), torch.float32, torch.device("cpu"), 0, 4, 2)], "padded")


def forks_of_one_that_has_loaded_torch() -> ForkServerContext:
    """Where ranks come from: they have nothing else of this process."""
    context = mp.get_context("forkserver")
    context.set_forkserver_preload(
        ["torch", "torch._dynamo", "torch.distributed", "pytest", "distro_optim.testing.updates"]
    )
    return context


class RankPool:
    """Processes that form one gloo group and do one job after the other: starting them takes the most time."""

    def __init__(self, size: int, folder: Path) -> None:
        context = forks_of_one_that_has_loaded_torch()
        self._results = context.Queue()
        self._commands = [context.Queue() for _ in range(size)]
        self._processes = [
            context.Process(target=_serve, args=(rank, size, f"file://{folder}/rendezvous", commands, self._results))
            for rank, commands in enumerate(self._commands)
        ]
        for process in self._processes:
            process.daemon = True
            process.start()
        self.broken = False

    def run(self, job: Callable[[int, int], None]) -> None:
        """Runs ``job(rank, size)`` on all ranks; raises what the first one raised that failed."""
        for commands in self._commands:
            commands.put(job)
        for _ in self._processes:
            try:
                rank, error = self._results.get(timeout=2 * TIMEOUT.total_seconds())
            except queue.Empty:
                rank, error = "a", "hangs"
            if error:
                self.broken = True
                self.close()
                raise AssertionError(f"{rank} rank: {error}")

    def close(self) -> None:
        for commands in self._commands:
            commands.put(None)
        for process in self._processes:
            if self.broken:
                process.kill()
            process.join(TIMEOUT.total_seconds())


def _serve(rank: int, size: int, rendezvous: str, commands: Any, results: Any) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=rendezvous, rank=rank, world_size=size, timeout=TIMEOUT)
    while (job := commands.get()) is not None:
        try:
            job(rank, size)
        except BaseException:
            results.put((rank, traceback.format_exc()))
        else:
            results.put((rank, None))
    dist.destroy_process_group()


class Net(nn.Module):
    """Shapes of every kind, among them one larger than a tile and a scalar; ragged tiles at the default chunk."""

    def __init__(self, dtype: torch.dtype, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.embed = nn.Embedding(50, 33, dtype=dtype)
        self.wide = nn.Linear(33, 130, dtype=dtype)
        self.conv = nn.Conv1d(130, 9, 3, dtype=dtype)
        self.scale = nn.Parameter(torch.ones((), dtype=dtype))

    def loss(self, batch: int) -> Tensor:
        tokens = torch.randint(50, (4, 8), generator=torch.Generator().manual_seed(batch))
        features = torch.tanh(self.wide(self.embed(tokens))).transpose(1, 2)
        loss: Tensor = (self.scale * self.conv(features)).float().square().mean()
        return loss


def fingerprint(tensors: Sequence[Tensor]) -> bytes:
    digest = hashlib.sha256()
    for tensor in tensors:
        digest.update(tensor.detach().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return digest.digest()


def gathered(mine: bytes) -> list[bytes]:
    """What every rank has, at every rank."""
    everybody: list[bytes | None] = [None] * dist.get_world_size()
    dist.all_gather_object(everybody, mine)
    return [e for e in everybody if e is not None]


def true_weights(optimizer: DisTrO) -> list[Tensor]:
    """Without the lookahead, which differs from rank to rank."""
    optimizer.eval()
    weights = [p.detach().clone() for group in optimizer.param_groups for p in group["params"]]
    optimizer.train()
    return weights


def fingerprints(rank: int, model: Net, optimizer: DisTrO, steps: int, idle: Sequence[int] = ()) -> Iterator[bytes]:
    """Trains, and yields the hash of the weights after every step; without gradients in steps ``idle``."""
    for step in range(steps):
        optimizer.zero_grad()
        if step not in idle:
            model.loss(1000 * step + rank).backward()
        optimizer.step()
        yield fingerprint(true_weights(optimizer))


# ---------------------------------------------------------------- jobs

STEPS = 50
# Every pair of values of two settings occurs.
CASES = [
    (torch.float32, True, True),
    (torch.float32, False, False),
    (torch.bfloat16, True, False),
    (torch.bfloat16, False, True),
]


def all_ranks_hold_the_same_bits(rank: int, size: int) -> None:
    for dtype, overlap, quantize in CASES:
        case = f"{dtype}, overlap={overlap}, quantize_1bit={quantize}"
        model = Net(dtype, seed=rank)  # every rank begins elsewhere
        assert len(set(gathered(fingerprint(list(model.parameters()))))) == size
        optimizer = DisTrO(
            model.parameters(), lr=1e-2, overlap=overlap, quantize_1bit=quantize, weight_decay=0.1, compression_chunk=32
        )
        # One rank sits out a few steps in the middle, another one begins late.
        idle = range(20, 25) if rank == 1 else range(3) if rank == 2 else ()
        history = list(fingerprints(rank, model, optimizer, STEPS, idle))
        assert len(set(history[3:])) == STEPS - 3, f"{case}: the weights stood still"
        for step, hashes in enumerate(zip(*map(_split, gathered(b"".join(history))), strict=True)):
            assert len(set(hashes)) == 1, f"{case}: the ranks differ after step {step}"
        assert len(set(gathered(fingerprint([s["delta"] for s in optimizer.state.values()])))) == size


def _split(history: bytes) -> list[bytes]:
    return [history[i : i + 32] for i in range(0, len(history), 32)]


def the_contract_is_kept(rank: int, size: int) -> None:
    check_peer(lambda: ProcessGroupExchange(timeout=TIMEOUT), rank, size)


def part_of_the_ranks_trains_together(rank: int, size: int) -> None:
    """Two groups of two ranks; in each, the weights of its own first rank are everybody's."""
    pairs = [dist.new_group([0, 1]), dist.new_group([2, 3])]
    model = Net(torch.float32, seed=rank)
    optimizer = DisTrO(model.parameters(), lr=1e-2, process_group=pairs[rank // 2])
    *_, last = fingerprints(rank, model, optimizer, 5)
    hashes = gathered(last)
    assert hashes[0] == hashes[1] != hashes[2] == hashes[3]


def ranks_with_other_models_are_told(rank: int, size: int) -> None:
    wrong: dict[str, Callable[[], DisTrO]] = {
        "another shape": lambda: DisTrO([torch.zeros(5 if rank == 2 else 4)]),
        "another number of parameters": lambda: DisTrO([torch.zeros(4)] * 1 + [torch.zeros(2)] * (rank == 2)),
        "another dtype": lambda: DisTrO([torch.zeros(4, dtype=torch.float64 if rank == 2 else torch.float32)]),
        "another top-k": lambda: DisTrO([torch.zeros(4)], compression_topk=2 if rank == 2 else 3),
        "another order": lambda: DisTrO([torch.zeros(n) for n in ((5, 4) if rank == 2 else (4, 5))]),
    }
    for make in wrong.values():
        optimizer = make()
        with pytest.raises(ExchangeError, match="rank 2 has other parameters than rank 0"):
            optimizer.step()


def settings_that_change_the_messages_must_agree(rank: int, size: int) -> None:
    """Values on one rank and signs on the others: messages of two sizes, which a collective cannot carry."""
    optimizer = DisTrO([torch.zeros(400)], quantize_1bit=rank != 1, overlap=False)
    with pytest.raises(ExchangeError, match="quantize_1bit"):
        optimizer.step()


def a_message_that_is_none_is_an_exchange_error(rank: int, size: int) -> None:
    exchange = ProcessGroupExchange(timeout=TIMEOUT)
    exchange.start(PLAN, [torch.zeros(6, 6)])
    update = random_update(PLAN, quantized=True)
    exchange.publish(update)
    size_of_message = exchange._in_flight[0][1].numel()
    exchange.collect()
    # Rank 1 takes part in the same collective with bytes of its own.
    for garbage in (b"\xff" * size_of_message, bytes(size_of_message), b"\1" + bytes(size_of_message - 1)):
        if rank == 1:
            mine = torch.frombuffer(bytearray(garbage), dtype=torch.uint8)
            exchange._all_gather(mine)[0].wait()
            continue
        exchange.publish(update)
        with pytest.raises(ExchangeError, match="rank 1 sent no update"):
            exchange.collect()


def updates_go_past_nccl(rank: int, size: int) -> None:
    """A group whose tensors lie on another device: its updates go over gloo, in a group of their own."""
    calls: list[tuple[str, object]] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(process_group, "_communication_device", lambda group, params: torch.device("meta"))
        patch.setattr(process_group, "_gather_flat", _recorded(process_group._gather_flat, calls))
        pairs = [dist.new_group([0, 1]), dist.new_group([2, 3])]
        exchange = ProcessGroupExchange(pairs[rank // 2], timeout=timedelta(seconds=2))
        exchange.start(PLAN, [])
        updates = [random_update(PLAN, quantized=True, seed=n) for n in range(size)]
        exchange.publish(updates[rank])
        first = rank // 2 * 2
        collected = exchange.collect()
        assert all(map(same_update, collected, updates[first : first + 2]))
        groups = {group for _, group in calls}
        assert len(groups) == 1
        assert not groups & {None, *pairs}
        if rank == 0:  # and a rank that does not answer is told in time, as without NCCL
            exchange.publish(updates[rank])
            with pytest.raises(ExchangeError, match="within 0:00:02"):
                exchange.collect()


def _recorded(call: Any, calls: list[tuple[str, object]]) -> Any:
    def recorded(*args: Any, **kwargs: Any) -> Any:
        calls.append((call.__name__, kwargs["group"]))
        return call(*args, **kwargs)

    return recorded


def a_rank_that_does_not_answer(rank: int, size: int) -> None:
    exchange = ProcessGroupExchange(timeout=timedelta(seconds=2))
    exchange.start(PLAN, [torch.zeros(6, 6)])
    update = random_update(PLAN, quantized=True)
    exchange.publish(update)
    exchange.collect()
    if rank == 0:
        exchange.publish(update)
        with pytest.raises(ExchangeError, match="within 0:00:02"):
            exchange.collect()
