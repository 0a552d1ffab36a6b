"""How many threads torch computes on."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

__all__ = ["SMALL", "one_thread_where"]

# Up to so many numbers torch's elementwise passes take one thread (its GRAIN_SIZE): what shares
# out fewer loses by it.
SMALL = 2**15


@contextmanager
def one_thread_where(small: bool) -> Iterator[None]:
    """torch on one thread for a while, if the work is ``small``."""
    before = torch.get_num_threads()
    if small:
        torch.set_num_threads(1)
    try:
        yield
    finally:
        if small:
            torch.set_num_threads(before)
