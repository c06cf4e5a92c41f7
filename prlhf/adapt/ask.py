"""Which comparisons to ask a user about: those whose answers tell most about the user's vector.

    margin = k (a + x . c) ~ N(mu, v),   c ~ N(m, S),  mu = k (a + x . m),  v = k^2 x^T S x
    information = H(E p) - E H(p),   p = s(margin)

k is the sharpness (`scale`). It is the mutual information of the answer and c, in nats (BALD; Houlsby et al. 2011, arXiv
1112.5745), H the entropy of a Bernoulli answer. The answer depends on c by its margin alone, so it is one integral. Both
responses may change places. Within a batch answers are not known, but that they will come is: after each pick

    S <- S - w k^2 S x x^T S / (1 + w k^2 x^T S x),   w = E p (1 - p)

the covariance after an answer of the expected curvature; the mean stays. So a pair that says the same again is
not picked next. What belongs to a loss, not to an answer, is left out (label_smoothing, margin, center).

Shape suffixes: N candidates, K coordinates, G nodes.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from prlhf.adapt.evidence import Evidence, judgements
from prlhf.adapt.nonlinear import known_user
from prlhf.adapt.reading import task_of, training_comparisons, training_judgements
from prlhf.adapt.rows import new_rows_prior
from prlhf.adapt.told import pair_fingerprint, told_by_known
from prlhf.adapt.users import (
    coordinates,
    new_users_prior,
    prior_of,
    trained_population,
)
from prlhf.adapt.variational import Gaussian
from prlhf.batch.tokens import EncodedComparison, EncodingReport
from prlhf.config.keys import has_linear_coordinates
from prlhf.data.check.rules import as_read
from prlhf.data.check.tables import markdown_table
from prlhf.data.comparisons import Comparison, parse_comparison, shortened
from prlhf.data.files import Record, read_records
from prlhf.data.names import canonical
from prlhf.errors import UserError
from prlhf.evaluate.held_out import encoder_of
from prlhf.score.slopes import margin_slopes
from prlhf.store.final import Loaded

NODES = torch.linspace(-8.5, 8.5, 401, dtype=torch.float64)  # of N(0, 1)
CHARACTERS = 40  # characters of a text in the table


class Answer(NamedTuple):
    """The answer to each candidate, as it is expected now: all (N,)."""

    probability_N: Tensor  # that the first response is preferred, E p
    information_N: Tensor  # H(E p) - E H(p), nats
    curvature_N: Tensor  # E p (1 - p)


def expected_answer(mean_N: Tensor, variance_N: Tensor) -> Answer:
    """Of margins with these means and variances, by sums over evenly spaced nodes.

    For a Gaussian their error falls as exp(-2 pi^2 / (spacing * deviation of the margin)): none to the last digit up to
    deviations of 10. With 100 nodes of Gauss-Hermite quadrature it is 6e-4 nats at 10.
    """
    weights_G = (-NODES.square() / 2).softmax(dim=0)
    p_NG = torch.sigmoid(mean_N[:, None] + variance_N.sqrt()[:, None] * NODES)
    p_N = p_NG @ weights_G
    information_N = entropy(p_N) - entropy(p_NG) @ weights_G
    return Answer(p_N, information_N.clamp(min=0), (p_NG * (1 - p_NG)) @ weights_G)


def entropy(p: Tensor) -> Tensor:
    """Of a Bernoulli variable, in nats."""
    return torch.special.entr(p) + torch.special.entr(1 - p)


class Question(NamedTuple):
    """A candidate to ask about."""

    row: int  # among the candidates
    information: float  # nats, with the answers to the questions before it to come
    probability: float  # that the first response is preferred, as of now


def questions(known: Gaussian, candidates: Evidence, count: int) -> list[Question]:
    """So many of the candidates, the most informative first, each with those before it in mind.

    known: of the user's c. candidates: times the sharpness.
    """
    x_NK, S_KK = candidates.features_NK, known.covariance_KK
    mean_N = candidates.generic_N + x_NK @ known.mean_K
    variance_N = ((x_NK @ S_KK) * x_NK).sum(dim=1).clamp(min=0)
    now_N = expected_answer(mean_N, variance_N).probability_N
    found: list[Question] = []
    for _ in range(count):
        answer = expected_answer(mean_N, variance_N)
        left_N = answer.information_N.index_fill(0, torch.tensor([q.row for q in found], dtype=torch.long), -1.0)
        n = int(left_N.argmax())
        found.append(Question(n, answer.information_N[n].item(), now_N[n].item()))
        Sx_K, w = S_KK @ x_NK[n], answer.curvature_N[n]
        less = w / (1 + w * (x_NK[n] @ Sx_K))
        S_KK = S_KK - less * torch.outer(Sx_K, Sx_K)
        variance_N = (variance_N - less * (x_NK @ Sx_K).square()).clamp(min=0)
    return found


class Candidates(NamedTuple):
    """A file of candidates: its records without their users, as comparisons (chosen: the first response), and as tokens."""

    records: list[Record]
    comparisons: list[Comparison]
    tokens: list[EncodedComparison]


def read_candidates(path: str, loaded: Loaded) -> Candidates:
    """Comparisons whose order and users mean nothing, or records with `responses`, two texts, in place of chosen and rejected.

    UserError, by line: a pair that is there twice or has one response twice, or that is longer than the model reads.
    """
    found, encoder, form = Candidates([], [], []), encoder_of(loaded), loaded.config.data
    seen: dict[str, str] = {}
    for where, number, record in read_records(path, form.format):
        record = {name: value for name, value in record.items() if name not in ("user", form.user_column)}
        c = parse_comparison(with_sides(record, where), where, f"{number}", form.attributes)
        if as_read(c).chosen == as_read(c).rejected:
            raise UserError(f"{where}: both responses are the same text; expected two to choose from")
        pair = pair_fingerprint(c)
        if pair in seen:
            raise UserError(f"{where}: the same prompt and responses as in {seen[pair]}; expected each candidate once")
        seen[pair] = where
        report = EncodingReport()
        tokens = encoder.encode(c, loaded.users, report)
        if tokens is None or report.prompts_truncated:
            raise UserError(
                f"{where}: longer than data.max_tokens={form.max_tokens} and data.max_prompt_tokens="
                f"{form.max_prompt_tokens} let the model read; expected a shorter prompt, or shorter responses"
            )
        found.records.append(record)
        found.comparisons.append(c)
        found.tokens.append(tokens)
    return found


def with_sides(record: Record, where: str) -> Record:
    """A record with `responses` [a, b] as one with chosen and rejected; others as they are."""
    if "responses" not in record:
        return record
    two = record["responses"]
    if not isinstance(two, list) or len(two) != 2:
        raise UserError(f"{where}, responses: expected a list of two texts, found {shortened(two)}")
    return {**record, "chosen": two[0], "rejected": two[1]}


class Known(NamedTuple):
    """What is known of a user: coordinates, sharpness, and in words."""

    gaussian: Gaussian
    sharpness: float
    said: str


def known_of(loaded: Loaded, user: int) -> Known:
    """What is known of a user, 0 for a new one. UserError as of `prior_of`."""
    posterior = loaded.posterior
    if user and posterior is not None and posterior.row(user) is not None:
        return Known(
            Gaussian.of(coordinates(loaded.model.user_model, [user]).users_MK[0], posterior.covariance(user)),
            posterior.law_of(user).sharpness,
            "adapted",
        )
    training = None if not user and posterior is not None else training_judgements(loaded, [user] if user else [])
    if not user:
        prior = new_users_prior(loaded, training)
        return Known(prior.gaussian, prior.law.sharpness, f"new; {prior.said}")
    gaussian, _ = prior_of(loaded, user, trained_population(loaded, None).gaussian, training)
    return Known(gaussian, 1.0, "known from training")


def check_new(loaded: Loaded, candidates: Candidates, name: str, count: int) -> None:
    """UserError for fewer candidates than questions, or one that the user has told of already."""
    if count > len(candidates.comparisons):
        raise UserError(
            f"--ask: found {count}, but {len(candidates.comparisons)} candidates; expected no more than there are"
        )
    told = {pair for pairs in told_by_known(loaded, [name]).values() for pair in pairs}
    for c in candidates.comparisons:
        if pair_fingerprint(c) in told:
            raise UserError(f"{c.where}: user {name!r} has told of this pair before; expected new candidates")


def ask(loaded: Loaded, candidates: Candidates, name: str, count: int) -> tuple[list[Question], str]:
    """The questions for a user, and what is known of the user in words. UserError as of `prior_of` and `known_user`."""
    user = loaded.users.number(canonical(name))
    if not has_linear_coordinates(loaded.config):
        evidence, said = linear_around(loaded, candidates, user)
        identity_RR = torch.eye(evidence.features_NK.shape[1], dtype=torch.float64)
        return questions(Gaussian(torch.zeros_like(identity_RR[0]), identity_RR), evidence, count), said
    evidence = judgements(loaded, [c._replace(user=1) for c in candidates.tokens]).of(1)
    known = known_of(loaded, user)
    return questions(known.gaussian, evidence.times(known.sharpness), count), known.said


def linear_around(loaded: Loaded, candidates: Candidates, user: int) -> tuple[Evidence, str]:
    """The candidates with margins that are linear around the user's row, in coordinates t ~ N(0, I), and what is known of the
    user, 0 for a new one, in words.

    Only the N x N covariance of the margins matters: there are N coordinates at most.
    """
    posterior, number = loaded.posterior, user or len(loaded.users) + 1
    adapted = posterior is not None and posterior.row(number) is not None
    training = None if adapted or (posterior is not None and not user) else training_comparisons(loaded)
    prior = new_rows_prior(loaded, None if user else training)  # who is known has a scale of their own
    known = known_user(loaded, number, prior, training)
    task, basis = task_of(loaded, candidates.tokens), prior.basis(known.root_KK, known.scale)
    N = len(task.comparisons)
    margin_N, features_NR = torch.zeros(N, dtype=torch.float64), basis.zeros.repeat(N, 1)
    for part in margin_slopes(task, range(N), known.row_V.repeat(N, 1)):
        margin_N[part.indices], features_NR[part.indices] = part.values_N, basis.pull(part.slopes_NV)
    features_NR = torch.linalg.qr(features_NR.T, mode="r").R.T
    zero_N = torch.zeros_like(margin_N)
    said = "adapted" if adapted else "known from training" if user else f"new; {prior.said}"
    return Evidence(margin_N, zero_N, features_NR, torch.zeros_like(features_NR), zero_N), said


def table(candidates: Candidates, asked: list[Question]) -> str:
    """The questions, one a row."""
    rows = []
    for q in asked:
        c = candidates.comparisons[q.row]
        prompt = c.prompt if isinstance(c.prompt, str) else str(c.prompt[-1].get("content"))
        texts = [
            text if len(text) <= CHARACTERS else text[: CHARACTERS - 3] + "..."
            for text in (prompt, c.chosen, c.rejected)
        ]
        line = c.where.rpartition(" ")[2]
        rows.append((line, c.id, *texts, f"{q.information:.4f}", f"{q.probability:.3f}"))
    return markdown_table(("line", "id", "prompt", "first", "second", "nats", "P(first)"), rows)


def to_answer(candidates: Candidates, asked: list[Question], name: str) -> list[Record]:
    """The questions as records of a new file: with `responses` and the user. Who answers puts in chosen and rejected."""
    records = []
    for q in asked:
        record, c = candidates.records[q.row], candidates.comparisons[q.row]
        kept = {name: value for name, value in record.items() if name not in ("chosen", "rejected", "margin", "first")}
        numbers = {"information": q.information, "probability_first": q.probability}
        records.append({**kept, "responses": [c.chosen, c.rejected], "user": name, **numbers})
    return records
