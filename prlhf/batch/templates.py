"""Chat templates: a prompt, text or messages, as the text that the model reads, and what ends an answer to it."""

import contextlib
import inspect
import re
from datetime import date
from functools import cached_property
from typing import Any, NamedTuple

from jinja2 import Environment, TemplateError, TemplateSyntaxError, nodes
from transformers import PreTrainedTokenizerBase

from prlhf.config.keys import DataConfig
from prlhf.data.comparisons import BESIDE_CONTENT, Messages, Tools
from prlhf.errors import UserError

# Chat templates by name, without BOS. Tulu: Wang et al. 2023 as Personalized Soups writes it, with the space before the
# newline. Llama 3: Meta's model card.
TEMPLATES = {
    "tulu": "{% for message in messages %}{{ '<|' + message['role'] + '|>\n' + message['content'] + ' \n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}",
    "llama3": "{% for message in messages %}{{ '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n' "
    "+ message['content'] | trim + '<|eot_id|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}",
}
ANSWER = "AnswerOfTheAssistant"  # stands in for an answer, to see what a template puts around it
ASKED = {"role": "user", "content": "Question"}
MADE_UP = [[ASKED], [{"role": "system", "content": "Help."}, ASKED]]  # some templates want a system message first
MARK = "EndOfTheContent"  # stands behind the last user message's content, to see what a template puts there
ENVIRONMENT = Environment(extensions=["jinja2.ext.loopcontrols"])  # to parse with, as Hugging Face does
# What a template in Jinja's sandbox raises for a conversation that it does not take.
REFUSALS = (TemplateError, TypeError, ValueError, AttributeError, KeyError, IndexError)


class AroundAnswer(NamedTuple):
    """What a template puts around an answer: white space between the prompt and it, and the token that ends it.

    That is the first special token behind the answer, None where there is none. Special is any added token but UNK: some
    families' turn ends are not marked as special (Phi-3). `found` is False where the template refuses the talks that would tell.
    """

    space: str
    end: int | None
    found: bool = True


