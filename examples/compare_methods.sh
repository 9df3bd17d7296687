#!/usr/bin/env bash
# Every method, on a CNN of ImageNet and on the shipped ViT, with the samples of the papers and with enough of them.
# About two hours on two CPU cores; started again, it computes only what is missing.
#
#   examples/compare_methods.sh DATA MODELS
#
# DATA holds parquet image sets (imagenet_samples, tiny_imagenet; imagenette and cats_vs_dogs to train the CNN's
# explainer on), MODELS the CNN.
set -euo pipefail
data=$1 models=$2
results=docs/comparison
runs=runs # interrupted training and computed maps stay here
mobilenet=$models/mobilenet_v2_1.0_224_imagenet
vit=tve_hf/checkpoints/vit-tiny-tiny-imagenet
shapley=examples/vit-shapley-vit-tiny-tiny-imagenet # by examples/train_vit_shapley.py

# 3,100 photographs for a few minutes: enough to see how far an explainer comes for little, not to ship it.
[ -e $runs/explainer-mobilenet-v2/model.safetensors ] || tve-hf pretrain --classifier "$mobilenet" --grid_size 14 \
    --train_files "$data/imagenette/train-*.parquet" "$data/cats_vs_dogs/train-*.parquet" --batch_size 32 \
    --max_steps 300 --save_steps 100 --output_dir $runs/explainer-mobilenet-v2

compare() { # name, classifier, explainer, images, more
    tve-hf evaluate --classifier "$2" --model $3 --test_files "$data/$4/test-*.parquet" --num_images 100 \
        --methods paper fair --removals zero blur --output_dir $runs/comparison/$1 "${@:5}"
    mkdir -p $results/$1
    for file in report.json table.md fidelity.png cost.png removals.png; do
        install -m 644 $runs/comparison/$1/$file $results/$1/$file
    done
}
compare mobilenet_v2 "$mobilenet" $runs/explainer-mobilenet-v2 imagenet_samples
compare vit_tiny $vit tve_hf/checkpoints/tve-vit-tiny-tiny-imagenet tiny_imagenet --vit_shapley $shapley

# Two states for all of them, Eq. 5, against the sampled expectation, Eq. 3.
python examples/study_sampling.py --classifier $vit --files "$data/tiny_imagenet/test-*.parquet" --grid_size 8 \
    --hops 1 --num_images 100 --num_patches 32 --output_file $results/sampling.json --plot $results/sampling.png
