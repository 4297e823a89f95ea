"""Teacher: a folder as strangers leave it, its checks, its soft labels and their cache."""

import functools
import json
import math
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import (
    ANY_JSON,
    ANY_TEXT,
    MODEL,
    SAMPLE,
    VOCABULARY,
    answer_with,
    edit_json,
    labelled,
    notes,
    outcome,
    report,
    rows,
    save_model,
    stand_in,
    tiny_model,
    write_csv,
)
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer, BertForMaskedLM, BertModel, pipeline

import distill


def edit_config(folder, **changes):
    path = Path(folder, "config.json")
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


# ── load_config ──


@pytest.mark.parametrize("file", ["", "adapter_config.json", "checkpoint-500/config.json"])
def test_load_config_lists_what_a_folder_without_model_holds(data, fails, file):
    path = Path("finetuned_bert_japanese", file)
    path.parent.mkdir(parents=True) if file else path.mkdir()
    if file:
        path.write_text("{}")
    assert f"the folder holds {file.split('/')[0] or 'nothing'}" in fails()


def test_load_config_and_tokenizer_refuse_file_in_place_of_folder(teacher, data, fails):
    for name in "config.json", "vocab.txt":
        message = fails("--teacher", str(teacher / name))
        assert str(teacher / name) in message and "Not a directory" in message
        assert "Not a directory" in fails("--tokenizer", str(teacher / name))


def test_load_config_refuses_unreachable_hub_name(data, monkeypatch, fails):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert "TEACHER = 'someone/model': cannot be loaded" in fails("--teacher", "someone/model")


@pytest.mark.parametrize(
    "config", ['{"model_type": "bert",', "", "[]", '{"model_type": "no such"}']
)
def test_load_config_refuses_broken_config(teacher, data, fails, config):
    (teacher / "config.json").write_text(config)
    assert "TEACHER = './finetuned_bert_japanese': cannot be loaded" in fails()


def classify_two_texts(folder):
    config = distill.load_config(folder)
    tokenizer = distill.load_tokenizer(folder, config)
    return distill.classify_encoded(
        distill.load_model(folder), tokenizer, distill.encode([["良い。", "悪い。"]], tokenizer, 32)
    )


@pytest.mark.parametrize("file", ["config.json", "tokenizer_config.json"])
@given(data=st.data())
def test_load_config_uses_or_refuses_any_value(teacher, file, data):
    path, distill.MAX_LENGTH = teacher / file, 32
    whole = json.loads(path.read_text("utf-8"))
    small = st.one_of(
        st.none(), st.booleans(), st.integers(-3, 3), st.floats(-2, 2), ANY_TEXT, ANY_JSON
    )
    changed = whole | {data.draw(st.sampled_from(sorted(whole))): data.draw(small)}
    try:
        path.write_text(json.dumps(changed), "utf-8")
        found = outcome(classify_two_texts, str(teacher))
        assert isinstance(found, distill.Problem) or len(found) == 2
    finally:
        path.write_text(json.dumps(whole), "utf-8")


def test_load_config_ignores_run_time_flags(teacher, data, run):
    def run_and_read(*more):
        run("--epochs", "2", *more)
        config = json.loads(Path("distilled_model/config.json").read_text("utf-8"))
        flags = "return_dict", "output_hidden_states", "output_attentions"
        return MODEL.read_bytes(), {name: config.get(name) for name in flags}

    before = run_and_read()
    whole = (teacher / "config.json").read_text("utf-8")
    for number, flags in enumerate(
        [
            {"return_dict": False, "output_hidden_states": True, "use_cache": False},
            {"output_attentions": True, "torchscript": True},
        ]
    ):
        edit_json(teacher / "config.json", **flags)
        assert run_and_read("--cache", f"cache{number}") == before
        (teacher / "config.json").write_text(whole, "utf-8")


def test_load_config_and_tokenizer_by_hub_name(data, run, tmp_path, monkeypatch):
    """A hub cache laid out by hand.

    The names are resolved as on a machine that has loaded them before.
    """
    snapshot = tmp_path / "hub" / "models--someone--teacher" / "snapshots" / ("0" * 40)
    save_model(snapshot)
    refs = snapshot.parents[1] / "refs"
    refs.mkdir()
    (refs / "main").write_text("0" * 40)
    # as by the environment variables of these names
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    run("--teacher", "someone/teacher", "--epochs", "1")
    assert report()["teacher"]["bytes"] == 4 * report()["teacher"]["parameters"]


