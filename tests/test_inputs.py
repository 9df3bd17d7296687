"""What users pass, good and bad, to the pipeline and to methods: the right map, or one sentence with the remedy."""

import base64
import io
import re
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import datasets
import numpy as np
import pillow_heif
import pytest
import torch
from PIL import Image
from tiny import GRID, LABELS, SIDE, make_explainer, save_classifier
from transformers import ViTForImageClassification, pipeline

import tve_hf
from tve_hf.cli import main
from tve_hf.methods import explain as explain_by

TASK = "transferable-attribution"
PIXELS = np.random.default_rng(0).integers(0, 256, (12, 10, 3), np.uint8)
PICTURE = Image.fromarray(PIXELS)
GRAY = PICTURE.convert("L")
HEIC = b"\0\0\0\x18ftypheic" + bytes(40)  # what such a file starts with


def encoded(picture: Image.Image = PICTURE, file_format: str = "PNG") -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, file_format)
    return buffer.getvalue()


PNG = encoded()


class OfAnotherLibrary:
    """An array of a library that numpy can read."""

    def __array__(self, dtype=None, copy=None):
        return PIXELS


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> SimpleNamespace:
    """Models and files that the rows of the tables name."""
    folder = tmp_path_factory.mktemp("world")
    classifier = save_classifier(folder / "classifier")
    split = tve_hf.split_classifier(classifier)
    explain = pipeline(TASK, model=make_explainer(split), classifier=split)
    pixel_values = split.image_processor([PICTURE, PICTURE.rotate(180)], return_tensors="pt")["pixel_values"]
    PICTURE.save(folder / "a photo.png")
    (folder / "empty.png").touch()
    (folder / "corrupt.png").write_bytes(b"no image at all")
    (folder / "truncated.png").write_bytes(PNG[:200])
    (folder / "photo.heic").write_bytes(HEIC)
    return SimpleNamespace(
        folder=folder,
        classifier=str(classifier),
        split=split,
        model=ViTForImageClassification.from_pretrained(classifier),
        explain=explain,
        random=pipeline(TASK, model=make_explainer(split, backgrounds="random"), classifier=split),
        sampled=pipeline(TASK, classifier=split, method_kwargs={"n_samples": 8}),
        x=pixel_values,
        scores=torch.randn(2, GRID, GRID),
        file=folder / "a photo.png",
    )


def refused(action: Callable[[], Any], pattern: str) -> None:
    """Check that an action is refused in one sentence."""
    with pytest.raises((ValueError, TypeError, OSError, ImportError), match=pattern) as caught:
        action()
    said = str(caught.value)
    assert "\n" not in said and len(said) < 600 and said[-1] in ".?", said


# --- images: the same picture, however it comes ---------------------------------------------------------------------

# How it is passed, and which picture it is.
IMAGES: dict[str, tuple[Callable[[SimpleNamespace], Any], Image.Image]] = {
    "PIL": (lambda w: PICTURE, PICTURE),
    "PIL with alpha": (lambda w: PICTURE.convert("RGBA"), PICTURE),
    "PIL gray": (lambda w: GRAY, GRAY),
    "PIL palette": (lambda w: PICTURE.quantize(8), PICTURE.quantize(8)),
    "PIL black and white": (lambda w: GRAY.convert("1"), GRAY.convert("1")),
    "PIL of 16 bits": (lambda w: Image.fromarray(np.asarray(GRAY).astype(np.uint16) * 257), GRAY),
    "PIL of floats in [0, 1]": (lambda w: Image.fromarray(np.asarray(GRAY, np.float32) / 255), GRAY),
    "array": (lambda w: PIXELS, PICTURE),
    "array, channels first": (lambda w: PIXELS.transpose(2, 0, 1), PICTURE),
    "array of float32": (lambda w: (PIXELS / 255).astype(np.float32), PICTURE),
    "array of float64": (lambda w: PIXELS / 255, PICTURE),
    "array of float16": (lambda w: (PIXELS / 255).astype(np.float16), PICTURE),
    "array of 16 bits": (lambda w: PIXELS.astype(np.uint16) * 257, PICTURE),
    "array without channels": (lambda w: np.asarray(GRAY), GRAY),
    "array of one channel": (lambda w: np.asarray(GRAY)[..., None] / 255, GRAY),
    "array that is read-only": (lambda w: np.frombuffer(PIXELS.tobytes(), np.uint8).reshape(PIXELS.shape), PICTURE),
    "array of another library": (lambda w: OfAnotherLibrary(), PICTURE),
    "path": (lambda w: str(w.file), PICTURE),
    "Path": (lambda w: w.file, PICTURE),
    "path from home": (lambda w: "~/a photo.png", PICTURE),
    "file URL": (lambda w: w.file.as_uri(), PICTURE),
    "base64": (lambda w: base64.b64encode(PNG).decode(), PICTURE),
    "data URL": (lambda w: f"data:image/png;base64,{base64.b64encode(PNG).decode()}", PICTURE),
    "bytes": (lambda w: PNG, PICTURE),
    "bytearray": (lambda w: bytearray(PNG), PICTURE),
    "memoryview": (lambda w: memoryview(PNG), PICTURE),
    "file in memory": (lambda w: io.BytesIO(PNG), PICTURE),
    "file in memory, read before": (lambda w: read_to_the_end(io.BytesIO(PNG)), PICTURE),
    "open file": (lambda w: open(w.file, "rb"), PICTURE),
    "dict of bytes": (lambda w: {"bytes": PNG, "path": None}, PICTURE),
    "dict of a path": (lambda w: {"bytes": None, "path": str(w.file)}, PICTURE),
}
# As those above by the pipeline; to a function on tensors, a tensor is prepared already.
TENSORS: dict[str, Callable[[], torch.Tensor]] = {
    "tensor": lambda: torch.from_numpy(PIXELS.copy()).permute(2, 0, 1),
    "tensor, channels last": lambda: torch.from_numpy(PIXELS.copy()),
    "tensor of floats": lambda: torch.from_numpy(PIXELS / 255).permute(2, 0, 1),
    "tensor of float16": lambda: torch.from_numpy(PIXELS / 255).permute(2, 0, 1).half(),
}


