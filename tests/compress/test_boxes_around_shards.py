"""A part of a tensor is cut into the tiles that it has in the whole, each of which belongs to one part."""

from __future__ import annotations

from itertools import pairwise, product

import pytest
import torch

from distro_optim.compress import ParamSpec, make_plan, tile_grid
from distro_optim.compress.planning import plan_of_part
from distro_optim.compress.shards import Span, box_around, box_owned

EDGES = (0, 1, 15, 16, 17, 32, 40)


@pytest.mark.parametrize("shard", list(product(pairwise(EDGES), [(0, 33), (5, 20), (16, 32)])))
def test_a_box_is_the_least_that_has_all_elements_of_the_tiles_that_the_shard_touches(shard: tuple[Span, Span]) -> None:
    grid = tile_grid((40, 33), 16, "padded")
    numbers = torch.arange(grid.rows * grid.cols).view(grid.rows, grid.cols)
    tile_of = numbers.repeat_interleave(16, 0)[:40].repeat_interleave(16, 1)[:, :33]
    touched = set(tile_of[slice(*shard[0]), slice(*shard[1])].flatten().tolist())
    box = box_around(shard, grid)
    assert set(box.tiles(grid).tolist()) == touched
    assert set(box.of_whole(tile_of).flatten().tolist()) == touched
    assert box.of_whole(tile_of).numel() == sum(int((tile_of == tile).sum()) for tile in touched)
    assert torch.equal(box.shard_of(box.of_whole(tile_of)), tile_of[slice(*shard[0]), slice(*shard[1])])
    assert (box.grid.h, box.grid.w, box.grid.tiles) == (16, 16, len(touched))


@pytest.mark.parametrize(
    ("shape", "tiling", "shard"),
    [
        ((50,), "padded", [(10, 20)]),
        ((4, 40, 40), "divisor", [(0, 4), (10, 20), (0, 40)]),
        ((4, 40, 40), "padded", [(0, 4), (0, 10), (0, 40)]),
        ((37, 64), "divisor", [(0, 10), (0, 64)]),  # tiles of one row
    ],
)
def test_what_has_no_rows_of_tiles_is_kept_as_a_whole(shape: tuple[int, ...], tiling: str, shard: list[Span]) -> None:
    grid = tile_grid(shape, 16, tiling)  # type: ignore[arg-type]
    box = box_around(shard, grid)
    assert box == box_owned(shard, grid)
    assert box.shape == shape
    assert box.grid is grid
    assert box.tiles(grid).tolist() == list(range(grid.tiles))
    assert box.shard_of(torch.zeros(shape)).shape == tuple(stop - start for start, stop in shard)


def test_a_batch_of_matrices_is_told_apart_matrix_by_matrix() -> None:
    grid = tile_grid((4, 3, 40, 24), 16, "divisor")
    shard = [(1, 3), (0, 3), (0, 40), (0, 24)]
    box = box_owned(shard, grid)
    assert box == box_around(shard, grid)
    assert box.is_shard
    per_matrix = grid.rows * grid.cols
    assert box.tiles(grid).tolist() == list(range(3 * per_matrix, 9 * per_matrix))
    assert (box.grid.lead, box.grid.h, box.grid.w, box.grid.tiles) == ((2, 3), grid.h, grid.w, 6 * per_matrix)


ROWS = (0, 5, 5, 16, 17, 18, 40)
COLUMNS = (0, 20, 33)


@pytest.mark.parametrize("tiling", ["padded", "divisor"])
def test_each_tile_is_owned_by_the_shard_that_has_its_first_element(tiling: str) -> None:
    grid = tile_grid((40, 33), 16, tiling)  # type: ignore[arg-type]
    owners = torch.zeros(grid.tiles, dtype=torch.int64)
    for rows, columns in product(pairwise(ROWS), pairwise(COLUMNS)):
        box = box_owned([rows, columns], grid)
        tiles = box.tiles(grid)
        owners[tiles] += 1
        assert len(tiles) == box.grid.tiles
        for tile in tiles.tolist():
            y, x = tile // grid.cols * grid.h, tile % grid.cols * grid.w
            assert rows[0] <= y < rows[1]
            assert columns[0] <= x < columns[1]
    assert owners.tolist() == [1] * grid.tiles


def test_a_shard_without_elements_has_no_tiles() -> None:
    grid = tile_grid((40, 33), 16, "padded")
    box = box_around([(40, 40), (0, 33)], grid)
    assert box.grid.tiles == len(box.tiles(grid)) == 0
    assert box.shape == (0, 33)


def test_a_shard_inside_of_a_tile_owns_none() -> None:
    grid = tile_grid((40, 33), 16, "padded")
    box = box_owned([(17, 31), (0, 33)], grid)
    assert box.grid.tiles == len(box.tiles(grid)) == 0
    assert box.shape == (0, 33)
    assert box.shard == ((17, 31), (0, 33))


def test_the_plan_of_a_part_has_the_batches_of_the_whole() -> None:
    specs = [ParamSpec(shape, torch.float32, torch.device("cpu"), 0, 16, 4) for shape in ((33, 33), (32, 32), (7, 7))]
    plan = make_plan(specs, "padded", arithmetic="exact")
    shards: list[list[Span]] = [[(32, 33), (0, 33)], [(0, 16), (0, 32)], [(7, 7), (0, 7)]]
    part = plan_of_part(plan, [box_around(s, g).grid for s, g in zip(shards, plan.grids, strict=True)])
    # A box with one row of elements is of tiles with sixteen; an exact grid stays one, and another does not become one.
    assert [(b.h, b.w, b.k, b.tiles, b.tiles_of_all) for b in part.batches] == [(16, 16, 4, 3, 9), (16, 16, 4, 2, 4)]
    assert [grid.exact for grid in part.grids] == [grid.exact for grid in plan.grids] == [False, True, True]
    assert part.layout == plan.layout
    assert not any(piece.flat for batch in part.batches for block in batch.blocks for piece in block.pieces)
