"""Attention and MLP as gradients of energies: where that is exact, and by how much it is not."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable
from typing import TypeVar, cast

import torch
from torch import Tensor, nn

from ..oracle import MLP, Attention
from ..tied import TiedAttention, TiedMLP, gelu_integral
from .statement import Line, Plot, Row, Statement
from .subject import Field, Place, Subject, causal_attention, past, softmax_attention

M = TypeVar("M", bound=nn.Module)
EXACT = 1e-10  # of identities in float64
TIME, WIDTH, HEADS = 6, 12, 2


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def tokens(seed: int = 0) -> Tensor:
    return torch.randn(TIME, WIDTH, generator=seeded(seed), dtype=torch.float64)


def drawn(module: M, seed: int = 1) -> M:
    """The module in float64 with matrices of norm about 2, steps and norms as constructed."""
    module = module.double().requires_grad_(False)
    generator = seeded(seed)
    for parameter in module.parameters():
        if parameter.ndim == 2:
            parameter.copy_(torch.randn(parameter.shape, generator=generator) / parameter.shape[1] ** 0.5)
    return module


def gradient(energy: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    return torch.func.grad(lambda z: energy(z).sum())(x)


def transposed(field: Field, x: Tensor) -> Field:
    """The field's Jacobian at x, transposed, as a function of a vector."""
    pull = torch.func.vjp(field, x)[1]
    return lambda vector: pull(vector)[0]


def jacobian(field: Field, x: Tensor) -> Tensor:
    """(time x width) squared."""
    return torch.func.jacrev(field)(x).reshape(x.numel(), x.numel())


def asymmetry(jacobian: Tensor) -> float:
    """The antisymmetric part's share of the norm: 0 for a gradient field, 0.71 for a matrix of independent entries."""
    return ((jacobian - jacobian.T).norm() / 2 / jacobian.norm()).item()


def unnormed(module: nn.Module) -> nn.Module:
    """The oracle as a function of y = LN(x)."""
    module = copy.deepcopy(module)
    module.norm = nn.Identity()
    return module


def largest(difference: Tensor) -> float:
    return difference.abs().max().item()


def interaction_energy(_: Subject) -> Statement:
    x = tokens() / 2

    def energy(z: Tensor) -> Tensor:
        return (z @ z.T).exp().sum()

    weights = (x @ x.T).exp().sum(1, keepdim=True)
    bare = WIDTH**0.5 * softmax_attention(WIDTH**0.25 * x, WIDTH**0.25 * x, x / WIDTH**0.5)

    # The model's own attention class with its three matrices tied: Q = K = V = W for each head, and W transposed behind.
    attn = drawn(Attention(WIDTH, HEADS))
    w = attn.qkv.weight[:WIDTH].clone()
    attn.qkv.weight.copy_(w.repeat(3, 1))
    attn.out.weight.copy_(w.T)
    y = attn.norm(tokens())
    c = (WIDTH / HEADS) ** -0.5

    def scores(z: Tensor) -> Tensor:  # (heads, time, time)
        heads = (z @ w.T).unflatten(-1, (HEADS, -1)).transpose(0, 1)
        return c * heads @ heads.mT

    def step_of(head: int) -> Tensor:
        slope = gradient(lambda z: scores(z)[head].exp().sum() / c, y)
        return slope / (2 * scores(y)[head].exp().sum(1, keepdim=True))

    preconditioned = torch.stack([step_of(head) for head in range(HEADS)]).sum(0)
    own = unnormed(attn)(y[None], softmax_attention)[0]

    def climb(field: Field, z: Tensor) -> list[float]:
        path = []
        for _ in range(25):
            path.append((scores(z).exp().sum() / c).log().item())
            z = attn.norm(z + 0.1 * field(z))
        return path

    free = unnormed(drawn(Attention(WIDTH, HEADS), 7))
    tied_path = climb(lambda z: unnormed(attn)(z[None], softmax_attention)[0], y)
    free_path = climb(lambda z: free(z[None], softmax_attention)[0], y)
    steps = [float(i) for i in range(25)]
    return Statement(
        name="interaction_energy",
        title="Tied attention is the preconditioned gradient of an interaction energy",
        equation="E(X) = Σᵢⱼ exp⟨xᵢ, xⱼ⟩,   Attn(X)ᵢ = ∇ᵢE / (2 Zᵢ),   Zᵢ = Σⱼ exp⟨xᵢ, xⱼ⟩;   "
        "with Q = K = V = W and W transposed behind, A(Y) = Σₕ Dₕ⁻¹ ∇Eₕ over the heads",
        claim="Without a mask and with tied weights, attention is the gradient of E, each token divided by its own 2 Z.",
        rows=[
            Row("one head, Q = K = V = 1: largest |Attn − ∇E / 2Z|", largest(bare - gradient(energy, x) / (2 * weights)), 0, EXACT),
            Row("the model's attention, two tied heads: largest |A − Σ D⁻¹∇E|", largest(own - preconditioned), 0, EXACT),
            Row("smallest rise of E over 24 normalised steps of 0.1, tied", min(b - a for a, b in itertools.pairwise(tied_path)), 0, 0, ">="),
        ],
        plots=[
            Plot(
                "Steps along tied attention climb the energy that belongs to it, every one of them. "
                "An attention with free matrices has another aim: it need not raise this energy.",
                "step", "log E",
                [Line("tied", steps, tied_path), Line("free Q, K, V, O", steps, free_path, "dashed")],
            )
        ],
    )  # fmt: skip


