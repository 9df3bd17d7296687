"""Exported graphs against the pipeline that they were made of, in the runtimes that will run them."""

import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from tiny import make_explainer, noise_image
from torch import nn
from transformers import CLIPImageProcessorPil, ViTImageProcessorPil, pipeline

from tve_hf import SplitClassifier, split_classifier
from tve_hf.export import export, formats, run
from tve_hf.pipeline_tve import TransferableAttributionPipeline

OLD_TORCH = torch.__version__ < formats.TORCH
needs_onnx = pytest.mark.skipif(OLD_TORCH, reason=f"ONNX needs torch {formats.TORCH}")
ROOT = Path(__file__).parents[2]
TOP_K = 3
# A ViT whose images are squashed and a CNN whose images are cropped, each with both kinds of explainer.
CASES = [
    pytest.param((name, backgrounds), id=f"{name}-{backgrounds}", marks=needs_onnx)
    for name in ("vit", "resnet")
    for backgrounds in ("random", "antithetical")
]


def processor_of(name: str, side: int):
    if name == "vit":
        return ViTImageProcessorPil(size={"height": side, "width": side})
    crop = {"height": side, "width": side}
    return CLIPImageProcessorPil(size={"shortest_edge": 80}, crop_size=crop, do_center_crop=True)


def explaining(classifier: SplitClassifier, backgrounds: str = "random", **settings):
    explainer = make_explainer(classifier, backgrounds=backgrounds)
    return pipeline("transferable-attribution", model=explainer, classifier=classifier, device="cpu", **settings)


@pytest.fixture(scope="module")
def explains(shared_model, specs):
    """Builder of a pipeline for a tiny architecture: explains(name, backgrounds)."""

    def make(name: str, backgrounds: str) -> TransferableAttributionPipeline:
        processor = processor_of(name, specs[name].side)
        classifier = split_classifier(shared_model(name), image_processor=processor)
        return explaining(classifier, backgrounds, top_k=TOP_K)

    return make


@pytest.fixture(scope="module", params=CASES)
def exported(request, explains, tmp_path_factory):
    """A pipeline, and the ONNX file that was made of it."""
    explain = explains(*request.param)
    path = tmp_path_factory.mktemp("onnx") / "model.onnx"
    return explain, path, export(explain, path)


def outputs_of(path: Path, pixel_values: np.ndarray) -> dict[str, np.ndarray]:
    """What onnxruntime itself gives, by name."""
    import onnxruntime

    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]
    return dict(zip(names, session.run(None, {"pixel_values": pixel_values}), strict=True))


def assert_same_as_pipeline(explain, photographs, found: dict[str, np.ndarray], tolerance: float) -> None:
    for i, explanations in enumerate(explain(photographs)):
        assert found["class_idx"][i].tolist() == [result["class_idx"] for result in explanations]
        np.testing.assert_allclose(found["score"][i], [result["score"] for result in explanations], atol=tolerance)
        maps = np.stack([result["attribution"] for result in explanations])
        assert np.ptp(maps) > 100 * tolerance  # they are not constant
        np.testing.assert_allclose(found["attribution"][i], maps, atol=tolerance)


@pytest.mark.parametrize("batch", [1, 3])
def test_onnxruntime_gives_the_pipelines_maps(exported, batch):
    explain, path, _ = exported
    photographs = [noise_image(seed, (100, 80)) for seed in range(batch)]
    pixel_values = explain.image_processor(photographs, return_tensors="np")["pixel_values"]
    found = outputs_of(path, pixel_values)
    assert_same_as_pipeline(explain, photographs, found, 1e-4)
    with torch.no_grad():
        logits = explain.classifier.backbone.model(torch.from_numpy(pixel_values)).logits
    np.testing.assert_allclose(found["logits"], logits.numpy(), atol=1e-4)


def test_the_file_says_what_is_needed_to_use_it(exported):
    import onnxruntime

    explain, path, written = exported
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    config = json.loads(session.get_modelmeta().custom_metadata_map["config.json"])
    assert config == json.loads(json.dumps(written.config))
    processor = explain.image_processor
    for name in ("image_mean", "image_std"):
        np.testing.assert_allclose(config[name], getattr(processor, name), atol=1e-5)
    assert config["image_size"] == session.get_inputs()[0].shape[2:]
    assert config["crop"] == (None if isinstance(processor, ViTImageProcessorPil) else 64 / 80)
    assert config["labels"] == [explain.classifier.id2label[i] for i in range(5)]
    assert config["grid_size"] == session.get_outputs()[3].shape[2:] == [4, 4]
    assert (config["rule"], config["unit"]) in [
        ("prob", "change of probability"),
        ("logit_averaged", "change of logit"),
    ]
    assert [path.name for path in path.parent.iterdir()] == ["model.onnx"]  # one file, and nothing left beside it


