"""From a name to a directory: packaged models, directories, and ids on the Hugging Face hub."""

from __future__ import annotations

import re
from pathlib import Path

from ouro.errors import CheckpointError
from ouro.extras import did_you_mean
from ouro.files import is_directory

PACKAGED = Path(__file__).parent / "models"

# Only data: never Python files, pickles or other formats of the weights.
FILES = (
    "config.json", "generation_config.json", "model.safetensors", "model.safetensors.index.json", "model-*.safetensors", "model.ouro",
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja",
)  # fmt: skip


def packaged_models() -> list[str]:
    """Names of the models that ship with the package."""
    return sorted(p.name for p in PACKAGED.iterdir() if (p / "config.json").exists())


def resolve(
    path_or_id: str | Path,
    *,
    revision: str | None = None,
    cache_dir: str | Path | None = None,
    local_files_only: bool = False,
    token: str | bool | None = None,
) -> Path:
    """The directory of a checkpoint.

    Parameters
    ----------
    path_or_id
        A packaged name such as `"ouro-tiny"`, a directory, or a hub id such as `"ByteDance/Ouro-1.4B"`.
    revision, cache_dir, local_files_only, token
        As in `huggingface_hub.snapshot_download`; `HF_HUB_OFFLINE` is honoured too. They mean
        nothing to a packaged name or a directory.

    Raises
    ------
    CheckpointError
        When there is no such directory, or the hub does not give it.
    """
    name = str(path_or_id)
    if name in packaged_models():
        return PACKAGED / name
    if name and is_directory(Path(path_or_id)):
        return Path(path_or_id)
    if isinstance(path_or_id, Path) or not re.fullmatch(r"[\w.-]+/[\w.-]+", name) or name.startswith((".", "/")):
        known = ", ".join(packaged_models())
        near = did_you_mean(name[:200], packaged_models())
        raise CheckpointError(f"no such model '{name[:200]}'{near}", expected=f"a directory, a hub id 'owner/name', or one of: {known}")
    return _from_hub(name, revision, cache_dir, local_files_only, token)


def _from_hub(name: str, revision: str | None, cache_dir: str | Path | None, local: bool, token: str | bool | None) -> Path:
    from huggingface_hub import snapshot_download

    try:
        path = snapshot_download(name, revision=revision, cache_dir=cache_dir, local_files_only=local, token=token,
                                 allow_patterns=list(FILES))  # fmt: skip
    except Exception as error:  # the hub library has many kinds, none of which says what to do
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise CheckpointError(
            f"cannot get '{name}' from the hub: {reason[:300]}",
            expected="network access, or the files in the local cache (then local_files_only=True or HF_HUB_OFFLINE=1)",
        ) from error
    return Path(path)
