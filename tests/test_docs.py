"""Pages with Python in them run as they stand, and what they say of their outcome is so."""

import re
from functools import cache
from pathlib import Path

import pytest
import torch

from lamina.model import Batch, PromptedModel
from lamina.prompts.pool import PromptPool

PAGES = Path(__file__).parents[1] / "docs"
L2P = "l2p-in-sixty-lines.md"


def program(page):
    """The Python blocks of a page, one after another."""
    return "\n".join(re.findall(r"^```python\n(.*?)^```$", (PAGES / page).read_text(), re.M | re.S))


@cache
def ran(page):
    """Return the names that a page's program leaves behind."""
    names = {"__name__": page}
    exec(compile(program(page), page, "exec"), names)
    return names


def test_the_page_keeps_to_sixty_lines_of_code():
    lines = [line for line in program(L2P).splitlines() if line.strip()]
    assert 55 <= len(lines) <= 65


def test_the_page_learns_both_tasks():
    """Of 16 test images of two classes, chance gets 8 right."""
    matrix = ran(L2P)["trainer"].matrix_task_aware
    assert [len(row) for row in matrix] == [1, 2]
    assert matrix[0][0] >= 13 / 16 and matrix[1][1] >= 13 / 16


def test_the_pages_predictions_do_not_depend_on_the_batch():
    names = ran(L2P)
    assert names["together"].shape == (16, 4) and (names["together"] - names["alone"]).abs().max() < 1e-4
    assert torch.equal(names["together"].argmax(-1), names["alone"].argmax(-1))


def test_the_pages_pool_scores_as_the_one_that_ships():
    names = ran(L2P)
    model, tower = names["model"], names["model"].tower
    ours = PromptPool(10, 3, 2, tower.width, tower.features)
    ours.load_state_dict(model.prompts.state_dict())
    images = Batch(names["images"][:3])
    with torch.no_grad():
        shipped, own = (PromptedModel(tower, prompts, model.head)(images) for prompts in (ours, model.prompts))
    torch.testing.assert_close(own.logits, shipped.logits, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(own.terms, shipped.terms)


@pytest.mark.parametrize("page", [path.name for path in sorted(PAGES.glob("*.md")) if program(path.name)])
def test_a_page_runs(page):
    assert ran(page)
