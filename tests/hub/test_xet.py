"""Xet, by which the Hub's client moves large files unless told otherwise: what comes by it is checked all the same.

Everything is the real client's but the storage, in whose place two functions stand. The other tests of the Hub tell
the client not to use Xet.
"""

import errno
import hashlib

import pytest
from hub_server import User, xet_hash
from huggingface_hub import _commit_api, constants, file_download
from shipped import VIT_EXPLAINER
from tiny import same_weights

from tve_hf import TVEExplainer
from tve_hf.hub.push import prepare

pytest.importorskip("hf_xet")


@pytest.fixture
def by_xet(online, monkeypatch):
    """The Hub with Xet, and no storage behind it."""
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", False)
    online.xet = True
    online.users["hf_owner"] = User("org")
    monkeypatch.setenv("HF_TOKEN", "hf_owner")
    return online


@pytest.fixture
def storage(by_xet, monkeypatch):
    """The names of what went through the storage, which works."""
    moved = []

    def download(*, incomplete_path, xet_file_data, **_):
        found = {xet_hash(content): content for content in by_xet.lfs.values()}
        incomplete_path.write_bytes(found[xet_file_data.file_hash])
        moved.append(xet_file_data.file_hash)

    def upload(*, additions, **_):
        for addition in additions:
            with addition.as_file() as file:
                content = file.read()
            addition.upload_info.sha256 = hashlib.sha256(content).digest()
            by_xet.lfs[addition.upload_info.sha256.hex()] = content
            moved.append(addition.path_in_repo)

    monkeypatch.setattr(file_download, "xet_get", download)
    monkeypatch.setattr(_commit_api, "_upload_xet_files", upload)
    return moved


def shared_blobs(cache):
    """The files that the cache keeps once for all repositories."""
    return [path for path in cache.glob("blobs/*/*") if len(path.name) == 64]


def test_the_client_takes_it_by_default(by_xet, pair):
    """The real hf_xet, whose storage is missing: one sentence, no half of a file, and the next try works."""
    with pytest.raises(ConnectionError, match="for org/tve failed .*404.*; try again") as error:
        TVEExplainer.from_pretrained("org/tve")
    assert "\n" not in str(error.value)
    assert [request for request in by_xet.requests if "/xet/" in request]
    assert not [path for path in by_xet.cache.rglob("*") if "incomplete" in path.name]
    by_xet.xet = False
    assert same_weights(TVEExplainer.from_pretrained("org/tve"), TVEExplainer.from_pretrained(pair[1]))


def test_weights_come_and_go_by_it_bit_for_bit(by_xet, storage, reports):
    prepare(VIT_EXPLAINER, "org/new", reports).send()
    weights = (VIT_EXPLAINER / "model.safetensors").read_bytes()
    assert by_xet.files("org/new")["model.safetensors"] == weights
    assert same_weights(TVEExplainer.from_pretrained("org/new"), TVEExplainer.from_pretrained(VIT_EXPLAINER))
    assert storage == ["model.safetensors", xet_hash(weights)]
    (blob,) = shared_blobs(by_xet.cache)
    assert blob.read_bytes() == weights


def test_what_repositories_share_comes_once_and_is_read_by_folder_too(by_xet, storage, pair, tmp_path):
    by_xet.add("org/twin", by_xet.files("org/tve"))
    expected = TVEExplainer.from_pretrained(pair[1])
    for name in ("org/tve", "org/twin"):
        assert same_weights(TVEExplainer.from_pretrained(name, cache_dir=tmp_path / "mine"), expected)
    assert len(storage) == 1
    (snapshot,) = (tmp_path / "mine").glob("models--org--twin/snapshots/*")
    assert same_weights(TVEExplainer.from_pretrained(snapshot), expected)


def test_full_disk_is_said_and_the_next_try_works(by_xet, storage, pair, monkeypatch):
    def full(*, incomplete_path, **_):
        incomplete_path.write_bytes(b"half")
        raise RuntimeError("Task error: File reconstruction error: IO Error: No space left on device (os error 28)")

    with monkeypatch.context() as patch:
        patch.setattr(file_download, "xet_get", full)
        with pytest.raises(OSError, match="No space is left for org/tve; free some, or set HF_HOME") as error:
            TVEExplainer.from_pretrained("org/tve")
    assert error.value.errno == errno.ENOSPC
    assert not [path for path in by_xet.cache.rglob("*") if "incomplete" in path.name]
    assert same_weights(TVEExplainer.from_pretrained("org/tve"), TVEExplainer.from_pretrained(pair[1]))


def test_what_is_cut_short_there_is_refused_and_comes_anew_by_force(by_xet, storage, pair):
    TVEExplainer.from_pretrained("org/tve")
    (blob,) = shared_blobs(by_xet.cache)
    content = blob.read_bytes()
    blob.chmod(0o644)
    blob.write_bytes(content[:-8])
    with pytest.raises(ValueError, match="model.safetensors cannot be loaded .*force_download=True"):
        TVEExplainer.from_pretrained("org/tve")
    again = TVEExplainer.from_pretrained("org/tve", force_download=True)
    assert same_weights(again, TVEExplainer.from_pretrained(pair[1]))
    assert len(storage) == 2
