"""A trained model along depth: every substep as a move of an optimisation method, every oracle as its adviser.

The model runs eagerly in fp32 on the CPU, one validation sequence at a time. Hooks see the substeps' streams and the
oracles' calls, so every rule is inspected as it is. docs/inspect.md has the equation of every quantity.
"""

from __future__ import annotations

import copy
import math
from collections import defaultdict
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, cast

import numpy as np
import torch
from tokenizers import Tokenizer
from torch import Tensor, nn
from torch.nn import functional as F

from ..config import as_dict
from ..data.corpus import MANIFEST, TOKENIZER, Corpus
from ..errors import UserError
from ..machine import memory_free
from ..model import LanguageModel, Layer, Streams
from ..oracle import Attend, causal
from ..training.checkpoint import MODEL, newest_first
from ..training.run import Run
from .jacobian import asymmetry, eigenvalues, jacobian, singular_values, typical_stretch

TOKENS = 2048  # looked at when the number of sequences is not given; two sequences at least
JACOBIAN_TOKENS = 128  # of the first sequence; causal, so their derivative is a corner of the whole sequence's
SINGULAR, EIGEN = 6, 3  # values of each layer
HEAD_TOKENS = 256  # of which logits exist at one time
ORACLES = ("attn", "mlp")
NODES, WEIGHTS = np.polynomial.legendre.leggauss(3)  # of the line integral, on [-1, 1]


