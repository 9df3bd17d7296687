"""One small member of every model family of timm, and the table of how each is split.

`make timm-table` writes the table for the installed timm.
"""

import argparse
import importlib.metadata
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torchvision_ops as torchvision_ops  # before transformers, which imports torchvision where there is one
from tiny_models import fit_batch_statistics, randomize
from torch import Tensor
from tqdm import tqdm
from transformers import TimmWrapperConfig, TimmWrapperForImageClassification

from tve_hf import split_classifier

NUM_LABELS = 5


@dataclass(frozen=True)
class Member:
    """A timm model, the side of its images in pixels, and what its constructor is given to make it smaller."""

    name: str
    side: int = 96
    settings: dict[str, Any] = field(default_factory=dict)

    def build(self, num_labels: int = NUM_LABELS) -> TimmWrapperForImageClassification:
        """It with random weights in the wrapper of transformers, in eval mode; `timm_model` is timm's own."""
        settings = {"pretrained_cfg_overlay": {"input_size": (3, self.side, self.side)}} | self.settings
        config = TimmWrapperConfig(architecture=self.name, num_labels=num_labels, model_args=settings)
        with torch.random.fork_rng():
            model = randomize(TimmWrapperForImageClassification(config))
            fit_batch_statistics(model.timm_model, self.side)
        return model.eval()


def _of(name: str, side: int = 96, **settings: Any) -> Member:
    return Member(name, side, settings)


# The member with the fewest parameters, at the smallest image on which its last feature map is no single cell.
FAMILIES = {
    "beit": _of("beit_base_patch16_224", 64, depth=3),
    "byoanet": _of("halonet_h1", 256),
    "byobnet": _of("test_byobnet"),
    "cait": _of("cait_xxs24_224", 64, depth=3),
    "coat": _of("coat_tiny", 64),
    "convit": _of("convit_tiny", 64),
    "convmixer": _of("convmixer_768_32", 64),
    "convnext": _of("test_convnext"),
    "cpubone": _of("cpubone_nano"),
    "crossvit": _of("crossvit_tiny_240", 240),
    "csatv2": _of("csatv2"),
    "cspnet": _of("cs3darknet_focus_s"),
    "cspnext": _of("cspnext_tiny"),
    "davit": _of("davit_tiny", 64, depths=(1, 1, 1, 1)),
    "deepseek_vit": _of("deepseek_vit_412m", 84, depth=3),
    "deit": _of("deit_tiny_patch16_224", 64),
    "densenet": _of("densenet121", 64),
    "dla": _of("dla46x_c"),
    "dpn": _of("dpn48b", 64),
    "edgenext": _of("edgenext_xx_small"),
    "efficientformer": _of("efficientformer_l1", 224),
    "efficientformer_v2": _of("efficientformerv2_s0", 64),
    "efficientnet": _of("test_efficientnet"),
    "efficientvim": _of("efficientvim_m1", 128),
    "efficientvit_mit": _of("efficientvit_b0"),
    "efficientvit_msra": _of("efficientvit_m0", 128),
    "eva": _of("vit_tiny_patch16_dinov3_qkvb", 64),
    "fasternet": _of("fasternet_t0"),
    "fastvit": _of("fastvit_t8"),
    "focalnet": _of("focalnet_tiny_srf", 64),
    "gcvit": _of("gcvit_xxtiny", 64),
    "gemma4_vit": _of("gemma4_vit_167m", depth=3, position_embedding_size=64),
    "ghostnet": _of("ghostnet_050"),
    "hardcorenas": _of("hardcorenas_b"),
    "hgnet": _of("hgnetv2_b0"),
    "hiera": _of("hiera_tiny_224", 64, stages=(1, 1, 1, 1)),
    "hieradet_sam2": _of("sam2_hiera_tiny", stages=(1, 1, 2, 1), global_att_blocks=(3,)),
    "hrnet": _of("hrnet_w18_small", 64),
    "iformer": _of("iformer_t"),
    "inception_next": _of("inception_next_atto"),
    "inception_resnet_v2": _of("inception_resnet_v2"),
    "inception_v3": _of("inception_v3"),
    "inception_v4": _of("inception_v4"),
    "lcnetv2": _of("lcnetv2_small"),
    "levit": _of("levit_128s", 128),
    "lowformer": _of("lowformer_b0"),
    "mambaout": _of("test_mambaout"),
    "maxxvit": _of("test_coatnet", 64),
    "metaformer": _of("poolformerv2_s12", 64),
    "mlp_mixer": _of("gmlp_ti16_224", 64),
    "mobilenetv3": _of("mobilenetv3_small_050"),
    "mobilenetv5": _of("mobilenetv5_base", 64, channel_multiplier=0.25),
    "mobilevit": _of("mobilevit_xxs"),
    "mvitv2": _of("mvitv2_tiny", 64),
    "naflexvit": _of("naflexvit_base_patch16_parfac_gap", 64, depth=3),
    "nasnet": _of("nasnetalarge", num_features=2016),
    "nest": _of("nest_tiny", 64),
    "nextvit": _of("nextvit_small", 64, depths=(1, 1, 5, 1)),
    "nfnet": _of("test_nfnet"),
    "pit": _of("pit_ti_224", 64),
    "pnasnet": _of("pnasnet5large"),
    "pvt_v2": _of("pvt_v2_b0", 64),
    "qwen3_vit": _of("qwen3_vit_88m", 64, depth=3),
    "rdnet": _of("rdnet_tiny", 64),
    "regnet": _of("regnetx_002"),
    "repghost": _of("repghostnet_050"),
    "repvit": _of("repvit_m1", 64),
    "res2net": _of("res2next50", 64, layers=(1, 1, 1, 1)),
    "resnest": _of("resnest14d", 64),
    "resnet": _of("test_resnet"),
    "resnetv2": _of("resnetv2_18", 64),
    "rexnet": _of("rexnet_100"),
    "selecsls": _of("selecsls42"),
    "senet": _of("legacy_seresnet18", 64),
    "sequencer": _of("sequencer2d_s", 64, layers=(1, 1, 1, 1)),
    "shvit": _of("shvit_s1", 128),
    "sknet": _of("skresnet18", 64),
    "starnet": _of("starnet_s050"),
    "swiftformer": _of("swiftformer_xs", 64),
    "swin_transformer": _of("swin_tiny_patch4_window7_224", 64, depths=(1, 1, 1, 1)),
    "swin_transformer_v2": _of("swinv2_tiny_window8_256", 64, depths=(1, 1, 1, 1)),
    "swin_transformer_v2_cr": _of("swinv2_cr_tiny_224", 64, depths=(1, 1, 1, 1)),
    "tiny_vit": _of("tiny_vit_5m_224"),
    "tnt": _of("tnt_s_legacy_patch16_224", 64, depth=3),
    "tresnet": _of("tresnet_m", 64),
    "twins": _of("twins_svt_small", 64, depths=(1, 1, 1, 1)),
    "vgg": _of("vgg11", mlp_ratio=1 / 32),
    "visformer": _of("visformer_tiny", 64),
    "vision_transformer": _of("test_vit", 64),
    "vision_transformer_hybrid": _of("vit_tiny_r_s16_p8_224", 64, depth=3),
    "vision_transformer_relpos": _of("test_vit_relpos", 64),
    "vision_transformer_sam": _of("samvit_base_patch16_224", 64, depth=3, global_attn_indexes=(2,)),
    "vitamin": _of("vitamin_small_224", 64),
    "volo": _of("volo_d1_224", 64),
    "vovnet": _of("ese_vovnet19b_slim_dw"),
    "xception": _of("legacy_xception"),
    "xception_aligned": _of("xception41p", 64),
    "xcit": _of("xcit_nano_12_p8_224", 64),
}


