#!/usr/bin/env bash
# Test the trainer with the oldest torch that pyproject.toml allows, in a fresh virtual environment.
#
#     scripts/torch_floor.sh           # the floor in pyproject.toml
#     scripts/torch_floor.sh 2.8       # another version
set -euo pipefail
cd "$(dirname "$0")/.."

floor=$(sed -nE 's/^dependencies = \["torch>=([0-9.]+)".*/\1/p' pyproject.toml)
version=${1:-$floor}

scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
export OMP_NUM_THREADS=1 PYTHONDONTWRITEBYTECODE=1

python3.11 -m venv "$scratch/venv"
export PATH="$scratch/venv/bin:$PATH"
pip install --quiet "torch~=$version.0" "torchaudio~=$version.0" -e '.[recipes,demo,tts,test]'

python -c 'import torch; print("torch", torch.__version__)'
python -m pytest -q -p no:cacheprovider tests/trainer
