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


def weighted_mean(values: Sequence[float], weights: Sequence[float]) -> tuple[float, float]:
    """The weighted mean of independent values and its standard error (nan with one).

    That of a ratio of two sums, linearised; with equal weights, the standard deviation over sqrt(n).
    """
    x, w = np.asarray(values), np.asarray(weights) / np.sum(weights)
    centre, n = float(w @ x), len(x)
    error = np.sqrt(n / (n - 1) * np.sum((w * (x - centre)) ** 2)) if n > 1 else np.nan
    return centre, float(error)


def paired_blocks(a: Sequence[float], b: Sequence[float], weights: Sequence[float]) -> dict[str, Any]:
    """b - a over the same blocks of text: weighted mean, 95 % interval and p-value by Student's t."""
    difference, error = weighted_mean(np.asarray(b) - np.asarray(a), weights)
    half = stats.t.ppf(0.975, len(a) - 1) * error
    p_value = 2 * stats.t.sf(abs(difference) / error, len(a) - 1) if error else float(difference == 0)
    return {"difference": difference, "low": difference - half, "high": difference + half, "p_value": float(p_value)}


def paired_documents(a: Sequence[float], b: Sequence[float], seed: int = 0, resamples: int = 10_000) -> dict[str, Any]:
    """b - a over the same documents: mean with its 95 % bootstrap interval (percentiles, documents drawn anew).

    Where every value is 0 or 1, also McNemar's exact test: of the documents on which only one of the two is right,
    is each as often the right one?
    """
    x, y = np.asarray(a, dtype=float), np.asarray(b, dtype=float)
    differences, n, generator = y - x, len(x), np.random.default_rng(seed)
    low, high = np.quantile(
        [differences[generator.integers(n, size=n)].mean() for _ in range(resamples)], [0.025, 0.975]
    )
    result: dict[str, Any] = {"difference": float(differences.mean()), "low": float(low), "high": float(high)}
    if np.isin([x, y], [0, 1]).all():
        only_a, only_b = int(np.sum(x > y)), int(np.sum(y > x))
        p_value = stats.binomtest(only_b, only_a + only_b).pvalue if only_a + only_b else 1.0
        result |= {"only_a": only_a, "only_b": only_b, "p_value": float(p_value)}
    return result


def mean(values: Iterable[float]) -> float:
    return float(np.mean(list(values)))


def spread(values: Iterable[float]) -> str:
    """± the standard deviation over seeds; empty with one."""
    values = list(values)
    return f" ± {np.std(values, ddof=1):.4f}" if len(values) > 1 else ""
