"""What a P-DPO policy is like for its users, before training (the reference pi_SFT) and after: its responses, and its distance.

The distance is log pi(y | x, u) - log pi_SFT(y | x) over the tokens of the policy's own responses, EOS included. Where they were
sampled at temperature 1, its mean over tokens estimates KL(pi || pi_SFT) per token. For other temperatures (0: greedy) it is the
log-ratio of what was answered, and no KL.

Policy and reference draw with the same random numbers for a prompt, whoever asks: what differs is not the draw.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from tqdm import tqdm

from prlhf.backbone.loading import choose_device
from prlhf.backbone.lora import adapters_off
from prlhf.batch.tokens import EncodedComparison, Encoder
from prlhf.data.check.rules import prompt_key
from prlhf.data.comparisons import GENERIC, Prompt, read_comparisons, read_prompts
from prlhf.errors import UserError
from prlhf.generate.decode import Decoding, Request, Response, batches, check_decoding, generate
from prlhf.judge.texts import Answered, described
from prlhf.method.build import without_users
from prlhf.method.losses import ResponseLogProbs
from prlhf.method.models import PersonalizedLM
from prlhf.score.agreement import check_agreement
from prlhf.score.score import score
from prlhf.store.final import Loaded, reference_model


class Asked(NamedTuple):
    """A prompt, with the text about the user who asks it, as the policy reads them and as the reference does."""

    prompt: Prompt
    user: str  # or GENERIC
    number: int
    policy: list[int]  # [BOS] u_t x
    reference: list[int]  # with or without u_t (data.user_text_in_reference)
    tail: int

    def comparison(self, response: Response) -> EncodedComparison:
        """The response on both sides of a comparison, which computes it once: all tokens that were drawn, the last of which
        ended it or was the last allowed."""
        y = [*response.ids, *([] if response.end is None else [response.end])]
        return EncodedComparison(self.policy, self.reference, y, y, self.number, tail=self.tail)


class Sides(NamedTuple):
    """To each of N `Asked`, what policy and reference answered, and of the policy's answer: log pi and log pi_SFT, sums over its
    tokens, and how many they are, (N,) each."""

    policy: list[Response]
    reference: list[Response]
    log_pi_N: Tensor
    log_sft_N: Tensor
    tokens_N: Tensor


def prompts_of(loaded: Loaded, path: str | None, limit: int) -> list[Prompt]:
    """The first `limit` prompts of a file, or the first different ones of the run's data.valid.

    Those of data.valid have no user text: it is the asking user's (`texts_of`). UserError where neither file is there.
    """
    if path is not None:
        return read_prompts(path, loaded.config.data)[:limit]
    if loaded.config.data.valid is None:
        raise UserError(f"{loaded.path / 'config.yaml'}: data.valid is not set, expected --prompts FILE")
    found: dict[Any, Prompt] = {}
    for c in read_comparisons(loaded.config.data.valid, loaded.config.data).comparisons:
        found.setdefault(prompt_key(c.prompt), Prompt(c.id, c.prompt, None, None, c.where, c.tools))
    return list(found.values())[:limit]


def texts_of(loaded: Loaded) -> dict[str, str]:
    """The text about each user in the run's data.valid, the last one given; none where the run has no such file."""
    if loaded.config.data.valid is None:
        return {}
    file = read_comparisons(loaded.config.data.valid, loaded.config.data)
    return {c.user: c.user_text for c in file.comparisons if c.user and c.user_text}


def asked_by(
    loaded: Loaded, encoder: Encoder, prompts: Sequence[Prompt], names: Sequence[str], texts: dict[str, str]
) -> list[Asked]:
    """Each prompt as each user asks it, user by user. texts: about users.

    The text that stands beside a prompt is about the prompt's user, and is read for that user alone.
    """
    read, asked = [encoder.read(p.text, p.where, p.tools) for p in prompts], []
    for name in names:
        for prompt, x in zip(prompts, read):
            own = prompt.user_text if prompt.user == name else None
            prompt = prompt._replace(user_text=own or texts.get(name))
            policy = encoder.prefix_to_answer(x, prompt.user_text, prompt.where)
            reference = policy
            if policy.user_text and not encoder.config.user_text_in_reference:
                room = len(encoder.bos) + len(policy.prompt) if policy.prompt_cut else encoder.config.max_tokens
                reference = encoder.prefix(x, None, room)
            number = loaded.required_number(name)
            asked.append(Asked(prompt, name, number, policy.ids, reference.ids, policy.tail))
    return asked


