"""The compile gate: every kernel of the registry for every target, without a GPU.

    python -m spd_fast.kernels.compile [--targets sm_80 sm_90 sm_100 gfx942] [--full] [--out FILE]

Compiles with whatever Triton is imported, in one process a core, and finds again in Triton's cache
what has not changed. Reads registers, stack and shared memory from the compiled code (NVIDIA:
cuobjdump on the cubin; AMD: the code object's metadata) and fails on a spill or on more shared
memory than the target has.
"""

from __future__ import annotations

import argparse
import csv
import functools
import multiprocessing
import os
import re
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from spd_fast.errors import nearest
from spd_fast.kernels.registry import Case, cases

# Target and the most shared memory a block (a work-group) can have, in bytes.
TARGETS = {
    "sm_80": (GPUTarget("cuda", 80, 32), 163 * 1024),
    "sm_90": (GPUTarget("cuda", 90, 32), 227 * 1024),
    "sm_100": (GPUTarget("cuda", 100, 32), 227 * 1024),
    "gfx942": (GPUTarget("hip", "gfx942", 64), 64 * 1024),
}


class Row(NamedTuple):
    """One line of the table; -1 where the compilation failed."""

    kernel: str
    target: str
    tile: str
    specialisation: str
    registers: int
    stack_bytes: int
    shared_bytes: int
    verdict: str


def _nvidia_usage(cubin: bytes) -> tuple[int, int]:
    """(registers, stack bytes) of the one function in a cubin."""
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        run = [str(tool), "-res-usage", file.name]
        text = subprocess.run(run, capture_output=True, text=True, check=True).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+)", text)
    if found is None:
        raise RuntimeError(f"cuobjdump said nothing of registers: {text.strip()!r}")
    return int(found[1]), int(found[2])


def _amd_usage(assembly: str) -> tuple[int, int]:
    """(vector registers, scratch bytes) of the one kernel in an assembly listing."""

    def field(name: str) -> int:
        found = re.search(rf"\.{name}:\s+(\d+)", assembly)
        if found is None:
            raise RuntimeError(f"the code object's metadata has no {name}")
        return int(found[1])

    spilled = 4 * (field("vgpr_spill_count"))
    return field("vgpr_count"), max(spilled, field("private_segment_fixed_size"))


def usage(case: Case, target: GPUTarget) -> tuple[int, int, int]:
    """(registers, stack bytes, shared bytes)."""
    types, constants, attributes = case.signature()
    source = ASTSource(case.kernel, types, constants, attributes)
    options = {"num_warps": case.config.num_warps, "num_stages": case.config.num_stages,
               "enable_fp_fusion": False}  # fmt: skip
    compiled: Any = triton.compile(source, target=target, options=options)
    read = _nvidia_usage if target.backend == "cuda" else _amd_usage
    code = compiled.asm["cubin" if target.backend == "cuda" else "amdgcn"]
    return (*read(code), compiled.metadata.shared)


def _verdict(stack: int, shared: int, limit: int) -> str:
    if stack:
        return "spills"
    return "too much shared memory" if shared > limit else "ok"


def examine(case: Case, name: str) -> Row:
    """Compile ``case`` for the target ``name`` and judge it."""
    target, limit = TARGETS[name]
    with warnings.catch_warnings():
        # gfx942 has no tf32 mode in every Triton: a warning there is no finding.
        warnings.simplefilter("ignore")
        try:
            registers, stack, shared = usage(case, target)
            verdict = _verdict(stack, shared, limit)
        except Exception as error:  # whatever a compiler raises is this case's verdict
            registers = stack = shared = -1
            verdict = f"{type(error).__name__}: {str(error).strip().splitlines()[-1][:90]}"
    return Row(case.kernel.__name__, name, str(case.config), str(case), registers, stack, shared,
               verdict)  # fmt: skip


@functools.cache
def _registered() -> tuple[Case, ...]:
    return tuple(cases())


def _examine_registered(job: tuple[int, str]) -> Row:
    index, name = job
    return examine(_registered()[index], name)


def _examine_all(jobs: Sequence[tuple[int, str]], processes: int) -> Iterator[Row]:
    if processes == 1:
        yield from map(_examine_registered, jobs)
        return
    # Kernels cannot be sent to another process: each makes the registry itself.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(processes, mp_context=context) as pool:
        yield from pool.map(_examine_registered, jobs, chunksize=4)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m spd_fast.kernels.compile")
    parser.add_argument("--targets", nargs="+", choices=TARGETS, default=list(TARGETS))
    parser.add_argument("--kernels", nargs="+", metavar="NAME", help="only these")
    parser.add_argument("--defaults", action="store_true", help="only the shipped defaults")
    parser.add_argument("--full", action="store_true", help="more odd sizes, and views")
    parser.add_argument("--jobs", type=int, default=len(os.sched_getaffinity(0)),
                        help="processes; the machine's cores unless given")  # fmt: skip
    parser.add_argument("--out", type=Path, help="CSV to write; {triton} stands for the version")
    parser.add_argument("--verbose", action="store_true", help="print every compilation")
    options = parser.parse_args(arguments)
    if os.environ.get("TRITON_INTERPRET") == "1":
        parser.error("TRITON_INTERPRET=1 compiles nothing")
    known = {case.name for case in _registered()}
    for name in options.kernels or ():
        if name not in known:
            parser.error(f"unknown kernel {name!r}; nearest: {nearest(name, known)}")
    jobs = [
        (index, target)
        for index, case in enumerate(_registered())
        if (not options.kernels or case.name in options.kernels)
        and (case.default or not options.defaults)
        and (options.full or not case.full)
        for target in options.targets
    ]
    rows = []
    for row in _examine_all(jobs, max(options.jobs, 1)):
        rows.append(row)
        if options.verbose or row.verdict != "ok":
            print(*row, sep="  ", flush=True)
    if options.out:
        path = Path(str(options.out).format(triton=triton.__version__))
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("w", newline="") as file:
            writer = csv.writer(file, lineterminator="\n")
            writer.writerow(Row._fields)
            writer.writerows(rows)
    failed = sum(row.verdict != "ok" for row in rows)
    print(f"triton {triton.__version__}: {len(rows)} compilations, {failed} failed")
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
