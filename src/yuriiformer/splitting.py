"""How the two oracles of a layer are combined: a table."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from torch import Tensor

from .errors import UserError, unknown
from .rule import Rule

Direction = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Stage:
    """One application of the rule: the oracles it asks, summed and scaled by the step fraction h."""

    oracles: tuple[str, ...]
    h: float = 1.0

    def direction(self, oracles: Mapping[str, Direction]) -> Direction:
        if len(self.oracles) == 1 and self.h == 1:
            return oracles[self.oracles[0]]

        def scaled_sum(x: Tensor) -> Tensor:
            terms = [oracles[name](x) for name in self.oracles]
            total = sum(terms[1:], start=terms[0])
            return total if self.h == 1 else self.h * total

        return scaled_sum


@dataclass(frozen=True)
class Splitting:
    """The stages of one layer, in order."""

    name: str
    stages: tuple[Stage, ...]


EULER = Splitting("euler", (Stage(("attn", "mlp")),))
LIE_TROTTER = Splitting("lie_trotter", (Stage(("attn",)), Stage(("mlp",))))
STRANG = Splitting("strang", (Stage(("attn",), 1 / 2), Stage(("mlp",)), Stage(("attn",), 1 / 2)))
WHOLE_LAYER = Splitting("whole_layer", (Stage(("attn", "mlp")),))  # the rule takes both oracles and splits itself

COMPOSING = {s.name: s for s in (LIE_TROTTER, EULER, STRANG)}  # the default first


def legal_splittings(rule: Rule) -> dict[str, Splitting]:
    """The splittings a rule can be used with; the first is its default."""
    return {WHOLE_LAYER.name: WHOLE_LAYER} if rule.whole_layer else COMPOSING


def find_splitting(rule: Rule, name: str) -> Splitting:
    """A splitting by name ("auto": the rule's default). Raises UserError when the pair is not legal."""
    legal = legal_splittings(rule)
    if name == "auto":
        return next(iter(legal.values()))
    if name in legal:
        return legal[name]
    if name not in {*COMPOSING, WHOLE_LAYER.name}:
        raise unknown("splitting", name, {*COMPOSING, WHOLE_LAYER.name})
    takes = "attn and mlp and is a whole layer" if rule.whole_layer else "one oracle and composes with a splitting"
    raise UserError(
        f"rule {rule.name!r} cannot be used with splitting {name!r}: it takes {takes}. Legal: {', '.join(legal)}"
    )
