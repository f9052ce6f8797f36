"""Figures in the house style, and SVG that may stand in a page.

`figure` gives matplotlib axes without pyplot's global state; `to_svg` turns a figure into SVG whose text and axes take
the colour of the page around them; `safe_svg` reduces an SVG of unknown origin to shapes and text. Matplotlib is slow to
import and is imported when the first figure is made.
"""

from __future__ import annotations

import hashlib
import io
import re
from functools import lru_cache
from typing import TYPE_CHECKING, Any
from xml.etree import ElementTree

from core.errors import InvalidInput

if TYPE_CHECKING:
    from matplotlib.figure import Figure

COLORS = ("#2b7bba", "#cf5c1c", "#158a68", "#b05c99", "#97780f", "#747b84")
"""Series colours: at least 3 : 1 against a white and a near-black page, told apart by the common kinds of colour blindness."""

_NAMESPACE = "http://www.w3.org/2000/svg"
_MAX_DEPTH = 60

# fmt: off
_ELEMENTS = frozenset({
    "svg", "g", "defs", "path", "use", "clipPath", "rect", "line", "polyline", "polygon", "circle", "ellipse",
    "text", "tspan", "title", "desc", "marker", "pattern", "image", "linearGradient", "radialGradient", "stop",
})
_PROPERTIES = frozenset({
    "clip-path", "clip-rule", "color", "fill", "fill-opacity", "fill-rule", "font", "font-size", "font-style",
    "font-weight", "marker", "marker-end", "marker-mid", "marker-start", "opacity", "stop-color", "stop-opacity",
    "stroke", "stroke-dasharray", "stroke-dashoffset", "stroke-linecap", "stroke-linejoin", "stroke-miterlimit",
    "stroke-opacity", "stroke-width", "text-anchor", "dominant-baseline", "white-space", "image-rendering",
})
_ATTRIBUTES = _PROPERTIES | frozenset({
    "id", "viewBox", "width", "height", "x", "y", "x1", "y1", "x2", "y2", "cx", "cy", "r", "rx", "ry", "fx", "fy",
    "dx", "dy", "d", "points", "transform", "offset", "gradientUnits", "gradientTransform", "spreadMethod",
    "clipPathUnits", "markerWidth", "markerHeight", "markerUnits", "refX", "refY", "orient", "patternUnits",
    "patternContentUnits", "patternTransform", "preserveAspectRatio", "role", "aria-label",
})
# fmt: on
_HARMLESS = re.compile(r"[\w\s#.,%()'\"+-]*")
_REFERENCE = re.compile(r"url\(\s*(['\"]?)#([\w.-]+)\1\s*\)")


def figure(width: float = 6.4, height: float = 3.6, nrows: int = 1, ncols: int = 1) -> tuple[Figure, Any]:
    """A matplotlib figure (inches) and its axes, or array of axes, as `pyplot.subplots` would give them.

    Leave text and axes black: `to_svg` gives them the colour of the page.
    """
    from cycler import cycler
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    made = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasSVG(made)
    axes = made.subplots(nrows, ncols)
    for ax in made.axes:
        ax.set_prop_cycle(cycler(color=COLORS))
        ax.spines[["top", "right"]].set_visible(False)
        ax.set_axisbelow(True)
        ax.grid(axis="y", color="black", alpha=0.12, linewidth=0.8)
        ax.tick_params(length=3, labelsize=9)
    return made, axes


def to_svg(figure: Figure) -> str:
    """SVG of a figure, the same for the same figure, with text as text and ids that no other figure has.

    Black becomes `currentColor`, backgrounds become transparent, and the font is that of the page.
    """
    import matplotlib as mpl

    for ax in figure.axes:
        legend = ax.get_legend()
        if legend is not None:
            legend.set_frame_on(False)
    buffer = io.StringIO()
    with mpl.rc_context({"svg.fonttype": "none", "svg.hashsalt": "tenfold"}):
        figure.savefig(
            buffer, format="svg", transparent=True, metadata=dict.fromkeys(("Date", "Creator", "Format", "Type"))
        )
    text = re.sub(r"^.*?(?=<svg)", "", buffer.getvalue(), flags=re.DOTALL)
    return safe_svg(text, prefix=f"f{hashlib.sha256(text.encode()).hexdigest()[:10]}-")


