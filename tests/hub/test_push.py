"""Up to the Hub and down again, against a server that speaks its protocol to the real client.

How downloads fail is in tests/test_hub_errors.py.
"""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hub_server import Fault, User
from huggingface_hub import HfApi, ModelCard
from shipped import VIT, VIT_EXPLAINER
from stranger import explain_elsewhere
from tiny import noise_image, same_weights
from transformers import AutoImageProcessor, AutoModelForImageClassification, pipeline

from tve_hf import TVEExplainer
from tve_hf.cli import main
from tve_hf.hub import push as pushing
from tve_hf.hub.model_card import render_card
from tve_hf.hub.push import prepare, publish
from tve_hf.hub.remote_code import code_files
from tve_hf.released import CHECKPOINTS

ROOT = Path(__file__).parents[2]


@pytest.fixture
def owner(hub, monkeypatch):
    """Log in as someone who may write to org."""
    hub.users["hf_owner"] = User("someone", orgs={"org": "write"})
    monkeypatch.setenv("HF_TOKEN", "hf_owner")
    return hub


# Round trips


def test_shipped_checkpoints_come_back_bit_for_bit_with_their_cards(owner, reports, tmp_path):
    names = {}
    code = {name: text.encode() for name, text in code_files().items()}
    for folder in CHECKPOINTS.iterdir():
        results = reports if folder == VIT_EXPLAINER else []
        card = tmp_path / "card.md"
        render_card(folder, results).save(card)
        is_explainer = json.loads((folder / "config.json").read_text())["model_type"] == "tve"
        push = prepare(folder, f"org/{folder.name}", results[::-1], card, measured=bool(results) or not is_explainer)
        push.send()
        names[folder] = push.repo_id
        expected = {path.name: path.read_bytes() for path in folder.iterdir()}
        found = owner.files(push.repo_id)
        index = expected.get("model.safetensors.index.json", b"")
        for shared in set(re.findall(rb"\.\./[\w/.-]+", index)):  # with a backbone that lies in another folder
            path = (folder / shared.decode()).resolve()
            expected[path.name] = path.read_bytes()
            expected["model.safetensors.index.json"] = index.replace(shared, path.name.encode())
        assert found.pop("README.md").decode() == str(render_card(folder, results, push.repo_id))
        assert f'model="org/{folder.name}"' in str(render_card(folder, results, push.repo_id))
        if is_explainer:
            config = json.loads(found.pop("config.json"))
            added = {key: config.pop(key) for key in ("auto_map", "custom_pipelines")}
            assert config == json.loads(expected.pop("config.json"))
            assert added["custom_pipelines"]["transferable-attribution"]["impl"].startswith("pipeline_tve.")
        assert found == expected | (code if is_explainer else {})
        assert len(owner.repos[push.repo_id].commits) == 2  # the one of its creation, and ours
    images = [noise_image(seed) for seed in range(2)]
    there = pipeline("transferable-attribution", model=names[VIT_EXPLAINER], classifier=names[VIT], device="cpu")
    here = pipeline("transferable-attribution", model=str(VIT_EXPLAINER), classifier=str(VIT), device="cpu")
    assert same_weights(there.model, here.model)
    assert same_weights(there.classifier.backbone.model, here.classifier.backbone.model)
    for (one,), (other,) in zip(there(images), here(images), strict=True):
        assert one["label"] == other["label"] and one["score"] == other["score"]
        assert np.array_equal(one["attribution"], other["attribution"])
        assert np.array_equal(one["overlay"], other["overlay"])


