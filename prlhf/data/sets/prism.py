"""PRISM (Kirk et al. 2024, HannahRoseKirk/prism-alignment): 1,396 people from 75 countries in dialogue with models.

Raw: survey.jsonl (who they are) and conversations.jsonl (8,011 dialogues; in each turn models answered, and the person chose
one answer). A comparison is the chosen answer against each unchosen one of its turn, or against the best-scored one. The
prompt is the dialogue so far, with the chosen answers. The user text is what people said about themselves. What they said of a
dialogue is in its comparisons' `reason` (open feedback) and `aspects` (what mattered most to their choice).

Traps: the literal text "EMPTY STRING"; in later turns `if_chosen` compares texts, so two rows of a turn can be chosen.
"""

from collections.abc import Iterator
from pathlib import Path

from prlhf.data.comparisons import attributes_text
from prlhf.data.files import Record, read_json_lines
from prlhf.data.sets.raw import Count, Options, RawSet, field, objects, raw_files
from prlhf.errors import UserError

FILES = ("survey.jsonl", "conversations.jsonl")
EMPTY = "EMPTY STRING"
ATTRIBUTES = (
    "self_description",
    "age",
    "gender",
    "education",
    "employment_status",
    "marital_status",
    "english_proficiency",
)
TOP_PREFERENCES = 3
SURVEY, WITH_DIALOGUES, DIALOGUES = 1_500, 1_396, 8_011  # published


def read(folder: Path, options: Options) -> RawSet:
    """The comparisons, users in the survey's order. UserError, with file, line and field, for bad raw data."""
    survey_file, conversations_file = raw_files(folder, "prism", *FILES)
    about = {}
    for number, raw in read_json_lines(survey_file):
        where = f"{survey_file}, line {number}"
        about[field(raw, "user_id", str, where)] = attributes(raw, where)
    by_user: dict[str, list[Record]] = {user: [] for user in about}
    dropped = dict.fromkeys(("turns without two answers that differ", "turns behind one without a chosen answer"), 0)
    dialogues, talking = 0, set()
    for number, raw in read_json_lines(conversations_file):
        where = f"{conversations_file}, line {number}"
        user = field(raw, "user_id", str, where)
        if user not in about:
            raise UserError(f"{where}, user_id: {user!r} is not in {survey_file}")
        dialogues += 1
        talking.add(user)
        who = dict(user=user, user_text=attributes_text(about[user]), attributes=about[user])
        by_user[user] += [{**comparison, **who} for comparison in dialogue(raw, where, options.rejected, dropped)]
    counts = [
        Count("people in the survey", len(about), SURVEY),
        Count("people with dialogues", len(talking), WITH_DIALOGUES),
        Count("dialogues", dialogues, DIALOGUES),
    ]
    records = [record for user in about for record in by_user[user]]
    return RawSet(records, None, counts, dropped, dialogues=True)


def attributes(raw: Record, where: str) -> dict[str, str]:
    """The ATTRIBUTES that a person gave, and the three preferences that they rated highest."""
    given = {name: field(raw, name, str, where, optional=True) for name in ATTRIBUTES}
    given["stated_prefs"] = highest(raw, "stated_prefs", where)
    return {name: text for name, text in given.items() if text and text != EMPTY}


def highest(raw: Record, name: str, where: str) -> str:
    """The TOP_PREFERENCES of a field of ratings that were rated highest, with commas between."""
    ratings = field(raw, name, dict, where, optional=True) or {}
    rated = {n: r for n, r in ratings.items() if type(r) in (int, float) and not n.startswith("other")}
    return ", ".join(sorted(rated, key=lambda name: (-rated[name], name))[:TOP_PREFERENCES])


def dialogue(raw: Record, where: str, rejected: str, dropped: dict[str, int]) -> Iterator[Record]:
    """The comparisons of one line of conversations.jsonl; turns without any are counted in `dropped`."""
    name = field(raw, "conversation_id", str, where)
    turns: dict[int, list[Record]] = {}
    for utterance in objects(raw, "conversation_history", where):
        turns.setdefault(field(utterance, "turn", int, where), []).append(utterance)
    why = {
        "reason": field(raw, "open_feedback", str, where, optional=True),
        "aspects": highest(raw, "choice_attributes", where),
    }
    why = {name: text for name, text in why.items() if text and text != EMPTY}
    history: list[dict[str, str]] = []
    for t, turn in enumerate(sorted(turns)):
        at = f"{where}, turn {turn}"
        said = [(field(u, "role", str, at), field(u, "content", str, at, True) or EMPTY, u) for u in turns[turn]]
        asked = [text for role, text, _ in said if role == "user"]
        answers = [(text, u) for role, text, u in said if role == "model" and text != EMPTY]
        chosen = [text for text, u in answers if field(u, "if_chosen", bool, at, optional=True)]
        if not chosen or not asked or asked[0] == EMPTY:
            dropped["turns behind one without a chosen answer"] += len(turns) - t
            return
        history.append({"role": "user", "content": asked[0]})
        others = [(text, u) for text, u in answers if text != chosen[0] and not u.get("if_chosen")]
        if rejected == "best":
            others = sorted(others, key=lambda other: -_score(other[1]))[:1]
        dropped["turns without two answers that differ"] += not others
        for text, utterance in others:
            place = dict(id=f"{name}:{turn}:{utterance.get('within_turn_id')}", split_group=name)
            yield dict(prompt=list(history), chosen=chosen[0], rejected=text, **place, **why)
        history.append({"role": "assistant", "content": chosen[0]})


def _score(utterance: Record) -> float:
    score = utterance.get("score")
    return float(score) if type(score) in (int, float) else float("-inf")
