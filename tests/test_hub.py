"""Names to directories. The hub itself is not there: a cache folder in its layout, and a stand-in, are."""

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


def test_offline_cache(tmp_path):
    """The layout that huggingface_hub keeps: refs, blobs, and snapshots of symbolic links."""
    repo, commit = tmp_path / "models--me--loop", "0" * 40
    snapshot = repo / "snapshots" / commit
    (repo / "blobs").mkdir(parents=True)
    (repo / "refs").mkdir()
    snapshot.mkdir(parents=True)
    (repo / "refs" / "main").write_text(commit)
    for i, file in enumerate(TINY.iterdir()):
        blob = repo / "blobs" / f"{i:040d}"
        blob.write_bytes(file.read_bytes())
        (snapshot / file.name).symlink_to(blob)
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
