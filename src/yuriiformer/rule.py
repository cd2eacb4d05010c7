"""A rule is a pure function, and its signature is its specification.

`@rule` reads the signature once and makes a `Rule`: which streams it moves, which oracles it asks,
whether it normalises, which coefficients are learned and in which range. Nothing else describes a rule.
"""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import inspect
import math
import pkgutil
import sys
import traceback
import typing
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from .errors import UserError, unknown


@dataclass(frozen=True)
class Range:
    """The interval a coefficient lives in, and the smooth map onto it from an unbounded parameter."""

    interval: str
    value: Callable[[Tensor], Tensor]  # raw parameter -> coefficient
    raw: Callable[[float], float]  # coefficient -> raw parameter; raises outside the interval

    def holds(self, coefficient: Any) -> bool:
        try:
            return math.isfinite(self.raw(coefficient))
        except (TypeError, ValueError, ArithmeticError):
            return False


UNIT = Range("(0, 1)", torch.sigmoid, lambda c: math.log(c / (1 - c)))
POSITIVE = Range("(0, inf)", F.softplus, lambda c: c + math.log(-math.expm1(-c)))
REAL = Range("(-inf, inf)", lambda raw: raw, float)

# The vocabulary of a signature. A stream is a tensor of shape (batch, time, width).
Stream = Annotated[Tensor, "stream"]  # the state x
Velocity = Annotated[Tensor, "velocity"]  # any further stream, same shape
Oracle = Annotated[Callable[[Tensor], Tensor], "oracle"]  # a descent direction, causal in time
Norm = Annotated[Callable[[Tensor], Tensor], "norm"]  # the velocity's LayerNorm, or the identity
Unit = Annotated[Tensor | float, UNIT]
Positive = Annotated[Tensor | float, POSITIVE]
Real = Annotated[Tensor | float, REAL]


@dataclass(frozen=True)
class Coefficient:
    """A learned scalar: its range and the value it starts from."""

    range: Range
    default: float


@dataclass(frozen=True)
class Rule:
    """What a signature says. Calling a `Rule` calls the function itself."""

    name: str
    step: Callable[..., Any]
    streams: tuple[str, ...]  # the state first, then the velocities
    oracles: tuple[str, ...]  # ("oracle",) composes with a splitting; ("attn", "mlp") is a whole layer
    normed: bool
    coefficients: Mapping[str, Coefficient]
    options: Mapping[str, tuple[Any, ...]]  # structural choices (not learned); the default first
    source: str
    reduces_to: Mapping[str, Mapping[str, float]]
    readout: tuple[str, ...]  # the streams whose sum the head reads
    sha256: str  # of the file it stands in
    textbook: Callable[[float], tuple[float, Mapping[str, float]]] | None

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.step(*args, **kwargs)

    @property
    def whole_layer(self) -> bool:
        return self.oracles == ("attn", "mlp")

    def calls(self, options: Mapping[str, Any]) -> dict[str, int]:
        """How often one step asks each oracle: counted by running it once."""
        count = dict.fromkeys(self.oracles, 0)

        def counting(name: str) -> Callable[[Tensor], Tensor]:
            def oracle(x: Tensor) -> Tensor:
                count[name] += 1
                return x

            return oracle

        stream = torch.ones(1, 2, 4)
        norm = [lambda v: v] if self.normed else []
        values = {name: c.default for name, c in self.coefficients.items()} | dict(options)
        with _located(self.step.__code__.co_filename):
            out = self.step(*[stream] * len(self.streams), *map(counting, self.oracles), *norm, **values)
        if (returned := len(as_streams(out))) != (taken := len(self.streams)):
            raise UserError(
                f"rule {self.name!r} returns {returned} streams; its signature takes {taken}, return as many."
            )
        if idle := [name for name, n in count.items() if n == 0]:
            raise UserError(f"rule {self.name!r} never asks its oracle {idle[0]!r}.")
        return count


