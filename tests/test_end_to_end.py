"""Whole runs: what they write, whether they repeat, what they need."""

import json
import math
import os
import re
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import (
    MODEL,
    ROOT,
    SAMPLE,
    TINY,
    history,
    in_child,
    report,
    rows,
    save_model,
    script,
    write_csv,
)
from fault_drill import Copy
from transformers import BertForSequenceClassification

import distill


def test_run_writes_every_file_the_readme_names(teacher, data, run, draws):
    printed = run()
    assert {file.name for file in Path("distilled_model").iterdir()} == {
        "model.safetensors",
        "config.json",
        "tokenizer_config.json",
        "vocab.txt",
        "README.md",
        "report.json",
        "history.csv",
        "loss.png",
        "predictions.csv",
        "cascade.png",
    }
    assert sorted(os.listdir()) == [
        ".distill_cache",
        "data",
        "distilled_model",
        "finetuned_bert_japanese",
    ]
    assert not Path(".distill_cache/distill_tmp").exists()

    result = report()
    assert set(result) == {
        "teacher",
        "student",
        "kept",
        "kept_interval",
        "speedup",
        "epochs",
        "best_epoch",
        "seconds",
        "settings",
        "versions",
        "hardware",
        "files",
        "cascade",
    }
    assert result["files"] == sorted(file.name for file in Path("distilled_model").iterdir())
    for role in "teacher", "student":
        assert {*result[role]} - {"name"} == {
            "parameters",
            "bytes",
            "splits",
            "labels",
            "confusion",
        }
        assert {
            split: figures["examples"] for split, figures in result[role]["splits"].items()
        } == {"train": 48, "val": 16, "test": 16}
        for figures in result[role]["splits"].values():
            assert set(figures) == {
                "examples",
                "accuracy",
                "macro_f1",
                "agreement",
                "kl",
                "seconds",
                "texts_per_second",
            }
            assert figures["seconds"] > 0 and math.isclose(
                figures["texts_per_second"], figures["examples"] / figures["seconds"]
            )
    test = {role: result[role]["splits"]["test"] for role in ("teacher", "student")}
    assert result["kept"] == test["student"]["accuracy"] / test["teacher"]["accuracy"]
    assert result["speedup"] == test["teacher"]["seconds"] / test["student"]["seconds"]
    assert test["teacher"]["agreement"] == 1
    assert result["student"]["bytes"] == MODEL.stat().st_size
    assert result["epochs"] == len(history()) - 1
    columns = [list(map(float, line.split(","))) for line in history()[1:]]
    best = max(columns, key=lambda epoch: (epoch[3], -epoch[2]))  # accuracy, then loss
    assert result["best_epoch"] == best[0]

    assert "(0): BertLayer(" in printed and "(1): BertLayer(" not in printed
    assert printed.count("BertForSequenceClassification(") == 1
    student, full = (
        BertForSequenceClassification.from_pretrained(folder)
        for folder in ("distilled_model", teacher)
    )
    assert (
        f"{student.num_parameters():,} parameters on cpu; the teacher has {full.num_parameters():,}"
        in printed
    )
    assert result["student"]["parameters"] == student.num_parameters()
    assert Path("distilled_model/loss.png").read_bytes()[:4] == b"\x89PNG"


# ── Reproducible ──


def test_run_gives_same_bytes_for_same_seed(teacher, data, run):
    found = []
    for seed in "1", "1", "2":
        run("--cache", f"cache{len(found)}", "--seed", seed)
        found.append((MODEL.read_bytes(), history()))
    assert found[0] == found[1] != found[2]


