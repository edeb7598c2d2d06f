"""The limits of this machine, measured now by the core (csrc/bench/limits.c)."""

from __future__ import annotations

import platform
from pathlib import Path

from ouro import _core

LARGEST_READ = 1 << 29  # bytes; above it the caches hold nothing of the last read
SMALLEST_READ = 1 << 18
UNITS = ("float32", "bfloat16", "int8")
REPEATS = 4


def read_rates(nbytes: float, threads: int) -> list[float]:
    """Bytes per second of a few plain reads of a buffer as large as the weights that are swept.

    Small weights stay in the caches, so they are compared with a read that stays there too.
    """
    size = int(min(max(nbytes, SMALLEST_READ), LARGEST_READ))
    return _core.read_bandwidth(size, threads, REPEATS if size > 1 << 26 else 40)


def peak_rate(unit: str, threads: int) -> tuple[str, float]:
    """The instruction of a unit and its operations per second, the best of a few."""
    instruction, rates = _core.peak(unit, threads, REPEATS)
    return instruction, max(rates)


def processor() -> str:
    """The processor's name, as far as the system tells it."""
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith(("model name", "Model")):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.machine()


def peak_memory(pid: int | str = "self") -> int:
    """Most bytes a process had resident since its program began; 0 when the system does not tell."""
    try:
        for line in Path(f"/proc/{pid}/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    return 0
