"""Heads that users bring: each against the library or the formula that it stands for."""

import itertools
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy.special import expit, log_softmax
from sklearn.calibration import CalibratedClassifierCV
from sklearn.cluster import KMeans
from sklearn.discriminant_analysis import LinearDiscriminantAnalysis
from sklearn.ensemble import IsolationForest, RandomForestClassifier
from sklearn.linear_model import LogisticRegression, Ridge, SGDClassifier
from sklearn.multiclass import OneVsRestClassifier
from sklearn.multioutput import MultiOutputClassifier
from sklearn.naive_bayes import GaussianNB
from sklearn.neighbors import KNeighborsClassifier
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.svm import SVC, LinearSVC
from tiny import noise_image, save_pair
from torch import Tensor, nn
from transformers import ViTConfig, ViTForImageClassification, pipeline

import tve_hf
from tve_hf import SplitClassifier, TVEExplainer, split_classifier
from tve_hf.heads import LEAST_PROBABILITY, EstimatorHead, NeighborsHead, PrototypeHead, affine_map
from tve_hf.methods import explain

D = 8


@pytest.fixture(scope="module")
def classifier(shared_model) -> SplitClassifier:
    return split_classifier(shared_model("cnn"))


@pytest.fixture(scope="module")
def examples(classifier, images) -> tuple[Tensor, Tensor]:
    """Embeddings (60, D) of noise images in three brightnesses, and which, (60,)."""
    labels = torch.arange(60) % 3
    pixel_values = images(60, 32) + (labels - 1).view(-1, 1, 1, 1)
    with torch.no_grad():
        return classifier.embed(pixel_values), labels


@pytest.fixture(scope="module")
def queries(classifier, images) -> Tensor:
    """Other embeddings, with leading dimensions (2, 3)."""
    with torch.no_grad():
        return classifier.embed(images(6, 32, seed=1) * 1.5).unflatten(0, (2, 3))


# --- estimators -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("estimator", "method"),
    [
        (LogisticRegression(), "predict_log_proba"),
        (make_pipeline(StandardScaler(), LogisticRegression(C=100)), "predict_log_proba"),
        (GaussianNB(), "predict_log_proba"),
        (LinearDiscriminantAnalysis(), "predict_log_proba"),
        (LinearSVC(), "decision_function"),
        (SVC(), "decision_function"),
        (SGDClassifier(random_state=0), "decision_function"),
        (make_pipeline(StandardScaler(), LinearSVC()), "decision_function"),
        (CalibratedClassifierCV(LinearSVC(), cv=2), "predict_proba"),
    ],
    ids=lambda value: value if isinstance(value, str) else type(value).__name__,
)
@pytest.mark.parametrize("names", [["dark", "grey", "light"], ["dark", "other"], [7, 3, 5]])
def test_log_prob_is_the_estimators(classifier, examples, queries, estimator, method, names) -> None:
    embeddings, labels = examples
    estimator.fit(embeddings.numpy(), np.array(names)[labels.clamp(max=len(names) - 1).numpy()])
    split = classifier.with_head(estimator)
    rows = queries.flatten(0, 1).double().numpy()
    expected = getattr(estimator, method)(rows)
    if method == "decision_function" and len(names) == 2:
        expected = np.log(np.stack([expit(-expected), expit(expected)], 1))
    elif method == "decision_function":
        expected = log_softmax(expected, 1)
    elif method == "predict_proba":
        expected = np.log(expected)
    assert split.head.method == method
    assert split.id2label == dict(enumerate(map(str, sorted(names))))
    found = split.log_prob(queries)
    assert found.shape == (2, 3, len(names))
    assert found.dtype == torch.float32
    np.testing.assert_allclose(found.flatten(0, 1), expected, rtol=1e-5, atol=1e-5)
    assert found.std() > 0.1
    predicted = [split.id2label[i] for i in found.flatten(0, 1).argmax(1).tolist()]
    assert predicted == [str(label) for label in estimator.predict(rows)]


