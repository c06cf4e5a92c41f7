"""A judge on any OpenAI-compatible server: conversations in, the texts of its answers out.

The package openai, the extra `judge`, does the talking. It also asks again, with exponential back-off and jitter, after 408, 409,
429 and 5xx (Retry-After honoured up to two minutes), time-outs and broken connections. Each answer is on disk before the next
question is sent, under a hash of all that decides it. So the same command goes on after a budget is spent, an error, Ctrl-C or a
kill, and nothing is paid for twice.
"""

import argparse
import asyncio
import hashlib
import json
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from tqdm import tqdm

from prlhf.data.comparisons import Messages
from prlhf.errors import UserError, check_range
from prlhf.judge.kept import AnswerFile, Completion, read_completion

OPENAI_URL = "https://api.openai.com/v1"
TEMPERATURE = 0
ANSWER_TOKENS = 16  # an answer may take: a letter, and a few words around it
CERTAIN_ANSWER_TOKENS = 32  # with a stated certainty
RETRIES = 6  # of the package: half a second, then twice as long each time, at most 8: 23 seconds in all
ANSWER_SECONDS = 60.0  # seconds that an answer may take
NONSENSE_PAUSES = (0.5, 1.0)  # seconds before a body that is no answer is asked for again
CHARACTERS_PER_TOKEN = 4  # of English text, roughly; for estimates alone
ANSWERS_FOLDER = "answers"  # in --out
ANSWERS_FILE = "answers.jsonl"


@dataclass
class Server:
    """A model on a server, where its answers are kept, what may be spent on it in this process, and what has been."""

    model: str
    base_url: str
    folder: Path
    concurrency: int = 8
    max_requests: int | None = None
    max_tokens: int | None = None
    dry_run: bool = False
    answer_tokens: int = ANSWER_TOKENS
    retries: int = RETRIES
    timeout: float = ANSWER_SECONDS
    requests: int = 0  # sent; one that the package repeats counts once
    tokens: int = 0  # of prompts and answers, as the server says
    wanted: dict[str, int] = field(default_factory=dict)  # of a dry run: an estimate of each question's tokens

    @property
    def url(self) -> str:
        """The base URL without user name, password, query and a slash at its end."""
        parts = urlsplit(self.base_url)
        return f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}{parts.path.rstrip('/')}"

    @property
    def spent(self) -> str | None:
        """The budget that is spent, as its option and number; None while there is some left."""
        budgets = {"--max-requests": (self.requests, self.max_requests), "--max-tokens": (self.tokens, self.max_tokens)}
        return next((f"{name} {most}" for name, (used, most) in budgets.items() if most and used >= most), None)

    def forecast(self) -> str:
        """What a dry run has found: how many requests, and roughly how many tokens."""
        most = len(self.wanted) * self.answer_tokens
        return (
            f"dry run: {len(self.wanted):,} requests to {self.model} at {self.url} would be sent, without those whose answers "
            f"are in {self.folder}: about {sum(self.wanted.values()):,} tokens to read (an estimate: characters / "
            f"{CHARACTERS_PER_TOKEN}), at most {most:,} to write; nothing was sent"
        )


def add_options(parser: argparse.ArgumentParser) -> None:
    """The options of a judge openai:MODEL."""
    group = parser.add_argument_group(
        "for --judge openai:MODEL", "The server's key is read from OPENAI_API_KEY, and from there alone."
    )
    group.add_argument("--base-url", help=f"of the server; by default OPENAI_BASE_URL, else {OPENAI_URL}")
    group.add_argument("--concurrency", type=int, default=8, help="requests under way at once (8)")
    group.add_argument("--max-requests", type=int, help="stop after so many; the same command goes on")
    group.add_argument("--max-tokens", type=int, help="stop after so many, prompts and answers together")
    group.add_argument("--answers", metavar="FOLDER", help=f"where answers are kept; by default OUT/{ANSWERS_FOLDER}")
    group.add_argument("--dry-run", action="store_true", help="say how many requests and tokens it would be; send none")


