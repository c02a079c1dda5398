"""Convert Hugging Face folders to our checkpoints and back: see --help."""

from gptoughts.errors import run_main
from gptoughts.inference.convert_checkpoint import main

if __name__ == "__main__":
    run_main(main)
