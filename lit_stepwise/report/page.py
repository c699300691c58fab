"""Puts a report together: one file that asks for nothing, runs only its own script, and takes all data as text."""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Mapping, Sequence
from importlib.resources import files
from typing import Any


def render(title: str, runs: Sequence[Mapping[str, Any]], data: Mapping[str, Any]) -> bytes:
    """The HTML file.

    Args:
        title: of the page.
        runs: what the head says of each.
        data: what the script draws; JSON.
    """
    from jinja2 import Environment
    from markupsafe import Markup

    room = files("lit_stepwise.report")
    style, *scripts = (_text(room.joinpath(name)) for name in ("page.css", "charts.js", "page.js"))
    script = "\n".join(scripts)
    policy = (
        f"default-src 'none'; script-src {_hash(script)}; style-src {_hash(style)}; img-src data:; "
        "base-uri 'none'; form-action 'none'"
    )
    template = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True).from_string(
        _text(room.joinpath("page.html"))
    )
    page = template.render(
        title=title,
        runs=runs,
        policy=policy,
        style=Markup(style),
        script=Markup(script),
        data=Markup(as_json(data)),
    )
    # a lone surrogate, as the name of a file may hold one, is written as the escape that JSON has for it
    return page.encode("utf-8", "backslashreplace")


def as_json(data: Any) -> str:
    """JSON that may stand inside a script element whatever is in it: no tag and no comment can begin or end there.

    U+2028 and U+2029 end a line where JavaScript before 2019 reads them.
    """
    text = json.dumps(data, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    for sign in "<>&\u2028\u2029":
        text = text.replace(sign, f"\\u{ord(sign):04x}")
    return text


def _text(file: Any) -> str:
    return str(file.read_text(encoding="utf-8")).strip()


def _hash(text: str) -> str:
    """As a Content-Security-Policy names what may run."""
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"
