"""The part of Go's template language that our chart uses, rendered as Helm renders it. Pure; called by `cli.render.chart`.

``if``/``else``, ``range``, ``with``, ``define``/``include``, ``$variables``, pipelines and the functions in `_FUNCTIONS`; anything else is
refused with its place, and so is a value that is not there, where Helm would print nothing. That the result is Helm's is a test's to
prove, on the whole chart.
"""

from __future__ import annotations

import base64
import json
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import yaml

_ACTION = re.compile(r"\{\{(-\s)?\s*(/\*.*?\*/|(?:\"(?:\\.|[^\"\\])*\"|`[^`]*`|(?!\}\}).)*?)\s*(\s-)?\}\}", re.DOTALL)
_TOKEN = re.compile(r"\s+|\"(?:\\.|[^\"\\])*\"|`[^`]*`|-?\d+|:=|\$[\w.]*|\.[\w.]*|[A-Za-z]\w*|[()|,]")
_ENDS = ("end", "else")


class TemplateError(ValueError):
    """The template is not ours to render, or asks for a value that is not there. The text names template, line and cause."""


class _Place(NamedTuple):
    name: str
    line: int

    def error(self, cause: str) -> TemplateError:
        return TemplateError(f"{self.name}:{self.line}: {cause}")


Evaluate = Callable[["_Scope"], Any]
Render = Callable[["_Scope"], Iterator[str]]


@dataclass
class _Scope:
    """What names mean at one place: ``.``, and variables (``$`` is the root)."""

    dot: Any
    variables: dict[str, Any]
    templates: Mapping[str, Render]

    def inside(self, dot: Any, **variables: Any) -> _Scope:
        return _Scope(dot, {**self.variables, **variables}, self.templates)


@dataclass
class Templates:
    """Templates that may include each other. Add all of them, then render."""

    _bodies: dict[str, Render] = field(default_factory=dict)

    def add(self, name: str, text: str) -> None:
        """Read one template and what it defines; raises TemplateError."""
        self._bodies[name] = _Parser(name, text, self._bodies).whole()

    def render(self, name: str, dot: Mapping[str, Any]) -> str:
        """The text of a template; raises TemplateError."""
        return "".join(self._bodies[name](_Scope(dot, {"$": dot}, self._bodies)))


class _Action(NamedTuple):
    place: _Place
    words: list[str]


class _Parser:
    """One template: text and actions in turn."""

    def __init__(self, name: str, text: str, templates: dict[str, Render]) -> None:
        self._templates = templates
        self._parts = list(_split(name, text))
        self._at = 0

    def whole(self) -> Render:
        body, closing = self._block()
        if closing is not None:
            raise closing.place.error(f"{closing.words[0]} without if, range, with or define")
        return body

    def _block(self) -> tuple[Render, _Action | None]:
        """Everything up to the ``end`` or ``else`` that closes it."""
        steps: list[Render] = []
        while self._at < len(self._parts):
            part = self._parts[self._at]
            self._at += 1
            if isinstance(part, str):
                steps.append(_text(part))
            elif not part.words:
                continue
            elif part.words[0] in _ENDS:
                return _sequence(steps), part
            else:
                steps.append(self._action(part))
        return _sequence(steps), None

    def _action(self, action: _Action) -> Render:
        keyword, rest = action.words[0], action.words[1:]
        if keyword == "if" or keyword == "with":
            return self._choice(action, keyword, rest)
        if keyword == "range":
            return self._range(action, rest)
        if keyword == "define":
            body, closing = self._block()
            self._closed(action, closing)
            self._templates[json.loads(rest[0])] = body
            return _text("")
        if len(action.words) > 2 and action.words[1] == ":=":
            return _assign(keyword, _pipeline(action.place, action.words[2:]))
        return _output(action.place, _pipeline(action.place, action.words))

    def _choice(self, action: _Action, keyword: str, words: list[str]) -> Render:
        condition = _pipeline(action.place, words)
        body, closing = self._block()
        otherwise = _text("")
        if closing is not None and closing.words[0] == "else":
            if closing.words[1:2] == ["if"]:
                return _choice(keyword, condition, body, self._choice(closing, "if", closing.words[2:]))
            otherwise, closing = self._block()
        self._closed(action, closing)
        return _choice(keyword, condition, body, otherwise)

    def _range(self, action: _Action, words: list[str]) -> Render:
        names: list[str] = []
        if ":=" in words:
            at = words.index(":=")
            names, words = [word for word in words[:at] if word != ","], words[at + 1 :]
        body, closing = self._block()
        self._closed(action, closing)
        return _loop(names, _pipeline(action.place, words), body)

    def _closed(self, action: _Action, closing: _Action | None) -> None:
        if closing is None or closing.words != ["end"]:
            raise action.place.error(f"{action.words[0]} has no end")