def noise(batch: int, side: int) -> Tensor:
    return torch.randn(batch, 3, side, side, generator=torch.Generator().manual_seed(batch))


def relative_error(ours: Tensor, theirs: Tensor) -> float:
    """The largest difference of logits, by the largest of them."""
    assert ours.shape == theirs.shape
    assert len(theirs) == 1 or theirs.std(0).max() > 0.01 * theirs.abs().max()  # they do depend on the image
    return float((ours - theirs).abs().max() / theirs.abs().max())


def row(family: str, member: Member) -> str:
    """The line of the table for one member of a family."""
    settings = ", ".join(f"{key}={value}" for key, value in member.settings.items())
    start = f"| {family} | {member.name}{f' ({settings})' if settings else ''}, {member.side} px | "
    model = member.build().timm_model
    try:
        classifier = split_classifier(model)
    except ValueError as error:
        return f"{start}| | | refused: {error} |"
    heads = [
        f"{'' if part.scale == 1 else f'{part.scale:.3g} × '}{'max of ' * part.by_max}{part.name}"
        for part in classifier.backbone.parts
    ]
    with torch.no_grad():
        images = [noise(batch, member.side) for batch in (1, 3)]
        error = max(relative_error(classifier.head(classifier.embed(x)), model(x)) for x in images)
        features = classifier(images[0]).features
    maps = [
        f"{name} {'×'.join(map(str, feature.shape[1:]))}"
        for name, feature in zip(classifier.backbone.feature_names, features, strict=True)
    ]
    verdict = "exact" if error == 0 else f"exact to {error:.0e}" if error <= 1e-5 else f"**wrong by {error:.0e}**"
    return f"{start}{classifier.embedding_dim} | {' + '.join(heads)} | {', '.join(maps)} | {verdict} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, required=True)
    output = parser.parse_args().output
    lines = [
        f"# All {len(FAMILIES)} model families of timm {importlib.metadata.version('timm')}",
        "",
        "Written by `make timm-table`: a member of each family, with random weights, is split by `split_classifier`,"
        " and `head(embed(x))` is compared with its own logits on batches of 1 and 3, by the largest difference over "
        "the largest logit. D is the dimension of the embedding at that size of image; the heads are the modules that "
        "give the logits; the feature maps (channels × rows × columns) are what an explainer may read. "
        "`tests/classifiers/test_timm.py` does the same in continuous integration, and with members whose heads are "
        "unusual.",
        "",
        "| family | member | D | heads | feature maps | verdict |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    lines += [row(family, member) for family, member in tqdm(FAMILIES.items())]
    output.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
