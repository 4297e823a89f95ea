"""Data files, splits and labels: read is what the file has, or one message names the line."""

import csv
import gzip
import io
import json
import shutil
import unicodedata
from pathlib import Path

import datasets
import pytest
from conftest import ANY_JSON, ANY_TEXT, load_splits, notes, outcome, rows, save_model, write_csv
from hypothesis import given
from hypothesis import strategies as st

import distill

COLUMNS = ["text", "label"]


def read(content, name="data.csv", columns=COLUMNS):
    """The rows of a file with this content, tuples; a Problem is returned, not raised."""
    Path(distill.CACHE).mkdir(exist_ok=True)
    Path(name).write_bytes(content if isinstance(content, bytes) else content.encode("utf-8"))
    try:
        table = distill.read_part(Path(name), columns)
        table = distill.take_columns("DATA", name, columns, table)
        return list(zip(*(table[column] for column in columns)))
    except distill.Problem as problem:
        return problem
    finally:
        shutil.rmtree(Path(distill.CACHE, "distill_tmp"), ignore_errors=True)


# ── CSV and TSV ──


def strictly(content, separator):
    """The rows as Python's csv module reads them in strict form, each checked for its fields.

    None if it refuses.
    """
    try:
        header, *lines = [
            line
            for line in csv.reader(
                io.StringIO(content, newline=""), delimiter=separator, strict=True
            )
            if line
        ]
    except (csv.Error, ValueError):
        return None
    if (
        not lines
        or any(len(line) != len(header) for line in lines)
        or any(header.count(name) != 1 for name in COLUMNS)
    ):
        return None
    return [tuple(line[header.index(name)] for name in COLUMNS) for line in lines]


PIECES = st.lists(
    st.sampled_from(
        [
            '"',
            '""',
            ",",
            "\t",
            "\n",
            "\r\n",
            "\r",
            "雨",
            "a",
            " ",
            "'",
            "pos",
            "neg",
            "\u2028",
            "\x0c",
            "\ufeff",
        ]
    ),
    max_size=14,
).map("".join)


@pytest.mark.parametrize("kind, separator", [(".csv", ","), (".tsv", "\t")])
@given(
    body=PIECES,
    written=st.lists(
        st.tuples(PIECES, st.sampled_from(["pos", "neg", "a,b", "\t", '"'])), max_size=4
    ),
    bom=st.booleans(),
)
def test_read_file_equals_strict_csv_module_or_refuses(kind, separator, body, written, bom):
    """Files of any pieces, and files that Python's csv module has written."""
    file = io.StringIO()
    csv.writer(file, delimiter=separator).writerows([COLUMNS, *written])
    for content in f"text{separator}label\n{body}", file.getvalue():
        expected, found = (
            strictly(content, separator),
            read("\ufeff" * bom + content, "data" + kind),
        )
        if isinstance(
            found, distill.Problem
        ):  # more may be refused: where a quote may have taken rows into a text
            assert expected is None or "takes the rows below into its text" in str(found)
        else:
            assert found == expected


@pytest.mark.parametrize("kind, separator", [(".csv", ","), (".tsv", "\t")])
@given(
    quotes=st.lists(
        st.tuples(
            st.sampled_from(["", "", "", '"', '""']), st.sampled_from(["", "", "", '"', '""'])
        ),
        min_size=2,
        max_size=12,
    ),
    labels=st.lists(st.sampled_from(["pos", "neg"]), min_size=12, max_size=12),
)
def test_read_file_loses_no_row_to_unclosed_quotes(kind, separator, quotes, labels):
    lines = [
        f"{before}雨{number}{after}{separator}{label}"
        for number, ((before, after), label) in enumerate(zip(quotes, labels))
    ]
    found = read("\n".join([f"text{separator}label", *lines]) + "\n", "data" + kind)
    assert isinstance(found, distill.Problem) or len(found) == len(lines)


def test_read_file_names_line_of_unclosed_quote():
    for kind, separator in (".csv", ","), (".tsv", "\t"):
        lines = [f"雨{number}{separator}{number % 2}" for number in range(20)]
        for opened in [4], [4, 9], [4, 9, 15]:
            broken = [('"' if number in opened else "") + line for number, line in enumerate(lines)]
            found = read("\n".join([f"text{separator}label", *broken]), "data" + kind)
            assert str(found).startswith(
                f"data{kind}, line 6: a quote opens here that does not close"
            ), found
        broken = [*lines[:4], '"' + lines[4], *lines[5:7], f'雪"{separator}1', *lines[7:]]
        found = read("\n".join([f"text{separator}label", *broken]), "data" + kind)
        assert str(found).startswith(
            f"data{kind}, line 6: a quote opens here and takes the rows below into its text"
        ), found


def test_csv_rows_tells_rows_in_quotes_by_labels_with_spaces():
    lines = ["text, label", "雨, positive", '"雪, negative', "風, positive", '霧", negative']
    assert "line 3: a quote opens here" in str(read("\n".join([*lines, "雲, negative"])))


def test_json_text_takes_no_list_of_labels_for_one():
    rows = [{"text": "雨", "label": label} for label in (["a"], ["a", "b"], [], {"a": 1})]
    found = read("\n".join(map(json.dumps, rows)), "data.jsonl")
    assert [label for _, label in found] == ["a", None, None, None]


def test_read_file_reads_texts_over_several_lines_and_logs_them(capsys):
    texts = [
        "良い店、\nまた行く",
        "a, b\nc, d",
        "価格は1,200\r\n送料は1,500",
        '"はい"\n\n"いいえ"',
        "一行",
    ]
    file = io.StringIO()
    csv.writer(file).writerows(
        [("label", "text"), *((str(number % 2), text) for number, text in enumerate(texts))]
    )
    assert read(file.getvalue()) == [(text, str(number % 2)) for number, text in enumerate(texts)]
    assert (
        "data.csv: 4 rows go over several lines, in quotes; the first from line 2"
        in capsys.readouterr().out
    )


@pytest.mark.parametrize(
    "content, where, has, header",
    [
        ("text,label\n雨,だ,0\n雪,1\n", 2, 3, 2),
        ("text,label\n雪,1\n雨\n", 3, 1, 2),
        ("text,label\n雨,0,\n雪,1,\n", 2, 3, 2),
        ('text,label\n"a\nb",1\n\n雨,だ,0\n', 5, 3, 2),
        ("id,text,label\n1,雨,0\n2,雪\n", 3, 2, 3),
    ],
)
def test_read_file_names_line_with_wrong_number_of_fields(content, where, has, header):
    assert str(read(content)).startswith(
        f"data.csv, line {where}: {has} fields, but the header has {header}."
    )


def test_read_file_skips_empty_lines_and_keeps_text_as_written():
    assert read("id,text,label\n\n1,NA,01\r\n2, 雨 ,1.0\n\n") == [("NA", "01"), (" 雨 ", "1.0")]


