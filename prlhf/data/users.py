"""The map between user names in files and user numbers in tensors."""

import json
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path

from prlhf.data.comparisons import GENERIC, Comparison
from prlhf.data.names import canonical, folded
from prlhf.errors import UserError, did_you_mean


def ranked(users: Iterable[str | None]) -> list[str]:
    """The different users, by descending number of occurrences, ties by name. None is no user."""
    counts = Counter(user for user in users if user is not None)
    return sorted(counts, key=lambda user: (-counts[user], user))


class UserIndex:
    """The map between user names (in files) and user numbers (in tensors); 0 is the unknown, generic user.

    Names are `canonical`. Those of an earlier version's run need not be, and are found under their canonical form too.
    """

    def __init__(self, names: Sequence[str]):
        self.names = tuple(names)
        exact = {name: number for number, name in enumerate(self.names, start=1)}
        self._numbers = {canonical(name): number for name, number in exact.items()} | exact

    @classmethod
    def from_comparisons(cls, comparisons: Iterable[Comparison], known_users: int | None = None) -> "UserIndex":
        """Users by descending number of comparisons, ties by name; the first `known_users` of them where given."""
        return cls(ranked(c.user for c in comparisons)[:known_users])

    def with_data(self, comparisons: Iterable[Comparison]) -> "UserIndex":
        """The users of this index, in its order, who have at least one of these comparisons."""
        users = {c.user for c in comparisons}
        return UserIndex([name for name in self.names if name in users])

    def __len__(self) -> int:
        """m, the number of known users."""
        return len(self.names)

    def number(self, name: str | None) -> int:
        """1..m for a known user, 0 for any other user or None."""
        return (self._numbers.get(name) or self._numbers.get(canonical(name), 0)) if name else 0

    def near(self, names: Iterable[str]) -> dict[str, str]:
        """Those of these names that are known names when `folded`, each with the known one."""
        known = {folded(name): name for name in reversed(self.names)}
        return {name: known[key] for name in names if (key := folded(name)) in known}

    def required_number(self, name: str) -> int:
        """Like `number`, but UserError for a name that is neither known nor 'generic'."""
        if canonical(name) == GENERIC:
            return 0
        if not self.number(name):
            known = ", ".join(self.names[:10]) + (", ..." if len(self) > 10 else "")
            near = self.near([name]).get(name)
            hint = f" (did you mean {near!r}?)" if near else did_you_mean(name, self.names)
            raise UserError(
                f"user {name!r} is not known to this model{hint}; "
                f"expected {GENERIC!r} or one of its {len(self)} users: {known}"
            )
        return self.number(name)

    def save(self, path: Path) -> None:
        """Write {"users": [name of user 1, name of user 2, ...]}."""
        path.write_text(json.dumps({"users": self.names}, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, path: Path) -> "UserIndex":
        """Read what `save` wrote. UserError where it is missing or damaged."""
        try:
            return cls(json.loads(path.read_text(encoding="utf-8"))["users"])
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UserError(f"{path}: no user index ({error})") from None