def test_pushed_explainer_works_where_the_package_is_not(owner, site, reports, tmp_path):
    prepare(VIT_EXPLAINER, "org/tve", reports).send()
    assert not list(VIT_EXPLAINER.glob("*.py"))
    noise_image(0).save(tmp_path / "noise.png")
    online = {"HF_ENDPOINT": owner.endpoint, "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1", "NO_PROXY": "127.0.0.1"}
    found = explain_elsewhere(site, "org/tve", VIT, tmp_path / "noise.png", tmp_path, **online)
    assert found.returncode == 0, found.stderr[-2000:]
    result = json.loads(found.stdout.splitlines()[-1])
    assert result["module"].startswith("transformers_modules.")
    fetched = {Path(request).name for request in owner.requests if request.startswith("GET /org/tve/resolve")}
    assert code_files().keys() <= fetched
    owner.requests.clear()
    explain = pipeline("transferable-attribution", model="org/tve", classifier=str(VIT), trust_remote_code=True)
    (ours,) = explain(tmp_path / "noise.png")
    assert np.allclose(result["attribution"], ours["attribution"], atol=1e-5)
    assert type(explain.model) is TVEExplainer
    assert owner.requests and not [request for request in owner.requests if request.endswith(".py")]


def test_models_push_themselves(owner, pair):
    explainer = TVEExplainer.from_pretrained(pair[1])
    explainer.push_to_hub("org/tve-own")
    assert set(owner.files("org/tve-own")) == {"README.md", "config.json", "model.safetensors"}
    assert same_weights(TVEExplainer.from_pretrained("org/tve-own"), explainer)
    explain = pipeline("transferable-attribution", model=explainer, classifier=str(pair[0]))
    explain.push_to_hub("org/tve-pipeline")
    files = owner.files("org/tve-pipeline")
    assert set(files) == {"README.md", "config.json", "model.safetensors", "preprocessor_config.json"}
    AutoModelForImageClassification.from_pretrained(pair[0]).push_to_hub("org/vit-own")
    AutoImageProcessor.from_pretrained(pair[0]).push_to_hub("org/vit-own")
    again = pipeline("transferable-attribution", model="org/tve-pipeline", classifier="org/vit-own")
    assert np.array_equal(again(noise_image(0))[0]["attribution"], explain(noise_image(0))[0]["attribution"])


def test_own_push_keeps_a_card_that_is_there(owner, pair):
    owner.add("org/tve", {"README.md": b"---\nlicense: mit\n---\n\n# measured\n"})
    TVEExplainer.from_pretrained(pair[1]).push_to_hub("org/tve")
    assert "# measured" in owner.files("org/tve")["README.md"].decode()


def test_revisions_by_branch_tag_and_commit(owner, pair):
    versions = {}
    explainer = TVEExplainer.from_pretrained(pair[1])
    for branch in ("main", "second"):
        with torch.no_grad():
            explainer.trunk.differences.bias.add_(1)
        info = explainer.push_to_hub("org/tve", revision=branch)
        versions[branch] = versions[info.oid] = explainer.trunk.differences.bias.clone()
    HfApi().create_tag("org/tve", tag="v2", revision="second")
    versions["v2"] = versions["second"]
    assert len(versions) == 5 and not torch.equal(versions["main"], versions["v2"])
    for revision, bias in versions.items():
        loaded = TVEExplainer.from_pretrained("org/tve", revision=revision)
        assert torch.equal(loaded.trunk.differences.bias, bias), revision
        explain = pipeline("transferable-attribution", model="org/tve", revision=revision, classifier=str(pair[0]))
        assert torch.equal(explain.model.trunk.differences.bias, bias), revision


def test_shards_come_back_and_a_later_push_leaves_no_old_weights(owner, pair, shipped, reports):
    explainer = TVEExplainer.from_pretrained(pair[1])
    explainer.push_to_hub("org/tve", max_shard_size="20KB")
    shards = [name for name in owner.files("org/tve") if name.endswith(".safetensors")]
    assert len(shards) > 2
    assert same_weights(TVEExplainer.from_pretrained("org/tve"), explainer)
    online = prepare(shipped, "org/tve", reports)
    assert set(online.removed) == {*shards, "model.safetensors.index.json"}
    online.send()
    assert [name for name in owner.files("org/tve") if "safetensors" in name] == ["model.safetensors"]
    assert same_weights(TVEExplainer.from_pretrained("org/tve"), TVEExplainer.from_pretrained(VIT_EXPLAINER))


