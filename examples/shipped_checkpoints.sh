#!/usr/bin/env bash
# Train, measure and describe the checkpoints that the package ships. About five hours on two CPU cores.
#
#   examples/shipped_checkpoints.sh DATA MODELS
#
# DATA holds parquet image sets (tiny_imagenet, imagenet_samples, imagenette, cats_vs_dogs, photos), MODELS the pretrained
# CNN that is fine-tuned, and that is the ViT's teacher.
set -euo pipefail
mkdir -p docs/comparison/refine
data=$1 models=$2
checkpoints=tve_hf/checkpoints
results=model_cards/results
cnn=$checkpoints/mobilenet-v2-tiny-imagenet
cnn_pets=$checkpoints/mobilenet-v2-cats-vs-dogs
cnn_explainer=$checkpoints/tve-mobilenet-v2-tiny-imagenet
vit=$checkpoints/vit-tiny-tiny-imagenet
pets=$checkpoints/vit-tiny-cats-vs-dogs
explainer=$checkpoints/tve-vit-tiny-tiny-imagenet
antithetical=docs/comparison/antithetical # the paper's form of the explainer: a row of the comparison
shapley=examples/vit-shapley-vit-tiny-tiny-imagenet # a rival, and of this one head: not in the package
runs=runs # checkpoints of interrupted training stay here

ship() { # copy what a checkpoint needs from its run
    mkdir -p "$2"
    for file in config.json model.safetensors preprocessor_config.json training.json; do
        install -m 644 "$1/$file" "$2/$file"
    done
}

# One thread, and its allocator keeps what it has: on a CPU both are faster than torch's defaults.
export OMP_NUM_THREADS=1 MALLOC_MMAP_MAX_=0 MALLOC_TRIM_THRESHOLD_=100000000000
large=("$data"/photos/train-*.parquet "$data"/{imagenette,cats_vs_dogs}/train-00000-of-00001.parquet)

# A CNN fine-tuned on 200 classes, and a second head on it.
python examples/finetune_cnn.py --classifier "$models/mobilenet_v2_1.0_224_imagenet" \
    --train_files "$data/tiny_imagenet/train-*.parquet" --unlabelled_files "${large[@]}" \
    --test_files "$data/tiny_imagenet/test-*.parquet" --large_test_files "$data/imagenet_samples/test-*.parquet" \
    --output_dir $runs/mobilenet-v2
ship $runs/mobilenet-v2 $cnn
python examples/tune_head.py --classifier $cnn --train_files "$data/cats_vs_dogs/train-*.parquet" \
    --test_files "$data/cats_vs_dogs/test-*.parquet" --output_dir $runs/cnn-pets
ship $runs/cnn-pets $cnn_pets
python examples/share_backbone.py $cnn $cnn_pets

# Its explainer, in two processes: from 315,000 masked passes of 26,000 images, a quarter of them photographs, and then
# from 502,000 of the photographs alone, each time of another crop, with wider coalitions, half of them blurred.
cnn_training() { # output folder, then options
    ACCELERATE_USE_CPU=true ACCELERATE_MIXED_PRECISION=bf16 torchrun --nproc_per_node 2 examples/pretrain.py \
        --classifier $cnn --output_dir $1 --hops 1 --backgrounds random --coalitions smooth --batch_size 16 \
        --normalize_labels "${@:2}"
}
cnn_training $runs/explainer-cnn --train_files "${large[@]}" "$data/tiny_imagenet/train-00000-of-00002.parquet" \
    --grid_size 10 --coalition_scale 0.7 --coalitions_per_image 12 --label_removals zero zero zero zero zero blur \
    --hidden_size 256 --num_hidden_layers 2 --num_epochs 5 --cache_labels --save_steps 821 --seed 0
cnn_training $runs/explainer-cnn-crops --train_files "${large[@]}" --validation_files "$data/imagenette/test-*.parquet" \
    --explainer $runs/explainer-cnn --coalition_scale 1.0 --coalitions_per_image 8 --label_removals zero blur \
    --random_resized_crop --num_epochs 10 --save_steps 200 --seed 1
