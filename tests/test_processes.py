"""Several processes: the same results as one."""

import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import (
    ROOT,
    TINY,
    history,
    outcome,
    report,
    rows,
    save_model,
    write_csv,
)
from safetensors.torch import load_file

import distill


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


def test_option_faults_refuse_methods_in_several_processes(settings):
    settings.setattr(distill, "world_size", lambda: 2)
    settings.setattr(distill, "METHOD", "rail")
    assert any("METHOD = 'rail': runs in one process" in one for one in distill.option_faults())
    settings.setattr(distill, "METHOD", "mse")
    assert distill.option_faults() == []


# ── Machines without a shared disk: here two folders, each with settings of its own ──


def two_machines(first, second):
    """Run the script in the folder first, and in two processes in the folder second.

    first, second: their options. Returns (exit status, what it said) of each.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    machines = []
    for number, (folder, options) in enumerate({"first": first, "second": second}.items()):
        machine = subprocess.Popen(
            [
                *(sys.executable, "-m", "torch.distributed.run", "--nnodes", "2"),
                *("--node_rank", str(number), "--nproc_per_node", str(number + 1)),
                *("--master_addr", "127.0.0.1", "--master_port", str(port)),
                *(str(ROOT / "distill.py"), *TINY, *options),
            ],
            cwd=folder,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        machines.append(machine)
    said = [machine.communicate()[0] for machine in machines]
    return [(machine.returncode, text) for machine, text in zip(machines, said, strict=True)]


def test_share_teacher_brings_made_teacher_to_other_machine(data, run, monkeypatch):
    save_model("base")
    for source, *copies in (
        ("data", "first/data", "second/texts"),
        ("base", "first/base", "second/b"),
    ):
        for folder in copies:
            shutil.copytree(source, folder)
    both = ["--teacher-base", "base", "--teacher-epochs", "1", "--epochs", "1"]
    other_folders = ["--data", "texts", "--teacher-base", "b", "--teacher", "deep/made"]
    ended = two_machines(both, [*both, *other_folders, "--cache", "deep/cache"])
    assert [status for status, _ in ended] == [0, 0], ended
    made = Path("first/finetuned_bert_japanese")
    assert sorted(os.listdir("second/deep/made")) == sorted(os.listdir(made))
    for path in made.iterdir():
        assert Path("second/deep/made", path.name).read_bytes() == path.read_bytes()
    # nothing else is left there, and its CACHE can be used by a run on that machine
    assert sorted(os.listdir("second")) == ["b", "deep", "texts"]
    assert sorted(os.listdir("second/deep")) == ["cache", "made"]
    assert sorted(os.listdir("second/deep/cache")) == ["CACHEDIR.TAG", "lock"]
    monkeypatch.chdir("second")
    run("--data", "texts", "--teacher", "deep/made", "--cache", "deep/cache", "--epochs", "1")


def test_check_same_refuses_machine_with_other_texts(teacher, data):
    """Its answers would go into the cache as those to the first machine's texts."""
    shutil.copytree("data", "first/data")
    shutil.copytree(teacher, Path("first", teacher))
    shutil.copytree("data", "second/data")
    write_csv(Path("second/data/train.csv"), rows("train", 48)[::-1])
    for status, said in two_machines([], []):
        assert (
            status and "the processes differ in their texts or tokenizers (seen in train)" in said
        )
    assert not [*Path("first/.distill_cache").glob("teacher-*.pt")]
    weights = Path(teacher, "model.safetensors")  # the second machine has got the teacher
    assert Path("second", weights).read_bytes() == weights.read_bytes()


def test_check_same_settings_refuses_other_settings_but_not_other_folders(settings):
    def check(**of_other):
        settings.setattr(distill, "gather_from_all", lambda own: [own, own | of_other])
        return outcome(distill.check_same_settings)

    assert check() is None
    assert "different settings: ALPHA." in str(check(ALPHA=0.7))
    assert "different settings: UNLABELED." in str(check(UNLABELED=False))  # is not None there
    assert "different settings: STUDENT_INIT." in str(check(STUDENT_INIT="random"))


def test_join_processes_says_what_to_check(monkeypatch):
    def refuse(**_):
        raise RuntimeError("Unable to find address for: eth0")

    monkeypatch.setattr(distill, "PartialState", refuse)
    with pytest.raises(SystemExit, match="address for: eth0. If GLOO_SOCKET_IFNAME is set, it"):
        distill.join_processes()


def test_refuse_teacher_elsewhere_names_process(settings):
    settings.setattr(distill, "gather_from_all", lambda is_there: [is_there, True])
    assert "process 1 already has one" in str(outcome(distill.refuse_teacher_elsewhere))
