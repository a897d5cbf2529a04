"""DDPP: trajectory matching with the parameters that are hard to match pruned (arXiv 2209.14609)."""

from __future__ import annotations

import torch
from torch import Tensor

from ddpp import pruning, seeds
from ddpp.config import Config, DistillConfig
from ddpp.errors import UserError
from ddpp.gpu import graphs_for, send
from ddpp.methods import METHODS, Memory, Problem, Update
from ddpp.methods._students import draw_batches, draw_plans, step_of
from ddpp.models import flat
from ddpp.pruning import Importance
from ddpp.synthetic import Synthetic
from ddpp.unroll import matching_gradients

_IMPORTANCE = "importance"  # in the memory


@METHODS.register("ddpp")
class DDPP:
    """At each outer step: a random teacher, a random start epoch, J student steps, the pruned distance.

    Equations 1 to 8 of the paper. Teachers are visited in random order, each once before any comes again. Options make
    it what came after: another rule of pruning, soft labels and a window of start epochs that grows (DATM, PAD), the
    nearest inner step (ATT), learned weights of the parameters (IADD).
    """

    needs_teachers = True
    learns_labels = True

    @staticmethod
    def check(config: Config) -> None:
        """Refuses a bound of ratios that prunes nothing, besides what :meth:`check_starts` does.

        Raises:
            UserError: it is 0.
        """
        if config.distill.prune == "ratio" and not config.distill.epsilon:
            raise UserError("--epsilon must be above 0, got 0; to prune nothing, give --prune none or --method mtt")
        DDPP.check_starts(config)

    @staticmethod
    def epochs_read(config: Config) -> int:
        """The last epoch of a teacher that is a target."""
        return config.distill.max_start_epoch - 1 + config.distill.teacher_span

    @staticmethod
    def check_starts(config: Config) -> None:
        """Refuses a start bound and span that reach beyond the teachers.

        Raises:
            UserError: they do.
        """
        settings, epochs = config.distill, config.teachers.epochs
        bound, span = settings.max_start_epoch, settings.teacher_span
        if (read := DDPP.epochs_read(config)) > epochs:
            raise UserError(
                f"--max-start-epoch {bound} with --teacher-span {span} needs teachers of {read} epochs, got "
                f"--teachers-epochs {epochs}. Raise it, or lower one of the others."
            )
        first = settings.first_max_start_epoch or bound
        if not settings.min_start_epoch < first <= bound:
            raise UserError(
                f"start epochs are drawn from --min-start-epoch {settings.min_start_epoch} to below "
                f"--first-max-start-epoch {first}, later --max-start-epoch {bound}: they must grow in this order"
            )

    def __init__(self, problem: Problem) -> None:
        self.problem = problem
        settings, layout, run = problem.config.distill, flat.layout(problem.network), problem.config.run
        bounds = {"epsilon": settings.epsilon, "share": settings.prune_share}
        self.distance = pruning.distance(self.rule, layout, **bounds, fused=run.use_fused_kernels)
        self.keep = pruning.keep(self.rule, layout, **bounds)
        self.step = step_of(problem)
        self.graphs = graphs_for(run, problem.device)

    def update(self, synthetic: Synthetic, step: int, memory: Memory) -> Update:
        settings, problem = self.problem.config.distill, self.problem
        index, epoch = self._draw_start(step)
        start, target = problem.teachers[index].rows(epoch, epoch + settings.teacher_span)
        batches = draw_batches(problem, len(synthetic.images), settings.inner_steps, step)
        importance = self._importance(start, memory)
        result = matching_gradients(
            problem.network,
            send(start, problem.device),
            send(target, problem.device),
            synthetic.images,
            synthetic.labels,
            synthetic.step_size,
            batches,
            draw_plans(problem, [len(b) for b in batches], step),
            engine=settings.engine,
            fused=problem.config.run.use_fused_kernels,
            step=self.step,
            checkpoint_every=settings.keep_every,
            distance=importance.distance if importance else self.distance,
            nearest_step=settings.nearest_step,
            graphs=self.graphs,
        )
        kept, note = result.kept / len(start), {"teacher": index, "start": epoch}
        learned = {_IMPORTANCE: importance.learned(settings.lr_importance)} if importance else {}
        return Update(result.loss, result.images, result.lr, kept, note, result.labels, learned)

    @property
    def rule(self) -> str:
        """Of pruning."""
        return self.problem.config.distill.prune

    def _importance(self, start: Tensor, memory: Memory) -> Importance | None:
        """The weights learned so far, all 1 at first; None where none are learned."""
        if not self.problem.config.distill.lr_importance:
            return None
        weights = memory.get(_IMPORTANCE)
        return Importance(self.keep, torch.ones_like(start, device=self.problem.device) if weights is None else weights)

    def _draw_start(self, step: int) -> tuple[int, int]:
        seed, count = self.problem.config.run.seed, len(self.problem.teachers)
        order = torch.randperm(count, generator=seeds.generator(seed, "teachers", step // count))
        low, bound = self.problem.config.distill.min_start_epoch, start_bound(self.problem.config.distill, step)
        epoch = torch.randint(low, bound, (), generator=seeds.generator(seed, "start epoch", step))
        return int(order[step % count]), int(epoch)


def start_bound(settings: DistillConfig, step: int) -> int:
    """The bound below which start epochs are drawn at an outer step; it grows linearly (DATM, arXiv 2310.05773)."""
    last, first = settings.max_start_epoch, settings.first_max_start_epoch
    return last if first is None else min(last, first + (last - first) * step // settings.window_steps)
