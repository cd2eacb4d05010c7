"""A comparison as a table: on the terminal and as Markdown."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.table import Table

from .statistics import mean, spread

HEADERS = (
    "arm", "parameters", "FLOPs/token", "tokens/s", "steps", "seconds", "final loss", "best loss", "against the baseline", "p (Holm)",
)  # fmt: skip


def rows(comparison: dict[str, Any]) -> list[tuple[str, ...]]:
    """The cells of each arm, in the order of HEADERS."""
    return [
        (
            arm["name"],
            f"{arm['parameters']:,}",
            f"{arm['flops_per_token'] / 1e6:.2f} M",
            f"{arm['tokens_per_second']:,.0f}",
            f"{arm['steps']}",
            f"{mean(arm['seconds']):.0f}",
            f"{mean(arm['final_validation'].values()):.4f}{spread(arm['final_validation'].values())}",
            f"{mean(arm['best_validation'].values()):.4f}",
            *against(arm["against_baseline"]),
        )
        for arm in comparison["arms"]
    ]


def against(test: dict[str, Any] | None) -> tuple[str, str]:
    """A difference with its interval, and its p-value; dashes for the baseline and where one seed gives none."""
    if test is None:
        return "–", "–"
    if test["low"] is None:
        return f"{test['mean_difference']:+.4f}", "–"
    return f"{test['mean_difference']:+.4f} [{test['low']:+.4f}, {test['high']:+.4f}]", f"{test['p_value_holm']:.2g}"


def show(comparison: dict[str, Any], console: Console) -> None:
    """Print the table and the verdict."""
    narrow = console.width < 150
    shown = [i for i, header in enumerate(HEADERS) if not (narrow and header in ("steps", "seconds", "best loss"))]
    table = Table(*(HEADERS[i] for i in shown))
    table.columns[0].overflow = "fold"
    for column in table.columns[1:]:
        column.justify = "right"
    for cells in rows(comparison):
        table.add_row(cells[0].replace(",", ",\n"), *(cells[i] for i in shown[1:]))
    console.print(table)
    for line in comparison["verdict"]:
        console.print(line, soft_wrap=True)


def markdown(comparison: dict[str, Any]) -> str:
    lines = [HEADERS, ("---",) * len(HEADERS), *rows(comparison)]
    return "".join(f"| {' | '.join(cells)} |\n" for cells in lines)
