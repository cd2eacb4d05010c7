"""Imported runs compute what the originals compute; what is no GPT-2, or does not fit, is refused by name."""

import json
import os
import pickle
import shutil
import struct

import pytest
import safetensors.torch
import torch
from torch import nn
from torch.nn import functional as F

from yuriiformer.cli import main
from yuriiformer.data.tokenizer import byte_level_bpe, make_tokenizer
from yuriiformer.errors import UserError
from yuriiformer.files import sha256
from yuriiformer.importing import import_run
from yuriiformer.training.run import Run


def logits(run, ids):
    return run.load()[0](ids)


# A GPT in nanoGPT's names, written for this test alone: the oracle here is nobody's code but torch's.
class Block(nn.Module):
    def __init__(self, width, heads, bias):
        super().__init__()
        self.heads = heads
        self.ln_1, self.ln_2 = nn.LayerNorm(width, bias=bias), nn.LayerNorm(width, bias=bias)
        self.attn, self.mlp = nn.Module(), nn.Module()
        self.attn.c_attn, self.attn.c_proj = nn.Linear(width, 3 * width, bias), nn.Linear(width, width, bias)
        self.mlp.c_fc, self.mlp.c_proj = nn.Linear(width, 4 * width, bias), nn.Linear(4 * width, width, bias)

    def forward(self, x):
        batch, time, width = x.shape
        size = width // self.heads
        q, k, v = (t.view(batch, time, -1, size).transpose(1, 2) for t in self.attn.c_attn(self.ln_1(x)).chunk(3, -1))
        scores = (q @ k.mT / size**0.5).masked_fill(torch.ones(time, time).triu(1).bool(), -torch.inf)
        x = x + self.attn.c_proj((scores.softmax(-1) @ v).transpose(1, 2).reshape(x.shape))
        return x + self.mlp.c_proj(F.gelu(self.mlp.c_fc(self.ln_2(x))))


class NanoGPT(nn.Module):
    def __init__(self, bias, vocabulary=320, context=16, width=24, heads=2, layers=3):
        super().__init__()
        self.transformer = nn.ModuleDict(
            {
                "wte": nn.Embedding(vocabulary, width),
                "wpe": nn.Embedding(context, width),
                "h": nn.ModuleList(Block(width, heads, bias) for _ in range(layers)),
                "ln_f": nn.LayerNorm(width, bias=bias),
            }
        )
        self.lm_head = nn.Linear(width, vocabulary, bias=False)
        self.lm_head.weight = self.transformer.wte.weight
        self.arguments = {
            "n_layer": layers, "n_head": heads, "n_embd": width, "block_size": context, "bias": bias,
            "vocab_size": vocabulary, "dropout": 0.0,
        }  # fmt: skip
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.add_(torch.randn(parameter.shape), alpha=0.1)

    def forward(self, ids):
        t = self.transformer
        x = t.wte(ids) + t.wpe(torch.arange(ids.shape[1]))
        for block in t.h:
            x = block(x)
        return self.lm_head(t.ln_f(x))

    def checkpoint(self, path, prefix="_orig_mod.", **changes):
        """What nanoGPT's train.py keeps, of a compiled model."""
        state = {prefix + name: tensor for name, tensor in self.state_dict().items()}
        settings = {"dataset": "stories", "compile": True, "learning_rate": 6e-4}
        kept = {"model": state, "model_args": self.arguments, "iter_num": 7, "best_val_loss": torch.tensor(3.0)}
        torch.save({**kept, "optimizer": {"state": {}}, "config": settings, **changes}, path)
        return path


@pytest.fixture
def tokenizer(corpus):
    return str(corpus.path / "tokenizer.json")


@pytest.fixture
def folder(gpt2_folder, tmp_path):
    """A copy of the small GPT-2 to spoil."""
    return shutil.copytree(gpt2_folder, tmp_path / "gpt2")


def change(folder, **keys):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | keys))


def saved(folder, **changes):
    """A GPT-2 of transformers with random weights, saved over the folder's."""
    import transformers

    model = transformers.GPT2LMHeadModel(transformers.GPT2Config.from_pretrained(folder, **changes)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape), alpha=0.1)
    model.save_pretrained(folder, max_shard_size="20KB")
    return model


