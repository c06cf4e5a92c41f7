"""How well a model knows new users after N comparisons: the table of docs/results.md.

    python -m examples.new_users polis --checkpoint RUN --data FOLDER [--set key=value ...]

polis: voters of FOLDER/unseen_users_adapt.jsonl, whom RUN does not know, are adapted with their first N comparisons, and
predicted on FOLDER/unseen_users_test.jsonl, which shares no vote with them. The rows: everybody as the generic user; adapted
(prlhf.adapt); and, as a control, adapted with another voter's N comparisons. Accuracy is the mean over voters of each one's;
the interval (95 %, bootstrap over voters) is of its difference from the generic user, paired by voter. Calibration error of
the adapted users' probabilities: of the most probable vector, and integrated over its posterior. Nothing is chosen on either
file: the prior comes from RUN and its training file.
"""

import argparse
from typing import NamedTuple

import numpy as np
import torch

from prlhf.adapt.__main__ import encoded, training_judgements
from prlhf.adapt.evidence import Judgements, judgements
from prlhf.adapt.users import check_adaptable, new_users_prior
from prlhf.adapt.variational import Evidence, Fit, Gaussian, fit
from prlhf.backbone.loading import choose_device
from prlhf.config.keys import LossConfig
from prlhf.data.check.tables import markdown_table
from prlhf.data.comparisons import read_comparisons
from prlhf.data.users import UserIndex, ranked
from prlhf.errors import run_command
from prlhf.evaluate.stats.metrics import correct, expected_calibration_error
from prlhf.method.posterior import integrated
from prlhf.score.agreement import check_agreement
from prlhf.store.final import Loaded, load_final

SHOTS = (0, 1, 2, 5, 10, 20, 50)
SAMPLES = 10_000
SEED = 0


class Protocol(NamedTuple):
    """New users' comparisons to learn from and to predict, by number, and their prior."""

    loss: LossConfig
    prior: Gaussian
    sharpness: float
    learn: Judgements
    predict: Judgements

    @property
    def users(self) -> list[int]:
        """Those who are in both files."""
        return sorted(set(self.learn.rows) & set(self.predict.rows))


def polis(loaded: Loaded, folder: str) -> Protocol:
    """The voters of a Polis folder whom training did not know."""
    files = [read_comparisons(f"{folder}/unseen_users_{part}.jsonl", loaded.config.data) for part in ("adapt", "test")]
    users = UserIndex(ranked(c.user for c in files[0].comparisons))
    judged = []
    for file in files:
        data = encoded(loaded, file)
        pairs = [c._replace(user=users.number(name)) for c, name in zip(data.comparisons, data.names)]
        judged.append(judgements(loaded, pairs))
    prior = new_users_prior(loaded, training_judgements(loaded))
    print(f"prior of a new user: {prior.said}")
    return Protocol(loaded.config.loss, prior.gaussian, prior.sharpness, *judged)


PROTOCOLS = {"polis": polis}


class Margins(NamedTuple):
    """Of a user's predicted comparisons, (N,): of the generic user, adapted, adapted and integrated, adapted to another user."""

    generic: np.ndarray
    adapted: np.ndarray
    integrated: np.ndarray
    another: np.ndarray

    @property
    def accuracies(self) -> list[float]:
        """Of each, with ties as one half."""
        return [float(correct(margins).mean()) for margins in self]


def predicted(protocol: Protocol, shots: int) -> list[Margins]:
    """What is predicted of each user after so many comparisons; another user is the next one."""
    users = protocol.users
    found: list[Margins] = []
    for user, other in zip(users, users[1:] + users[:1]):
        own, another = (fitted(protocol, protocol.learn.of(who), shots) for who in (user, other))
        test = protocol.predict.of(user)
        features_NK = test.features_NK
        adapted_N = test.generic_N + features_NK @ own.mean_K
        sure_N = integrated(adapted_N, own.variances(protocol.prior, features_NK), protocol.sharpness)
        another_N = test.generic_N + features_NK @ another.mean_K
        found.append(Margins(*(m.numpy() for m in (test.generic_N, adapted_N, sure_N, another_N))))
    return found


def fitted(protocol: Protocol, evidence: Evidence, shots: int) -> Fit:
    """A user after the first so many comparisons."""
    return fit(protocol.loss, evidence.of(slice(0, shots)), protocol.prior, protocol.sharpness)


def difference(accuracies_M: np.ndarray, generic_M: np.ndarray) -> str:
    """The mean of the paired differences with a bootstrap interval over users, in points."""
    rng, gains_M = np.random.default_rng(SEED), 100 * (accuracies_M - generic_M)
    means = gains_M[rng.integers(len(gains_M), size=(SAMPLES, len(gains_M)))].mean(axis=1)
    low, high = np.quantile(means, (0.025, 0.975))
    return f"{gains_M.mean():+.1f} ({low:+.1f} to {high:+.1f})"


def table(protocol: Protocol) -> str:
    """One row for each N."""
    rows = []
    for shots in SHOTS:
        margins = predicted(protocol, shots)
        generic_M, adapted_M, _, another_M = np.array([each.accuracies for each in margins]).T
        errors = [expected_calibration_error(np.concatenate(column)) for column in list(zip(*margins))[1:3]]
        rows.append((
            str(shots), f"{100 * generic_M.mean():.1f}", f"{100 * adapted_M.mean():.1f}", difference(adapted_M, generic_M),
            f"{100 * another_M.mean():.1f}", difference(another_M, generic_M), *(f"{100 * error:.1f}" for error in errors),
        ))  # fmt: skip
    head = ("N", "generic", "adapted", "less generic", "another's N", "less generic", "ECE plug-in", "ECE integrated")
    return markdown_table(head, rows)


def main() -> None:
    """Print the table of the protocol that the command line names."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("protocol", choices=PROTOCOLS)
    parser.add_argument("--checkpoint", required=True, help="a run's directory or its final/")
    parser.add_argument("--data", required=True, help="the protocol's folder")
    parser.add_argument("--set", nargs="+", action="extend", default=[], metavar="KEY=VALUE", help="override a key")
    args = parser.parse_args()
    loaded = load_final(args.checkpoint, tuple(args.set))
    check_adaptable(loaded)
    check_agreement(loaded.model.to(choose_device(loaded.config.device)))
    with torch.no_grad():
        protocol = PROTOCOLS[args.protocol](loaded, args.data)
        print(f"{len(protocol.users)} new users")
        print(table(protocol))


if __name__ == "__main__":
    run_command(main)
