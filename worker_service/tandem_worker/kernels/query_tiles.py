"""How the queries of prompt chunks are cut into tiles, the units of work of attention over chunks. Knows no torch."""

import numpy as np

from tandem_shared.step_plan import Int32Array

TILE_QUERIES = 128
"""Queries in a tile, at most."""
TILE_FIELDS = 5
"""Numbers that describe a tile, see cut_tiles."""


def cut_tiles(rows: np.ndarray, starts: np.ndarray, counts: np.ndarray, first_token: int = 0) -> Int32Array:
    """Cuts chunks, which are packed one after the other from token first_token on, into tiles of TILE_QUERIES queries.

    rows, starts (the position of the chunk's first token) and counts are (chunks,). Returns (tiles, TILE_FIELDS): the
    row, the index of the tile's first token in the step, the number of queries, the position of the tile's first
    token, and the position of its chunk's first token. A tile of no queries is padding.
    """
    num_tiles = -(-counts // TILE_QUERIES)
    chunk = np.repeat(np.arange(len(rows)), num_tiles)
    offset = (np.arange(len(chunk)) - np.repeat(np.cumsum(num_tiles) - num_tiles, num_tiles)) * TILE_QUERIES
    first = first_token + (np.cumsum(counts) - counts)[chunk] + offset
    count = np.minimum(counts[chunk] - offset, TILE_QUERIES)
    tiles = np.stack([rows[chunk], first, count, starts[chunk] + offset, starts[chunk]], 1)
    # The tiles with the longest context come first, so that all of the GPU's processors end at about the same time.
    return tiles[np.argsort(-tiles[:, 3], kind="stable")].astype(np.int32)
