"""CISPO: RL post-training for lightning-attention and mixture-of-experts language models."""

__version__ = "0.1.0"
