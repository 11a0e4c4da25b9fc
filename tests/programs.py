"""How tests start programs of the package as processes of their own."""

import os
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[1]
DISTRIBUTED = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")


def environment():
    """An environment of a single process on the CPU, without a network."""
    kept = {name: value for name, value in os.environ.items() if name not in DISTRIBUTED}
    return {**kept, "PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1",
            "CUDA_VISIBLE_DEVICES": "", "PYTHONIOENCODING": "utf-8", "TERM": "dumb"}
