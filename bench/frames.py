"""Tables of the benchmarks, by pandas: for a terminal, and for a page."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import pandas


def text(title: str, rows: Iterable[dict[str, Any]], decimals: int = 2) -> str:
    """The title, and under it a line per row. The columns are the keys of the first row, in their order."""
    frame = pandas.DataFrame(list(rows))
    return f"{title}\n{frame.to_string(index=False, na_rep='', float_format=f'{{:,.{decimals}f}}'.format)}"


def of_cells(title: str, header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """For a terminal, what `markdown` has for a page."""
    return text(title, (dict(zip(header, row, strict=True)) for row in rows))


def markdown(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """The same for a page. The cells stay as they are."""
    frame = pandas.DataFrame([list(row) for row in rows], columns=pandas.Index(header))
    return frame.to_markdown(index=False, disable_numparse=True)
