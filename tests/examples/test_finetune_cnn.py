"""What the fine-tuning of the CNN prepares: its classes, its head, and what is cut out and masked."""

import pytest
import torch
from scripts import load_example
from transformers import MobileNetV2Config, MobileNetV2ForImageClassification

finetune = load_example("finetune_cnn")


def test_classes_are_found_by_their_first_name_and_get_one_that_people_read():
    synonyms = {
        0: "background",
        5: "tabby, tabby cat",
        6: "German shepherd, German shepherd dog, alsatian",
        7: "lion, king",
    }
    indices, names = finetune.match_classes(["lion", "tabby", "German shepherd"], synonyms)
    assert indices == [7, 5, 6] and names == ["lion", "tabby cat", "German shepherd dog"]
    with pytest.raises(ValueError, match="0 classes of the classifier are called 'dog'"):
        finetune.match_classes(["dog"], synonyms)
    with pytest.raises(ValueError, match="2 classes of the classifier are called 'crane'"):
        finetune.match_classes(["crane"], {1: "crane", 2: "crane, bird"})


@torch.no_grad()
def test_the_new_head_says_of_its_classes_what_the_old_one_said():
    torch.manual_seed(0)
    config = MobileNetV2Config(image_size=32, depth_multiplier=0.25, num_labels=6)
    model = MobileNetV2ForImageClassification(config).eval()
    x = torch.randn(2, 3, 32, 32)
    before = model(x).logits
    finetune.with_classes(model, [4, 1], ["tabby cat", "lion"])
    torch.testing.assert_close(model(x).logits, before[:, [4, 1]])
    assert model.config.id2label == {0: "tabby cat", 1: "lion"} and model.config.num_labels == 2


def test_cuts_stay_inside_the_image_and_masks_are_whole_patches():
    """Of an image whose left half is black and right half white every cut is made of both, or of one, and no else."""
    pixels = torch.zeros(64, 3, 32, 32, dtype=torch.uint8)
    pixels[..., 16:] = 255
    generator = torch.Generator().manual_seed(0)
    x = finetune.augment(pixels, 48, 0.5, generator)
    assert x.shape == (64, 3, 48, 48) and x.min() >= -1 and x.max() <= 1
    side = x.mean((1, 2))
    mirrored = (side[:, 0] > side[:, -1]).float().mean()
    assert 0.25 < mirrored < 0.75
    ones = torch.ones(300, 3, 48, 48)
    masked = finetune.mask(ones, 16, generator)
    blocks = masked.unfold(2, 16, 16).unfold(3, 16, 16).flatten(4)
    assert ((blocks == 0).all(-1) | (blocks == 1).all(-1)).all()
    assert 0.2 < (masked.flatten(1) == 0).any(1).float().mean() < 0.45
