"""What the host knows of a group, and how much room its results need whatever the device says."""

from __future__ import annotations

from dataclasses import dataclass

from fp4gemm.formats import BLOCK, ScaleLayout

PARTIAL_ROWS = 128
"""Rows that the first pass of a sum over columns has together."""


def _up(size: int, unit: int) -> int:
    return -(-size // unit) * unit


@dataclass(frozen=True)
class GroupShape:
    """``members`` tensors of ``rows`` x ``columns`` values each, None where that varies, in a buffer of ``elements``.

    All of them together have ``row_bound`` rows and ``column_bound`` columns at most.
    """

    members: int
    rows: int | None
    columns: int | None
    elements: int
    row_bound: int
    column_bound: int

    def transposed(self) -> GroupShape:
        """That of the transposes."""
        return GroupShape(
            self.members, self.columns, self.rows, self.elements, self.column_bound, self.row_bound
        )  # fmt: skip

    def area(self, row_unit: int, column_unit: int) -> int:
        """The largest sum over members of rows x columns, each rounded up to whole units."""
        rows, columns = self.rows, self.columns
        row_sum, column_sum = self._sum(self.row_bound, row_unit), self._sum(self.column_bound, column_unit)
        if rows is not None and columns is not None:
            return self.members * _up(rows, row_unit) * _up(columns, column_unit)
        if columns is not None:
            return row_sum * _up(columns, column_unit)
        if rows is not None:
            return _up(rows, row_unit) * column_sum
        # (m + a) (k + b) summed, a and b what rounding can add.
        a, b = row_unit - 1, column_unit - 1
        return self.elements + b * self.row_bound + a * self.column_bound + self.members * a * b

    def data_bytes(self) -> int:
        """Codes of the result whose lines are the rows."""
        return self.area(1, BLOCK) // 2

    def scale_bytes(self, layout: ScaleLayout) -> int:
        """Its block scales, each member padded to whole tiles of the layout."""
        return self.area(layout.row_tile, layout.col_tile * BLOCK) // BLOCK

    def partial_sums(self) -> int:
        """Sums of the columns of each 128 rows; a member without rows has one of each."""
        return self.elements // PARTIAL_ROWS + self.column_bound

    def _sum(self, bound: int, unit: int) -> int:
        """The largest sum of sizes, each rounded up, if they are ``bound`` together: those of size 0 add nothing."""
        return (bound + (unit - 1) * min(self.members, bound)) // unit * unit
