"""Bad input at volume: any text, file, setting or model folder ends in a result or in one Problem, never in a library.

python -m pytest tests/test_input.py --hypothesis-profile=long  tries 500 of each kind instead of 25.
"""

import csv
import io
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from hypothesis import given
from hypothesis import strategies as st

import distill
from conftest import DEFAULTS, ROOT, save_model

STRANGE = ["", " ", "　\t", "\0", "雨\0雪", "\ud800", "雨\udfff雪", "שלום", "مرحبا", "👨‍👩‍👧‍👦", "か\u3099", "\u202e逆", "\ufeff", "\u2028",
           "𠮷鱻麤", "[CLS]", "[MASK][SEP]", "##", "\x01\x7f\x9f", "\ufdfa" * 3000, "NA", "null", "1e400", "=1+1", "../../etc/passwd"]
TEXTS = st.one_of(st.text(max_size=80), st.sampled_from(STRANGE),
                  st.text(st.characters(categories=["Lo", "Lm", "Cs", "Cc", "Cf", "So", "Zs"]), max_size=80),
                  st.lists(st.sampled_from([*STRANGE, "良い", "悪い。"]), max_size=6).map("".join))
JSON = st.recursive(st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), TEXTS),
                    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(TEXTS, inner, max_size=3)), max_leaves=4)


def outcome(function, *given):
    """What a function returns, or the Problem that it raises, which says something; nothing else may be raised."""
    try:
        return function(*given)
    except distill.Problem as problem:
        assert len(str(problem)) > 20 and "Traceback" not in str(problem)
        return problem


# ── Texts ──


@pytest.fixture(scope="module")
def student(tmp_path_factory):
    folder = save_model(tmp_path_factory.mktemp("student"))
    return distill.load_student(str(folder))


@given(texts=st.lists(TEXTS, max_size=4))
def test_any_texts_are_answered_or_refused(student, texts):
    answers = outcome(student, texts)
    if isinstance(answers, distill.Problem):
        assert "surrogates" in str(answers) and any("\ud800" <= character <= "\udfff" for text in texts for character in text)
    else:
        assert len(answers) == len(texts)
        assert all(answer["label"] in ("negative", "positive") and 0.5 <= answer["score"] <= 1 for answer in answers)


