"""KIP: kernel inducing points (Nguyen, Chen and Lee, arXiv 2011.00050 and 2107.13034)."""

from __future__ import annotations

import os

import torch
from torch import Tensor
from tqdm import tqdm

from ddpp import seeds
from ddpp.config import Config
from ddpp.data import Dataset
from ddpp.errors import UserError
from ddpp.gpu import send
from ddpp.methods import METHODS, Memory, Problem, Update
from ddpp.ntk import WideNetwork
from ddpp.synthetic import Synthetic

_AT_ONCE = 500  # images
_SILENT = 5  # seconds that need no bar


@METHODS.register("kip")
class KIP:
    """At each outer step a kernel ridge regression from the synthetic images, tested on a random batch of real ones.

    The kernel is the tangent kernel of an infinitely wide network, so no network is trained. The loss is half the
    squared distance of predictions and labels (equation 7 of the first paper), mean over the batch; labels are one-hot
    less their mean. Soft labels are learned as logits, so that networks can be trained on them as on any other. No
    augmentation is drawn, and the step size is not learned: networks are evaluated at its first value.
    """

    needs_teachers = False
    learns_labels = True

    @staticmethod
    def check(config: Config) -> None:
        """Every configuration suits."""

    def __init__(self, problem: Problem) -> None:
        self.problem = problem
        settings = problem.config.distill
        self.network = WideNetwork(settings.kip_kernel, settings.kip_depth)
        try:
            needed = self.network.memory(problem.dataset.shape)
        except UserError as e:
            raise UserError(f"--kip-kernel {settings.kip_kernel}, --kip-{e}") from None
        there = _memory(problem.device)
        if needed > there:
            raise UserError(
                f"--kip-kernel {settings.kip_kernel} needs {needed / 2**30:.1f} GiB for a real image and a synthetic "
                f"one of {'x'.join(map(str, problem.dataset.shape))}, and {problem.device} has "
                f"{there / 2**30:.1f} GiB. Take --kip-kernel conv or fc, a lower --kip-depth or --image-size."
            )

    def update(self, synthetic: Synthetic, step: int, memory: Memory) -> Update:
        settings, dataset, device = self.problem.config.distill, self.problem.dataset, self.problem.device
        classes = len(dataset.classes)
        draw = seeds.generator(self.problem.config.run.seed, "kip", step)
        chosen = torch.randperm(len(dataset.train_labels), generator=draw)[: settings.kip_batch]
        real, labels = send(dataset.train_images[chosen], device), send(dataset.train_labels[chosen], device)

        images = synthetic.images.detach().requires_grad_()
        held = synthetic.labels.detach()
        learned = [held.requires_grad_()] if held.is_floating_point() else []
        coefficients = fit(self.network.ntk(images, images), targets(held, classes), settings.kip_ridge)
        predictions = self.network.ntk(real, images) @ coefficients  # [n, K]
        loss = (predictions - targets(labels, classes)).square().sum(1).mean() / 2
        gradient, *of_labels = torch.autograd.grad(loss, [images, *learned])
        everything = torch.ones((), device=device)
        note = {"right": int((predictions.argmax(1) == labels).sum())}
        return Update(
            loss.detach(),
            gradient,
            torch.zeros_like(synthetic.step_size),
            everything,
            note,
            of_labels[0] if of_labels else None,
        )

    def accuracy(self, synthetic: Synthetic) -> float:
        """Test accuracy of the regression itself, in percent."""
        return accuracy_of_krr(self.network, synthetic, self.problem.dataset, self.problem.config.distill.kip_ridge)


def _memory(device: torch.device) -> int:
    """Bytes of a device's memory."""
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).total_memory)
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def targets(labels: Tensor, classes: int) -> Tensor:
    """Labels as a share of each class, one-hot or the softmax of logits, less the mean 1 / K, in float64. [N, K]"""
    if labels.is_floating_point():
        return labels.double().softmax(1) - 1 / classes
    return torch.nn.functional.one_hot(labels, classes).double() - 1 / classes


def fit(kernel: Tensor, targets: Tensor, ridge: float) -> Tensor:
    """Coefficients of a kernel ridge regression; predictions are kernel(x, training images) times them. [N, K]

    Args:
        kernel: of the training images with themselves. [N, N] float64
        targets: what to predict for them. [N, K] float64
        ridge: added to the diagonal, in units of its mean.

    A singular system gives numbers that are not finite, not an error. Differentiable.
    """
    diagonal = ridge * kernel.diagonal().mean() * torch.eye(len(kernel), dtype=kernel.dtype, device=kernel.device)
    return torch.linalg.solve_ex(kernel + diagonal, targets).result


@torch.no_grad()
def accuracy_of_krr(network: WideNetwork, trained_on: Synthetic, dataset: Dataset, ridge: float) -> float:
    """Share of test images that kernel ridge regression on a synthetic set labels right, in percent."""
    held = trained_on.images
    coefficients = fit(network.ntk(held, held), targets(trained_on.labels, len(dataset.classes)), ridge)
    parts, count = dataset.test_images.split(_AT_ONCE), -(-len(dataset.test_labels) // _AT_ONCE)
    parts = tqdm(parts, desc="test by regression", total=count, unit="batch", delay=_SILENT)
    answers = [(network.ntk(part.to(held.device), held) @ coefficients).argmax(1).cpu() for part in parts]
    return 100 * float((torch.cat(answers) == dataset.test_labels).double().mean())