@pytest.mark.parametrize(
    "name, content, columns",
    [
        ("a.csv", "text,label,text\na,0,b\n", ["text", "label", "text"]),
        ("a.csv", ",texts ,label\n0,a,1\n", ["", "texts ", "label"]),
        ("a.csv", "text;label\na;0\n", ["text;label"]),
        ("a.csv", "text\tlabel\na\t0\n", ["text\tlabel"]),
        ("a.csv", "\ntext,label\na,0\n", []),
        ("a.csv", "雨,0\n雪,1\n", ["雨", "0"]),
        ("a.csv", "\ufeff\ufefftext,label\na,0\n", ["\ufefftext", "label"]),
        ("a.csv", "", []),
        ("a.json", "[]", []),
        ("a.jsonl", '{"version": 1, "data": [{"text": "a"}]}', ["version", "data"]),
        ("a.jsonl", '{"text ": "a", " text": "b", "label": 0}', ["text ", " text", "label"]),
        ("a.txt", "雨\n", ["text"]),
    ],
)
def test_find_columns_shows_those_of_the_file(name, content, columns):
    found = str(read(content, name))
    assert name in found and str(columns) in found and "TEXT_COLUMN" in found


@pytest.mark.parametrize("header", [",text ,label", "0, text, label", "0,text\u3000,\tlabel"])
def test_take_columns_finds_columns_with_spaces_around_their_names(header):
    assert read(f"{header}\n0,a,1\n") == [("a", "1")]


def test_read_file_finds_columns_in_another_unicode_form(settings, data):
    """A name typed in NFC, in a file of a Mac."""
    settings.setattr(distill, "TEXT_COLUMN", "レビュー")
    settings.setattr(distill, "LABEL_COLUMN", "ラベル")
    header = [unicodedata.normalize("NFD", name) for name in ("レビュー", "ラベル")]
    table = [("良い。", "positive"), ("悪い。", "negative")]
    for split in "train", "val", "test":
        (data / f"{split}.csv").unlink()
    write_csv(data / "train.csv", table, header)
    lines = [json.dumps(dict(zip(header, row)), ensure_ascii=False) + "\n" for row in table]
    (data / "val.jsonl").write_text("".join(lines), "utf-8")
    as_dicts = [dict(zip(header, row)) for row in table]
    distill.datasets.Dataset.from_list(as_dicts).to_parquet(data / "test.parquet")
    for found in load_splits(settings).values():
        assert found["レビュー"][:] == ["良い。", "悪い。"] and found["labels"][:] == [1, 0]


def test_find_columns_prefers_the_name_as_it_is_written():
    assert distill.find_columns("x", ["text"], ["text ", "text"]) == ["text"]
    with pytest.raises(distill.Problem, match="several"):
        distill.find_columns("x", ["text"], ["text ", " text"])


@pytest.mark.parametrize("kind", [".csv", ".tsv", ".jsonl", ".json"])
def test_read_file_reads_gzip(settings, data, kind):
    expected = {split: rows.to_list() for split, rows in load_splits(settings).items()}
    for split, n in ("train", 48), ("val", 16), ("test", 16):
        path = data / f"{split}.csv"
        path.unlink()
        if kind in (".csv", ".tsv"):
            write_csv(path, rows(split, n), delimiter="\t" if kind == ".tsv" else ",")
            content = path.read_bytes()
            path.unlink()
        else:
            table = [{"text": text, "label": label} for text, label in rows(split, n)]
            lines = "\n".join(json.dumps(row) for row in table)
            content = (json.dumps(table) if kind == ".json" else lines).encode()
        (data / f"{split}{kind}.gz").write_bytes(gzip.compress(content))
    assert {split: rows.to_list() for split, rows in load_splits(settings).items()} == expected


def test_read_text_knows_gzip_by_its_first_bytes(settings, tmp_path):
    table = "".join(f"ひとつ{number},{number % 2}\n" for number in range(40))
    content = f"text,label\n{table}".encode("cp932")
    expected = read(content)
    assert len(expected) == 40
    for name in "all.csv.gz", "all.csv":
        assert read(gzip.compress(content), name) == expected
    assert read(content, "all.csv.gz") == expected
    assert "line 2" in str(read(gzip.compress("text,label\n文,0\n".encode("iso2022_jp"))))
    assert "data.csv: cannot be read" in str(read(gzip.compress(content)[:-20]))


def test_read_file_reads_text_of_a_megabyte():
    assert read("text,label\n" + "雨" * 400_000 + ",0\n") == [("雨" * 400_000, "0")]


def test_read_file_reads_only_needed_columns():
    """A column that nobody needs may change its type, or be cut short by nobody's fault."""
    lines = [
        f"{number if number < 11_000 else 'guest'},雨{number},{number % 2}"
        for number in range(12_000)
    ]
    assert len(read("\n".join(["user_id,text,label", *lines]))) == 12_000


@pytest.mark.parametrize(
    "kind, separator, lines",
    [
        (
            ".csv",
            ",",
            ['"A2,mixed', 'A4",negative'],
        ),  # a label that occurs nowhere else, but is one of the teacher's
        (".csv", ",", ['"A2,positive', "A3,mixed", 'A4",negative']),
        (".csv", ",", ['"A2,positive ', 'A4",negative']),
        (".csv", ",", ['"A2,positive', "", 'A4",negative']),
        (".tsv", "\t", ['"A2\tpositive', "", "", 'A4"\tnegative']),
    ],
)
@pytest.mark.parametrize("end", ["\n", "\r\n", "\r\r\n"])
def test_read_file_detects_rows_inside_quotes_by_known_labels(kind, separator, lines, end):
    Path(distill.CACHE).mkdir(exist_ok=True)
    content = [
        f"text{separator}label",
        f"A0{separator}positive",
        f"A1{separator}negative",
        *lines,
        f"A5{separator}positive",
    ]
    Path("data" + kind).write_bytes(end.join(content).encode())
    with pytest.raises(distill.Problem, match="takes the rows below into its text"):
        distill.read_part(Path("data" + kind), COLUMNS, {"negative", "positive", "mixed"})


def test_read_file_refuses_repeated_header():
    assert str(read("text,label\na,0\ntext,label\nb,1\n")).startswith(
        "data.csv, line 3: the header once more"
    )


# ── JSON ──


VALUES = st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), PIECES, st.just("\ud800"))


