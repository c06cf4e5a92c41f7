"""Positions computed in an epoch, with and without sharing between comparisons of one pair or of the same responses.

    python benchmarks/sharing.py --data runs/data/ukpconvarg1/train.jsonl.gz [--known 10] [--batch-size 32]
                                 [--micro-batch 8] [--out FILE.json]

`group_by` puts comparisons of the same two responses, or of few responses, into one update; `share_trees` computes what they
have in common once. Models: P-DPO with both branches and T_u = 10, and reward models with a soft prompt of one vector at each place,
or a linear head. Counts the positions of the
forward passes, and the padding among them; a random model of one block lays them out on the CPU, one tree per row. By default
an update is one forward pass per branch, which shares the most and pads the most. Training cuts it into micro-batches of
optim.micro_batch_size trees (8 by default), which share nothing with each other.
"""

import argparse
import itertools
import json
from pathlib import Path

from prlhf.backbone.loading import load_tokenizer
from prlhf.backbone.toys import byte_tokenizer
from prlhf.batch.datasets import encode_training_data
from prlhf.config import load as config_module
from prlhf.data.comparisons import read_comparisons
from prlhf.errors import run_command
from prlhf.method.build import build_model
from prlhf.score.task import Task
from prlhf.train.plan import epoch_updates, plan_update

MODELS = {
    "P-DPO, soft prompt": ["method=pdpo", "user_model.tokens=10"],
    "P-RM, soft prompt of one vector": ["method=prm", "user_model.tokens=1"],
    "P-RM, the same at prompt_end": ["method=prm", "user_model.tokens=1", "user_model.place=prompt_end"],
    "P-RM, the same at response_end": ["method=prm", "user_model.tokens=1", "user_model.place=response_end"],
    "P-RM, linear head": ["method=prm", "user_model.tokens=1", "user_model.aggregator=linear", "user_model.init=zero"],
}


def main() -> None:
    """Count the positions of an epoch for each combination of the two keys."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True)
    parser.add_argument(
        "--tokenizer", default="~/.cache/prlhf/SmolLM2-135M-Instruct", help="a model's folder, or bytes"
    )
    parser.add_argument("--known", type=int, default=10, help="known users: the most active ones")
    parser.add_argument("--limit", type=int, help="comparisons, a seeded sample; default: all")
    parser.add_argument("--batch-size", type=int, default=32, help="comparisons per update")
    parser.add_argument("--micro-batch", type=int, help="trees per forward pass; default: all of an update")
    parser.add_argument("--out", help="also write the table as JSON")
    args = parser.parse_args()
    file = read_comparisons(args.data)
    if args.tokenizer == "bytes":
        tokenizer = byte_tokenizer()
    else:
        tokenizer = load_tokenizer(config_module.load_config(None, [f"model.name={args.tokenizer}"]).model)
    keys = ["model.family=llama", "model.width=16", "model.heads=1", "model.layers=1", "data.max_tokens=4000"]
    keys += [f"data.known_users={args.known}", f"data.limit={args.limit or 'null'}"]
    keys += [f"optim.batch_size={args.batch_size}", f"optim.micro_batch_size={args.micro_batch or 2 * args.batch_size}"]
    data, rows = None, []
    print("| | optim.group_by | model.share_trees | positions an epoch | of none | padding, of positions |")
    print("|---" * 6 + "|")
    for model_name, model_keys in MODELS.items():
        positions: dict[tuple[str, str], int] = {}
        for group_by, share in itertools.product(("none", "pair", "response"), ("false", "true")):
            settings = [f"optim.group_by={group_by}", f"model.share_trees={share}"]
            config = config_module.load_config(None, [*keys, *model_keys, *settings])
            data = data or encode_training_data(config, tokenizer, file, None)
            comparisons = data.train.comparisons
            model = build_model(config, tokenizer, len(data.users))
            count = padding = 0
            for update in epoch_updates(config, comparisons, epoch=0):
                for part in plan_update(Task(config, model, comparisons), update):
                    batch = model.collate([comparisons[i] for i in part.indices], part.users)
                    real = int((batch.trees_RT > 0).sum())
                    count, padding = count + real, padding + batch.trees_RT.numel() - real
            positions[group_by, share] = count
            of_none = count / positions["none", "false"]
            found = {"model": model_name, "group_by": group_by, "share_trees": share == "true"}
            rows.append({**found, "positions": count, "of_none": of_none, "padding": padding})
            padded = f"{padding / count:.2f}"
            print(f"| {model_name} | {group_by} | {share} | {count:,} | {of_none:.2f} | {padded} |", flush=True)
    print(f"{data.train.report.lines()}; {len(data.users)} known users; {args.batch_size} comparisons an update")
    if args.out:
        Path(args.out).write_text(json.dumps({"arguments": vars(args), "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    run_command(main)