@pytest.mark.parametrize("estimator", [RandomForestClassifier(10, random_state=0), KNeighborsClassifier(3)])
def test_probabilities_of_zero_stay_finite(classifier, examples, estimator) -> None:
    estimator.fit(examples[0].numpy(), examples[1].numpy())
    queries = examples[0][:12].unflatten(0, (2, 6))
    split = classifier.with_head(estimator)
    probabilities = estimator.predict_proba(queries.flatten(0, 1).double().numpy())
    assert (probabilities == 0).any() and (probabilities.max(1) < 1).any()
    expected = np.log(np.where(probabilities == 0, LEAST_PROBABILITY, probabilities))
    np.testing.assert_allclose(split.log_prob(queries).flatten(0, 1), expected, atol=1e-5)
    assert split.log_prob(queries).exp().sum(-1).sub(1).abs().max() < 1e-6
    scores = tve_hf.transfer(queries, queries.flip(1), split, torch.tensor([0, 1]), "log_prob")
    assert scores.isfinite().all() and scores.std() > 0


class Duck:
    """No more than the methods of a fitted estimator."""

    def __init__(self, **methods) -> None:
        self.classes_ = np.array(["a", "b", "c"])
        self.__dict__ |= methods

    def fit(self) -> None: ...


def test_a_probability_of_zero_is_never_above_another(classifier) -> None:
    rows = np.array([[0.0, -900.0, -np.inf], [-np.inf, 0.0, -np.inf]])
    split = classifier.with_head(Duck(predict_log_proba=lambda x: rows[np.arange(len(x)) % 2]))
    least = math.log(LEAST_PROBABILITY)
    expected = torch.tensor([[0.0, -900.0, -900.0], [least, 0.0, least]])
    torch.testing.assert_close(split.log_prob(torch.zeros(2, D)), expected, rtol=1e-5, atol=1e-6)


def test_log_probabilities_are_preferred_and_arrays_come_as_float64(classifier) -> None:
    seen = []

    def score(rows: np.ndarray) -> np.ndarray:
        seen.append((rows.dtype, rows.shape))
        return np.log([[0.2, 0.3, 0.5]] * len(rows))

    split = classifier.with_head(Duck(predict_log_proba=score, decision_function=None, predict_proba=None))
    seen.clear()
    for dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
        logits = split.head(torch.zeros(4, 5, D, dtype=dtype))
        assert logits.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert seen == [(np.dtype("float64"), (20, D))] * 4
    torch.testing.assert_close(split.log_prob(torch.zeros(1, D)).exp(), torch.tensor([[0.2, 0.3, 0.5]]))


def test_several_labels_for_each_image(classifier, examples, queries) -> None:
    embeddings, labels = examples
    indicators = np.stack([labels == 0, labels > 0, labels == 2], 1).astype(int)
    estimator = OneVsRestClassifier(LogisticRegression()).fit(embeddings.numpy(), indicators)
    split = classifier.with_head(estimator, multi_label=True)
    rows = queries.flatten(0, 1).double().numpy()
    np.testing.assert_allclose(split.log_prob(queries).exp().flatten(0, 1), estimator.predict_proba(rows), atol=1e-5)
    with pytest.raises(ValueError, match="several labels for each image; pass multi_label=True"):
        classifier.with_head(estimator)
    probabilities = np.array([[0.9, 0.0, 1.0]])
    alone = Duck(predict_proba=lambda x: probabilities.repeat(len(x), 0))
    found = classifier.with_head(alone, multi_label=True).log_prob(queries[0, :1])
    np.testing.assert_allclose(found.exp(), probabilities, atol=1e-6)
    assert found.isfinite().all()
    with pytest.raises(ValueError, match="Duck do not sum to 1.*pass multi_label=True"):
        classifier.with_head(alone)


def test_gradients_through_an_estimator_are_refused_by_name(classifier, examples, images) -> None:
    split = classifier.with_head(LogisticRegression().fit(examples[0].numpy(), examples[1].numpy()))
    with pytest.raises(ValueError, match="LogisticRegression passes on no gradients; choose a method that needs none"):
        explain("grad_cam", split, images(1, 32), torch.tensor([0]), grid_size=4)


