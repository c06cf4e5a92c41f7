"""Adapted users whose rewards are not linear in their rows: margins that are linear around the row, against a posterior sample.

    python benchmarks/posterior.py --checkpoint ADAPTED --data HELD_OUT.jsonl --draws 12

For comparisons of adapted users, by three predictions of P(chosen is preferred): the margin as it is, integrated with margins that
are linear around the user's vector (as evaluate.py does), and the mean over draws of the vector from the same Gaussian, each
draw's margins by the model itself. Prints the mean -log P, accuracy, calibration error, and standard deviations of the margins.
"""

import argparse

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import softplus

from prlhf.data.check.tables import markdown_table
from prlhf.errors import UserError, run_command
from prlhf.evaluate.held_out import encoded, held_out_task, read_held_out
from prlhf.evaluate.stats.metrics import expected_calibration_error
from prlhf.method.posterior import Posterior, integrated
from prlhf.score.slopes import margin_slopes, user_rows
from prlhf.score.task import Task
from prlhf.store.final import load_final


def drawn(posterior: Posterior, user: int, generator: torch.Generator) -> Tensor:
    """A draw of the user's row less the row itself, (V,)."""
    variances_K, axes_KK = torch.linalg.eigh(posterior.covariance(user))
    root_KK = axes_KK * variances_K.clamp(min=0).sqrt()
    c_K = root_KK @ torch.randn(len(root_KK), dtype=torch.float64, generator=generator)
    if posterior.directions_KV is None:
        return c_K
    row_V = posterior.directions_KV.T @ c_K
    if posterior.floor is None:
        return row_V
    floor = posterior.law_of(user).scale * posterior.floor
    return row_V + floor.sqrt() * torch.randn(len(row_V), dtype=torch.float64, generator=generator)


def margins(task: Task, rows: list[int], rows_NV: Tensor) -> tuple[Tensor, Tensor]:
    """The margins of these comparisons as users with these rows have them, (N,), and their slopes, (N, V)."""
    margin_N, slopes_NV = torch.zeros(len(rows), dtype=torch.float64), torch.zeros_like(rows_NV)
    for part in margin_slopes(task, rows, rows_NV):
        margin_N[part.indices], slopes_NV[part.indices] = part.values_N, part.slopes_NV
    return margin_N, slopes_NV


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", required=True)
    parser.add_argument("--data", required=True)
    parser.add_argument("--draws", type=int, default=12)
    args = parser.parse_args()
    loaded = load_final(args.checkpoint)
    posterior, user_model = loaded.posterior, loaded.model.user_model
    if posterior is None:
        raise UserError(f"{loaded.path}: no adapted users; expected some")
    task = held_out_task(loaded, encoded(loaded, read_held_out(args.data, loaded)))
    rows = [i for i, user in enumerate(task.users) if posterior.row(user) is not None]
    users = [task.users[i] for i in rows]
    own_NV = user_rows(user_model, users)
    margin_N, slopes_NV = margins(task, rows, own_NV)
    variance_N = posterior.row_variances(users, slopes_NV)
    generator, samples = torch.Generator().manual_seed(0), []
    for _ in range(args.draws):
        away = {user: drawn(posterior, user, generator) for user in sorted(set(users))}
        samples.append(margins(task, rows, own_NV + torch.stack([away[user] for user in users]))[0])
    sample_SN = torch.stack(samples)
    logits = {
        "as it is": margin_N,
        "linear, integrated": integrated(margin_N, variance_N),
        "sample": torch.logit(sample_SN.sigmoid().mean(dim=0), eps=1e-9),
    }
    spread = {"linear, integrated": variance_N.sqrt().mean(), "sample": sample_SN.std(dim=0).mean()}
    lines = []
    for name, logit_N in logits.items():
        error = expected_calibration_error(logit_N.numpy())
        right = float(np.mean(logit_N.numpy() > 0))
        std = f"{spread[name]:.3f}" if name in spread else ""
        lines.append((name, f"{softplus(-logit_N).mean():.3f}", f"{100 * right:.1f}", f"{100 * error:.1f}", std))
    head = ("margin", "-log P", "accuracy, %", "calibration error, %", "standard deviation of a margin")
    print(f"{len(rows)} comparisons of {len(set(users))} adapted users, {args.draws} draws")
    print(markdown_table(head, lines))


if __name__ == "__main__":
    run_command(main)
