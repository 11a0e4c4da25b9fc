"""RLHF for LLaMA-family models in three steps: SFT, reward model, PPO."""

import logging

# DeepSpeed warns at its import, in every process, wherever there is no accelerator. Here, since
# this runs before any module of ours imports it.
logging.getLogger("DeepSpeed").addFilter(
    lambda record: "Setting accelerator to CPU" not in record.getMessage()
)

__version__ = "0.1.0"