def _split(name: str, text: str) -> Iterator[str | _Action]:
    """Text and actions in turn, with the white space gone that ``{{-`` and ``-}}`` take away."""
    at, trim = 0, False
    for found in _ACTION.finditer(text):
        before = text[at : found.start()]
        before = before.lstrip() if trim else before
        yield before.rstrip() if found[1] else before
        place = _Place(name, text.count("\n", 0, found.start()) + 1)
        yield _Action(place, [] if found[2].startswith("/*") else list(_words(place, found[2])))
        at, trim = found.end(), bool(found[3])
    rest = text[at:]
    if "{{" in rest:
        raise _Place(name, text.count("\n", 0, at + rest.index("{{")) + 1).error("an action is not closed")
    yield rest.lstrip() if trim else rest


def _words(place: _Place, text: str) -> Iterator[str]:
    at = 0
    while at < len(text):
        found = _TOKEN.match(text, at)
        if found is None:
            raise place.error(f"cannot read {text[at : at + 20]!r}")
        if not found[0].isspace():
            yield found[0]
        at = found.end()


# --- what is rendered ----------------------------------------------------------------------------------------------------------------


def _text(text: str) -> Render:
    return lambda scope: iter((text,))


def _sequence(steps: list[Render]) -> Render:
    def run(scope: _Scope) -> Iterator[str]:
        inner = scope.inside(scope.dot)  # variables end with their block
        for step in steps:
            yield from step(inner)

    return run


def _assign(name: str, value: Evaluate) -> Render:
    def run(scope: _Scope) -> Iterator[str]:
        scope.variables[name] = value(scope)
        yield ""

    return run


def _output(place: _Place, value: Evaluate) -> Render:
    def run(scope: _Scope) -> Iterator[str]:
        found = value(scope)
        if isinstance(found, dict | list):
            raise place.error("prints a list or an object; use toYaml or toJson")
        yield _printed(found)

    return run


def _choice(keyword: str, condition: Evaluate, body: Render, otherwise: Render) -> Render:
    def run(scope: _Scope) -> Iterator[str]:
        found = condition(scope)
        if not found:
            yield from otherwise(scope)
        else:
            yield from body(scope.inside(found) if keyword == "with" else scope)

    return run


def _loop(names: list[str], values: Evaluate, body: Render) -> Render:
    def run(scope: _Scope) -> Iterator[str]:
        found = values(scope)
        # Go goes through a map in the order of its keys
        pairs = sorted(found.items()) if isinstance(found, Mapping) else list(enumerate(found or ()))
        for key, value in pairs:
            named = dict(zip(names, (key, value) if len(names) == 2 else (value,), strict=False))
            yield from body(scope.inside(value, **named))

    return run


def _printed(value: Any) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    return "" if value is None else str(value)


# --- expressions ---------------------------------------------------------------------------------------------------------------------


def _pipeline(place: _Place, words: list[str]) -> Evaluate:
    """``a | f x | g``: each result is the last argument of the next."""
    value: Evaluate | None = None
    for command in _between(place, words, "|"):
        value = _command(place, command, value)
    if value is None:
        raise place.error("an empty action")
    return value


