#!/usr/bin/env bash
# Set what saves memory and what makes CUDA faster; see gptoughts/training/optimize.py, or --help.
set -euo pipefail
root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
python="${PYTHON:-$root/.venv/bin/python}"
[ -x "$python" ] || python=python3
PYTHONPATH="$root${PYTHONPATH:+:$PYTHONPATH}" exec "$python" -m gptoughts.training.optimize "$@"
