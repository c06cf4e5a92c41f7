"""Each pair in both orders: what two verdicts of a judge on the same two responses mean together."""

from collections.abc import Sequence
from typing import NamedTuple

from prlhf.judge.judges import Judge, Query, Verdict
from prlhf.judge.pairs import Pair


class Decision(NamedTuple):
    """A judge's two verdicts on a pair: with A's response first, and with B's first."""

    a_first: Verdict
    b_first: Verdict

    @property
    def parsed(self) -> bool:
        """Whether both verdicts could be understood."""
        return "unparsed" not in self

    @property
    def consistent(self) -> bool:
        """Whether both orders have the same outcome: A, B, or a tie."""
        return self in (("first", "second"), ("second", "first"), ("tie", "tie"))

    @property
    def win(self) -> float | None:
        """1 where A wins, 0 where B wins, 1/2 for a tie; None where a verdict could not be parsed.

        A response wins where it is preferred in both orders; all else is a tie (Zheng et al. 2023, arXiv 2306.05685, 3.4):
        verdicts that follow the position, and a preference in one order alone.
        """
        if not self.parsed:
            return None
        return {("first", "second"): 1.0, ("second", "first"): 0.0}.get(self, 0.5)

    @property
    def firsts(self) -> float:
        """For how many of the two verdicts the response that was read first wins, a tie counting one half."""
        return self.count("first") + 0.5 * self.count("tie")


def decide(pairs: Sequence[Pair], judge: Judge) -> list[Decision]:
    """The judge's verdicts on each pair, in both orders."""
    a_first = [Query(p.prompt, p.user, p.user_text, p.tools, p.a, p.b, p.where) for p in pairs]
    b_first = [query._replace(first=query.second, second=query.first) for query in a_first]
    verdicts = judge.verdicts([*a_first, *b_first])
    if len(verdicts) != 2 * len(pairs):
        raise ValueError(f"{judge.name}: {len(verdicts)} verdicts on {2 * len(pairs)} queries")
    return [Decision(*both) for both in zip(verdicts[: len(pairs)], verdicts[len(pairs) :])]
