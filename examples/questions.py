"""How much sooner chosen questions tell who a new voter is than random ones: the table of docs/results.md.

    python -m examples.questions --checkpoint RUN --data FOLDER

A simulation over recorded votes. The candidates of each voter of FOLDER/unseen_users_adapt.jsonl, whom RUN does not know, are
that voter's own pairs there. Accuracy after n answers is on FOLDER/unseen_users_test.jsonl, which shares no vote with them.
- random: n pairs in random order, the mean over ORDERS orders.
- one at a time: the most informative pair (prlhf.adapt --ask 1) is asked and its recorded answer fitted, n times.
- at once: the n most informative pairs (--ask n), with no answer in between.
- variance: one at a time, the pair that most lowers the mean variance of margins over the pairs of RUN's training file.
Accuracy is the mean over voters, with the difference from random at the same n, and a 95 % interval over voters of the paired
difference (bootstrap). Nothing is chosen on either file: the prior comes from RUN and its training file.
"""

import argparse
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from prlhf.adapt.ask import expected_answer, questions
from prlhf.adapt.evidence import Judgements, judgements
from prlhf.adapt.newton import Evidence, Gaussian, fit
from prlhf.adapt.reading import encoded, training_judgements
from prlhf.adapt.users import check_adaptable, new_users_prior
from prlhf.backbone.loading import choose_device
from prlhf.config.keys import LossConfig
from prlhf.data.check.tables import markdown_table
from prlhf.data.comparisons import read_comparisons
from prlhf.data.users import UserIndex, ranked
from prlhf.errors import run_command
from prlhf.evaluate.stats.metrics import correct
from prlhf.score.agreement import check_agreement
from prlhf.store.final import Loaded, load_final

SHOTS = (1, 2, 5, 8, 10, 12, 15, 20)
ORDERS = 20
SAMPLES = 10_000
SEED = 0

Pick = Callable[[Gaussian, Evidence], int]  # what is known of a voter and the pairs that are left -> the next question


class Voters(NamedTuple):
    """New voters' pairs to ask about and to predict, by number, and their prior."""

    loss: LossConfig
    prior: Gaussian
    learn: Judgements
    predict: Judgements

    @property
    def users(self) -> list[int]:
        """Those who are in both files."""
        return sorted(set(self.learn.pairs) & set(self.predict.pairs))


def new_voters(loaded: Loaded, training: Judgements, folder: str) -> Voters:
    """The voters of a Polis folder whom training did not know."""
    files = [read_comparisons(f"{folder}/unseen_users_{part}.jsonl", loaded.config.data) for part in ("adapt", "test")]
    users = UserIndex(ranked(c.user for c in files[0].comparisons))
    judged = []
    for data in (encoded(loaded, file) for file in files):
        numbered = [c._replace(user=users.number(name)) for c, name in zip(data.comparisons, data.names)]
        judged.append(judgements(loaded, numbered))
    prior, said = new_users_prior(loaded, training)
    print(f"prior of a new user: {said}")
    return Voters(loaded.config.loss, prior, *judged)


def accuracy(voters: Voters, user: int, rows: list[int]) -> float:
    """Of a voter's predicted pairs, right after the answers to these pairs."""
    found = fit(voters.loss, voters.learn.of(user).of(torch.tensor(rows)), voters.prior)
    test = voters.predict.of(user)
    return float(correct((test.generic_N + test.features_NK @ found.mean_K).numpy()).mean())


def one_at_a_time(voters: Voters, user: int, pick: Pick) -> list[int]:
    """The pairs that are asked, each after the answers to those before it."""
    evidence, prior = voters.learn.of(user), voters.prior
    asked: list[int] = []
    for _ in range(min(max(SHOTS), len(evidence.generic_N))):
        found = fit(voters.loss, evidence.of(torch.tensor(asked, dtype=torch.long)), prior)
        known = Gaussian.of(found.mean_K, prior.covariance_KK - found.told_KR @ found.told_KR.T)
        left = [row for row in range(len(evidence.generic_N)) if row not in asked]
        asked.append(left[pick(known, evidence.of(torch.tensor(left)))])
    return asked


