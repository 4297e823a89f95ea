"""Training: optimizer and schedule, early stopping, Ctrl-C, kill and resume."""

import importlib.util
import os
import signal
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import (
    MODEL,
    TINY,
    history,
    interrupt_in,
    labelled,
    load_edited,
    notes,
    report,
    rows,
    save_generator,
    save_model,
    tiny_model,
    write_csv,
)
from fault_drill import Copy
from transformers import AutoTokenizer, BertForSequenceClassification

import distill

# ── Optimizer and schedule ──


def test_make_trainer_decays_no_biases_or_norms(settings):
    model = tiny_model()
    table = [{"input_ids": [2, 9, 3], "length": 3, "labels": 1}]
    trainer = distill.make_trainer(
        model,
        {"train": table, "val": table},
        distill.collate,
        distill.CustomTrainer,
        epochs=1,
        learning_rate=1e-4,
        patience=3,
    )
    decayed, spared = trainer.create_optimizer().param_groups
    assert decayed["weight_decay"] == distill.WEIGHT_DECAY and spared["weight_decay"] == 0
    names = {id(tensor): name for name, tensor in model.named_parameters()}
    assert all("bias" in names[id(p)] or "LayerNorm" in names[id(p)] for p in spared["params"])
    assert all(p.dim() == 2 for p in decayed["params"])


def test_make_trainer_learning_rate_follows_schedule(teacher, data, run):
    rates = {}
    for schedule in "linear", "constant":
        run(
            "--schedule",
            schedule,
            "--patience",
            "9",
            "--learning-rate",
            "0.001",
            "--cache",
            schedule,
        )
        lines = Path("distilled_model/history.csv").read_text().splitlines()[1:]
        rates[schedule] = [float(line.split(",")[4]) for line in lines]
    assert rates["constant"] == [0.001] * 3
    assert rates["linear"] == pytest.approx(
        [0.001 * (18 - step) / 16 for step in (5, 11, 17)]
    )  # 6 steps an epoch, 2 warm


def test_make_trainer_uses_the_cpu_alone(teacher, data, run, monkeypatch):
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    monkeypatch.setattr(torch.backends.mps, "is_built", lambda: True)
    devices = []
    judge = distill.record_epoch
    monkeypatch.setattr(
        distill,
        "record_epoch",
        lambda trainer, row: (
            devices.append((trainer.args.device.type, trainer.model.device.type))
            or judge(trainer, row)
        ),
    )
    run("--epochs", "1")
    assert devices == [("cpu", "cpu")]


# ── train_epoch ──


def test_validate_averages_over_texts_not_batches(teacher, data, run):
    run("--epochs", "1", "--batch-size", "5")
    with open("distilled_model/history.csv", encoding="utf-8") as file:
        header, row = (line.strip().split(",") for line in file)
    row = dict(zip(header, map(float, row)))
    student, full = (
        BertForSequenceClassification.from_pretrained(folder).eval()
        for folder in ("distilled_model", teacher)
    )
    tokenizer, losses, right = AutoTokenizer.from_pretrained(teacher), [], 0
    for text, label in rows("val", 16):
        inputs, hard = (
            tokenizer(text, return_tensors="pt"),
            torch.tensor([int(label == "positive")]),
        )
        with torch.no_grad():
            logits, soft = student(**inputs).logits, torch.softmax(full(**inputs).logits / 2, -1)
        losses.append(distill.distillation_loss(logits, hard, soft).item())
        right += logits.argmax().item() == hard.item()
    assert (
        row["val_loss"] == pytest.approx(np.mean(losses), rel=1e-4)
        and row["val_accuracy"] == right / 16
    )


def test_record_epoch_logs_metrics_to_trackers(teacher, data, run, monkeypatch):
    logged = []
    log = distill.Trainer.log
    monkeypatch.setattr(
        distill.Trainer,
        "log",
        lambda self, logs, *rest: logged.append(dict(logs)) or log(self, logs, *rest),
    )
    run("--epochs", "2")
    assert [set(one) for one in logged] == [
        {"epoch", "train_loss", "eval_loss", "eval_accuracy", "learning_rate", "seconds"}
    ] * 2


def test_raise_if_not_finite_names_learning_rate(teacher, data, fails):
    message = fails("--learning-rate", "1e30", "--max-grad-norm", "1e30")
    assert (
        "the loss of epoch 1 is no number" in message
        and "Lower LEARNING_RATE (now 1e+30)" in message
    )


