"""Token ids to streams, through the layers, to logits: a language model whose layers are steps of a rule."""

from __future__ import annotations

import dataclasses
import hashlib
import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .cache import KVCache
from .config import ModelConfig
from .errors import UserError, unknown
from .oracle import ORACLES, Attend, causal
from .rule import REAL, UNIT, Rule, as_streams, find_rule
from .splitting import Direction, Splitting, find_splitting

Streams = tuple[Tensor, ...]  # the state first; each (batch, time, width)


class Substep(nn.Module):
    """One application of a rule, with its own coefficients and velocity norm."""

    fixed: Tensor
    constants: Mapping[str, float] | None = None  # see LanguageModel.constant_coefficients

    def __init__(self, rule: Rule, config: ModelConfig, layer: int, normed: bool) -> None:
        super().__init__()
        self.rule, self.options = rule, config.options
        self.free = config.coefficients == "free"  # learned, and not confined to its range
        self.learned = self.free or config.coefficients == "learned"
        initial = _initial_values(rule, config, layer)
        # All scalars in one 1-D tensor, unbound at use: a 0-d factor leaves the dtype of a stream alone,
        # and sharded training refuses 0-d parameters.
        if initial and self.learned:
            raw = [v if self.free else rule.coefficients[name].range.raw(v) for name, v in initial.items()]
            self.raw = nn.Parameter(torch.tensor(raw))
        elif initial:
            self.register_buffer("fixed", torch.tensor(list(initial.values())))
        self.norm: nn.Module | None = None
        if rule.normed:
            self.norm = nn.LayerNorm(config.width, bias=False) if normed else nn.Identity()

    def coefficients(self) -> Mapping[str, Tensor | float]:
        if self.constants is not None:
            return self.constants
        table = self.rule.coefficients
        if not table:
            return {}
        if not self.learned:
            return dict(zip(table, self.fixed.unbind(), strict=True))
        if self.free:
            return dict(zip(table, self.raw.unbind(), strict=True))
        return {name: table[name].range.value(raw) for name, raw in zip(table, self.raw.unbind(), strict=True)}

    @torch.no_grad()
    def numbers(self) -> dict[str, float]:
        return {name: float(value) for name, value in self.coefficients().items()}

    def forward(self, streams: Streams, *oracles: object) -> Streams:
        norm = () if self.norm is None else (self.norm,)
        moved = as_streams(self.rule(*streams, *oracles, *norm, **self.coefficients(), **self.options))
        return tuple(
            new.to(old.dtype) for new, old in zip(moved, streams, strict=True)
        )  # autocast's norms answer in fp32


def _initial_values(rule: Rule, config: ModelConfig, layer: int) -> dict[str, float]:
    """Where the coefficients start (or stay) in a layer, counted from 0."""
    values = {}
    for name, coefficient in rule.coefficients.items():
        neutral = coefficient.range.value(torch.zeros((), device="cpu")).item()
        values[name] = config.values.get(name, neutral if config.initial == "neutral" else coefficient.default)
        if config.coefficients == "scheduled" and coefficient.range is UNIT:
            values[name] = (layer + 1) / (layer + 4)  # Nesterov's t / (t + 3), t = 1, 2, ...
    return values


class Layer(nn.Module):
    """The two oracles and the substeps that ask them."""

    def __init__(self, rule: Rule, splitting: Splitting, config: ModelConfig, index: int) -> None:
        super().__init__()
        self.rule, self.splitting = rule, splitting
        oracles = ORACLES[config.oracles]
        self.attn, self.mlp = oracles.attn(config.width, config.heads), oracles.mlp(config.width)
        last = len(splitting.stages) - 1
        normed = {"substep": range(last + 1), "layer": [last], "none": []}[config.velocity_norm]
        self.substeps = nn.ModuleList(Substep(rule, config, index, i in normed) for i in range(last + 1))

    def forward(self, streams: Streams, attend: Attend = causal) -> Streams:
        oracles: dict[str, Direction] = {"attn": partial(self.attn, attend=attend), "mlp": self.mlp}
        for stage, substep in zip(self.splitting.stages, self.substeps, strict=True):
            asked = oracles.values() if self.rule.whole_layer else (stage.direction(oracles),)
            streams = substep(streams, *asked)
        return streams


