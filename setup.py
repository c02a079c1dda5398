"""Packaging: dependency ranges and console scripts (exact versions for an installation: requirements/)."""

from setuptools import find_packages, setup

setup(
    name="gptoughts",
    version="0.1.0",
    description="Pretrain and fine-tune language models: megatron-core specs, DeepSpeed ZeRO, laptop to cluster",
    license="Apache-2.0",
    python_requires=">=3.11",
    packages=find_packages(include=["gptoughts", "gptoughts.*"]),
    package_data={"gptoughts": ["models/*.cpp", "models/*.h"]},
    install_requires=[
        "torch>=2.6",
        "megatron-core>=0.16.1,<0.20",
        "deepspeed>=0.19.8,<0.20",
        "transformers>=5.0",
        "tokenizers>=0.22",
        "datasets>=4.0",
        "safetensors>=0.5",
        "jsonargparse[signatures]>=4.40",
        "numpy",
        "PyYAML",
        "rich",
        "matplotlib",
        "pillow",
        "ninja",
        "psutil",
        "zstandard",
        "xxhash",
    ],
    extras_require={
        "te": ["transformer-engine[pytorch]>=2.0"],
        "mpi": ["mpi4py"],
        "wandb": ["wandb"],
        "tensorboard": ["tensorboard"],
        "eval": ["lm-eval>=0.4.13"],
        "dev": ["pytest", "pytest-xdist", "ruff", "mypy", "types-PyYAML", "tensorboard"],
    },
    entry_points={
        "console_scripts": [
            "gptoughts-pretrain=gptoughts.training.console:pretrain",
            "gptoughts-generate=gptoughts.training.console:generate",
            "gptoughts-evaluate=gptoughts.training.console:evaluate",
            "gptoughts-preprocess-data=gptoughts.training.console:preprocess_data",
            "gptoughts-train-tokenizer=gptoughts.training.console:train_tokenizer",
            "gptoughts-fp8-report=gptoughts.training.console:fp8_report",
            "gptoughts-plot-run=gptoughts.training.console:plot_run",
            "gptoughts-convert-checkpoint=gptoughts.training.console:convert_checkpoint",
            "gptoughts-doctor=gptoughts.training.console:doctor",
        ]
    },
)