def as_streams(out: Tensor | tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """A rule of one stream returns a tensor, any other a tuple."""
    return out if isinstance(out, tuple) else (out,)


def rule(
    *,
    source: str,
    reduces_to: Mapping[str, Mapping[str, float]] | None = None,
    readout: tuple[str, ...] = ("x",),
    textbook: Callable[[float], tuple[float, Mapping[str, float]]] | None = None,
) -> Callable[[Callable[..., Any]], Rule]:
    """Make a `Rule` of a function.

    source: where the rule comes from.
    reduces_to: {other rule: coefficient values} under which, without the norm, it equals that rule.
    readout: the streams whose sum the head reads, when it is not the state alone.
    textbook: with oracle -gradient/L, curvature in [m, L]: sqrt(m/L) -> (factor on the error in a step, coefficients);
        for a whole layer as an integrator of dv = attn(x), dx = mlp(v): step size -> (order, coefficients).
    Raises UserError naming file, line and parameter when the signature is not one of a rule.
    """

    def decorate(step: Callable[..., Any]) -> Rule:
        code = step.__code__
        where = f"{code.co_filename}, line {code.co_firstlineno}: rule {step.__name__!r}"
        hints = typing.get_type_hints(step, include_extras=True)
        names: dict[str, list[str]] = {"stream": [], "velocity": [], "oracle": [], "norm": []}
        order: list[str] = []
        coefficients: dict[str, Coefficient] = {}
        options: dict[str, tuple[Any, ...]] = {}

        for name, parameter in inspect.signature(step).parameters.items():
            hint = hints.get(name)
            kind, default = getattr(hint, "__metadata__", (None,))[0], parameter.default
            if parameter.kind is not parameter.KEYWORD_ONLY:
                if kind not in names:
                    raise UserError(f"{where}: parameter {name!r} must be annotated Stream, Velocity, Oracle or Norm.")
                names[kind].append(name)
                order.append(kind)
            elif typing.get_origin(hint) is Literal:
                choices = typing.get_args(hint)
                if default not in choices:
                    raise UserError(f"{where}: option {name!r} needs a default out of {choices}.")
                options[name] = (default, *(c for c in choices if c != default))
            elif isinstance(kind, Range):
                if not kind.holds(default):
                    raise UserError(f"{where}: coefficient {name!r} needs a default in {kind.interval}.")
                coefficients[name] = Coefficient(kind, float(default))
            else:
                raise UserError(f"{where}: coefficient {name!r} must be annotated Unit, Positive, Real or Literal.")

        streams, oracles = (*names["stream"], *names["velocity"]), tuple(names["oracle"])
        if order != sorted(order, key=list(names).index) or len(names["stream"]) != 1 or len(names["norm"]) > 1:
            raise UserError(f"{where}: parameters are one Stream, then Velocity, then Oracle, then at most one Norm.")
        if oracles not in (("oracle",), ("attn", "mlp")):
            raise UserError(f"{where}: oracles are {oracles}; allowed are ('oracle',) or ('attn', 'mlp').")
        if not set(readout) <= set(streams):
            raise UserError(f"{where}: readout {readout} must name its streams {streams}.")
        return Rule(
            step.__name__, step, streams, oracles, bool(names["norm"]), coefficients, options,
            source, reduces_to or {}, readout, hashlib.sha256(Path(code.co_filename).read_bytes()).hexdigest(), textbook,
        )  # fmt: skip

    return decorate


@cache
def all_rules() -> dict[str, Rule]:
    """Every rule in the package, found by walking `rules/`."""
    package = importlib.import_module("yuriiformer.rules")
    found: dict[str, Rule] = {}
    for info in pkgutil.iter_modules(package.__path__):
        path = str(Path(package.__path__[0], f"{info.name}.py"))
        with _located(path):
            module = importlib.import_module(f"{package.__name__}.{info.name}")
        found |= {r.name: r for r in vars(module).values() if isinstance(r, Rule)}
    return found


def find_rule(name: str) -> Rule:
    """A rule by its name, or from a file outside the package when the name ends in `.py`."""
    if name.endswith(".py"):
        path = Path(name)
        if not path.is_file():
            raise UserError(f"rule file {name!r} does not exist.")
        return _from_file(path, path.read_bytes())
    try:
        return all_rules()[name]
    except KeyError:
        raise unknown("rule", name, all_rules()) from None


@cache
def _from_file(path: Path, content: bytes) -> Rule:
    """The rule of a file; one object as long as the content is the same, so that all its runs share what is compiled."""
    name = f"yuriiformer_rule_{path.stem}_{hashlib.sha256(content).hexdigest()[:8]}"
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    with _located(str(path)):
        sys.modules[spec.name] = module  # torch.compile looks functions up by their module
        spec.loader.exec_module(module)
    found = [value for value in vars(module).values() if isinstance(value, Rule)]
    if len(found) != 1:
        raise UserError(f"{path} defines {len(found)} rules; a rule file defines exactly one, with @rule.")
    return found[0]


@contextmanager
def _located(path: str) -> Iterator[None]:
    """What goes wrong in a rule file becomes one line that names the file and the line."""
    try:
        yield
    except UserError:
        raise
    except SyntaxError as error:
        raise UserError(f"{path}, line {error.lineno}: {error.msg}") from None
    except Exception as error:
        lines = [f.lineno for f in traceback.extract_tb(error.__traceback__) if f.filename == path]
        raise UserError(f"{path}, line {lines[-1] if lines else 1}: {type(error).__name__}: {error}") from None
