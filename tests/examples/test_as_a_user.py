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
def test_overlapped_data_parallel(tmp_path):
    options = ["--learning-rates=0.02", "--epochs=1", "--batch-size=400", "--seeds=1", "--out=out"]
    run = run_script("overlapped_data_parallel.py", *options, cwd=tmp_path)
    assert "| learning rate | synchronous | overlapped | compensated |" in run.stdout
    assert "0.02: the update of delay made no clear difference" in run.stdout  # one seed
    assert "10/10" in run.stderr
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert results["options"]["learning_rates"] == [0.02]
    accuracies = [runs[0][0] for runs in results["accuracies"].values()]
    assert len(set(accuracies)) == 3
    assert f"{100 * results['accuracies']['compensated'][0][0]:.1f} % |" in run.stdout
    assert (tmp_path / "out" / "accuracy.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
def test_pipeline_delay(tmp_path):
    options = ["--blocks=1", "--stages=2", "--updates=50", "--seeds=1", "--out=out"]
    options += ["--sgd-rates=0.1", "--adam-rates", "--methods=both"]
    run = run_script("pipeline_delay.py", *options, cwd=tmp_path)
    assert "2 stages, delays 1 to 0, 50 updates, 1 seeds" in run.stdout
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    (methods,) = results["curves"]["SGD"].values()
    losses = [runs[0][-1] for runs in methods.values()]
    assert max(losses) < 4  # it learns: a uniform guess costs 4.5
    assert len(set(losses)) == 3
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
