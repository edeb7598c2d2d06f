"""Builds `ouro._core` from csrc/ and puts a private OpenBLAS beside it.

Three things setuptools does not do by itself: flags per file (one file name prefix per instruction set), compiling in
parallel, and carrying the shared libraries of the pinned `scipy-openblas32` wheel into the package.

OURO_SANITIZE=address,undefined or =thread builds with sanitizers. Everything else is in pyproject.toml.
"""

from __future__ import annotations

import os
import platform
import shutil
import sysconfig
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy
from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError

ROOT = Path(__file__).parent
LAYERS = ("base", "kernels", "model", "engine", "tap", "bench", "python")
X86 = platform.machine() in ("x86_64", "AMD64")
ARM = platform.machine() in ("aarch64", "arm64")

# No fast-math and no contraction: a result has the same bits on every machine (docs/internals.md).
FLAGS = [
    "-std=c11",
    "-O3",
    "-g0",
    "-D_GNU_SOURCE",
    "-fvisibility=hidden",
    "-ffp-contract=off",
    "-fno-math-errno",
    "-Wall",
    "-Wextra",
    "-Wpedantic",
    "-pthread",
]
AVX2 = ["-mavx2", "-mfma"]
AVX_VNNI = [*AVX2, "-mavxvnni"]
AVX_VNNI_VL = [*AVX2, "-mavx512f", "-mavx512vl", "-mavx512vnni"]
AVX512 = [*AVX2, "-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mavx512bf16", "-mavx512vnni"]
ISA = {
    "avx512": AVX512,
    "avx_vnni_vl": AVX_VNNI_VL,
    "avx_vnni": AVX_VNNI,
    "avx2": AVX2,
    "neon_i8mm": ["-march=armv8.2-a+dotprod+i8mm"],
    "neon_dot": ["-march=armv8.2-a+dotprod"],
    "neon": [],
}


def isa_of(path: Path) -> str | None:
    """The instruction set a file is written for, by the start of its name; of two that fit the longer."""
    return next((isa for isa in ISA if path.stem.startswith(isa)), None)


def wanted(path: Path) -> bool:
    isa = isa_of(path)
    if path.stem.startswith("bench_"):  # programs of their own
        return False
    return isa is None or (X86 and isa.startswith("avx")) or (ARM and isa.startswith("neon"))


def sources() -> list[Path]:
    found = [p for layer in LAYERS for p in sorted((ROOT / "csrc" / layer).glob("*.c"))]
    return [p for p in found if wanted(p)]


def flags_of(path: Path) -> list[str]:
    # CPython's slots and NumPy's tables turn function pointers into void *, which -Wpedantic can not accept
    flags = FLAGS if path.parent.name != "python" else [f for f in FLAGS if f != "-Wpedantic"]
    base = ["-march=x86-64-v2", "-mtune=generic"] if X86 else []
    flags = flags + base + ISA.get(isa_of(path) or "", [])
    sanitize = os.environ.get("OURO_SANITIZE")
    return flags + ([f"-fsanitize={sanitize}", "-O1", "-g", "-fno-omit-frame-pointer", "-DOURO_SMALL_BLOCKS=1"] if sanitize else [])


def openblas() -> list[Path]:
    """Shared libraries and licences of the build-time wheel; empty where there is none."""
    try:
        import scipy_openblas32
    except ImportError:
        return []
    lib = Path(scipy_openblas32.get_lib_dir())
    package = Path(scipy_openblas32.__file__).parent
    bundled = package.parent / "scipy_openblas32.libs"
    licences = [*package.parent.glob("scipy_openblas32-*.dist-info/**/*LICENSE*"), *package.glob("LICENSE*")]
    files = [p for folder in (lib, bundled) if folder.is_dir() for p in folder.iterdir() if ".so" in p.name]
    return [p for p in files + licences if p.is_file()]


class BuildCore(build_ext):
    """Compiles each source with its own flags, several at once, and only what changed."""

    def build_extension(self, ext: Extension) -> None:
        if not (Path(sysconfig.get_path("include")) / "Python.h").is_file():
            raise SystemExit("Python.h is not here: on Debian it comes with the package python3-dev")
        unknown = {isa for isa in {isa_of(p) for p in sources()} if isa and not self.knows(isa)}
        found = [p for p in sources() if isa_of(p) not in unknown]
        headers = max(p.stat().st_mtime for p in (ROOT / "csrc").rglob("*.h"))
        kinds = {isa for p in found if (isa := isa_of(p))}
        macros = [("NPY_NO_DEPRECATED_API", "NPY_2_0_API_VERSION"), ("NPY_TARGET_VERSION", "NPY_1_25_API_VERSION")]
        macros += [(f"OURO_HAVE_{isa.upper()}", "1") for isa in sorted(kinds)]
        include = [str(ROOT / "csrc"), str(ROOT / "csrc" / "include"), numpy.get_include(), *self.compiler.include_dirs]
        temp = Path(self.build_temp) / (os.environ.get("OURO_SANITIZE") or "plain").replace(",", "-")

        def compile_one(path: Path) -> str:
            target = temp / path.relative_to(ROOT).with_suffix(".o")
            if self.force or not target.exists() or target.stat().st_mtime < max(path.stat().st_mtime, headers):
                made = self.compiler.compile(
                    [str(path.relative_to(ROOT))], output_dir=str(temp), macros=macros, include_dirs=include, extra_postargs=flags_of(path)
                )
                return made[0]
            return str(target)

        with ThreadPoolExecutor(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 2) as crew:
            objects = list(crew.map(compile_one, found))
        target = Path(self.get_ext_fullpath(ext.name))
        target.parent.mkdir(parents=True, exist_ok=True)
        sanitize = os.environ.get("OURO_SANITIZE")
        link = ["-pthread"] + ([f"-fsanitize={sanitize}"] if sanitize else [])
        self.compiler.link_shared_object(objects, str(target), libraries=["m", "dl"], extra_postargs=link)
        self.carry_openblas(target.parent / "_libs")

    def copy_extensions_to_source(self) -> None:
        super().copy_extensions_to_source()
        self.carry_openblas(ROOT / "ouro" / "_libs")

    def knows(self, isa: str) -> bool:
        """Whether the compiler has the instruction set (AVX-VNNI: gcc 11, clang 12); without it there is one table less."""
        with tempfile.TemporaryDirectory() as folder:
            empty = Path(folder) / "empty.c"
            empty.write_text("int ouro_empty;\n")
            try:
                self.compiler.compile([str(empty)], output_dir=folder, extra_postargs=ISA[isa])
            except CompileError:
                print(f"no {isa} kernels: this compiler does not know {' '.join(ISA[isa])}")
                return False
        return True

    def carry_openblas(self, folder: Path) -> None:
        files = openblas()
        if files:
            folder.mkdir(exist_ok=True)
        for path in files:
            shutil.copy2(path, folder / path.name)


setup(
    ext_modules=[Extension("ouro._core", [str(p.relative_to(ROOT)) for p in sources()])],
    cmdclass={"build_ext": BuildCore},
)
