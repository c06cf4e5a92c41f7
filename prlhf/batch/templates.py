"""Chat templates: a prompt, text or messages, as the text that the model reads."""

import inspect
import re
from datetime import date
from typing import Any

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from prlhf.config.keys import DataConfig
from prlhf.data.comparisons import Messages
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
# What a template in Jinja's sandbox raises for a conversation that it does not take.
REFUSALS = (TemplateError, TypeError, ValueError, AttributeError, KeyError, IndexError)


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

    def text(self, prompt: str | Messages, where: str) -> str:
        """The prompt as the model reads it, without the answer. UserError, with `where`, if the template refuses it."""
        if not self.takes(prompt):
            assert isinstance(prompt, str)
            return prompt
        messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else list(prompt)
        return self._render(messages, where, add_generation_prompt=True)

    def _render(self, messages: list[dict[str, Any]], where: str, add_generation_prompt: bool) -> str:
        source = self._source()
        for name in self.config.template_args or {}:
            if not re.search(rf"\b{re.escape(name)}\b", source):
                raise UserError(f"data.template_args: found {name!r}, which the chat template does not read")
        try:
            return self.tokenizer.apply_chat_template(
                messages,
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

    def _source(self) -> str:
        """The template's text. UserError where the tokenizer has none, or several and none of them is the default."""
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
        return self.tokenizer.get_chat_template()
