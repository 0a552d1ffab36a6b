"""docs/paper.md: its tables, filled from what runs and studies wrote. No number is typed by hand.

A table stands between ``<!-- table: NAME -->`` and ``<!-- end -->``; its sources lie beside the
page, in a folder of the page's name.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

from spd_fast._files import write_bytes
from spd_fast.errors import UserError
from spd_fast.studies.sources import read_sources
from spd_fast.studies.tables import all_tables

__all__ = ["fill", "write_page"]

_TABLE = re.compile(r"(<!-- table: (\S+) -->\n).*?(<!-- end -->)", re.S)


def fill(text: str, tables: Mapping[str, str]) -> str:
    """``text`` with every marked table replaced.

    Raises:
        UserError: a mark that names no table.
    """

    def replace(match: re.Match[str]) -> str:
        if match[2] not in tables:
            raise UserError(f"no table {match[2]!r}; known: {', '.join(tables)}")
        return f"{match[1]}{tables[match[2]]}{match[3]}"

    return _TABLE.sub(replace, text)


def write_page(page: Path) -> None:
    """Fill the tables of a page from its sources.

    Raises:
        UserError: no such page, or a mark that names no table.
    """
    try:
        text = page.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read {page}: {error}") from None
    sources = read_sources(page.with_suffix(""))
    write_bytes(page, fill(text, all_tables(sources, page.stem)).encode())
