"""Answer prompts as several users: python generate.py --checkpoint DIR --prompts FILE.jsonl --users alice,bob,generic
--out responses.jsonl

A line of --prompts is {"prompt": text or messages, "id"?, "user"?, "user_text"?}; a line of --out is {"id", "user", "prompt",
"response", "tokens", "finished", ...}. The same command again continues where it stopped. With --baseline the untouched base
model of the run answers (`base`), told of the user the text (`roleplay`) or N comparisons (`fewshot:N`).

Score responses with a reward model: python generate.py --checkpoint DIR --score FILE.jsonl --out rewards.jsonl
A line of --score is {"prompt", "response", "user", "user_text"?, "id"?}; of --out, {"id", "user", "known", "reward"}.
"""

import argparse
import sys
from collections.abc import Hashable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

from tqdm import tqdm

from prlhf.backbone.loading import choose_device
from prlhf.batch.tokens import EncodedPrompt, Encoder
from prlhf.data.comparisons import GENERIC, Prompt, read_prompts
from prlhf.data.files import fingerprint_of
from prlhf.data.unknown import check_users
from prlhf.errors import UserError, check_range, run_command
from prlhf.generate.asked import asked_names
from prlhf.generate.decode import Decoding, Request, batches, check_decoding, generate
from prlhf.generate.responses import ResponseFile
from prlhf.generate.rewards import score_file
from prlhf.judge.baselines import BASELINES, find_baseline
from prlhf.parallel.ranks import check_started_alone
from prlhf.score.agreement import check_agreement
from prlhf.store.final import Loaded, load_final, weights_checksum


