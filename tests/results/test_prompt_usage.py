"""Which prompts images choose, in `results.json` and on the page: 4 tasks of 3, 2, 4 and 1 classes, 5 prompts."""

import dataclasses
import html
import re
from html.parser import HTMLParser

import pytest

from lamina.errors import DataError
from lamina.results.figures import prompt_usage, shares
from lamina.results.records import Record
from lamina.results.report import report

#: by task, class and prompt; an image chooses two of the five
USAGE = [
    [[8, 2, 6, 0, 4], [10, 10, 0, 0, 0], [7, 3, 5, 0, 5]],
    [[0, 10, 8, 0, 2], [0, 0, 10, 0, 10]],
    [[1, 1, 8, 0, 10], [2, 9, 0, 0, 9], [0, 10, 0, 0, 10], [4, 7, 11, 0, 0]],
    [[9, 0, 9, 0, 0]],
]
#: percent of a task's choices, by prompt and task: 60, 40, 82 and 18 choices
SHARES = [
    ["41.7", "0.0", "8.5", "50.0"],
    ["25.0", "25.0", "32.9", "0.0"],
    ["18.3", "45.0", "23.2", "50.0"],
    ["0.0", "0.0", "0.0", "0.0"],
    ["15.0", "30.0", "35.4", "0.0"],
]
MEANS = ["25.1", "20.7", "34.1", "0.0", "20.1"]


def text_of(page):
    """What a reader sees, in one line."""
    return " ".join(html.unescape(re.sub(r"<[^>]*>", " ", page.split("</style>")[1])).split())


# ── in the record ────────────────────────────────────────────────────────────────────────────────────


def test_a_record_with_usage_is_read_back(make_record, tmp_path):
    record = make_record(usage=USAGE)
    record.write(tmp_path / "results.json")
    assert Record.read(tmp_path / "results.json") == record and record.as_dict()["usage"] == USAGE


def test_a_file_from_before_choices_were_counted_is_a_record_without_any(record):
    values = {name: value for name, value in record.as_dict().items() if name != "usage"}
    assert Record.from_dict(values) == record and record.usage == []


def test_an_unfinished_run_has_usage_of_its_tasks_and_one_of_all_at_once_of_every_task(make_record):
    assert make_record([[0.9], [0.8, 0.7]], finished=False, usage=USAGE[:2]).usage == USAGE[:2]
    assert make_record([[0.9, 0.8, 0.7, 0.6]], usage=USAGE).at_once


def changed(task, **rows):
    """USAGE with rows of one task replaced, as in c1=[...]."""
    tables = [[list(row) for row in table] for table in USAGE]
    for name, row in rows.items():
        tables[task][int(name[1:])] = row
    return tables


TYPE = "must be a list of tables of whole numbers, at least 0; got"
SHAPE = "must have 4 tables, with a row of as many numbers for each class of a task; got"


@pytest.mark.parametrize(
    ("usage", "message"),
    [
        ("often", f"{TYPE} 'often'"),
        ([[1, 2]], f"{TYPE} [[1, 2]]"),
        ([[[0.5]]], f"{TYPE} [[[0.5]]]"),
        ([[[-1]]], f"{TYPE} [[[-1]]]"),
        ([[[True]]], f"{TYPE} [[[True]]]"),
        (USAGE[:3], f"{SHAPE} [[5, 5, 5], [5, 5], [5, 5, 5, 5]]"),
        ([*USAGE, USAGE[0]], f"{SHAPE} [[5, 5, 5], [5, 5], [5, 5, 5, 5], [5], [5, 5, 5]]"),
        ([USAGE[0], USAGE[1][:1], *USAGE[2:]], f"{SHAPE} [[5, 5, 5], [5], [5, 5, 5, 5], [5]]"),
        (changed(1, c1=[1, 2, 3, 4]), f"{SHAPE} [[5, 5, 5], [5, 4], [5, 5, 5, 5], [5]]"),
        ([[], *USAGE[1:]], f"{SHAPE} [[], [5, 5], [5, 5, 5, 5], [5]]"),
        ([[[] for _ in table] for table in USAGE], f"{SHAPE} [[0, 0, 0], [0, 0], [0, 0, 0, 0], [0]]"),
    ],
)
def test_usage_of_another_shape_is_refused(make_record, usage, message):
    with pytest.raises(DataError) as error:
        make_record(usage=usage)
    assert str(error.value) == f"Record.usage {message}"


# ── on the page ──────────────────────────────────────────────────────────────────────────────────────


def test_shares_are_of_the_sum_over_rows():
    assert shares(USAGE[3]) == [0.5, 0.0, 0.5, 0.0, 0.0]
    assert shares(USAGE[1]) == [0.0, 0.25, 0.45, 0.0, 0.3]
    assert shares([[0, 0], [0, 0]]) is None


