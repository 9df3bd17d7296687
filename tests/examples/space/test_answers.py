"""What the Space answers, by direct calls; the page itself is in test_app.py."""

import json
import re
from base64 import b64decode
from html.parser import HTMLParser
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
import torch
from huggingface_hub import scan_cache_dir
from PIL import Image
from scripts import load_example
from shipped import VIT, VIT_EXPLAINER
from tiny import noise_image
from transformers import pipeline
from zero_shot_models import make_model, make_processor

import tve_hf

answers = load_example("space/answers")
WIDTH, HEIGHT = 384, 256
SHIPPED = (answers.SHIPPED, VIT.name, "", "")


@pytest.fixture(autouse=True)
def models(monkeypatch):
    kept = answers.Models(2)
    monkeypatch.setattr(answers, "MODELS", kept)
    return kept


@pytest.fixture
def photo(tmp_path) -> str:
    noise_image(3, (WIDTH, HEIGHT)).save(tmp_path / "photo.png")
    return str(tmp_path / "photo.png")


@pytest.fixture
def online(hub, tmp_path):
    """A Hub with a classifier and a zero-shot model."""
    torch.manual_seed(0)
    make_model("clip").save_pretrained(tmp_path / "clip")
    make_processor("clip").save_pretrained(tmp_path / "clip")
    for name, folder in (("org/vit", VIT), ("org/copy", VIT), ("org/clip", tmp_path / "clip")):
        hub.add(name, {path.name: path.read_bytes() for path in folder.iterdir()} | {"README.md": name.encode()})
    return hub


class Pictures(HTMLParser):
    """The alternative texts of the pictures of a page, and their pixels."""

    def __init__(self, html: str):
        super().__init__()
        self.texts, self.pictures = [], []
        self.feed(html)

    def handle_starttag(self, tag, attrs):
        if tag == "img":
            values = dict(attrs)
            self.texts.append(values["alt"])
            self.pictures.append(np.asarray(Image.open(BytesIO(b64decode(values["src"].partition(",")[2])))))


