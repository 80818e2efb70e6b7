"""How tensors of any shape are cut into tiles, and that a plan covers every element once."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from distro_optim.compress import ParamSpec, TilePlan, make_plan, profile, tile_grid
from distro_optim.compress.tiling import TILINGS, Tiling, largest_divisor
from distro_optim.errors import ConfigurationError

CPU = torch.device("cpu")

shapes = st.one_of(
    st.just(()),
    st.tuples(st.integers(0, 70)),
    st.tuples(st.integers(0, 40), st.integers(0, 40)),
    st.lists(st.integers(0, 6), min_size=3, max_size=5).map(tuple),
)


def spec(shape: tuple[int, ...], chunk: int = 8, *, dtype: torch.dtype = torch.float32, topk: int = 3) -> ParamSpec:
    return ParamSpec(shape, dtype, CPU, 0, chunk, topk)


@given(size=st.integers(1, 3000), limit=st.integers(1, 300))
def test_the_largest_divisor_is_found(size: int, limit: int) -> None:
    assert largest_divisor(size, limit) == max(d for d in range(1, limit + 1) if size % d == 0)


@pytest.mark.parametrize(
    ("size", "limit", "expected"), [(12, 5, 4), (100, 26, 25), (100, 7, 5), (50257, 64, 29), (101, 64, 1)]
)
def test_the_published_rule_gives_the_known_sides(size: int, limit: int, expected: int) -> None:
    assert largest_divisor(size, limit) == expected


@pytest.mark.parametrize(
    ("shape", "tiling", "coded"),
    [
        ((), "divisor", (1, 1)),
        ((), "padded", (1, 1)),
        ((130,), "divisor", (2, 65)),
        ((130,), "padded", (2, 100)),
        ((7,), "divisor", (1, 7)),
        ((101,), "divisor", (101, 1)),
        ((101,), "padded", (2, 100)),
        ((256, 384), "divisor", (4, 4, 64, 96)),
        ((256, 384), "padded", (3, 4, 100, 100)),
        ((101, 103), "divisor", (101, 103, 1, 1)),
        ((101, 103), "padded", (2, 2, 100, 100)),
        ((16, 8, 3, 3), "divisor", (16, 8, 1, 1, 3, 3)),
        ((16, 8, 3, 3), "padded", (1, 1, 16, 72)),
        ((2, 3, 4, 5, 6), "divisor", (2, 3, 4, 1, 1, 5, 6)),
        ((0,), "divisor", (0, 1)),
        ((0, 5), "padded", (0, 1, 1, 1, 1)),
        ((3, 0, 5), "divisor", (0, 1, 1, 1, 1)),
    ],
)
def test_a_shape_is_cut_like_this(shape: tuple[int, ...], tiling: Tiling, coded: tuple[int, ...]) -> None:
    assert tile_grid(shape, 100, tiling).coded_shape == coded


@pytest.mark.slow
@given(shape=shapes, chunk=st.integers(1, 20), tiling=st.sampled_from(TILINGS))
def test_tiles_are_no_longer_than_the_chunk_and_hold_the_whole_tensor(
    shape: tuple[int, ...], chunk: int, tiling: Tiling
) -> None:
    grid = tile_grid(shape, chunk, tiling)
    assert 1 <= grid.h <= chunk
    assert 1 <= grid.w <= chunk
    assert grid.tiles * grid.tile_size >= math.prod(shape)
    assert math.prod(grid.coded_shape) == grid.tiles * grid.tile_size
    if tiling == "divisor" or not grid.tiles:
        assert grid.tiles * grid.tile_size == math.prod(shape)


@given(
    sides=st.lists(st.tuples(st.integers(1, 6), st.integers(0, 3)), max_size=2),
    chunk=st.sampled_from([2, 3, 4, 6]),
)
def test_both_rules_agree_where_dimensions_divide(sides: list[tuple[int, int]], chunk: int) -> None:
    shape = tuple(min(small, chunk) if not times else chunk * times for small, times in sides)
    assert tile_grid(shape, chunk, "divisor") == tile_grid(shape, chunk, "padded")


# ---------------------------------------------------------------- plans


def times_covered(plan: TilePlan) -> list[torch.Tensor]:
    """How often the regions of a plan reach each element of each tensor."""
    counts = [torch.zeros(s.shape) for s in plan.specs]
    for batch in plan.batches:
        for block in batch.blocks:
            for piece in block.pieces:
                for region in piece.regions:
                    region.of_tensor(counts[piece.param]).add_(1)
    return counts


@st.composite
def plans(draw: st.DrawFn) -> TilePlan:
    specs = draw(
        st.lists(
            st.builds(
                ParamSpec,
                shape=shapes,
                dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float64]),
                device=st.just(CPU),
                group=st.integers(0, 1),
                chunk=st.sampled_from([3, 8]),
                topk=st.integers(1, 80),
            ),
            max_size=5,
        )
    )
    return make_plan(specs, draw(st.sampled_from(TILINGS)))


@pytest.fixture(autouse=True, scope="module", params=[200, profile.CPU.block_elements], ids=["tiny", "real"])
def block_elements(request: pytest.FixtureRequest) -> Iterator[int]:
    """Blocks so small that grids are cut in every way, and blocks as they are."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(profile, "CPU", replace(profile.CPU, block_elements=request.param))
        yield request.param


