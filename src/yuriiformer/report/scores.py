"""Evaluations and paired tests as tables on the terminal."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.table import Table


def show_scores(found: dict[str, Any], console: Console) -> None:
    table = Table("what", "number", "± standard error", "over", "prompts cut", title=found["path"])
    if v := found["validation"]:
        over = f"{v['tokens']:,} tokens"
        table.add_row("validation loss", f"{v['loss']:.4f}", f"{v['standard_error']:.4f}", over, "")
        table.add_row("perplexity", f"{v['perplexity']:.2f}", "", over, "")
        table.add_row("bits per byte", f"{v['bits_per_byte']:.4f}", "", over, "")
    for task in found["tasks"].values():
        cut = task["truncated"]
        share = f"{cut['prompts'] / cut['of']:.0%}" if cut["of"] else ""
        for name, numbers in task["results"].items():
            for metric, value in numbers.items():
                error = numbers.get(_error_of(metric))
                if "_stderr" not in metric and isinstance(value, float):
                    shown = f"{error:.4f}" if isinstance(error, float) else ""
                    label = f"{name}, {task['shots'].get(name, 0)} shots: {metric}"
                    table.add_row(label, f"{value:.4f}", shown, f"{task['documents'].get(name, 0):,} documents", share)
    _print(table, console)


def _error_of(metric: str) -> str:
    name, comma, kind = metric.partition(",")
    return f"{name}_stderr{comma}{kind}"


PAIRED = ("what", "n", "A", "B", "B - A [95 %]", "only A / only B right", "p")


def paired_rows(found: dict[str, Any]) -> list[tuple[str, ...]]:
    """The cells of each test, in the order of PAIRED."""
    return [
        (
            f"{row['task']}: {row['metric']}",
            f"{row['n']:,}",
            f"{row['a']:.4f}",
            f"{row['b']:.4f}",
            f"{row['difference']:+.4f} [{row['low']:+.4f}, {row['high']:+.4f}]",
            f"{row['only_a']} / {row['only_b']}" if "only_a" in row else "",
            f"{row['p_value']:.2g}" if "p_value" in row else "",
        )
        for row in found["rows"]
    ]


def show_paired(found: dict[str, Any], console: Console) -> None:
    table = Table(*PAIRED, title=f"A: {found['a']}, B: {found['b']}")
    for cells in paired_rows(found):
        table.add_row(*cells)
    _print(table, console)
    console.print(
        "Validation: Student's t over blocks of text. Documents: bootstrap interval, McNemar's exact test.",
        soft_wrap=True,
    )


def _print(table: Table, console: Console) -> None:
    for column in table.columns[1:]:
        column.justify = "right"
    console.print(table)
