"""Baselines by prompting: the untouched base model of a run reads about the user what is known, and nothing is trained.

    base        nothing
    roleplay    the text about the user and what they said of other answers, as a system message
    fewshot:N   N of the user's training comparisons, chosen and rejected response, as a system message

A prompt that goes through no chat template has the same before it. Where nothing is known of a user, it is the base itself. As a
predictor (`predicted_margins`) the base is asked which of two responses the user prefers, as a judge is (`template`), with the
same knowledge.
"""

import sys
from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

import numpy as np

from prlhf.backbone.loading import choose_device
from prlhf.batch.tokens import Encoder
from prlhf.data.comparisons import GENERIC, Comparison, Messages, Prompt
from prlhf.errors import UserError, did_you_mean
from prlhf.evaluate.accuracy import shuffled
from prlhf.evaluate.held_out import training_file
from prlhf.judge.letters import letter_log_probs
from prlhf.judge.profiles import Profile, Profiles, read_profiles
from prlhf.judge.queries import Query
from prlhf.judge.template import conversation, read_template, readable
from prlhf.score.agreement import check_agreement
from prlhf.store.final import Loaded, base_model

BASELINES = ("base", "roleplay", "fewshot:N")
ROLE = "You answer a user. {}\n\nAnswer as this user would like to be answered."
EXAMPLE = "[Prompt]\n{}\n[The response that the user preferred]\n{}\n[The response that the user did not prefer]\n{}"


class Baseline(NamedTuple):
    """A run with its base in the place of its model, and what is told of users."""

    name: str
    loaded: Loaded
    profiles: Profiles

    def prompts(self, asked: Sequence[tuple[Prompt, str]]) -> list[Prompt]:
        """Each prompt, with what is known of the user by this name (or `generic`) before it.

        UserError where nothing is known of any of them, though the baseline is to read something.
        """
        encoder = Encoder(self.loaded.tokenizer, self.loaded.config.data)
        found, known = [], 0
        for prompt, name in asked:
            user = None if name == GENERIC else name
            query = Query(prompt.text, user, prompt.user_text, prompt.tools, "", "", prompt.where)
            told = told_of(self.profiles.of(query))
            known += bool(told)
            found.append(prompt._replace(text=told_before(told, prompt.text, encoder.template.takes(prompt.text))))
        self.require_known(known, len(asked))
        return found

    def require_known(self, known: int, asked: int) -> None:
        """Say of how many nothing is known. UserError where that is all."""
        nothing = not self.profiles.examples and not self.profiles.with_text  # is to be read
        if asked and not known and not nothing:
            what = (
                "a text (user_text, attributes) or a statement (reason, aspects)"
                if self.profiles.with_text
                else "training comparisons to tell"
            )
            raise UserError(f"--baseline {self.name}: found no user with {what}, expected one at least")
        if known < asked and not nothing:
            print(f"--baseline {self.name}: of {asked - known:,} of {asked:,} users and prompts nothing is known")


def find_baseline(loaded: Loaded, name: str, seed: int) -> Baseline:
    """The baseline of this name (BASELINES), of a run whose model is then of no more use. seed: which examples are drawn.

    The base reads no user vectors, neither text nor comparisons but those that the baseline tells, and nothing is cut.
    UserError where there is none, or the training comparisons are gone.
    """
    kind, _, number = name.partition(":")
    if name not in ("base", "roleplay") and not (kind == "fewshot" and number.isdecimal()):
        hint = did_you_mean(name, BASELINES)
        raise UserError(f"--baseline {name}: no such baseline{hint}; expected one of {', '.join(BASELINES)}")
    profiles = Profiles(examples=0, with_text=False)
    if kind != "base":
        profiles = training_profiles(loaded, int(number or 0), seed, kind == "roleplay")
    data = replace(loaded.config.data, user_text=False, max_prompt_tokens=sys.maxsize, max_tokens=sys.maxsize)
    return Baseline(name, loaded._replace(model=base_model(loaded), config=replace(loaded.config, data=data)), profiles)


