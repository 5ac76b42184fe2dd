"""The mutations that `benchmarks.mutants` draws from: cosmic-ray's operators and two more, and what they leave alone."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Iterator

import parso
from cosmic_ray.ast import ast_nodes, get_ast
from cosmic_ray.mutating import mutate_code
from cosmic_ray.operators.operator import Example, Operator
from cosmic_ray.operators.provider import OperatorProvider

# Calls that change a value's gradient, storage, dtype or range: what goes wrong in silence without them.
_CALLS = frozenset({"abs", "clamp", "clone", "contiguous", "copy", "detach", "double", "float", "to"})
# Replacing a name by any other needs a list of names. `is` for `==` is the same of a literal, which Python keeps once.
_LEFT_OUT = frozenset({
    "VariableReplacer", "VariableInserter", "ReplaceComparisonOperator_Eq_Is", "ReplaceComparisonOperator_NotEq_IsNot",
})  # fmt: skip
_TEXT_FUNCTIONS = frozenset({"__repr__", "__str__"})
_TEXT_CALLS = ("warnings", "warn", "logger", "logging", "print")


class DropStatement(Operator):
    """A call made for its effect, or a raise, becomes `pass`."""

    def mutation_positions(self, node):
        if node.type == "simple_stmt" and self._drops(node.children[0]):
            yield node.children[0].start_pos, node.children[0].end_pos

    @staticmethod
    def _drops(statement) -> bool:
        if statement.type == "raise_stmt":
            return True
        return statement.type in ("atom_expr", "power") and statement.children[-1].get_code(False).startswith("(")

    def mutate(self, node, index):
        node.children[0] = parso.parse(node.children[0].get_first_leaf().prefix + "pass")
        return node

    @classmethod
    def examples(cls):
        return (Example("f(x)\n", "pass\n"), Example("raise ValueError(x)\n", "pass\n"))


class DropCall(Operator):
    """`x.detach()` becomes `x`, and so for the other calls of the list."""

    def mutation_positions(self, node):
        return [(node.children[i].start_pos, node.children[i + 1].end_pos) for i in self._calls(node)]

    @staticmethod
    def _calls(node) -> list[int]:
        if node.type not in ("atom_expr", "power"):
            return []
        code = [child.get_code(False) for child in node.children]
        return [
            i
            for i in range(1, len(code) - 1)
            if code[i][:1] == "." and code[i][1:] in _CALLS and code[i + 1][:1] == "("
        ]

    def mutate(self, node, index):
        i = self._calls(node)[index]
        del node.children[i : i + 2]
        return node

    @classmethod
    def examples(cls):
        return (Example("y = x.detach() + 1", "y = x + 1"),)


def _operators() -> dict[str, Operator]:
    provided = OperatorProvider()
    theirs = {name: provided[name]() for name in provided if name not in _LEFT_OUT}
    return theirs | {"DropStatement": DropStatement(), "DropCall": DropCall()}


_OPERATORS = _operators()


@dataclasses.dataclass(frozen=True)
class Mutation:
    """One change of one file. Lines count from 1; first to last are the lines of the statement it is in."""

    file: str
    operator: str
    occurrence: int
    line: int
    column: int
    first: int
    last: int
    # The lines of the function whose signature or decorators it is in, else None.
    body: tuple[int, int] | None

    def applied(self, source: str) -> str:
        return mutate_code(source, _OPERATORS[self.operator], self.occurrence)

    def compiles(self, source: str) -> bool:
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", SyntaxWarning)
                compile(self.applied(source), self.file, "exec")
        except SyntaxError:
            return False
        return True

    def change(self, source: str) -> tuple[str, str]:
        """The statement's changed lines, before and after, stripped."""
        before, after = source.splitlines(), self.applied(source).splitlines()
        start = 0
        while start < min(len(before), len(after)) and before[start] == after[start]:
            start += 1
        end = 0
        while end < min(len(before), len(after)) - start and before[-1 - end] == after[-1 - end]:
            end += 1
        old, new = before[start : len(before) - end], after[start : len(after) - end]
        return " ".join(line.strip() for line in old).strip(), " ".join(line.strip() for line in new).strip()


def sites(file: str, source: str) -> list[list[Mutation]]:
    """The places of a file that can be mutated, each with its variants; not all compile.

    Left alone: annotations, what an error or a warning says, __repr__, what stands under `if TYPE_CHECKING`.
    """
    counts = dict.fromkeys(_OPERATORS, 0)
    places: dict[tuple, list[Mutation]] = {}
    for node in ast_nodes(get_ast(source)):
        left_alone = None
        for name, operator in _OPERATORS.items():
            for start, end in operator.mutation_positions(node):
                occurrence, counts[name] = counts[name], counts[name] + 1
                if left_alone is None:
                    left_alone = _left_alone(node)
                if left_alone:
                    continue
                first, last, body = _statement(node)
                mutation = Mutation(file, name, occurrence, start[0], start[1], first, last, body)
                places.setdefault((start, end), []).append(mutation)
    return list(places.values())


def _with_ancestors(node) -> Iterator:
    while node is not None:
        yield node
        node = node.parent


def _left_alone(node) -> bool:
    for inner in _with_ancestors(node):
        outer = inner.parent
        if outer is None:
            return False
        if outer.type == "tfpdef" and inner is outer.children[-1]:
            return True
        if outer.type == "annassign" and inner is outer.children[1]:
            return True
        if outer.type == "funcdef" and inner is outer.annotation:
            return True
        if outer.type == "raise_stmt":
            return True
        if outer.type == "funcdef" and outer.name.value in _TEXT_FUNCTIONS:
            return True
        if outer.type in ("atom_expr", "power") and outer.get_code(False).split("(")[0].split(".")[0] in _TEXT_CALLS:
            return True
        if outer.type == "if_stmt" and outer.children[1].get_code(False) == "TYPE_CHECKING":
            return True
    return False


def _statement(node) -> tuple[int, int, tuple[int, int] | None]:
    """The lines of the statement, or of a compound statement's header, and the body a signature belongs to."""
    for inner in _with_ancestors(node):
        outer = inner.parent
        if outer.type == "decorated" and inner is outer.children[0]:
            return inner.start_pos[0], inner.end_pos[0], (outer.start_pos[0], outer.end_pos[0])
        if outer.type in ("funcdef", "classdef") and inner is not outer.children[-1]:
            return outer.start_pos[0], outer.children[-1].start_pos[0] - 1, (outer.start_pos[0], outer.end_pos[0])
        if inner.type == "simple_stmt" or outer.type in ("file_input", "suite"):
            last = inner.children[0].end_pos[0] if inner.type == "simple_stmt" else inner.end_pos[0]
            for child in getattr(inner, "children", ()):
                # A header's mutation concerns the header.
                if child.type in ("suite", "simple_stmt") and inner.type != "simple_stmt":
                    last = max(child.start_pos[0] - 1, inner.start_pos[0])
                    break
            return inner.start_pos[0], last, None
    raise AssertionError("a node stands in no statement")