# ── Early stopping ──


FLAT = [5] * 7


@pytest.mark.parametrize(
    "losses, hits, epochs, best",
    [
        ([5, 4, 3, 2, 1, 1, 1], FLAT, 7, 5),  # of equal accuracies the loss decides
        ([5, 4, 6, 6, 6, 1, 1], FLAT, 5, 2),  # three epochs without a better one
        ([5, 6, 6, 4, 6, 6, 6], FLAT, 7, 4),  # the count begins anew
        ([7, 6, 5, 4, 3, 2, 1], FLAT, 7, 7),  # better each time: not stopped
        ([1, 2, 3, 4, 5, 6, 7], [1, 2, 3, 4, 4, 4, 4], 7, 4),  # the accuracy, while the loss grows
        ([7, 6, 5, 4, 3, 2, 1], [5, 9, 8, 8, 8, 9, 9], 5, 2),  # a lower loss alone is not better
    ],
)
def test_train_stops_early_by_scripted_score(
    teacher, data, run, monkeypatch, losses, hits, epochs, best
):
    def scripted(trainer, epoch):
        with torch.no_grad():
            trainer.model.classifier.bias.fill_(
                epoch
            )  # so that the weights tell which epoch they are of
        return {
            "epoch": epoch,
            "train_loss": 1.0,
            "val_loss": float(losses[epoch - 1]),
            "val_accuracy": hits[epoch - 1] / 9,
            "learning_rate": 0.1,
            "seconds": 0.1,
        }

    monkeypatch.setattr(distill, "train_epoch", scripted)
    run("--epochs", "7")
    assert (report()["epochs"], report()["best_epoch"]) == (epochs, best)
    student = BertForSequenceClassification.from_pretrained("distilled_model")
    assert student.classifier.bias.tolist() == [best, best]


# ── Stop and resume ──


def test_train_resumed_equals_undisturbed(teacher, data, run, monkeypatch):
    options = "--epochs", "4", "--patience", "9", "--word-dropout", "0.3"
    run("--output", "whole", "--cache", "cache1", *options)
    resumed = "--output", "resumed", "--cache", "cache2", *options
    interrupt_in(monkeypatch, 3, RuntimeError("power cut"))
    with pytest.raises(RuntimeError):
        run(*resumed)
    assert not Path("resumed").exists()
    assert "goes on after epoch 2" in run(*resumed)
    assert (
        Path("whole/model.safetensors").read_bytes()
        == Path("resumed/model.safetensors").read_bytes()
    )
    assert history("whole") == history("resumed")


def test_train_ctrl_c_saves_best_and_can_resume(teacher, data, run, monkeypatch):
    interrupt_in(monkeypatch, 3, KeyboardInterrupt())
    assert "stopped by Ctrl-C" in run("--epochs", "4")
    assert report()["epochs"] == 2 and len(history()) == 3
    assert "goes on after epoch 2" in run("--epochs", "4")
    assert report()["epochs"] > 2


def test_train_ctrl_c_before_first_epoch_is_told(teacher, data, fails, monkeypatch):
    interrupt_in(monkeypatch, 1, KeyboardInterrupt())
    assert "stopped by Ctrl-C" in fails()
    assert not Path("distilled_model").exists()


def test_train_resumed_after_kill_equals_undisturbed(teacher, data, run):
    """In the method that has most to keep: generator, projections, both optimizers."""
    save_generator("filler")
    options = "--method cilda+minild --generator filler --generator-steps 2 --student-steps 4"
    options = [*options.split(), "--epochs", "4", "--patience", "9"]
    run(*options, "--cache", "cache1", "--output", "whole")
    options += ["--cache", "cache2", "--output", "resumed"]
    killed = Copy(distill.main, [*TINY, *options])
    deadline = time.monotonic() + 300
    while not Path("cache2/checkpoint.pt").exists():
        assert killed.process.is_alive() and time.monotonic() < deadline
        time.sleep(0.002)
    assert killed.end(timeout=0)[0] == -signal.SIGKILL
    assert "goes on after epoch" in run(*options)
    assert (
        Path("whole/model.safetensors").read_bytes()
        == Path("resumed/model.safetensors").read_bytes()
    )
    assert history("whole") == history("resumed")