def inspect_run(
    run: Run,
    corpus: Corpus | None = None,
    sequences: int | None = None,
    progress: Callable[[float, str], None] = lambda share, what: None,
) -> dict[str, Any]:
    """Every quantity along depth on the first of the run's validation sequences (its own corpus's by default).

    progress: called with a share of the work, all of which sum to 1, and what was done.
    Returns plain data: `series` holds {name: {"at": layers passed, "mean": ..., "se": standard error over sequences}}.
    Raises UserError when the run, its checkpoint, its rule or its corpus cannot be used, or memory would not suffice.
    """
    require_memory(run)
    corpus = corpus or corpus_for(run)
    model, complaints = run.load()
    config = model.config
    count = sequences or max(2, TOKENS // config.context)
    batches = corpus.validation_batches(sequences=count, batch=1, context=config.context)
    work = _work_shares(model, len(batches))

    series, layers = Series(), []
    for number, pair in enumerate(batches, 1):
        ids, targets = map(torch.from_numpy, pair)
        along_depth(model, ids, targets, series)
        progress(work[0], f"sequence {number}/{len(batches)}")
    ids = torch.from_numpy(batches[0][0][:, :JACOBIAN_TOKENS])
    with torch.no_grad():
        streams = model.start(ids, torch.arange(ids.shape[1]))
        for number, layer in enumerate(cast(list[Layer], model.layers), 1):
            layers.append(derivatives(layer, streams))
            streams = layer.forward(streams)
            progress(work[1], f"Jacobian of layer {number}/{config.layers}")
    return {
        "name": run.path.name,
        "rule": model.rule.name,
        "streams": model.rule.streams,
        "readout": model.rule.readout,
        "model": as_dict(config),
        "normed": model.rule.normed and config.velocity_norm != "none",
        "step": run.step,
        "warnings": complaints,
        "corpus": corpus.identity,
        "sequences": len(batches),
        "tokens": config.context,
        "jacobian_tokens": ids.shape[1],
        "coefficients": model.learned_coefficients(),
        "series": series.summary(),
        "derivatives": layers,
    }


class Series:
    """Numbers by name and position along depth (the layers passed, with fractions), one for each sequence."""

    def __init__(self) -> None:
        self.values: dict[str, dict[float, list[float]]] = defaultdict(lambda: defaultdict(list))

    def put(self, name: str, at: float, value: Tensor | float) -> None:
        self.values[name][at].append(float(value))

    def summary(self) -> dict[str, dict[str, list[float | None]]]:
        """Means with standard errors; None where there is no number (an angle to a velocity of 0) or one sequence."""

        def number(value: float) -> float | None:
            return value if math.isfinite(value) else None

        made = {}
        for name, places in self.values.items():
            arrays = [np.array(values) for values in places.values()]
            errors = [a.std(ddof=1) / math.sqrt(len(a)) if len(a) > 1 else math.nan for a in arrays]
            made[name] = {
                "at": [*map(number, places)],
                "mean": [number(float(a.mean())) for a in arrays],
                "se": [number(float(e)) for e in errors],
            }
        return made


class Call(NamedTuple):
    """One question to an oracle: in which substep, and what it answered."""

    oracle: str
    substep: int
    answer: Tensor


@torch.no_grad()
def along_depth(model: LanguageModel, ids: Tensor, targets: Tensor, series: Series) -> None:
    """Follow one sequence, ids and targets of (1, time), through the model and put down what is seen."""
    velocities = model.rule.streams[1:]
    streams = model.start(ids, torch.arange(ids.shape[1]))
    first, path, last = streams[0], torch.zeros(ids.shape), None
    loss = read_loss(model, streams, targets)
    series.put("loss", 0, loss)
    for name, stream in zip(model.rule.streams, streams, strict=True):
        series.put(f"size {name}", 0, _size(stream))
    for depth, layer in enumerate(cast(list[Layer], model.layers)):
        entropies: list[Tensor] = []
        into, (after, calls) = streams, watch(layer, streams, _recording(entropies))
        for index, out in enumerate(after):
            asked = [call for call in calls if call.substep == index]
            for order, call in enumerate(asked, 1):
                at = depth + (index + order / len(asked)) / len(after)
                series.put(f"answer {call.oracle}", at, _size(call.answer))
                for name, velocity in zip(velocities, into[1:], strict=True):
                    series.put(f"angle {name} {call.oracle}", at, _angle(velocity, call.answer))
                if call.oracle == "attn":
                    shares = entropies.pop(0)
                    series.put("entropy", at, shares.mean())
                    for head, share in enumerate(shares, 1):
                        series.put(f"entropy head {head}", at, share)
            at = depth + (index + 1) / len(after)
            for name, stream in zip(model.rule.streams, out, strict=True):
                series.put(f"size {name}", at, _size(stream))
            move = out[0] - into[0]
            path = path + move.norm(dim=-1)
            series.put("move", at, _size(move))
            series.put("straightness", at, ((out[0] - first).norm(dim=-1) / path).mean())
            if last is not None:
                series.put("turn", at, _angle(last, move))
            last, into = move, out
        x, streams, at = streams[0], after[-1], depth + 1
        before, after_it = interaction_energy(layer.attn, x), interaction_energy(layer.attn, streams[0])
        series.put("energy before", at, before)
        series.put("energy after", at, after_it)
        series.put("energy change", at, after_it - before)
        for name in ORACLES:
            norm = getattr(layer, name).norm
            series.put(f"work {name}", at, work(inside_norm(layer, name), norm(x), norm(streams[0])))
        was, loss = loss, read_loss(model, streams, targets)
        series.put("loss", at, loss)
        series.put("loss change", at, loss - was)
    series.put("path length", model.config.layers, path.mean() / math.sqrt(model.config.width))


def watch(layer: Layer, streams: Streams, attend: Attend) -> tuple[list[Streams], list[Call]]:
    """The streams after every substep of a layer, and its questions to the oracles in their order."""
    after: list[Streams] = []
    calls: list[Call] = []

    def called(name: str) -> Callable[[nn.Module, Any, Tensor], None]:
        return lambda module, args, answer: calls.append(Call(name, len(after), answer))

    hooks = [getattr(layer, name).register_forward_hook(called(name)) for name in ORACLES]
    hooks += [s.register_forward_hook(lambda module, args, out: after.append(out)) for s in layer.substeps]
    try:
        layer.forward(streams, attend)
    finally:
        for hook in hooks:
            hook.remove()
    return after, calls


def read_loss(model: LanguageModel, streams: Streams, targets: Tensor) -> float:
    """Cross entropy (nats per token) when the head reads these streams: after the last layer, the model's loss."""
    hidden = model.read(streams)[0].split(HEAD_TOKENS)
    parts = zip(hidden, targets[0].split(HEAD_TOKENS), strict=True)
    return sum(F.cross_entropy(model.head(h).float(), t, reduction="sum").item() for h, t in parts) / targets.numel()


def scores(q: Tensor, k: Tensor) -> Tensor:
    """<q_i, k_j> / sqrt(head width) where j <= i, else -inf: (..., time, time)."""
    future = torch.ones(q.shape[-2], k.shape[-2], dtype=torch.bool).triu(1)
    return (q @ k.mT / math.sqrt(q.shape[-1])).masked_fill(future, -math.inf)


def plain(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Causal attention by its formula: the kernels have no forward-mode derivative."""
    return scores(q, k).softmax(-1) @ v


def entropy_shares(q: Tensor, k: Tensor) -> Tensor:
    """Of each head of (1, heads, time, head width): entropy of a token's weights over the largest possible, log(i + 1).

    The mean over all tokens but the first, which has no choice. One head at a time, so that memory stays small.
    """
    shares = []
    for logits in map(scores, q[0], k[0]):
        logs = logits.log_softmax(-1)
        entropy = -(logs.exp() * logs.masked_fill(logs.isinf(), 0)).sum(-1)
        shares.append((entropy[1:] / torch.arange(2, len(entropy) + 1).log()).mean())
    return torch.stack(shares)


def _recording(entropies: list[Tensor]) -> Attend:
    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        entropies.append(entropy_shares(q, k))
        return causal(q, k, v)

    return attend


def interaction_energy(attn: nn.Module, x: Tensor) -> float:
    """-sqrt(head width) log mean_{j <= i} exp(<q_i, k_j> / sqrt(head width)), the mean over tokens i and heads.

    Per token, so that it does not grow with time: minus a soft maximum of <q_i, k_j> over the past.
    """
    energies: list[Tensor] = []

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        for logits in map(scores, q[0], k[0]):
            mean = logits.logsumexp(-1) - torch.arange(1, logits.shape[-1] + 1).log()
            energies.append(-math.sqrt(q.shape[-1]) * mean.mean())
        return v

    attn(x, attend=attend)
    return torch.stack(energies).mean().item()


def inside_norm(layer: Layer, name: str, attend: Attend = causal) -> Callable[[Tensor], Tensor]:
    """An oracle as a function of the normalised stream, which is where the energies of the paper live."""
    oracle = getattr(layer, name)
    inner = copy.copy(oracle)
    inner._modules = {**oracle._modules, "norm": nn.Identity()}
    return partial(inner, attend=attend) if name == "attn" else inner


def work(oracle: Callable[[Tensor], Tensor], start: Tensor, end: Tensor) -> float:
    """What an oracle does along a straight move: the integral over t in (0, 1) of <O(start + t move), move>.

    Mean over tokens, per entry of the stream. Where O = -grad F this is F(start) - F(end), up to the quadrature
    (three Gauss nodes); where O is no gradient it still says whether the move goes its way.
    """
    move = end - start
    nodes = zip(NODES, WEIGHTS, strict=True)
    return sum(weight / 2 * (oracle(start + (node + 1) / 2 * move) * move).mean().item() for node, weight in nodes)


@torch.no_grad()
def derivatives(layer: Layer, streams: Streams) -> dict[str, Any]:
    """The leading spectrum of the map of all streams that a layer is, and how far its oracles are from gradients."""
    j = jacobian(lambda s: torch.stack(layer.forward(tuple(s.unbind()), plain)), torch.stack(streams))
    found: dict[str, Any] = {
        "singular": singular_values(j, SINGULAR),
        "typical": typical_stretch(j),
        "eigenvalues": [[value.real, value.imag] for value in eigenvalues(j, EIGEN)],
    }
    for name in ORACLES:
        y = getattr(layer, name).norm(streams[0])
        found[f"asymmetry {name}"] = asymmetry(jacobian(inside_norm(layer, name, plain), y))
    return found


def _size(stream: Tensor) -> Tensor:
    """Root mean square entry of each token's vector, averaged over tokens."""
    return stream.square().mean(-1).sqrt().mean()


def _angle(a: Tensor, b: Tensor) -> Tensor:
    """Degrees between two vectors of each token, averaged over the tokens where both have a direction."""
    cosine = (a * b).sum(-1) / (a.norm(dim=-1) * b.norm(dim=-1))
    return cosine.clamp(-1, 1).acos().nanmean().rad2deg()


def corpus_for(run: Run, given: Path | None = None) -> Corpus:
    """The run's own corpus, or a given one with the same tokens. Raises UserError when there is none that fits."""
    if given is None:
        if not run.config.corpus or not (Path(run.config.corpus) / MANIFEST).is_file():
            where = f"its corpus {run.config.corpus} is gone" if run.config.corpus else "it has no corpus of its own"
            raise UserError(f"{run.path} needs text to run on: {where}; give a prepared corpus with --corpus DIR.")
        return run.corpus()
    corpus = Corpus(given)
    if Tokenizer.from_file(str(given / TOKENIZER)).get_vocab() != run.tokenizer().get_vocab():
        raise UserError(f"{given} has other tokens than {run.path}; prepare the text with the run's tokenizer.")
    return corpus


def memory_needed(run: Run) -> float:
    """Bytes, roughly: Python and torch, the weights while they are read, and one sequence's work."""
    config = run.config.model
    newest = newest_first(run.checkpoints)
    weights = (newest[0][1] / MODEL).stat().st_size if newest and (newest[0][1] / MODEL).is_file() else 0
    streams = 40 * config.context * config.width
    attention = 6 * config.context**2
    logits = 3 * HEAD_TOKENS * config.vocabulary
    tokens = min(JACOBIAN_TOKENS, config.context)
    graph = tokens * (100 * config.width + 10 * config.heads * tokens)
    return 5e8 + 2 * weights + 4 * (streams + attention + logits + graph)


def require_memory(run: Run) -> None:
    """Raises UserError, with the estimate, when this machine has less memory than a run would need."""
    needed, free = memory_needed(run), memory_free()
    if needed > free:
        raise UserError(
            f"inspecting {run.path} needs about {needed / 1e9:.1f} GB of memory and {free / 1e9:.1f} GB are free; "
            "use a machine with more."
        )


def _work_shares(model: LanguageModel, sequences: int) -> tuple[float, float]:
    """The share of the whole work that a sequence and that a layer's Jacobian is, by their matrix products."""
    config = model.config
    tokens = min(JACOBIAN_TOKENS, config.context)
    sequence = config.layers * config.context * (6 * 12 * config.width**2 + config.vocabulary * config.width)
    layer = 300 * tokens * 12 * config.width**2
    total = sequences * sequence + config.layers * layer
    return sequence / total, layer / total
