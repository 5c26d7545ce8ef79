"""benchmarks/tables.py: README.md holds what the results say, or the check fails."""

import dataclasses
import importlib.util
import json
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "tables.py"
README = "# lamina\n\n<!-- table: demo -->\nold\n<!-- /table -->\n\nThe end.\n"
TABLE = """| method | accuracy (%) | forgetting (%) | n |
|---|---:|---:|---:|
| vpt-nsp2 | 85.2 ± 1.0 | 9.0 ± 1.0 | 3 |

Mean ± sample standard deviation over n seeds, in percent; kind class-incremental, tasks 4, \
test batch independent, skipped images 0; backbone `lamina:vit-nano`; 2 cores of a test machine; \
commit `07b52d9`.
"""


@pytest.fixture(scope="module")
def script():
    sys.path.insert(0, str(SCRIPT.parent))  # as for a program that is called
    spec = importlib.util.spec_from_file_location("benchmark_tables", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    sys.path.remove(str(SCRIPT.parent))
    return module


@pytest.fixture
def call(script, tmp_path, capsys):
    """Run the script on a README and records; return exit status, README and what was said."""

    def run(records, *options, readme=README):
        path = tmp_path / "README.md"
        path.write_text(readme)
        if records is not None:
            values = {"records": [record.as_dict() for record in records]}
            (tmp_path / "demo.json").write_text(json.dumps(values))
        status = script.main([*options, "--pages", str(path), "--results", str(tmp_path)])
        said = capsys.readouterr()
        return status, path.read_text(), said.out + said.err

    return run


def test_a_block_is_rewritten_and_the_rest_is_left(call, seeds):
    status, text, said = call(seeds)
    assert (status, said) == (0, "README.md: table 'demo' rewritten\n")
    assert text == README.replace("old\n", TABLE)


def test_a_stale_block_fails_the_check_and_nothing_is_written(call, seeds):
    status, text, said = call(seeds, "--check")
    assert (status, text) == (1, README)
    assert said == "README.md: table 'demo' is stale; run python benchmarks/tables.py\n"


def test_a_fresh_block_passes_the_check(call, seeds):
    fresh = README.replace("old\n", TABLE)
    assert call(seeds, "--check", readme=fresh) == (0, fresh, "")


def test_commits_and_hardware_that_differ_are_all_in_the_caption(call, seeds):
    records = [*seeds[:2], dataclasses.replace(seeds[2], commit=None, hardware="one H200")]
    _, text, _ = call(records)
    assert "2 cores of a test machine / one H200; commit `07b52d9` / unknown." in text


@pytest.mark.parametrize(
    ("readme", "message"),
    [
        (
            README.replace("demo", "dem"),
            "no table is called 'dem'; did you mean 'demo'? Known: clap-context, clap-costs, clip-costs, demo, "
            "demo-clip, heads, long-streams, lspt-costs, methods, methods for CLIP, pool-costs, tiny-odd-10, transfer, "
            "votes",
        ),
        (
            README.replace("<!-- /table -->", ""),
            "each '<!-- table: NAME -->' needs a '<!-- /table -->'; got 1 and 0",
        ),
    ],
)
def test_a_block_that_cannot_be_made_leaves_the_file(call, seeds, readme, message):
    assert call(seeds, readme=readme) == (2, readme, f"{message}\n")


def test_results_that_are_missing_are_named(call, tmp_path):
    path = tmp_path / "demo.json"
    assert call(None) == (2, README, f"{path} cannot be read: No such file or directory\n")


def test_a_seed_that_is_there_twice_is_refused(call, seeds):
    status, _, said = call([*seeds, seeds[1]])
    assert (status, said) == (2, "vpt-nsp2 has seed 1 with order 7 twice; keep one run\n")


def test_an_unfinished_run_is_refused(call, seeds, make_record):
    status, _, said = call([*seeds, make_record([[0.5]], finished=False, seed=6)])
    assert (status, said) == (2, "vpt-nsp2 with seed 6 is not finished; run it to its end\n")


# ── experiments ──────────────────────────────────────────────────────────────────────────────────────


#: what runs of `make_record` learn, and how
MATRIX = [[0.9], [0.8, 0.7], [0.8, 0.7, 0.6], [0.5, 0.4, 0.3, 0.2]]
HERE = {"stream": "tiny-odd-4", "run": {}}


def test_a_variant_is_averaged_over_its_own_runs_and_one_not_yet_run_says_so(call, make_record, make_drift, tmp_path):
    matrix = [[0.9], [0.8, 0.7], [0.8, 0.7, 0.6]]
    runs = [
        make_record([*matrix, [0.5 + seed / 25, 0.4, 0.3, 0.2]], seed=seed, settings={"eta": 1}, drift=make_drift())
        for seed in (0, 1, 2)
    ]
    rows = [
        {"name": "all", "method": "vpt-nsp2", "settings": {"eta": 1}, "seeds": [0, 2], **HERE},
        {"name": "none", "method": "vpt-nsp2", "settings": {"eta": 0}, "seeds": [0], **HERE},
    ]
    values = {"experiments": {"parts": rows}, "records": [run.as_dict() for run in runs]}
    (tmp_path / "null-space.json").write_text(json.dumps(values))
    page = "<!-- table: null-space/parts -->\n<!-- /table -->\n"
    _, text, _ = call(None, readme=page)
    assert (
        "| variant | accuracy (%) | forgetting (%) | new tasks (%) | drift (%) | looking back (% of training) | n |"
        in text
    )
    assert "| all | 36.0 ± 1.4 | 32.0 ± 1.9 | 60.0 ± 0.0 | 10.0 ± 0.0 | 3.7 ± 0.0 | 2 |" in text
    assert "| none |" not in text and "\n\nNot yet run: none.\n\nMean ±" in text


def test_runs_of_another_stream_or_protocol_are_not_those_of_a_variant(call, make_record, tmp_path):
    run = make_record(MATRIX, settings={"eta": 1}).as_dict()
    online = {**run, "protocol": {**run["protocol"], "online": "one pass"}, "seed": run["seed"]}
    row = {"method": "vpt-nsp2", "settings": {"eta": 1}, "seeds": [run["seed"]]}
    rows = [
        {"name": "here", **row, **HERE},
        {"name": "elsewhere", **row, "stream": "other", "run": {}},
        {"name": "online", **row, "stream": "tiny-odd-4", "run": {"online": True}},
    ]

    def lines(*records):
        (tmp_path / "null-space.json").write_text(json.dumps({"experiments": {"parts": rows}, "records": records}))
        _, text, _ = call(None, readme="<!-- table: null-space/parts -->\n<!-- /table -->\n")
        row, _, waiting = text.splitlines()[3:6]
        return row.split(" | ")[0].strip("| "), row.rstrip(" |")[-1], waiting

    assert lines(run) == ("here", "1", "Not yet run: elsewhere; online.")
    assert lines(online) == ("online", "1", "Not yet run: here; elsewhere.")


def test_a_run_from_before_a_setting_was_there_is_one_with_its_default(call, make_record, tmp_path):
    run = make_record(MATRIX, settings={"length": 4})
    row = {"method": "vpt-nsp2", "seeds": [run.seed], **HERE}
    rows = [
        {"name": "default", **row, "settings": {"length": 4, "use_b1": True}},
        {"name": "other", **row, "settings": {"length": 4, "use_b1": False}},
        {"name": "shorter", **row, "settings": {"length": 3, "use_b1": True}},
    ]
    values = {"experiments": {"parts": rows}, "records": [run.as_dict()]}
    (tmp_path / "null-space.json").write_text(json.dumps(values))
    _, text, _ = call(None, readme="<!-- table: null-space/parts -->\n<!-- /table -->\n")
    assert text.splitlines()[3].endswith("| 1 |") and "\nNot yet run: other; shorter.\n" in text


def test_a_study_takes_runs_from_other_files_that_it_names(call, make_record, tmp_path):
    run = make_record(MATRIX, settings={"eta": 1})
    rows = [{"name": "here", "method": "vpt-nsp2", "settings": {"eta": 1}, "seeds": [run.seed], **HERE}]
    (tmp_path / "other.json").write_text(json.dumps({"records": [run.as_dict()]}))
    for also, expected in (["other"], "| here | 35.0 |"), ([], "-->\nNot yet run: here.\n<!--"):
        values = {"also": also, "experiments": {"parts": rows}, "records": []}
        (tmp_path / "null-space.json").write_text(json.dumps(values))
        _, text, _ = call(None, readme="<!-- table: null-space/parts -->\n<!-- /table -->\n")
        assert expected in text


def test_an_experiment_that_nobody_made_is_named(call, tmp_path):
    (tmp_path / "null-space.json").write_text(json.dumps({"experiments": {"parts": []}, "records": []}))
    page = "<!-- table: null-space/part -->\n<!-- /table -->\n"
    assert call(None, readme=page) == (2, page, "no experiment is called 'part'; did you mean 'parts'? Known: parts\n")


def test_a_long_stream_has_a_line_for_each_measure_and_a_dash_where_it_ended_earlier(call, tmp_path):
    facts = {"hardware": "2 cores of a test machine", "commit": "07b52d9" * 3}
    rows = [{"task": task, "seconds": 0.5 + task, "kept (MB)": task / 4} for task in (1, 10)]
    runs = [{"method": "ranpac", "tasks": 10, "rows": rows, **facts}]
    runs += [{"method": "strata", "tasks": 5, "rows": rows[:1], **facts}]
    (tmp_path / "long-streams.json").write_text(json.dumps(runs))
    text = call(None, readme="<!-- table: long-streams -->\n<!-- /table -->\n")[1]
    assert "| method | tasks | measure | task 1 | task 10 |" in text
    assert "| ranpac | 10 | seconds | 1.5 | 10.5 |" in text and "| ranpac | 10 | kept (MB) | 0.25 | 2.5 |" in text
    assert "| strata | 5 | kept (MB) | 0.25 | – |" in text
    assert "2 cores of a test machine; commit `07b52d907b52`." in text


def test_costs_are_ratios_of_steps_and_seconds_of_closed_forms(call, tmp_path):
    values = {
        "steps, processor time": {"vit, batch 8": {"one / other": {"median": 1.0251, "quartiles": [0.99, 1.0349]}}},
        "closed forms, seconds": {"ridge: solve": 0.125},
        "processor": "a test machine",
        "threads of the closed forms": 3,
        "rounds": 7,
        "commit": "07b52d9" * 3,
    }
    (tmp_path / "heads.json").write_text(json.dumps(values))
    text = call(None, readme="<!-- table: heads -->\n<!-- /table -->\n")[1]
    assert "| one / other | vit, batch 8 | 1.025 (0.990 to 1.035) |" in text and "| ridge: solve | 0.125 |" in text
    assert "Medians of 7 rounds; a test machine, steps on one thread, closed forms on 3; commit `07b52d907b52`." in text


def test_votes_have_a_line_for_each_run_and_a_column_for_each_way_to_choose(call, tmp_path):
    rows = [
        {"choice": "image", "batch": 128, "order": "sorted", "accuracy": 0.25},
        {"choice": "image", "batch": 128, "order": "mixed", "accuracy": 0.25},
        {"choice": "batch", "batch": 16, "order": "sorted", "accuracy": 0.75},
        {"choice": "batch", "batch": 16, "order": "mixed", "accuracy": 0.125},
    ]
    run = {"method": "l2p", "stream": "tiny-odd-4", "trained": "batch", "seed": 3, "rows": rows}
    values = {"commit": "07b52d9", "hardware": "2 cores", "runs": [run]}
    (tmp_path / "votes.json").write_text(json.dumps(values))
    _, text, _ = call(None, readme="<!-- table: votes -->\n<!-- /table -->\n")
    assert text == (
        "<!-- table: votes -->\n"
        "| method | on | seed | trained | each image for itself | 16 together, of a class and task "
        "| 16 together, in no order |\n"
        "|---|---|---:|---|---:|---:|---:|\n"
        "| l2p | tiny-odd-4 | 3 | together | 25.0 | 75.0 | 12.5 |\n"
        "\n"
        "Accuracy in percent on the test images of all tasks; 2 cores; commit `07b52d9`.\n"
        "<!-- /table -->\n"
    )


def test_costs_of_clap_have_a_line_for_each_number_of_classes(call, tmp_path):
    row = {
        "classes": 50,
        "multiply_adds": {"linear": 1_250_000, "CLAP": 4_700_000_000},
        "times": {"CLAP / linear": {"median": 233.6, "quartiles": [1, 2]}},
    }
    values = {"rows": [row], "batch": 64, "tasks": 10, "processor": "a chip", "commit": "07b52d9aaaabbbb"}
    (tmp_path / "clap-costs.json").write_text(json.dumps(values))
    _, text, _ = call(None, readme="<!-- table: clap-costs -->\n<!-- /table -->\n")
    assert text.splitlines()[1:4] == [
        "| classes | linear, million multiply-adds | CLAP, million multiply-adds | CLAP, times linear |",
        "|---:|---:|---:|---:|",
        "| 50 | 1.2 | 4,700.0 | 234 |",
    ]
    assert "64 kept features, 10 tasks, medians; a chip, one thread; commit `07b52d9aaaab`." in text


def test_costs_of_prompts_have_a_column_for_each_tower(call, tmp_path):
    sizes = {name: {"lspt / bare": {"median": ratio, "quartiles": [1, 2]}} for name, ratio in (("a", 1.376), ("b", 2))}
    values = {"sizes": sizes, "rounds": 7, "processor": "a chip", "commit": "07b52d9aaaabbbb"}
    (tmp_path / "lspt-costs.json").write_text(json.dumps(values))
    _, text, _ = call(None, readme="<!-- table: lspt-costs -->\n<!-- /table -->\n")
    assert text.splitlines()[1:4] == [
        "| step against the bare tower's | a | b |",
        "|---|---:|---:|",
        "| lspt | 1.38 | 2.00 |",
    ]


def test_transfer_has_a_table_for_each_stream_and_a_column_for_each_backbone(call, tmp_path):
    def row(stream, backbone, name, *accuracies):
        records = [
            {
                "metrics": {"accuracy": accuracy},
                "trainable_parameters": 1200,
                "seconds": {"train": [10.0, place]},
                "peak_memory_mb": 700.0,
                "hardware": "a chip",
                "commit": "07b52d9",
            }
            for place, accuracy in enumerate(accuracies)
        ]
        return {"stream": stream, "backbone": backbone, "name": name, "rate": 0.1, "records": records}

    rows = [
        row("few", "a", "LSPT", 0.5, 0.7),
        row("few", "b", "LSPT", 0.25, 0.25),
        row("many", "a", "linear", 0.5, 0.5),
    ]
    values = {
        "shared": {"epochs": 10},
        "names": ["linear", "LSPT", "full"],
        "rows": {str(i): r for i, r in enumerate(rows)},
    }
    (tmp_path / "transfer.json").write_text(json.dumps(values))
    _, text, _ = call(None, readme="<!-- table: transfer -->\n<!-- /table -->\n")
    assert text.splitlines()[1:-1] == [
        "`few`:",
        "",
        "| method | `a` (%) | `b` (%) | learned numbers | training, s | peak memory (MB) | n |",
        "|---|---:|---:|---:|---:|---:|---:|",
        "| LSPT | 60.0 ± 14.1 | 25.0 ± 0.0 | 1,200 | 10 | 700 | 2 |",
        "",
        "Not yet run: linear; full.",
        "",
        "`many`:",
        "",
        "| method | `a` (%) | `b` (%) | learned numbers | training, s | peak memory (MB) | n |",
        "|---|---:|---:|---:|---:|---:|---:|",
        "| linear | 50.0 ± 0.0 | – | 1,200 | 10 | 700 | 2 |",
        "",
        "Not yet run: LSPT; full.",
        "",
        "Mean ± sample standard deviation over n seeds of one choice of the rate; epochs 10; a chip; commit `07b52d9`.",
    ]


def test_costs_of_pools_are_multiples_of_what_they_are_compared_with(call, tmp_path):
    found = {
        "step": {"l2p / vpt-deep": {"median": 1.176, "quartiles": [1, 2]}},
        "prediction": {"l2p / vpt-deep": {"median": 1.144, "quartiles": [1, 2]}},
        "weights": {"vpt-deep": 1.001, "l2p": 1.0027},
    }
    values = {"commit": "07b52d9" + 33 * "0", "processor": "a chip", "rounds": 7, "sizes": {"vit, batch 8": found}}
    (tmp_path / "pool-costs.json").write_text(json.dumps(values))
    _, text, _ = call(None, readme="<!-- table: pool-costs -->\n<!-- /table -->\n")
    assert "| vpt-deep | vit, batch 8 | 1 | 1 | 1.001 |\n| l2p | vit, batch 8 | 1.18 | 1.14 | 1.003 |" in text
    assert text.endswith("medians of 7 rounds; a chip, one thread; commit `07b52d900000`.\n<!-- /table -->\n")
