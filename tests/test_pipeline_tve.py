"""The pipeline against its parts put together by hand, for every kind of input, good and bad."""

import io
import logging
import pickle
import threading
from functools import partial
from http.server import HTTPServer, SimpleHTTPRequestHandler

import datasets
import numpy as np
import pytest
import torch
from PIL import Image
from tiny import GRID, HOPS, LABELS, SIDE, noise_image, save_classifier, save_pair
from torch import nn
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModel,
    CLIPImageProcessorPil,
    ViTForImageClassification,
    ViTImageProcessorPil,
    pipeline,
)
from transformers.pipelines.pt_utils import KeyDataset

import tve_hf
from tve_hf.pipeline_tve import TransferableAttributionPipeline

TASK = "transferable-attribution"
KEYS = {"label", "class_idx", "score", "attribution", "method", "rule", "quality", "heatmap", "overlay", "figure"}
IMAGES = [noise_image(seed, (40 + seed, 36)) for seed in range(4)]


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    return save_pair(tmp_path_factory.mktemp("pair"))


@pytest.fixture(scope="module")
def explain(pair):
    classifier, explainer = pair
    return pipeline(TASK, model=str(explainer), classifier=str(classifier))


@pytest.fixture
def site(tmp_path, monkeypatch):
    class Quiet(SimpleHTTPRequestHandler):
        def log_message(self, *args):
            pass

    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    with HTTPServer(("127.0.0.1", 0), partial(Quiet, directory=tmp_path)) as server:
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


def assert_same(results, expected, tolerance=1e-4):
    """Compare what the pipeline gives for several images; batches round in another order than single images."""
    assert len(results) == len(expected)
    for result, other in zip(results, expected, strict=True):
        assert [r["class_idx"] for r in result] == [o["class_idx"] for o in other]
        for r, o in zip(result, other, strict=True):
            assert np.allclose(r["attribution"], o["attribution"], atol=tolerance)
            assert abs(r["score"] - o["score"]) < tolerance
            assert r["overlay"].size == o["overlay"].size


# The result


def test_result_equals_the_parts_put_together_by_hand(pair, explain):
    folder, explainer_folder = pair
    (result,) = explain(IMAGES[0], rule="log_prob")
    assert set(result) == KEYS
    model = ViTForImageClassification.from_pretrained(folder)
    explainer = tve_hf.TVEExplainer.from_pretrained(explainer_folder)
    pixel_values = AutoImageProcessor.from_pretrained(folder)(IMAGES[0], return_tensors="pt")["pixel_values"]
    with torch.no_grad():
        output = model(pixel_values, output_hidden_states=True)
        probabilities = output.logits.softmax(-1)[0]
        y = int(probabilities.argmax())
        names = explainer.config.feature_names  # vit.encoder.layer.<i> or the like
        chosen = [output.hidden_states[int(name.rpartition(".")[2]) + 1] for name in names]
        features = tuple(tokens[:, 1:].transpose(1, 2).unflatten(2, (4, 4)) for tokens in chosen)
        embeddings = model.vit(pixel_values).last_hidden_state[:, 0]
        predicted = explainer(pixel_values=pixel_values, features=features, embeddings=embeddings)
        kept, removed = (
            model.classifier(part).log_softmax(-1)[0, :, y] for part in (predicted.kept, predicted.removed)
        )
    assert (result["class_idx"], result["label"], result["rule"]) == (y, LABELS[y], "log_prob")
    assert result["score"] == pytest.approx(float(probabilities[y]), abs=1e-6)
    assert result["attribution"].shape == (GRID, GRID) and result["attribution"].dtype == np.float32
    assert np.allclose(result["attribution"], (kept - removed).view(GRID, GRID), atol=1e-5)
    assert result["attribution"].min() < 0 < result["attribution"].max()
    assert result["heatmap"].shape == (36, 40) and result["heatmap"].dtype == np.float32
    assert 0 <= result["heatmap"].min() < 0.5 < result["heatmap"].max() <= 1
    assert result["overlay"].size == (40, 36) and result["overlay"].mode == "RGB"


