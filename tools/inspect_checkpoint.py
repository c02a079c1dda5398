"""Print what a checkpoint holds, or where two differ: see --help."""

from gptoughts.checkpoint.inspect import main
from gptoughts.errors import run_main

if __name__ == "__main__":
    run_main(main)