def test_svc_of_pairs_of_classes_is_refused(classifier, examples) -> None:
    embeddings, labels = torch.cat([examples[0]] * 2).numpy(), np.arange(120) % 4
    with pytest.raises(ValueError, match=r"SVC gives \(6,\) values.*names 4.*decision_function_shape='ovr'"):
        classifier.with_head(SVC(decision_function_shape="ovo").fit(embeddings, labels))


@pytest.mark.parametrize(
    ("estimator", "fitted", "message"),
    [
        (LogisticRegression(), False, "LogisticRegression has no classes_: it is not fitted.*call its fit"),
        (make_pipeline(StandardScaler(), LinearSVC()), False, "Pipeline has no classes_: it is not fitted"),
        (LogisticRegression, False, "has no classes_: it is not fitted"),
        (Ridge(), True, "Ridge has none of predict_log_proba.*not a regressor"),
        (Ridge(), False, "Ridge has none of predict_log_proba.*not a regressor"),
        (KMeans(2), True, "KMeans has none of"),
        (IsolationForest(n_estimators=5), True, "IsolationForest has no classes_: .* or no classifier"),
    ],
)
def test_what_is_no_fitted_classifier_is_refused(classifier, examples, estimator, fitted, message) -> None:
    if fitted:
        estimator.fit(examples[0].numpy(), examples[1].numpy())
    with pytest.raises(ValueError, match=message):
        classifier.with_head(estimator)


def test_estimators_of_other_embeddings_or_several_outputs_are_refused(classifier, examples) -> None:
    embeddings, labels = examples[0].numpy(), examples[1].numpy()
    for estimator in (LogisticRegression(), make_pipeline(StandardScaler(), LinearSVC())):
        with pytest.raises(ValueError, match="made for embeddings of 7 dimensions, but this backbone gives 8; make"):
            classifier.with_head(estimator.fit(embeddings[:, :7], labels))
    several = MultiOutputClassifier(LogisticRegression()).fit(embeddings, np.stack([labels, labels % 2], 1))
    with pytest.raises(ValueError, match="MultiOutputClassifier has 2 outputs; pass a classifier of one"):
        classifier.with_head(several)


def test_a_pipeline_explains_an_estimator_by_its_own_class_names(tmp_path) -> None:
    folder, explainer = save_pair(tmp_path)
    split = split_classifier(folder)
    processor = split.image_processor
    pictures = [noise_image(seed) for seed in range(12)]
    with torch.no_grad():
        embeddings = split.embed(processor(pictures, return_tensors="pt")["pixel_values"])
    estimator = LogisticRegression().fit(embeddings.numpy(), ["crow", "dove"] * 6)
    explain = pipeline("transferable-attribution", model=str(explainer), classifier=split.with_head(estimator))
    (found,) = explain(pictures[0], label="dove", rule="log_prob")
    assert found["score"] == pytest.approx(estimator.predict_proba(embeddings[:1].double().numpy())[0, 1], abs=1e-5)
    with torch.no_grad():
        pixel_values = processor(pictures[0], return_tensors="pt")["pixel_values"]
        seen = split(pixel_values)
        out = TVEExplainer.from_pretrained(explainer)(pixel_values, seen.features, seen.embeddings)
    log_odds = [estimator.predict_log_proba(part[0].numpy())[:, 1] for part in (out.kept, out.removed)]
    np.testing.assert_allclose(found["attribution"].flatten(), log_odds[0] - log_odds[1], rtol=1e-3, atol=1e-4)


# --- prototypes -----------------------------------------------------------------------------------------------------


