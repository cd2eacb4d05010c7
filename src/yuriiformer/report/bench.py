"""The table of `yuriiformer bench`, for a terminal and as Markdown."""

from __future__ import annotations

from typing import Any

HEAD = ("arm", "median step (ms)", "95 %", "tokens/s", "MFU", "peak memory (GB)", "against the first", "95 %")


def rows(found: dict[str, Any]) -> list[tuple[str, ...]]:
    table: list[tuple[str, ...]] = []
    for name, arm in found["arms"].items():
        low, high = arm["interval"]
        speed = f"{arm['tokens_per_second']:,.0f}"
        mfu = f"{arm['mfu']:.1%}" if arm["mfu"] else "–"
        memory = f"{arm['peak_bytes'] / 1e9:.1f}" if arm["peak_bytes"] else "–"
        ratio, interval = "–", "–"
        if "ratio" in arm:
            ratio, interval = f"{arm['ratio']:.3f}", "{:.3f} to {:.3f}".format(*arm["ratio_interval"])
        step = f"{1000 * arm['median_seconds']:.1f}"
        table.append((name, step, f"{1000 * low:.1f} to {1000 * high:.1f}", speed, mfu, memory, ratio, interval))
    return table


def says(found: dict[str, Any]) -> list[str]:
    """What the table leaves out."""
    lines = [
        f"{found['steps']} steps of {found['tokens_per_step']:,} tokens each, by turns, after {found['warm_up']} of warm-up; "
        f"{found['machine']['device']}, torch {found['machine']['torch']}",
        f"copy {found['copy_bytes_per_second'] / 1e9:,.0f} GB/s, matrix product {found['matrix_product_flops'] / 1e12:,.2f} "
        "TFLOP/s, both measured here",
        "attention forward and backward: "
        + ", ".join(f"{name} {1000 * seconds:.2f} ms" for name, seconds in found["attention_seconds"].items()),
    ]
    first = next(iter(found["arms"].values()))
    for name, arm in found["arms"].items():
        if arm["step_bytes"]:
            lines.append(
                f"{name}: a step needs {arm['step_bytes'] / 1e9:.2f} GB beside weights and optimiser states, "
                f"{arm['step_bytes'] / first['step_bytes'] - 1:+.1%} of the first arm's"
            )
        if extra := arm.get("velocity_bytes_per_token"):
            floor, spent = extra.values()
            lines.append(
                f"{name}: its second stream must move {floor / 1000:,.0f} KB a token; the time beyond the first arm would "
                f"copy {spent / 1000:,.0f} KB"
            )
    return lines


def markdown(found: dict[str, Any]) -> str:
    lines = [HEAD, ("---",) * len(HEAD), *rows(found)]
    return "".join(f"| {' | '.join(cells)} |\n" for cells in lines)


def show(found: dict[str, Any], console: Any) -> None:
    from rich.table import Table

    table = Table(*HEAD)
    for row in rows(found):
        table.add_row(*row)
    console.print(table)
    for line in says(found):
        console.print(line, soft_wrap=True, markup=False)