def test_check_architecture_refuses_other_head(teacher, data, fails):
    BertForMaskedLM(tiny_model().config).save_pretrained(teacher)
    message = fails()
    assert "BertForMaskedLM" in message and "…ForSequenceClassification" in message


@pytest.mark.parametrize(
    "changes", [{"problem_type": "multi_label_classification"}, {"problem_type": "regression"}]
)
def test_check_architecture_refuses_other_problem_types(teacher, data, fails, changes):
    edit_config(teacher, **changes)
    message = fails()
    assert changes["problem_type"] in message and "one of two or more labels" in message


def test_check_architecture_refuses_model_without_classifier(teacher, data, fails):
    BertModel(tiny_model().config).save_pretrained(teacher)
    assert "is a BertModel" in fails() and "TEACHER_BASE" in fails()
    edit_config(teacher, architectures=["BertForSequenceClassification"])  # says so, but has none
    message = fails()
    assert "TEACHER = " in message and "classifier.bias, classifier.weight" in message


# ── Label names ──


@pytest.mark.parametrize(
    "id2label, label2id, expected",
    [
        ({0: "低", 1: "高"}, {"低": 0, "高": 1}, ["低", "高"]),
        ({0: "低", 1: "高"}, None, ["低", "高"]),
        (
            {0: "低", 1: "高"},
            {"LABEL_0": 0, "LABEL_1": 1},
            ["低", "高"],
        ),  # left from before the names were set
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
    ],
)
def test_checked_label_names_from_id2label_or_refused(teacher, id2label, label2id, expected):
    edit_json(teacher / "config.json", id2label=id2label, label2id=label2id)
    if expected is None:
        with pytest.raises(distill.Problem, match="finetuned_bert_japanese.*id2label.*label2id"):
            distill.load_config(str(teacher))
        return
    config = distill.load_config(str(teacher))
    assert config.id2label == dict(enumerate(expected)) and config.label2id == {
        name: number for number, name in enumerate(expected)
    }


def test_checked_label_names_are_those_of_the_student(teacher, data, run):
    edit_json(
        teacher / "config.json", id2label={0: "低", 1: "高"}, label2id={"LABEL_0": 0, "LABEL_1": 1}
    )
    for split in "train", "val", "test":
        write_csv(
            data / f"{split}.csv",
            [(text, "高" if label == "positive" else "低") for text, label in rows(split, 16)],
        )
    run("--epochs", "1")
    saved = json.loads(Path("distilled_model/config.json").read_text("utf-8"))
    assert saved["id2label"] == {"0": "低", "1": "高"} and saved["label2id"] == {"低": 0, "高": 1}
    assert distill.load_student("distilled_model")(["良い"])[0]["label"] in ("低", "高")


# ── load_tokenizer ──


@pytest.mark.parametrize("through", [[], ["between"]])
def test_base_with_tokenizer_finds_folder_named_in_config(data, run, through, settings):
    """transformers 4 wrote the name of the model that a model was made from."""
    chain = ["finetuned_bert_japanese", *through, "somewhere/base"]
    for folder, base in zip(chain, chain[1:]):
        save_model(folder, tokenizer=False)
        edit_config(folder, _name_or_path=f"./{base}/")
    AutoTokenizer.from_pretrained(SAMPLE / "base").save_pretrained("somewhere/base")
    printed = run("--epochs", "1")
    assert "tokenizer" in printed and "somewhere/base is used" in printed
    assert Path("distilled_model/vocab.txt").exists()


@pytest.mark.parametrize(
    "base", [None, "", 3, ".", "./finetuned_bert_japanese", "../gone", "gone", "/gone/base"]
)
def test_base_with_tokenizer_is_none_where_config_names_none(data, fails, base):
    folder = save_model(Path("finetuned_bert_japanese"), tokenizer=False)
    edit_config(folder, _name_or_path=base)
    assert "holds no tokenizer" in fails()


def test_base_with_tokenizer_is_hub_name_and_no_network_is_said(data, fails, monkeypatch):
    # without it, the library would try for a minute
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    folder = save_model(Path("finetuned_bert_japanese"), tokenizer=False)
    edit_config(folder, _name_or_path="someone/bert-base-japanese")
    message = fails()
    assert "'someone/bert-base-japanese'" in message and "cannot be loaded" in message


