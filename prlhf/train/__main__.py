"""Train a personalised language or reward model: python train.py --config NAME.yaml [--set key.sub=value ...]

On several GPUs or machines: torchrun --nproc_per_node 8 train.py --config NAME.yaml [--set key.sub=value ...]

The same command again resumes an unfinished run, and leaves a finished one as it is.
"""

import argparse
import sys

from prlhf.backbone.loading import choose_device, load_tokenizer
from prlhf.batch.datasets import encode_training_data
from prlhf.config import load as config_module
from prlhf.config.keys import Config, solves_exactly
from prlhf.data.comparisons import ComparisonFile, read_comparisons
from prlhf.errors import UserError, check_range, run_command
from prlhf.forecast.dry_run import available_memory, predict, render
from prlhf.parallel.ranks import process_group, say, started_processes, started_rank
from prlhf.parallel.shard import training_model
from prlhf.score.reference import weights_fingerprint
from prlhf.solve.run import set_prior
from prlhf.store.final import save_final
from prlhf.store.runs import Run, open_run
from prlhf.train.loop import log_solution, out_of_memory_explained, reproducible, train, with_reference


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", required=True, help="a YAML file, as given or in configs/")
    parser.add_argument("--set", nargs="+", action="extend", default=[], metavar="KEY=VALUE", help="override a key")
    parser.add_argument("--overwrite", action="store_true", help="start anew where the run directory has a run already")
    parser.add_argument("--dry-run", action="store_true", help="tell what it will take, loading and writing nothing")
    parser.add_argument("--world-size", type=int, default=started_processes(), metavar="N",
                        help="--dry-run: for N processes")  # fmt: skip
    parser.add_argument("--memory", type=float, metavar="GB", help="--dry-run: what each has, if not what is here")
    args = parser.parse_args()
    # Config and data: all their faults are told before a model is loaded.
    path = config_module.find_config(args.config)
    config = config_module.load_config(path, args.set)
    if config.data.train is None:
        raise UserError(f"{path}: data.train is not set, expected a file of comparisons")
    train_file = read_comparisons(config.data.train, config.data)
    valid_file = read_comparisons(config.data.valid, config.data) if config.data.valid else None
    if args.dry_run:
        check_range("--world-size", args.world_size, low=1)
        device = "cuda" if config.device == "cuda" else choose_device(config.device)
        memory = available_memory(device, args.memory, args.world_size)
        tokenizer = load_tokenizer(config.model)
        data = encode_training_data(config, tokenizer, train_file, valid_file)
        prediction = predict(config, tokenizer, data, device, args.world_size, memory)
        if started_rank() == 0:
            print(render(prediction))
        sys.exit(0 if prediction.fits else 1)
    device = choose_device(config.device)
    with process_group(config, device), out_of_memory_explained(config):
        run_training(
            config, open_run(config, path.stem, args.overwrite), device, train_file, valid_file, args.overwrite
        )


def run_training(
    config: Config,
    run: Run,
    device: str,
    train_file: ComparisonFile,
    valid_file: ComparisonFile | None,
    overwrite: bool,
) -> None:
    """Train on as many processes as there are, and write the model for use."""
    if run.finished and not overwrite:
        say(f"{run.final} is finished; --overwrite trains anew")
        return
    tokenizer = load_tokenizer(config.model)
    users, train_data, valid_data = encode_training_data(config, tokenizer, train_file, valid_file)
    say(f"train: {train_data.report.lines()}; {len(users)} known users")
    if valid_data is not None:
        say(f"valid: {valid_data.report.lines()}")

    # Model and reference: the model is its own reference until the first update.
    reproducible(config, device)
    model = training_model(config, tokenizer, len(users), device)
    base = weights_fingerprint(model.backbone)
    training = with_reference(config, model, train_data, base)
    valid = with_reference(config, model, valid_data, base) if valid_data is not None else None

    # Training, and the model for use. Until here nothing of an earlier run was touched.
    prior = set_prior(config, model, train_data.comparisons, base)
    run.begin(config, overwrite)
    if solves_exactly(config):
        log_solution(config, run, model, valid, prior)
    else:
        train(config, run, model, users, base, training, valid, prior)
    save_final(run.final, model, config, tokenizer, users, base)
    say(f"{run.final} is finished; evaluate it with: python evaluate.py --checkpoint {run.path}")


if __name__ == "__main__":
    run_command(main)
