"""Print the layouts of a run that fit some GPUs, with predicted memory, communication and speed: see --help."""

from gptoughts.errors import run_main
from gptoughts.planning.command import main

if __name__ == "__main__":
    run_main(main)
