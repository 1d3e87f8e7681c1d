"""Adaptation methods as the command line names them: a rule or test-time method, drift detection, questions."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, ClassVar

from fedbn.errors import UserError
from fedbn.objects import is_reference
from fedbn.online import Alignment, Rule
from fedbn.online.alignments.base import alignments, parse_alignment, split_alignment
from fedbn.online.drift.actions import Action, action
from fedbn.online.drift.detectors import Detector, detector
from fedbn.online.fallback import Fallback
from fedbn.online.matched import Matched, parse_matched, split_head
from fedbn.online.methods import rules_and_methods
from fedbn.online.rules.base import not_a_rule
from fedbn.online.rules.source import Source
from fedbn.online.validation import require_no_classes
from fedbn.plugins import find, parse, render, text_of
from fedbn.streams import StreamSpec
from fedbn.tasks import Task
from fedbn.tta import Method
from fedbn_simulations.adaptation.warm_starts import Start


@dataclass(frozen=True)
class Questions:
    """Ask each user for labels of single windows (`fedbn.online.prequential.ActiveLabeling`).

    Attributes:
        budget: number of questions per user.
    """

    name: ClassVar[str] = "ask"
    about: ClassVar[str] = "ask for the label of a class that was confirmed least"
    budget: int = 6

    def __post_init__(self) -> None:
        if self.budget < 1:
            raise UserError(f"'ask': budget must be at least 1, not {self.budget}")


@dataclass(frozen=True)
class AdaptationMethod:
    """A rule or test-time method and, with a rule, alignment of the input, matched head, drift detection and questions.

    Attributes:
        rule: a rule on statistics, or a method with gradients or output smoothing.
        watch: drift detector, and the action after an alarm.
        ask: questions to users.
        align: alignment of the input.
        head: matched head.
        fallback: return to the source while evidence is against the alignment.
    """

    rule: Rule | Method
    watch: tuple[Detector, Action] | None = None
    ask: Questions | None = None
    align: Alignment | None = None
    head: Matched | None = None
    fallback: Fallback | None = None

    @property
    def text(self) -> str:
        """The shortest text that `adaptation_method` parses to this value."""
        rule = None if self.rule == Source() and (self.align or self.head) else self.rule
        first = [render(part) for part in (self.align, rule, self.head) if part is not None]
        more = [render(part) for part in (*(self.watch or ()), self.ask, self.fallback) if part is not None]
        return "/".join(["+".join(first), *more])


def adaptation_method(text: str) -> AdaptationMethod:
    """Parse ``rule``, ``rule/detector/action``, ``rule/ask`` or ``rule/detector/action/ask``.

    ``/fallback`` can follow an alignment without drift detection.
    The rule can be an alignment, ``rotation``, or follow one, ``rotation+rule``. A matched head can follow all of them,
    ``rotation+rule+matched``, or stand alone.

    Raises:
        UserError: an unknown name, a wrong option, or parts that cannot be combined.

    >>> adaptation_method("pseudo:n0=16/adwin/decay:n=8/ask").text
    'pseudo/adwin/decay:n=8/ask'
    >>> adaptation_method("rotation+source+matched:weight=0.1").text
    'rotation+matched'
    """
    first, *more = text.split("/")
    first, head_text = split_head(first)
    head = parse_matched(head_text) if head_text else None
    if first and not is_reference(first):
        find(first.split("+")[0].split(":")[0], "rule or method", {**rules_and_methods(), **alignments()})
    align_text, rule_text = split_alignment(first)
    align = parse_alignment(align_text) if align_text else None
    chosen = parse(rule_text or Source.name, "rule or method", rules_and_methods(), (Rule, Method))
    fallback = parse(more.pop(), "monitor", {Fallback.name: Fallback}) if more and more[-1].startswith("fall") else None
    ask = parse(more.pop(), "question", {Questions.name: Questions}) if more and more[-1].startswith("ask") else None
    if len(more) not in (0, 2):
        raise UserError(f"{text!r}: write rule/detector/action, e.g. {first}/adwin/decay, or {first}/ask")
    watch = (detector(more[0]), action(more[1])) if more else None
    if isinstance(chosen, Method) and (watch or ask):
        raise UserError(
            f"{text!r}: only rules on statistics support drift detection and questions, and "
            f"{chosen.name} is a test-time method"
        )
    if fallback and (align is None or watch):
        raise UserError(f"{text!r}: fallback needs an alignment and no drift detection, e.g. rotation/fallback")
    if isinstance(chosen, Method) and (align or head):
        what = "alignments" if align else "matched heads"
        raise UserError(f"{text!r}: {what} work with rules on statistics, and {chosen.name} is a test-time method")
    return AdaptationMethod(chosen, watch, ask, align, head, fallback)


def adaptation_text(chosen: Any) -> str:
    """The text that `adaptation_method` converts to a rule or method that is given as an object.

    Raises:
        UserError: another object.
    """
    if isinstance(chosen, AdaptationMethod):
        return chosen.text
    return text_of(chosen, "rule or method", rules_and_methods(), (Rule, Method))


def check_classes(
    task: Task, chosen: Iterable[AdaptationMethod], starts: Iterable[Start], streams: Iterable[StreamSpec]
) -> None:
    """Raise if something needs classes, and the task has no class probabilities.

    Raises:
        UserError: naming it, and what to choose instead.
    """
    if task.has_posterior:
        return
    for method in chosen:
        if isinstance(method.rule, Rule):
            require_no_classes(method.rule, task.name)
        elif method.rule.needs:
            raise UserError(
                f"method {method.rule.name!r} needs {method.rule.needs}, and task {task.name!r} has no class "
                "probabilities: choose a rule on statistics, such as pseudo or ema"
            )
        for what, plugin in (("alignment", method.align), ("head", method.head)):
            if plugin is not None:
                raise UserError(f"{what} {plugin.name!r} needs classes, and task {task.name!r} has none: leave it out")
        if method.ask:
            raise UserError(f"'ask' asks for classes, and task {task.name!r} has none: leave it out")
    for kind, parts in (("start", starts), ("stream", streams)):
        for part in parts:
            if part.needs_classes:
                raise UserError(
                    f"{kind} {part.name!r} selects windows by class, and task {task.name!r} has no class per window: "
                    f"choose {'cold or recording' if kind == 'start' else 'natural or iid'}"
                )


def can_align(text: str) -> bool:
    """Whether an alignment can precede a rule.

    >>> can_align("pseudo/adwin/decay"), can_align("tent"), can_align("rotation+pseudo")
    (True, False, False)
    """
    method = adaptation_method(text)
    return isinstance(method.rule, Rule) and method.align is None


def served_rule(text: str) -> AdaptationMethod:
    """Rule of a model that serves users: on statistics, with an optional alignment, matched head and fallback.

    Raises:
        UserError: an unknown name or option, a test-time method, or a drift detector or questions.

    >>> served_rule("rotation+population:diversity=1+matched/fallback").text
    'rotation+population:diversity=1.0+matched/fallback'
    """
    method = adaptation_method(text)
    if not isinstance(method.rule, Rule):
        raise not_a_rule(method.rule.name)
    if method.watch or method.ask:
        raise UserError(
            f"rule {text!r}: leave out what follows '/', other than fallback. A service has its own drift detector "
            "(--drift), and only fedbn adapt asks questions"
        )
    return method
