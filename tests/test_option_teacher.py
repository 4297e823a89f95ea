"""Option: a teacher that is still to be made, and the sample teacher."""

import csv
import json
import sys
from pathlib import Path

import pytest
from conftest import interrupt_in, rows, save_model, tiny_model, write_csv
from transformers import (
    BertForSequenceClassification,
    BertModel,
    pipeline,
)

import distill

# ── find_teacher ──


def test_find_teacher_refuses_missing_folder_with_own_data(data, fails):
    message = fails()
    assert "TEACHER = './finetuned_bert_japanese'" in message and "no such folder" in message
    assert "TEACHER_BASE" in message
    assert not Path(".distill_cache/sample_teacher").exists()


@pytest.mark.parametrize(
    "name", ["./mine", "some/hub-name", "./finetuned_bert_japanese", "finetuned_bert_japanese"]
)
def test_find_teacher_keeps_teacher_of_command_line(name, monkeypatch, capsys):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(SystemExit) as exit:
        distill.main(["--teacher", name])
    assert (
        f"TEACHER = {name!r}" in str(exit.value.code)
        and "sample teacher" not in capsys.readouterr().out
    )


def test_find_teacher_keeps_teacher_named_in_file(monkeypatch):
    distill.COMMAND_LINE_SETTINGS.clear()
    assert distill.find_teacher()[0].endswith("sample_teacher")
    monkeypatch.setattr(distill, "TEACHER", "./mine")
    assert distill.find_teacher() == ("./mine", None)


def test_find_teacher_logs_teacher_that_is_there(teacher, data, run):
    save_model("base")
    printed = run("--teacher-base", "base", "--epochs", "1")
    assert "./finetuned_bert_japanese is used as it is" in printed and "from base" in printed


def test_teacher_source_has_damaged_sample_teacher_made_anew(monkeypatch, run):
    monkeypatch.setattr(distill, "DATA", "tests/sample")
    Path(distill.CACHE).mkdir()
    name, recipe = distill.find_teacher()
    assert recipe
    save_model(Path(name))
    distill.save_with_checksum(f"{name}.sum", distill.file_digest(f"{name}/model.safetensors"))
    assert distill.find_teacher() == (name, None)
    content = bytearray(Path(name, "model.safetensors").read_bytes())
    content[-1] ^= 1
    Path(name, "model.safetensors").write_bytes(content)
    assert distill.find_teacher() == (name, recipe)


def test_warn_if_sample_data_logs_note(run, monkeypatch, capsys):
    save_model("finetuned_bert_japanese")
    monkeypatch.setattr(distill, "add_soft_labels", lambda *given: sys.exit("far enough"))
    with pytest.raises(SystemExit):
        run("--data", "tests/sample")
    assert "DATA is still the sample; set it to your teacher's data" in capsys.readouterr().out


# ── make_teacher ──


def test_make_teacher_fine_tunes_teacher_base_once(data, run):
    save_model("base", seed=3)
    printed = run("--teacher-base", "base", "--teacher-epochs", "2")
    assert "base is fine-tuned into it" in printed
    assert BertForSequenceClassification.from_pretrained(
        "finetuned_bert_japanese"
    ).config.id2label == {0: "negative", 1: "positive"}
    before = Path("finetuned_bert_japanese/model.safetensors").read_bytes()
    assert "fine-tuned into it" not in run("--teacher-base", "base")
    assert Path("finetuned_bert_japanese/model.safetensors").read_bytes() == before


def test_make_teacher_takes_labels_from_data(data, run):
    """The base is a BERT without a classifier, as pretrained ones are."""
    save_model("base")
    BertModel(tiny_model().config).save_pretrained("base")
    for split in "train", "val", "test":
        write_csv(
            data / f"{split}.csv", [(text, i % 3) for i, (text, _) in enumerate(rows(split, 48))]
        )
    run("--teacher-base", "base", "--teacher-epochs", "1", "--epochs", "1")
    assert BertForSequenceClassification.from_pretrained("distilled_model").config.id2label == {
        0: "LABEL_0",
        1: "LABEL_1",
        2: "LABEL_2",
    }


def test_make_teacher_stopped_by_ctrl_c_saves_no_teacher(data, run, fails, monkeypatch):
    save_model("base")
    interrupt_in(monkeypatch, 2, KeyboardInterrupt())
    assert "stopped by Ctrl-C" in fails("--teacher-base", "base")
    assert not Path("finetuned_bert_japanese").exists() and not Path("distilled_model").exists()
    assert "goes on after epoch 1" in run("--teacher-base", "base")


def test_make_teacher_resumes_and_leaves_no_half_teacher(data, run, monkeypatch):
    save_model("base")
    interrupt_in(monkeypatch, 2, RuntimeError("killed"))
    with pytest.raises(RuntimeError):
        run("--teacher-base", "base")
    assert not Path("finetuned_bert_japanese").exists()
    assert "goes on after epoch 1" in run("--teacher-base", "base")


def test_make_teacher_refuses_second_run(data, fails):
    save_model("base")
    with distill.filelock.FileLock("made.distill_lock"):
        assert "TEACHER = 'made': another run is using it" in fails(
            "--teacher", "made", "--teacher-base", "base"
        )


def test_make_teacher_clears_lock_of_killed_run(data, run):
    save_model("base")
    for made in False, True:
        Path("made.distill_lock").touch()
        run("--teacher", "made", "--teacher-base", "base", "--teacher-epochs", "1", "--epochs", "1")
        assert Path("made").is_dir() and not Path("made.distill_lock").exists()


@pytest.mark.parametrize(
    "changes",
    [
        {"problem_type": "multi_label_classification", "labels": ("a", "b", "c")},
        {"problem_type": "regression", "labels": ("score",)},
    ],
)
def test_set_labels_makes_any_base_choose_one_label(data, run, changes):
    save_model("base", **changes)
    for epochs in "1", "2":  # the made teacher is accepted in later runs, too
        run(
            "--teacher",
            "made",
            "--teacher-base",
            "base",
            "--teacher-epochs",
            "1",
            "--epochs",
            epochs,
        )
    for folder in "made", "distilled_model":
        config = json.loads(Path(folder, "config.json").read_text("utf-8"))
        assert config["problem_type"] == "single_label_classification"
    texts = [text for text, _ in rows("test", 8)]
    classify = pipeline("text-classification", "distilled_model", device="cpu")
    for ours, stock in zip(distill.load_student("distilled_model")(texts), classify(texts)):
        assert ours["label"] == stock["label"] and abs(ours["score"] - stock["score"]) < 1e-5


def test_made_teacher_has_not_seen_test_of_a_run_with_another_seed(run, settings):
    write_csv("all.csv", rows("train", 120))
    save_model("base")
    made = ["--data", "all.csv", "--teacher", "made", "--teacher-base", "base"]
    made += ["--teacher-epochs", "1", "--epochs", "1"]
    tests = []
    for seed in "1", "2":
        run(*made, "--seed", seed)
        with open("distilled_model/predictions.csv", encoding="utf-8-sig", newline="") as file:
            tests.append({row["text"] for row in csv.DictReader(file)})
    assert tests[0] == tests[1]
