"""Reading files and labels: what is read is what the file has, or one message names the line."""

import csv
import io
import json
import shutil
from pathlib import Path

import datasets
import numpy as np
import pytest

import distill
from conftest import report, rows, save_model, write_csv

from hypothesis import given
from hypothesis import strategies as st

COLUMNS = ["text", "label"]


def read(content, name="data.csv", columns=COLUMNS):
    """The rows of a file with this content, tuples; a Problem is returned, not raised."""
    Path(distill.CACHE).mkdir(exist_ok=True)
    Path(name).write_bytes(content if isinstance(content, bytes) else content.encode("utf-8"))
    try:
        table = distill.read_file(Path(name), columns)
        return list(zip(*(table[column] for column in columns)))
    except distill.Problem as problem:
        return problem
    finally:
        shutil.rmtree(Path(distill.CACHE, "distill_tmp"), ignore_errors=True)


# ── CSV and TSV ──


def strictly(content, separator):
    """The rows as Python's csv module reads them in strict form, each checked for its fields; None if it refuses."""
    try:
        header, *lines = [line for line in csv.reader(io.StringIO(content, newline=""), delimiter=separator, strict=True) if line]
    except (csv.Error, ValueError):
        return None
    if not lines or any(len(line) != len(header) for line in lines) or any(header.count(name) != 1 for name in COLUMNS):
        return None
    return [tuple(line[header.index(name)] for name in COLUMNS) for line in lines]


PIECES = st.lists(st.sampled_from(['"', '""', ",", "\t", "\n", "\r\n", "\r", "雨", "a", " ", "'", "pos", "neg", "\u2028", "\x0c", "\ufeff"]),
                  max_size=14).map("".join)


@pytest.mark.parametrize("kind, separator", [(".csv", ","), (".tsv", "\t")])
@given(body=PIECES, written=st.lists(st.tuples(PIECES, st.sampled_from(["pos", "neg", "a,b", "\t", '"'])), max_size=4), bom=st.booleans())
def test_read_file_gives_what_the_csv_module_reads_strictly_or_refuses(kind, separator, body, written, bom):
    """Files of any pieces, and files that Python's csv module has written."""
    file = io.StringIO()
    csv.writer(file, delimiter=separator).writerows([COLUMNS, *written])
    for content in f"text{separator}label\n{body}", file.getvalue():
        expected, found = strictly(content, separator), read("\ufeff" * bom + content, "data" + kind)
        if isinstance(found, distill.Problem):  # more may be refused: where a quote may have taken rows into a text
            assert expected is None or "takes the rows below into its text" in str(found)
        else:
            assert found == expected


@pytest.mark.parametrize("kind, separator", [(".csv", ","), (".tsv", "\t")])
@given(quotes=st.lists(st.tuples(st.sampled_from(["", "", "", '"', '""']), st.sampled_from(["", "", "", '"', '""'])), min_size=2, max_size=12),
       labels=st.lists(st.sampled_from(["pos", "neg"]), min_size=12, max_size=12))
def test_read_file_loses_no_row_to_quotes_that_are_not_closed(kind, separator, quotes, labels):
    lines = [f"{before}雨{number}{after}{separator}{label}" for number, ((before, after), label) in enumerate(zip(quotes, labels))]
    found = read("\n".join([f"text{separator}label", *lines]) + "\n", "data" + kind)
    assert isinstance(found, distill.Problem) or len(found) == len(lines)


def test_read_file_names_the_line_of_a_quote_that_is_not_closed():
    for kind, separator in (".csv", ","), (".tsv", "\t"):
        lines = [f"雨{number}{separator}{number % 2}" for number in range(20)]
        for opened in [4], [4, 9], [4, 9, 15]:
            broken = [('"' if number in opened else "") + line for number, line in enumerate(lines)]
            found = read("\n".join([f"text{separator}label", *broken]), "data" + kind)
            assert str(found).startswith(f"data{kind}, line 6: a quote opens here that does not close"), found
        broken = [*lines[:4], '"' + lines[4], *lines[5:7], f'雪"{separator}1', *lines[7:]]
        found = read("\n".join([f"text{separator}label", *broken]), "data" + kind)
        assert str(found).startswith(f"data{kind}, line 6: a quote opens here and takes the rows below into its text"), found


