"""What is said of faults between here and the Hub, and that bugs are no such faults."""

import errno

import pytest
from hub_server import Fault, User, check_cache, one_sentence
from huggingface_hub import HfApi, constants, file_download
from huggingface_hub.utils import close_session
from shipped import VIT
from tiny import noise_image, same_weights
from transformers import pipeline

from tve_hf import TVEExplainer, split_classifier
from tve_hf.cli import main
from tve_hf.hub.info import explainers_in, explainers_of
from tve_hf.hub.push import prepare, publish


def bug(*_, **__):
    return None.bit_length()


def load():
    return TVEExplainer.from_pretrained("org/tve")


@pytest.fixture
def owner(online, monkeypatch):
    online.users["hf_owner"] = User("org")
    monkeypatch.setenv("HF_TOKEN", "hf_owner")
    return online


# A bug is a bug


@pytest.mark.parametrize("name", ["get_hf_file_metadata", "hf_hub_download", "hf_hub_url", "try_to_load_from_cache"])
@pytest.mark.parametrize("cached", [False, True])
def test_bug_while_loading_surfaces(online, monkeypatch, name, cached):
    if cached:
        load()
    monkeypatch.setattr(f"tve_hf.weights.{name}", bug)
    with pytest.raises(AttributeError, match="bit_length"):
        load()


@pytest.mark.parametrize(
    ("name", "ask"),
    [
        ("list_models", lambda: explainers_of("org")),
        ("get_collection", lambda: explainers_in("org/mine-1")),
        ("whoami", lambda: prepare(VIT, "org/new")),
        ("model_info", lambda: prepare(VIT, "org/new")),
        ("create_repo", lambda: prepare(VIT, "org/new").send()),
        ("create_commit", lambda: prepare(VIT, "org/new").send()),
    ],
)
def test_bug_while_asking_or_pushing_surfaces(owner, monkeypatch, name, ask):
    monkeypatch.setattr(HfApi, name, bug)
    with pytest.raises(AttributeError, match="bit_length"):
        ask()


def test_bug_is_not_tried_again(owner, monkeypatch):
    tried = []
    monkeypatch.setattr(HfApi, "create_commit", lambda *_, **__: tried.append(1) or bug())
    with pytest.raises(AttributeError):
        publish(VIT, "org/new", private=False)
    assert len(tried) == 1


def test_bug_behind_an_error_of_the_client_is_not_hidden(online, monkeypatch):
    def wrapped(*_, **__):
        try:
            bug()
        except AttributeError as error:
            raise RuntimeError("Error while uploading") from error

    monkeypatch.setattr("tve_hf.weights.hf_hub_download", wrapped)
    with pytest.raises(RuntimeError) as error:
        load()
    assert isinstance(error.value.__cause__, AttributeError)


# A fault is said


def test_what_is_no_hub_is_said(online, monkeypatch):
    """As behind a page that asks to log in to the network."""
    online.faults = [Fault("HEAD .*config.json", status=200, times=9)]
    with pytest.raises(OSError, match=f"{online.endpoint} does not answer as the Hub does for org/tve .*HF_ENDPOINT"):
        load()
    online.faults = [Fault("GET /api/models", body="page")]
    with pytest.raises(OSError, match=f"{online.endpoint} does not answer as the Hub does for org .*HF_ENDPOINT"):
        explainers_of("org")
    for name, value in (("ENDPOINT", "http://hub:port"), ("HUGGINGFACE_CO_URL_TEMPLATE", "http://hub:port/x")):
        monkeypatch.setattr(constants, name, value)
    with pytest.raises(OSError, match="does not answer as the Hub does for org/new .*HF_ENDPOINT"):
        TVEExplainer.from_pretrained("org/new")


def test_what_the_hub_refuses_is_no_matter_of_the_connection(online):
    online.faults = [Fault("HEAD .*config.json", status=410, times=9)]
    with pytest.raises(OSError, match=r"refuses what it was asked for org/tve \(410\): fault 410\.$"):
        load()


@pytest.mark.parametrize("offline", [True, False])
def test_pushing_needs_the_hub_and_a_token(online, monkeypatch, offline):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", offline)
    monkeypatch.setenv("HF_TOKEN", "hf_any" if offline else "")
    with pytest.raises(OSError, match="while offline; unset HF_HUB_OFFLINE" if offline else "There is no token"):
        prepare(VIT, "org/new")