def in_patches(pixels: np.ndarray, grid: tuple[int, int]) -> np.ndarray:
    rows, cols = grid
    return pixels.reshape(rows, HEIGHT // rows, cols, WIDTH // cols).mean((1, 3))


def test_an_answer_is_that_of_the_pipeline(photo):
    answer = answers.explain(photo, *SHIPPED, 0)
    explain = pipeline("transferable-attribution", model=str(VIT_EXPLAINER), classifier=str(VIT))
    expected = explain(photo, top_k=answers.TOP_K)
    assert [one["label"] for one in answer.explanations] == [one["label"] for one in expected]
    for one, other in zip(answer.explanations, expected, strict=True):
        np.testing.assert_allclose(one["attribution"], other["attribution"], atol=1e-6)
    refined = answers.explain(photo, *SHIPPED, 16).explanations[0]["attribution"]
    np.testing.assert_allclose(refined, explain(photo, refine=16)[0]["attribution"], atol=1e-6)
    words = answers.trust(answer, 0)
    assert "held-out images" in words and f"masking does to {expected[0]['label']!r}" in words


def test_the_map_has_one_sign_if_asked_and_no_colour_without_opacity(photo):
    answer = answers.explain(photo, *SHIPPED, 0)

    def drawn(sign: str, opacity: float = 100) -> np.ndarray:
        (picture,) = Pictures(answers.draw(answer, 0, opacity, sign, False)).pictures
        return picture.astype(int)

    red, blue = (drawn(sign) for sign in ("For the class", "Against the class"))
    scores = answer.explanations[0]["attribution"]
    redder = in_patches(red[..., 0] - red[..., 2], scores.shape)
    assert np.corrcoef(redder.ravel(), scores.clip(min=0).ravel())[0, 1] > 0.8
    assert np.abs(red[..., 0] - red[..., 2]).max() > 60 and (blue[..., 2] - blue[..., 0]).max() > 60
    assert (red[..., 2] - red[..., 0]).max() < 30 and (blue[..., 0] - blue[..., 2]).max() < 30
    assert np.abs(drawn("For and against", 0) - np.asarray(Image.open(photo))).mean() < 8  # but for JPEG


def test_removing_patches_is_what_fidelity_measures(photo):
    answer = answers.explain(photo, *SHIPPED, 0)
    one = answer.explanations[1]
    classifier = tve_hf.split_classifier(VIT)
    pixels = classifier.image_processor(Image.open(photo), return_tensors="pt")["pixel_values"]
    scores = one["attribution"].ravel()
    first = scores.argsort()[::-1][: round(0.3 * scores.size)]
    last = scores.argsort()[: round(0.3 * scores.size)]
    keep = torch.ones(1, 2, scores.size, dtype=torch.bool)
    keep[0, 0, first.copy()] = keep[0, 1, last.copy()] = False
    masked = tve_hf.patches.mask_patches(pixels, keep, one["attribution"].shape)[0]
    with torch.no_grad():
        probability = classifier.backbone.model(masked).logits.softmax(-1)[:, one["class_idx"]]
    picture, text = answers.remove(answer, 1, 30)
    told = re.findall(r"([\d.]+%)", text)
    assert told == [f"{probability[0]:.1%}", f"{one['score']:.1%}", f"{probability[1]:.1%}"]
    (shown,) = Pictures(picture).pictures
    grey = np.abs(shown.astype(int) - answers._GREY).max(-1) < 24  # a JPEG
    assert set(np.flatnonzero(in_patches(grey, one["attribution"].shape) > 0.7)) == set(first)


def test_other_methods_are_beside_it_and_those_that_cannot_serve_say_why(photo):
    html = answers.compare(answers.explain(photo, *SHIPPED, 0), 0)
    assert Pictures(html).texts == ["Map by Explainer", "Map by LeGrad", "Map by Grad-CAM", "Map by Sampled"]
    assert len(re.findall(r"fidelity gap [+-]\d\.\d\d", html)) == 4
    cnn = next(name for name in answers.shipped() if name.startswith("mobilenet"))
    html = answers.compare(answers.explain(photo, answers.SHIPPED, cnn, "", "", 16), 0)
    assert "Map by LeGrad" not in Pictures(html).texts and "<p>LeGrad: " in html


def test_files_hold_the_figure_and_the_raw_map_and_are_gone_afterwards(photo):
    answer = answers.explain(photo, *SHIPPED, 0)
    writing = answers.files(answer, 2)
    picture, record = map(Path, next(writing))
    one, saved = answer.explanations[2], json.loads(record.read_text())
    assert (saved["classifier"], saved["label"]) == (VIT.name, one["label"])
    np.testing.assert_array_equal(np.float32(saved["attribution"]), one["attribution"])
    assert Image.open(picture).size == one["figure"].size
    writing.close()
    assert not picture.parent.exists()


def test_a_name_of_the_hub_and_prompts(photo, online, models):
    answer = answers.explain(photo, answers.FROM_HUB, "", " org/vit ", "", 0)
    shipped = answers.explain(photo, *SHIPPED, 0)
    assert answer.explanations[0]["label"] == shipped.explanations[0]["label"]
    answer = answers.explain(photo, answers.PROMPTS, "", "org/clip", "a cat, a dog\n\n the chair ", 40)
    assert {one["label"] for one in answer.explanations} == {"a cat", "a dog", "the chair"}
    assert "without an explainer" in answers.trust(answer, 0)
    assert re.search(r"is [\d.]+% instead of", answers.remove(answer, 0, 50)[1])
    again = answers.explain(photo, answers.PROMPTS, "", "org/clip", "red, two dogs", 40)
    assert {one["label"] for one in again.explanations} == {"red", "two dogs"}


def test_few_models_are_kept_and_no_files_of_others(photo, online, models):
    for name in ("org/vit", "org/copy", "org/clip"):
        models.get(name)
    assert [*models.kept] == ["org/copy", "org/clip"]
    assert {repo.repo_id for repo in scan_cache_dir(online.cache).repos} == {"org/copy", "org/clip"}
    models.get("org/copy")
    models.get(str(VIT))
    assert [*models.kept] == ["org/copy", str(VIT)]


def test_too_large_a_model_is_refused_before_it_is_fetched(online, models, monkeypatch):
    monkeypatch.setattr(answers, "MAX_MODEL", 1e6)
    with pytest.raises(ValueError, match="org/vit has .* GB of weights"):
        models.get("org/vit")
    assert not any(path.name.endswith(".safetensors") for path in online.cache.rglob("*"))
    assert not models.kept


def test_a_slow_model_is_given_up_between_passes_and_serves_on(photo, monkeypatch):
    monkeypatch.setattr(answers, "MAX_SECONDS", -1)
    with pytest.raises(TimeoutError, match="ask for fewer passes"):
        answers.explain(photo, *SHIPPED, 0)
    monkeypatch.setattr(answers, "MAX_SECONDS", 600)
    answer = answers.explain(photo, *SHIPPED, 0)
    model = answers.MODELS.get(answer.name).classifier.backbone.model
    assert answer.explanations and not model._forward_pre_hooks


@pytest.mark.parametrize(
    "repository",
    [
        "",
        "vit",
        "../../etc/passwd",
        "/etc/passwd",
        "org/../vit",
        "http://10.0.0.1/vit",
        "org/vit/x",
        "org/vit\n",
        "~/x",
    ],
)
def test_only_names_of_repositories_are_taken(photo, repository, tmp_path, monkeypatch):
    asked = pytest.raises(ValueError, match="no name of a repository|was not found|cannot be")
    if repository.strip() == "org/vit":
        (tmp_path / "org" / "vit").mkdir(parents=True)  # a folder of the machine by that name
        monkeypatch.chdir(tmp_path)
    with asked:
        answers.explain(photo, answers.FROM_HUB, "", repository, "", 0)


@pytest.mark.parametrize(
    ("prompts", "said"),
    [("", "no prompts"), (" \n , ", "no prompts"), ("a cat, a cat", "twice"), ("x" * 300, "shorter ones")],
)
def test_prompts_that_cannot_be(photo, online, prompts, said):
    with pytest.raises(ValueError, match=said):
        answers.explain(photo, answers.PROMPTS, "", "org/clip", prompts, 0)


def test_unknown_models_are_named(photo, online):
    with pytest.raises(OSError, match="org/none"):
        answers.explain(photo, answers.FROM_HUB, "", "org/none", "", 0)


def test_images_that_cannot_be(tmp_path, monkeypatch):
    broken = tmp_path / "broken.jpg"
    broken.write_bytes(b"no image")
    noise_image(0).save(tmp_path / "cut.png")
    (tmp_path / "cut.png").write_bytes((tmp_path / "cut.png").read_bytes()[:200])
    for path, said in ((None, "no image"), (str(broken), "corrupt"), (str(tmp_path / "cut.png"), "truncated")):
        with pytest.raises(ValueError, match=said):
            answers.explain(path, *SHIPPED, 0)
    monkeypatch.setattr(answers, "MAX_PIXELS", 1000)
    noise_image(0, (40, 40)).save(tmp_path / "large.png")
    with pytest.raises(ValueError, match="shrink it"):
        answers.photograph(str(tmp_path / "large.png"))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)  # of a bomb, PIL reads no more than the header
    with pytest.raises(ValueError, match="shrink it"):
        answers.photograph(str(tmp_path / "large.png"))
