#!/usr/bin/env bash
# Go on, more carefully, from the newest good checkpoint of a run that went wrong; see gptoughts/training/emergency.py, or --help.
set -euo pipefail
root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
python="${PYTHON:-$root/.venv/bin/python}"
[ -x "$python" ] || python=python3
PYTHONPATH="$root${PYTHONPATH:+:$PYTHONPATH}" exec "$python" -m gptoughts.training.emergency "$@"
