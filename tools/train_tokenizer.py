"""Train a byte-level BPE tokenizer: see --help."""

from gptoughts.data.train_tokenizer import main
from gptoughts.errors import run_main

if __name__ == "__main__":
    run_main(main)
