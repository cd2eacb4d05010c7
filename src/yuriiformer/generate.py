"""Sampling from a model: temperature, top-k, top-p, a seed, in batches, with a KV cache in call order.

Past the context length: when a window is full, its newest half becomes the new prompt (positions are learned,
so the window must be read again). Cache, batch and compilation change the speed of this, never the tokens.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor

from .cache import KVCache
from .errors import UserError
from .model import LanguageModel, flops_per_token

SMALL = 2e7  # FLOPs of a step on a CPU; below, waking a second thread costs more than it brings (docs/generate.md)
ROOM = 64  # a cache's room is a multiple of it, so that few graphs are compiled


def generate(model: LanguageModel, prompt: Sequence[int], **settings: Any) -> Iterator[int]:
    """Yield ids that continue one prompt, one by one; settings as in `generate_batch`."""
    return (ids[0] for ids in generate_batch(model, [prompt], **settings))


def generate_batch(
    model: LanguageModel, prompts: Sequence[Sequence[int]], *, tokens: int, temperature: float = 1.0,
    top_k: int | None = None, top_p: float | None = None, seed: int = 0, use_cache: bool = True, compiled: bool = False,
) -> Iterator[list[int]]:  # fmt: skip
    """Yield `tokens` times the next id of every row. Temperature 0 takes the likeliest.

    A row's tokens do not depend on the others: row i draws by the seed `seed + i`.
    compiled: decode by one compiled graph (CUDA graphs on a GPU); worth it for more than some thousand tokens.
    Raises UserError for an empty prompt or a setting out of range.
    """
    if not prompts or not all(prompts):
        raise UserError("the prompt is empty; give at least one token.")
    for name, value, good in (
        ("temperature", temperature, temperature >= 0),
        ("top_k", top_k, top_k is None or top_k >= 1),
        ("top_p", top_p, top_p is None or 0 < top_p <= 1),
    ):
        if not good:
            raise UserError(f"{name} is {value}; allowed: temperature >= 0, top_k >= 1, 0 < top_p <= 1.")
    return _steps(model, prompts, tokens, (temperature, top_k, top_p), seed, use_cache, compiled)


@torch.no_grad()
def _steps(
    model: LanguageModel, prompts: Sequence[Sequence[int]], tokens: int,
    sampling: tuple[float, int | None, float | None], seed: int, use_cache: bool, compiled: bool,
) -> Iterator[list[int]]:  # fmt: skip
    device, context = model.input.token.weight.device, model.config.context
    rows = [torch.rand(tokens, generator=torch.Generator().manual_seed(seed + i)) for i in range(len(prompts))]
    draws = torch.stack(rows, 1).to(device)
    windows, full = [list(prompt) for prompt in prompts], True
    step = _compiled(model) if compiled else model.decode
    small = device.type == "cpu" and use_cache and len(prompts) * sum(flops_per_token(model.config).values()) < SMALL
    with model.constant_coefficients(), _one_thread() if small else nullcontext():
        for number in range(tokens):
            full = full or max(map(len, windows)) > context
            if full or not use_cache:
                first = number
                windows = [w[-(context // 2 or 1) :] if len(w) > context else w for w in windows]
                longest = max(map(len, windows))
                room = min(context, longest + tokens - number)
                ids, cache = _padded(windows, min(context, -(-room // ROOM) * ROOM), device)
                logits = model.decode(ids, cache if use_cache or cache.padding is not None else None)
                if compiled and device.type == "cuda":
                    for memory in cache.memory:
                        for tensor in memory:
                            torch._dynamo.mark_static_address(tensor)
            else:
                # Nothing that a guard of the compiled graph looks at changes from the second step on.
                unguarded = compiled and number > first + 1
                with torch.compiler.set_stance(skip_guard_eval_unsafe=True) if unguarded else nullcontext():
                    logits = step(ids, cache)
            ids, full = _choose(logits.float(), *sampling, draws[number])[:, None], False
            chosen = ids[:, 0].tolist()
            for window, token in zip(windows, chosen, strict=True):
                window.append(token)
            yield chosen


def _padded(windows: list[list[int]], room: int, device: torch.device) -> tuple[Tensor, KVCache]:
    """The windows as one batch, shorter ones padded on the left, and an empty cache for it."""
    longest = max(map(len, windows))
    missing = torch.tensor([longest - len(w) for w in windows], device=device)
    ids = torch.tensor([[0] * (longest - len(w)) + w for w in windows], device=device)
    return ids, KVCache(room, device, missing if missing.any() else None)


@contextmanager
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _compiled(model: LanguageModel) -> Any:
    torch._dynamo.config.recompile_limit = 64  # a graph for each batch size and room
    options: Any = {"triton.cudagraphs": model.input.token.weight.device.type == "cuda", "size_asserts": False}
    return torch.compile(model.decode, fullgraph=True, dynamic=False, options=options)


def _choose(logits: Tensor, temperature: float, top_k: int | None, top_p: float | None, draw: Tensor) -> Tensor:
    """A token for each row of (batch, vocabulary) logits; draw, (batch), is uniform in [0, 1)."""
    if temperature == 0:
        return logits.argmax(-1)
    probabilities, ids = (logits / temperature).softmax(-1).double().sort(-1, descending=True)
    if top_k is not None:
        probabilities[:, top_k:] = 0
    if top_p is not None:  # the fewest tokens whose probability reaches top_p
        probabilities[probabilities.cumsum(-1) - probabilities >= top_p] = 0
    reached = probabilities.cumsum(-1)
    place = (reached <= draw[:, None] * reached[:, -1:]).sum(-1, keepdim=True)
    return ids.gather(-1, place)[:, 0]
