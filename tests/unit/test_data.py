"""Text to tokens and tokens to batches."""

import bz2
import copy
import gzip
import json
import lzma
import os
import shutil

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer

from yuriiformer.data import corpus as corpora
from yuriiformer.data.corpus import Corpus, dtype_for
from yuriiformer.data.prepare import pieces, prepare
from yuriiformer.data.sources import Source
from yuriiformer.data.tokenizer import END_OF_TEXT, make_tokenizer
from yuriiformer.errors import UserError

DOCUMENTS = ["The first one is here.\n", "Zweites Stück: größer, 中文, 🙂.\n", "a third\n\nwith a gap\n"]


def decoded(corpus: Corpus) -> str:
    tokenizer = Tokenizer.from_file(str(corpus.path / "tokenizer.json"))
    return "".join(
        tokenizer.decode(corpus.tokens[s][:].tolist(), skip_special_tokens=False) for s in ("train", "validation")
    )


def write(folder, suffix):
    text = f"\n{END_OF_TEXT}\n".join(d.strip("\n") for d in DOCUMENTS)
    records = "\n".join(json.dumps({"text": d}) for d in DOCUMENTS)
    path = folder / f"x{suffix}"
    match suffix:
        case ".parquet":
            parquet = pytest.importorskip("pyarrow.parquet", reason="extra: data")
            parquet.write_table(pytest.importorskip("pyarrow").table({"text": DOCUMENTS}), path)
        case ".jsonl" | ".jsonl.gz":
            path.write_bytes(gzip.compress(records.encode()) if suffix.endswith("gz") else records.encode())
        case ".txt.zst":
            zstandard = pytest.importorskip("zstandard", reason="extra: data")
            path.write_bytes(zstandard.compress(text.encode()))
        case _:
            compress = {"xz": lzma.compress, "gz": gzip.compress, "bz2": bz2.compress}.get(suffix.split(".")[-1], bytes)
            path.write_bytes(compress(text.encode()))
    return path


SUFFIXES = [".txt", ".md", ".py", ".txt.xz", ".txt.gz", ".txt.bz2", ".txt.zst", ".jsonl", ".jsonl.gz", ".parquet"]


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_every_format_gives_the_same_documents(tmp_path, suffix):
    assert list(Source(str(write(tmp_path, suffix))).documents()) == DOCUMENTS


def test_folder_is_read_in_order(tmp_path):
    for name in ("b.txt", "a.md", "c.bin"):
        (tmp_path / name).write_text(name)
    assert list(Source(str(tmp_path)).documents()) == ["a.md\n", "b.txt\n"]


@pytest.mark.parametrize("tokenizer", ["bytes", "bpe:280"])
def test_tokens_decode_to_the_text(tmp_path, tokenizer):
    corpus = prepare(str(write(tmp_path, ".txt")), tmp_path / "c", tokenizer=tokenizer, fraction=0.3)
    text = decoded(corpus)
    assert text.count(END_OF_TEXT) == 6  # each document ends once in training and once in validation
    assert sorted(text.replace(END_OF_TEXT, "")) == sorted("".join(DOCUMENTS))


def test_bytes_are_bytes():
    tokenizer = make_tokenizer("bytes", [])
    assert tokenizer.encode("aé\n", add_special_tokens=False).ids == list("aé\n".encode())
    assert tokenizer.token_to_id(END_OF_TEXT) == 256


def test_gpt2_equals_tiktoken(shared, tmp_path, monkeypatch):
    tiktoken = pytest.importorskip("tiktoken", reason="extra: data")
    import hashlib

    from yuriiformer.data.tokenizer import GPT2_FILES

    for name, (url, _) in GPT2_FILES.items():
        shutil.copy(next(shared.glob(f"*{name}")), tmp_path / hashlib.sha1(url.encode()).hexdigest())
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path))
    reference = tiktoken.get_encoding("gpt2")
    with lzma.open(shared / "openwebtext_1k.txt.xz", "rt", encoding="utf-8") as file:
        text = file.read(300_000) + "\n\n  中文 🙂 naïve\t"
    for ours in (make_tokenizer("gpt2", []), make_tokenizer(f"gpt2:{shared}", [])):
        assert ours.get_vocab_size() == 50257
        assert ours.token_to_id(END_OF_TEXT) == 50256
        ours.encode_special_tokens = True
        assert ours.encode(text).ids == reference.encode_ordinary(text)


