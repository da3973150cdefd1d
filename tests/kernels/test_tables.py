"""Which tiles the kernels visit, and which they do not compare, against the dense visibility."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flashlla_jax.kernels.tables import by_key_tiles, by_query_tiles
from flashlla_jax.visibility import Hiding, Visibility, dense, visibility

ROWS, COLUMNS = 16, 8  # of a tile
CUT = 4


def hidden(ids: np.ndarray, window: tuple[int, int] | None = None, lengths: Any = None) -> Visibility:
    segments = jnp.asarray(ids)
    lengths = None if lengths is None else jnp.asarray(lengths)
    hiding = Hiding(True, window, 0, lengths, None, (segments, segments), True, None)
    return visibility(hiding, ids.shape[1], ids.shape[1])


def compared(rows: np.ndarray) -> int:
    """How many tiles of keys are."""
    low, whole, whole_end, high = np.moveaxis(rows, -1, 0)
    return int(np.sum(whole - low + high - whole_end))


def documents(*lengths: int) -> np.ndarray:
    return np.repeat(np.arange(len(lengths)), lengths)[None]


RNG = np.random.default_rng(0)
CASES: dict[str, Callable[[], Visibility]] = {
    "documents": lambda: hidden(documents(37, 80, 20, 63)),
    "more borders than tiles that may be cut": lambda: hidden(documents(*[20] * 10)),
    "of several rows": lambda: hidden(np.concatenate([documents(100, 101), documents(7, 194)])),
    "interleaved": lambda: hidden(RNG.integers(0, 3, (2, 201))),
    "in a window": lambda: hidden(documents(90, 111), (50, 0)),
    "queries that see nothing": lambda: hidden(documents(90, 111), None, np.array([130])),
    "fewer tiles than one may be cut of": lambda: hidden(documents(17, 23)),
}


@pytest.mark.parametrize("cut", [0, CUT])
@pytest.mark.parametrize("name", CASES)
def test_every_query_has_one_program_that_visits_all_it_sees(name: str, cut: int) -> None:
    seen = CASES[name]()
    length = seen.start.shape[1]
    shown = np.asarray(dense(seen, length))[:, 0]
    table = jax.tree.map(np.asarray, jax.jit(lambda seen: by_query_tiles(seen, length, ROWS, COLUMNS, cut))(seen))
    tiles = -(-length // ROWS)
    assert table.rows.shape[1:] == (1, tiles + (tiles // cut if cut else 0), 4)
    for batch, visible in enumerate(shown):
        served = np.zeros(tiles * ROWS, int)
        bounds = table.order[batch, 0] if cut else [(tile * ROWS, (tile + 1) * ROWS) for tile in range(tiles)]
        for (low, whole, whole_end, high), (first, stop) in zip(table.rows[batch, 0], bounds, strict=True):
            served[first:stop] += 1
            mine = visible[first:stop]
            assert mine[:, low * COLUMNS : high * COLUMNS].sum() == mine.sum()
            assert mine[mine.any(1), whole * COLUMNS : whole_end * COLUMNS].all()
        assert np.all(served == 1)


def test_documents_are_cut_apart_and_the_most_work_comes_first() -> None:
    seen = CASES["documents"]()  # they meet at 37 and 117 inside of tiles, where 37 and 80 keys end, and at 137
    table = jax.tree.map(np.asarray, by_query_tiles(seen, 200, ROWS, COLUMNS, CUT))
    bounds = {(int(first), int(stop)) for first, stop in table.order[0, 0] if first < stop}
    assert {(32, 37), (37, 48), (112, 117), (117, 128), (128, 137), (137, 144)} <= bounds
    visited = table.rows[0, 0, :, 3] - table.rows[0, 0, :, 0]
    assert np.all(np.diff(visited[: len(bounds)]) <= 0)
    whole = by_query_tiles(seen, 200, ROWS, COLUMNS)
    assert compared(table.rows) < compared(np.asarray(whole.rows))


def test_no_more_than_one_tile_of_so_many_is_cut() -> None:
    """Those where the longest documents end."""
    seen = hidden(documents(20, 50, 30, 41, 59))  # they meet at 20, 70, 100 and 141
    first = np.asarray(by_query_tiles(seen, 200, ROWS, COLUMNS, CUT).order)[0, 0, :, 0]
    tiles = 13
    assert tiles // CUT == 3
    assert {int(x) for x in first[first % ROWS != 0]} == {70, 100, 141}


@pytest.mark.parametrize("name", CASES)
def test_every_key_is_visited_by_the_queries_that_see_it(name: str) -> None:
    seen = CASES[name]()
    length = seen.start.shape[1]
    shown = np.asarray(dense(seen, length))[:, 0]
    table = jax.tree.map(np.asarray, by_key_tiles(seen, length, ROWS, COLUMNS))
    for batch, visible in enumerate(shown):
        for tile, (low, whole, whole_end, high) in enumerate(table.rows[batch, 0]):
            mine = visible[:, tile * COLUMNS : (tile + 1) * COLUMNS]
            assert mine[low * ROWS : high * ROWS].sum() == mine.sum()
            compared_not = mine[whole * ROWS : whole_end * ROWS]
            assert compared_not[visible[whole * ROWS : whole_end * ROWS].any(1)].all()
