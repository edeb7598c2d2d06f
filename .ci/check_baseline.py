"""Objects compiled without instruction-set flags hold no AVX: `python check_baseline.py DIR`. Needs objdump; x86-64 only.

The peak loops of csrc/bench name their instruction set function by function, and are left out.
"""

import platform
import re
import shutil
import subprocess
import sys
from pathlib import Path

WIDE = re.compile(r"%[yz]mm\d|\sv[a-z0-9]+\s.*%xmm")


def main(folder: Path) -> int:
    if platform.machine() != "x86_64" or shutil.which("objdump") is None:
        print("skipped: needs x86-64 and objdump")
        return 0
    plain = [p for p in folder.rglob("*.o") if not p.name.startswith("avx") and p.parent.name not in ("tests", "bench")]
    bad = [p for p in plain if WIDE.search(subprocess.run(["objdump", "-d", p], capture_output=True, text=True, check=True).stdout)]
    for p in bad:
        print(f"{p} has AVX instructions")
    print(f"{len(plain)} objects looked at, {len(bad)} with AVX")
    return 1 if bad or not plain else 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
