"""Our numbers beside the published ones: one dictionary, on the terminal, as Markdown and as a page."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from markupsafe import Markup as safe
from markupsafe import escape
from rich.console import Console
from rich.table import Table as Grid

from ..files import write_text
from ..presets import Table
from . import plots
from .skeleton import render
from .statistics import mean, spread

PLAN = ("arm", "runs", "done", "parameters", "FLOPs/token", "steps", "tokens", "FLOPs a run", "H100 a run", "here")
HEADERS = (
    "arm", "source", "best, published", "ours", "difference", "final, published", "ours", "difference",
    "best − baseline’s, published", "ours",
)  # fmt: skip


def beside(table: Table, comparison: dict[str, Any], plan: dict[str, Any]) -> dict[str, Any]:
    """`reproduction.json`. Differences are None where the numbers are not comparable."""
    arms = {arm["name"]: arm for arm in comparison["arms"]}
    baseline = comparison["baseline"]
    reference = {said.source: said.best for said in table.rows[baseline]}
    rows = []
    for name in (row["arm"] for row in plan["arms"]):
        if name not in arms:
            continue  # diverged: the verdict says so
        arm = arms[name]
        best, final = mean(arm["best_validation"].values()), mean(arm["final_validation"].values())
        published = [
            {
                "source": f"{said.source} ({said.note})" if said.note else said.source,
                "best": said.best,
                "final": said.final,
                "best_difference": _minus(best, said.best) if not plan["deviations"] else None,
                "final_difference": _minus(final, said.final) if not plan["deviations"] else None,
                "best_minus_baseline": _minus(said.best, reference.get(said.source)) if name != baseline else None,
                "scores": dict(said.scores),
            }
            for said in table.rows.get(name, ())
        ]
        ours = {key: arm[key] for key in ("best_validation", "final_validation", "training_loss")}
        gap = best - mean(arms[baseline]["best_validation"].values()) if name != baseline else None
        rows.append({"arm": name, **ours, "best_minus_baseline": gap, "published": published})
    several = len(comparison["seeds"]) > 1  # one seed gives no verdict on an arm; the table has its number
    return {
        "title": plan["title"],
        "comparable": not plan["deviations"],
        "says": says(plan),
        "seeds": comparison["seeds"],
        "rows": rows,
        "scores": {},
        "verdict": comparison["verdict"][0 if several else len(arms) - 1 :],
        "plan": plan,
        "corpus": comparison["corpus"],
        "machine": comparison["machine"],
        "command": comparison["command"],
    }


def _minus(a: float | None, b: float | None) -> float | None:
    return None if a is None or b is None else a - b


def says(plan: dict[str, Any]) -> str:
    """Whether our numbers can stand beside the published ones, and if not, why."""
    if not plan["deviations"]:
        return "Comparable: the published recipe, text and tokenizer, at all of the published steps."
    return f"Not comparable with the published numbers: {'; '.join(plan['deviations'])}."


def costs(plan: dict[str, Any]) -> list[str]:
    """What everything costs, and what is left of it."""
    e, total, left = plan["estimate"], plan["total"], plan["left"]
    lines = [
        f"On one {e['device']} about {duration(total['h100_hours'])}, {duration(left['h100_hours'])} of it left: an estimate, "
        f"{total['flops']:.2e} FLOPs at an MFU of {e['mfu']:.0%} of {e['peak_flops'] / 1e12:,.0f} TFLOP/s in bf16, which small models do not reach; not measured.",
    ]
    if "hours_here" in total:
        lines.append(
            f"On this device about {duration(total['hours_here'])}, {duration(left['hours_here'])} of it left, at the speed of "
            "finished runs or of the calibration."
        )
    else:
        lines.append("On this device: not known before a run has finished; --calibrate measures ten steps of each arm.")
    return lines


def duration(hours: float) -> str:
    if hours >= 1:
        return f"{hours:,.1f} h"
    return f"{hours * 60:.1f} min" if hours >= 1 / 60 else f"{hours * 3600:.2g} s"


def plan_rows(plan: dict[str, Any]) -> list[tuple[str, ...]]:
    """The cells of each arm, in the order of PLAN."""
    return [
        (
            row["arm"], f"{row['runs']}", f"{row['done']:.3g}", f"{row['parameters']:,}",
            f"{row['flops_per_token'] / 1e6:,.2f} M", f"{row['steps']:,}", f"{row['tokens']:,}", f"{row['flops']:.2e}",
            duration(row["h100_hours"]), "?" if row["hours_here"] is None else duration(row["hours_here"]),
        )
        for row in plan["arms"]
    ]  # fmt: skip


def rows(found: dict[str, Any]) -> list[tuple[str, ...]]:
    """The cells, a line for each source of each arm, in the order of HEADERS."""
    lines: list[tuple[str, ...]] = []
    for row in found["rows"]:
        best = f"{mean(row['best_validation'].values()):.4f}{spread(row['best_validation'].values())}"
        final = f"{mean(row['final_validation'].values()):.4f}{spread(row['final_validation'].values())}"
        nothing = {"source": "not published", "best": None, "final": None}
        for number, said in enumerate(row["published"] or [nothing]):
            first = number == 0
            lines.append(
                (
                    row["arm"] if first else "", said["source"],
                    _number(said["best"]), best if first else "", _difference(found, said, "best"),
                    _number(said["final"]), final if first else "", _difference(found, said, "final"),
                    _signed(said.get("best_minus_baseline")), _signed(row["best_minus_baseline"]) if first else "",
                )
            )  # fmt: skip
    return lines


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.4f}".removesuffix("0")


def _signed(value: float | None) -> str:
    return "–" if value is None else f"{value:+.4f}"


def _difference(found: dict[str, Any], said: dict[str, Any], which: str) -> str:
    if said[which] is not None and not found["comparable"]:
        return "not comparable"
    return _signed(said.get(f"{which}_difference"))


SCORES = ("arm", "task", "published", "ours", "documents")


def score_rows(found: dict[str, Any]) -> list[tuple[str, ...]]:
    """The cells of each arm and task, in the order of SCORES: the mean over seeds of acc_norm (acc where a task has none)."""
    lines: list[tuple[str, ...]] = []
    for row in found["rows"]:
        tasks = found["scores"].get(row["arm"], {})
        for task, by_seed in tasks.items():
            said = [f"{p['scores'][task]} ({p['source']})" for p in row["published"] if task in p["scores"]]
            value = mean(score["value"] for score in by_seed.values())
            documents = {f"{score['documents']:,}" for score in by_seed.values()}
            lines.append((row["arm"], task, "; ".join(said) or "–", f"{value:.4f}", ", ".join(documents)))
    return lines


def _grid(console: Console, headers: tuple[str, ...], lines: list[tuple[str, ...]]) -> None:
    grid = Grid(*headers)
    for column in grid.columns[1:]:
        column.justify = "right"
    for cells in lines:
        grid.add_row(cells[0].replace(",", ",\n"), *cells[1:])
    console.print(grid)


def show_plan(plan: dict[str, Any], console: Console) -> None:
    _grid(console, PLAN, plan_rows(plan))
    for line in [*costs(plan), says(plan)]:
        console.print(line, soft_wrap=True, markup=False)


def show(found: dict[str, Any], console: Console) -> None:
    _grid(console, HEADERS, rows(found))
    if found["scores"]:
        _grid(console, SCORES, score_rows(found))
    for line in [found["says"], *found["verdict"]]:
        console.print(line, soft_wrap=True, markup=False)


def markdown(found: dict[str, Any]) -> str:
    scores = _markdown(SCORES, score_rows(found)) + "\n" if found["scores"] else ""
    return f"{_markdown(HEADERS, rows(found))}\n{scores}{found['says']}\n"


def _markdown(headers: tuple[str, ...], lines: list[tuple[str, ...]]) -> str:
    return "".join(f"| {' | '.join(cells)} |\n" for cells in [headers, ("---",) * len(headers), *lines])


TEMPLATE = """{% extends "base" %}
{% block title %}{{ f.title }}, reproduced{% endblock %}
{% block style %}.no { border-color: #D55E00; background: #fdf1ea; } .left, #numbers td:nth-child(2) { text-align: left; }
#numbers td:first-child { min-width: 8rem; }{% endblock %}
{% block body %}
<h1>{{ f.title }}: ours beside the published</h1>
<p class="verdict{{ "" if f.comparable else " no" }}">{{ f.says }}</p>
<p class="say">Validation loss in nats per token; lower is better. {{ f.seeds | length }} seed{{ "s, mean ± standard deviation" if f.seeds | length > 1 else ": it says nothing about the spread" }}.
A difference is ours minus the published number; the last two columns are each arm's best loss minus the baseline's.</p>
<div class="scroll"><table id="numbers">
<tr>{% for header in headers %}<th{% if loop.index == 2 %} class="left"{% endif %}>{{ header }}{% endfor %}</tr>
{% for cells in rows %}<tr>{% for cell in cells %}<td>{{ broken(cell) }}{% endfor %}</tr>
{% endfor %}</table></div>
<p class="say">We know the published numbers from summaries and reproductions, not from the paper's full text. One that is not said to be
the best or the last stands as the best.</p>
{% if gaps %}<h2>What each arm gains on the baseline</h2>
<p class="say">Best validation loss minus the baseline's. Left of zero is better.{% if not f.comparable %} Ours and the published ones are from different runs: beside each other, not against each other.{% endif %}</p>
<figure>{{ gaps }}</figure>{% endif %}
<h2>Validation loss against training tokens</h2><p class="say">Thin lines are seeds.</p><figure>{{ curves }}</figure>
{% for line in f.verdict %}<p class="verdict">{{ line }}</p>{% endfor %}
{% if scores %}<h2>Downstream</h2><p class="say">Accuracy with the answers' lengths taken out (acc_norm), by lm-eval on the exported runs.</p>
<div class="scroll"><table><tr>{% for header in score_headers %}<th>{{ header }}{% endfor %}</tr>
{% for cells in scores %}<tr>{% for cell in cells %}<td>{{ broken(cell) }}{% endfor %}</tr>{% endfor %}</table></div>{% endif %}
<h2>What it costs</h2>
{% for line in costs %}<p class="say">{{ line }}</p>{% endfor %}
<div class="scroll"><table><tr>{% for header in plan_headers %}<th>{{ header }}{% endfor %}</tr>
{% for cells in plan_rows %}<tr>{% for cell in cells %}<td>{{ broken(cell) }}{% endfor %}</tr>{% endfor %}</table></div>
<h2>How to do it again</h2>
<pre>{{ f.command }}</pre>
<p class="say">Corpus {{ f.corpus.source }}, {{ f.corpus.tokenizer }}, sha256 {{ f.corpus.sha256[:16] }}…, on {{ f.machine.device }}, torch {{ f.machine.torch }}. YuriiFormer {{ f.machine.yuriiformer }}.</p>
<footer>All numbers are in reproduction.json; coefficients, texts and costs by part are on report.html beside this page.</footer>
{% endblock %}"""


def write_page(found: dict[str, Any], comparison: dict[str, Any], path: Path) -> None:
    """Write `reproduction.html`."""
    html = render(
        TEMPLATE,
        f=found,
        headers=HEADERS,
        rows=rows(found),
        gaps=safe(plots.gaps(found["rows"])) if len(found["rows"]) > 1 else "",
        curves=safe(plots.loss_curves(comparison["arms"], "tokens")),
        scores=score_rows(found),
        score_headers=SCORES,
        costs=costs(found["plan"]),
        plan_headers=PLAN,
        plan_rows=plan_rows(found["plan"]),
        broken=lambda cell: safe(str(escape(cell)).replace(",", ",<wbr>") if "=" in cell else escape(cell)),
    )
    write_text(path, html)
