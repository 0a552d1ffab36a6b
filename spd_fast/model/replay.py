"""What lies before a site: modules whose clean results a masked forward can take over.

A masked forward whose first masked site is s repeats the clean forward up to s. Every module that
finishes before s is called gives its clean output again, so it need not compute.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any, TypeGuard

import torch
from torch import Tensor, nn

__all__ = ["overridden_forwards", "prefixes"]


@contextmanager
def overridden_forwards(
    modules: Mapping[str, nn.Module], forwards: Mapping[str, Callable[..., Any]]
) -> Any:
    """Let the named modules compute something else for a while, without touching their state."""
    overridden = [(modules[name], forward) for name, forward in forwards.items()]
    # A module may carry a forward of its own already (as other libraries' hooks do): it comes back.
    before = [(module, module.__dict__.get("forward")) for module, _ in overridden]
    try:
        for module, forward in overridden:
            object.__setattr__(module, "forward", forward)
        yield
    finally:
        for module, own in before:
            module.__dict__.pop("forward", None)
            if own is not None:
                object.__setattr__(module, "forward", own)


def _is_tensors(output: Any) -> TypeGuard[Tensor | tuple[Tensor, ...]]:
    if isinstance(output, tuple):
        return len(output) > 0 and all(isinstance(t, Tensor) for t in output)
    return isinstance(output, Tensor)


def prefixes(
    modules: Mapping[str, nn.Module], sites: Mapping[str, str], run: Callable[[], Any]
) -> dict[str, tuple[str, ...]]:
    """Site → the largest modules that finish before it is called, in their order.

    ``modules`` are the target's by path, ``sites`` the paths of the sites' modules. ``run()`` is a
    forward of the target; it is observed once. Left out: modules that are called several times,
    that hold no parameters or buffers (as cheap to compute as to keep), whose output is not made of
    tensors, or is written to afterwards.
    """
    clock = 0
    began: dict[str, int] = {}
    ended: dict[str, int] = {}
    outputs: dict[str, list[tuple[Tensor, int]]] = {}
    unusable: set[str] = set()

    def observe(name: str, forward: Callable[..., Any]) -> Callable[..., Any]:
        def observed(*args: Any, **kwargs: Any) -> Any:
            nonlocal clock
            if name in began:
                unusable.add(name)
            clock += 1
            began.setdefault(name, clock)
            output = forward(*args, **kwargs)
            clock += 1
            ended[name] = clock
            if _is_tensors(output):
                parts = output if isinstance(output, tuple) else (output,)
                outputs[name] = [(t, t._version) for t in parts]
            else:
                unusable.add(name)
            return output

        return observed

    with ExitStack() as stack:
        everything = {
            name: observe(name, module.forward) for name, module in modules.items() if name
        }
        stack.enter_context(overridden_forwards(modules, everything))
        stack.enter_context(torch.no_grad())
        run()

    own = set(sites.values())
    usable = [
        name
        for name in sorted(ended, key=ended.__getitem__)
        if name not in unusable
        and (
            name in own
            or any(True for _ in (*modules[name].parameters(), *modules[name].buffers()))
        )
        and all(t._version == version for t, version in outputs[name])
    ]
    result = {}
    for site, path in sites.items():
        before = [n for n in usable if path in began and ended[n] < began[path]]
        inside = {n for n in before for outer in before if n.startswith(outer + ".")}
        result[site] = tuple(n for n in before if n not in inside)
    return result