def test_classes_by_rank_index_and_name(explain):
    ranked = explain(IMAGES[0], top_k=3)
    scores = [result["score"] for result in ranked]
    assert scores == sorted(scores, reverse=True) and ranked[0]["class_idx"] == explain(IMAGES[0])[0]["class_idx"]
    everything = explain(IMAGES[0], top_k=100)
    assert sorted(result["class_idx"] for result in everything) == list(range(len(LABELS)))
    assert sum(result["score"] for result in everything) == pytest.approx(1, abs=1e-5)
    by_index = {result["class_idx"]: result for result in everything}

    def indices(**asked):
        results = explain(IMAGES[0], **asked)
        for result in results:
            assert np.allclose(result["attribution"], by_index[result["class_idx"]]["attribution"], atol=1e-5)
        return [result["class_idx"] for result in results]

    assert indices(class_idx=0) == indices(class_idx=np.int64(0)) == indices(class_idx=torch.tensor(0)) == [0]
    assert indices(class_idx=[2, 0]) == indices(class_idx=torch.tensor([2, 0])) == [2, 0]
    assert indices(label="tabby, tabby cat") == indices(label=" Tabby ") == indices(label="tabby cat") == [0]
    assert indices(label=["sports car", "TABBY"]) == [6, 0]
    assert indices(label="cardigan") == indices(label="Cardigan") == [3]  # a whole name, before a synonym in class 2
    assert indices(label="Welsh corgi") == [2]


def test_call_overrides_what_the_pipeline_was_made_with(pair):
    classifier, explainer = pair
    explain = pipeline(TASK, model=str(explainer), classifier=str(classifier), label="tabby", rule="logit")
    (result,) = explain(IMAGES[0])
    assert (result["class_idx"], result["rule"]) == (0, "logit")
    assert len(explain(IMAGES[0], top_k=2)) == 2
    assert explain(IMAGES[0], class_idx=3)[0]["class_idx"] == 3
    assert explain(IMAGES[0], rule="log_prob")[0]["rule"] == "log_prob"
    assert explain(IMAGES[0])[0]["class_idx"] == 0


@pytest.mark.parametrize("rule", tve_hf.RULES)
def test_every_rule_is_named_and_is_that_of_transfer(explain, rule):
    (result,) = explain(IMAGES[1], rule=rule)
    classifier, model = explain.classifier, explain.model
    with torch.no_grad():
        pixel_values = explain.image_processor(IMAGES[1], return_tensors="pt")["pixel_values"]
        seen = classifier(pixel_values)
        predicted = model(pixel_values=pixel_values, features=seen.features, embeddings=seen.embeddings)
        class_idx = seen.logits.argmax(-1)
        scores = tve_hf.transfer(predicted.kept, predicted.removed, classifier, class_idx, rule, GRID, HOPS)
    assert result["rule"] == rule
    assert np.allclose(result["attribution"].ravel(), scores[0], atol=1e-5)


def test_default_rule_is_named(explain):
    assert isinstance(explain, TransferableAttributionPipeline) and explain.task == TASK
    assert explain(IMAGES[0])[0]["rule"] == tve_hf.DEFAULT_RULE


def test_verification_compares_with_the_exact_attribution(explain):
    (result,) = explain(IMAGES[2], verify=GRID * GRID, rule="log_prob")
    assert set(result) == KEYS | {"verification"}
    found = result["verification"]
    assert (found["num_patches"], found["rule"]) == (GRID * GRID, "log_prob")
    pixel_values = explain.image_processor(IMAGES[2], return_tensors="pt")["pixel_values"]
    kept, removed = tve_hf.exact_meta_attribution(explain.classifier, pixel_values, GRID, HOPS)
    with torch.no_grad():
        class_idx = torch.tensor([result["class_idx"]])
        exact = tve_hf.transfer(kept, removed, explain.classifier, class_idx, "log_prob")[0].numpy()
    predicted = result["attribution"].ravel()
    assert found["pearson"] == pytest.approx(np.corrcoef(exact, predicted)[0, 1], abs=1e-3)
    assert found["error"] == pytest.approx(np.abs(exact - predicted).mean(), rel=1e-3)
    assert {"spearman", "kept_error", "removed_error", "epsilon", "bound"} < set(found)
    # For each class and image of a batch its own; the same patches whatever else is in the batch.
    batch = explain(IMAGES[:3], verify=3, top_k=2, batch_size=3)
    alone = explain(IMAGES[2], verify=3, top_k=2)
    assert [len(results) for results in batch] == [2, 2, 2]
    assert len({results[k]["verification"]["pearson"] for results in batch for k in range(2)}) == 6
    for result, other in zip(alone, batch[2], strict=True):
        assert result["verification"]["pearson"] == pytest.approx(other["verification"]["pearson"], abs=1e-3)
    assert all(result["verification"]["num_patches"] == 3 for result in alone)


