"""Write Markdown: tables, and generated blocks between markers."""

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

MISSING = "–"
"""Shown in a cell whose value is None."""


def table(rows: Iterable[Mapping[str, Any]], columns: Sequence[str] | None = None) -> str:
    """Return a table with a line for each row, or "" without rows.

    `columns` defaults to every key of any row, in order of first appearance. A missing key leaves
    its cell empty, None shows as "–", and a float is rounded to four digits.
    """
    found = list(rows)
    if not found:
        return ""
    if columns is None:
        columns = list(dict.fromkeys(column for row in found for column in row))
    head = [f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
    lines = [[_cell(row.get(column, "")) for column in columns] for row in found]
    return "\n".join([*head, *(f"| {' | '.join(line)} |" for line in lines)])


def _cell(value: Any) -> str:
    if value is None:
        return MISSING
    if isinstance(value, float):
        return f"{value:.0f}" if abs(value) >= 1000 else f"{value:.4g}"
    return str(value).replace("|", "\\|").replace("\n", " ")


def replace_block(page: str, name: str, text: str) -> str:
    """Return `page` with the text between `<!-- name -->` and `<!-- end -->` replaced.

    Raises ValueError if the page has no such block.
    """
    pattern = re.compile(rf"(<!-- {re.escape(name)} -->\n).*?(<!-- end -->)", re.DOTALL)
    if not pattern.search(page):
        raise ValueError(f"page: got no block {name!r}, expected <!-- {name} --> … <!-- end -->")
    return pattern.sub(lambda match: f"{match[1]}{text}\n{match[2]}", page)
