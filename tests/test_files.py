"""Files and locks: what is replaced and what is not, full disks, and recovery."""

import errno
import json
import os
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import fault_drill
import pytest
import torch
from conftest import MODEL, ROOT, TINY, history, labelled, save_model, stand_in

import distill

# ── OUTPUT and CACHE ──


def test_folder_faults_refuse_unwritable_output_and_cache(teacher, data, fails):
    Path("file").write_text("x")
    message = fails("--output", "file/model", "--cache", "file/cache")
    assert (
        "OUTPUT = 'file/model': cannot be written" in message
        and "CACHE = 'file/cache': cannot be written" in message
    )


def test_folder_faults_refuse_unwritable_teacher(data, fails, capsys):
    save_model("base")
    Path("file").write_text("x")
    assert "TEACHER = 'file/made': cannot be written" in fails(
        "--teacher", "file/made", "--teacher-base", "base"
    )
    assert capsys.readouterr().out == ""


def test_folder_faults_refuse_cache_with_foreign_files(teacher, data, run, fails):
    Path("mine/tmp").mkdir(parents=True)
    Path("mine/checkpoint.pt").write_text("of something else")
    for cache in "mine", "data", ".":
        assert f"CACHE = {cache!r}: holds files that are not distill.py's" in fails(
            "--cache", cache
        )
    assert (
        Path("mine/checkpoint.pt").read_text() == "of something else" and Path("mine/tmp").is_dir()
    )
    Path("empty").mkdir()
    run("--cache", "empty", "--epochs", "1")
    assert (
        Path("empty/CACHEDIR.TAG")
        .read_text()
        .startswith("Signature: 8a477f597d28d172789f06886806bc55")
    )
    assert "goes on after epoch 1" in run("--cache", "empty", "--epochs", "1")


def test_output_faults_refuse_folder_of_someone_else(teacher, data, fails):
    Path("thesis").mkdir()
    Path("thesis/chapter1.txt").write_text("it was a dark and stormy night")
    assert "was not written by distill.py and is not overwritten" in fails("--output", "thesis")
    assert os.listdir("thesis") == ["chapter1.txt"]
    for name, other in (
        ("TEACHER", "finetuned_bert_japanese"),
        ("DATA", "data"),
        ("CACHE", ".distill_cache"),
    ):
        assert f"would replace {name}; it must not be or contain them" in fails("--output", other)


@pytest.mark.parametrize(
    "output, name",
    [
        (".", "the working folder"),
        ("..", "the working folder"),
        ("holder", "TEACHER"),
        ("holder/data", "DATA"),
        ("holder/cache", "CACHE"),
        ("holder/more", "UNLABELED"),
        (str(ROOT), "distill.py"),
    ],
)
def test_output_faults_refuse_folder_that_holds_inputs(fails, output, name):
    save_model(Path("holder/teacher"))
    for folder in "data", "more":
        Path("holder", folder).mkdir()
    message = fails(
        "--teacher",
        "holder/teacher",
        "--data",
        "holder/data",
        "--cache",
        "holder/cache",
        "--unlabeled",
        "holder/more",
        "--output",
        output,
    )
    assert f"would replace {name}" in message or f", {name}" in message
    assert Path("holder/teacher/model.safetensors").exists()


def test_is_inside_knows_a_folder_by_its_other_names(tmp_path, monkeypatch):
    """As on a Mac's disk, where "Model" is "model"; here, a link stands for the other name."""
    (tmp_path / "model" / "data").mkdir(parents=True)
    (tmp_path / "Model").symlink_to("model")
    monkeypatch.setattr(distill.os.path, "realpath", os.path.abspath)  # leaves links as they are
    assert distill.is_inside(tmp_path / "model", tmp_path / "Model")
    assert distill.is_inside(tmp_path / "model" / "data" / "not yet there", tmp_path / "Model")
    assert not distill.is_inside(tmp_path / "other", tmp_path / "Model")
    assert not distill.is_inside(tmp_path / "Model", tmp_path / "model" / "data")
    assert not distill.is_inside(tmp_path / "model", tmp_path / "not yet there")