def test_verification_costs_the_same_passes_for_all_classes(pair, explain):
    model = ViTForImageClassification.from_pretrained(pair[0])
    explain = pipeline(TASK, model=str(pair[1]), classifier=model, image_processor=explain.image_processor)
    images_seen = []
    model.register_forward_hook(lambda module, args, output: images_seen.append(len(output.logits)))
    explain(IMAGES[0], verify=4, top_k=3)
    # To classify it; 4 patches kept and removed; and once more whole and empty, to measure errors from.
    assert sum(images_seen) == 1 + 2 * 4 + 2


def test_multi_label_score_is_a_sigmoid(tmp_path):
    classifier, explainer = save_pair(tmp_path, problem_type="multi_label_classification")
    explain = pipeline(TASK, model=str(explainer), classifier=str(classifier))
    pixel_values = explain.image_processor(IMAGES[0], return_tensors="pt")["pixel_values"]
    with torch.no_grad():
        logits = ViTForImageClassification.from_pretrained(classifier)(pixel_values).logits[0]
    for result in explain(IMAGES[0], top_k=3):
        assert result["score"] == pytest.approx(float(logits[result["class_idx"]].sigmoid()), abs=1e-6)


# Inputs


def test_every_kind_of_one_image(explain, tmp_path, site):
    IMAGES[0].save(tmp_path / "a.png")
    (expected,) = explain(IMAGES[0])
    pixels = np.asarray(IMAGES[0])
    for image in (
        str(tmp_path / "a.png"),
        tmp_path / "a.png",
        f"{site}/a.png",
        pixels,
        pixels / 255,
        torch.from_numpy(pixels.copy()).permute(2, 0, 1),
        {"bytes": (tmp_path / "a.png").read_bytes(), "path": None},
    ):
        assert_same([explain(image)], [[expected]])


@pytest.mark.parametrize("batch_size", [1, 3])
def test_every_kind_of_several_images_in_order(explain, tmp_path, batch_size):
    for index, image in enumerate(IMAGES):
        image.save(tmp_path / f"{index}.png")
    paths = [tmp_path / f"{index}.png" for index in range(len(IMAGES))]
    expected = [explain(image, top_k=2) for image in IMAGES]
    features = datasets.Features({"image": datasets.Image()})
    data = datasets.Dataset.from_dict({"image": [str(path) for path in paths]}, features=features)
    as_paths = data.cast_column("image", datasets.Image(decode=False))
    for images in (
        IMAGES,
        tuple(IMAGES),
        [str(paths[0]), paths[1], IMAGES[2], np.asarray(IMAGES[3])],
        (image for image in IMAGES),
        map(Image.open, paths),
        data["image"],
        as_paths["image"],
        data.to_iterable_dataset()["image"],
        KeyDataset(data, "image"),
    ):
        lazy = not isinstance(images, (list, tuple))
        results = explain(images, batch_size=batch_size, top_k=2)
        assert isinstance(results, list) != lazy
        assert_same(list(results), expected)


def test_workers_and_pickling(explain):
    assert_same(list(explain(IMAGES, num_workers=1, batch_size=2)), [explain(image) for image in IMAGES])
    assert_same([pickle.loads(pickle.dumps(explain))(IMAGES[0])], [explain(IMAGES[0])])


# One pass, no traces


