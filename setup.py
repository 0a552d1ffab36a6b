"""Builds spd_fast, and its C++ extension where a compiler and torch are at hand.

The extension is optional: whatever goes wrong, one message says so and the package installs without
it; every operation then runs on the reference backend. SPD_FAST_SKIP_EXTENSION=1 skips it on
purpose.
"""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).resolve().parent
SOURCES = ["bindings.cpp", "cpu/dispatch.cpp"] + [
    f"cpu/kernels_{isa}.cpp" for isa in ("baseline", "avx2", "avx512")
]


def tell(message: str) -> None:
    print(f"spd_fast: {message}", file=sys.stderr, flush=True)


def without_extension(reason: str) -> None:
    tell(
        f"building without the C++ extension ({reason}); operations on cpu will use the reference"
        " backend"
    )


def compiles(command: list[str], flags: list[str]) -> bool:
    """Whether the compiler makes a shared library from a program that uses `flags`."""
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder, "probe.cpp")
        source.write_text('#include <cmath>\nextern "C" int probe() { return 0; }\n')
        run = [
            *command,
            *flags,
            "-shared",
            "-fPIC",
            str(source),
            "-o",
            str(Path(folder, "probe.so")),
        ]
        try:
            return subprocess.run(run, capture_output=True, check=False).returncode == 0
        except OSError:
            return False


def compile_flags(command: list[str]) -> tuple[list[str], list[str]]:
    """Flags for compiling and linking.

    -ffp-contract=off: masks must round like the reference; kernels ask for fused operations by
    name.
    -fno-math-errno, -fno-trapping-math: let comparisons and square roots vectorise; infinities and
    NaNs keep their meaning, unlike under -ffast-math.
    """
    flags = [
        "-O3",
        "-ffp-contract=off",
        "-fno-math-errno",
        "-fno-trapping-math",
        "-fvisibility=hidden",
        "-Wno-psabi",
        "-g0",
    ]
    if compiles(command, ["-fopenmp"]):
        return [*flags, "-fopenmp"], ["-fopenmp", "-s"]
    tell("the compiler has no OpenMP: the extension will run on one thread")
    return flags, ["-s"]


def extension() -> dict:
    """Arguments of setup() that build the extension, or none."""
    if os.environ.get("SPD_FAST_SKIP_EXTENSION") == "1":
        without_extension("SPD_FAST_SKIP_EXTENSION=1")
        return {}
    if platform.system() == "Windows":
        without_extension("Windows is not supported")
        return {}
    command = os.environ.get("CXX", "c++").split()
    if shutil.which(command[0]) is None:
        without_extension(f"no C++ compiler: '{command[0]}' was not found")
        return {}
    if not compiles(command, ["-std=c++17"]):
        without_extension(f"the C++ compiler '{' '.join(command)}' cannot build a small program")
        return {}
    try:
        from torch.utils import cpp_extension
    except Exception as error:
        without_extension(f"torch cannot be imported: {error}")
        return {}

    class OptionalBuild(cpp_extension.BuildExtension):
        """A failed compilation leaves the package without the extension instead of failing."""

        def build_extensions(self) -> None:
            try:
                super().build_extensions()
            except Exception as error:
                first_line = (str(error).strip() or type(error).__name__).splitlines()[0]
                without_extension(f"compilation failed: {first_line}")
                self.extensions = []

    compile_args, link_args = compile_flags(command)
    module = cpp_extension.CppExtension(
        "spd_fast._C",
        [f"csrc/{source}" for source in SOURCES],
        extra_compile_args=compile_args,
        extra_link_args=link_args,
        depends=[str(p.relative_to(ROOT)) for p in sorted((ROOT / "csrc").rglob("*.[hi]*"))],
    )
    build = OptionalBuild.with_options(use_ninja=cpp_extension.is_ninja_available())
    return {"ext_modules": [module], "cmdclass": {"build_ext": build}}


packages = find_packages(str(ROOT), include=["spd_fast", "spd_fast.*"])
# Installed inside the package: a top-level module called `kernels` would shadow another one. In the
# repository a link leads there, where links are kept.
if "spd_fast.kernels" not in packages:
    packages.append("spd_fast.kernels")
package_dir = {"spd_fast.kernels": "kernels"}

setup(
    packages=packages,
    package_dir=package_dir,
    package_data={
        "spd_fast": ["py.typed"],
        "spd_fast.experiments": ["*.yaml", "*/*.yaml"],
        "spd_fast.report": ["*.j2"],
    },
    **extension(),
)
