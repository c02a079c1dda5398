#!/usr/bin/env bash
# Train multi-head latent attention with settings that keep it stable; see gptoughts/training/simplified.py, or --help.
set -euo pipefail
root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
python="${PYTHON:-$root/.venv/bin/python}"
[ -x "$python" ] || python=python3
PYTHONPATH="$root${PYTHONPATH:+:$PYTHONPATH}" exec "$python" -m gptoughts.training.simplified "$@"