def log_sum_exp(_: Subject) -> Statement:
    attn = drawn(TiedAttention(WIDTH, HEADS))
    x, mask = tokens(2), past(TIME)
    y = attn.norm(x)
    all_seen = torch.ones_like(mask)
    energy = attn.energy

    def answer(z: Tensor, attend: Callable[..., Tensor] = causal_attention) -> Tensor:
        return unnormed(attn)(z[None], attend)[0]

    def given_past(z: Tensor) -> Tensor:  # the others, and the token's own key, are held
        return energy(z[None], y[None].detach(), mask)

    def through_norm(z: Tensor) -> Tensor:
        return given_past(attn.norm(z))

    back = transposed(attn.norm, x)
    full = gradient(lambda z: energy(z[None], z[None], all_seen), y)
    # The transposed half: each token as a key of the others.
    as_key = gradient(lambda z: energy(y[None], z[None], all_seen), y)
    unmasked = answer(y, softmax_attention)
    alone = (full - unmasked).norm() / full.norm()
    causal_full = gradient(lambda z: energy(z[None], z[None], mask), y)
    alone_causal = (causal_full - answer(y)).norm() / causal_full.norm()
    return Statement(
        name="log_sum_exp",
        title="Tied oracle: each token climbs its own log-sum-exp energy, given its past",
        equation="Lᵢ(y) = Σₕ (1/c) log Σⱼ≤ᵢ exp(c ⟨Qₕ y, Kₕ yⱼ⟩),   A(Y)ᵢ = ∇Lᵢ(yᵢ) = Σₕ Qₕᵀ Σⱼ aᵢⱼ Kₕ yⱼ,   y = LN(x)",
        claim="TiedAttention answers the gradient of the token's energy with all keys held fixed, causal or not, with a cache or "
        "without. It is not the gradient of the sum of all energies in all tokens: that has a second half, each token as a key.",
        rows=[
            Row("causal, with respect to y = LN(x): largest |A − ∇L|", largest(answer(y) - gradient(given_past, y)), 0, EXACT),
            Row("through LN, with respect to x: largest |Jᵀ A − ∇L(LN x)|", largest(back(answer(y)) - gradient(through_norm, x)), 0, EXACT),
            Row("no mask: largest |∇ΣL − (A + the key's half)|", largest(full - unmasked - as_key), 0, EXACT),
            Row("no mask: is A alone ∇ΣL? relative distance", alone.item(), 0, EXACT, should=False),
            Row("causal: is A alone ∇ΣL? relative distance", alone_causal.item(), 0, EXACT, should=False),
        ],
        notes=[
            "The token's own key counts as held: the derivative of ⟨Q y, K y⟩ through K is part of the missing half.",
            "With respect to x the gradient is LN's Jacobian (transposed) times the oracle: the residual step moves along "
            "the gradient in y, that is, preconditioned by the inverse of what LN does.",
        ],
    )  # fmt: skip


def mlp_potential(_: Subject) -> Statement:
    tied, free = drawn(TiedMLP(WIDTH)), drawn(MLP(WIDTH))
    x = tokens(3)
    y = tied.norm(x)
    answer, energy = unnormed(tied), tied.energy
    back = transposed(tied.norm, x)
    through = gradient(lambda z: energy(tied.norm(z)), x)
    grid = torch.linspace(-3, 3, 61, dtype=torch.float64)
    return Statement(
        name="mlp_potential",
        title="Tied MLP is the gradient of a potential",
        equation="U(y) = Σₖ sₖ G(⟨wₖ, y⟩), sₖ = ±1,   G′ = GELU,   G(z) = ((z² − 1) Φ(z) + z φ(z)) / 2,   M(y) = ∇U(y) = Wᵀ s GELU(W y)",
        claim="TiedMLP is the gradient of U with respect to y = LN(x); an MLP with a free second matrix is the gradient of nothing.",
        rows=[
            Row("tied: largest |M − ∇U|", largest(answer(y) - gradient(energy, y)), 0, EXACT),
            Row("through LN: largest |Jᵀ M − ∇U(LN x)|", largest(back(answer(y)) - through), 0, EXACT),
            Row("tied: antisymmetric share of the Jacobian", asymmetry(jacobian(answer, y)), 0, EXACT),
            Row("free random MLP: antisymmetric share of the Jacobian", asymmetry(jacobian(unnormed(free), y)), 0, EXACT, should=False),
        ],
        plots=[
            Plot(
                "One hidden unit: the potential G and its slope, which is GELU. G is nearly flat on the left and a parabola on "
                "the right; it is not quite convex, GELU falls a little below zero.",
                "z", "",
                [
                    Line("G(z)", grid.tolist(), gelu_integral(grid).tolist()),
                    Line("G′(z) = GELU(z)", grid.tolist(), torch.nn.functional.gelu(grid).tolist()),
                ],
            )
        ],
    )  # fmt: skip


