"""What prlhf computes of a causal LM beside what Hugging Face's own forward pass says of each sequence alone.

The oracle reads one sequence [BOS, e_u, x, y] at a time as `inputs_embeds` (token ids where there are no user vectors), with no
padding, no cache and eager attention, in a copy of the model that prlhf never touches.
"""

import re
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from prlhf.backbone.loading import load_weights
from prlhf.backbone.lora import lora_layers
from prlhf.backbone.toys import byte_tokenizer
from prlhf.batch.tokens import EncodedComparison
from prlhf.config.keys import Config
from prlhf.config.load import load_config
from prlhf.data.users import UserIndex
from prlhf.errors import UserError
from prlhf.generate.decode import Request, check_decoding, decoder_of
from prlhf.method.build import build_model
from prlhf.method.models import PersonalizedLM
from prlhf.score.agreement import check_agreement
from prlhf.score.score import score
from prlhf.store.final import load_final, save_final

TOKENIZER = byte_tokenizer()
LAYOUTS = ("tree", "packed", "rows")
NATS = 1e-3  # float32 rounds sums of up to seven log-probs to 1e-5; what is wrong here is wrong by more than 1e-2
SHORT, LONG = [1, 40, 92, 7, 133], [1, 12, 250, 33, 8, 71, 199, 64, 5]
COMPARISONS = [
    EncodedComparison(SHORT, SHORT, [17, 222, 9, 54, 130, 2], [88, 31, 2], user=1),
    EncodedComparison(LONG, LONG, [6, 147, 77, 2], [201, 16, 95, 3, 180, 44, 2], user=2),
]
USERS = [c.user for c in COMPARISONS]
REQUESTS = [Request(SHORT, 1, "a"), Request(LONG, 2, "b"), Request(SHORT[:3], 0, "c")]
CONTINUATIONS = [[9, 30, 61, 7], [140, 8, 23, 99], [77, 5, 210, 18]]


class Verdict(NamedTuple):
    """Whether the numbers are right, or refused with a reason; neither: they are wrong, by so much."""

    right: bool
    refused: str | None = None
    difference: float = 0.0

    def __str__(self) -> str:
        return (
            "right" if self.right else f"refused: {self.refused}" if self.refused else f"wrong by {self.difference:.2g}"
        )


def verdict(compute: Callable[[], float], tolerance: float = NATS) -> Verdict:
    """Of the difference that `compute` gives. A UserError is a refusal; its reason is what stands in parentheses."""
    try:
        difference = compute()
    except UserError as error:
        reason = re.search(r"\((.*)\)", str(error), re.DOTALL)
        return Verdict(False, reason.group(1) if reason else str(error))
    return Verdict(difference <= tolerance, difference=difference)


def own_model(folder: Path) -> PreTrainedModel:
    """Hugging Face's model with eager attention, which computes all that a family passes to it (SDPA drops softcaps)."""
    config = AutoConfig.from_pretrained(folder)
    # But Falcon's eager attention adds ALiBi twice: to the mask and to the scores.
    twice = config.model_type == "falcon" and config.alibi
    return AutoModelForCausalLM.from_pretrained(
        folder, attn_implementation="sdpa" if twice else "eager", dtype=torch.float32
    ).eval()


def own_log_probs(own: PreTrainedModel, prefix: list[int], e_UD: Tensor | None, y: list[int]) -> Tensor:
    """log p of every token where it could follow (len(y) + 1, V): at each place of y, and after it. In float64."""
    ids = torch.tensor([[*prefix, *y]])
    inputs = {"input_ids": ids}
    if e_UD is not None:
        row_TD = own.get_input_embeddings()(ids)[0]
        if own.config.model_type == "falcon_h1":  # multiplies the embeddings of ids, and of nothing else
            row_TD = row_TD * own.config.embedding_multiplier
        inputs = {"inputs_embeds": torch.cat([row_TD[:1], e_UD, row_TD[1:]])[None]}
    return own(**inputs, use_cache=False).logits[0, -len(y) - 1 :].double().log_softmax(-1)


def own_sums(own: PreTrainedModel, user_BUD: Tensor | None) -> Tensor:
    """log p(y | x, u) of the chosen and rejected responses of COMPARISONS, (B, 2); without user vectors, log p(y | x)."""
    rows = []
    for b, c in enumerate(COMPARISONS):
        for y in (c.chosen, c.rejected):
            log_probs = own_log_probs(own, c.prefix, None if user_BUD is None else user_BUD[b], y)
            rows.append(sum(log_probs[t, token] for t, token in enumerate(y)))
    return torch.stack(rows).view(-1, 2)