@pytest.mark.parametrize("activation", ["gelu_new", "gelu", "gelu_pytorch_tanh"])
def test_logits_equal_transformers(folder, tmp_path, activation):
    (folder / "model.safetensors").unlink()
    theirs = saved(folder, activation_function=activation)
    assert len(list(folder.glob("*.safetensors"))) > 1, "the weights are in shards"
    ids = torch.randint(0, 320, (2, 32))
    run = import_run(str(folder), tmp_path / "run")
    torch.testing.assert_close(logits(run, ids), theirs(ids).logits, rtol=0, atol=1e-5)
    other = {"gelu": "gelu_new"}.get(activation, "gelu")  # the test sees which GELU it is
    change(folder, activation_function=other)
    assert not torch.allclose(logits(import_run(str(folder), tmp_path / "other"), ids), theirs(ids).logits, 0, 1e-5)


def test_a_pickled_folder_and_one_without_the_heads_prefix_are_the_same(folder, tmp_path):
    ids = torch.randint(0, 320, (2, 32))
    expected = logits(import_run(str(folder), tmp_path / "a"), ids)
    tensors = safetensors.torch.load_file(folder / "model.safetensors")
    bare = {name.removeprefix("transformer."): t for name, t in tensors.items()}
    masks = {f"h.{i}.attn.bias": torch.ones(1, 1, 32, 32) for i in range(2)}  # as in OpenAI's own file on the hub
    safetensors.torch.save_file(bare | masks, folder / "model.safetensors")
    assert torch.equal(logits(import_run(str(folder), tmp_path / "b"), ids), expected)
    (folder / "model.safetensors").unlink()
    torch.save(tensors | {"lm_head.weight": tensors["transformer.wte.weight"]}, folder / "pytorch_model.bin")
    with pytest.raises(UserError, match="add --trust"):
        import_run(str(folder), tmp_path / "c")
    assert torch.equal(logits(import_run(str(folder), tmp_path / "c", trust=True), ids), expected)


@pytest.mark.parametrize("bias", [True, False])
def test_logits_equal_nanogpt(tmp_path, tokenizer, bias):
    theirs = NanoGPT(bias)
    path = theirs.checkpoint(tmp_path / "ckpt.pt")
    ids = torch.randint(0, 320, (2, 16))
    run = import_run(str(path), tmp_path / "run", tokenizer=tokenizer, trust=True)
    torch.testing.assert_close(logits(run, ids), theirs(ids), rtol=0, atol=1e-5)
    assert run.config.model.oracles == ("biased" if bias else "plain")
    assert run.env["imported_from"] == {"source": str(path), "sha256": {"ckpt.pt": sha256(path)}}


def test_an_imported_run_generates_and_says_how_to_train_on(gpt2_folder, tmp_path, capsys):
    assert main(["import", str(gpt2_folder), "--out", str(tmp_path / "run")]) == 0
    run = Run(tmp_path / "run")
    text = "Once upon a time"
    assert main(["generate", str(run.path), "--prompt", text, "--tokens", "40"]) == 0  # past the context of 32
    assert capsys.readouterr().out.startswith(text)
    assert main(["train", "--resume", str(run.path)]) == 2
    assert "yuriiformer train ARM --from" in capsys.readouterr().err


