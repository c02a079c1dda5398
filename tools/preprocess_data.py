"""Turn text into megatron-core indexed corpora: see --help."""

from gptoughts.data.preprocess import main
from gptoughts.errors import run_main

if __name__ == "__main__":
    run_main(main)