def test_prototypes_are_compared_by_cosine(classifier, queries) -> None:
    prototypes = torch.randn(4, D, generator=torch.Generator().manual_seed(0))
    split = classifier.with_head(prototypes, id2label=["a", "b", "c", "d"])
    assert split.id2label == {0: "a", 1: "b", 2: "c", 3: "d"}
    expected = 10 * F.cosine_similarity(queries.unsqueeze(-2), prototypes, dim=-1)
    torch.testing.assert_close(split.head(queries), expected, rtol=1e-5, atol=1e-5)
    assert split.head(torch.zeros(1, D)).isfinite().all()


def test_euclidean_prototypes_are_the_posterior_of_gaussians(classifier, examples, queries) -> None:
    means = torch.stack([examples[0][examples[1] == c].mean(0) for c in range(3)])
    variance = 0.3
    split = classifier.with_head(PrototypeHead(means, metric="euclidean", scale=1 / (2 * variance)))
    gaussians = torch.distributions.Normal(means, variance**0.5)
    expected = gaussians.log_prob(queries.unsqueeze(-2)).sum(-1).log_softmax(-1)
    torch.testing.assert_close(split.log_prob(queries), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("prototypes", "message"),
    [
        (torch.ones(3, D - 1), "made for embeddings of 7 dimensions, but this backbone gives 8"),
        (torch.ones(D), r"prototypes have shape \(8,\).*\(classes, D\)"),
        (torch.full((3, D), torch.nan), "pass finite numbers"),
        (torch.ones(3, D, dtype=torch.long), "type torch.int64; pass finite numbers"),
    ],
)
def test_bad_prototypes_are_refused(classifier, prototypes, message) -> None:
    with pytest.raises(ValueError, match=message):
        classifier.with_head(prototypes)


# --- neighbours -----------------------------------------------------------------------------------------------------


def _vote(query: np.ndarray, points: np.ndarray, labels: list[int], k: int, cosine: bool) -> list[float]:
    """Log-probabilities by the definition, with loops and in float64."""
    unit = (lambda v: v / np.linalg.norm(v)) if cosine else lambda v: v
    squares = sorted(
        (float(((unit(query) - unit(p)) ** 2).sum()), label) for p, label in zip(points, labels, strict=True)
    )
    votes = [(1 - square / squares[k][0], label) for square, label in squares[:k]]
    total = sum(vote for vote, _ in votes)
    classes = max(labels) + 1
    counts = [sum(vote for vote, label in votes if label == c) * k / total for c in range(classes)]
    return [math.log((count + 1 / classes) / (k + 1)) for count in counts]


@pytest.mark.parametrize("metric", ["cosine", "euclidean"])
@pytest.mark.parametrize("k", [1, 5, 59])
def test_neighbours_vote_by_the_definition(classifier, examples, queries, metric, k) -> None:
    split = classifier.with_head(NeighborsHead(*examples, k=k, metric=metric))
    found = split.log_prob(queries)
    assert found.shape == (2, 3, 3)
    for i, j in itertools.product(range(2), range(3)):
        expected = _vote(
            queries[i, j].double().numpy(),
            examples[0].double().numpy(),
            examples[1].tolist(),
            k,
            cosine=metric == "cosine",
        )
        torch.testing.assert_close(found[i, j].tolist(), expected, rtol=1e-3, atol=1e-3)


def test_neighbours_change_smoothly_and_are_finite_everywhere(classifier, examples, queries) -> None:
    split = classifier.with_head(NeighborsHead(*examples, k=5))
    here, there = examples[0][:2].double()

    def path(steps: int) -> Tensor:
        return here + torch.linspace(0, 1, steps + 1, dtype=torch.float64).unsqueeze(1) * (there - here)

    nearest = F.normalize(path(1000), dim=-1) @ F.normalize(examples[0].double(), dim=-1).T
    assert len({tuple(sorted(row)) for row in nearest.topk(5).indices.tolist()}) > 5  # the five do change
    coarse, fine = (split.head(path(steps)).diff(dim=0).abs().max() for steps in (1000, 16000))
    assert 0 < fine < coarse / 8  # a jump would be as high in smaller steps
    for extreme in (torch.zeros(1, D), examples[0][:1], queries[0] * 1e12, queries[0] * 1e-12):
        assert split.log_prob(extreme).isfinite().all()
        assert (split.log_prob(extreme) >= math.log(1 / (3 * 6)) - 1e-5).all()
    copies = classifier.with_head(NeighborsHead(examples[0][:1].repeat(9, 1), torch.arange(9) % 3, k=3))
    assert copies.log_prob(examples[0][:4]).isfinite().all()


