"""A model that is sharded over ranks (DTensors) has every bit of the model that is not: four processes, one peer."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest

from optimizer import sharded_ranks
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


@pytest.mark.parametrize("job", sharded_ranks.JOBS, ids=lambda job: job.__name__)
def test_on_four_ranks(
    job: Callable[[int, int], None], pool: list[RankPool], tmp_path_factory: pytest.TempPathFactory
) -> None:
    if pool[0].broken:
        pool[0] = RankPool(4, tmp_path_factory.mktemp("ranks"))
    pool[0].run(job)
