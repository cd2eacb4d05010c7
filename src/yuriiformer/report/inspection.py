"""The page of an inspection: every quantity along depth, what theory would have it do, and what it does."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from markupsafe import Markup as safe
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from ..files import write_text
from . import plots
from .skeleton import render

RUN_COLORS, MARKERS = (plots.COLORS[2], plots.COLORS[4]), ("o", "s")
GRADIENT_BELOW = 0.05  # an asymmetry that could be rounding and eight probes
Run = dict[str, Any]


@dataclass(frozen=True)
class Card:
    """One plot with its words. `found` says of a run what `expect` leads one to ask; `draw` gets all runs that have it."""

    title: str
    what: str
    expect: str
    found: Callable[[Run], str]
    draw: Callable[[Axes, Sequence[tuple[int, Run]]], None]
    ylabel: str
    claim: str = ""  # what should hold if depth is optimisation, for the table at the top
    shown: Callable[[Run], bool] = lambda run: True


def values(run: Run, name: str) -> list[float]:
    """A series' means, without the places where there is none (an angle to a velocity of 0). {v}: the velocity."""
    series = run["series"].get(name.format(v=velocity(run)), {"mean": []})
    return [m for m in series["mean"] if m is not None]


def velocity(run: Run) -> str:
    return run["streams"][1] if len(run["streams"]) > 1 else ""


def line(*names: str) -> Callable[[Axes, Sequence[tuple[int, Run]]], None]:
    """Series with a band of two standard errors; the first drawn through, the second dashed. {v}: the velocity."""

    def draw(axes: Axes, runs: Sequence[tuple[int, Run]]) -> None:
        for index, run in runs:
            for name, style in zip(names, ("-", "--"), strict=False):
                if (series := run["series"].get(name.format(v=velocity(run)))) is None:
                    continue
                at, mean, se = (np.array(series[key], dtype=float) for key in ("at", "mean", "se"))
                which = f" ({name.split()[-1]})" if len(names) > 1 else ""
                axes.plot(
                    at, mean, style, color=RUN_COLORS[index], marker=MARKERS[index], ms=4, label=run["label"] + which
                )
                axes.fill_between(at, mean - 2 * se, mean + 2 * se, color=RUN_COLORS[index], alpha=0.15, lw=0)

    return draw


def falls(run: Run, change: str, down: int = 1) -> str:
    """Whether a change by layer is a fall everywhere; the layers where it is not, or is within two standard errors of 0."""
    series = run["series"][change]
    rises = [str(i) for i, mean in enumerate(series["mean"], 1) if not down * mean < 0]
    pairs = zip(series["mean"], series["se"], strict=True)
    unsure = [str(i) for i, (mean, se) in enumerate(pairs, 1) if se is not None and abs(mean) < 2 * se]
    count = f"falls in {len(series['mean']) - len(rises)} of {len(series['mean'])} layers"
    note = f"; within two standard errors of no change: {', '.join(unsure)}" if unsure else ""
    return (f"does not hold: {count}, not in {', '.join(rises)}" if rises else f"holds: {count}") + note


def loss_found(run: Run) -> str:
    loss = values(run, "loss")
    return f"{falls(run, 'loss change')} ({loss[0]:.2f} before the first, {loss[1]:.2f} after it, {loss[-1]:.2f} at the end)"


def draw_loss(axes: Axes, runs: Sequence[tuple[int, Run]]) -> None:
    """From the first layer on: what is read before it would flatten the rest."""
    series = {index: {key: those[1:] for key, those in run["series"]["loss"].items()} for index, run in runs}
    line("loss")(axes, [(index, run | {"series": {"loss": series[index]}}) for index, run in runs])


