"""Four processes that hold one model together (FSDP2 over tensor parallelism, 2 x 2) are one peer of a run."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch.distributed.fsdp

from optimizer.process_group_ranks import RankPool

from . import shard_ranks

pytestmark = [
    pytest.mark.waiting,
    pytest.mark.slow,
    pytest.mark.skipif(
        not hasattr(torch.distributed.fsdp, "fully_shard"), reason="FSDP2 comes with PyTorch 2.6 and later"
    ),
]


@pytest.fixture(scope="module")
def pool(tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[RankPool]]:
    """One pool of four ranks for all tests; a test that breaks it puts another in its place."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_NUM_THREADS", "1")
        pools = [RankPool(4, tmp_path_factory.mktemp("ranks"))]
        yield pools
        pools[0].close()


@pytest.mark.parametrize("job", shard_ranks.JOBS, ids=lambda job: job.__name__)
def test_on_four_ranks(job: Callable[..., None], pool: list[RankPool], tmp_path: Path) -> None:
    if pool[0].broken:
        pool[0] = RankPool(4, tmp_path)
    with_folder = "folder" in inspect.signature(job).parameters
    pool[0].run(functools.partial(job, folder=tmp_path / "saved") if with_folder else job)
