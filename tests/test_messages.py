"""What messages hold beside role and content reaches the chat template, or is refused with file and line."""

import json

import pytest
from helpers import tiny_config

from prlhf.backbone.toys import byte_tokenizer
from prlhf.batch.datasets import encode_file
from prlhf.batch.tokens import Encoder
from prlhf.data.check.rules import prompt_key
from prlhf.data.comparisons import read_comparisons, read_prompts
from prlhf.data.users import UserIndex
from prlhf.errors import UserError
from prlhf.generate import rewards

TOOLS = [{"type": "function", "function": {"name": "rain", "description": "mm of rain", "parameters": {}}}]
CALL = {"type": "function", "function": {"name": "rain", "arguments": {"where": "Paris"}}}
TALK = [
    {"role": "user", "content": "Does it rain?", "name": "ann"},
    {"role": "assistant", "content": None, "reasoning_content": "I ask.", "tool_calls": [CALL]},
    {"role": "tool", "content": "3 mm", "tool_call_id": "1"},
]
# As Qwen's templates do it, in little.
TEMPLATE = (
    "{% if tools %}{{ tools | tojson }}\n{% endif %}{% for m in messages %}{{ m.role }}: {% if m.reasoning_content %}"
    "({{ m.reasoning_content }}){% endif %}{{ m.content or '' }}{% for call in m.tool_calls or [] %}"
    "{{ call.function | tojson }}{% endfor %}\n{% endfor %}assistant:"
)


def encoder(template):
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = template
    return Encoder(tokenizer, tiny_config().data)


def file_of(tmp_path, **record):
    path = tmp_path / "f.jsonl"
    plain = {"prompt": "x", "chosen": "a", "rejected": "b", "response": "a"}
    path.write_text(json.dumps(plain | {"prompt": "y"}) + "\n" + json.dumps(plain | record) + "\n")
    return path


@pytest.mark.parametrize("tools", [TOOLS, json.dumps(TOOLS), None])
def test_tools_tool_calls_and_reasoning_reach_the_template(tmp_path, tools):
    """Comparisons, prompts and responses to be scored are, token by token, what Hugging Face's own function gives."""
    path, enc = file_of(tmp_path, prompt=TALK, tools=tools), encoder(TEMPLATE)
    expected = enc.tokenizer.apply_chat_template(
        TALK, tools=TOOLS if tools else None, add_generation_prompt=True, return_dict=False
    )
    text = enc.tokenizer.decode(expected)
    assert "(I ask.)" in text and '"where": "Paris"' in text and ("mm of rain" in text) == bool(tools)
    dataset = encode_file(read_comparisons(path), enc, UserIndex([]))
    prompt = read_prompts(path)[1]
    (_, scored) = rewards.encode(rewards.read_lines(path), enc, [0, 0])
    assert dataset.comparisons[1].prefix == enc.read(prompt.text, "f", prompt.tools).ids == expected
    assert list(scored.reading.prefix) == expected
    assert prompt_key(({"role": "assistant", "tool_calls": [CALL]},)) != prompt_key(prompt.text[:1])
    assert prompt_key(prompt.text) != prompt_key(prompt.text[:1]) != prompt_key(({"role": "user", "content": "x"},))


def test_what_a_template_would_leave_out_is_refused_with_file_and_line(tmp_path):
    silent = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}assistant:"
    asked = [{"role": "user", "content": "Does it rain?"}]
    for record, named in (
        ({"prompt": TALK}, "line 2, prompt: found tool_calls, which the chat template does not read"),
        (
            {"prompt": [*asked, {**TALK[1], "content": "a", "tool_calls": None}]},
            "line 2, prompt: found reasoning_content",
        ),
        ({"prompt": asked, "tools": TOOLS}, "line 2, prompt: found tools, which"),
        ({"prompt": "text", "tools": TOOLS}, "line 2, tools: found a prompt as text"),
    ):
        with pytest.raises(UserError, match=named):
            encode_file(read_comparisons(file_of(tmp_path, **record)), encoder(silent), UserIndex([]))


def test_a_response_is_text_alone_and_faults_of_messages_and_tools_are_told_with_file_and_line(tmp_path):
    answer = {"role": "assistant", "content": "a"}
    for record, named in (
        ({"chosen": [{**answer, "content": None, "tool_calls": [CALL]}]}, "line 2, chosen: found a message with tool_calls"),
        ({"rejected": [{**answer, "reasoning_content": "hm"}]}, "line 2, rejected: found a message with reasoning_content"),
        ({"chosen": [{**answer, "content": None}]}, "line 2, chosen: expected text or a list of one assistant message"),
        ({"prompt": [{"role": "user", "content": None}]}, "line 2, prompt: expected text or a list"),
        ({"tools": "rain"}, "line 2, tools: expected a list of JSON schemas, found \"rain\""),
        ({"tools": ["rain"]}, "line 2, tools: expected a list of JSON schemas"),
    ):  # fmt: skip
        with pytest.raises(UserError, match=named):
            read_comparisons(file_of(tmp_path, **record))
    whole = read_comparisons(file_of(tmp_path, chosen=[{**answer, "tool_calls": [], "id": 7}])).comparisons[1]
    assert whole.chosen == "a"  # what is empty or no part of the text is no fault


@pytest.mark.parametrize(
    "mention", ["{# tools, function_call #}", "You have no tools, no function_call.\n", "{{ 'no tools' }}"]
)
def test_what_a_template_only_mentions_is_refused(tmp_path, mention):
    talk = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}assistant:"
    call = {"role": "assistant", "content": "", "function_call": {"name": "rain", "arguments": "{}"}}
    for record, name in (
        ({"tools": TOOLS, "prompt": TALK[:1]}, "tools"),
        ({"prompt": [TALK[0], call]}, "function_call"),
    ):
        file = read_comparisons(file_of(tmp_path, **record))
        with pytest.raises(UserError, match=f"line 2, prompt: found {name}, which the chat template does not read"):
            encode_file(file, encoder(mention + talk), UserIndex([]))
