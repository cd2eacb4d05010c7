"""What a user sees when something is wrong: one clear line and an exit code."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class UserError(Exception):
    """Bad input: what was got, what is allowed, what to do. Exit code 2."""

    exit_code = 2


class EnvironmentFault(UserError):
    """The machine refuses (disk full, missing library). Exit code 3."""

    exit_code = 3


class Interrupted(UserError):
    """Stopped by a signal with everything saved; the same command goes on. Exit code 75."""

    exit_code = 75


class Refuted(UserError):
    """A statement came out otherwise than theory says. Exit code 1."""

    exit_code = 1


def unknown(kind: str, got: str, allowed: Iterable[str]) -> UserError:
    """The error for a name that is not in a table, with the nearest name that is."""
    names = sorted(allowed)
    near = difflib.get_close_matches(got, names, n=1)
    hint = f"; did you mean {near[0]!r}?" if near else "."
    if len(names) > 100:  # one line stays one line
        near = difflib.get_close_matches(got, names, n=5)
        return UserError(f"{kind} {got!r} is not known{hint} Nearest of {len(names):,}: {', '.join(near) or 'none'}")
    return UserError(f"{kind} {got!r} is not known{hint} Known: {', '.join(names)}")
