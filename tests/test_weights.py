"""What comes down: it is whole or refused, and what should not be loaded is not.

Faults on the way are in tests/test_hub_errors.py.
"""

import hashlib
import json
import pickle
import struct
from pathlib import Path

import numpy as np
import pytest
import torch
from hub_server import Fault, User, check_cache, one_sentence
from huggingface_hub import constants
from huggingface_hub.errors import StrictDataclassError
from safetensors.torch import load_file, save_file
from tiny import noise_image, same_weights
from transformers import AutoModel, pipeline

from tve_hf import TVEExplainer, split_classifier


def downloads(hub):
    return [request for request in hub.requests if request.startswith("GET")]


# From the Hub, from its cache


def test_second_load_and_offline_load_are_from_the_cache(online, pair, monkeypatch):
    expected = pipeline("transferable-attribution", model=str(pair[1]), classifier=str(pair[0]))(noise_image(0))
    pipeline("transferable-attribution", model="org/tve", classifier="org/vit")
    online.requests.clear()
    pipeline("transferable-attribution", model="org/tve", classifier="org/vit")
    assert not [request for request in downloads(online) if "/api/" not in request]
    online.requests.clear()
    assert same_weights(
        TVEExplainer.from_pretrained("org/tve", local_files_only=True), TVEExplainer.from_pretrained(pair[1])
    )
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    explain = pipeline("transferable-attribution", model="org/tve", classifier="org/vit")
    assert np.array_equal(explain(noise_image(0))[0]["attribution"], expected[0]["attribution"])
    assert online.requests == []


def test_cache_serves_where_the_hub_is_gone(online, pair):
    assert TVEExplainer.from_pretrained("org/tve")
    split_classifier("org/vit")
    online.__exit__()
    assert same_weights(TVEExplainer.from_pretrained("org/tve"), TVEExplainer.from_pretrained(pair[1]))
    assert split_classifier("org/vit").name == "org/vit"
    assert online.waits.waited == []


@pytest.mark.parametrize("way", ["offline", "local_files_only"])
def test_what_is_not_in_the_cache_is_said_without_asking_the_hub(online, monkeypatch, way):
    arguments = {"local_files_only": True} if way == "local_files_only" else {}
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", way == "offline")
    with pytest.raises(OSError, match="org/tve is neither a folder here nor in the cache") as error:
        TVEExplainer.from_pretrained("org/tve", **arguments)
    one_sentence(error)
    assert online.requests == []


def test_private_repositories_need_a_token_that_the_cdn_never_sees(online, pair, monkeypatch):
    online.users["hf_owner"] = User("org")
    for repo in online.repos.values():
        repo.private = True
    with pytest.raises(OSError, match="org/tve .*private.*hf auth login") as error:
        TVEExplainer.from_pretrained("org/tve")
    one_sentence(error)
    with pytest.raises(OSError, match="org/vit .*private"):
        split_classifier("org/vit")
    loaded = TVEExplainer.from_pretrained("org/tve", token="hf_owner")
    assert same_weights(loaded, TVEExplainer.from_pretrained(pair[1]))
    monkeypatch.setenv("HF_TOKEN", "hf_owner")
    assert split_classifier("org/vit").name == "org/vit"
    seen = dict(zip(online.requests, online.headers, strict=True))
    cdn = [headers for request, headers in seen.items() if "/cdn/" in request]
    assert cdn and not any("authorization" in headers for headers in cdn)
    assert "authorization" in seen["HEAD /org/vit/resolve/main/config.json"]


# What is not loaded


@pytest.fixture
def folder(pair, tmp_path):
    """A copy of the explainer, to damage."""
    target = tmp_path / "copy"
    target.mkdir()
    for path in pair[1].iterdir():
        (target / path.name).write_bytes(path.read_bytes())
    return target


class Bomb:
    """Leaves a mark where it is unpickled."""

    def __init__(self, mark):
        self.mark = mark

    def __reduce__(self):
        return Path.touch, (self.mark,)


