"""Option: a teacher that ran elsewhere, whose probabilities are a column of the data."""

import json
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from conftest import MODEL, history, report, rows, save_model, write_csv

import distill

SPLITS = "train", "val", "test"


@pytest.fixture
def answers(teacher, data, run, monkeypatch):
    """Run the teacher; return {split: [(text, label, its probabilities)]}."""
    seen = {}
    add_soft_labels = distill.add_soft_labels

    def recorded(*given):
        seen.update(add_soft_labels(*given))
        return seen

    monkeypatch.setattr(distill, "add_soft_labels", recorded)
    run()
    monkeypatch.setattr(distill, "add_soft_labels", add_soft_labels)
    found = {}
    for split, n in ("train", 48), ("val", 16), ("test", 16):
        logits = torch.tensor(np.array(seen[split]["teacher_logits"][:]))
        probabilities = logits.double().softmax(-1).tolist()
        found[split] = [(*row, p) for row, p in zip(rows(split, n), probabilities, strict=True)]
    return found


def write_answers(folder, answers, kind):
    Path(folder).mkdir()
    names = "text", "label", "p"
    for split, table in answers.items():
        path = Path(folder, f"{split}{kind}")
        if kind == ".csv":
            write_csv(path, [(*row, str(p)) for *row, p in table], names)
        elif kind == ".jsonl":
            lines = [json.dumps(dict(zip(names, row))) + "\n" for row in table]
            path.write_text("".join(lines), "utf-8")
        else:
            table = [dict(zip(names, row)) for row in table]
            datasets.Dataset.from_list(table).to_parquet(path)


GIVEN = "--data", "answers", "--soft-labels-column", "p"


@pytest.mark.parametrize("kind", [".csv", ".jsonl", ".parquet"])
def test_add_given_soft_labels_gives_the_student_of_the_teachers_pass(
    answers, run, monkeypatch, kind
):
    student, losses, expected = MODEL.read_bytes(), history(), report()
    write_answers("answers", answers, kind)
    monkeypatch.setattr(distill, "run_teacher", None)  # it must not be called
    printed = run(*GIVEN, "--cache", "another")
    assert MODEL.read_bytes() == student and history() == losses
    assert "teacher   its probabilities are read from the column p" in printed
    assert "in p, the labels have this order: negative, positive" in printed

    # what is not known of this teacher is left out
    found = report()
    test = found["teacher"]["splits"]["test"]
    assert test["accuracy"] == expected["teacher"]["splits"]["test"]["accuracy"]
    assert test["seconds"] is test["texts_per_second"] is None
    assert found["teacher"]["parameters"] is found["teacher"]["bytes"] is None
    assert found["speedup"] is found["cascade"]["speedup"] is None
    for line in printed.splitlines():
        if line.startswith("teacher  test"):
            assert line.split()[5:] == ["–", "–"]  # without seconds
    kept = f"the student keeps {found['kept']:.1%} of the teacher's accuracy ("
    assert kept in printed and "teacher 0 parameters" not in printed and "None" not in printed
    assert "the probabilities in the column p" in Path("distilled_model/README.md").read_text()


def test_load_teacher_starts_from_student_init_without_teacher(answers, run, teacher):
    write_answers("answers", answers, ".jsonl")
    save_model(Path("small"), num_hidden_layers=2, seed=5)
    teacher.rename("gone")
    run(*GIVEN, "--student-init", "small", "--epochs", "1", "--cache", "another")
    config = json.loads(Path("distilled_model/config.json").read_text("utf-8"))
    assert set(config["label2id"]) == {"negative", "positive"}
    assert report()["teacher"]["splits"]["test"]["agreement"] == 1


def test_find_teacher_wants_teacher_or_start(answers, teacher, fails):
    write_answers("answers", answers, ".jsonl")
    teacher.rename("gone")
    assert "no such folder" in fails(*GIVEN)
    named = fails(*GIVEN, "--teacher", "./mistyped", "--student-init", "gone")
    assert "./mistyped" in named and "no such folder" in named


@pytest.mark.parametrize(
    "value",
    [
        "[0.2, 0.3, 0.5]",
        "0.5",
        "",
        "positive",
        "[0.2, nan]",
        "[-0.2, 1.2]",
        "[2.3, -1.1]",
        "[0.2, 0.7]",
        None,
        [0.2, None],
        [[0.2, 0.8]],
        {"negative": 0.2, "positive": 0.8},
    ],
)
def test_parse_probabilities_refuses_what_are_none(value):
    assert distill.parse_probabilities(value, 2) is None


