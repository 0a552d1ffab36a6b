"""Progress of a long loop: a bar in a terminal, plain periodic lines elsewhere."""

from __future__ import annotations

import sys
import time
from types import TracebackType
from typing import TextIO

from tqdm import tqdm

__all__ = ["Progress"]


class Progress:
    """``with Progress("decompose", total) as p: p.update(done, "loss 1e-3")``.

    In a terminal a tqdm bar with rate and ETA; otherwise one line at most every ``interval``
    seconds and one at the end.
    """

    def __init__(
        self,
        label: str,
        total: int,
        start: int = 0,
        *,
        file: TextIO | None = None,
        interval: float = 15.0,
        quiet: bool = False,
    ) -> None:
        self.label, self.total, self.interval, self.quiet = label, total, interval, quiet
        self.file = sys.stderr if file is None else file
        self.done = self.start = start
        self.bar: tqdm | None = None
        if not quiet and self.file.isatty():
            self.bar = tqdm(
                total=total, initial=start, desc=label, file=self.file, dynamic_ncols=True,
                mininterval=0.2, smoothing=0.05,
                leave=None,  # a bar below another one goes away when it is done
            )  # fmt: skip
        self.began = self.said = time.perf_counter()

    def update(self, done: int, text: str = "") -> None:
        """``done`` steps of ``total`` are finished; ``text`` is shown beside them."""
        if self.bar is not None:
            if text:
                self.bar.set_postfix_str(text, refresh=False)
            self.bar.update(done - self.done)
        self.done = done
        now = time.perf_counter()
        due = done >= self.total or now - self.said >= self.interval
        if self.bar is None and not self.quiet and due and text:
            self.said = now
            remaining = (now - self.began) / max(done - self.start, 1) * (self.total - done)
            eta = tqdm.format_interval(remaining)
            print(f"{self.label}: {done}/{self.total}  ETA {eta}  {text}", file=self.file)
            self.file.flush()

    def __enter__(self) -> Progress:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self.bar is not None:
            self.bar.close()
