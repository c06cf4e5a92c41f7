"""Figures of the reports, drawn only where matplotlib (an extra) is installed."""

from collections.abc import Callable
from pathlib import Path
from typing import Any


def save_figure(path: Path, size: tuple[float, float], draw: Callable[[Any], None]) -> bool:
    """Let `draw` fill the axes of a figure of `size` inches and save it; False where matplotlib is not installed."""
    pyplot = optional_pyplot()
    if pyplot is None:
        return False
    figure, axes = pyplot.subplots(figsize=size, layout="constrained")
    draw(axes)
    figure.savefig(path, dpi=150)
    pyplot.close(figure)
    return True


def optional_pyplot() -> Any:
    """matplotlib.pyplot for drawing to files, or None where matplotlib is not installed."""
    try:
        import matplotlib
    except ImportError:
        return None
    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot


def label(text: str) -> str:
    """A text for matplotlib, which takes a dollar sign for the start of a formula."""
    return text.replace("$", "\\$")
