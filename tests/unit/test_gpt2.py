"""Gradient descent x Lie-Trotter is GPT-2: the same logits and gradients as transformers' on the same weights."""

import pytest
import torch

from yuriiformer.config import ModelConfig
from yuriiformer.model import LanguageModel

transformers = pytest.importorskip("transformers", reason="transformers is not installed (extra: dev)")


@pytest.fixture
def pair():
    config = transformers.GPT2Config(
        vocab_size=128, n_positions=32, n_embd=48, n_layer=3, n_head=4, activation_function="gelu",
        resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
    )  # fmt: skip
    torch.manual_seed(0)
    theirs = transformers.GPT2LMHeadModel(config)
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            parameter.normal_(0, 0.1) if not name.endswith("bias") else parameter.zero_()
    ours = LanguageModel(ModelConfig(rule="gradient_descent", layers=3, heads=4, width=48, context=32, vocabulary=128))
    with torch.no_grad():
        for mine, other, transposed in weights(ours, theirs):
            mine.copy_(other.T if transposed else other)
    return ours, theirs


def weights(ours, theirs):
    """(our parameter, theirs, whether theirs is stored transposed)"""
    t = theirs.transformer
    yield ours.input.token.weight, t.wte.weight, False
    yield ours.input.position.weight, t.wpe.weight, False
    yield ours.norm.weight, t.ln_f.weight, False
    for mine, other in zip(ours.layers, t.h, strict=True):
        yield mine.attn.norm.weight, other.ln_1.weight, False
        yield mine.attn.qkv.weight, other.attn.c_attn.weight, True
        yield mine.attn.out.weight, other.attn.c_proj.weight, True
        yield mine.mlp.norm.weight, other.ln_2.weight, False
        yield mine.mlp.up.weight, other.mlp.c_fc.weight, True
        yield mine.mlp.out.weight, other.mlp.c_proj.weight, True


def test_same_logits_and_gradients(pair):
    ours, theirs = pair
    ids = torch.randint(0, 128, (2, 32))
    logits, expected = ours(ids), theirs(ids).logits
    torch.testing.assert_close(logits, expected, rtol=0, atol=1e-5)
    for model_logits in (logits, expected):
        torch.nn.functional.cross_entropy(model_logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten()).backward()
    for mine, other, transposed in weights(ours, theirs):
        torch.testing.assert_close(mine.grad, other.grad.T if transposed else other.grad, rtol=1e-4, atol=1e-6)


def test_parameter_count_of_the_paper():
    model = LanguageModel(
        ModelConfig(rule="gradient_descent", layers=12, heads=12, width=768, context=1024, vocabulary=50304)
    )
    assert sum(p.numel() for p in model.parameters()) == 124_373_760
    for name, parameter in model.named_parameters():
        std = parameter.std().item()
        if parameter.ndim == 1:
            assert (parameter == 1).all(), name
        else:
            assert abs(std / (0.02 / 24**0.5 if name.endswith("out.weight") else 0.02) - 1) < 0.02, name
