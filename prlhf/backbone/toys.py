"""Small models with random weights and a byte tokenizer, for tests and for trying things. They need no file."""

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    GPTJConfig,
    GPTJForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from prlhf.config.keys import ModelConfig

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def random_backbone(config: ModelConfig, vocabulary: int, seed: int) -> PreTrainedModel:
    """A small Llama or GPT-J with weights drawn from `seed`, for tests and for trying things."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        if config.family == "gptj":
            gptj = GPTJConfig(
                vocab_size=vocabulary, n_embd=config.width, n_layer=config.layers, n_head=config.heads,
                rotary_dim=config.width // config.heads // 2 // 2 * 2 or None, n_positions=4096,
                resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, tie_word_embeddings=False,
                bos_token_id=None, eos_token_id=None,
            )  # fmt: skip
            model: PreTrainedModel = GPTJForCausalLM(gptj)
        else:
            llama = LlamaConfig(
                vocab_size=vocabulary, hidden_size=config.width, num_hidden_layers=config.layers,
                num_attention_heads=config.heads,
                num_key_value_heads=config.heads if config.heads % 2 else config.heads // 2,
                intermediate_size=4 * config.width, max_position_embeddings=4096,
                bos_token_id=None, eos_token_id=None,
            )  # fmt: skip
            model = LlamaForCausalLM(llama)
    return model.to(DTYPES[config.dtype])


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer with one token a byte, BOS, EOS, PAD and a small chat template; needs no file."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: i for i, token in enumerate(["<pad>", "<s>", "</s>", *alphabet])}
    inner = Tokenizer(models.BPE(vocabulary, merges=[]))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=inner, bos_token="<s>", eos_token="</s>", pad_token="<pad>", clean_up_tokenization_spaces=False
    )
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ 'assistant:' }}{% endif %}"
    )
    return tokenizer