def draw_energy(axes: Axes, runs: Sequence[tuple[int, Run]]) -> None:
    for index, run in runs:
        for i, (before, after) in enumerate(
            zip(values(run, "energy before"), values(run, "energy after"), strict=True)
        ):
            label = run["label"] if i == 0 else None
            axes.plot([i, i + 1], [before, after], color=RUN_COLORS[index], lw=2, label=label)
            axes.plot(i + 1, after, MARKERS[index], color=RUN_COLORS[index], ms=5)


def draw_potential(axes: Axes, runs: Sequence[tuple[int, Run]]) -> None:
    axes.axhline(0, color="#444444", lw=1)
    every: list[float] = []
    for index, run in runs:
        for oracle, style in (("mlp", "-"), ("attn", "--")):
            series = run["series"][f"work {oracle}"]
            change = -np.array(series["mean"], dtype=float)
            every += np.abs(change).tolist()
            label = f"{run['label']} ({oracle})"
            axes.plot(series["at"], change, style, color=RUN_COLORS[index], marker=MARKERS[index], ms=4, label=label)
    middle = float(np.median(every))
    if 0 < 10 * middle < max(every):  # one layer would flatten the rest
        axes.set_yscale("symlog", linthresh=10 ** np.floor(np.log10(middle)))


def of_layers(run: Run, name: str) -> list[float]:
    return [layer[name] for layer in run["derivatives"]]


def gradient_found(run: Run) -> str:
    ranges = {
        o: (min(of_layers(run, f"asymmetry {o}")), max(of_layers(run, f"asymmetry {o}"))) for o in ("attn", "mlp")
    }
    holds = "holds" if all(high < GRADIENT_BELOW for _, high in ranges.values()) else "does not hold"
    return f"{holds}: " + ", ".join(f"{o} {low:.2f} to {high:.2f}" for o, (low, high) in ranges.items())


def draw_asymmetry(axes: Axes, runs: Sequence[tuple[int, Run]]) -> None:
    axes.axhline(1, color="#999999", lw=1)
    for index, run in runs:
        for oracle, style in (("attn", "-"), ("mlp", "--")):
            ys = of_layers(run, f"asymmetry {oracle}")
            label = f"{run['label']} ({oracle})"
            axes.plot(depth(run), ys, style, color=RUN_COLORS[index], marker=MARKERS[index], ms=4, label=label)
    axes.set_ylim(bottom=0)


def depth(run: Run) -> range:
    return range(1, run["model"]["layers"] + 1)


def radius(layer: dict[str, Any]) -> float:
    return max((abs(complex(*value)) for value in layer["eigenvalues"]), default=float("nan"))


def stretch_found(run: Run) -> str:
    largest = [max(layer["singular"], default=float("nan")) for layer in run["derivatives"]]
    grows = sum(not s <= 1 for s in largest)
    holds = "does not hold" if grows else "holds"
    return f"{holds}: {grows} of {len(largest)} layers stretch some direction, by up to {max(largest):.1f}"


def draw_spectrum(axes: Axes, runs: Sequence[tuple[int, Run]]) -> None:
    axes.axhline(1, color="#999999", lw=1)
    for index, run in runs:
        shift, color = 0.08 * (2 * index - 1) * (len(runs) > 1), RUN_COLORS[index]
        for i, layer in enumerate(run["derivatives"], 1):
            axes.plot(
                [i + shift] * len(layer["singular"]), layer["singular"], MARKERS[index], color=color, ms=4, alpha=0.6
            )
        axes.plot(depth(run), list(map(radius, run["derivatives"])), "-", color=color, label=run["label"])
        axes.plot(depth(run), of_layers(run, "typical"), ":", color=color)
    axes.set_yscale("log")


def draw_turn(axes: Axes, runs: Sequence[tuple[int, Run]]) -> None:
    axes.axhline(90, color="#999999", lw=1)
    line("turn")(axes, runs)


def draw_entropy(axes: Axes, runs: Sequence[tuple[int, Run]]) -> None:
    for index, run in runs:
        for name, series in run["series"].items():
            if name.startswith("entropy head"):
                axes.plot(series["at"], series["mean"], ".", color=RUN_COLORS[index], ms=4, alpha=0.5)
    line("entropy")(axes, runs)
    axes.set_ylim(0, 1.02)