def test_check_vocabulary_notes_other_size(teacher, data, run, capsys):
    other = AutoTokenizer.from_pretrained(SAMPLE / "base")
    words = Path(SAMPLE, "base", "vocab.txt").read_text("utf-8").splitlines()
    other.save_pretrained("smaller")
    Path("smaller/vocab.txt").write_text("\n".join(words[:300]), "utf-8")
    assert "tokens, the teacher" not in run("--epochs", "1")
    printed = notes(run("--epochs", "1", "--tokenizer", "smaller"))
    assert "300 tokens" in printed and f"{VOCABULARY:,}" in printed


def test_fit_to_model_pads_at_the_end(teacher, data, run):
    tokenizer_config = json.loads((teacher / "tokenizer_config.json").read_text("utf-8"))
    (teacher / "tokenizer_config.json").write_text(
        json.dumps(tokenizer_config | {"padding_side": "left"}), "utf-8"
    )
    run("--epochs", "1")
    texts = [text for text, _ in rows("test", 8)]
    classify = pipeline("text-classification", "distilled_model", device="cpu")
    for ours, stock in zip(
        distill.load_student("distilled_model")(texts), classify(texts, batch_size=8)
    ):
        assert ours["label"] == stock["label"] and abs(ours["score"] - stock["score"]) < 1e-5


def test_load_tokenizer_refuses_folder_without_and_names_fix(data, fails, run):
    save_model("finetuned_bert_japanese", tokenizer=False)
    message = fails()
    assert "holds no tokenizer: the folder holds config.json" in message
    assert "TOKENIZER instead: README.md lists some by" in message and str(VOCABULARY) in message
    AutoTokenizer.from_pretrained(SAMPLE / "base").save_pretrained("tokenizer")
    run("--tokenizer", "tokenizer", "--epochs", "1")
    assert Path("distilled_model/vocab.txt").exists()


def test_load_model_names_shapes_that_differ_from_the_config(teacher, data, fails):
    edit_json(teacher / "config.json", id2label={"0": "negative", "1": "positive", "2": "mixed"})
    edit_json(teacher / "config.json", label2id={"negative": 0, "positive": 1, "mixed": 2})
    message = fails()
    assert "classifier.bias (3,)" in message and "(2,)" in message


@pytest.mark.parametrize("package", ["fugashi", "unidic_lite"])
def test_load_tokenizer_names_missing_package(teacher, data, fails, monkeypatch, package):
    monkeypatch.setitem(sys.modules, package, None)
    message = fails()
    assert package in message and "finetuned_bert_japanese" in message


def test_load_tokenizer_refuses_max_length_beyond_positions(teacher, data, fails):
    assert "MAX_LENGTH = 65: the teacher takes at most 64 tokens" in fails("--max-length", "65")


def test_check_vocabulary_refuses_ids_beyond_the_teacher(data, fails):
    save_model("finetuned_bert_japanese", vocab_size=500)
    message = fails()
    assert f"ids up to {VOCABULARY - 1}" in message and "the teacher" in message
    assert "499" in message


def test_check_vocabulary_refuses_special_tokens_alone(teacher, data, fails):
    (teacher / "vocab.txt").write_text("[PAD]\n[UNK]\n[CLS]\n[SEP]\n[MASK]\n")
    assert "has 0 tokens that are not special" in fails()


def test_warn_if_tokenizer_guessed_without_tokenizer_class(teacher, data, run):
    Path(teacher, "tokenizer_config.json").write_text('{"do_lower_case": false}', "utf-8")
    found = notes(run("--epochs", "1"))
    assert "does not name its tokenizer_class: BertTokenizer is taken" in found
    edit_json(teacher / "config.json", tokenizer_class="BertJapaneseTokenizer")
    assert "tokenizer_class" not in notes(run("--epochs", "1"))