def read_to_the_end(file: io.BytesIO) -> io.BytesIO:
    file.read()
    return file


def by_hand(world: SimpleNamespace, picture: Image.Image) -> np.ndarray:
    """The occlusion map of class 1, by the model of transformers in a loop."""
    pixel_values = world.split.image_processor(picture.convert("RGB"), return_tensors="pt")["pixel_values"]
    side = SIDE // GRID
    scores = np.zeros((GRID, GRID), np.float32)
    with torch.no_grad():
        whole = world.model(pixel_values).logits.softmax(-1)[0, 1]
        for row in range(GRID):
            for column in range(GRID):
                masked = pixel_values.clone()
                masked[..., row * side : (row + 1) * side, column * side : (column + 1) * side] = 0
                scores[row, column] = whole - world.model(masked).logits.softmax(-1)[0, 1]
    return scores


@pytest.mark.parametrize("name", [*IMAGES, *TENSORS])
def test_the_pipeline_takes_an_image(world, name, monkeypatch):
    monkeypatch.setenv("HOME", str(world.folder))
    make, picture = IMAGES[name] if name in IMAGES else (lambda w: TENSORS[name](), PICTURE)
    (result,) = world.explain(make(world), class_idx=1, method="occlusion")
    assert np.allclose(result["attribution"], by_hand(world, picture), atol=1e-5)
    assert (result["label"], result["overlay"].size) == (LABELS[1], PICTURE.size)


@pytest.mark.parametrize("name", IMAGES)
def test_methods_take_an_image(world, name, monkeypatch):
    monkeypatch.setenv("HOME", str(world.folder))
    make, picture = IMAGES[name]
    scores = explain_by("occlusion", world.split, make(world), 1)
    assert scores.shape == (1, GRID, GRID) and np.allclose(scores[0], by_hand(world, picture), atol=1e-5)


def column_of(*pictures: Image.Image) -> Any:
    features = datasets.Features({"image": datasets.Image()})
    return datasets.Dataset.from_dict({"image": [*pictures]}, features=features)["image"]


SEVERAL: dict[str, Callable[[SimpleNamespace], Any]] = {
    "list": lambda w: [PICTURE, w.file],
    "tuple": lambda w: (PNG, PIXELS),
    "generator": lambda w: (picture for picture in (PICTURE, PIXELS)),
    "column": lambda w: column_of(PICTURE, PICTURE),
    "array (B, H, W, C)": lambda w: np.stack([PIXELS, PIXELS]),
    "array (B, C, H, W)": lambda w: np.stack([PIXELS, PIXELS]).transpose(0, 3, 1, 2) / 255,
}


@pytest.mark.parametrize("name", SEVERAL)
def test_the_pipeline_takes_several_images(world, name):
    results = list(world.explain(SEVERAL[name](world), class_idx=1, method="occlusion", batch_size=2))
    expected = by_hand(world, PICTURE)
    assert len(results) == 2 and all(np.allclose(r[0]["attribution"], expected, atol=1e-5) for r in results)


