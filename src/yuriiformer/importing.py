"""GPT-2's weights as a run: from a Hugging Face folder, or from nanoGPT's ckpt.pt.

Both are gradient descent with Lie-Trotter under other names. A pickle (.pt, .bin) is read only when asked, and then
as tensors and plain values: one that carries code is refused, not run.
"""

from __future__ import annotations

import os
import re
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from tokenizers import Tokenizer
from torch import Tensor, nn

from .config import Config, ModelConfig, TrainingConfig
from .data.corpus import TOKENIZER
from .data.sources import reachable
from .data.tokenizer import byte_level_bpe, make_tokenizer, read_tokenizer
from .errors import EnvironmentFault, UserError, unknown
from .files import read_json, sha256, write_text
from .model import LanguageModel, checked
from .presets import BASELINE
from .training.checkpoint import save
from .training.run import Run

WEIGHTS, INDEX, PICKLE = "model.safetensors", "model.safetensors.index.json", "pytorch_model.bin"
HUB_FILES = ["config.json", "*.safetensors", INDEX, TOKENIZER, "vocab.json", "merges.txt"]
PADDING = 128  # a table may have so many rows more than the tokenizer has tokens

# Our names and GPT-2's; `layers.N` is its `h.N`.
NAMES = {
    "input.token": "wte",
    "input.position": "wpe",
    "attn.norm": "ln_1",
    "attn.qkv": "attn.c_attn",
    "attn.out": "attn.c_proj",
    "mlp.norm": "ln_2",
    "mlp.up": "mlp.c_fc",
    "mlp.out": "mlp.c_proj",
    "norm": "ln_f",
}
MASKS = re.compile(r"h\.\d+\.attn\.(masked_)?bias")  # buffers of a causal mask, no weights

SIZES = {"layers": "n_layer", "heads": "n_head", "width": "n_embd", "vocabulary": "vocab_size"}
GELUS = {"gelu_new": "gpt2", "gelu_pytorch_tanh": "gpt2", "gelu": "biased"}  # Hugging Face's name: our oracles
# What else in a Hugging Face config changes the function; each but for GPT-2's own value is another model.
FIXED = {
    "layer_norm_epsilon": 1e-5,
    "scale_attn_weights": True,
    "scale_attn_by_inverse_layer_idx": False,
    "add_cross_attention": False,
    "tie_word_embeddings": True,
}


@dataclass(frozen=True)
class Found:
    """What a source holds: a model's config, its tensors, the files they stand in, a tokenizer where there is one."""

    model: ModelConfig
    tensors: Mapping[str, Tensor]
    transposed: bool  # matrices are stored as (in, out)
    files: list[Path]
    tokenizer: Tokenizer | None = None


def import_run(source: str, out: Path, *, tokenizer: str | None = None, trust: bool = False) -> Run:
    """Make the run directory `out` of a GPT-2 whose logits it computes.

    source: a Hugging Face folder, a nanoGPT checkpoint, or a name on the hub. tokenizer: instead of the folder's own.
    Raises UserError for a source that is no GPT-2 or does not fit its own description; nothing is left behind then.
    """
    if out.exists():
        raise UserError(f"{out} exists already; choose another --out or delete it.")
    path = Path(source)
    if path.is_file():
        found = _nanogpt(path, trust)
    else:
        found = _hugging_face(path if path.is_dir() else _from_hub(source), trust)
    vocabulary = _tokenizer(tokenizer, found, source)
    model = LanguageModel(found.model)
    _fill(model, found, source)
    origin = {"source": source, "sha256": {file.name: sha256(file) for file in found.files}}
    untrained = TrainingConfig(steps=0, device="cpu", precision="fp32", compile="no")
    with Run.written(out, Config(model=model.config, training=untrained), {"imported_from": origin}) as folder:
        write_text(folder / TOKENIZER, vocabulary.to_str(pretty=True))
        save(folder / "checkpoints", model)
    return Run(out)


