"""Option: a cascade, in which the teacher answers where the student is unsure."""

import json
import random
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import answer_with, edit_json, report, rows, save_model

import distill

# ── The eight texts, by hand ──

# the student's probability, whether it is right, whether the teacher is
EIGHT = [
    (0.55, False, True),
    (0.60, True, False),
    (0.65, False, True),
    (0.70, False, True),
    (0.75, True, True),
    (0.80, True, True),
    (0.90, True, False),
    (0.95, True, True),
]
ROLES = "teacher", "student"
# right answers of the two together, if the teacher is asked 0, 1, … 8 texts
N_RIGHT = [5, 6, 5, 6, 7, 7, 7, 6, 6]


def outputs(texts, seed=0):
    """What `predict` returns for texts such as EIGHT, in random order: label 0 is right."""
    texts = random.Random(seed).sample(texts, len(texts))
    logits, teacher_logits = [], []
    for probability, is_right, teacher_is_right in texts:
        pair = [probability, 1 - probability]
        logits.append(pair if is_right else pair[::-1])
        teacher_logits.append([3.0, 1.0] if teacher_is_right else [1.0, 3.0])
    return {
        "labels": torch.zeros(len(texts), dtype=torch.int64),
        "logits": {
            "teacher": torch.tensor(teacher_logits),
            "student": torch.tensor(logits).log(),
        },
        "seconds": {
            "teacher": torch.full([len(texts)], 2.0),
            "student": torch.full([len(texts)], 0.125),
        },
    }


def test_evaluate_cascade_by_hand():
    cascade = distill.evaluate_cascade(outputs(EIGHT), outputs(EIGHT, seed=1))
    # the teacher is right on 6 of 8; 99 % of that are reached when the text of 0.55 is asked
    assert cascade.pop("curve") == {
        "share": [n / 8 for n in range(9)],
        "accuracy": [n / 8 for n in N_RIGHT],
        "speedup": [pytest.approx(16 / (1 + 2 * n)) for n in range(9)],
    }
    # with it, surpluses over 0.99 of the teacher's: 4 × 0.01, 2 × 1 and 2 × -0.99; and 1 and -0.99
    mean, squares = 0.07 / 10, (4 * 0.01**2 + 3 + 3 * 0.99**2) / 10
    at_least = mean - 1.645 * ((squares - mean**2) / 10) ** 0.5 + 0.99 * 0.75
    assert cascade == {
        "threshold": pytest.approx(0.55, abs=1e-6),
        "is_promised": False,
        "val_kept": 1.0,
        "val_kept_at_least": pytest.approx(at_least / 0.75),
        "kept": 1.0,
        "share": 1 / 8,
        "accuracy": 6 / 8,
        "agreement": 4 / 8,  # they agree on the texts of 0.75, 0.80 and 0.95, and on the asked one
        "speedup": pytest.approx(16 / 3),
    }


@pytest.mark.parametrize("keeps, threshold, share", [(0.8, 0.0, 0), (0.84, 0.55, 1 / 8)])
def test_evaluate_cascade_keeps_what_the_setting_says(settings, keeps, threshold, share):
    settings.setattr(distill, "CASCADE_KEEPS", keeps)  # of 6: 4.8 of the 5 it has; 5.04
    cascade = distill.evaluate_cascade(outputs(EIGHT), outputs(EIGHT))
    assert cascade["threshold"] == pytest.approx(threshold, abs=1e-6)
    assert cascade["share"] == share


def test_evaluate_cascade_asks_texts_of_the_same_probability_together():
    # one of the two texts of 0.55 would do, but the threshold cannot tell them apart
    equal = [(0.55, *one[1:]) if one[0] == 0.60 else one for one in EIGHT]
    cascade = distill.evaluate_cascade(outputs(equal), outputs(equal))
    assert cascade["threshold"] == pytest.approx(0.65, abs=1e-6)
    assert cascade["share"] == 3 / 8 and cascade["accuracy"] == 6 / 8


def test_evaluate_cascade_threshold_is_of_val_not_of_test():
    hard = [(probability - 0.04, False, True) for probability, *_ in EIGHT]
    cascade = distill.evaluate_cascade(outputs(EIGHT), outputs(hard))
    assert cascade["threshold"] == pytest.approx(0.55, abs=1e-6)
    assert cascade["share"] == 1 / 8 and cascade["accuracy"] == 1 / 8


def test_evaluate_cascade_asks_all_if_only_the_teacher_is_right():
    texts = [(probability, False, True) for probability, *_ in EIGHT]
    cascade = distill.evaluate_cascade(outputs(texts), outputs(texts))
    assert cascade["share"] == cascade["accuracy"] == cascade["agreement"] == 1
    assert cascade["speedup"] == pytest.approx(16 / 17)


