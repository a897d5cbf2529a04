"""Augmentations of pixels by torchvision, beside DSA: the grid of DC-BENCH (arXiv 2207.09639)."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ddpp import seeds
from ddpp.data.base import library
from ddpp.data.preprocess import Transform, from_pixels, to_pixels_from
from ddpp.errors import UserError, nearest

POLICIES = ("autoaugment", "randaugment", "imagenet")


class Policy:
    """What is done to the batches of one training, in their order.

    Images are brought back to pixels of 8 bits, clamped to what they can show, augmented one by one and brought forth
    again. ``autoaugment`` is its CIFAR-10 policy (arXiv 1805.09501), ``randaugment`` two operations of magnitude 9
    (arXiv 1909.13719), ``imagenet`` a random crop resized, a flip and jittered colours.

    Args:
        policy: one of :data:`POLICIES`.
        transform: from pixels to what a network is trained on.
        side: of the images, in pixels.
        flip: whether a mirrored image keeps its label.
        seed: of all draws.

    Raises:
        UserError: an unknown policy.
    """

    def __init__(self, policy: str, transform: Transform, *, side: int, flip: bool, seed: int) -> None:
        check_policy(policy)
        self.transform, self.seed, self.step = transform, seed, 0
        self.augment = _build(policy, side, flip=flip)

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Tensor:
        """[n, C, H, W]"""
        pixels = (255 * to_pixels_from(self.transform, images)).round().to(torch.uint8)
        # torchvision draws from the global generator alone
        with seeds.in_global_generator(seeds.derive(self.seed, "policy", self.step)):
            augmented = torch.stack([self.augment(image) for image in pixels])
        self.step += 1
        return from_pixels(self.transform, augmented.to(images.dtype) / 255)


def check_policy(name: str, *others: str) -> None:
    """Refuses what is neither a policy nor one of ``others``.

    Raises:
        UserError: it is neither; the message names the nearest.
    """
    known = (*others, *POLICIES)
    if name not in known:
        raise UserError(f"unknown augmentation {name!r}{nearest(name, known)} Known: {', '.join(known)}")


def _build(policy: str, side: int, *, flip: bool) -> Callable[[Tensor], Tensor]:
    transforms = library("torchvision.transforms")
    if policy == "autoaugment":
        chain = [transforms.AutoAugment(transforms.AutoAugmentPolicy.CIFAR10)]
    elif policy == "randaugment":
        chain = [transforms.RandAugment()]
    else:
        mirror = [transforms.RandomHorizontalFlip()] if flip else []
        chain = [transforms.RandomResizedCrop(side, antialias=True), *mirror, transforms.ColorJitter(0.4, 0.4, 0.4)]
    composed: Callable[[Tensor], Tensor] = transforms.Compose(chain)
    return composed
