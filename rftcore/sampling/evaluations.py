"""The UNet's evaluations in one chain: without a graph, with one that is kept, or replayed from the state."""

from __future__ import annotations

import contextlib
from collections.abc import Hashable, Mapping
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from rftcore.blocks import once, recompute
from rftcore.blocks.serving import servings
from rftcore.sampling.ambient import Ambient, RandomState
from rftcore.sampling.constants import has_constants, make_constants
from rftcore.sampling.denoiser import Denoiser
from rftcore.sampling.graphs import Run
from rftcore.sampling.plan import Plan
from rftcore.sampling.replay import GradientSum, gradients, replay_parameters


class Inputs(NamedTuple):
    """What the UNet is given besides the state, by name; N rows are both branches of guidance, [negative; positive].

    Attributes:
        conditioning: (N, ...) `Conditioning.joined`.
        text: (N, M, C) the text's keys and values, made once for the chain; empty where each step makes them.
        time: (T, 1 or N, C) what becomes of the timesteps, for all steps; likewise.
    """

    conditioning: dict[str, Tensor]
    text: dict[str, Tensor]
    time: dict[str, Tensor]

    def tensors(self) -> list[Tensor]:
        """All of them, in a fixed order."""
        return [*self.conditioning.values(), *self.constants()]

    def constants(self) -> list[Tensor]:
        """What was made once for the chain."""
        return [*self.text.values(), *self.time.values()]

    def leaves(self, wanted: tuple[bool, ...]) -> Inputs:
        """The same as leaves of a graph of their own, of which these require grad, in the order of `tensors()`."""
        flags = iter(wanted)
        return Inputs(*({n: t.detach().requires_grad_(next(flags)) for n, t in group.items()} for group in self))


class Leaves(NamedTuple):
    """What a piece of work is differentiated by.

    Attributes:
        trained: one tensor for each parameter.
        stand_ins: those of them that are to be swapped in, by the parameter's name.
    """

    inputs: Inputs
    trained: list[Tensor]
    stand_ins: dict[str, Tensor]


class Kept(NamedTuple):
    """The graph of one evaluation, from its own leaves."""

    x: Tensor
    leaves: Leaves
    output: Tensor