def test_sharded_folder_is_pushed_whole(owner, shipped, reports):
    explainer = TVEExplainer.from_pretrained(shipped)
    (shipped / "model.safetensors").unlink()
    explainer.save_pretrained(shipped, max_shard_size="2MB")
    owner.add("org/tve", {"model.safetensors": b"old", "notes.txt": b"mine"})
    prepare(shipped, "org/tve", reports).send()
    assert "model.safetensors" not in owner.files("org/tve") and "notes.txt" in owner.files("org/tve")
    assert same_weights(TVEExplainer.from_pretrained("org/tve"), explainer)


def test_in_a_process_of_its_own(owner, tmp_path, reports):
    """Only the client's own settings lead there: push, then explain by name."""
    environment = {
        "HF_ENDPOINT": owner.endpoint,
        "HF_HOME": str(tmp_path / "home"),
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_OFFLINE": "0",
        "HF_TOKEN": "hf_owner",
    }
    noise_image(0).save(tmp_path / "photo.png")
    push = ["push", VIT_EXPLAINER, "org/tve", "--yes", "--results", *reports]
    explain = ["explain", tmp_path / "photo.png", "--model", "org/tve", "--output", tmp_path, "--json"]
    explain += ["--classifier", VIT]
    code = f"from tve_hf.cli import main; exit(main({[*map(str, push)]}) or main({[*map(str, explain)]}))"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, env=os.environ | environment
    )
    assert done.returncode == 0, done.stderr
    *said, record = done.stdout.splitlines()
    assert said[-1].startswith(f"{owner.endpoint}/org/tve/commit/")
    (expected,) = pipeline("transferable-attribution", model=str(VIT_EXPLAINER), classifier=str(VIT))(noise_image(0))
    assert np.allclose(json.loads(record)["explanations"][0]["attribution"], expected["attribution"], atol=1e-5)


# Pushing


@pytest.fixture
def shipped(tmp_path):
    """A copy of the shipped explainer, to damage."""
    return shutil.copytree(VIT_EXPLAINER, tmp_path / VIT_EXPLAINER.name)


@pytest.fixture
def push(capsys):
    def run(*arguments):
        code = main(["push", *map(str, arguments)])
        out, err = capsys.readouterr()
        lines = [line for line in err.splitlines() if line.startswith("tve-hf: ")]
        assert len(lines) == code
        return lines[0] if lines else out

    return run


def written(hub):
    return [request for request in hub.requests if not request.startswith(("GET", "HEAD"))]


def test_push_only_says_what_it_would_do_until_told_yes(owner, shipped, push, reports):
    (shipped / "notes.txt").write_text("mine")
    (shipped / "checkpoint-500").mkdir()
    said = push(shipped, "org/tve", "--results", *reports, "--private")
    size = (shipped / "model.safetensors").stat().st_size
    assert f"send    model.safetensors, {size:,} bytes" in said and "leave   notes.txt" in said
    assert "new private repository org/tve, branch main" in said and "--yes" in said
    assert written(owner) == [] and owner.repos == {}
    assert "/org/tve/commit/" in push(shipped, "org/tve", "--results", *reports[::-1], "--private", "--yes")
    assert owner.repos["org/tve"].private
    expected = {"README.md", "config.json", "model.safetensors", "preprocessor_config.json", "training.json"}
    assert {name for name in owner.files("org/tve") if not name.endswith(".py")} == expected
    assert owner.files("org/tve")["README.md"].decode() == str(render_card(shipped, reports[::-1], "org/tve"))


def test_own_picture_goes_with_the_card(owner, shipped, push, reports):
    noise_image(0).save(shipped / "example.png")
    push(shipped, "org/tve", "--results", *reports, "--yes")
    files = owner.files("org/tve")
    assert files["example.png"] == (shipped / "example.png").read_bytes()
    assert "](example.png)" in files["README.md"].decode()


