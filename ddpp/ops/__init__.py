"""The fused operators. Each has one meaning, written in plain torch; C++ and CUDA only make it faster."""

from __future__ import annotations

from ddpp.ops.dsa import dsa_augment
from ddpp.ops.match_loss import masked_match_loss
from ddpp.ops.norm_pool import norm_relu_pool

__all__ = ["dsa_augment", "masked_match_loss", "norm_relu_pool"]
