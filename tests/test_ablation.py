"""The rows of examples/ablation.py, from reports made by hand."""

from examples.ablation import row


def report(top, generic, shuffled, gain, interval=None):
    controls = {"generic_user": generic, "shuffled_users": shuffled, "personalisation_gain": gain}
    rows = {name: {"accuracy": value, "interval": interval} for name, value in controls.items()}
    return {"accuracy": {"top": top}, "controls": rows}


def test_one_seed_has_the_gains_interval():
    """T_u = 4 of docs/results.md: 97.5 less 54.2 is 43.3."""
    found = row("T_u = 4", [report(0.975, 0.7, 0.54167, 0.43333, [0.28281, 0.58386])])
    assert found == "| T_u = 4 | 97.5 | 70.0 | 54.2 | 43.3 (28.3 to 58.4) |"
    assert row("one user", [report(0.5, 0.5, None, None)]) == "| one user | 50.0 | 50.0 | - | - |"


def test_several_seeds_have_means_and_standard_deviations():
    """Gains 10 and 20: mean 15, standard deviation sqrt(2 * 5^2 / 1) = 7.1."""
    found = row("arm", [report(0.8, 0.7, 0.7, 0.1, [0, 0.2]), report(0.8, 0.7, 0.6, 0.2, [0.1, 0.3])])
    assert found == "| arm | 80.0 ± 0.0 | 70.0 ± 0.0 | 65.0 ± 7.1 | 15.0 ± 7.1 |"
