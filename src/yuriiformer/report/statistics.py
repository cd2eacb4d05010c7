"""Paired differences with their uncertainty."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
from scipy import stats


def paired(a: Sequence[float], b: Sequence[float]) -> dict[str, Any]:
    """a - b over the same seeds: mean, 95 % interval and p-value of the paired t-test (None with one seed)."""
    differences = np.asarray(a) - np.asarray(b)
    result: dict[str, Any] = {"mean_difference": float(differences.mean()), "low": None, "high": None, "p_value": None}
    if len(differences) > 1 and np.ptp(differences) == 0:  # no spread at all: the test's limit
        result |= {"low": float(differences[0]), "high": float(differences[0]), "p_value": float(differences[0] == 0)}
    elif len(differences) > 1:
        test = stats.ttest_rel(a, b)
        interval = test.confidence_interval(0.95)
        result |= {"low": float(interval.low), "high": float(interval.high), "p_value": float(test.pvalue)}
    return result | {"differences": differences.tolist()}


def holm(p_values: Sequence[float | None]) -> list[float | None]:
    """Holm's adjustment for several comparisons with one baseline; None stays None."""
    known = sorted((p, i) for i, p in enumerate(p_values) if p is not None)
    adjusted: list[float | None] = [None] * len(p_values)
    largest = 0.0
    for rank, (p, i) in enumerate(known):
        largest = max(largest, min(1.0, p * (len(known) - rank)))
        adjusted[i] = largest
    return adjusted


def mean(values: Iterable[float]) -> float:
    return float(np.mean(list(values)))


def spread(values: Iterable[float]) -> str:
    """± the standard deviation over seeds; empty with one."""
    values = list(values)
    return f" ± {np.std(values, ddof=1):.4f}" if len(values) > 1 else ""
