"""The page: complete, self-contained, harmless whatever a name holds, and true to the numbers."""

import dataclasses
import html
import re
from html.parser import HTMLParser

import pytest

from lamina.errors import DataError, StorageError
from lamina.results.figures import accuracy_curve, accuracy_matrix, drift_curves, forgetting_by_task
from lamina.results.report import report, write_report
from lamina.results.tables import aggregate

VOID = {"meta", "br", "hr", "input", "link", "img"}
EVIL = "<script>alert('x')</script>\"&"


class Balance(HTMLParser):
    """Collects the elements of a page and fails when they do not nest."""

    def __init__(self, text):
        super().__init__()
        self.open, self.seen, self.attributes = [], [], []
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.seen.append(tag)
        self.attributes += attrs
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.seen.append(tag)
        self.attributes += attrs

    def handle_endtag(self, tag):
        assert self.open and self.open.pop() == tag


def text_of(page):
    """What a reader sees, in one line with plain spaces."""
    body = page.split("</style>")[1]
    return " ".join(html.unescape(re.sub(r"<[^>]*>", " ", body)).split())


@pytest.fixture
def mixed(seeds, make_record):
    """Three seeds, another setting, an unfinished run and one that learned all at once."""
    return [
        *seeds,
        make_record(settings={"length": 9, "lr": 0.01, "stream": {"tasks": 4}}),
        make_record([[0.9], [0.8, 0.7]], method="l2p", finished=False, settings={"top_k": 5}),
        make_record([[0.93, 0.94, 0.95, 0.96]], method="joint", settings={"lr": 0.5}),
    ]


def test_a_page_is_written_whole(mixed, tmp_path):
    write_report(mixed, tmp_path / "report.html")
    assert (tmp_path / "report.html").read_text(encoding="utf-8") == report(mixed)


def test_a_page_that_cannot_be_written_says_so(mixed, tmp_path):
    (tmp_path / "taken").write_text("a file, so no folder can have its name")
    path = tmp_path / "taken" / "report.html"
    with pytest.raises(StorageError) as error:
        write_report(mixed, path)
    assert str(error.value) == f"{path} could not be written: File exists"


def test_a_page_about_nothing_is_refused():
    with pytest.raises(DataError) as error:
        report([])
    assert str(error.value) == "a report needs at least one run; got none"


def test_elements_nest_and_nothing_is_fetched_or_run(mixed):
    page = report(mixed)
    parsed = Balance(page)
    assert not {"script", "link", "img", "iframe", "object", "form"} & set(parsed.seen)
    links = [value for name, value in parsed.attributes if name in ("src", "href", "srcset")]
    assert not [value for value in links if not value.startswith("#")]
    assert not [name for name, _ in parsed.attributes if name.startswith("on")]
    assert "://" not in page and "url(" not in page and "@import" not in page


def test_every_text_of_a_record_is_escaped(make_record):
    record = make_record(
        method=f"method{EVIL}",
        stream=f"stream{EVIL}",
        stream_fingerprint=f"print{EVIL}",
        backbone={"name": f"backbone{EVIL}", "fingerprint": f"mark{EVIL}"},
        protocol={f"key{EVIL}": f"protocol{EVIL}", "test_batch": f"batch{EVIL}"},
        classes=[["ant"], ["bee"], [f"class{EVIL}"], ["cat"]],
        settings={f"setting{EVIL}": f"value{EVIL}"},
        versions={"lamina": f"lamina{EVIL}", "torch": f"torch{EVIL}", "timm": "1", "python": "3"},
        hardware=f"hardware{EVIL}",
        commit=f"commit{EVIL}",
        command=f"command{EVIL}",
    )
    other = dataclasses.replace(record, settings={"setting": [EVIL]}, hardware=f"machine{EVIL}", command=EVIL)
    other = dataclasses.replace(other, protocol={f"apart{EVIL}": f"unlike{EVIL}"})
    page = report([record, other, dataclasses.replace(record, method=f"second{EVIL}", stream="other")])
    parsed = Balance(page)
    assert "script" not in parsed.seen
    assert EVIL not in page and "<script" not in page
    assert any(name == "title" and EVIL in value for name, value in parsed.attributes)
    words = "method stream print backbone mark key protocol batch class setting value lamina torch"
    for word in [*words.split(), "hardware", "commit", "command", "machine", "second", "apart", "unlike"]:
        assert f"{word}{EVIL}" in html.unescape(page), word


