"""How a language model is asked to judge: which template, what of the user, and by which options of the command."""

import argparse
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from prlhf.data.comparisons import Messages
from prlhf.data.files import fingerprint_of, sha256
from prlhf.errors import UserError, check_range, expanded
from prlhf.judge.letters import LocalModel, letter_log_probs
from prlhf.judge.profiles import EXAMPLES, Profiles, read_profiles
from prlhf.judge.queries import Query, Ruling, Verdict
from prlhf.judge.template import DEFAULT_TEMPLATE, Template, conversation, read_template, tells_of_users

ASKED_JUDGES = ("hf", "openai")  # judges that read a template
BY_LETTERS = "hf"  # what states its certainty by probabilities, so that it need not be asked


@dataclass(frozen=True)
class Prompting:
    """How a language model is asked. certainty: it says how certain it is; asked: the template asks it for that.

    settings: what the reports say of it, and what tells whether two judges read the same.
    """

    template: Template = field(default_factory=read_template)
    profiles: Profiles = Profiles()
    certainty: bool = False
    asked: bool = False
    settings: dict[str, Any] = field(default_factory=dict)

    def conversations(self, queries: Sequence[Query]) -> list[Messages]:
        """What the judge reads of each query. UserError where the template cannot be filled in."""
        return [conversation(self.template, query, self.profiles.of(query), self.asked) for query in queries]

    def knows(self, query: Query) -> bool:
        """Whether the judge reads anything of the query's user, that is: whether their profile changes what it reads."""
        with_nothing = conversation(self.template, query, Profiles(examples=0, with_text=False).of(query), self.asked)
        return self.conversations([query])[0] != with_nothing

    @property
    def said(self) -> str:
        """What the judge reads of users, in a sentence."""
        if "profiles" not in self.settings:
            return (
                "It reads the user text of the responses' file."
                if self.profiles.with_text
                else "It reads nothing of users."
            )
        what = ["their text and what they said"] * self.profiles.with_text
        what += [f"up to {self.profiles.examples} of their comparisons"] * (self.profiles.examples > 0)
        return f"Of users it reads {' and '.join(what) or 'nothing'}, from {self.settings['profiles']}."


def rulings_by_letters(local: LocalModel, prompting: Prompting, queries: Sequence[Query]) -> list[Ruling]:
    """The response whose letter is the likelier answer; a tie where both are exactly as likely.

    With certainty, 100 max(p_A, p_B) / (p_A + p_B) = 100 s(|ln p_A - ln p_B|).
    """
    conversations, where = prompting.conversations(queries), [q.where for q in queries]
    log_p_N2 = letter_log_probs(local.model, local.tokenizer, conversations, where).double()
    if not log_p_N2.isfinite().all():
        raise UserError(
            f"--judge: {int((~log_p_N2.isfinite()).any(dim=1).sum())} answers have no finite log-probabilities"
        )
    margin_N = log_p_N2[:, 0] - log_p_N2[:, 1]
    certainty_N = (100 * margin_N.abs().sigmoid()).tolist() if prompting.certainty else [None] * len(queries)
    verdicts: list[Verdict] = ["tie" if m == 0 else "first" if m > 0 else "second" for m in margin_N.tolist()]
    return [Ruling(*both) for both in zip(verdicts, certainty_N)]


def add_prompting_options(parser: argparse.ArgumentParser) -> None:
    """The options of judges that read a template."""
    group = parser.add_argument_group(f"for --judge {' or '.join(f'{kind}:...' for kind in ASKED_JUDGES)}")
    group.add_argument("--profiles", metavar="FILE", help="comparisons: what the judge reads of their users")
    group.add_argument("--examples", type=int, help=f"comparisons of the user that the judge reads ({EXAMPLES})")
    group.add_argument("--seed", type=int, default=0, help="which comparisons these are")
    group.add_argument("--no-text", action="store_true", help="the judge reads neither users' texts nor what they said")
    group.add_argument("--template", metavar="FILE", help="what the judge reads, in place of the default")
    group.add_argument("--certainty", action="store_true", help="the judge says how certain it is, from 1 to 100")
    group.add_argument(
        "--show", action="store_true", help="print the first pair as the judge reads it, and ask nothing"
    )


def prompting_of(args: argparse.Namespace) -> Prompting:
    """How the options of `add_prompting_options` say to ask.

    UserError for an option that the judge does not have, and for a file that is damaged.
    """
    kind = args.judge.partition(":")[0]
    if kind not in ASKED_JUDGES:
        for name in ("profiles", "examples", "no_text", "template", "certainty", "show"):
            if getattr(args, name) not in (None, False):
                expected = " or ".join(f"{kind}:..." for kind in ASKED_JUDGES)
                raise UserError(f"--{name.replace('_', '-')}: not for --judge {args.judge}, expected {expected}")
        return Prompting()
    if args.examples is not None and args.profiles is None:
        raise UserError("--examples: found without --profiles, expected the file that they are drawn from")
    examples = EXAMPLES if args.examples is None else args.examples
    check_range("--examples", examples, low=0)
    asked = args.certainty and kind != BY_LETTERS
    template = read_template(args.template or DEFAULT_TEMPLATE, asked)
    profiles, settings = Profiles(examples=0, with_text=not args.no_text), dict[str, Any](text=not args.no_text)
    if args.profiles is not None:
        if not tells_of_users(template):
            raise UserError(
                f"{template.path}: tells nothing of users, expected user_text, reasons or examples in it for --profiles"
            )
        profiles = read_profiles(args.profiles, examples, args.seed, not args.no_text)
        settings |= {
            "profiles": args.profiles,
            "profiles_sha256": sha256(expanded(args.profiles)),
            "examples": examples,
        }
        settings |= {"seed": args.seed}
    settings |= {"template": fingerprint_of(template.text), "certainty": args.certainty}
    return Prompting(template, profiles, args.certainty, asked, settings)
