"""Ranks of a process group train as one: four processes on gloo."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import warm_python
from optimizer import process_group_ranks as ranks
from optimizer.process_group_ranks import RankPool

pytestmark = [pytest.mark.waiting, pytest.mark.slow]


@pytest.fixture(scope="module")
def pool(tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[RankPool]]:
    """One pool of four ranks for all tests; a test that breaks it puts another in its place."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_NUM_THREADS", "1")
        pools = [RankPool(4, tmp_path_factory.mktemp("ranks"))]
        yield pools
        pools[0].close()


@pytest.mark.parametrize(
    "job",
    [
        ranks.all_ranks_hold_the_same_bits,
        ranks.the_contract_is_kept,
        ranks.part_of_the_ranks_trains_together,
        ranks.ranks_with_other_models_are_told,
        ranks.settings_that_change_the_messages_must_agree,
        ranks.a_message_that_is_none_is_an_exchange_error,
    ],
    ids=lambda job: job.__name__,
)
def test_on_four_ranks(
    job: Callable[[int, int], None], pool: list[RankPool], tmp_path_factory: pytest.TempPathFactory
) -> None:
    if pool[0].broken:
        pool[0] = RankPool(4, tmp_path_factory.mktemp("ranks"))
    pool[0].run(job)


@pytest.mark.parametrize(
    ("size", "job"), [(2, ranks.a_rank_that_does_not_answer), (4, ranks.updates_go_past_nccl)], ids=["gloo", "nccl"]
)
def test_a_rank_that_does_not_answer_is_an_exchange_error(
    size: int, job: Callable[[int, int], None], tmp_path: Path
) -> None:
    pool = RankPool(size, tmp_path)
    try:
        pool.run(job)
    finally:
        pool.broken = True  # one rank is still in a collective
        pool.close()


SCRIPT = """
import hashlib
import os
import sys
from pathlib import Path

import torch
from distro_optim import DisTrO

rank = os.environ["RANK"]
torch.manual_seed(int(rank))
model = torch.nn.Linear(7, 3)
optimizer = DisTrO(model.parameters(), lr=0.01)
for step in range(4):
    optimizer.zero_grad()
    model(torch.randn(5, 7)).square().mean().backward()
    optimizer.step()
optimizer.flush()
digest = hashlib.sha256(b"".join(p.detach().numpy().tobytes() for p in model.parameters()))
report = f"{type(optimizer.exchange).__name__} {optimizer.exchange.num_peers} {digest.hexdigest()}"
Path(sys.argv[1], "report" + rank).write_text(report)
torch.distributed.destroy_process_group()
"""


def test_under_torchrun_a_script_without_a_process_group_gets_one(tmp_path: Path) -> None:
    script = tmp_path / "train.py"
    script.write_text(SCRIPT)
    done = warm_python.run(
        [
            sys.executable,
            "-m",
            "torch.distributed.run",
            "--standalone",
            "--nproc-per-node=2",
            str(script),
            str(tmp_path),
        ],
        capture_output=True,
        text=True,
        timeout=200,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        its_children_too=True,
    )
    assert done.returncode == 0, done.stderr
    first, second = (Path(tmp_path, f"report{rank}").read_text() for rank in range(2))
    assert first == second
    assert first.split()[:2] == ["ProcessGroupExchange", "2"]
