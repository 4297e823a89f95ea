"""A teacher's folder as strangers leave it: label maps, run-time flags, a tokenizer that is half described."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import distill
from conftest import ROOT, SAMPLE, report, rows, save_model, write_csv

MODEL = Path("distilled_model/model.safetensors")


def edit(path, **changes):
    """Change a JSON file; None takes a key away."""
    content = json.loads(Path(path).read_text("utf-8")) | changes
    Path(path).write_text(json.dumps({name: value for name, value in content.items() if value is not None}), "utf-8")


# ── Label maps ──


@pytest.mark.parametrize("id2label, label2id, expected", [
    ({0: "低", 1: "高"}, {"低": 0, "高": 1}, ["低", "高"]),
    ({0: "低", 1: "高"}, None, ["低", "高"]),
    ({0: "低", 1: "高"}, {"LABEL_0": 0, "LABEL_1": 1}, ["低", "高"]),  # left from before the names were set
    ({0: "低", 1: "高"}, {"低": "0", "高": "1"}, ["低", "高"]),  # numbers as texts
    ({0: "低", 1: "高"}, {"0": "低", "1": "高"}, ["低", "高"]),  # turned round
    ({0: "低", 1: "高"}, {"0": "LABEL_0", "1": "LABEL_1"}, ["低", "高"]),
    ({0: "LABEL_0", 1: "LABEL_1"}, {"高": 0, "低": 1}, ["高", "低"]),
    (None, None, ["LABEL_0", "LABEL_1"]),
    ({0: "LABEL_0", 1: "LABEL_1"}, {"LABEL_1": 0, "LABEL_0": 1}, None),
    ({0: 1, 1: 0}, {"1": 0, "0": 1}, ["1", "0"]),
    ({0: "1", 1: "0"}, {"1": "0", "0": "1"}, ["1", "0"]),
    ({0: "低", 1: "高"}, {"低": 1, "高": 0}, None),
    ({0: "低", 1: "高"}, {"低": 0, "高": 0}, None),
    ({0: "低", 1: "高"}, {"0": "高", "1": "低"}, None),
    ({0: "低", 1: "高"}, {"低": 1}, None),
    ({0: "低", 1: "低"}, {"低": 1}, None),
    ({1: "低", 2: "高"}, {"低": 1, "高": 2}, None),
])
def test_label_names_come_from_id2label_and_a_contradiction_is_refused(teacher, id2label, label2id, expected):
    edit(teacher / "config.json", id2label=id2label, label2id=label2id)
    if expected is None:
        with pytest.raises(distill.Problem, match="its config.json (contradicts itself|needs a different name)"):
            distill.load_config(str(teacher))
        return
    config = distill.load_config(str(teacher))
    assert config.id2label == dict(enumerate(expected)) and config.label2id == {name: number for number, name in enumerate(expected)}


def test_the_student_has_the_names_that_its_teachers_pipeline_prints(teacher, data, run):
    edit(teacher / "config.json", id2label={0: "低", 1: "高"}, label2id={"LABEL_0": 0, "LABEL_1": 1})
    for split in "train", "val", "test":
        write_csv(data / f"{split}.csv", [(text, "高" if label == "positive" else "低") for text, label in rows(split, 16)])
    run("--epochs", "1")
    saved = json.loads(Path("distilled_model/config.json").read_text("utf-8"))
    assert saved["id2label"] == {"0": "低", "1": "高"} and saved["label2id"] == {"低": 0, "高": 1}
    assert distill.load_student("distilled_model")(["良い"])[0]["label"] in ("低", "高")


# ── Run-time flags ──


@pytest.mark.parametrize("flags", [{"return_dict": False}, {"output_hidden_states": True}, {"output_attentions": True}, {"torchscript": True},
                                   {"return_dict": False, "output_hidden_states": True, "use_cache": False}])
def test_run_time_flags_of_a_teachers_config_change_nothing(teacher, data, run, flags):
    run("--epochs", "2")
    before, config = MODEL.read_bytes(), json.loads(Path("distilled_model/config.json").read_text("utf-8"))
    edit(teacher / "config.json", **flags)
    run("--epochs", "2", "--cache", "other")
    assert MODEL.read_bytes() == before
    saved = json.loads(Path("distilled_model/config.json").read_text("utf-8"))
    assert all(saved.get(name) == config.get(name) for name in ("return_dict", "output_hidden_states", "output_attentions"))


def test_run_time_flags_of_a_student_do_not_take_its_fast_layer_away(teacher):
    edit(teacher / "config.json", output_hidden_states=True, return_dict=False)
    model, _ = distill.load_saved(str(teacher))
    assert not model.config.output_hidden_states and model.config.return_dict
    assert distill.load_student(str(teacher))(["良い"])[0]["score"] >= 0.5


# ── A tokenizer that is half described ──


def notes(printed):
    return "\n".join(line for line in printed.splitlines() if line.startswith("note "))


def test_a_folder_that_does_not_name_its_tokenizer_class_is_told(teacher, data, run):
    Path(teacher, "tokenizer_config.json").write_text('{"do_lower_case": false}', "utf-8")
    assert "finetuned_bert_japanese does not name its tokenizer_class: texts are read by BertTokenizer." in notes(run("--epochs", "1"))
    edit(teacher / "config.json", tokenizer_class="BertJapaneseTokenizer")
    assert "tokenizer_class" not in notes(run("--epochs", "1"))


@pytest.mark.parametrize("version, mecab_kwargs, told", [
    ("4.30.2", None, "saved by 4.30"), ("4.45.2", {}, "saved by 4.45"), (None, None, "an unknown version"), ("4.46.0", None, ""),
    ("5.24.0", None, ""), ("4.30.2", {"mecab_dic": "unidic_lite"}, "")])
def test_a_folder_that_does_not_name_its_dictionary_is_told_if_the_default_has_changed_since(teacher, data, run, version, mecab_kwargs, told):
    edit(teacher / "config.json", transformers_version=version)
    edit(teacher / "tokenizer_config.json", mecab_kwargs=mecab_kwargs)
    found = notes(run("--epochs", "1"))
    assert ("does not name its mecab_dic" in found) == bool(told) and told in found


def test_a_tokenizer_of_special_tokens_alone_is_refused(teacher, data, fails):
    (teacher / "vocab.txt").write_text("[PAD]\n[UNK]\n[CLS]\n[SEP]\n[MASK]\n")
    assert "its vocabulary holds nothing but special tokens" in fails()


# ── Weights that the configuration does not know ──


def test_layers_that_the_configuration_does_not_know_are_refused(teacher, data, fails):
    edit(teacher / "config.json", num_hidden_layers=2)
    assert "its file holds layers, or parts of layers, that its config.json does not know (bert.encoder.layer.2." in fails()


def test_other_weights_that_are_not_used_are_told(teacher, data, run):
    weights = load_file(teacher / "model.safetensors")
    save_file(weights | {"cls.predictions.bias": torch.zeros(3), "bert.embeddings.position_ids": torch.arange(4)}, teacher / "model.safetensors",
              {"format": "pt"})
    shutil.copy(teacher / "model.safetensors", teacher / "model.backup.safetensors")
    assert "holds weights that a BertForSequenceClassification does not use: cls.predictions.bias" in notes(run("--epochs", "1"))
    assert report()["teacher"]["bytes"] == Path(teacher, "model.safetensors").stat().st_size


# ── A word that the student does not know ──


def test_predict_names_words_that_the_student_does_not_know(teacher, monkeypatch, capsys):
    distill.main(["--output", str(teacher), "--predict", "この店の料理は美味しい。", "接客は最悪だった。", "接客は最悪だった。", "😀"])
    printed = capsys.readouterr()
    assert len(printed.out.splitlines()) == 4 and all(re.fullmatch(r"\w+\t[01]\.\d{4}", line) for line in printed.out.splitlines())
    assert printed.err.splitlines() == ["note      the student does not know 最悪", "note      the student does not know 😀"]


def test_the_readmes_examples_hold_no_word_that_the_sample_student_does_not_know():
    tokenizer = distill.transformers.AutoTokenizer.from_pretrained(SAMPLE / "base")
    readme = (ROOT / "README.md").read_text("utf-8")
    commands = re.findall(r"^python distill.py --predict (.*)$", readme, re.M) + re.findall(r"^(?:predict\(|print\(pipeline)(.*)$", readme, re.M)
    texts = [text for command in commands for text in re.findall(r'"([^"]*。)"', command)]
    assert len(texts) >= 6
    for text in texts:
        assert distill.unknown_words(tokenizer, text) == [], text


def test_predict_takes_texts_and_pairs_alone_and_needs_no_standard_input(teacher):
    for rows in [["a", "b", "c"]], [[]], [["a"], ["a", "b"]], [3]:
        with pytest.raises(distill.Problem, match="a list of texts, or of pairs"):
            distill.load_student(teacher)(rows)
    for more, told in (["良い"], None), ([], b"no standard input to read them from"):
        command = f"{sys.executable} {ROOT / 'distill.py'} --output {teacher} --predict {' '.join(more)} <&-"
        done = subprocess.run(["bash", "-c", command], capture_output=True)
        assert done.returncode == (1 if told else 0) and (told or b"") in done.stderr and b"Traceback" not in done.stderr