def test_start_or_resume_starts_anew_for_other_settings_or_data(teacher, data, run):
    run()
    assert "goes on after epoch" in run()
    printed = run("--alpha", "0.6")
    assert "starts anew" in printed and "checkpoint: ALPHA\n" in printed
    write_csv(data / "val.csv", rows("val", 15))
    assert "checkpoint: the data\n" in run("--alpha", "0.6")


def test_start_or_resume_reports_warmup_beyond_training(teacher, data, run):
    assert "training has 18 steps at most" in notes(
        run("--warmup-steps", "18")
    ) and "WARMUP" not in notes(run("--warmup-steps", "17"))


# ── The run id ──


def test_training_run_id_depends_on_what_training_depends_on(settings):
    rows = distill.datasets.Dataset.from_list([{"input_ids": [2, 9, 3], "length": 3, "labels": 1}])
    data = {"train": rows, "val": rows}
    trainer = distill.make_trainer(
        tiny_model(),
        data,
        distill.collate,
        distill.CustomTrainer,
        epochs=1,
        learning_rate=1e-4,
        patience=3,
    )

    def run_id(**changes):
        with settings.context() as changed:
            for name, value in changes.items():
                changed.setattr(distill, name, value)
            return repr(sorted(distill.training_run_id(trainer).items()))

    plain = run_id()
    assert run_id() == plain
    different = [
        {"ALPHA": 0.4},
        {"LOSS_WEIGHTS": [0.1, 0.2, 0.7]},
        {"LOSS_WEIGHTS": [0.8, 0.1, 0.1]},
        {"LOSS_WEIGHTS": (0.8, 0.1, 0.1)},
        {"INIT_LAYERS": [1]},
        {"GENERATOR_WEIGHTS": {"KL": 0.1, "CRD": 0.9}},
        {"BATCHES_PER_POOL": 3},
    ]
    assert len({plain, *(run_id(**changes) for changes in different)}) == len(different) + 1
    names = {*distill.NOT_IN_RUN_ID, *distill.PATH_SETTINGS} - {"SOURCE"}
    assert run_id(**dict.fromkeys(names, "another")) == plain
    trainer.run_id_parts = [tiny_model(seed=1)]
    with_teacher = run_id()
    trainer.run_id_parts = [tiny_model(seed=2)]
    assert len({plain, with_teacher, run_id()}) == 3


@pytest.mark.parametrize(
    "options",
    [
        ["--unlabeled", "more", "--tokenizer", "finetuned_bert_japanese"],
        ["--augment", "1", "--student-init", "small"],
        ["--method", "cilda", "--generator", "filler"],
    ],
)
def test_training_run_id_is_the_same_in_another_place(data, run, monkeypatch, options):
    """A run that was stopped goes on where its folders were moved to, by absolute names, too."""
    save_model("finetuned_bert_japanese")
    save_model("small", num_hidden_layers=1, seed=5)
    save_generator("filler")
    Path("more").mkdir()
    write_csv("more/texts.csv", rows("test", 20))
    Path("here").mkdir()
    names = "finetuned_bert_japanese", "small", "filler", "more", "data"
    for name in names:
        os.rename(name, f"here/{name}")
    monkeypatch.chdir("here")
    run(*options, "--epochs", "2")
    monkeypatch.chdir("..")
    os.rename("here", "there")
    paths = ["--data", "data", "--teacher", "finetuned_bert_japanese", "--cache", ".distill_cache"]
    moved = [*options, *paths]
    for name in (*names, ".distill_cache"):
        moved = [str(Path("there", name).resolve()) if part == name else part for part in moved]
    printed = run(*moved, "--epochs", "2")
    assert "goes on after epoch 2" in printed and labelled(printed)[0] == 0


NO_KL = "* TEMPERATURE**2\n", "* 0\n"
DOUBLED = (
    "return self.classifier(x if pooler",
    "return 2 * self.classifier(x if pooler",
)
PAD_ID = "pad_token_id=tokenizer.pad_token_id)"
LAST_STEP = "        trainer.optimizer.zero_grad()\n"