def _hugging_face(folder: Path, trust: bool) -> Found:
    where = folder / "config.json"
    if not where.is_file():
        raise UserError(f"{folder} has no config.json: it is no Hugging Face folder. Name nanoGPT's checkpoint itself.")
    config = read_json(where)
    kind = config.get("model_type") if isinstance(config, dict) else None
    if kind != "gpt2":
        raise UserError(f"{where} says model_type {kind!r}; only 'gpt2' can be imported.")
    for key, value in FIXED.items():
        if (got := config.get(key, value)) != value:
            raise UserError(f"{where} says {key} {got!r}; only {value!r} can be imported.")
    activation = str(config.get("activation_function", "gelu_new"))
    if activation not in GELUS:
        raise unknown(f"{where}: activation_function", activation, GELUS)
    model = _model(config, "n_positions", GELUS[activation], where)
    if (inner := config.get("n_inner")) not in (None, 4 * model.width):
        raise UserError(f"{where} says n_inner {inner}; only {4 * model.width}, 4 * n_embd, can be imported.")
    files = _weights(folder)
    tensors: dict[str, Tensor] = {}
    for file in files:
        tensors |= _plain(_pickle(file, trust) if file.name == PICKLE else _safetensors(file), file)
    return Found(model, tensors, True, files, _own_tokenizer(folder))


def _weights(folder: Path) -> list[Path]:
    """The files that hold a folder's weights: those of an index, else one."""
    if (index := folder / INDEX).is_file():
        return _shards(index)
    for name in (WEIGHTS, PICKLE):
        if (folder / name).is_file():
            return [folder / name]
    raise UserError(f"{folder} holds no weights: no {WEIGHTS}, {INDEX} or {PICKLE}.")


def _safetensors(path: Path) -> dict[str, Tensor]:
    try:
        return safetensors.torch.load_file(path)
    except (safetensors.SafetensorError, OSError) as error:
        raise UserError(f"{path} cannot be read, it may be cut short: {error}") from None


def _shards(index: Path) -> list[Path]:
    table = read_json(index)
    names = table.get("weight_map") if isinstance(table, dict) else None
    if not (isinstance(names, dict) and all(isinstance(name, str) for name in names.values())):
        raise UserError(f"{index} is damaged: it has no weight_map of names to files.")
    files = [index.parent / name for name in sorted(set(names.values()))]
    for file in files:
        if file.parent != index.parent or not file.is_file():
            raise UserError(f"{index} names {file.name!r}, which is not beside it.")
    return files


def _nanogpt(path: Path, trust: bool) -> Found:
    checkpoint = _pickle(path, trust)
    arguments = checkpoint.get("model_args") if isinstance(checkpoint, dict) else None
    if not isinstance(arguments, dict) or "model" not in checkpoint:
        raise UserError(f"{path} is no nanoGPT checkpoint: it has no 'model' and 'model_args'.")
    model = _model(arguments, "block_size", "biased" if arguments.get("bias", True) else "plain", path)
    return Found(model, _plain(checkpoint["model"], path), False, [path])


def _pickle(path: Path, trust: bool) -> Any:
    if not trust:
        raise UserError(
            f"{path} is a pickle, a format that can carry code. It is read as tensors and plain values only, and a file "
            "with more in it is refused; add --trust if you know where it comes from."
        )
    try:
        with warnings.catch_warnings(action="ignore"):  # torch remarks on old formats
            return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged pickle fails in many ways
        if code := re.search(r"GLOBAL (\S+)", str(error)):
            raise UserError(f"{path} asks for the code {code[1]}; it is refused, and nothing of it was run.") from None
        raise UserError(f"{path} is no checkpoint of torch, or is cut short: {_first_line(error)}") from None


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".splitlines()[0].partition(". ")[0]


def _plain(tensors: Any, where: Path) -> dict[str, Tensor]:
    """By GPT-2's own names: without the prefixes that a compiled model or a language-model head's class puts before."""
    named = isinstance(tensors, Mapping) and all(
        isinstance(n, str) and isinstance(t, Tensor) for n, t in tensors.items()
    )
    if not named:
        raise UserError(f"{where} holds something else than named tensors.")
    return {name.removeprefix("_orig_mod.").removeprefix("transformer."): t for name, t in tensors.items()}


