"""Zero-shot models: the head that prompts make, against the model's own logits and transformers' own pipeline."""

import copy
import json

import datasets
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from accelerate.state import AcceleratorState
from PIL import Image
from tiny import GRID, HOPS, make_explainer, noise_image, save_noise, save_pair
from transformers import AutoModel, CLIPForImageClassification, pipeline
from transformers.models.auto.modeling_auto import MODEL_FOR_ZERO_SHOT_IMAGE_CLASSIFICATION_MAPPING_NAMES
from untouched import left_as_found
from zero_shot_models import SIDE, TINY, make_model, make_processor, make_tokenizer

import tve_hf
from tve_hf.benchmark.run import EvaluateArguments, evaluate
from tve_hf.cli import main
from tve_hf.fingerprint import match
from tve_hf.patches import neighborhoods
from tve_hf.pretrain import PretrainArguments, pretrain

TASK = "transferable-attribution"
LABELS = ["a cat", "two dogs on a red chair", "the remote control"]
TEMPLATE = "This is a photo of {}."
REFUSED = ("blip-2", "videoprism")
SERVED = [model_type for model_type in TINY if model_type not in REFUSED]
TRAINED_WITH_SIGMOID = ("siglip", "siglip2")


@pytest.fixture(scope="module")
def shared(fitted):
    """Models by type, built once; not to be changed by a test."""
    built = {}

    def get(model_type):
        if model_type not in built:
            model = fitted(_Vision(make_model(model_type)), SIDE).model if model_type == "align" else None
            built[model_type] = model or fitted(make_model(model_type), SIDE)
        return built[model_type]

    return get


