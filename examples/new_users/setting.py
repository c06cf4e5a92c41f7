"""A checkpoint, the hidden states of what its users and a protocol's new users judged, and what its own vectors predict.

Rows of the table are functions of turns. A turn is one new user after N comparisons; a row gives the margins of what is
predicted, positive where the chosen response is preferred.

Shape suffixes: N comparisons, K coordinates, W width, M known users.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

from torch import Tensor
from torch.nn.functional import logsigmoid

from examples.new_users.protocols import Division, Draw
from prlhf.adapt.evidence import Evidence, Judgements, apart, judgements
from prlhf.adapt.users import NewUsersPrior, coordinates, trained_population
from prlhf.adapt.variational import fits, whitened
from prlhf.batch.tokens import EncodedComparison
from prlhf.data.comparisons import Comparison, ComparisonFile
from prlhf.data.names import quoted
from prlhf.data.users import UserIndex, ranked
from prlhf.errors import UserError
from prlhf.evaluate.held_out import encoded, training_file
from prlhf.method.posterior import integrated
from prlhf.store.final import Loaded


class Turn(NamedTuple):
    """A new user's comparisons to learn from and to predict, as rows of `Setting.evidence`."""

    user: int
    learn: list[int]
    predict: list[int]


Row = Callable[[Sequence[Turn]], list[Tensor]]


class Setting(NamedTuple):
    """What every row of the table is made from."""

    loaded: Loaded
    training: Judgements  # of known users, 1 to M
    new: Judgements  # of new users, by numbers of their own
    evidence: dict[int, Evidence]  # the same, as evidence on coordinates
    raw: dict[int, list[Comparison]]  # the same, as text
    told: dict[int, list[EncodedComparison]]  # the same, as tokens
    trained: list[EncodedComparison]  # the training file, unknown users included
    draws: list[dict[int, Draw]]  # of each user, as rows of `evidence`

    def turns(self, draw: int, shots: int) -> list[Turn]:
        """Everybody after so many comparisons."""
        return [Turn(user, *drawn.at(shots)) for user, drawn in self.draws[draw].items()]


def set_up(loaded: Loaded, division: Division) -> Setting:
    """The hidden states of both. UserError where a new user is known, or the training file is not there."""
    users = UserIndex(ranked(c.user for c in division.new))
    if known := [name for name in users.names if loaded.users.number(name)]:
        who = f"{len(known):,} of the protocol's {len(users):,} new users ({quoted(known)})"
        raise UserError(f"{loaded.path}: {who} were trained on; expected a checkpoint of the protocol's train.jsonl")
    if (file := training_file(loaded)) is None:
        raise UserError(f"{loaded.path}: data.train: {loaded.config.data.train} is not there; expected that file")
    trained = encoded(loaded, file)
    data = encoded(loaded, ComparisonFile(division.new, 0))
    kept = [c._replace(user=users.number(name)) for c, name in zip(data.comparisons, data.names)]
    new = judgements(loaded, kept)
    raw: dict[int, list[Comparison]] = {}
    told: dict[int, list[EncodedComparison]] = {}
    place: dict[int, int] = {}  # of the comparisons that fit data.max_tokens: the row among their user's
    for tokens, comparison in zip(kept, data.raw):
        own = raw.setdefault(tokens.user, [])
        place[id(comparison)] = len(own)
        own.append(comparison)
        told.setdefault(tokens.user, []).append(tokens)
    row_of = [place.get(id(comparison)) for comparison in division.new]
    draws = []
    for drawn in division.draws:
        found = {}
        for draw in drawn:
            learn, predict = ([row for i in part if (row := row_of[i]) is not None] for part in draw[1:])
            if predict or len(learn) > max(division.shots):
                found[users.number(draw.user)] = Draw(draw.user, learn, predict)
        draws.append(found)
    evidence = {user: new.of(user) for user in new.rows}
    training = judgements(loaded, trained.comparisons)
    return Setting(loaded, training, new, evidence, raw, told, trained.comparisons, draws)


class Margins(NamedTuple):
    """Of the vector as it is, and integrated over the posterior; (N,) of each turn."""

    plug_in: list[Tensor]
    integrated: list[Tensor]


def margins_under(evidence: Evidence, c_K: Tensor) -> Tensor:
    """The margins (N,) of a user with these coordinates."""
    return evidence.generic_N + evidence.features_NK @ c_K


def generic(setting: Setting, turns: Sequence[Turn]) -> list[Tensor]:
    """Everybody as the generic user."""
    return [setting.evidence[turn.user].of(turn.predict).generic_N for turn in turns]


class Adapted:
    """prlhf.adapt: the prior of new users who have said so much, and what each one's coordinates are then."""

    def __init__(self, setting: Setting):
        self.setting = setting
        self.trained = trained_population(setting.loaded, setting.training)
        self.priors: dict[tuple[tuple[int, ...], ...], NewUsersPrior] = {}

    def prior(self, turns: Sequence[Turn]) -> NewUsersPrior:
        """By what these users, and trained ones, have said."""
        key = tuple((turn.user, *turn.learn) for turn in turns)
        if key not in self.priors:
            told = []
            for user, rows, _ in turns:
                pairs = self.setting.new.pairs(user)
                told.append(self.setting.evidence[user].of([rows[i] for i in apart([pairs[row] for row in rows])]))
            self.priors[key] = self.trained.prior(told)
        return self.priors[key]

    def margins(self, turns: Sequence[Turn], of: Sequence[Turn]) -> Margins:
        """What is predicted of each turn's user from what the user `of` the same place said."""
        found, loss, prior = Margins([], []), self.setting.loaded.config.loss, self.prior(turns)
        told = [self.setting.evidence[turn.user].of(turn.learn) for turn in of]
        problems = [whitened(loss, each, prior.population).scaled(*prior.law) for each in told]
        for turn, own in zip(turns, fits(loss, problems)):
            test = self.setting.evidence[turn.user].of(turn.predict)
            plug_in_N = margins_under(test, own.mean_K)
            found.plug_in.append(plug_in_N)
            variance_N = own.variances(prior.gaussian, test.features_NK)
            found.integrated.append(integrated(plug_in_N, variance_N, prior.law.sharpness))
        return found

    def own(self, turns: Sequence[Turn]) -> list[Tensor]:
        """Adapted to each user's own comparisons."""
        return self.margins(turns, turns).plug_in

    def another(self, turns: Sequence[Turn]) -> list[Tensor]:
        """Control: adapted to the comparisons of the next user."""
        return self.margins(turns, [*turns[1:], *turns[:1]]).plug_in


def nearest(setting: Setting) -> Row:
    """As the trained user under whose vector the comparisons are most probable; without comparisons, the generic user."""
    users_MK = coordinates(setting.loaded.model.user_model, range(1, len(setting.loaded.users) + 1)).users_MK

    def margins(turns: Sequence[Turn]) -> list[Tensor]:
        found = []
        for turn in turns:
            learnt, test = (setting.evidence[turn.user].of(rows) for rows in (turn.learn, turn.predict))
            likelihood_M = logsigmoid(learnt.generic_N + users_MK @ learnt.features_NK.T).sum(dim=1)
            found.append(margins_under(test, users_MK[likelihood_M.argmax()]) if turn.learn else test.generic_N)
        return found

    return margins