@pytest.mark.parametrize("text", ["とても良い。", "a", "あ", "。", " ", "a ", "\0", "𠮷", "😀", "\ufdfa", "か\u3099", "[CLS]"])
def test_texts_of_a_megabyte(student, text):
    """MeCab itself crashes on 200,000 letters without a space: the command would end without a word."""
    assert student([text * (1_000_000 // len(text.encode()))])[0]["score"] >= 0.5


def test_a_very_long_text_is_read_from_its_beginning(student):
    beginning = "料理は美味しいが接客は最悪だった。" * 100
    assert student([beginning + "良い" * 400_000])[0] == pytest.approx(student([beginning])[0])


# ── Files ──


def csv_file(table):
    file = io.StringIO()
    csv.writer(file).writerows(table)
    return file.getvalue().encode("utf-8", "surrogatepass")


LABELS = st.one_of(st.sampled_from(["negative", "positive", "0", "1"]), TEXTS)
ROWS = st.lists(st.tuples(TEXTS, LABELS), min_size=1, max_size=5)
CONTENTS = {
    ".csv": st.one_of(st.binary(max_size=300), ROWS.map(lambda rows: csv_file([("text", "label"), *rows])),
                      st.lists(st.lists(TEXTS, max_size=3), max_size=4).map(csv_file)),
    ".tsv": st.one_of(st.binary(max_size=300), TEXTS.map(lambda text: f"text\tlabel\n{text}\t1\n".encode("utf-8", "surrogatepass"))),
    ".jsonl": st.one_of(st.binary(max_size=300), st.lists(JSON, max_size=4).map(
        lambda rows: "\n".join(map(json.dumps, rows)).encode()), st.lists(st.fixed_dictionaries(
            {"text": st.one_of(TEXTS, JSON), "label": st.one_of(LABELS, JSON)}), max_size=4).map(
                lambda rows: "\n".join(map(json.dumps, rows)).encode())),
    ".json": st.one_of(st.binary(max_size=300), JSON.map(lambda value: json.dumps(value).encode()), ROWS.map(
        lambda rows: json.dumps([{"text": text, "label": label} for text, label in rows]).encode())),
    ".parquet": st.binary(max_size=300),
    ".txt": st.binary(max_size=300),
}


@pytest.fixture
def tokenizer(teacher):
    Path(distill.CACHE).mkdir(exist_ok=True)
    distill.MAX_LENGTH = 32
    return distill.load_tokenizer(str(teacher), distill.load_config(str(teacher)))


@pytest.mark.parametrize("kind", CONTENTS)
@given(data=st.data())
def test_any_file_is_read_or_refused(tokenizer, capsys, kind, data):
    content = data.draw(CONTENTS[kind])
    shutil.rmtree("data", ignore_errors=True)
    Path("data").mkdir()
    for split in "train", "val", "test":
        Path("data", split + kind).write_bytes(content)
    distill.DATA = "data"

    def read():
        splits, label2id = distill.load_data({"negative": 0, "positive": 1})
        return distill.tokenize(splits, tokenizer)
    found = outcome(read)
    if not isinstance(found, distill.Problem):
        assert {split: len(rows) > 0 for split, rows in found.items()} == {"train": True, "val": True, "test": True}
        assert set(found["train"]["labels"]) <= {0, 1}
    shutil.rmtree(Path(distill.CACHE, "distill_tmp"), ignore_errors=True)


# ── Settings ──

VALUES = st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), TEXTS, st.binary(max_size=5), st.tuples(),
                   st.lists(st.one_of(st.integers(), st.floats(), TEXTS), max_size=6).map(tuple), JSON)


def stays_here(value):  # as a setting that names a folder to write to
    return not isinstance(value, str) or not (set(Path(value.replace("\0", "")).parts) & {"/", "..", "~"})


@pytest.mark.parametrize("way", ["in the file", "on the command line"])
@given(name=st.sampled_from(sorted(DEFAULTS)), value=VALUES)
def test_any_value_of_any_setting_is_accepted_or_refused(way, name, value):
    for other, default in DEFAULTS.items():
        setattr(distill, other, default)
    if name in ("OUTPUT", "CACHE") and not stays_here(value):
        return
    if way == "in the file":
        setattr(distill, name, value)
    else:
        distill.apply_settings(distill.read_command_line([f"--{name.lower().replace('_', '-')}={value}"])[0])
    found = outcome(distill.check_settings)
    assert found is None or f"{name} = " in str(found)


# ── A teacher's folder ──


def load(folder):
    config = distill.load_config(folder)
    tokenizer = distill.load_tokenizer(folder, config)
    return distill.classify_encoded(distill.load_model(folder), tokenizer, distill.encode([["良い。", "悪い。"]], tokenizer, 32))


@pytest.mark.parametrize("file", ["config.json", "tokenizer_config.json"])
@given(data=st.data())
def test_any_configuration_is_used_or_refused(teacher, file, data):
    path, distill.MAX_LENGTH = teacher / file, 32
    whole = json.loads(path.read_text("utf-8"))
    small = st.one_of(st.none(), st.booleans(), st.integers(-3, 3), st.floats(-2, 2), TEXTS, JSON)
    changed = whole | {data.draw(st.sampled_from(sorted(whole))): data.draw(small)}
    try:
        path.write_text(json.dumps(changed), "utf-8")
        found = outcome(load, str(teacher))
        assert isinstance(found, distill.Problem) or len(found) == 2
    finally:
        path.write_text(json.dumps(whole), "utf-8")


@pytest.mark.parametrize("file", ["config.json", "tokenizer_config.json", "vocab.txt", "model.safetensors"])
@given(data=st.data())
def test_damaged_files_of_a_teacher_are_refused_or_make_no_difference_to_the_reading(teacher, file, data):
    path, distill.MAX_LENGTH = teacher / file, 32
    whole = path.read_bytes()
    place = data.draw(st.integers(0, min(len(whole), 3000)))
    try:
        path.write_bytes(whole[:place] + data.draw(st.binary(max_size=8)) + data.draw(st.sampled_from([b"", whole[place + 1:]])))
        found = outcome(load, str(teacher))
        assert isinstance(found, distill.Problem) or len(found) == 2
    finally:
        path.write_bytes(whole)


def test_a_tokenizer_without_padding(teacher):
    """Found by the test above, in its long form."""
    path = teacher / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text("utf-8")) | {"pad_token": None}), "utf-8")
    distill.MAX_LENGTH = 32
    assert "it has no padding token" in str(outcome(load, str(teacher)))


# ── Standard input ──


def test_lines_that_are_no_utf_8_are_refused_and_not_guessed(teacher):
    done = subprocess.run([sys.executable, str(ROOT / "distill.py"), "--output", str(teacher), "--predict"],
                          input="良い\n".encode() + "悪い\n".encode("cp932"), capture_output=True)
    assert done.returncode == 1 and b"Traceback" not in done.stderr and b"--predict: text 2 is not UTF-8" in done.stderr
    assert len(done.stdout.splitlines()) == 1  # what came before is answered