def answer_all(loaded: Loaded, asked: Sequence[Asked], encoder: Encoder, decoding: Decoding, batch_size: int) -> Sides:
    """Policy's and reference's responses, and the log-probs of the policy's.

    The reference answers [BOS] u_t x once for all who ask it so. Moves the model to its device.
    """
    model = loaded.model.to(choose_device(loaded.config.device))
    assert isinstance(model, PersonalizedLM)
    check_agreement(model)
    check_decoding(model)
    ends = encoder.stop_ids(model.backbone.generation_config)

    def respond(lm: PersonalizedLM, requests: list[Request], title: str) -> list[Response]:
        found: dict[int, Response] = {}
        for batch in tqdm(batches(requests, batch_size), desc=title, unit="batch", disable=None):
            found |= zip(batch, generate(lm, [requests[n] for n in batch], ends, decoding))
        return [found[n] for n in range(len(requests))]

    requests = [Request(a.policy, a.number, a.prompt.id, a.tail) for a in asked]
    policy = respond(model, requests, "the policy")
    pairs = [a.comparison(response) for a, response in zip(asked, policy)]
    scored = score(model, pairs, [a.number for a in asked], loaded.config.evaluate.batch_size, "its log-probs")
    assert isinstance(scored, ResponseLogProbs)
    reference = reference_model(loaded).to(model.device)
    if reference is not model:
        check_agreement(reference)
    log_sft_N = score(reference, pairs, None, loaded.config.evaluate.batch_size, "the reference's")[0]
    rows = {(a.prompt.id, *a.reference): Request(a.reference, 0, a.prompt.id, a.tail) for a in asked}
    with adapters_off(reference.backbone):
        responses = respond(without_users(reference, reference.backbone), list(rows.values()), "the reference")
    by_row = dict(zip(rows, responses))
    before = [by_row[a.prompt.id, *a.reference] for a in asked]
    return Sides(policy, before, scored.chosen, log_sft_N, scored.chosen_length)


class TokenMean(NamedTuple):
    """A mean over the tokens of several responses, and its standard error over responses; None for a single one."""

    mean: float
    standard_error: float | None


def token_mean(sums_N: Tensor, tokens_N: Tensor) -> TokenMean:
    """R = sum of sums / sum of tokens, and its standard error as of a ratio of means,

    sqrt(N / (N - 1) sum_n (sums_n - R tokens_n)^2) / sum of tokens      (Cochran 1977, Sampling Techniques, 6.4)
    """
    R = sums_N.double().sum() / tokens_N.sum()
    return TokenMean(R.item(), standard_error(residuals(sums_N, tokens_N)))


def residuals(sums_N: Tensor, tokens_N: Tensor) -> Tensor:
    """e_n = (sums_n - R tokens_n) / sum of tokens, (N,) float64: what response n moves R by, to first order."""
    sums_N, tokens_N = sums_N.double(), tokens_N.double()
    return (sums_N - sums_N.sum() / tokens_N.sum() * tokens_N) / tokens_N.sum()


def standard_error(e_N: Tensor) -> float | None:
    """sqrt(N / (N - 1) sum_n e_n^2); None for a single one."""
    N = len(e_N)
    return (N / (N - 1) * e_N.square().sum()).sqrt().item() if N > 1 else None


def policy_report(loaded: Loaded, asked: Sequence[Asked], sides: Sides) -> dict[str, Any]:
    """The numbers of report.json: for each user before and after, the known users who asked a prompt without a text about them
    where the model reads texts, and the price of personalisation."""
    texts = [
        [Answered(text, r.finished) for r, text in zip(side, texts_of_ids(loaded, side))]
        for side in (sides.reference, sides.policy)
    ]
    users: dict[str, Any] = {}
    by_prompt: dict[str, Tensor] = {}
    for name in dict.fromkeys(a.user for a in asked):
        rows = [n for n, a in enumerate(asked) if a.user == name]
        log_pi_N, log_sft_N, tokens_N = (t[rows] for t in (sides.log_pi_N, sides.log_sft_N, sides.tokens_N))
        distance = token_mean(log_pi_N - log_sft_N, tokens_N)
        by_prompt[name] = residuals(log_pi_N - log_sft_N, tokens_N)
        before, after = ([side[n] for n in rows] for side in texts)
        users[name] = {
            "before": described(before),
            "after": described(after)
            | {
                "tokens": int(tokens_N.sum()),
                "log_prob_per_token": token_mean(log_pi_N, tokens_N).mean,
                "reference_log_prob_per_token": token_mean(log_sft_N, tokens_N).mean,
                "log_ratio_per_token": distance.mean,
                "log_ratio_standard_error": distance.standard_error,
            },
        }
    nothing = {a.user for a in asked if a.user != GENERIC and not a.prompt.user_text}
    without_text = [name for name in users if name in nothing] if loaded.config.data.user_text else []
    return {"users": users, "without_text": without_text, "price": price(users, by_prompt)}


def price(users: dict[str, Any], by_prompt: dict[str, Tensor]) -> dict[str, Any] | None:
    """The log-ratio per token of known users as themselves, mean, least and most, beside the generic user's; None where one of
    the two is not there.

    by_prompt: each user's `residuals`, over the same prompts. All users answer these with the same random numbers, so the error of
    mean - generic is that of the residuals' own difference at each prompt: paired.
    """
    found = {name: row["after"]["log_ratio_per_token"] for name, row in users.items()}
    generic, known = found.pop(GENERIC, None), list(found.values())
    if generic is None or not known:
        return None
    own_N = torch.stack([by_prompt[name] for name in found]).mean(dim=0)
    return {
        "known_users": len(known),
        "as_themselves": sum(known) / len(known),
        "least": min(known),
        "most": max(known),
        "generic": generic,
        "more": sum(known) / len(known) - generic,
        "more_standard_error": standard_error(own_N - by_prompt[GENERIC]),
    }


def texts_of_ids(loaded: Loaded, responses: Sequence[Response]) -> list[str]:
    """The responses as text, as generate.py writes them."""
    return loaded.tokenizer.batch_decode([r.ids for r in responses], skip_special_tokens=True)