def test_one_pass_of_each_model_per_batch_and_no_gradients(pair, explain):
    model = ViTForImageClassification.from_pretrained(pair[0])
    state = {name: (module.training, len(module._forward_hooks)) for name, module in model.named_modules()}
    explain = pipeline(TASK, model=str(pair[1]), classifier=model, image_processor=explain.image_processor)
    explain(IMAGES[0])  # in which the head is folded into the explainer, and compared with what it does without
    passes = []
    outputs = []
    last = explain.model.trunk.norm  # of what the folded head reads
    handles = [
        model.register_forward_hook(lambda module, args, output: passes.append("classifier")),
        last.register_forward_hook(lambda module, args, output: passes.append("explainer")),
        last.register_forward_hook(lambda module, args, output: outputs.append(output)),
    ]
    explain(IMAGES, batch_size=2, top_k=3)
    assert passes == ["classifier", "explainer"] * 2
    assert not any(output.requires_grad for output in outputs)
    for handle in handles:
        handle.remove()
    assert all(parameter.grad is None for module in (model, explain.model) for parameter in module.parameters())
    after = {name: (module.training, len(module._forward_hooks)) for name, module in model.named_modules()}
    assert after == state
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_classifier_as_name_path_model_or_split(pair, explain):
    folder, explainer = pair
    expected = [explain(IMAGES[0])]
    model = ViTForImageClassification.from_pretrained(folder)
    split = tve_hf.split_classifier(folder)
    for classifier in (folder, split, tve_hf.split_classifier(model, explain.image_processor)):
        assert_same([pipeline(TASK, model=str(explainer), classifier=classifier)(IMAGES[0])], expected)
    torch.manual_seed(3)
    head = nn.Linear(24, 2)
    other = split.with_head(head, id2label={0: "cat", 1: "dog"})
    explain_other = pipeline(TASK, model=str(explainer), classifier=other)
    (result,) = explain_other(IMAGES[0], label="dog", rule="logit")
    with torch.no_grad():
        pixel_values = explain.image_processor(IMAGES[0], return_tensors="pt")["pixel_values"]
        probability = head(model.vit(pixel_values).last_hidden_state[:, 0]).softmax(-1)[0, 1]
    assert (result["label"], result["class_idx"]) == ("dog", 1)
    assert result["score"] == pytest.approx(float(probability), abs=1e-5)


def test_the_users_image_processor_takes_the_place_of_the_classifiers(pair, explain, tmp_path):
    folder, explainer = pair
    turned = _Mirrored(size={"height": SIDE, "width": SIDE})
    image = IMAGES[0].resize((SIDE, SIDE))
    expected = explain(image.transpose(Image.Transpose.FLIP_LEFT_RIGHT), class_idx=1)
    assert expected[0]["score"] != pytest.approx(explain(image, class_idx=1)[0]["score"], abs=1e-4)
    model = ViTForImageClassification.from_pretrained(folder)
    split = tve_hf.split_classifier(folder)
    own = split.image_processor
    for classifier in (str(folder), model, split):
        mirrored = pipeline(TASK, model=str(explainer), classifier=classifier, image_processor=turned)
        assert mirrored.image_processor is turned
        mirrored._regions[image.size] = (0, 0, SIDE, SIDE)  # a mirrored ramp has no region
        assert_same([mirrored(image, class_idx=1)], [expected])
    assert split.image_processor is own  # the user's classifier stays as it was
    _resize(SIDE).save_pretrained(tmp_path / "processor")
    named = pipeline(TASK, model=str(explainer), classifier=model, image_processor=str(tmp_path / "processor"))
    assert_same([named(IMAGES[0])], [explain(IMAGES[0])])


class _Mirrored(ViTImageProcessorPil):
    def preprocess(self, images, *args, **kwargs):
        images = images if isinstance(images, list) else [images]
        return super().preprocess([x.transpose(Image.Transpose.FLIP_LEFT_RIGHT) for x in images], *args, **kwargs)


def test_an_explainers_image_processor_serves_a_classifier_without_one(pair, explain, tmp_path):
    explain.save_pretrained(tmp_path / "saved")
    model = ViTForImageClassification.from_pretrained(pair[0])
    assert_same([pipeline(TASK, model=str(tmp_path / "saved"), classifier=model)(IMAGES[0])], [explain(IMAGES[0])])
    # But a classifier's own is right for its predictions.
    _resize(48).save_pretrained(tmp_path / "saved")
    again = pipeline(TASK, model=str(tmp_path / "saved"), classifier=str(pair[0]))
    assert again.image_processor.size == {"height": SIDE, "width": SIDE}


def test_bfloat16(pair, explain):
    folder, explainer = pair
    half = pipeline(TASK, model=str(explainer), classifier=str(folder), dtype=torch.bfloat16)
    assert half.classifier.dtype == half.model.dtype == torch.bfloat16
    (result,) = half(IMAGES[0], class_idx=1, verify=2, rule="log_prob")
    (full,) = explain(IMAGES[0], class_idx=1, rule="log_prob")
    assert result["attribution"].dtype == np.float32
    assert result["score"] == pytest.approx(full["score"], abs=0.05)
    assert np.corrcoef(result["attribution"].ravel(), full["attribution"].ravel())[0, 1] > 0.98
    # A classifier that the user loaded stays in its precision.
    mixed = pipeline(TASK, model=str(explainer), classifier=tve_hf.split_classifier(folder), dtype=torch.bfloat16)
    assert (mixed.classifier.dtype, mixed.model.dtype) == (torch.float32, torch.bfloat16)
    assert mixed(IMAGES[0])[0]["score"] == pytest.approx(explain(IMAGES[0])[0]["score"], abs=1e-6)