class ChatTemplate:
    """The chat template of one tokenizer and one `data` group of the config."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, config: DataConfig):
        self.tokenizer = tokenizer
        self.config = config
        own = inspect.signature(tokenizer.apply_chat_template).parameters
        for name in self.config.template_args or {}:
            if name in own:
                raise UserError(
                    f"data.template_args: found {name!r}, which prlhf itself says; expected other arguments"
                )
        today = config.template_date or date.today()
        # A template that asks for the date calls strftime_now; Hugging Face's own says the day on which it is rendered.
        self.arguments = {**(config.template_args or {}), "strftime_now": today.strftime}

    def takes(self, prompt: str | Messages) -> bool:
        """Whether a prompt goes through the template: messages do, and text unless data.template is `auto`."""
        return not isinstance(prompt, str) or self.config.template != "auto"

    def text(self, prompt: str | Messages, tools: Tools | None, where: str) -> str:
        """The prompt as the model reads it, without the answer. UserError, with `where`, if the template refuses it, or
        would leave out its tools, tool calls or reasoning."""
        if not self.takes(prompt):
            assert isinstance(prompt, str)
            if tools:
                raise UserError(
                    f"{where}, tools: found a prompt as text, which goes through no template; expected messages"
                )
            return prompt
        messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else list(prompt)
        return self._render(messages, tools, where, add_generation_prompt=True)

    def tail(self, prompt: str | Messages, tools: Tools | None, where: str, text: str) -> str:
        """The end of `text`, the prompt as the model reads it: what the template puts behind the content of the last user message.
        UserError where it does not put the content there as it is, or where no user speaks."""
        messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else list(prompt)
        last = max((i for i, message in enumerate(messages) if message["role"] == "user"), default=None)
        if last is not None:
            messages[last] = {**messages[last], "content": (messages[last]["content"] or "") + MARK}
            before, mark, tail = self._render(messages, tools, where, add_generation_prompt=True).rpartition(MARK)
            head = text.removesuffix(tail)
            if mark and head + tail == text and head.rstrip() == before.rstrip():  # many templates strip the content
                return tail
        raise UserError(
            f"{where}, prompt: found {'no user message' if last is None else 'content that the chat template changes'}, so "
            "that user vectors have no place behind it; expected user_model.place 'before_prompt', or another prompt"
        )

    @cached_property
    def around(self) -> AroundAnswer:
        """What the template puts around an assistant's message, from the first of MADE_UP that it takes."""
        for asked in MADE_UP:
            with contextlib.suppress(UserError):
                return self._around(asked)
        return AroundAnswer("", None, found=False)

    def _around(self, asked: list[dict[str, Any]]) -> AroundAnswer:
        prompt = self._render(asked, None, "", add_generation_prompt=True)
        talk = [*asked, {"role": "assistant", "content": ANSWER}]
        before, found, behind = self._render(talk, None, "", add_generation_prompt=False).rpartition(ANSWER)
        special = {i for i, token in self.tokenizer.added_tokens_decoder.items() if token.content.strip()}
        special.discard(self.tokenizer.unk_token_id)
        ids = self.tokenizer(behind, add_special_tokens=False)["input_ids"] if found else []
        space = before.removeprefix(prompt) if found and before.startswith(prompt) else ""
        return AroundAnswer(space if space.isspace() else "", next((i for i in ids if i in special), None))

    def _render(
        self, messages: list[dict[str, Any]], tools: Tools | None, where: str, add_generation_prompt: bool
    ) -> str:
        given = list(tools) if tools else None
        source = self._source(given)
        for name in self.config.template_args or {}:
            if not _reads(source, name):
                raise UserError(
                    f"data.template_args: found {name!r}, which the chat template does not read; expected names that it does"
                )
        told = ["tools"] if tools else []
        for name in [*told, *(name for name in BESIDE_CONTENT if any(m.get(name) for m in messages))]:
            if not _reads(source, name):
                raise UserError(f"{where}, prompt: found {name}, which the chat template does not read; expected none")
        try:
            return self.tokenizer.apply_chat_template(
                messages,
                tools=given,
                chat_template=source,
                tokenize=False,
                add_generation_prompt=add_generation_prompt,
                **self.arguments,
            )
        except REFUSALS as error:
            roles = ", ".join(message["role"] for message in messages)
            raise UserError(
                f"{where}, prompt: the chat template refuses this conversation ({error}); found the roles {roles}, "
                "expected what the template takes"
            ) from None

    def _source(self, tools: list[dict[str, Any]] | None) -> str:
        """The template's text; the tokenizer may have one of its own for tools.

        UserError where it has none at all, or several without a default.
        """
        if self.config.template in TEMPLATES:
            return TEMPLATES[self.config.template]
        own, others = self.tokenizer.chat_template, f"data.template {' or '.join(map(repr, TEMPLATES))}"
        if isinstance(own, dict) and own and "default" not in own:
            names = ", ".join(map(repr, sorted(own)))
            raise UserError(
                f"the tokenizer's chat templates are {names}; expected one that is named 'default' (copy one of them to "
                f"that name in tokenizer.chat_template, and save the tokenizer), or {others}"
            )
        if not own:
            raise UserError(
                f"the tokenizer has no chat template; expected prompts as text and data.template 'auto', or {others}"
            )
        return self.tokenizer.get_chat_template(tools=tools)


def _reads(source: str, name: str) -> bool:
    """Whether a template reads a variable, attribute or key of this name. Jinja leaves out all others without a word."""
    try:
        tree = ENVIRONMENT.parse(source)
    except TemplateSyntaxError:  # a tag of Hugging Face's own
        return re.search(rf"\b{re.escape(name)}\b", source) is not None
    names = {node.name for node in tree.find_all(nodes.Name)} | {node.attr for node in tree.find_all(nodes.Getattr)}
    return name in names | {node.value for node in tree.find_all(nodes.Const) if isinstance(node.value, str)}
