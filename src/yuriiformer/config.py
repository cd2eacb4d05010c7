"""A run's whole configuration: frozen dataclasses, strict JSON or TOML in, JSON out. Imports no torch."""

from __future__ import annotations

import dataclasses
import json
import tomllib
import typing
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeVar

from .errors import UserError, unknown

T = TypeVar("T")


def doc(text: str, default: Any = dataclasses.MISSING, **kwargs: Any) -> Any:
    """A dataclass field with the line that explains it."""
    return field(default=default, metadata={"doc": text}, **kwargs)


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    rule: str = doc("update rule: a name from `yuriiformer rules`, or a path to a .py file")
    splitting: str = doc("how the oracles are combined; auto is the rule's default", "auto")
    options: dict[str, Any] = doc("the rule's structural options, such as k=2", default_factory=dict)
    layers: int = doc("number of layers", 8)
    heads: int = doc("attention heads; must divide width", 3)
    width: int = doc("width of each stream", 96)
    context: int = doc("longest sequence", 128)
    vocabulary: int = doc("rows of the embedding table; 0 takes the corpus's, rounded up to 64", 0)
    velocity_start: Literal["own", "zeros", "x0", "linear"] = doc("v0: own tables, 0, x0, or a linear map of x0", "own")
    velocity_norm: Literal["substep", "layer", "none"] = doc(
        "LayerNorm of the velocity: each substep, last, never", "substep"
    )
    oracles: Literal["plain", "biased", "gpt2", "tied"] = doc(
        "attention and MLP: nanoGPT's, with biases, GPT-2's own, exact gradients of energies", "plain"
    )
    coefficients: Literal["learned", "free", "fixed", "scheduled"] = doc(
        "free: learned without staying in their range; scheduled: those in (0, 1) are t/(t+3) in layer t", "learned"
    )
    initial: Literal["rule", "neutral"] = doc("start of the coefficients: the rule's, or all raw parameters 0", "rule")
    values: dict[str, float] = doc("initial values by coefficient name, over `initial`", default_factory=dict)
    x0_scale: float = doc("factor on the embeddings that start the state", 1.0)
    learn_x0_scale: bool = doc("learn that factor", False)
    second_table: bool = doc("add a second token and position table to x0 (the parameter-matched control)", False)


@dataclass(frozen=True, kw_only=True)
class TrainingConfig:
    steps: int = doc("optimiser steps", 400)
    batch: int = doc("sequences per optimiser step, over all micro-batches and devices", 16)
    micro_batch: int = doc("sequences per forward pass and process; 0 takes as many as fit in memory", 0)
    optimizer: Literal["muon", "adamw"] = doc("muon: Muon on the matrices of the layers, AdamW on the rest", "muon")
    muon_lr: float = doc("peak learning rate of Muon", 0.02)
    adamw_lr: float = doc("peak learning rate of AdamW", 0.02)
    coefficient_lr: float = doc("learning rate of the learned scalars, as a multiple of adamw_lr", 5.0)
    weight_decay: float = doc("AdamW's weight decay, on the embedding tables (and on the matrices under adamw)", 0.1)
    schedule: Literal["cosine", "wsd", "constant"] = doc("learning rate over the steps, after the warm-up", "cosine")
    warmup: float = doc("share of the steps with linear warm-up", 0.1)
    decay: float = doc("share of the steps with linear decay, for wsd", 1 / 6)
    final_lr: float = doc("last learning rate as a share of the peak", 0.1)
    clip: float = doc("largest global gradient norm; 0 does not clip", 1.0)
    spike: float = doc("leave out a step whose gradient norm is so many times its running mean; 0 never", 10.0)
    seed: int = doc("initial weights and data order", 0)
    evaluate_every: int = doc("steps between validations", 50)
    evaluate_sequences: int = doc("sequences of the fixed validation set", 256)
    checkpoint_every: int = doc("steps between checkpoints; 0 writes only the last", 100)
    keep: int = doc("newest checkpoints kept", 2)
    keep_best: bool = doc("write one at each new best validation loss, and keep the best", True)
    parallel: Literal["ddp", "fsdp"] = doc("several processes: the model whole on each, or in shards", "ddp")
    device: Literal["auto", "cpu", "cuda", "mps"] = doc("auto takes the fastest there is", "auto")
    precision: Literal["auto", "fp32", "bf16"] = doc(
        "bf16 means autocast over fp32 weights; auto is measured per device", "auto"
    )
    compile: Literal["auto", "yes", "no"] = doc("torch.compile of each layer; auto is measured per device", "auto")
    attention: Literal["auto", "cudnn", "flash", "efficient", "math"] = doc(
        "kernel of attention on cuda; auto takes the fastest at the model's shape, elsewhere torch chooses", "auto"
    )
    streams: Literal["fp32", "bf16"] = doc("numbers of the streams between the layers, where precision is bf16", "fp32")
    loss_chunk: int = doc("tokens whose logits exist at a time; 0 is all at once, faster and larger", 0)


