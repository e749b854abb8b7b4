"""Renders HTML pages that consist of a single file and load nothing from the network.

A page contains its style sheet, and its pictures as data URIs. The texts and plots on a page may come from a stranger. So
templates escape all text, plots are embedded as pictures, in which a browser runs no script, and the Content-Security-Policy of
every page forbids scripts and requests.
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

from focus_ray.reporting.tables import format_error_bound

_TEMPLATES = Path(__file__).parent / "templates"
_JPEG_QUALITY = 82
_PICTURE = re.compile(r"data:image/(jpeg|png|svg\+xml);base64,[A-Za-z0-9+/]*={0,2}")


def render_page(template: str, **facts: Any) -> bytes:
    """Renders a template file of the folder `templates` to UTF-8 text.

    Args: facts: variables of the template. Their text is escaped.
    """
    return _create_template_environment().get_template(template).render(**facts).encode(errors="replace")


def encode_jpeg_uri(picture: NDArray[np.uint8]) -> str:
    """Returns a picture (H, W, 3) as the data URI of a JPEG."""
    buffer = io.BytesIO()
    Image.fromarray(picture).save(buffer, "JPEG", quality=_JPEG_QUALITY)
    return encode_data_uri("jpeg", buffer.getvalue())


def encode_data_uri(kind: str, data: bytes) -> str:
    """Returns an encoded picture as a data URI. `kind` is its format, such as png."""
    return f"data:image/{kind};base64,{base64.b64encode(data).decode()}"


def encode_svg_uri(svg: str) -> str:
    """Returns an untrusted SVG element as a data URI for `<img>`, in which a browser runs no script and loads nothing.

    The element gets the SVG namespace and the colours of the page, because a picture does not inherit them.
    """
    head, end, body = svg.partition(">")
    head = head.replace("<svg", '<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink"', 1)
    content = f"{head}{end}<style>{_read_colours()} text {{ font-family: system-ui, sans-serif; }}</style>{body}"
    return encode_data_uri("svg+xml", content.encode(errors="replace"))


@cache
def _read_colours() -> str:
    """Returns the style sheet with the colours of pages and plots."""
    return (_TEMPLATES / "colours.css").read_text(encoding="utf-8")


def _replace_unsafe_picture_uri(uri: Any) -> str:
    """Returns `uri` if it is the data URI of a JPEG, PNG or SVG in base64, otherwise the empty data URI 'data:,'.

    So a picture of the page never makes a browser load anything from the network.
    """
    return uri if isinstance(uri, str) and _PICTURE.fullmatch(uri) else "data:,"


@cache
def _create_template_environment() -> jinja2.Environment:
    """Returns the jinja2 environment of the templates, which escapes text and raises an error for undefined names."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(_TEMPLATES),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(
        figure=_format_metric, short=_format_number, percent=_format_percentage, within=format_error_bound
    )
    environment.filters.update(picture=_replace_unsafe_picture_uri, encode_svg_uri=encode_svg_uri)
    return environment


def _format_metric(value: float | None) -> str:
    """Returns a metric with four decimals, as in the Markdown tables; '-' for None."""
    return "-" if value is None else f"{value:.4f}"


def _format_number(value: Any) -> str:
    """Returns a float with four significant digits, and any other value as text."""
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _format_percentage(value: float) -> str:
    """Returns a share as a percentage, such as '1 %' for 0.01."""
    return f"{100 * value:.3g} %"
