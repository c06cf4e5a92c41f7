"""Train a personalised language or reward model: python train.py --config NAME.yaml [--set key.sub=value ...]

On several GPUs or machines: torchrun --nproc_per_node 8 train.py --config NAME.yaml [--set key.sub=value ...]

The same command again resumes an unfinished run, and leaves a finished one as it is.
"""

import argparse
import sys
from typing import NoReturn

from prlhf.backbone.loading import choose_device, load_tokenizer
from prlhf.batch.datasets import encode_training_data
from prlhf.batch.tokens import Encoder
from prlhf.config.keys import Config, solves_exactly
from prlhf.config.load import find_config, load_config
from prlhf.data.comparisons import ComparisonFile, read_comparisons
from prlhf.errors import UserError, check_range, run_command
from prlhf.forecast.dry_run import Prediction, available_memory, fastest_recompute, predict, render
from prlhf.parallel.ranks import process_group, rank, say, started_processes, started_rank
from prlhf.parallel.shard import training_model
from prlhf.score.agreement import check_agreement
from prlhf.score.reference import weights_fingerprint
from prlhf.score.task import prepare_task
from prlhf.solve.run import set_prior
from prlhf.store.final import save_final
from prlhf.store.runs import Run, open_run
from prlhf.train.loop import log_solution, train
from prlhf.train.process import compile_attention, out_of_memory_explained, reproducible

Files = tuple[ComparisonFile, ComparisonFile | None]  # training and held-out comparisons


def main() -> None:
    """Parse the command line and read config and data. Then train, or with --dry-run say what training would take."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", required=True, help="a YAML file, as given or in configs/")
    parser.add_argument("--set", nargs="+", action="extend", default=[], metavar="KEY=VALUE", help="override a key")
    parser.add_argument("--overwrite", action="store_true", help="start anew where the run directory has a run already")
    parser.add_argument("--dry-run", action="store_true", help="say what it will take, without loading or writing")
    n = started_processes()
    parser.add_argument("--world-size", type=int, default=n, metavar="N", help="with --dry-run: for N processes")
    parser.add_argument("--memory", type=float, metavar="GB", help="with --dry-run: what each has, if not what is here")
    args = parser.parse_args()

    # Faults of the config and the data are reported here, before a model is loaded.
    path = find_config(args.config)
    config = load_config(path, args.set)
    if config.data.train is None:
        raise UserError(f"{path}: data.train is not set, expected a file of comparisons")
    train_file = read_comparisons(config.data.train, config.data)
    valid_file = read_comparisons(config.data.valid, config.data) if config.data.valid else None
    if args.dry_run:
        dry_run(args, config, (train_file, valid_file))
    device = choose_device(config.device)
    with process_group(config, device), out_of_memory_explained(config):
        run = open_run(config, path.stem, args.overwrite)
        if run.finished and not args.overwrite:
            say(f"{run.final} is finished; --overwrite trains anew")
        else:
            run_training(run.dated(config, args.overwrite), run, device, (train_file, valid_file), args.overwrite)


def run_training(config: Config, run: Run, device: str, files: Files, overwrite: bool) -> None:
    """Train on all processes of the group, and write final/."""
    tokenizer = load_tokenizer(config.model)
    users, train_data, valid_data = encode_training_data(config, tokenizer, *files)
    say(f"train: {train_data.report.lines()}; {len(users)} known users")
    if valid_data is not None:
        say(f"valid: {valid_data.report.lines()}")
    for data in (train_data, valid_data):
        if data is not None and data.said_of_users is not None:
            say(data.said_of_users)

    # Until the first update the model is its own reference, so the reference's log-probs are computed now.
    reproducible(config, device)
    model = training_model(config, tokenizer, len(users), device)
    prompts, encoder = (c.prompt for c in train_data.raw), Encoder(tokenizer, config.data)
    unusual = encoder.unusual_end(prompts, model.backbone.generation_config) if config.method == "pdpo" else None
    if unusual and rank() == 0:
        print(f"warning: {unusual}", file=sys.stderr)
    base = weights_fingerprint(model.backbone)
    check_agreement(model)
    compile_attention(model)
    training = prepare_task(config, model, train_data, base)
    valid = prepare_task(config, model, valid_data, base) if valid_data is not None else None

    # Up to here no file of an earlier run has changed.
    prior = set_prior(config, model, train_data.comparisons, base)
    run.begin(config, overwrite)
    if solves_exactly(config):
        log_solution(run, config, valid, prior)
    else:
        train(run, users, training, valid, base, prior)
    save_final(run.final, model, config, tokenizer, users, base)
    say(f"{run.final} is finished; evaluate it with: python evaluate.py --checkpoint {run.path}")


def dry_run(args: argparse.Namespace, config: Config, files: Files) -> NoReturn:
    """Print what the training will take. Exit with status 0 if it fits in memory, else 1."""
    check_range("--world-size", args.world_size, low=1)
    device = "cuda" if config.device == "cuda" else choose_device(config.device)
    memory = available_memory(device, args.memory, args.world_size)
    tokenizer = load_tokenizer(config.model)
    data = encode_training_data(config, tokenizer, *files)

    def predicted(config: Config) -> Prediction:
        return predict(config, tokenizer, data, device, args.world_size, memory)

    prediction = predicted(config)
    if started_rank() == 0:
        print(render(prediction))
        print(fastest_recompute(config, prediction, predicted))
    sys.exit(0 if prediction.fits else 1)


if __name__ == "__main__":
    run_command(main)
