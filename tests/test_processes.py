"""Several processes: the same results as one."""

import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import (
    ROOT,
    TINY,
    history,
    report,
    rows,
    write_csv,
)
from safetensors.torch import load_file


def torchrun(n, *more):
    return subprocess.run(
        [
            sys.executable,
            "-m",
            "torch.distributed.run",
            "--nproc_per_node",
            str(n),
            str(ROOT / "distill.py"),
            *TINY,
            *more,
        ],
        capture_output=True,
        text=True,
    )


def losses(folder):
    return np.array([list(map(float, line.split(",")[1:4])) for line in history(folder)[1:]])


def test_run_in_several_processes_has_loss_curve_of_one(teacher, data, run):
    """49 texts in batches of 12.

    Of the last batch, of one text, two of three processes have nothing.
    """
    write_csv(data / "train.csv", rows("train", 49))
    options = ["--batch-size", "12", "--epochs", "4", "--patience", "1", "--learning-rate", "1e-2"]
    options += ["--dropout", "0.0"]  # each process would draw its own
    run(*options, "--output", "one", "--cache", "cache1")
    done = torchrun(3, *options, "--output", "three", "--cache", "cache3")
    assert done.returncode == 0, done.stderr
    assert losses("one") == pytest.approx(losses("three"), rel=1e-4, abs=1e-5)
    assert [line.split(",")[0] for line in history("one")] == [
        line.split(",")[0] for line in history("three")
    ]
    assert (
        done.stdout.count("labelled 81 texts") == 1 and done.stdout.count(" best\n") >= 1
    )  # one process speaks
    one, three = (load_file(f"{folder}/model.safetensors") for folder in ("one", "three"))
    for name in one:
        assert torch.allclose(one[name], three[name], rtol=1e-3, atol=1e-4), name
    assert report("three")["epochs"] == report("one")["epochs"]
    again = torchrun(
        2, *options, "--output", "three", "--cache", "cache3"
    )  # the same checkpoint, with fewer processes
    assert "labelled 0 texts" in again.stdout and "goes on after epoch" in again.stdout, (
        again.stderr
    )


def test_check_settings_in_several_processes_reports_once(teacher, data):
    done = torchrun(2, "--alpha", "7")
    assert (
        done.returncode
        and done.stderr.count("ALPHA = 7.0: must be") + done.stderr.count("ALPHA = 7: must be") == 1
    )
    assert "METHOD = 'rail': runs in one process" in torchrun(2, "--method", "rail").stderr