@settings(max_examples=60, deadline=None)
@given(st.text(alphabet="ab .\n\t'é", max_size=300), st.integers(5, 40))
def test_pieces_encode_like_the_whole(text, size):
    tokenizer = make_tokenizer("bpe:300", ["ab ab  ba\n\n\n a b. 'ab é\t\n" * 20])
    parts = list(pieces(text, size))
    assert "".join(parts) == text
    assert [i for p in parts for i in tokenizer.encode(p).ids] == tokenizer.encode(text).ids


def test_more_workers_make_the_same_corpus(text, corpus, tmp_path, monkeypatch):
    monkeypatch.setattr("yuriiformer.data.prepare.WORTH_PROCESSES", 0)
    monkeypatch.setattr("yuriiformer.data.prepare.PIECE", 1000)
    other = prepare(str(text), tmp_path / "c", tokenizer="bpe:300", workers=2)
    assert other.manifest["splits"] == corpus.manifest["splits"]


def test_dtype_holds_the_vocabulary():
    assert dtype_for(65536) is np.uint16
    assert dtype_for(65537) is np.uint32


def test_validation_file_of_its_own(text, tmp_path):
    (tmp_path / "v.txt").write_text("held out")
    corpus = prepare(str(text), tmp_path / "c", tokenizer="bytes", validation=str(tmp_path / "v.txt"))
    assert {"documents": 1, "bytes": 9, "tokens": 10}.items() <= corpus.manifest["splits"]["validation"].items()


