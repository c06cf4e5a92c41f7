"""Evaluate a model: python evaluate.py --checkpoint DIR [--data PATH] [--out DIR] [--set key.sub=value ...]

Writes report.json, report.md and a figure to the run's eval/ (or --out), and prints report.md.
"""

import argparse
from dataclasses import asdict
from pathlib import Path

from prlhf.backbones import choose_device
from prlhf.checkpoint import base_fingerprint, load_final, reference_model
from prlhf.data import read_comparisons
from prlhf.encoding import Encoder, encode_file
from prlhf.errors import UserError, run_command
from prlhf.evaluation import score_users, summarize
from prlhf.losses import REFERENCE_FREE
from prlhf.reference import reference_log_probs
from prlhf.report import markdown, write_report


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", required=True, help="a run's directory or its final/")
    parser.add_argument("--data", help="comparisons; by default the config's data.valid")
    parser.add_argument("--out", help="where the report goes; by default RUN_DIR/eval")
    parser.add_argument("--set", nargs="+", action="extend", default=[], metavar="KEY=VALUE", help="override a key")
    args = parser.parse_args()

    loaded = load_final(args.checkpoint, tuple(args.set))
    config = loaded.config
    source = args.data or config.data.valid
    if source is None:
        raise UserError(f"{loaded.path / 'config.yaml'}: data.valid is not set, expected --data PATH")
    run_dir = loaded.path.parent if loaded.path.name == "final" else loaded.path
    out = Path(args.out) if args.out else run_dir / "eval"
    out.mkdir(parents=True, exist_ok=True)
    encoder = Encoder(loaded.tokenizer, config.data)
    limited = args.data is None or any(text.startswith("data.valid_limit=") for text in args.set)
    file = read_comparisons(source).sample(config.data.valid_limit if limited else None, config.seed)
    data = encode_file(file, encoder, loaded.users)
    print(f"{source}: {data.report.lines()}")

    device = choose_device(config.device)
    loaded.model.to(device)
    reference = None
    if config.loss.kind not in REFERENCE_FREE:
        reference = reference_log_probs(
            lambda: reference_model(loaded), data.comparisons,
            config.evaluate.batch_size, base_fingerprint(loaded.path), device,
        )  # fmt: skip
    scores = score_users(config, loaded.model, data.comparisons)
    users = [c.user for c in data.comparisons]
    report = {
        "checkpoint": str(loaded.path),
        "data": str(source),
        "encoding": asdict(data.report),
        **summarize(config, scores, reference, users, data.names),
    }
    write_report(report, out)
    print(markdown(report))
    print(f"written to {out}")


if __name__ == "__main__":
    run_command(main)