def _between(place: _Place, words: list[str], mark: str) -> Iterator[list[str]]:
    depth, command = 0, list[str]()
    for word in words:
        depth += {"(": 1, ")": -1}.get(word, 0)
        if word == mark and depth == 0:
            yield command
            command = []
        else:
            command.append(word)
    if depth:
        raise place.error("parentheses do not match")
    yield command


def _command(place: _Place, words: list[str], piped: Evaluate | None) -> Evaluate:
    if not words:
        raise place.error("nothing before or after a |")
    operands = [] if piped is None else [piped]
    if words[0] in _FUNCTIONS or words[0] == "include":
        arguments = [*_operands(place, words[1:]), *operands]
        return _call(place, words[0], arguments)
    found = [*_operands(place, words), *operands]
    if len(found) != 1:
        raise place.error(f"{words[0]} is not a function of this renderer")
    return found[0]


def _call(place: _Place, name: str, arguments: list[Evaluate]) -> Evaluate:
    def run(scope: _Scope) -> Any:
        values = [argument(scope) for argument in arguments]
        if name == "include":
            body = scope.templates.get(values[0])
            if body is None:
                raise place.error(f"no template {values[0]!r}")
            return "".join(body(_Scope(values[1], {"$": values[1]}, scope.templates)))
        try:
            return _FUNCTIONS[name](*values)
        except (TypeError, ValueError, KeyError, AttributeError) as error:
            raise place.error(f"{name}: {error}") from None

    return run


def _operands(place: _Place, words: list[str]) -> Iterator[Evaluate]:
    at = 0
    while at < len(words):
        word = words[at]
        at += 1
        if word == "(":
            depth, start = 1, at
            while depth:
                depth += {"(": 1, ")": -1}.get(words[at], 0)
                at += 1
            yield _pipeline(place, words[start : at - 1])
        elif word[0] in '"`' or word.lstrip("-").isdigit() or word in ("true", "false"):
            literal = word[1:-1] if word[0] == "`" else json.loads(word)
            yield _constant(literal)
        elif word[0] in ".$":
            yield _path(place, word)
        elif word in _FUNCTIONS:
            yield _call(place, word, [])
        else:
            raise place.error(f"{word!r} is not a value of this renderer")


def _constant(value: Any) -> Evaluate:
    return lambda scope: value


def _path(place: _Place, word: str) -> Evaluate:
    start, *keys = word.split(".")

    def run(scope: _Scope) -> Any:
        if start and start not in scope.variables:
            raise place.error(f"no variable {start}")
        found = scope.variables[start] if start else scope.dot
        for key in filter(None, keys):
            if not isinstance(found, Mapping) or key not in found:
                raise place.error(f"{word}: no {key}")
            found = found[key]
        return found

    return run


def _indent(spaces: int, text: str) -> str:
    return "\n".join(" " * spaces + line for line in text.split("\n"))


def _and(*values: Any) -> Any:
    return next((value for value in values if not value), values[-1])


def _or(*values: Any) -> Any:
    return next((value for value in values if value), values[-1])


_FUNCTIONS: dict[str, Callable[..., Any]] = {
    "and": _and,
    "b64enc": lambda text: base64.b64encode(text.encode()).decode(),
    "default": lambda fallback, value: value or fallback,
    "dict": lambda *pairs: dict(zip(pairs[::2], pairs[1::2], strict=True)),
    "eq": lambda first, *others: first in others,
    "indent": _indent,
    "int": int,
    "join": lambda between, values: between.join(map(_printed, values)),
    "list": lambda *values: list(values),
    "ne": lambda first, second: first != second,
    "nindent": lambda spaces, text: "\n" + _indent(spaces, text),
    "not": lambda value: not value,
    "omit": lambda values, *keys: {key: value for key, value in values.items() if key not in keys},
    "or": _or,
    "quote": lambda value: json.dumps(_printed(value), ensure_ascii=False),
    "toJson": lambda value: json.dumps(value, sort_keys=True, separators=(",", ":")),
    "toYaml": lambda value: yaml.safe_dump(value, sort_keys=True, default_flow_style=False, allow_unicode=True, width=1 << 20).removesuffix(
        "\n"
    ),
    "trim": str.strip,
}