def test_vocabulary_and_merges_are_a_tokenizer(folder, tmp_path, tokenizer):
    model = json.loads((folder / "tokenizer.json").read_text())["model"]
    (folder / "tokenizer.json").unlink()
    end = {"<|endoftext|>": len(model["vocab"])}
    (folder / "vocab.json").write_text(json.dumps(model["vocab"] | end))
    (folder / "merges.txt").write_text("#version: 0.2\n" + "\n".join(" ".join(pair) for pair in model["merges"]) + "\n")
    run = import_run(str(folder), tmp_path / "run")
    text = "Once upon a time there was\n\na cat, 3 moons.<|endoftext|>"
    assert run.tokenizer().encode(text).ids == make_tokenizer(tokenizer, ()).encode(text).ids
    first = byte_level_bpe({"<|endoftext|>": 0, "a": 1}, "#version: 0.2\n")  # where it is the first, it stays the first
    assert first.encode("a<|endoftext|>").ids == [1, 0]
    (folder / "merges.txt").write_text("#version: 0.2\nno such\n")
    with pytest.raises(UserError, match="make no tokenizer"):
        import_run(str(folder), tmp_path / "no")


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        ({"model_type": "llama"}, "model_type 'llama'; only 'gpt2'"),
        ({"n_inner": 48}, "n_inner 48; only 96"),
        ({"activation_function": "relu"}, "activation_function 'relu' is not known"),
        ({"layer_norm_epsilon": 1e-6}, "layer_norm_epsilon 1e-06; only 1e-05"),
        ({"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx True; only False"),
        ({"scale_attn_weights": False}, "scale_attn_weights False; only True"),
        ({"tie_word_embeddings": False}, "tie_word_embeddings False; only True"),
        ({"n_head": 5}, "model.heads must divide model.width; got 5 heads, width 24"),
        ({"n_embd": "wide"}, "no whole number n_embd; got 'wide'"),
        ({"n_positions": 64}, "tensor wpe.weight of .* has shape .32, 24.; its config asks for .64, 24."),
        ({"n_layer": 3}, "has no tensor h.2.ln_1.weight, which its config asks for"),
        ({"n_layer": 1}, "has a tensor 'h.1.attn.c_attn.bias' that a GPT-2 of its config does not have"),
        ({"vocab_size": 200}, "300 tokens, the model's table 200 rows"),
        ({"vocab_size": 428}, "300 tokens, the model's table 428 rows"),
    ],
)
def test_a_config_that_is_not_gpt2s_or_does_not_fit_is_refused(folder, tmp_path, keys, said):
    change(folder, **keys)
    with pytest.raises(UserError, match=said):
        import_run(str(folder), tmp_path / "run")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["gpt2"]


def test_damaged_folders_are_refused(folder, tmp_path):
    def refused(said, **options):
        with pytest.raises(UserError, match=said):
            import_run(str(folder), tmp_path / "run", **options)
        assert sorted(p.name for p in tmp_path.iterdir()) == ["gpt2"]

    weights = folder / "model.safetensors"
    whole = weights.read_bytes()
    for size in (len(whole) - 10, 100, 4, 0):
        weights.write_bytes(whole[:size])
        refused("cannot be read, it may be cut short")
    tensors = safetensors.torch.load(whole)
    safetensors.torch.save_file(tensors | {"lm_head.weight": torch.ones(320, 24)}, weights)
    refused("lm_head that is not tied")
    safetensors.torch.save_file(tensors | {"transformer.h.0.adapter": torch.ones(1)}, weights)
    refused("a tensor 'h.0.adapter'")
    (folder / "model.safetensors.index.json").write_text('{"weight_map": {"a": "../b.safetensors"}}')
    refused("names 'b.safetensors', which is not beside it")
    (folder / "model.safetensors.index.json").write_text('{"weights": 3}')
    refused("it has no weight_map")
    (folder / "model.safetensors.index.json").unlink()
    weights.unlink()
    refused("holds no weights")
    weights.write_bytes(whole)
    refused("would be trained anew", tokenizer="bpe:300")
    (folder / "tokenizer.json").write_text("{")
    refused("tokenizer.json cannot be read")
    (folder / "tokenizer.json").unlink()
    refused("brings no tokenizer")
    (folder / "config.json").write_text("{")
    refused("config.json is damaged")
    (folder / "config.json").unlink()
    refused("has no config.json")


def header(*tensors, size=None):
    """A safetensors file of a header, as text, and 16 bytes."""
    text = ("{" + ",".join(tensors) + "}").encode()
    return struct.pack("<Q", len(text) if size is None else size) + text + bytes(16)


def entry(name="a", dtype="F32", shape="[2]", offsets="[0,8]"):
    return f'"{name}":{{"dtype":"{dtype}","shape":{shape},"data_offsets":{offsets}}}'


