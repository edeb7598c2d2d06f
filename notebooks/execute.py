"""Run the notebooks again and keep them small: `python notebooks/execute.py [NAME ...]` (needs nbclient and pillow).

Each is written back with its new outputs, without times and progress bars, pictures reduced to a palette.
"""

from __future__ import annotations

import base64
import io
import os
import sys
from pathlib import Path
from typing import Any

import nbformat
from nbclient import NotebookClient
from PIL import Image

FOLDER = Path(__file__).parent
COLOURS = 255


def smaller(png: str) -> str:
    """A picture (base64) with a palette instead of four channels a pixel: a third of the size, to the eye the same."""
    picture = Image.open(io.BytesIO(base64.b64decode(png))).convert("RGB")
    out = io.BytesIO()
    picture.quantize(COLOURS, method=Image.Quantize.MAXCOVERAGE, dither=Image.Dither.NONE).save(out, "PNG", optimize=True)
    return base64.b64encode(out.getvalue()).decode()


def execute(path: Path) -> None:
    """Run one notebook from its folder and write it back."""
    book: Any = nbformat.read(path, as_version=4)
    NotebookClient(book, timeout=120, record_timing=False, resources={"metadata": {"path": str(FOLDER)}}).execute()
    book.metadata.pop("widgets", None)
    for cell in book.cells:
        cell.metadata.pop("execution", None)
        for output in cell.get("outputs", []):
            data = output.get("data", {})
            if "image/png" in data:
                data["image/png"] = smaller(data["image/png"])
    nbformat.write(book, path)
    print(f"{path.name}: {path.stat().st_size:,} bytes")


def main(names: list[str]) -> None:
    """Run the named notebooks, or all."""
    os.environ["TQDM_DISABLE"] = "1"
    for path in [FOLDER / name for name in names] or sorted(FOLDER.glob("*.ipynb")):
        execute(path)


if __name__ == "__main__":
    main(sys.argv[1:])