def _model(config: Mapping[str, Any], context: str, oracles: str, where: Path) -> ModelConfig:
    sizes = {}
    for ours, theirs in {**SIZES, "context": context}.items():
        if type(config.get(theirs)) is not int:
            raise UserError(f"{where} gives no whole number {theirs}; got {config.get(theirs)!r}.")
        sizes[ours] = config[theirs]
    try:
        return checked(ModelConfig(rule=BASELINE, oracles=oracles, **sizes))  # type: ignore[arg-type]
    except UserError as error:
        raise UserError(f"{where}: {error}") from None


@torch.no_grad()
def _fill(model: nn.Module, found: Found, source: str) -> None:
    """Copy every tensor into its place; one that is missing, of another shape or left over is an error that names it."""
    left = {name: t for name, t in found.tensors.items() if not MASKS.fullmatch(name)}
    head = left.pop("lm_head.weight", None)
    for ours, tensor in model.state_dict().items():
        parts = re.fullmatch(r"(?:layers\.(\d+)\.)?(.*)\.(weight|bias)", ours)
        assert parts is not None
        layer, module, kind = parts.groups()
        theirs = f"{'' if layer is None else f'h.{layer}.'}{NAMES[module]}.{kind}"
        if theirs not in left:
            raise UserError(f"{source} has no tensor {theirs}, which its config asks for.")
        value = left.pop(theirs)
        if found.transposed and ".c_" in theirs and value.ndim == 2:
            value = value.T
        if value.shape != tensor.shape:
            raise UserError(
                f"tensor {theirs} of {source} has shape {tuple(value.shape)}; its config asks for {tuple(tensor.shape)}."
            )
        tensor.copy_(value)
    if left:
        raise UserError(f"{source} has a tensor {min(left)!r} that a GPT-2 of its config does not have.")
    if head is not None and not torch.equal(head, found.tensors["wte.weight"]):
        raise UserError(
            f"{source} has an lm_head that is not tied to its embedding table; only a tied one can be imported."
        )


def _own_tokenizer(folder: Path) -> Tokenizer | None:
    if (folder / TOKENIZER).is_file():
        return read_tokenizer(folder / TOKENIZER)
    vocabulary, merges = folder / "vocab.json", folder / "merges.txt"
    if not (vocabulary.is_file() and merges.is_file()):
        return None
    try:
        return byte_level_bpe(read_json(vocabulary), merges.read_text(encoding="utf-8"))
    except Exception as error:  # the library raises nothing more precise
        raise UserError(f"{vocabulary} and {merges} make no tokenizer: {error}") from None


def _tokenizer(name: str | None, found: Found, source: str) -> Tokenizer:
    if name is not None and name.startswith("bpe:"):
        raise UserError(f"tokenizer {name!r} would be trained anew; name the one the model was trained with.")
    tokenizer = make_tokenizer(name, ()) if name is not None else found.tokenizer
    if tokenizer is None:
        raise UserError(
            f"{source} brings no tokenizer that can be read (nanoGPT's meta.pkl, a pickle, never is); "
            "name it: --tokenizer gpt2, gpt2:FOLDER, bytes or FILE.json"
        )
    tokens, rows = 1 + max(tokenizer.get_vocab().values(), default=-1), found.model.vocabulary
    if not rows - PADDING < tokens <= rows:
        raise UserError(f"the tokenizer has {tokens:,} tokens, the model's table {rows:,} rows: they do not match.")
    return tokenizer


def _from_hub(name: str) -> Path:
    """The folder of a hub's repository: from its cache, else fetched."""
    if not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", name) or name.endswith((".pt", ".bin", ".safetensors")):
        raise UserError(f"{name} does not exist.")
    try:
        from huggingface_hub import snapshot_download
    except ImportError:
        raise EnvironmentFault(
            f"{name} is no folder here, and to look on the hub needs huggingface_hub: pip install 'yuriiformer[huggingface]'"
        ) from None
    problem = "no network"
    for local in [True, False] if reachable(os.environ.get("HF_ENDPOINT", "https://huggingface.co")) else [True]:
        try:
            folder = Path(snapshot_download(name, allow_patterns=HUB_FILES, local_files_only=local))
            if not local or list(folder.glob("*.safetensors")):  # a cache may hold the config alone
                return folder
        except Exception as error:  # of many kinds: no such name, not allowed, offline mode
            problem = problem if local else _first_line(error)
    raise UserError(f"{name} is no folder here, and the hub did not give it ({problem}). Name a folder that holds it.")
