"""Momentum for a model that is trained already: another rule that at first computes exactly the same function.

A rule's `reduces_to` says at which coefficients it equals a simpler rule when no norm acts on its velocity. Followed
down to the rule of the trained model, it says where the coefficients must start. Those values (0, 1) lie on the edge of
their ranges, where a sigmoid is reached only at infinity and has no slope: hence coefficients that are free of a range.
"""

from __future__ import annotations

import dataclasses

from .config import ModelConfig
from .errors import UserError
from .rule import Rule, all_rules, find_rule


def operate(start: ModelConfig, name: str) -> ModelConfig:
    """The config under which the rule `name` computes what a model of `start` computes, with all of its tensors.

    v0 = 0 adds no parameter; any other start of the velocity keeps the function, too. The start's own rule keeps its
    config. Raises UserError for a rule that no chain of reductions leads from.
    """
    new, old = find_rule(name), find_rule(start.rule)
    if (new.name, new.sha256) == (old.name, old.sha256):
        return dataclasses.replace(start, rule=name)
    values = _equal(new, old)
    if values is None:
        able = [rule.name for rule in all_rules().values() if _equal(rule, old) is not None]
        raise UserError(
            f"rule {name!r} cannot start from a run of {start.rule!r}: what it reduces to does not lead there, to a rule "
            f"without velocity and coefficients. Rules that can: {', '.join([start.rule, *able])}"
        )
    return dataclasses.replace(
        start, rule=name, options={}, coefficients="free", values=values, velocity_start="zeros", velocity_norm="none"
    )


def _equal(new: Rule, old: Rule) -> dict[str, float] | None:
    """The coefficients at which `new` is the whole of a model that `old` is now, its readout included."""
    bare = old.streams == old.readout and not old.coefficients
    return reduction(new, old) if bare and new.readout == new.streams[:1] else None


def reduction(rule: Rule, to: Rule) -> dict[str, float] | None:
    """The coefficients at which a rule equals another one, by following `reduces_to`; None where no chain leads there."""
    for name, values in rule.reduces_to.items():
        simpler = find_rule(name)
        further = {} if simpler is to else reduction(simpler, to)
        if further is not None and further.keys() | values.keys() <= rule.coefficients.keys():
            return {**further, **values}
    return None
