"""Markdown tables for the reports, and shares as text in percent."""

from collections.abc import Iterable, Sequence

Cell = str | int | float | None


def markdown_table(header: Sequence[str], rows: Iterable[Sequence[Cell]]) -> str:
    """A Markdown table. None is shown as '-', a whole number without decimals, any other number with one."""
    lines = ["|" + "".join(f" {cell(value)} |" if value != "" else " |" for value in row) for row in (header, *rows)]
    return "\n".join([lines[0], "|---" * len(header) + "|", *lines[1:]])


def cell(value: Cell) -> str:
    """The text of one cell: what would end a cell or a row is escaped."""
    if value is None:
        return "-"
    if isinstance(value, str):
        return value.replace("|", "\\|").replace("\n", " ")
    return f"{value:,.0f}" if value == int(value) else f"{value:,.1f}"


def percent(share: float | None) -> str:
    """A share in percent, for a column that names the unit; '-' for None."""
    return "-" if share is None else f"{100 * share:.2f}"


def percent_text(share: float | None) -> str:
    """A share in percent with its sign; '-' for None."""
    return "-" if share is None else f"{percent(share)}%"


def interval_text(interval: Sequence[float] | None) -> str:
    """An interval of shares in percent, without the sign; '-' for None."""
    return "-" if interval is None else f"{percent(interval[0])} to {percent(interval[1])}"
