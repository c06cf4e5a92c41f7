"""Train a personalised language or reward model: python train.py --config NAME.yaml [--set key.sub=value ...]

The same command again resumes an unfinished run, and leaves a finished one as it is.
"""

import argparse
import os

import torch

from prlhf import config as config_module
from prlhf.backbones import choose_device, load_tokenizer
from prlhf.checkpoint import save_final
from prlhf.config import Config
from prlhf.data import UserIndex, read_comparisons
from prlhf.encoding import Dataset, Encoder, encode_file
from prlhf.errors import UserError, run_command
from prlhf.loop import Split, train
from prlhf.losses import needs_reference
from prlhf.personalized import PersonalizedModel, build_model
from prlhf.reference import reference_log_probs, remember_states, weights_fingerprint
from prlhf.runs import open_run


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", required=True, help="a YAML file, as given or in configs/")
    parser.add_argument("--set", nargs="+", action="extend", default=[], metavar="KEY=VALUE", help="override a key")
    parser.add_argument("--overwrite", action="store_true", help="start anew where the run directory has a run already")
    args = parser.parse_args()
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise UserError("torchrun: this version trains in one process; expected --nproc_per_node 1")

    # Config and data: all their faults are told before a model is loaded.
    path = config_module.find(args.config)
    config = config_module.load(path, args.set)
    device = choose_device(config.device)
    if config.data.train is None:
        raise UserError(f"{path}: data.train is not set, expected a file of comparisons")
    train_file = read_comparisons(config.data.train)
    valid_file = read_comparisons(config.data.valid) if config.data.valid else None
    run = open_run(config, path.stem, args.overwrite)
    if run.finished and not args.overwrite:
        print(f"{run.final} is finished; --overwrite trains anew")
        return
    tokenizer = load_tokenizer(config.model)
    encoder = Encoder(tokenizer, config.data, config.method)
    most_active = UserIndex.from_comparisons(train_file.comparisons, config.data.known_users)
    train_file = train_file.sample(config.data.limit, config.seed)
    users = most_active.with_data(train_file.comparisons)
    if len(users) == 0 and config.user_model.kind != "uniform":
        raise UserError(f"{config.data.train}: no comparison has a user; expected users, or user_model.kind=uniform")
    train_data = encode_file(train_file, encoder, users)
    print(f"train: {train_data.report.lines()}; {len(users)} known users")
    valid_data = None
    if valid_file is not None:
        valid_data = encode_file(valid_file.sample(config.data.valid_limit, config.seed), encoder, users)
        print(f"valid: {valid_data.report.lines()}")

    # Model and reference: the model is its own reference until the first update.
    reproducible(config, device)
    model = build_model(config, tokenizer, len(users)).to(device)
    base = weights_fingerprint(model.backbone)
    training = with_reference(config, model, train_data, base)
    valid = with_reference(config, model, valid_data, base) if valid_data is not None else None

    # Training, and the model for use. Until here nothing of an earlier run was touched.
    run.begin(config, args.overwrite)
    train(config, run, model, users, base, training, valid)
    save_final(run.final, model, config, tokenizer, users, base)
    print(f"{run.final} is finished; evaluate it with: python evaluate.py --checkpoint {run.path}")


def reproducible(config: Config, device: str) -> None:
    """Seed torch; on a GPU also choose deterministic kernels, so that a resumed run ends bit for bit alike."""
    torch.manual_seed(config.seed)
    if device == "cuda" and config.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)


def with_reference(config: Config, model: PersonalizedModel, data: Dataset, base: str) -> Split:
    """The data with its reference log-probs, which reward models and the reference-free losses do without."""
    batch_size = config.evaluate.batch_size
    remember_states(model, data.comparisons, batch_size, base)
    if not needs_reference(config):
        return Split(data, None)
    return Split(data, reference_log_probs(lambda: model, data.comparisons, batch_size, base, model.device.type))


if __name__ == "__main__":
    run_command(main)
