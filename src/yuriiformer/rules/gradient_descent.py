"""Gradient descent: with the Lie-Trotter splitting, the GPT block."""

from ..rule import Oracle, Stream, rule


@rule(source="arXiv:2601.23236; with Lie-Trotter it is GPT-2 (Radford et al. 2019)", textbook=lambda s: (1 - s**2, {}))
def gradient_descent(x: Stream, oracle: Oracle) -> Stream:
    r"""Step along the direction the oracle gives.

    $$ x^+ = x + O(x) $$

    No coefficients. One oracle call.
    """
    return x + oracle(x)
