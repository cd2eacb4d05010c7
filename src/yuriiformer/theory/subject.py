"""The oracles that statements are about: those of a model's layers, in float64, and the states they meet."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import cast

import torch
from torch import Tensor, nn

from .. import presets
from ..config import override
from ..errors import UserError
from ..machine import memory_free
from ..model import LanguageModel, Layer
from ..rule import Rule, all_rules, find_rule

# What a run reads, so that its oracles are asked where real text asks them.
TEXT = "A layer is a step: attention and the network behind it say where each word should go, and momentum remembers. "

Field = Callable[[Tensor], Tensor]  # (time, width) to the same shape


def softmax_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    """Scaled dot-product attention in the dtype given: the model's own runs in fp32 on a CPU. No mask sees all."""
    scores = q @ k.mT / q.shape[-1] ** 0.5
    return (scores if mask is None else scores.masked_fill(~mask, -torch.inf)).softmax(-1) @ v


def past(time: int) -> Tensor:
    """(time, time), true where a token sees another: itself and its past."""
    return torch.ones(time, time, dtype=torch.bool).tril()


def causal_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return softmax_attention(q, k, v, past(q.shape[-2]))


@dataclass(frozen=True)
class Place:
    """A layer's two oracles and the state they are asked at, (time, width)."""

    name: str
    attn: nn.Module
    mlp: nn.Module
    state: Tensor

    def fields(self) -> dict[str, Field]:
        """The oracles as functions of the stream, pre-norm inside, causal."""
        attn = partial(self.attn, attend=causal_attention)
        return {"attn": lambda x: attn(x[None])[0], "mlp": lambda x: self.mlp(x[None])[0]}


@dataclass(frozen=True)
class Subject:
    """The layers of one model, and the rules to run."""

    title: str
    places: tuple[Place, ...]
    rules: Mapping[str, Rule] = field(default_factory=all_rules)

    def one_in(self, count: int) -> Subject:
        """At most `count` layers, from the first to the last."""
        have = len(self.places)
        chosen = (
            sorted({round(i * (have - 1) / max(1, count - 1)) for i in range(count)}) if have > count else range(have)
        )
        return dataclasses.replace(self, places=tuple(self.places[i] for i in chosen))


def look_at(title: str, model: LanguageModel, ids: Tensor) -> Subject:
    """Run a model over (time) ids in float64 and note the state before each layer.

    Raises UserError, with the estimate, when what the statements need would not fit in memory.
    """
    width, time = model.config.width, len(ids)
    # Weights in float64 twice (the model's and a copy), and some Jacobians of (time x width) squared.
    needed = 8 * (2 * sum(p.numel() for p in model.parameters()) + 4 * (time * width) ** 2)
    if needed > (free := memory_free()):
        raise UserError(
            f"the theory of {time} tokens of width {width} would take about {needed / 2**30:.1f} GiB of memory; "
            f"{free / 2**30:.1f} GiB are free. Give fewer --tokens, or a smaller run."
        )
    model = copy.deepcopy(model).double().requires_grad_(False)
    places = []
    with torch.no_grad():
        streams = model.start(ids[None], torch.arange(time))
        for index, module in enumerate(model.layers):
            layer = cast(Layer, module)
            places.append(Place(f"layer {index + 1}", layer.attn, layer.mlp, streams[0][0]))
            streams = layer.forward(streams, causal_attention)
    return with_rules(Subject(title, tuple(places)), [model.config.rule])


def with_rules(subject: Subject, names: Sequence[str]) -> Subject:
    """The same with further rules, by name or file. Raises UserError for one that is not known."""
    return dataclasses.replace(subject, rules={**subject.rules, **{(r := find_rule(name)).name: r for name in names}})


def random_subject(gain: float, oracles: str = "plain") -> Subject:
    """Three small layers of nanoGPT's initial weights, all matrices and tables times `gain`.

    Gain 1 is where training starts: there the oracles are nearly linear. Gain 8 brings the matrices to norms near 1.
    """
    base = presets.demo(presets.BASELINE).model
    config = dataclasses.replace(base, layers=3, heads=2, width=24, context=6, vocabulary=64)
    model = LanguageModel(override(config, {"oracles": oracles}))
    with torch.no_grad():
        for matrix in (p for p in model.parameters() if p.ndim == 2):
            matrix.mul_(gain)
    return look_at(f"random weights, {gain:g} × the initial scale", model, torch.arange(config.context))
