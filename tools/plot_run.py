"""Draw loss curves; see ``gptoughts.training.plot``."""

from gptoughts.errors import run_main
from gptoughts.training.plot import main

if __name__ == "__main__":
    run_main(main)
