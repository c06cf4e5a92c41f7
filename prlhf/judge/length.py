"""The length-controlled win rate: what A would win if both sides' responses were equally long.

After AlpacaEval 2 (Dubois et al. 2024, arXiv 2404.04475), whose regression has a term for the instruction too.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from prlhf.evaluate.stats.intervals import MISSED, Interval, student_t_quantile
from prlhf.evaluate.stats.metrics import distinct, sigmoid

RIDGE = 1e-3


class LengthFit(NamedTuple):
    """P(A wins) = s(intercept + slope tanh(d / scale)), d the length of A's response less that of B's."""

    rate: float  # s(intercept): at d = 0
    interval: Interval | None  # of the rate, over users
    intercept: float
    slope: float
    scale: float
    separable: bool  # without the ridge the fit would be infinite
    extrapolated: bool  # d = 0 is outside of all pairs' d


MARKS = {  # what is to be known of a rate, by the field that says so: the sign beside the rate, and the sentence below
    "extrapolated": (
        "†",
        "one side's responses are longer in every pair, so that equal length lies outside of what was judged, and the rate there "
        "is an extrapolation.",
    ),
    "separable": (
        "‡",
        "wins and losses are separable by length, or one side wins all: the fit is the ridge's, without an interval.",
    ),
}


def rate_marks(fit: Mapping[str, Any] | None) -> str:
    """The signs that stand beside a length-controlled rate, of `MARKS`; fit: a `LengthFit` as a report has it."""
    return "".join(f" {sign}" for name, (sign, _) in MARKS.items() if fit and fit[name])


def mark_sentences(fits: Iterable[Mapping[str, Any] | None]) -> list[str]:
    """What the signs beside these fits' rates mean."""
    signs = "".join(map(rate_marks, fits))
    return [f"{sign} At equal length: {said}" for sign, said in MARKS.values() if sign in signs]


def length_controlled(wins_N: np.ndarray, differences_N: np.ndarray, users: Sequence[str]) -> LengthFit | None:
    """Logistic regression of the wins on the length difference z = tanh(d / scale), scale the root mean square of d:

        maximise over (a, b)   sum_n y_n ln s(a + b z_n) + (1 - y_n) ln s(-a - b z_n) - RIDGE / 2 (a^2 + b^2).

    y is 1, 0, or 1/2 for a tie, which so weighs as half a win and half a loss. AlpacaEval 2 has the standard deviation for a
    scale, which would be no scale for differences that are nearly equal. The ridge is worth a thousandth of a pair; it
    matters where wins and losses are separable alone, and keeps the fit finite there.

    The interval is s(a +- t sqrt(V_aa)), V = U / (U-1) H^-1 (sum over users g g^T) H^-1, g a user's gradient, H the negative
    Hessian (Liang and Zeger 1986, Biometrika 73), t = t_{U-1, 0.975}. None for fewer than two users, where wins and losses
    are separable, and where all is a tie. The whole is None for no pairs, and where d is the same in all and not 0: nothing
    then tells length from quality.
    """
    if not len(wins_N) or (np.ptp(differences_N) == 0 and differences_N[0] != 0):
        return None
    scale = float(np.sqrt((differences_N.astype(float) ** 2).mean())) or 1.0
    z_N = np.tanh(differences_N / scale)
    x_N2 = np.stack([np.ones(len(z_N)), z_N], axis=1)
    beta_2 = logistic_fit(x_N2, wins_N)
    p_N = sigmoid(x_N2 @ beta_2)
    apart = separable(wins_N, z_N)
    outside = bool(differences_N.min() > 0 or differences_N.max() < 0)
    interval = None if apart else _interval(beta_2, x_N2, wins_N - p_N, p_N * (1 - p_N), users)
    return LengthFit(float(sigmoid(beta_2[0])), interval, float(beta_2[0]), float(beta_2[1]), scale, apart, outside)


def logistic_fit(x_N2: np.ndarray, y_N: np.ndarray) -> np.ndarray:
    """The maximum of `length_controlled`'s objective, (2,), by Newton's method; a step that does not rise is halved."""

    def objective(beta_2: np.ndarray) -> float:
        logits_N = x_N2 @ beta_2
        return float(y_N @ logits_N - np.logaddexp(0, logits_N).sum() - RIDGE / 2 * beta_2 @ beta_2)

    beta_2 = np.zeros(2)
    for _ in range(100):
        p_N = sigmoid(x_N2 @ beta_2)
        gradient_2 = x_N2.T @ (y_N - p_N) - RIDGE * beta_2
        step_2 = np.linalg.solve(_hessian(x_N2, p_N * (1 - p_N)), gradient_2)
        left = gradient_2 @ step_2  # near the maximum, twice what is left to gain
        if left < 1e-24:
            break
        size = 1.0
        while left > 1e-8 and objective(beta_2 + size * step_2) < objective(beta_2):
            size /= 2
        beta_2 = beta_2 + size * step_2
    return beta_2


def _hessian(x_N2: np.ndarray, weights_N: np.ndarray) -> np.ndarray:
    """The negative Hessian of the objective, (2, 2)."""
    return (x_N2 * weights_N[:, None]).T @ x_N2 + RIDGE * np.eye(2)


def _interval(
    beta_2: np.ndarray, x_N2: np.ndarray, residuals_N: np.ndarray, weights_N: np.ndarray, users: Sequence[str]
) -> Interval | None:
    names, index_N = distinct(users)
    if len(names) < 2:
        return None
    gradients_U2 = np.stack(
        [np.bincount(index_N, weights=residuals_N * column_N, minlength=len(names)) for column_N in x_N2.T], axis=1
    )
    # Column a of H^-1 gives V_aa = U / (U-1) sum over users (h . g)^2.
    effects_U = gradients_U2 @ np.linalg.solve(_hessian(x_N2, weights_N), np.array([1.0, 0.0]))
    half = np.sqrt(len(names) / (len(names) - 1) * (effects_U**2).sum())
    half *= student_t_quantile(1 - MISSED / 2, len(names) - 1)
    return Interval(*sigmoid(beta_2[0] + np.array([-half, half])).tolist()) if half > 0 else None


def separable(wins_N: np.ndarray, z_N: np.ndarray) -> bool:
    """Whether one side always wins, or a threshold on z parts all wins from all losses, with ties at the threshold alone.

    The likelihood then rises for ever along one direction (Albert and Anderson 1984, Biometrika 71).
    """
    wins, losses, ties = (z_N[wins_N == outcome] for outcome in (1, 0, 0.5))
    if not len(ties) and not (len(wins) and len(losses)):
        return True
    below, above = np.concatenate([losses, ties]), np.concatenate([wins, ties])
    return bool(np.ptp(z_N) > 0 and (below.max() <= above.min() or above.max() <= below.min()))
