"""The page of the theory: each statement with its numbers, its verdict and what to see in its plots."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from markupsafe import Markup as safe
from matplotlib.figure import Figure
from matplotlib.patches import Circle
from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter

from ..files import write_text
from . import plots
from .skeleton import render

MANY = 12  # rows that a table shows before it folds

TEMPLATE = """{% extends "base" %}
{% block title %}The theory, running{% endblock %}
{% block style %}
.plots { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 27rem), 1fr)); gap: 0 2rem; align-items: end; }
figcaption { color: #555; font-size: .9rem; }
.equation { white-space: pre-wrap; background: #f6f6f6; padding: .6rem .9rem; font-family: "STIX Two Math", "Cambria Math", "DejaVu Serif", serif; }
.yes { color: #00694c; } .no { color: #a34700; } .wrong { background: #b00020; color: #fff; padding: 0 .3rem; }
.verdict.no { border-color: #D55E00; background: #fbf4ee; color: inherit; } .verdict.wrong { border-color: #b00020; color: inherit; background: #fdecef; }
@media (max-width: 40rem) {
  .numbers tr { display: flex; flex-wrap: wrap; justify-content: flex-end; border-bottom: 1px solid #ddd; }
  .numbers td, .numbers th { border: 0; padding: .15rem .4rem; } .numbers td:first-child, .numbers th:first-child { width: 100%; }
}
td.words { white-space: nowrap; } td:first-child { overflow-wrap: anywhere; } #all td { text-align: left; } #all td:first-child { min-width: 10rem; width: 38%; }
summary { cursor: pointer; color: #555; }
{% endblock %}
{% block body %}
<h1>The theory, running</h1>
<p class="say">Layers are iterations, attention and MLP are gradients of energies, momentum accelerates: each statement behind that, computed by the
very functions that are the layers. What does not hold is shown as plainly as what does.</p>
<p class="verdict{{ " wrong" if wrong }}">{{ verdict }}</p>
<p class="say">Statements about real oracles look at: <b>{{ t.subject }}</b>.{% if not t.run %} For those of a model that you trained: <code>yuriiformer theory --run RUN</code>.{% endif %}</p>
<div class="scroll"><table id="all"><tr><th>statement<th style="text-align:left">verdict</tr>
{% for s in t.statements %}<tr><td><a href="#{{ s.name }}">{{ s.title }}</a><td class="{{ kind(s) }}">{{ s.verdict }}</tr>
{% endfor %}</table></div>
{% for s in t.statements %}
<h2 id="{{ s.name }}">{{ s.title }}</h2>
<p class="equation">{{ s.equation }}</p>
<p>{{ s.claim }}</p>
<p class="verdict {{ kind(s) }}"><code>{{ s.name }}</code>: {{ s.verdict }}.</p>
<div class="plots">{% for plot in s.plots %}<figure><figcaption>{{ plot.see }}</figcaption>{{ drawn(plot) }}</figure>
{% endfor %}</div>
<details{{ " open" if s.rows | length <= many }}><summary>The numbers ({{ s.rows | length }})</summary>
<div class="scroll"><table class="numbers"><tr><th>what<th>number<th>theory<th>verdict</tr>
{% for row in s.rows %}<tr><td>{{ row.what }}<td>{{ number(row.number) }}<td class="words">{{ expected(row) }}<td class="words">{{ word(row) }}</tr>
{% endfor %}</table></div></details>
{% for note in s.notes %}<p class="say">{{ note }}</p>{% endfor %}
{% endfor %}
<h2>How to reproduce it</h2>
<pre>{{ t.command }}</pre>
<footer>YuriiFormer {{ t.yuriiformer }}. Everything on this page is also in theory.json beside it.</footer>
{% endblock %}"""


def write_page(theory: dict[str, Any], path: Path) -> None:
    """Write `theory.html` of what `yuriiformer theory` computed."""
    html = render(
        TEMPLATE, t=theory, verdict=theory["verdict"], wrong=not theory["as_expected"], many=MANY,
        drawn=lambda plot: safe(spheres(plot) if plot["kind"] == "spheres" else curves(plot)),
        number=_number, expected=_expected, word=_word, kind=_kind,
    )  # fmt: skip
    write_text(path, html)


def _number(number: float | None) -> str:
    if number is None:
        return "not reached"
    return f"{number:,.0f}" if abs(number) >= 1000 or float(number).is_integer() else f"{number:#.3g}"


def _expected(row: dict[str, Any]) -> str:
    if row["expected"] is None:
        return "–"
    sign = {"=": "", ">=": "≥ ", "<=": "≤ "}[row["relation"]]
    slack = f" ± {row['tolerance']:.2g}" if row["relation"] == "=" else ""
    bound = row["expected"] + {"=": 0, ">=": -row["tolerance"], "<=": row["tolerance"]}[row["relation"]]
    return f"{sign}{_number(bound)}{slack}"


def _word(row: dict[str, Any]) -> str:
    if row["holds"] is None:
        return "measured"
    word = "holds" if row["holds"] else "does not hold"
    if not row["as_expected"]:
        return safe('<span class="wrong">{}, unlike theory</span>').format(word)
    return safe('<span class="{}">{}</span>').format("yes" if row["holds"] else "no", word)


def _kind(statement: dict[str, Any]) -> str:
    if not statement["as_expected"]:
        return "wrong"
    return "no" if any(row["holds"] is False for row in statement["rows"]) else "yes"


def curves(plot: dict[str, Any]) -> str:
    """Lines in one frame. Where curves lie on each other, the earlier one is wider and shows on both sides."""

    def draw(figure: Figure) -> None:
        axes = figure.subplots()
        style = {"solid": "-", "dashed": "--", "dots": ":"}
        named = [line for line in plot["lines"] if line["name"]]
        for index, line in enumerate(plot["lines"]):
            color = index if line["color"] is None else line["color"]
            width = 1.3 + 0.3 * max(0, len(named) - 1 - color) if line["style"] == "solid" else 1.6
            mark = "o" if len(line["x"]) < 12 and line["style"] == "solid" else ""
            axes.plot(
                line["x"], line["y"], style[line["style"]], color=plots.color(color), lw=width, marker=mark, ms=4,
                label=line["name"] or None,
            )  # fmt: skip
        if "x" in plot["log"]:
            axes.set_xscale("log")
            if max(x for line in plot["lines"] for x in line["x"]) < 100 * min(
                x for line in plot["lines"] for x in line["x"]
            ):
                axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
                axes.xaxis.set_major_formatter("{x:g}")
            axes.xaxis.set_minor_formatter(NullFormatter())
        elif all(float(x).is_integer() for line in plot["lines"] for x in line["x"]):
            axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        if "y" in plot["log"]:
            axes.set_yscale("log")
            axes.yaxis.set_minor_formatter(NullFormatter())
        elif min(y for line in plot["lines"] for y in line["y"]) > 0:
            axes.set_ylim(bottom=0)
        axes.set_xlabel(plot["x"])
        axes.set_ylabel(plot["y"])
        plots._legend_above(axes, 2)

    return plots._svg((5.2, 3.3 + 0.11 * len(plot["lines"])), draw)


def spheres(plot: dict[str, Any]) -> str:
    """Points on the sphere seen from far away, a row for each name; those behind are pale."""
    names, steps = plot["names"], plot["steps"]

    def draw(figure: Figure) -> None:
        grid = figure.subplots(len(names), len(steps), squeeze=False)
        for row, name in enumerate(names):
            for column, step in enumerate(steps):
                axes = grid[row][column]
                axes.add_patch(Circle((0, 0), 1, fill=False, color="#bbbbbb", lw=0.8))
                x, y, z = zip(*plot["points"][row][column], strict=True)
                axes.scatter(x, y, 9, plots.color(row), alpha=[0.9 if depth >= 0 else 0.3 for depth in z], linewidths=0)
                axes.set(xlim=(-1.1, 1.1), ylim=(-1.1, 1.1), aspect="equal")
                axes.axis("off")
                if row == 0:
                    axes.set_title(f"step {step}" if column == 0 else str(step), fontsize=10, pad=18)
            label = grid[row][0].annotate(name, (0, 1), xycoords="axes fraction", fontsize=10, color=plots.color(row))
            label.set_in_layout(False)  # it may reach over the next picture

    return plots._svg((0.95 * len(steps), 1.08 * len(names)), draw)
