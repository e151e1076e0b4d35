#!/usr/bin/env bash
# All that is measured on a GPU, in about nine minutes: tests, the table of docs/speed.md, three seeds of hyper.py on
# Hopper side by side, then hyper_paper.py for the rest, which the same command continues the next time.
#
#   bash benchmark/gpu.sh
#
# Needs a GPU, a CUDA build of torch, requirements.txt, stable-baselines3 and pytest. Results: benchmark/results
set -u
cd "$(dirname "$0")/.."
start=$SECONDS
export MUJOCO_GL=disabled OMP_NUM_THREADS=1
nvidia-smi --query-gpu=name,driver_version --format=csv,noheader
python -m pytest -q -p no:cacheprovider tests/test_compile.py -k cuda_graphs
for contest in "2 x 256" "2 x 1024" minibatch "env step"; do
    timeout 100 python benchmark/speed.py --device cuda --only "$contest" --rounds 10 --write
done
timeout 180 python benchmark/launch.py hyper.py --seeds 1 2 3 --parallel 3 --variant gpu -- --env-id Hopper-v4 --device cuda
left=$((540 - (SECONDS - start)))
[ $left -gt 30 ] && timeout $left python hyper_paper.py --env-id Hopper-v4 --device cuda --checkpoint-every 1000 \
    --run-dir runs/hyper_paper_gpu
echo "$((SECONDS - start)) seconds"
