"""Generate the short and long responses behind train.jsonl and valid.jsonl.

    python examples/length/make_comparisons.py --model ~/.cache/prlhf/SmolLM2-135M-Instruct

Every prompt of prompts.txt (written for this project, Apache-2.0) is answered several times by the model at
temperature 0.8. A short response is a sample's first sentence; a long one is the fewest whole sentences that
reach LONG words. Each is text the model wrote, cut at the end of a sentence. A prompt's shorts and longs are
paired at random, without users: `python -m prlhf.simulate` decides who prefers which. Train and valid share no prompt.
"""

import argparse
import json
import random
import re
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

HERE = Path(__file__).parent
SHORT = range(3, 13)  # words
LONG = range(20, 37)
INSTRUCTIONS = ("Answer in one short sentence.", "Answer the question.")
HELD_OUT = 2  # every fifth prompt from this one is for validation
SYSTEM = "Answer the question."  # what the comparisons' prompts say, whatever drew the response


def messages(question: str, system: str = SYSTEM) -> list[dict[str, str]]:
    return [{"role": "system", "content": system}, {"role": "user", "content": question}]


def sentence_prefixes(text: str) -> list[str]:
    """The text up to the end of its first, second, ... complete sentence, within one paragraph."""
    paragraph = " ".join(text.split("\n\n")[0].split())
    ends = [m.end() for m in re.finditer(r"[.!?](?=\s|$)", paragraph)]
    return [paragraph[:end] for end in ends if not re.search(r"\b(\d+|[A-Z]|Mr|Dr|St|e\.g|i\.e)\.$", paragraph[:end])]


def sample(model, tokenizer, questions: list[str], system: str, max_new_tokens: int) -> list[str]:
    chats = [
        tokenizer.apply_chat_template(messages(q, system), tokenize=False, add_generation_prompt=True)
        for q in questions
    ]
    inputs = tokenizer(chats, padding=True, padding_side="left", add_special_tokens=False, return_tensors="pt")
    with torch.inference_mode():
        output = model.generate(
            **inputs, max_new_tokens=max_new_tokens, do_sample=True, temperature=0.8, top_p=0.95,
            pad_token_id=tokenizer.pad_token_id, eos_token_id=tokenizer.eos_token_id,
        )  # fmt: skip
    return tokenizer.batch_decode(output[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)


def pairs(question: str, samples: list[str], rng: random.Random, most: int) -> list[dict]:
    """Up to `most` (short, long) pairs of one prompt, every response in as few pairs as possible."""
    shorts, longs = {}, {}  # dicts keep order and drop repeats
    for text in samples:
        prefixes = sentence_prefixes(text)
        shorts.update((p, None) for p in prefixes[:1] if len(p.split()) in SHORT)
        longs.update((p, None) for p in [p for p in prefixes if len(p.split()) in LONG][:1])
    everything = [(s, l) for s in shorts for l in longs]
    rng.shuffle(everything)
    used = {text: 0 for text in [*shorts, *longs]}
    chosen: list[tuple[str, str]] = []
    while everything and len(chosen) < most:
        best = min(everything, key=lambda pair: used[pair[0]] + used[pair[1]])
        everything.remove(best)
        chosen.append(best)
        used[best[0]] += 1
        used[best[1]] += 1
    return [{"prompt": messages(question), "responses": list(pair)} for pair in chosen]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--samples", type=int, default=5, help="samples per prompt and instruction")
    parser.add_argument("--pairs", type=int, default=12, help="pairs per prompt at most")
    parser.add_argument("--batch-size", type=int, default=160)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()

    torch.manual_seed(args.seed)
    rng = random.Random(args.seed)
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    questions = (HERE / "prompts.txt").read_text().splitlines()
    samples: dict[str, list[str]] = {q: [] for q in questions}
    for round_ in range(args.samples):
        for system in INSTRUCTIONS:
            for start in range(0, len(questions), args.batch_size):
                batch = questions[start : start + args.batch_size]
                for question, text in zip(batch, sample(model, tokenizer, batch, system, 56)):
                    samples[question].append(text)
        print(f"round {round_ + 1} of {args.samples} done", flush=True)

    found = [pair for question in questions for pair in pairs(question, samples[question], rng, args.pairs)]
    splits: dict[str, list[dict]] = {"train": [], "valid": []}
    held_out = set(questions[HELD_OUT::5])
    for number, pair in enumerate(found):
        chosen, rejected = rng.sample(pair["responses"], 2)  # no preference yet: the order is a coin's
        split = "valid" if pair["prompt"][1]["content"] in held_out else "train"
        splits[split].append(
            {"id": f"length-{number}", "prompt": pair["prompt"], "chosen": chosen, "rejected": rejected}
        )
    for split, records in splits.items():
        write(HERE / f"{split}.jsonl", records)
        prompts = len({record["prompt"][1]["content"] for record in records})
        print(f"{split}: {len(records)} pairs over {prompts} prompts")
    held_out_in_order = [q for q in questions if q in held_out]
    write(HERE / "valid_prompts.jsonl", [{"id": q, "prompt": messages(q)} for q in held_out_in_order])


def write(path: Path, records: list[dict]) -> None:
    with open(path, "w", encoding="utf-8") as file:
        file.writelines(json.dumps(record, ensure_ascii=False) + "\n" for record in records)


if __name__ == "__main__":
    main()