def test_read_file_reads_texts_that_do_span_lines_and_says_so(capsys):
    texts = ["良い店、\nまた行く", "a, b\nc, d", "価格は1,200\r\n送料は1,500", '"はい"\n\n"いいえ"', "一行"]
    file = io.StringIO()
    csv.writer(file).writerows([("label", "text"), *((str(number % 2), text) for number, text in enumerate(texts))])
    assert read(file.getvalue()) == [(text, str(number % 2)) for number, text in enumerate(texts)]
    assert "data.csv: 4 rows go over several lines, in quotes; the first from line 2" in capsys.readouterr().out


@pytest.mark.parametrize("content, where, has, header", [
    ("text,label\n雨,だ,0\n雪,1\n", 2, 3, 2), ("text,label\n雪,1\n雨\n", 3, 1, 2), ("text,label\n雨,0,\n雪,1,\n", 2, 3, 2),
    ('text,label\n"a\nb",1\n\n雨,だ,0\n', 5, 3, 2), ("id,text,label\n1,雨,0\n2,雪\n", 3, 2, 3)])
def test_read_file_names_the_line_that_has_other_fields_than_the_header(content, where, has, header):
    assert str(read(content)).startswith(f"data.csv, line {where}: {has} fields, but the header has {header}. A text with a comma")


def test_read_file_leaves_out_empty_lines_and_keeps_what_is_written():
    assert read("id,text,label\n\n1,NA,01\r\n2, 雨 ,1.0\n\n") == [("NA", "01"), (" 雨 ", "1.0")]


def test_read_file_refuses_a_column_that_is_there_twice():
    assert str(read("text,label,text\na,0,b\n")).startswith("data.csv has more than one column 'text'")


def test_read_file_shows_spaces_in_the_names_of_columns():
    assert "has no column text; its columns are '', 'text ', label" in str(read(",text ,label\n0,a,1\n"))


def test_read_file_reads_a_text_of_a_megabyte():
    assert read("text,label\n" + "雨" * 400_000 + ",0\n") == [("雨" * 400_000, "0")]


def test_read_file_takes_only_the_columns_that_are_needed():
    """A column that nobody needs may change its type, or be cut short by nobody's fault."""
    lines = [f"{number if number < 11_000 else 'guest'},雨{number},{number % 2}" for number in range(12_000)]
    assert len(read("\n".join(["user_id,text,label", *lines]))) == 12_000


@pytest.mark.parametrize("kind, separator, lines", [
    (".csv", ",", ['"A2,mixed', 'A4",negative']),  # a label that occurs nowhere else, but is one of the teacher's
    (".csv", ",", ['"A2,positive', "A3,mixed", 'A4",negative']),
    (".csv", ",", ['"A2,positive ', 'A4",negative']),
    (".csv", ",", ['"A2,positive', "", 'A4",negative']),
    (".tsv", "\t", ['"A2\tpositive', "", "", 'A4"\tnegative']),
])
@pytest.mark.parametrize("end", ["\n", "\r\n", "\r\r\n"])
def test_read_file_tells_rows_inside_quotes_by_the_teachers_labels_and_past_empty_lines(kind, separator, lines, end):
    Path(distill.CACHE).mkdir(exist_ok=True)
    content = [f"text{separator}label", f"A0{separator}positive", f"A1{separator}negative", *lines, f"A5{separator}positive"]
    Path("data" + kind).write_bytes(end.join(content).encode())
    with pytest.raises(distill.Problem, match="takes the rows below into its text"):
        distill.read_file(Path("data" + kind), COLUMNS, {"negative", "positive", "mixed"})


def test_read_file_refuses_a_header_in_the_middle():
    assert str(read("text,label\na,0\ntext,label\nb,1\n")).startswith("data.csv, line 3: the header once more")


def test_read_file_suspects_the_separator_of_a_header_in_one_piece():
    for content in "text;label\na;0\n", "text\tlabel\na\t0\n":
        assert "The fields of a .csv are separated by commas" in str(read(content))


# ── JSON ──

VALUES = st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), PIECES, st.just("\ud800"))


