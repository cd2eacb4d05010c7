"""The page of a comparison."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from markupsafe import Markup as safe
from markupsafe import escape

from ..files import write_text
from . import plots
from .skeleton import render
from .tables import HEADERS, rows

TEMPLATE = """{% extends "base" %}
{% block title %}{{ c.arms | map(attribute="name") | join(" · ") }}{% endblock %}
{% block style %}#numbers td { white-space: nowrap; } #numbers td:first-child { white-space: normal; }
.prompt { color: #777; }{% endblock %}
{% block body %}
<h1>{{ c.arms | map(attribute="name") | join(" against ") if c.arms | length == 2 else "Comparison of %d arms" % c.arms | length }}</h1>
<p class="say">{{ c.seeds | length }} seed{{ "s" if c.seeds | length > 1 }} ({{ c.seeds | join(", ") }}), budget {{ "{:,.0f}".format(c.budget.amount) }} {{ c.budget.kind }} an arm and seed,
the same batches in the same order for every arm. Baseline: <b>{{ c.baseline }}</b>.</p>
{% if c.start %}<p class="say">Every arm starts from the weights of the run <b>{{ c.start.run }}</b> at its step {{ c.start.step }} (sha256 {{ c.start.sha256[:12] }}…) and computes exactly its function before the first step.</p>{% endif %}
{% for line in c.verdict %}<p class="verdict">{{ line }}</p>{% endfor %}
{% if c.controls_not_run %}<p class="say">Honest controls that were not run here (<code>--controls</code> adds them): {{ c.controls_not_run | join("; ") }}.</p>{% endif %}

<h2>Numbers</h2>
<p class="say">Validation loss in nats per token, mean of the seeds, ± the standard deviation; lower is better. FLOPs are those of training (three times the forward pass); seconds and tokens/s are of training alone, without compilation, validation and checkpoints.</p>
<div class="scroll"><table id="numbers">
<tr>{% for header in headers %}<th>{{ header }}{% endfor %}<th>loss at<br>{{ "%.0f" % c.equal_seconds }} s</tr>
{% for cells in rows %}{% set arm = c.arms[loop.index0] %}{% set dot = color(loop.index0) %}<tr>{% for cell in cells %}{% if loop.first %}<td style="border-left: 5px solid {{ dot }}">{{ broken(cell) }}{% else %}<td>{{ stacked(cell) }}{% endif %}{% endfor %}<td>{{ "%.4f" % arm.validation_at_equal_seconds }}</tr>
{% endfor %}</table></div>
<p class="say">“loss at {{ "%.0f" % c.equal_seconds }} s” reads each curve at the time the fastest arm ended; a slower arm is then still at a higher
learning rate, so this column is unkind to it. A comparison with a budget in seconds is the fair one.</p>

<h2>Difference to the baseline</h2>
<p class="say">Dots are seeds, the diamond is their mean, the bar the 95 % interval of a paired t-test. Left of zero is better.</p>
<figure>{{ differences }}</figure>
{% for name, (label, say) in axes.items() %}
<h2>Validation loss against {{ label.split(" (")[0] }}</h2><p class="say">{{ say }} Thin lines are seeds.</p><figure>{{ curves[name] }}</figure>
{% endfor %}
{% if coefficients %}<h2>Learned coefficients</h2>
<p class="say">Where training put the scalars of each rule, layer by layer; thin lines are seeds. With a velocity norm, only the ratio of γ to β matters.</p>
{% for name, svg in coefficients.items() %}<h3>{{ name }}</h3><figure>{{ svg }}</figure>{% endfor %}{% endif %}

<h2>Every two arms</h2>
<p class="say">Final loss of the first minus the second, paired by seed; p-values without adjustment.</p>
<div class="scroll"><table><tr><th>first<th style="text-align:left">second<th>difference<th>95 % interval<th>p</tr>
{% for t in c.pairs %}<tr><td>{{ t.arm }}<td style="text-align:left">{{ t.against }}<td>{{ "%+.4f" % t.mean_difference }}
<td>{{ "[%+.4f, %+.4f]" % (t.low, t.high) if t.low is not none else "–" }}<td>{{ "%.2g" % t.p_value if t.p_value is not none else "–" }}</tr>
{% endfor %}</table></div>

<h2>Parameters and FLOPs by part</h2>
<div class="scroll"><table><tr><th>part{% for arm in c.arms %}<th>{{ arm.name }}{% endfor %}</tr>
{% for part in c.arms[0].parameters_by_part %}<tr><td>parameters: {{ part }}{% for arm in c.arms %}<td>{{ "{:,}".format(arm.parameters_by_part[part]) }}{% endfor %}</tr>{% endfor %}
{% for part in c.arms[0].forward_flops_by_part %}<tr><td>forward FLOPs per token: {{ part }}{% for arm in c.arms %}<td>{{ "{:,}".format(arm.forward_flops_by_part[part]) }}{% endfor %}</tr>{% endfor %}
</table></div>

<h2>What each arm writes</h2>
<p class="say">The same prompt (grey) and the same random numbers; seed 0, temperature 0.8, the 50 likeliest tokens.</p>
{% for arm in c.arms %}<h3>{{ arm.name }}</h3><pre><span class="prompt">{{ arm.sample.prompt }}</span>{{ arm.sample.text }}</pre>{% endfor %}

<h2>How to reproduce it</h2>
<pre>{{ c.command }}</pre>
<p class="say">Corpus {{ c.corpus.source }}, {{ c.corpus.tokenizer }}, sha256 {{ c.corpus.sha256[:16] }}…, on {{ c.machine.device }}, {{ c.machine.threads }} threads, torch {{ c.machine.torch }},
Python {{ c.machine.python }}, {{ training.precision }}, {{ "compiled" if training.compile == "yes" else "eager" }}. YuriiFormer {{ c.machine.yuriiformer }}.</p>
{% for arm in c.arms %}<details><summary>Configuration of {{ arm.name }}</summary><pre>{{ recipe(arm.config) }}</pre></details>{% endfor %}
<footer>Everything on this page is also in comparison.json beside it.</footer>
{% endblock %}"""


def write_page(comparison: dict[str, Any], path: Path) -> None:
    """Write `report.html`."""
    arms = comparison["arms"]
    html = render(
        TEMPLATE,
        c=comparison,
        axes=plots.AXES,
        curves={against: safe(plots.loss_curves(arms, against)) for against in plots.AXES},
        differences=safe(plots.differences(arms, comparison["baseline"])),
        coefficients={
            arm["name"]: safe(plots.coefficients(arm))
            for arm in arms
            if arm["coefficients"][0][0][0] and arm["config"]["model"]["coefficients"] in ("learned", "free")
        },
        color=plots.color,
        broken=lambda name: safe(str(escape(name)).replace(",", ",<wbr>")),
        stacked=lambda cell: safe(str(escape(cell)).replace(" ±", "<br>±").replace(" [", "<br>[")),
        headers=HEADERS,
        rows=rows(comparison),
        recipe=lambda config: json.dumps(config, indent=1),
        training=arms[0]["config"]["training"],
    )
    write_text(path, html)