@given(
    table=st.lists(st.dictionaries(st.sampled_from(["text", "label", "id"]), VALUES), max_size=4),
    bom=st.booleans(),
    ascii=st.booleans(),
    form=st.sampled_from(["lines", "list", "indented"]),
    junk=st.sampled_from(["", "", "", "}", "{", '{"text": 1', "[]", "null", "1 2", "\u3000"]),
)
def test_read_file_equals_json_module_or_refuses(table, bom, ascii, form, junk):
    def dump(value, **more):
        ensure_ascii = ascii or "\ud800" in repr(value) or "\\ud800" in repr(value)
        return json.dumps(value, ensure_ascii=ensure_ascii, **more)

    content = (
        "\n".join(map(dump, table))
        if form == "lines"
        else dump(table, indent=2 if form == "indented" else None)
    )
    content += "\n" + junk if junk else ""
    found = read("\ufeff" * bom + content, "data.jsonl")
    try:
        expected = (
            json.loads(content)
            if content.lstrip().startswith("[")
            else [json.loads(line) for line in content.split("\n") if line.strip(" \t\r")]
        )
        if not all(isinstance(row, dict) for row in expected):
            raise ValueError
    except ValueError:
        expected = None
    if isinstance(found, distill.Problem):
        assert not expected or not all(any(name in row for row in expected) for name in COLUMNS), (
            found
        )
    else:

        def whole(value):
            return value if "\ud800" not in value else None

        def label(value):
            return "" if value is None or value != value else whole(str(value))

        assert found == [
            (
                whole(row["text"]) if isinstance(row.get("text"), str) else None,
                label(row["label"]) if "label" in row else None,
            )
            for row in expected
        ]


@pytest.mark.parametrize(
    "content, where",
    [
        ('{"text": "a", "label": 0}\n{"text": "b", "label": 1\n', "line 2: not JSON"),
        ('{"text": "a", "label": 0},\n{"text": "b", "label": 1}', "line 1: not JSON"),
        ('{"text": "a", "label": 0}\n[1]\n', "row 2: [1] is no object"),
        ('[{"text": "a", "label": 0}, null]', "row 2: None is no object"),
        ('[{"text": "a", "label": 0},\n{"text"}]', "line 2: not JSON"),
    ],
)
def test_read_file_names_line_of_invalid_json(content, where):
    found = str(read(content, "data.jsonl"))
    assert found.startswith(f"data.jsonl, {where}") and len(found) < 500


def test_read_file_takes_what_pandas_writes_for_no_text(settings, data):
    """DataFrame.to_json() writes columns, not rows."""
    (data / "train.csv").unlink()
    content = {"text": {"0": "a"}, "label": {n: "x" for n in range(3000)}}
    (data / "train.json").write_text(json.dumps(content), "utf-8")
    with pytest.raises(distill.Problem, match="text empty or not a text.*: 1") as problem:
        load_splits(settings)
    assert len(str(problem.value)) < 1000


def test_read_file_keeps_json_labels_of_mixed_types_as_written():
    assert read(
        '{"text": "a", "label": 0}\n{"text": "b", "label": "1"}\n{"text": "c", "label": 1.0}\n',
        "data.jsonl",
    ) == [("a", "0"), ("b", "1"), ("c", "1.0")]


# ── Encodings ──


@pytest.mark.parametrize(
    "content, line",
    [
        ("text,label\nやや良い,0\n".encode("euc_jp"), 2),
        ("text,label\nやや良い①㈱,0\n".encode("euc_jis_2004"), 2),
        ("text,label\n雨,0\n".encode("iso2022_jp"), 2),
        (b"text,label\n" + b"a,1\n" * 30_000 + "雨".encode("iso2022_jp"), 30_002),
        (b"text,label\n\x1b(I12\x1b(B,0\n", 2),
        ("text,label\n雨\n".encode("iso2022_jp") + "雪".encode(), 2),
        ("text,label\n雨が降る,0\n雪".encode("cp932") + b"\x81\n", 2),
        ("text,label\n雨が降る,0\n".encode() + "ひどい".encode()[:-1] + b",1\n", 3),
        ("text,label\n雨,0\n雪".encode() + b"\xe3,1\n" + "雨,0\n".encode(), 3),
        ("text,label\nit’s good and doesn’t bore,0\n".encode("cp1252"), 2),
        ("text,label\na clichéd film’s end,0\n".encode("cp1252"), 2),
        (b"PK\x03\x04\x14\0\x06\0\x08\xff\n", 1),
    ],
)
def test_read_text_names_line_and_bytes_that_it_does_not_know(content, line):
    """Some of them could be read as CP932 or UTF-8, as other characters."""
    found = str(read(content, "{odd}.csv"))
    assert (
        found.startswith("{odd}.csv: cannot be read") and f"in line {line} are the bytes" in found
    )
    assert str(content[:4]) in found and "UTF-8" in found


def test_read_text_takes_what_a_terminal_has_printed():
    assert read("text,label\n\x1b[1mok\x1b(B\x1b[m,0\n") == [("\x1b[1mok\x1b(B\x1b[m", "0")]


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "cp932", "utf-16"])
def test_read_file_reads_every_encoding_it_names(encoding):
    assert read("text,label\n雨が降る①,0\nｱﾒ,1\n".encode(encoding)) == [
        ("雨が降る①", "0"),
        ("ｱﾒ", "1"),
    ]


# ── Files that are refused ──


def test_read_file_of_jsonl_accepts_a_key_that_only_later_rows_have():
    content = '{"text": "雨"}\n{"text": "雪", "label": 1}\n'
    assert read(content, "a.jsonl") == [("雨", None), ("雪", "1")]


def test_read_file_refuses_unknown_suffix(teacher, fails):
    Path("data.xlsx").write_bytes(b"PK")
    message = fails("--data", "data.xlsx")
    assert (
        "data.xlsx: cannot be read" in message and ".csv, .tsv, .jsonl, .json, .parquet" in message
    )


def test_refuse_missing_columns_names_those_of_the_file(teacher, data, fails):
    write_csv(data / "val.csv", rows("val", 4), ("文", "label"))
    assert "data/val.csv has no column text among ['文', 'label']" in fails()


@pytest.mark.parametrize(
    "name, content",
    [
        ("train.csv", b""),
        ("train.csv", b"text,label\n"),
        ("train.jsonl", b""),
        ("train.json", b"[]"),
        ("train.json", b"[1"),
        ("train.parquet", b"no parquet"),
        ("train.parquet.gz", b"no parquet"),
    ],
)
def test_read_part_refuses_empty_and_broken_files(settings, data, name, content):
    (data / "train.csv").unlink()
    (data / name).write_bytes(content)
    with pytest.raises(distill.Problem, match=name) as problem:
        load_splits(settings)
    assert "\n" not in str(problem.value)


def test_read_file_takes_names_like_patterns_literally(run):
    for name in "a[1]", "b*c", "f{1,2}", "~x", "http:x":
        Path(name).mkdir()
        write_csv(Path(name, "train.csv"), rows("train", 3))
        Path(distill.CACHE).mkdir(exist_ok=True)
        assert len(distill.read_part(Path(name, "train.csv"), ["text", "label"])) == 3


# ── The files of a folder ──


def test_find_parts_refuses_missing_path(teacher, fails):
    assert "DATA = './nowhere': no data: there is no such folder" in fails("--data", "./nowhere")