@pytest.mark.parametrize(
    "version, mecab_kwargs, told",
    [
        ("4.30.2", None, "saved by transformers 4.30.2"),
        ("4.45.2", {}, "saved by transformers 4.45.2"),
        (None, None, "saved by transformers None"),
        ("4.46.0", None, ""),
        ("5.24.0", None, ""),
        ("4.30.2", {"mecab_dic": "unidic_lite"}, ""),
    ],
)
def test_warn_if_tokenizer_guessed_without_dictionary(
    teacher, settings, capsys, version, mecab_kwargs, told
):
    settings.setattr(distill, "MAX_LENGTH", 32)
    edit_json(teacher / "config.json", transformers_version=version)
    edit_json(teacher / "tokenizer_config.json", mecab_kwargs=mecab_kwargs)
    distill.load_tokenizer(str(teacher), distill.load_config(str(teacher)))
    found = notes(capsys.readouterr().out)
    assert ("mecab_dic" in found) == bool(told) and told in found


# ── load_model ──


def test_load_model_is_frozen_in_eval_mode_and_float32():
    tiny_model().half().save_pretrained("half")
    assert json.loads(Path("half/config.json").read_text())["dtype"] == "float16"
    teacher = distill.load_model("half")
    assert teacher.dtype == torch.float32 and not teacher.training
    assert not any(tensor.requires_grad for tensor in teacher.parameters())


@pytest.mark.parametrize("harm", ["truncated", "empty", "missing", "pointer of git-lfs"])
def test_load_model_refuses_broken_weights(teacher, data, fails, harm):
    path = teacher / "model.safetensors"
    if harm == "missing":
        path.unlink()
    elif harm == "pointer of git-lfs":
        path.write_text("version https://git-lfs.github.com/spec/v1\n")
    else:
        path.write_bytes(path.read_bytes()[: 5000 if harm == "truncated" else 0])
    assert "TEACHER = './finetuned_bert_japanese': its weights cannot be loaded" in fails()


def test_load_model_reads_pytorch_model_bin(teacher, data, run):
    run("--output", "safe", "--cache", "other")
    torch.save(load_file(teacher / "model.safetensors"), teacher / "pytorch_model.bin")
    (teacher / "model.safetensors").unlink()
    run()
    safe, ours = load_file("safe/model.safetensors"), load_file(MODEL)
    for name in safe:
        assert torch.allclose(safe[name], ours[name], atol=1e-6), name


@pytest.mark.parametrize(
    "file", ["config.json", "tokenizer_config.json", "vocab.txt", "model.safetensors"]
)
@given(data=st.data())
def test_load_model_uses_or_refuses_damaged_files(teacher, file, data):
    path, distill.MAX_LENGTH = teacher / file, 32
    whole = path.read_bytes()
    place = data.draw(st.integers(0, min(len(whole), 3000)))
    try:
        path.write_bytes(
            whole[:place]
            + data.draw(st.binary(max_size=8))
            + data.draw(st.sampled_from([b"", whole[place + 1 :]]))
        )
        found = outcome(classify_two_texts, str(teacher))
        assert isinstance(found, distill.Problem) or len(found) == 2
    finally:
        path.write_bytes(whole)


def test_check_vocabulary_refuses_tokenizer_without_padding(teacher):
    """Found by the test above, in its long form."""
    path = teacher / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text("utf-8")) | {"pad_token": None}), "utf-8")
    distill.MAX_LENGTH = 32
    assert "None for padding" in str(outcome(classify_two_texts, str(teacher)))


def test_check_teacher_weights_refuses_unknown_layers(teacher, data, fails):
    edit_json(teacher / "config.json", num_hidden_layers=2)
    assert "bert.encoder.layer.2." in fails()


def test_check_teacher_weights_names_unused_weights(teacher, data, run):
    weights = load_file(teacher / "model.safetensors")
    save_file(
        weights
        | {"cls.predictions.bias": torch.zeros(3), "bert.embeddings.position_ids": torch.arange(4)},
        teacher / "model.safetensors",
        {"format": "pt"},
    )
    found = notes(run("--epochs", "1"))
    assert "BertForSequenceClassification" in found and "cls.predictions.bias" in found


@pytest.mark.parametrize(
    "name", ["pytorch_model.bin", "model.safetensors.index.json", "pytorch_model.bin.index.json"]
)
def test_warn_if_several_weights_says_which_are_read(teacher, name, capsys):
    distill.load_model(str(teacher))
    assert notes(capsys.readouterr().out) == ""
    (teacher / name).write_text("{}", "utf-8")
    distill.load_model(str(teacher))
    printed = notes(capsys.readouterr().out)
    assert f"sets of weights, model.safetensors, {name}: the first is read" in printed


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("method", ["kd", "none"])
def test_load_model_refuses_weights_that_are_not_finite(
    teacher, data, fails, value, method, capsys
):
    weights = load_file(teacher / "model.safetensors")
    weights["bert.encoder.layer.1.output.dense.bias"][3] = value
    save_file(weights, teacher / "model.safetensors", {"format": "pt"})
    message = fails("--method", method)
    assert str(teacher) in message and "bert.encoder.layer.1.output.dense.bias" in message
    assert "labelled" not in capsys.readouterr().out


