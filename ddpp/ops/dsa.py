"""Differentiable Siamese augmentation (DSA) of a batch of images, and its exact adjoint.

A *plan* is a float32 table [N, 16]: the parameters of each image, one row an image. :mod:`ddpp.augment` draws
plans; the column constants below name what they hold. A group of columns is off where it equals that of
:data:`IDENTITY`.

Source: Zhao and Bilen, "Dataset Condensation with Differentiable Siamese Augmentation" (arXiv 2102.08259),
with ``align_corners=True`` as in Cazenavette et al., "Dataset Distillation by Matching Training Trajectories"
(arXiv 2203.11932).
"""

from __future__ import annotations

import inspect
from collections.abc import Collection
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ddpp.ops._library import define, function, ops

BRIGHTNESS, SATURATION, CONTRAST = 0, 1, 2  # offset; factors around the pixel's and the image's mean
SHIFT_Y, SHIFT_X = 3, 4  # whole pixels
TOP, BOTTOM, LEFT, RIGHT = 5, 6, 7, 8  # the zeroed box: rows TOP to BOTTOM - 1, columns LEFT to RIGHT - 1
FLIP = 9  # not 0: mirror left and right
SCALE_X, SCALE_Y = 10, 11  # above 1 the picture gets smaller
COS, SIN = 12, 13  # of the angle of rotation
PLAN_SIZE = 16

#: The columns of each group, in the order in which the groups are applied.
COLUMNS: dict[str, tuple[int, ...]] = {
    "color": (BRIGHTNESS, SATURATION, CONTRAST),
    "crop": (SHIFT_Y, SHIFT_X),
    "cutout": (TOP, BOTTOM, LEFT, RIGHT),
    "flip": (FLIP,),
    "scale": (SCALE_X, SCALE_Y),
    "rotate": (COS, SIN),
}
GROUPS = tuple(COLUMNS)
#: The row of a plan that leaves its image as it is.
IDENTITY = (0.0, 1.0, 1.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 1.0, 1.0, 1.0, 0.0, 0.0, 0.0)
_CHANNELS = (1, 3)  # of the compiled kernels


def dsa_augment(images: Tensor, plan: Tensor, *, fused: bool = True) -> Tensor:
    """Augments each image by its row of the plan.

    The groups that are on are applied one after the other, each to the result of the one before:

    * color: x + BRIGHTNESS; then (x - m) SATURATION + m with m the pixel's mean over the channels; then
      (x - m) CONTRAST + m with m the mean over the image.
    * crop: pixel (y, x) is taken from (y + SHIFT_Y, x + SHIFT_X); 0 from outside.
    * cutout: the box is 0.
    * flip: mirrored left and right.
    * scale, then rotate: pixel (y, x) is taken from (SCALE_Y y, SCALE_X x), then from
      (SIN x + COS y, COS x - SIN y), by bilinear interpolation with 0 outside, in coordinates that run from
      -1 to 1 between the centres of the outermost pixels (``align_corners=True``). These are two resamplings
      where both groups are on. On an image that is not square, the rotation also shears the picture.

    Affine in the images, with a first derivative (the exact adjoint) and no second one: asking for it raises.
    Values that are in no drawn plan (a NaN, a box beyond the image) give unspecified pixels, nothing worse.

    Args:
        images: float32 or float64. [N, C, H, W]
        plan: float32, on the device of the images. [N, 16]
        fused: one launch of the compiled kernel where there is one, for 1 or 3 channels; else, and with False, plain
            PyTorch, which autograd differentiates any number of times (torch 2.11 its resampling once).

    Returns:
        The augmented images, in new memory and contiguous. [N, C, H, W]

    Raises:
        ValueError: shape, dtype or device of an argument, or a plan that requires a gradient.
        RuntimeError: the second derivative, with ``fused=True``.
    """
    _check(images, plan)
    if not (fused and images.shape[1] in _CHANNELS):
        return _fresh(reference(images, plan, _groups_unseen(plan, fused)), images)
    result: Tensor = function(_Augment, _AugmentWithJvp, _AugmentWithContext).apply(images, plan)
    return result


def dsa_adjoint(grad: Tensor, plan: Tensor, *, fused: bool = True) -> Tensor:
    """The gradient of the images from that of :func:`dsa_augment`'s result. Autograd does not record it.

    Args:
        grad: as the images there. [N, C, H, W]
        plan, fused: as there.
    """
    if fused and grad.shape[1] in _CHANNELS:
        return ops().dsa_adjoint.default(grad, plan)
    return _fresh(_adjoint(grad, plan, _groups_unseen(plan, fused)), grad)


