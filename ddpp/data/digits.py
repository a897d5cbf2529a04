"""The 1,797 handwritten digits that scikit-learn carries: 8x8 pixels, one channel, 17 grey levels."""

from __future__ import annotations

import torch

from ddpp import seeds
from ddpp.config import DataConfig
from ddpp.data.base import DATASETS, Raw, library
from ddpp.data.split import stratified

TEST_SHARE = 0.2
STRATEGY = "crop_scale_rotate"  # what Zhao, Mopuri and Bilen (arXiv 2006.05929) take for digits


@DATASETS.register("digits")
def digits(config: DataConfig) -> Raw:
    """Reads the digits; the same fifth of each class is the test set for every seed."""
    source = library("sklearn.datasets").load_digits()
    images = torch.from_numpy(source.images).to(torch.uint8)[:, None]  # [N, 1, 8, 8] of 0 to 16
    labels = torch.from_numpy(source.target).long()
    train, test = stratified(labels, TEST_SHARE, seeds.generator(0, "digits", "test"))
    return Raw(
        name="digits",
        classes=tuple(map(str, source.target_names)),
        train_images=images[train],
        train_labels=labels[train],
        test_images=images[test],
        test_labels=labels[test],
        strategy=STRATEGY,
        white=16,
    )
