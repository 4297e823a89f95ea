"""Option: what distillation was worth, beside the same student on hard labels alone."""

from pathlib import Path

import pytest
from conftest import MODEL, history, interrupt_in, report, rows


def without_seconds(splits):
    return {
        split: {name: value for name, value in metrics.items() if "second" not in name}
        for split, metrics in splits.items()
    }


def test_train_baseline_equals_method_none(teacher, data, run):
    printed = run("--baseline", "True")
    baseline, student = report()["baseline"], report()["student"]["splits"]["test"]
    test = baseline["splits"]["test"]
    gain = 100 * (student["accuracy"] - test["accuracy"])
    assert (
        f"Hard labels alone: accuracy {test['accuracy']:.4f}, agreement {test['agreement']:.4f}; "
        f"distillation is worth {gain:+.1f} points of accuracy (" in printed
    )
    low, high = baseline["gain_interval"]
    assert 100 * baseline["gain"] == pytest.approx(gain) and low < baseline["gain"] < high
    run("--method", "none", "--output", "none")
    alone = report("none")
    expected = without_seconds(alone["student"]["splits"])
    assert without_seconds(baseline["splits"]) == {
        split: expected[split] for split in ("val", "test")
    }
    assert (baseline["epochs"], baseline["best_epoch"]) == (alone["epochs"], alone["best_epoch"])


def test_train_baseline_leaves_the_student_as_it_is(teacher, data, run):
    run()
    student, losses = MODEL.read_bytes(), history()
    assert "baseline" not in report()
    run("--baseline", "True", "--cache", "another")
    assert MODEL.read_bytes() == student and history() == losses


def test_train_baseline_can_be_asked_for_later(teacher, data, run):
    """The checkpoint of the finished student is used: only the baseline is trained."""
    run()
    printed = run("--baseline", "True")
    assert "goes on after epoch 3" in printed.split("baseline ")[0]
    assert "goes on after" not in printed.split("baseline ")[1]


def test_train_baseline_is_left_out_on_ctrl_c_and_resumes(teacher, data, run, monkeypatch):
    run("--baseline", "True", "--output", "whole", "--cache", "another")
    run()  # so that the epochs that follow are those of the baseline
    weights = MODEL.read_bytes()
    interrupt_in(monkeypatch, 3, KeyboardInterrupt())
    printed = run("--baseline", "True")
    assert "baseline  stopped by Ctrl-C: it is left out; run again to resume" in printed
    assert "baseline" not in report() and MODEL.read_bytes() == weights
    printed = run("--baseline", "True")
    assert "goes on after epoch 2" in printed.split("baseline ")[1]
    found, expected = report()["baseline"], report("whole")["baseline"]
    assert without_seconds(found["splits"]) == without_seconds(expected["splits"])


def test_train_baseline_has_no_unlabeled_texts(teacher, data, run):
    """Only the teacher labels them. (The word vectors of the start are fitted to them, too.)"""
    plain = "--baseline", "True", "--refit-words", "0"
    run(*plain, "--output", "plain")
    more = "\n".join(text for text, _ in rows("train", 80)[60:])
    Path("more.txt").write_text(more, "utf-8")
    run(*plain, "--unlabeled", "more.txt")
    found, expected = report()["baseline"], report("plain")["baseline"]
    assert without_seconds(found["splits"]) == without_seconds(expected["splits"])


@pytest.mark.parametrize("student", ["bert", "bilstm"])
def test_train_baseline_takes_every_student(teacher, data, run, student):
    run("--baseline", "True", "--epochs", "1", "--student", student)
    assert 0 <= report()["baseline"]["splits"]["test"]["accuracy"] <= 1


def test_check_settings_refuses_baseline_of_the_baseline(teacher, data, fails):
    message = fails("--baseline", "True", "--method", "none")
    assert "METHOD = 'none': does without the teacher: it is the BASELINE" in message
    assert "BASELINE = 'yes': must be True or False" in fails("--baseline", "yes")
