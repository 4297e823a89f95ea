"""Paths as people write them, folders that are not to be replaced, and what is said of a disk."""

import errno
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import distill
from conftest import ROOT, TINY, history, rows, save_model, write_csv

MODEL = Path("distilled_model/model.safetensors")


# ── Paths ──


@pytest.mark.parametrize("given, expected", [
    ("./out/", "./out"), ("out//", "out"), ("out/.", "out"), ("./", "."), ("/", "/"), ("//", "/"), ("../", ".."), ("a/b", "a/b"),
    ("org/name/", "org/name"), ("~/out/", "/home/me/out"), ("~", "/home/me"), ("a/~", "a/~"), ("", "")])
def test_normalize_path_expands_the_home_folder_and_drops_slashes_at_the_end(monkeypatch, given, expected):
    monkeypatch.setenv("HOME", "/home/me")
    assert distill.normalize_path(given) == expected


def test_a_slash_at_the_end_of_any_path(data, run, capsys):
    save_model("base")
    options = ["--teacher-base", "base/", "--teacher", "./made/", "--teacher-epochs", "1", "--data", "data/", "--cache", "./cache/"]
    run(*options, "--output", "./out/")
    run(*options, "--output", "./out/", "--seed", "7")
    assert sorted(os.listdir()) == ["base", "cache", "data", "made", "out"]
    distill.main(["--output", "./out/", "--predict", "良い"])
    assert distill.load_student("out/")(["良い"]) == distill.load_student(Path("out"))(["良い"])