def span(name: str, unit: str = "", digits: int = 2) -> Callable[[Run], str]:
    """A series from its first to its last value, with its extremes."""

    def found(run: Run) -> str:
        known = values(run, name)
        ends = f"{known[0]:.{digits}f}{unit} at first, {known[-1]:.{digits}f}{unit} at last"
        return f"{ends} (between {min(known):.{digits}f} and {max(known):.{digits}f})"

    return found


def effective_steps(run: Run) -> list[list[float]] | None:
    """gamma / (1 - beta), [substep][layer], where the rule has coefficients of these names."""
    table = run["coefficients"]
    if not {"gamma", "beta"} <= set(table[0][0]):
        return None
    return [[layer[s]["gamma"] / (1 - layer[s]["beta"]) for layer in table] for s in range(len(table[0]))]


def steps_found(run: Run) -> str:
    every = [step for steps in effective_steps(run) or [] for step in steps]
    note = "; the velocity's LayerNorm sets the size of the move, not this number" if run["normed"] else ""
    return f"between {min(every):.2f} and {max(every):.2f}{note}"


def draw_steps(axes: Axes, runs: Sequence[tuple[int, Run]]) -> None:
    for index, run in runs:
        for s, steps in enumerate(effective_steps(run) or []):
            label = f"{run['label']}" + (f", substep {s + 1}" if len(run["coefficients"][0]) > 1 else "")
            axes.plot(depth(run), steps, ("-", "--", ":")[s % 3], color=RUN_COLORS[index], marker=MARKERS[index], ms=4, label=label)  # fmt: skip


