"""Predicts what each GPU would hold, as the dry run does, for models of real shapes on 1, 2, 4 and 8 GPUs.

    python benchmarks/memory.py [--processes 1 2 4 8] [--micro-batch 4] [--out FILE.json]

P-DPO on comparisons of TL;DR's lengths (`shapes`), T_u = 10, gradient checkpointing. Full fine-tuning: float32 weights and
moments, bfloat16 passes. LoRA: rank 16 on bfloat16 weights. Nothing is loaded; only a model's config.json is read.
"""

import argparse
import dataclasses
import json
import tempfile
from pathlib import Path

from shapes import MODELS, random_comparisons, training_data

from prlhf.backbone.toys import byte_tokenizer
from prlhf.config import load as config_module
from prlhf.errors import run_command
from prlhf.forecast.dry_run import predict

MODES = {
    "full": ("model.compute_dtype=bfloat16",),
    "LoRA": ("model.dtype=bfloat16", "lora.rank=16"),
}
SIZES = (40, 80, 141)  # GB of memory of common GPUs
USERS = 100


def main() -> None:
    """Predict every model, mode and number of GPUs, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2, 4, 8])
    parser.add_argument("--comparisons", type=int, default=32, help="per update")
    parser.add_argument("--micro-batch", type=int, default=4, help="trees per forward pass")
    parser.add_argument("--models", nargs="+", default=list(MODELS), choices=list(MODELS))
    parser.add_argument("--out", help="also write the table as JSON")
    args = parser.parse_args()
    data = training_data(random_comparisons("tldr", args.comparisons, 256, USERS), USERS)
    rows = []
    for name in args.models:
        with tempfile.TemporaryDirectory() as folder:
            MODELS[name].save_pretrained(folder)
            byte_tokenizer().save_pretrained(folder)
            for mode, keys in MODES.items():
                always = (f"model.name={folder}", "model.gradient_checkpointing=true", "device=cuda")
                sizes = (f"optim.batch_size={args.comparisons}", f"optim.micro_batch_size={args.micro_batch}")
                config = config_module.load_config(None, [*always, *sizes, *keys])
                for processes in args.processes:
                    memory = predict(config, byte_tokenizer(), data, "cuda", processes).memory
                    row = {"model": name, "mode": mode, "gpus": processes, "peak": memory.peak}
                    rows.append(row | dataclasses.asdict(memory))
    print("| | GPUs | weights | gradients | moments | gathered | activations | peak, GB each | fits |")
    print("|---|---|---|---|---|---|---|---|---|")
    for row in rows:
        parts = [row[key] for key in ("weights", "gradients", "optimizer", "whole_blocks", "activations", "peak")]
        fits = next((f"{size} GB" for size in SIZES if row["peak"] <= size * 1e9), "no")
        cells = " | ".join(f"{part / 1e9:.1f}" for part in parts)
        print(f"| {row['model']}, {row['mode']} | {row['gpus']} | {cells} | {fits} |")
    if args.out:
        Path(args.out).write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    run_command(main)