@pytest.mark.parametrize("name", SEVERAL)
def test_methods_take_several_images(world, name):
    scores = explain_by("occlusion", world.split, SEVERAL[name](world), [1, 1])
    assert scores.shape == (2, GRID, GRID) and np.allclose(scores, by_hand(world, PICTURE), atol=1e-5)


def test_heic_is_read_where_pillow_heif_is_installed(world):
    photograph = io.BytesIO()
    pillow_heif.from_pillow(PICTURE).save(photograph, quality=-1, chroma=444, matrix_coefficients=0)  # without loss
    assert photograph.getvalue()[4:12] == b"ftypheix"  # as for any HEIC in 4:4:4
    (result,) = world.explain(photograph.getvalue(), class_idx=1, method="occlusion")
    assert np.allclose(result["attribution"], by_hand(world, PICTURE), atol=1e-5)


BAD_IMAGES: dict[str, tuple[Callable[[SimpleNamespace], Any], str]] = {
    "missing": (lambda w: "nowhere.png", "'nowhere.png' does not exist.*check the path"),
    "missing from home": (lambda w: "~/nowhere.png", "'~/nowhere.png' does not exist"),
    "missing file URL": (lambda w: "file:///nowhere.png", "'file:///nowhere.png' does not exist"),
    "folder": (lambda w: w.folder, "is a directory: pass a list"),
    "empty": (lambda w: w.folder / "empty.png", "empty.png' is empty"),
    "corrupt": (lambda w: w.folder / "corrupt.png", "corrupt.png' is corrupt or in no format.*convert"),
    "truncated": (lambda w: w.folder / "truncated.png", "truncated or corrupt.*again"),
    "HEIC without its library": (lambda w: w.folder / "photo.heic", "a HEIC photograph: `pip install pillow-heif`"),
    "bytes of nothing": (lambda w: b"", "length 0 is empty"),
    "bytes of no image": (lambda w: b"hello", "The bytes of length 5 is corrupt or in no format"),
    "closed file": (lambda w: closed(io.BytesIO(PNG)), "closed.*open it"),
    "text file": (lambda w: io.StringIO("hello"), "open it with mode 'rb'"),
    "number": (lambda w: 3, "The int 3 is not an image: pass a path"),
    "none": (lambda w: None, "No image was given"),
    "empty list": (lambda w: [], "No image was given"),
    "empty array": (lambda w: np.zeros((0, 8, 8, 3)), "No image was given"),
    "set": (lambda w: {"a.png"}, "The set .* is not an image: pass a path"),
    "dict": (lambda w: {"url": "a.png"}, "is not an image: pass a path"),
    "five channels": (lambda w: np.zeros((8, 8, 5)), r"\(8, 8, 5\).* is not one image: pass \(H, W\)"),
    "video": (lambda w: np.zeros((2, 2, 8, 8, 3)), "is not one image"),
    "row": (lambda w: np.zeros(8), "is not one image"),
    "NaN": (lambda w: np.full((8, 8, 3), np.nan), "NaN or infinite values: replace them"),
    "floats to 255": (lambda w: PIXELS.astype(np.float32), r"scale floats to \[0, 1\]"),
    "negative floats": (lambda w: PIXELS / 127.5 - 1, r"scale floats to \[0, 1\]"),
    "int64": (lambda w: PIXELS.astype(np.int64), "has no image dtype: cast it to uint8"),
    "text array": (lambda w: np.array([["a"]]), "has no image dtype"),
}


def closed(file: io.BytesIO) -> io.BytesIO:
    file.close()
    return file


@pytest.mark.parametrize("surface", ["pipeline", "methods"])
@pytest.mark.parametrize("name", BAD_IMAGES)
def test_bad_images_are_refused(world, name, surface, monkeypatch):
    monkeypatch.setenv("HOME", str(world.folder))
    monkeypatch.setitem(sys.modules, "pillow_heif", None)
    make, pattern = BAD_IMAGES[name]
    if surface == "pipeline":
        refused(lambda: world.explain(make(world)), pattern)
    else:
        refused(lambda: explain_by("occlusion", world.split, make(world), 1), pattern)


# --- what the pipeline takes by name --------------------------------------------------------------------------------

