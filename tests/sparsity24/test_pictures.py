"""The path of a group: every number in the picture against the brute-force solver, and the committed file against the code."""

from __future__ import annotations

import re
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
import torch

import sparsity24
from core.errors import InvalidInput
from sparsity24.pictures import GROUP, GroupPath, group_path, main, path_svg
from sparsity24.prox import prox24
from sparsity24.reference_solvers import prox24_brute_force, prox_objective

COMMITTED = Path(sparsity24.__path__[0]) / "path.svg"


@pytest.fixture(scope="module")
def path() -> GroupPath:
    return group_path()


def test_every_point_of_the_path_is_the_global_minimum(path: GroupPath) -> None:
    some = slice(0, None, 14)
    lams = torch.from_numpy(path.lams[some])
    z = torch.tensor([GROUP], dtype=torch.float64).expand(len(lams), 4).contiguous()
    w = torch.from_numpy(path.magnitudes[some]).copysign(z)
    ours = prox_objective(w, z, lams[:, None]).squeeze(1)
    torch.testing.assert_close(ours, prox24_brute_force(z, lams), rtol=0, atol=1e-12)


def test_the_support_falls_from_four_to_three_to_two_at_the_jumps(path: GroupPath) -> None:
    assert list(dict.fromkeys(path.supports.tolist())) == [4, 3, 2]
    assert len(path.jumps) == 2
    for jump, before, after in zip(path.jumps, (4, 3), (3, 2), strict=True):
        z = torch.tensor([GROUP], dtype=torch.float64)
        assert int((prox24(z, jump - 1e-6) != 0).sum()) == before
        assert int((prox24(z, jump + 1e-6) != 0).sum()) == after


def test_at_a_jump_the_objectives_of_two_supports_cross(path: GroupPath) -> None:
    for jump, before, after in zip(path.jumps, (4, 3), (3, 2), strict=True):
        difference = path.objectives[before] - path.objectives[after]
        crossing = np.flatnonzero(path.lams < jump)[-1]
        assert difference[crossing] < 0
        assert not difference[crossing + 1] < 0


def test_the_drawn_solution_has_the_lowest_objective(path: GroupPath) -> None:
    values = np.stack([path.objectives[support] for support in (2, 3, 4)])
    np.testing.assert_array_equal(np.nanargmin(values, axis=0) + 2, path.supports)


def _drawn(svg: str) -> tuple[list[str], list[float]]:
    """The words of a picture, and the numbers of its curves; ids are left out, since they hash the last digits."""
    root = ElementTree.fromstring(svg)  # noqa: S314
    words = [element.text or "" for element in root.iter() if element.tag.endswith("text")]
    curves = " ".join(element.get("d", "") for element in root.iter() if element.tag.endswith("path"))
    return words, [float(number) for number in re.findall(r"-?\d+(?:\.\d+)?", curves)]


def test_the_committed_picture_is_what_the_code_draws() -> None:
    words, numbers = _drawn(path_svg())
    committed_words, committed_numbers = _drawn(COMMITTED.read_text())
    assert committed_words == words
    np.testing.assert_allclose(committed_numbers, numbers, atol=0.01)
    assert len(numbers) > 500


def test_the_picture_has_fixed_colours_and_loads_nothing() -> None:
    svg = COMMITTED.read_text()
    assert "currentColor" not in svg
    assert "<script" not in svg
    assert not re.search(r"url\((?!#)|href=\"(?!#)", svg)


def test_text_stands_out_on_a_white_and_a_near_black_page() -> None:
    def luminance(color: str) -> float:
        parts = [int(color[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    svg = path_svg()
    for element in ElementTree.fromstring(svg).iter():  # noqa: S314
        if not element.tag.endswith("text"):
            continue
        found = re.search(r"fill: (#[0-9a-f]{6})", element.get("style", ""))
        own = luminance(found[1] if found else re.search(r"fill=\"(#[0-9a-f]{6})\"", svg)[1])  # type: ignore[index]
        for page in ("#ffffff", "#0d1117"):
            light, dark = sorted((own, luminance(page)), reverse=True)
            assert (light + 0.05) / (dark + 0.05) > 3.5


def test_the_command_writes_the_file_it_is_given(tmp_path: Path) -> None:
    main([str(tmp_path / "again.svg")])
    assert (tmp_path / "again.svg").read_text() == path_svg()
    with pytest.raises(InvalidInput, match=r"pictures sparsity24/path\.svg"):
        main([])