@given(table=st.lists(st.dictionaries(st.sampled_from(["text", "label", "id"]), VALUES), max_size=4), bom=st.booleans(), ascii=st.booleans(),
       form=st.sampled_from(["lines", "list", "indented"]), junk=st.sampled_from(["", "", "", "}", "{", '{"text": 1', "[]", "null", "1 2", "\u3000"]))
def test_read_file_gives_what_the_json_module_reads_or_refuses(table, bom, ascii, form, junk):
    dump = lambda value, **more: json.dumps(value, ensure_ascii=ascii or "\ud800" in repr(value) or "\\ud800" in repr(value), **more)
    content = "\n".join(map(dump, table)) if form == "lines" else dump(table, indent=2 if form == "indented" else None)
    content += "\n" + junk if junk else ""
    found = read("\ufeff" * bom + content, "data.jsonl")
    try:
        expected = json.loads(content) if content.lstrip().startswith("[") else [
            json.loads(line) for line in content.split("\n") if line.strip(" \t\r")]
        if not all(isinstance(row, dict) for row in expected):
            raise ValueError
    except ValueError:
        expected = None
    if isinstance(found, distill.Problem):
        assert not expected or not all(any(name in row for row in expected) for name in COLUMNS), found
    else:
        whole = lambda value: value if "\ud800" not in value else None
        label = lambda value: None if value is None else "" if value != value else whole(str(value))
        assert found == [(whole(row["text"]) if isinstance(row.get("text"), str) else None, label(row.get("label"))) for row in expected]


@pytest.mark.parametrize("content, message", [
    ('{"text": "a", "label": 0}\n{"text": "b", "label": 1\n', "data.jsonl, line 2: not a whole JSON object"),
    ('{"text": "a", "label": 0}{"text": "b", "label": 1}', "data.jsonl, line 1: more than one JSON object"),
    ('{"text": "a", "label": 0}\n[1]\n', "data.jsonl, line 2: no object. Accepted is one such as"),
    ('[{"text": "a", "label": 0}, null]', "data.jsonl, row 2: no object"),
    ('{"text": {"0": "a"}, "label": {"0": 1}}', "data.jsonl, line 1: many values in text, where one is accepted"),
    ('{"version": 1, "data": [{"text": "a", "label": 0}]}', "data.jsonl has no column text, label; its columns are version, data"),
])
def test_read_file_names_the_line_of_a_json_file_that_is_wrong(content, message):
    found = str(read(content, "data.jsonl"))
    assert found.startswith(message) and len(found) < 300


def test_read_file_reads_labels_of_mixed_types_in_json_as_they_are_written():
    assert read('{"text": "a", "label": 0}\n{"text": "b", "label": "1"}\n{"text": "c", "label": 1.0}\n', "data.jsonl") == [
        ("a", "0"), ("b", "1"), ("c", "1.0")]


# ── Encodings ──


def test_read_file_refuses_euc_jp_that_would_pass_for_cp932():
    content = "text,label\nやや良い,0\n".encode("euc_jp")
    assert content.decode("cp932") != "text,label\nやや良い,0\n"  # without an error: other characters
    assert "it may be EUC-JP. Save it as UTF-8" in str(read(content))


def test_read_file_refuses_jis_whose_bytes_pass_for_utf_8():
    for text in "雨".encode("iso2022_jp"), b"a,1\n" * 30_000 + "雨".encode("iso2022_jp"), b"\x1b(I12\x1b(B":
        assert "it is JIS (ISO-2022-JP)" in str(read(b"text,label\n" + text + b",0\n"))


def test_read_file_names_what_may_be_another_encoding_and_the_line_of_what_is_none():
    assert "it may be EUC-JP" in str(read("text,label\nやや良い①㈱,0\n".encode("euc_jis_2004")))
    assert "it may be UTF-16" in str(read("text,label\n雨,0\n".encode("utf-16-le")))
    assert "it is neither UTF-8 nor CP932: line 3" in str(read("text,label\n雨が降る,0\n雪".encode("cp932") + b"\x81\n"))


