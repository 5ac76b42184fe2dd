"""Writes a block's program, step by step, from the block's own layers."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Mapping, Sequence

from torch import Tensor, nn

from rftcore.blocks import kinds, modules
from rftcore.blocks.dropout import DroppedAdapter
from rftcore.blocks.modules import Dropped
from rftcore.blocks.program import Program, Step
from rftcore.ops import Geometry, Projection
from rftcore.ops.projections import flatten


class Builder:
    """Collects steps and their parameters. Each method adds a step and returns the name of its output.

    Args:
        inputs: names of the program's inputs.
        backends: of an op's name, the backend that was asked for; "auto" where it says nothing.
        given: of a layer's name, its output, made beforehand.

    Attributes:
        parameters: of the steps.
        taken: of what was given, by the names that it has in the program: further inputs.

    Raises: Unserved, from any method, where a layer is one that no step can stand for.
    """

    def __init__(
        self, inputs: Iterable[str], backends: dict[str, str], given: Mapping[str, Tensor] | None = None
    ) -> None:
        self._inputs = tuple(inputs)
        self._given = given
        self.taken: dict[str, Tensor] = {}
        self._steps: list[Step] = []
        self._boundaries: list[str] = []
        self.parameters: list[Tensor | None] = []
        self._backends = backends
        self._prefix, self._inside = "", set[str]()

    @property
    def program(self) -> Program:
        return Program((*self._inputs, *self.taken), tuple(self._steps), tuple(self._boundaries))

    @contextlib.contextmanager
    def within(self, layer: str) -> Iterator[None]:
        """Values written inside have names that begin with `layer` and a dot; names are looked up there first."""
        self._prefix, self._inside = f"{layer}.", set()
        try:
            yield
        finally:
            self._prefix, self._inside = "", set()

    def take(self, names: Mapping[str, str]) -> bool:
        """Whether the outputs of all these layers were made beforehand: they are then inputs, called as `names` says."""
        if not self._given or any(layer not in self._given for layer in names):
            return False
        self.taken.update((self._prefix + name, self._given[layer]) for layer, name in names.items())
        self._inside.update(names.values())
        return True

    def boundary(self, name: str) -> str:
        """Notes that a block ends with this value and another begins with it."""
        self._boundaries.append(name)
        return name

    def step(self, kind, inputs: Sequence[str], outputs: Sequence[str], parameters=(), statistics: Sequence[str] = ()):
        """Any step; returns the name of its first output."""
        start = len(self.parameters)
        self.parameters.extend(parameters)
        places = range(start, len(self.parameters))
        if self._prefix:
            inputs = [self._prefix + name if name in self._inside else name for name in inputs]
            self._inside.update(outputs)
            outputs, statistics = ([self._prefix + name for name in names] for names in (outputs, statistics))
        self._steps.append(Step(kind, tuple(inputs), tuple(outputs), tuple(statistics), places))
        return outputs[0]

    def _backend(self, op: str) -> str:
        return self._backends.get(op, "auto")

    def group_norm(
        self,
        name: str,
        x: str,
        norm: nn.Module,
        silu: bool,
        embedding: str | None = None,
        how: str | None = None,
        own=False,
    ) -> str:
        """`how` is "add" or "scale_shift", for an embedding; `own`: the norm is the block."""
        norm = modules.expect(norm, nn.GroupNorm, own=own)
        kind = kinds.GroupNorm(norm.num_groups, norm.eps, silu, how, self._backend("group_norm_silu"))
        inputs = [x] if embedding is None else [x, embedding]
        return self.step(kind, inputs, [name], modules.norm_parameters(norm), [f"{name}.mean", f"{name}.deviation"])

    def layer_norm(self, name: str, h: str, norm: nn.Module) -> str:
        norm = modules.expect(norm, nn.LayerNorm)
        if len(norm.normalized_shape) != 1:
            raise modules.Unserved(f"a LayerNorm over {norm.normalized_shape}")
        parameters = modules.norm_parameters(norm)
        return self.step(kinds.LayerNorm(norm.eps), [h], [name], parameters, [f"{name}.mean", f"{name}.deviation"])

    def linear(self, names: Sequence[str], n: str, layers: Sequence[nn.Module], residual: str | None = None) -> str:
        """Projections of one n; a residual is added to a single one's output."""
        read = [modules.linear(layer) for layer in layers]
        counts = tuple(len(p.adapters) for p, _ in read)
        scales = tuple(_scales(p) for p, _ in read)
        kind = kinds.Linear(counts, scales, residual is not None, backend=self._backend("lora_linear"))
        outputs = [name if not dropped else f"{name}.undropped" for name, (_, dropped) in zip(names, read, strict=True)]
        self.step(kind, [n] if residual is None else [n, residual], outputs, flatten(p for p, _ in read))
        for name, output, (_, dropped) in zip(names, outputs, read, strict=True):
            self._add_dropped(name, n, output, dropped, None)
        return self._prefix + names[0]

    def convolution(self, name: str, x: str, layer: nn.Module, residual: str | None = None, own=False) -> str:
        """`own`: the layer is the block."""
        projection, geometry, dropped = modules.convolution(layer, own)
        kind = kinds.Convolution(geometry, len(projection.adapters), _scales(projection), residual is not None)
        output = name if not dropped else f"{name}.undropped"
        self.step(kind, [x] if residual is None else [x, residual], [output], flatten([projection]))
        self._add_dropped(name, x, output, dropped, geometry)
        return self._prefix + name

    def _add_dropped(self, name: str, n: str, y: str, dropped: Sequence[Dropped], geometry: Geometry | None) -> None:
        """Adds to y, until it is `name`, what adapters with dropout make of n."""
        for i, (p, adapter) in enumerate(dropped):
            output = name if i + 1 == len(dropped) else f"{name}.dropped{i}"
            kind = DroppedAdapter(p, adapter.scale, geometry)
            y = self.step(kind, [n, y], [output], [adapter.a, adapter.b])

    def attention(self, name: str, q: str, k: str, v: str, heads: int, scale: float) -> str:
        kind = kinds.Attention(heads, scale, self._backend("attention"))
        return self.step(kind, [q, k, v], [name], statistics=[f"{name}.log_sum_exp"])

    def geglu(self, name: str, u: str) -> str:
        return self.step(kinds.GEGLU(self._backend("geglu"), self._backend("gated_linear")), [u], [name])

    def quotient(self, name: str, x: str, divisor: float) -> str:
        """x itself where the divisor is 1."""
        return x if divisor == 1 else self.step(kinds.Quotient(divisor), [x], [name])


def _scales(projection: Projection) -> tuple[float, ...]:
    return tuple(adapter.scale for adapter in projection.adapters)
