"""A network without convolutions, as dataset distillation tests transfer with."""

from __future__ import annotations

import math

from torch import nn

from ddpp.config import ModelConfig
from ddpp.models.base import MODELS, Network, Shape

_WIDTH = 128


@MODELS.register("mlp")
def mlp(config: ModelConfig, shape: Shape, classes: int) -> Network:
    """Two layers of 128 with ReLU under the classifier."""
    first, second = nn.Linear(math.prod(shape), _WIDTH), nn.Linear(_WIDTH, _WIDTH)
    return Network(nn.Sequential(nn.Flatten(), first, nn.ReLU(), second, nn.ReLU()), _WIDTH, classes)