NO_TORCH = """
import runpy, sys
for name in ("torch", "transformers", "tve_hf"):
    sys.modules[name] = None  # importing it raises
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def test_the_example_needs_no_torch(exported, tmp_path):
    explain, path, _ = exported
    noise_image(3, (100, 80)).save(tmp_path / "photo.png")
    arguments = [ROOT / "examples" / "explain_onnx.py", path, tmp_path / "photo.png", tmp_path / "why.png"]
    done = subprocess.run(
        [sys.executable, "-c", NO_TORCH, *map(str, arguments)], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    label, score = re.fullmatch(r"(\S+) \(([\d.]+)%\) -> .*", done.stdout.strip()).groups()
    (first, *_) = explain(str(tmp_path / "photo.png"))
    assert label == first["label"]
    assert float(score) == pytest.approx(100 * first["score"], abs=1)  # one resize in place of a resize and a crop
    before, after = (np.asarray(Image.open(tmp_path / name), np.int16) for name in ("photo.png", "why.png"))
    assert before.shape == after.shape
    changed = (before != after).any(-1)
    if isinstance(explain.image_processor, CLIPImageProcessorPil):
        assert not changed[:, :17].any() and changed[8:72, 18:82].any()  # 64 of 80 rows and columns of the middle
    # Red where the evidence is for the class, blue where it is against.
    strongest = np.unravel_index(np.abs(first["attribution"]).argmax(), (4, 4))
    rows, columns = np.nonzero(changed)
    top, left, height, width = rows.min(), columns.min(), np.ptp(rows) + 1, np.ptp(columns) + 1
    pairs = zip((top, left), strongest, (height, width), strict=True)
    y, x = (int(start + (i + 0.5) * side / 4) for start, i, side in pairs)
    red, _, blue = after[y, x]
    assert (red > blue) == (first["attribution"][strongest] > 0)


def test_a_program_of_torch_export_gives_the_same(explains, tmp_path):
    explain = explains("resnet", "random")
    assert export(explain, tmp_path / "model.pt2").difference < 1e-5
    extra = {"config.json": ""}
    module = torch.export.load(tmp_path / "model.pt2", extra_files=extra).module()
    assert json.loads(extra["config.json"])["outputs"] == ["logits", "class_idx", "score", "attribution"]
    for batch in (1, 3):
        photographs = [noise_image(seed, (100, 80)) for seed in range(batch)]
        outputs = module(explain.image_processor(photographs, return_tensors="pt")["pixel_values"])
        names = json.loads(extra["config.json"])["outputs"]
        found = {name: output.detach().numpy() for name, output in zip(names, outputs, strict=True)}
        assert_same_as_pipeline(explain, photographs, found, 1e-5)


@pytest.mark.parametrize("name", ["vit", "resnet"])
def test_a_program_compiles_without_breaks(explains, tmp_path, name):
    explain = explains(name, "random")
    export(explain, tmp_path / "model.pt2")
    module = torch.export.load(tmp_path / "model.pt2").module()
    pixel_values = explain.image_processor([noise_image(0), noise_image(1)], return_tensors="pt")["pixel_values"]
    torch.compiler.reset()
    compiled = torch.compile(module, backend="eager", fullgraph=True)
    with torch.no_grad():
        for found, expected in zip(compiled(pixel_values), module(pixel_values), strict=True):
            torch.testing.assert_close(found, expected)


def test_settings_for_all_calls_are_those_of_the_graph(explains, tmp_path):
    classifier = explains("vit", "random").classifier
    explain = explaining(classifier, class_idx=[4, 0], rule="logit")
    config = export(explain, tmp_path / "model.pt2").config
    assert (config["rule"], config["unit"]) == ("logit", "change of logit")
    photograph = noise_image(0)
    module = torch.export.load(tmp_path / "model.pt2").module()
    outputs = module(explain.image_processor([photograph] * 2, return_tensors="pt")["pixel_values"])
    found = dict(zip(config["outputs"], (output.detach().numpy() for output in outputs), strict=True))
    assert found["class_idx"].tolist() == [[4, 0]] * 2
    assert_same_as_pipeline(explain, [photograph] * 2, found, 1e-5)
    assert export(explain, tmp_path / "other.pt2", top_k=9).config["labels"] == config["labels"]
    module = torch.export.load(tmp_path / "other.pt2").module()
    assert module(explain.classifier.probe())[1].shape == (2, 5)  # no more classes than there are


@pytest.mark.parametrize("kind", [pytest.param("onnx", marks=[pytest.mark.slow, needs_onnx]), "pt2"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_precision(build, specs, dtype, kind, tmp_path):
    classifier = split_classifier(build("vit").to(dtype), image_processor=processor_of("vit", 32))
    explainer = make_explainer(classifier).to(dtype)
    explain = pipeline("transferable-attribution", model=explainer, classifier=classifier, device="cpu")
    path = tmp_path / f"model.{kind}"
    if (kind, dtype) == ("onnx", torch.bfloat16):
        with pytest.raises(ValueError, match="onnxruntime cannot run model.onnx .*float32 or float16, or as a .pt2"):
            export(explain, path)
        assert not [*tmp_path.iterdir()]
        return
    export(explain, path)
    noise = np.random.default_rng(0).normal(size=(3, 3, 32, 32)).astype(np.float32)
    found = formats.run_onnx(path)(noise) if kind == "onnx" else formats.run_pt2(path)(noise)
    assert [output.dtype for output in found] == [np.float32, np.int64, np.float32, np.float32]
    with torch.no_grad():
        logits = classifier.float()(torch.from_numpy(noise)).logits
    # Digits of the precision, over four blocks: rounding, and no more.
    np.testing.assert_allclose(found[0], logits.numpy(), atol=32 * torch.finfo(dtype).eps * logits.abs().max().item())


# What cannot be exported


class Branching(nn.Linear):
    """A head whose path depends on values."""

    def forward(self, embeddings):
        return super().forward(embeddings * 2 if embeddings.sum() > 0 else embeddings)


class Counting(nn.Linear):
    """A head of whose operators ONNX lacks one."""

    def forward(self, embeddings):
        return super().forward(embeddings) + torch.linalg.svdvals(embeddings.reshape(-1, 2, 16)).sum()


def sklearn_head():
    linear_model = pytest.importorskip("sklearn.linear_model")
    draw = np.random.default_rng(0)
    return linear_model.LogisticRegression().fit(draw.normal(size=(20, 32)), np.arange(20) % 2)


@pytest.mark.parametrize(
    ("head", "name", "said"),
    [
        (lambda: Branching(32, 5), "model.pt2", "cannot be traced as one graph.*depends on values.*with_head"),
        pytest.param(
            lambda: Counting(32, 5),
            "model.onnx",
            "cannot be translated to ONNX.*svd.*export it as a .pt2 file",
            marks=needs_onnx,
        ),
        (sklearn_head, "model.pt2", "LogisticRegression of scikit-learn, which computes outside torch; put a torch"),
    ],
)
def test_graphs_that_cannot_be_exported(explains, head, name, said, tmp_path, capfd):
    classifier = explains("vit", "random").classifier.with_head(head())
    explain = explaining(classifier)
    (tmp_path / name).write_text("of an earlier run")
    with pytest.raises(ValueError, match=said) as caught:
        export(explain, tmp_path / name)
    assert "\n" not in str(caught.value)
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {name: "of an earlier run"}
    assert "def forward" not in "".join(capfd.readouterr())


def test_a_graph_that_gives_something_else_is_not_kept(explains, tmp_path, monkeypatch):
    wrong = run.Format(formats.write_pt2, lambda path: lambda x: [y + 1 for y in formats.run_pt2(path)(x)])
    monkeypatch.setitem(run.FORMATS, "pt2", wrong)
    with pytest.raises(ValueError, match="gives other logits than the pipeline, by 1 for 1 images"):
        export(explains("vit", "random"), tmp_path / "model.pt2")
    assert not [*tmp_path.iterdir()]


def test_settings_that_no_graph_has(explains, tmp_path):
    explain = explains("vit", "random")
    for settings, said in (
        ({"refine": 8}, "refine runs masked passes"),
        ({"verify": 8}, "verify runs masked passes"),
        ({"method": "occlusion"}, "Only an explainer can be exported"),
    ):
        other = explaining(explain.classifier, **settings)
        with pytest.raises(ValueError, match=said):
            export(other, tmp_path / "model.pt2")
    with pytest.raises(ValueError, match="is 'bin'; name the file .onnx or .pt2"):
        export(explain, tmp_path / "model.bin")
    with pytest.raises(ValueError, match="top_k is 0"):
        export(explain, tmp_path / "model.pt2", top_k=0)
    assert not [*tmp_path.iterdir()]


def test_what_is_missing_is_named(explains, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    with pytest.raises(
        ImportError, match=r"need torch" if OLD_TORCH else r"need onnxscript: run `pip install tve_hf\[export\]`"
    ):
        export(explains("vit", "random"), tmp_path / "model.onnx")


def test_a_folder_that_cannot_be_written(explains, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="file"):
        export(explains("vit", "random"), tmp_path / "file" / "model.pt2")