ship $runs/explainer-cnn-crops $cnn_explainer
# Twice as deep, from scratch, as the second training is; not shipped.
cnn_training $runs/explainer-cnn-deep --train_files "${large[@]}" --validation_files "$data/imagenette/test-*.parquet" \
    --validation_images 32 --grid_size 10 --hidden_size 256 --num_hidden_layers 4 --coalition_scale 1.0 \
    --coalitions_per_image 8 --label_removals zero blur --random_resized_crop --num_epochs 10 --save_steps 200 --seed 1

# The small ViT, a second head on it, and its explainers.
python examples/distill_vit.py --train_files "$data/tiny_imagenet/train-*.parquet" \
    --test_files "$data/tiny_imagenet/test-*.parquet" --teacher "$models/mobilenet_v2_1.0_224_imagenet" \
    --output_dir $runs/vit
ship $runs/vit $vit

python examples/tune_head.py --classifier $vit --train_files "$data/cats_vs_dogs/train-*.parquet" \
    --test_files "$data/cats_vs_dogs/test-*.parquet" --output_dir $runs/pets
ship $runs/pets $pets

# Random backgrounds, Eq. 3: 640,000 masked passes. Of eight pairs of coalitions one is blurred, so that maps hold under
# blur too.
tve-hf pretrain --classifier $vit --train_files "$data/tiny_imagenet/train-*.parquet" \
    --validation_files "$data/tiny_imagenet/test-*.parquet" --output_dir $runs/explainer --grid_size 8 --hops 1 \
    --backgrounds random --coalitions smooth --coalition_scale 0.7 --coalitions_per_image 16 \
    --label_removals zero zero zero zero zero zero zero blur --hidden_size 256 --num_hidden_layers 4 --num_epochs 10 \
    --cache_labels --normalize_labels --save_steps 625 --seed 0
ship $runs/explainer $explainer
python examples/share_backbone.py $vit $pets

# The paper's two states, Eq. 6, with 1.0 million masked passes; that above took 0.64 million.
tve-hf pretrain --classifier $vit --train_files "$data/tiny_imagenet/train-*.parquet" \
    --validation_files "$data/tiny_imagenet/test-*.parquet" --output_dir $runs/explainer-antithetical --grid_size 8 \
    --hops 1 --hidden_size 192 --num_hidden_layers 4 --num_epochs 10 --cache_labels --normalize_labels --save_steps 1250

# 2.3 million passes of the classifier.
python examples/train_vit_shapley.py --classifier $vit --train_files "$data/tiny_imagenet/train-*.parquet" \
    --validation_files "$data/tiny_imagenet/test-*.parquet" --grid_size 8 --hidden_size 192 --num_hidden_layers 4 \
    --batch_size 32 --surrogate_steps 1250 --surrogate_learning_rate 1e-4 --steps 2000 --save_steps 250 \
    --output_dir $runs/vit-shapley
ship $runs/vit-shapley $shapley

# Which rule is the default: two backbones, two removal operators, exact and predicted. The winner is set by hand.
mobilenet=mobilenet_v1_0.25_128_imagenet
tve-hf pretrain --classifier "$models/$mobilenet" --train_files "$data/tiny_imagenet/train-*.parquet" \
    --validation_files "$data/tiny_imagenet/test-*.parquet" --output_dir $runs/explainer-mobilenet --grid_size 8 \
    --hops 1 --hidden_size 192 --num_hidden_layers 2 --max_steps 300 --save_steps 150
python examples/study_rules.py --num_images 100 --output_file $results/rules.json \
    --case $vit 8 1 "$data/tiny_imagenet/test-*.parquet" $runs/explainer-antithetical \
    --case "$models/$mobilenet" 8 1 "$data/imagenet_samples/test-*.parquet" $runs/explainer-mobilenet