@pytest.mark.parametrize("text", ["雨が降る。", "すばらしい映画", "ひどい"])
def test_read_file_names_the_line_of_a_character_that_was_cut(text):
    content = f"text,label\n{text},0\n".encode() + text.encode()[:-1] + b",1\n" + f"{text},0\n".encode()
    assert "it is UTF-8, but line 3 holds bytes that are no character" in str(read(content))


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "cp932", "utf-16"])
def test_read_file_reads_every_encoding_it_names(encoding):
    assert read("text,label\n雨が降る①,0\nｱﾒ,1\n".encode(encoding)) == [("雨が降る①", "0"), ("ｱﾒ", "1")]


# ── The files of a folder ──


def test_two_files_for_one_split_are_refused_by_name(teacher, data, fails):
    for more in "train.tsv", "TRAIN.CSV", "train.parquet":
        (data / more).write_text("x", "utf-8")
        message = fails()
        assert "train.csv" in message and more in message and "both for train. Keep one of them" in message
        (data / more).unlink()
    write_csv(data / "dev.csv", rows("val", 4))
    assert "dev.csv and val.csv are both for val" in fails()


def test_a_text_file_is_never_labelled_data(teacher, data, run, fails):
    (data / "test.txt").write_text("a note\n", "utf-8")
    (data / "._train.csv").write_bytes(b"\0\5\26\7")
    assert "train 48 · val 16 · test 16" in run("--epochs", "1")
    assert "a .txt file has no labels" in fails("--data", "data/test.txt")


def test_files_of_a_folder_that_are_not_read_are_told(teacher, data, run):
    write_csv(data / "train_extra.csv", rows("train", 3))
    (data / "sub").mkdir()
    Path("more/sub").mkdir(parents=True)
    Path("more/a.txt").write_text("雨が降る\n", "utf-8")
    printed = run("--unlabeled", "more", "--epochs", "1")
    assert "data: sub, train_extra.csv are not read" in printed and "more: sub is not read" in printed


def test_a_data_set_with_two_names_for_one_split_and_one_beside_files_are_refused(teacher, fails):
    table = datasets.Dataset.from_dict({"text": [text for text, _ in rows("train", 8)], "label": [label for _, label in rows("train", 8)]})
    datasets.DatasetDict(train=table, dev=table, validation=table, test=table).save_to_disk("saved")
    assert "dev and validation are both for val" in fails("--data", "saved")
    datasets.DatasetDict(train=table, val=table, test=table).save_to_disk("both")
    write_csv(Path("both/train.csv"), rows("train", 8))
    assert "save_to_disk folder that also holds train.csv" in fails("--data", "both")


# ── Labels ──


def labels_of(names, **splits):
    """The numbers of the labels of each split, by a teacher with these names; or the Problem."""
    Path(distill.CACHE).mkdir(exist_ok=True)
    shutil.rmtree("data", ignore_errors=True)
    Path("data").mkdir()
    for split in distill.SPLITS:
        labels = splits.get(split, splits["train"])
        write_csv(Path("data", f"{split}.csv"), [(f"雨{number}", label) for number, label in enumerate(labels)])
    distill.DATA = "data"
    try:
        found, label2id = distill.load_data({name: number for number, name in enumerate(names)} if names else None)
        return {split: found[split]["labels"][:] for split in found} | {"names": list(label2id)}
    except distill.Problem as problem:
        return str(problem)


@pytest.mark.parametrize("names, written, expected", [
    (["negative", "positive"], ["positive", "negative"], [1, 0]),
    (["negative", "positive"], ["1", "0"], [1, 0]),
    (["negative", "positive"], ["1.0", "0.0"], [1, 0]),
    (["1.0", "0.0"], ["1.0", "0.0"], [0, 1]),  # looked up as they are written
    (["1.0", "0.0"], ["1", "0"], [0, 1]),  # the same numbers: still the names
    (["1", "0"], ["1.0", "0.0"], [0, 1]),
    (["1", "0"], ["1", "0"], [0, 1]),
    (["1", "2"], ["0", "1"], [0, 1]),  # 0 is no name: numbers, all of them
    (["1", "2"], ["1", "2"], [0, 1]),
    (["v1.0", "v2.0"], ["v2.0", "v1.0"], [1, 0]),
    (["01", "1"], ["01", "1"], [0, 1]),
    (["False", "True"], ["True", "False"], [1, 0]),
    (["True", "False"], ["1", "0"], [0, 1]),  # 1 is True, whichever output that is
    (["true", "false"], ["1.0", "0.0"], [0, 1]),
])
def test_labels_are_names_first_and_else_numbers(names, written, expected):
    assert labels_of(names, train=written)["train"] == expected


