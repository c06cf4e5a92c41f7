"""How much sooner chosen questions tell who a new voter is than random ones: the table of docs/results.md.

    python -m examples.questions --checkpoint RUN --data FOLDER

A simulation over recorded votes. The candidates of each voter of FOLDER/unseen_users_adapt.jsonl, whom RUN does not know, are
that voter's own pairs there. Accuracy after n answers is on FOLDER/unseen_users_test.jsonl, which shares no vote with them.
- random: n pairs in random order, the mean over ORDERS orders.
- one at a time: the most informative pair (prlhf.adapt --ask 1) is asked and its recorded answer fitted, n times.
- at once: the n most informative pairs (--ask n), with no answer in between.
- variance: one at a time, the pair that most lowers the mean variance of margins over the pairs of RUN's training file.
Accuracy is the mean over voters, with the difference from random at the same n, and a 95 % interval over voters of the paired
difference (bootstrap). A voter's prior has the scale and sharpness of RUN's voters and of the other half of the new ones, by the
first COHORT pairs of each: as where users were adapted before. Nothing is chosen on the file that is predicted.
"""

import argparse
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from examples.new_users.report import difference
from prlhf.adapt.ask import expected_answer, questions
from prlhf.adapt.evidence import Evidence, Judgements, apart, judgements
from prlhf.adapt.reading import training_judgements
from prlhf.adapt.users import check_adaptable, trained_population
from prlhf.adapt.variational import Fit, Gaussian, fits, whitened
from prlhf.backbone.loading import choose_device
from prlhf.config.keys import LossConfig
from prlhf.data.check.tables import markdown_table
from prlhf.data.comparisons import read_comparisons
from prlhf.data.users import UserIndex, ranked
from prlhf.errors import run_command
from prlhf.evaluate.held_out import encoded
from prlhf.evaluate.stats.metrics import correct
from prlhf.score.agreement import check_agreement
from prlhf.store.final import Loaded, load_final

SHOTS = (1, 2, 5, 8, 10, 12, 15, 20)
ORDERS = 20
COHORT = 20  # pairs of each voter of the other half
SEED = 0

Pick = Callable[[Gaussian, Evidence], int]  # what is known of a voter and the pairs that are left -> the next question


class Voters(NamedTuple):
    """New voters, by number, their pairs to ask about and to predict, and their prior."""

    users: list[int]
    loss: LossConfig
    prior: Gaussian
    sharpness: float
    learn: Judgements
    predict: Judgements


def halves(loaded: Loaded, training: Judgements, folder: str) -> list[Voters]:
    """The voters of a Polis folder whom training did not know, in two halves."""
    files = [read_comparisons(f"{folder}/unseen_users_{part}.jsonl", loaded.config.data) for part in ("adapt", "test")]
    users = UserIndex(ranked(c.user for c in files[0].comparisons))
    judged = []
    for data in (encoded(loaded, file) for file in files):
        numbered = [c._replace(user=users.number(name)) for c, name in zip(data.comparisons, data.names)]
        judged.append(judgements(loaded, numbered))
    learn, population = judged[0], trained_population(loaded, training)
    both, found = sorted(set(learn.rows) & set(judged[1].rows)), []
    for half, others in ((both[::2], both[1::2]), (both[1::2], both[::2])):
        told = [learn.of(user).of(torch.tensor(apart(learn.pairs(user)[:COHORT]))) for user in others]
        prior = population.prior(told)
        print(f"prior of {len(half)} new users: {prior.said}")
        found.append(Voters(half, loaded.config.loss, prior.gaussian, prior.law.sharpness, learn, judged[1]))
    return found


Asked = list[list[int]]  # of each voter, rows of the voter's pairs


def fitted(voters: Voters, asked: Asked) -> list[Fit]:
    """All voters after the answers to these pairs; the prior's mean is 0."""
    told = [voters.learn.of(user).of(torch.tensor(rows, dtype=torch.long)) for user, rows in zip(voters.users, asked)]
    problems = [whitened(voters.loss, each, voters.prior).scaled(1.0, voters.sharpness) for each in told]
    return fits(voters.loss, problems)


def accuracies(voters: Voters, asked: Asked) -> list[list[float]]:
    """Of each voter's predicted pairs, right after the answers to the first n of these, for each n of SHOTS."""
    found = []
    for n in SHOTS:
        right = []
        for user, each in zip(voters.users, fitted(voters, [rows[:n] for rows in asked])):
            test = voters.predict.of(user)
            right.append(float(correct((test.generic_N + test.features_NK @ each.mean_K).numpy()).mean()))
        found.append(right)
    return np.array(found).T.tolist()


def one_at_a_time(voters: Voters, pick: Pick) -> Asked:
    """The pairs that each voter is asked, each after the answers to those before it."""
    candidates = [voters.learn.of(user).times(voters.sharpness) for user in voters.users]
    asked: Asked = [[] for _ in candidates]
    for _ in range(max(SHOTS)):
        for evidence, rows, found in zip(candidates, asked, fitted(voters, asked)):
            known = Gaussian.of(found.mean_K, voters.prior.covariance_KK - found.told_KR @ found.told_KR.T)
            left = [row for row in range(len(evidence.generic_N)) if row not in rows]
            if left:
                rows.append(left[pick(known, evidence.of(torch.tensor(left)))])
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
    rng, candidates = np.random.default_rng(SEED), [voters.learn.of(user) for user in voters.users]
    orders = [[rng.permutation(len(each.generic_N)).tolist() for each in candidates] for _ in range(ORDERS)]
    at_once = [
        [q.row for q in questions(voters.prior, each.times(voters.sharpness), min(max(SHOTS), len(each.generic_N)))]
        for each in candidates
    ]
    like_KK = voters.sharpness**2 * pairs_NK.T @ pairs_NK / len(pairs_NK)
    return {
        "random": np.mean([accuracies(voters, order) for order in orders], axis=0),
        "one at a time": np.array(accuracies(voters, one_at_a_time(voters, informative))),
        "at once": np.array(accuracies(voters, at_once)),
        "variance": np.array(accuracies(voters, one_at_a_time(voters, lowering_variance(like_KK)))),
    }


def less(accuracies_M: np.ndarray, others_M: np.ndarray) -> str:
    """The mean of the paired differences with an interval over voters, in points."""
    mean, low, high = (100 * x for x in difference(accuracies_M, others_M))
    return f"{mean:+.1f} ({low:+.1f} to {high:+.1f})"


def table(found: dict[str, np.ndarray]) -> str:
    """One row for each n."""
    random, others = found["random"], [name for name in found if name != "random"]
    rows = []
    for column, n in enumerate(SHOTS):
        cells = [f"{100 * random[:, column].mean():.1f}"]
        for name in others:
            right = found[name][:, column]
            cells += [f"{100 * right.mean():.1f}", less(right, random[:, column])]
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
        training = training_judgements(loaded)
        assert training is not None
        pairs_NK = torch.cat([training.of(user).features_NK for user in training.rows])
        of_halves = [measured(voters, pairs_NK) for voters in halves(loaded, training, args.data)]
    found = {name: np.concatenate([half[name] for half in of_halves]) for name in of_halves[0]}
    print(f"{len(found['random'])} new voters")
    print(table(found))
    for name in found:
        for n in (8, 10, 12):
            behind = less(found[name][:, SHOTS.index(n)], found["random"][:, SHOTS.index(20)])
            print(f"{name}, {n}, less 20 random ones: {behind}")


if __name__ == "__main__":
    run_command(main)
