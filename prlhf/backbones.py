"""What differs between Hugging Face families: how a model is loaded, its attention, its head, what LoRA adapts.

The model classes are Hugging Face's own. Llama-like families (Llama 2/3, Tulu, SmolLM2, Mistral, Qwen) take a
boolean attention mask through the attention interface; GPT-J has no SDPA there and gets one here. Either takes a dense mask
(SDPA) or FlexAttention's BlockMask, of which only the blocks that anything sees are computed.
"""

import contextlib
import functools
import json
import logging
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from huggingface_hub import snapshot_download
from safetensors import SafetensorError, safe_open
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor, nn
from torch._ops import OpOverload
from torch.nn.attention.flex_attention import BlockMask, create_block_mask
from torch.utils.checkpoint import (
    CheckpointPolicy,
    SelectiveCheckpointContext,
    checkpoint,
    create_selective_checkpoint_contexts,
)
from transformers import (
    AttentionInterface,
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    Cache,
    GenerationConfig,
    GPTJConfig,
    GPTJForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)
from transformers.activations import NewGELUActivation
from transformers.integrations.flex_attention import flex_attention_forward
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.utils import logging as transformers_logging

from prlhf.batching import PreferenceBatch, sees, tree_mask
from prlhf.config import ModelConfig
from prlhf.errors import UserError

transformers_logging.disable_progress_bar()

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
LLAMA_LIKE = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
LORA_TARGETS = {"gptj": ("q_proj", "k_proj", "v_proj", "out_proj", "fc_in", "fc_out")}  # all others: LLAMA_LIKE
GATED_MLPS = ("LlamaMLP", "MistralMLP", "Qwen2MLP", "Qwen3MLP")  # classes that compute what _gated_mlp does


aten = torch.ops.aten
PRODUCTS = {aten.mm.default: 0, aten.addmm.default: 1, aten.bmm.default: 0, aten.baddbmm.default: 1}  # -> left factor
ATTENTION = frozenset(
    (
        aten._scaled_dot_product_flash_attention.default,
        aten._scaled_dot_product_flash_attention_for_cpu.default,
        aten._scaled_dot_product_efficient_attention.default,
        aten._scaled_dot_product_cudnn_attention.default,
    )
)


class Head(NamedTuple):
    """The language-model head: logits = hidden @ weight.T + bias."""

    weight_VD: Tensor
    bias_V: Tensor | None


def head(model: PreTrainedModel) -> Head:
    """The head of a causal LM (GPT-J's has a bias)."""
    layer = model.get_output_embeddings()
    return Head(layer.weight, layer.bias)


def hidden_states(
    model: PreTrainedModel,
    embeddings_RTD: Tensor,
    mask: Tensor | BlockMask,
    positions_RT: Tensor,
    cache: Cache | None = None,
) -> Tensor:
    """Last hidden states (R, T, D), after the final norm: what the head reads.

    mask: boolean (R, 1, T, S), True where a query sees a key, or blocks of it; S counts the cached positions too.
    """
    if isinstance(mask, Tensor):  # from a boolean one each block would make, and keep, what is added to its scores
        mask = torch.zeros(mask.shape, dtype=embeddings_RTD.dtype, device=mask.device).masked_fill_(~mask, -torch.inf)
    output = model.base_model(
        inputs_embeds=embeddings_RTD,
        attention_mask=mask,
        position_ids=positions_RT,
        past_key_values=cache,
        use_cache=cache is not None,
    )
    return output.last_hidden_state


def attention_mask(batch: PreferenceBatch) -> Tensor | BlockMask:
    """What each position of the batch's rows sees (`tree_mask`): blocks for a packed row on a GPU, else dense."""
    if not (batch.packed and batch.input_ids_RT.is_cuda):
        return tree_mask(batch.trees_RT, batch.segments_RT)
    return tree_block_mask(batch)


def takes_flex_attention(model: PreTrainedModel) -> bool:
    """Whether FlexAttention computes this model's attention: heads of 16 or more, and no dropout in it."""
    config = model.config
    heads = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return heads >= 16 and attention_dropout(model) == 0.0


def attention_dropout(model: PreTrainedModel) -> float:
    """The probability of dropout within attention."""
    return getattr(model.config, "attention_dropout", 0.0) or getattr(model.config, "attn_pdrop", 0.0)


