"""The tables that users read say what the committed results say."""

import csv
import importlib
import importlib.util
import json
import os
import pathlib
import re

import numpy as np
import pytest
from example_cases import load

ROOT = pathlib.Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results"


def page(name):
    return (ROOT / name).read_text()


def results(name):
    return json.loads((RESULTS / name).read_text())


def benchmark(name, monkeypatch):
    """The script of that name, as a module; what it sets in the environment is undone."""
    monkeypatch.setattr(os, "environ", dict(os.environ))
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    spec = importlib.util.spec_from_file_location(name, ROOT / "benchmarks" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_table_of_the_readme():
    """Test errors of compare_async.py, and pushes to the target over those of stale gradients."""

    def found(table, column):
        file = RESULTS / "compare_async" / "mnist" / f"{table}.csv"
        rows = csv.DictReader(file.read_text().splitlines())
        return {
            (row["method"], row["workers"]): float(row[column] or "nan")
            for row in rows
            if row["momentum"] == "0"
        }

    errors = found("test_error", "test_error_mean")
    pushes = found("pushes_to_target", "pushes_to_target_mean")
    names = {
        "stale gradients as they are": "ASGD",
        "the step divided by √τ": "lr/sqrt-tau",
        "MXNet's default, `lamda=0.04`": "DC-c",
        "`add_delay_compensation()`": "DC-a-clipped",
        "`robust_delay_compensation()`": "robust",
    }
    for name, method in names.items():
        cells = []
        for m in ("8", "16", "32"):
            ratio = f" ({pushes[method, m] / pushes['ASGD', m]:.2f})" if method != "ASGD" else ""
            cells.append(f"{100 * errors[method, m]:.1f} %{ratio}")
        row = f"| {name} | {' | '.join(cells)} |"
        assert row in page("README.md"), row


def tables(text):
    """The rows of each table, without its two lines of heads."""
    blocks = re.findall(r"(?:^\|.*\n)+", text, re.MULTILINE)
    return [frozenset(block.splitlines()[2:]) for block in blocks]


def linked(pattern, text):
    """The result files that a page links to."""
    names = re.findall(rf"benchmarks/results/({pattern})\)", text)
    assert names, pattern
    return names


@pytest.mark.parametrize(
    ("script", "result", "where"),
    [
        ("update", "update-cpu-epyc-jax-0.10.2.json", "docs/speed.md"),
        ("tpu_compile", "tpu-compile-jax-0.12.json", "docs/speed.md"),
        ("gpu", "gpu-h200-jax-0.11.2.json", "docs/speed.md"),
        ("state_memory", "state-memory.json", "docs/spmd.md"),
    ],
)
def test_a_table_is_what_its_script_prints(script, result, where, monkeypatch):
    text = page(where)
    assert f"benchmarks/results/{result}" in text
    table = benchmark(script, monkeypatch).table(results(result))
    rows = [line for line in table.splitlines() if line.startswith("|")]
    assert len(rows) > 4
    for row in rows:
        assert row in text


def test_the_ratios_of_other_runs():
    """A column a file, in the order in which they are linked."""
    section = page("docs/speed.md").partition("Other runs on machines")[2].partition("\n## ")[0]
    cases = [results(name)["cases"] for name in linked(r"update-cpu-[\w.-]+?\.json", section)]
    columns = [c["one array of 16.8 M"] for c in cases if "one array of 16.8 M" in c]
    rows = re.findall(r"^\| `([^`]+)` \| (.*) \|$", section, re.MULTILINE)
    assert len(rows) > 5
    for name, cells in rows:
        expected = [f"{c[name]['ratio']:.2f}" if name in c else "–" for c in columns]
        assert cells.split(" | ") == expected, name


def test_the_speed_of_the_parameter_server():
    for case, digits in (("16.8 M parameters, 2 workers", 0), ("1,000 parameters, 4 workers", 1)):
        figures = results("parameter-server-ray-2.60.json")["speed"][case]
        medians, ratios = figures["milliseconds a push"], figures["ratio"]
        train, rounds = medians.pop("train"), figures["rounds"]["train"]
        cells = [f"{ms:.{digits}f} ({ratios[name]:.1f})" for name, ms in medians.items()]
        ours = f"{train:.{digits}f} ({min(rounds):.{digits}f} to {max(rounds):.{digits}f})"
        row = f"| {case} | {' | '.join(cells)} | {ours} |"
        assert row in page("docs/parameter_server.md"), row


@pytest.mark.parametrize("study", ["quick", "digits", "mnist"])
def test_the_tables_and_sentences_of_compare_async(study):
    text = set(page("docs/asynchronous.md").splitlines())
    lines = (RESULTS / "compare_async" / study / "tables.md").read_text().splitlines()
    made = [line for line in lines if line.startswith(("| ", "- ", "Staleness", "Stable"))]
    assert len(made) > 30
    for line in made:
        assert line in text, line


@pytest.mark.parametrize("study", ["digits", "mnist"])
def test_the_table_of_async_prediction(study, monkeypatch):
    load("compare_async")  # on which the script builds, with the module `common` of the examples
    files = [RESULTS / "async_prediction" / study / name for name in ("grid.csv", "test_error.csv")]
    rows = [list(csv.DictReader(file.read_text().splitlines())) for file in files]
    table = benchmark("async_prediction", monkeypatch).table(*rows)
    assert f"\n{table}\n" in page("docs/asynchronous.md")


@pytest.mark.parametrize(
    ("heading", "study", "rows"),
    [
        ("Digits", "digits", 40),
        ("Steps by speed, digits", "digits", 20),
        ("Steps by speed, MNIST", "mnist", 12),
        ("Text", "characters", 60),
        ("MNIST", "mnist", 60),
    ],
)
def test_the_tables_of_local_steps(heading, study, rows):
    section = re.split(
        r"\n##", page("docs/local_steps_measured.md").partition(f"\n## {heading}")[2]
    )[0]
    files = (RESULTS / "local_steps" / study).rglob("tables.md")
    made = [table for file in files for table in tables(file.read_text())]
    found = tables(section)
    assert sum(map(len, found)) >= rows
    for table in found:  # its rows are of one table; some have fewer methods
        assert any(table <= whole for whole in made), table


def test_the_counts_of_the_guide_to_local_steps():
    """In how many of 24 cases a method at one outer rate is as good as a barrier at its best."""

    def good(study, barrier, method):
        text = (RESULTS / "local_steps" / study / "tables.md").read_text()
        section = text.partition(f"## One outer rate for all, against {barrier}")[2]
        rates = re.search(r"\| outer rate +\|(.*)\|", section)[1].split("|")
        cells = re.search(rf"\| {method} +\|(.*)\|", section)[1].split("|")
        assert all(cell.strip().endswith("of 24") for cell in cells)
        return {float(r): int(cell.split()[0]) for r, cell in zip(rates, cells, strict=True)}

    studies = ("digits", "mnist", "characters")
    robust = [good(study, "SSGD", "robust") for study in studies]
    rows = {
        "robust at 0.25, 0.5, 1": [f"{r[0.25]}, **{r[0.5]}**, {r[1]}" for r in robust],
        "ASGD at the one rate": [max(good(s, "SSGD", "ASGD").values()) for s in studies],
        "robust at 0.5": [good(s, "DiLoCo", "robust")[0.5] for s in studies],
        "DiLoCo at 0.5": [good(s, "SSGD", "DiLoCo")[0.5] for s in studies],
    }
    for name, cells in rows.items():
        (row,) = re.findall(rf"^\| {name}[ :].*", page("docs/local_steps.md"), re.MULTILINE)
        assert row.endswith("| " + " | ".join(map(str, cells)) + " |"), row


def test_the_speed_of_steps_by_speed():
    cases = results("steps-by-speed-ray-2.60.json")["cases"]
    rates = [round(case["batches a second"]) for case in cases.values()]
    assert [*cases] == [f"{m}, {s}" for m in ("sync", "async") for s in ("equal", "by speed")]
    words = "behind a barrier {} batches a second with equal steps and {} by speed, "
    words += "without one {} and {}"
    assert words.format(*rates) in " ".join(page("docs/local_steps.md").split())


ROBUST = {  # the rows' names in the page
    "`robust_delay_compensation()`": "robust",
    "the step divided by √τ": "lr/√τ",
    "Gap-Aware": "gap-aware",
    "stale gradients as they are": "asgd",
}


def test_the_figures_of_robust():
    text = page("docs/asynchronous.md")
    found = results("robust-search.json")["digits, seeds 400 to 407"]["results"]
    for name, method in ROBUST.items():
        plain, momentum = found[method].values()

        def good(cells, few):
            return sum(
                error < 0.05
                for m, cell in cells.items()
                if (4 <= int(m) <= 64) == few
                for error in cell["metric"]
            )

        counts = [good(plain, True), good(momentum, True), good(plain, False)]
        assert f"| {name} | {counts[0]} | {counts[1]} | {counts[2]} and " in text, name
        assert f"| {counts[2]} and {good(momentum, False)} |" in text, name
        cells = []
        for inner, m in (("plain", "8"), ("plain", "32"), ("momentum", "8"), ("momentum", "32")):
            index = ("plain", "momentum").index(inner)
            best, of_asgd = (
                min(list(found[which].values())[index][m]["pushes to target"])
                for which in (method, "asgd")
            )
            ratio = "" if method == "asgd" else f" ({best / of_asgd:.2f})"
            cells.append(f"{best:.0f}{ratio}")
        row = f"| {name} | {' | '.join(cells)} |"
        assert row in text.replace(" *", ""), row


@pytest.mark.parametrize("rate", ["0.02", "0.05", "0.1", "0.2", "0.4"])
def test_the_figures_of_train_flax(rate):
    curves = results(f"train_flax/learning_rate_{rate}.json")["curves"]
    final = [
        100 * np.array([run["test accuracy"][-1] for run in curves[method]])
        for method in ("fresh", "stale", "compensated")
    ]
    text = page("docs/measured.md")
    if rate == "0.2":  # the default
        for accuracy in final:
            assert f"| {accuracy.mean():.1f} ± {accuracy.std(ddof=1):.1f} % |" in text
    else:
        row = " | ".join(f"{accuracy.mean():.1f} %" for accuracy in final)
        assert f"| `--learning-rate {rate}` | {row} |" in text


@pytest.mark.slow
def test_each_figure_is_drawn_and_shown(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "docs")
    figures = importlib.import_module("figures")
    figures.main(["--out", str(tmp_path)])
    drawn = {path.name for path in tmp_path.glob("*.svg")}
    assert drawn == {path.name for path in (ROOT / "docs" / "figures").iterdir()}
    text = "".join(path.read_text() for path in (ROOT / "docs").glob("*.md"))
    assert drawn <= {*re.findall(r"\(figures/(\w+\.svg)\)", text)}


@pytest.mark.parametrize("name", ["README.md", "CONTRIBUTING.md"])
def test_what_the_pages_outside_the_manual_link_to_is_there(name):
    targets = re.findall(r"\]\((?!https?:)([^)#]+)(?:#([^)]+))?\)", page(name))
    assert targets
    for path, anchor in targets:
        assert (ROOT / path).exists(), path
        if anchor:
            headings = re.findall(r"^#+ (.*)$", page(path), re.MULTILINE)
            assert anchor in [heading.lower().replace(" ", "-") for heading in headings], anchor


PUBLISHED = "## What others have published"


def test_the_tables_of_published_ideas():
    """Of pipeline_ideas.py: the validation loss at the end, mean ± standard deviation."""
    lines = (RESULTS / "pipeline_ideas" / "cells.jsonl").read_text().splitlines()
    final = {
        tuple(entry["name"].values()): [run[-1] for run in entry["curves"]["loss"]]
        for entry in map(json.loads, lines)
    }
    section = page("docs/pipelines_measured.md").partition(PUBLISHED)[2].partition("\n## ")[0]
    tables = re.findall(r"(?:^\|.*\n)+", section, re.MULTILINE)
    assert len(tables) == 3
    for head, _, *rows in map(str.splitlines, tables):
        columns = re.findall(r"(\d+) stages, (\w+) at ([\d.]+)", head)
        assert len(columns) > 2
        assert len(rows) > 3
        for row in rows:
            method, *cells = row.strip("| ").split(" | ")
            for (stages, optimizer, rate), cell in zip(columns, cells, strict=True):
                losses = final.get((int(stages), optimizer, method, float(rate)))
                words = f"{np.mean(losses):.3f} ± {np.std(losses, ddof=1):.3f}" if losses else "–"
                assert cell == words, (method, stages, optimizer)


@pytest.mark.parametrize(
    ("script", "folder", "where", "heading"),
    [
        ("overlapped_data_parallel", None, "docs/spmd.md", "### What it costs in accuracy"),
        ("pipeline_delay", "pipeline_ideas", "docs/pipelines.md", "## What it gives back"),
        ("pipeline_delay", None, "docs/pipelines_measured.md", "# Measured: pipelines"),
    ],
)
def test_a_table_of_cells_is_what_the_example_prints(script, folder, where, heading, monkeypatch):
    module, methods, report = map(load, (script, "stale_methods", "stale_report"))
    monkeypatch.setitem(methods.METHODS, "strong+momentum-up", ())  # of pipeline_ideas.py
    printed = []
    for file in (RESULTS / (folder or script)).rglob("cells.jsonl"):
        entries = [json.loads(line) for line in file.read_text().splitlines()]
        cells = methods.Grid(file, entries[0]["settings"]).finished([e["name"] for e in entries])
        cells = [cell for cell in cells if cell["optimizer"] in methods.OPTIMIZERS]
        updates = module.EVALUATE_EVERY * np.arange(1, 1 + cells[0]["loss"].shape[1])
        printed += [
            report.tables(name, of, updates, module.MEASURE) for name, of, _ in report.groups(cells)
        ]
        printed.append(report.overview(cells, updates, module.MEASURE))
    section = page(where).partition(heading)[2]
    if heading.startswith("# "):  # but for the tables of the test above
        section = re.sub(rf"{PUBLISHED}.*?\n## ", "", section, flags=re.DOTALL)
    else:
        section = section.partition("\n## ")[0]
    made, found = tables("\n\n".join(printed) + "\n"), tables(section)
    assert sum(map(len, found)) > 2
    for table in found:
        assert any(table <= whole for whole in made), table
