"""The scripts under examples/ as a user runs them, with few updates. The other tests are faster."""

import json
import re

import numpy as np
import pytest
from example_cases import run_script


@pytest.mark.slow
def test_linen_train_state_resumes(tmp_path):
    saved, final, resumed = run_script("linen_train_state.py", cwd=tmp_path).stdout.splitlines()
    assert float(final.split()[-1]) < float(saved.split()[3].rstrip(","))
    assert resumed.endswith("the same parameters and optimizer state, bit for bit")
    assert not list(tmp_path.iterdir())  # the checkpoint was temporary


@pytest.mark.slow
def test_train_flax(tmp_path):
    options = ["--epochs=1", "--batch-size=80", "--seeds=2", "--delay=3", "--out=out"]
    run = run_script("train_flax.py", *options, cwd=tmp_path)
    table = re.findall(r"^(fresh|stale|compensated) .*", run.stdout, re.MULTILINE)
    assert table == ["fresh", "stale", "compensated"]
    assert "seed 1" in run.stdout
    assert "100/100" in run.stderr  # the progress bars'
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    final = {
        name: [curves["test accuracy"][-1] for curves in runs]
        for name, runs in results["curves"].items()
    }
    assert min(final["fresh"]) > 0.5
    assert final["fresh"] != final["stale"] != final["compensated"]


@pytest.mark.slow
def test_train_flax_without_delay_and_where_it_diverges(tmp_path):
    small = ["--epochs=1", "--batch-size=80", "--seeds=1", "--out=out"]
    run_script("train_flax.py", *small, "--delay=0", cwd=tmp_path)
    curves = json.loads((tmp_path / "out" / "results.json").read_text())["curves"]
    assert curves["fresh"] == curves["stale"] == curves["compensated"]
    # Stale gradients do well at this rate; a huge constant lamda without a limit blows up.
    options = ["--learning-rate=0.03", "--lamda=1e6", "--decay=none", "--clip=none"]
    run = run_script("train_flax.py", *small, *options, cwd=tmp_path)
    assert re.search(r"^compensated +1 of 1 diverged +diverged$", run.stdout, re.MULTILINE)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("script", "options"),
    [
        ("overlapped_data_parallel.py", ["--updates=20", "--batch-size=400", "--sgd-rates=0.02"]),
        ("pipeline_delay.py", ["--updates=50", "--blocks=1", "--stages=2", "--sgd-rates=0.1"]),
    ],
)
def test_stale_gradients_on_several_devices(script, options, tmp_path):
    """The CNN and the transformer themselves: they learn, and each method learns otherwise."""
    options += ["--quick", "--seeds=1", "--muon-rates", "--out=out"]
    run = run_script(script, *options, cwd=tmp_path)
    assert (tmp_path / "out" / "tables.md").read_text() in run.stdout
    rows = [line.split(" | ") for line in run.stdout.splitlines() if line.startswith("| ")]
    assert {"| fresh", "| stale"} < {row[0] for row in rows}
    cells = (tmp_path / "out" / "cells.jsonl").read_text().splitlines()
    losses = [json.loads(cell)["curves"]["loss"][0][-1] for cell in cells]
    assert len({*losses}) == 3
    # A guess costs 2.3 nats among ten digits, and 4.5 among the characters.
    assert max(losses) < (4 if script == "pipeline_delay.py" else 1.5)
    assert (tmp_path / "out" / "curves.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
def test_compare_async(tmp_path):
    options = ["--quick", "--workers", "1", "2", "--methods", "SGD", "ASGD", "--seeds", "2"]
    options += ["--pushes", "50", "--learning-rates", "0.2", "1e30", "--out=new/folder"]
    run = run_script("compare_async.py", *options, cwd=tmp_path)
    out = tmp_path / "new" / "folder"
    assert "4/4" in run.stderr
    assert (out / "tables.md").read_text() in run.stdout
    cells = [json.loads(line) for line in (out / "cells.jsonl").read_text().splitlines()]
    assert [np.shape(cell["test_error"]) for cell in cells] == [(2, 2)] * 4