def configure(folder, **changes):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def shard(folder, rename=None):
    """Split the weights in two and name the second file otherwise in the index."""
    weights = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names = sorted(weights)
    parts = {"model-1.safetensors": names[:5], "model-2.safetensors": names[5:]}
    for file, held in parts.items():
        save_file({name: weights[name] for name in held}, folder / file, {"format": "pt"})
    weight_map = {name: rename or file if "2" in file else file for file, held in parts.items() for name in held}
    index = {"metadata": {"total_size": 1}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def only_pickle(folder):
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps(Bomb(folder.parent / "exploded")))


def pickle_in_index(folder):
    shard(folder, "pytorch_model.bin")
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps(Bomb(folder.parent / "exploded")))


def pickle_by_another_name(folder):
    (folder / "model.safetensors").write_bytes(pickle.dumps(Bomb(folder.parent / "exploded")))


def upwards(folder):
    (folder / "model.safetensors").rename(folder.parent / "other.safetensors")
    (folder / "model.safetensors").write_bytes((folder.parent / "other.safetensors").read_bytes())
    shard(folder, "../other.safetensors")


def absolute(folder):
    (folder.parent / "other.safetensors").write_bytes((folder / "model.safetensors").read_bytes())
    shard(folder, str(folder.parent / "other.safetensors"))


def huge_header(folder):
    """A header that promises a tensor of a terabyte, in a file of some bytes."""
    header = json.dumps({"trunk.norm.bias": {"dtype": "F32", "shape": [2**38], "data_offsets": [0, 2**40]}}).encode()
    (folder / "model.safetensors").write_bytes(struct.pack("<Q", len(header)) + header + bytes(64))


def odd_sizes(folder):
    weights = load_file(folder / "model.safetensors")
    weights["trunk.differences.weight"] = weights["trunk.differences.weight"][:-2].clone()
    save_file(weights, folder / "model.safetensors", {"format": "pt"})


def cut(path):
    path.write_bytes(path.read_bytes()[:-8])


def missing_shard(folder):
    shard(folder)
    (folder / "model-2.safetensors").unlink()


REFUSED = {
    "only a pickle": (only_pickle, "has no model.safetensors; .*pickles"),
    "a pickle in the index": (pickle_in_index, "names 'pytorch_model.bin', which is no safetensors"),
    "a pickle by another name": (pickle_by_another_name, "model.safetensors cannot be loaded .*fetch it again"),
    "upwards": (upwards, r"names '../other.safetensors', which is no safetensors file beside it"),
    "absolute": (absolute, "other.safetensors', which is no safetensors file beside it"),
    "index of nothing": (lambda f: (shard(f), (f / "model.safetensors.index.json").write_text("[]")), "is damaged"),
    "a missing shard": (missing_shard, "lacks model-2.safetensors"),
    "a huge header": (huge_header, "model.safetensors cannot be loaded .*fetch it again"),
    "truncated": (lambda f: cut(f / "model.safetensors"), "model.safetensors cannot be loaded .*fetch it again"),
    "a truncated shard": (
        lambda f: (shard(f), cut(f / "model-2.safetensors")),
        "model-2.safetensors cannot be loaded",
    ),
    "no json": (lambda f: (f / "config.json").write_text("{"), "config.json of .* is damaged"),
    "another kind": (lambda f: configure(f, model_type="vit"), "is no explainer, but a 'vit'"),
    "other files": (lambda f: configure(f, transformers_weights="x.safetensors"), "sets transformers_weights"),
    "quantization": (lambda f: configure(f, quantization_config={"quant_method": "gptq"}), "quantization_config"),
    "an adapter": (lambda f: (f / "adapter_config.json").write_text("{}"), "holds an adapter"),
}
# Seen while transformers loads it, before it takes memory for what the files lack.
CONTRADICTIONS = {
    "weights of another size": (
        odd_sizes,
        "contradicts itself: for trunk.differences.weight config.json describes 48 x 32, but the weights hold 46 x 32",
    ),
    "another embedding": (lambda f: configure(f, embedding_dim=96), "contradicts itself: for .* and .* others"),
    "more layers": (lambda f: configure(f, num_hidden_layers=3), "contradicts itself: .*weights hold nothing"),
    "fewer layers": (lambda f: configure(f, num_hidden_layers=0), "contradicts itself: .*describes nothing"),
    "hundreds of gigabytes": (lambda f: configure(f, hidden_size=2**19), "contradicts itself"),
    "more than can be addressed": (
        lambda f: configure(f, hidden_size=2**40),
        "hidden_size is 1099511627776.* at most",
    ),
    "a million layers": (lambda f: configure(f, num_hidden_layers=10**6), "num_hidden_layers is 1000000.* at most"),
    "a grid that does not fit": (lambda f: configure(f, grid_size=5), "grid_size=5"),
}


