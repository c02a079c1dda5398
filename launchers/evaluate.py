"""Measure how well a model predicts texts; see ``gptoughts.inference.evaluate``."""

from gptoughts.errors import run_main
from gptoughts.inference.evaluate import main

if __name__ == "__main__":
    run_main(main)