def _check(images: Tensor, plan: Tensor) -> None:
    shape = images.shape
    if len(shape) != 4:
        raise ValueError(f"dsa_augment: images must be [N, C, H, W], got {list(shape)}")
    if images.dtype not in (torch.float32, torch.float64):
        raise ValueError(
            f"dsa_augment: images must be float32 or float64, got {images.dtype}; convert them with .float()"
        )
    if plan.shape != (shape[0], PLAN_SIZE) or plan.dtype != torch.float32:
        raise ValueError(
            f"dsa_augment: plan must be float32 [{shape[0]}, {PLAN_SIZE}], a row for each image, got "
            f"{plan.dtype} {list(plan.shape)}; ddpp.augment.draw makes plans, one for each step"
        )
    if plan.device != images.device:
        raise ValueError(
            f"dsa_augment: plan must be on {images.device} like the images, got {plan.device}; move it there"
        )
    if plan.requires_grad:
        raise ValueError("dsa_augment: plan must not require a gradient, it is a constant; give plan.detach()")


# ---- the meaning, in plain torch ----


def reference(images: Tensor, plan: Tensor, groups: Collection[str] | None = None) -> Tensor:
    """:func:`dsa_augment` in plain torch, without its checks.

    Args:
        images: [N, C, H, W].
        plan: [N, 16].
        groups: those that may be on; without, the plan's values are looked at, which waits for a GPU.
    """
    groups = _groups_on(plan) if groups is None else groups
    plan = plan.to(images.dtype)
    if "color" in groups:
        images = _color(images, plan)
    if "crop" in groups:
        images = _crop(images, plan)
    if "cutout" in groups:
        images = _cutout(images, plan)
    if "flip" in groups:
        images = _flip(images, plan)
    if "scale" in groups:
        images = F.grid_sample(images, _scale_grid(images, plan), align_corners=True)
    if "rotate" in groups:
        images = F.grid_sample(images, _rotate_grid(images, plan), align_corners=True)
    return images


def _adjoint(grad: Tensor, plan: Tensor, groups: Collection[str] | None = None) -> Tensor:
    """The transpose of the linear part. Colour without its offset is symmetric, flip and cutout are too."""
    groups = _groups_on(plan) if groups is None else groups
    plan = plan.to(grad.dtype).clone()
    plan[:, BRIGHTNESS] = 0
    plan[:, SHIFT_Y : SHIFT_X + 1] *= -1
    if "rotate" in groups:
        grad = _resample_adjoint(grad, _rotate_grid(grad, plan))
    if "scale" in groups:
        grad = _resample_adjoint(grad, _scale_grid(grad, plan))
    if "flip" in groups:
        grad = _flip(grad, plan)
    if "cutout" in groups:
        grad = _cutout(grad, plan)
    if "crop" in groups:
        grad = _crop(grad, plan)
    if "color" in groups:
        grad = _color(grad, plan)
    return grad


def _groups_unseen(plan: Tensor, fused: bool) -> Collection[str] | None:
    """All groups where a fused op goes by plain torch on a GPU: a step that is captured may look at no value there."""
    return GROUPS if fused and plan.is_cuda else None


def _groups_on(plan: Tensor) -> list[str]:
    """The groups that some image uses; the others need not be computed."""
    on = (plan != plan.new_tensor(IDENTITY)).any(0).tolist()
    return [group for group, columns in COLUMNS.items() if any(on[column] for column in columns)]


def _column(plan: Tensor, column: int) -> Tensor:
    return plan[:, column, None, None, None]  # [N, 1, 1, 1]


def _color(x: Tensor, plan: Tensor) -> Tensor:
    x = x + _column(plan, BRIGHTNESS)
    x = torch.lerp(x.mean(1, keepdim=True), x, _column(plan, SATURATION))
    return torch.lerp(x.mean((1, 2, 3), keepdim=True), x, _column(plan, CONTRAST))


def _crop(x: Tensor, plan: Tensor) -> Tensor:
    n, c, h, w = x.shape
    # A border of zeros stands for all that is outside.
    row = (torch.arange(1, h + 1, device=x.device) + plan[:, SHIFT_Y, None].long()).clamp(0, h + 1)  # [N, H]
    column = (torch.arange(1, w + 1, device=x.device) + plan[:, SHIFT_X, None].long()).clamp(0, w + 1)  # [N, W]
    source = (row[:, :, None] * (w + 2) + column[:, None, :]).view(n, 1, h * w).expand(n, c, h * w)
    return F.pad(x, (1, 1, 1, 1)).flatten(2).gather(2, source).view(n, c, h, w)


def _cutout(x: Tensor, plan: Tensor) -> Tensor:
    row, column = (torch.arange(side, device=x.device) for side in x.shape[2:])
    in_rows = (row >= plan[:, TOP, None]) & (row < plan[:, BOTTOM, None])  # [N, H]
    in_columns = (column >= plan[:, LEFT, None]) & (column < plan[:, RIGHT, None])  # [N, W]
    return x.masked_fill((in_rows[:, :, None] & in_columns[:, None, :])[:, None], 0)


def _flip(x: Tensor, plan: Tensor) -> Tensor:
    return torch.where(_column(plan, FLIP) != 0, x.flip(3), x)