@dataclass(frozen=True, kw_only=True)
class Config:
    """One training run."""

    corpus: str = doc("corpus directory, made by `yuriiformer prepare`", "")
    start: str = doc("run directory whose weights training starts from; the model is then that run's", "")
    model: ModelConfig = doc("the architecture")
    training: TrainingConfig = doc("the recipe", default_factory=TrainingConfig)


def as_dict(config: Any) -> dict[str, Any]:
    return dataclasses.asdict(config)


def from_dict(cls: type[T], data: Mapping[str, Any], where: str = "") -> T:
    """Build a config of `cls`; every key must be a field and every value of its type.

    Raises UserError naming the dotted key.
    """
    if not isinstance(data, Mapping):
        raise UserError(f"config key {where.rstrip('.')} is a section of keys; got {data!r}.")
    hints = typing.get_type_hints(cls)
    values = {}
    for key, value in data.items():
        if key not in hints:
            raise unknown("config key", where + key, [where + k for k in hints])
        hint = hints[key]
        is_section = dataclasses.is_dataclass(hint) and isinstance(hint, type)
        values[key] = from_dict(hint, value, f"{where}{key}.") if is_section else _checked(hint, value, where + key)
    try:
        return cls(**values)
    except TypeError:
        missing = [f.name for f in dataclasses.fields(cls) if f.name not in values]  # type: ignore[arg-type]
        raise UserError(f"config key {where}{missing[0]!r} is required.") from None


def _checked(hint: Any, value: Any, key: str) -> Any:
    if typing.get_origin(hint) is Literal:
        if value not in typing.get_args(hint):
            raise unknown(key, str(value), map(str, typing.get_args(hint)))
        return value
    base = typing.get_origin(hint) or hint
    if base is float and type(value) is int:
        return float(value)
    if type(value) is not base:
        raise UserError(f"config key {key} must be of type {base.__name__}; got {value!r}.")
    return value


def field_type(cls: type, key: str) -> Any:
    return typing.get_type_hints(cls)[key]


def parse(text: str, hint: Any) -> Any:
    """A command line's text as a value of the type; text that does not fit is returned as it is, to be refused later."""
    if typing.get_origin(hint) is Literal or hint is str:
        return text
    try:
        value = json.loads(text.lower() if hint is bool else text)
        return float(value) if hint is float and type(value) is int else value
    except json.JSONDecodeError:
        return text


def override(config: T, assignments: Mapping[str, Any]) -> T:
    """The config with dotted keys replaced; text values are read as the field's type."""
    data = as_dict(config)
    for dotted, value in assignments.items():
        *sections, last = dotted.split(".")
        node, cls = data, type(config)
        for section in sections:
            if section not in node:
                break
            node, cls = node[section], field_type(cls, section)
        if not isinstance(node, dict) or last not in node or not dataclasses.is_dataclass(cls):
            raise unknown("config key", dotted, flat_keys(type(config)))
        node[last] = parse(value, field_type(cls, last)) if isinstance(value, str) else value
    return from_dict(type(config), data)


def flat_keys(cls: type, prefix: str = "") -> dict[str, dataclasses.Field[Any]]:
    """Every dotted key with its field."""
    keys: dict[str, dataclasses.Field[Any]] = {}
    for f in dataclasses.fields(cls):
        hint = field_type(cls, f.name)
        if dataclasses.is_dataclass(hint) and isinstance(hint, type):
            keys |= flat_keys(hint, f"{prefix}{f.name}.")
        else:
            keys[prefix + f.name] = f
    return keys


def flat(config: Config) -> dict[str, Any]:
    """Every dotted key of a run's configuration with its value."""
    data = as_dict(config)
    return {
        key: data[section][name] if section else data[name]
        for key in flat_keys(Config)
        for section, _, name in [key.rpartition(".")]
    }


def load(path: Path, base: Config) -> Config:
    """Read a .toml or .json file of sections over `base`."""
    try:
        text = path.read_text(encoding="utf-8")
        data = tomllib.loads(text) if path.suffix == ".toml" else json.loads(text)
    except FileNotFoundError:
        raise UserError(f"config file {str(path)!r} does not exist.") from None
    except (tomllib.TOMLDecodeError, json.JSONDecodeError, UnicodeDecodeError, OSError) as error:
        raise UserError(f"config file {str(path)!r} cannot be read: {error}") from None
    merged = as_dict(base)
    for key, value in data.items():
        merged[key] = merged[key] | value if isinstance(value, dict) and isinstance(merged.get(key), dict) else value
    return from_dict(Config, merged)
