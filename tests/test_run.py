"""The command from end to end: what it writes, how it stops, goes on and starts again."""

import json
import math
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from transformers import BertForSequenceClassification, BertModel, pipeline

import distill
from conftest import ROOT, SAMPLE, TINY, history, report, rows, save_generator, save_model, tiny_model, write_csv

MODEL = Path("distilled_model/model.safetensors")


def test_a_run_writes_everything_the_readme_names(teacher, data, run):
    printed = run()
    assert {file.name for file in Path("distilled_model").iterdir()} == {
        "model.safetensors", "config.json", "tokenizer_config.json", "vocab.txt", "README.md", "report.json",
        "history.csv", "loss.png"}
    assert sorted(os.listdir()) == [".distill_cache", "data", "distilled_model", "finetuned_bert_japanese"]
    assert not Path(".distill_cache/distill_tmp").exists()

    result = report()
    assert set(result) == {"teacher", "student", "kept", "speedup", "epochs", "best_epoch", "seconds", "settings",
                           "versions", "hardware", "files"}
    assert result["files"] == sorted(file.name for file in Path("distilled_model").iterdir())
    for role in "teacher", "student":
        assert set(result[role]) == {"parameters", "bytes", "splits"}
        assert {split: figures["examples"] for split, figures in result[role]["splits"].items()} == {
            "train": 48, "val": 16, "test": 16}
        for figures in result[role]["splits"].values():
            assert set(figures) == {"examples", "accuracy", "macro_f1", "agreement", "kl", "seconds", "texts_per_second"}
            assert figures["seconds"] > 0 and math.isclose(
                figures["texts_per_second"], figures["examples"] / figures["seconds"])
    test = {role: result[role]["splits"]["test"] for role in ("teacher", "student")}
    assert result["kept"] == test["student"]["accuracy"] / test["teacher"]["accuracy"]
    assert result["speedup"] == test["teacher"]["seconds"] / test["student"]["seconds"]
    assert test["teacher"]["agreement"] == 1
    assert result["student"]["bytes"] == MODEL.stat().st_size
    assert result["epochs"] == len(history()) - 1
    losses = [float(line.split(",")[2]) for line in history()[1:]]
    assert result["best_epoch"] == 1 + losses.index(min(losses))

    assert "(0): BertLayer(" in printed and "(1): BertLayer(" not in printed
    assert printed.count("BertForSequenceClassification(") == 1
    student, full = (BertForSequenceClassification.from_pretrained(folder) for folder in ("distilled_model", teacher))
    assert f"{student.num_parameters():,} parameters on cpu; the teacher has {full.num_parameters():,}" in printed
    assert result["student"]["parameters"] == student.num_parameters()
    assert Path("distilled_model/loss.png").read_bytes()[:4] == b"\x89PNG"


def test_the_student_has_the_structure_of_the_teacher(teacher, data, run):
    run("--num-layers", "2")
    teacher_text, student_text = (re.sub(r"\s+\((\d+(-\d+)?|\d+-\d+)\): (\d+ x )?BertLayer", "BertLayer", str(
        BertForSequenceClassification.from_pretrained(folder))) for folder in (teacher, "distilled_model"))
    assert teacher_text == student_text


def test_the_saved_student_is_the_reported_one_and_a_pipeline_loads_it(teacher, data, run):
    run()
    classify = pipeline("text-classification", model="distilled_model", device="cpu")
    answers = classify([text for text, _ in rows("test", 16)], batch_size=4)
    assert {answer["label"] for answer in answers} <= {"negative", "positive"}
    right = sum(answer["label"] == label for answer, (_, label) in zip(answers, rows("test", 16)))
    assert right / 16 == report()["student"]["splits"]["test"]["accuracy"]


def test_bytes_are_those_of_the_weights_alone(teacher, data, run):
    for name in "training_args.bin", "pytorch_model.bin":  # what a Trainer and an older copy leave in such a folder
        (teacher / name).write_bytes(b"x" * 1000)
    run("--epochs", "1")
    assert report()["teacher"]["bytes"] == (teacher / "model.safetensors").stat().st_size


