"""Several processes: the same results as one."""

import os
import shutil
import socket
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import (
    TINY,
    history,
    outcome,
    report,
    rows,
    save_model,
    write_csv,
)
from fault_drill import Copy
from safetensors.torch import load_file
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

import distill


def losses(folder):
    return np.array([list(map(float, line.split(",")[1:4])) for line in history(folder)[1:]])


def test_run_in_several_processes_has_loss_curve_of_one(teacher, data, run):
    """49 texts in batches of 12.

    Of the last batch, of one text, two of three processes have nothing.
    """
    write_csv(data / "train.csv", rows("train", 49))
    options = ["--batch-size", "12", "--epochs", "4", "--patience", "1", "--learning-rate", "1e-2"]
    options += ["--dropout", "0.0", "--word-dropout", "0"]  # each process would draw its own
    run(*options, "--output", "one", "--cache", "cache1")
    of_three = [*options, "--output", "three", "--cache", "cache3"]
    ended = in_processes(3, ["."] * 3, [of_three] * 3)
    assert [status for status, _ in ended] == [0, 0, 0], ended
    assert losses("one") == pytest.approx(losses("three"), rel=1e-4, abs=1e-5)
    assert [line.split(",")[0] for line in history("one")] == [
        line.split(",")[0] for line in history("three")
    ]
    assert "labelled 81 texts" in ended[0][1] and " best\n" in ended[0][1]
    assert [said for _, said in ended[1:]] == ["", ""]  # one process speaks
    one, three = (load_file(f"{folder}/model.safetensors") for folder in ("one", "three"))
    for name in one:
        assert torch.allclose(one[name], three[name], rtol=1e-3, atol=1e-4), name
    assert report("three")["epochs"] == report("one")["epochs"]
    # the same checkpoint, with fewer processes
    (status, said), (other_status, _) = in_processes(2, ["."] * 2, [of_three] * 2)
    assert (status, other_status) == (0, 0), said
    assert "labelled 0 texts" in said and "goes on after epoch" in said


def test_run_under_torchrun(teacher, data):
    """torchrun's own launcher, but with copies of this process in place of new ones."""
    rendezvous = {"rdzv_backend": "c10d", "rdzv_endpoint": "localhost:0"}
    config = LaunchConfig(1, 1, 2, run_id="test", start_method="fork", **rendezvous)

    def run_rank(arguments):
        distill.PartialState._reset_state()  # that of runs before, in this process
        distill.main(arguments)

    launch = elastic_launch(config, run_rank)
    status, said = Copy(launch, [*TINY, "--epochs", "1"]).end()
    assert status == 0, said
    assert said.count("labelled 80 texts") == 1 and report()["epochs"] == 1


def test_check_settings_in_several_processes_reports_once(teacher, data):
    ended = in_processes(2, [".", "."], [["--alpha", "7"]] * 2)
    assert "ALPHA = 7: must be" in ended[0][1] and "ALPHA" not in ended[1][1]
    assert all(status for status, _ in ended)


def test_option_faults_refuse_methods_in_several_processes(settings):
    settings.setattr(distill, "world_size", lambda: 2)
    settings.setattr(distill, "METHOD", "rail")
    assert any("METHOD = 'rail': needs" in fault for fault in distill.option_faults())
    settings.setattr(distill, "METHOD", "mse")
    assert not [*distill.option_faults()]


# ── Machines without a shared disk: here two folders, each with settings of its own ──


def in_processes(n_processes, folders, options):
    """Run the script in several processes, as torchrun starts them, but without new imports.

    folders, options: of each process. Returns (exit status, what it said) of each.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]

    def run_rank(number):
        os.environ |= {
            "RANK": str(number),
            "LOCAL_RANK": str(number),
            "WORLD_SIZE": str(n_processes),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
        }
        distill.PartialState._reset_state()
        os.chdir(folders[number])
        distill.main([*TINY, *options[number]])

    copies = [Copy(run_rank, number) for number in range(n_processes)]
    return [copy.end() for copy in copies]


def two_machines(first, second):
    """Run the script in the folder first, and in two processes in the folder second."""
    return in_processes(3, ["first", "second", "second"], [first, second, second])


def test_made_teacher_reaches_other_machine(data, run, monkeypatch):
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
    assert [status for status, _ in ended] == [0, 0, 0], ended
    assert report("first/distilled_model")["epochs"] == 1
    assert sorted(os.listdir("first")) == [
        ".distill_cache",
        "base",
        "data",
        "distilled_model",
        "finetuned_bert_japanese",
    ]
    # nothing is left there, and its CACHE can be used by a run on that machine
    assert not [path for path in Path("second/deep").rglob("*") if path.is_file()]
    monkeypatch.chdir("second")
    run("--data", "texts", "--teacher-base", "b", "--cache", "deep/cache", "--epochs", "1")


def test_check_same_in_all_processes_refuses_machine_with_other_texts(teacher, data):
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


def test_check_same_settings_refuses_other_settings_but_not_other_folders(settings):
    def check(**of_other):
        """Compare this process's settings with those of another that has `of_other`, too."""
        gathered = []
        settings.setattr(distill, "gather_object", lambda own: gathered.extend(own) or own)
        with settings.context() as patch:
            for name, value in of_other.items():
                patch.setattr(distill, name, value)
            assert outcome(distill.check_same_settings) is None
        settings.setattr(distill, "gather_object", lambda own: [*gathered, *own])
        return outcome(distill.check_same_settings)

    settings.setattr(distill, "world_size", lambda: 2)
    assert check(DATA="elsewhere", CACHE="there", TEACHER="./mine") is None
    assert "differ in their SEED, ALPHA." in str(check(ALPHA=0.7, SEED=7))
    assert "differ in their UNLABELED." in str(check(UNLABELED="more.txt"))
    assert "differ in their STUDENT_INIT." in str(check(STUDENT_INIT="random"))


def test_join_processes_says_what_to_check(monkeypatch):
    def refuse(**_):
        raise RuntimeError("Unable to find address for: eth0")

    monkeypatch.setattr(distill, "PartialState", refuse)
    message = str(outcome(distill.join_processes))
    assert "address for: eth0" in message and "GLOO_SOCKET_IFNAME" in message
