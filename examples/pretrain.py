"""Pre-train an explainer on unlabelled images; all settings: `python examples/pretrain.py --help`.

On the GPUs of one machine, ImageNet from the Hub without a copy on disk, logged to TensorBoard:

    accelerate launch --config_file examples/accelerate/ddp.yaml examples/pretrain.py \\
        --classifier google/vit-base-patch16-224 --output_dir tve-vit-base \\
        --dataset_name ILSVRC/imagenet-1k --validation_split validation --streaming --dataloader_num_workers 8 \\
        --random_resized_crop --num_epochs 10 --report_to tensorboard --push_to_hub

The same command started again goes on from the last checkpoint, with the same images and draws. SIGTERM and SIGUSR1
write one and end the run with exit code 128 + the signal's number (143, 138), or with what the launcher makes of it;
0 means that the explainer is finished. So a SLURM job can queue itself again before its time is up: examples/slurm.sh.

The paper's settings, one to a line in a file, as every command of tve-hf reads them; what follows it goes before it:

    python examples/pretrain.py @examples/recipes/paper.args --classifier google/vit-base-patch16-224 ...

Fine-tune a released explainer on your fully fine-tuned classifier (the paper's LETA-FT):

    python examples/pretrain.py --classifier my-tuned-vit --explainer tve-vit-base --learning_rate 1e-4 \\
        --num_epochs 1 --dataset_name my-images --output_dir tve-my-tuned-vit
"""

import sys

from tve_hf.cli import main

if __name__ == "__main__":
    sys.exit(main(["pretrain", *sys.argv[1:]]))