class _Vision(torch.nn.Module):
    """A model on images alone, whose batch statistics can be fitted."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, pixel_values):
        return self.model.get_image_features(pixel_values)


def inputs_of(model_type, batch):
    """Noise images as the model type takes them."""
    generator = torch.Generator().manual_seed(batch)
    if model_type == "siglip2":  # of other shapes, so that some are padded
        images = [Image.new("RGB", (40, 20 + 10 * i)) for i in range(batch)]
        inputs = dict(make_processor(model_type).image_processor(images, return_tensors="pt"))
        return inputs | {"pixel_values": torch.randn(inputs["pixel_values"].shape, generator=generator)}
    return {"pixel_values": torch.randn(batch, 3, SIDE, SIDE, generator=generator)}


def own_logits(model, sentences, inputs):
    """The whole model's logits_per_image, (B, S), with prompts padded as transformers' pipeline pads them."""
    padding = {"padding": True}
    if "siglip" in model.config.model_type:
        padding = {"padding": "max_length", "max_length": 64}
    tokens = make_tokenizer()(sentences, return_tensors="pt", **padding)
    with torch.no_grad():
        return model(**tokens, **inputs).logits_per_image


def counted(module):
    """A list that grows by each call of a module."""
    calls = []
    module.register_forward_pre_hook(lambda *_: calls.append(1))
    return calls


def split(model, labels=LABELS, **options):
    processor = make_processor(model.config.model_type)
    return tve_hf.split_classifier(model, processor, candidate_labels=labels, **options)


def assert_close(ours, theirs, tolerance=1e-5):
    assert ours.shape == theirs.shape
    assert (ours - theirs).abs().max() <= tolerance * theirs.abs().max()


def test_the_table_is_complete():
    assert set(TINY) == set(MODEL_FOR_ZERO_SHOT_IMAGE_CLASSIFICATION_MAPPING_NAMES)


@pytest.mark.parametrize("model_type", SERVED)
@torch.no_grad()
def test_every_class_is_split_exactly_and_left_as_found(shared, model_type):
    model = shared(model_type)
    with left_as_found(model):
        classifier = split(model)
    assert classifier.id2label == dict(enumerate(LABELS))
    sentences = [TEMPLATE.replace("{}", label) for label in LABELS]
    for batch in (1, 3):
        inputs = inputs_of(model_type, batch)
        logits = own_logits(model, sentences, inputs)
        embeddings = classifier.embed(**inputs)
        assert embeddings.shape == (batch, classifier.embedding_dim)
        assert_close(classifier.head(embeddings), logits)
        assert_close(classifier(**inputs).logits, logits)
    assert logits.std(0).max() > 0.01 * logits.abs().max()  # they depend on the image,
    assert logits.std(1).max() > 0.01 * logits.abs().max()  # and on the prompt
    assert classifier.multi_label == (model_type in TRAINED_WITH_SIGMOID)


@pytest.mark.parametrize("model_type", SERVED)
def test_other_prompts_run_the_text_tower_alone(shared, model_type):
    model = copy.deepcopy(shared(model_type))
    classifier = split(model)
    inputs = inputs_of(model_type, 2)
    embeddings = classifier.embed(**inputs).detach()
    passes, image_passes = counted(model), [counted(module) for module in classifier.backbone.model.children()]
    text_passes = counted(model.text_model)
    other = classifier.with_prompts(["a dog", "it"], hypothesis_template="a drawing of {}")
    assert not passes and not any(image_passes) and len(text_passes) == 1
    assert other.id2label == {0: "a dog", 1: "it"}
    assert other.backbone is classifier.backbone
    logits = other.head(embeddings)
    assert_close(logits, own_logits(model, ["a drawing of a dog", "a drawing of it"], inputs))
    assert classifier.id2label == dict(enumerate(LABELS))  # which is another object


@pytest.mark.parametrize("model_type", ["clip", "siglip", "siglip2", "metaclip_2", "chinese_clip"])
@pytest.mark.parametrize("template", [None, "a drawing of {}"])
def test_probabilities_are_those_of_transformers_own_pipeline(shared, model_type, template):
    model, processor = shared(model_type), make_processor(model_type)
    theirs = pipeline(
        "zero-shot-image-classification",
        model=model,
        image_processor=processor.image_processor,
        tokenizer=processor.tokenizer,
    )
    classifier = split(model, hypothesis_template=template)
    options = {} if template is None else {"hypothesis_template": template}
    for seed in range(2):
        image = noise_image(seed)
        scores = {row["label"]: row["score"] for row in theirs(image, candidate_labels=LABELS, **options)}
        inputs = processor.image_processor(image, return_tensors="pt")
        probabilities = classifier.log_prob(classifier.embed(**inputs)).exp()[0]
        assert probabilities.tolist() == pytest.approx([scores[label] for label in LABELS], rel=1e-5)


def test_a_bias_makes_a_sigmoid_even_while_it_is_zero():
    torch.manual_seed(0)
    model = make_model("siglip")
    with torch.no_grad():
        assert model.logit_bias == 0
    assert split(model).multi_label
    with torch.no_grad():
        model.logit_scale.fill_(1.5)
    classifier = split(model)
    inputs = inputs_of("siglip", 2)
    assert_close(
        classifier(**inputs).logits, own_logits(model, [TEMPLATE.replace("{}", label) for label in LABELS], inputs)
    )


@pytest.mark.parametrize("model_type", ["clip", "siglip", "tipsv2"])
def test_an_embedding_does_not_depend_on_the_prompts_beside_it(shared, model_type):
    classifier = split(shared(model_type))
    alone = classifier.with_prompts(LABELS[:1]).head.text_embeddings
    assert_close(classifier.head.text_embeddings[:1], alone)
    assert classifier.text.pad_to == (64 if model_type == "siglip" else None)


def test_templates_are_averaged_as_unit_vectors(shared):
    model = shared("clip")
    templates = ["This is a photo of {}.", "a drawing of {}", "{}"]
    classifier = split(model, hypothesis_template=templates)
    rows = []
    with torch.no_grad():
        for label in LABELS:
            vectors = []
            for template in templates:
                tokens = make_tokenizer()(template.replace("{}", label), return_tensors="pt")
                vector = model.get_text_features(**tokens).pooler_output[0]
                vectors.append(vector / vector.norm())
            mean = sum(vectors) / len(vectors)
            rows.append(mean / mean.norm())
        assert_close(classifier.head.text_embeddings, torch.stack(rows))
        image = model.get_image_features(**inputs_of("clip", 2)).pooler_output
        logits = model.logit_scale.exp() * (image / image.norm(dim=-1, keepdim=True)) @ torch.stack(rows).T
        assert_close(classifier(**inputs_of("clip", 2)).logits, logits)


def test_what_is_not_given_stays_as_it_is(shared):
    classifier = split(shared("clip"), hypothesis_template="a drawing of {}")
    same = classifier.with_prompts()
    assert torch.equal(same.head.text_embeddings, classifier.head.text_embeddings)
    fewer = classifier.with_prompts(LABELS[1:])
    assert_close(fewer.head.text_embeddings, classifier.head.text_embeddings[1:])
    other = classifier.with_prompts(hypothesis_template="{}")
    assert other.id2label == classifier.id2label
    assert_close(other.head.text_embeddings, split(shared("clip"), hypothesis_template="{}").head.text_embeddings)
    later = split(shared("clip"), labels=None, hypothesis_template="a drawing of {}").with_prompts(LABELS)
    assert_close(later.head.text_embeddings, classifier.head.text_embeddings)
    back = classifier.with_head(torch.nn.Linear(24, 2)).reading(()).with_prompts(LABELS, "a drawing of {}")
    assert_close(back.head.text_embeddings, classifier.head.text_embeddings)


@pytest.mark.parametrize("model_type", ["clip", "siglip"])
@torch.no_grad()
def test_transfer_of_exact_meta_attributions_is_f_of_masked_images(shared, model_type):
    """Eq. 7 from the whole model run on each masked image, prompts and all."""
    model, images = shared(model_type), inputs_of(model_type, 2)["pixel_values"]
    classifier = split(model)
    kept, removed = tve_hf.exact_meta_attribution(classifier, images, GRID, HOPS)
    for labels in (LABELS, ["a dog", "it"]):
        classifier = classifier.with_prompts(labels)
        sentences = [TEMPLATE.replace("{}", label) for label in labels]
        class_idx = torch.tensor([1, 0])
        scores = tve_hf.transfer(kept, removed, classifier, class_idx, "log_prob", GRID, HOPS)
        for z, near in enumerate(neighborhoods(GRID, HOPS)):
            mask = near.view(GRID, GRID).repeat_interleave(SIDE // GRID, 0).repeat_interleave(SIDE // GRID, 1)
            both = [own_logits(model, sentences, {"pixel_values": images * m}) for m in (mask, ~mask)]
            squash = F.logsigmoid if model_type == "siglip" else lambda logits: logits.log_softmax(-1)
            g, h = (squash(logits)[range(2), class_idx] for logits in both)
            assert scores[:, z].tolist() == pytest.approx((g - h).tolist(), abs=1e-4)


def test_the_fingerprint_is_of_the_image_tower_alone(shared):
    model = copy.deepcopy(shared("clip"))
    before = split(model).fingerprint()
    assert split(model, labels=["it"]).fingerprint() == before
    assert split(model, labels=None).fingerprint() == before
    for name in ("text_model.final_layer_norm.weight", "text_projection.weight", "logit_scale"):
        with torch.no_grad():
            model.get_parameter(name).mul_(1.5).add_(torch.rand_like(model.get_parameter(name)))
    assert split(model).fingerprint() == before
    for name in ("vision_model.encoder.layers.1.mlp.fc1.weight", "visual_projection.weight"):
        with torch.no_grad():
            changed = copy.deepcopy(model)
            changed.get_parameter(name).normal_()
        assert match(split(changed).fingerprint(), before) == "same architecture, other weights"


def test_features_are_the_maps_of_the_image_tower(shared):
    model = shared("clip")
    classifier = split(model)
    inputs = inputs_of("clip", 2)
    states = model.vision_model(**inputs, output_hidden_states=True).hidden_states
    assert classifier.backbone.feature_names == tuple(f"vision_model.encoder.layers.{i}" for i in range(3))
    for feature, state in zip(classifier(**inputs).features, states[1:], strict=True):
        assert torch.equal(feature, state[:, 1:].transpose(1, 2).unflatten(2, (4, 4)))


@pytest.mark.parametrize("model_type", ["clip", "siglip", "align", "tipsv2"])
def test_methods_and_fidelity_serve_prompts(shared, model_type):
    model = shared(model_type)
    classifier = split(model)
    images, class_idx = inputs_of(model_type, 2)["pixel_values"], torch.tensor([0, 2])
    names = ["exact", "random", "grad_cam"] + (["rollout"] if model_type == "clip" else [])
    with left_as_found(model, but_the_generator=True):
        for name in names:
            scores = tve_hf.methods.explain(name, classifier, images, class_idx, (GRID, GRID))
            assert scores.shape == (2, GRID, GRID) and torch.isfinite(scores).all()
    sentences = [TEMPLATE.replace("{}", label) for label in LABELS]
    found = tve_hf.fidelity(classifier, images, scores, class_idx, num_levels=3)

    def probability(pixel_values):
        logits = own_logits(model, sentences, {"pixel_values": pixel_values})
        return (logits.sigmoid() if classifier.multi_label else logits.softmax(-1))[range(2), class_idx]

    lost = probability(images) - probability(torch.zeros_like(images))
    assert found.plus[:, 0].tolist() == pytest.approx(lost.tolist(), abs=1e-5)


@torch.no_grad()
def test_half_precision(shared):
    model = copy.deepcopy(shared("siglip")).bfloat16()
    classifier = split(model)
    inputs = {name: value.bfloat16() for name, value in inputs_of("siglip", 2).items()}
    logits = own_logits(model, [TEMPLATE.replace("{}", label) for label in LABELS], inputs)
    assert classifier(**inputs).logits.dtype == torch.bfloat16
    assert_close(classifier(**inputs).logits.float(), logits.float(), 1e-2)
    # A classifier that is moved takes its text tower along.
    classifier = classifier.float().with_prompts(LABELS)
    assert classifier.head.text_embeddings.dtype == torch.float32
    assert classifier(**inputs_of("siglip", 2)).logits.dtype == torch.float32


def test_rows_of_patches_are_embedded_but_not_masked(shared):
    classifier = split(shared("siglip2"))
    with pytest.raises(ValueError, match="also reads pixel_attention_mask, spatial_shapes"):
        classifier(inputs_of("siglip2", 1)["pixel_values"])


@pytest.fixture(scope="module", params=["clip", "siglip"])
def saved(request, shared, tmp_path_factory):
    """Folders of a zero-shot model, and of an explainer of its image tower."""
    folder = tmp_path_factory.mktemp(request.param)
    shared(request.param).save_pretrained(folder / "zero-shot")
    make_processor(request.param).save_pretrained(folder / "zero-shot")
    make_explainer(tve_hf.split_classifier(folder / "zero-shot")).save_pretrained(folder / "explainer")
    return folder / "zero-shot", folder / "explainer"


def test_pipeline_by_name(saved, monkeypatch):
    folder, explainer = saved
    explain = pipeline(TASK, model=str(explainer), classifier=str(folder), candidate_labels=LABELS)

    def fail(*args, **kwargs):
        raise AssertionError("loaded or split again")

    monkeypatch.setattr("tve_hf.classifiers.given.split_classifier", fail)
    classifier = tve_hf.split_classifier(folder, candidate_labels=LABELS)
    image = noise_image(3)
    pixel_values = explain.image_processor(image, return_tensors="pt")["pixel_values"]
    results = explain(image, top_k=3)
    probabilities = classifier.log_prob(classifier.embed(pixel_values)).exp()[0]
    assert {r["label"]: pytest.approx(r["score"], rel=1e-4) for r in results} == dict(
        zip(LABELS, probabilities.tolist(), strict=True)
    )

    def by_hand(head, index):
        model = AutoModel.from_pretrained(explainer)
        with torch.no_grad():
            seen = head(pixel_values)
            out = model(pixel_values=pixel_values, features=seen.features, embeddings=seen.embeddings)
            scores = tve_hf.transfer(out.kept, out.removed, head, torch.tensor([index]), grid_size=GRID, hops=HOPS)
        return scores[0].view(GRID, GRID).numpy()

    (result,) = explain(image, label="the remote control")
    np.testing.assert_allclose(result["attribution"], by_hand(classifier, 2), rtol=1e-3, atol=1e-5)
    assert np.ptp(result["attribution"]) > 0
    assert result["overlay"].size == image.size

    whole, image_tower = counted(explain.classifier.text.model), counted(explain.classifier.backbone.model)
    other = ["a dog", "it", "a red chair"]
    (result,) = explain(image, candidate_labels=other, hypothesis_template=["{}", "a drawing of {}"], class_idx=1)
    assert (len(whole), len(image_tower)) == (0, 1)  # of the image alone
    assert result["label"] == "it"
    prompted = classifier.with_prompts(other, ["{}", "a drawing of {}"])
    np.testing.assert_allclose(result["attribution"], by_hand(prompted, 1), rtol=1e-3, atol=1e-5)

    (result,) = explain(image, label="a cat", verify=4)  # the prompts of the construction again
    np.testing.assert_allclose(result["attribution"], by_hand(classifier, 0), rtol=1e-3, atol=1e-5)
    assert result["verification"]["num_patches"] == 4
    lazy = explain((noise_image(i) for i in range(3)), candidate_labels=other, label="it")
    explain(image, candidate_labels=LABELS)  # another call in between does not change what the first one asked
    assert [results[0]["label"] for results in lazy] == ["it"] * 3


def test_pipeline_parameters_of_construction_hold_for_later_calls(saved):
    folder, explainer = saved
    image = noise_image(1)
    explain = pipeline(
        TASK, model=str(explainer), classifier=str(folder), hypothesis_template="a drawing of {}", top_k=3
    )
    with pytest.raises(ValueError, match="zero-shot model, whose classes are what prompts say; pass candidate_labels"):
        explain(image)
    expected = pipeline(
        TASK,
        model=str(explainer),
        classifier=tve_hf.split_classifier(folder),
        candidate_labels=LABELS,
        hypothesis_template="a drawing of {}",
        top_k=3,
    )(image)
    results = explain(image, candidate_labels=LABELS)
    assert [r["label"] for r in results] == [r["label"] for r in expected]
    for result, wanted in zip(results, expected, strict=True):
        np.testing.assert_allclose(result["attribution"], wanted["attribution"], rtol=1e-3, atol=1e-5)

    explain = pipeline(TASK, model=str(explainer), classifier=str(folder), candidate_labels=LABELS, label="a cat")
    assert explain(image, candidate_labels=["a dog", "a cat"])[0]["class_idx"] == 1
    with pytest.raises(ValueError, match="'a cat' is not a class"):
        explain(image, candidate_labels=["a dog", "it"])


def test_pipeline_takes_a_model_and_its_processor(saved, shared):
    folder, explainer = saved
    classifier = tve_hf.split_classifier(folder, candidate_labels=LABELS)
    model = classifier.text.model
    explain = pipeline(
        TASK,
        model=str(explainer),
        classifier=model,
        image_processor=make_processor(model.config.model_type),
        candidate_labels=LABELS,
    )
    by_name = pipeline(TASK, model=str(explainer), classifier=str(folder), candidate_labels=LABELS)
    one, other = (run(noise_image(2))[0] for run in (explain, by_name))
    np.testing.assert_allclose(one["attribution"], other["attribution"], rtol=1e-3, atol=1e-5)


def test_command_line(saved, tmp_path, capsys):
    folder, explainer = saved
    noise_image(0).save(tmp_path / "photo.png")
    arguments = ["explain", str(tmp_path / "photo.png"), "--classifier", str(folder), "--model", str(explainer)]
    arguments += ["--output", str(tmp_path / "out"), "--json", "--plain", "--label", "two dogs"]
    assert main([*arguments, "--candidate-labels", "a cat", "two dogs", "--hypothesis-template", "a photo of {}"]) == 0
    (line,) = capsys.readouterr().out.splitlines()
    (explanation,) = json.loads(line)["explanations"]
    assert (explanation["label"], explanation["class_idx"]) == ("two dogs", 1)
    with Image.open(explanation["picture"]) as picture:
        assert picture.size == (40, 40)
    assert main([*arguments[:-2], "--candidate-labels", "a cat", "a cat"]) == 1
    assert capsys.readouterr().err == "tve-hf: candidate_labels has 'a cat' twice; leave one of them out.\n"


@pytest.fixture
def settings(saved, tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    yield {
        "classifier": str(saved[0]),
        "train_files": [str(save_noise(tmp_path / "noise.parquet", 4))],
        "output_dir": str(tmp_path / "run"),
        "grid_size": GRID,
        "hops": HOPS,
        "hidden_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "patches_per_image": 3,
        "batch_size": 2,
        "num_epochs": 1,
        "mixed_precision": "no",
    }
    AcceleratorState._reset_state(True)


def test_pre_training_needs_no_prompts_unless_it_validates(settings, tmp_path):
    with pytest.raises(ValueError, match="pass candidate_labels"):
        pretrain(PretrainArguments(**settings, validation_files=settings["train_files"]))
    assert not list((tmp_path / "run").iterdir())  # it says so before it trains

    pretrain(PretrainArguments(**settings))
    explain = pipeline(TASK, model=str(tmp_path / "run"), classifier=settings["classifier"], candidate_labels=LABELS)
    assert explain(noise_image(0))[0]["label"] in LABELS

    settings |= {"output_dir": str(tmp_path / "validated"), "validation_files": settings["train_files"]}
    pretrain(PretrainArguments(**settings, candidate_labels=LABELS))
    (row,) = json.loads((tmp_path / "validated" / "training.json").read_text())["log"]
    assert np.isfinite([row["kept_error"], row["removed_error"]]).all() and -1 <= row["spearman"] <= 1


def test_evaluation_takes_prompts(saved, settings, tmp_path):
    folder, explainer = saved
    args = EvaluateArguments(
        classifier=str(folder),
        model=str(explainer),
        test_files=settings["train_files"],
        output_dir=str(tmp_path / "report"),
        methods=["random"],
        removals=["zero"],
        candidate_labels=LABELS,
        hypothesis_template=["{}"],
    )
    report = evaluate(args)
    classifier = tve_hf.split_classifier(folder, candidate_labels=LABELS, hypothesis_template="{}")
    images = [noise_image(seed) for seed in report["rows"]]
    pixel_values = classifier.image_processor(images, return_tensors="pt")["pixel_values"]
    with torch.no_grad():
        class_idx = classifier(pixel_values).logits.argmax(-1)
    scores = tve_hf.methods.explain("exact", classifier, pixel_values, class_idx, GRID, hops=HOPS)
    found = tve_hf.fidelity(classifier, pixel_values, scores, class_idx)
    assert report["per_image"]["exact/zero/plus"] == pytest.approx(found.plus_auc.tolist(), abs=1e-4)


def test_prompts_that_make_no_classes_are_refused(shared):
    classifier = split(shared("clip"))

    def refused(message, *prompts):
        for ask in (
            classifier.with_prompts,
            lambda *given: split(shared("clip"), given[0], hypothesis_template=given[1]),
        ):
            with pytest.raises(ValueError, match=message):
                ask(*(prompts if len(prompts) == 2 else (*prompts, None)))

    refused("candidate_labels is empty; pass at least one", [])
    refused("candidate_labels is the string 'a cat'; pass a list", "a cat")
    refused(r"candidate_labels\[1\] is ' '; pass words", ["a cat", " "])
    refused(r"candidate_labels\[0\] is 3; pass words", [3])
    refused("candidate_labels has 'a cat ' twice", ["a cat", "a dog", "a cat "])
    refused("hypothesis_template 'a photo' has no {} where", LABELS, "a photo")
    refused("hypothesis_template 'a {x}' has no {} where", LABELS, ["{}", "a {x}"])
    refused("hypothesis_template is empty; pass at least one", LABELS, [])
    long = ["a dog", "a cat " * 40]
    refused("prompt 'This is a photo of a cat .*'... has 88 tokens, but .*CLIPModel reads at most 64; shorten", long)


def test_prompts_may_be_as_long_as_the_tokenizer_says(shared):
    processor = make_processor("clip", model_max_length=8)
    classifier = tve_hf.split_classifier(
        shared("clip"), processor, candidate_labels=["cat " * 6], hypothesis_template="{}"
    )
    with pytest.raises(ValueError, match="has 9 tokens, but .* reads at most 8"):
        classifier.with_prompts(["cat " * 7])


def test_classifiers_without_prompts_have_a_backbone_only(shared):
    classifier = split(shared("clip"), labels=None)
    images = inputs_of("clip", 1)["pixel_values"]
    assert classifier.id2label == {}
    kept, removed = tve_hf.exact_meta_attribution(classifier, images, GRID, HOPS)
    for ask in (
        lambda: classifier(images),
        lambda: classifier.head(kept),
        lambda: tve_hf.methods.explain("exact", classifier, images, torch.tensor([0]), GRID),
    ):
        with pytest.raises(ValueError):
            ask()
    with pytest.raises(ValueError, match="CLIPModel is a zero-shot model, whose classes .* pass candidate_labels"):
        classifier.log_prob(kept)
    assert torch.equal(kept, tve_hf.exact_meta_attribution(split(shared("clip")), images, GRID, HOPS)[0])


def test_ordinary_classifiers_take_no_prompts(build, tmp_path):
    with pytest.raises(
        ValueError, match="ViTForImageClassification takes no candidate_labels, for it has no text tower"
    ):
        tve_hf.split_classifier(build("vit"), candidate_labels=LABELS)
    with pytest.raises(ValueError, match="takes no candidate_labels"):
        tve_hf.split_classifier(build("vit")).with_prompts(LABELS)
    folder, explainer = save_pair(tmp_path)
    with pytest.raises(ValueError, match=f"{folder} takes no candidate_labels"):
        pipeline(TASK, model=str(explainer), classifier=str(folder), candidate_labels=LABELS)
    explain = pipeline(TASK, model=str(explainer), classifier=str(folder))
    with pytest.raises(ValueError, match=f"{folder} takes no candidate_labels"):
        explain(noise_image(0), candidate_labels=LABELS)


def test_processors_that_lack_a_part_are_refused(shared):
    processor = make_processor("clip")
    for given, lacking in ((processor.image_processor, "tokenizer"), (None, "tokenizer")):
        with pytest.raises(ValueError, match=f"CLIPModel reads images and prompts, but .* has no {lacking}; pass the"):
            tve_hf.split_classifier(shared("clip"), given, candidate_labels=LABELS)


@pytest.mark.parametrize("model_type", REFUSED)
def test_models_whose_towers_cannot_be_run_apart_are_refused(model_type):
    with pytest.raises(
        ValueError, match="takes no candidate_labels, for it has no text tower that can be run without"
    ):
        split(make_model(model_type))
    with pytest.raises(ValueError, match="Cannot split"):
        split(make_model(model_type), labels=None)


def test_logits_that_are_no_cosine_are_refused(shared, monkeypatch):
    model = copy.deepcopy(shared("clip"))
    forward = model.forward

    def squared(*args, **kwargs):
        output = forward(*args, **kwargs)
        output.logits_per_image = output.logits_per_image.square()
        return output

    model.forward = squared
    with pytest.raises(
        ValueError, match="Cannot split CLIPModel: it gives no logits_per_image that are a scaled cosine"
    ):
        split(model)


def test_models_that_cannot_be_trusted_are_refused(shared, tmp_path):
    model = copy.deepcopy(shared("clip"))
    with pytest.raises(ValueError, match="is in train mode"):
        split(model.train())
    model.eval()
    with torch.no_grad():
        model.text_projection.weight[0, 0] = torch.nan
    with pytest.raises(ValueError, match="NaN or infinite logits"):
        split(model)
    # A fine-tuned classifier has lost its text tower: it is loaded as what it was saved as.
    CLIPForImageClassification(model.config).save_pretrained(tmp_path)
    make_processor("clip").image_processor.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=f"{tmp_path} takes no candidate_labels"):
        tve_hf.split_classifier(tmp_path, candidate_labels=LABELS)
    model.vision_model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    whole = make_model("clip").config.to_dict() | {"architectures": ["CLIPModel"]}
    (tmp_path / "config.json").write_text(json.dumps(whole | {"torch_dtype": config.get("dtype")}))
    with pytest.raises(ValueError, match=f"{tmp_path} is no whole zero-shot model .* is missing"):
        tve_hf.split_classifier(tmp_path, candidate_labels=LABELS)
