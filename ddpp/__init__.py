"""Dataset distillation by trajectory matching, with difficult parameters pruned (DDPP).

Importing the package needs neither the compiled libraries nor a GPU nor the network.
"""

from __future__ import annotations

import importlib
from typing import Any

__version__ = "0.1.0"

_PUBLIC = {"masked_match_loss": "ddpp.ops", "dsa_augment": "ddpp.ops"}
__all__ = ["__version__", "dsa_augment", "masked_match_loss"]


def __getattr__(name: str) -> Any:
    if name in _PUBLIC:
        return getattr(importlib.import_module(_PUBLIC[name]), name)
    raise AttributeError(f"module 'ddpp' has no attribute {name!r}")