def test_the_headline_shows_means_and_every_run(mixed):
    text = text_of(report(mixed))
    assert "vpt-nsp2 length 4 3 85.2 ± 1.0 9.0 ± 1.0 90.1 ± 0.3 −8.7 ± 1.0 90.3 ± 1.0" in text
    assert "vpt-nsp2 length 4 2 7 84.2 10.0 89.9 −9.7 89.2" in text
    assert "l2p unfinished, 2 of 4 tasks 0 7 75.0 10.0 82.5 −10.0 80.0" in text
    assert "joint 0 7 94.5 – – – 99.2" in text


def test_what_no_run_has_is_no_column(seeds, make_record):
    """One task forgets nothing, so a page about one task neither asks for forgetting nor calls it continual."""
    text = text_of(report([make_record([[0.9]], test_sizes=[9], classes=[["ant", "bee"]])]))
    assert "orgetting" not in text and "Backward transfer" not in text and "continual" not in text
    assert "In percent. Method Seed Order Accuracy" in text
    several = text_of(report(seeds))
    assert "In percent. Forgetting is better when lower, the others when higher." in several
    assert f"{len(seeds)} runs of continual learning" in several


def test_the_protocol_stands_above_the_numbers(mixed):
    text = text_of(report(mixed))
    protocol = "kind class-incremental tasks 4 test batch independent skipped images 0"
    assert f"backbone lamina:vit-nano {protocol}" in text
    assert text.index("class-incremental") < text.index("85.2 ± 1.0")
    assert "protocol" not in text and "left out" not in text and "Not measured alike" not in text


def test_a_batchwise_protocol_and_skipped_images_are_warned_about(make_record):
    protocol = {"kind": "class-incremental", "test_batch": "transductive", "skipped_images": 1234}
    text = text_of(report([make_record(protocol=protocol)]))
    assert "vpt-nsp2: protocol transductive. A prediction depends on the other images of its" in text
    assert "vpt-nsp2: 1 234 images could not be read and were left out." in text


def test_a_protocol_that_differs_is_set_out_above_the_numbers(seeds, make_record):
    """A run of all tasks at once stands beside the others; the page says in what it differs."""
    protocol = {**seeds[0].protocol, "kind": "joint"}
    joint = make_record([[0.9, 0.8, 0.7, 0.6]], method="joint", protocol=protocol)
    page = report([*seeds, joint])
    text = text_of(page)
    assert page.count("<section>") == 1
    assert "Not measured alike, kind: class-incremental for vpt-nsp2; joint for joint. In percent" in text
    assert "backbone lamina:vit-nano tasks 4" in text


def test_streams_and_backbones_are_never_compared_in_one_table(seeds):
    other_stream = dataclasses.replace(seeds[0], stream="tiny-even-4")
    backbone = {"name": "lamina:vit-nano", "fingerprint": "ffff"}
    other_backbone = dataclasses.replace(seeds[1], backbone=backbone)
    page = report([*seeds, other_stream, other_backbone])
    assert page.count("<section>") == 3
    assert re.findall(r'href="#([^"]*)"', page) == re.findall(r'<h2 id="([^"]*)"', page)


def test_costs_are_summed_over_tasks(record):
    text = text_of(report([record]))
    assert "vpt-nsp2 0 4 min 02 s 9.0 s 16.0 s 4 min 27 s 812 MB 12 345 67 890" in text
    assert "vpt-nsp2 0 look back 2.2 2.2 2.2 2.2" in text


def test_settings_that_differ_come_first(mixed):
    text = text_of(report(mixed[:4]))
    differs = "What differs: Setting vpt-nsp2 length 4 vpt-nsp2 length 9 length 4 9"
    assert f"{differs} The same in all: lr 0.01" in text


