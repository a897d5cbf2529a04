"""Winograd's minimal filtering F(m x m, 3 x 3): a 3x3 convolution with 2.25 (m = 2) or 4 (m = 4) times fewer products.

Stride 1, one zero pixel around the image, any image size and number of channels. With a = m + 2, tiles of a x a pixels
that start every m pixels, and the matrices B, G, A below:

    output = At ((Bt tile B) * (G weight Gt)) A

where * is, for each of the a x a positions, a product of matrices over the channels. An input gradient is a
convolution by the weight turned by 180 degrees, with inputs and outputs exchanged. A weight gradient is a product of
the convolution's transformed tiles with those of the output's gradient (`winograd_output_transposed`), transformed
back. Transformed tensors are [a * a, rows, columns]; tiles are rows, in the order of images, rows and columns of tiles.
`winograd_convolve` also convolves values and tangents that are stacked along the batch, by (weight, tangent).

Source: Lavin and Gray, "Fast Algorithms for Convolutional Neural Networks" (arXiv 1509.09308). One convolution in
float32 with 128 channels differs from float64 by 4e-7 of its length at m = 2, where a direct one does by 6e-7, and by
2.4e-6 at m = 4.

Few channels, as in a first layer, are convolved by one product with their 3x3 neighbourhoods (`columns_of_images`).

The operators write their last argument, are trusted with their arguments' sizes (the compiled ones check them), and are
not differentiable. They are compiled for the CPU; elsewhere the vendor's library convolves faster.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from ddpp.ops._library import define, implementation

TILES = (2, 4)
_PADDING = 16  # values between matrices: a power of two from one to the next would make them share cache lines

_INPUT: dict[int, list[list[float]]] = {
    2: [[1, 0, -1, 0], [0, 1, 1, 0], [0, -1, 1, 0], [0, 1, 0, -1]],
    4: [
        [4, 0, -5, 0, 1, 0],
        [0, -4, -4, 1, 1, 0],
        [0, 4, -4, -1, 1, 0],
        [0, -2, -1, 2, 1, 0],
        [0, 2, -1, -2, 1, 0],
        [0, 4, 0, -5, 0, 1],
    ],
}
_WEIGHT: dict[int, list[list[float]]] = {
    2: [[1, 0, 0], [1 / 2, 1 / 2, 1 / 2], [1 / 2, -1 / 2, 1 / 2], [0, 0, 1]],
    4: [
        [1 / 4, 0, 0],
        [-1 / 6, -1 / 6, -1 / 6],
        [-1 / 6, 1 / 6, -1 / 6],
        [1 / 24, 1 / 12, 1 / 6],
        [1 / 24, -1 / 12, 1 / 6],
        [0, 0, 1],
    ],
}
_OUTPUT: dict[int, list[list[float]]] = {
    2: [[1, 1, 1, 0], [0, 1, -1, -1]],
    4: [[1, 1, 1, 1, 1, 0], [0, 1, -1, 2, -2, 0], [0, 1, 1, 4, 4, 0], [0, 1, -1, 8, -8, 1]],
}


def tile_grid(height: int, width: int, m: int) -> tuple[int, int]:
    """Rows and columns of tiles that cover an image."""
    return -(-height // m), -(-width // m)


def is_compiled() -> bool:
    """Whether the CPU has kernels for the stages, without which torch's convolution is faster."""
    return implementation("multiply_matrices", "cpu")[0] == "C++"


def transformed(m: int, rows: int, columns: int, memory: Callable[[int], Tensor]) -> Tensor:
    """A transformed tensor, laid out as the kernels like it, in the memory [size] that ``memory(size)`` gives.

    Returns:
        [(m + 2)^2, rows, columns]
    """
    count, apart = (m + 2) ** 2, rows * columns + _PADDING
    return memory(count * apart).view(count, apart)[:, : rows * columns].unflatten(1, (rows, columns))


def _matrix(table: dict[int, list[list[float]]], m: int, like: Tensor) -> Tensor:
    return torch.tensor(table[m], dtype=like.dtype, device=like.device)


# ---- the meaning, in plain torch ----


