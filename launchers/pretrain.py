"""Pretrain a model; see ``gptoughts.training.pretrain``."""

from gptoughts.errors import run_main
from gptoughts.training.pretrain import main

if __name__ == "__main__":
    run_main(main)