# ── preflight_checks: what can be refused before the teacher's pass ──


def test_preflight_checks_refuse_unknown_tracker(teacher, data, fails):
    assert "REPORT_TO = 'nosuch'" in fails("--report-to", "nosuch")


@pytest.mark.parametrize(
    "options, message",
    [
        (["--num-layers", "7"], "layers 0 to 2"),
        (["--report-to", "nosuch"], "REPORT_TO = 'nosuch'"),
        (["--student-init", "broken"], "STUDENT_INIT = 'broken': its weights cannot be loaded"),
        (["--student-init", "other"], "family 'roberta'"),
        (["--method", "mate", "--generator", "broken"], "GENERATOR = 'broken'"),
    ],
)
def test_preflight_checks_refuse_faults_before_teacher_pass(
    teacher, data, fails, capsys, options, message
):
    save_model("broken")
    Path("broken/model.safetensors").write_bytes(b"no weights")
    save_model("other")
    Path("other/config.json").write_text(
        Path("other/config.json").read_text().replace('"bert"', '"roberta"')
    )
    assert message in fails(*options)
    assert "labelled" not in capsys.readouterr().out


# ── check_teacher: what is said where the data hardly fit the teacher ──


def test_check_teacher_logs_nothing_of_teacher_that_fits(teacher, data, run, monkeypatch):
    answer_with(monkeypatch, lambda label: label)
    assert "teacher" not in notes(run("--epochs", "2"))


def test_check_teacher_reports_accuracy_below_largest_class(teacher, data, run, monkeypatch):
    answer_with(monkeypatch, lambda label: "negative" if label == "positive" else "positive")
    printed = run("--epochs", "2")
    assert (
        "the teacher is right on 0.0% of train; "
        "to answer negative always would be right on 50.0%. Likely causes: " in notes(printed)
    )
    assert all(
        cause in notes(printed)
        for cause in ("labels are in another order", "tokenizer or MeCab dictionary", "TEXT_COLUMN")
    )
    assert printed.index("the teacher is right on") < printed.index(" epoch   train loss")
    assert (
        "Cascade:" not in printed
        and "The teacher is wrong on every text of test.\nThe student is " in printed
    )
    assert report()["kept"] is None


def test_check_teacher_reports_single_answer(teacher, data, run, monkeypatch):
    answer_with(monkeypatch, lambda label: "positive")
    assert "the teacher answers all texts of train with positive" in notes(run("--epochs", "2"))


def test_warn_if_labels_exchanged_names_both_labels(data, run, monkeypatch):
    """Of a teacher that is right on most.

    Neutral texts are the most, and only positive and negative are exchanged.
    """
    save_model("finetuned_bert_japanese", labels=("negative", "positive", "neutral"))
    rows_of = {
        split: [
            (text, label if number % 3 == 0 else "neutral")
            for number, (text, label) in enumerate(rows(split, 48))
        ]
        for split in distill.SPLITS
    }
    for split, table in rows_of.items():
        write_csv(data / f"{split}.csv", table)

    def add(data, teacher, collate_fn):
        wrong = np.array([1, 0, 2])
        result = {}
        for split, table in data.items():
            soft_labels = np.eye(3)[wrong[table["labels"][:]]] * 0.8 + 0.1
            table = table.add_column("soft_labels", list(soft_labels)).add_column(
                "teacher_logits", list(np.log(soft_labels))
            )
            result[split] = table.add_column("teacher_seconds", np.ones(len(table)))
        return result

    monkeypatch.setattr(distill, "add_soft_labels", add)
    found = notes(run("--epochs", "2"))
    assert (
        "answers negative mostly with positive, and positive mostly with negative: "
        "are these two labels exchanged?" in found
    )
    assert found.count("exchanged?") == 1 and "is right on" not in found


# ── add_soft_labels and its cache ──