def server_of(args: argparse.Namespace, certainty: bool = False) -> Server | None:
    """The server that the options of `add_options` name; None for another judge.

    UserError for a number out of range, a base URL that is none, and an option that another judge does not have.
    """
    kind, _, model = args.judge.partition(":")
    if kind != "openai" or not model:
        options = argparse.ArgumentParser()
        add_options(options)
        for name, default in vars(options.parse_args([])).items():
            if getattr(args, name) != default:
                raise UserError(f"--{name.replace('_', '-')}: not for --judge {args.judge}, expected openai:MODEL")
        return None
    for name in ("concurrency", "max_requests", "max_tokens"):
        value = getattr(args, name)
        check_range(f"--{name.replace('_', '-')}", 1 if value is None else value, low=1)
    base_url = args.base_url or os.environ.get("OPENAI_BASE_URL") or OPENAI_URL
    try:
        is_url = urlsplit(base_url).scheme in ("http", "https") and bool(urlsplit(base_url).hostname)
    except ValueError:
        is_url = False
    if not is_url:
        where = "--base-url" if args.base_url else "OPENAI_BASE_URL"
        raise UserError(f"{where}: found no URL, expected one such as {OPENAI_URL}")
    return Server(
        model,
        base_url,
        Path(args.answers or Path(args.out) / ANSWERS_FOLDER),
        args.concurrency,
        args.max_requests,
        args.max_tokens,
        args.dry_run,
        CERTAIN_ANSWER_TOKENS if certainty else ANSWER_TOKENS,
    )


def key_of(server: Server, messages: Messages) -> str:
    """The SHA-256 of all that decides an answer: model, base URL without credentials, messages, temperature, tokens it may take.

    The URL counts because servers give one name to different weights. Neither it nor the messages can be read off the key.
    """
    decides = [server.model, server.url, list(messages), TEMPERATURE, server.answer_tokens]
    return hashlib.sha256(json.dumps(decides, sort_keys=True).encode()).hexdigest()


def answers(server: Server, conversations: Sequence[Messages]) -> list[str]:
    """The model's answer to each conversation, in their order; "" where it had nothing to say, or was cut (`Completion.said`).

    Equal conversations are asked once, and those whose answer is on disk not at all. Of a dry run all are "", and those that
    would be asked are put down in `server.wanted`.
    UserError, with what is kept: the budget is spent, the server refuses, cannot be reached or speaks no sense; and where
    there is something to ask, but no key or no package openai.
    """
    kept = AnswerFile(server.folder / ANSWERS_FILE)
    by_key = {key_of(server, messages): messages for messages in conversations}
    asked = {key: messages for key, messages in by_key.items() if key not in kept.answers}
    if server.dry_run:
        server.wanted |= {key: estimated_tokens(messages) for key, messages in asked.items()}
        return [""] * len(conversations)
    if asked:

        def with_kept(problem: str) -> str:
            done = sum(key in kept.answers for key in by_key)
            return f"{problem}; {done:,} of {len(by_key):,} answers are kept in {kept.path}, the same command goes on"

        try:
            problem = asyncio.run(_ask_all(server, asked, kept, _api_key()))
        except KeyboardInterrupt:
            print(with_kept("interrupted"), file=sys.stderr)
            raise
        if problem:
            raise UserError(with_kept(problem))
    said = {key: kept.answers[key].said for key in by_key}
    if cut := list(said.values()).count(None):
        print(
            f"{server.model}: {cut:,} of {len(said):,} answers were cut, at {server.answer_tokens} tokens or while it thought, and "
            "are unparsed",
            file=sys.stderr,
        )
    return [said[key_of(server, messages)] or "" for messages in conversations]


def _api_key() -> str:
    """The key, from the environment. UserError where there is none, or it cannot stand in a header."""
    key = os.environ.get("OPENAI_API_KEY", "").strip()
    if not key:
        raise UserError("OPENAI_API_KEY: not set, expected the server's key (any text where it needs none)")
    if not (key.isascii() and key.isprintable()):
        raise UserError("OPENAI_API_KEY: found characters that no key has, expected printable ASCII")
    return key