def rows_of(figure):
    body = figure.split("<tbody>")[1]
    return [re.findall(r"<t[hd][^>]*>([^<]*)</t[hd]>", row) for row in body.split("</tr>")[:-1]]


def test_the_map_has_prompts_down_tasks_across_and_their_mean(make_record):
    figure = prompt_usage(make_record(usage=USAGE))
    expected = zip(range(1, 6), SHARES, MEANS, strict=True)
    assert rows_of(figure) == [[f"prompt {number}", *own, mean] for number, own, mean in expected]
    head = figure.split("</thead>")[0]
    assert re.findall(r"<th[^>]*>([^<]*)</th>", head) == ["chosen", "1", "2", "3", "4", "mean"]
    assert 'title="fox, gnu, hen, ibis">3<' in head


def test_a_prompt_that_is_chosen_more_has_a_stronger_colour(make_record):
    figure = prompt_usage(make_record(usage=USAGE), most=0.5)
    shades = [float(shade) for shade in re.findall(r"--o:([0-9.]+)", figure)]
    wanted = [0.04 + 0.96 * float(share) / 50 for row in SHARES for share in row]
    assert shades == pytest.approx(wanted, abs=2e-3)
    assert max(shades) == 1.0 and min(shades) == 0.04


def test_a_task_whose_images_chose_nothing_is_left_empty(make_record):
    figure = prompt_usage(make_record(usage=[*USAGE[:3], [[0] * 5]]))
    lines = rows_of(figure)
    assert [line[4] for line in lines] == [""] * 5
    assert lines[0][5] == "16.7"  # over three tasks


@pytest.fixture
def runs(make_record, seeds):
    """Two runs with a pool, of two methods, and three without."""
    sharper = [[[0, 0, 3] for _ in table] for table in USAGE]
    return [*seeds, make_record(method="l2p", usage=USAGE), make_record(method="dualprompt", usage=sharper)]


def test_usage_is_in_the_report_of_runs_with_a_pool_and_nowhere_else(runs):
    page = report(runs)
    text = text_of(page)
    assert text.count("Prompts that images choose") == 1 and page.count("<summary>Prompts by class</summary>") == 2
    part = page.split("<h3>Prompts that images choose</h3>")[1].split("<h3>")[0]
    assert re.findall(r"<h4>([^<]*)<", part) == ["l2p", "dualprompt"]
    assert "Prompts that images choose" not in report(runs[:3])


def test_maps_of_a_section_share_one_scale_which_is_said(runs):
    assert "fell on the prompt, in percent. Colour runs from 0 to 100. l2p seed 0" in text_of(report(runs))
    assert "Colour runs from 0 to 50. l2p seed 0, order 7 chosen 1 2 3 4 mean" in text_of(report(runs[:4]))
    for some, shade in ((runs, "0.52"), (runs[:4], "1.0")):
        part = report(some).split("<h3>Prompts that images choose</h3>")[1]
        assert f'style="--o:{shade}">50.0<' in part


def test_classes_are_listed_with_their_choices_in_percent(runs):
    text = text_of(report(runs[:4]))
    assert "Prompts by class Class Task Choices 1 2 3 4 5 ant 1 20 40.0 10.0 30.0 0.0 20.0 bee 1 20 50.0" in text
    assert "hen 3 20 0.0 50.0 0.0 0.0 50.0 ibis 3 22 18.2 31.8 50.0 0.0 0.0 jay 4 18 50.0 0.0 50.0 0.0 0.0" in text


def test_a_class_that_was_not_tested_with_a_task_is_not_listed_there(make_record):
    text = text_of(report([make_record(usage=changed(1, c0=[0] * 5))]))
    assert "cat 1 20 35.0 15.0 25.0 0.0 25.0 eel 2 20" in text


def test_counts_of_zero_throughout_are_no_figure_and_no_failure(make_record):
    assert "Prompts that images choose" not in report([make_record(usage=[[[0] * 5 for _ in t] for t in USAGE])])


def test_names_of_classes_are_escaped(make_record):
    evil = "<script>alert('x')</script>\"&"
    classes = [["ant", evil, "cat"], ["dog", "eel"], ["fox", "gnu", "hen", "ibis"], ["jay"]]
    page = report([dataclasses.replace(make_record(usage=USAGE), classes=classes)])
    found = []
    parser = HTMLParser()
    parser.handle_starttag = lambda tag, attributes: found.append(tag)
    parser.feed(page)
    assert "script" not in found and "<script" not in page and evil in html.unescape(page)


def test_elements_nest(runs):
    open_tags = []
    parser = HTMLParser()
    parser.handle_starttag = lambda tag, attributes: open_tags.append(tag) if tag != "meta" else None

    def end(tag):
        assert open_tags.pop() == tag

    parser.handle_endtag = end
    parser.handle_startendtag = lambda tag, attributes: None
    parser.feed(report(runs))
    assert open_tags == []
