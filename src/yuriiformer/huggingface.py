"""The core inside Hugging Face transformers: configuration, base model, language model.

`export` writes this file and what it needs of the core into one file, so it may lean on the core, torch and
transformers alone. Importing it registers the classes: exported folders then load without their own code.
"""

from __future__ import annotations

import itertools
from dataclasses import asdict
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    DynamicCache,
    GenerationMixin,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.masking_utils import create_causal_mask
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from .config import ModelConfig
from .model import LanguageModel, Streams, checked, oracle_calls
from .oracle import Attend


class YuriiFormerConfig(PreTrainedConfig):
    """The core's ModelConfig under `model`, and what other libraries read, derived from it.

    `num_hidden_layers` is the number of attention calls: that many keys and values a cache must hold.
    """

    model_type = "yuriiformer"
    has_no_defaults_at_init = True
    keys_to_ignore_at_inference = ["past_key_values"]

    model: dict[str, Any] | None = None
    vocab_size: int = 0
    hidden_size: int = 0
    intermediate_size: int = 0
    num_attention_heads: int = 0
    num_key_value_heads: int = 0
    head_dim: int = 0
    num_hidden_layers: int = 0
    max_position_embeddings: int = 0
    use_cache: bool = True
    tie_word_embeddings: bool = True
    bos_token_id: int | None = None
    eos_token_id: int | None = None
    pad_token_id: int | None = None

    def __post_init__(self, **others: Any) -> None:
        if self.model is None:
            raise ValueError("YuriiFormerConfig needs model={...}, the fields of the core's ModelConfig.")
        core = checked(ModelConfig(**self.model))
        self.model = asdict(core)
        self.vocab_size, self.hidden_size, self.intermediate_size = core.vocabulary, core.width, 4 * core.width
        self.num_attention_heads = self.num_key_value_heads = core.heads
        self.head_dim = core.width // core.heads
        self.num_hidden_layers = core.layers * oracle_calls(core)["attn"]
        self.max_position_embeddings = core.context
        super().__post_init__(**others)


class AttentionCall(nn.Module):
    """One of the attention calls of a forward pass: transformers' cache and the chosen kernel. It holds no weights."""

    is_causal, num_key_value_groups = True, 1

    def __init__(self, config: YuriiFormerConfig, number: int) -> None:
        super().__init__()
        self.config, self.layer_idx = config, number
        self.head_dim = config.head_dim
        self.scaling = config.head_dim**-0.5

    def forward(self, q: Tensor, k: Tensor, v: Tensor, mask: Any, past: Any, **kwargs: Any) -> Tensor:
        """(batch, heads, time, head width) each, and so is the answer."""
        if past is not None:
            k, v = past.update(k, v, self.layer_idx)
        kernel = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, eager_attention)
        y, _ = kernel(self, q, k, v, mask, dropout=0.0, scaling=self.scaling, **kwargs)
        batch, heads, time, _ = q.shape
        return y.reshape(batch, time, heads, -1).transpose(1, 2)


def eager_attention(
    call: nn.Module, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scaling: float, **kwargs: Any
) -> tuple[Tensor, Tensor]:
    """(batch, heads, time, head width) each; the mask is added to the scores."""
    scores = q @ k.mT * scaling
    weights = (scores if mask is None else scores + mask).softmax(-1, torch.float32).to(q.dtype)
    return (weights @ v).transpose(1, 2), weights


class YuriiFormerPreTrainedModel(PreTrainedModel):
    config_class = YuriiFormerConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["Layer"]
    _skip_keys_device_placement = ["past_key_values"]
    _supports_sdpa = _supports_flash_attn = _supports_flex_attn = _supports_attention_backend = True
    _can_compile_fullgraph = True

    @property
    def _core(self) -> LanguageModel:
        return cast(YuriiFormerModel, self.base_model).core

    @torch.no_grad()
    def initialize_weights(self) -> None:
        """The core's initial weights, for every tensor that was not loaded."""
        core = self._core
        new = {k: t for k, t in core.state_dict(keep_vars=True).items() if not getattr(t, "_is_hf_initialized", False)}
        if new:
            fresh = LanguageModel(core.config).state_dict()
            for name, tensor in new.items():
                tensor.copy_(fresh[name])

    def get_input_embeddings(self) -> nn.Module:
        return self._core.input.token

    def set_input_embeddings(self, value: nn.Module) -> None:
        self._core.input.token = cast(nn.Embedding, value)

    def resize_token_embeddings(self, new_num_tokens: int | None = None, *args: Any, **kwargs: Any) -> nn.Embedding:
        if new_num_tokens not in (None, self.config.vocab_size):
            raise ValueError(
                f"the vocabulary of this model is {self.config.vocab_size}; its velocity has token tables of its own, "
                "so it cannot be resized. Use the tokenizer that came with it."
            )
        return self._core.input.token