def test_foreign_files_in_output_are_refused(teacher, data, run, fails):
    run("--epochs", "1")
    Path("distilled_model/.DS_Store").write_text("x")
    run("--epochs", "1", "--seed", "7")
    report = json.loads(Path("distilled_model/report.json").read_text("utf-8"))
    for without_files in False, True:  # as earlier versions wrote it
        if without_files:
            del report["files"]
            for name in "predictions.csv", "cascade.png":  # which they did not write
                Path("distilled_model", name).unlink()
            Path("distilled_model/report.json").write_text(json.dumps(report), "utf-8")
        for name in "notes.md", ".git", "results.xlsx":
            Path("distilled_model", name).write_text("which seed was best?")
            assert f"holds {name}, not written by distill.py, and is replaced as a whole" in fails()
            Path("distilled_model", name).unlink()
    run("--epochs", "1", "--seed", "7")
    for content in (
        "[]",
        "{}",
        "3",
        "no JSON",
        '{"student": {}, "files": 3}',
    ):  # somebody's report.json
        Path("distilled_model/report.json").write_text(content)
        assert "was not written by distill.py and is not overwritten" in fails()


def test_check_output_replaceable_refuses_mount_point(
    teacher, data, run, fails, monkeypatch, capsys
):
    run("--epochs", "1")
    before = MODEL.read_bytes()
    monkeypatch.setattr(os.path, "ismount", lambda path: str(path).endswith("distilled_model"))
    message = fails("--seed", "7")
    assert "OUTPUT = './distilled_model': is a mount point" in message
    assert (
        "Name a new folder inside it, such as './distilled_model/student'" in message
        and "Make room" not in message
    )
    assert "teacher " not in capsys.readouterr().out and MODEL.read_bytes() == before


def test_check_output_replaceable_refuses_undeletable_files(teacher, data, run, fails, monkeypatch):
    run("--epochs", "1")
    access = os.access
    monkeypatch.setattr(
        os,
        "access",
        lambda path, mode: not str(path).endswith("distilled_model") and access(path, mode),
    )
    assert "OUTPUT = './distilled_model': is write-protected" in fails("--seed", "7")
    monkeypatch.setattr(os, "access", access)
    Path("distilled_model.distill_old").mkdir()
    rmtree = distill.shutil.rmtree
    monkeypatch.setattr(
        distill.shutil,
        "rmtree",
        lambda path, *more, **options: (
            "distilled_model" in str(path) or rmtree(path, *more, **options)
        ),
    )
    assert "distilled_model.distill_old, left by an earlier run, cannot be deleted" in fails(
        "--seed", "7"
    )


# ── Locks ──


def test_run_lock_refuses_second_run_and_ignores_dead_one(teacher, data, run, fails):
    held = (
        "import filelock, time\n"
        "with filelock.FileLock({!r}): print('held', flush=True); time.sleep(600)"
    )
    distill.make_cache()
    for path, told in (
        (".distill_cache/lock", "CACHE = './.distill_cache'"),
        ("distilled_model.distill_lock", "OUTPUT = './distilled_model'"),
    ):
        Path(path).parent.mkdir(exist_ok=True)
        process = subprocess.Popen(
            [sys.executable, "-c", held.format(path)], stdout=subprocess.PIPE, text=True
        )
        assert process.stdout.readline() == "held\n"
        assert f"{told}: another run is using it" in fails()
        process.kill()
        process.communicate()
    run("--epochs", "1")
    assert not list(Path().glob("*.distill_lock"))


# ── save_with_checksum ──


def test_save_with_checksum_keeps_old_file_on_error(settings, monkeypatch):
    distill.save_with_checksum("a.pt", {"x": torch.arange(3)})
    monkeypatch.setattr(
        distill.os, "fsync", lambda handle: (_ for _ in ()).throw(OSError("no space left"))
    )
    with pytest.raises(OSError):
        distill.save_with_checksum("a.pt", {"x": torch.arange(4)})
    assert distill.load_with_checksum("a.pt")["x"].tolist() == [0, 1, 2]


@pytest.mark.parametrize(
    "harm",
    [
        lambda content: content[:-100],
        lambda content: b"",
        lambda content: content[:300] + bytes([content[300] ^ 1]) + content[301:],
    ],
)
@pytest.mark.parametrize("file", ["teacher-*.pt", "checkpoint.pt"])
def test_load_with_checksum_names_damaged_files_to_make_anew(teacher, data, run, file, harm):
    run()
    before, (path,) = (MODEL.read_bytes(), history()), Path(".distill_cache").glob(file)
    path.write_bytes(harm(path.read_bytes()))
    printed = run()
    assert f"{path} is damaged" in printed
    assert ("goes on" in printed) == (file != "checkpoint.pt") and labelled(printed) == (
        (80, 0) if "teacher" in file else (0, 80)
    )
    assert (MODEL.read_bytes(), history()) == before


