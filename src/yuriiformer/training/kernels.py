"""What a training step is computed with: attention's kernel, the streams' numbers, the loss in one piece or in chunks."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from ..config import Config, TrainingConfig
from ..model import LanguageModel
from ..oracle import causal

ATTENTION = {
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "flash": SDPBackend.FLASH_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "math": SDPBackend.MATH,
}
SEQUENCES = 8  # for which the kernels are timed
TIMED = 10  # calls of each kernel; the fastest counts


def equip(model: LanguageModel, config: TrainingConfig) -> None:
    """Set a model up for training as a definite config says."""
    if config.compile == "yes":
        model.compile_parts()
    if config.streams == "bf16":
        model.stream_dtype = torch.bfloat16
    if config.loss_chunk:
        piece = torch.compile(_piece, fullgraph=True, dynamic=False) if config.compile == "yes" else _piece
        model.cross_entropy = partial(ChunkedLoss.apply, config.loss_chunk, piece)


@contextmanager
def attention(kernel: str) -> Iterator[None]:
    """Within it torch computes attention by this kernel; "auto" leaves the choice to torch.

    The kernels after it in the table stand in for what it cannot compute (masks, fp32). Those before it are switched
    off, not only ranked lower: torch's first call on some cards sets an order of its own. The kernel becomes part of a
    compiled graph but not of the key under which torch keeps that on disk, and a later run would get this run's kernel:
    hence the tag.
    """
    if kernel == "auto":
        yield
        return
    names = list(ATTENTION)
    allowed = [ATTENTION[name] for name in names[names.index(kernel) :]]
    tag = f"{torch.compiler.config.cache_key_tag} attention={kernel}"
    tagged = torch.compiler.config.patch(cache_key_tag=tag)  # type: ignore[attr-defined]
    with sdpa_kernel(allowed, set_priority=True), tagged:
        yield


def fastest_attention(config: Config) -> tuple[str, str]:
    """The kernel for a definite config, and a line that tells the times where there was a choice: on CUDA, at auto."""
    if config.training.device != "cuda" or config.training.attention != "auto":
        return config.training.attention, ""
    timed = attention_times(config)
    line = ", ".join(f"{name} {1000 * seconds:.2f} ms" for name, seconds in timed.items())
    return next(iter(timed), "auto"), f"attention, {SEQUENCES} x {config.model.context} tokens: {line}"


def attention_times(config: Config) -> dict[str, float]:
    """Seconds of attention at a definite config's shape, by kernel; the fastest first."""
    model, training = config.model, config.training
    width = model.width // model.heads
    return attention_seconds(SEQUENCES, model.heads, model.context, width, training.precision, training.device)


@cache
def attention_seconds(
    sequences: int, heads: int, context: int, head_width: int, precision: str, device: str
) -> dict[str, float]:
    """Seconds of causal attention, forward and backward, by kernel; the fastest first.

    A kernel that cannot compute this shape, or for which memory does not suffice, is left out.
    """
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    qkv = torch.randn(sequences, context, 3, heads, head_width, device=device, dtype=dtype, requires_grad=True)
    q, k, v = qkv.permute(2, 0, 3, 1, 4)  # laid out as the model's

    def call() -> float:
        started = now(device)
        causal(q, k, v).sum().backward(retain_graph=True)
        return now(device) - started

    found = {}
    for name, backend in ATTENTION.items():
        try:
            with warnings.catch_warnings(), sdpa_kernel(backend):
                warnings.simplefilter("ignore")  # torch explains at length why a kernel cannot
                found[name] = min(call() for _ in range(TIMED))
        except RuntimeError:
            continue
    return dict(sorted(found.items(), key=lambda item: item[1]))


def now(device: str) -> float:
    """The clock, when all that was asked of the device is done."""
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


class ChunkedLoss(torch.autograd.Function):
    """`model.cross_entropy`, a number of tokens at a time.

    The gradients of a chunk are made with its loss and kept in place of its logits, so nothing is computed twice.
    """

    @staticmethod
    def forward(
        ctx: Any, chunk: int, piece: Callable[..., Any], hidden: Tensor, table: Tensor, targets: Tensor
    ) -> Tensor:
        kind, rows, ids = hidden.device.type, hidden.flatten(0, -2), targets.flatten()
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else rows.dtype
        weight, loss = table.to(dtype), torch.zeros((), device=rows.device)
        to_rows, to_table = torch.empty_like(rows), torch.zeros_like(table)
        with torch.autocast(kind, enabled=False):
            for some, answers, into in zip(rows.split(chunk), ids.split(chunk), to_rows.split(chunk), strict=True):
                part, gradient, table_gradient = piece(some.to(dtype), weight, answers)
                loss += part
                into.copy_(gradient)
                to_table += table_gradient
        ctx.save_for_backward(to_rows.view_as(hidden), to_table)
        ctx.count = len(ids)
        return loss / len(ids)

    @staticmethod
    def backward(ctx: Any, factor: Tensor) -> tuple[None, None, Tensor, Tensor, None]:
        to_rows, to_table = ctx.saved_tensors
        factor = factor / ctx.count
        return None, None, to_rows * factor, to_table * factor, None


def _piece(rows: Tensor, table: Tensor, targets: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The summed cross entropy of some tokens, and its gradients with respect to rows and table."""
    logits, answer = F.linear(rows, table).float(), targets[:, None]
    total = logits.logsumexp(-1, keepdim=True)
    loss = (total - logits.gather(-1, answer)).sum()
    probability = (logits - total).exp()
    hit = torch.arange(len(table), device=rows.device) == answer
    wrong = torch.where(hit, probability - 1, probability).to(rows.dtype)
    return loss, wrong @ table, wrong.mT @ rows