def informative(known: Gaussian, left: Evidence) -> int:
    """The pair whose answer tells most of the voter's vector."""
    return questions(known, left, 1)[0].row


def lowering_variance(like_KK: Tensor) -> Pick:
    """The pair that most lowers trace(S M): by w x^T S M S x / (1 + w x^T S x). like_KK: M, the mean of x x^T of other pairs."""

    def pick(known: Gaussian, left: Evidence) -> int:
        x_NK = left.features_NK
        Sx_NK = x_NK @ known.covariance_KK
        variance_N = (Sx_NK * x_NK).sum(dim=1)
        w_N = expected_answer(left.generic_N + x_NK @ known.mean_K, variance_N).curvature_N
        return int((w_N * ((Sx_NK @ like_KK) * Sx_NK).sum(dim=1) / (1 + w_N * variance_N)).argmax())

    return pick


def measured(voters: Voters, pairs_NK: Tensor) -> dict[str, np.ndarray]:
    """Accuracies of each way to ask, (voters, SHOTS)."""
    rng = np.random.default_rng(SEED)
    ways: dict[str, list[list[float]]] = {"random": [], "one at a time": [], "at once": [], "variance": []}
    variance = lowering_variance(pairs_NK.T @ pairs_NK / len(pairs_NK))
    for user in voters.users:
        evidence = voters.learn.of(user)
        orders = [rng.permutation(len(evidence.generic_N)).tolist() for _ in range(ORDERS)]
        random = np.array([[accuracy(voters, user, order[:n]) for n in SHOTS] for order in orders])
        ways["random"].append(random.mean(axis=0).tolist())
        for name, pick in (("one at a time", informative), ("variance", variance)):
            asked = one_at_a_time(voters, user, pick)
            ways[name].append([accuracy(voters, user, asked[:n]) for n in SHOTS])
        at_once = [q.row for q in questions(voters.prior, evidence, min(max(SHOTS), len(evidence.generic_N)))]
        ways["at once"].append([accuracy(voters, user, at_once[:n]) for n in SHOTS])
    return {name: np.array(found) for name, found in ways.items()}


def difference(accuracies_M: np.ndarray, others_M: np.ndarray) -> str:
    """The mean of the paired differences with a bootstrap interval over voters, in points."""
    rng, gains_M = np.random.default_rng(SEED), 100 * (accuracies_M - others_M)
    means = gains_M[rng.integers(len(gains_M), size=(SAMPLES, len(gains_M)))].mean(axis=1)
    low, high = np.quantile(means, (0.025, 0.975))
    return f"{gains_M.mean():+.1f} ({low:+.1f} to {high:+.1f})"


def table(found: dict[str, np.ndarray]) -> str:
    """One row for each n."""
    random, others = found["random"], [name for name in found if name != "random"]
    rows = []
    for column, n in enumerate(SHOTS):
        cells = [f"{100 * random[:, column].mean():.1f}"]
        for name in others:
            right = found[name][:, column]
            cells += [f"{100 * right.mean():.1f}", difference(right, random[:, column])]
        rows.append((str(n), *cells))
    head = ("n", "random", *(text for name in others for text in (name, "less random")))
    return markdown_table(head, rows)


def main() -> None:
    """Print the table, and the chosen pairs' accuracy at n = 12 less that of 20 random ones."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", required=True, help="a run's directory or its final/")
    parser.add_argument("--data", required=True, help="a Polis folder")
    args = parser.parse_args()
    loaded = load_final(args.checkpoint)
    check_adaptable(loaded)
    check_agreement(loaded.model.to(choose_device(loaded.config.device)))
    with torch.no_grad():
        training = training_judgements(loaded, update=True)
        assert training is not None
        voters = new_voters(loaded, training, args.data)
        found = measured(voters, torch.cat([training.of(user).features_NK for user in training.pairs]))
    print(f"{len(voters.users)} new voters")
    print(table(found))
    for name in found:
        for n in (8, 10, 12):
            less = difference(found[name][:, SHOTS.index(n)], found["random"][:, SHOTS.index(20)])
            print(f"{name}, {n}, less 20 random ones: {less}")


if __name__ == "__main__":
    run_command(main)
