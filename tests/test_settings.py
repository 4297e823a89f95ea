"""Settings: the command line, the checks, --help and the README's table."""

import ast
import contextlib
import os
import re
import unicodedata
from pathlib import Path

import pytest
import torch
from conftest import ANY_JSON, ANY_TEXT, DEFAULTS, ROOT, SAMPLE, outcome, save_model, write_csv
from hypothesis import given
from hypothesis import strategies as st

import distill

# ── The command line and --help ──


def test_read_command_line_help_names_every_setting(capsys):
    with pytest.raises(SystemExit) as exit:
        distill.main(["--help"])
    text = " ".join(capsys.readouterr().out.split())
    assert exit.value.code == 0
    for name in distill.ACCEPTED:
        assert f"--{name.lower().replace('_', '-')} " in text, name
    assert "lower it if the loss jumps [0.0001]" in text


def test_read_command_line_parses_values(settings):
    found, texts = distill.read_command_line(
        [
            "--alpha",
            "1",
            "--init-layers",
            "(0, 2)",
            "--num-layers",
            "2",
            "--teacher",
            "2024",
            "--tokenizer",
            "None",
            "--learning-rate",
            "3e-4",
            "--data",
            "日本語/データ.csv",
            "--loss-weights",
            "(1/3, 1/3, 1/3)",
            "--cache",
            "1/2",
            "--alpha",
            "1/0",
        ]
    )
    assert texts is None and found == {
        "ALPHA": "1/0",
        "LOSS_WEIGHTS": (1 / 3, 1 / 3, 1 / 3),
        "CACHE": "1/2",
        "INIT_LAYERS": (0, 2),
        "NUM_LAYERS": 2,
        "TEACHER": "2024",
        "TOKENIZER": None,
        "LEARNING_RATE": 3e-4,
        "DATA": "日本語/データ.csv",
    }
    assert distill.ALPHA == DEFAULTS["ALPHA"]  # not changed yet
    vars(distill).update(found | {"ALPHA": 1, "METHOD": "mate"})
    with contextlib.ExitStack() as locks:
        distill.check_settings(locks)


def test_read_command_line_refuses_unknown_option(capsys):
    with pytest.raises(SystemExit) as exit:
        distill.main(["--alhpa", "0.5"])
    assert exit.value.code == 2 and "--alhpa" in capsys.readouterr().err


def test_documented_settings_cover_every_checked_setting():
    groups = distill.documented_settings()
    names = [name for comments in groups.values() for name in comments if comments[name]]
    assert sorted(names) == sorted(distill.ACCEPTED) and list(groups)[0] == "Teacher and data"
    block = Path(distill.__file__).read_text("utf-8").split("# ── Settings ")[1].split("\n\n")[0]
    assert re.findall("^([A-Z_]+) = ", block, re.M) == names[: block.count(" = ")]


def test_accepted_settings_in_readme_have_its_defaults():
    text = (ROOT / "README.md").read_text("utf-8")
    rows = re.findall(
        r"^\| ((?:`[A-Z_]+`(?:, )?)+) \| ((?:`[^`]+`(?:, )?)+) \|", text, re.MULTILINE
    )
    defaults = {}
    for names, values in rows:
        names, values = re.findall("`(.+?)`", names), re.findall("`(.+?)`", values)
        defaults |= {
            name: ast.literal_eval(value) for name, value in zip(names, values, strict=True)
        }
    assert len(defaults) >= 15
    assert defaults == {name: DEFAULTS[name] for name in defaults}


@pytest.mark.parametrize("file", ["README.md", "tests/README.md"])
def test_accepted_settings_are_those_that_readme_names(file):
    text = (ROOT / file).read_text("utf-8")
    constants = set(re.findall(r"`([A-Z]+_?[A-Z_]+)(?: = [^`]+)?`", text))
    assert constants and constants <= set(DEFAULTS)


