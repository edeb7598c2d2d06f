"""Names to directories. The hub itself is not there: a cache folder in its layout, and a stand-in, are."""

import os
import subprocess
import sys

import pytest
from paths import TINY

import ouro
from ouro.hub import FILES, packaged_models, resolve


def test_packaged_and_directories(tmp_path):
    assert packaged_models() == ["ouro-tiny"]
    assert resolve("ouro-tiny") == TINY and resolve(str(tmp_path)) == tmp_path


@pytest.mark.parametrize("name", ["nothing", "a/b/c", "/no/such", "./x/y", "", "x" * 300, "x" * 100_000, "a\0b"])
def test_unknown_names(name):
    with pytest.raises(ouro.CheckpointError, match="ouro-tiny") as caught:
        resolve(name)
    assert len(str(caught.value)) < 1000


def cached(tmp_path, commit="0" * 40, branch="main"):
    """`me/loop` in the layout that huggingface_hub keeps: refs, blobs, and snapshots of symbolic links."""
    repo = tmp_path / "models--me--loop"
    snapshot = repo / "snapshots" / commit
    (repo / "blobs").mkdir(parents=True)
    (repo / "refs").mkdir()
    snapshot.mkdir(parents=True)
    (repo / "refs" / branch).write_text(commit)
    for i, file in enumerate(TINY.iterdir()):
        blob = repo / "blobs" / f"{i:040d}"
        blob.write_bytes(file.read_bytes())
        (snapshot / file.name).symlink_to(blob)
    return snapshot


def test_offline_cache(tmp_path):
    cached(tmp_path)
    model = ouro.load("me/loop", cache_dir=tmp_path, local_files_only=True)
    assert model.generate("One day", max_new_tokens=2).token_ids
    with pytest.raises(ouro.CheckpointError, match="hub"):
        ouro.load("me/other", cache_dir=tmp_path, local_files_only=True)


def test_only_data_is_asked_for(monkeypatch):
    seen = {}

    def snapshot_download(name, **arguments):
        seen.update(arguments, name=name)
        return str(TINY)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    assert resolve("ByteDance/Ouro-1.4B", revision="abc", token="t") == TINY
    assert seen["name"] == "ByteDance/Ouro-1.4B" and seen["revision"] == "abc" and seen["allow_patterns"] == list(FILES)
    assert not any(p.endswith((".py", ".bin", ".pt", "*")) for p in FILES)


def test_revision_in_the_cache(tmp_path):
    snapshot = cached(tmp_path, "1" * 40, "v2")
    for revision in ("v2", "1" * 40):
        assert resolve("me/loop", cache_dir=tmp_path, local_files_only=True, revision=revision) == snapshot
    with pytest.raises(ouro.CheckpointError, match="hub"):
        resolve("me/loop", cache_dir=tmp_path, local_files_only=True)


def test_offline_by_the_environment(tmp_path):
    """HF_HUB_OFFLINE is read when the library is imported: in a process of its own, where any connection is an error."""
    cached(tmp_path)
    code = (
        "import socket, ouro\n"
        "def refuse(*a): raise SystemExit('asked the network')\n"
        "socket.getaddrinfo = socket.create_connection = socket.socket.connect = refuse\n"
        f"print(ouro.load('me/loop', cache_dir={str(tmp_path)!r}).config.n_layers)\n"
        f"try: ouro.load('me/other', cache_dir={str(tmp_path)!r})\n"
        "except ouro.CheckpointError as error: print('HF_HUB_OFFLINE' in str(error))"
    )
    offline = {**os.environ, "HF_HUB_OFFLINE": "1"}
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path, env=offline)
    assert run.stdout.split() == ["4", "True"], run.stdout + run.stderr


def test_what_the_library_would_fetch():
    """Its own filter, over what released repositories hold and what others have added to theirs."""
    from huggingface_hub.utils import filter_repo_objects

    wanted = ["config.json", "generation_config.json", "model-00001-of-00002.safetensors", "model.safetensors",
              "model.safetensors.index.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja"]  # fmt: skip
    other = ["modeling_ouro.py", "configuration_ouro.py", "model-x.py", "pytorch_model.bin", "model.safetensors.py", "README.md",
             "optimizer.pt", "model.gguf", "assets/figure.png", "model-1.safetensors.exe"]  # fmt: skip
    assert sorted(filter_repo_objects([*wanted, *other], allow_patterns=list(FILES))) == sorted(wanted)