def test_missing_token_is_said_on_the_way_down(online):
    with pytest.raises(OSError, match="There is no token; log in with `hf auth login`"):
        TVEExplainer.from_pretrained("org/tve", token=True)


@pytest.mark.parametrize("fault", ["status", "network"])
def test_forced_download_that_fails_says_why(online, fault):
    load()
    if fault == "network":
        online.__exit__()
        close_session()  # its connections, which the server would still answer
        with pytest.raises(ConnectionError, match=f"connection to {online.endpoint} for org/tve failed"):
            TVEExplainer.from_pretrained("org/tve", force_download=True)
        return
    online.faults = [Fault("HEAD .*config.json", status=500, times=9)]
    with pytest.raises(OSError, match="answered 500 for org/tve; try again later"):
        TVEExplainer.from_pretrained("org/tve", force_download=True)


def test_wrong_arguments_are_no_matter_of_the_connection(online):
    load()
    with pytest.raises(ValueError, match="Cannot pass 'force_download=True' and 'local_files_only=True'"):
        TVEExplainer.from_pretrained("org/tve", force_download=True, local_files_only=True)


def test_errors_of_the_disk_stay_what_they_are(online, monkeypatch):
    def refused(url, file, **_):
        raise PermissionError(errno.EACCES, "Permission denied", file.name)

    monkeypatch.setattr(file_download, "http_get", refused)
    with pytest.raises(PermissionError, match="Permission denied") as error:
        load()
    assert error.value.filename.endswith("incomplete")


# Faults on the way

WEIGHTS_HEAD, WEIGHTS_BODY = "HEAD .*/model.safetensors", "GET /cdn"
FAULTS = {
    "401": (Fault("HEAD .*config.json", status=401, times=9), "no repository .* that you may read"),
    "403": (Fault("HEAD .*config.json", status=403, times=9), "refuses access"),
    "404": (Fault("HEAD .*config.json", status=404, times=9), "org/tve has no config.json"),
    "429": (Fault("HEAD .*config.json", status=429, headers={"Retry-After": "7"}, times=9), "again in 7 seconds"),
    "500": (Fault("HEAD .*config.json", status=500, times=9), "answered 500 for org/tve"),
    "weights 401": (Fault(WEIGHTS_HEAD, status=401, times=9), "no repository .* that you may read"),
    "weights 403": (Fault(WEIGHTS_HEAD, status=403, times=9), "refuses access"),
    "weights 500": (Fault(WEIGHTS_HEAD, status=500, times=9), "answered 500 for org/tve"),
    "body 403": (Fault(WEIGHTS_BODY, status=403, times=9), "refuses access"),
    "body 404": (Fault(WEIGHTS_BODY, status=404, times=9), "has no"),
    "body 429": (Fault(WEIGHTS_BODY, status=429, headers={"Retry-After": "7"}, times=9), "again in 7 seconds"),
    "body 500": (Fault(WEIGHTS_BODY, status=500, times=9), "answered 500 for org/tve"),
    "cut for good": (Fault(WEIGHTS_BODY, body="cut", times=99), "connection .* failed"),
    "short": (Fault(WEIGHTS_BODY, body="short", times=9), "^org/tve came down incomplete; try again"),
}


@pytest.mark.parametrize("kind", FAULTS)
def test_fault_ends_in_one_sentence_and_the_next_try_works(online, pair, tmp_path, capsys, kind):
    fault, message = FAULTS[kind]
    online.faults = [Fault(**vars(fault))]
    with pytest.raises(OSError, match=message) as error:
        TVEExplainer.from_pretrained("org/tve")
    one_sentence(error)
    check_cache(online)
    online.faults = [Fault(**vars(fault))]
    photo = tmp_path / "photo.png"
    noise_image(0).save(photo)
    command = ["explain", str(photo), "--model", "org/tve", "--classifier", str(pair[0]), "--output", str(tmp_path)]
    assert main(command) == 1
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("tve-hf: ")]
    assert len(lines) == 1
    check_cache(online)
    online.faults = []
    assert same_weights(TVEExplainer.from_pretrained("org/tve"), TVEExplainer.from_pretrained(pair[1]))
    check_cache(online)


