"""A trained model for Python: text and user names in, text and numbers out. `prlhf.load` makes it.

In every call `users` is a name for all items, or a list with one name an item. None and "generic" mean the unknown
user, whom the model answers with user 0's vectors. A name that the model does not know is a UserError.
"""

from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any

from prlhf.backbone.loading import choose_device
from prlhf.batch.tokens import EncodedComparison, Encoder, EncodingReport
from prlhf.data.comparisons import GENERIC, named_user, parse_comparison, parse_prompt, parse_response, shortened
from prlhf.errors import UserError, check_range
from prlhf.generate.decode import Decoding, Request, Response, batches, check_decoding, generate
from prlhf.generate.rewards import ScoredLine, encode
from prlhf.method.losses import Answers, Outputs, needs_reference, reward_margin
from prlhf.method.models import PersonalizedLM
from prlhf.score.agreement import check_agreement
from prlhf.score.score import score
from prlhf.store.final import Loaded, reference_model

OWN = "@own"  # as generate.py's --users: each comparison is read by the user that it names
Names = str | Sequence[str | None] | None
Prompts = Sequence[str | Sequence[Mapping[str, str]]]


class TextModel:
    """A trained model with its tokenizer and user names. `loaded` has the parts: config, tokenizer, users, model."""

    def __init__(self, loaded: Loaded):
        self.loaded, self.config = loaded, loaded.config
        method, place = loaded.config.method, loaded.config.user_model.place
        self.encoder = Encoder(loaded.tokenizer, loaded.config.data, method, place)
        check_agreement(loaded.model.to(choose_device(loaded.config.device)))
        if isinstance(loaded.model, PersonalizedLM):
            check_decoding(loaded.model)

    @property
    def users(self) -> tuple[str, ...]:
        """The names of the known users, most active in training first."""
        return self.loaded.users.names

    def generate(
        self, prompts: Prompts, users: Names = None, user_texts: Names = None, batch_size: int = 32, **decoding: Any
    ) -> list[str]:
        """One response to each prompt, as its user prefers it. For models of `method: pdpo`.

        prompts: texts, taken as they are, or lists of {"role", "content"} messages, which go through the chat template.
        user_texts: text about the user, put before the prompt; one for all, or a list. decoding: max_new_tokens (128),
        temperature (0: greedy), top_p (1) and seed (0). Responses are generate.py's for the same prompts without ids. In
        float32 they do not depend on batch_size, but for near ties; in a half type rounding makes them, and batch_size=1
        is exact. UserError: a model that does not generate, an unknown user, a setting out of range, a prompt that is none
        or too long.
        """
        if not isinstance(self.loaded.model, PersonalizedLM):
            raise UserError(f"{self.loaded.path}: method {self.config.method} does not generate, expected pdpo")
        names, texts = _one_each(users, prompts, "users"), _one_each(user_texts, prompts, "user_texts")
        requests = []
        for i, (prompt, name, text) in enumerate(zip(prompts, names, texts)):
            where = f"prompts[{i}]"
            prefix = self.encoder.prefix_to_answer(self.encoder.read(parse_prompt(prompt, where), where), text, where)
            requests.append(Request(prefix.ids, self._number(name), f"{i + 1} {name or GENERIC}", prefix.tail))
        settings = Decoding(**decoding)
        check_range("max_new_tokens", settings.max_new_tokens, low=1)
        check_range("temperature", settings.temperature, low=0)
        check_range("top_p", settings.top_p, low=1e-6, high=1)
        ends = self.encoder.stop_ids(self.loaded.model.backbone.generation_config)
        found: dict[int, Response] = {}
        for batch in batches(requests, batch_size):
            found |= zip(batch, generate(self.loaded.model, [requests[n] for n in batch], ends, settings))
        ids = [found[n].ids for n in range(len(requests))]
        return self.loaded.tokenizer.batch_decode(ids, skip_special_tokens=True)

    def score(
        self, prompts: Prompts, responses: Sequence[str], users: Names = None, user_texts: Names = None
    ) -> list[float]:
        """One number for each response, given its prompt and user:

        `method: prm`: the reward r_P(x, y, u). Rewards to one prompt can be compared; their zero is arbitrary.
        `method: pdpo`: log pi_P(y | x, u) in nats, over all tokens with EOS. The implicit reward beta h: see `margins`.
        Prompts, users and user texts as for `generate`; a prompt is cut as its longest response demands. UserError for
        `method: pairwise`, an unknown user, lists of different lengths, a prompt or response that is none or too long.
        """
        if self.encoder.question is not None:
            raise UserError(f"{self.loaded.path}: method pairwise compares two responses, expected prm or pdpo")
        names, texts = _one_each(users, prompts, "users"), _one_each(user_texts, prompts, "user_texts")
        lines = []
        _require_list(responses)
        for i, (prompt, response) in enumerate(zip(prompts, _one_each(responses, prompts, "responses"))):
            x, y = parse_prompt(prompt, f"prompts[{i}]"), parse_response(response, f"responses[{i}]")
            lines.append(ScoredLine(x, y, names[i], texts[i], str(i), f"prompts[{i}]"))
        encoded = [line.reading for line in encode(lines, self.encoder, [self._number(name) for name in names])]
        # Each response stands on both sides of a comparison, and is computed once.
        pairs = [
            EncodedComparison([*r.prefix], [*r.prefix], [*r.response], [*r.response], r.user, tail=r.tail)
            for r in encoded
        ]
        outputs = self._outputs(pairs) if pairs else None
        assert not isinstance(outputs, Answers)  # refused above
        return outputs.chosen.tolist() if outputs else []

    def margins(self, comparisons: Sequence[Mapping[str, Any]], users: Names = OWN) -> list[float]:
        """How much more reward the chosen response of each comparison has than the rejected one, for its user:

        `method: pdpo`: beta h(u), the implicit reward against the reference (SimPO, ORPO: beta times the difference of
        log-probs a token); `prm`: r_P(x, y1, u) - r_P(x, y2, u); `pairwise`: logit P(y1 over y2).
        sigmoid(margin) is the probability that the user prefers the chosen one, for the sigmoid losses.

        comparisons: records as in a data file, {"prompt", "chosen", "rejected", "user"?, "user_text"?}; the user may
        also stand in `data.user_column`. By default each is read by the user that it names, the generic user where that
        is none or unknown, as in evaluate.py; `users` puts others in their place. After full fine-tuning the first call
        loads the base, the reference. UserError, with the position: no comparison, or too little room for its prompt.
        """
        _require_list(comparisons)
        data = self.config.data
        records = [named_user(r, data.user_column) if data.user_column in r else r for r in map(dict, comparisons)]
        parsed = [parse_comparison(r, f"comparisons[{i}]", str(i), data.attributes) for i, r in enumerate(records)]
        if users == OWN:
            numbers = [self.loaded.number(c.user) for c in parsed]
        else:
            numbers = [self._number(name) for name in _one_each(users, parsed, "users")]
        pairs = []
        for i, (comparison, number) in enumerate(zip(parsed, numbers)):
            encoded = self.encoder.encode(comparison, self.loaded.users, EncodingReport())
            if encoded is None:
                raise UserError(
                    f"comparisons[{i}]: beside the longer response fewer than data.min_prompt_tokens "
                    f"({data.min_prompt_tokens}) tokens of the prompt fit into data.max_tokens ({data.max_tokens})"
                )
            pairs.append(encoded._replace(user=number))
        if not pairs:
            return []
        reference: Any = None
        if needs_reference(self.config):
            reference = score(self._reference, pairs, None, self.config.evaluate.batch_size)
        return reward_margin(self.config.loss, self._outputs(pairs), reference).tolist()

    def _outputs(self, pairs: list[EncodedComparison]) -> Outputs:
        return score(self.loaded.model, pairs, [c.user for c in pairs], self.config.evaluate.batch_size)

    @cached_property
    def _reference(self) -> PersonalizedLM:
        return check_agreement(reference_model(self.loaded).to(self.loaded.model.device))

    def _number(self, name: str | None) -> int:
        return 0 if name is None else self.loaded.required_number(name)


def _require_list(items: Any) -> None:
    """UserError where `items` is one text or one record."""
    if isinstance(items, (str, Mapping)):
        raise UserError(f"expected a list, found one item: {shortened(items)}")


def _one_each(values: Any, items: Sequence[Any], name: str) -> list[Any]:
    """`values` as a list with one for each item. UserError where it is a list of another length, or `items` is no list."""
    _require_list(items)
    if values is None or isinstance(values, str):
        return [values] * len(items)
    if len(values) != len(items):
        raise UserError(f"{name}: found {len(values)}, expected {len(items)}, one for each item")
    return list(values)