PIPELINE_CLASSES: dict[str, tuple[dict[str, Any], list[list[int]]]] = {
    "top_k": ({"top_k": 7}, [[0, 1, 2, 3, 4, 5, 6]] * 2),  # in some order
    "top_k of numpy": ({"top_k": np.int64(7)}, [[0, 1, 2, 3, 4, 5, 6]] * 2),
    "class": ({"class_idx": 3}, [[3], [3]]),
    "class of numpy": ({"class_idx": np.int32(3)}, [[3], [3]]),
    "class in a tensor": ({"class_idx": torch.tensor(3)}, [[3], [3]]),
    "classes": ({"class_idx": [3, 1]}, [[3, 1], [3, 1]]),
    "classes in an array": ({"class_idx": np.array([3, 1])}, [[3, 1], [3, 1]]),
    "one class of each": ({"class_idx": [[3], [1]]}, [[3], [1]]),
    "one class of each in a tensor": ({"class_idx": torch.tensor([[3], [1]])}, [[3], [1]]),
    "classes of each": ({"class_idx": [(3, 0), (1, 2)]}, [[3, 0], [1, 2]]),
    "label": ({"label": "tabby"}, [[0], [0]]),
    "labels": ({"label": ("sports car", "tabby")}, [[6, 0], [6, 0]]),
    "label of each": ({"label": [["sports car"], ["tabby"]]}, [[6], [0]]),
}


@pytest.mark.parametrize("name", PIPELINE_CLASSES)
@pytest.mark.parametrize("batch_size", [1, 2])
def test_classes_of_the_pipeline(world, name, batch_size):
    options, expected = PIPELINE_CLASSES[name]
    images = [PICTURE, PICTURE.rotate(180)]
    results = world.explain(images, batch_size=batch_size, **options)
    found = [[result["class_idx"] for result in of_image] for of_image in results]
    assert (found if "top_k" not in options else [sorted(row) for row in found]) == expected
    for image, of_image in zip(images, results, strict=True):
        for result in of_image:
            (alone,) = world.explain(image, class_idx=result["class_idx"])
            assert np.allclose(result["attribution"], alone["attribution"], atol=1e-4)


NUMBER, PAIR = "pass a whole number", [PICTURE, PICTURE]
BAD_OPTIONS: dict[str, tuple[dict[str, Any], str]] = {
    "top_k text": ({"top_k": "2"}, f"top_k is '2'; {NUMBER} from 1 on"),
    "top_k zero": ({"top_k": 0}, f"top_k is 0; {NUMBER} from 1 on"),
    "top_k bool": ({"top_k": True}, f"top_k is True; {NUMBER}"),
    "top_k float": ({"top_k": 2.0}, f"top_k is 2.0; {NUMBER}"),
    "class float": ({"class_idx": 1.0}, f"class_idx is 1.0; {NUMBER}"),
    "class bool": ({"class_idx": True}, f"class_idx is True; {NUMBER}"),
    "class text": ({"class_idx": "tabby"}, "class_idx is 'tabby'; pass names as label="),
    "class beyond": ({"class_idx": 7}, "class_idx 7 is not a class of .*, which has 7, counted from 0"),
    "class below": ({"class_idx": -1}, "class_idx -1 is not a class"),
    "classes of floats": ({"class_idx": torch.tensor([1.0])}, f"class_idx is 1.0; {NUMBER}"),
    "no classes": ({"class_idx": []}, "No class was given; pass at least one"),
    "classes for one image": ({"class_idx": [[1]]}, "1 rows of classes for images that are no list"),
    "uneven classes": ({"class_idx": [[1], [1, 2]]}, "in one list, or a list of equally many for each"),
    "mixed classes": ({"class_idx": [[1], 2]}, "in one list, or a list of equally many for each"),
    "label number": ({"label": 3}, "label is 3; pass a class's name, or its number as class_idx="),
    "label unknown": ({"label": "taby"}, "'taby' is not a class of .*did you mean 'tabby'"),
    "label of two": ({"label": "crane"}, "'crane' names the classes .*class_idx"),
    "two choices": ({"label": "tabby", "top_k": 2}, "top_k, class_idx and label exclude one another"),
    "rule unknown": ({"rule": "magic"}, "Unknown rule 'magic'; choose one of"),
    "rule number": ({"rule": 3}, "rule is 3; pass its name"),
    "rule of a method without": ({"rule": "prob", "method": "rise"}, "rise takes no 'rule'; it takes"),
    "verify float": ({"verify": 2.5}, f"verify is 2.5; {NUMBER} from 1 on, for example 64"),
    "verify zero": ({"verify": 0}, "verify is 0"),
    "verify what adds up to nothing": ({"verify": 8, "method": "rise"}, "'rise' do not add up.*leave it out"),
    "verify too few": ({"verify": 4, "method": "sampled"}, "verify is 4; a correlation needs 8"),
    "refine text": ({"refine": "many"}, f"refine is 'many'; {NUMBER} from 1 on, for example 25"),
    "refine of two backgrounds": ({"refine": 4}, "refine needs an explainer of random backgrounds.*--backgrounds"),
    "refine of a method": ({"refine": 4, "method": "rise"}, "refine corrects the map of an explainer.*leave it out"),
    "timeout negative": ({"timeout": -1}, "timeout is -1; pass a number of seconds above 0"),
    "timeout text": ({"timeout": "1 s"}, "timeout is '1 s'; pass a number of seconds"),
    "timeout infinite": ({"timeout": float("inf")}, "timeout is inf; pass a number of seconds"),
    "on_error": ({"on_error": "ignore"}, "on_error is 'ignore'; pass 'skip' .* or 'raise'"),
    "batch_size": ({"batch_size": 0}, f"batch_size is 0; {NUMBER} from 1 on"),
    "num_workers": ({"num_workers": -1}, f"num_workers is -1; {NUMBER} from 0 on"),
    "unknown, near": ({"topk": 2}, "The pipeline takes no 'topk': did you mean 'top_k'"),
    "unknown, far": ({"zzz": 2}, "The pipeline takes no 'zzz'; it takes .*class_idx"),
    "prompts": ({"candidate_labels": ["a cat"]}, "takes no candidate_labels.*zero-shot model"),
    "prompts, a number": ({"candidate_labels": 3}, "takes no candidate_labels.*zero-shot model"),
    "method unknown": ({"method": "limee"}, "Unknown method 'limee'; choose one of .*lime"),
    "method number": ({"method": 3}, "method is 3; pass its name"),
    "options of the explainer": ({"method_kwargs": {"n_samples": 4}}, "method_kwargs are of another method"),
    "options, no dict": ({"method": "rise", "method_kwargs": 4}, "method_kwargs is 4; pass a dict"),
    "option unknown": (
        {"method": "rise", "method_kwargs": {"num_samples": 4}},
        "rise takes no 'num_samples': did you mean 'n_samples'",
    ),
    "option of text": ({"method": "rise", "method_kwargs": {"n_samples": "4"}}, f"n_samples is '4'; {NUMBER}"),
    "option zero": ({"method": "rise", "method_kwargs": {"n_samples": 0}}, f"n_samples is 0; {NUMBER} from 1 on"),
    "option odd": ({"method": "sampled", "method_kwargs": {"n_samples": 7}}, "is 7, but coalitions come in pairs"),
    "grid that does not divide": ({"method": "rise", "method_kwargs": {"grid_size": 3}}, "3 x 3 patches does not"),
    "grid of text": ({"method": "rise", "method_kwargs": {"grid_size": "4"}}, "'4' is no grid; pass whole numbers"),
    "method that needs more": ({"method": "vit_shapley"}, "vit_shapley needs shapley_explainer.*or use 'exact'"),
}


