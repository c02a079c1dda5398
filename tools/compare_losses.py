"""Compare the losses of two runs; see ``gptoughts.training.compare``."""

from gptoughts.errors import run_main
from gptoughts.training.compare import main

if __name__ == "__main__":
    run_main(main)
