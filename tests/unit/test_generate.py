"""Generation: the cache changes the speed, never the tokens."""

import pytest
import torch
from conftest import SMALL
from torch._dynamo.testing import CompileCounter

from yuriiformer.cache import KVCache
from yuriiformer.config import ModelConfig
from yuriiformer.errors import UserError
from yuriiformer.generate import _choose, generate, generate_batch
from yuriiformer.model import LanguageModel


@torch.no_grad()
def far_from_initial(model: LanguageModel) -> LanguageModel:
    """At the initial weights all logits are alike."""
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        parameter.add_(torch.empty(parameter.shape).normal_(0, 0.3, generator=generator))
    return model


@pytest.mark.parametrize(
    "settings", [{"temperature": 0}, {"temperature": 1.3, "seed": 5}, {"top_k": 5}, {"top_p": 0.7, "seed": 2}]
)
def test_cache_gives_the_same_tokens_past_the_context(combination, settings):
    model = far_from_initial(LanguageModel(ModelConfig(**combination)))
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


@pytest.mark.parametrize("settings", [{"temperature": 0}, {"seed": 5, "top_k": 20}], ids=["greedy", "sampled"])
@pytest.mark.parametrize("how", [{}, {"use_cache": False}, {"compiled": True}], ids=["cache", "recompute", "compiled"])
def test_a_row_of_a_batch_is_what_it_is_alone(settings, how):
    """Prompts of different lengths, past the context: padding, windows that fill at different times, seeds by row."""
    model = far_from_initial(LanguageModel(ModelConfig(rule="nesterov", **SMALL | {"layers": 1})))
    prompts = [[3, 1, 4, 1, 5], [9, 2], [6, 5, 3, 5, 8, 9, 7, 9, 3, 2, 3, 8]]
    together = list(zip(*generate_batch(model, prompts, tokens=40, **settings | how), strict=True))
    seed = settings.get("seed", 0)
    for row, prompt in enumerate(prompts):
        assert list(together[row]) == list(generate(model, prompt, tokens=40, **settings | {"seed": seed + row}))


def test_decoding_compiles_one_graph_for_all_steps(combination):
    model, counter = far_from_initial(LanguageModel(ModelConfig(**combination))), CompileCounter()
    torch._dynamo.reset()
    step = torch.compile(model.decode, backend=counter, fullgraph=True, dynamic=False)
    ids = torch.randint(0, 64, (2, 12), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        for _ in range(2):  # the second cache shares the first one's graph
            cache = KVCache(model.config.context, torch.device("cpu"))
            model.decode(ids[:, :4], cache)
            logits = [step(ids[:, i : i + 1], cache) for i in range(4, 12)]
    torch.testing.assert_close(torch.stack(logits, 1), model(ids)[:, 4:], rtol=1e-4, atol=1e-4)
    assert counter.frame_count == 1


def draws(logits, n=4000, temperature=1.0, top_k=None, top_p=None):
    uniform = torch.rand(n, generator=torch.Generator().manual_seed(0))
    found = _choose(logits.expand(n, -1), temperature, top_k, top_p, uniform)
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
