"""Report: the metrics, report.json, predictions.csv, and the lines of the console."""

import csv
import math
import re
from collections import Counter
from pathlib import Path

import pandas
import pytest
import torch
from conftest import MODEL, notes, report, rows, save_model, write_csv
from transformers import BertForSequenceClassification, pipeline

import distill

# ── Metrics ──


def test_compute_metrics_by_hand():
    def half(chosen):  # logits of 1/2 for these classes, 1/4 for the two others
        return (torch.full((6, 3), 0.25) + torch.eye(3)[chosen] / 4).log() + 7

    outputs = {
        "labels": torch.tensor([0, 0, 0, 1, 1, 2]),
        "logits": {"student": half([0, 0, 1, 1, 0, 0]), "teacher": half([0, 1, 0, 1, 1, 2])},
        "seconds": {"student": torch.full([6], 1 / 3)},
    }
    figures = distill.compute_metrics(outputs, "student")
    # F1: class 0 = 2·2 / (4 + 3); class 1 = 2·1 / (2 + 2);
    # class 2 = 0, for it stands in the labels but is never chosen
    assert figures == {
        "examples": 6,
        "accuracy": 0.5,
        "macro_f1": pytest.approx((4 / 7 + 1 / 2 + 0) / 3),
        "agreement": 2 / 6,
        "seconds": pytest.approx(2.0),
        "texts_per_second": pytest.approx(3.0),
        # where they differ, 1/2 ln (1/2 : 1/4) + 1/4 ln (1/4 : 1/2)
        "kl": pytest.approx(4 / 6 * 0.25 * math.log(2)),
    }


def outputs_with_right(student, teacher):
    """What `predict` returns for texts that the models answer rightly (1) or not (0)."""

    def logits(right):
        return torch.eye(2)[1 - torch.tensor(right)]

    labels = torch.zeros(len(student), dtype=torch.int64)
    return {"labels": labels, "logits": {"student": logits(student), "teacher": logits(teacher)}}


def test_compare_with_teacher_by_hand():
    """Ten texts: both are right on 5, the student alone on 1, the teacher alone on 3."""
    found = distill.compare_with_teacher(
        outputs_with_right([1] * 6 + [0] * 4, [1] * 5 + [0] + [1] * 3 + [0])
    )
    kept = 6 / 8
    assert found["kept"] == pytest.approx(kept)
    # surpluses over `kept` of the teacher's: 5 × 1/4, 1, 3 × -3/4, 0; and the added 1 and -3/4
    total, squares = 0 + 1 / 4, 5 / 16 + 1 + 3 * 9 / 16 + 1 + 9 / 16
    error = (squares / 12 - (total / 12) ** 2) ** 0.5 / 12**0.5
    bounds = [kept + (total / 12 + sign * 1.96 * error) / 0.8 for sign in (-1, 1)]
    assert found["kept_interval"] == pytest.approx(bounds)


def test_compare_with_teacher_that_is_never_right():
    found = distill.compare_with_teacher(outputs_with_right([1, 0], [0, 0]))
    assert found == {"kept": None, "kept_interval": None}


def test_compare_with_teacher_is_not_sure_after_few_texts():
    """Equal answers to few texts do not show that the models are equal."""
    widths = []
    for n_texts in 10, 1000:
        low, high = distill.compare_with_teacher(outputs_with_right([1] * n_texts, [1] * n_texts))[
            "kept_interval"
        ]
        assert low < 1 < high
        widths.append(high - low)
    assert widths[0] > 0.3 and widths[1] < 0.01


def test_paired_interval_covers_the_truth():
    """In about 95 of 100 samples the interval holds the true difference; paired, it is narrow."""
    generator = torch.Generator().manual_seed(0)
    n_covered = 0
    for _ in range(200):
        chance = torch.rand(300, generator=generator)
        right, other = ((chance < 0.8).double() for _ in range(2))
        changed = torch.rand(300, generator=generator) < 0.1
        right[changed] = (torch.rand(300, generator=generator) < 0.6).double()[changed]
        low, high = distill.paired_interval(right, other)
        n_covered += low <= 0.1 * (0.6 - 0.8) <= high
        assert high - low < 0.09  # 0.13 if they were not paired
    assert 183 <= n_covered <= 198


