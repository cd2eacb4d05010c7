"""A comparison on the terminal."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.table import Table

from .page import mean, spread


def show(comparison: dict[str, Any], console: Console) -> None:
    """Print the table and the verdict."""
    table = Table(
        title=f"{len(comparison['seeds'])} seeds, {comparison['budget']['amount']:,.0f} {comparison['budget']['kind']} each"
    )
    table.add_column("arm", overflow="fold")
    for column in ("parameters", "FLOPs/token", "tokens/s", "final loss", "best", "against baseline", "p (Holm)"):
        table.add_column(column, justify="right", overflow="fold")
    for arm in comparison["arms"]:
        test = arm["against_baseline"]
        against = f"{test['mean_difference']:+.4f}" if test else "–"
        if test and test["low"] is not None:
            against += f" [{test['low']:+.3f}, {test['high']:+.3f}]"
        table.add_row(
            arm["name"], f"{arm['parameters']:,}", f"{arm['flops_per_token'] / 1e6:.2f} M", f"{arm['tokens_per_second']:,.0f}",
            f"{mean(arm['final_validation'].values()):.4f}{spread(arm['final_validation'].values())}",
            f"{mean(arm['best_validation'].values()):.4f}", against,
            f"{test['p_value_holm']:.2g}" if test and test["p_value_holm"] is not None else "–",
        )  # fmt: skip
    console.print(table)
    for line in comparison["verdict"]:
        console.print(line, soft_wrap=True)
