"""A user's mistake, told in one line: which config key, what was given, what would be right.

The checks below return the value they were given, so that a constructor validates and assigns in one line. They know
only the argument's name; `config.build` puts the config group in front of it (`t` becomes `attack.t`).
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Collection, Iterable
from typing import Any


class UserError(Exception):
    """Something the user can put right. Shown as one line, without a traceback."""


class ConfigError(UserError):
    """A config value that cannot be used: `key`, what was `given`, and what it `must` be."""

    def __init__(self, key: str, given: object, must: str) -> None:
        super().__init__(key, given, must)
        self.key, self.given, self.must = key, given, must

    def under(self, group: str) -> ConfigError:
        """The same mistake, seen from one level further up in the config."""
        return ConfigError(f"{group}.{self.key}", self.given, self.must)

    def __str__(self) -> str:
        given = "null" if self.given is None else self.given
        return f"{self.key}={given}: {self.must}"


def whole(key: str, value: Any, least: int | None = None, most: int | None = None) -> int:
    """`value` if it is an integer in [least, most]."""
    ok = isinstance(value, int) and not isinstance(value, bool)
    if not ok or (least is not None and value < least) or (most is not None and value > most):
        raise ConfigError(key, value, f"must be a whole number{_span(least, most)}")
    return value


def number(key: str, value: Any, least: float | None = None, most: float | None = None, above: float | None = None) -> float:
    """`value` as a float if it is a finite number in [least, most] and greater than `above`."""
    ok = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    low = ok and ((least is not None and value < least) or (above is not None and value <= above))
    if not ok or low or (most is not None and value > most):
        span = f" above {above:g}" if above is not None else _span(least, None)
        raise ConfigError(key, value, f"must be a number{span}{_span(None, most)}")
    return float(value)


def choice(key: str, value: Any, options: Collection[str]) -> Any:
    """`value` if it is one of `options`."""
    if value not in options:
        raise ConfigError(key, value, f"must be one of {', '.join(options)}{near(value, options)}")
    return value


def flag(key: str, value: Any) -> bool:
    """`value` if it is true or false."""
    if not isinstance(value, bool):
        raise ConfigError(key, value, "must be true or false")
    return value


def near(word: object, options: Iterable[str]) -> str:
    """A hint naming the options that look like `word`, or nothing."""
    matches = difflib.get_close_matches(str(word), list(options), n=3, cutoff=0.6)
    return f"; did you mean {' or '.join(matches)}?" if matches else ""


def _span(least: float | None, most: float | None) -> str:
    if least is not None and least == most:
        return f", here {least}"
    if least is not None and most is not None:
        return f" from {least} to {most}"
    if least is not None:
        return f" of at least {least}"
    return f" of at most {most}" if most is not None else ""