def test_evaluate_baseline_by_hand():
    """Of ten texts the student alone is right on 3, the baseline alone on 1."""
    test = outputs_with_right([1] * 7 + [0] * 3, [1] * 10)
    alone = outputs_with_right([1] * 4 + [0] * 3 + [1] + [0] * 2, [1] * 10)
    seconds = {"student": torch.ones(10)}
    history = [{"epoch": 1, "val_loss": 1.0, "val_accuracy": 0.5}]
    baseline = {"history": history, "predictions": {"test": alone | {"seconds": seconds}}}
    found = distill.evaluate_baseline(baseline, test)["baseline"]
    assert found["gain"] == pytest.approx(0.2)
    error = (6 / 12 - (2 / 12) ** 2) ** 0.5 / 12**0.5
    assert found["gain_interval"] == pytest.approx([2 / 12 - 1.96 * error, 2 / 12 + 1.96 * error])
    assert "worth +20.0 points of accuracy (-22.2 to +55.5)" in distill.format_baseline(found)


def test_evaluate_kl_is_of_plain_distributions(teacher, data, run):
    """Whatever the soft labels are made with.

    ALPHA 0 leaves the student as it is, so that only the report could differ.
    """
    kl = set()
    for options in (), ("--temperature", "7"), ("--method", "mse"):
        run("--epochs", "1", "--alpha", "0", *options)
        kl.add(round(report()["student"]["splits"]["test"]["kl"], 5))
    assert len(kl) == 1 and kl.pop() > 0
    model = BertForSequenceClassification.from_pretrained(teacher)
    model.classifier.weight.data *= 1e4  # so certain that its soft labels are 0 and 1 in 32 bits
    model.save_pretrained(teacher)
    run("--epochs", "1", "--method", "rail")
    assert math.isfinite(report()["student"]["splits"]["test"]["kl"])


def test_evaluate_labels_by_hand():
    labels = torch.tensor([0, 0, 0, 1, 1, 2])
    predicted = torch.tensor([0, 0, 1, 1, 0, 0])
    logits = {"student": torch.eye(4)[predicted], "teacher": torch.eye(4)[labels]}
    outputs = {"labels": labels, "logits": logits}
    found = {role: distill.evaluate_labels(outputs, role, [*"abcd"]) for role in logits}
    assert found["student"] == {
        "labels": {
            "a": {"precision": 2 / 4, "recall": 2 / 3, "f1": 4 / 7, "support": 3},
            "b": {"precision": 1 / 2, "recall": 1 / 2, "f1": 2 / 4, "support": 2},
            "c": {"precision": None, "recall": 0, "f1": 0, "support": 1},  # never predicted
            "d": {"precision": None, "recall": None, "f1": None, "support": 0},
        },
        "confusion": {"a": {"a": 2, "b": 1}, "b": {"a": 1, "b": 1}, "c": {"a": 1}},
    }
    assert found["teacher"]["confusion"] == {"a": {"a": 3}, "b": {"b": 2}, "c": {"c": 1}}
    lines = distill.format_labels(found["student"]["labels"])
    assert lines[1].split() == ["0.5000", "0.6667", "0.5714", "3", "a"]
    assert lines[3].split() == ["–", "0.0000", "0.0000", "1", "c"]
    assert len({len(line) for line in lines[1:]}) == 1


def test_format_labels_prints_few_labels_alone():
    figures = {"precision": 1.0, "recall": 1.0, "f1": 1.0, "support": 1}
    assert len(distill.format_labels({str(number): figures for number in range(10)})) == 11
    assert distill.format_labels({str(number): figures for number in range(11)}) == []


def test_run_reports_the_labels_of_test(teacher, data, run):
    printed = run("--epochs", "1")
    for role in "teacher", "student":
        found = report()[role]
        n_right = sum(row.get(name, 0) for name, row in found["confusion"].items())
        assert n_right / 16 == found["splits"]["test"]["accuracy"]
        supports = {name: one["support"] for name, one in found["labels"].items()}
        assert supports == Counter(label for _, label in rows("test", 16))
    assert "student on test   precision   recall" in printed


ODD = [
    "=1+1",
    'a "quoted" one, with a comma',
    "two\nlines",
    "改行と、読点。",
    "[SEP]",
    "'",
    " 空白 ",
]


