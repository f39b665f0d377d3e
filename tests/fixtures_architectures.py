"""Tiny random models of many families, with every kind of weight away from its start: biases and norms count."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoModelForCausalLM,
    Cohere2Config,
    CohereConfig,
    DeepseekV3Config,
    Gemma2Config,
    Gemma3TextConfig,
    GemmaConfig,
    GPT2Config,
    GPTNeoXConfig,
    GraniteConfig,
    LlamaConfig,
    MistralConfig,
    MixtralConfig,
    Olmo2Config,
    OPTConfig,
    Phi3Config,
    PhiConfig,
    PreTrainedConfig,
    Qwen2Config,
    Qwen2MoeConfig,
    Qwen3Config,
    Qwen3MoeConfig,
    SmolLM3Config,
    Starcoder2Config,
)

from tests.fixtures_model import make_tokenizer

SPECIAL = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
SMALL = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 256,
    **SPECIAL,
}
GROUPED = SMALL | {"num_key_value_heads": 2}
GPT2 = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 256, **SPECIAL}
WINDOW = 7
"""Shorter than the documents of the tests."""
ALTERNATING = {"sliding_window": WINDOW, "layer_types": ["sliding_attention", "full_attention"]}
LLAMA_LIKE = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
ATTENTION_ONLY = {"q_proj", "k_proj", "v_proj", "o_proj"}


class Family:
    """A configuration, and the last names of the linear modules to adapt and of those to leave.

    `attention` is the kernel that it can run with.
    """

    def __init__(
        self,
        config: Callable[..., PreTrainedConfig],
        linear: set[str],
        *,
        left: Sequence[str] = (),
        attention: str = "sdpa",
        **options: Any,
    ) -> None:
        self.config = config
        self.linear = linear
        self.left = set(left)
        self.attention = attention
        self.options = options

    def make(self, folder: Path, *, how: Mapping[str, Any] | None = None, **changes: Any) -> Path:
        """Save a random model of this family and its tokenizer; `how` goes to save_pretrained."""
        tokenizer = make_tokenizer()
        config = self.config(**{"vocab_size": len(tokenizer), **self.options, **changes})
        save_random(config, folder, **(how or {}))
        tokenizer.save_pretrained(folder)
        return folder


def save_random(
    config: PreTrainedConfig, folder: Path, kind: Any = AutoModelForCausalLM, dtype: Any = torch.float32, **how: Any
) -> None:
    """Save a model whose weights, biases and norms are all random."""
    generator = torch.Generator().manual_seed(0)
    model = kind.from_config(config).to(dtype)
    with torch.no_grad():
        for name, weight in sorted(model.named_parameters()):
            noise = torch.randn(weight.shape, generator=generator)
            if weight.ndim > 1:
                weight.copy_(noise * 0.15)
            else:
                weight.copy_((weight if "norm" in name or "ln_" in name else 0.0) + noise * 0.1)
    model.save_pretrained(folder, **how)


FAMILIES = {
    "llama": Family(LlamaConfig, LLAMA_LIKE, **GROUPED),
    "llama-biased": Family(LlamaConfig, LLAMA_LIKE, **GROUPED, attention_bias=True, mlp_bias=True, head_dim=12),
    "qwen2": Family(Qwen2Config, LLAMA_LIKE, **GROUPED, tie_word_embeddings=True),
    "qwen3": Family(Qwen3Config, LLAMA_LIKE, **GROUPED, head_dim=16),
    "mistral": Family(MistralConfig, LLAMA_LIKE, **GROUPED, sliding_window=WINDOW, head_dim=8),
    "gemma": Family(GemmaConfig, LLAMA_LIKE, **GROUPED, head_dim=16),
    "gemma2": Family(
        Gemma2Config,
        LLAMA_LIKE,
        attention="eager",
        **GROUPED,
        **ALTERNATING,
        head_dim=16,
        query_pre_attn_scalar=12,
        attn_logit_softcapping=2.0,
        final_logit_softcapping=3.0,
    ),
    "gemma3": Family(Gemma3TextConfig, LLAMA_LIKE, **GROUPED, **ALTERNATING, head_dim=16, query_pre_attn_scalar=12),
    "phi": Family(PhiConfig, {"q_proj", "k_proj", "v_proj", "dense", "fc1", "fc2"}, **SMALL, partial_rotary_factor=0.5),
    "phi3": Family(
        Phi3Config,
        {"qkv_proj", "o_proj", "gate_up_proj", "down_proj"},
        **GROUPED,
        sliding_window=WINDOW,
        partial_rotary_factor=0.5,
    ),
    "gpt2": Family(GPT2Config, {"c_attn", "c_proj", "c_fc"}, **GPT2),
    "gpt_neox": Family(
        GPTNeoXConfig,
        {"query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h"},
        **SMALL,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5},
    ),
    "opt": Family(
        OPTConfig,
        {"q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2", "project_in", "project_out"},
        hidden_size=32,
        ffn_dim=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=256,
        word_embed_proj_dim=24,
        do_layer_norm_before=False,
        **SPECIAL,
    ),
    "granite": Family(
        GraniteConfig,
        LLAMA_LIKE,
        **GROUPED,
        embedding_multiplier=3.0,
        attention_multiplier=0.3,
        residual_multiplier=0.5,
        logits_scaling=4.0,
    ),
    "cohere": Family(CohereConfig, LLAMA_LIKE, **GROUPED, logit_scale=0.3, use_qk_norm=True),
    "cohere2": Family(Cohere2Config, LLAMA_LIKE, **GROUPED, **ALTERNATING, logit_scale=0.3),
    "smollm3": Family(SmolLM3Config, LLAMA_LIKE, **GROUPED, no_rope_layers=[1, 0]),
    "starcoder2": Family(
        Starcoder2Config,
        {"q_proj", "k_proj", "v_proj", "o_proj", "c_fc", "c_proj"},
        **GROUPED,
        sliding_window=WINDOW,
        use_bias=True,
    ),
    "olmo2": Family(Olmo2Config, LLAMA_LIKE, **GROUPED),
    "deepseek_v3": Family(
        DeepseekV3Config,
        {"q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj"},
        left=["gate_proj", "up_proj", "down_proj"],
        **SMALL,
        num_key_value_heads=4,
        q_lora_rank=16,
        kv_lora_rank=16,
        qk_nope_head_dim=8,
        qk_rope_head_dim=8,
        v_head_dim=12,
        n_routed_experts=4,
        num_experts_per_tok=2,
        n_group=1,
        topk_group=1,
        moe_intermediate_size=16,
        first_k_dense_replace=1,
    ),
    "mixtral": Family(MixtralConfig, ATTENTION_ONLY, **GROUPED, num_local_experts=4),
    "qwen2_moe": Family(
        Qwen2MoeConfig,
        LLAMA_LIKE | {"shared_expert_gate"},
        **GROUPED,
        num_experts=4,
        num_experts_per_tok=2,
        moe_intermediate_size=16,
        shared_expert_intermediate_size=16,
    ),
    "qwen3_moe": Family(
        Qwen3MoeConfig,
        ATTENTION_ONLY,
        **GROUPED,
        num_experts=4,
        num_experts_per_tok=2,
        moe_intermediate_size=16,
        head_dim=16,
    ),
}