@pytest.mark.slow
@given(plan=plans())
@settings(max_examples=60, deadline=None)
def test_every_element_is_reached_exactly_once(plan: TilePlan) -> None:
    for count in times_covered(plan):
        assert bool((count == 1).all())


@pytest.mark.slow
@given(plan=plans())
@settings(max_examples=60, deadline=None)
def test_no_two_elements_share_a_place_in_a_block(plan: TilePlan) -> None:
    for batch in plan.batches:
        for block in batch.blocks:
            places = torch.zeros(block.tiles, batch.h, batch.w)
            for piece in block.pieces:
                for region in piece.regions:
                    window = region.of_block(places)
                    assert window.shape == region.size
                    window.add_(1)
                tiles = places[piece.block_start : piece.block_stop]
                assert piece.partial == bool((tiles == 0).any())
            assert float(places.max()) == 1


@pytest.mark.slow
@given(plan=plans())
@settings(max_examples=60, deadline=None)
def test_blocks_follow_each_other_and_hold_no_more_than_they_may(plan: TilePlan) -> None:
    for batch in plan.batches:
        capacity = max(1, batch.profile.block_elements // batch.tile_size)
        assert [b.start for b in batch.blocks] == [0, *(b.stop for b in batch.blocks)][:-1]
        assert batch.blocks[-1].stop == batch.tiles
        for block in batch.blocks:
            assert 1 <= block.tiles <= capacity
            assert [p.block_start for p in block.pieces] == [0, *(p.block_stop for p in block.pieces)][:-1]
            assert block.pieces[-1].block_stop == block.tiles
            for piece in block.pieces:
                assert len(piece.regions) <= 4
                assert batch.ranges[piece.param][0] + piece.start == block.start + piece.block_start


@pytest.mark.slow
@given(plan=plans())
@settings(max_examples=60, deadline=None)
def test_tensors_of_a_batch_share_everything_that_its_arithmetic_depends_on(plan: TilePlan) -> None:
    for number, (tensor, grid) in enumerate(zip(plan.specs, plan.grids, strict=True)):
        home = plan.home[number]
        assert (home is None) == (math.prod(tensor.shape) == 0)
        if home is not None:
            batch = plan.batches[home]
            assert (batch.group, batch.h, batch.w, batch.k) == (tensor.group, grid.h, grid.w, plan.topk[number])
            assert batch.value_dtype == tensor.dtype
            assert batch.compute_dtype == (torch.float64 if tensor.dtype == torch.float64 else torch.float32)
            start, stop = batch.ranges[number]
            assert stop - start == grid.tiles


def test_many_small_tensors_share_a_few_batches() -> None:
    plan = make_plan([spec((64, 64), 64) for _ in range(40)] + [spec((64,), 64) for _ in range(40)], "padded")
    assert len(plan.batches) == 2


@pytest.mark.parametrize(("tiles", "capacity"), [(40, 32), (512, 32), (800, 50), (1024, 64), (5000, 64)])
def test_a_batch_has_blocks_for_several_threads_unless_they_would_be_less_than_half_as_large(
    tiles: int, capacity: int
) -> None:
    way = replace(profile.CPU, block_elements=64 * 64, fewest_blocks=16)
    plan = make_plan([spec((8 * tiles, 8), 8)], "padded", profile=lambda _: way)
    assert max(block.tiles for block in plan.batches[0].blocks) == min(tiles, capacity)


def test_the_layout_is_equal_exactly_where_plans_are() -> None:
    base = make_plan([spec((8, 8)), spec((5,))], "divisor").layout
    assert make_plan([spec((8, 8)), spec((5,))], "divisor").layout == base
    assert make_plan([spec((8, 8)), spec((5,))], "padded").layout == base  # the same tiles
    others = [
        [spec((5,)), spec((8, 8))],
        [spec((8, 8))],
        [spec((8, 8)), spec((5,)), spec((0,))],
        [spec((8, 8)), spec((5, 1))],
        [spec((8, 8), 4), spec((5,))],
        [spec((8, 8), topk=4), spec((5,))],
        [spec((8, 8), dtype=torch.float64), spec((5,))],
    ]
    layouts = {make_plan(specs, "divisor").layout for specs in others}
    assert len(layouts) == len(others)
    assert base not in layouts


def test_a_plan_of_nothing_is_a_plan() -> None:
    plan = make_plan([], "padded")
    assert len(plan) == 0
    assert plan.batches == ()


def test_a_tile_with_more_positions_than_an_index_can_name_is_refused() -> None:
    largest = (46_340, 46_341)
    assert make_plan([spec(largest, 46_340)], "padded").grids[0].tiles == 2
    with pytest.raises(ConfigurationError, match=r"compression_chunk=65535 .* at most 46340"):
        make_plan([spec((50_000, 50_000), 65_535)], "padded")