def test_evaluate_cascade_equals_brute_force():
    generator = torch.Generator().manual_seed(0)
    for n_texts, n_classes in (1, 2), (7, 3), (250, 4):
        val, test = (
            {
                "labels": torch.randint(n_classes, (n_texts,), generator=generator),
                "logits": {
                    role: torch.randn(n_texts, n_classes, generator=generator) for role in ROLES
                },
                "seconds": {role: torch.rand(n_texts, generator=generator) for role in ROLES},
            }
            for _ in range(2)
        )

        def ask(outputs, threshold):
            """Accuracy, agreement and speed at a threshold, text by text."""
            n_right = n_agreeing = 0
            seconds = outputs["seconds"]["student"].sum().item()
            for label, logits, teacher_logits, teacher_seconds in zip(
                outputs["labels"],
                outputs["logits"]["student"],
                outputs["logits"]["teacher"],
                outputs["seconds"]["teacher"].tolist(),
            ):
                asked = logits.softmax(-1).max() <= threshold
                seconds += teacher_seconds if asked else 0
                answer = (teacher_logits if asked else logits).argmax()
                n_right += (answer == label).item()
                n_agreeing += (answer == teacher_logits.argmax()).item()
            speedup = outputs["seconds"]["teacher"].sum().item() / seconds
            return n_right / n_texts, n_agreeing / n_texts, speedup

        cascade = distill.evaluate_cascade(val, test)
        target = 0.99 * ask(val, 1)[0]
        candidates = [0.0, *val["logits"]["student"].softmax(-1).max(-1).values.tolist()]
        lowest = min(one for one in candidates if ask(val, one)[0] >= target - 1e-9)
        assert cascade["threshold"] == lowest
        found = [cascade[key] for key in ("accuracy", "agreement", "speedup")]
        assert found == pytest.approx(ask(test, lowest))
        assert len(cascade["curve"]["share"]) == min(n_texts, 100) + 1


# the student errs on the 20 of which it is least sure; the teacher is always right
THOUSAND = [(0.5 + number / 2001, number > 20, True) for number in range(1, 1001)]


def test_evaluate_cascade_promises_with_confidence():
    """By hand: 10 of 1000 may be wrong. Of 5, one is 95 % sure of that; of 6, one is not."""
    cascade = distill.evaluate_cascade(outputs(THOUSAND), outputs(THOUSAND, seed=1))
    assert cascade["is_promised"]
    assert cascade["share"] == pytest.approx(15 / 1000)
    assert cascade["val_kept"] == cascade["kept"] == pytest.approx(995 / 1000)
    total, squares = 995 * 0.01 - 5 * 0.99 + 0.01, 995 * 0.01**2 + 6 * 0.99**2 + 1
    error = (squares / 1002 - (total / 1002) ** 2) ** 0.5 / 1002**0.5
    at_least = total / 1002 - 1.645 * error + 0.99
    assert cascade["val_kept_at_least"] == pytest.approx(at_least) and at_least > 0.99


def test_evaluate_cascade_stops_at_the_first_threshold_that_is_not_sure():
    """One lower threshold would do, but is not tried."""
    # the most certain texts: 30 that the student alone gets wrong, then 60 that it alone gets right
    lucky = [(0.80 + n / 1000, True, False) for n in range(60)]
    unlucky = [(0.90 + n / 1000, False, True) for n in range(30)]
    texts = [*THOUSAND[20:600], *lucky, *unlucky]
    cascade = distill.evaluate_cascade(outputs(texts), outputs(texts))
    assert cascade["is_promised"] and cascade["threshold"] > 0.9
    assert cascade["val_kept"] < 1


def test_evaluate_cascade_keeps_its_promise_on_other_texts():
    """Of 100 validation sets, at least 90 give a threshold that keeps 99 % of the teacher's."""
    generator = np.random.default_rng(0)

    def draw(n_texts):
        probability = generator.uniform(0.5, 1, n_texts)
        is_right = generator.random(n_texts) < probability
        teacher_is_right = generator.random(n_texts) < 0.93
        return list(zip(probability, is_right.tolist(), teacher_is_right.tolist(), strict=True))

    test = outputs(draw(20_000))
    cascades = [distill.evaluate_cascade(outputs(draw(800)), test) for _ in range(100)]
    assert all(cascade["is_promised"] for cascade in cascades)
    n_held = sum(cascade["kept"] >= distill.CASCADE_KEEPS for cascade in cascades)
    assert n_held >= 90
    assert min(cascade["share"] for cascade in cascades) < 0.95  # not by asking everything