def test_folders_of_the_user_beside_the_output_are_left_alone(teacher, data, run):
    for name in "distilled_model.old", "distilled_model.new", "finetuned_bert_japanese.old":
        Path(name).mkdir()
        Path(name, "mine").write_text("x")
    run("--epochs", "1")
    run("--epochs", "2")
    assert all(Path(name, "mine").exists() for name in os.listdir() if name.endswith(("old", "new")))


def test_nothing_personal_is_written(data, run, tmp_path):
    run("--teacher", str(save_model(tmp_path / "somewhere" / "else")))
    for file in Path("distilled_model").iterdir():
        assert str(tmp_path).encode() not in file.read_bytes(), file


def test_the_cpu_is_used_even_where_there_is_more(teacher, data, run, monkeypatch):
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    monkeypatch.setattr(torch.backends.mps, "is_built", lambda: True)
    devices = []
    judge = distill.record_epoch
    monkeypatch.setattr(distill, "record_epoch", lambda trainer, row: devices.append(
        (trainer.args.device.type, trainer.model.device.type)) or judge(trainer, row))
    run("--epochs", "1")
    assert devices == [("cpu", "cpu")]


def test_same_seed_same_bytes_other_seed_other_bytes(teacher, data, run):
    found = []
    for seed in "1", "1", "2":
        run("--cache", f"cache{len(found)}", "--seed", seed)
        found.append((MODEL.read_bytes(), history()))
    assert found[0] == found[1] != found[2]


def test_progress_lines_are_aligned(teacher, data, run):
    lines = [line for line in run("--patience", "9").splitlines() if re.match(r" *(epoch|\d+) ", line)]
    assert len(lines) == 4 and len({len(line.removesuffix(" best").rstrip()) for line in lines}) == 1


# ── Stopping ──


@pytest.mark.parametrize("losses, epochs, best", [
    ([5, 4, 3, 2, 1, 1, 1], 7, 5),  # equal is not better
    ([5, 4, 6, 6, 6, 1, 1], 5, 2),  # three epochs without a lower loss
    ([5, 6, 6, 4, 6, 6, 6], 7, 4),  # the count begins anew
    ([7, 6, 5, 4, 3, 2, 1], 7, 7),  # better each time: not stopped
])
def test_early_stopping_by_a_scripted_loss(teacher, data, run, monkeypatch, losses, epochs, best):
    def scripted(trainer, epoch):
        with torch.no_grad():
            trainer.model.classifier.bias.fill_(epoch)  # so that the weights tell which epoch they are of
        return {"epoch": epoch, "train_loss": 1.0, "val_loss": float(losses[epoch - 1]), "val_accuracy": 0.5,
                "learning_rate": 0.1, "seconds": 0.1}
    monkeypatch.setattr(distill, "train_epoch", scripted)
    run("--epochs", "7")
    assert (report()["epochs"], report()["best_epoch"]) == (epochs, best)
    student = BertForSequenceClassification.from_pretrained("distilled_model")
    assert student.classifier.bias.tolist() == [best, best]


def interrupt_in(monkeypatch, epoch, error):
    """From now on the given epoch of training breaks off with `error`, once."""
    train_epoch = distill.train_epoch

    def broken(trainer, number):
        if number == epoch:
            monkeypatch.setattr(distill, "train_epoch", train_epoch)
            train_epoch(trainer, number)  # the weights have moved on
            raise error
        return train_epoch(trainer, number)
    monkeypatch.setattr(distill, "train_epoch", broken)


def test_a_resumed_run_ends_like_an_undisturbed_one(teacher, data, run, monkeypatch):
    run("--output", "whole", "--cache", "cache1", "--epochs", "4", "--patience", "9")
    interrupt_in(monkeypatch, 3, RuntimeError("power cut"))
    with pytest.raises(RuntimeError):
        run("--output", "resumed", "--cache", "cache2", "--epochs", "4", "--patience", "9")
    assert not Path("resumed").exists()
    assert "goes on after epoch 2" in run("--output", "resumed", "--cache", "cache2", "--epochs", "4", "--patience", "9")
    assert Path("whole/model.safetensors").read_bytes() == Path("resumed/model.safetensors").read_bytes()
    assert history("whole") == history("resumed")


