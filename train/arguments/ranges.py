"""Whether the values of options are of the types and in the ranges that a dataclass annotates."""

from __future__ import annotations

import dataclasses
import math
import operator
import re
from collections import Counter
from collections.abc import Iterator
from functools import cache
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

from rcl_fast.train.errors import refuse_each
from rcl_fast.train.options import Range, Words

LONGEST = 60  # characters of a value that a message shows


def check(options: Any) -> None:
    """Raises UserError with a line for each option whose value is not of its type or not in its range."""
    refuse_each(violations(options))


def violations(options: Any) -> list[str]:
    """Returns a sentence for each option of a dataclass, or of its sections, that its annotation doesn't allow."""
    allowed = hints(options.__class__)
    return [
        f"{flag(name)} {words}, got {shown(value)}"
        for name, value in _values(options)
        if (words := broken(allowed[name], value))
    ]


@cache
def hints(kind: Any) -> dict[str, Any]:
    """Returns the annotation of every option of a dataclass and of its sections, by the option's name."""
    found: dict[str, Any] = {}
    for name, hint in get_type_hints(kind, include_extras=True).items():
        is_section = dataclasses.is_dataclass(hint)
        found |= hints(hint) if is_section else {name: hint}
    return found


def flag(name: str) -> str:
    """Returns how the command line spells an option."""
    return f"--{name.replace('_', '-')}"


def shown(value: Any) -> str:
    """Returns a value for a message, several as the command line has them, cut where it is long."""
    if isinstance(value, tuple):
        value = " ".join(map(shown, value)) or "none"
    text = value if isinstance(value, str) and value else repr(value)
    return text if len(text) <= LONGEST else f"{text[:LONGEST]}..."


def phrase(hint: Any) -> str:
    """Returns what values of an annotation must be, to follow "must": "be a number, at least 0, at most 1"."""
    bare, marks = unwrapped(hint)
    if _is_union(bare):
        return phrase(_without_none(bare))
    if get_origin(bare) is not tuple:
        return ", ".join([f"be {_noun(hint)}", *(end for end, _ in _ends(marks, 0))])
    parts = get_args(bare)
    if parts[-1] is ...:
        return f"be values, each {phrase(parts[0]).removeprefix('be ')}"
    nouns = Counter(phrase(part).removeprefix("be ") for part in parts)
    return f"be {len(parts)} values: {', '.join(f'{noun} ({n} times)' if n > 1 else noun for noun, n in nouns.items())}"


def unwrapped(hint: Any) -> tuple[Any, list[Any]]:
    """Returns an annotation without its marks, and the marks."""
    if get_origin(hint) is not Annotated:
        return hint, []
    bare, *marks = get_args(hint)
    return bare, marks


def single(hint: Any) -> tuple[Any, bool]:
    """Returns the type of each value of an option without its marks, and whether None is one, too."""
    bare, _ = unwrapped(hint)
    if _is_union(bare):
        return single(_without_none(bare))[0], True
    return (single(get_args(bare)[0])[0], False) if get_origin(bare) is tuple else (bare, False)


def count(hint: Any) -> int | None:
    """Returns how many values an option takes; None: any number."""
    bare, _ = unwrapped(hint)
    if _is_union(bare):
        return count(_without_none(bare))
    if get_origin(bare) is not tuple:
        return 1
    parts = get_args(bare)
    return None if parts[-1] is ... else len(parts)


def choices(hint: Any) -> tuple[str, ...]:
    """Returns the words that the values of an option are chosen from; none where they are not."""
    bare, marks = unwrapped(hint)
    if _is_union(bare):
        return choices(_without_none(bare))
    named = [word for mark in marks if isinstance(mark, Words) for word in mark.words]
    return get_args(bare) if get_origin(bare) is Literal else tuple(named)


def _values(options: Any) -> Iterator[tuple[str, Any]]:
    for field in dataclasses.fields(options):
        value = getattr(options, field.name)
        yield from _values(value) if dataclasses.is_dataclass(value) else [(field.name, value)]


def broken(hint: Any, value: Any) -> str | None:
    """Returns what a value must be and is not, to follow the option; None for a value that the annotation allows."""
    bare, marks = unwrapped(hint)
    if _is_union(bare):
        return None if value is None else broken(_without_none(bare), value)
    if get_origin(bare) is tuple:
        return _broken_tuple(hint, value)
    if not (value in get_args(bare) if get_origin(bare) is Literal else _is_of(bare, value) and _fits(marks, value)):
        return f"must {phrase(hint)}"
    if bare is float and not _is_finite(value):
        return "must be a finite number"
    return next((f"must be {end}" for end, holds in _ends(marks, value) if not holds), None)


def _broken_tuple(hint: Any, value: Any) -> str | None:
    bare, marks = unwrapped(hint)
    parts = get_args(bare)
    if parts[-1] is ... and isinstance(value, tuple):
        words = [f"must have values, {end}" for end, holds in _ends(marks, len(value)) if not holds]
        words += [word.replace("must", "must each", 1) for one in value if (word := broken(parts[0], one))]
        return next(iter(words), None)
    if not isinstance(value, tuple) or len(value) != len(parts):
        return f"must {phrase(hint)}"
    placed = enumerate(map(broken, parts, value), start=1)
    return next((f"value {place} {word}" for place, word in placed if word), None)


def _is_of(kind: type, value: Any) -> bool:
    """Returns whether a value is of a type; a whole number is a number, too, and truth values are neither."""
    kinds = (int, float) if kind is float else (kind,)
    return isinstance(value, kinds) and (kind is bool or not isinstance(value, bool))


def _fits(marks: list[Any], value: Any) -> bool:
    patterns = [mark for mark in marks if isinstance(mark, Words)]
    return all(value in mark.words or re.fullmatch(mark.pattern, value) for mark in patterns)


def _is_finite(value: float) -> bool:
    try:
        return math.isfinite(value)
    except OverflowError:  # a whole number beyond any float
        return False


_HOLDS = {"above": operator.gt, "at_least": operator.ge, "below": operator.lt, "at_most": operator.le}


def _ends(marks: list[Any], value: Any) -> Iterator[tuple[str, bool]]:
    """Gives each end of the ranges in words, and whether the value is on its right side."""
    for mark in marks:
        if isinstance(mark, Range):
            for name, end in mark._asdict().items():
                if end is not None:
                    yield f"{name.replace('_', ' ')} {_number(end)}", _HOLDS[name](value, end)


def _is_union(hint: Any) -> bool:
    return get_origin(hint) in (Union, UnionType)


def _without_none(union: Any) -> Any:
    """Returns the annotation that is optional in a union with None."""
    return next(part for part in get_args(union) if part is not NoneType)


_NOUNS = {"int": "a whole number", "float": "a number", "bool": "true or false", "str": "text", "Path": "a path"}


def _noun(hint: Any) -> str:
    bare, marks = unwrapped(hint)
    words = ", ".join(choices(hint))
    if get_origin(bare) is Literal:
        return f"one of {words}"
    return next(
        (f"{words}, or like {mark.example}" for mark in marks if isinstance(mark, Words)), _NOUNS[bare.__name__]
    )


def _number(value: Any) -> str:
    return f"{int(value):,}" if value == int(value) and abs(value) < 2**63 else f"{value:g}"
