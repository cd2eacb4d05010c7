"""Byte-level BPE trained on the corpus, plain bytes, exact GPT-2, or one that is there: all as one `tokenizer.json`."""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections.abc import Iterable
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from ..errors import UserError

END_OF_TEXT = "<|endoftext|>"

GPT2_FILES = {  # name: (address, sha256); OpenAI's release files, the ones tiktoken checks
    "encoder.json": (
        "https://openaipublic.blob.core.windows.net/gpt-2/encodings/main/encoder.json",
        "196139668be63f3b5d6574427317ae82f612a97c5d1cdaf36ed2256dbf636783",
    ),
    "vocab.bpe": (
        "https://openaipublic.blob.core.windows.net/gpt-2/encodings/main/vocab.bpe",
        "1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5",
    ),
}


def check_name(name: str) -> None:
    """Raises UserError unless the name is `bytes`, `bpe:SIZE`, `gpt2`, `gpt2:FOLDER` or a `FILE.json`."""
    kind, _, argument = name.partition(":")
    good_size = argument.isdigit() and 257 <= int(argument) < 2**31
    named = name in ("bytes", "gpt2") or name.endswith(".json")
    if not (named or (kind == "bpe" and good_size) or (kind == "gpt2" and argument)):
        raise UserError(
            f"tokenizer {name!r} is not known. Allowed: bytes, bpe:SIZE (at least 257), gpt2, gpt2:FOLDER, FILE.json"
        )


def vocabulary_of(name: str) -> int:
    """How many tokens the tokenizer of that name has, or at most will have where it is still to be trained."""
    check_name(name)
    if name.endswith(".json"):
        return read_tokenizer(Path(name)).get_vocab_size()
    kind, _, argument = name.partition(":")
    return {"bytes": 257, "gpt2": 50_257}.get(kind) or int(argument)


def make_tokenizer(name: str, texts: Iterable[str]) -> Tokenizer:
    """The tokenizer of that name; `texts` is read only where one is trained."""
    check_name(name)
    if name.endswith(".json"):
        return read_tokenizer(Path(name))
    kind, _, argument = name.partition(":")
    if kind == "gpt2":
        return _gpt2(argument)
    alphabet = [byte_to_char()[b] for b in range(256)]
    if kind == "bytes":
        tokenizer = _byte_level(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]), use_regex=False)
    else:
        tokenizer = _byte_level(models.BPE())
        trainer = trainers.BpeTrainer(
            vocab_size=int(argument) - 1, initial_alphabet=alphabet, special_tokens=[], show_progress=False
        )
        tokenizer.train_from_iterator(texts, trainer)
    tokenizer.add_special_tokens([END_OF_TEXT])
    return tokenizer


def read_tokenizer(path: Path) -> Tokenizer:
    """The tokenizer of a `tokenizer.json`. Raises UserError when it cannot be read."""
    if not path.is_file():
        raise UserError(f"tokenizer {path} does not exist.")
    try:
        return Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises nothing more precise
        raise UserError(f"{path} cannot be read: {error}") from None


def byte_level_bpe(vocabulary: dict[str, int], merges: str) -> Tokenizer:
    """GPT-2's kind of tokenizer from its two files: the id of each token, and the merges below a line of version."""
    lines = (line.partition(" ") for line in merges.split("\n")[1:])
    tokenizer = _byte_level(models.BPE(vocab=vocabulary, merges=[(left, right) for left, _, right in lines if right]))
    if END_OF_TEXT in vocabulary:
        tokenizer.add_special_tokens([END_OF_TEXT])  # it keeps its id
    return tokenizer


def _byte_level(model: models.BPE, use_regex: bool = True) -> Tokenizer:
    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=use_regex)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def byte_to_char() -> dict[int, str]:
    """The printable character that stands for each byte in byte-level vocabularies."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [b for b in range(256) if b not in printable]
    return {b: chr(b) for b in printable} | {b: chr(256 + i) for i, b in enumerate(others)}


def _gpt2(folder: str) -> Tokenizer:
    return byte_level_bpe(json.loads(_gpt2_file("encoder.json", folder)), _gpt2_file("vocab.bpe", folder).decode())


def _gpt2_file(name: str, folder: str) -> bytes:
    """One of GPT-2's two files: from the folder, or tiktoken's cache, or through tiktoken's download."""
    url, expected = GPT2_FILES[name]
    if folder:
        found = sorted(Path(folder).glob(f"*{name}"))
        if not found:
            raise UserError(f"folder {folder!r} holds no file *{name}; GPT-2's BPE needs encoder.json and vocab.bpe.")
        data = found[0].read_bytes()
    else:
        default = os.environ.get("DATA_GYM_CACHE_DIR", os.path.join(tempfile.gettempdir(), "data-gym-cache"))
        cached = Path(os.environ.get("TIKTOKEN_CACHE_DIR", default)) / hashlib.sha1(url.encode()).hexdigest()
        data = cached.read_bytes() if cached.is_file() else _download(url, expected)
    got = hashlib.sha256(data).hexdigest()
    if got != expected:
        raise UserError(f"GPT-2's {name} has sha256 {got[:12]}..., expected {expected[:12]}...: not the released file.")
    return data


def _download(url: str, expected: str) -> bytes:
    try:
        from tiktoken.load import read_file_cached

        return read_file_cached(url, expected)
    except ImportError:
        tried = "tiktoken is not installed (pip install 'yuriiformer[data]')"
    except Exception as error:  # requests and its many kinds of failure
        tried = f"no network ({type(error).__name__})"
    raise UserError(
        f"GPT-2's BPE files are not in tiktoken's cache and cannot be fetched: {tried}. "
        "Give a folder that holds encoder.json and vocab.bpe: --tokenizer gpt2:FOLDER"
    )