def test_a_setting_that_one_configuration_lacks_differs(mixed):
    """The one that lacks it comes first, then last."""
    for pair in (mixed[4:6], mixed[5:3:-1]):
        text = text_of(report(pair))
        assert re.search(r"lr (– 0\.5|0\.5 –)", text) and re.search(r"top_k (– 5|5 –)", text)


def test_what_it_takes_to_run_it_again_is_there(mixed):
    text = text_of(report(mixed))
    assert "commit 07b52d9 hardware 2 cores of a test machine lamina 0.1.0 torch 2.15.0 timm 1.0.31" in text
    assert text.count("lamina run recipes/vpt-nsp2/tiny.toml --seed 0") == len(mixed)


def test_provenance_that_differs_is_said_run_by_run(seeds):
    text = text_of(report([seeds[0], dataclasses.replace(seeds[1], commit="badc0de")]))
    assert "seed 0, order 7 commit 07b52d9 lamina run" in text
    assert "seed 1, order 7 commit badc0de lamina run" in text


# ── figures ────────────────────────────────────────────────────────────────────────────────────────


def test_the_curve_has_a_point_per_task_and_a_band_over_seeds(seeds):
    wide = accuracy_curve(aggregate(seeds)).split('class="narrow"')[0]
    titles = re.findall("<title>(.*?)</title>", wide)
    assert titles[0] == "vpt-nsp2, after task 1: 95.0 ± 0.0 %, 3 runs"
    assert titles[3] == "vpt-nsp2, after task 4: 85.2 ± 1.0 %, 3 runs"
    (points,) = re.findall('<polyline[^>]*points="([^"]*)"', wide)
    heights = [float(point.split(",")[1]) for point in points.split()]
    assert len(heights) == 4 and heights == sorted(heights)
    assert wide.count("<polygon") == 1


def test_one_run_has_no_band(record):
    assert "<polygon" not in accuracy_curve(aggregate([record]))


def test_a_run_that_learned_all_at_once_is_a_level_line(mixed):
    curve = accuracy_curve(aggregate(mixed[5:]))
    assert "<polyline" not in curve
    assert "joint, all at once: 94.5 %" in curve


def test_a_stream_of_one_task_can_be_drawn(make_record):
    record = make_record([[0.8]], classes=[["ant", "bee"]], test_sizes=[30])
    Balance(report([record]))


def test_the_matrix_prints_every_value_and_leaves_later_tasks_empty(record):
    figure = accuracy_matrix(record)
    assert re.findall(r'<td class="accuracy[^>]*>([^<]*)<', figure) == (
        ["95.0", "90.0", "92.0", "85.0", "93.0", "90.0", "80.0", "86.0", "88.0", "91.0"]
    )
    assert figure.count("<td></td>") == 6
    assert "after 4" in figure and "all at once" not in figure


def test_a_higher_accuracy_has_a_stronger_colour(record):
    shades = [float(shade) for shade in re.findall(r"--o:([0-9.]+)", accuracy_matrix(record, palest=0.8))]
    assert shades[0] == max(shades) and shades[6] == min(shades) == 0.04


def test_forgetting_of_each_task_is_averaged_over_seeds_and_gains_are_told_apart(seeds, make_record):
    gained = make_record([[0.5], [0.7, 0.9]], classes=[["ant"], ["bee"]], test_sizes=[3, 5], method="up")
    figure = forgetting_by_task([*aggregate(seeds), *aggregate([gained])])
    assert re.findall(r'<td class="(lost|gained)[^>]*>([^<]*)<', figure) == [
        ("lost", "16.0"),
        ("lost", "8.0"),
        ("lost", "3.0"),
        ("gained", "−20.0"),
    ]


def test_forgetting_is_left_out_where_nothing_can_be_forgotten(mixed):
    assert forgetting_by_task(aggregate(mixed[5:])) is None
    assert "Forgetting of each task" not in report(mixed[5:])


