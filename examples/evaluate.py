"""Compare explanation methods on held-out images: the same as `tve-hf evaluate`, for `accelerate launch`.

    accelerate launch examples/evaluate.py --classifier google/vit-base-patch16-224 --model tve-vit-base \
        --test_files 'images/*.parquet' --methods fair --removals zero blur road --output_dir results
"""

import sys

from tve_hf.cli import main

if __name__ == "__main__":
    sys.exit(main(["evaluate", *sys.argv[1:]]))
