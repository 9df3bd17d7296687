"""Pre-train an explainer on unlabelled images: `accelerate launch examples/pretrain.py --help`."""

from transformers import HfArgumentParser

from tve_hf.pretrain import PretrainArguments, pretrain

if __name__ == "__main__":
    (arguments,) = HfArgumentParser(PretrainArguments).parse_args_into_dataclasses()
    pretrain(arguments)