@pytest.mark.parametrize("name", BAD_OPTIONS)
def test_bad_options_of_the_pipeline_are_refused(world, name):
    options, pattern = BAD_OPTIONS[name]
    refused(lambda: world.explain(PICTURE, **options), pattern)
    assert world.explain(PICTURE, class_idx=1)[0]["class_idx"] == 1  # and it goes on working


def test_rows_for_other_images_are_refused(world):
    refused(lambda: world.explain(PAIR, class_idx=[[1], [2], [3]]), "3 rows of classes for 2 images; pass a list")


BAD_PIPELINES: dict[str, tuple[Callable[[SimpleNamespace], dict[str, Any]], str]] = {
    "number": (lambda w: {"classifier": 3}, "classifier is 3; pass an image classifier, its name or folder"),
    "explainer in its place": (lambda w: {"model": w.model, "classifier": w.split}, "is no explainer.*classifier="),
    "any module as explainer": (lambda w: {"model": w.split, "classifier": w.split}, "is no explainer.*classifier="),
    "explainer alone": (lambda w: {"model": w.explain.model}, "Which classifier is to be explained.*classifier="),
    "no explainer fits": (lambda w: {"classifier": w.split, "method": "tve"}, "No released explainer fits .*pretrain"),
    "no image processor": (lambda w: {"classifier": w.model}, "No image processor came with .*image_processor="),
    "method": (lambda w: {"classifier": w.split, "method": "limee"}, "Unknown method 'limee'; choose one of"),
    "unknown option": (lambda w: {"classifier": w.split, "methods": "rise"}, "did you mean 'method'"),
    "options, no dict": (lambda w: {"classifier": w.split, "method_kwargs": 4}, "method_kwargs is 4; pass a dict"),
    "classes of no images": (lambda w: {"classifier": w.split, "class_idx": [[1], [2]]}, "pass it with the images"),
}