def test_labels_are_read_one_way_in_all_splits(capsys):
    # 1 by itself could be a name, and would be in val; but train has 0, which is none
    assert labels_of(["1", "2"], train=["0", "1"], val=["1", "1"], test=["0"])["val"] == [1, 1]
    capsys.readouterr()
    assert labels_of(["1", "0"], train=["1", "0"])["train"] == [0, 1]
    assert "taken as the teacher's names (1, 0), not as the numbers of its outputs" in capsys.readouterr().out
    message = labels_of(["negative", "positive"], train=["negative", "positive"], test=["0", "1"])
    assert "'negative' in train is a name" in message and "'0' in test can only be a number" in message


@pytest.mark.parametrize("written, names, numbers", [
    (["1.0", "2.0", "3.0"], ["1", "2", "3"], [0, 1, 2]), (["1", "2", "3"], ["1", "2", "3"], [0, 1, 2]),
    (["10", "9", "-1"], ["-1", "9", "10"], [2, 1, 0]), (["0", "2"], ["0", "2"], [0, 1]), (["0.5", "10", "2"], ["0.5", "2", "10"], [0, 2, 1]),
    (["0", "1", "2"], ["LABEL_0", "LABEL_1", "LABEL_2"], [0, 1, 2]), (["1.0", "0.0"], ["LABEL_0", "LABEL_1"], [1, 0]),
    (["b", "a"], ["a", "b"], [1, 0]), (["01", "02"], ["01", "02"], [0, 1])])
def test_the_names_of_a_new_teacher_are_those_of_the_data(written, names, numbers):
    found = labels_of(None, train=written)
    assert found["names"] == names and found["train"] == numbers


def test_class_labels_that_the_splits_number_differently_are_refused_where_the_numbers_count():
    Path(distill.CACHE).mkdir(exist_ok=True)
    one = datasets.Dataset.from_dict({"text": ["雨", "雪"], "label": [0, 1]})
    saved = datasets.DatasetDict({split: one.cast_column("label", datasets.ClassLabel(names=names)) for split, names in (
        ("train", ["bad", "good"]), ("val", ["bad", "good"]), ("test", ["good", "bad"]))})
    saved.save_to_disk("saved")
    distill.DATA = "saved"
    assert distill.load_data({"bad": 0, "good": 1})[0]["test"]["labels"][:] == [1, 0]
    with pytest.raises(distill.Problem, match="the class label 0 of test is named 'good', but the teacher's output 0 'LABEL_0'"):
        distill.load_data({"LABEL_0": 0, "LABEL_1": 1})


@pytest.mark.parametrize("own, names, said", [
    (["neg", "pos"], ["LABEL_0", "LABEL_1"], "neg is LABEL_0, pos is LABEL_1"),
    (["ネガティブ", "ポジティブ"], ["negative", "positive"], "ネガティブ is negative"),
    (["Positive", "Negative"], ["negative", "positive"], None),  # known, but for the case: their numbers would turn them round
    (["joy", "anger", "sad"], ["anger", "joy", "sadness"], None),
])
def test_class_labels_of_other_names_are_taken_by_number_and_told_or_refused(capsys, own, names, said):
    Path(distill.CACHE).mkdir(exist_ok=True)
    one = datasets.Dataset.from_dict({"text": list("雨雪風")[:len(own)], "label": range(len(own))}).cast_column("label", datasets.ClassLabel(names=own))
    datasets.DatasetDict(train=one, val=one, test=one).save_to_disk("saved")
    distill.DATA = "saved"
    if said:
        assert distill.load_data({name: number for number, name in enumerate(names)})[0]["train"]["labels"][:] == list(range(len(own)))
        assert f"are taken by their numbers: {said}" in capsys.readouterr().out
    else:
        with pytest.raises(distill.Problem, match=f"the class label . of train is named '{own[0]}'"):
            distill.load_data({name: number for number, name in enumerate(names)})


