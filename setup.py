"""Packaging. `pip install -e .` makes `alpaca_rlhf` importable from everywhere.

The ranges here are what the code is meant to work with: lower bounds hold the interfaces it uses,
upper bounds stop before the next major version. The exact versions that the tests run with are in
requirements.txt.
"""

import re
from pathlib import Path

from setuptools import find_packages, setup

HERE = Path(__file__).resolve().parent


def version() -> str:
    """Read the version from the package without importing it."""
    source = (HERE / "alpaca_rlhf" / "__init__.py").read_text(encoding="utf-8")
    found = re.search(r'^__version__ = "([^"]+)"$', source, re.MULTILINE)
    if found is None:
        raise RuntimeError("alpaca_rlhf/__init__.py does not define __version__")
    return found.group(1)


def tested() -> list[str]:
    """The pins of requirements.txt; the installed package knows them as the extra `tested`."""
    pins = HERE / "requirements.txt"
    lines = pins.read_text(encoding="utf-8").splitlines() if pins.exists() else []
    return [line for line in lines if line and not line.startswith("#")]


setup(
    name="alpaca-rlhf",
    version=version(),
    description="RLHF for LLaMA-family models in three steps: SFT, reward model, PPO",
    packages=find_packages(include=["alpaca_rlhf", "alpaca_rlhf.*"]),
    package_data={
        "alpaca_rlhf.demo": ["*.yaml"],
        "alpaca_rlhf.evaluation.report": ["*.j2", "*.css", "*.js"],
        "alpaca_rlhf.utils.generation.cpu": ["*.c"],
    },
    python_requires=">=3.11",
    install_requires=[
        "torch>=2.9,<3",
        "deepspeed>=0.19.8,<1",
        "transformers>=5,<6",
        "datasets>=4,<6",
        "peft>=0.18,<1",
        "accelerate>=1.10,<2",
        "sentencepiece>=0.2,<1",
        "protobuf>=5,<8",
        "numpy>=2,<3",
        "py3langid>=0.3,<1",
        "filelock>=3.15",
        "matplotlib>=3.9,<4",
        "Jinja2>=3.1,<4",
        "httpx>=0.27,<1",
        "psutil>=5.9",
        "PyYAML>=6,<7",
        "tqdm>=4.66,<5",
    ],
    # debug: for `my_deepspeed.py --debug_ranks`; tensorboard, wandb, mlflow: for `--tracker`;
    # quantized: for `--load_in_4bit` and `--load_in_8bit`; chat: the web chat; serve: the endpoint.
    extras_require={
        "tested": tested(),
        "debug": ["debugpy>=1.8,<2"],
        "tensorboard": ["tensorboard>=2.18,<3"],
        "wandb": ["wandb>=0.19,<1"],
        "mlflow": ["mlflow>=2.20,<4"],
        "quantized": ["bitsandbytes>=0.50,<1"],
        "chat": ["gradio>=6,<7"],
        "serve": ["fastapi>=0.115", "uvicorn>=0.30"],
    },
)