@pytest.mark.parametrize("name", BAD_PIPELINES)
def test_bad_pipelines_are_refused(world, name):
    make, pattern = BAD_PIPELINES[name]
    refused(lambda: pipeline(TASK, **make(world)), pattern)


@pytest.mark.parametrize("rule", tve_hf.RULES)
def test_rules_of_two_backgrounds_are_refused_for_random_ones(world, rule):
    if not rule.startswith(("removed", "standardized")):
        assert world.random(PICTURE, rule=rule)[0]["rule"] == rule
    else:
        refused(
            lambda: world.random(PICTURE, rule=rule),
            f"'{rule}' is for explainers of two.*logit_averaged, prob, prob_averaged",
        )
        asked = {"explainer": world.random.model, "rule": rule}
        refused(lambda: explain_by("tve", world.split, world.x, 1, **asked), f"'{rule}' is for explainers of two")


@pytest.mark.parametrize("name", ["explainer", "sampled", "occlusion", "lime"])
def test_a_head_that_is_not_finite_is_named(world, name):
    """Finite for the embeddings of images, not for those beside them."""
    seen, probed = world.split.embed(world.x), []

    def head(embeddings: torch.Tensor) -> torch.Tensor:
        near = (embeddings.unsqueeze(-2) - seen).abs().amax(-1).amin(-1, keepdim=True) < 1e-3
        return torch.where(near | (not probed), embeddings[..., :2], torch.nan)

    odd = world.split.with_head(head)
    probed.append(True)
    image = world.x[:1]
    if name == "explainer":
        explain = pipeline(TASK, model=world.random.model, classifier=odd)
        refused(lambda: explain(PICTURE), "The head of .* gives NaN or infinity for .*base ± phi.*put a head on it")
    else:
        refused(lambda: explain_by(name, odd, image, 1), "head.*put a.* head on it")


# --- on_error -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("batch_size", [1, 2, 4])
def test_bad_images_of_a_list_are_passed_over(world, batch_size):
    images = [PICTURE, "nowhere.png", PIXELS, world.folder / "corrupt.png", 3]
    results = world.explain(images, on_error="skip", class_idx=1, batch_size=batch_size)
    assert [[*result[0]] == ["error"] for result in results] == [False, True, False, True, True]
    assert "'nowhere.png' does not exist" in results[1][0]["error"] and "The int 3" in results[4][0]["error"]
    (alone,) = world.explain(PICTURE, class_idx=1)
    for k in (0, 2):
        assert np.allclose(results[k][0]["attribution"], alone["attribution"], atol=1e-4)
    refused(lambda: world.explain(images), "'nowhere.png' does not exist")


# --- what methods and metrics take besides images -------------------------------------------------------------------

GOOD_CALLS: dict[str, Callable[[SimpleNamespace], torch.Tensor]] = {
    "tensors": lambda w: explain_by("occlusion", w.split, w.x, torch.tensor([1, 1])),
    "a model": lambda w: explain_by("occlusion", w.model, w.x, torch.tensor([1, 1])),
    "a name": lambda w: explain_by("occlusion", w.classifier, [PICTURE, PICTURE.rotate(180)], 1),
    "what the processor gave": lambda w: explain_by(
        "occlusion", w.split, w.split.image_processor([PICTURE, PICTURE.rotate(180)], return_tensors="pt"), 1
    ),
    "float64": lambda w: explain_by("occlusion", w.split, w.x.double(), 1),
    "a number": lambda w: explain_by("occlusion", w.split, w.x, 1),
    "a tensor without axes": lambda w: explain_by("occlusion", w.split, w.x, torch.tensor(1)),
    "a list": lambda w: explain_by("occlusion", w.split, w.x, [1, 1]),
    "an array": lambda w: explain_by("occlusion", w.split, w.x, np.array([1, 1])),
    "int32": lambda w: explain_by("occlusion", w.split, w.x, torch.tensor([1, 1], dtype=torch.int32)),
    "classes of each": lambda w: explain_by("occlusion", w.split, w.x, [[0, 1], [2, 1]])[:, 1],
    "a bare grid": lambda w: explain_by("occlusion", w.split, w.x, 1, GRID),
    "a grid of numpy": lambda w: explain_by("occlusion", w.split, w.x, 1, np.int64(GRID)),
    "a grid in a list": lambda w: explain_by("occlusion", w.split, w.x, 1, [GRID, GRID]),
    "a hyphen": lambda w: explain_by("occlusion", w.split, w.x, 1, chunk_size=3),
}


@pytest.mark.parametrize("name", GOOD_CALLS)
def test_calls_of_a_method(world, name):
    scores = GOOD_CALLS[name](world)
    expected = np.stack([by_hand(world, PICTURE), by_hand(world, PICTURE.rotate(180))])
    assert scores.shape == (2, GRID, GRID) and np.allclose(scores, expected, atol=1e-5)