GUARD = """
import runpy, socket, sys
def refuse(*given, **more):
    open("network", "a").write(repr(given))
    raise OSError("no network in this test")
socket.socket.connect = socket.socket.connect_ex = refuse
socket.getaddrinfo = socket.create_connection = refuse
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def test_run_gives_same_bytes_in_another_process_and_nothing_personal(data, run, tmp_path):
    """There on a terminal of ASCII alone, without a network, in the folder of a user."""
    home = tmp_path / "users" / "taro-yamada"
    teacher = save_model(home / "mine", labels=("低評価", "高評価"))
    for split in "train", "val", "test":
        table = [
            (text, "高評価" if label == "positive" else "低評価") for text, label in rows(split, 16)
        ]
        write_csv(data / f"{split}.csv", table)
    run("--teacher", str(teacher), "--output", "here", "--cache", "cache1")

    arguments = ["--teacher", teacher, "--data", data.resolve()]
    arguments += ["--output", home / "out", "--cache", home / "cache"]
    environment = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(("HF_", "TRANSFORMERS_"))
    }
    environment |= {"HOME": str(home), "USER": "taro-yamada", "LOGNAME": "taro-yamada"}
    done = subprocess.run(
        [sys.executable, "-c", GUARD, *script(*map(str, arguments))[1:]],
        env=environment | {"PYTHONIOENCODING": "ascii"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    there = home / "out"
    assert Path("here/model.safetensors").read_bytes() == (there / MODEL.name).read_bytes()
    assert history("here") == history(there)
    assert report(there)["hardware"].endswith(", 1 thread")

    assert not Path("network").exists()
    written = [
        path for folder in ("out", "cache") for path in (home / folder).rglob("*") if path.is_file()
    ]
    assert len(written) > 10
    for path in written:
        assert b"taro-yamada" not in path.read_bytes(), path


# ── The terminal and the packages ──


def test_main_ends_in_one_message_on_closed_pipe(teacher, data):
    def with_closed_pipe():  # as by | head -1
        read_end, write_end = os.pipe()
        os.close(read_end)
        os.dup2(write_end, 1)
        sys.stdout = open(1, "w", buffering=1)
        with pytest.raises(SystemExit) as exit:
            distill.main(TINY)
        sys.stdout.flush()  # as Python does at its end
        Path("message").write_text(exit.value.code)

    assert in_child(with_closed_pipe) == 0
    assert "Broken pipe" in Path("message").read_text()


def test_run_names_missing_package(tmp_path):
    """The first mistake of all: pip install forgotten."""
    shutil.copy(ROOT / "distill.py", tmp_path)
    (tmp_path / "datasets.py").write_text(
        "raise ModuleNotFoundError(\"No module named 'datasets'\")"
    )
    done = subprocess.run(
        [sys.executable, "distill.py"], cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 1 and done.stderr.strip().endswith("pip install -r requirements.txt")
    assert "Traceback" not in done.stderr


def test_run_names_python_version_that_is_too_old():
    program = "import runpy, sys; sys.version_info = (3, 10); runpy.run_path(sys.argv[1])"
    done = subprocess.run(
        [sys.executable, "-c", program, str(ROOT / "distill.py")], capture_output=True, text=True
    )
    assert done.returncode == 1 and "needs Python 3.11 or newer; this is" in done.stderr


def test_run_refuses_python_without_docstrings():
    done = subprocess.run(
        [sys.executable, "-OO", str(ROOT / "distill.py")], capture_output=True, text=True
    )
    assert done.returncode == 1 and done.stderr.startswith("distill.py: transformers needs")


# ── Scale ──


WATCHED = """
import os, sys, threading, time
sys.path.insert(0, sys.argv.pop(1))
import distill

peak = 0
def look():
    global peak
    while True:
        with open("/proc/self/status") as file:
            peak = max(peak, int(file.read().split("RssAnon:")[1].split()[0]))
        time.sleep(0.01)

for folder in "few", "many":  # each in a copy, so that they begin alike and import once
    if os.fork() == 0:
        os.chdir(folder)
        threading.Thread(target=look, daemon=True).start()
        distill.main()
        with open("peak", "w") as file:
            file.write(str(1024 * peak))
        os._exit(0)
    os.wait()
