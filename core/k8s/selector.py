"""Label selectors: which objects a Server, Service or workload means (apimachinery LabelSelector). Pure."""

from __future__ import annotations

from collections.abc import Mapping

import msgspec

from core.k8s import fields
from core.k8s.fields import InvalidObject

_OPERATORS = ("In", "NotIn", "Exists", "DoesNotExist")


class Requirement(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """LabelSelectorRequirement: ``NotIn`` and ``DoesNotExist`` also hold for an object without the label."""

    key: str
    operator: str
    values: tuple[str, ...] = ()

    def matches(self, labels: Mapping[str, str]) -> bool:
        """Does an object with these labels meet the requirement?"""
        value = labels.get(self.key)
        if self.operator == "In":
            return value in self.values
        if self.operator == "NotIn":
            return value not in self.values
        return (value is not None) == (self.operator == "Exists")


class LabelSelector(msgspec.Struct, frozen=True, forbid_unknown_fields=True, rename="camel"):
    """Everything must hold; an empty selector selects every object."""

    match_labels: dict[str, str] = {}
    match_expressions: tuple[Requirement, ...] = ()

    def matches(self, labels: Mapping[str, str]) -> bool:
        """Does the selector select an object with these labels?"""
        for key, value in self.match_labels.items():  # a loop, not any(): asked for every pod and every Server
            if labels.get(key) != value:
                return False
        return not self.match_expressions or all(requirement.matches(labels) for requirement in self.match_expressions)

    def excludes(self, other: LabelSelector) -> bool:
        """Can no object be selected by both? True only when that shows in their matchLabels."""
        theirs = other.match_labels
        return any(key in theirs and theirs[key] != value for key, value in self.match_labels.items())


def read_selector(raw: object, path: str) -> LabelSelector:
    """Read a selector from an untrusted value; raises InvalidObject."""
    selector = fields.read(raw, LabelSelector, path)
    for number, requirement in enumerate(selector.match_expressions):
        where = f"{path}.matchExpressions[{number}]"
        fields.one_of(f"{where}.operator", requirement.operator, _OPERATORS)
        if (requirement.operator in ("In", "NotIn")) != bool(requirement.values):
            expected = "at least one value" if not requirement.values else f"no values with operator {requirement.operator}"
            raise InvalidObject(f"{where}.values", expected, fields.shown(list(requirement.values)))
    return selector
