"""The theory, running: each statement of the paper and of the textbooks behind it, computed.

    from yuriiformer.theory import compute, random_subject
    for statement in compute(random_subject(gain=8)):
        print(statement.name, statement.verdict)

A statement is a function of a subject: the oracles of a trained model's layers (`look_at`) or random ones, and the rules.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

from ..errors import unknown
from . import acceleration, energies, particles, splittings
from .statement import Line, Plot, Row, Spheres, Statement
from .subject import TEXT, Place, Subject, look_at, random_subject, with_rules

STATEMENTS: dict[str, Callable[[Subject], Statement]] = {
    function.__name__: function
    for module in (energies, splittings, acceleration, particles)
    for function in module.STATEMENTS
}


def chosen(only: Sequence[str] = ()) -> list[str]:
    """The names of `only`, or all. Raises UserError for one that does not exist."""
    for name in only:
        if name not in STATEMENTS:
            raise unknown("statement", name, STATEMENTS)
    return [name for name in STATEMENTS if name in only or not only]


def compute(subject: Subject, only: Sequence[str] = ()) -> Iterator[Statement]:
    """Each statement as soon as it is computed."""
    return (STATEMENTS[name](subject) for name in chosen(only))


__all__ = [
    "STATEMENTS", "TEXT", "Line", "Place", "Plot", "Row", "Spheres", "Statement", "Subject", "chosen", "compute", "look_at",
    "random_subject", "with_rules",
]  # fmt: skip