class YuriiFormerModel(YuriiFormerPreTrainedModel):
    """Token ids to what the head reads."""

    def __init__(self, config: YuriiFormerConfig) -> None:
        super().__init__(config)
        self.core = LanguageModel(ModelConfig(**cast(dict, config.model)), seed=None)
        self.calls = nn.ModuleList(AttentionCall(config, i) for i in range(config.num_hidden_layers))
        self.gradient_checkpointing = False
        self.post_init()

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Any = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPast:
        """(batch, time) ids. Hidden states, where asked for, are the state stream x before and after each layer."""
        if input_ids is None or inputs_embeds is not None:
            raise ValueError("give input_ids: the streams start from several token tables, so inputs_embeds cannot do.")
        recompute = self.gradient_checkpointing and self.training
        if use_cache is None:
            use_cache = self.config.use_cache
        if recompute:
            use_cache, past_key_values = False, None
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache(config=self.config)
        if position_ids is None:
            past = 0 if past_key_values is None else past_key_values.get_seq_length()
            position_ids = (torch.arange(input_ids.shape[1], device=input_ids.device) + past).unsqueeze(0)
        if input_ids.device.type == "cpu" and not torch.compiler.is_compiling():
            last, room = int(position_ids.max()), self.config.max_position_embeddings
            if last >= room:
                raise ValueError(f"position {last} is past the model's context of {room} tokens; give a shorter text.")

        streams = self.core.start(input_ids, position_ids)
        mask = create_causal_mask(
            config=self.config,
            inputs_embeds=streams[0],
            attention_mask=attention_mask,
            past_key_values=past_key_values,
            position_ids=position_ids,
        )
        kwargs |= {"mask": mask, "past": past_key_values, "position_ids": position_ids}
        states = [streams[0]]
        each = len(self.calls) // len(self.core.layers)
        for index, layer in enumerate(self.core.layers):

            def step(streams: Streams, layer: nn.Module = layer, first: int = each * index) -> Streams:
                return layer(streams, self._attend(first, **kwargs))

            streams = self._gradient_checkpointing_func(step, streams) if recompute else step(streams)
            states.append(streams[0])
        hidden = self.core.read(streams)
        if output_hidden_states is None:
            output_hidden_states = self.config.output_hidden_states
        return BaseModelOutputWithPast(
            last_hidden_state=hidden,
            past_key_values=past_key_values if use_cache else None,
            hidden_states=(*states[:-1], hidden) if output_hidden_states else None,
        )

    def _attend(self, first: int, **kwargs: Any) -> Attend:
        """The attention of a layer whose first call has this number."""
        numbers = itertools.count(first)

        def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return self.calls[next(numbers)](q, k, v, **kwargs)

        return attend


class YuriiFormerForCausalLM(YuriiFormerPreTrainedModel, GenerationMixin):
    """Token ids to logits, and the loss where labels are given (the same ids: they are shifted inside)."""

    _tied_weights_keys = {"lm_head.weight": "model.core.input.token.weight"}

    def __init__(self, config: YuriiFormerConfig) -> None:
        super().__init__(config)
        self.model = YuriiFormerModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Any = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        out = self.model(
            input_ids, attention_mask, position_ids, past_key_values, inputs_embeds, use_cache=use_cache, **kwargs
        )
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(out.last_hidden_state[:, kept])
        loss = None
        if labels is not None:
            loss = self.loss_function(logits, labels, vocab_size=self.config.vocab_size, **kwargs)
        return CausalLMOutputWithPast(
            loss=loss, logits=logits, past_key_values=out.past_key_values, hidden_states=out.hidden_states
        )


AutoConfig.register(YuriiFormerConfig.model_type, YuriiFormerConfig, exist_ok=True)
AutoModel.register(YuriiFormerConfig, YuriiFormerModel, exist_ok=True)
AutoModelForCausalLM.register(YuriiFormerConfig, YuriiFormerForCausalLM, exist_ok=True)