MUST, KERNEL = "must name, for each of 2 images, a class", "pass a whole number"
BAD_CALLS: dict[str, tuple[Callable[[SimpleNamespace], Any], str]] = {
    "class beyond": (lambda w: explain_by("grad_cam", w.split, w.x, 7), f"{MUST} between 0 and 6"),
    "class below": (lambda w: explain_by("grad_cam", w.split, w.x, [-1, 0]), MUST),
    "class float": (lambda w: explain_by("grad_cam", w.split, w.x, 1.0), MUST),
    "class bool": (lambda w: explain_by("grad_cam", w.split, w.x, True), MUST),
    "class text": (lambda w: explain_by("grad_cam", w.split, w.x, "tabby"), f"class_idx 'tabby' {MUST}"),
    "class none": (lambda w: explain_by("grad_cam", w.split, w.x, None), f"class_idx None {MUST}"),
    "too few classes": (lambda w: explain_by("grad_cam", w.split, w.x, [1]), MUST),
    "uneven classes": (lambda w: explain_by("grad_cam", w.split, w.x, [[1], [1, 2]]), MUST),
    "no image": (lambda w: explain_by("grad_cam", w.split, w.x[:0], 1), "holds no image; pass a batch"),
    "one image": (lambda w: explain_by("grad_cam", w.split, w.x[0], 1), r"of one image; pass .*unsqueeze\(0\)"),
    "channels last": (
        lambda w: explain_by("grad_cam", w.split, w.x.permute(0, 2, 3, 1), 1),
        r"with channels last; pass pixel_values.permute\(0, 3, 1, 2\)",
    ),
    "whole numbers": (lambda w: explain_by("grad_cam", w.split, w.x.byte(), 1), "torch.uint8; pass what the image"),
    "no axes": (lambda w: explain_by("grad_cam", w.split, torch.tensor(1.0), 1), "holds no image"),
    "five axes": (lambda w: explain_by("grad_cam", w.split, w.x[None], 1), r"are no images; pass a batch, \(B, 3"),
    "NaN": (lambda w: explain_by("grad_cam", w.split, w.x / 0, 1), "hold NaN or infinity"),
    "no processor": (lambda w: explain_by("grad_cam", w.model, PICTURE, 1), "came without an image processor.*pass"),
    "no classifier": (lambda w: explain_by("grad_cam", 3, w.x, 1), "classifier is 3; pass an image classifier"),
    "train mode": (lambda w: explain_by("grad_cam", in_train_mode(w), w.x, 1), r"train mode.*eval\(\)"),
    "split in train mode": (lambda w: explain_by("grad_cam", split_in_train_mode(w), w.x, 1), r"train mode.*eval\(\)"),
    "method": (lambda w: explain_by("limee", w.split, w.x, 1), "Unknown method 'limee'; choose one of"),
    "method number": (lambda w: explain_by(3, w.split, w.x, 1), "Unknown method 3; choose one of"),
    "option": (lambda w: explain_by("rise", w.split, w.x, 1, samples=4), "no 'samples': did you mean 'n_samples'"),
    "option of text": (lambda w: explain_by("rise", w.split, w.x, 1, n_samples="4"), f"n_samples is '4'; {KERNEL}"),
    "option float": (lambda w: explain_by("ig", w.split, w.x, 1, n_steps=5.0), f"n_steps is 5.0; {KERNEL}"),
    "hops below": (lambda w: explain_by("exact", w.split, w.x, 1, hops=-1), f"hops is -1; {KERNEL} from 0 on"),
    "rule": (lambda w: explain_by("exact", w.split, w.x, 1, rule="magic"), "Unknown rule 'magic'; choose"),
    "removal": (lambda w: explain_by("exact", w.split, w.x, 1, removal="magic"), "Unknown removal operator 'magic'"),
    "grid zero": (lambda w: explain_by("rise", w.split, w.x, 1, 0), "0 is no grid; pass whole numbers"),
    "grid float": (lambda w: explain_by("rise", w.split, w.x, 1, 4.0), "4.0 is no grid"),
    "grid of three": (lambda w: explain_by("rise", w.split, w.x, 1, (4, 4, 4)), r"\(4, 4, 4\) is no grid"),
    "grid that does not divide": (lambda w: explain_by("rise", w.split, w.x, 1, 3), "3 x 3 patches does not divide"),
    "explainer missing": (lambda w: explain_by("tve", w.split, w.x, 1), "tve needs explainer.*or use 'exact'"),
    "sampled: option": (
        lambda w: tve_hf.sampled_meta_attribution(w.split, w.x, num_sample=4),
        "sampled_meta_attribution takes no 'num_sample': did you mean 'num_samples'",
    ),
    "sampled: number": (lambda w: tve_hf.sampled_meta_attribution(w.split, w.x, GRID, 8.0), f"8.0; {KERNEL}"),
    "sampled: no image": (lambda w: tve_hf.sampled_meta_attribution(w.split, w.x[:0]), "holds no image"),
    "exact: option": (
        lambda w: tve_hf.exact_meta_attribution(w.split, w.x, hop=1),
        "exact_meta_attribution takes no 'hop': did you mean 'hops'",
    ),
    "exact: hops": (lambda w: tve_hf.exact_meta_attribution(w.split, w.x, GRID, 1.5), f"hops is 1.5; {KERNEL}"),
    "exact: file": (lambda w: tve_hf.exact_meta_attribution(w.split, "nowhere.png"), "'nowhere.png' does not exist"),
    "fidelity: scores": (lambda w: tve_hf.fidelity(w.split, w.x, torch.zeros(16), 1), r"scores is \(16,\); pass a"),
    "fidelity: no tensor": (lambda w: tve_hf.fidelity(w.split, w.x, [0.0], 1), "scores is list; pass a tensor"),
    "fidelity: classes": (lambda w: tve_hf.fidelity(w.split, w.x, w.scores, [1]), MUST),
    "fidelity: levels": (
        lambda w: tve_hf.fidelity(w.split, w.x, w.scores, 1, num_levels=5.0),
        f"num_levels is 5.0; {KERNEL}",
    ),
    "fidelity: option": (lambda w: tve_hf.fidelity(w.split, w.x, w.scores, 1, level=5), "takes no 'level': did you"),
}


