"""Files and locks: what is replaced and what is not, full disks, and recovery."""

import errno
import functools
import itertools
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
from conftest import MODEL, ROOT, TINY, FastBert, history, in_child, labelled, save_model, stand_in

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
        message = fails("--cache", cache)
        assert f"CACHE = {cache!r}: holds " in message and "not written by distill.py" in message
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
    assert "holds chapter1.txt, not written by distill.py" in fails("--output", "thesis")
    assert os.listdir("thesis") == ["chapter1.txt"]
    for name, other in (
        ("TEACHER", "finetuned_bert_japanese"),
        ("DATA", "data"),
        ("CACHE", ".distill_cache"),
    ):
        assert f"OUTPUT = {other!r}: is or contains {name}" in fails("--output", other)


@pytest.mark.parametrize(
    "output, name",
    [
        (".", "the working folder"),
        ("..", "the working folder"),
        ("holder", "TEACHER"),
        ("holder/data", "DATA"),
        ("holder/cache", "CACHE"),
        ("holder/more", "UNLABELED"),
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
    assert "is or contains" in message and name in message
    assert Path("holder/teacher/model.safetensors").exists()
    assert "distill.py" in fails("--output", str(ROOT))  # is foreign there


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
    for name in "notes.md", ".git", "results.xlsx":
        Path("distilled_model", name).write_text("which seed was best?")
        assert f"holds {name}, not written by distill.py" in fails()
        Path("distilled_model", name).unlink()
    for content in (
        "[]",
        "{}",
        "3",
        "no JSON",
        '{"student": {}, "files": 3}',
    ):  # somebody's report.json
        Path("distilled_model/report.json").write_text(content)
        assert "report.json" in fails()


def test_replacement_fault_refuses_what_cannot_be_replaced(teacher, data, run, fails, monkeypatch):
    """Refused before any work: a mount point, a folder in which no file can be made or deleted."""
    run("--epochs", "1")
    before, inode = MODEL.read_bytes(), os.stat("distilled_model").st_ino
    is_output = "distilled_model"
    rmtree, new_file = distill.shutil.rmtree, distill.tempfile.TemporaryFile

    def refuse(path):
        if is_output in str(path):
            raise PermissionError(errno.EACCES, "Permission denied", str(path))

    with monkeypatch.context() as patch:
        patch.setattr(os.path, "ismount", lambda path: is_output in str(path))
        assert "OUTPUT = './distilled_model': is a mount point" in fails("--seed", "7")
    with monkeypatch.context() as patch:
        patch.setattr(
            distill.tempfile, "TemporaryFile", lambda dir: refuse(dir) or new_file(dir=dir)
        )
        message = fails("--seed", "7")
        assert (
            "OUTPUT = './distilled_model': cannot be written ([Errno 13] Permission denied"
            in message
        )
    Path("distilled_model.distill_old").mkdir()
    with monkeypatch.context() as patch:
        patch.setattr(distill.shutil, "rmtree", lambda path, **more: refuse(path) or rmtree(path))
        message = fails("--seed", "7")
        assert "Permission denied" in message and "distilled_model.distill_old" in message
    assert MODEL.read_bytes() == before and os.stat("distilled_model").st_ino == inode


# ── Locks ──


def test_folder_faults_refuse_second_run_and_ignores_dead_one(teacher, data, run, fails):
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


def test_load_with_checksum_names_damaged_files_to_make_anew(teacher, data, run):
    run()
    before = MODEL.read_bytes(), history()
    harms = (
        lambda content: content[:-100],
        lambda content: b"",
        lambda content: content[:300] + bytes([content[300] ^ 1]) + content[301:],
    )
    for harm, file in itertools.product(harms, ["teacher-*.pt", "checkpoint.pt"]):
        (path,) = Path(".distill_cache").glob(file)
        path.write_bytes(harm(path.read_bytes()))
        printed = run()
        assert f"{path} is damaged" in printed
        assert ("goes on" in printed) == (file != "checkpoint.pt")
        assert labelled(printed) == ((80, 0) if "teacher" in file else (0, 80))
        assert (MODEL.read_bytes(), history()) == before


# ── replaced ──


def test_replaced_follows_link(teacher, data, run):
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


def test_replaced_leaves_folders_beside_output_alone(teacher, data, run):
    for name in "distilled_model.old", "distilled_model.new", "finetuned_bert_japanese.old":
        Path(name).mkdir()
        Path(name, "mine").write_text("x")
    run("--epochs", "1")
    run("--epochs", "2")
    assert all(
        Path(name, "mine").exists() for name in os.listdir() if name.endswith(("old", "new"))
    )


def test_replaced_on_full_disk_keeps_old_result(teacher, data, run, fails, monkeypatch):
    run("--epochs", "1")
    before = {file.name: file.read_bytes() for file in Path("distilled_model").iterdir()}

    def full(*given, **more):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        stand_in(patch, "plot_losses", full)
        message = fails("--alpha", "1.0")
        assert "No space left on device. What was saved before is still there" in message
    assert {file.name: file.read_bytes() for file in Path("distilled_model").iterdir()} == before
    assert "goes on after epoch 3" in run("--alpha", "1.0")


def test_replaced_keeps_old_student_of_run_that_fails(teacher, data, run, fails):
    run("--epochs", "1")
    before = {file.name: file.read_bytes() for file in Path("distilled_model").iterdir()}
    fails("--learning-rate", "1e30")
    fails("--teacher", "./nowhere")
    assert {file.name: file.read_bytes() for file in Path("distilled_model").iterdir()} == before


# ── Full disk ──


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EROFS])
def test_main_tells_why_nothing_can_be_written(teacher, data, fails, monkeypatch, number):
    def save_pretrained(*given, **more):
        raise OSError(number, os.strerror(number), "x")

    for owner, name in (
        (FastBert, "save_pretrained"),
        (distill, "save_with_checksum"),
    ):
        monkeypatch.setattr(owner, name, save_pretrained)
        message = fails("--epochs", "1", "--cache", name)
        assert os.strerror(number) in message and "What was saved before is still there" in message