def tree_block_mask(batch: PreferenceBatch) -> BlockMask:
    """`tree_mask` as FlexAttention's blocks of 128 x 128 positions."""
    trees_RT, segments_RT = batch.trees_RT, batch.segments_RT

    def mask(row: Tensor, _: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return sees(trees_RT, segments_RT, row, query, key)

    (R, T), device = trees_RT.shape, trees_RT.device
    return create_block_mask(mask, R, None, T, T, device=device, _compile=device.type == "cuda")


def takes_grouped_keys(query: Tensor) -> bool:
    """Whether scaled_dot_product_attention with a mask has a kernel there for fewer key heads than query heads."""
    return query.device.type == "cpu"


def _tree_attention(
    attention: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | BlockMask,
    **options: Any,
) -> tuple[Tensor, Tensor | None]:
    """Hugging Face's attention interface: FlexAttention for a BlockMask, else scaled_dot_product_attention.

    Where several query heads read one key head (GQA), a CPU's kernel takes the keys as they are; Hugging Face's function
    repeats them for it, as kernels for a GPU want it, and the copies would be kept for the backward pass.
    """
    if isinstance(attention_mask, Tensor) and takes_grouped_keys(query):
        output_RHTd = nn.functional.scaled_dot_product_attention(
            query,
            key,
            value,
            attention_mask,
            options.get("dropout", 0.0),
            scale=options.get("scaling"),
            enable_gqa=True,
        )
        return output_RHTd.transpose(1, 2), None
    forward = flex_attention_forward if isinstance(attention_mask, BlockMask) else sdpa_attention_forward
    return forward(attention, query, key, value, attention_mask, **options)


AttentionInterface.register("trees", _tree_attention)


def _gptj_attention(
    attention: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | BlockMask
) -> tuple[Tensor, None]:
    """GPTJAttention._attn, softmax(Q K^T / sqrt(d) + mask) V, by the same two; heads (R, H, T, d) in and out."""
    options = {"dropout": attention.attn_dropout.p if attention.training else 0.0}
    query, key = query.to(value.dtype), key.to(value.dtype)
    output_RTHd, _ = _tree_attention(attention, query, key, value, attention_mask, **options)
    return output_RTHd.transpose(1, 2), None


def use_tree_attention(model: PreTrainedModel) -> PreTrainedModel:
    """Let a model's attention take the masks of `attention_mask`, and compute GPT-J's GELU in one operation."""
    if model.config.model_type == "gptj":
        for block in model.transformer.h:
            block.attn._attn = types.MethodType(_gptj_attention, block.attn)
            if isinstance(block.mlp.act, NewGELUActivation):
                block.mlp.act = nn.GELU(approximate="tanh")
    else:
        model.set_attn_implementation("trees")
    return model


def blocks(model: PreTrainedModel) -> list[nn.Module]:
    """The transformer blocks, in order."""
    return list(model.base_model.h if model.config.model_type == "gptj" else model.base_model.layers)


def elementwise_recomputed(
    narrow: int, attention: frozenset[OpOverload]
) -> tuple[contextlib.AbstractContextManager, contextlib.AbstractContextManager]:
    """Contexts for torch.utils.checkpoint: keep matrix products and the operations `attention`, compute all else again.

    A product over `narrow` or fewer (LoRA's B) is cheaper to compute than to keep. (Selective activation checkpointing:
    Korthikanti et al. 2022, arXiv 2205.05198, section 5, keeps what is dear to compute for its size.)
    """

    def policy(_: SelectiveCheckpointContext, op: OpOverload, *args: Any, **kwargs: Any) -> CheckpointPolicy:
        kept = op in attention or (op in PRODUCTS and args[PRODUCTS[op]].shape[-1] > narrow)
        return CheckpointPolicy.MUST_SAVE if kept else CheckpointPolicy.PREFER_RECOMPUTE

    return create_selective_checkpoint_contexts(policy)


def keep_less(block: nn.Module) -> None:
    """Let a block keep its products' outputs and its attention's for the backward pass, but not what is elementwise within
    RMSNorm and the MLP, which is computed again there. (As Liger does: Hsu et al. 2024, arXiv 2410.10989, section 3.2.)
    An MLP of another class than those known here stays as it is."""
    for module in block.modules():
        kind = type(module).__name__
        if kind.endswith("RMSNorm"):
            module.forward = functools.partial(_computed_again, module.forward)
        elif kind in GATED_MLPS:
            module.forward = types.MethodType(_gated_mlp, module)
        elif kind == "GPTJMLP":
            module.forward = types.MethodType(_gptj_mlp, module)


def _computed_again(function: Callable[..., Tensor], *inputs: Tensor) -> Tensor:
    """function(*inputs), of which the backward pass keeps the inputs alone. A last product is not computed again: the
    recomputation ends with what it has to keep."""
    if not torch.is_grad_enabled():
        return function(*inputs)
    return checkpoint(function, *inputs, use_reentrant=False, preserve_rng_state=False)


def _then_product(layer: nn.Module, function: Callable[..., Tensor], *inputs: Tensor) -> Tensor:
    """layer(function(*inputs)), keeping neither the layer's input nor what leads to it; with LoRA only not the latter, as
    the layer is then more than one product."""
    if isinstance(layer, nn.Linear):
        return _computed_again(lambda *again: layer(function(*again)), *inputs)
    return layer(_computed_again(function, *inputs))


def _gated_mlp(mlp: nn.Module, x: Tensor) -> Tensor:
    """LlamaMLP.forward, W_down (act(W_gate x) * W_up x)."""
    return _then_product(mlp.down_proj, lambda gate, up: mlp.act_fn(gate) * up, mlp.gate_proj(x), mlp.up_proj(x))


def _gptj_mlp(mlp: nn.Module, x: Tensor) -> Tensor:
    """GPTJMLP.forward, W_out act(W_in x)."""
    return mlp.dropout(_then_product(mlp.fc_out, mlp.act, mlp.fc_in(x)))


def prepare_blocks(model: PreTrainedModel, config: ModelConfig, lora_rank: int) -> None:
    """Gradient checkpointing of every n-th block, and torch.compile of each, as the config has it; the blocks with neither
    `keep_less`: a checkpointed block keeps still less, and the compiler chooses by itself."""
    if config.gradient_checkpointing:
        options: dict[str, Any] = {"use_reentrant": False}
        if config.recompute == "elementwise":
            # Attention with dropout draws again, or what is dropped behind it would be other elements than before.
            kept = frozenset() if attention_dropout(model) else ATTENTION
            options["context_fn"] = functools.partial(elementwise_recomputed, lora_rank, kept)
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=options)
        for i, block in enumerate(blocks(model)):
            block.gradient_checkpointing = i % config.checkpoint_every == 0
    for block in blocks(model):
        if config.compile:
            block.compile(dynamic=True)
        elif not (config.gradient_checkpointing and block.gradient_checkpointing):
            keep_less(block)