def test_cut_download_is_resumed_where_it_was_cut(online, pair, monkeypatch):
    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 100)  # what is kept is whole chunks
    online.faults = [Fault(WEIGHTS_BODY, body="cut")]
    assert same_weights(TVEExplainer.from_pretrained("org/tve"), TVEExplainer.from_pretrained(pair[1]))
    seen = list(zip(online.requests, online.headers, strict=True))
    ranges = [headers.get("range") for request, headers in seen if request.startswith(WEIGHTS_BODY)]
    half = (pair[1] / "model.safetensors").stat().st_size // 2
    assert ranges == [None, f"bytes={half // 100 * 100}-"]


def test_busy_hub_is_waited_for_as_it_asks(online):
    online.faults = [Fault("HEAD .*config.json", status=429, headers={"Retry-After": "7"}, times=3)]
    assert TVEExplainer.from_pretrained("org/tve").config.model_type == "tve"
    assert online.waits.waited == [8.0]  # and one second more, as the client does


def test_slow_answers_are_awaited(online):
    online.faults = [Fault("HEAD", delay=0.2), Fault(WEIGHTS_BODY, delay=0.2)]
    assert TVEExplainer.from_pretrained("org/tve").config.model_type == "tve"


@pytest.mark.parametrize("load", [TVEExplainer.from_pretrained, split_classifier])
def test_no_network_fails_at_once(hub, load):
    hub.__exit__()
    with pytest.raises(ConnectionError, match=f"connection to {hub.endpoint} for org/other failed") as error:
        load("org/other")
    one_sentence(error)
    assert hub.waits.waited == []


def test_hub_that_never_answers_is_given_up(online, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_ETAG_TIMEOUT", 0.2)
    online.faults = [Fault("HEAD", delay=1.0)]
    with pytest.raises(ConnectionError, match="org/tve failed"):
        TVEExplainer.from_pretrained("org/tve")


@pytest.mark.parametrize(
    ("model", "parts"),
    [
        ("org/none", ["org/none", "no repository"]),
        ("no/such/folder", ["'no/such/folder'", "no folder here", "owner/name"]),
        ("org/vit", ["org/vit", "no explainer", "'vit'"]),
        ("org/empty", ["org/empty", "has no config.json"]),
        ("org/gated", ["org/gated", "gated", "ask for access"]),
    ],
)
def test_wrong_repositories_are_named(online, pair, tmp_path, capsys, model, parts):
    online.add("org/empty", {"README.md": b"# soon"})
    online.add("org/gated", online.files("org/tve"), gated=True)
    command = ["explain", str(tmp_path / "any.png"), "--model", model, "--classifier", str(pair[0])]
    assert main([*command, "--output", str(tmp_path)]) == 1
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("tve-hf: ")]
    assert all(part in line for part in parts), line
    with pytest.raises((OSError, ValueError)) as error:
        TVEExplainer.from_pretrained(model)
    assert all(part in one_sentence(error) for part in parts)


@pytest.mark.parametrize("load", [TVEExplainer.from_pretrained, split_classifier])
def test_token_that_is_not_valid_is_said(online, monkeypatch, load):
    monkeypatch.setenv("HF_TOKEN", "hf_outdated")
    with pytest.raises(OSError, match="The token is not valid"):
        load("org/vit")


def test_wrong_revision_is_named(online):
    with pytest.raises(OSError, match="org/tve has no revision 'v9'"):
        TVEExplainer.from_pretrained("org/tve", revision="v9")


def test_repository_of_a_classifier_is_no_explainer_for_the_pipeline(online):
    with pytest.raises(ValueError, match="org/vit.* is no explainer"):
        pipeline("transferable-attribution", model="org/vit", classifier="org/vit")


def test_full_disk_leaves_nothing_and_the_next_try_works(online, pair, monkeypatch):
    real = file_download.http_get

    def full(url, file, **options):
        real(url, file, **options)
        file.truncate(1000)
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(file_download, "http_get", full)
        with pytest.raises(OSError, match="No space is left for org/tve; free some, or set HF_HOME") as error:
            TVEExplainer.from_pretrained("org/tve")
    assert error.value.errno == errno.ENOSPC
    check_cache(online)
    assert same_weights(TVEExplainer.from_pretrained("org/tve"), TVEExplainer.from_pretrained(pair[1]))