def test_parse_soft_labels_counts_and_names_faulty_rows(teacher, data, fails):
    for split, n in ("train", 48), ("val", 16), ("test", 16):
        table = [(*row, "[0.25, 0.75]") for row in rows(split, n)]
        if split == "val":
            table[3] = table[8] = (*table[3][:2], "[0.2, 0.7]")
        write_csv(data / f"{split}.csv", table, ("text", "label", "p"))
    message = fails("--soft-labels-column", "p")
    assert "val: p is not a list of 2 probabilities" in message
    assert message.endswith("in 2 rows: 4, 9")


@pytest.mark.parametrize(
    "value",
    [
        "[0.25, 0.75]",
        "[0.25 0.75]",
        " 0.25,0.75 ",
        "(0.25, 0.75)",
        [0.25, 0.75],
        "[2.5e-1\n 0.75]",
        "[np.float64(0.25), np.float32(0.75)]",
    ],
)
def test_parse_probabilities_takes_a_list_or_its_text(value):
    assert distill.parse_probabilities(value, 2) == [0.25, 0.75]


def test_parse_soft_labels_counts_faults_of_many_rows(teacher, data, fails):
    table = [("良い。", "positive", "[0.25, 0.75]" if n > 1100 else "?") for n in range(1, 1201)]
    write_csv(data / "train.csv", table, ("text", "label", "p"))
    for split in "val", "test":
        write_csv(data / f"{split}.csv", table[-8:], ("text", "label", "p"))
    assert "in 1,100 rows: 1, 2, 3, 4, 5, " in fails("--soft-labels-column", "p")


def test_parse_soft_labels_column_may_have_any_name(answers, run):
    """Also that of the script's own column."""
    for split in SPLITS:
        table = [(text, label, str(p)) for text, label, p in answers[split]]
        write_csv(f"data/{split}.csv", table, ("text", "label", "teacher_probabilities"))
    more = [(text, "[0.1, 0.9]") for text, _ in rows("train", 70)[60:]]
    write_csv("more.csv", more, ("text", "teacher_probabilities"))
    column = "--soft-labels-column", "teacher_probabilities"
    assert "48 + 10 unlabeled" in run(*column, "--unlabeled", "more.csv", "--epochs", "1")


def test_parse_soft_labels_refuses_values_of_json_that_are_no_list(teacher, data, fails):
    for split in SPLITS:
        (data / f"{split}.csv").unlink()
        lines = [json.dumps({"text": t, "label": label, "p": 0.5}) for t, label in rows(split, 8)]
        (data / f"{split}.jsonl").write_text("\n".join(lines), "utf-8")
    assert "p is not a list of 2 probabilities" in fails("--soft-labels-column", "p")


def test_read_unlabeled_takes_soft_labels_too(answers, run, fails, monkeypatch):
    write_answers("answers", answers, ".csv")
    table = [(text, "[0.1, 0.9]") for text, _ in rows("train", 70)[60:]]
    write_csv("more.csv", table, ("text", "p"))
    monkeypatch.setattr(distill, "run_teacher", None)
    assert "48 + 10 unlabeled" in run(*GIVEN, "--unlabeled", "more.csv", "--epochs", "1")

    table[4] = (table[4][0], "[0.1]")
    write_csv("more.csv", table, ("text", "p"))
    message = fails(*GIVEN, "--unlabeled", "more.csv")
    assert "UNLABELED = 'more.csv'" in message and message.endswith("in 1 rows: 5")
    Path("more.txt").write_text("良い。\n", "utf-8")
    message = fails(*GIVEN, "--unlabeled", "more.txt")
    assert "more.txt has no column p" in message


def test_soft_labels_as_objects_are_told_what_is_accepted(teacher, data, fails):
    for split in "train", "val", "test":
        line = {"text": "雨", "label": "negative", "p": {"negative": 0.9, "positive": 0.1}}
        (data / f"{split}.csv").unlink()
        (data / f"{split}.jsonl").write_text(json.dumps(line), "utf-8")
    message = fails("--soft-labels-column", "p")
    assert "p is not a list of 2 probabilities that add up to 1 in 1 rows: 1" in message


def test_check_settings_refuses_what_needs_a_teacher(teacher, data, fails):
    column = "--soft-labels-column", "p"
    assert "METHOD = 'mse': needs more of the teacher" in fails(*column, "--method", "mse")
    assert "METHOD = 'mate': needs more of the teacher" in fails(*column, "--method", "mate")
    assert "no teacher is run" in fails(*column, "--augment", "1")
    assert "no teacher is run" in fails(*column, "--teacher-base", "base")
    assert "must be different columns" in fails("--soft-labels-column", "label")
    assert "data" in (message := fails(*column)) and "has no column p" in message
