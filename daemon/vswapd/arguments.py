"""What a CONTROL request carries: taken out one by one, and checked.

This module must not know verbs, or what is done with the values.
"""

from __future__ import annotations

import json
from typing import Any, Final

from vswapd.errors import ArgumentError
from vswapd.sizes import UnitError, parse_size

_MOST_TEXT: Final = 4096
"""PATH_MAX; no argument of any verb is longer."""


class Arguments:
    """The values of one request. Every method raises ArgumentError for what makes no sense."""

    def __init__(self, given: dict[str, Any]) -> None:
        self._left = dict(given)

    def __contains__(self, name: str) -> bool:
        return self._left.get(name) is not None

    def text(self, name: str) -> str:
        """Text that must be there."""
        value = self._take(name)
        if not isinstance(value, str) or len(value) > _MOST_TEXT:
            raise ArgumentError(f"{name}: write text, of {_MOST_TEXT} characters at most")
        return value

    def path(self, name: str) -> str:
        """An absolute path: the daemon's working directory is not the caller's."""
        value = self.text(name)
        if not value.startswith("/") or "\0" in value:
            raise ArgumentError(f"{name}: {value!r} is no absolute path: the daemon runs elsewhere")
        if not value.isascii() and value.encode(errors="ignore").decode() != value:
            raise ArgumentError(f"{name}: {value!a} is no UTF-8 text: nothing can show it")
        return value

    def size(self, name: str, *, least: int) -> int:
        """Bytes, as a number or as a size such as 512M."""
        value = self._take(name)
        if isinstance(value, bool) or not isinstance(value, int | str):
            raise ArgumentError(f"{name}: write bytes, or a size such as 512M")
        try:
            size = parse_size(value)
        except UnitError as error:
            raise ArgumentError(f"{name}: {error}") from None
        if size < least:
            raise ArgumentError(f"{name}: {size} is too little: write {least} or more")
        return size

    def number(self, name: str, default: int, *, most: int) -> int:
        """A whole number, 0 to `most`; null is as if it were not there."""
        value = self._left.pop(name, None)
        if value is None:
            return default
        if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value <= most:
            raise ArgumentError(f"{name}: {_shown(value)}: write a whole number, 0 to {most}")
        return value

    def flag(self, name: str, *, default: bool) -> bool:
        """True or false; null is as if it were not there."""
        value = self._left.pop(name, None)
        if value is None:
            return default
        if not isinstance(value, bool):
            raise ArgumentError(f"{name}: {_shown(value)}: write true or false")
        return value

    def end(self) -> None:
        """Nothing may be left, but for what is null."""
        for name, value in self._left.items():
            if value is not None:
                raise ArgumentError(f"{name!r} is no argument of this verb")

    def _take(self, name: str) -> Any:
        if name not in self:
            raise ArgumentError(f"{name} is missing")
        return self._left.pop(name)


def _shown(value: Any) -> str:
    """A value as it was written."""
    return json.dumps(value, ensure_ascii=False)