# Geometry


def test_map_lies_on_the_part_that_a_centre_crop_shows(tmp_path):
    size = {"height": SIDE, "width": SIDE}
    processor = CLIPImageProcessorPil(size={"shortest_edge": SIDE}, crop_size=size)
    classifier, explainer = save_pair(tmp_path, processor=processor)
    explain = pipeline(TASK, model=str(explainer), classifier=str(classifier))
    image = noise_image(0, (96, 48))
    (result,) = explain(image)
    assert result["overlay"].size == (96, 48)
    assert result["heatmap"].shape == (48, 96)
    assert (result["heatmap"][:, :23] == 0.5).all() and (result["heatmap"][:, 73:] == 0.5).all()
    shown = result["heatmap"][:, 24:72]
    assert np.ptp(shown[:, :4]) > 0 and np.ptp(shown[:, -4:]) > 0
    # The strongest patch has the sign of its score.
    row, col = np.unravel_index(np.abs(result["attribution"]).argmax(), (GRID, GRID))
    middle = shown[12 * row + 6, 12 * col + 6]
    assert abs(middle - 0.5) > 0.4 and np.sign(middle - 0.5) == np.sign(result["attribution"][row, col])


def test_pictures_are_bounded_and_smooth_unless_asked_otherwise(explain):
    large = noise_image(0, (1700, 100))
    (result,) = explain(large)
    assert result["overlay"].size == (1600, 94) and result["heatmap"].shape == (94, 1600)
    (result,) = explain(large, max_size=None, smooth=False)
    assert result["overlay"].size == (1700, 100)
    assert len(np.unique(result["heatmap"])) <= GRID**2
    assert result["figure"].width > result["figure"].height


def test_photograph_turned_by_exif_is_explained_upright(explain, tmp_path):
    upright = noise_image(5, (30, 50))
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned clockwise by 90 degrees
    upright.transpose(Image.Transpose.ROTATE_90).save(tmp_path / "turned.png", exif=exif)
    result = explain(str(tmp_path / "turned.png"))
    assert result[0]["overlay"].size == (30, 50) and result[0]["heatmap"].shape == (50, 30)
    assert_same([result], [explain(upright)])


# Saving


def test_round_trip(pair, explain, tmp_path):
    explain.save_pretrained(tmp_path / "saved")
    assert not list((tmp_path / "saved").glob("*.py"))
    again = pipeline(TASK, model=str(tmp_path / "saved"), classifier=str(pair[0]))
    assert_same([again(image) for image in IMAGES], [explain(image) for image in IMAGES], tolerance=1e-6)
    config = AutoConfig.from_pretrained(tmp_path / "saved")
    assert isinstance(config, tve_hf.TVEConfig)
    assert config.backbone_fingerprint == explain.classifier.fingerprint()
    assert isinstance(AutoModel.from_pretrained(tmp_path / "saved"), tve_hf.TVEExplainer)
    assert AutoImageProcessor.from_pretrained(tmp_path / "saved").size == {"height": SIDE, "width": SIDE}


def test_shipped_checkpoints_need_no_arguments():
    (result,) = pipeline(TASK)(noise_image(0, (80, 60)), verify=8)
    assert set(result) == KEYS | {"verification"} and result["overlay"].size == (80, 60)


# Bad input


def refused(action, *parts):
    """Check that an action is refused in one sentence with these parts."""
    with pytest.raises((ValueError, TypeError, OSError)) as caught:
        action()
    message = str(caught.value)
    assert "\n" not in message and len(message) < 600, message
    for part in parts:
        assert str(part) in message, message