@pytest.mark.parametrize("where", ["folder", "hub"])
@pytest.mark.parametrize("kind", REFUSED)
def test_refused_before_anything_is_built(hub, folder, monkeypatch, kind, where):
    change, message = REFUSED[kind]
    change(folder)
    name = folder
    if where == "hub":
        name = "org/tve"
        hub.add(name, {path.name: path.read_bytes() for path in folder.iterdir()})

    def built(*_, **__):
        raise AssertionError("transformers was asked to build it")

    monkeypatch.setattr("transformers.PreTrainedModel.from_pretrained", classmethod(built))
    with pytest.raises((OSError, ValueError), match=message) as error:
        TVEExplainer.from_pretrained(name)
    one_sentence(error)
    assert not (folder.parent / "exploded").exists()
    assert not [request for request in hub.requests if ".bin" in request]
    check_cache(hub)


@pytest.mark.parametrize("kind", CONTRADICTIONS)
def test_contradiction_of_config_and_weights_is_refused(folder, monkeypatch, kind):
    change, message = CONTRADICTIONS[kind]
    change(folder)

    def initialized(*_):
        raise AssertionError("memory was taken for weights that the files lack")

    monkeypatch.setattr("transformers.PreTrainedModel.initialize_weights", initialized)
    with pytest.raises((ValueError, StrictDataclassError), match=message) as error:
        TVEExplainer.from_pretrained(folder)
    if not isinstance(error.value, StrictDataclassError):
        one_sentence(error)


def test_special_file_is_no_weights(folder):
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors").symlink_to("/dev/zero")
    with pytest.raises(OSError, match="has no model.safetensors"):
        TVEExplainer.from_pretrained(folder)


def test_links_of_the_user_and_of_the_cache_are_followed(online, folder, pair):
    (folder / "model.safetensors").rename(folder.parent / "elsewhere")
    (folder / "model.safetensors").symlink_to(folder.parent / "elsewhere")
    assert same_weights(TVEExplainer.from_pretrained(folder), TVEExplainer.from_pretrained(pair[1]))
    TVEExplainer.from_pretrained("org/tve")
    (snapshot,) = online.cache.glob("models--org--tve/snapshots/*")
    assert (snapshot / "model.safetensors").is_symlink()
    assert same_weights(TVEExplainer.from_pretrained(snapshot), TVEExplainer.from_pretrained(pair[1]))


def test_damaged_files_are_refused_and_come_anew_by_force(online, pair):
    online.faults = [Fault("GET .*config.json", body="wrong")]
    with pytest.raises(ValueError, match="^config.json of org/tve is damaged .*force_download=True") as error:
        TVEExplainer.from_pretrained("org/tve")
    one_sentence(error)
    expected = TVEExplainer.from_pretrained(pair[1])
    assert same_weights(TVEExplainer.from_pretrained("org/tve", force_download=True), expected)
    (weights,) = online.cache.rglob("model.safetensors")
    weights.resolve().write_bytes(weights.read_bytes()[:-8])
    with pytest.raises(ValueError, match="model.safetensors cannot be loaded .*force_download=True") as error:
        TVEExplainer.from_pretrained("org/tve")
    one_sentence(error)
    assert same_weights(TVEExplainer.from_pretrained("org/tve", force_download=True), expected)


