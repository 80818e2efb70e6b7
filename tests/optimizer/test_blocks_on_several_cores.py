"""A step's blocks are shared out among threads: each once, none lost, and the same bits as on one thread."""

from __future__ import annotations

import os
import sys
import threading

import pytest
import torch

import warm_python
from distro_optim import DisTrO
from distro_optim.optim.workers import Workers


def test_every_item_is_worked_on_once_and_no_worker_has_two() -> None:
    workers = Workers(3)
    busy = [threading.Lock() for _ in range(3)]
    done: list[int] = []

    def work(item: int, worker: int) -> None:
        assert busy[worker].acquire(blocking=False)
        assert torch.get_num_threads() == 1
        assert not torch.is_grad_enabled()
        done.append(item)
        busy[worker].release()

    for _ in range(3):
        workers.run(work, list(range(100)))
    assert sorted(done) == sorted(list(range(100)) * 3)


def test_the_number_of_threads_of_everybody_else_stays_as_it_was() -> None:
    before = torch.get_num_threads()
    Workers(4).run(lambda item, worker: None, range(8))
    assert torch.get_num_threads() == before
    seen: list[int] = []
    thread = threading.Thread(target=lambda: seen.append(torch.get_num_threads()))
    thread.start()
    thread.join()
    assert seen == [before]


def test_an_error_is_raised_when_nobody_works_any_more() -> None:
    workers = Workers(2)
    running: list[int] = []

    def work(item: int, worker: int) -> None:
        running.append(item)
        try:
            if item == 5:
                raise ZeroDivisionError(item)
        finally:
            running.remove(item)

    with pytest.raises(ZeroDivisionError):
        workers.run(work, range(10_000))
    assert not running
    workers.run(work, range(3))  # and they can be used again


@pytest.mark.slow
@pytest.mark.parametrize("overlap", [False, True])
def test_the_bits_do_not_depend_on_the_number_of_threads(overlap: bool) -> None:
    shapes = [(512, 640), (100, 1100), (2000,), (7,)]
    threads = torch.get_num_threads()

    def train(count: int) -> list[torch.Tensor]:
        generator = torch.Generator().manual_seed(0)
        params = [torch.nn.Parameter(torch.randn(s, generator=generator)) for s in shapes]
        torch.set_num_threads(count)
        try:
            optimizer = DisTrO(params, lr=1e-2, overlap=overlap)
            for _ in range(4):
                for p in params:
                    p.grad = torch.randn(p.shape, generator=generator)
                optimizer.step()
        finally:
            torch.set_num_threads(threads)
        return [p.detach() for p in params]

    one, two, three = train(1), train(2), train(3)
    assert all(torch.equal(a, b) for a, b in zip(one, two, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(two, three, strict=True))


def test_a_single_item_too_is_worked_on_by_one_core() -> None:
    threads: list[int] = []
    Workers(2).run(lambda item, worker: threads.append(torch.get_num_threads()), [0])
    assert threads == [1]


def test_optimizers_take_turns_on_the_same_threads() -> None:
    seen: list[set[int]] = []
    for _ in range(2):
        seen.append(set())
        Workers(3).run(lambda item, worker: seen[-1].add(threading.get_ident()), range(64))
    of_the_process = [thread for thread in threading.enumerate() if thread.name.startswith("distro-optim-step")]
    assert seen[0] | seen[1] <= {thread.ident for thread in of_the_process}
    Workers(3).run(lambda item, worker: None, range(64))
    assert [thread for thread in threading.enumerate() if thread.name.startswith("distro-optim-step")] == of_the_process


FORKED = """
import os
from distro_optim.optim.workers import Workers
Workers(2).run(lambda item, worker: None, range(4))
child = os.fork()
done = []
if child == 0:
    Workers(2).run(lambda item, worker: done.append(item), range(4))
    os._exit(0 if sorted(done) == [0, 1, 2, 3] else 1)
raise SystemExit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_forked_process_starts_threads_of_its_own() -> None:
    assert warm_python.run([sys.executable, "-c", FORKED], timeout=60).returncode == 0
