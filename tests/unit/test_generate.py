"""Generation: the cache changes the speed, never the tokens."""

import pytest
import torch

from yuriiformer.config import ModelConfig
from yuriiformer.errors import UserError
from yuriiformer.generate import _choose, generate
from yuriiformer.model import LanguageModel


@pytest.mark.parametrize(
    "settings", [{"temperature": 0}, {"temperature": 1.3, "seed": 5}, {"top_k": 5}, {"top_p": 0.7, "seed": 2}]
)
def test_cache_gives_the_same_tokens_past_the_context(combination, settings):
    model = LanguageModel(ModelConfig(**combination))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():  # far from the initial weights, where all logits are alike
        for parameter in model.parameters():
            parameter.add_(torch.empty(parameter.shape).normal_(0, 0.3, generator=generator))
    prompt = [3, 1, 4, 1, 5]
    with_cache, without = (list(generate(model, prompt, tokens=60, use_cache=c, **settings)) for c in (True, False))
    assert with_cache == without
    assert settings.get("temperature") == 0 or len(set(with_cache)) > 3


def test_window_keeps_its_newest_half():
    """Past the context, the next token is the one a fresh model would give to the newest half."""
    model = LanguageModel(ModelConfig(rule="nesterov", layers=1, heads=1, width=8, context=16, vocabulary=64))
    ids = list(generate(model, [1, 2], tokens=17, temperature=0))
    text = [1, 2, *ids]
    assert ids[15] == next(generate(model, text[17 - 8 : 17], tokens=1, temperature=0))


def draws(logits, n=4000, **settings):
    generator = torch.Generator().manual_seed(0)
    found = torch.tensor(
        [
            _choose(logits, settings.get("temperature", 1.0), settings.get("top_k"), settings.get("top_p"), generator)
            for _ in range(n)
        ]
    )
    return torch.bincount(found, minlength=len(logits)) / n


def test_sampling_follows_the_distribution():
    probabilities = torch.tensor([0.1, 0.5, 0.15, 0.25])
    logits = probabilities.log()
    torch.testing.assert_close(draws(logits), probabilities, atol=0.03, rtol=0)
    hot = (logits / 2).softmax(-1)
    torch.testing.assert_close(draws(logits, temperature=2.0), hot, atol=0.03, rtol=0)
    torch.testing.assert_close(draws(logits, top_k=2), torch.tensor([0, 2 / 3, 0, 1 / 3]), atol=0.03, rtol=0)
    torch.testing.assert_close(draws(logits, top_p=0.76), torch.tensor([0, 0.5, 0.15, 0.25]) / 0.9, atol=0.03, rtol=0)
    assert draws(logits, n=20, top_p=0.01)[1] == 1


@pytest.mark.parametrize("bad", [{"temperature": -1}, {"top_k": 0}, {"top_p": 0.0}, {"top_p": 1.5}])
def test_settings_out_of_range(bad):
    model = LanguageModel(ModelConfig(rule="gradient_descent", layers=1, heads=1, width=8, context=8, vocabulary=64))
    with pytest.raises(UserError, match="allowed"):
        next(generate(model, [1], tokens=1, **bad))
