"""Tiny random models of Hugging Face's causal-LM families, in which every part shows: no weight is zero or one, and what a
family adds to the logits or to attention (softcaps, scales, sinks) is set to something."""

import math
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

# Each family by its model type, with models that people know. Encoders and halves of sequence-to-sequence models that
# AutoModelForCausalLM takes too (BERT, BART, ...) are left out, and what reads images or sound before it reads text.
FAMILIES = {
    "afmoe": "Trinity", "apertus": "Apertus", "arcee": "AFM-4.5B", "aria_text": "Aria (text)", "axk1": "A.X K1", "axk2": "",
    "bamba": "Bamba", "biogpt": "BioGPT", "bitnet": "BitNet b1.58", "bloom": "BLOOM, BLOOMZ", "codegen": "CodeGen",
    "cohere": "Command R, Aya 23", "cohere2": "Command R7B, Command A", "cohere2_moe": "", "cohere_compass_text": "",
    "ctrl": "CTRL", "cwm": "CWM", "dbrx": "DBRX", "deepseek_v2": "DeepSeek-V2", "deepseek_v3": "DeepSeek-V3, R1",
    "deepseek_v32": "DeepSeek-V3.2", "deepseek_v4": "DeepSeek-V4", "diffllama": "DiffLlama", "doge": "Doge",
    "dots1": "dots.llm1", "ernie4_5": "ERNIE 4.5", "ernie4_5_moe": "ERNIE 4.5 MoE", "exaone4": "EXAONE 4",
    "exaone_moe": "K-EXAONE", "falcon": "Falcon 7B", "falcon (new decoder)": "Falcon 40B, Falcon 2",
    "falcon (ALiBi)": "Falcon-RW", "falcon_h1": "Falcon-H1", "falcon_mamba": "Falcon Mamba", "flex_olmo": "FlexOlmo",
    "gemma": "Gemma", "gemma2": "Gemma 2", "gemma3_text": "Gemma 3", "gemma3n_text": "Gemma 3n",
    "gemma4_text": "Gemma 4 E2B, E4B", "gemma4_text (no per-layer embeddings)": "Gemma 4 31B", "gemma4_unified_text": "",
    "glm": "GLM-4-9B", "glm4": "GLM-4-0414", "glm4_moe": "GLM-4.5", "glm4_moe_lite": "GLM-4.7-Flash", "glm_moe_dsa": "GLM-5",
    "gpt2": "GPT-2, DistilGPT2", "gpt_bigcode": "StarCoder, SantaCoder", "gpt_neo": "GPT-Neo, TinyStories",
    "gpt_neox": "Pythia, GPT-NeoX, Dolly", "gpt_neox_japanese": "", "gpt_oss": "gpt-oss", "gptj": "GPT-J",
    "granite": "Granite 3", "granite_swa": "", "granitemoe": "Granite 3 MoE", "granitemoe_swa": "",
    "granitemoehybrid": "Granite 4", "granitemoeshared": "", "helium": "Helium", "hrm_text": "",
    "hunyuan_v1_dense": "Hunyuan 7B", "hunyuan_v1_moe": "Hunyuan-A13B", "hy_v3": "", "hy_v4": "",
    "hyperclovax": "HyperCLOVA X SEED", "inkling_text": "", "jais2": "Jais 2", "jamba": "Jamba", "jetmoe": "JetMoE",
    "kimi_linear": "Kimi Linear", "laguna": "", "lfm2": "LFM2", "lfm2_moe": "LFM2-8B-A1B",
    "llama": "Llama 1 to 3, Tulu, SmolLM2, Vicuna, Yi", "llama4_text": "Llama 4 (text)", "longcat_flash": "LongCat-Flash",
    "mamba": "Mamba", "mamba2": "Mamba 2", "mellum": "Mellum", "mimo_v2_flash": "MiMo-V2-Flash", "minicpm3": "MiniCPM3",
    "minimax": "MiniMax-Text-01", "minimax_m2": "MiniMax-M2", "minimax_m3_vl_text": "", "ministral": "Ministral 8B",
    "ministral3": "Ministral 3", "mistral": "Mistral 7B, Zephyr", "mixtral": "Mixtral", "modernbert-decoder": "Ettin",
    "mpt": "MPT", "nanochat": "nanochat", "nemotron": "Nemotron-4, Minitron", "nemotron_h": "Nemotron-H, Nemotron Nano 2",
    "olmo": "OLMo", "olmo2": "OLMo 2", "olmo3": "OLMo 3", "olmo_hybrid": "OLMo Hybrid", "olmoe": "OLMoE",
    "openai-gpt": "GPT", "opt": "OPT, Galactica", "opt (projected embeddings)": "OPT-350M", "persimmon": "Persimmon",
    "phi": "Phi-1, 1.5, 2", "phi3": "Phi-3, 3.5, 4", "phimoe": "Phi-3.5-MoE", "qwen2": "Qwen1.5, 2, 2.5, R1 distillations",
    "qwen2_moe": "Qwen1.5-MoE, Qwen2-57B-A14B", "qwen3": "Qwen3", "qwen3_5_moe_text": "Qwen3.5 MoE", "qwen3_5_text": "Qwen3.5",
    "qwen3_moe": "Qwen3-30B-A3B", "qwen3_next": "Qwen3-Next", "qwen4_exp_text": "", "recurrent_gemma": "RecurrentGemma",
    "rwkv": "RWKV-4", "seed_oss": "Seed-OSS", "smollm3": "SmolLM3", "solar_open": "Solar Open", "stablelm": "StableLM",
    "starcoder2": "StarCoder2", "vaultgemma": "VaultGemma", "xglm": "XGLM", "xlstm": "xLSTM-7B", "youtu": "Youtu-LLM",
    "zamba": "Zamba", "zamba2": "Zamba2", "zaya": "ZAYA1",
}  # fmt: skip
VOCABULARY, WIDTH, HEADS = 300, 32, 4
# A family takes those of these that its config knows, then its own of OWN.
SMALL: dict[str, Any] = {
    "vocab_size": VOCABULARY, "hidden_size": WIDTH, "intermediate_size": 48, "ffn_dim": 48, "n_inner": 48, "num_layers": 2,
    "num_hidden_layers": 2, "num_attention_heads": HEADS, "num_key_value_heads": 2, "head_dim": WIDTH // HEADS,
    "max_position_embeddings": 512, "sliding_window": 64, "num_experts": 4, "n_routed_experts": 4, "num_local_experts": 4,
    "num_experts_per_tok": 2, "moe_intermediate_size": 16, "n_group": 1, "topk_group": 1, "moe_topk": 2,
    "n_shared_experts": 1, "num_shared_experts": 1, "first_k_dense_replace": 1, "shared_expert_intermediate_size": 16,
    "shared_intermediate_size": 16, "q_lora_rank": 12, "kv_lora_rank": 16, "qk_rope_head_dim": 4, "qk_nope_head_dim": 8,
    "v_head_dim": 8, "index_head_dim": 8, "index_n_heads": 2, "index_topk": 64, "rotary_dim": 4,
    "mamba_d_state": 8, "mamba_n_heads": 8, "mamba_d_head": 8, "mamba_dt_rank": 4, "state_size": 8, "time_step_rank": 4,
    "ssm_state_size": 8, "chunk_size": 8, "mamba_chunk_size": 8, "linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "decoder_layers": 2, "decoder_attention_heads": HEADS, "decoder_ffn_dim": 48, "is_decoder": True,
    "final_logit_softcapping": 3.0, "attn_logit_softcapping": 2.0, "logit_scale": 0.3, "logits_scaling": 3.0,
    "embedding_multiplier": 2.0, "residual_multiplier": 0.7, "attention_multiplier": 0.2, "routed_scaling_factor": 1.5,
    "lm_head_multiplier": 0.4, "key_multiplier": 0.7, "attention_out_multiplier": 0.6, "attention_in_multiplier": 1.3,
    "ssm_in_multiplier": 0.8, "ssm_out_multiplier": 0.6, "mlp_multipliers": [0.7, 0.6], "scale_emb": 2.0, "scale_depth": 1.4,
    "dim_model_base": 12, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
MULTI_LATENT = {"num_key_value_heads": HEADS}
ZAMBA = {"num_hidden_layers": 4, "layers_block_type": ["linear_attention", "hybrid"] * 2}
MAMBA2 = {"num_heads": 8, "head_dim": 8, "n_groups": 2}
GEMMA_3N = {
    "layer_types": ["sliding_attention", "full_attention", "sliding_attention", "full_attention"], "num_hidden_layers": 4,
    "num_kv_shared_layers": 2, "vocab_size_per_layer_input": VOCABULARY, "hidden_size_per_layer_input": 8,
}  # fmt: skip
OWN: dict[str, dict[str, Any]] = {
    "bamba": {"attn_layer_indices": [1]},
    "cohere_compass_text": {
        "layer_types": ["full_attention", "sliding_attention"],
        "rope_parameters": {
            kind: {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [1, 1, 2]}
            for kind in ("full_attention", "sliding_attention")
        },
    },
    "ctrl": {"dff": 48},
    "dbrx": {
        "d_model": WIDTH, "attn_config": {"kv_n_heads": 2, "rope_theta": 10000.0, "clip_qkv": 1.5},
        "ffn_config": {"ffn_hidden_size": 16, "moe_num_experts": 4, "moe_top_k": 2, "hidden_size": WIDTH},
    },
    "deepseek_v4": {
        "o_groups": 2, "o_lora_rank": 8, "num_key_value_heads": 1, "head_dim": 16,
        "compress_rates": {"compressed_sparse_attention": 4, "heavily_compressed_attention": 8},
    },
    "falcon_h1": {"mamba_d_ssm": 64},
    "falcon": {"new_decoder_architecture": False, "multi_query": True},
    "gemma3n_text": GEMMA_3N | {
        "laurel_rank": 8, "intermediate_size": [48] * 4, "activation_sparsity_pattern": [0.95, 0.0, 0.0, 0.0],
    },
    "gemma4_text": GEMMA_3N | {"per_layer_config": {}},
    "gemma4_unified_text": {},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]], "window_size": 256},
    "granitemoehybrid": {"layer_types": ["linear_attention", "full_attention"]},
    "inkling_text": {
        "swa_num_attention_heads": HEADS, "swa_num_key_value_heads": 2, "swa_head_dim": 8, "sliding_window_size": 64,
        "d_rel": 4, "rel_extent": 64,
    },
    "jamba": {"num_hidden_layers": 3, "attn_layer_period": 2, "attn_layer_offset": 1},
    "kimi_linear": MULTI_LATENT | {"linear_head_dim": 8, "linear_num_heads": 4},
    "lfm2": {"layer_types": ["conv", "full_attention"]},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"], "num_dense_layers": 1},
    "llama4_text": {"no_rope_layers": [1, 0], "attn_scale": 0.5},
    "longcat_flash": MULTI_LATENT | {"ffn_hidden_size": 48, "expert_ffn_hidden_size": 16, "zero_expert_num": 2, "head_dim": 4},
    "mamba2": MAMBA2,
    "nemotron_h": {
        "layers_block_type": ["linear_attention", "moe", "full_attention", "mlp"], "num_hidden_layers": 4,
        "mamba_num_heads": 8, "mamba_head_dim": 8, "n_groups": 2, "moe_shared_expert_intermediate_size": 16,
    },
    "qwen4_exp_text": {
        "indexer_n_heads": 2, "indexer_kv_heads": 1, "indexer_head_dim": 8, "indexer_budget": 64, "indexer_compress_ratio": 4,
        "hc_lowrank": 8, "ngram_vocab_size_base": 50, "split_ngram_parts": 1, "ple_embed_dim": 8,
    },
    "recurrent_gemma": {
        "num_hidden_layers": 3, "lru_width": WIDTH, "attention_window_size": 64, "logits_soft_cap": 3.0,
    },
    "youtu": {"pad_token_id": None},  # its loader would set that word's embedding to zero
    "xlstm": {"num_heads": 4, "hidden_size": 128},
    "zamba": ZAMBA | {"n_mamba_heads": 2, "attention_hidden_size": 64, "attention_head_dim": 16, "num_key_value_heads": HEADS},
    "zamba2": ZAMBA | {"mamba_headdim": 8, "n_mamba_heads": 8, "num_key_value_heads": HEADS, "attention_head_dim": 16},
    "zaya": {"num_experts_per_tok": 1, "router_hidden_size": 16},
    "falcon (new decoder)": {"new_decoder_architecture": True, "num_kv_heads": 2},
    "falcon (ALiBi)": {"alibi": True, "multi_query": False},
    "gemma4_text (no per-layer embeddings)": {"hidden_size_per_layer_input": 0},
    "opt (projected embeddings)": {"word_embed_proj_dim": 16},
}  # fmt: skip


