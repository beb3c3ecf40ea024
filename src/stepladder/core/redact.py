"""Secrets out of everything that is shown or kept: configuration, environment, logs, reports."""

from __future__ import annotations

import itertools
import re
from collections.abc import Mapping
from typing import Any

HIDDEN = "[redacted]"

_WORDS = {"secret", "secrets", "password", "passwd", "passphrase", "apikey", "credential", "credentials"}
_PAIRS = {("api", "key"), ("access", "key"), ("private", "key"), ("secret", "key"), ("auth", "key")}
_VALUES = re.compile(
    r"\bhf_[A-Za-z0-9]{6,}"
    r"|\bsk-[A-Za-z0-9_-]{6,}"
    r"|\bAKIA[0-9A-Z]{8,}"
    r"|\bgh[opsru]_[A-Za-z0-9]{6,}|\bgithub_pat_\w{6,}"
    r"|\bglpat-[\w-]{6,}|\bxox[abprs]-[\w-]{6,}"
    r"|\beyJ[\w-]{10,}\.[\w-]{10,}\.[\w-]{5,}"
)
_ASSIGNED = re.compile(
    r"(?i)(\b[\w-]*(?:token|secret|password|passwd|passphrase|api[_-]?key)[\"']?\s*[=:]\s*)"
    r"(\"[^\"]*\"|'[^']*'|[^\s\"',;&]+)"
)
_URL_LOGIN = re.compile(r"(://)[^/\s:@]+:[^/\s@]+@")
_BEARER = re.compile(r"(?i)(\b(?:bearer|basic)\s+)[\w.+/=~-]{8,}")


def redact(value: Any) -> Any:
    """A copy of a plain tree (mappings, lists, scalars) without secrets.

    Hidden are the values of keys that name one (``hf_token``, ``API_KEY``, ``db-password``,
    ``clientSecret``), and inside any text what looks like one: provider tokens (``hf_…``, ``sk-…``,
    ``AKIA…``, ``ghp_…``), assignments (``password=…``), logins in URLs, bearer headers. Counts stay:
    ``tokens``, ``tokenizer`` and numbers called ``token`` are no secrets.
    """
    if isinstance(value, Mapping):
        return {key: HIDDEN if _secret(str(key), entry) else redact(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        before = [None, *value]  # an argument list: what follows "--token" is one
        return [HIDDEN if _flag(flag, entry) else redact(entry) for flag, entry in zip(before, value, strict=False)]
    return _text(value) if isinstance(value, str) else value


def _flag(flag: Any, value: Any) -> bool:
    return isinstance(flag, str) and flag.startswith("-") and isinstance(value, str) and _secret(flag, value)


def _secret(key: str, value: Any) -> bool:
    if value is None or isinstance(value, bool) or value == "":
        return False
    words = re.findall(r"[a-z0-9]+", re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", key).lower())
    if _WORDS.intersection(words) or _PAIRS.intersection(itertools.pairwise(words)):
        return True
    return "token" in words and isinstance(value, str)


def _text(text: str) -> str:
    text = _VALUES.sub(HIDDEN, text)
    text = _URL_LOGIN.sub(rf"\1{HIDDEN}@", text)
    text = _BEARER.sub(rf"\1{HIDDEN}", text)
    return _ASSIGNED.sub(rf"\1{HIDDEN}", text)