def test_a_class_label_and_a_plain_number_do_not_mix_where_the_names_object():
    Path(distill.CACHE).mkdir(exist_ok=True)
    plain = datasets.Dataset.from_dict({"text": ["雨", "雪"], "label": [0, 1]})
    named = plain.cast_column("label", datasets.ClassLabel(names=["positive", "negative"]))
    datasets.DatasetDict(train=named, val=plain, test=plain).save_to_disk("saved")
    distill.DATA = "saved"
    with pytest.raises(distill.Problem, match="the class label 0 of train is named 'positive'"):
        distill.load_data({"negative": 0, "positive": 1})


def test_labels_of_a_new_teacher_that_look_alike_are_refused():
    for one, other in ("positive", "positive "), ("Good", "good"), ("１", "1"):
        assert "look like one label. Write them alike" in labels_of(None, train=[one, other, "x"])
    assert labels_of(None, train=["none", "some"])["names"] == ["none", "some"]


@pytest.mark.parametrize("format", [None, "numpy", "torch", "pandas", "arrow"])
def test_the_format_of_a_saved_data_set_makes_no_difference(teacher, run, format):
    """Its numbers come as arrays, of which Python shows only the ends: other labels in the middle would not be noticed."""
    Path("saved").mkdir()
    for flipped in False, True:
        table = rows("train", 2500)
        table[500:2400] = [(text, {"negative": "positive", "positive": "negative"}[label] if flipped else label) for text, label in table[500:2400]]
        one = datasets.Dataset.from_dict({"text": [text for text, _ in table], "label": [label for _, label in table]})
        one.set_format(format, columns=["label"] if format == "torch" else None)
        datasets.DatasetDict(train=one, val=one.select(range(9)), test=one.select(range(9))).save_to_disk("saved")
        printed = run("--data", "saved", "--epochs", "1", "--batch-size", "500")
        assert ("settings or data differ" in printed) == flipped


# ── The net: what is said where the data hardly fit the teacher ──


def notes(printed):
    return "\n".join(line for line in printed.splitlines() if line.startswith("note "))


def answer_with(monkeypatch, answer):
    """The teacher answers each text with the label answer(text, label)."""
    known = {text: label for split in distill.SPLITS for text, label in rows(split, 48)}
    add_soft_labels = distill.add_soft_labels

    def add(data, *more):
        def change(batch):
            texts = ["".join(tokens) for tokens in map(tokenizer.convert_ids_to_tokens, batch["input_ids"])]
            found = [answer(known.get(text.removeprefix("[CLS]").removesuffix("[SEP]"), "negative")) for text in texts]
            soft_labels = [[0.9, 0.1] if label == "negative" else [0.1, 0.9] for label in found]
            return {"soft_labels": soft_labels, "teacher_logits": np.log(soft_labels)}
        return {split: table.map(change, batched=True) for split, table in add_soft_labels(data, *more).items()}
    tokenizer = distill.transformers.AutoTokenizer.from_pretrained("finetuned_bert_japanese")
    monkeypatch.setattr(distill, "add_soft_labels", add)


def test_nothing_is_said_of_a_teacher_that_fits(teacher, data, run, monkeypatch):
    answer_with(monkeypatch, lambda label: label)
    assert notes(run("--epochs", "2")) == ""


def test_a_teacher_worse_than_the_largest_class_is_told_before_the_student_is_trained(teacher, data, run, monkeypatch):
    answer_with(monkeypatch, lambda label: "negative" if label == "positive" else "positive")
    printed = run("--epochs", "2")
    assert "the teacher is right on 0.0% of train; to answer negative always would be right on 50.0%. Likely causes: " in notes(printed)
    assert all(cause in notes(printed) for cause in ("labels are in another order", "tokenizer or MeCab dictionary", "TEXT_COLUMN"))
    assert printed.index("the teacher is right on") < printed.index(" epoch   train loss")
    assert "keeps" not in printed and "the teacher is right on no text, so there is nothing to keep" in printed
    assert report()["kept"] is None


def test_a_teacher_with_one_answer_is_told(teacher, data, run, monkeypatch):
    answer_with(monkeypatch, lambda label: "positive")
    assert "the teacher answers all texts of train with positive" in notes(run("--epochs", "2"))