def test_evaluate_cascade_where_the_teacher_is_never_right_on_val():
    wrong = [(probability, False, False) for probability, *_ in EIGHT]
    cascade = distill.evaluate_cascade(outputs(wrong), outputs(EIGHT))
    assert cascade["threshold"] == 0
    assert cascade["val_kept"] is cascade["val_kept_at_least"] is None
    assert "None" not in "".join(distill.format_cascade(cascade))


def test_evaluate_cascade_without_known_seconds_has_no_speed():
    test = outputs(EIGHT)
    test["seconds"]["teacher"] = torch.zeros(8)
    cascade = distill.evaluate_cascade(outputs(EIGHT), test)
    assert cascade["speedup"] is None and set(cascade["curve"]["speedup"]) == {None}


# ── In a run ──


def test_run_reports_cascade(teacher, data, run, monkeypatch, draws):
    answer_with(monkeypatch, lambda label: label)
    printed = run("--cascade-keeps", "0.999", "--epochs", "1", "--learning-rate", "1e-9")
    cascade = report()["cascade"]
    assert cascade["curve"]["accuracy"][0] == report()["student"]["splits"]["test"]["accuracy"]
    assert cascade["curve"]["accuracy"][-1] == report()["teacher"]["splits"]["test"]["accuracy"]
    assert cascade["threshold"] > 0  # the student has learned nothing
    assert (
        f"the student's probability is at most {cascade['threshold']:.6g}\n"
        f"({cascade['share']:.1%} of test): accuracy {cascade['accuracy']:.4f}, agreement "
        f"{cascade['agreement']:.4f}, {cascade['speedup']:.1f} times as fast as the teacher.\n"
    ) in printed
    assert Path("distilled_model/cascade.png").read_bytes()[:4] == b"\x89PNG"


def test_format_cascade_says_that_the_student_is_enough():
    right = [(probability, True, True) for probability, *_ in THOUSAND]
    cascade = distill.evaluate_cascade(outputs(right), outputs(right))
    assert cascade["threshold"] == 0
    first, on_val, on_test = distill.format_cascade(cascade)
    assert "student alone keeps enough" in first and "On val this keeps 100.0%" in on_val
    assert "on test it keeps 100.0%: the promise held." in on_test


def test_format_cascade_says_that_val_is_too_small_or_the_promise_did_not_hold():
    few = distill.format_cascade(distill.evaluate_cascade(outputs(EIGHT), outputs(EIGHT)))
    assert "val is too small to promise 99%" in few[-1]
    hard = outputs([(probability, False, True) for probability, *_ in THOUSAND])
    lines = distill.format_cascade(distill.evaluate_cascade(outputs(THOUSAND), hard))
    assert "on test it keeps 1.5%: the promise did not hold." in lines[-1]


def test_format_cascade_without_a_right_answer_of_the_teacher_on_test():
    never = outputs([(probability, True, False) for probability, *_ in THOUSAND])
    cascade = distill.evaluate_cascade(outputs(THOUSAND), never)
    assert cascade["kept"] is None and cascade["val_kept"] is not None
    assert "None" not in "".join(distill.format_cascade(cascade))


# ── load_student and --predict ──


@pytest.fixture
def student(teacher, data, run):
    run("--epochs", "1")
    return Path("distilled_model")


TEXTS = [text for text, _ in rows("test", 12)]


def plain(answers):
    return [{key: answer[key] for key in ("label", "score")} for answer in answers]


def test_load_student_asks_teacher_up_to_the_threshold(student, teacher):
    alone = distill.load_student(student)(TEXTS)
    of_teacher = distill.load_student(teacher)(TEXTS)
    assert all("by" not in answer for answer in alone)
    threshold = sorted(answer["score"] for answer in alone)[4]
    answers = distill.load_student(student, teacher, threshold)(TEXTS)
    assert [answer["by"] for answer in answers].count("teacher") == 5
    for answer, ours, theirs in zip(answers, alone, of_teacher):
        expected = theirs if ours["score"] <= threshold else ours
        assert answer["label"] == expected["label"]
        assert answer["score"] == pytest.approx(expected["score"], abs=1e-5)
    assert {one["by"] for one in distill.load_student(student, teacher, 0)(TEXTS)} == {"student"}
    assert {one["by"] for one in distill.load_student(student, teacher, 1)(TEXTS)} == {"teacher"}


def test_load_student_takes_threshold_of_the_report(student, teacher):
    scores = [answer["score"] for answer in distill.load_student(student)(TEXTS)]
    saved = report() | {"cascade": {"threshold": sorted(scores)[2]}}
    (student / "report.json").write_text(json.dumps(saved), "utf-8")
    answers = distill.load_student(student, teacher)(TEXTS)
    assert [answer["by"] for answer in answers].count("teacher") == 3