@pytest.mark.parametrize("name", ["val", "test", "train"])
def test_group_by_split_names_missing_split_and_files_found(settings, data, name):
    (data / f"{name}.csv").unlink()
    with pytest.raises(distill.Problem, match=f"for {name} there is nothing") as problem:
        load_splits(settings)
    assert all(f"{split}.csv" in str(problem.value) for split in {"train", "val", "test"} - {name})


def test_find_parts_shows_what_is_in_a_folder_without_data(teacher, fails):
    Path("data").mkdir()
    Path("data/notes.txt").write_text("x")
    message = fails()
    assert "the folder holds notes.txt" in message and ".csv, .tsv, .jsonl, .json" in message


def test_read_splits_takes_no_txt_or_dot_file_as_labeled_data(teacher, data, run, fails):
    (data / "test.txt").write_text("a note\n", "utf-8")
    (data / "._train.csv").write_bytes(b"\0\5\26\7")
    assert "train 48 · val 16 · test 16" in run("--epochs", "1")
    assert "no column label" in fails("--data", "data/test.txt")


@pytest.mark.parametrize("name", ["val", "validation", "valid", "dev"])
def test_read_splits_accepts_every_name_of_the_validation_split(settings, name):
    Path("data").mkdir()
    for number, split in enumerate(["train", name, "test"]):
        write_csv(Path("data", f"{split}.csv"), TABLE[number:])
    assert {split: len(table) for split, table in load_splits(settings).items()} == {
        "train": 4,
        "val": 3,
        "test": 2,
    }


def test_refuse_duplicate_splits_names_both_files(teacher, data, fails):
    for more in "train.tsv", "TRAIN.CSV", "train.parquet":
        (data / more).write_text("x", "utf-8")
        message = fails()
        assert "for train there is" in message and "train.csv" in message and more in message
        (data / more).unlink()
    write_csv(data / "dev.csv", rows("val", 4))
    assert "for val there is dev.csv, val.csv" in fails()


def test_report_unread_files_names_them(teacher, data, run):
    write_csv(data / "train_extra.csv", rows("train", 3))
    (data / "sub").mkdir()
    Path("more/sub").mkdir(parents=True)
    Path("more/a.txt").write_text("雨が降る\n", "utf-8")
    printed = run("--unlabeled", "more", "--epochs", "1")
    for said in "data: not read: sub", "data: not read: train_extra.csv", "more: not read: sub":
        assert said in printed


def test_group_by_split_refuses_ambiguous_parts(settings):
    table = as_dataset(rows("train", 8))
    datasets.DatasetDict(train=table, dev=table, validation=table, test=table).save_to_disk("saved")
    with pytest.raises(distill.Problem, match="for val there is dev, validation"):
        load_splits(settings, DATA="saved")
    datasets.DatasetDict(train=table, val=table, test=table).save_to_disk("both")
    write_csv(Path("both/train.csv"), rows("train", 8))
    with pytest.raises(distill.Problem, match="dataset_dict.json, train.csv"):
        load_splits(settings, DATA="both")


TABLE = [
    ("今日は, 晴れ。", "positive"),
    ("NA", "negative"),
    ("007", "positive"),
    ("「雨」\nです", "negative"),
]


EXPECTED = {"text": [text for text, _ in TABLE], "labels": [1, 0, 1, 0]}


def as_dataset(table, label=str):
    return datasets.Dataset.from_dict(
        {
            "id": list(range(len(table))),
            "text": [t for t, _ in table],
            "label": [label(one) for _, one in table],
        }
    )


WRITERS = {
    "csv": lambda path: write_csv(path, TABLE),
    "CSV": lambda path: write_csv(path, TABLE),
    "csv with BOM": lambda path: write_csv(path, TABLE, encoding="utf-8-sig"),
    "csv in CP932": lambda path: write_csv(path, TABLE, encoding="cp932"),
    "csv with CRLF": lambda path: write_csv(path, TABLE, lineterminator="\r\n"),
    "csv in other order": lambda path: write_csv(
        path, [(label, text) for text, label in TABLE], ("label", "text")
    ),
    "tsv": lambda path: write_csv(path, TABLE, delimiter="\t"),
    "jsonl": lambda path: as_dataset(TABLE).to_json(path, force_ascii=False),
    "json": lambda path: path.write_text(
        json.dumps([{"text": t, "label": lab} for t, lab in TABLE]), "utf-8"
    ),
    "parquet": lambda path: as_dataset(TABLE).to_parquet(path),
}


def test_load_dataset_from_library_reads_save_to_disk_folder(settings):
    datasets.DatasetDict(
        {name: as_dataset(TABLE) for name in ("train", "validation", "test")}
    ).save_to_disk("data")
    before = sorted(Path("data").rglob("*"))
    assert load_splits(settings)["val"].to_dict() == EXPECTED
    assert sorted(Path("data").rglob("*")) == before


@pytest.mark.parametrize("kind", WRITERS)
def test_load_data_reads_every_kind_of_file_exactly(settings, kind, capsys):
    Path("data").mkdir()
    for name in "train", "dev", "test":
        WRITERS[kind](Path("data", f"{name}.{kind.split()[0]}"))
    for table in load_splits(settings).values():
        assert table.to_dict() == EXPECTED
    assert ("CP932" in capsys.readouterr().out) == ("CP932" in kind)


@pytest.mark.parametrize("format", ["numpy", "torch", "pandas", "arrow"])
def test_load_data_ignores_format_of_saved_data_set(teacher, run, format):
    """Its numbers come as arrays, of which Python shows only the ends.

    Other labels in the middle would not be noticed.
    """
    Path("saved").mkdir()
    for flipped in False, True:
        table = rows("train", 1100)
        table[300:800] = [
            (text, {"negative": "positive", "positive": "negative"}[label] if flipped else label)
            for text, label in table[300:800]
        ]
        one = datasets.Dataset.from_dict(
            {"text": [text for text, _ in table], "label": [label for _, label in table]}
        )
        one.set_format(format, columns=["label"] if format == "torch" else None)
        datasets.DatasetDict(
            train=one, val=one.select(range(9)), test=one.select(range(9))
        ).save_to_disk("saved")
        printed = run("--data", "saved", "--epochs", "1", "--batch-size", "500")
        assert ("starts anew" in printed) == flipped


def csv_file(table):
    file = io.StringIO()
    csv.writer(file).writerows(table)
    return file.getvalue().encode("utf-8", "surrogatepass")


LABELS = st.one_of(st.sampled_from(["negative", "positive", "0", "1"]), ANY_TEXT)


ROWS = st.lists(st.tuples(ANY_TEXT, LABELS), min_size=1, max_size=5)