@pytest.mark.parametrize("limit", [3_000, 30_000, 100_000])
def test_full_disk_is_told_and_same_command_resumes(teacher, data, run, fails, limit):
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


def test_recover_after_kill_at_each_moment_of_replacing(teacher, data, run, fails):
    """OUTPUT is half-written; whole; the old one is away; the new one stands in its place."""
    run()
    before = MODEL.read_bytes()

    def killed_in(owner, name):
        call = getattr(owner, name)

        def killed(*given, **more):
            if "distilled_model" in str(given):
                os.kill(os.getpid(), signal.SIGKILL)
            return call(*given, **more)

        setattr(owner, name, killed)  # in a copy of this process
        distill.main([*TINY, "--alpha", "1.0"])

    for moment in (
        (distill, "plot_losses"),
        (os, "rename"),
        (os, "replace"),
        (distill.shutil, "rmtree"),
    ):
        assert in_child(functools.partial(killed_in, *moment)) == -signal.SIGKILL
        assert MODEL.exists() == (moment != (os, "replace"))
        fails("--teacher", "./nowhere")  # any later run first puts the old result back
        is_new = moment[1] == "rmtree"
        assert (MODEL.read_bytes() != before) == is_new
        assert len(list(Path("distilled_model").iterdir())) == 10
        folders = [".distill_cache", "data", "distilled_model", "finetuned_bert_japanese"]
        assert sorted(os.listdir()) == folders


def test_run_survives_fault_drill(capsys):
    with pytest.raises(SystemExit) as exit:
        fault_drill.main(["--rounds", "1"])
    printed = capsys.readouterr().out
    assert exit.value.code == 0 and printed.count("as undisturbed") == 1, printed


def test_run_ignores_clock_set_back_or_on(teacher, data, run, monkeypatch):
    run()
    before = MODEL.read_bytes()
    for years in -20, 20:
        moment = time.time() + years * 365 * 86400
        for path in Path().rglob("*"):
            os.utime(path, (moment, moment))
        monkeypatch.setattr(time, "time", functools.partial(float, moment - 10**6))
        printed = run()
        assert (
            "labelled 0 texts" in printed
            and "goes on after epoch" in printed
            and MODEL.read_bytes() == before
        )


# ── What OUTPUT and CACHE must not be ──


def test_replacement_fault_names_what_would_be_replaced(teacher, data, run, fails):
    run("--epochs", "1")
    before = MODEL.read_bytes()
    for setting in "STUDENT_INIT", "TEACHER_BASE", "TOKENIZER", "GENERATOR", "UNLABELED":
        options = ["--method", "mate"] if setting == "GENERATOR" else []
        flag = f"--{setting.lower().replace('_', '-')}"
        message = fails(flag, "distilled_model/", *options)
        assert f"is or contains {setting}" in message and MODEL.read_bytes() == before


@pytest.mark.parametrize("name", ["CACHEDIR.TAG", "lock", "teacher-0.pt"])
def test_is_own_cache_needs_own_mark(teacher, data, fails, name):
    Path("theirs").mkdir()
    Path("theirs", name).write_text("Signature: 8a477f597d28d172789f06886806bc55\n# by pytest\n")
    assert "CACHE = './theirs'" in fails("--cache", "./theirs")
    assert os.listdir("theirs") == [name]


def test_is_own_cache_after_kill_while_it_is_made(teacher, data, run):
    Path(".distill_cache").mkdir()
    Path(".distill_cache/CACHEDIR.TAG").touch()
    run("--epochs", "1")
    assert "distill.py" in Path(".distill_cache/CACHEDIR.TAG").read_text("utf-8")


def test_replaced_takes_folders_within(teacher, data, run):
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