def test_card_of_the_training_makes_way_for_the_results(owner, shipped, push, reports):
    render_card(shipped, []).save(shipped / "README.md")
    push(shipped, "org/tve", "--results", *reports, "--yes")
    assert owner.files("org/tve")["README.md"].decode() == str(render_card(shipped, reports, "org/tve"))


def test_card_from_the_hub_can_be_pushed_again(owner, shipped, push, reports):
    push(shipped, "org/tve", "--results", *reports[::-1], "--yes")
    first = owner.files("org/tve")["README.md"]
    (shipped / "README.md").write_bytes(first)
    push(shipped, "org/tve", "--results", *reports, "--yes")
    assert owner.files("org/tve")["README.md"] == first


def test_licence_is_the_given_one_or_the_cards(owner, shipped, push, reports):
    def license_there():
        return ModelCard(owner.files("org/tve")["README.md"].decode()).data.license

    push(shipped, "org/tve", "--results", *reports, "--yes")
    assert license_there() is None
    push(shipped, "org/tve", "--results", *reports, "--license", "apache-2.0", "--yes")
    assert license_there() == "apache-2.0"
    (shipped / "README.md").write_bytes(owner.files("org/tve")["README.md"])
    push(shipped, "org/tve", "--results", *reports, "--yes")
    assert license_there() == "apache-2.0"
    push(shipped, "org/tve", "--results", *reports, "--license", "mit", "--yes")
    assert license_there() == "mit"


def test_licence_that_the_hub_does_not_know_is_said(owner, shipped, push, reports):
    said = push(shipped, "org/tve", "--results", *reports, "--license", "free", "--yes")
    assert "does not take the card" in said and '"license" must be one of' in said and "not free" in said
    assert owner.files("org/tve") == {}


def test_push_to_ones_own_repository_updates_it_on_any_branch(owner, shipped, push, reports):
    push(shipped, "org/tve", "--results", *reports, "--yes")
    first = owner.repos["org/tve"].branches["main"]
    (shipped / "training.json").write_text((shipped / "training.json").read_text() + "\n")
    assert "the existing repository org/tve, branch next" in push(
        shipped, "org/tve", "--results", *reports, "--branch", "next", "--yes"
    )
    assert owner.repos["org/tve"].branches["main"] == first
    assert len(owner.repos["org/tve"].commits) == 3
    assert owner.files("org/tve", "next")["training.json"] == (shipped / "training.json").read_bytes()


def test_name_without_owner_is_ones_own(owner, shipped, push, reports):
    assert "repository someone/tve" in push(shipped, "tve", "--results", *reports)


def damage(folder, change, reports):
    """Damage a checkpoint; return what else to pass."""
    if change == "pickle":
        (folder / "pytorch_model.bin").write_bytes(b"x")
    elif change == "nan":
        from safetensors.torch import load_file, save_file

        weights = load_file(folder / "model.safetensors")
        weights["trunk.norm.bias"][3] = float("nan")
        save_file(weights, folder / "model.safetensors", {"format": "pt"})
    elif change == "no processor":
        (folder / "preprocessor_config.json").unlink()
    elif change == "other size":
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | {"hidden_size": 96}))
    elif change == "number":
        card = str(render_card(folder, reports))
        assert card.count("| images | 2 |") == 1
        (folder / "README.md").write_text(card.replace("| images | 2 |", "| images | 20 |"))
    elif change == "metadata":
        (folder / "README.md").write_text("---\nlicense: [mit\n---\n\n# Mine\n")
    elif change in ("report", "other report"):
        report = json.loads((reports[0] / "report.json").read_text())
        if change == "report":
            del report["summary"]["median_r2"]
        else:
            report["settings"]["model"] = "runs/another"
        (folder / "task").mkdir()
        (folder / "task" / "report.json").write_text(json.dumps(report))
        return [folder / "task" / "report.json"]
    return reports