def load_tokenizer(config: ModelConfig, folder: Path | None = None) -> PreTrainedTokenizerBase:
    """The tokenizer in `folder` or of the model; a byte tokenizer for a random-weight model."""
    if folder is None and config.name is None:
        return byte_tokenizer()
    with _explained(folder or config.name):
        return AutoTokenizer.from_pretrained(str(folder or _expanded(config.name)), trust_remote_code=False)


def load_backbone(config: ModelConfig, tokenizer: PreTrainedTokenizerBase, seed: int) -> PreTrainedModel:
    """The causal LM in config.dtype: from safetensors, or with weights drawn from `seed` where it has no name."""
    if config.name is None:
        return use_tree_attention(random_backbone(config, len(tokenizer), seed))
    return load_weights(config.name, config.dtype)


def load_weights(name: str | Path, dtype: str) -> PreTrainedModel:
    """A causal LM from a folder or hub name. UserError where there is none, or no safetensors in it."""
    with _explained(name):
        model = AutoModelForCausalLM.from_pretrained(
            _expanded(name), dtype=DTYPES[dtype], use_safetensors=True, trust_remote_code=False
        )
    make_savable(model)
    return use_tree_attention(model)


def make_savable(model: PreTrainedModel) -> None:
    """Mend a generation config that transformers reads and then refuses to save: a temperature, say, without sampling."""
    generation = model.generation_config
    try:
        generation.validate(strict=True)
    except ValueError:
        generation.do_sample = True
        try:
            generation.validate(strict=True)
        except ValueError:
            model.generation_config = GenerationConfig.from_model_config(model.config)


def weights_folder(name: str | Path) -> Path:
    """The folder of a model's safetensors: as named, or the hub's, downloaded where it is not there yet."""
    path = Path(_expanded(name))
    if path.is_dir():
        return path
    with _explained(name):
        folder = Path(snapshot_download(str(name), allow_patterns=["*.safetensors", "*.json", "tokenizer*"]))
        if not any(folder.glob("*.safetensors")):
            raise OSError("the hub has no model.safetensors of it")
    return folder


def weight_files(folder: Path) -> list[Path]:
    """The files in `folder` that from_pretrained reads: model.safetensors, else those that its index names; of others, of
    another type say, none. Empty where there is neither."""
    whole, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    if whole.is_file() or not index.is_file():
        return [whole] if whole.is_file() else []
    try:
        files = json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()
        return [folder / name for name in sorted({Path(file).name for file in files})]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{index}: cannot be read ({error})") from None


