#!/usr/bin/env bash
# Run the tests and every benchmark on this machine. Each line also runs on its own. On a GPU, compilation takes some minutes.
#     bash benchmarks/run_all.sh [batch size of the training steps]
set -uo pipefail
cd "$(dirname "$0")/.."
batch="${1:-256}"
python -m pytest
python benchmarks/unet_step.py "$batch"
python benchmarks/vae_step.py "$batch"
python benchmarks/sample_64.py
python benchmarks/loader.py
python benchmarks/memory.py configs/celeba64.yaml diffusion.batch_size=256
python benchmarks/memory.py configs/faces512.yaml
python benchmarks/pixel_space.py configs/faces512.yaml 4 128 256
python benchmarks/faults.py 5
