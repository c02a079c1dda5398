"""What the console scripts of setup.py call: the programs of ``launchers/`` and ``tools/`` where only a wheel is."""

from __future__ import annotations

from typing import NoReturn

from gptoughts.errors import run_main


def pretrain() -> NoReturn:
    """``launchers/pretrain.py``."""
    from gptoughts.training.pretrain import main

    run_main(main)


def generate() -> NoReturn:
    """``launchers/generate.py``."""
    from gptoughts.inference.generate import main

    run_main(main)


def evaluate() -> NoReturn:
    """``launchers/evaluate.py``."""
    from gptoughts.inference.evaluate import main

    run_main(main)


def preprocess_data() -> NoReturn:
    """``tools/preprocess_data.py``."""
    from gptoughts.data.preprocess import main

    run_main(main)


def train_tokenizer() -> NoReturn:
    """``tools/train_tokenizer.py``."""
    from gptoughts.data.train_tokenizer import main

    run_main(main)


def convert_checkpoint() -> NoReturn:
    """``tools/convert_checkpoint.py``."""
    from gptoughts.inference.convert_checkpoint import main

    run_main(main)


def plot_run() -> NoReturn:
    """``tools/plot_run.py``."""
    from gptoughts.training.plot import main

    run_main(main)


def fp8_report() -> NoReturn:
    """``tools/fp8_report.py``."""
    from gptoughts.training.fp8_report import main

    run_main(main)


def doctor() -> NoReturn:
    """``tools/doctor.py``."""
    from gptoughts.platform.doctor import main

    run_main(main)
