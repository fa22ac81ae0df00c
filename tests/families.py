"""Tiny models of many families, from their configuration classes."""

import inspect

import torch
import transformers

SIZES = dict(
    vocab_size=128, hidden_size=32, intermediate_size=48, num_hidden_layers=4,
    num_attention_heads=4, num_key_value_heads=2, head_dim=8, max_position_embeddings=256,
    pad_token_id=0, bos_token_id=1, eos_token_id=2, initializer_range=0.4,
)  # fmt: skip
MOE = dict(num_experts=4, num_local_experts=4, num_experts_per_tok=2, moe_intermediate_size=16)
WINDOW = dict(sliding_window=8, use_sliding_window=True)
STATES = dict(mamba_n_heads=4, mamba_d_head=16, mamba_d_state=8, mamba_n_groups=1, mamba_d_conv=4)

# family: (name of its configuration class, what differs from SIZES)
FAMILIES = {
    "llama": ("LlamaConfig", {}),
    "mistral, window": ("MistralConfig", WINDOW),
    "mixtral, experts": ("MixtralConfig", MOE),
    "qwen2": ("Qwen2Config", {}),
    "qwen3": ("Qwen3Config", {}),
    "qwen3, experts": ("Qwen3MoeConfig", MOE),
    "qwen3 next, linear attention": (
        "Qwen3NextConfig",
        MOE | dict(linear_num_key_heads=2, linear_num_value_heads=4, linear_key_head_dim=8,
                   linear_value_head_dim=8, shared_expert_intermediate_size=16),
    ),
    "qwen3.5, linear attention": (
        "Qwen3_5TextConfig",
        dict(linear_num_key_heads=2, linear_num_value_heads=4, linear_key_head_dim=8,
             linear_value_head_dim=8),
    ),
    "gemma2, window, soft cap": ("Gemma2Config", dict(sliding_window=8)),
    "gemma3, window": ("Gemma3TextConfig", dict(sliding_window=8)),
    "gemma3n, shared keys": (
        "Gemma3nTextConfig",
        dict(sliding_window=8, num_kv_shared_layers=2, vocab_size_per_layer_input=128,
             hidden_size_per_layer_input=8, laurel_rank=4, altup_num_inputs=2,
             intermediate_size=[48] * 4, activation_sparsity_pattern=[0.0] * 4,
             layer_types=["sliding_attention", "full_attention"] * 2),
    ),
    "gemma4, shared keys": (
        "Gemma4TextConfig",
        dict(sliding_window=8, num_kv_shared_layers=2, vocab_size_per_layer_input=128,
             hidden_size_per_layer_input=8, global_head_dim=8,
             layer_types=["sliding_attention", "full_attention"] * 2),
    ),
    "lfm2, convolutions": (
        "Lfm2Config",
        dict(layer_types=["conv", "full_attention"] * 2, conv_L_cache=3, block_ff_dim=48),
    ),
    "granite": ("GraniteConfig", {}),
    "granite 4, states": (
        "GraniteMoeHybridConfig",
        MOE | STATES | dict(layer_types=["mamba", "attention"] * 2, shared_intermediate_size=32,
                            mamba_expand=2),
    ),
    "falcon h1, states": ("FalconH1Config", STATES | dict(mamba_d_ssm=64, mamba_expand=2)),
    "mamba": ("MambaConfig", dict(state_size=8, expand=2, conv_kernel=4)),
    "mamba2": (
        "Mamba2Config",
        dict(state_size=8, expand=2, conv_kernel=4, num_heads=8, head_dim=8, n_groups=1),
    ),
    "bamba, states": ("BambaConfig", STATES | dict(attn_layer_indices=[1, 3], mamba_expand=2)),
    "jamba, states": (
        "JambaConfig",
        MOE | dict(attn_layer_period=2, attn_layer_offset=1, mamba_d_state=8, mamba_d_conv=4,
                   use_mamba_kernels=False),
    ),
    "olmo2": ("Olmo2Config", {}),
    "olmo3, window": ("Olmo3Config", dict(sliding_window=8)),
    "olmoe, experts": ("OlmoeConfig", MOE),
    "gpt-oss, sinks": ("GptOssConfig", MOE | dict(sliding_window=8)),
    "gpt2": ("GPT2Config", dict(n_embd=32, n_layer=4, n_head=4, n_positions=256)),
    "gpt-neox": ("GPTNeoXConfig", {}),
    "opt": ("OPTConfig", dict(ffn_dim=48, word_embed_proj_dim=32)),
    "bloom, alibi": ("BloomConfig", dict(n_layer=4, n_head=4)),
    "falcon": ("FalconConfig", dict(new_decoder_architecture=True, num_kv_heads=2)),
    "phi3": ("Phi3Config", {}),
    "smollm3": ("SmolLM3Config", {}),
    "cohere2, window": ("Cohere2Config", dict(sliding_window=8)),
    "deepseek v3, latent attention": (
        "DeepseekV3Config",
        MOE | dict(n_routed_experts=4, n_group=1, topk_group=1, q_lora_rank=16, kv_lora_rank=16,
                   qk_rope_head_dim=8, qk_nope_head_dim=8, v_head_dim=8, first_k_dense_replace=1,
                   num_key_value_heads=4, n_shared_experts=1),
    ),
}  # fmt: skip


def make(family):
    """A model with random weights, far from uniform, in eval mode."""
    name, changes = FAMILIES[family]
    config_class = getattr(transformers, name)
    values = SIZES | changes
    known = set(inspect.signature(config_class.__init__).parameters)
    annotations = getattr(config_class, "__annotations__", {})
    for parent in config_class.__mro__:
        annotations = annotations | getattr(parent, "__annotations__", {})
    values = {key: value for key, value in values.items() if key in known | set(annotations)}
    torch.manual_seed(0)
    config = config_class(**values)
    return transformers.AutoModelForCausalLM.from_config(config).eval()