# ── save_folder ──


def test_save_folder_follows_link(teacher, data, run):
    Path("elsewhere").mkdir()
    for target in (
        "elsewhere/student",
        "elsewhere/not/yet",
    ):  # a folder, and one that is still to be made
        Path("link").unlink(missing_ok=True)
        Path("link").symlink_to(target)
        run("--output", "link", "--epochs", "1")
        run("--output", "link/", "--epochs", "1", "--seed", "7")
        assert Path("link").is_symlink() and Path(target, "report.json").is_file()
        assert os.listdir(Path(target).parent) == [Path(target).name]


def test_save_folder_leaves_folders_beside_output_alone(teacher, data, run):
    for name in "distilled_model.old", "distilled_model.new", "finetuned_bert_japanese.old":
        Path(name).mkdir()
        Path(name, "mine").write_text("x")
    run("--epochs", "1")
    run("--epochs", "2")
    assert all(
        Path(name, "mine").exists() for name in os.listdir() if name.endswith(("old", "new"))
    )


def test_save_folder_on_full_disk_keeps_old_result(teacher, data, run, fails, monkeypatch):
    run("--epochs", "1")
    before = {file.name: file.read_bytes() for file in Path("distilled_model").iterdir()}

    def full(*given, **more):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        stand_in(patch, "plot_losses", full)
        assert "No space left on device. What was saved before is still there" in fails(
            "--alpha", "1.0"
        )
    assert {file.name: file.read_bytes() for file in Path("distilled_model").iterdir()} == before
    assert "goes on after epoch 3" in run("--alpha", "1.0")


def test_save_folder_keeps_old_student_of_run_that_fails(teacher, data, run, fails):
    run("--epochs", "1")
    before = {file.name: file.read_bytes() for file in Path("distilled_model").iterdir()}
    fails("--learning-rate", "1e30")
    fails("--teacher", "./nowhere")
    assert {file.name: file.read_bytes() for file in Path("distilled_model").iterdir()} == before


# ── Full disk ──


@pytest.mark.parametrize(
    "number, room",
    [
        (errno.ENOSPC, True),
        (errno.EDQUOT, True),
        (errno.EFBIG, True),
        (errno.EACCES, False),
        (errno.EROFS, False),
        (errno.EINVAL, False),
    ],
)
def test_full_disk_problem_blames_disk_only_for_its_errors(
    teacher, data, fails, monkeypatch, number, room
):
    def save_pretrained(*given, **more):
        raise OSError(number, os.strerror(number), "x")

    monkeypatch.setattr(distill.BertForSequenceClassification, "save_pretrained", save_pretrained)
    message = fails("--epochs", "1")
    assert (
        os.strerror(number) in message
        and ("Make room" in message) == room
        and "What was saved before is still there" in message
    )
    monkeypatch.setattr(distill, "save_with_checksum", save_pretrained)
    message = fails("--epochs", "1", "--cache", "other")
    assert os.strerror(number) in message and ("Make room" in message) == room


@pytest.mark.parametrize("limit", [3_000, 30_000, 100_000])
def test_full_disk_problem_is_told_and_same_command_resumes(teacher, data, run, fails, limit):
    run("--output", "whole", "--cache", "other")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
    try:
        message = fails()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert "large" in message.lower() or "too big" in message.lower(), message
    assert (
        not MODEL.exists() and not fault_drill.half_written(".")[1:]
    )  # but for CACHE/tmp, which the next run empties
    run()
    assert MODEL.read_bytes() == Path("whole/model.safetensors").read_bytes()
    assert fault_drill.half_written(".") == []


# ── Recovery ──


@pytest.mark.parametrize("moment", [1, 2])
def test_recover_folder_after_kill_while_output_is_replaced(teacher, data, run, fails, moment):
    """The old OUTPUT is renamed away, and then the new one in."""
    run()
    before = MODEL.read_bytes()
    killed = f"""
import os, sys
sys.path.insert(0, {str(ROOT)!r})
import distill
rename, calls = os.rename, []
def last_rename(source, target, **more):
    calls.extend(["rename"] * ("distilled_model" in str(source)))
    if len(calls) == {moment}:
        os.kill(os.getpid(), 9)
    rename(source, target, **more)
os.rename = last_rename
distill.main({[*TINY, "--alpha", "1.0"]!r})
"""
    assert (
        subprocess.run([sys.executable, "-c", killed], capture_output=True).returncode
        == -signal.SIGKILL
    )
    assert MODEL.exists() == (moment == 1) and Path("distilled_model.distill_new").exists()
    fails("--teacher", "./nowhere")  # any later run first puts the old result back
    assert MODEL.read_bytes() == before and sorted(os.listdir()) == [
        ".distill_cache",
        "data",
        "distilled_model",
        "finetuned_bert_japanese",
    ]
    run("--alpha", "1.0")
    assert MODEL.read_bytes() != before