GROUPS: dict[str, tuple[Card, ...]] = {
    "Is depth an optimisation?": (
        Card(
            "Loss after each layer",
            "The head reads the state after every layer, as it does after the last (“logit lens”); before the first layer only in the line below.",
            "If the layers optimised the loss, it would fall at every one. Nothing in training asks for that.",
            loss_found, draw_loss, "loss (nats per token)", "The loss falls at every layer",
        ),
        Card(
            "Interaction energy E",
            "Minus the soft maximum of ⟨query, key⟩ over each token's past. Every layer has its own queries and keys, so its own E: a line goes from E before the layer to E after it.",
            "If attention descended its energy, every line would fall. Real attention has values of its own and only looks back.",
            lambda run: falls(run, "energy change"), draw_energy, "E of the layer, before → after", "Every layer lowers its interaction energy",
        ),
        Card(
            "Potential energy F",
            "Change of F over a layer: minus the work of the MLP along the layer's move, a line integral between the normalised states. Dashed: the same for attention.",
            "Below zero the move goes the oracle's way: the least to expect of a move that contains its answer. It is the difference of a potential only where the oracle is a gradient (next plot); else it belongs to this path.",
            lambda run: falls(run, "work mlp", -1), draw_potential, "change of F per entry", "Every layer lowers its potential energy",
        ),
        Card(
            "Are the oracles gradients?",
            "|J − Jᵀ| / |J + Jᵀ| of each oracle's Jacobian J with respect to the normalised state.",
            "A gradient has 0; a map without any symmetry has 1 (grey). Causal attention cannot have 0: the past does not see the future.",
            gradient_found, draw_asymmetry, "asymmetry", "The oracles are gradients (asymmetry 0)",
        ),
        Card(
            "Jacobian of a layer",
            "Of the map from all streams to all streams: largest singular values (dots), largest |eigenvalue| (line), root mean square of all singular values (dotted).",
            "A stable descent step on a convex energy stretches nothing (all below the grey line at 1). Above it, a small difference between two inputs can grow.",
            stretch_found, draw_spectrum, "factor", "No layer stretches any direction",
        ),
    ),
    "The path of the state": (
        Card(
            "Size of the state x", "Root mean square entry, mean over tokens.",
            "Where it grows and the moves do not, later layers turn the state less and less: the head sees only its direction.",
            span("size x"), line("size x"), "|x|",
        ),
        Card(
            "Size of each move", "Root mean square entry of the difference a substep makes in x.",
            "Descent that converges takes smaller and smaller moves. A velocity with a norm cannot: its size is learned, not earned.",
            span("move"), line("move"), "|move|",
        ),
        Card(
            "Turning angle", "Between a move and the one before it, mean over tokens.",
            "Moves that know nothing of one another turn by 90° in so many dimensions (grey); momentum means less than that.",
            span("turn", "°", 0), draw_turn, "degrees", shown=lambda run: bool(values(run, "turn")),
        ),
        Card(
            "Straightness", "Distance from the start over the length of the path so far, mean over tokens.",
            "1 is a straight line. A random walk of n equal moves has 1/√n.",
            lambda run: f"{values(run, 'straightness')[-1]:.2f} at the end, path length {values(run, 'path length')[0]:.1f}",
            line("straightness"), "straightness",
        ),
    ),
    "The method": (
        Card(
            "Size of the velocity v", "Root mean square entry, mean over tokens.",
            "With a velocity norm it is near the norm's learned weights; without one it shows whether momentum builds up.",
            span("size {v}"), line("size {v}"), "|v|", shown=lambda run: bool(velocity(run)),
        ),
        Card(
            "Angle between v and the oracles", "Between the velocity a substep starts with and what the oracle then answers.",
            "Below 90° the oracle confirms where the state already goes, and momentum builds up; above, it brakes.",
            lambda run: "; ".join(f"{o}: {span(f'angle {{v}} {o}', '°', 0)(run)}" for o in ("attn", "mlp")),
            line("angle {v} attn", "angle {v} mlp"), "degrees", shown=lambda run: bool(values(run, "angle {v} mlp")),
        ),
        Card(
            "Effective step γ/(1−β)", "What a constant direction would add up to, by the learned coefficients of each layer.",
            "In theory the step of the method. Several times more than one layer's step means memory over several layers.",
            steps_found, draw_steps, "γ/(1−β)", shown=lambda run: effective_steps(run) is not None,
        ),
        Card(
            "Attention entropy", "Of a token's weights, as a share of the largest possible, log(i + 1); dots are heads.",
            "1 is an average over the whole past, 0 a look at one token.",
            span("entropy"), draw_entropy, "share of log(i + 1)",
        ),
    ),
}  # fmt: skip


def says(run: Run) -> dict[str, str]:
    """What every plot says of a run, by its title."""
    return {c.title: c.found(run) for cards in GROUPS.values() for c in cards if c.shown(run)}


def draw(card: Card, runs: Sequence[Run]) -> str:
    """A card's plot, sized for a phone: wider screens show two side by side."""
    shown = [(index, run) for index, run in enumerate(runs) if card.shown(run)]

    def on(figure: Figure) -> None:
        axes = figure.subplots()
        card.draw(axes, shown)
        axes.set_xlabel("layers passed")
        axes.set_ylabel(card.ylabel)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        plots._legend_above(axes)

    return plots._svg((5, 3.9), on)


