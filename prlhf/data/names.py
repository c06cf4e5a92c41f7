"""The names of users: one spelling for each, and which spellings people do not tell apart."""

import itertools
import re
import unicodedata
from collections.abc import Collection

EXACT = 2**53  # from here on neighbouring whole numbers are the same floating-point number
WHOLE = re.compile(r"(-?(?:0|[1-9][0-9]*))\.0+")  # a whole number that was written as a float
LOSSY = re.compile(r"-?[0-9]+(\.[0-9]+)?[eE]\+[0-9]+|-?[1-9][0-9]*\.0+")  # in a canonical name: too large to be exact
MISSING = {"nan", "NaN", "NaT", "<NA>", "None", "null", "NULL"}  # what programs write for no name
ALIKE = "case, white space, invisible characters or leading zeros"


def canonical(name: str) -> str:
    """The name in Unicode's composed form (NFC), without white space around it; a whole number without ".0".

    People lose nothing by it: no two of them differ in these alone. "007", "1e3" and "Alice" stay as they are.
    """
    name = unicodedata.normalize("NFC", name).strip()
    whole = WHOLE.fullmatch(name)
    return str(int(whole[1])) if whole and len(whole[1]) < 17 and abs(int(whole[1])) < EXACT else name


def folded(name: str) -> str:
    """What is left of a name without ALIKE (and compatibility forms of characters): equal for names that look the same."""
    plain = unicodedata.normalize("NFKC", name).casefold()
    if not (plain.isascii() and plain.isalnum()):
        plain = "".join(c for c in plain if not c.isspace() and unicodedata.category(c) not in ("Cc", "Cf"))
    return plain.lstrip("0") or "0" if plain.isdecimal() else plain


def quoted(names: Collection[str], most: int = 3) -> str:
    """The first names in quotes, with what is invisible as its code; "..." where there are more."""
    shown = [repr(name) for name in itertools.islice(names, most)]
    return ", ".join(shown + ["..."] * (len(names) > most))
