"""The largest number of bytes that tensors take together while something runs on the CPU."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch.profiler import ProfilerActivity, profile


def tensor_peak(run: Callable[[], Any]) -> int:
    """What ``torch.cuda.max_memory_allocated`` would say of ``run``, in bytes: of every allocation
    through torch's CPU allocator, those of the C++ extension among them."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        held = run()  # until the profile ends
    with tempfile.TemporaryDirectory() as folder:
        trace = Path(folder) / "trace.json"
        seen.export_chrome_trace(str(trace))
        events = json.loads(trace.read_text(encoding="utf-8"))["traceEvents"]
    del held
    total = highest = 0
    for event in sorted((e for e in events if e.get("name") == "[memory]"), key=lambda e: e["ts"]):
        total += event["args"]["Bytes"]
        highest = max(highest, total)
    return highest
