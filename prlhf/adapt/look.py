"""Who the users are to a model: python -m prlhf.users RUN [--data FILE] [--out DIR] [--forget NAME]

Writes users.csv, users.md and, where matplotlib is installed, map.png to RUN_DIR/users (or --out), and prints users.md. For any
model with users of their own. Of each user: how many comparisons the model has learned from; on held-out ones (data.valid, or
--data) the accuracy as this user, as the generic user, and the gain; how far the user's vectors are from the generic user's; the
nearest other users; for clusters the weights of the archetypes; for adapted users how sure the model is. --forget NAME removes
a user from the model instead, in place, and says what still holds their comparisons.
"""

import argparse
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from prlhf.adapt.forget import forget
from prlhf.adapt.space import Space, directions, nearest, space_of
from prlhf.adapt.told import read_told
from prlhf.adapt.users import check_personal
from prlhf.config.keys import is_linear
from prlhf.data.check.tables import markdown_table, percent
from prlhf.data.files import replace_text
from prlhf.errors import UserError
from prlhf.evaluate.accuracy import reward_margins, score_users
from prlhf.evaluate.ends import SHOWN, USERS_CSV, write_users
from prlhf.evaluate.figures import label, save_figure
from prlhf.evaluate.held_out import encoded, held_out_task, read_held_out, training_file
from prlhf.evaluate.stats.metrics import UserCounts, by_user
from prlhf.method.users import ClusterUsers
from prlhf.parallel.ranks import check_started_alone
from prlhf.store.final import Loaded, load_final

NAMED = 60  # points of the map with names, at most


