"""Sampling from a model: temperature, top-k, top-p, a seed, and a KV cache in call order.

Past the context length: when the window is full, its newest half becomes the new prompt (positions are learned,
so the window must be read again). The cache changes the speed of this, never the tokens.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from .errors import UserError
from .model import LanguageModel


@torch.no_grad()
def generate(
    model: LanguageModel, prompt: Sequence[int], *, tokens: int, temperature: float = 1.0,
    top_k: int | None = None, top_p: float | None = None, seed: int = 0, use_cache: bool = True,
) -> Iterator[int]:  # fmt: skip
    """Yield `tokens` ids that continue the prompt, one by one. Temperature 0 takes the likeliest.

    Raises UserError for an empty prompt or a setting out of range.
    """
    if not prompt:
        raise UserError("the prompt is empty; give at least one token.")
    for name, value, good in (
        ("temperature", temperature, temperature >= 0),
        ("top_k", top_k, top_k is None or top_k >= 1),
        ("top_p", top_p, top_p is None or 0 < top_p <= 1),
    ):
        if not good:
            raise UserError(f"{name} is {value}; allowed: temperature >= 0, top_k >= 1, 0 < top_p <= 1.")
    device = model.input.token.weight.device
    generator = torch.Generator().manual_seed(seed)
    context = model.config.context
    window = list(prompt)
    cache, unread = model.make_cache(), window
    for _ in range(tokens):
        if len(window) > context:
            window = window[-(context // 2 or 1) :]
            cache, unread = model.make_cache(), window
        ids = torch.tensor([unread if use_cache else window], device=device)
        hidden = model.hidden(ids, cache if use_cache else None)
        chosen = _choose(model.head(hidden[0, -1]).float().cpu(), temperature, top_k, top_p, generator)
        window.append(chosen)
        unread = [chosen]
        yield chosen


def _choose(
    logits: Tensor, temperature: float, top_k: int | None, top_p: float | None, generator: torch.Generator
) -> int:
    if temperature == 0:
        return int(logits.argmax())
    logits, ids = (logits / temperature).sort(descending=True)
    probabilities = logits.softmax(-1)
    keep = torch.ones_like(probabilities, dtype=torch.bool)
    if top_k is not None:
        keep[top_k:] = False
    if top_p is not None:  # the fewest tokens whose probability reaches top_p
        keep &= probabilities.cumsum(-1) - probabilities < top_p
    return int(ids[torch.multinomial(probabilities * keep, 1, generator=generator)])
