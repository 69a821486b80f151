"""CISPO: RL post-training for lightning-attention and mixture-of-experts language models."""

import os.path

__version__ = "0.1.0"

# The packages cispo.rewards and cispo.recipes: a wheel has them in this folder, a checkout beside it.
if not os.path.isdir(os.path.join(os.path.dirname(__file__), "rewards")):
    __path__.append(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