def word_embeddings(model: PreTrainedModel, folder: Path) -> Tensor:
    """The input embeddings (V, D) of an empty model, as they lie in the one of `weight_files` that has them: what of them
    is not read takes no memory."""
    wanted = model.get_input_embeddings().weight
    name = next(name for name, p in model.named_parameters() if p is wanted)
    files = weight_files(folder)
    for file in files:
        with _explained(folder), safe_open(file, framework="pt") as opened:
            if name in opened.keys():  # noqa: SIM118 (not a dict)
                return opened.get_tensor(name)
    if not files:
        raise UserError(f"model {str(folder)!r}: no model.safetensors and no index of its parts{_conversion(folder)}")
    raise UserError(f"model {str(folder)!r}: no weight {name!r} in its safetensors files")


def empty_backbone(config: ModelConfig, tokenizer: PreTrainedTokenizerBase) -> PreTrainedModel:
    """The causal LM of a config with parameters of config.dtype that have shapes and no values (device meta).

    Buffers, such as rotary frequencies, are real. No weights are read: a named model's config.json says it all.
    """
    if config.name is None:
        with parameters_on_meta(torch.float32):
            return use_tree_attention(random_backbone(config, len(tokenizer), 0))
    dtype = DTYPES[config.dtype]
    with parameters_on_meta(dtype), _explained(config.name):
        described = AutoConfig.from_pretrained(_expanded(config.name), trust_remote_code=False)
        # Made in float32, as from_pretrained makes it: rotary frequencies computed in a half type would be others.
        model = AutoModelForCausalLM.from_config(described, dtype=torch.float32, trust_remote_code=False)
        with contextlib.suppress(OSError):  # not every model has one
            model.generation_config = GenerationConfig.from_pretrained(_expanded(config.name))
    model.config.dtype = dtype
    make_savable(model)
    return use_tree_attention(model.eval())


@contextlib.contextmanager
def parameters_on_meta(dtype: torch.dtype) -> Iterator[None]:
    """Within the context, a module's parameters lose their values as soon as they are registered, and are of `dtype`."""
    register = nn.Module.register_parameter

    def on_meta(module: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
        if parameter is not None and not parameter.is_meta:  # one that is already there is tied
            parameter = nn.Parameter(parameter.detach().to("meta", dtype), parameter.requires_grad)
        register(module, name, parameter)

    nn.Module.register_parameter = on_meta
    try:
        yield
    finally:
        nn.Module.register_parameter = register


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
    backend = Tokenizer(models.BPE(vocabulary, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        clean_up_tokenization_spaces=False,
    )
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ 'assistant:' }}{% endif %}"
    )
    return tokenizer


def choose_device(name: str) -> str:
    """The device of the config's `device`: auto is cuda where there is one. UserError for a cuda that is not there."""
    if name == "cuda" and not torch.cuda.is_available():
        raise UserError("device: found 'cuda', but torch sees no GPU; expected auto or cpu")
    return name if name != "auto" else "cuda" if torch.cuda.is_available() else "cpu"


def check_positions(model: PreTrainedModel, positions: int) -> None:
    """UserError where a sequence of so many positions is more than the model reads (its sliding window counts)."""
    limits = (getattr(model.config, name, None) for name in ("max_position_embeddings", "sliding_window"))
    limit = min(value for value in (*limits, positions) if value is not None)
    if limit < positions:
        raise UserError(
            f"data.max_tokens: a sequence takes {positions} positions, user vectors included, and the model reads {limit}; "
            "expected shorter prompts, responses or --max-new-tokens"
        )


def lora_targets(model: PreTrainedModel, names: tuple[str, ...] | None) -> tuple[str, ...]:
    """`names`, or all linear layers of the blocks for the model's family."""
    return names or LORA_TARGETS.get(model.config.model_type, LLAMA_LIKE)


def _conversion(name: str | Path, reason: str = "") -> str:
    """What to do with a model that has no safetensors, by its folder or by what was said of the hub's; '' where it has."""
    folder = Path(_expanded(name))
    if any(folder.glob("*.safetensors")) or not (any(folder.glob("*.bin")) or "model.safetensors" in reason):
        return ""
    return (
        "; .bin files are never unpickled here. If it has these alone and you trust them, convert them once: "
        f"transformers.AutoModelForCausalLM.from_pretrained({str(name)!r}).save_pretrained(NEW_FOLDER, "
        "safe_serialization=True), and the tokenizer likewise"
    )


def _expanded(name: str | Path) -> str:
    path = Path(name).expanduser()
    return str(path) if path.exists() else str(name)


@contextlib.contextmanager
def _explained(name: str | Path) -> Iterator[None]:
    """Loading errors as one sentence, and transformers' chatter left out."""
    logger = logging.getLogger("transformers")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        reason = str(error).strip().splitlines()[0]
        raise UserError(
            f"model {str(name)!r}: expected a folder or hub name (model.name) of a causal LM with whole safetensors "
            f"and a tokenizer ({reason}){_conversion(name, reason)}"
        ) from None
    finally:
        logger.setLevel(level)
