"""One mistake after another: each ends with one message that names the value, what is accepted and what to do."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import datasets
import pytest
import torch
from transformers import AutoTokenizer, BertForMaskedLM, BertModel

import distill
from conftest import ROOT, SAMPLE, VOCABULARY, rows, save_model, tiny_model, write_csv


def edit_config(folder, **changes):
    path = Path(folder, "config.json")
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


# ── Settings ──

BAD = {
    "TEACHER": [""], "NUM_LAYERS": ["0", "1.5", "two", "None", "101"], "ALPHA": ["-0.1", "1.1", "half", "nan", "True", "1" + "0" * 400],
    "TEMPERATURE": ["0", "-1", "inf"], "EPOCHS": ["0", "2.0", "1" + "0" * 400], "PATIENCE": ["0"], "BATCH_SIZE": ["0", "-8"],
    "LEARNING_RATE": ["0", "-1e-4", "fast"], "SCHEDULE": ["cosine"], "WARMUP_STEPS": ["-1"], "WEIGHT_DECAY": ["-0.1"],
    "MAX_GRAD_NORM": ["0"], "SEED": ["-1", "x"], "STUDENT_INIT": [" "], "STUDENT": ["lstm"],
    "AUGMENT": ["-1", "0.5"], "AUGMENT_MASK": ["1.1"],
    "AUGMENT_NGRAM": ["-0.1"], "UNLABELED": [" "], "GENERATOR": [" "], "BILSTM_WORDS": ["None"], "BILSTM_EMBEDDING": ["0"],
    "BILSTM_HIDDEN": ["x", "10001"], "BILSTM_LEARNING_RATE": ["0"], "EXPORT": ["tf", "int8"], "MAX_LENGTH": ["3", "12.5"],
    "INIT_LAYERS": ["inner", "(0, 1)", "(-1,)", "7", "()"],
    "REFIT_WORDS": ["-1", "1.5"], "DROPOUT": ["1", "-0.1", "x"], "TEXT_COLUMN": [""], "OUTPUT": [" "],
    "METHOD": ["kl", "None"], "TRAIN_FRACTION": ["0", "1.1"], "LOSS_WEIGHTS": ["()", "1", "(1, 1)"],
    "MASK_RATE": ["1.5"], "GENERATOR_STEPS": ["0"],
    "STUDENT_STEPS": ["0.5"], "GENERATOR_LEARNING_RATE": ["0"],
    "TEACHER_EPOCHS": ["0"], "TEACHER_LEARNING_RATE": ["0"], "CACHE": [""],
}


@pytest.mark.parametrize("name, value", [(name, value) for name, values in BAD.items() for value in values])
def test_a_setting_of_the_wrong_type_or_range(fails, name, value):
    message = fails(f"--{name.lower().replace('_', '-')}={value}")
    assert re.search(rf"\n  {name} = .*: must be .+", message) and message.count("\n") == 1


def test_all_faults_of_the_settings_at_once(fails):
    message = fails("--alpha", "2", "--epochs", "0", "--schedule", "wavy", "--seed", "-3")
    assert [line.split(" = ")[0].strip() for line in message.splitlines()[1:]] == ["EPOCHS", "SEED", "ALPHA", "SCHEDULE"]


def test_a_misspelt_option(capsys):
    with pytest.raises(SystemExit) as exit:
        distill.main(["--alhpa", "0.5"])
    assert exit.value.code == 2 and "--alhpa" in capsys.readouterr().err


def test_exit_status_and_message_of_the_real_command(tmp_path):
    done = subprocess.run([sys.executable, str(ROOT / "distill.py"), "--alpha", "7"], capture_output=True, text=True)
    assert done.returncode == 1 and done.stdout == ""
    assert done.stderr == "distill.py: these settings must be put right:\n  ALPHA = 7: must be a number from 0 to 1\n"


def test_output_that_cannot_be_written(teacher, data, fails):
    Path("file").write_text("x")
    message = fails("--output", "file/model", "--cache", "file/cache")
    assert "OUTPUT = 'file/model': cannot be written" in message and "CACHE = 'file/cache': cannot be written" in message


def test_output_that_is_someone_elses_is_left_alone(teacher, data, fails):
    Path("thesis").mkdir()
    Path("thesis/chapter1.txt").write_text("it was a dark and stormy night")
    assert "was not written by distill.py and is not overwritten" in fails("--output", "thesis")
    assert os.listdir("thesis") == ["chapter1.txt"]
    for name, other in ("TEACHER", "finetuned_bert_japanese"), ("DATA", "data"), ("CACHE", ".distill_cache"):
        assert f"would replace {name}; it must not be or contain them" in fails("--output", other)


def test_an_old_student_survives_a_run_that_fails(teacher, data, run, fails):
    run("--epochs", "1")
    before = {file.name: file.read_bytes() for file in Path("distilled_model").iterdir()}
    fails("--learning-rate", "1e30")
    fails("--teacher", "./nowhere")
    assert {file.name: file.read_bytes() for file in Path("distilled_model").iterdir()} == before


def test_a_loss_that_is_not_a_number(teacher, data, fails):
    message = fails("--learning-rate", "1e30", "--max-grad-norm", "1e30")
    assert "loss is not a number any more in epoch" in message and "Lower LEARNING_RATE (now 1e+30)" in message


def test_a_tracker_that_is_not_there(teacher, data, fails):
    assert "REPORT_TO = 'nosuch'" in fails("--report-to", "nosuch")


# ── Teacher ──


def test_no_teacher_and_data_of_ones_own(data, fails):
    message = fails()
    assert "TEACHER = './finetuned_bert_japanese': no such folder" in message and "TEACHER_BASE" in message
    assert not Path(".distill_cache/sample_teacher").exists()


def test_an_empty_teacher_folder(data, fails):
    Path("finetuned_bert_japanese").mkdir()
    assert "holds no model (no config.json" in fails()


def test_a_file_in_place_of_a_folder(teacher, data, fails):
    assert "config.json': holds no model" in fails("--teacher", str(teacher / "config.json"))
    assert "vocab.txt' holds no tokenizer" in fails("--tokenizer", str(teacher / "vocab.txt"))


def test_a_hub_name_that_cannot_be_reached(data, monkeypatch, fails):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert "TEACHER = 'someone/model': cannot be loaded" in fails("--teacher", "someone/model")


@pytest.mark.parametrize("config", ['{"model_type": "bert",', "", "[]", '{"model_type": "no such"}'])
def test_a_broken_config(teacher, data, fails, config):
    (teacher / "config.json").write_text(config)
    assert "TEACHER = './finetuned_bert_japanese': cannot be loaded" in fails()


@pytest.mark.parametrize("harm", ["truncated", "empty", "missing", "other shape"])
def test_broken_weights(teacher, data, fails, harm):
    path = teacher / "model.safetensors"
    if harm == "missing":
        path.unlink()
    elif harm == "other shape":
        edit_config(teacher, intermediate_size=48)
    else:
        path.write_bytes(path.read_bytes()[:5000 if harm == "truncated" else 0])
    assert "TEACHER = './finetuned_bert_japanese': its weights cannot be loaded" in fails()


def test_no_fine_tuned_classifier(teacher, data, fails):
    BertModel(tiny_model().config).save_pretrained(teacher)
    assert "is a BertModel" in fails() and "TEACHER_BASE" in fails()
    edit_config(teacher, architectures=["BertForSequenceClassification"])  # says so, but has none
    message = fails()
    assert "not a fine-tuned classifier" in message and "classifier.bias, classifier.weight" in message


def test_not_a_sequence_classifier(teacher, data, fails):
    BertForMaskedLM(tiny_model().config).save_pretrained(teacher)
    assert "is a BertForMaskedLM; accepted is" in fails()


@pytest.mark.parametrize("changes", [{"problem_type": "multi_label_classification"}, {"problem_type": "regression"}])
def test_not_a_choice_of_one_label(teacher, data, fails, changes):
    edit_config(teacher, **changes)
    assert "chooses one of two or more labels" in fails()


def test_more_student_layers_than_the_teacher_has(teacher, data, fails):
    assert "the teacher has layers 0 to 2" in fails("--num-layers", "4")
    assert "the teacher has layers 0 to 2" in fails("--num-layers", "1", "--init-layers", "(3,)")


# ── Tokenizer ──


def test_no_tokenizer_and_the_fix(data, fails, run):
    save_model("finetuned_bert_japanese", tokenizer=False)
    message = fails()
    assert "holds no tokenizer" in message and 'TOKENIZER to the one the teacher was made with' in message
    AutoTokenizer.from_pretrained(SAMPLE / "base").save_pretrained("tokenizer")
    run("--tokenizer", "tokenizer", "--epochs", "1")
    assert Path("distilled_model/vocab.txt").exists()


def test_a_tokenizer_with_ids_beyond_the_vocabulary(data, fails):
    save_model("finetuned_bert_japanese", vocab_size=500)
    assert f"has ids up to {VOCABULARY - 1}, the teacher only 0 to 499" in fails()


@pytest.mark.parametrize("package", ["fugashi", "unidic_lite"])
def test_fugashi_or_unidic_lite_not_installed(teacher, data, fails, monkeypatch, package):
    monkeypatch.setitem(sys.modules, package, None)
    message = fails()
    assert package in message and "pip install fugashi unidic-lite" in message


def test_max_length_beyond_the_positions(teacher, data, fails):
    assert "MAX_LENGTH = 65: the teacher takes at most 64 tokens" in fails("--max-length", "65")


# ── Data ──


def test_data_that_is_not_there(teacher, fails):
    assert "DATA = './nowhere': no such file or folder" in fails("--data", "./nowhere")


def test_the_sample_with_a_teacher_of_ones_own(data, fails):
    save_model("finetuned_bert_japanese", labels=("bad", "good"))
    message = fails("--data", "tests/sample")
    assert "DATA is still the sample" in message and "(bad, good)" in message


@pytest.mark.parametrize("name", ["val", "test", "train"])
def test_a_missing_split(teacher, data, fails, name):
    (data / f"{name}.csv").unlink()
    message = fails()
    assert f"has no {name}" in message and "found: " in message and "one single file" in message


def test_a_folder_without_data(teacher, fails):
    Path("data").mkdir()
    Path("data/notes.txt").write_text("x")
    assert "has no train, no val or validation or valid or dev, no test (found: nothing)" in fails()


def test_a_file_of_another_kind(teacher, fails):
    Path("data.xlsx").write_bytes(b"PK")
    message = fails("--data", "data.xlsx")
    assert "data.xlsx: cannot be read" in message and ".csv, .tsv, .jsonl, .json, .parquet" in message


def test_a_missing_column(teacher, data, fails):
    write_csv(data / "val.csv", rows("val", 4), ("文", "label"))
    assert "data/val.csv has no column text; its columns are 文, label" in fails()


@pytest.mark.parametrize("name, content", [
    ("train.csv", b""), ("train.csv", b"text,label\n"), ("train.jsonl", b""), ("train.json", b"[]"), ("train.json", b"[1"),
    ("train.parquet", b"no parquet"),
])
def test_empty_and_broken_files(teacher, data, fails, name, content):
    (data / "train.csv").unlink()
    (data / name).write_bytes(content)
    message = fails()
    assert f"{data / name}: cannot be read" in message and "Accepted are .csv" in message and message.count("\n") == 0


def test_empty_texts_and_missing_labels_are_counted(teacher, data, fails):
    table = rows("train", 20)
    for number in 2, 5, 7, 8, 9, 11:
        table[number] = ("　 ", table[number][1])
    table[3] = (table[3][0], "")
    write_csv(data / "train.csv", table)
    message = fails()
    assert "train: text empty or not a text in 6 rows: 3, 6, 8, 9, 10, …" in message and "train: no label in 1 rows: 4" in message


def test_missing_values_in_jsonl(teacher, data, fails):
    (data / "train.csv").unlink()
    (data / "train.jsonl").write_text('{"text": null, "label": "positive"}\n{"text": "良い", "label": null}\n{"text": "雨"}\n', "utf-8")
    message = fails()
    assert "train: text empty or not a text in 1 rows: 1" in message and "train: no label in 2 rows: 2, 3" in message


def test_numbers_in_place_of_texts(teacher, data, fails):
    (data / "train.csv").unlink()
    datasets.Dataset.from_dict({"text": [0, 7], "label": ["negative", "positive"]}).to_parquet(data / "train.parquet")
    assert "train: text empty or not a text in 2 rows: 1, 2" in fails()


@pytest.mark.parametrize("label", ["neutral", "2", "-1", "0.5", "Positive", "True"])
def test_labels_that_the_teacher_does_not_have(teacher, data, fails, label):
    write_csv(data / "test.csv", [("良い", label), ("悪い", "negative")])
    assert f"test: label '{label}', which the teacher does not have (negative, positive), in 1 rows: 1" in fails()


def test_too_few_rows_to_cut(teacher, fails):
    write_csv(Path("few.csv"), rows("train", 3))
    assert "cannot be cut into train, val and test" in fails("--data", "few.csv")


def test_a_single_label_is_not_enough_for_a_new_teacher(data, fails):
    save_model("base")
    for split in "train", "val", "test":
        write_csv(data / f"{split}.csv", [(text, "good") for text, _ in rows(split, 4)])
    assert "LABEL_COLUMN = 'label': 1 different labels" in fails("--teacher-base", "base")


def test_a_package_that_is_missing(tmp_path):
    """The first mistake of all: pip install forgotten."""
    shutil.copy(ROOT / "distill.py", tmp_path)
    (tmp_path / "datasets.py").write_text("raise ModuleNotFoundError(\"No module named 'datasets'\")")
    done = subprocess.run([sys.executable, "distill.py"], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 1 and done.stderr.strip().endswith("pip install -r requirements.txt")
    assert "Traceback" not in done.stderr


def test_a_malicious_pickle_in_the_teacher_does_not_run(teacher, data, fails):
    class Evil:
        def __reduce__(self):
            return os.mkdir, ("hacked",)
    (teacher / "model.safetensors").unlink()
    torch.save({"classifier.bias": Evil()}, teacher / "pytorch_model.bin")
    assert "its weights cannot be loaded" in fails() and not Path("hacked").exists()
