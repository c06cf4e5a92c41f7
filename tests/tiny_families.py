"""Tiny models of Hugging Face's families whose files are read in another way than name by name."""

import torch
from helpers import TOKENIZER, VOCABULARY
from transformers import AutoConfig, AutoModelForCausalLM

SMALL = {
    "vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 2, "max_position_embeddings": 512, "bos_token_id": None, "eos_token_id": None, "pad_token_id": None,
}  # fmt: skip
EXPERTS = {"num_experts_per_tok": 2, "moe_intermediate_size": 16, "head_dim": 16}
GLM = {**SMALL, **EXPERTS, "n_routed_experts": 4, "first_k_dense_replace": 1, "n_group": 1, "topk_group": 1}
FAMILIES = {
    "glm4_moe": GLM,  # a router's correction bias, kept in float32
    "deepseek_v3": {**GLM, "head_dim": 8, "q_lora_rank": 8, "kv_lora_rank": 8, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8},
    "gemma4_text": {**SMALL, "head_dim": 16, "num_hidden_layers": 1, "hidden_size_per_layer_input": 0},  # a layer's scale
    "qwen3_moe": {**SMALL, **EXPERTS, "num_experts": 4},
    "gpt_neox": {name: value for name, value in SMALL.items() if name != "num_key_value_heads"},
}  # fmt: skip


def made(family, seed=0, **keys):
    """A tiny model of Hugging Face's, every weight and persistent buffer drawn from `seed`. keys: of its config.json."""
    generator = torch.Generator().manual_seed(seed)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **FAMILIES[family] | keys)).eval()
    with torch.no_grad():
        for tensor in model.state_dict().values():
            tensor.copy_(0.1 + 0.2 * torch.randn(tensor.shape, generator=generator))
    return model


def saved(model, folder):
    model.save_pretrained(folder)
    TOKENIZER.save_pretrained(folder)
    return folder
