"""Pages of one file: templates with escaping on, one style sheet, pictures as data URIs. Nothing is fetched to show them.

Pages are made of records that others may have written: names, reasons, plots. So no text of a record becomes markup, plots are
pictures (a browser runs no script in a picture), and each page forbids scripts and requests by its Content-Security-Policy.
"""

from __future__ import annotations

import base64
import io
import re
from functools import cache
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
from numpy.typing import NDArray
from PIL import Image

from focus_ray.evaluation.report import format_bound

_TEMPLATES = Path(__file__).parent / "templates"
_JPEG_QUALITY = 82
_PICTURE = re.compile(r"data:image/(jpeg|png|svg\+xml);base64,[A-Za-z0-9+/]*={0,2}")


def render(template: str, **facts: Any) -> bytes:
    """A page of `templates/`, UTF-8. All text in `facts` is escaped."""
    return _environment().get_template(template).render(**facts).encode(errors="replace")


def jpeg_uri(picture: NDArray[np.uint8]) -> str:
    """(H, W, 3) -> a data URI."""
    buffer = io.BytesIO()
    Image.fromarray(picture).save(buffer, "JPEG", quality=_JPEG_QUALITY)
    return f"data:image/jpeg;base64,{base64.b64encode(buffer.getvalue()).decode()}"


def png_uri(data: bytes) -> str:
    """An encoded PNG -> a data URI."""
    return f"data:image/png;base64,{base64.b64encode(data).decode()}"


def svg_uri(svg: str) -> str:
    """An SVG element, of any origin -> a data URI for `<img>`, in which a browser runs no script and fetches nothing.

    The element gets the namespace and the colours of the page, which a picture does not inherit.
    """
    head, end, rest = svg.partition(">")
    head = head.replace("<svg", '<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink"', 1)
    content = f"{head}{end}<style>{_colours()} text {{ font-family: system-ui, sans-serif; }}</style>{rest}"
    return f"data:image/svg+xml;base64,{base64.b64encode(content.encode(errors='replace')).decode()}"


@cache
def _colours() -> str:
    return (_TEMPLATES / "colours.css").read_text(encoding="utf-8")


def _picture(uri: Any) -> str:
    """The data URI of a picture; nothing in place of any other address, which would be fetched."""
    return uri if isinstance(uri, str) and _PICTURE.fullmatch(uri) else "data:,"


@cache
def _environment() -> jinja2.Environment:
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(_TEMPLATES),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(figure=_figure, short=_short, percent=_percent, within=format_bound)
    environment.filters.update(picture=_picture, svg_uri=svg_uri)
    return environment


def _figure(value: float | None) -> str:
    """A metric, as the Markdown tables show it."""
    return "-" if value is None else f"{value:.4f}"


def _short(value: Any) -> str:
    """A number to four places that count; other values as they are."""
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _percent(value: float) -> str:
    return f"{100 * value:.3g} %"
