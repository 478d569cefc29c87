"""How clusters share tiles: every block of K once, and every sum that is left for others added once."""

from __future__ import annotations

import ctypes
from collections import defaultdict
from itertools import product

import emulator as emulation
import pytest

_DRIVER = """
#include "fp4gemm/pieces.hpp"
namespace fp4gemm {
// Of each piece of a cluster its tile, blocks and whether it ends the tile; returns how many pieces there are.
extern "C" int pieces(int tiles, int tile_blocks, int clusters, int cluster, int* out, int room) {
  Pieces const all(tiles, tile_blocks, clusters);
  int count = 0;
  for (Piece p = all.first(cluster); p.tile < tiles; p = all.next(p, cluster), ++count) {
    if (count == room) return -1;
    int const numbers[] = {p.tile, p.block, p.count, all.ends(p)};
    for (int i = 0; i < 4; ++i) out[4 * count + i] = numbers[i];
  }
  return count;
}
extern "C" int continues(int tiles, int tile_blocks, int clusters, int part, int tile) {
  return Pieces(tiles, tile_blocks, clusters).continues(part, tile);
}
}  // namespace fp4gemm
"""
_ROOM = 4096


@pytest.fixture(scope="module")
def library(emulator: emulation.Emulator) -> ctypes.CDLL:
    return emulation.compile_cpp(emulator.folder, "pieces", _DRIVER)


def pieces_of(library: ctypes.CDLL, problem: tuple[int, int, int], cluster: int) -> list[tuple[int, int, int, bool]]:
    out = (ctypes.c_int * (4 * _ROOM))()
    count = library.pieces(*problem, cluster, out, _ROOM)
    assert count >= 0, f"{problem}: cluster {cluster} does not end"
    return [(out[4 * i], out[4 * i + 1], out[4 * i + 2], bool(out[4 * i + 3])) for i in range(count)]


PROBLEMS = (
    *product((1, 2, 3, 26, 64, 65, 66, 67, 92, 98, 99, 100, 131, 132, 224, 512), (1, 3, 7, 8, 9, 64, 128, 1000), (66,)),
    *product((1, 5, 7, 8, 9, 11, 12, 13, 40), (1, 4, 5, 16, 33), (1, 2, 3, 8)),
    (1024, 128, 66),
    (300, 224, 132),
)


@pytest.mark.parametrize("problem", PROBLEMS, ids=str)
def test_pieces(problem: tuple[int, int, int], library: ctypes.CDLL) -> None:
    tiles, tile_blocks, clusters = problem
    parts_of: dict[int, list[tuple[int, int, int, bool]]] = defaultdict(list)  # of a tile: first, count, cluster, ends
    work = []
    for cluster in range(clusters):
        pieces = pieces_of(library, problem, cluster)
        work.append(sum(count for _, _, count, _ in pieces))
        for i, (tile, first, count, ends) in enumerate(pieces):
            assert count > 0
            assert ends or i == 0, "a sum that others wait for is computed first, and there is one place for it"
            parts_of[tile].append((first, count, cluster, ends))
    assert sorted(parts_of) == list(range(tiles))
    for tile, parts in parts_of.items():
        at = 0
        for first, count, _, ends in sorted(parts):
            assert first == at, f"tile {tile}: a block twice, or not at all"
            at += count
            assert ends == (at == tile_blocks)
        assert at == tile_blocks
        *others, (first, _, cluster, _) = sorted(parts)
        fetched, part = [], cluster
        while first > 0 and library.continues(*problem, part, tile):
            part -= 1
            fetched.append(part)
        assert fetched == [other for _, _, other, _ in reversed(others)], f"tile {tile}: sums that are not added"
    assert max(work) <= -(-tiles // clusters) * tile_blocks, "slower than whole tiles"
    # No more than an equal share, but for ends that are moved to the border of a tile; a short K is not worth a cut.
    if tile_blocks >= 8 and tiles * tile_blocks >= 8 * clusters:
        assert max(work) <= tiles * tile_blocks / clusters + 1 + 2 * 3


def test_a_k_that_numbers_do_not_hold_is_not_cut(library: ctypes.CDLL) -> None:
    problem = (67, 10**6, 66)
    assert pieces_of(library, problem, 0) == [(0, 0, 10**6, True), (66, 0, 10**6, True)]