def test_a_tilde_that_no_shell_has_expanded(teacher, data, run, fails, monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    Path("home").mkdir()
    Path("home/unlabeled.txt").write_text("雨が降る\n", "utf-8")
    run("--output=~/student", "--cache=~/cache", "--unlabeled=~/unlabeled.txt", "--epochs", "1")
    assert sorted(os.listdir("home")) == ["cache", "student", "unlabeled.txt"] and not Path("~").exists()
    assert "OUTPUT = '~nobody-here/x': cannot be written (no user of this name)" in fails("--output", "~nobody-here/x")


def test_an_output_that_is_a_link(teacher, data, run):
    Path("elsewhere").mkdir()
    for target in "elsewhere/student", "elsewhere/not/yet":  # a folder, and one that is still to be made
        Path("link").unlink(missing_ok=True)
        Path("link").symlink_to(target)
        run("--output", "link", "--epochs", "1")
        run("--output", "link/", "--epochs", "1", "--seed", "7")
        assert Path("link").is_symlink() and Path(target, "report.json").is_file()
        assert os.listdir(Path(target).parent) == [Path(target).name]


# ── What is not replaced ──


def test_an_output_that_cannot_be_renamed_is_refused_before_any_work(teacher, data, run, fails, monkeypatch, capsys):
    run("--epochs", "1")
    before, rename = MODEL.read_bytes(), os.rename

    def busy(source, target):
        if str(source).endswith("distilled_model"):  # as of a mount point
            raise OSError(errno.EBUSY, os.strerror(errno.EBUSY), str(source), None, str(target))
        rename(source, target)
    monkeypatch.setattr(os, "rename", busy)
    message = fails("--seed", "7")
    assert "OUTPUT = './distilled_model': cannot be replaced as a whole" in message and "busy" in message
    assert "Name a new folder inside it, such as './distilled_model/student'" in message and "Make room" not in message
    assert "teacher " not in capsys.readouterr().out and MODEL.read_bytes() == before


def test_an_output_whose_files_cannot_be_deleted_is_refused_before_any_work(teacher, data, run, fails, monkeypatch):
    run("--epochs", "1")
    access = os.access
    monkeypatch.setattr(os, "access", lambda path, mode: not str(path).endswith("distilled_model") and access(path, mode))
    assert "OUTPUT = './distilled_model': is write-protected" in fails("--seed", "7")
    monkeypatch.setattr(os, "access", access)
    Path("distilled_model.distill_old").mkdir()
    rmtree = distill.shutil.rmtree
    monkeypatch.setattr(distill.shutil, "rmtree", lambda path, *more, **options: "distilled_model" in str(path) or rmtree(path, *more, **options))
    assert "distilled_model.distill_old, left by an earlier run, cannot be deleted" in fails("--seed", "7")


def test_a_kill_during_export_leaves_nothing_in_the_way(teacher, data, run, monkeypatch):
    def killed(graph, example, folder):
        Path(folder, "student.pt2").write_text("half")
        raise SystemExit("killed")
    for moment in "writing", "moving":
        with monkeypatch.context() as patch, pytest.raises(SystemExit, match="killed"):
            if moment == "writing":
                patch.setattr(distill, "export_pt2", killed)
                patch.setattr(distill.shutil, "rmtree", lambda *given, **more: None)  # a kill clears nothing away
            else:
                patch.setattr(os, "replace", lambda source, target, replace=os.replace: exit("killed") if str(target).endswith(
                    "pt2") else replace(source, target))
            run("--epochs", "1", "--export", "pt2")
        run("--epochs", "1", "--export", "pt2", "--output", str(Path("distilled_model").absolute()))
        assert sorted(json.loads(Path("distilled_model/report.json").read_text())["files"]) == sorted(os.listdir("distilled_model"))
        assert "student.pt2" in os.listdir("distilled_model") and not Path("distilled_model.distill_new").exists()


@pytest.mark.parametrize("output, name", [
    (".", "the working folder"), ("..", "the working folder"), ("holder", "TEACHER"), ("holder/data", "DATA"), ("holder/cache", "CACHE"),
    ("holder/more", "UNLABELED"), (str(ROOT), "distill.py")])
def test_an_output_that_would_replace_what_is_needed_is_refused(fails, output, name):
    save_model(Path("holder/teacher"))
    for folder in "data", "more":
        Path("holder", folder).mkdir()
    message = fails("--teacher", "holder/teacher", "--data", "holder/data", "--cache", "holder/cache", "--unlabeled", "holder/more",
                    "--output", output)
    assert f"would replace {name}" in message or f", {name}" in message
    assert Path("holder/teacher/model.safetensors").exists()


def test_an_output_with_files_of_the_users_own_is_left_alone(teacher, data, run, fails):
    run("--epochs", "1")
    Path("distilled_model/.DS_Store").write_text("x")
    run("--epochs", "1", "--seed", "7")
    report = json.loads(Path("distilled_model/report.json").read_text("utf-8"))
    for without_files in False, True:  # as earlier versions wrote it
        if without_files:
            del report["files"]
            Path("distilled_model/report.json").write_text(json.dumps(report), "utf-8")
        for name in "notes.md", ".git", "results.xlsx":
            Path("distilled_model", name).write_text("which seed was best?")
            assert f"holds {name}, not written by distill.py, and is replaced as a whole" in fails()
            Path("distilled_model", name).unlink()
    run("--epochs", "1", "--seed", "7")
    for content in "[]", "{}", "3", "no JSON", '{"student": {}, "files": 3}':  # somebody's report.json
        Path("distilled_model/report.json").write_text(content)
        assert "was not written by distill.py and is not overwritten" in fails()


def test_a_cache_with_files_of_the_users_own_is_left_alone(teacher, data, run, fails):
    Path("mine/tmp").mkdir(parents=True)
    Path("mine/checkpoint.pt").write_text("of something else")
    for cache in "mine", "data", ".":
        assert f"CACHE = {cache!r}: holds files that are not distill.py's" in fails("--cache", cache)
    assert Path("mine/checkpoint.pt").read_text() == "of something else" and Path("mine/tmp").is_dir()
    Path("empty").mkdir()
    run("--cache", "empty", "--epochs", "1")
    assert Path("empty/CACHEDIR.TAG").read_text().startswith("Signature: 8a477f597d28d172789f06886806bc55")
    assert "goes on after epoch 1" in run("--cache", "empty", "--epochs", "1")


def test_a_teacher_that_could_not_be_saved_is_refused_before_it_is_made(data, fails, capsys):
    save_model("base")
    Path("file").write_text("x")
    assert "TEACHER = 'file/made': cannot be written" in fails("--teacher", "file/made", "--teacher-base", "base")
    assert capsys.readouterr().out == ""


def test_a_tokenizer_that_cannot_be_saved_is_found_out_before_training(teacher, data, fails, monkeypatch, capsys):
    def broken(*given, **more):
        raise ValueError("its vocabulary file is gone")
    monkeypatch.setattr(distill.transformers.BertJapaneseTokenizer, "save_pretrained", broken)
    assert "the student's tokenizer cannot be saved: its vocabulary file is gone" in fails()
    assert "epoch" not in capsys.readouterr().out


@pytest.mark.parametrize("options, message", [
    (["--num-layers", "7"], "the teacher has layers 0 to 2"), (["--report-to", "nosuch"], "REPORT_TO = 'nosuch'"),
    (["--student-init", "broken"], "STUDENT_INIT = 'broken': its weights cannot be loaded"),
    (["--student-init", "other"], "is of the family 'roberta'"),
    (["--method", "mate", "--generator", "broken"], "GENERATOR = 'broken'"),
])
def test_what_is_wrong_with_other_models_is_told_before_the_teachers_pass(teacher, data, fails, capsys, options, message):
    save_model("broken")
    Path("broken/model.safetensors").write_bytes(b"no weights")
    save_model("other")
    Path("other/config.json").write_text(Path("other/config.json").read_text().replace('"bert"', '"roberta"'))
    assert message in fails(*options)
    assert "labelled" not in capsys.readouterr().out


def test_one_run_at_a_time_makes_a_teacher(data, fails):
    save_model("base")
    with distill.filelock.FileLock("made.distill_lock"):
        assert "TEACHER = 'made': another run is using it" in fails("--teacher", "made", "--teacher-base", "base")


def test_the_lock_of_a_run_that_was_killed_while_it_made_a_teacher_is_cleared_away(data, run):
    save_model("base")
    for made in False, True:
        Path("made.distill_lock").touch()
        run("--teacher", "made", "--teacher-base", "base", "--teacher-epochs", "1", "--epochs", "1")
        assert Path("made").is_dir() and not Path("made.distill_lock").exists()


def test_a_teacher_that_is_there_is_told_where_another_could_be_made(teacher, data, run):
    save_model("base")
    printed = run("--teacher-base", "base", "--epochs", "1")
    assert "./finetuned_bert_japanese is there and is used as it is; delete it to have it made anew from base" in printed


def test_columns_must_differ(teacher, data, fails):
    assert "must be different columns" in fails("--text-pair-column", "text")
    assert "must be different columns" in fails("--label-column", "text")
    assert "must not be 'labels'" in fails("--text-column", "labels")


# ── A teacher that the user names is never replaced ──


@pytest.mark.parametrize("name", ["./mine", "some/hub-name", "./finetuned_bert_japanese", "finetuned_bert_japanese"])
def test_a_teacher_that_is_named_is_never_replaced_by_the_sample_teacher(name, monkeypatch, capsys):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(SystemExit) as exit:
        distill.main(["--teacher", name])
    assert f"TEACHER = {name!r}" in str(exit.value.code) and "sample teacher" not in capsys.readouterr().out


def test_a_teacher_named_in_the_file_is_never_replaced_by_the_sample_teacher(monkeypatch):
    distill.COMMAND_LINE_SETTINGS.clear()
    assert distill.find_teacher()[0].endswith("sample_teacher")
    monkeypatch.setattr(distill, "TEACHER", "./mine")
    assert distill.find_teacher() == ("./mine", None)


def test_data_that_are_still_the_sample_are_told(run, monkeypatch, capsys):
    save_model("finetuned_bert_japanese")
    monkeypatch.setattr(distill, "add_soft_labels", lambda *given: sys.exit("far enough"))
    with pytest.raises(SystemExit):
        run("--data", "tests/sample")
    assert "DATA is still the sample; set it to your teacher's data" in capsys.readouterr().out


# ── What is said of a disk ──


@pytest.mark.parametrize("number, room", [(errno.ENOSPC, True), (errno.EDQUOT, True), (errno.EFBIG, True), (errno.EACCES, False),
                                          (errno.EROFS, False), (errno.EINVAL, False)])
def test_a_message_blames_the_disk_only_for_what_the_disk_did(teacher, data, fails, monkeypatch, number, room):
    def save_pretrained(*given, **more):
        raise OSError(number, os.strerror(number), "x")
    monkeypatch.setattr(distill.BertForSequenceClassification, "save_pretrained", save_pretrained)
    message = fails("--epochs", "1")
    assert os.strerror(number) in message and ("Make room" in message) == room and "What was saved before is still there" in message
    monkeypatch.setattr(distill, "save_with_checksum", save_pretrained)
    message = fails("--epochs", "1", "--cache", "other")
    assert os.strerror(number) in message and ("Make room" in message) == room


def test_an_output_that_nobody_reads_any_more_ends_the_run_in_one_message(teacher, data):
    process = subprocess.Popen([sys.executable, str(ROOT / "distill.py"), *TINY], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    process.stdout.readline()
    process.stdout.close()  # as by | head -1
    error = process.stderr.read()
    assert process.wait() == 1 and "the program that read its output has ended" in error and "Traceback" not in error


def test_a_terminal_without_japanese_letters_ends_no_run(data):
    save_model("finetuned_bert_japanese", labels=("低評価", "高評価"))
    for split in "train", "val", "test":
        write_csv(data / f"{split}.csv", [(text, "高評価" if label == "positive" else "低評価") for text, label in rows(split, 16)])
    done = subprocess.run([sys.executable, str(ROOT / "distill.py"), *TINY], capture_output=True, env=os.environ | {"PYTHONIOENCODING": "ascii"})
    assert done.returncode == 0 and len(history()) == 4