class Tables(nn.Module):
    """A token and a position embedding, added."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.token = nn.Embedding(config.vocabulary, config.width)
        self.position = nn.Embedding(config.context, config.width)

    def forward(self, ids: Tensor, positions: Tensor) -> Tensor:
        return self.token(ids) + self.position(positions)


class LanguageModel(nn.Module):
    """A decoder-only transformer. With gradient descent and Lie-Trotter it is nanoGPT's GPT-2.

    Raises UserError for a configuration that no model has.
    """

    def __init__(self, config: ModelConfig, seed: int | None = 0) -> None:
        super().__init__()
        self.config = config = checked(config)
        self.rule = find_rule(config.rule)
        splitting = find_splitting(self.rule, config.splitting)

        self.input = Tables(config)
        self.second = Tables(config) if config.second_table else None
        self.x0_scale = nn.Parameter(torch.tensor([config.x0_scale])) if config.learn_x0_scale else None
        velocities = range(len(self.rule.streams) - 1)
        self.velocity = nn.ModuleList()  # what the velocities start from
        if config.velocity_start == "own":
            self.velocity.extend(Tables(config) for _ in velocities)
        elif config.velocity_start == "linear":
            self.velocity.extend(nn.Linear(config.width, config.width, bias=False) for _ in velocities)
        self.layers = nn.ModuleList(Layer(self.rule, splitting, config, i) for i in range(config.layers))
        self.norm = nn.LayerNorm(config.width, bias=ORACLES[config.oracles].bias)
        self.cross_entropy: Callable[[Tensor, Tensor, Tensor], Tensor] = cross_entropy
        self.stream_dtype: torch.dtype | None = None  # of the streams in training, where it is not that of the weights
        if seed is not None:  # else the weights are to be loaded, or the tensors are on the meta device
            self.initialise(seed)

    @torch.no_grad()
    def initialise(self, seed: int) -> None:
        """nanoGPT's initial weights. Each tensor's draw depends on its name alone, so arms share what they share.

        | tensor | start |
        | --- | --- |
        | tables, qkv, query, key, up | N(0, 0.02) |
        | out (the residual projections) | N(0, 0.02 / sqrt(2 layers)) |
        | a velocity's linear map | the identity |
        | biases | 0 |
        | norms, coefficients, scale | as constructed; a tied oracle, which has no out, steps by 1 / sqrt(2 layers) |
        """
        for name, parameter in self.named_parameters():
            if name.startswith("velocity.") and name.count(".") == 2:
                nn.init.eye_(parameter)
            elif parameter.ndim == 2:
                std = 0.02 / math.sqrt(2 * self.config.layers) if name.endswith("out.weight") else 0.02
                digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
                generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)
                parameter.copy_(torch.empty(parameter.shape).normal_(0, std, generator=generator))
            elif name.endswith("bias"):
                parameter.zero_()
            elif name.endswith((".attn.raw", ".mlp.raw")):
                parameter.fill_(-math.log(2 * self.config.layers) / 2)

    def start(self, ids: Tensor, positions: Tensor) -> Streams:
        """The streams before the first layer; positions are (time) or (batch, time)."""
        x = self.input(ids, positions)
        if self.second is not None:
            x = x + self.second(ids, positions)
        if self.x0_scale is not None:
            x = self.x0_scale.unbind()[0] * x
        elif self.config.x0_scale != 1:
            x = self.config.x0_scale * x
        count = len(self.rule.streams) - 1
        match self.config.velocity_start:
            case "own":
                return x, *(tables(ids, positions) for tables in self.velocity)
            case "linear":
                return x, *(linear(x).to(x.dtype) for linear in self.velocity)
            case "x0":
                return x, *[x] * count
            case _:
                return x, *[torch.zeros_like(x)] * count

    def read(self, streams: Streams) -> Tensor:
        """What the head reads of the streams after the last layer: (batch, time, width)."""
        read = [stream for name, stream in zip(self.rule.streams, streams, strict=True) if name in self.rule.readout]
        return self.norm(sum(read[1:], start=read[0]))

    def hidden(self, ids: Tensor, cache: KVCache | None = None, dtype: torch.dtype | None = None) -> Tensor:
        """What the head reads for (batch, time) ids, which continue the tokens that the cache holds.

        dtype: of the streams between the layers; None leaves them as they start.
        """
        time = ids.shape[1]
        positions, attend = (torch.arange(time, device=ids.device), causal) if cache is None else cache.read(time)
        streams = tuple(stream.to(dtype or stream.dtype) for stream in self.start(ids, positions))
        for layer in self.layers:
            # Layers are compiled for training; decoding has other lengths, and a graph of its own (generate.py).
            streams = layer(streams) if cache is None else layer.forward(streams, attend)
        if cache is not None:
            cache.advance(time)
        return self.read(streams)

    def head(self, hidden: Tensor) -> Tensor:
        """Logits by the tied embedding table."""
        return F.linear(hidden, self.input.token.weight)

    def forward(self, ids: Tensor, cache: KVCache | None = None) -> Tensor:
        """(batch, time) ids to (batch, time, vocabulary) logits. With a cache, ids continue the tokens it holds."""
        return self.head(self.hidden(ids, cache))

    def decode(self, ids: Tensor, cache: KVCache | None = None) -> Tensor:
        """(batch, vocabulary) logits of the next token."""
        return self.head(self.hidden(ids, cache)[:, -1])

    def loss(self, ids: Tensor, targets: Tensor) -> Tensor:
        """Mean cross entropy in nats per token; targets are the next ids."""
        return self.cross_entropy(self.hidden(ids, dtype=self.stream_dtype), self.input.token.weight, targets)

    def compile_parts(self) -> None:
        """Compile one layer for all layers, and the head with its loss: a graph each, in seconds instead of minutes."""
        allow_recompilation()
        for layer in self.layers:
            layer.compile(fullgraph=True, dynamic=False)
        self.cross_entropy = torch.compile(cross_entropy, fullgraph=True, dynamic=False)

    @contextmanager
    def constant_coefficients(self) -> Iterator[None]:
        """Within it the learned scalars are plain numbers: decoding would compute them anew for every token."""
        substeps = [module for module in self.modules() if isinstance(module, Substep)]
        for substep in substeps:
            substep.constants = substep.numbers()
        try:
            yield
        finally:
            for substep in substeps:
                substep.constants = None

    def parameter_counts(self) -> dict[str, int]:
        """Trained parameters by part; they sum to the total."""
        counts = dict.fromkeys(PARTS.values(), 0)
        for name, parameter in self.named_parameters():
            counts[next(PARTS[word] for word in reversed(name.split(".")) if word in PARTS)] += parameter.numel()
        return counts

    def learned_coefficients(self) -> list[list[dict[str, float]]]:
        """The coefficients now: [layer][substep]{name: value}."""
        layers = [cast(list[Substep], layer.substeps) for layer in cast(list[Layer], self.layers)]
        return [[s.numbers() for s in substeps] for substeps in layers]


# The part a parameter counts to: the last word of its name that stands here decides.
PARTS = {
    "input": "token and position tables",
    "second": "second tables",
    "velocity": "velocity start",
    "attn": "attention",
    "mlp": "mlp",
    "norm": "norms",
    "raw": "coefficients",
    "x0_scale": "coefficients",
}


def allow_recompilation() -> None:
    """The arms of a comparison share the code of a layer: it may be compiled once for each of them."""
    torch._dynamo.config.recompile_limit = 64


def cross_entropy(hidden: Tensor, table: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(F.linear(hidden, table).flatten(0, 1).float(), targets.flatten())


def oracle_calls(config: ModelConfig) -> Counter[str]:
    """How often one layer asks each oracle, `attn` and `mlp`."""
    rule = find_rule(config.rule)
    asked = rule.calls(config.options)
    if rule.whole_layer:
        return Counter(asked)
    stages = find_splitting(rule, config.splitting).stages
    return Counter({o: n * asked["oracle"] for o, n in Counter(o for s in stages for o in s.oracles).items()})


def flops_per_token(config: ModelConfig) -> dict[str, int]:
    """Matrix-product FLOPs of one token's forward pass at full context, by part; training costs three times that.

    A multiply-add is 2. Attention scores count all `context` keys (nanoGPT's convention, not the causal half);
    element-wise work is not counted.
    """
    calls = oracle_calls(config)
    velocities = len(find_rule(config.rule).streams) - 1
    linear_starts = velocities if config.velocity_start == "linear" else 0
    return {
        "attention projections": config.layers
        * calls["attn"]
        * 2
        * ORACLES[config.oracles].projections
        * config.width**2,
        "attention scores": config.layers * calls["attn"] * 2 * 2 * config.context * config.width,
        "mlp": config.layers * calls["mlp"] * 2 * 8 * config.width**2,
        "velocity start": linear_starts * 2 * config.width**2,
        "head": 2 * config.vocabulary * config.width,
    }


def training_flops_per_token(config: ModelConfig) -> int:
    """The forward pass, and twice that for the backward."""
    return 3 * sum(flops_per_token(config).values())


def checked(config: ModelConfig) -> ModelConfig:
    """The config with its splitting by name. Raises UserError when no model has it."""
    rule = find_rule(config.rule)
    config = dataclasses.replace(config, splitting=find_splitting(rule, config.splitting).name)
    for key in ("layers", "heads", "width", "context", "vocabulary"):
        if getattr(config, key) < 1:
            raise UserError(f"model.{key} must be at least 1; got {getattr(config, key)}.")
    if config.width % config.heads:
        raise UserError(f"model.heads must divide model.width; got {config.heads} heads, width {config.width}.")
    for name, value in config.options.items():
        if name not in rule.options:
            raise unknown(f"option of rule {rule.name!r}", name, rule.options)
        if value not in rule.options[name]:
            raise UserError(f"option {name} of rule {rule.name!r} must be one of {rule.options[name]}; got {value!r}.")
    for name, value in config.values.items():
        if name not in rule.coefficients:
            raise unknown(f"coefficient of rule {rule.name!r}", name, rule.coefficients)
        allowed = REAL if config.coefficients == "free" else rule.coefficients[name].range
        if not allowed.holds(value):
            interval = allowed.interval
            raise UserError(f"coefficient {name} of rule {rule.name!r} must be in {interval}; got {value!r}.")
    oracle_calls(config)  # runs the rule once: one that cannot run, or returns the wrong streams, is refused here
    return config
