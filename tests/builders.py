"""Makes safetensors files and checkpoint directories, good and bad."""

import json
import shutil
import struct
from pathlib import Path

from paths import FIXTURES


def read_parts(path: Path):
    """(header dict, data bytes) of a safetensors file."""
    blob = path.read_bytes()
    (n,) = struct.unpack("<Q", blob[:8])
    return json.loads(blob[8 : 8 + n]), blob[8 + n :]


def write_parts(path: Path, header, data: bytes, *, length: int | None = None) -> None:
    """Writes a header (dict or raw bytes) and data; `length` lies about the header's size."""
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(raw) if length is None else length) + raw + data)


def copy_fixture(name: str, to: Path) -> Path:
    target = to / name
    shutil.copytree(FIXTURES / name, target)
    return target


def edit_config(directory: Path, **changes) -> None:
    """Changes keys of config.json; a value of ... removes the key."""
    path = directory / "config.json"
    config = json.loads(path.read_text())
    for key, value in changes.items():
        if value is ...:
            config.pop(key, None)
        else:
            config[key] = value
    path.write_text(json.dumps(config))
