"""Each pair in both orders: what two verdicts of a judge on the same two responses mean together."""

from collections.abc import Sequence
from typing import NamedTuple

from prlhf.judge.judges import Judge
from prlhf.judge.pairs import Pair
from prlhf.judge.queries import Query, Ruling, Verdict

CERTAIN = 80  # a judge who says so much of 100 in both orders is certain


class Decision(NamedTuple):
    """A judge's two verdicts on a pair: with A's response first, and with B's first; and how certain it says to be of each."""

    a_first: Verdict
    b_first: Verdict
    certainties: tuple[float | None, float | None] | None = None  # None: it was not asked

    @property
    def both(self) -> tuple[Verdict, Verdict]:
        """The two verdicts."""
        return self.a_first, self.b_first

    @property
    def parsed(self) -> bool:
        """Whether both verdicts could be understood."""
        return "unparsed" not in self.both

    @property
    def consistent(self) -> bool:
        """Whether both orders have the same outcome: A, B, or a tie."""
        return self.both in (("first", "second"), ("second", "first"), ("tie", "tie"))

    @property
    def win(self) -> float | None:
        """1 where A wins, 0 where B wins, 1/2 for a tie; None where a verdict could not be parsed.

        A response wins where it is preferred in both orders; all else is a tie (Zheng et al. 2023, arXiv 2306.05685, 3.4):
        verdicts that follow the position, and a preference in one order alone.
        """
        if not self.parsed:
            return None
        return {("first", "second"): 1.0, ("second", "first"): 0.0}.get(self.both, 0.5)

    @property
    def firsts(self) -> float:
        """For how many of the two verdicts the response that was read first wins, a tie counting one half."""
        return self.both.count("first") + 0.5 * self.both.count("tie")

    @property
    def certain(self) -> bool:
        """Whether the judge says to be at least CERTAIN of both verdicts."""
        return all(c is not None and c >= CERTAIN for c in self.certainties or (None,))


def decide(pairs: Sequence[Pair], judge: Judge) -> list[Decision]:
    """The judge's verdicts on each pair, in both orders."""
    return decide_queries(queries_of(pairs), judge)


def queries_of(pairs: Sequence[Pair]) -> list[Query]:
    """What a judge is asked of each pair, A's response first."""
    return [Query(p.prompt, p.user, p.user_text, p.tools, p.a, p.b, p.where) for p in pairs]


def decide_queries(a_first: Sequence[Query], judge: Judge) -> list[Decision]:
    """The judge's verdicts on each query, A's response first as it stands, and with B's first."""
    b_first = [query._replace(first=query.second, second=query.first) for query in a_first]
    verdicts = judge.verdicts([*a_first, *b_first])
    if len(verdicts) != 2 * len(a_first):
        raise ValueError(f"{judge.name}: {len(verdicts)} verdicts on {2 * len(a_first)} queries")
    rulings = [found if isinstance(found, Ruling) else Ruling(found) for found in verdicts]
    return [_decision(*both) for both in zip(rulings[: len(a_first)], rulings[len(a_first) :])]


def _decision(a_first: Ruling, b_first: Ruling) -> Decision:
    certainties = a_first.certainty, b_first.certainty
    return Decision(a_first.verdict, b_first.verdict, None if certainties == (None, None) else certainties)