def _transform(images: Tensor, m: int) -> Tensor:
    """Tiles with their border. [(m + 2)^2, tiles, C]"""
    n, c, height, width = images.shape
    down, across = tile_grid(height, width, m)
    bordered = F.pad(images, (1, across * m + 1 - width, 1, down * m + 1 - height))
    cut = bordered.unfold(2, m + 2, m).unfold(3, m + 2, m)  # [N, C, down, across, a, a]
    b = _matrix(_INPUT, m, images)
    return torch.einsum("pi,nchwij,qj->pqnhwc", b, cut, b).reshape((m + 2) ** 2, n * down * across, c)


def _images(products: Tensor, m: int, size: torch.Size) -> Tensor:
    """From the products of the tiles. [N, C, H, W]"""
    n, c, height, width = size
    down, across = tile_grid(height, width, m)
    a = _matrix(_OUTPUT, m, products)
    parts = products.reshape(m + 2, m + 2, n, down, across, c)
    whole = torch.einsum("ip,pqnhwc,jq->nchiwj", a, parts, a).reshape(n, c, down * m, across * m)
    return whole[:, :, :height, :width]


@define(
    "winograd_convolve(Tensor x, Tensor weight, Tensor? tangent, bool transposed, int m, Tensor(a!)? tiles, "
    "Tensor(b!) y) -> ()"
)
def _convolve(
    x: Tensor, weight: Tensor, tangent: Tensor | None, transposed: bool, m: int, tiles: Tensor | None, y: Tensor
) -> None:
    cut = _transform(x, m)
    products = cut @ weight
    if tangent is not None:
        values, tangents = cut.chunk(2, 1)
        zeros = torch.zeros_like(products[:, : values.shape[1]])
        across = [tangents @ tangent, zeros] if transposed else [zeros, values @ tangent]
        products = products + torch.cat(across, 1)
    y.copy_(_images(products, m, y.shape))
    if tiles is not None:
        tiles.copy_(cut)


@define("winograd_output_transposed(Tensor images, int m, Tensor(a!) tiles) -> ()")
def _output_transposed(images: Tensor, m: int, tiles: Tensor) -> None:
    n, c, height, width = images.shape
    down, across = tile_grid(height, width, m)
    whole = F.pad(images, (0, across * m - width, 0, down * m - height)).reshape(n, c, down, m, across, m)
    a = _matrix(_OUTPUT, m, images)
    tiles.copy_(torch.einsum("ip,nchiwj,jq->pqnhwc", a, whole, a).reshape(tiles.shape))


@define("winograd_weight(Tensor weight, int m, bool backward, Tensor(a!) transformed) -> ()")
def _weight(weight: Tensor, m: int, backward: bool, transformed: Tensor) -> None:
    g = _matrix(_WEIGHT, m, weight)
    weight = weight.flip(2, 3).transpose(0, 1) if backward else weight
    transformed.copy_(torch.einsum("pi,ocij,qj->pqco", g, weight, g).reshape(transformed.shape))


@define("winograd_weight_transposed(Tensor transformed, int m, Tensor(a!) weight) -> ()")
def _weight_transposed(transformed: Tensor, m: int, weight: Tensor) -> None:
    g = _matrix(_WEIGHT, m, weight)
    parts = transformed.reshape(m + 2, m + 2, *weight.shape[:2])
    weight.copy_(torch.einsum("pi,pqoc,qj->ocij", g, parts, g))


@define("columns_of_images(Tensor images, int pad_y, int pad_x, Tensor(a!) columns) -> ()")
def _columns(images: Tensor, pad_y: int, pad_x: int, columns: Tensor) -> None:
    taps = F.unfold(images, 3, padding=(pad_y, pad_x)).transpose(1, 2)  # [N, pixels, 9 C]
    columns.copy_(F.pad(taps, (0, columns.shape[2] - taps.shape[2])))


@define("images_of_columns(Tensor columns, int pad_y, int pad_x, Tensor(a!) images) -> ()")
def _images_of_columns(columns: Tensor, pad_y: int, pad_x: int, images: Tensor) -> None:
    taps = columns[..., : 9 * images.shape[1]].transpose(1, 2)
    images.copy_(F.fold(taps, (images.shape[2], images.shape[3]), 3, padding=(pad_y, pad_x)))


@define("multiply_matrices(Tensor a, Tensor b, bool a_transposed, bool accumulate, Tensor(a!) c) -> ()")
def _multiply(a: Tensor, b: Tensor, a_transposed: bool, accumulate: bool, c: Tensor) -> None:
    product = (a.transpose(1, 2) if a_transposed else a) @ b
    c.add_(product) if accumulate else c.copy_(product)
