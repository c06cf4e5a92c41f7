"""Which users a command asks, by its option --users."""

import csv
import io

from prlhf.data.comparisons import GENERIC
from prlhf.data.users import UserIndex
from prlhf.errors import UserError


def asked_names(text: str, users: UserIndex) -> list[str]:
    """The names of --users, as the model has them; none for @own. They are CSV: a name with a comma stands in double quotes.

    UserError for an unknown name, or where a known one with a comma is written without quotes.
    """
    if text in ("@all", "@own"):
        return [*users.names, GENERIC] if text == "@all" else []
    rows = csv.reader(io.StringIO(text), skipinitialspace=True)
    names = [name for row in rows for name in row] or [text]
    for name in users.names:
        if "," in name and name in text and name not in names:
            quoted = '"' + name.replace('"', '""') + '"'
            raise UserError(
                f"--users {text}: a name with a comma stands in double quotes, as in --users '{quoted},bob'"
            )
    numbers = [users.required_number(name) for name in names]
    return [users.names[number - 1] if number else GENERIC for number in numbers]
