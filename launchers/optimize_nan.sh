#!/usr/bin/env bash
# Say where a run went wrong and what to change; see gptoughts/training/diagnose.py, or --help.
set -euo pipefail
root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
python="${PYTHON:-$root/.venv/bin/python}"
[ -x "$python" ] || python=python3
PYTHONPATH="$root${PYTHONPATH:+:$PYTHONPATH}" exec "$python" -m gptoughts.training.diagnose "$@"