class Evaluations:
    """Evaluates a UNet at the steps of one chain, and differentiates those evaluations.

    Args:
        timesteps: (T,) the model's times.
        input_scales: (T,) factors of the state as the model sees it; None: it sees it as it is.
        conditioning: `Conditioning.joined`; of its tensors those are differentiated that require grad.
        parameters: what is trained, by name.
        plan: what each differentiated step keeps; None where nothing is differentiated.
        run: runs each piece of work, as it stands or as a captured graph.
        batch: B.
    """

    def __init__(
        self,
        denoiser: Denoiser,
        *,
        guided: bool,
        timesteps: Tensor,
        input_scales: Tensor | None,
        conditioning: Mapping[str, Tensor],
        parameters: Mapping[str, nn.Parameter],
        plan: Plan | None,
        run: Run,
        batch: int,
    ) -> None:
        self.denoiser, self.parameters, self.plan = denoiser, parameters, plan
        self.guided, self._timesteps, self._scales, self._batch = guided, timesteps, input_scales, batch
        self._run = run
        self._random: dict[int, RandomState] = {}
        self._kept: dict[int, Kept] = {}
        self._finished = False
        self._conditioning = {name: tensor.detach() for name, tensor in conditioning.items()}
        self._conditioning_wanted = tuple(tensor.requires_grad for tensor in conditioning.values())

    def begin(self) -> None:
        """Makes what is made once for the chain, in the surroundings that its steps will have."""
        self._ambient = Ambient.capture(self._timesteps.device)
        self._servings = servings(self.denoiser.model)
        self._prepare()

    def _prepare(self) -> None:
        given = Inputs({name: self._static(name, tensor) for name, tensor in self._conditioning.items()}, {}, {})

        def make() -> Inputs:
            # Its graph goes at once: the values are made again for their gradient, when there is one.
            with torch.set_grad_enabled(self.plan is not None):
                made = self._with_constants(self._leaves(given, self._conditioning_wanted))
            return made.leaves(tuple(tensor.requires_grad for tensor in made.tensors()))

        def work() -> None:
            # To static tensors, not the pool's: the first chain's steps may then be captured after it already.
            with torch.no_grad():
                for static, made in zip(self._inputs.constants(), make().constants(), strict=True):
                    static.copy_(made)

        if not has_constants(self.denoiser):
            self._inputs = given
        elif self._run.plain:
            self._inputs = make()
        else:
            self._inputs = self._run.keep("once", make)._replace(conditioning=given.conditioning)
            self._run.run("once", work)
        self._wanted = self._run.keep(
            "wanted",
            lambda: (*self._conditioning_wanted, *(tensor.requires_grad for tensor in self._inputs.constants())),
        )

    @property
    def is_plain(self) -> bool:
        """Whether nothing of it is captured."""
        return self._run.plain

    def output(self, step: int, x: Tensor) -> Tensor:
        """The UNet's output (N, C, h, w) at the state x (B, C, h, w), without a graph."""
        row, x = self._row(step), self._static("x", x)
        leaves = Leaves(self._inputs, [], {})
        return self._fresh(self._run.run("output", lambda: self._evaluate(row, x, leaves)))

    def differentiable_output(self, step: int, x: Tensor, x_needed: bool) -> Tensor:
        """The same, for `backward`: with a graph that is kept, or to be replayed, as the plan says."""
        if not self._run.plain:
            # What draws random numbers is not captured.
            return self._evaluate_by_plan(step, x, x_needed)
        before = RandomState.capture(x.device)
        output = self._evaluate_by_plan(step, x, x_needed)
        if before.drawn_from():
            self._random[step] = before
        return output

    def _evaluate_by_plan(self, step: int, x: Tensor, x_needed: bool) -> Tensor:
        plan = self._plan_of_gradients()
        stored = plan.stored[step]
        if stored is None:
            return self.output(step, x)
        x = self._static(("x", step), x)

        def work() -> Kept:
            return self._with_graph(step, x, x_needed, plan.levels[stored])

        self._kept[step] = self._run.run(("keep", step), work)
        return self._fresh(self._kept[step].output.detach())

    def backward(self, step: int, x: Tensor, grad_output: Tensor, x_needed: bool) -> Tensor | None:
        """The gradient of x, if needed, given that of the output; that of everything else is added up."""
        grad_output = self._static("grad_output", grad_output)
        if (kept := self._kept.pop(step, None)) is not None:
            grad = self._run.run(("kept", step), lambda: self._differentiate(kept, grad_output, self._run.retain))
            return None if grad is None else self._fresh(grad)
        plan, row, x = self._plan_of_gradients(), self._row(step), self._static("x", x)
        # Not what a segment returned: of several that take turns, each would have to be captured again.
        grad_x = self._run.keep("grad_x", lambda: torch.empty_like(x)) if x_needed else None
        # Of fewer images dropout would draw other masks than it drew of all.
        together = self._batch if step in self._random else plan.replay_batch
        for first in range(0, self._batch, together):
            images = slice(first, min(first + together, self._batch))

            def work(images: slice = images) -> None:
                replayed = self._with_graph(row, x, x_needed, plan.replay_level, images)
                grad = self._differentiate(replayed, self._of_images(grad_output, images))
                if grad_x is not None and grad is not None:
                    grad_x[images] = grad

            with self._random[step].restored() if step in self._random else contextlib.nullcontext():
                self._run.run(("replay", x_needed, first), work)
        return grad_x

    def _plan_of_gradients(self) -> Plan:
        """The plan, asked for by what only differentiated chains do, and those have one."""
        return cast(Plan, self.plan)

    def begin_backward(self) -> None:
        """Before the first `backward`, in a chain's second backward pass, too: everything is replayed in that one.

        Raises:
            RuntimeError: where the UNet was accelerated otherwise, or restored, since `begin`, or lost a parameter.
        """
        there = set(map(id, self.denoiser.module.parameters()))
        if lost := [name for name, parameter in self.parameters.items() if id(parameter) not in there]:
            raise RuntimeError(
                f"{lost[0]!r} and {len(lost) - 1} more trainable parameters were taken out of the UNet between the "
                "sampling and its backward pass; call backward() first."
            )
        if self._servings and list(map(id, self._servings)) != list(map(id, servings(self.denoiser.model))):
            raise RuntimeError(
                "rftcore.accelerate or rftcore.restore was called on the UNet between the sampling and its backward "
                "pass, which would replay other blocks; call backward() first."
            )
        if self._finished:
            # The graphs' memory is other chains' by now.
            self._run, self._finished = Run(None, "a chain's second backward pass"), False
            with torch.no_grad(), self._ambient.restored():
                self._prepare()
        make = lambda: GradientSum([*self._inputs.tensors(), *self.parameters.values()])  # noqa: E731
        # Of a plain run new ones: what is handed out may become a parameter's own `grad`.
        self._sums = make() if self._run.plain else self._run.keep("sums", make)
        self._sums.clear()

    def gradients(self) -> list[Tensor | None]:
        """Of the conditioning's tensors and of the parameters, once every step has had its backward."""
        count = len(self._inputs.constants())
        if any(self._wanted[len(self._wanted) - count :]):
            self._run.run("once, backward", self._constants_backward)
        result = [None if grad is None else self._fresh(grad) for grad in self._sums.result()]
        del result[len(self._conditioning) : len(self._conditioning) + count]
        return result

    def finish(self) -> None:
        """After the last pass: captured work is other chains' from now on."""
        self._run.finish()
        self._finished = not self._run.plain

    def release(self) -> None:
        """Lets every kept graph go."""
        self._kept.clear()
        self._run.give_up()

    def _leaves(self, inputs: Inputs, wanted: tuple[bool, ...]) -> Leaves:
        """Leaves for one piece of work; a captured one needs its own even of parameters, of the stream it runs on."""
        return Leaves(inputs.leaves(wanted), *replay_parameters(self.parameters, own=not self._run.plain))

    def _evaluate(self, step: int | Tensor, x: Tensor, leaves: Leaves, images: slice | None = None) -> Tensor:
        """The output for the states x (b, C, h, w) of some images, of all B where none are named."""
        time = {name: _row(table, step) for name, table in leaves.inputs.time.items()}
        conditioning, given = leaves.inputs.conditioning, {**leaves.inputs.text, **time}
        if images is not None and x.shape[0] != self._batch:
            conditioning, given = (
                {name: t if t.shape[0] == 1 else self._of_images(t, images) for name, t in group.items()}
                for group in (conditioning, given)
            )
        if self._scales is not None:
            x = x * _row(self._scales, step)
        with once.given(self.denoiser.model, given) if given else contextlib.nullcontext():
            t = _row(self._timesteps, step)
            return self.denoiser(x, t, conditioning, guided=self.guided, parameters=leaves.stand_ins)

    def _with_graph(self, step: Any, x: Tensor, x_needed: bool, level: Any, images: slice | None = None) -> Kept:
        x = (x if images is None else x[images]).detach().requires_grad_(x_needed)
        leaves = self._leaves(self._inputs, self._wanted)
        again = contextlib.nullcontext() if level is None else recompute(self.denoiser.model, level)
        with torch.enable_grad(), self._ambient.restored(), again:
            return Kept(x, leaves, self._evaluate(step, x, leaves, images))

    def _differentiate(self, kept: Kept, grad_output: Tensor, retain_graph: bool = False) -> Tensor | None:
        sources = [kept.x, *kept.leaves.inputs.tensors(), *kept.leaves.trained]
        grad, *rest = gradients([kept.output], [grad_output], sources, retain_graph)
        self._sums.add(rest)
        return grad

    def _constants_backward(self) -> None:
        given = self._inputs._replace(text={}, time={})
        leaves = self._leaves(given, self._conditioning_wanted)
        with torch.enable_grad(), self._ambient.restored():
            again = self._with_constants(leaves) if has_constants(self.denoiser) else given
        if (again.text.keys(), again.time.keys()) != (self._inputs.text.keys(), self._inputs.time.keys()):
            raise RuntimeError(
                "hooks, adapters or gradient checkpointing were put on or taken off the UNet between the sampling and "
                "its backward pass, which would replay another model; call backward() first."
            )
        made = again.constants()
        first = len(self._conditioning)
        sums = self._sums.result()[first : first + len(made)]
        found = gradients(made, sums, [*leaves.inputs.tensors(), *leaves.trained])
        self._sums.add([*found[:first], *[None] * len(made), *found[first:]])

    def _with_constants(self, leaves: Leaves) -> Inputs:
        """The inputs with what need not be made in each step."""
        values = make_constants(self.denoiser, self._timesteps, leaves.inputs.conditioning, leaves.stand_ins)
        return Inputs(leaves.inputs.conditioning, values.text, values.time)

    def _of_images(self, tensor: Tensor, images: slice) -> Tensor:
        """Of (N, ...) what belongs to these images, in both branches."""
        return tensor.unflatten(0, (-1, self._batch))[:, images].flatten(0, 1)

    def _static(self, name: Hashable, tensor: Tensor) -> Tensor:
        """The same values where captured work reads them."""
        if self._run.plain:
            return tensor
        return self._run.keep(name, lambda: torch.empty_like(tensor)).copy_(tensor)

    def _row(self, step: int) -> int | Tensor:
        """The step as work is told it that is captured once for all steps."""
        if self._run.plain:
            return step
        device = self._timesteps.device
        return self._run.keep("step", lambda: torch.zeros(1, dtype=torch.int64, device=device)).fill_(step)

    def _fresh(self, tensor: Tensor) -> Tensor:
        """What a segment returned, for longer than until it runs again."""
        return tensor if self._run.plain else tensor.clone()


def _row(table: Tensor, step: int | Tensor) -> Tensor:
    """Row `step` of a table; of a step on the device, too."""
    return table.index_select(0, step).squeeze(0) if isinstance(step, Tensor) else table[step]
