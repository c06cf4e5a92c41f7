"""What users have told of already, so that no comparison counts twice.

told.json, beside posterior.safetensors, has for each adapted user a hash of every comparison that the user's vector comes from:
of the prompt and both responses, in either order and `as_read`. It holds no text, but who has a text can see whether it is there.
Users of training have told what data.train holds.
"""

import json
from collections.abc import Iterable, Sequence

from prlhf.data.check.rules import as_read, prompt_key
from prlhf.data.comparisons import Comparison
from prlhf.data.files import fingerprint_of
from prlhf.data.users import UserIndex
from prlhf.errors import UserError
from prlhf.evaluate.held_out import training_file
from prlhf.store.final import TOLD, Loaded


def pair_fingerprint(comparison: Comparison) -> str:
    """A hash of a prompt and its two responses, the same for opposite choices."""
    read = as_read(comparison)
    return fingerprint_of(prompt_key(read.prompt), *sorted((read.chosen, read.rejected)))


def read_told(loaded: Loaded) -> dict[str, list[str]]:
    """The folder's told.json: hashes by name. UserError where it is damaged."""
    path = loaded.path / TOLD
    try:
        return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read ({error})") from None


def told_by_known(loaded: Loaded, names: Iterable[str | None]) -> dict[str, list[str]]:
    """The hashes of all that those of these users have told whom the model knows: as adapted users, else in training."""
    adapted = read_told(loaded)
    known = {loaded.users.names[n - 1] for n in map(loaded.users.number, names) if n}
    trained = known - adapted.keys()
    told = {name: list(adapted[name]) for name in known & adapted.keys()}
    file = training_file(loaded) if trained else None
    for c in file.comparisons if file else ():
        number = loaded.users.number(c.user)
        if number and (name := loaded.users.names[number - 1]) in trained:
            told.setdefault(name, []).append(pair_fingerprint(c))
    return told


def told_after(loaded: Loaded, users: UserIndex, comparisons: Sequence[Comparison]) -> dict[str, list[str]]:
    """told.json with these comparisons. users: the known and the new ones.

    UserError where a user has told of a pair before, or chose both of its responses in this file. A pair that a user judged
    twice in it, the same way, is two votes, as in training.
    """
    before = told_by_known(loaded, [c.user for c in comparisons])
    now: dict[str, list[str]] = {}
    seen: dict[tuple[int, str], Comparison] = {}
    for c in comparisons:
        number = users.number(c.user)
        if not number:
            continue
        name, found = users.names[number - 1], pair_fingerprint(c)
        if found in before.get(name, ()):
            raise UserError(f"{c.where}: user {name!r} has told of this pair before; expected each pair once")
        first = seen.setdefault((number, found), c)
        if as_read(first).chosen != as_read(c).chosen:
            raise UserError(f"{c.where}: user {name!r} contradicts {first.where}; expected one answer to each pair")
        now.setdefault(name, []).append(found)
    return read_told(loaded) | {name: before.get(name, []) + new for name, new in now.items()}