CONTENTS = {
    ".csv": st.one_of(
        st.binary(max_size=300),
        ROWS.map(lambda rows: csv_file([("text", "label"), *rows])),
        st.lists(st.lists(ANY_TEXT, max_size=3), max_size=4).map(csv_file),
    ),
    ".tsv": st.one_of(
        st.binary(max_size=300),
        ANY_TEXT.map(lambda text: f"text\tlabel\n{text}\t1\n".encode("utf-8", "surrogatepass")),
    ),
    ".jsonl": st.one_of(
        st.binary(max_size=300),
        st.lists(ANY_JSON, max_size=4).map(lambda rows: "\n".join(map(json.dumps, rows)).encode()),
        st.lists(
            st.fixed_dictionaries(
                {"text": st.one_of(ANY_TEXT, ANY_JSON), "label": st.one_of(LABELS, ANY_JSON)}
            ),
            max_size=4,
        ).map(lambda rows: "\n".join(map(json.dumps, rows)).encode()),
    ),
    ".json": st.one_of(
        st.binary(max_size=300),
        ANY_JSON.map(lambda value: json.dumps(value).encode()),
        ROWS.map(
            lambda rows: json.dumps(
                [{"text": text, "label": label} for text, label in rows]
            ).encode()
        ),
    ),
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
def test_load_data_reads_or_refuses_any_file(tokenizer, capsys, kind, data):
    content = data.draw(CONTENTS[kind])
    shutil.rmtree("data", ignore_errors=True)
    Path("data").mkdir()
    for split in "train", "val", "test":
        Path("data", split + kind).write_bytes(content)
    distill.DATA = "data"

    def read():
        splits, _ = distill.load_data(["negative", "positive"])
        return distill.tokenize(splits, tokenizer)

    found = outcome(read)
    if not isinstance(found, distill.Problem):
        assert {split: len(rows) > 0 for split, rows in found.items()} == {
            "train": True,
            "val": True,
            "test": True,
        }
        assert set(found["train"]["labels"]) <= {0, 1}
    shutil.rmtree(Path(distill.CACHE, "distill_tmp"), ignore_errors=True)


# ── One set that is split here ──


@pytest.mark.parametrize("form", ["file", "set"])
def test_split_single_set_keeps_label_shares_and_depends_on_texts_alone(settings, form, capsys):
    table = [(f"{number}番目", "positive" if number % 4 else "negative") for number in range(200)]
    write_csv(Path("data.csv"), table) if form == "file" else as_dataset(table).save_to_disk(
        "data.csv"
    )
    cuts = [load_splits(settings, DATA="data.csv", SEED=seed) for seed in (1, 2)]
    write_csv(Path("turned.csv"), table[::-1])
    cuts.append(load_splits(settings, DATA="turned.csv"))
    assert "cut 80/10/10" in capsys.readouterr().out
    for cut in cuts:
        assert {split: (len(rows), sum(rows["labels"])) for split, rows in cut.items()} == {
            "train": (160, 120),
            "val": (20, 15),
            "test": (20, 15),
        }
        assert sorted(text for rows in cut.values() for text in rows["text"]) == sorted(
            text for text, _ in table
        )
    for split in "val", "test":
        texts = [sorted(cut[split]["text"]) for cut in cuts]
        assert texts[0] == texts[1] == texts[2]


def test_split_single_set_keeps_equal_texts_together(settings):
    table = [
        (f"{number % 50}番目", "positive" if number % 2 else "negative") for number in range(150)
    ]
    table += [(f" {number}番目　", "negative") for number in range(0, 50, 2)]
    write_csv("data.csv", table)
    cut = load_splits(settings, DATA="data.csv")
    found = [{text.strip() for text in rows["text"]} for rows in cut.values()]
    assert sum(map(len, found)) == len(set.union(*found)) == 50
    assert sum(map(len, cut.values())) == len(table)
    assert all(found)


def test_split_single_set_keeps_texts_in_test_when_rows_are_added(settings):
    table = [(f"{number}番目", "positive" if number % 2 else "negative") for number in range(600)]
    write_csv("data.csv", table[:500])
    write_csv("more.csv", table)
    before = load_splits(settings, DATA="data.csv")
    after = load_splits(settings, DATA="more.csv")
    # only those at the edge of a share move
    trained = set(before["train"]["text"]) & {*after["val"]["text"], *after["test"]["text"]}
    assert len(trained) <= 6


def test_split_by_column_opens_no_other_file(settings):
    """A picture in a data set may be the path of any file."""
    table = rows("train", 30)
    one = as_dataset(table).add_column("picture", ["/etc/hostname"] * 30)
    one = one.cast_column("picture", datasets.Image())
    one.save_to_disk("all.saved")
    found = load_splits(settings, DATA="all.saved")
    assert sum(map(len, found.values())) == 30


@pytest.mark.parametrize("form", ["csv", "jsonl", "parquet", "saved", "classes"])
@pytest.mark.parametrize("names", [("train", "dev", "test"), ("Training ", "検証", "テスト")])
def test_split_by_column_uses_column_that_names_splits(settings, form, names, capsys):
    table = rows("train", 40)
    columns = {
        "id": list(range(40)),
        "text": [text for text, _ in table],
        "用途": [names[0] if n % 4 else names[1 + n % 8 // 4] for n in range(40)],
        "label": [label for _, label in table],
    }
    one = datasets.Dataset.from_dict(columns)
    if form == "classes":
        one = one.class_encode_column("用途")
    if form in ("saved", "classes"):
        one.save_to_disk(f"all.{form}")
    elif form == "csv":
        one.to_csv("all.csv", index=False)
    elif form == "jsonl":
        one.to_json("all.jsonl", force_ascii=False)
    else:
        one.to_parquet("all.parquet")
    found = load_splits(settings, DATA=f"all.{form}")
    assert "用途" in capsys.readouterr().out
    for split, name in zip(("train", "val", "test"), names):
        expected = [text for text, use in zip(columns["text"], columns["用途"]) if use == name]
        assert found[split]["text"][:] == expected


def test_split_by_column_refuses_missing_split_and_ignores_other_columns(settings, capsys):
    table = [(*row, "test" if n % 3 else "train") for n, row in enumerate(rows("train", 60))]
    write_csv("all.csv", table, header=("text", "label", "split"))
    with pytest.raises(distill.Problem, match="'split' names test and train alone"):
        load_splits(settings, DATA="all.csv")
    table[7] = (*table[7][:2], "another")
    write_csv("all.csv", table, header=("text", "label", "split"))
    load_splits(settings, DATA="all.csv")
    printed = capsys.readouterr().out
    assert "'split' is not used" in printed and "row 8" in printed and "80/10/10" in printed
    # the column in which every row names a split counts, wherever it is and whatever is first in it
    table = [("テスト" if n == 0 else "評判", *row) for n, row in enumerate(table)]
    table = [
        (*row[:3], "" if n < 2 else ("train", "val", "test")[n % 3]) for n, row in enumerate(table)
    ]
    for number, use in (0, "dev"), (1, "train"):
        table[number] = (*table[number][:3], use)
    write_csv("all.csv", table, header=("分野", "text", "label", "split"))
    found = load_splits(settings, DATA="all.csv")
    assert [len(found[split]) for split in ("train", "val", "test")] == [20, 20, 20]
    write_csv("all.csv", [(*row, "train") for row in rows("train", 60)], ("text", "label", "split"))
    assert len(load_splits(settings, DATA="all.csv")["test"]) > 0


def test_split_by_column_takes_class_label_of_no_class(settings):
    """-1 is what a saved test set often has for a label that is kept secret."""
    table = rows("train", 30)
    one = as_dataset(table).add_column("category", [n % 3 - 1 for n in range(30)])
    one = one.cast_column("category", datasets.ClassLabel(names=["dev", "test"]))
    one.save_to_disk("all.saved")
    found = load_splits(settings, DATA="all.saved")
    assert sum(map(len, found.values())) == 30


def test_warn_if_labels_contradict_names_rows(settings, capsys):
    Path("data").mkdir()
    for split in "train", "val", "test":
        write_csv(f"data/{split}.csv", rows(split, 20))
    load_splits(settings)
    assert "more than once" not in capsys.readouterr().out
    table = rows("train", 20)
    other = {"negative": "positive", "positive": "negative"}
    table.append((f"{table[4][0]} ", other[table[4][1]]))
    table.append(table[6])  # the same label: nothing to say
    write_csv("data/train.csv", table)
    load_splits(settings)
    printed = capsys.readouterr().out
    assert "in train more than once" in printed
    assert "1, in the rows 5, 21" in printed


def test_split_single_set_refuses_too_few_rows(teacher, fails):
    write_csv(Path("few.csv"), rows("train", 3))
    assert "cannot be cut into train, val and test" in fails("--data", "few.csv")


# ── Rows ──


def test_validate_rows_names_empty_texts_and_missing_labels(settings, data):
    table = rows("train", 30)
    for number in 2, 5, *range(7, 17):
        table[number] = ("　 ", table[number][1])
    table[3] = (table[3][0], "")
    write_csv(data / "train.csv", table)
    with pytest.raises(distill.Problem) as problem:
        load_splits(settings)
    lines = str(problem.value).splitlines()
    first_ten = "3, 6, 8, 9, 10, 11, 12, 13, 14, 15, …"
    assert f"  train: text empty or not a text in 12 rows: {first_ten}" in lines
    assert "  train: no label in 1 rows: 4" in lines


def test_validate_rows_counts_missing_values_of_jsonl(teacher, data, fails):
    (data / "train.csv").unlink()
    (data / "train.jsonl").write_text(
        '{"text": null, "label": "positive"}\n{"text": "良い", "label": null}\n{"text": "雨"}\n',
        "utf-8",
    )
    message = fails()
    assert "train: text empty or not a text in 1 rows: 1" in message
    assert "train: no label in 2 rows: 2, 3" in message


def test_validate_rows_refuses_numbers_as_texts(teacher, data, fails):
    (data / "train.csv").unlink()
    datasets.Dataset.from_dict({"text": [0, 7], "label": ["negative", "positive"]}).to_parquet(
        data / "train.parquet"
    )
    assert "train.parquet: column text holds Value('int64')" in fails()


@pytest.mark.parametrize("label", ["neutral", "2", "-1", "0.5", "positives", "True"])
def test_validate_rows_names_unknown_labels_those_of_the_teacher_and_of_the_data(label):
    message = labels_of(
        ["negative", "positive"], train=["positive", "negative"], test=[label, "negative"]
    )
    assert f"test: label '{label}'" in message and message.endswith("in 1 rows: 1")
    assert "the teacher has negative, positive" in message and "the data " in message


def test_validate_rows_explains_sample_with_other_teacher(data, fails):
    save_model("finetuned_bert_japanese", labels=("bad", "good"))
    message = fails("--data", "tests/sample")
    assert "DATA = 'tests/sample'" in message and "the teacher has bad, good" in message
    assert "the data negative, positive" in message and "id2label" in message


def test_log_label_counts_reports_absent_and_single_label(data, run):
    save_model("finetuned_bert_japanese", labels=("negative", "positive", "neutral"))
    assert "no text of train has the label neutral" in notes(run("--epochs", "2"))
    write_csv(data / "train.csv", [(text, "positive") for text, _ in rows("train", 16)])
    assert "no text of train has the label negative, neutral" in notes(run("--epochs", "2"))


# ── Labels ──


def labels_of(names, **splits):
    """The numbers of the labels of each split, by a teacher with these names; or the Problem."""
    Path(distill.CACHE).mkdir(exist_ok=True)
    shutil.rmtree("data", ignore_errors=True)
    Path("data").mkdir()
    for split in distill.SPLITS:
        labels = splits.get(split, splits["train"])
        write_csv(
            Path("data", f"{split}.csv"),
            [(f"雨{number}", label) for number, label in enumerate(labels)],
        )
    distill.DATA = "data"
    try:
        found, label_names = distill.load_data(names)
        return {split: found[split]["labels"][:] for split in found} | {"names": label_names}
    except distill.Problem as problem:
        return str(problem)


@pytest.mark.parametrize(
    "names, written, expected",
    [
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
        (["negative", "positive"], ["Positive", " NEGATIVE"], [1, 0]),
        (["a", "A"], ["A", "a"], [1, 0]),
        (["True", "False"], ["TRUE", "FALSE"], [0, 1]),
        (["False", "True"], ["True", "False"], [1, 0]),
        (["True", "False"], ["1", "0"], [0, 1]),  # 1 is True, whichever output that is
        (["true", "false"], ["1.0", "0.0"], [0, 1]),
    ],
)
def test_match_labels_prefers_names_over_numbers(names, written, expected):
    assert labels_of(names, train=written)["train"] == expected


@pytest.mark.parametrize("labels", [("negative", "positive"), ("0", "1"), (0, 1), (0.0, 1.0)])
def test_match_labels_by_name_or_number(settings, labels):
    Path("data").mkdir()
    for split in "train", "val", "test":
        datasets.Dataset.from_dict(
            {"text": ["良い", "悪い"], "label": [labels[1], labels[0]]}
        ).to_parquet(f"data/{split}.parquet")
    assert load_splits(settings)["train"]["labels"][:] == [1, 0]


def test_match_labels_reads_all_splits_one_way_or_refuses(capsys):
    # 1 by itself could be a name, and would be in val; but train has 0, which is none
    assert labels_of(["1", "2"], train=["0", "1"], val=["1", "1"], test=["0"])["val"] == [1, 1]
    capsys.readouterr()
    assert labels_of(["1", "0"], train=["1", "0"])["train"] == [0, 1]
    printed = capsys.readouterr().out
    assert "the teacher's labels are 1, 0" in printed and "0 is output 1, 1 is output 0" in printed
    message = labels_of(["negative", "positive"], train=["negative", "positive"], test=["0", "1"])
    assert "test: label '0'" in message and "the data 0, 1, negative, positive" in message
    assert "different" not in labels_of(["a", "A"], train=["a", "A"], test=["A ", "b"])


@pytest.mark.parametrize(
    "written, names, numbers",
    [
        (["1.0", "2.0", "3.0"], ["1", "2", "3"], [0, 1, 2]),
        (["1", "2", "3"], ["1", "2", "3"], [0, 1, 2]),
        (["10", "9", "-1"], ["-1", "9", "10"], [2, 1, 0]),
        (["0", "2"], ["0", "2"], [0, 1]),
        (["0", "1", "2"], ["LABEL_0", "LABEL_1", "LABEL_2"], [0, 1, 2]),
        (["1.0", "0.0"], ["LABEL_0", "LABEL_1"], [1, 0]),
        (["b", "a"], ["a", "b"], [1, 0]),
        (["01", "02"], ["01", "02"], [0, 1]),
    ],
)
def test_new_label_names_are_those_of_the_data(written, names, numbers):
    found = labels_of(None, train=written)
    assert found["names"] == names and found["train"] == numbers


@pytest.mark.parametrize("written", [["0.0", "0.2", "5.0"], ["-1.5", "2"], ["0.5", "bad"]])
def test_new_label_names_refuses_scores(written):
    message = labels_of(None, train=written)
    assert "scores" in message and next(one for one in written if one[-1] != "0") in message


@pytest.mark.parametrize("written", [["good", "bad"], ["-1", "0", "1"], ["10", "9", "2"]])
def test_match_labels_refuses_names_for_labels_without_names(written):
    names = [f"LABEL_{number}" for number in range(len(written))]
    message = labels_of(names, train=written)
    assert f"the teacher has {', '.join(names)}, the data {', '.join(sorted(written))}" in message
    assert "id2label in its config.json" in message


def test_new_label_names_refuses_labels_that_look_alike():
    for one, other in ("Good", "good"), ("１", "1"):
        message = labels_of(None, train=[one, other, "x"])
        assert "look like one label" in message and one in message and other in message
    assert labels_of(None, train=["none", "some"])["names"] == ["none", "some"]


def test_new_label_names_refuses_single_label(data, fails):
    save_model("base")
    for split in "train", "val", "test":
        write_csv(data / f"{split}.csv", [(text, "good") for text, _ in rows(split, 4)])
    assert "LABEL_COLUMN = 'label': 1 different labels" in fails("--teacher-base", "base")


def class_labels(teacher_names, **names):
    """What labels 0, 1, … of saved splits become, with these names of class labels; or why not.

    None: plain numbers.
    """
    splits = {}
    for split in distill.SPLITS:
        own = names.get(split, names["train"])
        n_labels = len(own or teacher_names)
        table = datasets.Dataset.from_dict(
            {"text": list("雨雪風")[:n_labels], "label": range(n_labels)}
        )
        if own:
            table = table.cast_column("label", datasets.ClassLabel(names=own))
        splits[split] = table
    datasets.DatasetDict(splits).save_to_disk("saved")
    Path(distill.CACHE).mkdir(exist_ok=True)
    distill.DATA = "saved"
    found = outcome(distill.load_data, teacher_names)
    if isinstance(found, distill.Problem):
        return str(found)
    return {split: rows["labels"][:] for split, rows in found[0].items()}


@pytest.mark.parametrize(
    "teacher_names, own, expected",
    [
        (["negative", "positive"], dict(train=["positive", "negative"]), [1, 0]),
        (["negative", "positive"], dict(train=["Positive", "Negative"]), [1, 0]),
        (["negative", "positive"], dict(train=["a", "b"]), [0, 1]),
        (["LABEL_0", "LABEL_1"], dict(train=["neg", "pos"]), [0, 1]),
        (["negative", "positive"], dict(train=["ネガティブ", "ポジティブ"]), [0, 1]),
        # joy is known, by another number
        (["anger", "joy", "sadness"], dict(train=["joy", "anger", "sad"]), "label 'sad'"),
        # each split has other numbers, of which the teacher knows no name
        (["LABEL_0", "LABEL_1"], dict(train=["bad", "good"], test=["good", "bad"]), "label 'bad'"),
        (["negative", "positive"], dict(train=["positive", "negative"], val=None), "label '0'"),
        (["negative", "positive"], dict(train=["neg", "pos", "more"]), "label 'more'"),
    ],
)
def test_match_labels_takes_class_labels_by_name_else_number(capsys, teacher_names, own, expected):
    found = class_labels(teacher_names, **own)
    if isinstance(expected, str):
        assert expected in found and "the teacher has" in found
        return
    assert found["train"] == expected
    names = own["train"]
    is_by_number = not {name.casefold() for name in names} & set(teacher_names)
    assert (f"{names[0]} is output 0" in capsys.readouterr().out) == is_by_number


def test_match_labels_takes_names_of_splits_numbered_differently():
    found = class_labels(["bad", "good"], train=["bad", "good"], test=["good", "bad"])
    assert found == {"train": [0, 1], "val": [0, 1], "test": [1, 0]}


def test_match_labels_in_one_unicode_form_and_without_spaces():
    """Labels that are names of a Mac's folders, or follow a comma and a space."""
    names = ["グルメ", "その他"]
    found = labels_of(names, train=[unicodedata.normalize("NFD", "グルメ"), " その他 ", "グルメ"])
    assert found["train"] == [0, 1, 0]
    found = labels_of(
        None, train=["グルメ", unicodedata.normalize("NFD", "グルメ"), "その他", " その他"]
    )
    assert found["names"] == ["その他", "グルメ"] and found["train"] == [1, 1, 0, 0]


# ── Layouts of folders, and of the hub ──


def write_parquet(path, table):
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = [{"text": text, "label": label} for text, label in table]
    distill.datasets.Dataset.from_list(rows).to_parquet(path)


def test_read_splits_reads_folder_as_the_hub_lays_it_out(settings):
    for split, n in ("train", 48), ("validation", 16), ("test", 16):
        table = rows("val" if split == "validation" else split, n)
        half = n // 2
        for number, part in enumerate((table[:half], table[half:])):
            write_parquet(Path(f"set/data/{split}-0000{number}-of-00002.parquet"), part)
    Path("set/README.md").write_text("x")
    splits = load_splits(settings, DATA="set")
    assert splits["train"]["text"][:] == [text for text, _ in rows("train", 48)]
    assert [len(rows) for rows in splits.values()] == [48, 16, 16]
    Path("set/data/train-00001-of-00002.parquet").unlink()
    with pytest.raises(distill.Problem, match="for train there is train-00000-of-00002.parquet"):
        load_splits(settings, DATA="set")


@pytest.mark.parametrize("ends", [("", ""), ("-0a1b2c3d4e5f", "-5f4e3d2c1b0a")])
def test_is_one_set_refuses_missing_shard(settings, ends):
    """Older names have a hash, of each shard another."""
    for split in "train", "val", "test":
        for number in range(1 if split == "train" else 2):
            path = Path(f"set/{split}-0000{number}-of-00002{ends[number]}.parquet")
            write_parquet(path, rows("train", 8))
    with pytest.raises(distill.Problem, match="for train there is train-00000-of-00002"):
        load_splits(settings, DATA="set")
    write_parquet(Path(f"set/train-00001-of-00002{ends[1]}.parquet"), rows("train", 16)[8:])
    assert len(load_splits(settings, DATA="set")["train"]) == 16
    write_parquet(Path(f"set/train-00001-of-00002{ends[1]}.PARQUET"), rows("train", 16)[8:])
    with pytest.raises(distill.Problem, match="for train there is"):
        load_splits(settings, DATA="set")


def test_labeled_files_refuses_names_of_two_kinds(settings, data):
    """The longer one would not be read."""
    (data / "train.csv").rename(data / "train-v1.csv")
    with pytest.raises(distill.Problem, match="for train there is nothing, in all .*train-v1.csv"):
        load_splits(settings)


def test_load_dataset_from_library_does_not_ask_the_hub_for_a_file(settings):
    settings.setattr(distill.datasets, "load_dataset", None)
    for name in "reviews.csv", "./reviews", "my/own/reviews":
        with pytest.raises(distill.Problem, match="no data: there is no such folder"):
            load_splits(settings, DATA=name)


def test_needed_columns_refuse_bytes(settings):
    table = [(text, label.encode()) for text, label in rows("train", 40)]
    write_parquet(Path("all.parquet"), table)
    with pytest.raises(distill.Problem, match="the set: column label holds .*binary"):
        load_splits(settings, DATA="all.parquet")


def test_read_files_refuses_shards_that_do_not_fit(settings):
    for split in "train", "validation", "test":
        write_parquet(Path(f"set/{split}-00000-of-00002.parquet"), rows("train", 8))
        labels = [(text, [label]) for text, label in rows("train", 8)]
        write_parquet(Path(f"set/{split}-00001-of-00002.parquet"), labels)
    with pytest.raises(distill.Problem, match="00001-of-00002.parquet: column label holds List"):
        load_splits(settings, DATA="set")


def test_read_files_reads_only_needed_columns_of_shards(settings):
    """Another column may have another type in each."""
    for split in "train", "validation", "test":
        for number, other in enumerate((1, "one")):
            table = [{"text": t, "label": label, "id": other} for t, label in rows("train", 8)]
            Path("set").mkdir(exist_ok=True)
            path = Path(f"set/{split}-0000{number}-of-00002.parquet")
            distill.datasets.Dataset.from_list(table).to_parquet(path)
    assert len(load_splits(settings, DATA="set")["train"]) == 16


def test_read_splits_reads_names_of_jglue(settings, capsys):
    for split, n in ("train", 48), ("valid", 16), ("test", 16):
        table = rows("val" if split == "valid" else split, n)
        lines = [json.dumps({"text": text, "label": label}) + "\n" for text, label in table]
        Path("set").mkdir(exist_ok=True)
        Path(f"set/{split}-v1.1.json").write_text("".join(lines), "utf-8")
    assert len(load_splits(settings, DATA="set")["val"]) == 16
    assert "val is valid-v1.1.json" in capsys.readouterr().out
    Path("set/train-v1.0.json").write_text("".join(lines), "utf-8")
    with pytest.raises(distill.Problem, match="train-v1.0.json, train-v1.1.json"):
        load_splits(settings, DATA="set")


def test_labeled_files_prefers_exact_names(settings, data):
    write_csv(data / "train-old.csv", rows("train", 3))
    assert len(load_splits(settings)["train"]) == 48


def test_load_dataset_from_library_takes_a_configuration(settings, monkeypatch):
    asked = []

    def load_dataset(*given, **more):
        asked.append(given)
        table = [{"text": text, "label": label} for text, label in rows("train", 20)]
        return distill.datasets.DatasetDict(
            {
                split: distill.datasets.Dataset.from_list(table)
                for split in ("train", "validation", "test")
            }
        )

    monkeypatch.setattr(distill.datasets, "load_dataset", load_dataset)
    assert len(load_splits(settings, DATA="org/name:config")["val"]) == 20
    load_splits(settings, DATA="org/name")
    assert asked == [("org/name", "config"), ("org/name",)]


def test_split_single_set_names_rare_labels(settings):
    table = [(f"文{number}", "negative" if number < 6 else "positive") for number in range(200)]
    write_csv("all.csv", table)
    with pytest.raises(distill.Problem) as problem:
        load_splits(settings, DATA="all.csv")
    assert "negative 6" in str(problem.value) and "ten" in str(problem.value)


def test_log_label_counts_names_few_of_many_labels(settings, capsys):
    Path("data").mkdir()
    names = [f"label{number:03}" for number in range(150)]
    for split in "train", "val", "test":
        table = [(f"文{n}", name) for n, name in enumerate([*names, *names[:2], names[1]])]
        write_csv(f"data/{split}.csv", table)
    settings.setattr(distill, "DATA", "data")
    distill.make_cache()
    distill.load_data(names)
    printed = capsys.readouterr().out
    assert "train has 2 label000, 3 label001, " in printed
    assert len(printed) < 400


def test_read_parquet_reads_needed_columns_alone(settings):
    """A column of a kind that datasets does not know does not matter, nor does its size."""
    import pyarrow
    import pyarrow.parquet

    Path("data").mkdir()
    for split in "train", "val", "test":
        table = rows(split, 12)
        columns = {
            "extra": pyarrow.array(
                [[("k", n)] for n in range(12)], pyarrow.map_("string", "int64")
            ),
            " text": [text for text, _ in table],
            "label": pyarrow.array([label for _, label in table]).dictionary_encode(),
            "blob": ["x" * 100_000] * 12,
        }
        pyarrow.parquet.write_table(pyarrow.table(columns), f"data/{split}.parquet")
    found = load_splits(settings)
    assert found["train"]["text"][:] == [text for text, _ in rows("train", 12)]
    size = sum(p.stat().st_size for p in Path(distill.CACHE).rglob("*") if p.is_file())
    assert size < 100_000


def test_json_rows_refuses_a_key_that_occurs_twice(teacher, data, fails):
    """Which of two labels is meant is not certain."""
    lines = [f'{{"text": "雨{n}", "label": {n % 2}}}' for n in range(40)]
    lines[6] = '{"text": "雨", "label": 0, "label": 1}'
    for content, where in ("\n".join(lines), "line 7"), (f"[{', '.join(lines)}]", "in the list"):
        Path("all.json").write_text(content, "utf-8")
        message = fails("--data", "all.json")
        assert f"all.json, {where}: " in message and "twice in {'text': '雨'" in message