def on_normed(place: Place, attend: Callable[..., Tensor]) -> tuple[Field, Field, Tensor]:
    """A layer's two oracles as functions of y, and the y that attention meets."""
    norm = cast(nn.Module, place.attn.norm)
    attn, mlp = unnormed(place.attn), unnormed(place.mlp)
    return lambda z: attn(z[None], attend)[0], mlp, norm(place.state)


def causal_untied(subject: Subject) -> Statement:
    attn = drawn(TiedAttention(WIDTH, HEADS))
    symmetric = copy.deepcopy(attn)
    symmetric.key.weight.copy_(attn.query.weight)
    one_head = drawn(TiedAttention(WIDTH, 1))
    one_head.key.weight.copy_(one_head.query.weight)
    y = attn.norm(tokens(4))

    def partition(z: Tensor) -> Tensor:
        q = one_head.query(z)
        return (q @ q.T / WIDTH**0.5).exp().sum(1, keepdim=True)

    def field(module: nn.Module, attend: Callable[..., Tensor]) -> Field:
        inner = unnormed(module)
        return lambda z: inner(z[None], attend)[0]

    def share(module: nn.Module, attend: Callable[..., Tensor]) -> float:
        return asymmetry(jacobian(field(module, attend), y))

    bare = field(one_head, softmax_attention)
    rows = [
        Row("K = Q, one head, no mask, times Z", asymmetry(jacobian(lambda z: partition(z) * bare(z), y)), 0, EXACT),
        Row("K = Q, no mask (divided by Z: a preconditioned gradient)", share(symmetric, softmax_attention), 0, EXACT, should=False),
        Row("K = Q, causal", share(symmetric, causal_attention), 0, EXACT, should=False),
        Row("tied oracle (K free of Q), causal", share(attn, causal_attention), 0, EXACT, should=False),
        Row("free Q, K, V, O, causal", share(drawn(Attention(WIDTH, HEADS)), causal_attention), 0, EXACT, should=False),
    ]  # fmt: skip
    lines: dict[str, list[float]] = {"attention": [], "MLP": []}
    for place in subject.places:
        attn_field, mlp_field, state = on_normed(place, causal_attention)
        lines["attention"].append(asymmetry(jacobian(attn_field, state)))
        # Token by token: the MLP's Jacobian has blocks, one a token.
        blocks = torch.stack([torch.func.jacrev(mlp_field)(token) for token in state])
        lines["MLP"].append(((blocks - blocks.mT).norm() / 2 / blocks.norm()).item())
    tied = all(isinstance(place.mlp, TiedMLP) for place in subject.places)
    for name, shares in lines.items():
        exact = tied and name == "MLP"
        rows.append(Row(f"{subject.title}: {name}, largest over its layers", max(shares), 0, EXACT, should=exact))
    depth = [float(i + 1) for i in range(len(subject.places))]
    return Statement(
        name="causal_untied",
        title="What causal masking and free matrices break",
        equation="‖J − Jᵀ‖ / (2 ‖J‖), J the Jacobian of the oracle in all tokens: 0 for a gradient, 0.71 for independent entries",
        claim="Only an oracle with a symmetric Jacobian is the gradient of some energy. Tied, unmasked attention is one after "
        "multiplication by Z; a real layer, with its causal mask and free matrices, is not, and this is by how much.",
        rows=rows,
        plots=[
            Plot(
                f"{subject.title}: the share of each layer's Jacobian that no energy can explain. At the dotted line nothing "
                "of a gradient is left; at zero the layer is one.",
                "layer", "antisymmetric share",
                [*(Line(name, depth, shares) for name, shares in lines.items()),
                 Line("independent entries", depth, [0.5**0.5] * len(depth), "dots")],
            )
        ],
        notes=["A preconditioned gradient, D⁻¹∇E, has no symmetric Jacobian either, though it still climbs E: symmetry is the stricter test."],
    )  # fmt: skip


STATEMENTS = (interaction_energy, log_sum_exp, mlp_potential, causal_untied)