def test_an_epoch_visits_every_block_once(corpus):
    numbered = copy.copy(corpus)  # tokens that tell where they stand
    numbered.tokens, numbered.vocabulary = {"train": np.arange(2005)}, 3000
    context, batch, blocks = 16, 4, (2005 - 16) // 16
    rows = [numbered.batch_at(step, seed=3, batch=batch, context=context) for step in range(blocks // batch)]
    starts = np.concatenate([inputs[:, 0] for inputs, _ in rows])
    assert len(set(starts)) == len(starts) == blocks // batch * batch
    assert len(set(starts % context)) == 1
    assert (np.diff(starts) < 0).any()
    for inputs, targets in rows:
        assert (inputs == inputs[:, :1] + np.arange(context)).all()
        assert (targets == inputs + 1).all()


def test_epochs_differ_in_offset_and_order(corpus):
    from yuriiformer.data.corpus import _epoch

    first, second = _epoch(0, 0, 100, 16), _epoch(0, 1, 100, 16)
    assert sorted(first[1]) == list(range(100)) == sorted(second[1])
    assert (first[1] != second[1]).any()
    offsets = {_epoch(seed, 0, 100, 16)[0] for seed in range(40)}
    assert len(offsets) > 5
    assert offsets <= set(range(16))


@pytest.mark.parametrize("world", [2, 4])
def test_ranks_together_read_the_same_batch(corpus, world):
    for step in (0, 7, 1000):
        whole, _ = corpus.batch_at(step, seed=1, batch=8, context=16)
        parts = [corpus.batch_at(step, seed=1, batch=8, context=16, rank=r, world=world)[0] for r in range(world)]
        assert (np.stack(parts, 1).reshape(whole.shape) == whole).all()


def test_interrupted_prepare_leaves_nothing(text, tmp_path):
    def stop(read):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        prepare(str(text), tmp_path / "c", progress=stop)
    assert list(tmp_path.iterdir()) == []


def damaged(corpus, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(corpus.path, copy)
    return copy


def test_damage_is_noticed(corpus, tmp_path):
    copy = damaged(corpus, tmp_path)
    file = copy / "train.bin"
    data = bytearray(file.read_bytes())
    data[11] ^= 1
    file.write_bytes(data)
    with pytest.raises(UserError, match=r"train.bin is damaged"):
        Corpus(copy)
    file.write_bytes(data[:-2])
    with pytest.raises(UserError, match="cut short"):
        Corpus(copy)
    file.unlink()
    with pytest.raises(UserError, match="is missing"):
        Corpus(copy)
    (copy / "manifest.json").write_text('{"format": 1}')
    with pytest.raises(UserError, match="damaged"):
        Corpus(copy)


def test_token_outside_the_vocabulary(corpus, tmp_path):
    copy = damaged(corpus, tmp_path)
    manifest = json.loads((copy / "manifest.json").read_text())
    manifest["vocabulary"] = 100
    del manifest["sha256"]
    manifest["format"] = 1
    (copy / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(UserError, match=r"holds token id \d+; its vocabulary has 100"):
        Corpus(copy).batch_at(0, seed=0, batch=4, context=16)


def test_a_page_is_looked_at_when_it_is_read(corpus, tmp_path, monkeypatch):
    """As of a file that is too large to be hashed at every start: a damage is found by who reads it, and by nobody else."""
    monkeypatch.setattr(corpora, "VERIFY_BELOW", 0)
    copy = damaged(corpus, tmp_path)
    file = copy / "train.bin"
    data = bytearray(file.read_bytes())
    data[2 * corpora.PAGE + 5] ^= 1
    file.write_bytes(data)
    tokens = Corpus(copy).tokens["train"]
    page = corpora.PAGE // tokens.dtype.itemsize
    assert (tokens[: 2 * page] == corpus.tokens["train"][: 2 * page]).all()
    assert (tokens[3 * page :] == corpus.tokens["train"][3 * page :]).all()
    for part in (slice(2 * page, 2 * page + 1), slice(3 * page - 1, 3 * page + 1), slice(None)):
        with pytest.raises(UserError, match=r"train.bin is damaged in the 4096 bytes from 8192 on"):
            tokens[part]
    data[2 * corpora.PAGE + 5] ^= 1
    file.write_bytes(data)
    sums = copy / "train.crc"
    sums.write_bytes(sums.read_bytes()[:-4])
    with pytest.raises(UserError, match=r"train.crc is damaged"):
        Corpus(copy)


def test_slices_are_those_of_an_array(corpus):
    tokens = corpus.tokens["train"]
    array = np.fromfile(tokens.file, tokens.dtype)
    generator = np.random.default_rng(0)
    for start, stop in generator.integers(0, len(array) + 1, (50, 2)):
        assert (tokens[start : max(start, stop)] == array[start : max(start, stop)]).all()
    assert len(tokens) == len(array)


def test_a_file_that_shrinks_or_goes_while_it_is_read(corpus, tmp_path):
    copy = damaged(corpus, tmp_path)
    opened = Corpus(copy)
    os.truncate(copy / "train.bin", 20)
    with pytest.raises(UserError, match=r"train.bin was cut short while it was in use"):
        opened.batch_at(0, seed=0, batch=64, context=16)
    (copy / "train.bin").unlink()
    with pytest.raises(UserError, match=r"train.bin is gone"):
        opened.batch_at(0, seed=0, batch=4, context=16)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"dtype": "uint32"}, "manifest says"),
        ({"dtype": "complicated"}, "manifest.json is damaged"),
        ({"vocabulary": 300.5, "format": 7}, "has corpus format 7"),
        ({"splits": {}}, "manifest.json is damaged"),
        ({"splits": [1, 2]}, "manifest.json is damaged"),
    ],
)
def test_a_manifest_that_says_what_is_not_so(corpus, tmp_path, change, said):
    copy = damaged(corpus, tmp_path)
    manifest = json.loads((copy / "manifest.json").read_text())
    for sealed in (True, False):
        (copy / "manifest.json").write_text(json.dumps(manifest | change))
        with pytest.raises(UserError, match=f"its sha256 is not its own|{said}" if sealed else said):
            Corpus(copy).batch_at(0, seed=0, batch=4, context=16)
        manifest.pop("sha256", None)
        manifest["format"] = 1


@pytest.mark.parametrize("size", [0, 1, 33])
def test_empty_and_odd_files(corpus, tmp_path, size):
    copy = damaged(corpus, tmp_path)
    os.truncate(copy / "train.bin", size)
    with pytest.raises(UserError, match=rf"train.bin has {size} bytes, its manifest says"):
        Corpus(copy)