@pytest.mark.parametrize(
    ("change", "parts"),
    [
        ("pickle", ["pytorch_model.bin", "pickle"]),
        ("nan", ["NaN", "trunk.norm.bias"]),
        ("no processor", ["preprocessor_config.json"]),
        ("other size", ["contradicts itself"]),
        ("number", ["README.md", "does not say what the results say", "line"]),
        ("metadata", ["metadata of the card", "README.md", "cannot be read"]),
        ("report", ["lacks a number", "median_r2"]),
        ("other report", ["runs/another", "not on"]),
    ],
)
def test_push_refuses_before_anything_is_sent(owner, shipped, push, change, parts, reports):
    results = damage(shipped, change, reports)
    said = push(shipped, "org/tve", "--results", *results, "--yes")
    assert all(part in said for part in parts), said
    assert owner.requests == []


def test_push_refuses_an_explainer_without_results_and_a_missing_folder(owner, shipped, push, tmp_path, reports):
    assert "needs measured results" in push(shipped, "org/tve", "--yes")
    assert "no folder" in push(tmp_path / "none", "org/tve", "--yes")
    assert "cannot be read" in push(shipped, "org/tve", "--results", *reports, "--card", tmp_path / "none.md", "--yes")
    assert owner.requests == []


@pytest.mark.parametrize("private", [True, False])
def test_failed_push_of_a_run_names_the_command_that_finishes_it(owner, shipped, push, monkeypatch, private):
    """The folder of a run holds more than a checkpoint, and no code."""
    (shipped / "checkpoint-500").mkdir()
    (shipped / "checkpoint-500" / "optimizer.bin").write_bytes(b"momentum")
    render_card(shipped, []).save(shipped / "README.md")
    monkeypatch.setattr(pushing.time, "sleep", lambda seconds: None)
    owner.faults = [Fault("GET /api/whoami", status=502, times=99)]
    with pytest.raises(OSError, match="is complete, but could not be pushed to org/tve .*502") as error:
        publish(shipped, "org/tve", private=private)
    owner.faults = []
    program, command, *arguments = shlex.split(re.search("run `(.*)`", str(error.value))[1])
    assert (program, command) == ("tve-hf", "push")
    assert "/org/tve/commit/" in push(*arguments)
    files = owner.files("org/tve")
    expected = {"README.md", "config.json", "model.safetensors", "preprocessor_config.json", "training.json"}
    assert files.keys() == expected | code_files().keys()
    assert files["README.md"].decode() == str(render_card(shipped, [], "org/tve"))
    assert owner.repos["org/tve"].private == private


def test_classifier_that_lacks_weights_is_refused(owner, push, tmp_path):
    folder = shutil.copytree(VIT, tmp_path / "vit")
    for change, parts in (
        ({"num_hidden_layers": 99}, "describes it, but the weights hold nothing"),
        ({"intermediate_size": 8}, r"describes 8, but the weights hold \d+"),
    ):
        config = json.loads((VIT / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | change))
        assert re.search(parts, push(folder, "org/vit", "--yes"))
    (folder / "model.safetensors").write_bytes(b"short")
    assert "model.safetensors cannot be loaded" in push(folder, "org/vit", "--yes")
    assert owner.requests == []


