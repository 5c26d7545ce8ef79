"""Tables of what benchmarks found that is not a set of runs: a function for each file of results; see `tables.py`."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from statistics import fmean
from typing import Any

from lamina.results.tables import show, spread


def long_streams(runs: Sequence[Mapping[str, Any]]) -> str:
    """Return the Markdown table of what `benchmarks/long_streams.py` wrote: a row for each run and measure."""
    shown = sorted({row["task"] for run in runs for row in run["rows"]})
    lines = [
        f"| method | tasks | measure | {' | '.join(f'task {task}' for task in shown)} |",
        f"|---|---:|---|{'---:|' * len(shown)}",
    ]
    for run in runs:
        at = {row["task"]: row for row in run["rows"]}
        for measure in run["rows"][0]:
            if measure != "task":
                cells = [str(at[task][measure]) if task in at else "–" for task in shown]
                lines.append(f"| {run['method']} | {run['tasks']} | {measure} | {' | '.join(cells)} |")
    commits = listed(f"`{run['commit'][:12]}`" for run in runs)
    return "\n".join(lines) + f"\n\n{listed(run['hardware'] for run in runs)}; commit {commits}.\n"


def costs(values: Mapping[str, Any]) -> str:
    """Return the Markdown tables of what `benchmarks/heads.py` wrote: steps compared, and closed forms."""
    lines = ["| step against step | on | times as long (quartiles) |", "|---|---|---:|"]
    for size, pairs in values["steps, processor time"].items():
        for pair, found in pairs.items():
            low, high = found["quartiles"]
            lines.append(f"| {pair} | {size} | {found['median']:.3f} ({low:.3f} to {high:.3f}) |")
    lines += ["", "| closed form, 200 classes, 768 features | seconds |", "|---|---:|"]
    lines += [f"| {name} | {seconds} |" for name, seconds in values["closed forms, seconds"].items()]
    said = f"{values['processor']}, steps on one thread, closed forms on {values['threads of the closed forms']}"
    return "\n".join(lines) + f"\n\nMedians of {values['rounds']} rounds; {said}; commit `{values['commit'][:12]}`.\n"


def clap_costs(values: Mapping[str, Any]) -> str:
    """Return the Markdown table of what `benchmarks/clap_costs.py` wrote: a line for each number of classes."""
    names = list(values["rows"][0]["multiply_adds"])
    heads = [f"{name}, million multiply-adds" for name in names] + [f"{name}, times linear" for name in names[1:]]
    lines = [f"| classes | {' | '.join(heads)} |", f"|---:|{'---:|' * len(heads)}"]
    for row in values["rows"]:
        cells = [f"{row['multiply_adds'][name] / 1e6:,.1f}" for name in names]
        cells += [f"{row['times'][f'{name} / linear']['median']:.0f}" for name in names[1:]]
        lines.append(f"| {row['classes']} | {' | '.join(cells)} |")
    said = f"A step of {values['batch']} kept features, {values['tasks']} tasks, medians"
    return "\n".join(lines) + f"\n\n{said}; {values['processor']}, one thread; commit `{values['commit'][:12]}`.\n"


def prompt_costs(values: Mapping[str, Any]) -> str:
    """Return the Markdown table of what `benchmarks/lspt_costs.py` wrote: a line for each kind of prompts."""
    sizes = values["sizes"]
    lines = [f"| step against the bare tower's | {' | '.join(sizes)} |", f"|---|{'---:|' * len(sizes)}"]
    for pair in next(iter(sizes.values())):
        cells = [f"{found[pair]['median']:.2f}" for found in sizes.values()]
        lines.append(f"| {pair.removesuffix(' / bare')} | {' | '.join(cells)} |")
    said = f"Medians of {values['rounds']} rounds; {values['processor']}, one thread"
    return "\n".join(lines) + f"\n\n{said}; commit `{values['commit'][:12]}`.\n"


def votes(values: Mapping[str, Any]) -> str:
    """Return the Markdown table of what `benchmarks/votes.py` wrote: a line for each run, a column for each choice."""
    columns = list(dict.fromkeys((r["choice"], r["batch"], r["order"]) for run in values["runs"] for r in run["rows"]))
    columns = [column for column in columns if column[0] == "batch" or column[2] == "sorted"]  # alone, order is nothing
    titles = {"image": "each image for itself", "batch": "{} together, {}"}
    words = {"sorted": "of a class and task", "mixed": "in no order"}
    heads = [titles[choice].format(batch, words[order]) for choice, batch, order in columns]
    lines = [f"| method | on | seed | trained | {' | '.join(heads)} |", f"|---|---|---:|---|{'---:|' * len(columns)}"]
    for run in values["runs"]:
        found = {(row["choice"], row["batch"], row["order"]): row["accuracy"] for row in run["rows"]}
        trained = {"image": "each image for itself", "batch": "together"}[run["trained"]]
        cells = [f"{100 * found[column]:.1f}" for column in columns]
        lines.append(f"| {run['method']} | {run['stream']} | {run['seed']} | {trained} | {' | '.join(cells)} |")
    said = "Accuracy in percent on the test images of all tasks"
    return "\n".join(lines) + f"\n\n{said}; {values['hardware']}; commit `{values['commit']}`.\n"


def pool_costs(values: Mapping[str, Any]) -> str:
    """Return the Markdown table of what `benchmarks/pool_costs.py` wrote."""
    lines = ["| method | on | step | prediction | weights in memory |", "|---|---|---:|---:|---:|"]
    for size, found in values["sizes"].items():
        for name, share in found["weights"].items():
            pair = f"{name} / vpt-deep"
            cells = [
                f"{found[kind][pair]['median']:.2f}" if pair in found[kind] else "1" for kind in ("step", "prediction")
            ]
            lines.append(f"| {name} | {size} | {' | '.join(cells)} | {share:.3f} |")
    said = "Steps and predictions as multiples of vpt-deep's, weights as multiples of the frozen backbone's"
    tail = f"medians of {values['rounds']} rounds; {values['processor']}, one thread; commit `{values['commit'][:12]}`"
    return "\n".join(lines) + f"\n\n{said}; {tail}.\n"


def clip_costs(values: Mapping[str, Any]) -> str:
    """Return the Markdown tables of what `benchmarks/clip_costs.py` wrote: steps compared, and many texts read."""
    batch, size_of = values["images in a batch"], values["sizes"]
    lines = ["| one against the other | with | times as long (quartiles) |", "|---|---|---:|"]
    for size, found in size_of.items():
        for pair, ratio in found["ratios"].items():
            choices = found["choices in the batch"].get(pair.split(" / ")[-1])
            said = "" if choices is None else f" ({choices} different choices by {batch} images)"
            low, high = ratio["quartiles"]
            lines.append(f"| {pair}{said} | {size} | {ratio['median']:.1f} ({low:.1f} to {high:.1f}) |")
    bank = values["bank"]
    texts = bank["classes"] * bank["templates"]
    lines += [
        "",
        f"Reading {texts:,} texts, {bank['templates']} of each of {bank['classes']:,} classes, with clip-nano took ",
    ]
    lines[-1] += f"{bank['seconds']} s and {bank['more memory at the peak (MB)']} MB more than the model."
    said = f"batches of {batch} images; medians of {values['rounds']} rounds; towers in {values['towers in']}"
    tail = f"{values['processor']}, one thread, processor time; commit `{values['commit']}`"
    return "\n".join(lines) + f"\n\nTen classes in a task; {said}; {tail}.\n"


def transfer(values: Mapping[str, Any]) -> str:
    """Return the Markdown tables of what `benchmarks/transfer.py` wrote: one for each stream."""
    rows = list(values["rows"].values())
    backbones = sorted({row["backbone"] for row in rows})
    titles = [f"`{name}` (%)" for name in backbones]
    heads = ["method", *titles, "learned numbers", "training, s", "peak memory (MB)", "n"]
    said = []
    for stream in dict.fromkeys(row["stream"] for row in rows):
        here = [row for row in rows if row["stream"] == stream]
        said += [f"`{stream}`:", "", f"| {' | '.join(heads)} |", f"|---|{'---:|' * (len(heads) - 1)}"]
        for name in values["names"]:
            found = {row["backbone"]: row["records"] for row in here if row["name"] == name}
            runs = [run for records in found.values() for run in records]
            if not runs:
                continue
            cells = [
                str(spread([run["metrics"]["accuracy"] for run in found[backbone]])) if backbone in found else "–"
                for backbone in backbones
            ]
            cells += [f"{fmean(run['trainable_parameters'] for run in runs):,.0f}"]
            cells += [f"{fmean(sum(run['seconds']['train']) for run in runs):,.0f}"]
            cells += [f"{fmean(run['peak_memory_mb'] for run in runs):,.0f}"]
            count = listed(len(records) for records in found.values())
            said.append(f"| {name} | {' | '.join(cells)} | {count} |")
        missing = [name for name in values["names"] if name not in {row["name"] for row in here}]
        said += ["", f"Not yet run: {'; '.join(missing)}.", ""] if missing else [""]
    runs = [run for row in rows for run in row["records"]]
    shared = ", ".join(f"{name.replace('_', ' ')} {value}" for name, value in values["shared"].items())
    commits = listed(f"`{run['commit']}`" for run in runs)
    tail = f"{listed(run['hardware'] for run in runs)}; commit {commits}"
    said += [f"Mean ± sample standard deviation over n seeds of one choice of the rate; {shared}; {tail}."]
    return "\n".join(said) + "\n"


def listed(values: Iterable[Any]) -> str:
    """Return different values in a line, each once."""
    return " / ".join(dict.fromkeys(" ".join(show(value).split()) for value in values))


#: file of results -> what makes a table of it
SHOWN: dict[str, Callable[[Any], str]] = {
    "long-streams": long_streams,
    "heads": costs,
    "votes": votes,
    "clap-context": votes,
    "pool-costs": pool_costs,
    "clip-costs": clip_costs,
    "clap-costs": clap_costs,
    "lspt-costs": prompt_costs,
    "transfer": transfer,
}