def test_training_run_id_holds_the_code(teacher, data, capsys):
    """An edited loss gives another student; an edited text or OUTPUT gives the finished run."""

    def run(*changes):
        module = load_edited(*changes)
        module.main([*TINY, "--epochs", "2"])
        return capsys.readouterr().out, Path(module.OUTPUT, "model.safetensors").read_bytes()

    _, plain = run()
    printed, student = run(NO_KL)
    assert "starts anew" in printed and "checkpoint: the code" in printed
    assert student != plain and labelled(printed)[0] == 0  # the teacher need not run again

    printed, student = run(
        NO_KL,
        ('OUTPUT = "./distilled_model"  # folder', 'OUTPUT = "./elsewhere"  # a folder'),
        (LAST_STEP, f"{LAST_STEP}        # mine\n"),
        ('    """Return the mean over a batch of ALPHA', '    """My loss: ALPHA'),
        ("It inherits its teacher's mistakes", "It inherits all of its teacher's mistakes"),
        ("SAVE_SECONDS = 60", "SAVE_SECONDS = 61"),
        ('REPORT_TO = "none"  #', 'REPORT_TO = ("none")  #'),
    )
    assert "goes on after epoch 2" in printed and Path("elsewhere/model.safetensors").exists()
    printed, again = run(NO_KL, ("ALPHA = 0.5  #", "ALPHA = 0.7  #"))
    assert "checkpoint: ALPHA\n" in printed and again != student


def test_training_run_id_is_that_of_the_file_as_it_was_loaded(teacher, data, capsys):
    module = load_edited()
    Path("edited.py").write_text("raise SystemExit('edited while it runs')", "utf-8")
    module.main([*TINY, "--epochs", "1"])
    load_edited().main([*TINY, "--epochs", "1"])
    assert "goes on after epoch 1" in capsys.readouterr().out


def test_source_is_read_before_the_slow_imports():
    saved = "    import filelock\n", "    import filelock\n\n    Path(__file__).write_text('0')\n"
    assert "def main(" in load_edited(saved).SOURCE


def test_hash_of_follows_what_a_function_uses():
    def code(*changes):
        module = load_edited(*changes)
        return module.hash_of(module.timed_logits, module.BertForSequenceClassification)

    plain = code()
    assert (
        code(NO_KL)
        == plain
        == code(("TEMPERATURE = 2.0  # softens", "TEMPERATURE = 3.0  # softens"))
    )
    edited = code((" * p_sum).flatten(1)", ").flatten(1)"))
    assert edited != plain
    other = load_edited()
    assert other.hash_of(other.contextual_vectors) != other.hash_of(other.collate)
    annotated = load_edited(("TOKENS_PER_BATCH = 2048", "TOKENS_PER_BATCH: int = 64"))
    assert annotated.hash_of(annotated.inference_loader) != other.hash_of(other.inference_loader)


PROGRAMS = """
class A: _a = VALUE # a private member
def loss(x): return A._a * x
---
class A:
    @staticmethod
    def _k(): return VALUE
def loss(x): return A._k() * x
---
class M(type):
    def __call__(c, x): return x * VALUE
class A(metaclass=M): pass
def loss(x): return A(x)
---
BASELINE = VALUE # a name that distill.py ignores among its own
def loss(x): return BASELINE * x
---
class A:
    def f(self): return VALUE
OF_CLASSES = {A}
def loss(x): return [a().f() for a in OF_CLASSES]
---
def loss(x): "1"; return x == "VALUE" # a constant that is the docstring, too
---
def loss(x): return sum(VALUE * y for y in x)
---
def loss(x):
    def inner(y=VALUE): return y
    return inner()
---
TABLE = {"f": lambda x: VALUE * x}
def loss(x): return TABLE["f"](x)
---
class A:
    class B: c = VALUE
def loss(x): return A.B.c
---
import functools
f = functools.partial(pow, VALUE)
def loss(x): return f(x)
---
import functools
@functools.lru_cache
def g(): return VALUE
def loss(x): return g()
---
OF_PAIRS = dict([("a", 1), ("b", 2)][:: VALUE * 2 - 3]) # the order
def loss(x): return [*OF_PAIRS]
---
def loss(*x): return x if VALUE == 1 else 0
""".split("---")


@pytest.mark.parametrize("program", PROGRAMS)
def test_hash_of_tells_programs_apart(program):
    hashes = []
    for value in "1", "2", "1":
        names = {"__name__": "__main__"}
        exec(program.replace("VALUE", value), names)
        hashes.append(distill.hash_of(names["loss"]))
    assert hashes[0] != hashes[1] and hashes[0] == hashes[2]


