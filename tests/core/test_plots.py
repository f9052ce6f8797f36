from __future__ import annotations

import itertools
import re
import subprocess
import sys

import numpy as np
import pytest

from core.errors import InvalidInput
from core.plots import COLORS, figure, safe_svg, to_svg


def line_plot(slope: float = 1.0):
    fig, ax = figure()
    ax.plot([0, 1, 2], [0, slope, 2 * slope], label="loss & <others>")
    ax.fill_between([0, 1], [0, 1], hatch="//")
    ax.set_xlabel("iteration")
    ax.legend()
    return fig


def test_text_stays_text_and_takes_the_colour_and_font_of_the_page():
    svg = to_svg(line_plot())
    assert re.search(r"<text [^>]*>iteration</text>", svg)
    assert "loss &amp; &lt;others&gt;" in svg
    assert "#000000" not in svg
    assert "currentColor" in svg
    assert "font-family" not in svg
    assert "<style" not in svg  # a style sheet of one figure would hold for the whole page
    assert "DOCTYPE" not in svg
    assert "#ffffff" not in svg  # no white box behind the plot or the legend


def test_the_same_figure_gives_the_same_svg_and_another_shares_no_id():
    assert to_svg(line_plot()) == to_svg(line_plot())
    ids = [re.findall(r' id="([^"]+)"', to_svg(line_plot(slope))) for slope in (1.0, 2.0)]
    assert len(set(ids[0])) == len(ids[0]) > 5
    assert not set(ids[0]) & set(ids[1])


def test_every_reference_inside_a_figure_still_finds_its_target():
    svg = safe_svg(to_svg(line_plot()), prefix="claim-8-")
    ids = set(re.findall(r' id="([^"]+)"', svg))
    references = set(re.findall(r'href="#([^"]+)"', svg)) | set(re.findall(r"url\(#([^)]+)\)", svg))
    assert references
    assert references <= ids


def test_a_heat_map_keeps_its_picture():
    fig, axes = figure(6.4, 3.0, 1, 2)
    axes[0].imshow(np.eye(4))
    assert 'href="data:image/png;base64,' in to_svg(fig)


def test_matplotlib_is_imported_by_the_first_figure_and_pyplot_never():
    code = (
        "import sys, core.plots; assert 'matplotlib' not in sys.modules;"
        "core.plots.to_svg(core.plots.figure()[0]); assert 'matplotlib.pyplot' not in sys.modules"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def luminance(color: str) -> float:
    channels = np.array([int(color[i : i + 2], 16) for i in (1, 3, 5)]) / 255
    linear = np.where(channels <= 0.04045, channels / 12.92, ((channels + 0.055) / 1.055) ** 2.4)
    return float(linear @ [0.2126, 0.7152, 0.0722])


def contrast(one: str, other: str) -> float:
    dark, light = sorted((luminance(one), luminance(other)))
    return (light + 0.05) / (dark + 0.05)


@pytest.mark.parametrize("page", ["#ffffff", "#1d2024"])
def test_series_colours_stand_out_on_light_and_dark(page):
    assert min(contrast(color, page) for color in COLORS) >= 3


# Full protanopia and deuteranopia in linear RGB (Machado, Oliveira and Fernandes 2009, table 1, severity 1).
PROTAN = np.array([[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]])
DEUTAN = np.array([[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.011820, 0.042940, 0.968881]])


def lab(color: str, vision: np.ndarray) -> np.ndarray:
    channels = np.array([int(color[i : i + 2], 16) for i in (1, 3, 5)]) / 255
    linear = np.where(channels <= 0.04045, channels / 12.92, ((channels + 0.055) / 1.055) ** 2.4)
    seen = np.clip(vision @ linear, 0, 1)
    to_xyz = np.array([[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]])
    x, y, z = np.cbrt(to_xyz @ seen / [0.9505, 1.0, 1.089])
    return np.array([116 * y - 16, 500 * (x - y), 200 * (y - z)])


@pytest.mark.parametrize("vision", [np.eye(3), PROTAN, DEUTAN], ids=["all cones", "protanopia", "deuteranopia"])
def test_the_first_four_series_colours_are_told_apart_by_every_eye(vision):
    distances = {
        (one, other): np.linalg.norm(lab(one, vision) - lab(other, vision))
        for one, other in itertools.combinations(COLORS[:4], 2)
    }
    assert min(distances.values()) >= 12, distances


SVG = '<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" viewBox="0 0 9 9">{}</svg>'


@pytest.mark.parametrize(
    "attack",
    [
        "<script>alert(1)</script>",
        '<rect width="1" onload="alert(1)" onclick="alert(1)"/>',
        '<a href="javascript:alert(1)"><text>x</text></a>',
        '<use xlink:href="https://evil.example/x.svg#a"/>',
        '<image href="https://evil.example/x.png"/>',
        '<image href="data:image/svg+xml;base64,PHN2Zz4="/>',
        '<foreignObject><body xmlns="http://www.w3.org/1999/xhtml"><iframe src="https://evil.example"/></body></foreignObject>',
        "<style>@import url(https://evil.example/x.css); * { fill: red }</style>",
        '<rect style="fill: url(https://evil.example/x)"/>',
        '<rect fill="url(https://evil.example/x)"/>',
        '<rect style="position: fixed; inset: 0"/>',
        r'<rect style="fill: u\72l(//evil.example)"/>',
        '<set attributeName="href" to="javascript:alert(1)"/>',
        "<!-- evil --><?evil x?>",
    ],
)
def test_an_attack_leaves_no_trace(attack):
    svg = safe_svg(SVG.format(attack + '<circle r="2"/>'))
    assert '<circle r="2" />' in svg
    for trace in (
        "script",
        "alert",
        "evil",
        "onload",
        "onclick",
        "<style",
        "position",
        "foreignObject",
        "<a",
        "<set",
        "svg+xml",
    ):
        assert trace not in svg


@pytest.mark.parametrize(
    "text",
    [
        "",
        "no markup at all",
        "<svg><g></svg>",
        "<html><svg/></html>",
        '<!DOCTYPE svg [<!ENTITY a "aaaaaaaa"><!ENTITY b "&a;&a;">]><svg>&b;</svg>',
        "<svg>" + "<g>" * 100 + "</g>" * 100 + "</svg>",
        "<svg>\0</svg>",
    ],
)
def test_what_is_not_one_plain_svg_is_refused(text):
    with pytest.raises(InvalidInput):
        safe_svg(text)
