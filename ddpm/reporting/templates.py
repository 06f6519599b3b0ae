"""Renders the templates of this folder."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


def render(template: str, **content: Any) -> str:
    """Renders a template of this folder. HTML templates escape the content, so the content cannot add markup."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=".html." in template,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters["number"] = lambda value: f"{value:.3g}"
    environment.filters["count"] = lambda value: f"{value:,}"
    environment.filters["plain"] = lambda value: value if isinstance(value, str) else json.dumps(value)
    return environment.get_template(template).render(**content)