def _scale_grid(x: Tensor, plan: Tensor) -> Tensor:
    zero = torch.zeros_like(plan[:, 0])
    theta = torch.stack((plan[:, SCALE_X], zero, zero, zero, plan[:, SCALE_Y], zero), 1)
    return F.affine_grid(theta.view(-1, 2, 3), list(x.shape), align_corners=True)


def _rotate_grid(x: Tensor, plan: Tensor) -> Tensor:
    cos, sin, zero = plan[:, COS], plan[:, SIN], torch.zeros_like(plan[:, 0])
    theta = torch.stack((cos, -sin, zero, sin, cos, zero), 1)
    return F.affine_grid(theta.view(-1, 2, 3), list(x.shape), align_corners=True)


def _resample_adjoint(grad: Tensor, grid: Tensor) -> Tensor:
    # 0, 0, True: bilinear, zeros outside, align_corners. Only the gradient of the images is asked for: of the
    # second argument, the images, nothing but the shape matters.
    result: Tensor = torch.ops.aten.grid_sampler_2d_backward(grad, grad, grid, 0, 0, True, [True, False])[0]
    return result


def _fresh(result: Tensor, argument: Tensor) -> Tensor:
    """An op's result is contiguous and never its argument."""
    return result.clone(memory_format=torch.contiguous_format) if result is argument else result.contiguous()


@define("dsa_augment(Tensor images, Tensor plan) -> Tensor")
def _augment_op(images: Tensor, plan: Tensor) -> Tensor:
    if images.is_meta:
        return torch.empty_like(images, memory_format=torch.contiguous_format)
    return _fresh(reference(images, plan), images)


@define("dsa_adjoint(Tensor grad, Tensor plan) -> Tensor")
def _adjoint_op(grad: Tensor, plan: Tensor) -> Tensor:
    if grad.is_meta:
        return torch.empty_like(grad, memory_format=torch.contiguous_format)
    return _fresh(_adjoint(grad, plan), grad)


# ---- derivatives ----


def _vmap(form: Any, info: Any, in_dims: tuple[int | None, ...], images: Tensor, plan: Tensor) -> tuple[Tensor, int]:
    """Images are independent: the mapped dimension joins the batch."""
    images, plan = (
        x.movedim(dim, 0) if dim is not None else x.expand(info.batch_size, *x.shape)
        for x, dim in zip((images, plan), in_dims, strict=True)
    )
    result = form.apply(images.flatten(0, 1), plan.flatten(0, 1))
    return result.unflatten(0, images.shape[:2]), 0


class _Adjoint(torch.autograd.Function):
    """The gradient as a Function of its own, so that differentiating it raises instead of giving zeros."""

    @staticmethod
    def forward(grad: Tensor, plan: Tensor) -> Any:
        return ops().dsa_adjoint.default(grad, plan)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        raise RuntimeError("dsa_augment has no second derivative in its fused form; call it with fused=False")

    @staticmethod
    def vmap(info: Any, in_dims: Any, grad: Tensor, plan: Tensor) -> tuple[Tensor, int]:
        return _vmap(_Adjoint, info, in_dims, grad, plan)


class _Augment(torch.autograd.Function):
    @staticmethod
    def forward(images: Tensor, plan: Tensor) -> Any:
        return ops().dsa_augment.default(images, plan)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.save_for_backward(inputs[1])
        ctx.save_for_forward(inputs[1])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        # A Function costs microseconds; nothing is recorded where gradients are off.
        adjoint = _Adjoint.apply if torch.is_grad_enabled() else ops().dsa_adjoint.default
        return adjoint(grad, *ctx.saved_tensors), None

    @staticmethod
    def vmap(info: Any, in_dims: Any, images: Tensor, plan: Tensor) -> tuple[Tensor, int]:
        return _vmap(_Augment, info, in_dims, images, plan)


class _AugmentWithJvp(_Augment):
    @staticmethod
    def jvp(ctx: Any, tangent: Tensor, _: Any) -> Any:
        linear = ctx.saved_tensors[0].clone()
        linear[:, BRIGHTNESS] = 0
        return ops().dsa_augment.default(tangent, linear)


class _AugmentWithContext(torch.autograd.Function):
    """The same in the form that costs less; see :func:`ddpp.ops._library.function`."""

    @staticmethod
    def forward(ctx: Any, images: Tensor, plan: Tensor) -> Any:
        ctx.save_for_backward(plan)
        ctx.save_for_forward(plan)
        return ops().dsa_augment.default(images, plan)

    backward = _Augment.backward
    jvp = _AugmentWithJvp.jvp


# Function.apply binds its arguments through inspect.signature at each call; a stored one saves microseconds.
for _form in (_Adjoint, _Augment):
    _form.forward.__signature__ = inspect.signature(_form.forward)  # type: ignore[union-attr]