def main(arguments: Sequence[str] | None = None) -> None:
    """Show the users of the model that the command line names, or forget one."""
    parser = argparse.ArgumentParser(
        prog=None if arguments is None else f"{Path(sys.argv[0]).name} users",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("run", metavar="RUN", help="a run's directory or its final/, or an adapted folder")
    parser.add_argument("--data", help="held-out comparisons; by default the config's data.valid")
    parser.add_argument("--out", help="where the table goes; by default RUN_DIR/users")
    parser.add_argument("--forget", metavar="NAME", help="remove this user from the model")
    args = parser.parse_args(arguments)
    if args.forget is not None and (args.data or args.out):
        raise UserError("--forget: found --data or --out; expected it alone")
    check_started_alone("prlhf.users")
    loaded = load_final(args.run)
    check_personal(loaded)
    if args.forget is not None:
        return print("\n".join(forget(loaded, args.forget)))
    source = args.data or loaded.config.data.valid
    if source is None:
        raise UserError(f"{loaded.path / 'config.yaml'}: data.valid is not set, expected --data FILE")
    seen = look(loaded, source, None if args.data else loaded.config.data.valid_limit)
    run_dir = loaded.path.parent if loaded.path.name == "final" else loaded.path
    out = Path(args.out) if args.out else run_dir / "users"
    out.mkdir(parents=True, exist_ok=True)
    write_users(out / USERS_CSV, seen.rows, seen.columns)
    draw_map(seen, out / "map.png")
    replace_text(out / "users.md", seen.markdown())
    print(f"{seen.markdown()}\nwritten to {out}")


class Users(NamedTuple):
    """All users as rows of a table, and as points."""

    rows: list[dict[str, Any]]  # by number; cells as numbers, None for what is not known
    points_M2: Tensor  # on the two principal directions of f(u) - f(0)
    share: float  # of the mean squared distance from f(0) that lies in these two
    unit: str  # of distances and standard deviations, in a sentence

    @property
    def columns(self) -> list[str]:
        """The names of the columns: of standard_deviation and weights only where somebody has them."""
        return list(self.rows[0])

    def markdown(self) -> str:
        """The users with the most comparisons, as text."""
        shown = sorted(self.rows, key=lambda row: -(row["comparisons"] or 0))[: 2 * SHOWN]
        said = f" These are the {2 * SHOWN} with the most comparisons; {USERS_CSV} has all."
        said = said if len(self.rows) > len(shown) else ""
        shares = {"accuracy", "generic_user", "gain"}
        cells = [[percent(row[k]) if k in shares else shown_cell(row[k]) for k in self.columns] for row in shown]
        head = [f"{k.replace('_', ' ')}{', %' if k in shares else ''}" for k in self.columns]
        return "\n\n".join([
            f"# {len(self.rows):,} users", f"{self.unit}{said}", markdown_table(head, cells),
            f"The map's two directions hold {percent(self.share)}% of the users' mean squared distance.",
        ]) + "\n"  # fmt: skip


def shown_cell(value: Any) -> str | int | None:
    """A cell of users.md."""
    return f"{value:.2f}" if isinstance(value, float) else value


@torch.no_grad()
def look(loaded: Loaded, source: str, limit: int | None) -> Users:
    """All users of a model, on the comparisons of a file. UserError where it knows nobody."""
    if not len(loaded.users):
        raise UserError(f"{loaded.path}: knows no users; expected some")
    file = read_held_out(source, loaded).sample(limit, loaded.config.seed)
    data = encoded(loaded, file)
    task = held_out_task(loaded, data)
    margins = reward_margins(task, score_users(task, controls=False))
    known = np.array(task.users) > 0
    numbers = np.array(task.users)[known].astype(str)
    own, generic = (by_user(numbers, values[known]) for values in margins[:2])
    space = space_of(loaded, data.comparisons)
    typical = np.sqrt(np.square(margins[1]).mean())
    unit = f"{space.unit} The generic user's own margins are {typical:.2f}." if is_linear(loaded.config) else space.unit
    points_M2, share = directions(space.points_MR)
    rows = table(loaded, space, own, generic)
    return Users(rows, points_M2, share, unit)


def table(loaded: Loaded, space: Space, own: UserCounts, generic: UserCounts) -> list[dict[str, Any]]:
    """A row for each user, by number. own, generic: what is right of their held-out comparisons, users by number."""
    right = {int(u): (int(n), a, g) for u, n, a, g in zip(own.users, own.n, own.accuracy(), generic.accuracy())}
    learned, names = comparisons_of(loaded), loaded.users.names
    distances_M, near = space.points_MR.norm(dim=1).tolist(), nearest(space.points_MR)
    weights = archetypes(loaded)
    rows = []
    for user, name in enumerate(names, start=1):
        n, accuracy, as_generic = right.get(user, (0, None, None))
        row = {"user": name, "comparisons": learned.get(user), "held_out": n}
        row |= {"accuracy": accuracy, "generic_user": as_generic}
        row |= {"gain": None if accuracy is None else accuracy - as_generic, "distance": distances_M[user - 1]}
        row["nearest"] = ", ".join(f"{names[other]} ({distance:.2f})" for other, distance in near[user - 1])
        if space.deviations:
            row["standard_deviation"] = space.deviations.get(user)
        if weights is not None:
            row |= {f"archetype_{k}": weight for k, weight in enumerate(weights[user - 1].tolist(), start=1)}
        rows.append(row)
    return rows


def comparisons_of(loaded: Loaded) -> dict[int, int]:
    """How many comparisons each user's vectors were learned from; without those of training whose file is gone."""
    file = training_file(loaded)
    counts = Counter(loaded.users.number(c.user) for c in file.comparisons) if file else Counter()
    return {**counts, **{loaded.users.number(name): len(pairs) for name, pairs in read_told(loaded).items()}}


def archetypes(loaded: Loaded) -> Tensor | None:
    """The weights (M, K) of clusters; None for other users."""
    user_model = loaded.model.user_model
    if loaded.config.user_model.kind != "cluster":
        return None
    users = torch.arange(1, len(loaded.users) + 1, device=loaded.model.device)
    w_MK = user_model.weights(users) if isinstance(user_model, ClusterUsers) else user_model.parts(users).coordinates_B
    assert w_MK is not None
    return w_MK.detach().cpu()


def draw_map(seen: Users, path: Path) -> None:
    """All users on the two directions, coloured by gain; the generic user is the cross."""

    def draw(axes: Any) -> None:
        gains = np.array([np.nan if row["gain"] is None else 100 * row["gain"] for row in seen.rows])
        x, y = seen.points_M2.T.tolist()
        most = np.nanmax(np.abs(gains)) if np.isfinite(gains).any() else 1.0
        axes.scatter(x, y, c="lightgrey", s=18)  # whose gain is not known
        found = axes.scatter(x, y, c=gains, cmap="RdYlBu", vmin=-(most or 1), vmax=most or 1, s=18, edgecolors="grey")
        axes.figure.colorbar(found, label="gain over the generic user, points")
        axes.plot(0, 0, "k+", markersize=12)
        if len(x) <= NAMED:
            for row, *point in zip(seen.rows, x, y):
                axes.annotate(label(row["user"]), point, fontsize=6, xytext=(3, 3), textcoords="offset points")
        axes.set(xlabel="first direction of f(u) - f(0)", ylabel="second direction", aspect="equal")

    save_figure(path, (7, 5.5), draw)