TEMPLATE = """{% extends "base" %}
{% block title %}{{ runs | map(attribute="label") | join(" beside ") }}, inside{% endblock %}
{% block style %}.cards { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 26rem), 1fr)); gap: 1rem 2rem; }
.card { display: flex; flex-direction: column; } .card h3 { margin: .8rem 0 .2rem; } .card p { margin: .2rem 0; font-size: .93rem; }
.card figure { margin: auto 0 0; padding-top: .5rem; width: 100%; } .found { border-left: 4px solid; padding-left: .6rem; }
#claims td, #claims th { text-align: left; vertical-align: top; }{% endblock %}
{% block body %}
<h1>Inside {{ runs | map(attribute="label") | join(" and ") }}</h1>
{% for run in runs %}<p class="say found" style="border-color: {{ colors[loop.index0] }}"><b>{{ run.label }}</b>: {{ run.rule }}, {{ run.model.splitting }},
{{ run.model.layers }} layers, width {{ run.model.width }}, {{ run.model.heads }} heads, {{ run.model.oracles }} oracles, checkpoint of step {{ "{:,}".format(run.step) }};
{{ run.sequences }} validation sequences of {{ "{:,}".format(run.tokens) }} tokens of {{ run.corpus.source }}.</p>
{% endfor %}
<p class="say">What would hold if depth were an optimisation. With oracles that are tied and see all tokens, and a small enough step of plain descent, the statements on
energies and gradients are theorems; an ordinary model has neither, and the table says what is left of them in it.</p>
<div class="scroll"><table id="claims"><tr><th>statement{% for run in runs %}<th>{{ run.label }}{% endfor %}</tr>
{% for card in cards if card.claim %}<tr><td>{{ card.claim }}{% for run in runs %}<td>{{ run.says[card.title] }}{% endfor %}</tr>
{% endfor %}</table></div>
<p class="say">Bands are two standard errors over the sequences of one trained model: they say nothing about another seed{{ " (and two runs see the same sequences, so their difference is surer than their bands)" if runs | length > 1 }}. Substeps stand between the layers.
E and F are per token; sizes are root mean squares over a vector's entries, so that models of any width compare. Jacobians are of the first {{ runs[0].jacobian_tokens }} tokens of the first sequence.</p>
{% for group, members in groups.items() %}{% set seen = members | selectattr("title", "in", plots) | list %}
<h2>{{ group }}</h2><div class="cards">
{% for card in seen %}<section class="card"><h3>{{ card.title }}</h3><p>{{ card.what }}</p><p class="say">{{ card.expect }}</p>
{% for run in runs if card.title in run.says %}<p class="found" style="border-color: {{ run.color }}">{{ run.says[card.title] }}</p>{% endfor %}
<figure>{{ plots[card.title] }}</figure></section>
{% endfor %}</div>{% endfor %}
{% if coefficients %}<h2>Coefficients</h2><p class="say">Where training put the scalars of the rule, a panel for each substep.</p>
<div class="cards">{% for name, svg in coefficients.items() %}<section class="card"><h3>{{ name }}</h3><figure>{{ svg }}</figure></section>{% endfor %}</div>{% endif %}
<h2>How to reproduce it</h2><pre>{{ command }}</pre>
{% for run in runs %}<details><summary>Model of {{ run.label }}</summary><pre>{{ recipe(run.model) }}</pre></details>{% endfor %}
<footer>Every number on this page is in inspection.json beside it.</footer>
{% endblock %}"""


def labelled(runs: Sequence[Run]) -> list[Run]:
    """The runs with the name each goes by on the page and with what its plots say."""
    names = [run["name"] for run in runs]
    same = len(set(names)) < len(names)
    return [
        run | {"label": f"{run['name']} ({index})" if same else run["name"], "says": says(run)}
        for index, run in enumerate(runs, 1)
    ]


def write_page(inspection: dict[str, Any], path: Path) -> None:
    """Write `inspection.html`."""
    runs = [run | {"color": RUN_COLORS[index]} for index, run in enumerate(inspection["runs"])]
    cards = [card for members in GROUPS.values() for card in members]
    html = render(
        TEMPLATE,
        runs=runs,
        colors=RUN_COLORS,
        command=inspection["command"],
        groups=GROUPS,
        cards=cards,
        plots={card.title: safe(draw(card, runs)) for card in cards if any(map(card.shown, runs))},
        coefficients={
            run["label"]: safe(plots.coefficients({"coefficients": [run["coefficients"]]}))
            for run in runs
            if run["coefficients"][0][0]
        },
        recipe=lambda model: json.dumps(model, indent=1),
    )
    write_text(path, html)