def test_add_soft_labels_equals_stock_model(teacher, data, settings):
    settings.setattr(distill, "DATA", "data")
    settings.setattr(distill, "TEMPERATURE", 3.0)
    model, tokenizer = distill.load_model(str(teacher)), AutoTokenizer.from_pretrained(teacher)
    Path(distill.CACHE).mkdir()
    table = distill.tokenize(distill.load_data([*model.config.label2id])[0], tokenizer)
    table = distill.add_soft_labels(table, model, distill.collate)
    for split in table:
        for (text, _), soft in zip(rows(split, 100), table[split]["soft_labels"]):
            logits = model(**tokenizer(text, return_tensors="pt")).logits[0]
            assert soft == pytest.approx(torch.softmax(logits / 3, -1).tolist(), abs=1e-5)
        assert min(table[split]["teacher_seconds"]) > 0


def test_add_soft_labels_asks_for_each_text_once_over_runs(teacher, data, run):
    assert labelled(run()) == (80, 0)
    before = report()["teacher"]
    assert labelled(run("--alpha", "0.9", "--temperature", "3")) == (0, 80)
    assert (
        report()["teacher"] == before
    )  # times too: they are those of the pass in which it answered
    write_csv(data / "test.csv", [("部屋は本当に広かった。", "positive"), *rows("test", 16)[1:]])
    assert labelled(run()) == (1, 79)
    assert labelled(run("--max-length", "12"))[0] > 40  # cut sentences are other sentences
    save_model(teacher, seed=1)
    assert labelled(run()) == (80, 0)


def test_add_soft_labels_resumes_stopped_pass(teacher, data, run, monkeypatch):
    predict, calls = distill.timed_logits, []

    def killed(model, loader):
        for answer in predict(model, loader):
            calls.append(len(answer[0]))
            if len(calls) == 4:
                raise RuntimeError("killed")
            yield answer

    stand_in(monkeypatch, "timed_logits", killed)
    monkeypatch.setattr(distill, "TOKENS_PER_BATCH", 200)
    with pytest.raises(RuntimeError):
        run()
    stand_in(monkeypatch, "timed_logits", predict)
    done = sum(calls[1:3])  # the first is the warm-up, the fourth came to nothing
    assert 0 < done < 80 and labelled(run()) == (80 - done, done)


def test_warn_if_timed_on_other_hardware_logs_note(teacher, data, run, monkeypatch):
    assert notes(run("--epochs", "2")).count("another processor") == 0
    assert notes(run("--epochs", "2")).count("another processor") == 0
    monkeypatch.setattr(distill.torch, "get_num_threads", functools.partial(int, 99))
    assert (
        "the teacher's seconds are from a run with another processor or number of threads"
        in notes(run("--epochs", "2"))
    )


def test_save_model_lets_transformers_4_read_the_tokenizer(teacher, tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(teacher)
    tokenizer.add_special_tokens({"additional_special_tokens": ["[匿名]"]})
    distill.save_model(tiny_model(), tokenizer, tmp_path / "saved")
    saved = json.loads(Path(tmp_path, "saved", "tokenizer_config.json").read_text("utf-8"))
    assert saved["additional_special_tokens"] == ["[匿名]"]  # what version 4 writes and reads
    assert not isinstance(saved.get("extra_special_tokens"), list)
    again = AutoTokenizer.from_pretrained(tmp_path / "saved")
    text = "[匿名]の部屋"
    assert again(text) == tokenizer(text) and "[匿名]" in again.all_special_tokens


# ── Weights that are something else ──


def resave_weights(teacher, change):
    """Replace a teacher's weights by change(weights) in pytorch_model.bin."""
    weights = load_file(teacher / "model.safetensors")
    (teacher / "model.safetensors").unlink()
    torch.save(change(weights), teacher / "pytorch_model.bin")


@pytest.mark.parametrize(
    "change, found",
    [
        (lambda weights: {f"module.{key}": w for key, w in weights.items()}, "module.bert"),
        (lambda weights: {"epoch": 3, "model_state_dict": weights}, "model_state_dict"),
        (lambda weights: tiny_model(), "pytorch_model.bin"),
    ],
    ids=["data parallel", "checkpoint", "pickled model"],
)
def test_load_model_names_what_is_found_in_place_of_weights(teacher, data, fails, change, found):
    resave_weights(teacher, change)
    message = fails()
    assert "TEACHER = './finetuned_bert_japanese'" in message and found in message
    assert "\x1b" not in message and len(message) < 2000