@pytest.fixture
def drifted(seeds, make_record, make_drift):
    """Two of three seeds measured drift, one twice as much; another method a tenth; one none at all."""
    return [
        *(dataclasses.replace(run, drift=make_drift(1 + run.seed)) for run in seeds[:2]),
        seeds[2],
        make_record(method="calm", drift=make_drift(0.1)),
        make_record(method="unmeasured"),
    ]


def test_drift_is_drawn_by_task_and_by_block_where_it_was_measured(drifted):
    """After tasks 2, 3 and 4, old features (block 4 of 0 to 4) moved by 5, 7.5 and 10 %, or twice as far."""
    (row, noisy), (other, calm) = drift_curves(aggregate(drifted))
    assert (row.name, other.name) == ("vpt-nsp2", "calm")
    assert re.findall("<title>(.*?)</title>", noisy) == [
        "vpt-nsp2, after task 2: 7.5 ± 3.5 %, 2 runs",
        "vpt-nsp2, after task 3: 11.3 ± 5.3 %, 2 runs",
        "vpt-nsp2, after task 4: 15.0 ± 7.1 %, 2 runs",
        *(f"vpt-nsp2, block {b}: {3 * (b + 1)}.0 ± {1.414 * (b + 1):.1f} %, 2 runs" for b in range(5)),
    ]
    assert re.findall("<title>(.*?)</title>", calm) == [
        "calm, after task 2: 0.5 %", "calm, after task 3: 0.8 %", "calm, after task 4: 1.0 %",
        "calm, block 0: 0.2 %", "calm, block 1: 0.4 %", "calm, block 2: 0.6 %",
        "calm, block 3: 0.8 %", "calm, block 4: 1.0 %",
    ]  # fmt: skip
    assert noisy.count("<polygon") == 2 and "<polygon" not in calm


def test_drifts_share_one_scale_from_zero_and_keep_the_colours_of_their_methods(drifted):
    (_, noisy), (_, calm) = drift_curves(aggregate(drifted))
    for figure, colour in ((noisy, "c0"), (calm, "c1")):
        assert set(re.findall('class="line (c[0-9])"', figure)) == {colour}
        for drawing in figure.split("</svg>")[:2]:
            assert re.findall('text-anchor="end">([^<]*)<', drawing) == ["0", "5", "10", "15", "20", "25"]
            lowest = re.findall('class="grid"[^>]* y1="([^"]*)"', drawing)[0]
            assert lowest == "180.0"
    heights = [float(point.split(",")[1]) for point in re.findall('points="([^"]*)"', calm)[1].split()]
    assert heights == [pytest.approx(180 - 168 * share / 125, abs=0.06) for share in (1, 2, 3, 4, 5)]


def test_axes_of_drift_count_tasks_from_the_second_and_blocks_from_zero(drifted):
    (_, noisy), _ = drift_curves(aggregate(drifted))
    by_task, by_block, _ = noisy.split("</svg>")
    assert re.findall('text-anchor="middle">([^<]*)<', by_task) == ["2", "3", "4", "tasks learned"]
    assert re.findall('text-anchor="middle">([^<]*)<', by_block) == ["0", "1", "2", "3", "4", "block"]


def test_features_that_never_moved_are_a_line_at_zero(make_record, make_drift):
    ((_, figure),) = drift_curves(aggregate([make_record(drift=make_drift(0.0))]))
    assert re.findall('points="([^"]*)"', figure)[0] == "44.0,180.0 195.0,180.0 346.0,180.0"
    assert re.findall('text-anchor="end">([^<]*)<', figure)[:6] == ["0.0", "0.2", "0.4", "0.6", "0.8", "1.0"]


def test_drift_is_in_the_report_where_it_was_measured_and_nowhere_else(drifted, make_record):
    page = report(drifted)
    Balance(page)
    assert text_of(page).count("Drift of old features") == 1
    assert "Drift of old features" not in report([*drifted[2:3], drifted[-1]])
    one = make_record([[0.8]], classes=[["ant", "bee"]], test_sizes=[30], drift=[[[0.0, 0.0]]])
    assert "Drift of old features" not in report([one])
    evil = dataclasses.replace(drifted[0], method=f"method{EVIL}")
    assert "script" not in Balance(report([evil])).seen
