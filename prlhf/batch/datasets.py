"""Files of comparisons as tokens: what a config trains and evaluates on."""

from typing import NamedTuple

from transformers import PreTrainedTokenizerBase

from prlhf.batch.tokens import EncodedComparison, Encoder, EncodingReport
from prlhf.config.keys import Config
from prlhf.data.comparisons import Comparison, ComparisonFile
from prlhf.data.unknown import alike, check_users, without_users
from prlhf.data.users import UserIndex
from prlhf.errors import UserError


class Dataset(NamedTuple):
    """The comparisons of a file as tokens, the raw ones beside them, what was dropped or cut, and what to say of its users."""

    comparisons: list[EncodedComparison]
    raw: list[Comparison]
    report: EncodingReport
    said_of_users: str | None = None

    @property
    def names(self) -> list[str | None]:
        """The user of each comparison, as the file names them."""
        return [c.user for c in self.raw]


class TrainingData(NamedTuple):
    """What a config trains and evaluates on, as tokens, and the known users."""

    users: UserIndex
    train: Dataset
    valid: Dataset | None


def encode_file(file: ComparisonFile, encoder: Encoder, users: UserIndex) -> Dataset:
    """All comparisons of a file as tokens. UserError where none fits."""
    report = EncodingReport(equal_responses_dropped=file.equal_responses)
    kept = [(tokens, c) for c in file.comparisons if (tokens := encoder.encode(c, users, report)) is not None]
    if not kept:
        raise UserError(
            f"data.max_tokens: found {encoder.config.max_tokens}, but none of {len(file.comparisons)} comparisons fits; "
            "expected more"
        )
    return Dataset([tokens for tokens, _ in kept], [c for _, c in kept], report)


def encode_training_data(
    config: Config, tokenizer: PreTrainedTokenizerBase, train: ComparisonFile, valid: ComparisonFile | None
) -> TrainingData:
    """The files' comparisons as tokens, sampled as the config says.

    UserError where a known user is needed and none is, and as of `check_users` for the held-out file.
    """
    encoder = Encoder(tokenizer, config.data, config.method, config.user_model.place)
    source, names = config.data.train or "", [c.user for c in train.comparisons]
    most_active = UserIndex.from_comparisons(train.comparisons, config.data.known_users)
    train = train.sample(config.data.limit, config.seed)
    users = most_active.with_data(train.comparisons)
    if len(users) == 0 and config.user_model.kind != "uniform":
        raise UserError(f"{without_users(source, config.data)}; expected users, or user_model.kind=uniform")
    said = alike(source, names) if any(names) else without_users(source, config.data)
    encoded = encode_file(train, encoder, users)._replace(said_of_users=said)
    if valid is None:
        return TrainingData(users, encoded, None)
    said = check_users(config.data.valid or "", [c.user for c in valid.comparisons], users, config.data)
    held_out = encode_file(valid.sample(config.data.valid_limit, config.seed), encoder, users)._replace(
        said_of_users=said
    )
    if config.train.best_by == "accuracy" and not any(c.user for c in held_out.comparisons):
        raise UserError(
            f"{config.data.valid}: found {len(held_out.comparisons)} comparisons, none by a user whom {config.data.train} "
            "knows; train.best_by=accuracy measures known users: expected some of theirs, or train.best_by=loss"
        )
    return TrainingData(users, encoded, held_out)
