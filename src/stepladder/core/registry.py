"""Names to things: with suggestions for a wrong name, aliases, and entries that load only when asked for."""

from __future__ import annotations

import difflib
import importlib
from collections.abc import Iterable
from typing import Generic, TypeVar

from stepladder.core.errors import UserError

T = TypeVar("T")


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """`` — did you mean 'x'?`` or an empty string: the tail of every sentence about a wrong name."""
    close = difflib.get_close_matches(str(name), list(known), n=1, cutoff=0.5)
    return f" — did you mean '{close[0]}'?" if close else ""


class Registry(Generic[T]):
    """A table of named things of one sort; ``noun`` is how errors call the sort ("architecture", "task")."""

    def __init__(self, noun: str) -> None:
        self.noun = noun
        self._entries: dict[str, T] = {}
        self._aliases: dict[str, str] = {}
        self._lazy: dict[str, tuple[str, str]] = {}

    def add(self, name: str, thing: T, aliases: Iterable[str] = ()) -> T:
        """Register ``thing``; a name taken by something else is an error."""
        for label in (name, *aliases):
            owner = self._entries.get(self._aliases.get(label, label))
            if owner is not None and owner is not thing:
                raise UserError(f"{self.noun} '{label}' is already taken; give yours another name")
        self._entries[name] = thing
        self._aliases.update(dict.fromkeys(aliases, name))
        return thing

    def lazy(self, name: str, target: str, extra: str) -> None:
        """Register ``"module:attribute"``, imported on first use; ``extra`` is the pip extra that brings it."""
        self._lazy[name] = (target, extra)

    def name(self, name: str) -> str:
        """The canonical name behind a name or an alias; a wrong one raises UserError with the nearest known."""
        name = self._aliases.get(name, name)
        if name not in self._entries and name not in self._lazy:
            hint = did_you_mean(name, {**self._entries, **self._aliases, **self._lazy})
            hint = hint or f"; known: {', '.join(self.names())}"
            raise UserError(f"unknown {self.noun} '{name}'{hint}")
        return name

    def get(self, name: str) -> T:
        """The thing called ``name`` (or an alias of it)."""
        name = self.name(name)
        if name not in self._entries:
            target, extra = self._lazy[name]
            module, attribute = target.split(":")
            try:
                self._entries[name] = getattr(importlib.import_module(module), attribute)
            except ImportError as error:
                raise UserError(
                    f"{self.noun} '{name}' needs '{error.name}': pip install 'stepladder[{extra}]'"
                ) from error
        return self._entries[name]

    def names(self) -> list[str]:
        """All canonical names, sorted."""
        return sorted({*self._entries, *self._lazy})
