"""RLHF for LLaMA-family models in three steps: SFT, reward model, PPO."""

__version__ = "0.1.0"
