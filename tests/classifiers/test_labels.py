"""Classes by number, name and synonym."""

import pytest

from tve_hf import split_classifier

LABELS = ["tabby, tabby cat", "Egyptian cat", "Cardigan, Welsh corgi", "cardigan", "crane", "crane", "sports car"]


@pytest.fixture
def classifier(shared_model):
    return split_classifier(shared_model("cnn")).with_head(lambda e: e[..., :7], id2label=LABELS)


@pytest.mark.parametrize(
    ("asked", "class_idx"),
    [(0, 0), (6, 6), ("tabby", 0), (" Tabby CAT ", 0), ("egyptian cat", 1), ("Welsh corgi", 2), ("cardigan", 3)],
)
def test_a_class_is_found(classifier, asked, class_idx) -> None:
    assert classifier.class_index(asked) == class_idx


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        (7, "class_idx 7 is not a class of TinyCNN, which has 7, counted from 0"),
        (-1, "class_idx -1 is not a class"),
        ("crane", r"'crane' names the classes 4 \(crane\), 5 \(crane\) of TinyCNN; pass one of them as class_idx"),
        ("car", "'car' is not a class of TinyCNN; did you mean 'sports car'"),
        ("zzz", "'zzz' is not a class of TinyCNN; see classifier.id2label"),
    ],
)
def test_what_is_no_class_is_refused(classifier, asked, message) -> None:
    with pytest.raises(ValueError, match=message):
        classifier.class_index(asked)