def test_pickle_beside_safetensors_is_left_alone(hub, folder, pair):
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps(Bomb(folder.parent / "exploded")))
    hub.add("org/tve", {path.name: path.read_bytes() for path in folder.iterdir()})
    for name in (folder, "org/tve"):
        assert same_weights(TVEExplainer.from_pretrained(name), TVEExplainer.from_pretrained(pair[1]))
    assert not (folder.parent / "exploded").exists() and not [r for r in hub.requests if ".bin" in r]


@pytest.mark.parametrize("arguments", [{"use_safetensors": False}, {"gguf_file": "model.gguf"}])
def test_other_formats_cannot_be_asked_for(pair, arguments):
    with pytest.raises(ValueError, match="safetensors only"):
        TVEExplainer.from_pretrained(pair[1], **arguments)


def test_classifier_with_only_a_pickle_is_refused(hub, pair, tmp_path):
    files = {path.name: path.read_bytes() for path in pair[0].iterdir()}
    files["pytorch_model.bin"] = pickle.dumps(Bomb(tmp_path / "exploded")) + files.pop("model.safetensors")
    hub.add("org/vit", files)
    with pytest.raises(OSError, match="org/vit has no model.safetensors") as error:
        split_classifier("org/vit")
    one_sentence(error)
    assert not (tmp_path / "exploded").exists() and not [r for r in hub.requests if ".bin" in r]


def test_code_of_a_repository_does_not_run_unasked(hub, folder, pair, tmp_path):
    code = f"from pathlib import Path\nPath({str(tmp_path / 'ran')!r}).touch()\n"
    (folder / "modeling_tve.py").write_text(code)
    references = {"AutoConfig": "modeling_tve.TVEConfig", "AutoModel": "modeling_tve.TVEExplainer"}
    configure(folder, auto_map=references)
    hub.add("org/tve", {path.name: path.read_bytes() for path in folder.iterdir()})
    for name in (str(folder), "org/tve"):
        for load in (TVEExplainer.from_pretrained, AutoModel.from_pretrained):
            assert same_weights(load(name), TVEExplainer.from_pretrained(pair[1]))
        pipeline("transferable-attribution", model=name, classifier=str(pair[0]))
    assert not (tmp_path / "ran").exists()


def test_what_does_not_fit_starts_afresh_if_asked(folder):
    configure(folder, num_hidden_layers=2)
    loaded = TVEExplainer.from_pretrained(folder, ignore_mismatched_sizes=True)
    assert len(loaded.trunk.layers) == 2


def test_arguments_reach_config_and_loading(pair):
    loaded, report = TVEExplainer.from_pretrained(
        pair[1], dtype=torch.float16, backbone_name="renamed", output_loading_info=True
    )
    assert loaded.dtype == torch.float16 and loaded.config.backbone_name == "renamed"
    assert not report["missing_keys"] and loaded.name_or_path == str(pair[1])


def test_subfolder_and_variant(hub, folder, pair):
    content = {f"deep/{path.name}": path.read_bytes() for path in folder.iterdir()}
    hub.add("org/deep", content)
    (folder / "model.safetensors").rename(folder / "model.fp16.safetensors")
    hub.add("org/variant", {path.name: path.read_bytes() for path in folder.iterdir()})
    expected = TVEExplainer.from_pretrained(pair[1])
    assert same_weights(TVEExplainer.from_pretrained("org/deep", subfolder="deep"), expected)
    assert same_weights(TVEExplainer.from_pretrained("org/variant", variant="fp16"), expected)
    assert same_weights(TVEExplainer.from_pretrained(folder, variant="fp16"), expected)


def test_no_hash_is_made_of_the_weights(online, monkeypatch):
    def digest(*_):
        raise AssertionError("all weights were read to hash them")

    monkeypatch.setattr(hashlib, "file_digest", digest)
    for _ in range(2):
        assert TVEExplainer.from_pretrained("org/tve").config.model_type == "tve"


def test_forced_download_comes_once(online):
    for _ in range(2):
        TVEExplainer.from_pretrained("org/tve", force_download=True)
    assert len([request for request in online.requests if request.startswith("GET /cdn")]) == 2