def test_card_and_push_need_no_training_libraries(owner, site, reports, tmp_path):
    """In an environment of transformers, torch and pillow alone."""
    environment = {"PATH": os.environ["PATH"], "PYTHONPATH": f"{site}:{ROOT}", "HF_HOME": str(tmp_path / "home")}
    environment |= {"HF_ENDPOINT": owner.endpoint, "HF_HUB_DISABLE_XET": "1", "HF_TOKEN": "hf_owner"}
    environment["NO_PROXY"] = "127.0.0.1"
    results = ["--results", *map(str, reports)]
    commands = [
        ["card", str(VIT_EXPLAINER), *results, "--output", str(tmp_path / "card.md")],
        ["push", str(VIT_EXPLAINER), "org/tve", "--yes", *results],
    ]
    code = f"""
import sys
from tve_hf.cli import main
codes = [main(command) for command in {commands}]
extras = {{"accelerate", "captum", "datasets", "matplotlib", "scipy", "sklearn", "timm"}}
print(codes, sorted(extras & set(sys.modules)))
"""
    done = subprocess.run(
        [sys.executable, "-S", "-c", code], capture_output=True, text=True, cwd=tmp_path, env=environment
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "[0, 0] []", done.stderr
    assert (tmp_path / "card.md").read_text().strip() == str(render_card(VIT_EXPLAINER, reports)).strip()
    assert "README.md" in owner.files("org/tve")


@pytest.mark.parametrize(
    ("user", "repo", "parts"),
    [
        (None, "org/tve", ["no token", "hf auth login"]),
        ("stranger", "org/tve", ["token is not valid"]),
        (User("someone"), "org/tve", ["someone may not write to org", "someone/tve"]),
        (User("someone", orgs={"org": "read"}), "org/tve", ["someone may not write to org"]),
        (User("org", role="read"), "org/tve", ["'test' may only read org/tve"]),
        (User("org", scopes={"org/other": ["repo.write"]}), "org/tve", ["'test' may only read org/tve"]),
        (User("org"), "org/bad name", ["org/bad name"]),
    ],
    ids=["none", "unknown", "another's", "reader", "read token", "other scope", "bad name"],
)
def test_push_finds_out_about_the_token_before_the_upload(hub, shipped, push, monkeypatch, user, repo, parts, reports):
    if user is not None:
        monkeypatch.setenv("HF_TOKEN", "hf_token")
        hub.users = {} if user == "stranger" else {"hf_token": user}
    said = push(shipped, repo, "--results", *reports, "--yes")
    assert all(part in said for part in parts), said
    assert written(hub) == []


def test_push_with_a_token_for_one_repository(hub, shipped, push, monkeypatch, reports):
    hub.users["hf_token"] = User("org", scopes={"org/tve": ["repo.content.read", "repo.write"]})
    monkeypatch.setenv("HF_TOKEN", "hf_token")
    assert "/org/tve/commit/" in push(shipped, "org/tve", "--results", *reports, "--yes")


def test_push_does_not_call_a_public_repository_private(owner, shipped, push, reports):
    owner.add("org/tve", {})
    assert "is public" in push(shipped, "org/tve", "--results", *reports, "--private", "--yes")
    assert written(owner) == []


@pytest.mark.parametrize(
    ("fault", "parts"),
    [
        (Fault("GET /api/whoami", status=500, times=99), ["500"]),
        (Fault("POST /api/repos/create", status=403, times=99), ["refuses access to org/tve", "403"]),
        (Fault("POST .*preupload", status=429, headers={"Retry-After": "9"}, times=99), ["9 seconds"]),
        (Fault("PUT /lfs", status=500, times=99), ["500", "org/tve"]),
        (Fault("POST /lfs-verify", status=400, times=99), ["400", "org/tve"]),
        (Fault("POST .*commit", status=403, times=99), ["refuses access to org/tve"]),
    ],
    ids=["whoami", "create", "preupload", "upload", "verify", "commit"],
)
def test_failed_push_changes_no_file_and_the_next_works(owner, shipped, push, fault, parts, reports):
    owner.faults = [Fault(**vars(fault))]
    said = push(shipped, "org/tve", "--results", *reports, "--yes")
    assert all(part in said for part in parts), said
    assert not owner.repos or owner.files("org/tve") == {}
    owner.faults = []
    push(shipped, "org/tve", "--results", *reports, "--yes")
    assert same_weights(TVEExplainer.from_pretrained("org/tve"), TVEExplainer.from_pretrained(shipped))


def test_push_without_network(owner, shipped, push, reports):
    owner.__exit__()
    assert f"connection to {owner.endpoint}" in push(shipped, "org/tve", "--results", *reports, "--yes")
