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

_MARK = re.compile(r"^<!-- (?:table: (?P<table>\S+)|end) -->$", re.M)


def fill(text: str, tables: Mapping[str, str]) -> str:
    """``text`` with every marked table replaced.

    Raises:
        UserError: no mark, one that names no table, or marks that are not in pairs.
    """
    parts, kept, opened = [], 0, None
    for mark in _MARK.finditer(text):
        name = mark["table"]
        if opened is not None and name is not None:
            raise UserError(f"table {opened!r} has no <!-- end --> before table {name!r}")
        if opened is None and name is None:
            line = text.count("\n", 0, mark.start()) + 1
            raise UserError(f"line {line}: <!-- end --> without a table's mark before it")
        if name is not None:
            if name not in tables:
                raise UserError(f"no table {name!r}; known: {', '.join(tables)}")
            parts.append(f"{text[kept : mark.end()]}\n{tables[name]}")
        kept, opened = mark.start(), name
    if opened is not None:
        raise UserError(f"table {opened!r} has no <!-- end --> after it")
    if not parts:
        raise UserError("no <!-- table: NAME --> ... <!-- end --> on a line of its own")
    return "".join([*parts, text[kept:]])


def write_page(page: Path) -> None:
    """Fill the tables of a page from its sources.

    Raises:
        UserError: no such page, marks as in :func:`fill`, or a source that cannot be read.
    """
    try:
        text = page.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read {page}: {error}") from None
    sources = read_sources(page.with_suffix(""))
    tables = all_tables(sources, page.stem)
    try:
        filled = fill(text, tables)
    except UserError as error:
        raise UserError(f"cannot fill {page}: {error}") from None
    write_bytes(page, filled.encode())