def test_accepted_settings_are_the_options_of_commands_in_readme():
    text = (ROOT / "README.md").read_text("utf-8")
    commands = re.findall(r"distill\.py (--.+)", text)
    commands += re.findall(r"^\| [^|]+ \| `(--.+?)`", text, re.MULTILINE)
    options = {option for command in commands for option in re.findall(r"--([a-z-]+)", command)}
    known = {name.lower().replace("_", "-") for name in DEFAULTS} | {"predict", "help"}
    assert {"teacher", "data", "unlabeled", "export"} <= options <= known


def test_import_runs_nothing_and_settings_are_read_at_call(settings):
    settings.setattr(distill, "TEMPERATURE", 7.0)
    assert not Path(".distill_cache").exists() and (SAMPLE / "train.csv").exists()
    z = torch.tensor([[1.0, 0.0]])
    settings.setattr(distill, "ALPHA", 1.0)
    assert distill.distillation_loss(
        z, torch.tensor([0]), torch.softmax(z / 7, -1)
    ).item() == pytest.approx(0, abs=1e-5)


# ── Checks ──


BAD = {
    "TEACHER": [""],
    "NUM_LAYERS": ["0", "1.5", "two", "None", "101"],
    "ALPHA": ["-0.1", "1.1", "half", "nan", "True", "1" + "0" * 400],
    "TEMPERATURE": ["0", "-1", "inf"],
    "EPOCHS": ["0", "2.0", "1" + "0" * 400],
    "PATIENCE": ["0"],
    "BATCH_SIZE": ["0", "-8"],
    "LEARNING_RATE": ["0", "-1e-4", "fast"],
    "SCHEDULE": ["cosine"],
    "WARMUP_STEPS": ["-1"],
    "WEIGHT_DECAY": ["-0.1"],
    "MAX_GRAD_NORM": ["0"],
    "SEED": ["-1", "x"],
    "STUDENT_INIT": [" "],
    "STUDENT": ["lstm"],
    "AUGMENT": ["-1", "0.5"],
    "AUGMENT_REPLACE": ["2"],
    "AUGMENT_MASK": ["1.1"],
    "AUGMENT_NGRAM": ["-0.1"],
    "UNLABELED": [" "],
    "GENERATOR": [" "],
    "BILSTM_WORDS": ["None"],
    "BILSTM_EMBEDDING": ["0"],
    "BILSTM_HIDDEN": ["x", "10001"],
    "BILSTM_LEARNING_RATE": ["0"],
    "EXPORT": ["tf", "int8"],
    "MAX_LENGTH": ["3", "12.5"],
    "INIT_LAYERS": ["inner", "(0, 1)", "(-1,)", "7", "()"],
    "REFIT_WORDS": ["-1", "1.5"],
    "DROPOUT": ["1", "-0.1", "x"],
    "TEXT_COLUMN": [""],
    "OUTPUT": [" "],
    "METHOD": ["kl", "None"],
    "TRAIN_FRACTION": ["0", "1.1"],
    "LOSS_WEIGHTS": ["()", "1", "(1, 1)"],
    "MASK_RATE": ["1.5"],
    "GENERATOR_STEPS": ["0"],
    "STUDENT_STEPS": ["0.5"],
    "GENERATOR_LEARNING_RATE": ["0"],
    "TEACHER_EPOCHS": ["0"],
    "TEACHER_LEARNING_RATE": ["0"],
    "CACHE": [""],
    "BASELINE": ["1", "yes"],
    "CASCADE_KEEPS": ["0", "1"],
    "ASK_TEACHER": ["-0.1", "1.1", "never"],
    "SOFT_LABELS_COLUMN": [""],
}


@pytest.mark.parametrize(
    "name, value", [(name, value) for name, values in BAD.items() for value in values]
)
def test_check_settings_refuses_wrong_type_or_range(fails, name, value):
    message = fails(f"--{name.lower().replace('_', '-')}={value}")
    assert re.search(rf"\n  {name} = .*: must be .+", message) and message.count("\n") == 1


