"""Gates as they are written: `"> 0.5"`, `"<= 2"`, `"< 1.1 * sft/perplexity"`, `">= stage:sft/accuracy"`.

A rule is an operator and a limit: a number, a metric, or a number times a metric. It is parsed here by a grammar of
three lines and never evaluated as code.
"""

from __future__ import annotations

import math
import operator
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

OFF = "off"
"""What is written for a gate that a stage has unasked and that is not wanted."""

_OPERATORS: dict[str, Callable[[float, float], bool]] = {
    ">=": operator.ge,
    "<=": operator.le,
    ">": operator.gt,
    "<": operator.lt,
}
_NUMBER = r"[-+]?(?:\d+(?:\.\d*)?|\.\d+)(?:[eE][-+]?\d+)?"
_METRIC = r"(?:(?:stage:)?\w[\w.-]*/)?[A-Za-z_][\w.-]*"
_RULE = re.compile(rf"\s*(>=|<=|>|<)\s*(?:({_NUMBER})(?:\s*\*\s*({_METRIC}))?|({_METRIC}))\s*", re.ASCII)
_NAME = re.compile(_METRIC, re.ASCII)

_WRITE = 'write >, >=, < or <= and then a number, a metric or NUMBER * METRIC, as in "> 0.5" or "< 1.1 * sft/loss"'


@dataclass(frozen=True)
class Rule:
    """What a metric must be: `factor` alone, or times another metric."""

    text: str
    operator: str
    factor: float
    metric: str | None = None

    def holds(self, value: float, limit: float) -> bool:
        return _OPERATORS[self.operator](value, limit)

    @property
    def wants_more(self) -> bool:
        return self.operator.startswith(">")


@dataclass(frozen=True)
class Judged:
    """What came of one gate."""

    gate: str
    """As `require` names it."""
    rule: str
    """What it asks, in the words of the file."""
    passed: bool
    value: float | None
    """The metric; None when there is none."""
    limit: float | None
    """The number that it was compared with."""
    says: str
    """The numbers in words: `0.47, must be > 0.5`."""
    remedy: str = ""

    def record(self) -> dict[str, Any]:
        """Return what the manifest keeps."""
        found = {"gate": self.gate, "rule": self.rule, "passed": self.passed, "value": self.value, "limit": self.limit}
        return {**found, "says": self.says}


def parse(text: str) -> Rule:
    """Return a rule; raise ValueError that says what may be written."""
    found = _RULE.fullmatch(text)
    if found is None:
        raise ValueError(f"{text!r} is no rule; {_WRITE}")
    sign, number, factor_of, metric = found.groups()
    factor = float(number) if number is not None else 1.0
    if not math.isfinite(factor) or metric in ("nan", "inf"):
        raise ValueError(f"{text!r}: {number or metric} is no finite number; {_WRITE}")
    return Rule(" ".join(text.split()), sign, factor, factor_of or metric)


def is_metric(text: str) -> bool:
    """Tell whether a text has the form of a metric's name: METRIC, NAME/METRIC or stage:NAME/METRIC."""
    return _NAME.fullmatch(text) is not None


def check_rule(text: Any) -> Any:
    """Refuse what is no rule, as a validator does; `off` is looked at where the names are known."""
    if isinstance(text, int | float) and not isinstance(text, bool):
        raise ValueError(f'{text!r} is no rule; write an operator before it, as in ">= {text}"')
    if text is False:  # what YAML's own writers make of `off`
        return OFF
    if not isinstance(text, str):
        raise ValueError(f"{text!r} is no rule; {_WRITE}")
    if text != OFF:
        parse(text)
    return text


def judge(gate: str, rule: Rule, value: float | None, other: float | None) -> Judged:
    """Compare a metric with its limit; one that is missing or no finite number does not pass.

    `other` is the metric that the rule names on its right side.
    """
    limit = rule.factor if rule.metric is None else None if other is None else rule.factor * other
    missing = _missing(gate, value) or (rule.metric and _missing(rule.metric, other)) or ""
    if not missing and (limit is None or not math.isfinite(limit)):
        missing = f"{rule.text} is {limit}, no number to compare with"
    if missing or value is None or limit is None:
        return Judged(gate, rule.text, False, _finite(value), _finite(limit), f"{missing}; must be {rule.text}")
    shown = f" = {limit:.6g}" if rule.metric else ""
    says = f"{value:.6g}, must be {rule.text}{shown}"
    passed = rule.holds(value, limit)
    if passed:
        return Judged(gate, rule.text, True, value, limit, says)
    if value != limit and f"{value:.6g}" == f"{limit:.6g}":  # too near to be seen in six digits
        says = f"{value!r}, must be {rule.text}{f' = {limit!r}' if rule.metric else ''}"
    better, gentler = ("raise", "lower") if rule.wants_more else ("lower", "raise")
    return Judged(gate, rule.text, False, value, limit, says, f"{better} {gate}, or {gentler} the gate")


def _missing(name: str, value: float | None) -> str:
    if value is None:
        return f"{name} was not measured"
    return "" if math.isfinite(value) else f"{name} is {value}, no number"


def _finite(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None
