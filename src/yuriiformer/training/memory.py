"""How much memory a training step takes, and so how many sequences go through the model at a time."""

from __future__ import annotations

import bisect
import json
import math
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from ..config import Config, ModelConfig, TrainingConfig, as_dict, from_dict, override
from ..errors import EnvironmentFault
from ..machine import memory_free
from ..model import LanguageModel, Layer, allow_recompilation
from ..presets import BASELINE
from ..rule import find_rule
from ..splitting import find_splitting

SPARE = 0.9  # the share of the free memory that is used: allocators leave gaps, and libraries take workspace


def estimate(config: Config, micro_batch: int, ranks: int = 1) -> dict[str, int]:
    """Bytes of a training step at its peak by part, for a definite config; on each of `ranks` devices.

    What a layer keeps for its backward pass is not computed by a formula: one layer is run on one sequence, compiled as
    training compiles it, and asked. So it is right for every rule, splitting and oracle.
    """
    model, training = config.model, config.training
    with torch.device("meta"):
        built = LanguageModel(model, seed=None)
    matrices = [m.weight for m in built.modules() if isinstance(m, nn.Linear)]
    in_matrices, parameters = _numel(matrices), _numel(list(built.parameters()))
    half, compiled = training.precision == "bf16", training.compile == "yes"
    tokens = micro_batch * model.context
    baseline = replace(model, rule=BASELINE, splitting="auto", options={}, values={})
    kept, plain = (_kept(_what_decides(config, m)) for m in (model, baseline))
    moments = 8 * parameters - (4 * in_matrices if training.optimizer == "muon" else 0)
    shards = ranks if training.parallel == "fsdp" else 1
    gathered = 0 if shards == 1 else 8 * _numel(list(built.layers[0].parameters()))  # a layer, and the next one's
    # Bytes a logit: eager, three copies in fp32 stand at the same time; compiled, the gradient takes the logits' place.
    logits = model.vocabulary * min(tokens, training.loss_chunk or tokens) * (12 if not compiled else 2 if half else 4)
    table = model.vocabulary * model.width
    parts = {
        "weights": 4 * parameters // shards + gathered,
        "gradients": 4 * parameters // shards,
        "optimiser": moments // shards,
        "copies in bf16": 2 * (in_matrices + table) if half else 0,
        "activations": model.layers * micro_batch * min(kept, plain),
        "velocity": model.layers * micro_batch * max(0, kept - plain),
        "logits": logits + table * ((8 if training.loss_chunk else 0) + (2 if half else 4)),
    }
    if training.optimizer == "muon":  # its updates and one batch of matrices, when the activations are gone
        shapes = Counter(tuple(sorted(m.shape)) for m in matrices)
        largest = max(a * b * n for (a, b), n in shapes.items())
        busy = parts["copies in bf16"] + parts["activations"] + parts["velocity"] + parts["logits"]
        parts["optimiser"] += max(0, 4 * in_matrices + 12 * largest - busy)
    return parts


def _numel(tensors: list[Tensor]) -> int:
    return sum(t.numel() for t in tensors)


def _what_decides(config: Config, model: ModelConfig) -> str:
    """The part of a config that a layer's memory depends on, as text: the seeds of an arm ask once."""
    t = config.training
    training = TrainingConfig(device=t.device, precision=t.precision, compile=t.compile, streams=t.streams)
    return json.dumps(as_dict(Config(model=replace(model, layers=1, vocabulary=1), training=training)))


@cache
def _kept(config: str) -> int:
    """Bytes that one layer keeps of one sequence from its forward to its backward pass, its weights not counted."""
    whole = from_dict(Config, json.loads(config))
    model, training = whole.model, whole.training
    device = torch.device(training.device)
    rule = find_rule(model.rule)
    with device:
        layer = Layer(rule, find_splitting(rule, model.splitting), model, 0)
    half = training.precision == "bf16"
    dtype = torch.bfloat16 if training.streams == "bf16" else torch.float32
    sizes = {}

    def note(tensor: Tensor) -> Tensor:
        sizes[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    allow_recompilation()
    # The partition into what is kept and what is computed again is the compiler's own, without its code generation.
    run = (
        torch.compile(layer, backend="aot_eager_decomp_partition", dynamic=False)
        if training.compile == "yes"
        else layer
    )
    streams = tuple(
        torch.zeros(1, model.context, model.width, device=device, dtype=dtype, requires_grad=True) for _ in rule.streams
    )
    with (
        torch.autocast(device.type, torch.bfloat16, enabled=half),
        torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor),
    ):
        out = run(streams)
    own = {p.untyped_storage().data_ptr() for p in layer.parameters()}
    kept = sum(size for pointer, size in sizes.items() if pointer not in own)
    del out
    return kept - (2 * _numel([m.weight for m in layer.modules() if isinstance(m, nn.Linear)]) if half else 0)


def fit(config: Config, ranks: int = 1) -> tuple[int, str]:
    """The largest micro-batch that fits into the free memory of each of `ranks` devices, and a line that says so.

    The number of passes is what counts: as few as fit, or up to a quarter more where that makes them equal.
    Raises EnvironmentFault with what would fit when not one sequence does.
    """
    rows = math.ceil(config.training.batch / ranks)
    free = SPARE * device_memory_free(config.training.device)
    if config.training.device == "cpu":
        free /= ranks  # they share it, as far as this process can tell

    def needed(micro: int) -> int:
        return sum(estimate(config, micro, ranks).values())

    largest = bisect.bisect_right(range(1, rows + 1), free, key=needed)
    if not largest:
        others = "; ".join(_would_fit(config, ranks, free)) or "a machine with more"
        raise EnvironmentFault(
            f"one sequence needs about {needed(1) / 1e9:.1f} GB and {free / 1e9:.1f} GB are free. Would fit: {others}."
        )
    passes = math.ceil(rows / largest)
    passes = next((n for n in range(passes, passes + passes // 4 + 1) if rows % n == 0), passes)
    micro = math.ceil(rows / passes)
    return micro, f"micro-batch {micro} x {passes}: {needed(micro) / 1e9:.2g} of {free / 1e9:.2g} GB estimated"


def device_memory_free(device: str) -> float:
    """Bytes; infinity where nothing tells."""
    if device == "cuda":
        unused = torch.cuda.memory_reserved() - torch.cuda.memory_allocated()  # torch's own, free to be taken again
        return float(torch.cuda.mem_get_info()[0] + unused)
    return memory_free() if device == "cpu" else math.inf


def _would_fit(config: Config, ranks: int, free: float) -> Iterator[str]:
    """Changes of one key with which one sequence fits."""
    model = config.model
    smaller: dict[str, list[Any]] = {
        f"model.{key}": [getattr(model, key) >> n for n in range(1, 12) if getattr(model, key) >> n > 0]
        for key in ("context", "layers")
    }
    smaller["model.width"] = [w for n in range(1, 12) if (w := model.width >> n) and w % model.heads == 0]
    smaller["training.loss_chunk"] = [] if config.training.loss_chunk else [1024]
    for key, values in smaller.items():
        for value in values:
            if sum(estimate(override(config, {key: value}), 1, ranks).values()) <= free:
                yield f"{key}={value}"
                break
    for processes in (2, 4, 8, 16, 32, 64):
        if sum(estimate(override(config, {"training.parallel": "fsdp"}), 1, processes).values()) <= free:
            yield f"training.parallel=fsdp on {processes} devices"
            break