def test_take_texts_takes_texts_that_begin_with_a_dash():
    argv = ["--predict", "-5点", "--", "-h?", "- 悪い", "--output", "out"]
    changes, texts = distill.read_command_line(argv)
    assert changes == {"OUTPUT": "out"} and texts == ["-5点", "--", "-h?", "- 悪い"]
    argv = ["--predict=雨", "--predict", "良い", "-----", "--seed", "1", "--predict", "悪い"]
    assert distill.read_command_line(argv) == ({"SEED": 1}, ["雨", "良い", "-----", "悪い"])
    assert distill.read_command_line(["--predict"])[1] == []
    assert distill.read_command_line(["--seed", "1"])[1] is None
    with pytest.raises(SystemExit):  # a mistyped option is no text
        distill.read_command_line(["--predict", "良い", "--outptu", "out"])


@pytest.mark.parametrize("form, other", [("NFC", "NFD"), ("NFD", "NFC")])
def test_normalize_path_finds_the_other_unicode_form(form, other):
    Path(unicodedata.normalize(form, "データ")).mkdir()
    found = distill.normalize_path("./" + unicodedata.normalize(other, "データ"))
    assert os.path.isdir(found)
    assert distill.normalize_path("./ない") == "./ない"


def test_documented_settings_need_no_comment(monkeypatch):
    """A user who edits the file may leave the comment out."""
    source = Path(distill.__file__).read_text("utf-8")
    edited = re.sub(r"(?m)^TEACHER = .*$", 'TEACHER = "./mine"', source)
    edited = re.sub(r"(?m)^EPOCHS = .*$", "EPOCHS = 5 # few", edited)
    monkeypatch.setattr(distill, "SOURCE", edited)
    found = {}
    for comments in distill.documented_settings().values():
        found |= comments
    assert found.keys() == distill.ACCEPTED.keys()
    assert found["TEACHER"] == found["EPOCHS"] == ""


def test_check_settings_reports_all_faults_at_once(fails):
    message = fails("--alpha", "2", "--epochs", "0", "--schedule", "wavy", "--seed", "-3")
    assert [line.split(" = ")[0].strip() for line in message.splitlines()[1:]] == [
        "EPOCHS",
        "SEED",
        "ALPHA",
        "SCHEDULE",
    ]


def test_check_settings_message_of_command(capsys):
    """Python writes the text of a SystemExit to standard error and ends with exit status 1."""
    with pytest.raises(SystemExit) as exit:
        distill.main(["--alpha", "7"])
    assert exit.value.code == (
        "distill.py: these settings must be put right:\n  ALPHA = 7: must be a number from 0 to 1"
    )
    assert capsys.readouterr() == ("", "")


VALUES = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.floats(),
    ANY_TEXT,
    st.binary(max_size=5),
    st.tuples(),
    st.lists(st.one_of(st.integers(), st.floats(), ANY_TEXT), max_size=6).map(tuple),
    ANY_JSON,
)


def stays_here(value):  # as a setting that names a folder to write to
    return not isinstance(value, str) or not (
        set(Path(value.replace("\0", "")).parts) & {"/", "..", "~"}
    )


@pytest.mark.parametrize("way", ["in the file", "on the command line"])
@given(name=st.sampled_from(sorted(DEFAULTS)), value=VALUES)
def test_check_settings_accepts_or_refuses_any_value(way, name, value):
    for other, default in DEFAULTS.items():
        setattr(distill, other, default)
    if name in ("OUTPUT", "CACHE") and not stays_here(value):
        return
    if way == "in the file":
        setattr(distill, name, value)
    else:
        vars(distill).update(
            distill.read_command_line([f"--{name.lower().replace('_', '-')}={value}"])[0]
        )
    with contextlib.ExitStack() as locks:
        found = outcome(distill.check_settings, locks)
    assert found is None or f"{name} = " in str(found)


