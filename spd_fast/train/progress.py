"""Progress of a long loop: a bar in a terminal, plain periodic lines elsewhere."""

from __future__ import annotations

import sys
import time
from types import TracebackType
from typing import TextIO

from tqdm import tqdm

__all__ = ["Progress"]


# Seconds until the first line; the pause between lines as a share of the time gone by, and the
# longest there is, in seconds.
FIRST_LINE = 1.0
SPREAD = 0.05
LONGEST_SILENCE = 600.0


class Progress:
    """``with Progress("decompose", total) as p: p.update(done, "loss 1e-3")``.

    In a terminal a tqdm bar with rate and ETA; otherwise plain lines: the first after a second, one
    at the end, and between them at most one every ``interval`` seconds, further apart as the loop
    goes on, so that the log of a day has a few hundred. The ETA of lines does not count the first
    step, which also loads and allocates; with an ``interval`` of 0, of whole runs, it does.
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
        self.text = ""
        self.began = time.perf_counter()
        self.next_line = self.began + FIRST_LINE
        self.counted = self.began, start  # when and at which step the ETA begins to count

    def update(self, done: int, text: str = "") -> None:
        """``done`` steps of ``total`` are finished; ``text``, or the last one, is shown beside."""
        self.text = text or self.text
        if self.bar is not None:
            if text:
                self.bar.set_postfix_str(text, refresh=False)
            self.bar.update(done - self.done)
        ended = done >= self.total > self.done
        self.done = done
        now = time.perf_counter()
        if done == self.start + 1 and self.interval:
            self.counted = now, done
        if self.bar is None and not self.quiet and (ended or now >= self.next_line):
            elapsed = now - self.began
            self.next_line = now + min(max(self.interval, SPREAD * elapsed), LONGEST_SILENCE)
            since, first = self.counted
            remaining = (now - since) / max(done - first, 1) * (self.total - done)
            eta = "?" if done == first < self.total else tqdm.format_interval(remaining)
            line = f"{self.label}: {done}/{self.total}  ETA {eta}"
            print(f"{line}  {self.text}".rstrip(), file=self.file)
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