"""


def test_run_memory_does_not_grow_with_texts():
    """Of 10,000 texts more, of 30 tokens each, a run holds no more than 400 bytes a text.

    These are numbers and keys, not the texts.
    """
    texts = [text for split in ("train", "val", "test") for text, _ in rows(split, None)]
    teacher = save_model("teacher", hidden_size=16, num_hidden_layers=1)
    for folder, n in ("few", 1_000), ("many", 11_000):
        draw = np.random.default_rng(0)
        Path(folder, "data").mkdir(parents=True)
        for split, size in ("train", n), ("val", 500), ("test", 500):
            pairs = draw.integers(len(texts), size=(size, 2))
            table = [(texts[a] + texts[b], a % 2) for a, b in pairs]
            write_csv(f"{folder}/data/{split}.csv", table)
    options = [*TINY, "--teacher", f"../{teacher}", "--epochs", "1", "--batch-size", "128"]
    done = subprocess.run([sys.executable, "-c", WATCHED, str(ROOT), *options], capture_output=True)
    assert done.returncode == 0, done.stderr
    few, many = (int(Path(folder, "peak").read_text()) for folder in ("few", "many"))
    assert many - few < 10_000 * 400 + 15e6  # the latter: MeCab's and torch's own


if not Path("/proc/self/status").exists():
    test_run_memory_does_not_grow_with_texts = pytest.mark.skip("needs /proc")(
        test_run_memory_does_not_grow_with_texts
    )


# ── The sample, as in the README ──


def test_run_of_sample_has_teacher_better_than_bag_of_words(capsys):
    """The sample with nothing else present, from another folder than the script's.

    A logistic regression on the words stays 8 points below the sample teacher, which reaches 95 %.
    """
    distill.main(["--epochs", "1"])  # of the student
    printed = capsys.readouterr().out
    assert len(re.findall("^teacher .*sample teacher", printed, re.M)) == 1
    assert (
        not Path("finetuned_bert_japanese").exists()
        and Path(".distill_cache/sample_teacher").is_dir()
    )
    assert report()["student"]["splits"]["test"]["accuracy"] > 0.8
    teacher = report()["teacher"]["splits"]["test"]["accuracy"]
    assert teacher >= 0.95

    vocabulary = (SAMPLE / "base" / "vocab.txt").read_text("utf-8").splitlines()
    words = {word: column for column, word in enumerate(vocabulary)}
    tokenizer = distill.transformers.AutoTokenizer.from_pretrained(SAMPLE / "base")

    def bag(split):
        table = rows(split, None)
        counts = torch.zeros(len(table), len(words))
        for row, (text, _) in enumerate(table):
            for token in tokenizer.tokenize(text):
                counts[row, words[token]] += 1
        return counts, torch.tensor([label == "positive" for _, label in table]).double()

    (x, y), (test_x, test_y) = bag("train"), bag("test")
    weights = torch.zeros(len(words) + 1, requires_grad=True)
    optimizer = torch.optim.LBFGS([weights], max_iter=300, line_search_fn="strong_wolfe")

    def loss():
        optimizer.zero_grad()
        value = (
            torch.nn.functional.binary_cross_entropy_with_logits(
                x @ weights[1:] + weights[0], y.float()
            )
            + 1e-4 * weights.square().sum()
        )
        value.backward()
        return value

    optimizer.step(loss)

    def accuracy(x, y):
        return ((x @ weights[1:] + weights[0] > 0) == y.bool()).double().mean().item()

    assert 0.6 < accuracy(x, y)  # it has learnt what it can
    assert accuracy(test_x, test_y) <= teacher - 0.08


def test_make_sample_writes_the_sample(tmp_path):
    target = tmp_path / "sample"
    target.mkdir()
    (target / "make_sample.py").write_bytes((SAMPLE / "make_sample.py").read_bytes())
    runpy.run_path(target / "make_sample.py", run_name="__main__")
    for name in "train.csv", "val.csv", "test.csv", "base/vocab.txt":
        assert (target / name).read_bytes() == (SAMPLE / name).read_bytes()
    texts = [text for split in ("train", "val", "test") for text, _ in rows(split, None)]
    assert len(texts) == len(set(texts)) >= 4000


# ── The table of settings over seeds ──


def test_ablation_runs_each_setting_once_and_averages(teacher, data, run, capsys, monkeypatch):
    """Its figures are those of the same command by hand.

    What is finished is not repeated; a failure is told.
    """
    import ablation

    run("--epochs", "1", "--seed", "2")
    Path("settings.txt").write_text("# comment\n\nby hand: --epochs 1\n", "utf-8")
    command = [
        "settings.txt",
        "--folder",
        "runs",
        "--seeds",
        "1",
        "2",
        "--",
        *TINY,
        "--teacher",
        str(teacher),
    ]

    def run_in_copy(started, **_):  # without an import for each
        status, said = Copy(distill.main, started[2:]).end()
        return subprocess.CompletedProcess(started, status, said, said)

    monkeypatch.setattr(ablation.subprocess, "run", run_in_copy)
    with pytest.raises(SystemExit, match="^0$"):
        ablation.main(command)
    made = [json.loads(line) for line in Path("runs/runs.jsonl").read_text("utf-8").splitlines()]
    assert [(row["name"], row["seed"], row["epochs"]) for row in made] == [
        ("by hand", 1, 1),
        ("by hand", 2, 1),
    ]
    test = report()["student"]["splits"]["test"]
    for figure in "accuracy", "macro_f1", "agreement", "kl":
        assert made[1][figure] == pytest.approx(test[figure], abs=1e-6)
    first, second = (row["accuracy"] * 100 for row in made)
    line = (
        f"| by hand | 2 | {(first + second) / 2:.2f} ± {abs(first - second) / math.sqrt(2):.2f} |"
    )
    assert line in Path("runs/table.md").read_text("utf-8")

    Path("settings.txt").write_text("by hand: --epochs 1\nwrong: --epochs 0\n", "utf-8")
    capsys.readouterr()
    with pytest.raises(SystemExit, match="runs that failed: 1"):
        ablation.main(command[:4] + command[5:])
    told = capsys.readouterr().out
    assert (
        told.startswith("wrong, seed 2: distill.py: these settings must be put right")
        and "| by hand | 2 |" in told
    )