def test_column_faults_refuse_equal_columns(teacher, data, fails):
    assert "must be different columns" in fails("--text-pair-column", "text")
    assert "must be different columns" in fails("--label-column", "text")
    assert "must be different columns" in fails("--label-column", "text ")
    assert "texts not in 'labels'" in fails("--text-column", "labels")


@pytest.mark.parametrize(
    "options, told",
    [
        (["--method", "rail", "--student", "bilstm"], "METHOD = 'rail': needs STUDENT = \"bert\""),
        (["--method", "none", "--augment", "1"], "METHOD = 'none': does without the teacher"),
        (
            ["--method", "kd", "--loss-weights", "(1, 1)"],
            "LOSS_WEIGHTS = (1, 1): must be None or a weight for each term of METHOD",
        ),
        (["--generator", "somewhere"], "does nothing without a METHOD of 'mate'"),
    ],
)
def test_option_faults_refuse_settings_that_do_not_fit(teacher, data, fails, options, told):
    assert told in fails(*options)


def test_option_faults_and_missing_paths_of_options_are_named(teacher, data, fails, settings):
    message = fails("--student", "bilstm", "--student-init", "small", "--generator", "x")
    assert "of a 'bilstm' it must be" in message and "without a METHOD" in message
    settings.setattr(distill.importlib.util, "find_spec", lambda name: None)
    assert "pip install onnx onnxscript onnxruntime" in fails("--export", "onnx")
    assert "UNLABELED = 'nowhere'" in fails("--unlabeled", "nowhere")
    write_csv("other.csv", [["a"]], header=["sentence"])
    assert "other.csv has no column text among ['sentence']" in fails("--unlabeled", "other.csv")
    assert "GENERATOR = './nowhere'" in fails("--method", "mate", "--generator", "./nowhere")
    assert "is no masked-language model but a BertForSeq" in fails(
        "--method", "mate", "--generator", str(teacher)
    )


# ── Paths ──


@pytest.mark.parametrize(
    "given, expected",
    [
        ("./out/", "./out"),
        ("out//", "out"),
        ("out/.", "out"),
        ("./", "."),
        ("/", "/"),
        ("//", "/"),
        ("../", ".."),
        ("a/b", "a/b"),
        ("org/name/", "org/name"),
        ("~/out/", "/home/me/out"),
        ("~", "/home/me"),
        ("a/~", "a/~"),
        ("", ""),
    ],
)
def test_normalize_path_expands_home_and_drops_trailing_slashes(monkeypatch, given, expected):
    monkeypatch.setenv("HOME", "/home/me")
    assert distill.normalize_path(given) == expected


def test_normalized_paths_accept_trailing_slash(data, run, capsys):
    save_model("base")
    options = [
        "--teacher-base",
        "base/",
        "--teacher",
        "./made/",
        "--teacher-epochs",
        "1",
        "--data",
        "data/",
        "--cache",
        "./cache/",
    ]
    run(*options, "--output", "./out/")
    run(*options, "--output", "./out/", "--seed", "7")
    assert sorted(os.listdir()) == ["base", "cache", "data", "made", "out"]
    distill.main(["--output", "./out/", "--predict", "良い"])
    assert distill.load_student("out/")(["良い"]) == distill.load_student(Path("out"))(["良い"])


def test_normalized_paths_expand_tilde(teacher, data, run, fails, monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    Path("home").mkdir()
    Path("home/unlabeled.txt").write_text("雨が降る\n", "utf-8")
    run("--output=~/student", "--cache=~/cache", "--unlabeled=~/unlabeled.txt", "--epochs", "1")
    assert (
        sorted(os.listdir("home")) == ["cache", "student", "unlabeled.txt"]
        and not Path("~").exists()
    )
    assert "OUTPUT = '~nobody-here/x': cannot be written (no user of this name)" in fails(
        "--output", "~nobody-here/x"
    )