@pytest.mark.parametrize(
    ("count", "labels", "k", "message"),
    [
        (6, [0, 1, 2, 0, 1, 2], 6, "k is 6, but 6 embeddings are stored; choose k between 1 and 5"),
        (6, [0, 1, 2, 0, 1, 2], 0, "k is 0"),
        (6, [1, 2, 3, 1, 2, 3], 2, "labels hold 1, 2, 3; number the classes from 0"),
        (6, [0, 2, 2, 0, 2, 2], 2, "labels hold 0, 2; number"),
        (6, [-1, 0, 1, 0, 1, 1], 2, "labels hold -1, 0, 1; number"),
        (6, [0, 1, 2], 2, r"labels have shape \(3,\).*one integer for each of the 6"),
        (6, [0.0, 1.0, 2.0, 0.0, 1.0, 2.0], 2, "type torch.float32"),
    ],
)
def test_bad_neighbours_are_refused(count, labels, k, message) -> None:
    with pytest.raises(ValueError, match=message):
        NeighborsHead(torch.ones(count, D), torch.tensor(labels), k=k)


def test_an_unknown_metric_and_other_dimensions_are_refused(classifier, examples) -> None:
    with pytest.raises(ValueError, match="Unknown metric 'manhattan'; choose one of cosine, euclidean"):
        PrototypeHead(torch.ones(3, D), metric="manhattan")
    with pytest.raises(ValueError, match="made for embeddings of 5 dimensions, but this backbone gives 8"):
        classifier.with_head(NeighborsHead(examples[0][:, :5], examples[1]))


# --- as modules -----------------------------------------------------------------------------------------------------


def test_tensors_of_heads_are_buffers_and_no_part_of_the_backbone(classifier, examples, queries) -> None:
    before = classifier.fingerprint()
    estimator = LogisticRegression().fit(examples[0].numpy(), examples[1].numpy())
    for head in (PrototypeHead(examples[0][:3]), NeighborsHead(*examples), EstimatorHead(estimator)):
        split = classifier.with_head(head)
        assert split.fingerprint() == before
        assert not list(head.parameters())
        assert all(tensor.device.type == "meta" for tensor in head.to("meta").state_dict().values())
    head = PrototypeHead(examples[0][:3])
    exact = head(queries)
    assert not head.prototypes.requires_grad
    head.prototypes += 1
    assert torch.equal(PrototypeHead(examples[0][:3])(queries), exact)  # its own copy
    half = PrototypeHead(examples[0][:3]).to(torch.bfloat16)
    assert half.prototypes.dtype == torch.bfloat16
    assert half(queries.to(torch.bfloat16)).dtype == torch.float32
    torch.testing.assert_close(half(queries.to(torch.bfloat16)), exact, rtol=0.05, atol=0.05)


def test_gradients_reach_the_embedding_through_prototypes_and_neighbours(examples, queries) -> None:
    for head in (PrototypeHead(examples[0][:3]), NeighborsHead(*examples, k=5)):
        double = head.double()
        inputs = queries.double().requires_grad_()
        assert torch.autograd.gradcheck(double, inputs)


def test_a_module_for_rows_alone_is_given_rows(classifier, queries) -> None:
    head = nn.Sequential(nn.BatchNorm1d(D), nn.Linear(D, 4))
    with torch.no_grad():
        head[0].running_mean.normal_()
    mean = head[0].running_mean.clone()
    split = classifier.with_head(head)
    assert torch.equal(head[0].running_mean, mean) and head[0].num_batches_tracked == 0  # tried in eval mode
    expected = head.eval()(queries.flatten(0, 1)).unflatten(0, (2, 3))
    torch.testing.assert_close(split.head(queries), expected)
    plain = nn.Linear(D, 4)
    assert classifier.with_head(plain).head is plain