def test_ctrl_c_saves_and_reports_the_best_so_far_and_can_go_on(teacher, data, run, monkeypatch):
    interrupt_in(monkeypatch, 3, KeyboardInterrupt())
    assert "stopped by Ctrl-C" in run("--epochs", "4")
    assert report()["epochs"] == 2 and len(history()) == 3
    assert "goes on after epoch 2" in run("--epochs", "4")
    assert report()["epochs"] > 2


def test_ctrl_c_before_the_first_epoch_says_so(teacher, data, fails, monkeypatch):
    interrupt_in(monkeypatch, 1, KeyboardInterrupt())
    assert "stopped by Ctrl-C" in fails()
    assert not Path("distilled_model").exists()


def test_other_settings_or_data_start_anew(teacher, data, run):
    run()
    assert "goes on after epoch" in run()
    assert "training starts anew" in run("--alpha", "0.6")
    write_csv(data / "val.csv", rows("val", 15))
    assert "training starts anew" in run("--alpha", "0.6")


def script(*more):
    return [sys.executable, str(ROOT / "distill.py"), *TINY, *more]


def test_kill_9_and_the_same_command_again(teacher, data):
    """In the method that has most to keep: generator, projections, both optimizers."""
    save_generator("filler")
    run = ["--method", "cilda+minild", "--generator", "filler", "--generator-steps", "2", "--student-steps", "4",
           "--epochs", "6", "--patience", "9", "--cache"]
    subprocess.run(script(*run, "cache1", "--output", "whole"), check=True, capture_output=True)
    process = subprocess.Popen(script(*run, "cache2", "--output", "resumed"), stdout=subprocess.PIPE)
    deadline = time.monotonic() + 300
    while not Path("cache2/checkpoint.pt").exists():
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    again = subprocess.run(script(*run, "cache2", "--output", "resumed"), check=True, capture_output=True, text=True)
    assert "goes on after epoch" in again.stdout
    assert Path("whole/model.safetensors").read_bytes() == Path("resumed/model.safetensors").read_bytes()
    assert history("whole") == history("resumed")


@pytest.mark.parametrize("moment", [1, 2, 3, 4])
def test_a_kill_while_the_result_is_put_in_place(teacher, data, run, fails, moment):
    """OUTPUT is renamed four times: away and back, which shows before any work that it can be; away, and the new one in."""
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
    assert subprocess.run([sys.executable, "-c", killed], capture_output=True).returncode == -signal.SIGKILL
    assert MODEL.exists() == (moment in (1, 3)) and Path("distilled_model.distill_new").exists() == (moment > 2)
    fails("--teacher", "./nowhere")  # any later run first puts the old result back
    assert MODEL.read_bytes() == before and sorted(os.listdir()) == [
        ".distill_cache", "data", "distilled_model", "finetuned_bert_japanese"]
    run("--alpha", "1.0")
    assert MODEL.read_bytes() != before


# ── The teacher's answers and their cache ──


def labelled(printed):
    return tuple(map(int, re.search(r"labelled (\d+) texts; (\d+) were in the cache", printed).groups()))


def test_the_teacher_sees_each_sentence_once_over_all_runs(teacher, data, run):
    assert labelled(run()) == (80, 0)
    before = report()["teacher"]
    assert labelled(run("--alpha", "0.9", "--temperature", "3")) == (0, 80)
    assert report()["teacher"] == before  # times too: they are those of the pass in which it answered
    write_csv(data / "test.csv", [("部屋は本当に広かった。", "positive"), *rows("test", 16)[1:]])
    assert labelled(run()) == (1, 79)
    assert labelled(run("--max-length", "12"))[0] > 40  # cut sentences are other sentences
    save_model(teacher, seed=1)
    assert labelled(run()) == (80, 0)


def test_a_stopped_teacher_pass_goes_on(teacher, data, run, monkeypatch):
    predict, calls = distill.timed_logits, []

    def killed(model, loader):
        for answer in predict(model, loader):
            calls.append(len(answer[1]))
            if len(calls) == 4:
                raise RuntimeError("killed")
            yield answer
    monkeypatch.setattr(distill, "timed_logits", killed)
    monkeypatch.setattr(distill, "TOKENS_PER_BATCH", 200)
    with pytest.raises(RuntimeError):
        run()
    monkeypatch.setattr(distill, "timed_logits", predict)
    done = sum(calls[1:3])  # the first is the warm-up, the fourth came to nothing
    assert 0 < done < 80 and labelled(run()) == (80 - done, done)


