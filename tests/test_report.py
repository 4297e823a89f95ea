"""Report: the metrics, report.json, and the lines of the console."""

import math
import re

import pytest
import torch
from conftest import report, rows
from transformers import BertForSequenceClassification, pipeline

import distill

# ── Metrics ──


def test_compute_metrics_by_hand():
    def half(chosen):  # logits of 1/2 for these classes, 1/4 for the two others
        return (torch.full((6, 3), 0.25) + torch.eye(3)[chosen] / 4).log() + 7

    figures = distill.compute_metrics(
        half([0, 0, 1, 1, 0, 0]), torch.tensor([0, 0, 0, 1, 1, 2]), half([0, 1, 0, 1, 1, 2]), 2.0
    )
    # F1: class 0 = 2·2 / (4 + 3); class 1 = 2·1 / (2 + 2);
    # class 2 = 0, for it stands in the labels but is never chosen
    assert figures == {
        "examples": 6,
        "accuracy": 0.5,
        "macro_f1": pytest.approx((4 / 7 + 1 / 2 + 0) / 3),
        "agreement": 2 / 6,
        "seconds": 2.0,
        "texts_per_second": 3.0,
        # where they differ, 1/2 ln (1/2 : 1/4) + 1/4 ln (1/4 : 1/2)
        "kl": pytest.approx(4 / 6 * 0.25 * math.log(2)),
    }


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


def test_save_results_student_is_reported_one_in_pipeline(teacher, data, run):
    run()
    classify = pipeline("text-classification", model="distilled_model", device="cpu")
    answers = classify([text for text, _ in rows("test", 16)], batch_size=4)
    assert {answer["label"] for answer in answers} <= {"negative", "positive"}
    right = sum(answer["label"] == label for answer, (_, label) in zip(answers, rows("test", 16)))
    assert right / 16 == report()["student"]["splits"]["test"]["accuracy"]


# ── Report files ──


def test_weight_bytes_counts_weights_alone(teacher, data, run):
    for name in (
        "training_args.bin",
        "pytorch_model.bin",
    ):  # what a Trainer and an older copy leave in such a folder
        (teacher / name).write_bytes(b"x" * 1000)
    run("--epochs", "1")
    assert report()["teacher"]["bytes"] == (teacher / "model.safetensors").stat().st_size


# ── Console ──


def test_print_epoch_aligns_lines(teacher, data, run):
    lines = [
        line for line in run("--patience", "9").splitlines() if re.match(r" *(epoch|\d+) ", line)
    ]
    assert (
        len(lines) == 4 and len({len(line.removesuffix(" best").rstrip()) for line in lines}) == 1
    )
