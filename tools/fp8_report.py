"""Say what FP8 casts of a run lost, and draw it; see ``gptoughts.training.fp8_report``."""

from gptoughts.errors import run_main
from gptoughts.training.fp8_report import main

if __name__ == "__main__":
    run_main(main)