def in_train_mode(world: SimpleNamespace) -> torch.nn.Module:
    return ViTForImageClassification.from_pretrained(world.classifier).train()


def split_in_train_mode(world: SimpleNamespace) -> torch.nn.Module:
    return tve_hf.split_classifier(world.classifier).train()


@pytest.mark.parametrize("name", BAD_CALLS)
def test_bad_calls_are_refused(world, name):
    action, pattern = BAD_CALLS[name]
    refused(lambda: action(world), pattern)


def test_metrics_and_samples_take_what_methods_take(world):
    images = [PICTURE, PICTURE.rotate(180)]
    by_tensors = tve_hf.fidelity(world.split, world.x, world.scores, torch.tensor([1, 1]))
    by_images = tve_hf.fidelity(world.split, images, world.scores, 1)
    torch.testing.assert_close(by_images.plus, by_tensors.plus)
    for function, options in (
        (tve_hf.exact_meta_attribution, {"grid_size": GRID, "hops": 1}),
        (tve_hf.sampled_meta_attribution, {"grid_size": GRID, "num_samples": 8}),
    ):
        kept, removed = function(world.split, world.x, **options)
        for classifier, given in ((world.split, images), (world.model, world.x), (world.classifier, images)):
            again, without = function(classifier, given, **options)
            torch.testing.assert_close(again, kept)
            torch.testing.assert_close(without, removed)


# --- the command line -----------------------------------------------------------------------------------------------

COMMANDS: dict[str, tuple[list[str], str]] = {
    "missing image": (["nowhere.png"], "nowhere.png.* does not exist"),
    "corrupt image": (["{folder}/corrupt.png"], "corrupt.png.* is corrupt or in no format"),
    "unknown label": (["{folder}/a photo.png", "--label", "taby"], "did you mean 'tabby'"),
    "no class": (["{folder}/a photo.png", "--top-k", "0"], "top_k is 0; pass a whole number"),
    "refine": (["{folder}/a photo.png", "--refine", "4"], "refine needs an explainer of random backgrounds"),
    "verify": (["{folder}/a photo.png", "--verify", "0"], "verify is 0; pass a whole number"),
}


@pytest.mark.parametrize("name", COMMANDS)
def test_the_command_line_refuses_in_one_sentence(world, name, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    arguments, pattern = COMMANDS[name]
    if not (world.folder / "explainer").exists():
        world.explain.model.save_pretrained(world.folder / "explainer")
    models = ["--classifier", world.classifier, "--model", str(world.folder / "explainer")]
    status = main(["explain", *(text.format(folder=world.folder) for text in arguments), *models])
    said = [line for line in capsys.readouterr().err.splitlines() if line.startswith("tve-hf: ")]
    assert status == 1 and len(said) == 1 and re.search(pattern, said[0]), said
    assert not list(Path(tmp_path).rglob("*.png"))
