"""What a language model reads as a judge, by a template that can be replaced, and what its answer says.

A template is Jinja, as chat templates are: `{{ prompt }}`, `{% if user_text %} ... {% endif %}`. Values are put in as they are;
what looks like a placeholder in a response stays text. `template.txt` is the default.
"""

import json
import re
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

from jinja2 import StrictUndefined, TemplateError, TemplateSyntaxError, nodes
from jinja2.meta import find_undeclared_variables
from jinja2.sandbox import ImmutableSandboxedEnvironment

from prlhf.data.comparisons import BESIDE_CONTENT, Messages, Tools
from prlhf.data.files import read_lines, require_file
from prlhf.errors import UserError, did_you_mean
from prlhf.judge.profiles import Profile
from prlhf.judge.queries import Query, Ruling

DEFAULT_TEMPLATE = Path(__file__).with_name("template.txt")
NEEDED: tuple[str, ...] = ("prompt", "response_a", "response_b")
# What a template may say; examples have EXAMPLE_FIELDS, and certainty is whether the judge is asked for its certainty.
PLACEHOLDERS: tuple[str, ...] = (*NEEDED, "user_text", "reasons", "examples", "certainty")
ABOUT_USERS = frozenset({"user_text", "reasons", "examples"})
EXAMPLE_FIELDS: tuple[str, ...] = ("prompt", "chosen", "rejected")
ENVIRONMENT_OF_JUDGES = ImmutableSandboxedEnvironment(undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
# An A before a word in small letters is the article, but before these; a letter behind "response" or "option" is none.
VERBS = "is|was|wins|and|or|over|with|because|since|by|as|at|for|than"
LETTER = re.compile(rf"\bA\b(?! (?!(?:{VERBS})\b)[a-z])|\bB\b")
NAMED_LETTER = re.compile(rf"\b(?i:response|option) +([AB]\b|[ab]\b(?! (?!(?:{VERBS})\b)[a-z]))")
BY_PLACE = re.compile(r"\bthe (first|second)\b", re.IGNORECASE)
ALONE = re.compile(r"\W*([ab])\W*", re.IGNORECASE)
NEGATED = re.compile(r"\b(?:not|never|neither|nor)\b|n['’]t\b", re.IGNORECASE)


class Template(NamedTuple):
    """A template's text, and where it is from."""

    text: str
    path: Path


def read_template(path: str | Path = DEFAULT_TEMPLATE, certainty: bool = False) -> Template:
    """A template from a file. certainty: it must ask for one.

    UserError, with file and line: not Jinja, a placeholder that there is not, a needed one that is missing, or a text that
    cannot be filled in.
    """
    path = require_file(path)
    text = "".join(line for _, line in read_lines(path))
    try:
        tree = ENVIRONMENT_OF_JUDGES.parse(text)
        names = find_undeclared_variables(tree)
    except TemplateSyntaxError as error:
        raise UserError(f"{path}, line {error.lineno}: not a Jinja template ({error.message})") from None
    said = [(node.lineno, node.name, PLACEHOLDERS) for node in tree.find_all(nodes.Name) if node.name in names]
    for part in tree.find_all(nodes.Getattr):
        if not (isinstance(part.node, nodes.Name) and part.node.name == "loop"):
            said.append((part.lineno, part.attr, EXAMPLE_FIELDS))
    for line, name, known in said:
        if name not in known:
            hint = did_you_mean(name, known)
            raise UserError(f"{path}, line {line}: no placeholder {name!r}{hint}; expected {', '.join(known)}")
    for name in (*NEEDED, *(("certainty",) if certainty else ())):
        if name not in names:
            raise UserError(
                f"{path}: no placeholder {name!r} in it, expected {', '.join(NEEDED)} at least"
                + (", and certainty, which --certainty asks for" if certainty else "")
            )
    template = Template(text, path)
    made_up = Query("x", None, None, None, "y", "z", "")
    for profile in (Profile(None, (), ()), Profile("u", ("r",), ())):
        conversation(template, made_up, profile, certainty)
    return template


def tells_of_users(template: Template) -> bool:
    """Whether a template has a placeholder for what is known of a user."""
    return bool(find_undeclared_variables(ENVIRONMENT_OF_JUDGES.parse(template.text)) & ABOUT_USERS)


def conversation(template: Template, query: Query, profile: Profile, certainty: bool = False) -> Messages:
    """What the judge reads of a query: one user message. UserError where the template cannot be filled in."""
    examples = [
        {"prompt": readable(c.prompt, c.tools), "chosen": c.chosen, "rejected": c.rejected} for c in profile.examples
    ]
    values: dict[str, Any] = dict(
        prompt=readable(query.prompt, query.tools), response_a=query.first, response_b=query.second,
        user_text=profile.text, reasons=list(profile.reasons), examples=examples, certainty=certainty,
    )  # fmt: skip
    try:
        text = compiled(template.text).render(values)
    except (TemplateError, TypeError, ValueError, ArithmeticError, LookupError, RecursionError) as error:
        raise UserError(f"{template.path}: cannot be filled in ({error})") from None
    return ({"role": "user", "content": text.strip()},)


compiled = cache(ENVIRONMENT_OF_JUDGES.from_string)  # by a template's text


def readable(prompt: str | Messages, tools: Tools | None = None) -> str:
    """A prompt as text: of messages, each with its role before it, and tool calls, reasoning and tools as JSON."""
    if isinstance(prompt, str):
        return prompt
    parts = [f"tools: {json.dumps(tools, ensure_ascii=False)}"] if tools else []
    for message in prompt:
        beside = [
            f"{name}: {json.dumps(message[name], ensure_ascii=False)}" for name in BESIDE_CONTENT if message.get(name)
        ]
        parts.append("\n".join([f"{message['role']}: {message.get('content') or ''}".rstrip(), *beside]))
    return "\n\n".join(parts)


def parse_answer(text: str) -> Ruling:
    """What an answer says: the letter A or B in it, or that it is a tie; and the one whole number from 1 to 100, if any.

    `unparsed` where it has both letters, or a letter and "tie", or neither, or says what is not so, or has one letter and names
    the other's place ("the first", "the second"). An A before a word in small letters is the article ("A clear answer"), but
    not in "A wins" or "Response A clearly wins".
    """
    numbers = re.findall(r"\d+(?:\.\d+)?", re.sub(r"/\s*100\b", "", text))
    whole = [int(n) for n in set(numbers) if n.isdecimal() and len(n) <= 3 and 1 <= int(n) <= 100]
    certainty = whole[0] if len(set(numbers)) == len(whole) == 1 else None
    without_ties, ties = re.subn(r"\b(?:a )?tie\b", "", text, flags=re.IGNORECASE)
    alone = ALONE.fullmatch(re.sub(r"\d+", "", text))
    named = NAMED_LETTER.sub(lambda found: f"{found[1].upper()}.", without_ties)
    letters = {alone[1].upper()} if alone else set(LETTER.findall(named))
    places = {"A" if place.lower() == "first" else "B" for place in BY_PLACE.findall(text)}
    if len(letters) + bool(ties) != 1 or NEGATED.search(text) or (letters and places - letters):
        return Ruling("unparsed", certainty)
    return Ruling("tie" if ties else "first" if letters == {"A"} else "second", certainty)