def test_labels_that_seem_exchanged_are_told(data, run, monkeypatch):
    """Of a teacher that is right on most: neutral texts are the most, and only positive and negative are exchanged."""
    save_model("finetuned_bert_japanese", labels=("negative", "positive", "neutral"))
    rows_of = {split: [(text, label if number % 3 == 0 else "neutral") for number, (text, label) in enumerate(rows(split, 48))] for split in distill.SPLITS}
    for split, table in rows_of.items():
        write_csv(data / f"{split}.csv", table)

    def add(data, teacher, collate_fn):
        wrong = np.array([1, 0, 2])
        result = {}
        for split, table in data.items():
            soft_labels = np.eye(3)[wrong[table["labels"][:]]] * 0.8 + 0.1
            table = table.add_column("soft_labels", list(soft_labels)).add_column("teacher_logits", list(np.log(soft_labels)))
            result[split] = table.add_column("teacher_seconds", np.ones(len(table)))
        return result
    monkeypatch.setattr(distill, "add_soft_labels", add)
    found = notes(run("--epochs", "2"))
    assert "answers negative mostly with positive, and positive mostly with negative: are these two labels exchanged?" in found
    assert found.count("exchanged?") == 1 and "is right on" not in found


def test_a_label_that_no_text_has_and_data_of_one_label_are_told(data, run):
    save_model("finetuned_bert_japanese", labels=("negative", "positive", "neutral"))
    assert "no text of train has the label neutral" in notes(run("--epochs", "2"))
    write_csv(data / "train.csv", [(text, "positive") for text, _ in rows("train", 16)])
    assert "all texts of train have one label, positive" in notes(run("--epochs", "2"))


def test_tokens_that_the_vocabulary_does_not_know_are_told(teacher, data, run):
    assert "vocabulary" not in notes(run("--epochs", "2"))
    write_csv(data / "val.csv", [(f"囁嚶{text}", label) for text, label in rows("val", 16)])
    assert " of val. Are these texts of the teacher's language" in notes(run("--epochs", "2"))
    assert "% of train" not in notes(run("--epochs", "2"))


def test_a_warm_up_that_outlasts_training_is_told(teacher, data, run):
    assert "training has 18 steps at most" in notes(run("--warmup-steps", "18")) and "WARMUP" not in notes(run("--warmup-steps", "17"))


def test_seconds_of_another_machine_are_told(teacher, data, run, monkeypatch):
    assert notes(run("--epochs", "2")).count("another processor") == 0
    assert notes(run("--epochs", "2")).count("another processor") == 0
    monkeypatch.setattr(distill, "hardware", lambda: "an abacus, 2 threads")
    assert "the teacher's seconds are from a run with another processor or number of threads" in notes(run("--epochs", "2"))


# ── Texts without labels ──


def test_unlabeled_leaves_out_dot_files_and_compares_endings_without_case(teacher, data, run):
    Path("more").mkdir()
    texts = [text for text, _ in rows("train", 60)[48:]]
    Path("more/a.txt").write_text("\n".join(texts[:4]), "utf-8")
    Path("more/B.TXT").write_text("\n".join(texts[4:8]), "utf-8")
    Path("more/._a.txt").write_bytes(b"\0\5\26\7" + "雪".encode() + b"\0\2\0\0Mac OS X")
    Path("more/.DS_Store").write_bytes(b"\0\0\0\1Bud1")
    write_csv(Path("more/c.csv"), [(text,) for text in [*texts[8:], " "]], ["text"])
    printed = run("--unlabeled", "more", "--epochs", "2")
    assert "train: 48 + 12 unlabeled" in printed and "more: 1 of 13 rows hold no text and are left out" in printed


def test_unlabeled_without_a_text_is_refused(teacher, data, fails):
    Path("empty.txt").write_text("\n \n", "utf-8")
    assert "UNLABELED = 'empty.txt': holds no text, only empty lines" in fails("--unlabeled", "empty.txt")


def test_unlabeled_csv_may_hold_texts_over_several_lines(teacher, data, run):
    write_csv("mail.csv", [["御中\nいつも、ありがとう, です\n敬具, 私", "1"], ["雨", "2"]], ["text", "id"])
    assert "train: 48 + 2 unlabeled" in run("--unlabeled", "mail.csv", "--epochs", "1")
