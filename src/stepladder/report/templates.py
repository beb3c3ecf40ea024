"""The pages' templates, beside this file: an unknown name in one is an error, and everything is escaped."""

from __future__ import annotations

import jinja2


def environment() -> jinja2.Environment:
    """Where templates are found and how they are filled in."""
    return jinja2.Environment(
        loader=jinja2.PackageLoader("stepladder", "report"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