def training_profiles(loaded: Loaded, examples: int, seed: int, with_text: bool) -> Profiles:
    """What a judge reads of the known users (`read_profiles`), by their comparisons in training alone."""
    path, file = loaded.config.data.train, training_file(loaded)
    if path is None or file is None:
        raise UserError(
            f"{loaded.path / 'config.yaml'}: data.train, {path}, is not there; a baseline reads users' texts and comparisons in it"
        )
    trained = {c.where for c in file.comparisons if loaded.users.number(c.user)}
    return read_profiles(path, examples, seed, with_text, loaded.config.data, trained)


def told_of(profile: Profile) -> str:
    """What the base reads of a user before a prompt; "" where nothing is known."""
    known = [f"What is known about the user:\n{profile.text}"] if profile.text else []
    if profile.reasons:
        known.append("\n".join(["What the user said about other answers:", *(f"- {text}" for text in profile.reasons)]))
    examples = [EXAMPLE.format(readable(c.prompt, c.tools), c.chosen, c.rejected) for c in profile.examples]
    known += ["\n\n".join(["Earlier choices of this user:", *examples])] if examples else []
    return ROLE.format("\n\n".join(known)) if known else ""


def told_before(told: str, prompt: str | Messages, templated: bool) -> str | Messages:
    """A prompt with a text before it: in its system message, or in a new one; as text where it goes through no chat template."""
    if not told:
        return prompt
    if isinstance(prompt, str) and not templated:
        return f"{told}\n\n{prompt}"
    messages: Messages = ({"role": "user", "content": prompt},) if isinstance(prompt, str) else prompt
    if messages[0]["role"] == "system":
        return ({**messages[0], "content": f"{told}\n\n{messages[0]['content']}"}, *messages[1:])
    return ({"role": "system", "content": told}, *messages)


def predicted_margins(baseline: Baseline, comparisons: Sequence[Comparison]) -> np.ndarray:
    """(3, B): how much likelier the base finds it that the user prefers the chosen response, as the true user, with nothing known,
    and as another known user, drawn as `evaluate.accuracy.shuffled` does:

        1/2 sum over both orders of ln p(letter of chosen) - ln p(letter of rejected).

    Of an unknown user the text is read in all three, as a policy reads it. Moves the model to its device.
    """
    loaded, template, profiles = baseline.loaded, read_template(), baseline.profiles
    names, numbers = loaded.users.names, [loaded.users.number(c.user) for c in comparisons]
    others = shuffled(numbers, len(names), loaded.config.evaluate.seed)
    queries = []
    for reader in ("true", "generic", "shuffled"):
        for c, number, other in zip(comparisons, numbers, others):
            text = c.user_text if reader == "true" or not number else None
            user = {"true": number, "generic": 0, "shuffled": other}[reader]
            query = Query(c.prompt, names[user - 1] if user else None, text, c.tools, c.chosen, c.rejected, c.where)
            queries += [query, query._replace(first=c.rejected, second=c.chosen)]
    told = [profiles.of(query) for query in queries]
    baseline.require_known(sum(not profile.empty for profile in told[: 2 * len(comparisons) : 2]), len(comparisons))
    conversations = [conversation(template, query, profile) for query, profile in zip(queries, told)]
    model = check_agreement(loaded.model.to(choose_device(loaded.config.device)))
    where = [query.where for query in queries]
    log_p_N2 = letter_log_probs(model, loaded.tokenizer, conversations, where, loaded.config.data).double()
    if not log_p_N2.isfinite().all():
        raise UserError(f"--baseline {baseline.name}: found log-probabilities that are not finite: a broken model?")
    first_RBO = (log_p_N2[:, 0] - log_p_N2[:, 1]).view(3, len(comparisons), 2).numpy()  # by order: O
    return (first_RBO[:, :, 0] - first_RBO[:, :, 1]) / 2