def test_hash_of_tells_stars_apart_but_not_docstrings():
    programs = [
        "def loss(*x): return x",
        "def loss(**x): return x",
        "def loss(*x):\n    'It returns its arguments.'\n    return x",
    ]
    hashes = []
    for program in programs:
        names = {"__name__": "__main__"}
        exec(program, names)
        hashes.append(distill.hash_of(names["loss"]))
    assert hashes[0] != hashes[1] and hashes[0] == hashes[2]


STOCK_LOSS = """
stock = distill.CustomTrainer.compute_loss
def compute_loss(self, *arguments, **options):
    loss = stock(self, *arguments, **options)
    return factor * loss if isinstance(loss, distill.torch.Tensor) else loss
"""


@pytest.mark.parametrize(
    "replace",
    [
        "distill.distillation_loss = lambda logits, *labels: factor * logits.square().mean()",
        f"{STOCK_LOSS}distill.CustomTrainer.compute_loss = compute_loss",
        f"""{STOCK_LOSS}
distill.CustomTrainer.compute_loss = distill.functools.wraps(stock)(compute_loss)""",
        f"""{STOCK_LOSS}
class Mine(distill.CustomTrainer):
    compute_loss = compute_loss
distill.METHODS["kd"] = Mine""",
        """
ours = distill.distillation_loss
def mine(logits, hard_labels, soft_labels, *, factor=factor):
    return factor * ours(logits, hard_labels, soft_labels)
distill.distillation_loss = mine""",
    ],
)
def test_training_run_id_holds_functions_replaced_by_a_script(teacher, data, capsys, replace):
    """Whoever imports distill.py may put functions of their own in the place of ours."""
    students = []
    for factor, message in (2, ""), (3, "checkpoint: the code"), (3, "goes on after epoch 1"):
        module = load_edited()
        exec(replace, {"__name__": "__main__", "distill": module, "factor": factor})
        module.main([*TINY, "--epochs", "1"])
        assert message in capsys.readouterr().out
        students.append(MODEL.read_bytes())
    assert students[0] != students[1] == students[2]


@pytest.mark.parametrize(
    "name, stand_in",
    [
        ("EarlyStoppingCallback", print),
        ("Trainer.create_optimizer", load_edited),
        ("LogitTrainer.compute_loss", property(print)),
        ("CustomTrainer.needs_all_embeddings", True),
    ],
)
def test_hash_of_holds_replaced_members_and_imported_classes(monkeypatch, name, stand_in):
    module = load_edited()

    def code():
        return module.hash_of(module.run)

    before = code()
    owner, _, member = name.rpartition(".")
    with monkeypatch.context() as patch:
        patch.setattr(getattr(module, owner) if owner else module, member, stand_in)
        assert before != code() == code()
    assert code() == before


@pytest.mark.parametrize("assigned", ["MINE =", "OTHER, MINE = 1,", "with TORCH:\n    MINE ="])
@pytest.mark.parametrize("function", ["torch.tensor", "list", "dict"])
def test_hash_of_holds_values_that_are_read_from_a_file(data, assigned, function):
    assigned = assigned.replace("TORCH", "torch.no_grad()")
    read = f'{function}(ast.literal_eval(Path("mine.txt").read_text()))'
    find = "SEED = 42  #"
    changed = f"{assigned} {read}\n{find}"
    use = STUDENT_LINE, f"    MINE and None\n{STUDENT_LINE}"
    codes = []
    for number in 1, 1.00001, 1.00001:
        Path("mine.txt").write_text(f"((1, 2), (3, {number}))")
        module = load_edited((find, changed), use)
        codes.append(module.hash_of(module.run))
    assert codes[0] != codes[1] == codes[2]


MAIN = '\nif __name__ == "__main__":'
COMBINE = "def combine_with_cross_entropy("


