"""The exported folder in transformers: the same numbers as ours, and what its users do with it."""

import ast
import json
import shutil
import sys
from pathlib import Path

import pytest
import torch
from conftest import COMBINATIONS, SMALL

from yuriiformer.config import ModelConfig, override
from yuriiformer.data.corpus import Corpus
from yuriiformer.data.tokenizer import make_tokenizer
from yuriiformer.errors import UserError
from yuriiformer.flatten import flatten
from yuriiformer.model import LanguageModel
from yuriiformer.rule import all_rules
from yuriiformer.signals import Stop
from yuriiformer.training.loop import train
from yuriiformer.training.run import Run, definite

transformers = pytest.importorskip("transformers", reason="the extra huggingface is not installed")
from yuriiformer.export import check, export, model_card, modeling_source, write_model  # noqa: E402

VARIANTS = [
    *({"rule": rule, "splitting": s, "options": options} for rule, s, options in (p.values[0] for p in COMBINATIONS)),
    *({"rule": "nesterov", "velocity_start": start} for start in ("zeros", "x0", "linear")),
    {"rule": "nesterov", "coefficients": "fixed", "second_table": True, "learn_x0_scale": True},
    {"rule": "nesterov", "coefficients": "free", "velocity_norm": "none", "x0_scale": 3.0, "oracles": "gpt2"},
    {"rule": "gradient_descent", "oracles": "biased"},
    {"rule": "nesterov", "oracles": "tied"},
]


def perturbed(config: ModelConfig) -> LanguageModel:
    """A model of which no tensor has its initial value, so that one that is not written or not loaded shows."""
    model = LanguageModel(config)
    generator = torch.Generator().manual_seed(1)
    for tensor in model.state_dict().values():
        tensor += 0.1 * torch.randn(tensor.shape, generator=generator)
    return model


def test_every_rule_splitting_and_variant_loads_back_equal(tmp_path):
    tokenizer = make_tokenizer("bytes", [])
    size = SMALL | {"vocabulary": 320}
    cores = [perturbed(ModelConfig(**{"splitting": "auto"} | variant | size)) for variant in VARIANTS]
    folders = [tmp_path / str(i) for i in range(len(cores))]
    for core, folder in zip(cores, folders, strict=True):
        write_model(core, tokenizer, folder)
    for found in check(cores, folders):
        assert found["logits"] == 0  # bit-equal: the same operations in the same order
        assert found["left_padded"] < 1e-5
        assert found["cached_equals_uncached"]


def test_a_difference_is_found(tmp_path):
    core = perturbed(ModelConfig(rule="nesterov", **SMALL | {"vocabulary": 320}))
    write_model(core, make_tokenizer("bytes", []), tmp_path / "m")
    with torch.no_grad():
        core.layers[0].mlp.out.weight[0, 0] += 0.01
    with pytest.raises(UserError, match="does not compute what the run computes"):
        check([core], [tmp_path / "m"])


@pytest.mark.parametrize("rule", all_rules().values(), ids=lambda r: r.name)
def test_the_modelling_file_needs_only_torch_and_transformers(rule):
    tree = ast.parse(modeling_source(rule))
    modules = {a.name for n in ast.walk(tree) if isinstance(n, ast.Import) for a in n.names}
    modules |= {n.module or "." for n in ast.walk(tree) if isinstance(n, ast.ImportFrom)}
    assert {m.split(".")[0] for m in modules} - sys.stdlib_module_names == {"torch", "transformers"}
    names = {node.name for node in tree.body if isinstance(node, ast.ClassDef | ast.FunctionDef)}
    assert rule.name in names
    assert not names & (set(all_rules()) - {rule.name} | {"all_rules", "TrainingConfig"})


def test_flatten_takes_what_is_needed_in_order(tmp_path):
    a, b = tmp_path / "a.py", tmp_path / "b.py"
    a.write_text("import math\nimport json\n\n# of a circle\nTAU = math.tau  # twice pi\n\ndef unused():\n    json\n")
    b.write_text("from .a import TAU\n\ndef round(r):\n    return TAU * r\n")
    text = flatten([a, b], ["round"], {})
    assert "# of a circle\nTAU = math.tau  # twice pi" in text
    assert "json" not in text
    scope: dict = {}
    exec(compile(text, "flat", "exec"), scope)
    assert scope["round"](2) == scope["TAU"] * 2
    b.write_text("TAU = 1\n")
    with pytest.raises(UserError, match=r"b.py defines 'TAU', and so does .*a.py; rename it"):
        flatten([a, b], ["TAU"], {})