def personalised(folder: Path, layout: str, rank: int = 0) -> tuple[Config, PersonalizedLM]:
    """The model in a folder as a run loads it, with user vectors as large as its word embeddings. All are drawn anew."""
    config = load_config(
        None, (f"model.name={folder}", f"model.layout={layout}", "user_model.tokens=2", f"lora.rank={rank}")
    )
    torch.manual_seed(3)
    model = build_model(config, TOKENIZER, len(USERS), load_weights(folder, "float32")).eval()
    model.user_slot = 1  # the prompts here begin with a BOS
    with torch.no_grad():
        for parameter in model.user_model.parameters():
            parameter.copy_(torch.randn(parameter.shape))
        for layer in lora_layers(model.backbone).values():
            layer.lora_B.copy_(0.3 * torch.randn(layer.lora_B.shape))
    return config, model


def sums(model: PersonalizedLM, users: list[int] | None = USERS) -> Tensor:
    """What `own_sums` says, by prlhf."""
    scored = score(model, COMPARISONS, users, batch_size=4)
    return torch.stack([scored.chosen, scored.rejected], dim=1).double()


def of_layout(folder: Path, own: PreTrainedModel, layout: str) -> Verdict:
    """Once the check at a run's start has let the layout pass: log-probs of known users and of the reference, and the gradient
    of the sum of log-prob differences in the users' vectors, as a part of its length."""

    def compute() -> float:
        _, model = personalised(folder, layout)
        check_agreement(model)
        reference_B2 = own_sums(own, None).detach()
        user_BUD = model.user_model(torch.tensor(USERS)).detach().requires_grad_()
        expected_B2 = own_sums(own, user_BUD)
        (expected_BUD,) = torch.autograd.grad((expected_B2[:, 0] - expected_B2[:, 1]).sum(), user_BUD)
        scored = model(model.collate(COMPARISONS, USERS))
        (scored.chosen - scored.rejected).sum().backward()
        found_BUD = model.user_model.offsets_MUD.grad.to_dense()  # of users 1 and 2, in this order
        differences = [
            (sums(model) - expected_B2).abs().max(),
            (sums(model, None) - reference_B2).abs().max(),
            (found_BUD - expected_BUD).norm() / expected_BUD.norm(),
        ]
        return max(difference.item() for difference in differences)

    return verdict(compute)


def of_decoding(folder: Path, own: PreTrainedModel, layout: str) -> Verdict:
    """The log-probs of all tokens at each place of given continuations of prompts of unequal lengths, decoded as one batch."""

    @torch.no_grad()
    def compute() -> float:
        _, model = personalised(folder, layout)
        check_decoding(model)
        decoder, user_BUD = decoder_of(model, REQUESTS), model.user_model(torch.tensor([r.user for r in REQUESTS]))
        steps = [decoder.prefill(), *(decoder.decode_one_token(torch.tensor(tokens)) for tokens in zip(*CONTINUATIONS))]
        found_BNV = torch.stack(steps, dim=1).double().log_softmax(-1)
        expected = [own_log_probs(own, r.ids, e, y) for r, e, y in zip(REQUESTS, user_BUD, CONTINUATIONS)]
        return (found_BNV - torch.stack(expected)).abs().max().item()

    return verdict(compute)


def of_lora(folder: Path, layout: str, targets: list[str]) -> Verdict:
    """Log-probs with adapters on the default targets, whose names go to `targets`, against W + scale B A in Hugging Face's model."""

    @torch.no_grad()
    def compute() -> float:
        _, model = personalised(folder, layout, rank=2)
        check_agreement(model)
        layers, own = lora_layers(model.backbone), own_model(folder)
        targets.extend(sorted({path.rsplit(".", 1)[-1] for path in layers}))
        for path, layer in layers.items():
            linear = own.get_submodule(path)  # whose weight another layer may share (Zamba)
            linear.weight = nn.Parameter(linear.weight + layer.scale * layer.lora_B @ layer.lora_A)
        return (sums(model) - own_sums(own, model.user_model(torch.tensor(USERS)))).abs().max().item()

    return verdict(compute)


def of_final(folder: Path, layout: str) -> Verdict:
    """After full fine-tuning, here a step of noise in all that the model stores, `final/` computes what was saved, to the bit."""

    def compute() -> float:
        config, model = personalised(folder, layout)
        with torch.no_grad():
            for tensor in model.backbone.state_dict(keep_vars=True).values():
                if tensor.is_floating_point():
                    tensor.add_(0.05 * torch.randn(tensor.shape))
        save_final(folder / "final", model, config, TOKENIZER, UserIndex(("one", "two")), "")
        loaded = load_final(folder / "final").model
        loaded.user_slot = 1
        return (sums(loaded) - sums(model)).abs().max().item()

    return verdict(compute, tolerance=0.0)