def test_load_student_loads_the_teacher_once(student, teacher, monkeypatch):
    loaded = []
    load_model = distill.load_model
    monkeypatch.setattr(
        distill, "load_model", lambda *args, **more: loaded.append(1) or load_model(*args, **more)
    )
    classify = distill.load_student(student, teacher, 1)
    assert classify(TEXTS[:2]) + classify(TEXTS[2]) == classify(TEXTS[:3]) or len(loaded) == 1
    assert len(loaded) == 1 and classify([]) == []


def test_load_student_takes_numbers_of_numpy_and_paths(student, teacher, monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    expected = distill.load_student(student, teacher, 0.6)(TEXTS)
    found = distill.load_student("~/distilled_model/", "~/finetuned_bert_japanese", np.float64(0.6))
    assert found(TEXTS) == expected
    assert distill.load_student("~/distilled_model", teacher)(TEXTS)[0].keys() == expected[0].keys()


def test_load_student_takes_max_length_of_the_student(student, teacher, monkeypatch):
    """The script's own, 128, is more than this teacher takes."""
    monkeypatch.setattr(distill, "MAX_LENGTH", 128)
    assert distill.load_student(student, teacher, 1)(["良い。" * 100])[0]["by"] == "teacher"


def test_load_student_refuses_threshold_without_teacher(student):
    with pytest.raises(distill.Problem, match="needs a teacher to be asked"):
        distill.load_student(student, threshold=0.5)


def test_load_asked_teacher_takes_no_threshold_of_another_teacher(student, teacher):
    """The report's is for the teacher of a column, which TEACHER need not be."""
    saved = report()
    saved["settings"]["SOFT_LABELS_COLUMN"] = "p"
    (student / "report.json").write_text(json.dumps(saved), "utf-8")
    with pytest.raises(distill.Problem, match="SOFT_LABELS_COLUMN"):
        distill.load_student(student, teacher)
    assert distill.load_student(student, teacher, 1)(TEXTS)[0]["by"] == "teacher"


@pytest.mark.parametrize("threshold", [-0.1, 1.5, float("nan"), "0.5", True])
def test_load_student_refuses_threshold_outside_0_to_1(student, teacher, threshold):
    with pytest.raises(distill.Problem, match="must be a number from 0 to 1"):
        distill.load_student(student, teacher, threshold)


def test_load_student_refuses_teacher_of_other_labels(student):
    other = save_model(Path("other"), labels=("low", "high"))
    with pytest.raises(distill.Problem, match=r"its labels \(low, high\) are not those of the"):
        distill.load_student(student, other, 0.5)


def test_load_student_takes_teacher_with_the_labels_in_another_order(student):
    other = save_model(Path("other"), labels=("positive", "negative"))
    labels = [one["label"] for one in distill.load_student(student, other, 1)(TEXTS)]
    assert labels == [one["label"] for one in distill.load_student(other)(TEXTS)]


def test_load_student_refuses_report_without_threshold(student, teacher):
    edit_json(student / "report.json", cascade=None)
    with pytest.raises(distill.Problem, match="threshold.* = None: must be a number"):
        distill.load_student(student, teacher)


def test_show_predictions_says_who_answered(student, teacher, capsys):
    capsys.readouterr()
    for given, expected in ("1", "teacher"), ("0", "student"):
        distill.main(["--ask-teacher", given, "--predict", *TEXTS])
        lines = [line.split("\t") for line in capsys.readouterr().out.splitlines()]
        answers = distill.load_student(student, teacher, int(given))(TEXTS)
        assert lines == [[one["label"], f"{one['score']:.4f}", expected] for one in answers]
    distill.main(["--ask-teacher", "auto", "--predict", TEXTS[0]])
    assert capsys.readouterr().out.count("\t") == 2
    for bad in "2", "often":
        with pytest.raises(SystemExit, match=r"ASK_TEACHER.*must be a number from 0 to 1"):
            distill.main(["--ask-teacher", bad, "--predict", TEXTS[0]])


def test_show_predictions_asks_the_sample_teacher_for_its_student_alone(student, teacher, capsys):
    command = ["--data", "tests/sample", "--ask-teacher", "1", "--predict", TEXTS[0]]
    teacher.rename(".distill_cache/sample_teacher")
    capsys.readouterr()
    with pytest.raises(SystemExit, match="finetuned_bert_japanese'.*no such folder"):
        distill.main(command)  # the student is that of another teacher, whom nobody names
    saved = report()
    saved["settings"]["DATA"] = "tests/sample"
    (student / "report.json").write_text(json.dumps(saved), "utf-8")
    capsys.readouterr()
    distill.main(command)
    assert capsys.readouterr().out.endswith("teacher\n")