def main() -> None:
    """Check the options, load the model, and answer prompts or score responses."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", required=True, help="a run's directory or its final/")
    task = parser.add_mutually_exclusive_group(required=True)
    task.add_argument("--prompts", help="what to answer")
    task.add_argument("--score", metavar="FILE", help="responses to score, all, each as its own user")
    parser.add_argument(
        "--users",
        help='for --prompts: names with commas between ("Smith, J." in quotes), generic, @all, or @own: who asks',
    )
    parser.add_argument("--baseline", help=f"for --prompts: the run's base model answers: {', '.join(BASELINES)}")
    parser.add_argument("--out", required=True)
    parser.add_argument("--max-new-tokens", type=int, default=128)
    parser.add_argument("--temperature", type=float, default=0.0, help="0 is greedy")
    parser.add_argument("--top-p", type=float, default=1.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--batch-size", type=int, default=32, help="1: no row's rounding depends on another's")
    parser.add_argument("--limit", type=int, help="with --prompts: the first so many")
    parser.add_argument("--overwrite", action="store_true", help="replace --out")
    parser.add_argument("--set", nargs="+", action="extend", default=[], metavar="KEY=VALUE", help="override a key")
    args = parser.parse_args()
    check_range("--max-new-tokens", args.max_new_tokens, low=1)
    check_range("--temperature", args.temperature, low=0)
    check_range("--top-p", args.top_p, low=1e-6, high=1)
    check_range("--batch-size", args.batch_size, low=1)
    check_range("--limit", 1 if args.limit is None else args.limit, low=1)
    for name in ("users", "baseline", "limit", "max_new_tokens", "temperature", "top_p", "seed"):
        if args.score and getattr(args, name) != parser.get_default(name):
            raise UserError(f"--{name.replace('_', '-')}: not for --score, which takes --out and --batch-size")
    check_started_alone("generate.py")
    loaded = load_final(args.checkpoint, tuple(args.set))
    if args.score:
        print(score_file(loaded, args.score, args.out, args.batch_size, args.overwrite))
    elif args.users is None:
        raise UserError("--users: expected names with commas between, e.g. --users generic")
    else:
        answer(args, loaded)


def answer(args: argparse.Namespace, loaded: Loaded) -> None:
    """Write the responses to --prompts for each of --users, but those that --out has already."""
    prompts = read_prompts(args.prompts, loaded.config.data)
    if args.baseline is None and loaded.config.method != "pdpo":
        raise UserError(f"{loaded.path}: a model of method {loaded.config.method} does not generate, expected pdpo")
    baseline = find_baseline(loaded, args.baseline, args.seed) if args.baseline else None
    loaded = baseline.loaded if baseline else loaded
    if args.users == "@own":
        said = check_users(args.prompts, [p.user for p in prompts], loaded.users, loaded.config.data, "prompt")
        if said is not None:
            print(said)
    names = dict.fromkeys(asked_names(args.users, loaded.users))
    asked = [(p, name) for p in prompts[: args.limit] for name in names or [p.user or GENERIC]]
    model = loaded.model.to(choose_device(loaded.config.device))
    check_agreement(model)
    check_decoding(model)
    read = baseline.prompts(asked) if baseline else [p for p, _ in asked]
    encoder = Encoder(loaded.tokenizer, loaded.config.data, place=loaded.config.user_model.place)
    prefixes = prefixes_of(read, encoder)
    decoding = Decoding(args.max_new_tokens, args.temperature, args.top_p, args.seed)
    settings = {"model": weights_checksum(loaded.path), "baseline": args.baseline, **asdict(decoding)}
    out = ResponseFile(Path(args.out), settings, args.overwrite)

    waiting = waiting_for(asked, prefixes, loaded, out, greedy=args.temperature == 0)
    cut = len({prompt.id for (prompt, _), p in zip(asked, prefixes) if p.prompt_cut + p.user_text_cut > 0})
    count = len(prompts[: args.limit])
    print(f"{count} prompts, {cut} of them or their user texts truncated, for users {args.users}")

    ends = encoder.stop_ids(model.backbone.generation_config)
    if unusual := encoder.unusual_end((p.text for p in read), model.backbone.generation_config):
        print(f"warning: {unusual}", file=sys.stderr)
    requests = [request for request, _ in waiting]
    model.check_length(max((len(r.ids) for r in requests), default=0) + args.max_new_tokens)
    for batch in tqdm(batches(requests, args.batch_size), desc="generation", unit="batch", disable=None):
        responses = generate(model, [requests[n] for n in batch], ends, decoding)
        texts = loaded.tokenizer.batch_decode([r.ids for r in responses], skip_special_tokens=True)
        for n, response, text in zip(batch, responses, texts):
            for record in waiting[n].records:
                out.append({**record, "response": text, "tokens": len(response.ids), "finished": response.finished})
    print(f"{args.out}: {sum(len(records) for _, records in waiting)} new responses, {len(asked)} in all")


class Waiting(NamedTuple):
    """A request, and the records of the output that are to have its response."""

    request: Request
    records: list[dict[str, Any]]


def waiting_for(
    asked: Sequence[tuple[Prompt, str]],
    prefixes: Sequence[EncodedPrompt],
    loaded: Loaded,
    out: ResponseFile,
    greedy: bool,
) -> list[Waiting]:
    """What `out` lacks of the prompts and users asked. Those who read the same have one greedy answer: it is computed once."""
    found: dict[Hashable, Waiting] = {}
    for (prompt, name), prefix in zip(asked, prefixes):
        record = {"id": prompt.id, "user": name, "prompt": prompt.text, "user_text": prompt.user_text}
        record |= {"tools": prompt.tools} if prompt.tools else {}
        record["prefix"] = fingerprint_of(prefix.ids)[:12]
        if not out.has(record):
            request = Request(prefix.ids, loaded.number(name), f"{prompt.id} {name}", prefix.tail)
            key = tuple(request.ids), request.user, None if greedy else request.name
            found.setdefault(key, Waiting(request, [])).records.append(record)
    return list(found.values())


def prefixes_of(prompts: Sequence[Prompt], encoder: Encoder) -> list[EncodedPrompt]:
    """What the model reads of each prompt, which is the same object for many users."""
    found: dict[int, EncodedPrompt] = {}
    for p in prompts:
        if id(p) not in found:
            found[id(p)] = encoder.prefix_to_answer(encoder.read(p.text, p.where, p.tools), p.user_text, p.where)
    return [found[id(p)] for p in prompts]


if __name__ == "__main__":
    run_command(main)
