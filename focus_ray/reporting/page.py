"""Pages of one file: templates with escaping on, one style sheet, pictures as data URIs. Nothing is fetched to show them."""

from __future__ import annotations

import base64
import io
from functools import cache
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
from numpy.typing import NDArray
from PIL import Image

from focus_ray.evaluation.report import within

_TEMPLATES = Path(__file__).parent / "templates"
_JPEG_QUALITY = 82


def render(template: str, **facts: Any) -> bytes:
    """A page of `templates/`, UTF-8. Text in `facts` is escaped; what is `markupsafe.Markup`, such as a plot, is not."""
    return _environment().get_template(template).render(**facts).encode()


def jpeg_uri(picture: NDArray[np.uint8]) -> str:
    """(H, W, 3) -> a data URI."""
    buffer = io.BytesIO()
    Image.fromarray(picture).save(buffer, "JPEG", quality=_JPEG_QUALITY)
    return f"data:image/jpeg;base64,{base64.b64encode(buffer.getvalue()).decode()}"


def png_uri(data: bytes) -> str:
    """An encoded PNG -> a data URI."""
    return f"data:image/png;base64,{base64.b64encode(data).decode()}"


@cache
def _environment() -> jinja2.Environment:
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(_TEMPLATES),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(figure=_figure, short=_short, percent=_percent, within=within)
    return environment


def _figure(value: float | None) -> str:
    """A metric, as the Markdown tables show it."""
    return "-" if value is None else f"{value:.4f}"


def _short(value: Any) -> str:
    """A number to four places that count; other values as they are."""
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _percent(value: float) -> str:
    return f"{100 * value:.3g} %"