@pytest.mark.parametrize("harm", [lambda content: content[:-100], lambda content: b"",
                                  lambda content: content[:300] + bytes([content[300] ^ 1]) + content[301:]])
@pytest.mark.parametrize("file", ["teacher-*.pt", "checkpoint.pt"])
def test_damaged_files_in_the_cache_are_named_and_made_anew(teacher, data, run, file, harm):
    run()
    before, (path,) = (MODEL.read_bytes(), history()), Path(".distill_cache").glob(file)
    path.write_bytes(harm(path.read_bytes()))
    printed = run()
    assert f"{path} is damaged" in printed
    assert ("goes on" in printed) == (file != "checkpoint.pt") and labelled(printed) == ((80, 0) if "teacher" in file else (0, 80))
    assert (MODEL.read_bytes(), history()) == before


# ── A teacher of our own ──


def test_teacher_base_is_fine_tuned_into_teacher_and_then_used(data, run):
    save_model("base", seed=3)
    printed = run("--teacher-base", "base", "--teacher-epochs", "2")
    assert "base is fine-tuned into it" in printed
    assert BertForSequenceClassification.from_pretrained("finetuned_bert_japanese").config.id2label == {
        0: "negative", 1: "positive"}
    before = Path("finetuned_bert_japanese/model.safetensors").read_bytes()
    assert "fine-tuned into it" not in run("--teacher-base", "base")
    assert Path("finetuned_bert_japanese/model.safetensors").read_bytes() == before


def test_ctrl_c_while_a_teacher_is_made_makes_no_teacher_of_what_is_there(data, run, fails, monkeypatch):
    save_model("base")
    interrupt_in(monkeypatch, 2, KeyboardInterrupt())
    assert "stopped by Ctrl-C" in fails("--teacher-base", "base")
    assert not Path("finetuned_bert_japanese").exists() and not Path("distilled_model").exists()
    assert "goes on after epoch 1" in run("--teacher-base", "base")


def test_labels_for_a_new_teacher_are_read_off_the_data(data, run):
    """The base is a BERT without a classifier, as pretrained ones are."""
    save_model("base")
    BertModel(tiny_model().config).save_pretrained("base")
    for split in "train", "val", "test":
        write_csv(data / f"{split}.csv", [(text, i % 3) for i, (text, _) in enumerate(rows(split, 48))])
    run("--teacher-base", "base", "--teacher-epochs", "1", "--epochs", "1")
    assert BertForSequenceClassification.from_pretrained("distilled_model").config.id2label == {
        0: "LABEL_0", 1: "LABEL_1", 2: "LABEL_2"}


def test_a_stopped_fine_tuning_goes_on_and_leaves_no_half_teacher(data, run, monkeypatch):
    save_model("base")
    interrupt_in(monkeypatch, 2, RuntimeError("killed"))
    with pytest.raises(RuntimeError):
        run("--teacher-base", "base")
    assert not Path("finetuned_bert_japanese").exists()
    assert "goes on after epoch 1" in run("--teacher-base", "base")


def test_a_teacher_and_its_tokenizer_by_hub_name(data, tmp_path):
    """A hub cache laid out by hand: the names are resolved as on a machine that has loaded them before."""
    snapshot = tmp_path / "hub" / "models--someone--teacher" / "snapshots" / ("0" * 40)
    save_model(snapshot)
    refs = snapshot.parents[1] / "refs"
    refs.mkdir()
    (refs / "main").write_text("0" * 40)
    subprocess.run(script("--teacher", "someone/teacher", "--epochs", "1"), check=True, capture_output=True,
                   env={**os.environ, "HF_HUB_CACHE": str(tmp_path / "hub"), "HF_HUB_OFFLINE": "1"})
    assert report()["teacher"]["bytes"] == (snapshot / "model.safetensors").stat().st_size


# ── The sample, as in the README ──