@pytest.mark.parametrize(
    ("head", "error", "message"),
    [
        (
            lambda e: e.sum(),
            ValueError,
            r"gives \(\) for embeddings of shape \(6, 8\).*logits of shape \(6, classes\)",
        ),
        (lambda e: e[:3], ValueError, r"gives \(3, 8\) for embeddings"),
        (lambda e: e[:, :0], ValueError, r"gives \(6, 0\) for embeddings"),
        (lambda e: "cat", ValueError, "gives str for embeddings"),
        (lambda e: e.numpy(), ValueError, "gives ndarray for embeddings"),
        (lambda e: torch.cat([e, e[:, :1] * torch.nan], 1), ValueError, "gives NaN for class 8, whatever"),
        (nn.Linear(D, 3).bfloat16(), ValueError, "does not accept.*for this backbone, in torch.float32 on cpu"),
        (np.ones((3, D)), TypeError, "A ndarray is no head; pass a module, a function, class prototypes as a tensor"),
        (None, TypeError, "A NoneType is no head"),
    ],
)
def test_what_is_no_head_is_refused(classifier, head, error, message) -> None:
    with pytest.raises(error, match=message):
        classifier.with_head(head)


def test_names_must_be_counted_from_zero(classifier) -> None:
    with pytest.raises(ValueError, match=r"id2label has the keys \[1, 2, 3\]; number the classes from 0 to 2"):
        classifier.with_head(nn.Linear(D, 3), id2label={1: "a", 2: "b", 3: "c"})
    with pytest.raises(ValueError, match="id2label names 2 classes, but the head gives 3 logits"):
        classifier.with_head(nn.Linear(D, 3), id2label=["a", "b"])


# --- probabilities --------------------------------------------------------------------------------------------------


def test_log_prob_of_each_kind_is_torchs_negative_loss(classifier, queries) -> None:
    torch.manual_seed(0)
    several, one = nn.Linear(D, 4), nn.Linear(D, 1)
    with torch.no_grad():
        for y in range(4):
            labels = torch.full((2, 3), y)
            loss = F.cross_entropy(several(queries).movedim(-1, 1), labels, reduction="none")
            torch.testing.assert_close(classifier.with_head(several).log_prob(queries)[..., y], -loss)
        loss = F.binary_cross_entropy_with_logits(several(queries), torch.ones(2, 3, 4), reduction="none")
        torch.testing.assert_close(classifier.with_head(several, multi_label=True).log_prob(queries), -loss)
        loss = F.binary_cross_entropy_with_logits(one(queries), torch.ones(2, 3, 1), reduction="none")
        alone = classifier.with_head(one)
        assert alone.multi_label and alone.id2label == {0: "LABEL_0"}
        torch.testing.assert_close(alone.log_prob(queries), -loss)
        for multi_label in (False, True):
            binary = classifier.with_head(one, id2label={0: "dog", 1: "cat"}, multi_label=multi_label)
            assert not binary.multi_label and binary.id2label == {0: "dog", 1: "cat"}
            for y in range(2):
                labels = torch.full((2, 3, 1), float(y))
                loss = F.binary_cross_entropy_with_logits(one(queries), labels, reduction="none")
                torch.testing.assert_close(binary.log_prob(queries)[..., [y]], -loss)


