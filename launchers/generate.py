"""Sample from a trained model; see ``gptoughts.inference.generate``."""

from gptoughts.errors import run_main
from gptoughts.inference.generate import main

if __name__ == "__main__":
    run_main(main)