def test_the_sample_run_makes_a_sample_teacher_for_whom_words_alone_do_not_tell_the_label():
    """`python distill.py` with nothing else present, from another folder than the script's. A logistic regression on the
    words stays 8 points below the sample teacher, which reaches 95 %.
    """
    done = subprocess.run([sys.executable, str(ROOT / "distill.py")], capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr
    assert len(re.findall("^teacher .*sample teacher", done.stdout, re.M)) == 1
    assert not Path("finetuned_bert_japanese").exists() and Path(".distill_cache/sample_teacher").is_dir()
    assert report()["student"]["splits"]["test"]["accuracy"] > 0.8
    teacher = report()["teacher"]["splits"]["test"]["accuracy"]
    assert teacher >= 0.95

    vocabulary = (SAMPLE / "base" / "vocab.txt").read_text("utf-8").splitlines()
    words = {word: column for column, word in enumerate(vocabulary)}
    tokenizer = distill.transformers.AutoTokenizer.from_pretrained(SAMPLE / "base")

    def bag(split):
        table = rows(split, None)
        counts = torch.zeros(len(table), len(words))
        for row, (text, _) in enumerate(table):
            for token in tokenizer.tokenize(text):
                counts[row, words[token]] += 1
        return counts, torch.tensor([label == "positive" for _, label in table]).double()
    (x, y), (test_x, test_y) = bag("train"), bag("test")
    weights = torch.zeros(len(words) + 1, requires_grad=True)
    optimizer = torch.optim.LBFGS([weights], max_iter=300, line_search_fn="strong_wolfe")

    def loss():
        optimizer.zero_grad()
        value = torch.nn.functional.binary_cross_entropy_with_logits(
            x @ weights[1:] + weights[0], y.float()) + 1e-4 * weights.square().sum()
        value.backward()
        return value
    optimizer.step(loss)
    accuracy = lambda x, y: ((x @ weights[1:] + weights[0] > 0) == y.bool()).double().mean().item()
    assert 0.6 < accuracy(x, y)  # it has learnt what it can
    assert accuracy(test_x, test_y) <= teacher - 0.08


def test_the_sample_is_what_its_script_writes(tmp_path):
    target = tmp_path / "sample"
    target.mkdir()
    (target / "make_sample.py").write_bytes((SAMPLE / "make_sample.py").read_bytes())
    subprocess.run([sys.executable, str(target / "make_sample.py")], check=True, capture_output=True)
    for name in "train.csv", "val.csv", "test.csv", "base/vocab.txt":
        assert (target / name).read_bytes() == (SAMPLE / name).read_bytes()
    texts = [text for split in ("train", "val", "test") for text, _ in rows(split, None)]
    assert len(texts) == len(set(texts)) >= 4000


# ── The table of settings over seeds ──


def test_the_ablation_runs_each_setting_once_and_averages(teacher, data, run, capsys):
    """Its figures are those of the same command by hand; what is finished is not repeated; a failure is told."""
    import ablation
    run("--epochs", "1", "--seed", "2")
    Path("settings.txt").write_text("# comment\n\nby hand: --epochs 1\n", "utf-8")
    command = ["settings.txt", "--folder", "runs", "--seeds", "1", "2", "--", *TINY, "--teacher", str(teacher)]
    with pytest.raises(SystemExit, match="^0$"):
        ablation.main(command)
    made = [json.loads(line) for line in Path("runs/runs.jsonl").read_text("utf-8").splitlines()]
    assert [(row["name"], row["seed"], row["epochs"]) for row in made] == [("by hand", 1, 1), ("by hand", 2, 1)]
    test = report()["student"]["splits"]["test"]
    for figure in "accuracy", "macro_f1", "agreement", "kl":
        assert made[1][figure] == pytest.approx(test[figure], abs=1e-6)
    first, second = (row["accuracy"] * 100 for row in made)
    line = f"| by hand | 2 | {(first + second) / 2:.2f} ± {abs(first - second) / math.sqrt(2):.2f} |"
    assert line in Path("runs/table.md").read_text("utf-8")

    Path("settings.txt").write_text("by hand: --epochs 1\nwrong: --epochs 0\n", "utf-8")
    capsys.readouterr()
    with pytest.raises(SystemExit, match="runs that failed: 1"):
        ablation.main(command[:4] + command[5:])
    told = capsys.readouterr().out
    assert told.startswith("wrong, seed 2: distill.py: these settings must be put right") and "| by hand | 2 |" in told