@pytest.fixture
def bad_images(tmp_path, monkeypatch):
    """Bad inputs by name: (what is passed, what the message must say)."""
    buffer = io.BytesIO()
    Image.effect_noise((64, 64), 50).save(buffer, "PNG")
    (tmp_path / "corrupt.png").write_bytes(b"no image at all")
    (tmp_path / "truncated.png").write_bytes(buffer.getvalue()[:1000])
    (tmp_path / "empty.png").touch()
    noise_image(0, (300, 300)).save(tmp_path / "bomb.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10_000)
    named = {name: ("again",) for name in ("truncated", "empty")}
    named |= {"corrupt": ("PNG",), "bomb": ("shrink",), "missing": ("check the path",)}
    table = {k: (tmp_path / f"{k}.png", (f"{k}.png", *parts)) for k, parts in named.items()}
    return table | {
        "directory": (tmp_path, (tmp_path.name, "list of the files")),
        "number": (3, ("int", "pass a path")),
        "nan": (np.full((8, 8, 3), np.nan), ("(8, 8, 3)", "NaN")),
        "channels": (np.zeros((8, 8, 5)), ("(8, 8, 5)", "not one image")),
    }


@pytest.mark.parametrize(
    "kind", ["corrupt", "truncated", "empty", "bomb", "missing", "directory", "number", "nan", "channels"]
)
def test_bad_images_are_named_in_every_mode(explain, bad_images, kind):
    image, parts = bad_images[kind]
    refused(lambda: explain(image), *parts)
    refused(lambda: explain([IMAGES[0], image]), *parts)
    refused(lambda: explain([IMAGES[0], image, IMAGES[1]], batch_size=3), *parts)
    refused(lambda: list(explain(x for x in [IMAGES[0], image])), *parts)
    assert_same([explain(IMAGES[0])], [explain(IMAGES[0])])  # and the pipeline goes on working


def test_bad_row_of_a_column_is_named(explain):
    good = io.BytesIO()
    IMAGES[0].save(good, "PNG")
    rows = [{"bytes": good.getvalue(), "path": None}, {"bytes": b"no image", "path": None}]
    data = datasets.Dataset.from_dict({"photo": rows}, features=datasets.Features({"photo": datasets.Image()}))
    streamed = data.to_iterable_dataset()
    for column in (data["photo"], streamed["photo"], KeyDataset(data, "photo")):
        results = iter(explain(column))
        assert next(results)[0]["overlay"].size == IMAGES[0].size
        refused(lambda results=results: next(results), "Row 1", "'photo'")
    refused(lambda: explain(data), "Dataset", "column")
    refused(lambda: explain(streamed), "IterableDataset", "column")


@pytest.mark.parametrize("make", [lambda: [], lambda: (), lambda: None, lambda: (x for x in ()), lambda: iter([])])
def test_no_image_is_refused(explain, make):
    refused(lambda: explain(make()), "No image was given", "pass a path")


def test_empty_column_is_refused(explain):
    data = datasets.Dataset.from_dict({"image": [IMAGES[0]]}, features=datasets.Features({"image": datasets.Image()}))
    streamed, data = data.to_iterable_dataset().take(0), data.select([])
    for column in (data["image"], streamed["image"], KeyDataset(data, "image")):
        refused(lambda column=column: explain(column), "No image was given")


def test_unknown_and_ambiguous_classes_are_refused(pair, explain):
    name = str(pair[0])
    refused(lambda: explain(IMAGES[0], label="taby"), "'taby'", name, "did you mean", "'tabby'")
    refused(lambda: explain(IMAGES[0], label=["tabby", "car"]), "'car'", "sports car")
    refused(lambda: explain(IMAGES[0], label="xyzxyz"), "'xyzxyz'", "id2label")
    refused(lambda: explain(IMAGES[0], label="crane"), "'crane'", "4", "5", "class_idx")
    refused(lambda: explain(IMAGES[0], class_idx=7), "7", name, "counted from 0")
    refused(lambda: explain(IMAGES[0], class_idx=-1), "-1")
    refused(lambda: explain(IMAGES[0], class_idx=[0, 99]), "99")
    refused(lambda: explain(IMAGES[0], class_idx=[]), "at least one")
    refused(lambda: explain(IMAGES[0], label=[]), "at least one")
    refused(lambda: explain(IMAGES[0], top_k=0), "top_k is 0")
    refused(lambda: explain(IMAGES[0], verify=0), "verify is 0")
    refused(lambda: explain(IMAGES[0], top_k=2, label="tabby"), "exclude one another")
    refused(lambda: explain(IMAGES[0], rule="magic"), "'magic'", "log_prob")
    refused(lambda: pipeline(TASK, model=str(pair[1]), classifier=name, label="taby"), "'tabby'")


class TwoHeads(nn.Module):
    """Takes the larger of two heads' logits, so that no weighted sum of modules gives them."""

    def __init__(self):
        super().__init__()
        self.body = nn.Conv2d(3, 24, 8, stride=8)
        self.heads = nn.ModuleList(nn.Linear(24, 5) for _ in range(2))

    def forward(self, pixel_values):
        embedding = self.body(pixel_values).mean((2, 3))
        return self.heads[0](embedding).maximum(self.heads[1](embedding))


def test_classifiers_that_cannot_serve_are_refused(pair, explain, tmp_path):
    folder, explainer = pair

    def build(classifier):
        return lambda: pipeline(TASK, model=str(explainer), classifier=classifier)

    model = ViTForImageClassification.from_pretrained(folder)
    split = tve_hf.split_classifier(model, explain.image_processor)
    refused(lambda: pipeline(TASK, model=str(explainer)), "classifier=", "'classifier'")
    refused(build(TwoHeads().eval()), "Cannot split", "wrap it")
    model.vit.save_pretrained(tmp_path / "headless")
    explain.image_processor.save_pretrained(tmp_path / "headless")
    refused(build(tmp_path / "headless"), "headless", "classifier.bias", "no trained head")
    refused(build(model), "image processor", "image_processor=")
    refused(build(split.train()), "train mode", "eval()")
    split.eval()
    refused(build(model.train()), "train mode", "eval()")
    model.eval()
    with torch.no_grad():
        model.classifier.bias[0] = torch.nan
    refused(build(split), str(folder), "NaN", "again")
    refused(build(model), str(folder), "NaN", "again")
    refused(lambda: pipeline(TASK, model=str(folder), classifier=str(folder)), str(folder), "no explainer", "model=")


def test_explainers_that_do_not_fit_are_refused(pair, tmp_path):
    folder, explainer = pair
    other = {
        "wide": save_classifier(tmp_path / "wide", hidden_size=32),
        "large": save_classifier(tmp_path / "large", processor=_resize(48), image_size=48),
        "bright": save_classifier(tmp_path / "bright", processor=_resize(SIDE, image_mean=[0.4, 0.5, 0.6])),
        "deep": save_classifier(tmp_path / "deep", num_hidden_layers=3),
    }

    def build(name):
        return lambda: pipeline(TASK, model=str(explainer), classifier=str(other[name]))

    remedy = "pre-train one with `tve-hf pretrain`"
    refused(build("wide"), explainer, other["wide"], "24", "32", remedy)
    refused(build("large"), explainer, other["large"], "(32, 32)", "(48, 48)", remedy)
    refused(build("bright"), explainer, other["bright"], "image_mean", "0.4", remedy)
    refused(build("deep"), explainer, other["deep"], "'classifier'", remedy)


def _resize(side, **settings):
    return ViTImageProcessorPil(size={"height": side, "width": side}, **settings)


def test_features_are_read_where_the_explainer_was_trained_to_read_them(pair, explain):
    other = tve_hf.split_classifier(pair[0])
    other.backbone.feature_names = other.backbone.feature_names[:1]
    assert_same([pipeline(TASK, model=str(pair[1]), classifier=other)(IMAGES[0])], [explain(IMAGES[0])])

    model = AutoModel.from_pretrained(pair[1])
    model.config.feature_names = ["vit.layers.0", "vit.layers.7"]
    refused(lambda: pipeline(TASK, model=model, classifier=str(pair[0])), pair[0], "no module 'vit.layers.7'")


def test_explainer_with_nan_weights_is_refused(pair):
    model = AutoModel.from_pretrained(pair[1])
    with torch.no_grad():
        model.trunk.norm.weight[3] = torch.nan
    refused(
        lambda: pipeline(TASK, model=model, classifier=str(pair[0])),
        pair[1],
        "NaN",
        "trunk.norm.weight",
        "train it again",
    )


@pytest.mark.parametrize("tuned", [False, True])
def test_other_weights_of_the_backbone_give_one_warning(pair, tmp_path, caplog, tuned):
    classifier = save_classifier(tmp_path / "tuned", seed=1) if tuned else pair[0]
    with caplog.at_level(logging.WARNING):
        explain = pipeline(TASK, model=str(pair[1]), classifier=str(classifier))
        (result,) = explain(IMAGES[0])
        explain(IMAGES[1])
    messages = [record.getMessage() for record in caplog.records if record.name.startswith("tve_hf")]
    assert len(messages) == tuned
    if tuned:
        assert str(classifier) in messages[0] and "verify=16" in messages[0]
    assert np.isfinite(result["attribution"]).all()