@pytest.mark.parametrize(
    "before, after",
    [
        ([], [(MAIN, f"\nMETHODS.update(kd=LogitTrainer)\n{MAIN}")]),
        ([], [(MAIN, f"\nCustomTrainer.batch_loss = LogitTrainer.batch_loss\n{MAIN}")]),
        (
            [(COMBINE, f"distillation_loss = functools.partial(distillation_loss)\n\n{COMBINE}")],
            [NO_KL],
        ),
    ],
)
def test_training_run_id_holds_every_statement(teacher, data, capsys, before, after):
    students = []
    for changes in before, [*before, *after]:
        load_edited(*changes).main([*TINY, "--epochs", "1"])
        students.append(MODEL.read_bytes())
        printed = capsys.readouterr().out
    assert "checkpoint: the code" in printed and students[0] != students[1]
    load_edited(*changes).main([*TINY, "--epochs", "1"])
    assert "goes on after epoch 1" in capsys.readouterr().out


STUDENT_LINE = "    student_log_probs = F.log_softmax(logits / TEMPERATURE, -1)\n"
USE_THEIRS = "    return mine.losses.factor() * kl.mean()\n    ("


@pytest.mark.parametrize(
    "changes",
    [
        [("import argparse\n", "import argparse\nimport mine.losses\n")],
        [(STUDENT_LINE, f"    import mine.losses\n\n{STUDENT_LINE}")],
    ],
)
def test_hash_of_holds_imported_files_of_the_user(data, monkeypatch, changes):
    """They may be packages, and imported by a function only."""
    monkeypatch.syspath_prepend(os.getcwd())
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    Path("mine").mkdir()
    codes = []
    for factor in 2, 3, 3:
        for name in "__init__.py", "losses.py":
            Path("mine", name).write_text(f"def factor():\n    return {factor}\n", "utf-8")
        for name in "mine", "mine.losses":
            sys.modules.pop(name, None)
        importlib.invalidate_caches()
        module = load_edited(*changes, ("    return combine_with_cross_entropy(kl,", USE_THEIRS))
        codes.append((module.hash_of(module.run), module.hash_of(module.timed_logits)))
    assert codes[0] != codes[1] == codes[2]
    assert codes[0][1] != codes[1][1]


def test_add_soft_labels_runs_edited_teacher_again(teacher, data, capsys, settings):
    load_edited().main([*TINY, "--epochs", "1"])
    assert labelled(capsys.readouterr().out)[0] > 0
    load_edited(DOUBLED).main([*TINY, "--epochs", "1"])
    assert labelled(capsys.readouterr().out)[1] == 0
    load_edited(DOUBLED).main([*TINY, "--epochs", "1"])
    assert labelled(capsys.readouterr().out)[0] == 0
    module = load_edited(DOUBLED, (PAD_ID, "pad_token_id=0)"))
    module.main([*TINY, "--epochs", "1"])
    assert labelled(capsys.readouterr().out)[1] == 0
    settings.setattr(module.transformers, "__version__", "another")
    module.main([*TINY, "--epochs", "1"])
    assert labelled(capsys.readouterr().out)[1] == 0


@pytest.mark.parametrize(
    "content", [{"key": torch.arange(3)}, {}, [1], None, {"logits": torch.ones(2, 3)}]
)
def test_load_teacher_outputs_of_another_form_are_made_anew(teacher, data, run, content):
    run("--epochs", "1")
    before = MODEL.read_bytes()
    (path,) = Path(".distill_cache").glob("teacher-*.pt")
    distill.save_with_checksum(path, content)
    assert labelled(run("--epochs", "1"))[1] == 0
    assert MODEL.read_bytes() == before


def test_main_puts_settings_back(teacher, data):
    before = {name: getattr(distill, name) for name in distill.ACCEPTED}
    distill.main([*TINY, "--epochs", "1", "--output", "./a/"])
    assert {name: getattr(distill, name) for name in distill.ACCEPTED} == before
    with pytest.raises(SystemExit):
        distill.main(["--alpha", "7", "--seed", "3"])
    assert {name: getattr(distill, name) for name in distill.ACCEPTED} == before
    assert not distill.COMMAND_LINE_SETTINGS


def test_train_accepts_a_method_of_its_own(teacher, data, capsys):
    """As the docstring of CustomTrainer says: a subclass and one entry."""
    mine = """class Mine(CustomTrainer):
    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        loss, outputs = super().compute_loss(model, inputs, return_outputs=True)
        return (2 * loss, outputs) if return_outputs else 2 * loss


METHODS = {
    "mine": Mine,
"""
    module = load_edited(("METHODS = {\n", mine))
    module.main([*TINY, "--epochs", "1", "--method", "mine"])
    assert "student  test" in capsys.readouterr().out
