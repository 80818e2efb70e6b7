"""Of tensors that are sharded, what a rank needs and has not comes to it once, from the nearest who has it."""

from __future__ import annotations

import itertools
from collections import Counter

import pytest

from distro_optim.compress import tile_grid
from distro_optim.compress.shards import Span, box_owned
from distro_optim.optim.shards.routes import Rectangle, Route, Routes, routes

ROWS: tuple[Span, ...] = ((0, 13), (13, 26), (26, 39), (39, 50))
THIN: tuple[Span, ...] = ((0, 2), (2, 4), (4, 5), (5, 5))
SQUARE: list[tuple[int, ...]] = [(0, 0), (0, 1), (1, 0), (1, 1)]
LINE: list[tuple[int, ...]] = [(n,) for n in range(4)]

CASES: dict[str, tuple[list[tuple[int, ...]], tuple[int, int], list[Rectangle]]] = {
    "rows": (LINE, (50, 33), [(rows, (0, 33)) for rows in ROWS]),
    "more ranks than rows": (LINE, (5, 33), [(rows, (0, 33)) for rows in THIN]),
    "columns": (LINE, (33, 50), [((0, 33), columns) for columns in ROWS]),
    "a square": (SQUARE, (50, 33), list(itertools.product([(0, 25), (25, 50)], [(0, 17), (17, 33)]))),
    "copies": (SQUARE, (50, 33), [((0, 25), (0, 33)), ((25, 50), (0, 33))] * 2),
}


def elements(part: Rectangle) -> list[tuple[int, ...]]:
    return list(itertools.product(*(range(*span) for span in part)))


@pytest.mark.parametrize("tiling", ["padded", "divisor"])
@pytest.mark.parametrize("back", [False, True], ids=["to the owners", "and back"])
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_everybody_gets_what_it_needs_once(
    case: tuple[list[tuple[int, ...]], tuple[int, int], list[Rectangle]], back: bool, tiling: str
) -> None:
    coordinates, shape, shards = case
    grid = tile_grid(shape, 16, tiling)  # type: ignore[arg-type]
    boxes = [box_owned(shard, grid).spans for shard in shards]
    have, need = [[[part] for part in parts] for parts in ((boxes, shards) if back else (shards, boxes))]
    everybody = [routes(coordinates, place, have, need) for place in range(4)]
    crossed = 0
    for place, here in enumerate(everybody):
        assert here.travel == everybody[0].travel
        assert not here.to[place]
        assert not here.come[place]
        got: Counter[tuple[int, ...]] = Counter()
        for source, there in enumerate(here.come):
            assert there == everybody[source].to[place]
            for route in there:
                assert route.elements == len(elements(route.part))
                assert set(elements(route.part)) <= set(elements(have[source][0]))
                got.update(elements(route.part))
        wanted = set(elements(need[place][0])) - set(elements(have[place][0]))
        assert got == Counter(wanted)
        crossed += len(wanted)
    assert everybody[0].travel == (frozenset({0}) if crossed else frozenset())


def test_copies_of_a_shard_send_to_who_is_near() -> None:
    _, _, shards = CASES["copies"]
    grid = tile_grid((50, 33), 16, "padded")
    have, need = [[part] for part in shards], [[box_owned(shard, grid).spans] for shard in shards]

    def of(place: int) -> Routes:
        return routes(SQUARE, place, have, need)

    row = [Route(0, ((25, 32), (0, 33)))]
    assert of(0).come == [[], row, [], []]
    assert of(2).come == [[], [], [], row]


def test_what_lies_on_edges_of_tiles_stays_where_it_is() -> None:
    shards: list[Rectangle] = [((start, start + 16), (0, 33)) for start in range(0, 64, 16)]
    grid = tile_grid((64, 33), 16, "padded")
    have, need = [[part] for part in shards], [[box_owned(shard, grid).spans] for shard in shards]
    assert not routes(LINE, 0, have, need).travel
