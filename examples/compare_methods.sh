#!/usr/bin/env bash
# Every method, on a CNN of ImageNet and on the shipped ViT, with the samples of the papers and with enough of them.
# About five hours on two CPU cores; started again, it computes only what is missing.
#
#   examples/compare_methods.sh DATA MODELS
#
# DATA holds parquet image sets (imagenet_samples, tiny_imagenet, imagenette, cats_vs_dogs, photos), MODELS the CNN.
set -euo pipefail
data=$1 models=$2
results=docs/comparison
runs=runs # what is computed stays here
vit=tve_hf/checkpoints/vit-tiny-tiny-imagenet
shapley=examples/vit-shapley-vit-tiny-tiny-imagenet # by examples/train_vit_shapley.py

cnn=$models/mobilenet_v2_1.0_224_imagenet
# Explainers for the CNN, on unlabelled photographs beside those that it is judged by, each time of another crop and with
# new coalitions: 251,000 masked passes. One of twice the width, that was trained before examples/study_backgrounds.py
# said how wide coalitions should be, and for two epochs after it: 351,000. And one of the paper's two backgrounds, 0.5
# million passes, on 20,000 images of 64 pixels and 3,100 larger ones.
large=("$data"/photos/train-*.parquet "$data"/{imagenette,cats_vs_dogs}/train-00000-of-00001.parquet)
random() { # output folder, then options
    OMP_NUM_THREADS=1 MALLOC_MMAP_MAX_=0 MALLOC_TRIM_THRESHOLD_=100000000000 ACCELERATE_USE_CPU=true \
        ACCELERATE_MIXED_PRECISION=bf16 torchrun --nproc_per_node 2 examples/pretrain.py --classifier "$cnn" \
        --output_dir $1 --train_files "${large[@]}" --validation_files "$data/imagenette/test-*.parquet" --hops 1 \
        --backgrounds random --coalitions smooth --coalitions_per_image 8 --random_resized_crop --batch_size 16 \
        --normalize_labels "${@:2}"
}
random $runs/explainer-mobilenet-v2-small --grid_size 14 --coalition_scale 1.5 --label_removals zero blur \
    --hidden_size 128 --num_hidden_layers 2 --num_epochs 5 --validation_images 16 --save_steps 197 --seed 0
random $runs/explainer-mobilenet-v2-first --grid_size 14 --coalition_scale 0.7 --label_removals zero zero zero blur \
    --hidden_size 256 --num_hidden_layers 2 --num_epochs 5 --validation_images 32 --save_steps 197 --seed 0
random $runs/explainer-mobilenet-v2-wide --explainer $runs/explainer-mobilenet-v2-first --coalition_scale 1.5 \
    --label_removals zero blur --num_epochs 2 --validation_images 16 --save_steps 1000 --seed 1
tve-hf pretrain --classifier "$cnn" --output_dir $runs/explainer-mobilenet-v2 --train_files \
    "$data/tiny_imagenet/train-00000-of-00002.parquet" "$data"/{imagenette,cats_vs_dogs}/train-00000-of-00001.parquet \
    --validation_files "$data/imagenette/test-*.parquet" --validation_images 16 --grid_size 14 --batch_size 32 \
    --num_epochs 5 --cache_labels --normalize_labels --save_steps 600
tve-hf evaluate --classifier "$cnn" --test_files "$data/imagenet_samples/test-*.parquet" --num_images 100 \
    --methods paper fair --removals zero blur --output_dir $runs/comparison/two-states \
    --model $runs/explainer-mobilenet-v2
for name in small wide; do
    tve-hf evaluate --classifier "$cnn" --test_files "$data/imagenet_samples/test-*.parquet" --num_images 100 \
        --methods tve --removals zero blur --num_gallery 0 --output_dir $runs/comparison/$name \
        --model $runs/explainer-mobilenet-v2-$name
done
small=$runs/comparison/small/report.json
wide=$runs/comparison/wide/report.json two_states=$runs/comparison/two-states/report.json
python examples/join_reports.py --output_dir $results/mobilenet_v2 $small $two_states \
    --rename $two_states tve=tve_two_states
python examples/join_reports.py --output_dir $runs/comparison/wide-joined $small $wide --rename $wide tve=tve_wide
mkdir -p $results/mobilenet_v2_wide
install -m 644 $runs/comparison/wide-joined/{report.json,table.md} $results/mobilenet_v2_wide
install -m 644 $runs/explainer-mobilenet-v2-first/training.json $results/mobilenet_v2_wide/training_first.json
install -m 644 $runs/explainer-mobilenet-v2-wide/training.json $results/mobilenet_v2_wide/training.json
install -m 644 $runs/explainer-mobilenet-v2-small/training.json $results/mobilenet_v2/training.json
install -m 644 $runs/explainer-mobilenet-v2/training.json $results/mobilenet_v2/training_two_states.json
# The explainer of two backgrounds that shipped_checkpoints.sh trains.
tve-hf evaluate --classifier $vit --test_files "$data/tiny_imagenet/test-*.parquet" --num_images 100 \
    --methods paper fair --removals zero blur --output_dir $runs/comparison/vit_tiny \
    --model $runs/explainer-antithetical --vit_shapley $shapley
mkdir -p $results/vit_tiny
for file in report.json table.md fidelity.png cost.png removals.png; do
    install -m 644 $runs/comparison/vit_tiny/$file $results/vit_tiny/$file
done

# Two states for all of them, Eq. 5, against the sampled expectation, Eq. 3.
python examples/study_sampling.py --classifier $vit --files "$data/tiny_imagenet/test-*.parquet" --grid_size 8 \
    --hops 1 --num_images 100 --num_patches 16 --output_file $results/sampling.json --plot $results/sampling.png

# What masked passes buy in training: both forms of the explainer at 20,000 and at 80,000.
python examples/study_passes.py --classifier $vit --train_files "$data/tiny_imagenet/train-*.parquet" \
    --test_files "$data/tiny_imagenet/test-*.parquet" --numbers 1250 5000 --coalition_scale 0.7 --num_images 60 \
    --output_dir $runs/passes --output_file $results/passes.json --plot $results/passes.png

# How small an explainer may be, at 80,000.
python examples/study_sizes.py --classifier $vit --train_files "$data/tiny_imagenet/train-*.parquet" \
    --test_files "$data/tiny_imagenet/test-*.parquet" --numbers 5000 --sizes 64x1 128x1 128x2 192x2 --num_images 60 \
    --output_dir $runs/sizes --output_file $results/sizes.json --plot $results/sizes.png

# Which backgrounds should stand for all: fidelity of two and of random ones, before any training.
python examples/study_backgrounds.py --num_images 24 --bf16 --batch_size 4 --cells $runs/backgrounds \
    --output_file $results/backgrounds.json --plot $results/backgrounds.png \
    --case $vit 8 1 "$data/tiny_imagenet/test-*.parquet" \
    --case tve_hf/checkpoints/vit-tiny-cats-vs-dogs 8 1 "$data/cats_vs_dogs/test-*.parquet" \
    --case "$models/mobilenet_v1_0.25_128_imagenet" 8 1 "$data/photos/train-*.parquet" \
    --case $cnn 14 1 "$data/photos/train-*.parquet"
