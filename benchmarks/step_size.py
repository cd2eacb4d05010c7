"""A learned step size without momentum: the control of the surgery's measurement (docs/import.md), and an example of
a rule file that can start from a trained model, because it says where it equals a rule of the package."""

from yuriiformer.rule import Oracle, Positive, Stream, rule


@rule(source="a control of ours", reduces_to={"gradient_descent": {"gamma": 1.0}})
def step_size(x: Stream, oracle: Oracle, *, gamma: Positive = 1.0) -> Stream:
    r"""Step along the direction the oracle gives, as far as is learned.

    $$ x^+ = x + \gamma\,O(x) $$

    `gamma` is the step size. One oracle call.
    """
    return x + gamma * oracle(x)