@pytest.fixture(scope="module")
def run(corpus: Corpus, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A trained Strang model: two attention calls a layer."""
    from yuriiformer.config import Config, TrainingConfig

    training = TrainingConfig(
        steps=12, batch=4, evaluate_sequences=8, checkpoint_every=4, device="cpu", precision="fp32", compile="no"
    )
    model = ModelConfig(rule="nesterov", splitting="strang", **SMALL | {"vocabulary": 320, "context": 48})
    config = Config(corpus=str(corpus.path), model=model, training=training)
    run = Run.create(tmp_path_factory.mktemp("runs") / "run", config, corpus)
    train(run, Stop())
    return run


@pytest.fixture(scope="module")
def folder(run: Run, tmp_path_factory: pytest.TempPathFactory) -> Path:
    target = tmp_path_factory.mktemp("exports") / "export"
    export(run, target)
    return target


@pytest.fixture
def hf(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(transformers.dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    return transformers.AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True).eval()


@pytest.fixture
def tokens() -> torch.Tensor:
    return torch.randint(0, 300, (2, 20), generator=torch.Generator().manual_seed(2))


def test_the_card_has_the_measured_numbers(run, folder):
    card = (folder / "README.md").read_text()
    summary = json.loads((run.path / "summary.json").read_text())
    assert f"{summary['final_validation']:.4f} nats per token" in card
    assert f"{sum(summary['parameters'].values()):,}" in card


def test_it_loads_without_its_own_code_where_the_package_is(folder, run, tokens):
    import yuriiformer.huggingface  # noqa: F401

    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    assert type(model).__module__ == "yuriiformer.huggingface"
    assert torch.equal(model(tokens).logits, run.load()[0](tokens))


def test_logits_loss_and_hidden_states_are_ours(hf, run, tokens):
    core = run.load()[0]
    out = hf(tokens, labels=tokens, output_hidden_states=True)
    assert torch.equal(out.logits, core(tokens))
    torch.testing.assert_close(out.loss, core.loss(tokens[:, :-1], tokens[:, 1:]))
    assert len(out.hidden_states) == core.config.layers + 1
    assert torch.equal(out.hidden_states[-1], core.hidden(tokens))
    assert torch.equal(hf(tokens, logits_to_keep=3).logits, out.logits[:, -3:])
    assert torch.equal(hf.model(tokens).last_hidden_state, core.hidden(tokens))


def test_attention_kernels_agree(hf, tokens):
    expected = hf(tokens).logits
    hf.set_attn_implementation("eager")
    torch.testing.assert_close(hf(tokens).logits, expected, rtol=0, atol=2e-6)
    mask = torch.ones_like(tokens)
    mask[0, :4] = 0
    padded = hf(tokens, attention_mask=mask).logits
    hf.set_attn_implementation("sdpa")
    torch.testing.assert_close(hf(tokens, attention_mask=mask).logits[:, 4:], padded[:, 4:], rtol=0, atol=2e-6)


def test_generation_in_all_its_ways(hf, tokens, folder):
    greedy = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": None}
    alone = [hf.generate(row[None], **greedy)[0, len(row) :] for row in (tokens[0, :9], tokens[1, :5])]
    padded = torch.full((2, 9), 5)
    mask = torch.zeros_like(padded)
    padded[0], mask[0] = tokens[0, :9], 1
    padded[1, 4:], mask[1, 4:] = tokens[1, :5], 1
    together = hf.generate(padded, attention_mask=mask, **greedy)[:, 9:]
    assert torch.equal(together, torch.stack(alone))
    static = hf.generate(tokens[:1, :9], cache_implementation="static", disable_compile=True, **greedy)
    assert torch.equal(static[0, 9:], alone[0])
    beams = [hf.generate(tokens[:, :9], num_beams=3, use_cache=cached, **greedy) for cached in (True, False)]
    assert torch.equal(*beams)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
    text = "a small grey cat"
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    assert tokenizer.eos_token == "<|endoftext|>"


def test_past_the_context_is_one_clear_line(hf, tokens):
    with pytest.raises(ValueError, match="position 48 is past the model's context of 48 tokens"):
        hf.generate(tokens, max_new_tokens=40, do_sample=False, eos_token_id=None)


def test_recomputed_activations_give_the_same_gradients(hf, tokens):
    def gradients() -> list[torch.Tensor]:
        hf.zero_grad()
        hf(tokens, labels=tokens).loss.backward()
        return [p.grad.clone() for p in hf.parameters()]

    hf.train()
    expected = gradients()
    hf.gradient_checkpointing_enable()
    assert all(map(torch.equal, gradients(), expected))


def test_it_compiles_as_one_graph(hf, tokens):
    compiled = torch.compile(hf.forward, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(tokens, use_cache=False).logits, hf(tokens).logits)


def test_a_model_from_the_configuration_starts_as_ours(folder, run, tmp_path, monkeypatch):
    monkeypatch.setattr(transformers.dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    config = transformers.AutoConfig.from_pretrained(folder, trust_remote_code=True)
    model = transformers.AutoModelForCausalLM.from_config(config, trust_remote_code=True)
    ours = LanguageModel(run.config.model).state_dict()
    assert all(torch.equal(tensor, ours[name]) for name, tensor in model.model.core.state_dict().items())
    assert model.lm_head.weight is model.model.core.input.token.weight


def test_fine_tuning_with_trainer_and_loading_again(hf, tokens, tmp_path):
    rows = [{"input_ids": row, "labels": row} for row in tokens.repeat(8, 1)]
    before = hf(tokens, labels=tokens).loss.item()
    settings = transformers.TrainingArguments(
        tmp_path / "trainer", max_steps=8, learning_rate=1e-2, per_device_train_batch_size=4,
        report_to=[], save_strategy="no", use_cpu=True, disable_tqdm=True,
    )  # fmt: skip
    trainer = transformers.Trainer(hf, settings, train_dataset=rows)
    trainer.train()
    hf.eval()
    after = hf(tokens, labels=tokens).loss.item()
    assert after < before - 0.5
    trainer.save_model(tmp_path / "tuned")
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "tuned", trust_remote_code=True).eval()
    assert torch.equal(again(tokens).logits, hf(tokens).logits)
    assert again.config.auto_map["AutoModel"].endswith("modeling_yuriiformer.YuriiFormerModel")


def test_peft_lora(hf, tokens, tmp_path):
    peft = pytest.importorskip("peft", reason="peft is not installed")
    expected = hf(tokens).logits
    model = peft.get_peft_model(hf, peft.LoraConfig(r=4, target_modules=["qkv", "up"], task_type="CAUSAL_LM"))
    torch.testing.assert_close(model(tokens).logits, expected)  # an adapter starts at zero
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    for _ in range(10):
        loss = model(tokens, labels=tokens).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    tuned = model(tokens).logits
    assert not torch.allclose(tuned, expected, atol=1e-2)
    merged = model.merge_and_unload()
    torch.testing.assert_close(merged(tokens).logits, tuned, rtol=1e-4, atol=1e-4)


def test_a_rule_file_from_outside_goes_into_the_folder(corpus, config, tmp_path):
    rule = tmp_path / "drifting.py"
    source = Path(sys.modules["yuriiformer.rules.heavy_ball"].__file__).read_text()
    source = source.replace("from ..rule", "from yuriiformer.rule").replace("heavy_ball", "drifting")
    rule.write_text(
        source.replace("    v = norm(", "    v = norm(_twice *").replace("@rule", "_twice = 2.0\n\n\n@rule")
    )
    config, _ = definite(override(config, {"model.rule": str(rule)}), corpus)
    run = Run.create(tmp_path / "run", config, corpus)
    train(run, Stop())
    export(run, tmp_path / "out")
    assert "_twice = 2.0" in (tmp_path / "out/modeling_yuriiformer.py").read_text()
    assert str(tmp_path) not in (tmp_path / "out/config.json").read_text() + (tmp_path / "out/README.md").read_text()


def test_what_cannot_be_exported_is_one_line(corpus, config, tmp_path):
    fresh = Run.create(tmp_path / "fresh", definite(config, corpus)[0], corpus)
    with pytest.raises(UserError, match="is at step 0 of 12; finish it"):
        export(fresh, tmp_path / "out")
    with pytest.raises(UserError, match="has no checkpoint yet"):
        export(fresh, tmp_path / "out", unfinished=True)
    (tmp_path / "full").mkdir()
    (tmp_path / "full/note").write_text("mine")
    with pytest.raises(UserError, match="is not empty"):
        export(fresh, tmp_path / "full")
    assert not (tmp_path / "out").exists()


def test_a_tokenizer_with_too_many_tokens_is_refused(run, tmp_path):
    copy = tmp_path / "run"
    shutil.copytree(run.path, copy)
    make_tokenizer("bpe:400", ["a cat and a moon " * 50 + "".join(map(chr, range(200, 500)))] * 3).save(
        str(copy / "tokenizer.json")
    )
    with pytest.raises(UserError, match=r"the tokenizer has \d+ tokens, the model 320"):
        export(Run(copy), tmp_path / "out")


def test_a_card_without_numbers_says_so(run, tmp_path):
    copy = tmp_path / "run"
    shutil.copytree(run.path, copy)
    (copy / "summary.json").unlink()
    card = model_card(Run(copy), run.load()[0], dict.fromkeys(("logits", "left_padded"), 0.0) | {
        "transformers": "5", "torch": "2", "cached_equals_uncached": True})  # fmt: skip
    assert "there are no measured numbers" in card
