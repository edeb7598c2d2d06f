"""Resident memory of a model beside what it should take: packed weights + keys and values + a constant (docs/quantization.md).

    python benchmarks/memory.py CHECKPOINT [--compute int8 ...] [--prompt 512] [--kv-dtype int8]

Each compute has a process of its own. `before` is that process with its libraries in memory; the peak is reset between loading and
generating (Linux: /proc/self/clear_refs).
"""

import argparse
import json
import re
import subprocess
import sys
from pathlib import Path

CONSTANT_MIB = 32  # readers' buffers, scratch of passes, threads; tests/test_memory.py holds small models to it
STATUS, CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def status(name: str) -> float:
    """MiB of one line of this process' status."""
    found = re.search(rf"{name}:\s+(\d+)", STATUS.read_text())
    assert found
    return int(found[1]) / 1024


def measure(where: str, compute: str, prompt: int, kv_dtype: str | None) -> dict[str, object]:
    """Load, generate three tokens behind `prompt` positions, and note what was resident, MiB."""
    import ouro

    ouro.load("ouro-tiny").generate([1, 2], max_new_tokens=2)  # libraries are in memory now
    ouro.free_memory()
    before = status("VmRSS")
    CLEAR.write_text("5")
    model = ouro.load(where, compute=compute, kv_dtype=kv_dtype)
    row: dict[str, object] = {"compute": compute, "kv_dtype": model.kv_dtype, "before": before}
    row |= {"loading": status("VmHWM"), "loaded": status("VmRSS"), "weights": model.info()["weight_bytes"] / 2**20}
    CLEAR.write_text("5")
    ids = [i % model.config.d_vocab for i in range(1, prompt + 1)]
    model.generate(ids, max_new_tokens=3, eos_token_id=[])
    pages = -(-(prompt + 3) // 64) * model.config.n_steps
    row |= {"generating": status("VmHWM"), "cache": pages * model.info()["kv_page_bytes"] / 2**20}
    ouro.free_memory()
    return row | {"freed": status("VmRSS")}


def show(row: dict[str, float]) -> str:
    """One line of the table."""
    loaded = row["before"] + row["weights"] + CONSTANT_MIB
    full = loaded + row["cache"]
    measured = (row[k] for k in ("before", "weights", "cache", "loading", "loaded"))
    cells = [row["compute"], row["kv_dtype"], *measured, loaded, row["generating"], full, row["freed"]]
    text = [c if isinstance(c, str) else f"{c:,.0f}" for c in cells]
    return "| " + " | ".join([*text, f"{row['generating'] / full - 1:+.1%}"]) + " |"


def main() -> None:
    """Print one line for each compute."""
    p = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    p.add_argument("checkpoint")
    p.add_argument("--compute", nargs="+", default=["bfloat16", "int8", "int4", "float32"])
    p.add_argument("--prompt", type=int, default=512)
    p.add_argument("--kv-dtype")
    p.add_argument("--measure", action="store_true", help=argparse.SUPPRESS)
    a = p.parse_args()
    if a.measure:
        print(json.dumps(measure(a.checkpoint, a.compute[0], a.prompt, a.kv_dtype)))
        return
    print("| compute | keys, values | before | weights | cache | peak loading | loaded | predicted | peak generating | predicted | freed "
          "| peak, beside |")  # fmt: skip
    print("|---" * 12 + "|")
    for compute in a.compute:
        more = ["--kv-dtype", a.kv_dtype] if a.kv_dtype else []
        command = [sys.executable, __file__, a.checkpoint, "--measure", "--prompt", str(a.prompt), "--compute", compute, *more]
        print(show(json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)), flush=True)


if __name__ == "__main__":
    main()
