"""Option: what distillation was worth, beside the same student on hard labels alone."""

from pathlib import Path

import pytest
from conftest import MODEL, history, interrupt_in, report, rows

import distill


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
        f"distillation is worth {gain:+.1f} points of accuracy." in printed
    )
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


def test_train_baseline_resumes(teacher, data, run, monkeypatch, fails):
    run("--baseline", "True", "--output", "whole", "--cache", "another")
    run()  # so that the epochs that follow are those of the baseline
    interrupt_in(monkeypatch, 3, KeyboardInterrupt())
    train = distill.train

    def stop(*given, **more):
        monkeypatch.setattr(distill, "train", train)
        return train(*given, **more)

    monkeypatch.setattr(distill, "train", stop)
    monkeypatch.setattr(distill, "train_baseline", broken_once(monkeypatch, distill.train_baseline))
    fails("--baseline", "True")
    printed = run("--baseline", "True")
    assert "goes on after epoch 2" in printed.split("baseline ")[1]
    expected = report("whole")["baseline"]
    assert without_seconds(report()["baseline"]["splits"]) == without_seconds(expected["splits"])


def broken_once(monkeypatch, train_baseline):
    """train_baseline, whose interruption ends the run, as a kill would."""

    def broken(*given):
        monkeypatch.setattr(distill, "train_baseline", train_baseline)
        train = distill.train
        monkeypatch.setattr(distill, "train", lambda *args: train(*args, use_best_if_stopped=False))
        try:
            return train_baseline(*given)
        finally:
            monkeypatch.setattr(distill, "train", train)

    return broken


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
    assert "BASELINE = True: METHOD = 'none' is the baseline itself" in message
    assert "BASELINE = 'yes': must be True or False" in fails("--baseline", "yes")