@pytest.mark.parametrize("pairs", [False, True])
def test_write_predictions_is_read_back(teacher, data, run, pairs):
    names = ["text", "label", *(["second"] if pairs else [])]
    table = [(text, label, f"{text}?")[: len(names)] for text, label in rows("test", 16)]
    table += [(text, "positive", text)[: len(names)] for text in ODD]
    for split in "train", "val":
        table_of_split = [(*row, row[0])[: len(names)] for row in rows(split, 16)]
        write_csv(data / f"{split}.csv", table_of_split, names)
    write_csv(data / "test.csv", table, names)
    run("--epochs", "1", *(["--text-pair-column", "second"] if pairs else []))
    path = Path("distilled_model/predictions.csv")
    assert path.read_bytes().startswith("\ufefftext,".encode())  # by which Excel knows UTF-8
    with open(path, encoding="utf-8-sig", newline="") as file:
        found = list(csv.DictReader(file))
    frame = pandas.read_csv(path, keep_default_na=False)
    assert [*frame.columns] == [*found[0]]
    assert frame.astype(str)["text"].tolist() == [row["text"] for row in found]

    # the test split in its order
    assert [(row["text"], row["label"]) for row in found] == [row[:2] for row in table]
    if pairs:
        assert [row["text_pair"] for row in found] == [row[2] for row in table]
    for role in "teacher", "student":
        n_right = (frame[role] == frame["label"]).sum()
        assert n_right / len(table) == report()[role]["splits"]["test"]["accuracy"]
        assert frame[f"{role}_probability"].between(0.5, 1).all()
    texts = [(row["text"], row["text_pair"]) if pairs else row["text"] for row in found]
    for row, answer in zip(found, distill.load_student("distilled_model")(texts)):
        assert row["student"] == answer["label"]
        assert float(row["student_probability"]) == pytest.approx(answer["score"], abs=1e-4)


def test_save_results_student_is_reported_one_in_pipeline(teacher, data, run):
    run()
    classify = pipeline("text-classification", model="distilled_model", device="cpu")
    answers = classify([text for text, _ in rows("test", 16)], batch_size=4)
    assert {answer["label"] for answer in answers} <= {"negative", "positive"}
    right = sum(answer["label"] == label for answer, (_, label) in zip(answers, rows("test", 16)))
    assert right / 16 == report()["student"]["splits"]["test"]["accuracy"]


# ── Report files ──


def test_make_report_counts_bytes_of_weights_alone(teacher, data, run):
    (teacher / "training_args.bin").write_bytes(b"x" * 1000)  # as a Trainer leaves it
    run("--epochs", "1")
    assert report()["teacher"]["bytes"] == 4 * report()["teacher"]["parameters"]
    assert report()["student"]["bytes"] == MODEL.stat().st_size


@pytest.mark.parametrize(
    "predicted, labels, is_noted",
    [([1, 1], [0, 1], True), ([1, 0], [0, 1], False), ([1, 1], [1, 1], False)],
)
def test_warn_if_one_label_names_label(predicted, labels, is_noted, capsys):
    answers = torch.tensor(predicted), torch.tensor(labels)
    distill.warn_if_one_label("student", "test", *answers, ["bad", "good"])
    printed = capsys.readouterr().out
    assert ("student" in printed and "test with good" in printed) == is_noted


def test_run_notes_student_that_answers_one_label(teacher, data, run):
    printed = run("--epochs", "1", "--warmup-steps", "1000000", "--student-init", "random")
    answers = {
        row["student"]
        for row in csv.DictReader(open("distilled_model/predictions.csv", encoding="utf-8-sig"))
    }
    assert ("the student answers all" in notes(printed)) == (len(answers) == 1)


# ── Console ──


def test_print_epoch_aligns_lines(teacher, data, run):
    lines = [
        line for line in run("--patience", "9").splitlines() if re.match(r" *(epoch|\d+) ", line)
    ]
    assert (
        len(lines) == 4 and len({len(line.removesuffix(" best").rstrip()) for line in lines}) == 1
    )


@pytest.mark.parametrize("kind", ["japanese", "rust"])
def test_write_model_card_names_language_and_truncates(rust, data, run, kind):
    """The card's pipeline reads texts of any length as distill.py does."""
    folder = save_model("finetuned_bert_japanese", tokenizer=kind == "japanese")
    if kind == "rust":
        rust.save_pretrained(folder)
    run("--epochs", "1")
    card = Path("distilled_model/README.md").read_text("utf-8")
    assert ("language: ja" in card) == (kind == "japanese") and "truncation=True" in card
    code = (
        card.split("```python\n")[1]
        .split("```")[0]
        .replace("path/to/this/folder", "distilled_model")
    )
    classify = {}
    exec(code, classify)
    texts = ["the film is not good。料理" * n for n in (1, 8, 400)]
    for ours, stock in zip(
        distill.load_student("distilled_model")(texts), classify["classify"](texts)
    ):
        assert ours["label"] == stock["label"] and abs(ours["score"] - stock["score"]) < 1e-5