def test_run_survives_fault_drill():
    done = subprocess.run(
        [sys.executable, str(ROOT / "tests/tools/fault_drill.py"), "--rounds", "1"],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout
    assert done.stdout.count("as undisturbed") == 1


def test_run_ignores_clock_set_back_or_on(teacher, data, run, monkeypatch):
    run()
    before = MODEL.read_bytes()
    for years in -20, 20:
        moment = time.time() + years * 365 * 86400
        for path in Path().rglob("*"):
            os.utime(path, (moment, moment))
        monkeypatch.setattr(time, "time", lambda: moment - 10**6)
        printed = run()
        assert (
            "labelled 0 texts" in printed
            and "goes on after epoch" in printed
            and MODEL.read_bytes() == before
        )


# ── What OUTPUT and CACHE must not be ──


@pytest.mark.parametrize(
    "setting", ["STUDENT_INIT", "TEACHER_BASE", "TOKENIZER", "GENERATOR", "UNLABELED"]
)
def test_output_faults_name_what_would_be_replaced(teacher, data, run, fails, setting):
    run("--epochs", "1")
    before = MODEL.read_bytes()
    options = ["--method", "mate"] if setting == "GENERATOR" else []
    flag = f"--{setting.lower().replace('_', '-')}"
    message = fails(flag, "distilled_model/", *options)
    assert f"would replace {setting}" in message and MODEL.read_bytes() == before


@pytest.mark.parametrize("name", ["CACHEDIR.TAG", "lock", "teacher-0.pt"])
def test_is_own_cache_needs_own_mark(teacher, data, fails, name):
    Path("theirs").mkdir()
    Path("theirs", name).write_text("Signature: 8a477f597d28d172789f06886806bc55\n# by pytest\n")
    assert "CACHE = './theirs'" in fails("--cache", "./theirs")
    assert os.listdir("theirs") == [name]


def test_is_own_cache_after_kill_while_it_is_made(teacher, data, run):
    Path(".distill_cache").mkdir()
    Path(".distill_cache/CACHEDIR.TAG.distill_new").touch()
    run("--epochs", "1")
    assert "distill.py" in Path(".distill_cache/CACHEDIR.TAG").read_text("utf-8")


def test_check_output_replaceable_leaves_output_in_place(teacher, data, run, monkeypatch):
    run("--epochs", "1")
    inode = os.stat("distilled_model").st_ino
    monkeypatch.setattr(distill.os, "rename", lambda *names: pytest.fail(str(names)))
    distill.check_output_replaceable()
    assert os.stat("distilled_model").st_ino == inode


def test_replaced_folder_takes_folders_within(teacher, data, run):
    """A tokenizer with several chat templates is saved with a folder of its own."""
    tokenizer = distill.transformers.AutoTokenizer.from_pretrained(teacher)
    tokenizer.chat_template = {"default": "{{ messages }}", "other": "{{ messages }}!"}
    tokenizer.save_pretrained(teacher)
    assert any(path.is_dir() for path in teacher.iterdir())
    run("--epochs", "1")
    run("--epochs", "1")  # what it wrote is its own
    inside = {
        str(path.relative_to("distilled_model")) for path in Path("distilled_model").rglob("*")
    }
    assert "additional_chat_templates/other.jinja" in inside
    assert "additional_chat_templates/other.jinja" in distill.file_names("distilled_model")


@pytest.mark.parametrize(
    "error, is_full",
    [
        (RuntimeError("429: quota exceeded for quota metric"), False),
        (ValueError("file too large for preview"), False),
        (OSError(errno.EDQUOT, "Disk quota exceeded"), True),
        (RuntimeError(f"I/O error: No space left on device (os error {errno.ENOSPC})"), True),
        (RuntimeError(f"[Errno {errno.EFBIG}] File too large"), True),
        (RuntimeError("step 28 of errno"), False),
    ],
)
def test_full_disk_problem_needs_number_of_error(error, is_full):
    assert (distill.full_disk_problem(error) is not None) == is_full