@pytest.mark.parametrize(
    "content",
    [
        header(entry(), size=1 << 40),
        header(*(entry(str(n), shape="[0]", offsets="[0,0]") for n in range(20_000))),
        header(" " * (2 << 20)),
        header(entry(), entry("b", offsets="[4,12]")),
        header(entry(offsets="[4,12]")),
        header(entry(), entry(offsets="[8,16]")),
        header(entry(shape=f"[{2**62},16]")),
        header(entry(shape="[-2]")),
        header(entry(offsets="[NaN,8]")),
        header(entry(dtype="F99")),
        header(entry(), entry("b", shape="[1]", offsets="[8,16]")),
        struct.pack("<Q", 5) + b"[1,2]",
    ],
    ids=[
        "longer than the file", "20,000 tensors", "2 MB of blanks", "overlap", "gap", "twice", "overflow", "negative",
        "no number", "unknown type", "shape and size", "a list",
    ],
)  # fmt: skip
def test_a_header_that_lies_is_refused(folder, tmp_path, content):
    (folder / "model.safetensors").write_bytes(content)
    with pytest.raises(UserError, match=r"model.safetensors cannot be read") as caught:
        import_run(str(folder), tmp_path / "run")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "run").exists()


class Code:
    def __reduce__(self):
        return os.mkdir, ("carried out",)


def test_a_pt_that_is_no_checkpoint_or_carries_code_is_refused(tmp_path, tokenizer, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "ckpt.pt"

    def refused(said, trust=True, **options):
        with pytest.raises(UserError, match=said) as caught:
            import_run(str(path), tmp_path / "run", trust=trust, **{"tokenizer": tokenizer} | options)
        assert "\n" not in str(caught.value)
        assert [p.name for p in tmp_path.iterdir()] == ["ckpt.pt"], "nothing was run, nothing is left behind"

    good = NanoGPT(bias=False).checkpoint(path).read_bytes()
    refused("add --trust", trust=False)
    refused("brings no tokenizer .*meta.pkl", tokenizer=None)
    NanoGPT(bias=False, vocabulary=640).checkpoint(path)
    refused("257 tokens, the model's table 640 rows", tokenizer="bytes")
    path.write_bytes(good[:-300])
    refused("is no checkpoint of torch, or is cut short")
    for content in (b"", b"some text", pickle.dumps({"model": Code()}, protocol=4)):
        path.write_bytes(content)
        refused("is no checkpoint of torch, or is cut short")
    torch.save({"model": {"wte.weight": Code()}, "model_args": {}}, path)
    refused(r"asks for the code \w+.mkdir; it is refused, and nothing of it was run")
    for other in ([1, 2], {"weight": torch.ones(2)}, {"model": {}, "model_args": 3}):
        torch.save(other, path)
        refused("is no nanoGPT checkpoint: it has no 'model' and 'model_args'")
    model = NanoGPT(bias=False)
    for state in ({"wte.weight": 3}, {1: torch.ones(2)}, [torch.ones(2)]):
        model.checkpoint(path, model=state)
        refused("holds something else than named tensors")
    model.checkpoint(path, model_args=model.arguments | {"bias": True})
    refused("has no tensor h.0.ln_1.bias, which its config asks for")
    model.checkpoint(path, model_args=model.arguments | {"block_size": 8})
    refused(r"wpe.weight .* has shape \(16, 24\); its config asks for \(8, 24\)")


def test_a_name_that_is_no_folder_is_looked_for_on_the_hub(gpt2_folder, tmp_path, monkeypatch):
    """Without a network: the hub's cache serves, and what it lacks is told at once."""
    pytest.importorskip("huggingface_hub")
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")  # nobody answers there
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    cached = tmp_path / "cache" / "models--someone--tiny"
    shutil.copytree(gpt2_folder, cached / "snapshots" / "abc")
    (cached / "refs").mkdir()
    (cached / "refs" / "main").write_text("abc")
    run = import_run("someone/tiny", tmp_path / "run")
    ids = torch.arange(32)[None]
    assert torch.equal(logits(run, ids), logits(import_run(str(gpt2_folder), tmp_path / "same"), ids))
    with pytest.raises(UserError, match=r"someone/other is no folder here, and .* did not give it \(no network\)"):
        import_run("someone/other", tmp_path / "other")
    (cached / "snapshots" / "abc" / "model.safetensors").unlink()
    with pytest.raises(UserError, match=r"did not give it \(no network\)"):
        import_run("someone/tiny", tmp_path / "other")
    with pytest.raises(UserError, match="some/where/else does not exist"):
        import_run("some/where/else", tmp_path / "other")