def estimated_tokens(messages: Messages) -> int:
    """Roughly how many tokens a conversation has."""
    return -(-sum(len(str(m.get("content") or "")) for m in messages) // CHARACTERS_PER_TOKEN)


async def _ask_all(server: Server, asked: Mapping[str, Messages], kept: AnswerFile, api_key: str) -> str | None:
    """Ask, and keep, until all is answered (None), the budget is spent, or something is wrong: what that is.

    No more is sent then; what is under way is awaited and kept, since it is paid for.
    """
    try:
        import httpx2  # which openai sends by
        import openai
    except ImportError:
        raise UserError(
            "--judge openai: the package is not installed, expected it (pip install 'prlhf[judge]')"
        ) from None
    kept.prepare()
    problems: list[str] = []
    left = iter(asked.items())

    async def work() -> None:
        while not problems and not server.spent:
            key, messages = next(left, ("", ()))
            if not key:
                return
            try:
                answer = await _ask(client, server, messages)
            except (openai.OpenAIError, _NoCompletion) as error:
                problems.append(_told(server, error, api_key))
                return
            kept.append(key, answer)
            server.tokens += answer.tokens or 0
            bar.update()
            if server.max_tokens and answer.tokens is None:
                problems.append(
                    f"{server.url}: does not say how many tokens it used, expected another budget (--max-requests)"
                )

    class Timed(openai.DefaultAsyncHttpxClient):
        async def send(self, *args: Any, **options: Any) -> Any:
            """One try, within the time limit as a whole: the package's own limit is of the time between two bytes."""
            try:
                return await asyncio.wait_for(super().send(*args, **options), server.timeout)
            except asyncio.TimeoutError:  # noqa: UP041, another one in Python 3.10
                raise httpx2.ReadTimeout("no whole answer in time") from None

    client = openai.AsyncOpenAI(
        api_key=api_key,
        base_url=server.base_url,
        max_retries=server.retries,
        timeout=server.timeout,
        http_client=Timed(),
    )
    with tqdm(total=len(asked), desc="judging", unit="answer", disable=None) as bar:
        async with client:
            await asyncio.gather(*(work() for _ in range(min(server.concurrency, len(asked)))))
    if not problems and next(left, None):
        problems.append(f"{server.spent}: spent, with {server.requests:,} requests and {server.tokens:,} tokens")
    return problems[0] if problems else None


class _NoCompletion(Exception):
    """What came back is no chat completion; the message is the body."""


async def _ask(client: Any, server: Server, messages: Messages) -> Completion:
    """One answer. _NoCompletion where what comes back is none, in all of three tries or within the budget."""
    for pause in (*NONSENSE_PAUSES, None):
        server.requests += 1
        response = await client.chat.completions.with_raw_response.create(
            model=server.model,
            messages=list(messages),
            temperature=TEMPERATURE,
            max_tokens=server.answer_tokens,
            stream=False,
        )
        body = response.http_response.text
        if (answer := read_completion(body)) is not None:
            break
        if pause is not None:
            await asyncio.sleep(pause)
        if pause is None or server.spent:
            raise _NoCompletion(body)
    return answer


def _told(server: Server, error: Exception, api_key: str) -> str:
    """What went wrong, in one sentence without the key."""
    import openai

    def short(text: object) -> str:
        line = " ".join(str(text).replace(api_key, "***").split())
        return line if len(line) <= 200 else line[:197] + "..."

    tries = f"tried {1 + server.retries} times"
    if isinstance(error, _NoCompletion):
        said = f"found {short(error) or 'an empty body'}, expected a chat completion with choices"
    elif isinstance(error, openai.APITimeoutError):
        said = f"no answer within {server.timeout:g} seconds, {tries}"
    elif isinstance(error, openai.APIConnectionError):
        said = f"cannot be reached, {tries} ({short(error.__cause__ or error)})"
    elif isinstance(error, openai.APIStatusError):
        body = error.body.get("message") or json.dumps(error.body) if isinstance(error.body, dict) else error.body
        said = f"answered {error.status_code} ({short(body or error.message)})"
        if wait := error.response.headers.get("Retry-After"):
            said += f", with Retry-After {short(wait)}"
        if error.status_code in (401, 403):
            said += ", expected its key in OPENAI_API_KEY"
        elif error.status_code == 404:
            said += f", expected a base URL below which it has {server.model}"
    else:
        said = short(error)
    return f"{server.url}: {said}"