def tiny_config(family: str, **changes: Any) -> PretrainedConfig:
    """A small config of one of FAMILIES, and `changes` of it."""
    model_type = family.partition(" ")[0]
    default = CONFIG_MAPPING[model_type]()
    stored = default.to_dict().keys()
    known = stored | default.attribute_map.keys()
    given = {name: value for name, value in SMALL.items() if name in known}
    given |= {name: 0.0 for name in known if name.endswith(("dropout", "pdrop", "dropout_prob", "layerdrop"))}
    if "kv_lora_rank" in known:
        given |= MULTI_LATENT
        del given["head_dim"]
    for name in ("layer_types", "mlp_layer_types"):  # one layer of each kind, at least two
        kinds = list(dict.fromkeys(getattr(default, name, None) or ())) if name in stored else []
        if kinds:
            given[name] = kinds * 2 if len(kinds) == 1 else kinds
            given["num_hidden_layers"] = len(given[name])
    return type(default)(**given | OWN.get(model_type, {}) | OWN.get(family, {}) | changes)


def draw_weights(model: PreTrainedModel) -> None:
    """Matrices of entries N(0, 1.5 / inputs); vectors, norms and correction biases moved by N(0, 0.3^2)."""
    generator = torch.Generator().manual_seed(0)
    parameters = dict(model.named_parameters())
    for name, tensor in sorted(model.state_dict(keep_vars=True).items()):
        if not tensor.is_floating_point() or (name not in parameters and not name.endswith(("bias", "scalar"))):
            continue  # other buffers are constants: frequencies, decays, masks
        noise = torch.randn(tensor.shape, generator=generator)
        with torch.no_grad():
            if tensor.dim() > 1 and "A_log" not in name:
                tensor.copy_(noise * math.sqrt(1.5 / tensor.shape[-1]))
            else:
                tensor.add_(0.3 * noise)
    model.tie_weights()


def tiny_model(family: str, **changes: Any) -> PreTrainedModel:
    """A model of `tiny_config` with weights of `draw_weights`, in eval mode."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(tiny_config(family, **changes))
    draw_weights(model)
    return model.eval()
