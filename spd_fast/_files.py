"""Files that are either wholly there or not at all."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from spd_fast.errors import UserError

__all__ = ["alone_in", "sync_folder", "write_bytes"]


def write_bytes(path: Path, data: bytes) -> None:
    """Write a file aside, flush it to the disk, and rename it into place."""
    aside = path.with_name(f".{path.name}.tmp")
    try:
        with aside.open("wb") as f:
            f.write(data)
            f.flush()
            os.fsync(f.fileno())
        aside.replace(path)
    except BaseException:
        aside.unlink(missing_ok=True)
        raise


def sync_folder(folder: Path) -> None:
    """Flush a folder's entries (new names, renames) to the disk."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def alone_in(folder: Path) -> Iterator[None]:
    """Keep other processes that ask for the same out of a folder; a killed one lets go of it.

    Raises:
        UserError: another process is at work there.
    """
    try:
        import fcntl
    except ImportError:  # Windows has no such lock
        yield
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"another process is working in {folder}") from None
        except OSError:  # some network file systems have no locks
            pass
        yield
    finally:
        os.close(descriptor)
