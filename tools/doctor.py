"""Says what this machine can run; ``--build_ops`` compiles DeepSpeed's CPU operators."""

from gptoughts.errors import run_main
from gptoughts.platform.doctor import main

if __name__ == "__main__":
    run_main(main)
