"""A local language model that answers by a letter: the log-probabilities of the letters as the first token of its answer.

Nothing is sampled. A letter is the token that the tokenizer makes of it behind the prompt, as of the first token of a response.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from prlhf.backbone.loading import choose_device, load_tokenizer
from prlhf.batch.tokens import EncodedComparison, Encoder
from prlhf.config.keys import Config, DataConfig, ModelConfig, UserModelConfig
from prlhf.data.comparisons import Messages
from prlhf.errors import UserError
from prlhf.method.build import build_model
from prlhf.method.losses import ResponseLogProbs
from prlhf.method.models import PersonalizedLM
from prlhf.score.agreement import check_agreement
from prlhf.score.score import score

LETTERS = ("A", "B")
BY_TEMPLATE = DataConfig(template="chat")
LETTERS_BATCH = 8  # conversations per forward pass


class LocalModel(NamedTuple):
    """A causal LM without users, and its tokenizer."""

    model: PersonalizedLM
    tokenizer: PreTrainedTokenizerBase


def load_local(path: str) -> LocalModel:
    """The causal LM of a folder or hub name in float32, for use. UserError where it cannot be loaded or computed."""
    config = Config(model=ModelConfig(name=path, frozen=True), user_model=UserModelConfig(kind="uniform", tokens=0))
    tokenizer = load_tokenizer(config.model)
    model = build_model(config, tokenizer, 0)
    assert isinstance(model, PersonalizedLM)
    return LocalModel(check_agreement(model.to(choose_device("auto")).eval()), tokenizer)


def letter_log_probs(
    model: PersonalizedLM,
    tokenizer: PreTrainedTokenizerBase,
    conversations: Sequence[Messages],
    where: Sequence[str] = (),
    config: DataConfig = BY_TEMPLATE,
) -> Tensor:
    """ln p(A | x) and ln p(B | x), (N, 2), float32 on the CPU: the next token of the model without its users behind each x.

    x is a conversation through the chat template of `config`, with what begins an answer. Equal conversations are computed once,
    and all of them in an order of their own, so that rounding depends on the set of conversations alone.
    UserError, with `where`, if x is longer than the model reads, or the letters are not one token each, and two.
    """
    encoder, readings = Encoder(tokenizer, config), list[EncodedComparison]()
    for n, messages in enumerate(conversations):
        at = where[n] if where else f"conversation {n + 1}"
        read = encoder.read(messages, at)
        a, b = encoder.response_ids(read, *LETTERS)
        if a.merged or b.merged or not len(a.ids) == len(b.ids) == 2 or a.ids == b.ids:  # each with what ends an answer
            raise UserError(
                f"{at}: the tokenizer does not write {' and '.join(LETTERS)} as one token each at the start of an answer; "
                "expected another model"
            )
        prefix = [*encoder.bos, *read.ids]
        try:
            model.check_length(len(prefix) + 1)
        except UserError as error:
            raise UserError(
                f"{at}: a question of {len(prefix)} tokens is more than the model reads ({error}); expected shorter texts, or "
                "fewer examples"
            ) from None
        readings.append(EncodedComparison(prefix, prefix, a.ids[:1], b.ids[:1], 0))
    order = sorted({tuple(c.prefix): c for c in readings}.items())
    scored = score(model, [c for _, c in order], None, LETTERS_BATCH, "answers")
    assert isinstance(scored, ResponseLogProbs)
    row = {prefix: n for n, (prefix, _) in enumerate(order)}
    return torch.stack([scored.chosen, scored.rejected], dim=1).float()[[row[tuple(c.prefix)] for c in readings]]
