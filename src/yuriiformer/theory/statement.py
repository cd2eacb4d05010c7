"""A statement: what theory claims, the numbers that were computed, and whether the two agree. Plain data throughout."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal


def finite(number: float) -> float | None:
    """Infinity as None: JSON has no word for it."""
    return number if math.isfinite(number) else None


@dataclass(frozen=True)
class Row:
    """One number beside what theory says of it."""

    what: str
    number: float | None  # None: not reached
    expected: float | None = None  # None: measured, and theory claims nothing
    tolerance: float = 0.0
    relation: Literal["=", "<=", ">="] = "="
    should: bool = True  # false where theory itself says that the claim fails

    @property
    def holds(self) -> bool | None:
        """None where nothing is claimed. A number that is not finite holds nothing."""
        if self.expected is None:
            return None
        if self.number is None:
            return False
        off = self.number - self.expected
        return bool({"=": abs(off), "<=": off, ">=": -off}[self.relation] <= self.tolerance)

    @property
    def as_expected(self) -> bool:
        return self.holds is None or self.holds == self.should


@dataclass(frozen=True)
class Line:
    """A curve of a plot."""

    name: str
    x: list[float]
    y: list[float]
    style: Literal["solid", "dashed", "dots"] = "solid"
    color: int | None = None  # an index; None counts on


@dataclass(frozen=True)
class Plot:
    """Curves in one frame, and what one should see in them."""

    see: str
    x: str
    y: str
    lines: list[Line]
    log: Literal["", "x", "y", "xy"] = ""


@dataclass(frozen=True)
class Spheres:
    """Points on a sphere: a row of pictures for each name, a column for each step. points[row][column][point] = (x, y, z)."""

    see: str
    names: list[str]
    steps: list[int]
    points: list[list[list[list[float]]]]


@dataclass(frozen=True)
class Statement:
    """A claim of the theory, computed."""

    name: str
    title: str
    equation: str
    claim: str
    rows: list[Row]
    plots: Sequence[Plot | Spheres] = ()
    notes: Sequence[str] = ()  # what the numbers do not say by themselves

    @property
    def as_expected(self) -> bool:
        return all(row.as_expected for row in self.rows)

    @property
    def verdict(self) -> str:
        """In one line; what fails is said as plainly as what holds."""
        claimed = [row for row in self.rows if row.holds is not None]
        failing = [row for row in claimed if not row.holds]
        if unexpected := [row for row in claimed if not row.as_expected]:
            return f"not as theory says: {'; '.join(row.what for row in unexpected)}"
        if not failing:
            return f"holds ({len(claimed)} of {len(claimed)})" if claimed else "measured"
        shown = "; ".join(
            f"{row.what} ({'not reached' if row.number is None else f'{row.number:.2g}'})" for row in failing[:3]
        )
        more = f"; and {len(failing) - 3} more" if len(failing) > 3 else ""
        return f"holds in {len(claimed) - len(failing)} of {len(claimed)}; does not, as theory says: {shown}{more}"

    def as_dict(self) -> dict[str, Any]:
        data = dataclasses.asdict(self)
        for row, entry in zip(self.rows, data["rows"], strict=True):
            entry |= {"holds": row.holds, "as_expected": row.as_expected}
        for plot, entry in zip(self.plots, data["plots"], strict=True):
            entry["kind"] = type(plot).__name__.lower()
        return data | {"as_expected": self.as_expected, "verdict": self.verdict}
