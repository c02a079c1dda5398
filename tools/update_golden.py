"""Record golden loss curves anew; see ``tests.golden.curve``."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from gptoughts.errors import run_main
from tests.golden.curve import main

if __name__ == "__main__":
    run_main(main)