@lru_cache(maxsize=512)
def safe_svg(text: str, prefix: str = "") -> str:
    """The shapes and text of an SVG, safe to put into a page: no script, handler, style sheet, link or outside resource.

    Every id gets `prefix`, so that it can clash with nothing else in the page. Raises `InvalidInput` when `text` is not
    one well-formed SVG.
    """
    # Entities are the one way in which a small XML text grows without bound; an SVG of ours has no document type.
    if re.search(r"<!\s*(DOCTYPE|ENTITY)", text, re.IGNORECASE):
        raise InvalidInput("An SVG in a page may not declare a document type or entities.")
    try:
        root = ElementTree.fromstring(text)  # noqa: S314  (no entities, see above; depth is limited below)
    except (ElementTree.ParseError, ValueError) as error:
        raise InvalidInput(f"This is not an SVG: {error}") from error
    if _local(root.tag) != "svg":
        raise InvalidInput(f"An SVG starts with <svg>, this starts with <{_local(root.tag)}>.")
    clean = _cleaned(root, prefix, 0)
    _size_in_pixels(clean)
    # What matplotlib says in a style sheet, which in a page would hold for every other SVG too.
    clean.attrib = {
        "xmlns": _NAMESPACE,
        "fill": "currentColor",
        "stroke-linejoin": "round",
        "stroke-linecap": "butt",
        **clean.attrib,
    }
    return ElementTree.tostring(clean, encoding="unicode")


def _cleaned(element: ElementTree.Element, prefix: str, depth: int) -> ElementTree.Element:
    if depth > _MAX_DEPTH:
        raise InvalidInput(f"This SVG is nested more than {_MAX_DEPTH} levels deep.")
    name = _local(element.tag)
    clean = ElementTree.Element(name)
    clean.text, clean.tail = element.text, element.tail
    for key, value in element.attrib.items():
        key = _local(key)
        if key == "id":
            clean.set("id", prefix + value)
        elif key == "style":
            style = _clean_style(value, prefix)
            if style:
                clean.set("style", style)
        elif key == "href":
            if value.startswith("#"):
                clean.set("href", f"#{prefix}{value[1:]}")
            elif name == "image" and value.startswith("data:image/png;base64,"):
                clean.set("href", value)
        elif key in _ATTRIBUTES:
            safe = _clean_value(value, prefix)
            if safe is not None:
                clean.set(key, safe)
    for child in element:
        if isinstance(child.tag, str) and _local(child.tag) in _ELEMENTS:
            clean.append(_cleaned(child, prefix, depth + 1))
    return clean


def _clean_style(style: str, prefix: str) -> str:
    kept = []
    for declaration in style.split(";"):
        name, _, value = (part.strip() for part in declaration.partition(":"))
        safe = _clean_value(value, prefix) if name in _PROPERTIES else None
        if safe is not None:
            kept.append(f"{name}: {safe}")
    return "; ".join(kept)


def _clean_value(value: str, prefix: str) -> str | None:
    """The value with its references renamed and black as the page's colour; None when it reaches outside the figure."""
    if not _HARMLESS.fullmatch(value):
        return None
    if "url" in value.lower():
        inside = _REFERENCE.fullmatch(value)
        return f"url(#{prefix}{inside[2]})" if inside else None
    return "currentColor" if value.strip().lower() in ("#000000", "#000", "black") else value


def _size_in_pixels(root: ElementTree.Element) -> None:
    """Matplotlib writes points; a bare number lets style sheets shrink the figure in proportion."""
    points = re.fullmatch(r"([\d.]+)pt", root.get("width", ""))
    root.attrib.pop("height", None)
    if points:
        root.set("width", f"{float(points[1]) * 4 / 3:.0f}")


def _local(name: object) -> str:
    """The name without its namespace; empty for comments and processing instructions."""
    return name.rpartition("}")[2] if isinstance(name, str) else ""