@torch.no_grad()
@pytest.mark.parametrize("names", [["no tumour", "tumour"], ["tumour"]])
def test_a_model_of_one_logit_has_the_classes_that_it_names(names, randomized, images) -> None:
    config = ViTConfig(
        image_size=32,
        patch_size=8,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=64,
        id2label=dict(enumerate(names)),
    )
    model = ViTForImageClassification(config)
    model.classifier = nn.Linear(32, 1)
    split = split_classifier(randomized(model).eval())
    assert split.id2label == dict(enumerate(names))
    logit = model(images(3, 32)).logits.squeeze(1)
    probabilities = split.log_prob(split.embed(images(3, 32))).exp()
    torch.testing.assert_close(probabilities[:, -1], logit.sigmoid())
    assert probabilities.shape == (3, len(names))
    if len(names) == 2:
        torch.testing.assert_close(probabilities[:, 0], 1 - logit.sigmoid())
        torch.testing.assert_close(split(images(3, 32)).logits, torch.stack([torch.zeros(3), logit], 1))


# --- one backbone, several heads ------------------------------------------------------------------------------------


@torch.no_grad()
def test_a_second_head_costs_no_pass_of_the_backbone(shared_model, images, examples) -> None:
    model = shared_model("cnn")
    general = split_classifier(model)
    pixel_values, rows, side = images(2, 32), 4, 8
    passes = []
    handle = model.register_forward_hook(lambda module, args, output: passes.append(len(args[0])))
    kept, removed = tve_hf.exact_meta_attribution(general, pixel_values, grid_size=rows, hops=1)
    assert sum(passes) == 2 * 2 * rows**2
    passes.clear()
    estimator = LogisticRegression().fit(examples[0].numpy(), examples[1].numpy())
    task = general.with_head(estimator)
    class_idx = torch.tensor([1, 2])
    scores = tve_hf.transfer(kept, removed, task, class_idx, "log_prob")
    general_scores = tve_hf.transfer(kept, removed, general, class_idx, "log_prob")
    assert passes == []
    handle.remove()

    def task_model(image: Tensor, y: int) -> float:
        for stage in model.stages:
            image = stage(image)
        return estimator.predict_log_proba(image.mean((1, 2)).double().numpy()[None])[0, y]

    for b, row, column in itertools.product(range(2), range(rows), range(rows)):
        top, left = max(row - 1, 0) * side, max(column - 1, 0) * side
        bottom, right = (row + 2) * side, (column + 2) * side
        alone, without = torch.zeros_like(pixel_values[b]), pixel_values[b].clone()
        alone[:, top:bottom, left:right] = pixel_values[b, :, top:bottom, left:right]
        without[:, top:bottom, left:right] = 0
        y = int(class_idx[b])
        expected = task_model(alone, y) - task_model(without, y)
        assert scores[b, row * rows + column].item() == pytest.approx(expected, rel=1e-3, abs=1e-4)
        logits = [model(image[None])[0].log_softmax(0)[y] for image in (alone, without)]
        torch.testing.assert_close(general_scores[b, row * rows + column], logits[0] - logits[1], rtol=1e-3, atol=1e-4)
    assert np.corrcoef(scores.flatten(), general_scores.flatten())[0, 1] < 0.99  # the heads do differ


@torch.no_grad()
def test_affine_maps_are_found_whatever_they_are_written_as() -> None:
    torch.manual_seed(0)
    linear, scaled = nn.Linear(6, 3), nn.Linear(6, 3, bias=False)
    convolution = nn.Conv2d(6, 3, 1)
    heads = {
        "sum": (lambda e: linear(e) + 0.5 * scaled(e), linear.weight + 0.5 * scaled.weight, linear.bias),
        "part": (lambda e: linear(e)[..., :2], linear.weight[:2], linear.bias[:2]),
        "convolution": (
            lambda e: convolution(e.reshape(-1, 6, 1, 1)).reshape(*e.shape[:-1], 3),
            convolution.weight.flatten(1),
            convolution.bias,
        ),
    }
    for name, (head, weight, bias) in heads.items():
        found = affine_map(head, 6, torch.float32, torch.device("cpu"))
        assert found is not None, name
        torch.testing.assert_close(found.weight, weight)
        torch.testing.assert_close(found.bias, bias)
    half = affine_map(linear.bfloat16(), 6, torch.bfloat16, torch.device("cpu"))
    assert torch.equal(half.weight, linear.weight.float()) and torch.equal(half.bias, linear.bias.float())
