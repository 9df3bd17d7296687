"""What is read of a `pretrained_cfg`, and that nothing is where timm is missing. test_timm.py has the rest."""

from types import SimpleNamespace

from torch import nn

from tve_hf import split_classifier
from tve_hf.classifiers import loading
from tve_hf.classifiers.loading import id2label_from, image_processor_from, pretrained_cfg_of

CFG = {"input_size": (3, 32, 32), "architecture": "tiny", "num_classes": 2, "label_names": ["cat", "dog"]}


class _Model(nn.Module):
    def __init__(self, **attributes) -> None:
        super().__init__()
        for name, value in attributes.items():
            setattr(self, name, value)


def test_what_was_saved_comes_before_the_model_and_the_model_that_it_wraps() -> None:
    saved, own, inner = ({"tag": tag} for tag in ("saved", "own", "inner"))
    wrapped = _Model(pretrained_cfg=inner)
    assert pretrained_cfg_of(_Model()) == {}
    assert pretrained_cfg_of(_Model(config=SimpleNamespace(), base_model=wrapped)) is inner
    assert pretrained_cfg_of(_Model(pretrained_cfg=own, base_model=wrapped)) is own
    assert pretrained_cfg_of(_Model(pretrained_cfg=own, config=SimpleNamespace(pretrained_cfg=saved))) is saved
    assert pretrained_cfg_of(_Model(pretrained_cfg="of another library")) == {}


def test_a_model_of_the_name_alone_is_split_without_timm(monkeypatch, build) -> None:
    monkeypatch.setattr(loading, "is_timm_available", lambda: False)
    assert image_processor_from(CFG) is None
    assert id2label_from(CFG, 2) is None
    model = build("cnn")
    model.pretrained_cfg = {"architecture": "tiny_cnn"}
    classifier = split_classifier(model)
    assert classifier.name == "tiny_cnn"
    assert classifier.image_processor is None
    assert classifier.id2label[0] == "LABEL_0"
