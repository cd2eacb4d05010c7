"""The derivative of a layer or an oracle, known only by its products with vectors: no matrix is ever built."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.sparse.linalg import ArpackNoConvergence, LinearOperator, eigs, eigsh
from torch import Tensor

TOLERANCE, RESTARTS = 1e-2, 5  # of ARPACK: relative, and how often it may start again from what it has
PROBES = 8  # random vectors of an estimate


def jacobian(f: Callable[[Tensor], Tensor], x: Tensor) -> LinearOperator:
    """df/dx at x, flattened to (n, n); f answers in the shape of x, and must have a second derivative in torch.

    J'u is a backward pass through f, whose graph is kept. It is linear in u, so a backward pass through *it* is J v:
    ten times cheaper than forward mode, which runs f again for every product.
    """
    pull = torch.func.vjp(f, x)[1]
    push = torch.func.vjp(lambda u: pull(u)[0], torch.zeros_like(x))[1]

    def product(by: Callable[[Tensor], tuple[Tensor, ...]]) -> Callable[[NDArray], NDArray]:
        def times(vector: NDArray) -> NDArray:
            tensor = torch.from_numpy(np.ascontiguousarray(vector)).to(x.dtype).reshape(x.shape)
            return by(tensor)[0].detach().numpy().ravel()

        return times

    dtype = x.detach().numpy().dtype
    return LinearOperator((x.numel(), x.numel()), matvec=product(push), rmatvec=product(pull), dtype=dtype)


def singular_values(j: LinearOperator, count: int) -> list[float]:
    """The largest few, falling: how much the map stretches in its most stretching directions."""
    squares = np.maximum(_leading(eigsh, j.H @ j, count, 20), 0)
    return sorted(map(float, np.sqrt(squares)), reverse=True)


def eigenvalues(j: LinearOperator, count: int) -> list[complex]:
    """The few of largest modulus, falling: how its repetition would grow and, where they are not real, turn."""
    return sorted(map(complex, _leading(eigs, j, count, 40)), key=abs, reverse=True)


def _leading(solve: Callable[..., NDArray], j: LinearOperator, count: int, basis: int) -> NDArray:
    """What ARPACK finds within its restarts: possibly fewer than asked for, or none."""
    size = j.shape[0]
    start = np.random.default_rng(0).standard_normal(size).astype(j.dtype)
    try:
        return solve(
            j, min(count, size - 2), v0=start, ncv=min(basis, size), tol=TOLERANCE, maxiter=RESTARTS,
            return_eigenvectors=False,
        )  # fmt: skip
    except ArpackNoConvergence as error:
        return np.asarray(error.eigenvalues)


def typical_stretch(j: LinearOperator) -> float:
    """The root mean square of all singular values, |J| / sqrt(n), from random signs: E |Jz|^2 = |J|^2 (Hutchinson)."""
    return float(np.sqrt(np.mean([np.mean(j.matvec(z) ** 2) for z in _signs(j)])))


def asymmetry(j: LinearOperator) -> float:
    """|J - J'| / |J + J'| in the Frobenius norm, from random signs.

    0 for the derivative of a gradient, 1 for one without any symmetry, infinite for a pure rotation.
    """
    pairs = [(j.matvec(z), j.rmatvec(z)) for z in _signs(j)]
    minus, plus = (sum(float(np.sum((right + sign * left) ** 2)) for right, left in pairs) for sign in (-1, 1))
    return math.sqrt(minus / plus) if plus else math.inf if minus else 0.0


def _signs(j: LinearOperator) -> NDArray:
    return np.random.default_rng(0).choice([-1.0, 1.0], size=(PROBES, j.shape[0])).astype(j.dtype)