measure() { # task, images, folder of the report, classifier, explainer, then options
    tve-hf evaluate --classifier $4 --model $5 --num_images $2 --test_files "$data/$1/test-*.parquet" \
        --output_dir $runs/results/$3 "${@:6}"
    land $runs/results/$3 $3
}
land() { # what tve-hf evaluate wrote, where it is shown
    mkdir -p $2
    for file in report.json table.md fidelity.png cost.png; do
        install -m 644 $1/$file $2/$file
    done
}
for task in tiny_imagenet cats_vs_dogs; do
    classifier=$([ $task = tiny_imagenet ] && echo "$vit" || echo $pets)
    rival=$([ $task = tiny_imagenet ] && echo "--vit_shapley $shapley" || true)
    measure $task 300 $antithetical/$task $classifier $runs/explainer-antithetical $rival \
        --methods random rollout grad_cam legrad
    # Under the paper's rule, for which Theorem 1 holds.
    measure $task 300 $antithetical/${task}_log_prob $classifier $runs/explainer-antithetical $rival --rule log_prob \
        --methods random
    tve-hf evaluate --classifier $classifier --model $explainer $rival --num_images 300 \
        --test_files "$data/$task/test-*.parquet" --output_dir $runs/results/$task \
        --methods exact random chefer_cam libragrad text_span
    # The explainer of two backgrounds is a row too.
    python examples/join_reports.py --output_dir $runs/results/$task-joined $runs/results/$task/report.json \
        $antithetical/$task/report.json --rename $antithetical/$task/report.json tve=tve_two_states
    land $runs/results/$task-joined $results/$task
done
# The CNN's, on larger photographs that nothing was trained on, and on cats against dogs, whose head it has never seen.
for task in imagenet_samples cats_vs_dogs; do
    classifier=$([ $task = imagenet_samples ] && echo "$cnn" || echo $cnn_pets)
    rivals=$([ $task = imagenet_samples ] && echo rise@400 || true)
    tve-hf evaluate --classifier $classifier --model $cnn_explainer --num_images 100 --removals zero blur \
        --test_files "$data/$task/test-*.parquet" --output_dir $runs/results/mobilenet_v2/$task \
        --methods exact random centre grad_cam $rivals
    land $runs/results/mobilenet_v2/$task $results/mobilenet_v2/$task
done
# What its second training gained, and what a deeper one has.
both=$results/mobilenet_v2/imagenet_samples/report.json
for name in first deep; do
    explainer=$runs/explainer-cnn$([ $name = first ] || echo -deep)
    tve-hf evaluate --classifier $cnn --model $explainer --num_images 100 --removals zero blur --num_gallery 0 \
        --test_files "$data/imagenet_samples/test-*.parquet" --output_dir $runs/results/mobilenet_v2/$name --methods tve
done
first=$runs/results/mobilenet_v2/first/report.json deep=$runs/results/mobilenet_v2/deep/report.json
python examples/join_reports.py --output_dir $runs/results/mobilenet_v2/stages $both $first $deep \
    --rename $first tve=tve_first --rename $deep tve=tve_deep --leave_out $both exact random centre grad_cam rise@400
stages=docs/comparison/cnn_stages
mkdir -p $stages
install -m 644 $runs/results/mobilenet_v2/stages/{report.json,table.md} $runs/explainer-cnn/training.json $stages
install -m 644 $runs/explainer-cnn-deep/training.json $stages/training_deep.json
# Maps that n masked passes correct, beside methods that take n passes.
tve-hf evaluate --classifier $vit --model $explainer --num_images 100 --removals zero --num_gallery 0 \
    --test_files "$data/tiny_imagenet/test-*.parquet" --output_dir $runs/results/refine \
    --methods exact random {tve,lime,kernel_shap,rise}@{8,16,25,50,100,400}
for file in report.json table.md cost.png; do
    install -m 644 $runs/results/refine/$file docs/comparison/refine/$file
done
install -m 644 $runs/explainer-antithetical/training.json $antithetical/training.json

python examples/study_theorem.py --report $antithetical/tiny_imagenet_log_prob/report.json \
    --output $antithetical/theorem.png

for folder in $cnn $cnn_pets $vit $pets; do
    tve-hf card $folder --license cc-by-nc-4.0 --output "model_cards/$(basename $folder).md"
done
tve-hf card $explainer --results $results/{tiny_imagenet,cats_vs_dogs} --license cc-by-nc-4.0 \
    --output "model_cards/$(basename $explainer).md"
tve-hf card $cnn_explainer --results $results/mobilenet_v2/{imagenet_samples,cats_vs_dogs} --license cc-by-nc-4.0 \
    --output "model_cards/$(basename $cnn_explainer).md"
python -c 'import skimage.data as d, PIL.Image as i; i.fromarray(d.coffee()).save("'$runs'/coffee.png")'
tve-hf explain --output docs
tve-hf explain $runs/coffee.png --output docs
for name in chelsea coffee; do
    mv docs/$name.tve.png docs/$name.png
    rm docs/$name.tve.json
done
