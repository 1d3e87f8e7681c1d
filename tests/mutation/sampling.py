"""A keyed sample of the mutants that Cosmic Ray can make."""

from __future__ import annotations

import hashlib
from collections import Counter, defaultdict
from contextlib import suppress
from dataclasses import dataclass, replace

from cosmic_ray.ast import ast_nodes, get_ast
from cosmic_ray.mutating import mutate_code
from cosmic_ray.plugins import get_operator

SWAPS = {
    "Binary": "Add_Sub Sub_Add Mul_Div Div_Mul FloorDiv_Mul Mod_FloorDiv Pow_Mul BitAnd_BitOr BitOr_BitAnd",
    "Comparison": "Eq_NotEq NotEq_Eq Lt_LtE LtE_Lt Gt_GtE GtE_Gt Is_IsNot IsNot_Is",
    "Unary": "Delete_USub Delete_Invert Delete_Not",
}
OTHERS = [
    *("AddNot", "ReplaceTrueWithFalse", "ReplaceFalseWithTrue", "ReplaceAndWithOr", "ReplaceOrWithAnd"),
    *("ReplaceBreakWithContinue", "ReplaceContinueWithBreak", "ZeroIterationForLoop"),
    *("ExceptionReplacer", "NumberReplacer", "RemoveDecorator"),
]
OPERATORS = [f"Replace{kind}Operator_{swap}" for kind, swaps in SWAPS.items() for swap in swaps.split()] + OTHERS
"""Plausible mistakes. Others, such as a shift in place of a sum, fail in every test that runs the line."""

ANNOTATIONS = {(":", "annassign"), (":", "tfpdef"), ("->", "funcdef")}
"""Operator before a type annotation, and type of the node that holds both."""


@dataclass(frozen=True)
class Mutant:
    """One change of one module.

    Attributes:
        key: depends on the changed line and the function around it, not on the rest of the module, so that the same
            sample is drawn before and after a change elsewhere.
        module: path relative to the root.
        line: number of the changed line.
        before, after: text of the first line that differs.
        operator, occurrence: operator of Cosmic Ray, and index of the place among those where it applies.
    """

    key: str
    module: str
    line: int
    before: str
    after: str
    operator: str
    occurrence: int

    def source(self, code):
        """Mutated source of the module."""
        return mutate_code(code, get_operator(f"core/{self.operator}")(), self.occurrence)


def draw(root, modules, count, seed=0):
    """Draw up to ``count`` places of the modules, and one mutant in each."""
    candidates = []
    for module in modules:
        code = (root / module).read_text(encoding="utf-8")
        candidates += [
            (digest(seed, key), module, code, line, variants) for key, line, variants in places(code, module)
        ]
    sample = []
    for key, module, code, line, variants in sorted(candidates):
        if len(sample) == count:
            break
        index = min(range(len(variants)), key=lambda i: digest(key, variants[i][0], i))
        mutant = Mutant(key, module, line, "", "", *variants[index])
        with suppress(AttributeError):  # Cosmic Ray 8.7 cannot replace an exception with a dotted name
            if lines := first_difference(code, mutant.source(code)):
                sample.append(replace(mutant, before=lines[0], after=lines[1]))
    return sample


def places(code, module):
    """Places that can be mutated: a key, the line, and pairs of operator and occurrence."""
    lines, nodes = code.splitlines(), list(ast_nodes(get_ast(code)))
    found = defaultdict(list)
    for name in OPERATORS:
        operator = get_operator(f"core/{name}")()
        positions = ((node, start) for node in nodes for start, _ in operator.mutation_positions(node))
        for occurrence, (node, (line, column)) in enumerate(positions):
            if not is_annotation(node):
                text = lines[line - 1].strip()
                column -= len(lines[line - 1]) - len(lines[line - 1].lstrip())
                place = module, scope(node), text, column, name.rpartition("_")[0] or name
                found[place, line].append((name, occurrence))
    repeated = Counter()
    for (place, line), variants in sorted(found.items(), key=lambda item: item[0][1]):
        repeated[place] += 1
        yield digest(*place, repeated[place]), line, variants


def is_annotation(node):
    """Whether a node is in a type annotation, which is not evaluated."""
    while (parent := node.parent) is not None:
        before = node.get_previous_sibling()
        if (getattr(before, "value", ""), parent.type) in ANNOTATIONS:
            return True
        node = parent
    return False


def scope(node):
    """Qualified name of the function or class around a node."""
    names = []
    while node is not None:
        if node.type in ("funcdef", "classdef"):
            names.append(node.name.value)
        node = node.parent
    return ".".join(reversed(names))


def first_difference(before, after):
    """First line that differs, in both texts, without blank lines; None if there is none or ``after`` is no Python."""
    try:
        compile(after, "", "exec")
    except SyntaxError:
        return None
    a, b = ([line for line in map(str.strip, text.splitlines()) if line] for text in (before, after))
    return next((pair for pair in zip(a, b) if pair[0].split() != pair[1].split()), None)


def digest(*parts):
    """Hash of texts and numbers."""
    return hashlib.sha256("|".join(map(str, parts)).encode()).hexdigest()[:16]
