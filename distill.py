"""distill.py: distil a fine-tuned Japanese BERT classifier into a one-layer student, on a CPU.

    python distill.py                            # use the settings below
    python distill.py --teacher DIR --data DIR   # change settings for one run
    python distill.py --predict "文章" …          # classify texts with the student
    python distill.py --help                     # list every setting

Reads   TEACHER, a fine-tuned …ForSequenceClassification, and DATA, labelled texts in the splits
        train, val and test. If both have their defaults and the TEACHER folder does not exist, a
        sample teacher is first trained on sample data (and kept in CACHE).
Writes  OUTPUT: the student, its tokenizer, a model card, report.json, predictions.csv, history.csv,
        loss.png and cascade.png.
        CACHE: what later runs reuse, such as the teacher's logits, and the last checkpoint, from
        which the same command resumes a run that was stopped. CACHE can be deleted at any time.

Map     The whole method, in the order in which it runs: Settings · The run · Teacher · Student ·
        Loss and trainer · Training · Report
        What it rests on: Report files · Models and tokenizers · Data files · Labels · Batches ·
        Teacher cache · Trainer and checkpoints · Fast BERT · Copying layers · Word vectors
        Options, each section with its settings: a teacher to be made · a teacher that
        ran elsewhere · less or more text · other students · other methods · what distillation was
        worth · a cascade · export · from Python
        Settings: checks and command line · Errors · Files and locks · Processes · Main
"""

import argparse
import ast
import codecs
import contextlib
import copy
import csv
import dis
import functools
import gzip
import hashlib
import importlib.util
import inspect
import io
import itertools
import json
import math
import os
import platform
import re
import shutil
import site
import sys
import tempfile
import threading
import time
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from types import CodeType, FunctionType, ModuleType, SimpleNamespace

# what runs, read before the slow imports: the file may be edited while it runs
SOURCE = Path(__file__).read_text("utf-8")

if sys.version_info < (3, 11):  # noqa: UP036 (it would fail later, with a worse message)
    sys.exit(f"distill.py: needs Python 3.11 or newer; this is {platform.python_version()}")
if sys.flags.optimize > 1:
    sys.exit("distill.py: transformers needs docstrings: run without -OO or PYTHONOPTIMIZE=2")

try:
    import datasets
    import filelock
    import numpy as np
    import pandas
    import pyarrow.parquet
    import torch
    import torch.nn.functional as F
    import transformers
    from accelerate import DistributedDataParallelKwargs, PartialState
    from accelerate.utils import broadcast_object_list, gather_object
    from datasets.utils._dill import Pickler
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogFormatter
    from torch.nn.utils.rnn import pad_sequence
    from torch.utils._pytree import tree_leaves
    from torch.utils.data import DataLoader
    from tqdm.auto import tqdm
    from transformers import EarlyStoppingCallback, PrinterCallback, Trainer, TrainingArguments
    from transformers.integrations import get_reporting_integration_callbacks
    from transformers.modeling_outputs import SequenceClassifierOutput
    from transformers.models.auto.tokenization_auto import get_tokenizer_config
    from transformers.models.bert_japanese.tokenization_bert_japanese import MecabTokenizer
except ModuleNotFoundError as error:
    sys.exit(f"distill.py: {error}. Install the requirements: pip install -r requirements.txt")

# ── Settings ──────────────────────────────────────────────────────────────────────────────────────
# Teacher and data
TEACHER = "./finetuned_bert_japanese"  # the fine-tuned classifier: a folder or a hub name
TOKENIZER = None  # None: the teacher's own; otherwise a folder or a hub name
DATA = "tests/sample"  # folder of train/val/test files, one file (split 80/10/10), or a hub name
TEXT_COLUMN = "text"  # column with the text
TEXT_PAIR_COLUMN = None  # column with the second text, if texts come in pairs
LABEL_COLUMN = "label"  # column with the label: the teacher's label names, or class numbers from 0
MAX_LENGTH = 128  # tokens; longer texts are truncated. A larger value does not slow down short ones
# Student
STUDENT = "bert"  # or "bilstm", an LSTM with its own vocabulary
NUM_LAYERS = 1  # encoder layers ("bert" only); everything else is as in the model it starts from
STUDENT_INIT = "teacher"  # initial weights: "teacher", "random", or a pretrained model
INIT_LAYERS = "middle"  # layers to copy: "first", "middle", "last", "spread" or e.g. (5,)
REFIT_WORDS = 2  # how many teacher layers word vectors are fitted to (BERT, RoBERTa, ELECTRA)
DROPOUT = None  # in training ("bert" only); None: as in the model that it starts from
WORD_DROPOUT = 0.0  # share of tokens hidden in training ("bert"): lowers the loss on few texts
# Loss
METHOD = "kd"  # or "mse", "none" (hard labels only), "rail", "mate", "cilda", "cilda+minild"
ALPHA = 0.5  # "kd", "mse": weight of the soft labels; the hard labels (CE) get 1 - ALPHA
TEMPERATURE = 2.0  # softens both sides in "kd"; raise it for an overconfident teacher
# Training
EPOCHS = 20  # at most; early stopping usually ends training sooner
PATIENCE = 3  # epochs without improvement (validation accuracy, then loss) before training stops
BATCH_SIZE = 32  # texts per step, over all processes
LEARNING_RATE = 1e-4  # ("bert") higher than for 12 layers; lower it if the loss jumps
SCHEDULE = "linear"  # learning rate after the warm-up: "linear" (to 0 at EPOCHS) or "constant"
WARMUP_STEPS = 0.06  # warm-up steps; a value below 1 is a fraction of all steps
WEIGHT_DECAY = 0.01  # of AdamW, applied to weight matrices only
MAX_GRAD_NORM = 1.0  # gradients are clipped to this norm
SEED = 42  # the same student again, on the same machine with the same threads
# Output
OUTPUT = "./distilled_model"  # folder of the student; an earlier student in it is replaced
CACHE = "./.distill_cache"  # folder of teacher logits, checkpoints and what else is reused
EXPORT = None  # also write the student as "pt2" (torch.export), "onnx" or "onnx-int8"
REPORT_TO = "none"  # "tensorboard", "wandb" or another tracker that transformers supports


# ── The run ───────────────────────────────────────────────────────────────────────────────────────


def run():
    """Distil, save, report; return the report (None in all processes but the first)."""
    stage_seconds = {}

    with timed_stage("data", stage_seconds):
        teacher_name, recipe = on_main_process(find_teacher)  # recipe: how to make it, or None
        config, label_names = load_teacher_config(teacher_name, recipe)
        tokenizer_name = TOKENIZER or config.name_or_path
        tokenizer = on_main_process(lambda: load_tokenizer(tokenizer_name, config))
        preflight_checks(config, tokenizer)
        data, label_names = load_data(label_names)  # the data's if there is no teacher yet
        data |= load_extra_texts(data["train"], tokenizer)  # splits, appended to train below
        test_texts = data["test"]
        student_tokenizer = load_student_tokenizer(tokenizer, data)
        data = tokenize(data, tokenizer, student_tokenizer)
        collate_fn = make_collate_fn(tokenizer)

    if recipe:
        with timed_stage("making the teacher", stage_seconds):
            make_teacher(teacher_name, recipe, config, tokenizer, label_names, data, collate_fn)

    with timed_stage("soft labels", stage_seconds):
        teacher, teacher_info = load_teacher(teacher_name, config, label_names)
        n_labelled = len(data["train"])
        data = append_extra_texts(data)  # to train, after its labelled texts
        data = add_soft_labels(data, teacher, collate_fn)
        check_teacher(data["train"], label_names)

    with timed_stage("student", stage_seconds):
        student = STUDENTS[STUDENT](teacher, student_tokenizer, tokenizer)
        # the layer copied from a BERT expects words in context: word vectors are refitted to that
        refit_word_vectors(student, teacher, tokenizer, data["train"], collate_fn)
        data = use_student_ids(data)  # the teacher no longer needs its ids
        collate_fn = make_collate_fn(student_tokenizer)
        log_student(student, teacher)
        untrained = copy.deepcopy(student) if BASELINE else None
        trainer = make_trainer(student, data, collate_fn, METHODS[METHOD], hides_words=True)
        trainer.set_up_method(teacher, tokenizer)

    with timed_stage("training", stage_seconds):
        history = train(trainer, Path(CACHE, "checkpoint.pt"))
    data["train"] = data["train"].select(range(n_labelled))  # without the extra texts
    baseline = None
    if BASELINE:
        with timed_stage("baseline", stage_seconds):
            baseline = train_baseline(untrained, data, collate_fn)
    if rank() != 0:  # only the first process evaluates and saves
        return None

    with timed_stage("evaluation", stage_seconds):
        predictions = {split: predict(trainer, rows) for split, rows in data.items()}
        results = evaluate(predictions, label_names, baseline)
        answers = answer_table(test_texts, predictions["test"], label_names)
    run_info = {"teacher": teacher_info, "seconds": stage_seconds}
    report = save_results(student, student_tokenizer, history, results, answers, run_info)
    print(format_report(report))
    if EXPORT:
        export(student, data["test"], collate_fn, report)
    log_end(report)
    return report


# ── Teacher ───────────────────────────────────────────────────────────────────────────────────────


def add_soft_labels(data, teacher, collate_fn):
    """Add the teacher's outputs to every split of `data` and return the new splits.

    The new columns:
        teacher_logits   z_T, (classes,)
        soft_labels      softmax(z_T / T), (classes,); see `soften`
        teacher_seconds  this text's share of the time that the teacher took for its batch

    The teacher runs once per distinct text. Texts are identified by the column "key", a hash of
    their token ids; those already in CACHE are skipped.
    """
    if SOFT_LABELS_COLUMN:
        return add_given_soft_labels(data)
    cache_path = teacher_cache_path(teacher, data)
    outputs = load_teacher_outputs(cache_path, n_classes=teacher.config.num_labels)

    # texts that are not in the cache yet
    all_rows = datasets.concatenate_datasets(list(data.values()))
    keys, first_rows = np.unique(column_array(all_rows, "key"), return_index=True)
    is_new = ~np.isin(keys, outputs["key"].numpy())
    if is_new.any():
        new_rows = all_rows.select(np.sort(first_rows[is_new]))
        outputs = run_teacher(new_rows, teacher, collate_fn, outputs, cache_path)
    log("teacher", f"labelled {is_new.sum():,} texts; {(~is_new).sum():,} were in the cache")
    warn_if_timed_on_other_hardware(outputs, cache_path)

    # look up the teacher's outputs for every row, by key
    soft_labels = soften(outputs["logits"])
    by_key = torch.argsort(outputs["key"])
    sorted_keys = outputs["key"][by_key]

    def new_columns(batch):
        positions = by_key[torch.searchsorted(sorted_keys, torch.tensor(batch["key"]))]
        return {
            "teacher_logits": outputs["logits"][positions].numpy(),
            "soft_labels": soft_labels[positions].numpy(),
            "teacher_seconds": outputs["seconds"][positions].numpy(),
        }

    return {split: map_on_disk(rows, new_columns) for split, rows in data.items()}


# ── Student ───────────────────────────────────────────────────────────────────────────────────────


def build_student(teacher, tokenizer=None, teacher_tokenizer=None):
    """Return a classifier with NUM_LAYERS layers and DROPOUT, initialised from another model.

    It has that model's architecture, and copies its embeddings, pooler, classifier and the layers
    that INIT_LAYERS names. The model is the teacher, or the pretrained model in STUDENT_INIT; with
    "random" no weights are copied. (The tokenizers are for other students.)
    """
    source = teacher
    if STUDENT_INIT not in ("teacher", "random"):
        source = load_student_init(teacher.config)
    model_class = classifier_class(source.config)
    if STUDENT_INIT == "random":
        weights, layers = {}, range(NUM_LAYERS)
    else:
        weights, layers = source.state_dict(), layers_to_copy(source.config)
    transformers.set_seed(SEED)  # for weights that are not copied
    return copy_with_layers(source, model_class, layers, weights, DROPOUT)


# ── Loss and trainer ──────────────────────────────────────────────────────────────────────────────


def soften(teacher_logits):
    """Return the soft labels softmax(z_T / T), (texts, classes); T = 1 for methods without T."""
    temperature = TEMPERATURE if METHODS[METHOD].softens else 1
    return F.softmax(teacher_logits.double() / temperature, -1).float()


def distillation_loss(logits, hard_labels, soft_labels):
    """Return the mean over a batch of ALPHA * KL + (1 - ALPHA) * CE (arXiv:1503.02531).

    logits: the student's, z_S, (batch, classes)
    hard_labels: (batch,); NO_LABEL for a text without one, whose loss is KL alone
    soft_labels: the teacher's softmax(z_T / T), (batch, classes)

    KL is T² * KL(soft_labels || softmax(z_S / T)), summed over the classes, with T = TEMPERATURE.
    T² makes up for the 1 / T² in the gradients of KL: ALPHA has about the same effect at every T.
    CE is the cross-entropy of softmax(z_S).
    """
    student_log_probs = F.log_softmax(logits / TEMPERATURE, -1)
    kl = F.kl_div(student_log_probs, soft_labels, reduction="none").sum(-1) * TEMPERATURE**2
    return combine_with_cross_entropy(kl, logits, hard_labels)


def combine_with_cross_entropy(soft_loss, logits, hard_labels):
    """Return the mean of ALPHA * soft_loss + (1 - ALPHA) * CE; soft_loss: one value per text."""
    cross_entropy = F.cross_entropy(logits, hard_labels, ignore_index=NO_LABEL, reduction="none")
    alpha = torch.where(hard_labels == NO_LABEL, 1, ALPHA)
    return (alpha * soft_loss + (1 - alpha) * cross_entropy).mean()


class CustomTrainer(Trainer):
    """A Trainer for METHOD "kd", and the base class of all other methods.

    Its loaders keep soft_labels; the stock ones drop what is not an argument of the model. To add
    a method, override batch_loss or compute_loss, or subclass MethodTrainer, whose loss is a
    weighted sum of terms; then add the class to METHODS.
    """

    families = None  # of teachers that it works with; None: all FAMILIES
    learns_from = "probabilities"  # of the teacher; or "model", if it needs more; or None
    terms = ()  # of the loss of a MethodTrainer
    softens = True  # False: T = 1 in the soft labels
    word_dropout = 0  # see `hide_words`
    best_by_accuracy = True  # else by the loss
    needs_all_embeddings = False  # True: keep the embeddings of tokens that never occur in the data
    run_id_parts = ()  # what training depends on besides settings, data, models and `extra_state`

    def set_up_method(self, teacher, tokenizer):
        """Hook of `run`, before training: prepare what the method needs besides the student."""

    def extra_state(self):
        """Hook: what a checkpoint must hold besides the student, {name: module or optimizer}."""
        return {}

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        outputs = model(**model_inputs(inputs))
        loss = self.batch_loss(outputs.logits, inputs)
        return (loss, outputs) if return_outputs else loss

    def batch_loss(self, logits, batch):
        """Return the mean loss of a batch (see `collate`) for the student's logits."""
        return distillation_loss(logits, batch["labels"], batch["soft_labels"])

    def get_train_dataloader(self):
        """Batches of texts of similar length, in an order that depends on SEED and state.epoch."""
        lengths = column_array(self.train_dataset, "length")
        batch_size = self.args.train_batch_size
        order = length_grouped_order(lengths, batch_size, SEED + int(self.state.epoch or 0))
        batches = batches_of_this_process(order, batch_size)
        collate_fn = functools.partial(hide_words, self.word_dropout, self.data_collator)
        return DataLoader(self.train_dataset, batch_sampler=batches, collate_fn=collate_fn)

    def get_eval_dataloader(self, eval_dataset=None):
        """Batches of validation texts, divided among the processes."""
        rows = self.eval_dataset if eval_dataset is None else eval_dataset
        return inference_loader(rows, self.data_collator, select_batches=shard)

    def get_test_dataloader(self, test_dataset):
        return inference_loader(test_dataset, self.data_collator)


# ── Training ──────────────────────────────────────────────────────────────────────────────────────


def train(trainer, checkpoint_path, use_best_if_stopped=True):
    """Train, and return the history: a list with one dict per epoch (see `train_epoch`).

    Training stops after EPOCHS, after PATIENCE epochs without a better one (see `epoch_score`), or
    on Ctrl-C (which is re-raised if no epoch has finished, if use_best_if_stopped is False, or if
    there are several processes). Afterwards trainer.model has the weights of the best epoch.

    Each epoch ends with a checkpoint. A run with the same settings, code, data and weights (its run
    id) resumes from it, bit-identically on the same machine, threads and processes.
    """
    run_id = training_run_id(trainer)
    with only_used_embeddings(trainer):  # AdamW would spend much of each step on unused rows
        checkpoint = start_or_resume(trainer, checkpoint_path, run_id)
        for epoch_record in checkpoint["history"]:  # replayed, to restore the early stopping
            record_epoch(trainer, epoch_record)

        try:
            while len(checkpoint["history"]) < trainer.args.num_train_epochs:
                if trainer.control.should_training_stop:  # set by EarlyStoppingCallback
                    log("training", "stopped early: validation no longer improves")
                    break
                epoch_record = train_epoch(trainer, len(checkpoint["history"]) + 1)
                is_best = record_epoch(trainer, epoch_record)
                weights = trainer.model.state_dict()
                checkpoint = {  # a new dict: Ctrl-C must not leave it half-updated
                    "run_id": run_id,
                    "history": [*checkpoint["history"], epoch_record],
                    "best": copy.deepcopy(weights) if is_best else checkpoint["best"],
                    **{name: part.state_dict() for name, part in training_parts(trainer).items()},
                }
                if rank() == 0:
                    save_with_checksum(checkpoint_path, checkpoint)
        except KeyboardInterrupt:
            if not checkpoint["history"] or not use_best_if_stopped or world_size() > 1:
                raise
            log("training", "stopped by Ctrl-C: the best epoch so far is used; run again to resume")

        trainer.model_wrapped = trainer.model  # without DDP
        trainer.callback_handler.on_train_end(trainer.args, trainer.state, trainer.control)
        trainer.model.load_state_dict(checkpoint["best"])
        return checkpoint["history"]


def train_epoch(trainer, epoch):
    """Train for one epoch and validate; return its history entry, a dict."""
    # Reseeding in every epoch makes a resumed run identical to one that was never stopped. Each
    # process has a seed of its own, for its dropout: rank() times a large prime.
    transformers.set_seed(SEED + epoch + 10_007 * rank())
    trainer.state.epoch = epoch
    start = time.perf_counter()
    model = trainer.model_wrapped.train()
    loader = trainer.get_train_dataloader()
    trainer.state.global_step = (epoch - 1) * len(loader)
    shares = shares_of_steps(len(trainer.train_dataset), trainer.args.train_batch_size)
    loss_sum = 0.0
    batches = progress_bar(loader, desc=f"epoch {epoch}")
    # n_texts: of this process; weight: 1 if there is no other process
    for batch, (n_texts, weight) in zip(batches, shares, strict=True):
        learning_rate = trainer.lr_scheduler.get_last_lr()[0]

        loss = trainer.compute_loss(model, batch)
        trainer.accelerator.backward(loss * weight)
        clip_gradients(trainer.model, trainer.args.max_grad_norm)
        trainer.optimizer.step()
        trainer.lr_scheduler.step()
        trainer.optimizer.zero_grad()

        trainer.state.global_step += 1
        loss_sum += loss.item() * n_texts
        if not math.isfinite(loss_sum) and world_size() == 1:
            break  # reported below; several processes must all take the same number of steps
    seconds = time.perf_counter() - start

    loss_sum, val_loss_sum, n_correct = sum_over_processes(loss_sum, *validate(trainer))
    if not math.isfinite(loss_sum + val_loss_sum):
        rate = trainer.args.learning_rate
        raise Problem(f"the loss of epoch {epoch} is no number. Lower LEARNING_RATE (now {rate}).")
    n_val_texts = len(trainer.eval_dataset)
    return {
        "epoch": epoch,
        "train_loss": loss_sum / len(trainer.train_dataset),
        "val_loss": val_loss_sum / n_val_texts,
        "val_accuracy": n_correct / n_val_texts,
        "learning_rate": learning_rate,  # of the last step
        "seconds": seconds,  # without validation
    }


@torch.inference_mode()
def validate(trainer):
    """Return (sum of losses, number of correct predictions) over this process's part of val."""
    model = trainer.model.eval()  # not wrapped: the processes may have different numbers of batches
    loss_sum, n_correct = 0.0, 0
    for batch in trainer.get_eval_dataloader():
        loss, outputs = trainer.compute_loss(model, batch, return_outputs=True)
        loss_sum += loss.item() * len(outputs.logits)
        labels = batch.get("labels")
        if labels is not None and labels.dim() == 1:
            n_correct += (outputs.logits.argmax(-1) == labels).sum().item()
        else:  # only in distill(): no labels, or one for each token
            n_correct = math.nan
    return loss_sum, n_correct


def record_epoch(trainer, epoch_record):
    """Report an epoch to the callbacks and print it; return whether it is the best so far.

    EarlyStoppingCallback compares the score with state.best_metric but never updates it. We do,
    after on_evaluate: set earlier, no epoch would count as better; never set, every epoch would.
    """
    metrics = {name.replace("val_", "eval_"): value for name, value in epoch_record.items()}
    trainer.state.epoch = epoch_record["epoch"]
    trainer.log(dict(metrics))  # log() adds to its argument
    score = epoch_score(epoch_record) if trainer.best_by_accuracy else -epoch_record["val_loss"]
    metrics["eval_score"] = score
    trainer.control = trainer.callback_handler.on_evaluate(
        trainer.args, trainer.state, trainer.control, metrics
    )
    is_best = trainer.state.best_metric is None or score > trainer.state.best_metric
    if is_best:
        trainer.state.best_metric = score
    print_epoch(epoch_record, is_best)
    return is_best


# ── Report ────────────────────────────────────────────────────────────────────────────────────────


def predict(trainer, rows):
    """Return both models' answers to `rows`, a dict.

    labels, (texts,); logits, {role: (texts, classes)}, for the roles "teacher" and "student"; and
    seconds, {role: (texts,)}, each text's share of the time for its batch. The student runs once
    over the rows. The teacher does not: its outputs are in the data.
    """
    teacher_logits = torch.tensor(column_array(rows, "teacher_logits"), dtype=torch.float32)
    logits, seconds = torch.empty_like(teacher_logits), torch.empty(len(rows))
    loader = trainer.get_test_dataloader(rows)
    next(timed_logits(trainer.model, loader))  # warm-up
    batches = zip(loader.batch_sampler, timed_logits(trainer.model, loader), strict=True)
    for row_numbers, (batch_logits, batch_seconds) in batches:
        logits[row_numbers] = batch_logits
        seconds[row_numbers] = batch_seconds / len(row_numbers)
    teacher_seconds = torch.tensor(column_array(rows, "teacher_seconds"))
    return {
        "labels": torch.tensor(column_array(rows, "labels")),
        "logits": {"teacher": teacher_logits, "student": logits},
        "seconds": {"teacher": teacher_seconds, "student": seconds},
    }


def evaluate(predictions, label_names, baseline):
    """Return what the report says about teacher and student: each, compared, and as a cascade.

    predictions: {split: what `predict` returns}. Each model has "splits", {split: metrics}, and
    what `evaluate_labels` returns for test. To add a metric, add it to `compute_metrics`.
    """
    val, test = predictions["val"], predictions["test"]
    results = {**compare_with_teacher(test), "cascade": evaluate_cascade(val, test)}
    results |= evaluate_baseline(baseline, test) if baseline else {}
    for role in "teacher", "student":
        splits = {split: compute_metrics(outputs, role) for split, outputs in predictions.items()}
        results[role] = {"splits": splits, **evaluate_labels(test, role, label_names)}
    return results


def save_results(student, tokenizer, history, results, answers, run_info):
    """Write OUTPUT, all or nothing, and return the report; for the arguments see `run`."""
    with replaced(OUTPUT) as folder:
        save_model(student, tokenizer, folder)
        report = make_report(student, history, results, run_info, folder)
        write_model_card(report, splits_words(tokenizer), folder)
        pandas.DataFrame(history).to_csv(folder / "history.csv", index=False)
        write_answers(answers, folder)
        plot_losses(history, folder)
        plot_cascade(report, folder)
        write_report(report, folder)
    return report


# ─────────────── That is the method. Below: what it rests on, then options. ───────────────


# ── Report files: console, table, plot, model card ────────────────────────────────────────────────

MODEL_CARD = """---
{language}pipeline_tag: text-classification
library_name: transformers
---
# A small text classifier ({STUDENT}), distilled

Distilled from `{teacher}` on `{DATA}` by distill.py, with METHOD {METHOD}, ALPHA {ALPHA} and
TEMPERATURE {TEMPERATURE}; all settings are in report.json. It inherits its teacher's mistakes: test
it on your own texts before you rely on it.

```
python distill.py --output path/to/this/folder --predict "この店の料理は美味しい。"
```

A "bert" also loads like any model:

```python
from transformers import pipeline
classify = pipeline("text-classification", model="path/to/this/folder", truncation=True)
```

```
{table}
```
"""


def log(stage, message):
    print(f"{stage:<9} {message}", flush=True)


def note(message):
    """Print something that does not stop a run, but that the user should look at."""
    log("note", message)


def progress_bar(steps, **options):
    """Return `steps` with a progress bar on a terminal; only the first process shows it."""
    # None: hidden where there is no terminal
    return tqdm(steps, leave=False, disable=rank() > 0 or None, **options)


@contextlib.contextmanager
def timed_stage(name, stage_seconds):
    """Store the seconds that the block takes in `stage_seconds`, under `name`."""
    start = time.perf_counter()
    yield
    stage_seconds[name] = time.perf_counter() - start


def log_processes():
    """Say how many processes there are, and that accelerate needs MPI to start several."""
    if world_size() > 1:
        note(f"{world_size()} processes share the teacher's texts and each batch of {BATCH_SIZE}")
    elif "MASTER_PORT" in os.environ and "ACCELERATE_USE_CPU" in os.environ:
        note("on a CPU, accelerate starts one process unless given --mpirun_hostfile; use torchrun")


def log_student(student, teacher):
    print(student)
    size, teacher_size = student.num_parameters(), teacher.num_parameters()
    log("student", f"{size:,} parameters on {student.device}; the teacher has {teacher_size:,}")


def log_end(report):
    stages = [f"{stage} {seconds:.1f}" for stage, seconds in report["seconds"].items()]
    log("seconds", ", ".join(stages))
    log("saved", f"{OUTPUT}: {', '.join(report['files'])}")


def print_epoch(epoch_record, is_best):
    columns = (
        "{epoch:6d} {train_loss:12.4f} {val_loss:12.4f} {val_accuracy:14.4f} "
        "{learning_rate:12.1e} {seconds:9.1f}"
    )
    print(columns.format(**epoch_record), "best" if is_best else "", flush=True)


def epoch_score(epoch_record):
    """Return the score of an epoch: its accuracy on val; of equal ones, the lower loss wins."""
    # not the loss alone: it grows with the confidence in few wrong answers, while accuracy rises
    return epoch_record["val_accuracy"] - 1e-9 * epoch_record["val_loss"]


def best_epoch_of(history):
    return max(history, key=epoch_score)


def make_report(student, history, results, run_info, folder):
    """Return the report, a dict (see README.md). folder: where the student has been saved."""
    teacher_test = results["teacher"]["splits"]["test"]
    student_test = results["student"]["splits"]["test"]
    return {
        **results,
        "teacher": {**run_info["teacher"], **results["teacher"]},
        "student": {
            "parameters": student.num_parameters(),
            "bytes": os.path.getsize(folder / "model.safetensors"),
            **results["student"],
        },
        "speedup": ratio(teacher_test["seconds"], student_test["seconds"]),
        "epochs": len(history),
        "best_epoch": best_epoch_of(history)["epoch"],
        "seconds": run_info["seconds"],
        "settings": {name: without_folders(globals()[name]) for name in ACCEPTED},
        "versions": {
            "python": platform.python_version(),
            **{module.__name__: module.__version__ for module in (torch, transformers, datasets)},
        },
        "hardware": hardware(),
    }


def compute_metrics(outputs, role):
    """Return the metrics of one model on one split, a dict. Add new ones here.

    outputs: what `predict` returns. role: "teacher" or "student". All metrics are written to
    report.json; those in SPLIT_TABLE are printed, too. agreement is the share of texts on which
    the model predicts what the teacher does; kl is KL(teacher || model) at T = 1.
    """
    labels, logits = outputs["labels"], outputs["logits"][role]
    teacher_logits = outputs["logits"]["teacher"]
    predicted = logits.argmax(-1)
    figures = label_figures(confusion_matrix(labels, predicted, logits.shape[1]))
    f1 = [label["f1"] for label in figures if label["f1"] is not None]
    agreement = (predicted == teacher_logits.argmax(-1)).double().mean()
    log_probs, teacher_log_probs = logits.log_softmax(-1), teacher_logits.log_softmax(-1)
    kl = F.kl_div(log_probs, teacher_log_probs, reduction="batchmean", log_target=True)
    # 0: the teacher ran elsewhere
    seconds = outputs["seconds"][role].sum(dtype=torch.float64).item() or None
    return {
        "examples": len(labels),
        "accuracy": (predicted == labels).double().mean().item(),
        "macro_f1": sum(f1) / len(f1),
        "agreement": agreement.item(),
        "kl": kl.item(),
        "seconds": seconds,
        "texts_per_second": ratio(len(labels), seconds),
    }


def compare_with_teacher(outputs):
    """Return kept, the student's accuracy over the teacher's, and its 95 % interval, kept_interval.

    The interval is paired, by the delta method. Both are None if the teacher is never right.
    outputs: what `predict` returns.
    """
    student, teacher = is_right(outputs, "student"), is_right(outputs, "teacher")
    accuracy = teacher.mean().item()
    kept = ratio(student.mean().item(), accuracy)
    if kept is None:
        return {"kept": None, "kept_interval": None}
    bounds = paired_interval(student, teacher, kept)
    return {"kept": kept, "kept_interval": [kept + bound / accuracy for bound in bounds]}


def is_right(outputs, role):
    """Return for each text 1 where a model predicts its label, else 0, as float64."""
    return (outputs["logits"][role].argmax(-1) == outputs["labels"]).double()


def paired_interval(right, other_right, factor=1):
    """Return (low, high), the 95 % interval of the mean of right - factor * other_right.

    right, other_right: 1 or 0 for each text, see `is_right`.
    """
    differences = right - factor * other_right
    sums = differences.sum().item(), differences.square().sum().item()
    return normal_interval(*sums, len(differences), factor, 1.96)


def normal_interval(total, total_squares, n_texts, factor, sigmas):
    """Return (low, high): mean ± `sigmas` standard errors, from the sums over n_texts differences.

    Two texts are added first, one that only the one model answers rightly and one that only the
    other does: without them, the interval of few texts would be too narrow (Bonett and Price 2012,
    doi:10.3102/1076998611411915, for a factor of 1).
    """
    n_texts += 2
    mean = (total + 1 - factor) / n_texts
    variance = (total_squares + 1 + factor**2) / n_texts - mean**2
    half_width = sigmas * (variance / n_texts) ** 0.5
    return mean - half_width, mean + half_width


def ratio(numerator, denominator):
    """Return the quotient, or None where there is none: one of the two is unknown, or by zero."""
    return numerator / denominator if numerator is not None and denominator else None


def confusion_matrix(labels, predicted, n_classes):
    """Return (n_classes, n_classes) counts: row = label, column = prediction, as float64."""
    cells = torch.bincount(labels * n_classes + predicted, minlength=n_classes**2)
    return cells.view(n_classes, n_classes).double()


def label_figures(confusion):
    """Return a dict for each label: precision, recall, f1 and support, its number of texts.

    Precision is None if no text was given the label, recall if none has it, F1 if neither.
    """
    n_texts, n_predicted = confusion.sum(1).tolist(), confusion.sum(0).tolist()
    n_correct = confusion.diagonal().tolist()
    return [
        {
            "precision": ratio(correct, predicted),
            "recall": ratio(correct, texts),
            "f1": ratio(2 * correct, texts + predicted),
            "support": int(texts),
        }
        for correct, texts, predicted in zip(n_correct, n_texts, n_predicted, strict=True)
    ]


def evaluate_labels(outputs, role, label_names):
    """Return what a model does with each label, a dict of "labels" and "confusion".

    labels: {name: `label_figures`}. confusion: {name: {predicted name: number of texts}}, without
    zeros. outputs: what `predict` returns.
    """
    predicted = outputs["logits"][role].argmax(-1)
    warn_if_one_label(role, "test", predicted, outputs["labels"], label_names)
    matrix = confusion_matrix(outputs["labels"], predicted, len(label_names))
    confusion = defaultdict(dict)
    for label, answer in matrix.nonzero().tolist():
        confusion[label_names[label]][label_names[answer]] = int(matrix[label, answer])
    labels = dict(zip(label_names, label_figures(matrix), strict=True))
    return {"labels": labels, "confusion": dict(confusion)}


def answer_table(texts, outputs, label_names):
    """Return the table of predictions.csv, a pandas.DataFrame.

    texts: rows with the texts. outputs: what `predict` returns for them.
    """
    names = np.array(label_names)
    columns = text_columns()
    table = texts.select_columns(columns).to_pandas()[columns]
    table.columns = ["text", "text_pair"][: len(columns)]
    table["label"] = names[outputs["labels"]]
    for role, logits in outputs["logits"].items():
        probabilities, predicted = logits.softmax(-1).max(-1)
        table[role] = names[predicted]
        table[f"{role}_probability"] = probabilities.numpy()
    return table


def hardware():
    """Return the name of the processor and the number of threads that torch uses."""
    commands = {
        "Darwin": "sysctl -n machdep.cpu.brand_string",
        "Linux": "grep -m1 'model name' /proc/cpuinfo",
    }
    answer = os.popen(commands.get(platform.system(), "")).read()
    name = answer.split(":")[-1].strip() or platform.machine()
    n_threads = torch.get_num_threads()
    return f"{name}, {n_threads} thread{'s' if n_threads > 1 else ''}"


def without_folders(value):
    """Return a setting as strangers may see it: of a path to elsewhere only the last part."""
    if isinstance(value, str) and value.startswith(("~", "..", os.sep)):
        return Path(value).name
    return value


# columns of the two tables that are printed: heading, figure, width, format
SPLIT_TABLE = (
    ("accuracy", "accuracy", 9, ".4f"),
    ("macro F1", "macro_f1", 10, ".4f"),
    ("agreement", "agreement", 11, ".4f"),
    ("seconds", "seconds", 9, ".2f"),
    ("texts/s", "texts_per_second", 9, ",.0f"),
)
LABEL_TABLE = (
    ("precision", "precision", 12, ".4f"),
    ("recall", "recall", 9, ".4f"),
    ("F1", "f1", 9, ".4f"),
    ("texts", "support", 8, ",d"),
)


def format_headings(columns):
    return "".join(heading.rjust(width) for heading, _, width, _ in columns)


def format_figures(figures, columns):
    """Return one line of a table; a figure that is None, unknown, is a dash."""
    line = ""
    for _, name, width, number_format in columns:
        value = figures[name]
        line += ("–" if value is None else format(value, number_format)).rjust(width)
    return line


def format_report(report):
    """Return the report as text: the tables, and what they mean in words."""
    lines = [f"{'split':>14} {format_headings(SPLIT_TABLE)}"]
    sizes = []
    for role in "teacher", "student":
        for split, metrics in report[role]["splits"].items():
            lines.append(f"{role:<8} {split:<6}{format_figures(metrics, SPLIT_TABLE)}")
        if report[role]["parameters"] is not None:
            megabytes = report[role]["bytes"] / 1e6
            sizes.append(f"{role} {report[role]['parameters']:,} parameters, {megabytes:.1f} MB")
    lines.append("; ".join(sizes))
    lines += format_labels(report["student"]["labels"])

    if report["kept"] is None:
        lines.append("The teacher is wrong on every text of test.")
    else:
        low, high = report["kept_interval"]
        lines.append(
            f"On test the student keeps {report['kept']:.1%} of the teacher's accuracy "
            f"(95% interval {100 * low:.1f} to {100 * high:.1f})."
        )
    if report["speedup"] is not None:
        lines.append(
            f"The student is {report['speedup']:.1f} times as fast as the teacher (without "
            f"tokenization; {report['hardware']})."
        )
    if report["kept"] is not None:
        lines += format_cascade(report["cascade"])
    if "baseline" in report:
        lines.append(format_baseline(report["baseline"]))
    return "\n".join(lines)


def format_labels(labels):
    """Return the lines of a table of labels, or none if there are more than ten."""
    if len(labels) > 10:
        return []
    lines = [f"student on test{format_headings(LABEL_TABLE)}   label"]
    for name, figures in labels.items():
        lines.append(f"{'':<15}{format_figures(figures, LABEL_TABLE)}   {name}")
    return lines


def plot_losses(history, folder):
    """Draw the train and validation loss of each epoch into loss.png."""
    figure = Figure(figsize=(7, 4.2), layout="constrained")
    axes = figure.subplots()
    epochs = [epoch_record["epoch"] for epoch_record in history]

    # line styles and colours (Okabe and Ito) that colour-blind readers can tell apart
    for name, style, colour in ("train_loss", "o--", "#0072B2"), ("val_loss", "s-", "#D55E00"):
        losses = [epoch_record[name] for epoch_record in history]
        axes.plot(epochs, losses, style, color=colour, label=name.replace("_", " "))
    best = best_epoch_of(history)
    label = f"best accuracy: epoch {best['epoch']}"
    axes.plot(best["epoch"], best["val_loss"], "*k", markersize=16, label=label)

    axes.set(xlabel="epoch", ylabel=f'loss of METHOD "{METHOD}"')
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(folder / "loss.png", dpi=150)


def write_answers(answers, folder):
    """Write predictions.csv, with the BOM by which Excel recognises UTF-8."""
    answers.to_csv(
        folder / "predictions.csv",
        index=False,
        encoding="utf-8-sig",
        float_format="%.4f",
        lineterminator="\r\n",  # with it, Python quotes texts that have a \r
    )


def write_model_card(report, is_japanese, folder):
    card = MODEL_CARD.format(
        **report["settings"],
        language="language: ja\n" if is_japanese else "",
        teacher=report["teacher"]["name"],
        table=format_report(report),
    )
    (folder / "README.md").write_text(card, "utf-8")


def write_report(report, folder):
    report["files"] = sorted({*os.listdir(folder), "report.json"})
    text = json.dumps(report, indent=2, ensure_ascii=False)
    (folder / "report.json").write_text(f"{text}\n", "utf-8")


# ── Models and tokenizers: load and check ─────────────────────────────────────────────────────────

# the families of models that can be teachers
ROBERTAS = "roberta", "xlm-roberta", "camembert"
COUNT_FROM_PADDING = *ROBERTAS, "luke"  # whose positions begin after the padding id
BERT_LIKE = "bert", *ROBERTAS, "electra"  # whose layers are BERT's
FAST_FAMILIES = *BERT_LIKE, "distilbert", "deberta-v2"  # that have a fast last layer
FAMILIES = *FAST_FAMILIES, "bart", "luke", "modernbert"


def classifier_class(config):
    """Return the class of a classifier of this family; the fast one if there is one."""
    stock = transformers.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING[type(config)]
    return fast_class(stock) if config.model_type in FAST_FAMILIES else stock


def load_teacher_config(teacher_name, recipe):
    """Return (config, label names by output) of the teacher.

    If it is still to be made, or there is none: the config of the model to start from, and None.
    """
    name, setting = teacher_name, "TEACHER"
    if recipe:
        name, setting = recipe["base"], "TEACHER_BASE"
    elif teacher_name is None:
        name, setting = STUDENT_INIT, "STUDENT_INIT"
    config = on_main_process(lambda: load_config(name, setting))
    return config, [*config.label2id] if setting == "TEACHER" else None


def load_config(name, setting="TEACHER"):
    """Return the configuration of the model in the folder or hub repository `name`.

    setting: the setting that names the model. It decides what the model must be (Problem if it is
    not) and is named in messages.
    """
    what = f"{setting} = {name!r}"
    accepted = (
        f"On disk, {describe_path(name)}; accepted is a folder of model.save_pretrained, or a hub "
        "name. To have a teacher fine-tuned, name the model to start from in TEACHER_BASE"
    )
    with as_problem(f"{what}: cannot be loaded", accepted):
        is_local = looks_like_path(name) or os.path.exists(name)
        if is_local and not os.path.isfile(os.path.join(name, "config.json")):
            raise ValueError("it has no config.json")
        forbid_outside_paths(name)
        config = transformers.AutoConfig.from_pretrained(name, trust_remote_code=False)
        if setting.startswith("TEACHER"):
            check_architecture(config, what, setting)
        padding_id = config.pad_token_id
        if config.model_type in COUNT_FROM_PADDING and padding_id not in range(config.vocab_size):
            raise ValueError(f"its config.json has pad_token_id {padding_id}, the id of no token")
        if setting in ("TEACHER", "OUTPUT"):
            set_labels(config, checked_label_names(config, what))
        else:  # whatever its labels were, it is to choose one of the teacher's
            config.problem_type = "single_label_classification"

    # Flags of how its last user wanted to run the model. They would slow it down, or change what
    # it returns.
    config.return_dict = True
    config.output_hidden_states = False
    config.output_attentions = False
    return config


def describe_path(path):
    """Return what lies at a path, for a message."""
    try:
        return f"the folder holds {short_list(sorted(os.listdir(path))) or 'nothing'}"
    except OSError as error:
        return f"there is no such folder ({error.strerror})"


def looks_like_path(name):
    """Whether a name can only be a path, not that of a hub repository."""
    return name.startswith((".", "~", os.sep)) or name.count("/") > 1


def check_architecture(config, what, setting):
    """Raise Problem if a teacher's family, head or outputs are not what is needed.

    Of a TEACHER_BASE only the family counts: it gets another head.
    """
    architecture = str((config.architectures or ["…ForSequenceClassification"])[0])
    families = METHODS[METHOD].families or FAMILIES
    is_classifier = (
        architecture.endswith("ForSequenceClassification")
        and config.num_labels > 1
        and config.problem_type in (None, "single_label_classification")
    )
    if config.model_type not in families or (setting == "TEACHER" and not is_classifier):
        raise Problem(
            f"{what}: is a {architecture} with {config.num_labels} output(s) and "
            f"problem_type {config.problem_type!r}, and is of the family {config.model_type!r}; "
            f"METHOD = {METHOD!r} accepts {', '.join(families)}, fine-tuned as a "
            "…ForSequenceClassification that chooses one of two or more labels. To fine-tune a "
            "model of these families first, name it in TEACHER_BASE. A model of another family can "
            "teach by its probabilities: see SOFT_LABELS_COLUMN."
        )


def checked_label_names(config, what):
    """Return the label names of a classifier, one for each output: those of id2label.

    Raise Problem if label2id contradicts them. A label2id with other names (LABEL_0, … from before
    the names were set), with its numbers as strings, or from number to name, does not contradict.
    If id2label has only LABEL_0, …, the names of label2id are taken.
    """
    outputs = [*range(config.num_labels)]
    names = {str(name) for name in config.id2label.values()}
    is_complete = sorted(config.id2label) == outputs and len(names) == len(outputs)

    # entries without their direction: each is a name and a number
    label2id = config.label2id or {}
    id2label = {frozenset(map(str, entry)) for entry in config.id2label.items()}
    with_known_name = {frozenset(map(str, entry)) for entry in label2id.items()}
    with_known_name = {entry for entry in with_known_name if entry & names}
    if not is_complete or not with_known_name <= id2label:
        raise Problem(
            f"{what}: the label names in its config.json do not fit together: id2label is "
            f"{config.id2label}, label2id {config.label2id}; accepted is a different name in "
            f"id2label for each of the outputs 0 to {len(outputs) - 1}, and a label2id that "
            "agrees. Correct the one that is wrong; id2label is what pipelines print."
        )
    if not with_known_name and names == {f"LABEL_{number}" for number in outputs}:
        by_number = sorted(label2id, key=lambda name: str(label2id[name]).zfill(9))
        if [str(label2id[name]) for name in by_number] == [*map(str, outputs)]:
            return [*map(str, by_number)]
    return [str(config.id2label[number]) for number in outputs]


def set_labels(config, names):
    """Set the names of the labels, given in the order of the outputs."""
    config.id2label = dict(enumerate(names))
    config.label2id = {name: number for number, name in enumerate(names)}


def takes_token_types(config):
    """Whether a model distinguishes the texts of a pair by token types: BERT does, RoBERTa not."""
    return (getattr(config, "type_vocab_size", 0) or 0) > 1


def max_tokens(config):
    """Return the largest number of tokens that a model takes."""
    offset = config.pad_token_id + 1 if config.model_type in COUNT_FROM_PADDING else 0
    return getattr(config, "max_position_embeddings", 10**9) - offset


def load_tokenizer(name, config, role="teacher", max_length=None):
    """Return the tokenizer in `name`; Problem if it does not fit the model.

    config: of the model whose texts it tokenizes. role: what messages call this model.
    max_length: instead of MAX_LENGTH.
    """
    max_length = max_length or MAX_LENGTH
    advice = (
        f"Save the tokenizer that the {role} was made with into its folder (the teacher's can be "
        "named in TOKENIZER instead: README.md lists some by the size of the vocabulary, which is "
        f"{config.vocab_size} here)"
    )
    source = base_with_tokenizer(name) if os.path.exists(name) else name
    if source is None:  # transformers would make an empty one, silently
        raise Problem(f"{name!r} holds no tokenizer: {describe_path(name)}. {advice}.")
    if source != name:
        log("data", f"{name} holds no tokenizer; that of {source} is used, which it was made from")
    where = f"the tokenizer in {source!r}"
    with as_problem(f"{where} cannot be loaded", advice):
        saved_config = get_tokenizer_config(source)
        options = json.dumps([saved_config.get("mecab_kwargs"), saved_config.get("sudachi_kwargs")])
        if "/" in options and not os.path.exists(source):
            raise ValueError(f"its tokenizer_config.json names files, not opened here: {options}")
        tokenizer = transformers.AutoTokenizer.from_pretrained(source, trust_remote_code=False)
        fit_to_model(tokenizer, config)
        # encode something now, rather than fail once all data is read
        encode([["晴れ time"]] * len(text_columns()), tokenizer, max_length)

    # the vocabulary must be the model's, as far as that can be seen
    vocabulary = tokenizer.get_vocab()
    n_words = len(set(vocabulary) - set(tokenizer.all_special_tokens))
    n_ids = max(vocabulary.values(), default=-1) + 1
    if tokenizer.pad_token_id is None or n_words == 0 or n_ids > config.vocab_size:
        raise Problem(
            f"{where} has {n_words} tokens that are not special, ids up to {n_ids - 1}, and "
            f"{tokenizer.pad_token!r} for padding; the {role} needs words, ids from 0 to at most "
            f"{config.vocab_size - 1}, and a token for padding. {advice}."
        )
    if n_ids < config.vocab_size:
        note(
            f"{where} has {n_ids:,} tokens, the {role} {config.vocab_size:,}. If these are "
            "not just spare rows, it is that of another model, or of another version"
        )

    limit = max_tokens(config)
    if limit < max_length:
        raise Problem(f"MAX_LENGTH = {max_length}: the {role} takes at most {limit} tokens.")
    tokenizer.model_max_length = max_length
    if role == "teacher":
        warn_if_tokenizer_guessed(tokenizer, source, saved_config, config)
    return tokenizer


def base_with_tokenizer(folder):
    """Return where the tokenizer of the model in `folder` is: there, or in what it was made from.

    transformers 4 wrote a model's base into config.json: a hub name, or the path of a folder, which
    may name its own base. None if that leads nowhere.
    """
    for _ in range(5):
        files = "vocab.*", "tokenizer.json", "*.model"
        if any(path for pattern in files for path in Path(folder).glob(pattern)):
            return folder
        with contextlib.suppress(OSError, ValueError, LookupError, TypeError):
            # from the file itself: from_pretrained replaces the name by that of the folder
            saved = json.loads(Path(folder, "config.json").read_text("utf-8"))
            folder = normalize_path(saved["_name_or_path"])
        if not os.path.exists(folder):
            return folder if re.fullmatch(r"\w[\w.-]*/[\w.-]+", folder) else None
    return None


def fit_to_model(tokenizer, config):
    """Make the tokenizer pad at the end, and return token types exactly if the model takes them."""
    tokenizer.padding_side = "right"
    tokenizer.model_input_names = ["input_ids", "attention_mask"]
    if takes_token_types(config):
        tokenizer.model_input_names.append("token_type_ids")


def warn_if_tokenizer_guessed(tokenizer, name, saved_config, config):
    """Say where transformers had to guess what the teacher's tokenizer was."""
    guessed = {}
    if not saved_config.get("tokenizer_class") and not getattr(config, "tokenizer_class", None):
        guessed["tokenizer_class"] = type(tokenizer).__name__
    # the default dictionary changed in transformers 4.46
    version = str(config.transformers_version)
    is_old = not re.match(r"4\.(4[6-9]|[5-9]\d)|[5-9]|\d\d", version)
    uses_mecab = getattr(tokenizer, "word_tokenizer_type", None) == "mecab"
    if uses_mecab and is_old and not (saved_config.get("mecab_kwargs") or {}).get("mecab_dic"):
        guessed['"mecab_kwargs": {"mecab_dic": …}'] = "unidic_lite"
    for option, value in guessed.items():
        note(
            f"{name} (saved by transformers {version}) does not name its {option}: {value} is "
            "taken. If the teacher was trained with another (most Japanese BERTs with "
            "BertJapaneseTokenizer, before transformers 4.46 with ipadic), write that into its "
            "tokenizer_config.json"
        )


def preflight_checks(config, tokenizer):
    """Load and discard what later stages need, so that its faults are found before slow work."""
    with as_problem(f"REPORT_TO = {REPORT_TO!r}", 'Install what is missing, or set "none"'):
        for callback in get_reporting_integration_callbacks(REPORT_TO):
            callback()
    if STUDENT_INIT not in ("teacher", "random"):
        config = load_student_init(config).config
    if STUDENT == "bert" and STUDENT_INIT != "random":
        layers_to_copy(config)
    if WORD_DROPOUT and config.is_encoder_decoder:
        raise Problem(
            f"WORD_DROPOUT = {WORD_DROPOUT}: a decoder, as {config.model_type!r} has, would still "
            "read the hidden words. Set it to 0."
        )
    rewrites = "KL′" in METHODS[METHOD].terms
    if (rewrites or AUGMENT) and tokenizer.mask_token_id is None:
        raise Problem(
            f"METHOD = {METHOD!r}, AUGMENT = {AUGMENT}: the teacher's tokenizer has no mask token, "
            "which AUGMENT and methods that rewrite texts need. Choose others."
        )
    if rewrites and GENERATOR is not None:
        load_generator(tokenizer)


def load_teacher(name, config, label_names):
    """Return the frozen teacher and what the report says of it: {name, parameters, bytes}.

    With SOFT_LABELS_COLUMN the model only gives the student its start: it is TEACHER or, where
    there is none (name is None), STUDENT_INIT, whose config is given. Of the teacher that ran
    elsewhere nothing is known.
    """
    if name is None:
        set_labels(config, label_names)
    model = on_main_process(lambda: load_model(name) if name else load_student_init(config))
    if SOFT_LABELS_COLUMN:
        name = f"the probabilities in the column {SOFT_LABELS_COLUMN}"
        return model, {"name": name, "parameters": None, "bytes": None}
    n_parameters = model.num_parameters()
    name = without_folders(name)
    return model, {"name": name, "parameters": n_parameters, "bytes": 4 * n_parameters}


def load_model(name, setting="TEACHER", config=None):
    """Return the classifier in `name`, in eval mode and float32.

    A teacher must be complete and is frozen. Any other model may lack its head, or have one for
    other labels; the head then starts random.
    """
    what = f"{setting} = {name!r}"
    # in the order in which transformers looks for them
    possible = (
        "model.safetensors",
        "model.safetensors.index.json",
        "pytorch_model.bin",
        "pytorch_model.bin.index.json",
    )
    found = [file for file in possible if os.path.isfile(os.path.join(name, file))]
    if len(found) > 1:
        note(f"{what} holds several sets of weights, {', '.join(found)}: the first is read")
    advice = (
        f"On disk, {describe_path(name)}; accepted are weights and config.json of one model, as "
        "save_pretrained writes them"
    )
    with as_problem(f"{what}: its weights cannot be loaded", advice):
        config = config or load_config(name, setting)
        model, info = classifier_class(config).from_pretrained(
            name,
            config=config,
            dtype=torch.float32,  # transformers 5 would keep the precision of the file
            ignore_mismatched_sizes=True,
            output_loading_info=True,
        )
        # run it once, so that what does not fit fails here
        end_id = getattr(config, "eos_token_id", None) or 0  # BART needs one in its input
        model.eval()(input_ids=torch.full((1, 2), end_id))
    check_weights(what, model, info, is_complete=setting == "TEACHER")
    return model.requires_grad_(setting != "TEACHER")


def check_weights(what, model, info, is_complete):
    """Raise Problem if weights are missing, of another shape, not numbers, or of more layers.

    transformers would only warn, and go on with random weights or without the layers.
    info: what from_pretrained tells of them. is_complete: the head counts, too.
    """
    missing = sorted(info["missing_keys"])
    for key, saved, needed in info["mismatched_keys"]:
        missing.append(f"{key} {tuple(needed)}, of which the file has {tuple(saved)}")
    if not is_complete:  # its head may be missing, or have other labels
        head = rf"(?!{model.base_model_prefix}\.)|.*\.pooler\."
        missing = [key for key in missing if not re.match(head, key)]
    broken = [key for key, weight in model.named_parameters() if not weight.isfinite().all()]
    unused = sorted(info["unexpected_keys"])
    has_more_layers = is_complete and re.search(r"layers?\.\d+\.", " ".join(unused))
    needed_by = f"a {type(model).__name__} of its config.json"
    if missing or broken or has_more_layers:
        faults = {"missing": missing, "NaN or infinite": broken, "more than it has": unused}
        found = [f"{fault}: {short_list(keys)}" for fault, keys in faults.items() if keys]
        raise Problem(
            f"{what}: its weights are not those of {needed_by} ({'; '.join(found)}). Accepted are "
            "weights and config.json as save_pretrained writes them, of a fine-tuned classifier "
            "for TEACHER; name a model that is to be fine-tuned first in TEACHER_BASE."
        )
    if unused and is_complete:
        note(f"{what} holds weights that {needed_by} does not use: {short_list(unused)}")


def check_teacher(rows, names):
    """Note where the teacher's answers to the training texts hardly fit their labels.

    rows: the training texts with labels and soft_labels. names: the label names, by output.
    """
    labels = column_array(rows, "labels")
    predicted = [np.argmax(batch["soft_labels"], -1) for batch in iter_batches(rows, "soft_labels")]
    is_labelled = labels != NO_LABEL
    predicted = torch.tensor(np.concatenate(predicted)[is_labelled])
    labels = torch.tensor(labels[is_labelled])
    warn_if_one_label("teacher", "train", predicted, labels, names)

    confusion = confusion_matrix(labels, predicted, len(names))
    n_majority, majority = confusion.sum(1).max(0)
    if confusion.trace() < n_majority:  # no model at all would be better
        note(
            f"the teacher is right on {confusion.trace() / len(labels):.1%} of train; to answer "
            f"{names[majority]} always would be right on {n_majority / len(labels):.1%}. Likely "
            "causes: its labels are in another order than those of the data; its tokenizer or "
            "MeCab dictionary is not the one it was trained with; TEXT_COLUMN or LABEL_COLUMN "
            "names another column; it was trained too little"
        )
    mostly_other = confusion > confusion.diagonal()[:, None]
    for first, second in (mostly_other & mostly_other.T).triu().nonzero().tolist():
        note(
            f"the teacher answers {names[first]} mostly with {names[second]}, and "
            f"{names[second]} mostly with {names[first]}: are these two labels exchanged?"
        )


def warn_if_one_label(role, split, predicted, labels, names):
    """Note if a model answers all texts of a split with one label, though they have several."""
    if len(set(predicted.tolist())) == 1 < len(set(labels.tolist())):
        note(f"the {role} answers all texts of {split} with {names[predicted[0]]}")


# ── Data files ────────────────────────────────────────────────────────────────────────────────────

SPLIT_NAMES = {  # what files, parts of a data set, or values in a column may call a split
    "train": ["train", "training", "学習", "訓練"],
    "val": ["val", "validation", "valid", "dev", "development", "検証", "開発"],
    "test": ["test", "testing", "テスト", "評価"],
}
SPLITS = tuple(SPLIT_NAMES)
# each a branch of `read_part`; texts without labels may also be a .txt
FILE_KINDS = ".csv", ".tsv", ".jsonl", ".json", ".parquet"
TEXT_TYPES = "string", "large_string", "string_view", "null"  # as Arrow and datasets name them
COLUMN_ADVICE = (
    "Set TEXT_COLUMN, TEXT_PAIR_COLUMN, LABEL_COLUMN and SOFT_LABELS_COLUMN; a .csv (commas) or "
    ".tsv (tabs) has their names in its first line"
)
NO_LABEL = -100  # hard label of a text that only the teacher has labelled
ROWS_PER_PART = 10_000  # rows that are in memory at once


def load_data(label_names=None):
    """Return ({"train", "val", "test"}: texts and `labels`, label names); Problem for faulty data.

    label_names: the teacher's, by output; None if it is still to be made: then the data's count.
    `labels` are numbers of the teacher's outputs.
    """
    splits = read_splits(known_labels=set(label_names or ()))

    # what the labels mean, decided over all splits
    names = label_names or new_label_names(splits)
    outputs = match_labels(splits, names)
    for split, rows in splits.items():
        splits[split] = validate_rows(rows, split, outputs, names)
        warn_if_labels_contradict(splits[split], split)

    if "the set" in splits:
        splits = split_single_set(splits["the set"], names)
    splits["train"] = take_fraction(splits["train"], len(names))
    log_label_counts(splits, names)
    if SOFT_LABELS_COLUMN:
        log("data", f"in {SOFT_LABELS_COLUMN}, the labels have this order: {', '.join(names)}")
    return splits, names


def read_splits(known_labels):
    """Return {split: rows}, or {"the set": rows} if DATA is one set that is still to be split.

    known_labels: see `csv_rows`.
    """
    columns = [*text_columns(), *soft_label_columns(), LABEL_COLUMN]
    parts = find_parts("DATA", FILE_KINDS)
    if "the set" in parts:
        parts["the set"] = read_part(parts["the set"], columns, known_labels)
        groups = split_by_column(parts["the set"], columns) or parts
        groups = {split: {split: rows} for split, rows in groups.items()}
    else:
        groups = group_by_split(parts)
    return {
        split: join_parts("DATA", group, columns, known_labels) for split, group in groups.items()
    }


def find_parts(setting, kinds):
    """Return what DATA or UNLABELED names, {name: path of a file, or Dataset}.

    One file, or one data set without splits, has the name "the set".
    """
    name = globals()[setting]
    path = Path(name)
    if name == "tests/sample" and not path.exists():  # started from another folder
        path = Path(__file__).resolve().parent / name
    if path.is_file():
        return {"the set": path}
    # in a subfolder, as the hub lays out its folders
    files = data_files(path, kinds) or data_files(path / "data", kinds)
    is_saved = files and files.keys() <= {"state.json", "dataset_dict.json", "dataset_info.json"}
    if files and not is_saved:
        read = [file.relative_to(path).parts[0] for file in files.values()]
        log_unread(name, os.listdir(path), read)
        return files

    accepted = (
        f"Accepted are a file ({', '.join(kinds)}), a folder of files or of save_to_disk; as DATA, "
        "where a folder has a file each for train, val and test, also a hub data set (with a "
        "configuration: org/name:configuration)"
    )
    is_path = path.exists() or looks_like_path(name) or file_kind(path) in kinds
    if not is_saved and (is_path or setting != "DATA"):
        raise Problem(f"{setting} = {name!r}: no data: {describe_path(name)}. {accepted}.")
    with as_problem(f"{setting} = {name!r}: cannot be loaded", accepted):
        forbid_outside_paths(path)
        datasets.disable_caching()  # it would write beside the data
        if is_saved:
            loaded = datasets.load_from_disk(name)
        else:
            loaded = datasets.load_dataset(*name.split(":", 1))
    loaded = loaded.with_format(None)  # a format such as "torch" was for its last user
    parts = loaded if isinstance(loaded, dict) else {"the set": loaded}
    return parts if len(parts) > 1 else {"the set": next(iter(parts.values()))}


def data_files(folder, kinds):
    """Return {name: path} of the data files in a folder; hidden files do not count."""
    paths = sorted(folder.glob("[!.]*"))
    return {path.name: path for path in paths if file_kind(path) in kinds}


def log_unread(where, found, read):
    """Say what is not read; hidden files do not count, nor what lies in the sample's folder."""
    unread = sorted(name for name in {*found} - {*read} if not name.startswith("."))
    if unread and where != "tests/sample":
        log("data", f"{where}: not read: {short_list(unread)}")


def group_by_split(parts):
    """Return {split: those of the parts, see `find_parts`, that belong to it}; Problem for none.

    A part's name is that of a split. Where none is, those that begin with one count:
    train-v1.1.json, or train-00000-of-00002.parquet, a shard; several files are read only if they
    are all shards.
    """
    exact, longer = defaultdict(list), defaultdict(list)
    for name in parts:
        first_word, rest = re.fullmatch(r"([^-_.]*)(.*)", name).groups()
        is_exact = rest.lower().removesuffix(".gz") in ("", *FILE_KINDS)
        (exact if is_exact else longer)[split_of(first_word)].append(name)
    exact.pop(None, None)
    groups = exact or longer
    for split in SPLITS:
        if not is_one_set(groups[split]):
            raise Problem(
                f"DATA = {DATA!r}: for {split} there is {short_list(groups[split]) or 'nothing'}, "
                f"in all {short_list([*parts])}. Accepted are one file (or a set of shards, none "
                "missing) for each of train, val and test, named alike; or DATA itself names a "
                "single file, which is cut into the three."
            )
    if not exact:
        log("data", "; ".join(f"{split} is {short_list(groups[split])}" for split in SPLITS))
    log_unread(DATA, parts, itertools.chain(*map(groups.get, SPLITS)))
    return {split: {name: parts[name] for name in groups[split]} for split in SPLITS}


def is_one_set(names):
    """Whether these are one file, or all the shards of one set, each once."""
    shards = [re.sub(r"(-of-\d{5}).*", r"\1", name) for name in names]  # older ones end in a hash
    pattern = re.fullmatch(r"(.+-)\d{5}(-of-(\d{5}))", shards[0]) if names else None
    if not pattern:
        return len(names) == 1
    start, end, n_shards = pattern.groups()
    return shards == [f"{start}{number:05}{end}" for number in range(int(n_shards))]


def split_by_column(rows, columns):
    """Return {split: rows} if a column of one data set names the split of each row; else None.

    columns: those that are something else. Raise Problem if a split is missing.
    """
    others = [canonical_name(column) for column in columns]
    for name, kind in rows.features.items():
        is_read = isinstance(kind, datasets.ClassLabel) or getattr(kind, "dtype", "") in TEXT_TYPES
        if not is_read or canonical_name(name) in others:  # pictures may be paths to other files
            continue
        split_of_row = [split_of(label_text(value, kind)) for (value,) in iter_rows(rows, name)]
        found = sorted({*split_of_row} - {None})
        if found and None in split_of_row:
            note(
                f"column {name!r} is not used: {split_of_row.count(None):,} of its values name no "
                f"split, the first in row {split_of_row.index(None) + 1}"
            )
        elif len(found) == 2:
            raise Problem(
                f"DATA = {DATA!r}: column {name!r} names {' and '.join(found)} alone. Add what is "
                "missing of train, val and test, or remove this column to have the set cut into "
                "the three."
            )
        elif len(found) == 3:  # a column that says train everywhere splits nothing
            log("data", f"{DATA}: the split of each row is that in column {name!r}")
            return select_splits(rows, np.array(split_of_row))
    return None


def select_splits(rows, split_of_row):
    """Return {split: its rows}."""
    return {split: rows.select(np.flatnonzero(split_of_row == split)) for split in SPLITS}


def split_of(name):
    """Return the split that a name stands for, or None."""
    name = canonical_name(name).casefold()
    return next((split for split, names in SPLIT_NAMES.items() if name in names), None)


def split_single_set(rows, names):
    """Split one data set 80/10/10 into train, val and test; names: the label names, by number.

    Each label is split in the same proportion, by the order of hashes of its texts: not by SEED, so
    that a teacher made of the same set has not seen test. A text that occurs several times is in
    one split only. If texts are added, a few others move from one split to another.
    """
    table = hashed_texts(rows)
    texts = table.drop_duplicates("text").sort_values("text")
    by_label = texts.groupby("labels")["text"]
    n_same_label = by_label.transform("size")
    if n_same_label.min() < 10:
        counts = [f"{names[label]} {count}" for label, count in by_label.size().items()]
        raise Problem(
            f"DATA = {DATA!r}: cannot be cut into train, val and test. Different texts: "
            f"{short_list(counts)}. Give ten or more of each label, or files of your own for "
            "train, val and test."
        )
    n_tenth = (n_same_label / 10).round()
    number = by_label.cumcount()
    texts["split"] = np.select([number < n_tenth, number < 2 * n_tenth], ["val", "test"], "train")
    split_of_row = table["text"].map(texts.set_index("text")["split"])
    log("data", f"{DATA} is one set: its texts are cut 80/10/10, each label in proportion")
    return select_splits(rows, split_of_row)


def hashed_texts(rows):
    """Return a DataFrame: labels; text, an integer, the same for texts that look the same."""
    table = rows.select_columns("labels").to_pandas()
    hashes = []
    for texts in iter_rows(rows, *text_columns()):
        hashes.append(text_key([unicodedata.normalize("NFKC", text).strip() for text in texts]))
    table["text"] = hashes
    return table


def warn_if_labels_contradict(rows, split):
    """Note texts that occur more than once, with different labels."""
    table = hashed_texts(rows).drop_duplicates()
    table = table[table.duplicated("text", keep=False)].sort_values("text", kind="stable")
    if len(table):
        note(
            f"texts that occur in {split} more than once, with different labels: "
            f"{table['text'].nunique():,}, in the rows {short_list(table.index + 1)}"
        )


def log_label_counts(splits, names):
    """Say how many texts there are, and note labels that no training text has."""
    counts = np.bincount(column_array(splits["train"], "labels"), minlength=len(names))
    sizes = " · ".join(f"{split} {len(rows):,}" for split, rows in splits.items())
    by_label = [f"{count:,} {name}" for name, count in zip(names, counts, strict=True)]
    log("data", f"{DATA}: {sizes}; train has {short_list(by_label)}")
    absent = [names[label] for label in np.flatnonzero(counts == 0)]
    if absent:
        note(
            f"no text of train has the label {short_list(absent)}: for it the student sees "
            "only the teacher's guesses"
        )


def text_columns():
    return [TEXT_COLUMN, TEXT_PAIR_COLUMN] if TEXT_PAIR_COLUMN else [TEXT_COLUMN]


def take_columns(setting, name, columns, rows):
    """Return these columns of a part of DATA or UNLABELED, under the names of the settings.

    Raise Problem if one is missing or holds something else, or if there are no rows.
    """
    where = f"{setting} = {globals()[setting]!r}: {name}"
    spelled = find_columns(where, columns, rows.column_names)
    rows = rows.select_columns(spelled).rename_columns(dict(zip(spelled, columns, strict=True)))
    if len(rows) == 0:
        raise Problem(f"{where} has no rows. Add some.")
    for column, kind in rows.features.items():
        # Features of other kinds are not read: a picture may be a path, which datasets would open.
        if column == SOFT_LABELS_COLUMN:
            kind = getattr(kind, "feature", kind)  # of the members of a list
        accepted = TEXT_TYPES
        if column not in text_columns():
            accepted += "int", "uint", "float", "bool"
        if getattr(kind, "dtype", "").rstrip("0123456789") not in accepted:
            raise Problem(
                f"{where}: column {column} holds {kind}. Accepted are texts, for labels also "
                f"numbers, for soft labels lists of numbers. {COLUMN_ADVICE}."
            )
    return rows


def join_parts(setting, parts, columns, known_labels=frozenset()):
    """Return these columns of the parts of DATA or UNLABELED, see `find_parts`, as one Dataset."""
    tables = []
    for name, part in parts.items():
        rows = read_part(part, columns, known_labels)
        tables.append(take_columns(setting, name, columns, rows))
    where = f"{setting} = {globals()[setting]!r}: its parts do not fit together"
    with as_problem(where, "Write the columns of all parts in one type"):
        return datasets.concatenate_datasets(tables)


def find_columns(where, columns, found):
    """Return the names that columns have among those found; Problem for none, or several.

    A name is looked up as it is written, then without spaces around it and in one Unicode form.
    """
    spelled = []
    for column in columns:
        alike = [name for name in found if canonical_name(name) == canonical_name(column)]
        matches = [name for name in alike if name == column] or alike
        if len(matches) != 1:
            raise Problem(
                f"{where} has {'several columns' if matches else 'no column'} {column} among "
                f"{found!s:.300}. {COLUMN_ADVICE}."
            )
        spelled += matches
    return spelled


def iter_batches(rows, *columns):
    """Yield {column: values} for ROWS_PER_PART rows at a time: a large data set stays on disk."""
    return rows.select_columns([*columns]).with_format(None).iter(ROWS_PER_PART)


def iter_rows(rows, *columns):
    """Yield the values that each row has in these columns, a tuple."""
    for part in iter_batches(rows, *columns):
        yield from zip(*part.values(), strict=True)


def column_array(rows, name):
    """Return a column of numbers as one array."""
    return rows.select_columns(name).with_format("numpy")[:][name]


def read_part(part, columns, known_labels=frozenset()):
    """Return a data file as a Dataset of strings, exactly as the file has them.

    Of a .parquet it has the columns that are needed, with their types. Raise Problem, with the
    line, where it is not certain what the rows are.
    part: the path of the file, or a Dataset, which is returned as it is.
    columns: those that it must have. known_labels: see `csv_rows`.
    """
    if isinstance(part, datasets.Dataset):
        return part
    with as_problem(
        f"{part}: cannot be read",
        f"Accepted are {', '.join(FILE_KINDS)}, for UNLABELED also .txt; all but .parquet also as "
        ".gz; in UTF-8, UTF-16 with BOM or CP932",
    ):
        kind = file_kind(part)
        if kind == ".parquet":
            return write_rows(*parquet_batches(part, columns))
        with open_text(part) as file:
            if kind in (".csv", ".tsv"):
                rows = csv_rows(part, file, known_labels)
            elif kind in (".json", ".jsonl"):
                rows = json_rows(part, file)
            elif kind == ".txt":
                texts = ({TEXT_COLUMN: line.rstrip("\r\n")} for line in file)
                rows = itertools.chain([[TEXT_COLUMN]], texts)
            else:
                raise ValueError(f"its name ends in {kind!r}")
            header = next(rows)
            find_columns(part, columns, header)
            return write_rows(*text_batches(rows, header))


def write_rows(schema, batches):
    """Write Arrow batches to a file in CACHE; return it as a Dataset."""
    path = str(scratch_folder() / f"rows-{time.monotonic_ns()}.arrow")
    with pyarrow.OSFile(path, "wb") as file, pyarrow.ipc.new_stream(file, schema) as stream:
        for batch in batches:
            stream.write_batch(batch)
    return datasets.Dataset.from_file(path)


def text_batches(rows, header):
    """Return (schema, Arrow batches) of an iterator of rows, {column: string or None}."""
    # which of two columns with one name is meant is not certain
    names = [name for name in header if header.count(name) == 1]
    schema = pyarrow.schema([(name, pyarrow.string()) for name in names])
    parts = iter(lambda: [*itertools.islice(rows, 1000)], [])
    return schema, (pyarrow.RecordBatch.from_pylist(part, schema) for part in parts)


def parquet_batches(path, columns):
    """Return (schema, Arrow batches) of these columns of a .parquet, and of any that name splits.

    No others are read.
    """
    file = pyarrow.parquet.ParquetFile(path)
    schema = file.schema_arrow
    names = find_columns(path, columns, schema.names)
    for name, kind in zip(schema.names, schema.types, strict=True):
        holds_text = str(kind) in TEXT_TYPES or pyarrow.types.is_dictionary(kind)
        if holds_text and name not in names:
            first_rows = next(file.iter_batches(100, columns=[name]), {name: []})
            if any(split_of(str(value)) for value in first_rows[name]):
                names.append(name)
    fields = [schema.field(name) for name in names]
    batches = (batch.select(names) for batch in file.iter_batches(1000, columns=names))
    return pyarrow.schema(fields, schema.metadata), batches


def open_text(path):
    """Open a file, also a .gz, as text; its line ends stay as they are."""
    with open(path, "rb") as file:
        is_gzip = file.read(2) == b"\x1f\x8b"  # whatever its name ends in
    open_file = gzip.open if is_gzip else open
    with open_file(path, "rb") as file:
        encoding = text_encoding(path, file)
    return open_file(path, "rt", encoding=encoding, newline="")


def text_encoding(path, file):
    """Return the encoding of a file: UTF-8, UTF-16 with BOM or CP932 (Japanese Excel).

    ValueError for any other. file: it, open for bytes; it is read line by line.
    """
    start = file.read(4)
    if start.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        return "utf-16"
    file.seek(0)
    for number, line in enumerate(file, 1):
        # JIS (ISO-2022-JP) is all ASCII and would pass for UTF-8. These are its marks before kanji
        # and kana; the mark of the way back, "\x1b(B", also occurs in what a terminal has printed.
        jis = re.search(rb"\x1b(\$[@B(]|\([IJ])", line)
        fault = jis.start() if jis else utf8_fault(line)
        if fault is None:
            continue
        if not jis and is_japanese_cp932(file):
            log("data", f"{path} is not UTF-8: it is read as CP932")
            return "cp932"
        raise ValueError(
            f"it is neither UTF-8 nor Japanese CP932: in line {number} are the bytes "
            f"{line[fault : fault + 8]!r}; it begins with {start!r}"
        )
    return "utf-8-sig"


def utf8_fault(line):
    """Return the position of the first byte that is not UTF-8, or None."""
    try:
        line.decode()
    except UnicodeDecodeError as error:
        return error.start


def is_japanese_cp932(file):
    """Whether a file, open for bytes, is a Japanese text in CP932.

    Most bytes are characters in CP932, so the text must look Japanese: a fifth of what is not ASCII
    must be kana. Of EUC-JP and Windows-1252 hardly any would be.
    """
    file.seek(0)
    n_kana = n_others = 0
    for line in file:
        text = line.decode("cp932", "replace")
        n_kana += len(re.findall("[ぁ-ヶー]", text))
        n_others += len(re.findall(r"[^\x00-\x7f]", text))
        if "\ufffd" in text:
            return False
    return 5 * n_kana > n_others


def file_kind(path):
    """Return the kind of a data file: its suffix, in small letters, without that of gzip."""
    return Path(path.name.lower().removesuffix(".gz")).suffix


def csv_rows(path, file, known_labels):
    """Yield the header and the rows of a .csv or .tsv, as the csv module reads them in strict mode.

    Problem for a row with more or fewer fields than the header, and for a quotation mark that
    seems to open a field by mistake: every row up to the next mark would end up in that field.
    known_labels: the teacher's label names, by which a row is told from a line of a text.
    """
    separator = "\t" if file_kind(path) == ".tsv" else ","
    csv.field_size_limit(sys.maxsize)
    reader = csv.reader(file, delimiter=separator, strict=True)

    def fault(line, what):
        return Problem(
            f'{path}, line {line}: {what}. A text with {separator!r}, a line break or a " in it '
            'must stand in quotes, and a " in it be written twice.'
        )

    labels = {*known_labels}
    spanning = {}  # rows over several lines: {number of the first line: content}
    line = 1  # the first of the next row
    try:
        header = next(reader, [])
        is_label = [canonical_name(name) == canonical_name(LABEL_COLUMN) for name in header]
        yield header
        line = reader.line_num + 1
        for fields in reader:
            first_line, line = line, reader.line_num + 1
            if not fields:  # an empty line
                continue
            if fields == header:
                raise fault(first_line, "the header once more")
            if len(fields) != len(header):
                raise fault(first_line, f"{len(fields)} fields, but the header has {len(header)}")
            if line > first_line + 1:
                spanning[first_line] = separator.join(fields)
            labels.update(map(str.strip, itertools.compress(fields, is_label)))
            yield dict(zip(header, fields, strict=True))
    except csv.Error:
        raise fault(line, "a quote opens here that does not close at the end of a field") from None

    # One line of a row over several lines, its first or its last, looks like a row by itself. If
    # more lines do, with labels in the right place, they are rows that a quote has swallowed.
    def is_row(content):
        fields = content.split(separator)
        if len(fields) != len(header) or separator == "\t" or len(labels) < 2:
            return len(fields) == len(header)
        return labels.issuperset(map(str.strip, itertools.compress(fields, is_label)))

    for line, content in spanning.items():
        if sum(map(is_row, re.split("[\r\n]+", content))) > 1:
            raise fault(
                line,
                "a quote opens here and takes the rows below into its text (if this text does go "
                "over these lines, save the file as .jsonl)",
            )
    if spanning:
        log(
            "data",
            f"{path}: {len(spanning):,} rows go over several lines, in quotes; the first from line "
            f"{min(spanning)}",
        )


def json_rows(path, file):
    """Yield the columns and rows of a .json or .jsonl: a list of objects, or one in each line."""
    is_list = next((line for line in file if line.strip()), "").lstrip().startswith("[")

    def fault(where, what):
        return Problem(
            f"{path}, {where}: {what}. Accepted are one object in each line, such as "
            f'{{"{TEXT_COLUMN}": …}}, or a list of them, with a comma between two.'
        )

    def objects():
        file.seek(0)
        lines = [file.read()] if is_list else file
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            try:
                value = json.loads(line.rstrip(), object_pairs_hook=object_of)
            except json.JSONDecodeError as error:
                where = f"line {number + error.lineno - 1}"
                raise fault(where, f"not JSON ({error.msg})") from None
            except ValueError as error:  # of object_of
                where = "in the list" if is_list else f"line {number}"
                raise fault(where, str(error)) from None
            yield from value if is_list else [value]

    names = {}
    for number, row in enumerate(objects(), 1):
        if not isinstance(row, dict):
            raise fault(f"row {number}", f"{row!r:.40} is no object")
        names |= dict.fromkeys(row)
    yield [*names]
    for row in objects():
        yield {name: json_text(value, name) for name, value in row.items()}


def object_of(pairs):
    """Return a JSON object, given as pairs, as a dict; ValueError for a key that occurs twice."""
    if len(dict(pairs)) < len(pairs):
        raise ValueError(f"a key occurs twice in {dict(pairs)!r:.99}")
    return dict(pairs)


def json_text(value, name):
    """Return a value of a JSON object as text; None for null, and for a text that is not one."""
    column = canonical_name(name)
    if column in map(canonical_name, soft_label_columns()):
        return str(value)
    if isinstance(value, list) and len(value) == 1:
        value = value[0]
    if isinstance(value, str):
        return value if is_encodable(value) else None
    is_text_column = column in map(canonical_name, text_columns())
    return None if is_text_column or isinstance(value, list | dict) else label_text(value)


def validate_rows(rows, split, outputs, names):
    """Return the texts of a split with `labels`, the numbers of the teacher's outputs.

    With SOFT_LABELS_COLUMN also `teacher_probabilities`. Raise Problem, with the numbers of the
    faulty rows, if a text, a label or a soft label is missing or unknown.
    outputs: see `match_labels`.
    """
    columns = text_columns()
    kept = text_columns()
    faults = defaultdict(list)
    if SOFT_LABELS_COLUMN:
        rows, soft_label_faults = parse_soft_labels(rows, len(names))
        faults |= soft_label_faults
        kept.append("teacher_probabilities")
    kind = rows.features[LABEL_COLUMN]
    have = f"teacher has {short_list(names)}, the data {short_list(sorted(outputs)):.200},"
    labels = []
    for *texts, label in iter_rows(rows, *columns, LABEL_COLUMN):
        label = label_text(label, kind)
        labels.append(outputs.get(label, NO_LABEL))
        if labels[-1] == NO_LABEL:
            fault = f"label {label[:60]!r}, the {have}" if label else "no label"
            faults[fault].append(len(labels))
        for column, text in zip(columns, texts, strict=True):
            if not is_text(text):
                faults[f"{column} empty or not a text"].append(len(labels))
    refuse_faulty_rows("DATA", split, faults)
    return rows.select_columns(kept).add_column("labels", np.array(labels))


def refuse_faulty_rows(setting, name, faults):
    """Raise Problem if there are faults: {fault: numbers of the rows that have it}.

    name: that of the split or file whose rows they are.
    """
    lines = [
        f"{name}: {fault} in {len(rows):,} rows: {short_list(rows)}"
        for fault, rows in faults.items()
        if rows
    ]
    if lines:
        hint = f"{setting} = {globals()[setting]!r}: correct these rows, which are counted from 1."
        if setting == "DATA":
            hint += (
                " Labels are the teacher's names (id2label in its config.json), or numbers of its "
                "outputs from 0, in all splits alike."
            )
        more = [f"and {len(lines) - 9:,} more faults"] if len(lines) > 9 else []
        raise Problem("\n  ".join([hint, *lines[:9], *more]))


def is_text(value):
    """Whether a value is a string that is not blank and that UTF-8 can hold."""
    return isinstance(value, str) and value.strip() != "" and is_encodable(value)


def is_encodable(value):
    """Whether UTF-8 can hold a string: it has no half of a character (a lone surrogate)."""
    return re.search("[\ud800-\udfff]", value) is None


def short_list(values):
    """Return values separated by commas; of many, the first ten."""
    return ", ".join(map(str, values[:10])) + (", …" if len(values) > 10 else "")


# ── Labels: names or numbers ──────────────────────────────────────────────────────────────────────


def label_text(label, kind=None):
    """Return a label as text, that of a ClassLabel by its name; "" for None and NaN.

    kind: the type of its column.
    """
    if isinstance(kind, datasets.ClassLabel) and label in range(kind.num_classes):
        return kind.names[label]
    return "" if label is None or label != label else str(label)


def canonical_label(label):
    """Return a label without what does not tell labels apart.

    That is white space around it; its Unicode form, which is another in names of a Mac's folders;
    and the ".0" of a number, which pandas writes where another label is missing.
    """
    return re.sub(r"^(-?\d+)\.0+$", r"\1", canonical_name(label))


def label_key(label):
    """Return a label also without its case and the width of its characters."""
    return unicodedata.normalize("NFKC", canonical_label(label)).casefold()


def canonical_name(name):
    """Return a name without white space around it, in the Unicode form NFC."""
    return unicodedata.normalize("NFC", name).strip()


def look_up_labels(labels, names):
    """Return {label: its position in `names`, or NO_LABEL if it is not among them}.

    A label is looked up exactly as it is written, then by its `label_key`, if that is another for
    each of the names; "1" is "True" where the names are True and False.
    """
    exact = {name: position for position, name in enumerate(names)}
    by_key = {label_key(name): position for name, position in exact.items()}
    if len(by_key) < len(names):
        by_key = {}
    if by_key.keys() == {"true", "false"}:
        by_key |= {"1": by_key["true"], "0": by_key["false"]}
    return {label: exact.get(label, by_key.get(label_key(label), NO_LABEL)) for label in labels}


def written_labels(splits):
    """Return the different labels of all splits, as texts, and the names of their class labels.

    The names are None if a split has no class labels, or other ones than the first split.
    """
    labels = set()
    kinds = [rows.features[LABEL_COLUMN] for rows in splits.values()]
    for rows, kind in zip(splits.values(), kinds, strict=True):
        labels |= {label_text(label, kind) for label in rows.unique(LABEL_COLUMN)}
    is_one_kind = all(kind == kinds[0] for kind in kinds)
    return labels - {""}, getattr(kinds[0], "names", None) if is_one_kind else None


def new_label_names(splits):
    """Return the label names of a teacher that is still to be made, in the order of its outputs."""
    labels, class_names = written_labels(splits)
    labels = {canonical_label(label) for label in labels}
    are_numbers = all(re.fullmatch(r"-?\d+(\.\d+)?", label) for label in labels)
    names = class_names or sorted(labels, key=float if are_numbers else None)
    scores = [name for name in names if re.fullmatch(r"-?\d*\.\d*[1-9]\d*", name)]
    n_alike = Counter(map(label_key, names))
    alike = [name for name in names if n_alike[label_key(name)] > 1]
    faults = [
        (not 2 <= len(names) <= 1000, f"{len(names)} different labels; accepted are 2 to 1000"),
        (scores and not class_names, f"{short_list(scores)} are scores; write a class for each"),
        (alike, f"{short_list(alike)} look like one label; write them alike"),
    ]
    for is_fault, fault in faults:
        if is_fault:
            raise Problem(f"LABEL_COLUMN = {LABEL_COLUMN!r}: {fault}.")
    if names == [str(number) for number in range(len(names))]:
        return [f"LABEL_{name}" for name in names]
    return names


def match_labels(splits, names):
    """Return {label as written: number of the teacher's output, or NO_LABEL}.

    The labels of all splits are names of the teacher's labels, or all are numbers of its outputs:
    whichever leaves fewer unknown (`validate_rows` refuses these). If both fit, they are names.
    A ClassLabel has a number, too, which counts only if the teacher knows none of its names.
    """
    labels, class_names = written_labels(splits)

    def n_unknown(outputs):
        return [*outputs.values()].count(NO_LABEL)

    as_names = look_up_labels(labels, names)
    numbers = [str(number) for number in range(len(names))]
    if class_names:
        numbers = class_names[: len(names)] if n_unknown(as_names) == len(labels) else []
    as_numbers = look_up_labels(labels, numbers)
    outputs = min(as_names, as_numbers, key=n_unknown)
    if as_names != as_numbers and n_unknown(as_numbers) == 0:
        meanings = [f"{label} is output {output}" for label, output in sorted(outputs.items())]
        log(
            "data" if n_unknown(as_names) else "note",  # both fit: look at it
            f"the teacher's labels are {short_list(names)}; those of the data, numbers or names, "
            f"are taken so: {short_list(meanings)}",
        )
    return outputs


# ── Batches: token ids, padding, order ────────────────────────────────────────────────────────────

MAX_CHARACTERS = 30_000  # of a text that are read: far more than any MAX_LENGTH tokens have
MAX_UNKNOWN_SHARE = 0.03  # of a split's tokens; a vocabulary that fits the texts knows nearly all
TEXTS_PER_PROCESS = 100_000  # fewer would not pay for starting another process to tokenize
TOKENS_PER_BATCH = 2048  # of inference: enough to keep the processor busy, and they fit its cache
BATCHES_PER_POOL = 16  # batches of training whose texts are sorted by length together
MECAB_LOCK = threading.Lock()  # MeCab answers one thread at a time
ID_COLUMNS = "input_ids", "token_type_ids"
TARGETS = "labels", "soft_labels", "teacher_logits", "teacher_layers"  # inputs of the loss only


def tokenize(data, tokenizer, student_tokenizer=None):
    """Replace the texts of every split by token ids; return `data`.

    New columns: input_ids, for pairs token_type_ids, length, unknown, truncated (see `encode`) and
    key, an integer that names the ids. If the student has another tokenizer, its ids are in columns
    that begin with "student_". Nothing is padded here.
    """
    tokenizers = {"": tokenizer}
    if student_tokenizer not in (None, tokenizer):
        tokenizers["student_"] = student_tokenizer
    for split, rows in data.items():
        n_workers = min(len(rows) // TEXTS_PER_PROCESS, os.cpu_count() // world_size())
        data[split] = map_on_disk(
            rows,
            encode_batch,
            remove_columns=text_columns(),
            num_proc=n_workers or None,
            fn_kwargs={
                "columns": text_columns(),
                "tokenizers": tokenizers,
                "max_length": MAX_LENGTH,
            },
        )
    log_tokens(data, tokenizer)
    log_shared_texts(data)
    return data


def encode_batch(batch, columns, tokenizers, max_length):
    """Return the new columns for a batch of texts. It may run in another process."""
    texts = [batch[column] for column in columns]
    new_columns = encode(texts, tokenizers[""], max_length)
    id_lists = [new_columns[name] for name in ID_COLUMNS if name in new_columns]
    new_columns["key"] = list(map(text_key, zip(*id_lists, strict=True)))
    if "student_" in tokenizers:
        for name, values in encode(texts, tokenizers["student_"], max_length).items():
            new_columns[f"student_{name}"] = values
    return new_columns


def text_key(ids):
    """Return a 64-bit integer that names token ids, or normalized texts.

    Of a million texts, two share a key with a probability of 3e-8.
    """
    hashed = hashlib.blake2b(repr(ids).encode(), digest_size=8).digest()
    return int.from_bytes(hashed, "little", signed=True)


def log_tokens(data, tokenizer):
    """Say how long the texts are, and note if many of their tokens are unknown."""
    data = {name: rows for name, rows in data.items() if name != "copies"}
    lengths = np.concatenate([column_array(rows, "length") for rows in data.values()])
    n_truncated = sum(column_array(rows, "truncated").sum() for rows in data.values())
    log(
        "data",
        f"{lengths.mean():.1f} tokens per text, at most {lengths.max()}; {n_truncated:,} of "
        f"{len(lengths):,} texts cut to MAX_LENGTH = {MAX_LENGTH}",
    )
    unknown_shares = []
    for split, rows in data.items():
        share = column_array(rows, "unknown").sum() / max(1, column_array(rows, "length").sum())
        if share > MAX_UNKNOWN_SHARE:
            unknown_shares.append(f"{share:.1%} of {split}")
    if unknown_shares:
        note(
            f"the vocabulary does not know many tokens ([UNK]): {', '.join(unknown_shares)}. Are "
            "these texts of the teacher's language, and is the tokenizer, with its dictionary, the "
            "one that the teacher was trained with?"
        )
    first_ids = data["train"][0]["input_ids"][:30]
    log("data", "the first: " + " ".join(tokenizer.convert_ids_to_tokens(first_ids)))


def log_shared_texts(data):
    """Say how many texts of a split are in another, too: such a split flatters a model."""
    keys = {split: column_array(data[split], "key") for split in SPLITS}
    for other, split in itertools.combinations(SPLITS, 2):
        n_shared = np.isin(keys[split], keys[other]).sum()
        if n_shared:
            log(
                "data",
                f"{n_shared:,} of {len(data[split]):,} texts of {split} also occur in {other}: "
                f"the scores on {split} are inflated",
            )


def encode(texts, tokenizer, max_length):
    """Return the token ids of texts, exactly as the stock tokenizer gives them, without padding.

    texts: [texts], or [first texts, second texts] for pairs. A text is a string, or a list of its
    words, each with the white space before it, None for a masked word.
    Returns lists, one value per text: input_ids; for pairs token_type_ids, if the model takes them;
    length; unknown, the number of [UNK]; truncated, whether max_length truncated the text.
    """
    with_types = len(texts) > 1 and "token_type_ids" in tokenizer.model_input_names
    if tokenizer.is_fast:
        texts = [[join_words(text, tokenizer) for text in column] for column in texts]
        # always with the same options: it keeps them, and another thread may use it, too
        encoded = tokenizer(
            *texts,
            truncation=True,
            max_length=max_length,
            return_attention_mask=False,
            return_token_type_ids=with_types,
        )
        columns = dict(encoded)
        columns["truncated"] = [bool(row.overflowing) for row in encoded.encodings]
    else:
        with MECAB_LOCK:
            id_columns = [list(map(make_encoder(tokenizer), column)) for column in texts]
        columns = join_ids(id_columns, tokenizer, max_length, with_types)
    columns["length"] = [len(ids) for ids in columns["input_ids"]]
    columns["unknown"] = [ids.count(tokenizer.unk_token_id) for ids in columns["input_ids"]]
    return columns


def join_ids(id_columns, tokenizer, max_length, with_types):
    """Truncate each row, one or two id lists, and put special tokens around it; see `encode`."""
    # Ask the tokenizer once where the ids go. Negative numbers take their place.
    places = [[-1 - number] for number in range(len(id_columns))]
    template = tokenizer.build_inputs_with_special_tokens(*places)
    max_ids = max_length - (len(template) - len(places))
    columns = defaultdict(list)
    for row in zip(*id_columns, strict=True):
        n_excess = sum(map(len, row)) - max_ids
        if n_excess > 0:
            *row, _ = tokenizer.truncate_sequences(*row, num_tokens_to_remove=n_excess)
            input_ids = tokenizer.build_inputs_with_special_tokens(*row)
        else:
            input_ids = []
            for token_id in template:
                input_ids += row[-1 - token_id] if token_id < 0 else [token_id]
        columns["input_ids"].append(input_ids)
        columns["truncated"].append(n_excess > 0)
        if with_types:
            token_types = tokenizer.create_token_type_ids_from_sequences(*row)
            columns["token_type_ids"].append(token_types)
    return dict(columns)


def join_words(text, tokenizer):
    """Return a text as a string; a masked word (None) becomes the mask token."""
    if isinstance(text, str):
        return text
    return "".join(word or tokenizer.mask_token for word in text)


@functools.lru_cache(2)
def make_encoder(tokenizer):
    """Return a function from a text to its token ids, for a tokenizer in Python.

    Special tokens are not added. The ids are those of the stock tokenizer. BertJapaneseTokenizer
    splits a word into subwords, in Python, each time it meets it; here each word is split once, and
    most of the time that is left is MeCab's. A text that spells out a special token is left to it.
    """
    special_tokens = re.compile("|".join(map(re.escape, tokenizer.get_added_vocab())))
    never_split = tokenizer.all_special_tokens

    @functools.lru_cache(1 << 18)
    def word_ids(word):
        if word is None:
            return (tokenizer.mask_token_id,)
        subwords = [word]
        if tokenizer.do_subword_tokenize:
            subwords = tokenizer.subword_tokenizer.tokenize(word)
        return tuple(tokenizer.convert_tokens_to_ids(subwords))

    def text_ids(text):
        if splits_words(tokenizer) and not isinstance(text, str):
            words = [word and word.strip() for word in text]
        elif not splits_words(tokenizer) or special_tokens.search(text):
            text = limit_characters(join_words(text, tokenizer))
            return tokenizer.convert_tokens_to_ids(tokenizer.tokenize(text))
        else:
            text = limit_characters(text)
            words = tokenizer.word_tokenizer.tokenize(text, never_split=never_split)
        return list(itertools.chain.from_iterable(map(word_ids, words)))

    return text_ids


def splits_words(tokenizer):
    """Whether a tokenizer splits Japanese texts into words with a dictionary."""
    return isinstance(tokenizer, transformers.BertJapaneseTokenizer) and tokenizer.do_word_tokenize


def limit_characters(text):
    """Return the first MAX_CHARACTERS of a text: MeCab crashes at some 100,000.

    NFKC, which the tokenizer applies first, can make 18 characters of one.
    """
    text = text[:MAX_CHARACTERS]
    while len(text) > 1000 and len(unicodedata.normalize("NFKC", text)) > MAX_CHARACTERS:
        text = text[: len(text) // 2]
    return text


def map_on_disk(rows, function, **options):
    """Dataset.map into a new file in `scratch_folder`: nothing is reused, or written elsewhere."""
    shows_progress = len(rows) >= TEXTS_PER_PROCESS and sys.stderr.isatty() and rank() == 0
    if shows_progress:
        datasets.enable_progress_bars()
    else:
        datasets.disable_progress_bars()
    name = f"rows-{time.monotonic_ns()}"
    return rows.map(
        function,
        batched=True,
        desc="texts",
        new_fingerprint=name,
        cache_file_name=str(scratch_folder() / f"{name}.arrow"),
        **options,
    )


def make_collate_fn(tokenizer):
    return functools.partial(collate, pad_token_id=tokenizer.pad_token_id)


def collate(rows, pad_token_id=0):
    """Return rows of `tokenize` as a batch of tensors, padded to the longest of these rows.

    Lists are padded, not tensors: pad_sequence would take 5 % of the time from text to label.
    """
    lengths = [len(row["input_ids"]) for row in rows]
    longest = max(lengths)

    def padded(name, padding):
        return torch.tensor([row[name] + [padding] * (longest - len(row[name])) for row in rows])

    batch = {
        "input_ids": padded("input_ids", pad_token_id),
        "attention_mask": (torch.arange(longest) < torch.tensor(lengths)[:, None]).long(),
    }
    if "token_type_ids" in rows[0]:
        batch["token_type_ids"] = padded("token_type_ids", 0)
    for name in TARGETS:
        if name in rows[0]:
            batch[name] = torch.stack([torch.as_tensor(row[name]) for row in rows])
    return batch


def hide_words(share, collate_fn, rows):
    """Return collate_fn(rows), with a share of the tokens taken out of the attention.

    So a student cannot learn a few texts by heart (word dropout, Iyyer et al. 2015, P15-1162). The
    first token of a text, [CLS], and its last, with all that are equal to it, [SEP], stay.
    """
    batch = collate_fn(rows)
    if share == 0:
        return batch
    ids, mask = batch["input_ids"], batch["attention_mask"]
    is_special = ids == ids.gather(1, mask.sum(1, keepdim=True) - 1)
    is_special[:, 0] = True
    is_hidden = (torch.rand(ids.shape) < share) & ~is_special
    return batch | {"attention_mask": mask.masked_fill(is_hidden, 0)}


def rows_of(columns):
    """Return columns, a dict of lists, as a list of dicts."""
    return [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]


def model_inputs(batch):
    return {name: tensor for name, tensor in batch.items() if name not in TARGETS}


def token_budget_batches(lengths):
    """Yield batches of row numbers, longest texts first: TOKENS_PER_BATCH with the padding."""
    order = np.argsort(-np.asarray(lengths), kind="stable")
    start = 0
    while start < len(order):
        longest = max(1, lengths[order[start]])
        batch_size = max(1, TOKENS_PER_BATCH // longest)
        yield order[start : start + batch_size]
        start += batch_size


def inference_loader(rows, collate_fn, select_batches=list):
    """Return a loader of batches for inference; select_batches chooses among them."""
    batches = list(token_budget_batches(column_array(rows, "length")))
    return DataLoader(rows, batch_sampler=select_batches(batches), collate_fn=collate_fn)


@torch.inference_mode()
def timed_logits(model, loader):
    """Run `model` over `loader`; yield (logits (batch, classes), seconds) for each batch."""
    model.eval()
    for batch in loader:
        start = time.perf_counter()
        logits = model(**model_inputs(batch)).logits
        yield logits, time.perf_counter() - start


def length_grouped_order(lengths, batch_size, seed):
    """Return the row numbers of one epoch: batches of similar length, in random order.

    A last batch that is not full comes last.
    """
    generator = np.random.default_rng(seed)
    order = generator.permutation(len(lengths))
    pool_numbers = np.arange(len(order)) // (BATCHES_PER_POOL * batch_size)
    order = order[np.lexsort((lengths[order], pool_numbers))]  # by length within each pool
    n_full = len(order) // batch_size * batch_size
    full_batches = generator.permutation(order[:n_full].reshape(-1, batch_size))
    return np.concatenate([full_batches.ravel(), order[n_full:]])


def batches_of_this_process(order, batch_size):
    """Return this process's part of each batch, as lists of row numbers.

    Every process takes every step: one that has no text of a small last batch repeats one of its
    texts, which `train_epoch` weights with 0.
    """
    own_batches = []
    for start in range(0, len(order), batch_size):
        batch = order[start : start + batch_size]
        own_part = shard(batch)
        own_batches.append(own_part if len(own_part) else batch[:1])
    return own_batches


def classify_encoded(model, tokenizer, columns):
    """Return the logits (texts, classes) of what `encode` returned, in its order."""
    rows = rows_of(columns)
    batches = list(token_budget_batches(columns["length"]))
    loader = (collate([rows[row] for row in batch], tokenizer.pad_token_id) for batch in batches)
    logits = torch.empty(len(rows), model.config.num_labels)
    for batch, (batch_logits, _) in zip(batches, timed_logits(model, loader), strict=True):
        logits[batch] = batch_logits
    return logits


# ── Teacher cache ─────────────────────────────────────────────────────────────────────────────────

SAVE_SECONDS = 60  # between two savings of the teacher's outputs


def teacher_cache_path(teacher, data):
    """Return the path for the teacher's outputs, which is named after its weights and its code.

    Raise Problem if the processes differ in the teacher or the texts: the outputs that they give
    one another would be cached under wrong names.
    """
    code = hash_of(run_teacher, fast_class, make_collate_fn)
    name = digest(teacher, versions(), code)
    contents = {"teachers, distill.py, or versions of Python, PyTorch or transformers": name}
    for split, rows in data.items():
        contents[f"texts or tokenizers (seen in {split})"] = iter_batches(rows, "key")
    check_same_in_all_processes(contents)
    return Path(CACHE, f"teacher-{name}.pt")


def load_teacher_outputs(path, n_classes):
    """Return the teacher's outputs in the cache; empty if there are none of this form.

    A dict of tensors, one value per text: key (see `text_key`), logits (texts, classes), seconds,
    and machine, a number for the hardware on which the seconds were measured.
    """
    empty = {
        "key": torch.empty(0, dtype=torch.int64),
        "logits": torch.empty(0, n_classes),
        "seconds": torch.empty(0),
        "machine": torch.empty(0, dtype=torch.int64),
    }

    saved = on_main_process(lambda: load_with_checksum(path))
    is_usable = isinstance(saved, dict) and saved.keys() == empty.keys()
    return saved if is_usable else empty


def run_teacher(rows, teacher, collate_fn, outputs, path):
    """Run the teacher on `rows`; return `outputs` with the new ones appended, and save them.

    With several processes each runs the teacher on a part of the batches.
    """
    parts = [outputs]

    def joined():
        return {name: torch.cat([part[name] for part in parts]) for name in outputs}

    def save():
        if rank() == 0:
            save_with_checksum(path, joined())

    loader = inference_loader(rows, collate_fn, select_batches=shard)
    next(timed_logits(teacher, loader), None)  # warm-up
    own_parts = teacher_parts(rows, teacher, loader)
    n_rounds = on_main_process(lambda: len(loader))  # other processes may have one batch less
    last_save = time.monotonic()
    try:
        for _ in progress_bar(range(n_rounds), desc="teacher"):
            parts += filter(None, gather_object([next(own_parts, None)]))
            if time.monotonic() - last_save > SAVE_SECONDS:
                save()
                last_save = time.monotonic()
    finally:  # what a stopped run has labelled is not lost
        save()
    return joined()


def teacher_parts(rows, teacher, loader):
    """Yield the teacher's outputs for each batch, in the form of `load_teacher_outputs`."""
    keys = torch.from_numpy(column_array(rows, "key"))
    machine = machine_number()
    answers = timed_logits(teacher, loader)
    for row_numbers, (logits, seconds) in zip(loader.batch_sampler, answers, strict=True):
        n_texts = len(row_numbers)
        yield {
            "key": keys[row_numbers],
            "logits": logits,
            "seconds": torch.full([n_texts], seconds / n_texts),
            "machine": torch.full([n_texts], machine),
        }


def machine_number():
    """Return a number for this hardware: times are comparable on one machine only."""
    return int(digest(hardware())[:8], 16)


def warn_if_timed_on_other_hardware(outputs, path):
    """Note if some of the teacher's times were measured on other hardware than this."""
    if (outputs["machine"] != machine_number()).any():
        note(
            "some of the teacher's seconds are from a run with another processor or number of "
            f"threads, those of the student from this one; to compare them, delete {path}"
        )


# ── Trainer and checkpoints ───────────────────────────────────────────────────────────────────────

# what training does not depend on: settings of what comes after it, texts that only describe, what
# records the command line, a lock (PATH_SETTINGS are left out, too)
NOT_IN_RUN_ID = {
    "REPORT_TO",
    "EXPORT",
    "BASELINE",
    "CASCADE_KEEPS",
    "ASK_TEACHER",
    "SAVE_SECONDS",
    "MODEL_CARD",
    "CACHE_MARK",
    "SOURCE",
    "MECAB_LOCK",
    "COMMAND_LINE_SETTINGS",
}


def make_trainer(model, data, collate_fn, trainer_class, hides_words=False, **training):
    """Return a trainer on the CPU, which has AdamW, the schedule, callbacks and trackers.

    hides_words: whether WORD_DROPOUT applies. training: epochs, learning_rate and patience, if
    other than in the settings.
    """
    default_rate = BILSTM_LEARNING_RATE if STUDENT == "bilstm" else LEARNING_RATE
    with as_problem(f"REPORT_TO = {REPORT_TO!r}", 'Install what is missing, or set "none"'):
        args = TrainingArguments(
            output_dir=CACHE,
            use_cpu=True,
            seed=SEED,
            num_train_epochs=training.get("epochs", EPOCHS),
            per_device_train_batch_size=BATCH_SIZE,
            learning_rate=training.get("learning_rate", default_rate),
            lr_scheduler_type=SCHEDULE,
            warmup_steps=WARMUP_STEPS,
            weight_decay=WEIGHT_DECAY,
            max_grad_norm=MAX_GRAD_NORM,
            eval_strategy="epoch",
            save_strategy="epoch",
            load_best_model_at_end=True,
            metric_for_best_model="eval_score",
            greater_is_better=True,
            report_to=REPORT_TO,
            disable_tqdm=True,
            log_level="error",
        )
        trainer = trainer_class(
            model=model,
            args=args,
            data_collator=collate_fn,
            train_dataset=data["train"],
            eval_dataset=data["val"],
            callbacks=[EarlyStoppingCallback(training.get("patience", PATIENCE))],
        )
    trainer.word_dropout = WORD_DROPOUT if hides_words else 0
    trainer.remove_callback(PrinterCallback)
    return trainer


def training_run_id(trainer):
    """Return what training depends on, {name: value or hash}: settings, code, data, weights.

    What files and folders hold is in the data and the weights; where they lie does not count, so
    that a run resumes after it was moved. Raise Problem if the processes differ.
    """
    settings = sorted(ACCEPTED.keys() - NOT_IN_RUN_ID - {*PATH_SETTINGS})
    run_id = {name: repr(globals()[name]) for name in settings}
    run_id["the number of epochs"] = trainer.args.num_train_epochs
    run_id["the learning rate"] = trainer.args.learning_rate
    run_id["the code"] = hash_of(run, distill, other_statements(), ignored=ACCEPTED)
    run_id["the versions"] = versions()
    # Computed numbers may differ in the last bit from one processor to another. Weights are those
    # of the first process in any case (DDP), and soft labels are nearly equal.
    check_same_in_all_processes(run_id)
    computed = {"soft_labels", "teacher_logits"}
    check_same_in_all_processes({"data": training_data(trainer, without=computed)})

    models = [*trainer.run_id_parts, *trainer.extra_state().values(), trainer.model]
    run_id["the data"] = on_main_process(lambda: digest(training_data(trainer)))
    run_id["the models and losses"] = on_main_process(lambda: digest(*models))
    return run_id


def versions():
    python = ".".join(platform.python_version_tuple()[:2])
    return f"Python {python}, PyTorch {torch.__version__}, transformers {transformers.__version__}"


def hash_of(*values, ignored=()):
    """Return a hash of functions, classes and values; a new one if they cannot be pickled.

    Functions and classes of the user's own, those of this file among them, count by their code and
    by all that they use by name, except settings that are paths and the names in `ignored`; those
    of libraries by their names. A comment or docstring does not count.
    """
    state = hashlib.sha256(repr(own_files()).encode())
    ignored = {*ignored} | NOT_IN_RUN_ID | {*PATH_SETTINGS}
    pickler = ContentPickler(SimpleNamespace(write=state.update), recurse=True)
    pickler.found, pickler.numbers = [], {}
    try:
        pickler.dump(values)
        for value in pickler.found:  # it grows: what they use follows them
            pickler.clear_memo()
            pickler.dump(content_of(value, ignored))
    except Exception as error:
        note(f"a stopped run cannot be resumed: what it depends on has no hash ({error})")
        return os.urandom(8).hex()
    return state.hexdigest()


class ContentPickler(Pickler):
    """The pickler by which datasets hashes functions, with a number for whatever has `content_of`.

    found: these objects, numbered from 0. numbers: {id of an object: its number}.
    """

    def persistent_id(self, value):
        if isinstance(value, set | frozenset):  # its order differs from one process to the next
            return "set", sorted(value, key=lambda item: getattr(item, "__qualname__", repr(item)))
        if isinstance(value, functools._lru_cache_wrapper):
            value = value.__wrapped__
        if not isinstance(value, FunctionType | CodeType | ModuleType | type):
            return None
        if id(value) not in self.numbers:
            self.numbers[id(value)] = len(self.found)
            self.found.append(value)
        return self.numbers[id(value)]

    def _batch_setitems(self, items, *more):  # datasets sorts them, but their order may count
        super(Pickler, self)._batch_setitems(items, *more)


def content_of(value, ignored):
    """Return what a function, class, module or code object consists of, for `hash_of`.

    Of what belongs to a library this is its name and, of a class, the functions of the user's own
    that a script has put into it. ignored: names in this module that do not count.
    """
    if isinstance(value, CodeType):  # without names, lines and docstring
        arguments = value.co_varnames, value.co_argcount, value.co_kwonlyargcount
        has_stars = value.co_flags & (inspect.CO_VARARGS | inspect.CO_VARKEYWORDS)
        steps, _, constants = code_steps(value)
        return steps, constants, arguments, has_stars, value.co_exceptiontable
    if isinstance(value, FunctionType) and is_own(value):
        module = value.__globals__
        names = global_names(value.__code__) & module.keys()
        if module is globals():
            names -= ignored
        used = {name: module[name] for name in sorted(names) if not name.endswith("__")}
        closure = [cell.cell_contents for cell in value.__closure__ or ()]
        return value.__code__, value.__defaults__, value.__kwdefaults__, closure, vars(value), used

    members = {}
    for key, member in sorted(vars(value).items()):
        # not what Python and transformers note in a class
        counts = is_own(value) and not re.search("^__|_cached_value$|^_abc_impl$", key)
        if counts or (isinstance(member, FunctionType) and is_own(member)):
            members[key] = member
    name = getattr(value, "__module__", ""), getattr(value, "__qualname__", value.__name__)
    return name, type(value), getattr(value, "__bases__", ()), members


def is_own(value):
    """Whether a function, class or module is the user's own: of no installed package."""
    name = value.__name__ if isinstance(value, ModuleType) else value.__module__
    if name == "__main__" or name not in sys.modules:  # of a file that was only executed
        return True
    return is_own_file(getattr(sys.modules[name], "__file__", ""))


@functools.cache
def code_steps(code):
    """Return (the instructions of a code object, as text; the names it looks up; its constants)."""
    steps, names, constants = [], set(), []
    for step in dis.get_instructions(code):
        argument = step.argval
        if "CONST" in step.opname:
            constants.append(argument)
            argument = None
        elif "NAME" in step.opname or "GLOBAL" in step.opname:
            names.add(argument)
        steps.append((step.opname, argument))
    return repr(steps), names, constants


@functools.cache
def global_names(code):
    """Return the names that a code object, or a function in it, looks up in its module."""
    _, names, constants = code_steps(code)
    inner = [constant for constant in constants if isinstance(constant, CodeType)]
    return names.union(*map(global_names, inner))


@functools.cache
def other_statements():
    """Return the statements of this file that define no function, class or CONSTANT."""
    definitions = ast.FunctionDef | ast.ClassDef | ast.Import | ast.ImportFrom
    nodes = [node for node in ast.parse(SOURCE).body if not isinstance(node, definitions)]
    return [text for text in map(ast.unparse, nodes) if not re.match(r"[A-Z]\w* = |['\"]", text)]


def own_files():
    """Return the hashes of the user's own modules: those loaded, or imported in a function."""
    files = {str(getattr(module, "__file__", "")) for module in [*sys.modules.values()]}
    source = SOURCE
    for file in filter(os.path.isfile, filter(is_own_file, files)):
        source += "\n" + Path(file).read_text("utf-8", "replace")
    for name in re.findall(r"^[ \t]+(?:import|from) ([\w.]+)", source, re.MULTILINE):
        with contextlib.suppress(ImportError, AttributeError, ValueError):
            files.add(str(importlib.util.find_spec(name).origin))
    scripts = __file__, str(getattr(sys.modules["__main__"], "__file__", ""))
    return sorted(file_digest(file) for file in files - {*scripts} if is_own_file(file))


@functools.cache
def is_own_file(path):
    """Whether a path is that of a module which belongs to no installed package."""
    installed = *site.getsitepackages(), site.getusersitepackages(), os.path.dirname(os.__file__)
    path = str(path)
    return path.endswith(".py") and os.path.isabs(path) and not path.startswith(installed)


def training_data(trainer, without=frozenset()):
    """Yield the columns that training depends on, part by part."""
    for rows in trainer.train_dataset, trainer.eval_dataset:
        columns = {*rows.column_names} - {"teacher_seconds", "teacher_layers"} - without
        yield from iter_batches(rows, *sorted(columns))


def start_or_resume(trainer, checkpoint_path, run_id):
    """Make optimizer and schedule and load the checkpoint of this run, if there is one; return it.

    A checkpoint is a dict: run_id, history and, after the first epoch, best (weights) and the
    states of the `training_parts`.
    """
    args = trainer.args
    n_steps = int(args.num_train_epochs) * len(trainer.get_train_dataloader())
    if n_steps <= WARMUP_STEPS:
        note(
            f"WARMUP_STEPS = {WARMUP_STEPS}, but training has {n_steps} steps at most: the "
            "learning rate is never reached. Lower it, or BATCH_SIZE"
        )
    trainer.create_optimizer_and_scheduler(num_training_steps=n_steps)

    new_checkpoint = {"run_id": run_id, "history": []}
    checkpoint = on_main_process(lambda: load_with_checksum(checkpoint_path)) or new_checkpoint
    saved_id = checkpoint.get("run_id")
    if saved_id != run_id:
        saved_id = saved_id if isinstance(saved_id, dict) else {}
        different = [name for name in run_id | saved_id if saved_id.get(name) != run_id.get(name)]
        log("training", f"starts anew; changed since the checkpoint: {short_list(different)}")
        checkpoint = new_checkpoint
    if checkpoint["history"]:
        log("training", f"goes on after epoch {len(checkpoint['history'])}")
        for name, part in training_parts(trainer).items():
            part.load_state_dict(checkpoint[name])

    if world_size() > 1:  # gradients become the mean over all processes
        # the fast last layer gives no gradient to some of its parameters
        trainer.accelerator.ddp_handler = DistributedDataParallelKwargs(find_unused_parameters=True)
        trainer.model_wrapped = trainer.accelerator.prepare(trainer.model)
    trainer.control = trainer.callback_handler.on_train_begin(args, trainer.state, trainer.control)
    print(" epoch   train loss     val loss   val accuracy         rate   seconds")
    return checkpoint


def training_parts(trainer):
    """Return what changes in training: {name: module, optimizer or schedule}."""
    return {
        "model": trainer.model,
        "optimizer": trainer.optimizer,
        "scheduler": trainer.lr_scheduler,
        **trainer.extra_state(),
    }


# ── Fast BERT: the same results in less time ──────────────────────────────────────────────────────


@functools.cache
def fast_class(stock):
    """Return the fast version of `stock`, a classifier class of FAST_FAMILIES.

    It has the same name, which save_pretrained writes into config.json, and the same arguments.
    """
    fast = FastDebertaV2Classifier if "DebertaV2" in stock.__name__ else FastClassifier

    @functools.wraps(stock.forward)
    def forward(self, *args, **more):
        return fast.forward(self, *args, **more)

    return type(stock.__name__, (fast, stock), {"forward": forward})


def __getattr__(name):
    """Return a fast class by its name, by which pickle finds it (from one process to the next)."""
    stock = name.endswith("ForSequenceClassification") and getattr(transformers, name, None)
    if stock and stock.config_class.model_type in FAST_FAMILIES:
        return fast_class(stock)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


class FastClassifier:
    """A stock class with the same parameters, outputs and gradients, and a faster last layer.

    Of the last layer the classifier reads one position, [CLS]. So the query, the output of the
    attention and the feed-forward are computed for that position only. Keys and values are not
    computed for any, because matrix products are associative (per head; x: input of the layer,
    x_0: of [CLS]):

        score    (W_q x_0 + b_q) · (W_k x_j + b_k) = (W_kᵀ q) · x_j + c
                 c is the same for all j, and softmax drops it
        context  Σ_j p_j (W_v x_j + b_v) = W_v (Σ_j p_j x_j) + b_v Σ_j p_j
                 with dropout Σ_j p_j is not 1

    The stock forward runs if a caller wants more than logits (the loss of labels, say), gives more
    than tokens, their types and a mask, or has changed the model (see `needs_stock_forward`). Where
    the fast one runs, dropout draws other numbers, and the key biases of all but DeBERTa-v2 have no
    gradient (it is 0). Logits may differ for a text that is all masked, and in DeBERTa-v2 gradients
    for one whose [CLS] is masked.
    """

    def __init__(self, config):
        super().__init__(config)
        _, *modules = self.modules()
        for module in modules:
            if type(module) is torch.nn.Dropout:
                module.__class__ = FastDropout
        self.module_classes = [type(module) for module in modules]

    def forward(self, input_ids=None, attention_mask=None, *rest, **more):
        """Take the arguments of the stock forward; logits: (batch, classes)."""
        more = {name: value for name, value in more.items() if value is not None}
        token_type_ids, inputs_embeds = more.get("token_type_ids"), more.get("inputs_embeds")
        _, *modules = self.modules()
        needs_stock_forward = (
            rest
            or more.keys() - {"token_type_ids", "inputs_embeds"}
            or (input_ids is None) == (inputs_embeds is None)
            or (attention_mask is not None and attention_mask.dim() != 2)
            or self.config.output_hidden_states
            or self.config.output_attentions
            or not self.config.return_dict
            or self.config._attn_implementation not in ("eager", "sdpa")
            or torch.is_autocast_enabled("cpu")
            or not self.has_fast_layer()
            or len(modules) != len(self.module_classes)
            or not all(map(is_unchanged, modules, self.module_classes))
            or len({module.training for module in modules}) > 1
        )
        if needs_stock_forward:
            return super().forward(input_ids, attention_mask, *rest, **more)
        x = self.last_cls_state(input_ids, attention_mask, token_type_ids, inputs_embeds)
        return SequenceClassifierOutput(logits=self.classify(x))

    def has_fast_layer(self):
        """Whether the last layer can be computed for [CLS] alone."""
        return not getattr(self.config, "is_decoder", False)

    def last_cls_state(self, input_ids, attention_mask, token_type_ids, inputs_embeds):
        """Return the last layer's output at [CLS], (batch, hidden)."""
        body = self.base_model
        x = embed(body.embeddings, input_ids, token_type_ids, inputs_embeds)
        if hasattr(body, "embeddings_project"):  # of a small ELECTRA
            x = body.embeddings_project(x)
        mask = None
        if attention_mask is not None and (is_traced() or not attention_mask.all()):
            is_padding = attention_mask[:, None] == 0
            mask = is_padding.to(x.dtype) * torch.finfo(x.dtype).min  # (batch, 1, length)
        *layers, last_layer = (body.encoder if hasattr(body, "encoder") else body.transformer).layer
        for layer in layers:
            x = layer(x, None if mask is None else mask[:, None])
        return cls_layer(last_layer, x, mask)

    def classify(self, x):
        """Return the logits for the last state of [CLS], by the stock head."""
        if hasattr(self, "pre_classifier"):  # DistilBERT
            return self.classifier(self.dropout(self.pre_classifier(x).relu()))
        x = x[:, None]  # the other heads take all positions, and read the first
        pooler = getattr(self, "pooler", getattr(self.base_model, "pooler", None))
        return self.classifier(x if pooler is None else self.dropout(pooler(x)))


def is_unchanged(module, its_class):
    """Whether a module is of this class, runs its forward, and nobody hooked into it."""
    hooks = module._forward_hooks, module._forward_pre_hooks
    hooks += module._backward_hooks, module._backward_pre_hooks
    is_free = "forward" not in vars(module)
    if any(hooks):  # those that transformers leaves behind for output_hidden_states do nothing
        names = [getattr(hook, "__module__", "") for kind in hooks for hook in kind.values()]
        is_free &= all(name.startswith("transformers.utils.") for name in names)
    return is_free and type(module) in (its_class, UsedRows)


def is_traced():
    """Whether a graph is being recorded, which must hold for other inputs, too."""
    return torch.compiler.is_compiling() or torch.jit.is_tracing()


def cls_layer(layer, x, mask):
    """Return the output of a layer of BERT or DistilBERT at the first position, (batch, hidden).

    x: (batch, length, hidden). mask: (batch, 1, length), added to the scores; or None.
    """
    attention, cls = getattr(layer.attention, "self", layer.attention), x[:, 0]
    is_distilbert = hasattr(attention, "q_lin")
    names = ("q_lin", "k_lin", "v_lin") if is_distilbert else ("query", "key", "value")
    to_query, to_key, to_value = (getattr(attention, name) for name in names)
    head_size = attention.attention_head_size
    query = to_query(cls).unflatten(1, (-1, head_size)) * head_size**-0.5
    context = cls_context(attention, x, query, to_key, to_value, mask)
    if is_distilbert:
        cls = layer.sa_layer_norm(attention.out_lin(context) + cls)
        return layer.output_layer_norm(layer.ffn.ff_chunk(cls) + cls)
    return layer.feed_forward_chunk(layer.attention.output(context, cls))


def cls_context(attention, x, query, to_key, to_value, added):
    """Return what the first position gets by attention, (batch, hidden).

    x: (batch, length, hidden). query: of the first position, (batch, heads, head size), scaled.
    added: to the scores, (batch, 1 or heads, length); or None.
    """
    n_heads, head_size = query.shape[1:]
    key_weight = to_key.weight.view(n_heads, head_size, -1)
    value_weight = to_value.weight.view(n_heads, head_size, -1)

    # W_kᵀ q, for each head: (batch, heads, hidden)
    score_vectors = torch.bmm(query.transpose(0, 1), key_weight).transpose(0, 1)

    # Σ p_j x_j and Σ p_j; dropout is applied to ones, so that its mask can be multiplied in
    keep = None
    if attention.training:
        keep = attention.dropout(x.new_ones(*score_vectors.shape[:2], x.shape[1]))
    p_sum, x_mean = ClsAttention.apply(x, score_vectors, added, keep)

    context = torch.bmm(value_weight, x_mean.permute(1, 2, 0)).permute(2, 0, 1)
    return (context + to_value.bias.view(n_heads, head_size) * p_sum).flatten(1)


def embed(embeddings, input_ids, token_type_ids, inputs_embeds):
    """Return what the embeddings of BERT and its like return, (batch, length, hidden).

    Positions and types are added first: one pass less over the large tensor saves 0 to 14 % of the
    time of inference (one layer, batch 32, 16 and 64 tokens).
    """
    length = (input_ids if inputs_embeds is None else inputs_embeds).shape[1]
    positions = position_vectors(embeddings, input_ids, token_type_ids, length)
    if inputs_embeds is None:  # in place: saves a sixth of the time of inference at 512 tokens
        x = embeddings.word_embeddings(input_ids).add_(positions)
    else:
        x = inputs_embeds + positions
    return embeddings.dropout(embeddings.LayerNorm(x))


def position_vectors(embeddings, input_ids, token_type_ids, length):
    """Return the sum of position and type vectors, (length, hidden) or (batch, length, hidden).

    RoBERTa numbers tokens from its padding id + 1 on; padding itself has the padding id. Without
    input_ids, all count as tokens.
    """
    padding_id = getattr(embeddings, "padding_idx", None)
    first = 0 if padding_id is None else padding_id + 1
    x = embeddings.position_embeddings.weight[first : first + length]
    if padding_id is not None and input_ids is not None:
        is_token = input_ids != padding_id
        if is_traced() or not is_token.all():
            x = embeddings.position_embeddings(is_token.cumsum(1) * is_token + padding_id)
    types = getattr(embeddings, "token_type_embeddings", None)  # DistilBERT has none
    if types is None:
        return x
    return x + (types.weight[0] if token_type_ids is None else types(token_type_ids))


class FastDebertaV2Classifier(FastClassifier):
    """The same for DeBERTa-v2 (He et al. 2021, https://arxiv.org/abs/2006.03654) with one layer.

    Its scores have up to three parts. With k_j = W_k x_j + b_k, the query q of [CLS], the vector
    e_j of the distance from [CLS] to j, and two projections of it, to a key and to a query:

        q · k_j           see FastClassifier
        q · key(e_j)      does not depend on x_j
        query(e_j) · k_j  = (W_kᵀ query(e_j)) · x_j + query(e_j) · b_k
                          one vector for each head and j, the same for all texts
    """

    def has_fast_layer(self):
        return self.config.relative_attention and self.config.num_hidden_layers == 1

    def last_cls_state(self, input_ids, attention_mask, token_type_ids, inputs_embeds):
        encoder = self.deberta.encoder
        x = self.deberta.embeddings(input_ids, token_type_ids, None, attention_mask, inputs_embeds)
        mask = x.new_ones(x.shape[:2]) if attention_mask is None else attention_mask
        [layer] = encoder.layer
        attention, cls = layer.attention.self, x[:, 0]
        distances = encoder.get_rel_pos(x, query_states=x[:, :1])[0, 0]
        buckets = (distances + attention.pos_ebd_size).clamp(0, 2 * attention.pos_ebd_size - 1)
        distance_vectors = attention.pos_dropout(encoder.get_rel_embedding())[buckets]

        n_parts = 1 + len({*attention.pos_att_type} & {"c2p", "p2c"})
        scale = np.sqrt(np.float32(n_parts * attention.attention_head_size)).item()  # as in stock
        query = attention.query_proj(cls).unflatten(1, (-1, attention.attention_head_size)) / scale
        scores = distance_scores(attention, x, query, distance_vectors, scale)
        is_seen = mask[:, None] * mask[:, None, :1]  # by [CLS], if that is no padding itself
        scores = scores.masked_fill(is_seen == 0, torch.finfo(x.dtype).min)
        context = cls_context(attention, x, query, attention.key_proj, attention.value_proj, scores)
        cls = layer.attention.output(context, cls)
        cls = layer.output(layer.intermediate(cls), cls)
        if encoder.conv is not None:
            if not is_traced():  # a graph cannot ask whether a text is shorter
                n_read = 1 + encoder.conv.conv.padding[0]
                x, mask = x[:, :n_read], mask[:, :n_read]
            cls = encoder.conv(x, cls[:, None], mask)[:, 0]
        return cls


def distance_scores(attention, x, query, distance_vectors, scale):
    """Return the parts of DeBERTa's scores that depend on distances, (batch, heads, length).

    query: (batch, heads, head size), divided by `scale`. distance_vectors: (length, hidden).
    """
    heads = attention.num_attention_heads, -1
    scores = x.new_zeros(x.shape[0], heads[0], x.shape[1])
    if "c2p" in attention.pos_att_type:
        to_key = attention.key_proj if attention.share_att_key else attention.pos_key_proj
        keys = to_key(distance_vectors).unflatten(1, heads)
        scores = scores + torch.einsum("bhd,nhd->bhn", query, keys)
    if "p2c" in attention.pos_att_type:
        to_query = attention.query_proj if attention.share_att_key else attention.pos_query_proj
        queries = to_query(distance_vectors).unflatten(1, heads) / scale
        key_weight = attention.key_proj.weight.unflatten(0, heads)
        score_vectors = torch.einsum("nhd,hdk->nhk", queries, key_weight)
        scores = scores + torch.einsum("bnk,nhk->bhn", x, score_vectors)
        scores = scores + torch.einsum("nhd,hd->hn", queries, attention.key_proj.bias.view(heads))
    return scores


class FastDropout(torch.nn.Dropout):
    """Dropout with the same distribution, drawn faster.

    It draws the gaps between the units that are dropped, which are geometric and 1/p times fewer
    than the units: 1 to 15 % of the time of a training step (one layer, batch 32, p = 0.1, 16 and
    64 tokens).
    """

    def _get_name(self):
        return "Dropout"  # the structure is printed like the teacher's

    def forward(self, x):
        if not self.training or self.p in (0, 1):
            return super().forward(x)
        expected = x.numel() * self.p
        n_gaps = int(expected + 10 * expected**0.5 + 10)  # ten standard deviations more
        uniform = torch.rand(n_gaps, device=x.device)
        gaps = (uniform.neg_().log1p_() / math.log1p(-self.p)).long() + 1
        dropped = gaps.cumsum(0) - 1
        dropped = dropped[: torch.searchsorted(dropped, x.numel())]
        return (x.flatten().index_fill(0, dropped, 0) / (1 - self.p)).view_as(x)


class ClsAttention(torch.autograd.Function):
    """Attention of one position: returns Σ_j p_j (b, heads, 1) and Σ_j p_j x_j (b, heads, hidden).

    p = softmax(vectors · x + added) * keep, with x (b, length, hidden), vectors (b, heads, hidden),
    added (b, 1 or heads, length), a mask or more scores, or None, keep (b, heads, length) or None.
    The gradient is written by hand: that of x, the one large tensor, is one product instead of two
    and a sum. There are no second derivatives.
    """

    @staticmethod
    def forward(ctx, x, vectors, added, keep):
        scores = torch.bmm(vectors, x.transpose(1, 2))
        if added is not None:
            scores = scores + added
        weights = scores.softmax(-1)
        p = weights if keep is None else weights * keep
        ctx.save_for_backward(x, vectors, weights, p, keep)
        return p.sum(-1, keepdim=True), torch.bmm(p, x)

    @staticmethod
    def backward(ctx, grad_sum, grad_mean):
        if torch.is_grad_enabled():
            raise RuntimeError("the fast [CLS] layer has no second derivatives: use a stock class")
        x, vectors, weights, p, keep = ctx.saved_tensors
        grad_p = torch.bmm(grad_mean, x.transpose(1, 2)) + grad_sum
        grad = weights * (grad_p if keep is None else grad_p * keep)
        grad -= weights * grad.sum(-1, keepdim=True)
        left = torch.cat([grad, p], 1).transpose(1, 2)
        grad_x = torch.bmm(left, torch.cat([vectors, grad_mean], 1))
        return grad_x, torch.bmm(grad, x), grad if ctx.needs_input_grad[2] else None, None


def only_used_embeddings(trainer):
    """Return `used_embedding_rows` for what a trainer trains on, if it needs no other rows."""
    model = trainer.model
    # models of others may use their embeddings elsewhere
    if isinstance(model, (FastClassifier, *OWN_CLASSES.values())):
        embedding = model.get_input_embeddings()
        is_plain = is_unchanged(embedding, torch.nn.Embedding) and embedding.weight.requires_grad
        if is_plain and not trainer.needs_all_embeddings:
            return used_embedding_rows(model, trainer.train_dataset, trainer.eval_dataset)
    return contextlib.nullcontext()


@contextlib.contextmanager
def used_embedding_rows(model, *splits):
    """In this block the model has only the embedding rows of tokens in `splits`.

    At the end the rows are put back, with the result of a plain run. A training set uses a few
    thousand of 32768 rows, and the pass of AdamW over all of them would take much of each step. The
    unused rows have no gradient: AdamW would only shrink them, all by the same factor. One more
    row, of ones, which no token uses, tells that factor.
    """
    full = model.get_input_embeddings()

    # the rows in use
    is_used = torch.zeros(full.num_embeddings, dtype=torch.bool)
    if full.padding_idx is not None:
        is_used[full.padding_idx] = True
    for rows in splits:
        ids_only = rows.select_columns("input_ids").with_format("numpy")
        for part in ids_only.iter(ROWS_PER_PART):
            is_used[np.concatenate(part["input_ids"])] = True

    new_id = (is_used.cumsum(0) - 1).clamp(0)  # masked positions may hold any id
    padding_idx = None if full.padding_idx is None else new_id[full.padding_idx].item()
    rows = torch.cat([full.weight[is_used], torch.ones_like(full.weight[:1])]).detach()
    small = UsedRows(*rows.shape, padding_idx, _weight=rows).train(full.training)
    small.new_id = new_id
    model.set_input_embeddings(small)
    try:
        yield
    finally:
        with torch.no_grad():
            full.weight *= small.weight[-1]
            full.weight[is_used] = small.weight[:-1]
        model.set_input_embeddings(full.train(small.training))


class UsedRows(torch.nn.Embedding):
    """An embedding of some rows of another; it takes the other's ids (id i: row new_id[i])."""

    def forward(self, ids):
        return super().forward(self.new_id[ids])


def clip_gradients(model, max_norm):
    """Do what torch.nn.utils.clip_grad_norm_ does, in 1 to 9 % less time of a training step."""
    grads = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
    norm = sum(torch.dot(grad.flatten(), grad.flatten()) for grad in grads).sqrt()
    if norm > max_norm:
        torch._foreach_mul_(grads, max_norm / norm)


# ── Copying layers ────────────────────────────────────────────────────────────────────────────────


def layers_to_copy(config):
    """Return the numbers of the layers that INIT_LAYERS names; Problem if there are not as many."""
    depth = min(getattr(config, key) for key in DEPTH_KEYS if hasattr(config, key))
    n_left_out = depth - NUM_LAYERS
    starts = {"first": 0, "middle": (n_left_out + 1) // 2, "last": n_left_out}
    if INIT_LAYERS == "spread":
        layers = np.linspace(0, depth - 1, NUM_LAYERS).round().astype(int).tolist()
    elif isinstance(INIT_LAYERS, str):
        layers = range(starts[INIT_LAYERS], starts[INIT_LAYERS] + NUM_LAYERS)
    else:
        layers = INIT_LAYERS
    is_too_many = isinstance(INIT_LAYERS, str) and n_left_out < 0
    if is_too_many or min(layers) < 0 or max(layers) >= depth:
        raise Problem(
            f"NUM_LAYERS = {NUM_LAYERS}, INIT_LAYERS = {INIT_LAYERS!r}: the {STUDENT_INIT} has "
            f"layers 0 to {depth - 1}."
        )
    return list(layers)


# the names that configurations have for the number of layers; BART has one for each half
DEPTH_KEYS = "num_hidden_layers", "encoder_layers", "decoder_layers"


def copy_with_layers(source, model_class, layers, weights, dropout=None):
    """Return a `model_class` that has, of the layers of `source`, those numbered in `layers`.

    weights: a state dict of `source`, or part of one; what it lacks starts random.
    dropout: replaces every dropout rate while this model is in memory; None keeps them.
    """
    config = copy.deepcopy(source.config)
    for key in DEPTH_KEYS:
        if hasattr(config, key):
            setattr(config, key, len(layers))
    if getattr(config, "layer_types", None):  # ModernBERT: local and global attention
        types = config.layer_types
        config.layer_types = [types[layer % len(types)] for layer in layers]

    # The saved config keeps the source's rates, for whoever trains the student further.
    source_rates = {}
    if dropout is not None:
        source_rates = {key: rate for key, rate in config.to_dict().items() if "dropout" in key}
        config.update(dict.fromkeys(source_rates, dropout))
    model = model_class(config).to("cpu")
    model.config.update(source_rates)

    # layer i of the new model takes the weights of layer layers[i] of the source
    copied = {}
    for name in model.state_dict():
        source_name = re.sub(
            r"(?<=layer\.)\d+|(?<=layers\.)\d+", lambda match: str(layers[int(match[0])]), name
        )
        if source_name in weights:
            copied[name] = weights[source_name]
    model.load_state_dict(copied, strict=False)
    return model


# ── Word vectors: refitted to what the copied layer is used to ────────────────────────────────────


@torch.inference_mode()
def refit_word_vectors(student, teacher, tokenizer, rows, collate_fn):
    """Set each word vector of the student to what the teacher's first layers make of the word.

    The student's layer comes from the middle of the teacher, where it met words that the layers
    below had read in context; in the student it meets bare word vectors. So each of these becomes
    the vector that the embeddings' LayerNorm turns into the mean of the word's states after
    REFIT_WORDS layers, over `rows` and the word by itself (in the manner of Bommasani et al. 2020,
    https://aclanthology.org/2020.acl-main.431). It is an ordinary embedding, and trained further.
    """
    config = teacher.config
    is_bert_of_teacher = (STUDENT, STUDENT_INIT) == ("bert", "teacher")
    is_small_electra = teacher.get_input_embeddings().embedding_dim != config.hidden_size
    is_bert_like = config.model_type in BERT_LIKE and not is_small_electra
    if REFIT_WORDS == 0 or not is_bert_of_teacher or not is_bert_like:
        return
    n_layers = min(REFIT_WORDS, config.num_hidden_layers)

    def make_vectors():
        return contextual_vectors(teacher, n_layers, tokenizer, rows, collate_fn)

    code = hash_of(contextual_vectors, make_collate_fn)
    vocabulary = sorted(tokenizer.get_vocab().items())
    special_ids = sorted(tokenizer.all_special_ids), tokenizer("")["input_ids"]
    parts = teacher, n_layers, vocabulary, special_ids, code, iter_batches(rows, "key")
    vectors = on_main_process(lambda: cached("words", make_vectors, *parts))
    student.get_input_embeddings().weight.copy_(vectors)


def contextual_vectors(teacher, n_layers, tokenizer, rows, collate_fn):
    """Return the word vectors for `refit_word_vectors`, (vocabulary, hidden)."""
    log("teacher", f"its first {n_layers} layers reread the training texts, to refit word vectors")
    lower_layers = copy_with_layers(teacher, type(teacher), range(n_layers), teacher.state_dict())
    lower_layers = lower_layers.base_model.eval()
    embeddings = lower_layers.embeddings
    norm = embeddings.LayerNorm
    plain_vectors = embeddings.word_embeddings.weight

    # the training texts, then every word by itself: [CLS] word [SEP]
    word_ids = {*tokenizer.get_vocab().values()} - {*tokenizer.all_special_ids}
    word_ids &= {*range(len(plain_vectors))}
    cls_id, *end_ids = tokenizer("")["input_ids"]
    single_words = [[cls_id, word_id, *end_ids] for word_id in sorted(word_ids)]
    lengths = [len(ids) for ids in single_words]
    single_rows = datasets.Dataset.from_dict({"input_ids": single_words, "length": lengths})
    loaders = [inference_loader(part, collate_fn) for part in (rows, single_rows)]

    # sums over all occurrences of a token
    state_sums = torch.zeros_like(plain_vectors)
    position_sums = torch.zeros_like(plain_vectors)
    counts = torch.zeros(len(plain_vectors), 1)
    n_batches = sum(map(len, loaders))
    for batch in progress_bar(itertools.chain(*loaders), total=n_batches, desc="words"):
        is_token = batch["attention_mask"].bool()
        token_ids = batch["input_ids"][is_token]
        states = lower_layers(**model_inputs(batch)).last_hidden_state
        # undo the LayerNorm; the small constant avoids a division by 0
        states = (states - norm.bias) * norm.weight / (norm.weight**2 + 1e-4)
        types = batch.get("token_type_ids")
        positions = position_vectors(embeddings, batch["input_ids"], types, states.shape[1])
        state_sums.index_add_(0, token_ids, states[is_token])
        position_sums.index_add_(0, token_ids, positions.expand_as(states)[is_token])
        counts += torch.bincount(token_ids, minlength=len(counts))[:, None]

    # The LayerNorm does not depend on the size of its input: that stays. (In place: memory.)
    mean_positions = position_sums.div_(counts.clamp(min=1))
    size = (plain_vectors + mean_positions).std(-1, correction=0, keepdim=True)
    vectors = F.layer_norm(state_sums, state_sums.shape[-1:], eps=0).mul_(size).sub_(mean_positions)
    return torch.where(counts > 0, vectors, plain_vectors)


# ── Option: a teacher that is still to be made ────────────────────────────────────────────────────

TEACHER_BASE = None  # TEACHER does not exist yet? fine-tune this base model into it
TEACHER_EPOCHS = 3  # at most, in that fine-tuning
TEACHER_LEARNING_RATE = 3e-5  # in that fine-tuning

# as long as there is nothing at this TEACHER, and DATA is the sample, a sample teacher stands in
DEFAULT_TEACHER = "./finetuned_bert_japanese"


def find_teacher():
    """Return (name, recipe): the teacher's folder or hub name, and how it is to be made.

    recipe: a dict of base and training (see `make_trainer`); None if the teacher is there.
    name: None if there is no teacher, only its answers (SOFT_LABELS_COLUMN) and STUDENT_INIT.
    """
    is_sample = DATA == "tests/sample"
    if not has_teacher():
        if SOFT_LABELS_COLUMN is not None and STUDENT_INIT not in ("teacher", "random"):
            return None, None
        if is_sample and TEACHER_BASE is None:
            return find_sample_teacher()
    if is_sample:
        note("DATA is still the sample; set it to your teacher's data")
    if TEACHER_BASE is None:
        return TEACHER, None
    if os.path.exists(TEACHER):
        note(f"{TEACHER} is used as it is; delete it to have it made from {TEACHER_BASE}")
        return TEACHER, None
    log("teacher", f"no {TEACHER} yet: {TEACHER_BASE} is fine-tuned into it")
    training = {"epochs": TEACHER_EPOCHS, "learning_rate": TEACHER_LEARNING_RATE}
    return TEACHER, {"base": TEACHER_BASE, "training": training}


def has_teacher():
    """Whether somebody has named a TEACHER, or there is one at its default."""
    is_named = TEACHER != DEFAULT_TEACHER or "TEACHER" in COMMAND_LINE_SETTINGS
    return is_named or os.path.exists(TEACHER)


def find_sample_teacher():
    """`find_teacher` for the sample teacher. It is in CACHE, so that nobody takes it for theirs."""
    name = os.path.join(CACHE, "sample_teacher")
    is_made = load_with_checksum(f"{name}.sum") == file_digest(f"{name}/model.safetensors")
    state = "(made before)" if is_made else "and is trained first (about a minute)"
    log(
        "teacher",
        f"no {TEACHER} here, and DATA is the sample: a small sample teacher stands in {state}",
    )
    base = Path(__file__).resolve().parent / DATA / "base"
    training = {"epochs": 6, "learning_rate": 1e-3, "patience": 6}
    return name, None if is_made else {"base": str(base), "training": training}


def teacher_of_student(folder):
    """Return the name of the teacher of the student in `folder`: TEACHER or the sample teacher."""
    settings = saved_report(folder).get("settings", {})
    is_sample = (settings.get("TEACHER"), settings.get("DATA")) == (DEFAULT_TEACHER, "tests/sample")
    return os.path.join(CACHE, "sample_teacher") if is_sample and not has_teacher() else TEACHER


def make_teacher(name, recipe, config, tokenizer, label_names, data, collate_fn):
    """Fine-tune a base model on the hard labels, with the epoch loop of the student; save it."""
    set_labels(config, label_names)
    transformers.set_seed(SEED)
    is_sample = TEACHER_BASE is None
    if is_sample:  # its base is a configuration without weights
        model = classifier_class(config)(config)
    else:
        model = on_main_process(lambda: load_model(TEACHER_BASE, "TEACHER_BASE", config))
    trainer = make_trainer(model, data, collate_fn, HardLabelTrainer, **recipe["training"])
    checkpoint_path = Path(CACHE, "teacher_checkpoint.pt")
    train(trainer, checkpoint_path, use_best_if_stopped=False)
    if rank() == 0:
        with replaced(name) as folder:
            save_model(model, tokenizer, folder)
        if is_sample:
            save_with_checksum(f"{name}.sum", file_digest(f"{name}/model.safetensors"))
        checkpoint_path.unlink()


# ── Option: a teacher that ran elsewhere ──────────────────────────────────────────────────────────

SOFT_LABELS_COLUMN = None  # column with the teacher's probabilities, lists; it is not asked again


def soft_label_columns():
    return [SOFT_LABELS_COLUMN] if SOFT_LABELS_COLUMN else []


def parse_soft_labels(rows, n_classes):
    """Replace SOFT_LABELS_COLUMN by "teacher_probabilities", lists of n_classes numbers.

    Return (rows, {fault: numbers of the rows that have it, from 1}).
    """

    def parse(batch):
        parsed = [parse_probabilities(value, n_classes) for value in batch[SOFT_LABELS_COLUMN]]
        return {"teacher_probabilities": parsed}

    features = datasets.Features(rows.features)
    features["teacher_probabilities"] = datasets.List(datasets.Value("float64"))
    rows = map_on_disk(rows, parse, features=features)
    is_faulty = rows.data.column("teacher_probabilities").is_null().to_numpy()
    fault = f"{SOFT_LABELS_COLUMN} is not a list of {n_classes} probabilities that add up to 1"
    return rows, {fault: (np.flatnonzero(is_faulty) + 1).tolist()}


def parse_probabilities(value, n_classes):
    """Return a list of floats; None if `value` is no list of n_classes probabilities.

    value: a list of numbers, or the text of one, also as numpy writes it: "[0.1 0.9]" or
    "[np.float64(0.1), np.float64(0.9)]".
    """
    if isinstance(value, str):
        value = re.sub(r"np\.float\d+|[][(),]", " ", value).split()
    try:
        probabilities = np.array(value, np.float64)
    except (TypeError, ValueError):
        return None
    if probabilities.shape != (n_classes,) or not (probabilities >= 0).all():  # NaN is not
        return None
    return probabilities.tolist() if abs(probabilities.sum() - 1) <= 1e-3 else None


def add_given_soft_labels(data):
    """`add_soft_labels` for the teacher's probabilities in the data.

    Their logarithms are logits that give the same probabilities at every temperature. From
    probabilities of 64 bits this gives the same soft labels, to the bit, as the teacher's logits.
    """

    def new_columns(batch):
        probabilities = torch.tensor(batch["teacher_probabilities"], dtype=torch.float64)
        logits = probabilities.clamp_min(torch.finfo(torch.float64).tiny).log()
        return {
            "teacher_logits": logits.float().numpy(),
            "soft_labels": soften(logits).numpy(),
            "teacher_seconds": np.zeros(len(logits), np.float32),  # unknown
        }

    log("teacher", f"its probabilities are read from the column {SOFT_LABELS_COLUMN}")
    return {split: map_on_disk(rows, new_columns) for split, rows in data.items()}


# ── Option: less or more text ─────────────────────────────────────────────────────────────────────

TRAIN_FRACTION = 1.0  # share of the labelled training texts to use, each label in proportion
UNLABELED = None  # texts that only the teacher labels: a file (.txt: one per line) or a folder
AUGMENT = None  # changed copies of each training text; None: up to 10 if texts are few (`n_copies`)
AUGMENT_REPLACE = 0.1  # in a copy, the probability that a word becomes another one of the texts
AUGMENT_MASK = 0.1  # the probability that a word becomes [MASK]
AUGMENT_NGRAM = 0.25  # the probability that a copy keeps only 2 to 10 neighbouring words


def load_extra_texts(train_rows, tokenizer):
    """Return {"unlabeled": …, "copies": …}, as far as the settings ask for them."""
    extra = {}
    if UNLABELED:
        n_classes = len(train_rows[0]["teacher_probabilities"]) if SOFT_LABELS_COLUMN else None
        extra["unlabeled"] = read_unlabeled(n_classes)
    n_texts = len(train_rows) + len(extra.get("unlabeled", ()))
    n = n_copies(n_texts, tokenizer)
    if n:
        extra["copies"] = map_on_disk(
            train_rows,
            augment,
            with_indices=True,
            remove_columns=train_rows.column_names,
            fn_kwargs={"split_words": make_word_splitter(tokenizer), "n": n},
            batch_size=10_000,  # the texts whose words replace one another
        )
    return extra


def n_copies(n_texts, tokenizer):
    """Return AUGMENT; if it is None, up to 10 of each text, for fewer than 10,000 texts.

    They are at most 30,000 in all. With more texts they did not help by validation. There are none
    either for the methods of papers, and where a teacher could not label them or does not count.
    """
    if AUGMENT is not None:
        return AUGMENT
    method = METHODS[METHOD]
    is_plain = method.learns_from and ALPHA and not method.terms
    if not is_plain or SOFT_LABELS_COLUMN or tokenizer.mask_token_id is None or n_texts >= 10_000:
        return 0
    return min(10, 30_000 // n_texts)


def take_fraction(rows, n_classes):
    """Return TRAIN_FRACTION of the rows, each label in proportion."""
    if TRAIN_FRACTION == 1:
        return rows
    with as_problem(f"TRAIN_FRACTION = {TRAIN_FRACTION}: cannot be taken", "Choose another, or 1"):
        rows = rows.cast_column("labels", datasets.ClassLabel(n_classes))
        parts = rows.train_test_split(1 - TRAIN_FRACTION, seed=SEED, stratify_by_column="labels")
        return parts["train"].cast_column("labels", datasets.Value("int64"))


def read_unlabeled(n_classes=None):
    """Return the texts of UNLABELED, with NO_LABEL as their label.

    n_classes: the number of soft labels of each, with SOFT_LABELS_COLUMN.
    """
    columns = [*text_columns(), *soft_label_columns()]
    parts = find_parts("UNLABELED", (*FILE_KINDS, ".txt"))
    rows = join_parts("UNLABELED", parts, columns)
    if SOFT_LABELS_COLUMN:
        rows, faults = parse_soft_labels(rows, n_classes)
        refuse_faulty_rows("UNLABELED", " + ".join(parts), faults)
        rows = rows.select_columns([*text_columns(), "teacher_probabilities"])

    is_valid = np.array([all(map(is_text, texts)) for texts in iter_rows(rows, *text_columns())])
    if not is_valid.any():
        raise Problem(f"UNLABELED = {UNLABELED!r}: holds only empty lines. Add texts, or set None.")
    if not is_valid.all():
        n_empty = (~is_valid).sum()
        log("data", f"{UNLABELED}: {n_empty:,} of {len(rows):,} rows hold no text: left out")
    rows = rows.select(np.flatnonzero(is_valid))
    return rows.add_column("labels", [NO_LABEL] * len(rows))


def make_word_splitter(tokenizer):
    """Return a function from a text to its words.

    With a tokenizer that does not split words itself, a word has the white space before it.
    """
    if splits_words(tokenizer):
        return lambda text: tokenizer.word_tokenizer.tokenize(limit_characters(text))
    mecab = MecabTokenizer(mecab_dic="unidic_lite")

    def split_words(text):
        text = unicodedata.normalize("NFKC", limit_characters(text))
        words = []
        end = 0
        for word in mecab.tokenize(text):
            start, end = end, text.index(word, end) + len(word)
            words.append(text[start:end])
        return words

    return split_words


def augment(batch, row_numbers, split_words, n):
    """Return n copies of each text, as lists of words, None for a masked word.

    Each word becomes another word of the batch with the probability AUGMENT_REPLACE (after its own
    white space), then a mask with AUGMENT_MASK; then, with AUGMENT_NGRAM, only 2 to 10 neighbouring
    words are kept (Tang et al. 2019, arXiv:1903.12136, whose words are of the same part of speech).
    Copies have no hard label: it may not hold for them. What is random depends on SEED and the row.
    """
    copies = {column: [] for column in text_columns()}
    for column_number, (column, column_copies) in enumerate(copies.items()):
        texts = [split_words(text) for text in batch[column]]
        pool = [word.lstrip() for words in texts for word in words]
        for words, row_number in zip(texts, row_numbers, strict=True):
            generator = np.random.default_rng([SEED, row_number, column_number])
            for _ in range(n):
                new_words = np.array(words, object)
                for place in np.flatnonzero(generator.random(len(words)) < AUGMENT_REPLACE):
                    space = re.match(r"\s*", words[place])[0]
                    new_words[place] = space + pool[generator.integers(len(pool))]
                new_words[generator.random(len(words)) < AUGMENT_MASK] = None
                if generator.random() < AUGMENT_NGRAM:
                    length = generator.integers(2, 10, endpoint=True)
                    start = generator.integers(max(len(new_words) - length, 0), endpoint=True)
                    new_words = new_words[start : start + length]
                column_copies.append(new_words.tolist())
    return copies | {"labels": [NO_LABEL] * (n * len(row_numbers))}


def append_extra_texts(data):
    """Append the texts without hard labels to train: each once, and none that a split has."""
    known_keys = np.concatenate([column_array(data[split], "key") for split in SPLITS])
    for name in "unlabeled", "copies":
        if name not in data:
            continue
        rows = data.pop(name)
        keys, first_rows = np.unique(column_array(rows, "key"), return_index=True)
        new_rows = np.sort(first_rows[~np.isin(keys, known_keys)])
        known_keys = np.concatenate([known_keys, keys])
        log(
            "data",
            f"train: {len(data['train']):,} + {len(new_rows):,} {name}, which only the teacher "
            f"labels ({len(rows) - len(new_rows):,} equal to others left out)",
        )
        extra_rows = rows.select(new_rows).cast(data["train"].features)
        data["train"] = datasets.concatenate_datasets([data["train"], extra_rows])
    return data


# ── Option: other students ────────────────────────────────────────────────────────────────────────

BILSTM_WORDS = "own"  # MeCab's words in the training texts, or "teacher": the teacher's subwords
BILSTM_EMBEDDING = 300  # size of a word vector
BILSTM_HIDDEN = 300  # size of the LSTM's state, in each direction
BILSTM_LEARNING_RATE = 1e-3  # instead of LEARNING_RATE


def load_student_init(teacher_config):
    """Return the small pretrained model in STUDENT_INIT with a head for the teacher's labels.

    This is how ERNIE-Tiny is distilled. Raise Problem if it is not of the teacher's family.
    """
    config = load_config(STUDENT_INIT, "STUDENT_INIT")
    if config.model_type != teacher_config.model_type:
        raise Problem(
            f"STUDENT_INIT = {STUDENT_INIT!r}: is of the family {config.model_type!r}, the teacher "
            f"of {teacher_config.model_type!r}. Name a model of the teacher's family."
        )
    set_labels(config, teacher_config.label2id)
    return load_model(STUDENT_INIT, "STUDENT_INIT", config)


def load_student_tokenizer(tokenizer, data):
    """Return the student's tokenizer; Problem if it cannot be saved.

    It is the teacher's, that of STUDENT_INIT, or one whose tokens are the words of the data.
    """
    student_tokenizer = tokenizer
    if STUDENT == "bilstm":
        if BILSTM_WORDS == "own":
            student_tokenizer = make_word_tokenizer(data)
    elif STUDENT_INIT not in ("teacher", "random"):
        config = load_config(STUDENT_INIT, "STUDENT_INIT")
        student_tokenizer = load_tokenizer(STUDENT_INIT, config, "student")
        has_same_type = type(student_tokenizer) is type(tokenizer)
        if has_same_type and student_tokenizer.get_vocab() == tokenizer.get_vocab():
            student_tokenizer = tokenizer
        elif METHODS[METHOD].terms:
            raise Problem(
                f"STUDENT_INIT = {STUDENT_INIT!r}: its tokens are not the teacher's, as METHOD = "
                f"{METHOD!r} needs."
            )
    with as_problem(
        "the student's tokenizer cannot be saved",
        "Save it anew with a current transformers, and name it in TOKENIZER",
    ):
        student_tokenizer.save_pretrained(scratch_folder() / "tokenizer")
    return student_tokenizer


def use_student_ids(data):
    """Return the splits with the ids of the student's tokenizer, if it has one of its own."""
    new_data = {}
    for split, rows in data.items():
        own_names = [name for name in rows.column_names if name.startswith("student_")]
        new_names = {name: name.removeprefix("student_") for name in own_names}
        # token types go with the teacher's ids, even if the student's tokenizer makes none
        old_names = {*new_names.values(), "token_type_ids"} & {*rows.column_names}
        if new_names:
            rows = rows.remove_columns([*old_names]).rename_columns(new_names)
        new_data[split] = rows
    return new_data


def make_word_tokenizer(data):
    """Return a BertJapaneseTokenizer whose tokens are MeCab's words.

    They are those that occur more than once in the training texts. The others become [UNK], whose
    vector is thus trained.
    """
    mecab = MecabTokenizer(mecab_dic="unidic_lite")
    counts = Counter()
    splits = [data[split] for split in ("train", "unlabeled") if split in data]
    for rows, column in itertools.product(splits, text_columns()):
        for text in rows[column]:
            counts.update(mecab.tokenize(limit_characters(text)))
    frequent = sorted(word for word, count in counts.items() if count > 1)
    vocabulary = dict.fromkeys(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *frequent])

    log("student", f"its vocabulary: {len(vocabulary):,} words of {len(counts):,} in the texts")
    path = scratch_folder() / "vocab.txt"
    path.write_text("\n".join(vocabulary), "utf-8")
    return transformers.BertJapaneseTokenizer(
        str(path),
        do_subword_tokenize=False,
        word_tokenizer_type="mecab",
        mecab_kwargs={"mecab_dic": "unidic_lite"},
        model_max_length=MAX_LENGTH,
    )


class BiLSTM(transformers.PreTrainedModel):
    """An LSTM in each direction over the words of a text, a tanh layer and a classifier.

    The student of Tang et al. 2019 (arXiv:1903.12136).
    """

    config_class = transformers.PreTrainedConfig

    def __init__(self, config):
        super().__init__(config)
        self.embedding = torch.nn.Embedding(
            config.vocab_size, config.embedding_size, padding_idx=config.pad_token_id
        )
        self.lstm = torch.nn.LSTM(
            config.embedding_size, config.hidden_size, batch_first=True, bidirectional=True
        )
        self.dense = torch.nn.Linear(2 * config.hidden_size, config.hidden_size)
        self.classifier = torch.nn.Linear(config.hidden_size, config.num_labels)
        self.dropout = torch.nn.Dropout(config.dropout)
        self.post_init()

    def _init_weights(self, module):
        if isinstance(module, torch.nn.Embedding):  # all others keep torch's initialization
            torch.nn.init.normal_(module.weight, std=0.1)

    def get_input_embeddings(self):
        return self.embedding

    def set_input_embeddings(self, value):
        self.embedding = value

    def forward(self, input_ids, attention_mask=None, token_type_ids=None, labels=None):
        """Return logits (batch, classes).

        input_ids, attention_mask: (batch, length), padded at the end. token_type_ids play no part.
        """
        if attention_mask is None:
            attention_mask = torch.ones_like(input_ids)
        x = self.dropout(self.embedding(input_ids)).transpose(0, 1)  # (length, batch, embedding)
        positions, rows = (torch.arange(size, device=x.device) for size in x.shape[:2])
        last = attention_mask.sum(1) - 1

        # both directions end at the last word of a text; the padding stays behind it
        backwards = (last - positions[:, None]).clamp(min=0)
        forward_state = self.lstm_states(x, "")[last, rows]
        backward_state = self.lstm_states(x[backwards, rows], "_reverse")[last, rows]

        states = torch.cat([forward_state, backward_state], -1)
        hidden = self.dense(self.dropout(states)).tanh()
        logits = self.classifier(self.dropout(hidden))
        loss = None if labels is None else F.cross_entropy(logits, labels)
        return SequenceClassifierOutput(loss=loss, logits=logits)

    def lstm_states(self, x, direction):
        """Return the states of one direction, (length, batch, hidden).

        x: (length, batch, embedding). direction: "" or "_reverse", the end of the names that
        self.lstm gives its weights.
        In a training step of 32 texts, one direction of padded texts at a time is 1.7 times as fast
        as self.lstm over packed ones (x86).
        """
        names = "weight_ih_l0", "weight_hh_l0", "bias_ih_l0", "bias_hh_l0"
        weights = [getattr(self.lstm, name + direction) for name in names]
        zero = x.new_zeros(1, x.shape[1], self.config.hidden_size)
        if not torch.compiler.is_exporting():
            # with biases, 1 layer, no dropout, one direction, the length first
            options = True, 1, 0.0, self.training, False, False
            return torch.lstm(x, (zero, zero), weights, *options)[0]

        # torch.export would unroll torch.lstm for one length; it keeps a scan as a loop
        from torch._higher_order_ops.scan import scan

        weight_x, weight_h, bias_x, bias_h = weights

        def step(state, input_gates):
            hidden, cell = state
            gates = input_gates + F.linear(hidden, weight_h)
            input_gate, forget_gate, new_cell, output_gate = gates.chunk(4, -1)
            cell = forget_gate.sigmoid() * cell + input_gate.sigmoid() * new_cell.tanh()
            hidden = output_gate.sigmoid() * cell.tanh()
            return (hidden, cell), hidden.clone()

        start = zero[0], zero[0].clone()
        return scan(step, start, F.linear(x, weight_x, bias_x + bias_h))[1]


def build_bilstm(teacher, tokenizer, teacher_tokenizer):
    """Return a BiLSTM for the teacher's labels.

    With STUDENT_INIT = "teacher" its word vectors are the principal components of the teacher's,
    the mean over the subwords of a word.
    """
    config = transformers.PreTrainedConfig(
        vocab_size=len(tokenizer),
        embedding_size=BILSTM_EMBEDDING,
        hidden_size=BILSTM_HIDDEN,
        dropout=0.2,
        pad_token_id=tokenizer.pad_token_id,
        id2label=teacher.config.id2label,
        label2id=teacher.config.label2id,
    )
    transformers.set_seed(SEED)
    student = BiLSTM(config)
    if STUDENT_INIT == "teacher":
        vectors = word_vectors(teacher, tokenizer, teacher_tokenizer)
        vectors -= vectors.mean(0)
        components = torch.linalg.eigh(vectors.T @ vectors)[1].flip(1)  # largest first
        vectors = (vectors @ components)[:, :BILSTM_EMBEDDING]
        with torch.no_grad():
            student.embedding.weight[:, : vectors.shape[1]] = vectors * (0.1 / vectors.std())
    return student


def word_vectors(teacher, tokenizer, teacher_tokenizer):
    """Return, for each token of `tokenizer`, the mean of the teacher's vectors of its subwords."""
    teacher_vectors = teacher.get_input_embeddings().weight
    vectors = []
    for token_id, token in enumerate(tokenizer.convert_ids_to_tokens(range(len(tokenizer)))):
        ids = [token_id]
        if tokenizer is not teacher_tokenizer:
            ids = teacher_tokenizer(token, add_special_tokens=False)["input_ids"]
        vectors.append(teacher_vectors[ids or [teacher_tokenizer.unk_token_id]].mean(0))
    return torch.stack(vectors)


# STUDENT → a function of the teacher, the student's tokenizer and the teacher's. A student is a
# PreTrainedModel with get_input_embeddings, set_input_embeddings, and a forward from input_ids,
# attention_mask and, for pairs, token_type_ids to an output with logits.
STUDENTS = {"bert": build_student, "bilstm": build_bilstm}
OWN_CLASSES = {"BiLSTM": BiLSTM}  # classes of students that transformers does not have


# ── Option: other methods ─────────────────────────────────────────────────────────────────────────

LOSS_WEIGHTS = None  # of the terms of a METHOD, in the order of its class; None: the paper's
GENERATOR = None  # the model that rewrites texts; None: one is made of the teacher
MASK_RATE = 0.3  # the probability that a token of a rewritten text is replaced
GENERATOR_STEPS = 10  # steps of the generator, towards texts on which the student errs; then
STUDENT_STEPS = 100  # steps of the student; and so on
GENERATOR_LEARNING_RATE = 5e-7  # in the steps of the generator

PROJECTION_SIZE = 128  # of the vectors by which layers of teacher and student are compared
CRD_TEMPERATURE = 2.0  # of the contrast between the texts of a batch
GENERATOR_MAX_GRAD_NORM = 5.0
GENERATOR_WEIGHTS = {"KL": 0.5, "CRD": 0.5}  # of what the generator of CILDA maximizes
WARM_START_STEPS = 100  # in which a generator that is made here learns to fill in words
WARM_START_LEARNING_RATE = 5e-4


class HardLabelTrainer(CustomTrainer):
    """The loss is CE alone: METHOD "none", and the fine-tuning of a teacher."""

    learns_from = None

    def batch_loss(self, logits, batch):
        return F.cross_entropy(logits, batch["labels"], reduction="none").mean()


class LogitTrainer(CustomTrainer):
    """METHOD "mse": ALPHA * mean((z_S - z_T)²) + (1 - ALPHA) * CE (arXiv:1903.12136)."""

    learns_from = "model"

    def batch_loss(self, logits, batch):
        squares = F.mse_loss(logits, batch["teacher_logits"], reduction="none").mean(-1)
        return combine_with_cross_entropy(squares, logits, batch["labels"])


class MethodTrainer(CustomTrainer):
    """The base class of METHODs whose loss is a weighted sum of terms.

    CE    cross-entropy with the hard labels
    KL    from the teacher's probabilities to the student's, at T = 1
    RAIL, CRD, or another layer_term: layer_loss(teacher, student) of a subclass, of the layers,
          each side flattened and projected to (batch, PROJECTION_SIZE)
    ′     the same of rewritten texts. A masked-language model, GENERATOR or one made of the
          teacher, rewrites masked tokens. Every STUDENT_STEPS it is trained for GENERATOR_STEPS to
          rewrite them so that the student errs and, if the layer_term is CRD, the layers are hard
          to tell apart.

    Terms begin with CE and KL. In evaluation the loss has these only: they need just the text.
    """

    families = "bert", *ROBERTAS, "bart"
    learns_from = "model"
    softens = False
    paper_weights = ()  # of the terms, unless LOSS_WEIGHTS is set
    layer_term = None

    def set_up_method(self, teacher, tokenizer):
        self.teacher = teacher
        self.mask_token_id = tokenizer.mask_token_id
        special_ids = sorted({*tokenizer.all_special_ids} - {tokenizer.unk_token_id})
        self.special_ids = torch.tensor(special_ids)
        self.n_tokens = max(tokenizer.get_vocab().values()) + 1  # a model may have more rows
        self.run_id_parts = teacher, self.mask_token_id, special_ids, self.n_tokens
        self.weights = dict(zip(self.terms, LOSS_WEIGHTS or self.paper_weights, strict=True))
        self.needs_all_embeddings = self.rewrites = "KL′" in self.terms

        # sorted by length: less padding where texts are taken in order
        rows = self.train_dataset
        self.train_dataset = rows.select(np.argsort(column_array(rows, "length")))
        self.lengths = column_array(self.train_dataset, "length")

        # layers are compared as vectors of the same size
        config = teacher.config
        self.teacher_depth = getattr(config, "encoder_layers", config.num_hidden_layers)
        depths_and_models = (len(self.teacher_layers()), teacher), (NUM_LAYERS, self.model)
        transformers.set_seed(SEED)
        self.projections = torch.nn.ModuleList(
            torch.nn.Linear(depth * model.config.hidden_size, PROJECTION_SIZE, bias=False)
            for depth, model in depths_and_models
        )
        if self.layer_term in self.terms:  # on the texts themselves the teacher never changes
            self.train_dataset = self.with_teacher_layers(self.train_dataset)
        if self.rewrites:
            self.generator = load_generator(tokenizer) if GENERATOR else make_generator(self)
            self.adversary = torch.nn.ModuleList([self.generator, self.projections])
            self.generator_optimizer = torch.optim.AdamW(
                self.adversary.parameters(), GENERATOR_LEARNING_RATE, fused=True
            )

    def extra_state(self):
        if not self.rewrites:
            return {"projections": self.projections}
        return {"adversary": self.adversary, "generator_optimizer": self.generator_optimizer}

    def teacher_layers(self):
        """Return the numbers of the teacher's layers to compare with those of the student."""
        return np.arange(self.teacher_depth)

    def pool(self, inputs, states):
        """Return the states of a layer, (batch, length, hidden), as (batch, hidden)."""
        return states[:, 0]

    def create_optimizer(self, *args):
        optimizer = super().create_optimizer(*args)
        if self.layer_term in self.terms:
            weights = [*self.projections.parameters()]
            optimizer.add_param_group({"params": weights, "weight_decay": WEIGHT_DECAY})
        return optimizer

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        is_training = model.training
        if is_training and self.rewrites and self.state.global_step % STUDENT_STEPS == 0:
            for _ in range(GENERATOR_STEPS):
                self.generator_step(self.random_batch())
        losses, logits = self.losses(model, inputs, is_training and self.layer_term in self.terms)
        if is_training and self.rewrites:
            with torch.no_grad():
                rewritten = self.rewrite(inputs)
            with_layers = f"{self.layer_term}′" in self.terms
            rewritten_losses, _ = self.losses(model, inputs, with_layers, rewritten)
            losses |= {f"{term}′": loss for term, loss in rewritten_losses.items()}
        terms = self.terms if is_training else ("CE", "KL")
        loss = sum(self.weights[term] * losses[term] for term in terms)
        return (loss, SequenceClassifierOutput(logits=logits)) if return_outputs else loss

    def losses(self, model, inputs, with_layers, rewritten=None):
        """Return ({"CE": loss, "KL": loss, with_layers also the layer_term}, logits) of a batch.

        rewritten: see `rewrite`; None: the texts as they are.
        """
        pool = self.pool if with_layers else None
        logits, student_layers = forward_with_layers(model, inputs, pool, rewritten)
        soft_labels, teacher_layers = inputs["soft_labels"], inputs.get("teacher_layers")
        if rewritten is not None:
            teacher_logits, teacher_layers = forward_with_layers(
                self.teacher, inputs, pool, rewritten
            )
            soft_labels = F.softmax(teacher_logits, -1)
        labels = inputs["labels"]
        cross_entropy = F.cross_entropy(logits, labels, ignore_index=NO_LABEL, reduction="sum")
        kl = F.kl_div(F.log_softmax(logits, -1), soft_labels, reduction="batchmean")
        losses = {"CE": cross_entropy / len(logits), "KL": kl}
        if with_layers:
            teacher_layers = teacher_layers[:, self.teacher_layers()]
            project_teacher, project_student = self.projections
            losses[self.layer_term] = self.layer_loss(
                project_teacher(teacher_layers.flatten(1)),
                project_student(student_layers.flatten(1)),
            )
        return losses, logits

    def with_teacher_layers(self, rows):
        """Add the column teacher_layers, (layers, hidden) per text. It stays on disk, in CACHE."""
        keys = iter_batches(rows, "key")
        method = type(self)
        code = hash_of(forward_with_layers, method.pool, method.is_ordinary, make_collate_fn)
        parts = self.teacher, self.special_ids.tolist(), versions(), code, keys
        path = Path(CACHE, f"layers-{digest(*parts)}.arrow")
        if load_with_checksum(f"{path}.sum") != file_digest(path):
            log("teacher", f"one more pass, for METHOD = {METHOD!r}: its layers")

            @torch.inference_mode()
            def pooled_layers(batch):
                inputs = self.data_collator(rows_of(batch))
                _, layers = forward_with_layers(self.teacher, inputs, self.pool)
                return {"teacher_layers": layers.numpy()}

            columns = [*{"input_ids", "token_type_ids"} & {*rows.column_names}]
            new_rows = map_on_disk(
                rows.select_columns(columns), pooled_layers, batch_size=64, remove_columns=columns
            )
            os.replace(new_rows.cache_files[0]["filename"], path)
            save_with_checksum(f"{path}.sum", file_digest(path))
        layer_rows = datasets.Dataset.from_file(str(path))
        joined = datasets.concatenate_datasets([rows.flatten_indices(), layer_rows], axis=1)
        return joined.with_format("numpy", ["teacher_layers"], output_all_columns=True)

    def is_ordinary(self, inputs):
        """Return (batch, length): where there is neither padding nor a special token."""
        is_special = torch.isin(inputs["input_ids"], self.special_ids)
        return inputs["attention_mask"].bool() & ~is_special

    def generator_step(self, inputs):
        """Train the generator (and the projections) for one step."""
        rewritten = self.rewrite(inputs, differentiable=True)
        weights = GENERATOR_WEIGHTS if self.layer_term in GENERATOR_WEIGHTS else {"KL": 1.0}
        losses, _ = self.losses(self.model, inputs, self.layer_term in weights, rewritten)
        objective = sum(weight * losses[term] for term, weight in weights.items())
        (-objective).backward(inputs=[*self.adversary.parameters()])  # maximize
        clip_gradients(self.adversary, GENERATOR_MAX_GRAD_NORM)
        self.generator_optimizer.step()
        self.adversary.zero_grad()

    def rewrite(self, inputs, differentiable=False):
        """Return (positions, tokens): where the generator rewrites, and what it draws there.

        positions: (batch, length), bool. tokens: their ids, (positions,). If differentiable, rows
        of a straight-through Gumbel-softmax, (positions, vocabulary).
        """
        positions = self.mask(inputs)
        logits = token_logits(self.generator, inputs, positions, self.mask_token_id)
        logits = logits[:, : self.n_tokens]
        logits[:, self.special_ids] = -math.inf
        if differentiable:
            return positions, F.gumbel_softmax(logits, hard=True)

        # inverse transform sampling: one random number per position
        cdf = logits.softmax(-1).cumsum(-1)
        uniform = torch.rand(len(cdf), 1) * cdf[:, -1:] * (1 - 1e-6)  # stays below the last sum
        return positions, torch.searchsorted(cdf, uniform, right=True).flatten()

    def mask(self, inputs):
        """Return (batch, length): each ordinary token with the probability MASK_RATE."""
        positions = self.is_ordinary(inputs)
        n_ordinary = int(positions.sum())
        positions[positions.clone()] = torch.rand(n_ordinary) < MASK_RATE
        return positions

    def random_batch(self):
        """Return a random batch of training texts of similar length."""
        seed = int(torch.randint(2**31, []))
        order = length_grouped_order(self.lengths, BATCH_SIZE, seed)
        row_numbers = order[:BATCH_SIZE].tolist()
        return self.data_collator([self.train_dataset[number] for number in row_numbers])


class RailTrainer(MethodTrainer):
    """METHOD "rail": the distance of layers' mean states (arXiv:2109.10164)."""

    terms = "CE", "KL", "RAIL"
    paper_weights = 1 / 3, 1 / 3, 1 / 3
    layer_term = "RAIL"

    def teacher_layers(self):
        """They are drawn anew in each epoch, as many as the student has."""
        generator = np.random.default_rng([SEED, int(self.state.epoch or 0)])
        n_layers = min(NUM_LAYERS, self.teacher_depth)
        return np.sort(generator.choice(self.teacher_depth, n_layers, replace=False))

    def pool(self, inputs, states):
        is_counted = self.is_ordinary(inputs)
        is_counted[:, 0] |= ~is_counted.any(1)  # a text of special tokens only
        weights = is_counted / is_counted.sum(1, keepdim=True)
        return torch.einsum("bl,blh->bh", weights, states)

    def layer_loss(self, teacher, student):
        return (F.normalize(teacher) - F.normalize(student)).norm(dim=-1).mean()


class MateTrainer(MethodTrainer):
    """METHOD "mate": rewritten texts (arXiv:2105.05912)."""

    terms = "CE", "KL", "KL′"
    paper_weights = 1 / 3, 1 / 3, 1 / 3


class CildaTrainer(MethodTrainer):
    """METHOD "cilda": texts rewritten to make layers hard to tell apart (arXiv:2204.07674)."""

    terms = "CE", "KL", "CE′", "KL′"
    paper_weights = 0.333, 0.333, 0.222, 0.111
    layer_term = "CRD"

    def layer_loss(self, teacher, student):
        """How hard it is to find, by the cosine, the student's vector of the same text."""
        cosines = F.normalize(teacher) @ F.normalize(student).T
        return F.cross_entropy(cosines / CRD_TEMPERATURE, torch.arange(len(cosines)))


class CildaMinildTrainer(CildaTrainer):
    """METHOD "cilda+minild": the student, too, compares layers (言語処理学会 2023 Q3-2)."""

    families = "bert", *ROBERTAS
    terms = "CE", "KL", "CRD", "CE′", "KL′", "CRD′"
    paper_weights = 2 / 9, 2 / 9, 2 / 9, 1 / 6, 1 / 12, 1 / 12

    def layer_loss(self, teacher, student):
        """CRD over its value where nothing can be told apart, the logarithm of the batch size."""
        return super().layer_loss(teacher, student) / math.log(max(len(teacher), 2))


# METHOD → class of its trainer. Validation, and so early stopping, uses the same loss.
METHODS = {
    "none": HardLabelTrainer,
    "kd": CustomTrainer,
    "mse": LogitTrainer,
    "rail": RailTrainer,
    "mate": MateTrainer,
    "cilda": CildaTrainer,
    "cilda+minild": CildaMinildTrainer,
}


def forward_with_layers(model, inputs, pool=None, rewritten=None):
    """Return (logits, layers) of a batch, of which some tokens may be rewritten.

    pool: see `MethodTrainer.pool`; rewritten: see `MethodTrainer.rewrite`.
    layers: pooled states of each encoder layer, (batch, layers, hidden); None without pool.
    """
    arguments = model_inputs(inputs)
    if pool:
        arguments["output_hidden_states"] = True
    if rewritten:
        input_ids = arguments.pop("input_ids")
        embeds = rewritten_embeddings(model, input_ids, *rewritten)
        if model.config.model_type == "bart":
            arguments |= bart_arguments(model, input_ids, embeds, arguments["attention_mask"])
        else:
            arguments["inputs_embeds"] = embeds
    outputs = model(**arguments)
    if pool is None:
        return outputs.logits, None
    states = outputs.get("encoder_hidden_states") or outputs.get("hidden_states")
    layers = [pool(inputs, layer_states) for layer_states in states[1:]]  # 0: the embeddings
    return outputs.logits, torch.stack(layers, 1)


def rewritten_embeddings(model, input_ids, positions, tokens):
    """Return the embeddings of a batch with `tokens`, ids or rows of one-hots, at `positions`."""
    embedding = model.get_input_embeddings()
    if tokens.dim() == 1:
        return embedding(input_ids.masked_scatter(positions, tokens))
    embeds = embedding(input_ids).clone()
    scale = getattr(embedding, "embed_scale", 1)  # BART scales its embeddings
    embeds[positions] = tokens @ embedding.weight[: tokens.shape[1]] * scale
    return embeds


def bart_arguments(model, input_ids, embeds, attention_mask):
    """Return arguments that make BART's classifier, which takes no inputs_embeds, use `embeds`."""
    start_ids = torch.full_like(input_ids[:, :1], model.config.decoder_start_token_id)
    start_embeds = model.get_input_embeddings()(start_ids)
    encoder_outputs = model.model.encoder(
        inputs_embeds=embeds, attention_mask=attention_mask, output_hidden_states=True
    )
    return {
        "input_ids": input_ids,
        "encoder_outputs": encoder_outputs,
        "decoder_inputs_embeds": torch.cat([start_embeds, embeds[:, :-1]], 1),
    }


def token_logits(generator, inputs, positions, mask_token_id):
    """Return a masked-language model's logits at masked positions, (positions, vocabulary)."""
    arguments = model_inputs(inputs)
    arguments["input_ids"] = inputs["input_ids"].masked_fill(positions, mask_token_id)
    if not takes_token_types(generator.config):
        arguments.pop("token_type_ids", None)
    # the product with the vocabulary is by far the largest: it is computed at `positions` only
    output_layer = generator.get_output_embeddings()
    with output_layer.register_forward_pre_hook(lambda module, args: args[0][positions]):
        return generator(**arguments).logits


def make_generator(trainer):
    """Return a masked-language model made of the teacher's embeddings and lowest two layers.

    It is trained on the training texts for WARM_START_STEPS and kept in CACHE. Without that its
    head, which starts random, would write random words: the steps brought its loss on the masked
    words of 400 of JCM's test texts from 11.9 to 5.0.
    """
    teacher = trainer.teacher
    transformers.set_seed(SEED)
    generator = copy_with_layers(
        teacher,
        transformers.MODEL_FOR_MASKED_LM_MAPPING[type(teacher.config)],
        range(min(2, trainer.teacher_depth)),
        teacher.state_dict(),
    )
    methods = (getattr(type(trainer), name) for name in ("mask", "random_batch", "is_ordinary"))
    code = hash_of(make_generator, *methods, make_collate_fn)
    parts = teacher, SEED, trainer.mask_token_id, trainer.special_ids.tolist(), code
    keys = iter_batches(trainer.train_dataset, "key")
    weights = cached("generator", lambda: warm_start(generator, trainer), *parts, keys)
    generator.load_state_dict(weights)
    return generator.eval()


def warm_start(generator, trainer):
    """Train a generator to fill in masked words; return its weights."""
    log("generator", "no GENERATOR is set: made of the teacher's embeddings and lowest layers")
    weights = generator.train().parameters()
    optimizer = torch.optim.AdamW(weights, WARM_START_LEARNING_RATE, fused=True)
    for _ in progress_bar(range(WARM_START_STEPS), desc="generator"):
        batch = trainer.random_batch()
        positions = trainer.mask(batch)
        logits = token_logits(generator, batch, positions, trainer.mask_token_id)
        targets = batch["input_ids"][positions]
        loss = F.cross_entropy(logits, targets, reduction="sum") / max(1, len(logits))
        loss.backward()
        clip_gradients(generator, MAX_GRAD_NORM)
        optimizer.step()
        optimizer.zero_grad()
    return generator.state_dict()


def load_generator(teacher_tokenizer):
    """Return GENERATOR, a masked-language model with the teacher's vocabulary."""
    config = load_config(GENERATOR, "GENERATOR")
    tokenizer = load_tokenizer(GENERATOR, config, "GENERATOR")
    if tokenizer.get_vocab() != teacher_tokenizer.get_vocab():
        raise Problem(
            f"GENERATOR = {GENERATOR!r}: has {len(tokenizer):,} tokens, which are not the "
            f"teacher's {len(teacher_tokenizer):,}. Name a masked-language model of the teacher's "
            "vocabulary, or None."
        )
    with as_problem(f"GENERATOR = {GENERATOR!r}: cannot be loaded", "Name a masked-language model"):
        model, info = transformers.AutoModelForMaskedLM.from_pretrained(
            GENERATOR, dtype=torch.float32, output_loading_info=True, trust_remote_code=False
        )
    # from a classifier, the head for tokens would be random or, for BART, untrained
    architecture = str((config.architectures or [""])[0])
    if info["missing_keys"] or "Classification" in architecture:
        raise Problem(
            f"GENERATOR = {GENERATOR!r}: is no masked-language model but a "
            f"{architecture or 'part of one'}."
        )
    return model.eval()


# ── Option: what distillation was worth ───────────────────────────────────────────────────────────

BASELINE = False  # True: also train the same student on the hard labels alone, and compare


def train_baseline(student, data, collate_fn):
    """Train the student on the hard labels alone; return its history and predictions, a dict.

    predictions: {"val" and "test": what `predict` returns}. Return None if Ctrl-C stops it, and in
    every process but the first.
    student: as it was before its distillation. It becomes what METHOD "none" gives, but for the
    word vectors, which are fitted to the texts of UNLABELED and AUGMENT, too.
    """
    log("baseline", "the same student, from the same start, is trained on the hard labels alone")
    trainer = make_trainer(student, data, collate_fn, HardLabelTrainer, hides_words=True)
    try:
        history = train(trainer, Path(CACHE, "baseline_checkpoint.pt"), use_best_if_stopped=False)
    except KeyboardInterrupt:
        if world_size() > 1:
            raise
        log("baseline", "stopped by Ctrl-C: it is left out; run again to resume")
        return None
    if rank() != 0:
        return None
    predictions = {split: predict(trainer, data[split]) for split in ("val", "test")}
    return {"history": history, "predictions": predictions}


def evaluate_baseline(baseline, test):
    """Return {"baseline": its metrics, and what the student gains over it on test}.

    gain is in accuracy, gain_interval its 95 % interval. test: what `predict` returns.
    """
    predictions, history = baseline["predictions"], baseline["history"]
    student, alone = is_right(test, "student"), is_right(predictions["test"], "student")
    figures = {
        "splits": {name: compute_metrics(part, "student") for name, part in predictions.items()},
        "epochs": len(history),
        "best_epoch": best_epoch_of(history)["epoch"],
        "gain": (student - alone).mean().item(),
        "gain_interval": paired_interval(student, alone),
    }
    return {"baseline": figures}


def format_baseline(baseline):
    test = baseline["splits"]["test"]
    gain, low, high = (100 * value for value in (baseline["gain"], *baseline["gain_interval"]))
    return (
        f"Hard labels alone: accuracy {test['accuracy']:.4f}, agreement {test['agreement']:.4f}; "
        f"distillation is worth {gain:+.1f} points of accuracy ({low:+.1f} to {high:+.1f})."
    )


# ── Option: a cascade, in which the teacher answers where the student is unsure ───────────────────

CASCADE_KEEPS = 0.99  # share of the teacher's accuracy that the two together must keep
ASK_TEACHER = None  # in --predict: the probability up to which TEACHER is asked; "auto": as chosen


def evaluate_cascade(val, test):
    """Return how good and how fast student and teacher are together, a dict.

    The student answers every text. Where its probability is at most a threshold, the teacher
    answers instead. The threshold is the lowest at which val shows, with 95 % confidence, that the
    two keep CASCADE_KEEPS of the teacher's accuracy. The highest is tried first, then lower ones
    until one fails, so that none is chosen for its luck (Angelopoulos et al. 2021,
    arXiv:2110.01052). If val is too small to show it, it is the lowest that keeps as much on val.
    (The confidence is that of a normal approximation, and val has also chosen the best epoch.)

    val, test: what `predict` returns. The dict: threshold, 0 if the student needs no teacher;
    is_promised, whether val shows it; val_kept, the share of the teacher's accuracy on val, and
    val_kept_at_least, its bound at this threshold; on test, kept, share (of the texts that the
    teacher is asked), accuracy, agreement and speedup (over the teacher alone); and curve, lists of
    share, accuracy and speedup at every hundredth of the share. What is unknown is None.
    """
    val_curve, test_curve = cascade_curve(val), cascade_curve(test)
    # a threshold cannot separate texts of the same probability
    val_curve = val_curve.drop_duplicates("threshold", keep="last")
    val_teacher, test_teacher = (is_right(part, "teacher").mean().item() for part in (val, test))
    target = CASCADE_KEEPS * val_teacher - 1e-9
    is_sure = (val_curve["accuracy_at_least"] >= target)[::-1].cummin()[::-1]
    keeps = val_curve["accuracy"] >= target
    chosen = val_curve[is_sure if is_sure.any() else keeps].iloc[0]
    at_threshold = test_curve[test_curve["threshold"] <= chosen["threshold"]].iloc[-1]

    n_texts = len(test["labels"])
    n_asked = np.linspace(0, n_texts, min(n_texts, 100) + 1).round()
    points = test_curve[["share", "accuracy", "speedup"]].iloc[n_asked]
    return {
        "threshold": float(chosen["threshold"]),
        "is_promised": bool(is_sure.any()),
        "val_kept": ratio(chosen["accuracy"], val_teacher),
        "val_kept_at_least": ratio(chosen["accuracy_at_least"], val_teacher),
        **at_threshold[["share", "accuracy", "agreement", "speedup"]].to_dict(),
        "kept": ratio(at_threshold["accuracy"], test_teacher),
        "curve": points.to_dict("list"),
    }


def cascade_curve(outputs):
    """Return what the two are together if the teacher is asked 0, 1, … all texts, a table.

    Those of which the student is least sure come first. A row for each number of texts, with the
    columns threshold (the last text's probability), share, accuracy, accuracy_at_least (with 95 %
    confidence, if the teacher is as accurate as here), agreement and speedup.
    outputs: what `predict` returns.
    """
    seconds = outputs["seconds"]
    probability, answers = outputs["logits"]["student"].softmax(-1).max(-1)
    right, teacher_right = is_right(outputs, "student"), is_right(outputs, "teacher")
    agrees = answers == outputs["logits"]["teacher"].argmax(-1)
    probability, order = probability.sort(stable=True)

    def sums(values, values_if_asked):  # over all texts, if the first 0, 1, … are asked
        changes = values_if_asked.double() - values.double()
        return values.double().sum() + F.pad(changes[order].cumsum(0), (1, 0))

    n_texts = len(right)
    must_keep = CASCADE_KEEPS * teacher_right
    surplus, teacher_surplus = right - must_keep, teacher_right - must_keep
    surplus_at_least, _ = normal_interval(
        sums(surplus, teacher_surplus),
        sums(surplus.square(), teacher_surplus.square()),
        n_texts,
        factor=CASCADE_KEEPS,
        sigmas=1.645,  # one-sided
    )
    all_seconds = sums(seconds["student"], seconds["student"] + seconds["teacher"])
    teacher_seconds = seconds["teacher"].double().sum()  # 0: it ran elsewhere
    curve = {
        "threshold": F.pad(probability.double(), (1, 0)),
        "share": torch.arange(n_texts + 1.0, dtype=torch.float64) / n_texts,
        "accuracy": sums(right, teacher_right) / n_texts,
        "accuracy_at_least": surplus_at_least + must_keep.mean(),
        "agreement": sums(agrees, torch.ones_like(agrees)) / n_texts,
        "speedup": teacher_seconds / all_seconds,
    }
    table = pandas.DataFrame({name: values.tolist() for name, values in curve.items()})
    return table if teacher_seconds else table.assign(speedup=None)


def format_cascade(cascade):
    """Return the lines of the report about the cascade, with what it promises and keeps on test."""
    if cascade["threshold"] == 0:
        lines = ["Cascade: on val the student alone keeps enough."]
    else:
        line = (
            f"({cascade['share']:.1%} of test): accuracy {cascade['accuracy']:.4f}, agreement "
            f"{cascade['agreement']:.4f}"
        )
        if cascade["speedup"] is not None:
            line += f", {cascade['speedup']:.1f} times as fast as the teacher"
        lines = [
            f"Cascade: the teacher answers where the student's probability is at most "
            f"{cascade['threshold']:.6g}",
            line + ".",
        ]
    if cascade["val_kept"] is None or cascade["kept"] is None:  # the teacher is never right
        return lines
    promise = f"{100 * CASCADE_KEEPS:.4g}%"
    on_val = f"On val this keeps {cascade['val_kept']:.1%} of the teacher's accuracy"
    on_test = f"on test it keeps {cascade['kept']:.1%}"
    if not cascade["is_promised"]:
        return [*lines, f"{on_val}: val is too small to promise {promise}; {on_test}."]
    held = "held" if cascade["kept"] >= CASCADE_KEEPS - 1e-9 else "did not hold"
    return [
        *lines,
        f"{on_val}, with 95% confidence at least {promise};",
        f"{on_test}: the promise {held}.",
    ]


def plot_cascade(report, folder):
    """Draw accuracy and speed against the share of texts that the teacher is asked."""
    cascade = report["cascade"]
    curve = cascade["curve"]
    figure = Figure(figsize=(7, 4.2), layout="constrained")
    axes = figure.subplots()
    shares = [100 * share for share in curve["share"]]

    # line styles and colours (Okabe and Ito) that colour-blind readers can tell apart
    axes.plot(shares, curve["accuracy"], "-", color="#0072B2", label="accuracy of the two together")
    for role, style in ("teacher", ":"), ("student", "--"):
        accuracy = report[role]["splits"]["test"]["accuracy"]
        axes.axhline(accuracy, linestyle=style, color="black", label=f"{role} alone")
    label = f"threshold {cascade['threshold']:.6g}, chosen on val"
    point = 100 * cascade["share"], cascade["accuracy"]
    axes.plot(*point, "*k", markersize=16, label=label)
    axes.set(xlabel="texts of test that the teacher is asked, %", ylabel="accuracy on test")
    axes.grid(alpha=0.3)

    handles = axes.get_legend_handles_labels()[0]
    if cascade["speedup"] is not None:
        speed_axes = axes.twinx()
        style = {"color": "#D55E00", "linestyle": "-.", "label": "speed (right)"}
        handles += speed_axes.plot(shares, curve["speedup"], **style)
        speed_axes.set(ylabel="speed, times the teacher's", yscale="log")
        speed_axes.yaxis.set_major_formatter("{x:g}")
        speed_axes.yaxis.set_minor_formatter(LogFormatter())
    axes.legend(handles=handles, loc="lower center", bbox_to_anchor=(0.5, 1), ncols=3, fontsize=8)
    figure.savefig(folder / "cascade.png", dpi=150)


def load_asked_teacher(name, threshold, folder, student, student_tokenizer):
    """Return (model, tokenizer, threshold) of the teacher in `name`, for `ask_teacher`.

    threshold: from 0 to 1; None: the one in the report of `folder`, the student's. Raise Problem if
    it is that of a teacher who ran elsewhere, or if the teacher has other labels.
    """
    report = saved_report(folder)
    if threshold is None and report.get("settings", {}).get("SOFT_LABELS_COLUMN") is None:
        threshold = report.get("cascade", {}).get("threshold")
    is_number = isinstance(threshold, int | float) and not isinstance(threshold, bool)
    if not is_number or not 0 <= threshold <= 1:
        raise Problem(
            f"threshold (ASK_TEACHER) = {threshold!r}: must be a number from 0 to 1. Without one "
            f'(ASK_TEACHER = "auto") it is taken from {folder}/report.json, if that has one and '
            "the teacher's answers did not come from SOFT_LABELS_COLUMN."
        )
    name = normalize_path(os.fspath(name))
    config = load_config(name)
    labels, teacher_labels = student.config.label2id, config.label2id
    if labels.keys() != teacher_labels.keys():
        raise Problem(
            f"TEACHER = {name!r}: its labels ({short_list([*teacher_labels])}) are not those of "
            f"the student ({short_list([*labels])}). Name the teacher of this student."
        )
    max_length = min(student_tokenizer.model_max_length, max_tokens(config))
    tokenizer = load_tokenizer(TOKENIZER or name, config, max_length=max_length)
    return load_model(name, config=config), tokenizer, threshold


def ask_teacher(answers, texts, model, tokenizer, threshold):
    """Return the student's answers to texts; the teacher's, where the student is unsure.

    Each answer says who gave it: "by": "student" or "teacher".
    """
    answers = [{**answer, "by": "student"} for answer in answers]
    unsure = [number for number, answer in enumerate(answers) if answer["score"] <= threshold]
    encoded = encode_texts(tokenizer, [texts[number] for number in unsure])
    teacher_answers = label_scores(model, tokenizer, encoded)
    for number, teacher_answer in zip(unsure, teacher_answers, strict=True):
        answers[number] = {**teacher_answer, "by": "teacher"}
    return answers


# ── Option: the student as a graph for other programs ─────────────────────────────────────────────

EXPORTS = "pt2", "onnx", "onnx-int8"


class ExportGraph(torch.nn.Module):
    """The student as a function of tensors only, each (batch, length), to (batch, classes)."""

    def __init__(self, student):
        super().__init__()
        self.student = student

    def forward(self, input_ids, attention_mask, token_type_ids=None):
        # not all families take token types
        types = {} if token_type_ids is None else {"token_type_ids": token_type_ids}
        return self.student(input_ids=input_ids, attention_mask=attention_mask, **types).logits


@torch.no_grad()
def export(student, rows, collate_fn, report):
    """Write the student as EXPORT says into OUTPUT, and what was measured into its report.

    Each file is loaded again and classifies `rows`. No file is kept unless the graph's logits are
    within 1e-4 of the student's; those of 8-bit weights are not, and their accuracy is reported.
    """
    advice = "Choose another format, or None"
    write = export_pt2 if EXPORT == "pt2" else export_onnx
    with (
        replaced(OUTPUT) as folder,
        as_problem(f"EXPORT = {EXPORT!r}: failed, but the student is saved", advice),
        quiet_libraries(),
    ):
        shutil.copytree(OUTPUT, folder, dirs_exist_ok=True)
        graph = ExportGraph(student).eval()
        example = model_inputs(collate_fn([rows[number % len(rows)] for number in range(8)]))
        free = {0: torch.export.Dim("batch"), 1: torch.export.Dim("length", max=MAX_LENGTH)}
        options = {"kwargs": example, "dynamic_shapes": dict.fromkeys(example, free)}
        programs = {"eager": lambda inputs: graph(**inputs), **write(graph, options, folder)}

        figures = measure_programs(programs, rows, collate_fn, folder)
        if not figures[[*programs][1]]["difference"] <= 1e-4:  # the graph; NaN, too, is a fault
            raise ValueError("its logits differ from the student's")
        report["export"] = figures
        write_report(report, folder)


def export_pt2(graph, options, folder):
    """Write student.pt2; return {file name: function from inputs to logits}.

    options: of torch's exporters, for inputs with any batch size and length.
    """
    path = f"{folder}/student.pt2"
    torch.export.save(torch.export.export(graph, (), **options), path)
    program = torch.export.load(path).module()
    return {"student.pt2": lambda inputs: program(**inputs)}


def export_onnx(graph, options, folder):
    """Write student.onnx and, for "onnx-int8", student_int8.onnx; return as `export_pt2` does."""
    import onnxruntime
    from onnxruntime.quantization import quantize_dynamic

    program = torch.onnx.export(
        graph,
        (),
        **options,
        input_names=[*options["kwargs"]],
        output_names=["logits"],
        dynamo=True,  # the default from PyTorch 2.9 on
        verbose=False,
    )
    names = ["student.onnx"]
    program.save(f"{folder}/student.onnx")
    if EXPORT == "onnx-int8":
        names.append("student_int8.onnx")
        # ONNX Runtime has no 8-bit kernel for the two products with weights viewed by heads
        nodes = [node.name for node in program.model_proto.graph.node]
        quantize_dynamic(
            f"{folder}/student.onnx",
            f"{folder}/student_int8.onnx",
            per_channel=True,
            extra_options={"EnableSubgraph": True},
            nodes_to_exclude=[name for name in nodes if "bmm" in name],
        )
    settings = onnxruntime.SessionOptions()
    settings.intra_op_num_threads = torch.get_num_threads()

    def load(name):
        path, providers = f"{folder}/{name}", ["CPUExecutionProvider"]
        session = onnxruntime.InferenceSession(path, settings, providers=providers)

        def run_session(inputs):
            arrays = {key: tensor.numpy() for key, tensor in inputs.items()}
            return torch.from_numpy(session.run(None, arrays)[0])

        return run_session

    return {name: load(name) for name in names}


def measure_programs(programs, rows, collate_fn, folder):
    """Return {program: bytes, accuracy, difference (of logits), milliseconds_1, milliseconds_32}.

    Milliseconds are median and p95 per batch, of 1 and of 32 texts.
    """
    figures = {}
    labels = torch.tensor(rows["labels"][:])
    few_rows = rows.select(range(min(len(rows), 40)))
    for name, program in programs.items():  # in turn: their threads would compete
        file = Path(folder, "model.safetensors" if name == "eager" else name)
        figures[name] = {"bytes": file.stat().st_size}
        for batch_size, measured_rows in (1, few_rows), (32, rows):
            logits = []
            milliseconds = []
            for batch in DataLoader(measured_rows, batch_size, collate_fn=collate_fn):
                start = time.perf_counter()
                logits.append(program(model_inputs(batch)))
                milliseconds.append(1000 * (time.perf_counter() - start))
            # the first batch is a warm-up
            median, p95 = np.percentile(milliseconds[1:] or milliseconds, [50, 95])
            figures[name][f"milliseconds_{batch_size}"] = {"median": median, "p95": p95}

        logits = torch.cat(logits)
        if name == "eager":
            eager_logits = logits
        figures[name]["accuracy"] = (logits.argmax(-1) == labels).double().mean().item()
        figures[name]["difference"] = (logits - eager_logits).abs().max().item()
        one_text, many_texts = figures[name]["milliseconds_1"], figures[name]["milliseconds_32"]
        log(
            "export",
            f"{name:<17}{figures[name]['bytes']:11,} bytes, "
            f"accuracy {figures[name]['accuracy']:.4f}, "
            f"logits within {figures[name]['difference']:.0e}; "
            f"1 text {one_text['median']:.2f} ms (p95 {one_text['p95']:.2f}), "
            f"32 texts {many_texts['median']:.2f} ms (p95 {many_texts['p95']:.2f})",
        )
    return figures


@contextlib.contextmanager
def quiet_libraries():
    """Silence warnings and logs of torch.onnx about packages that are not needed."""
    import logging
    import warnings

    level = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(action="ignore"):
            yield
    finally:
        logging.disable(level)


# ── Option: from Python ───────────────────────────────────────────────────────────────────────────


def load_student(folder, teacher=None, threshold=None):
    """Return a function from texts to answers: [{"label": name, "score": probability}, …].

    folder: OUTPUT of a run. texts: a list of texts, or of pairs if the student was trained on
    pairs; the answers are in their order. Raise Problem if there is no complete student, or if an
    item is not a text.

    teacher: the folder or hub name of the teacher, who then answers where the student's score is
    at most `threshold`: from 0 to 1, or None for the one in report.json, which was chosen on val.
    Each answer then says who gave it: "by": "student" or "teacher".
    """
    answer_texts, _, _ = load_answerer(folder, teacher, threshold)

    def classify(texts):
        answers, _ = answer_texts([texts] if isinstance(texts, str) else list(texts))
        return answers

    return classify


def load_answerer(folder, teacher, threshold):
    """Return (function, tokenizer, texts per row); the arguments are those of `load_student`.

    The function: a list of texts, and the number of texts before them → answers, and for each text
    the number of its unknown tokens. Texts per row: 1 or 2, or None if the report does not tell.
    """
    if teacher is None and threshold is not None:
        raise Problem(f"threshold = {threshold!r}: needs a teacher to be asked; name it, too.")
    folder = normalize_path(os.fspath(folder))
    model, tokenizer = load_saved(folder)
    settings = saved_report(folder).get("settings", {})
    n_texts = None
    if "TEXT_PAIR_COLUMN" in settings:
        n_texts = 1 if settings["TEXT_PAIR_COLUMN"] is None else 2
    asked_teacher = None
    if teacher is not None:
        asked_teacher = load_asked_teacher(teacher, threshold, folder, model, tokenizer)

    def answer_texts(texts, n_before=0):
        encoded = encode_texts(tokenizer, texts, n_texts, n_before)
        answers = label_scores(model, tokenizer, encoded)
        if asked_teacher:
            answers = ask_teacher(answers, texts, *asked_teacher)
        return answers, encoded["unknown"]

    return answer_texts, tokenizer, n_texts


def load_saved(folder):
    """Return (model, tokenizer) of the student in `folder`."""
    folder = normalize_path(os.fspath(folder))
    with as_problem(f"{folder!r}: no student can be loaded from it", "Name the OUTPUT of a run"):
        forbid_outside_paths(folder)
        saved_config = json.loads(Path(folder, "config.json").read_text("utf-8"))
        options = {"dtype": torch.float32}
        model_class = OWN_CLASSES.get(saved_config["architectures"][0])
        if model_class is None:
            options["config"] = load_config(folder, "OUTPUT")
            model_class = classifier_class(options["config"])
        model, info = model_class.from_pretrained(folder, output_loading_info=True, **options)
        check_weights(repr(folder), model, info, is_complete=True)
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
        fit_to_model(tokenizer, model.config)
        tokenizer.model_max_length = min(tokenizer.model_max_length, max_tokens(model.config))
        # a first text, before several threads use it, clears options saved in tokenizer.json
        encode([["晴れ"]], tokenizer, tokenizer.model_max_length)
    return model.eval(), tokenizer


def encode_texts(tokenizer, texts, n_texts=None, n_before=0):
    """Return `encode` of a list of texts or of pairs of texts; Problem for anything else.

    n_texts: 1 or 2, what is accepted; None: what the first is. n_before: texts before these, which
    count in the message.
    """
    if not texts:
        return {"input_ids": [], "length": [], "unknown": []}
    if n_texts is None:
        n_texts = 1 if isinstance(texts[0], str) else 2
    rows = [(row,) if isinstance(row, str) else row for row in texts]
    for number, row in enumerate(rows, n_before + 1):
        is_row = isinstance(row, tuple | list) and len(row) == n_texts
        if not is_row or not all(isinstance(text, str) and is_encodable(text) for text in row):
            accepted = "a pair of texts (in --predict with one tab between)"
            raise Problem(
                f"text {number} is {texts[number - n_before - 1]!r:.60}: each must be "
                f"{accepted if n_texts == 2 else 'a single text'}, in valid UTF-8."
            )
    return encode(list(zip(*rows, strict=True)), tokenizer, tokenizer.model_max_length)


def label_scores(model, tokenizer, encoded):
    """Return {"label": name, "score": probability} for each of the texts."""
    scores, outputs = classify_encoded(model, tokenizer, encoded).softmax(-1).max(-1)
    labels = [model.config.id2label[output] for output in outputs.tolist()]
    rows = zip(labels, scores.tolist(), strict=True)
    return [{"label": label, "score": score} for label, score in rows]


def unknown_words(tokenizer, text):
    """Return the words that the vocabulary lacks; characters, if the tokenizer splits no words."""
    text = limit_characters(text)
    words = tokenizer.word_tokenizer.tokenize(text) if splits_words(tokenizer) else text
    return [
        word for word in dict.fromkeys(words) if tokenizer.unk_token in tokenizer.tokenize(word)
    ]


def show_predictions(texts):
    """Print a label and its probability for each text; without texts, for each line of stdin.

    With ASK_TEACHER also who gave it. Unknown words are named on standard error, each once.
    """
    teacher = threshold = None
    if ASK_TEACHER is not None:
        teacher = teacher_of_student(OUTPUT)
        threshold = None if ASK_TEACHER == "auto" else ASK_TEACHER
    with contextlib.redirect_stdout(sys.stderr):  # notes are not answers
        answer_texts, tokenizer, n_texts = load_answerer(OUTPUT, teacher, threshold)
    is_pair = n_texts == 2 or TEXT_PAIR_COLUMN is not None
    n_answered = 0
    named_words = set()
    for chunk in [texts] if texts else stdin_lines():
        # in groups, so that what comes before a line that is not UTF-8 is answered
        for _, lines in itertools.groupby(chunk, is_encodable):
            lines = [line.rstrip("\n") for line in lines]
            rows = [line.split("\t") if is_pair and "\t" in line else line for line in lines]
            answers, n_unknown = answer_texts(rows, n_answered)
            n_answered += len(rows)
            for line, answer, has_unknown in zip(lines, answers, n_unknown, strict=True):
                columns = [answer["label"], f"{answer['score']:.4f}"]
                if "by" in answer:
                    columns.append(answer["by"])
                print(*columns, sep="\t", flush=True)
                if has_unknown and len(named_words) < 100:
                    words = unknown_words(tokenizer, line.replace("\t", " "))
                    new_words = {*words} - named_words
                    named_words |= new_words
                    if new_words:
                        message = f"the student does not know {', '.join(sorted(new_words))}"
                        print(f"note      {message}", file=sys.stderr, flush=True)


def stdin_lines():
    """Yield lists of the lines of standard input: as many as have come."""
    if sys.stdin is None:
        raise Problem("--predict: there are no texts, and no standard input to read them from.")
    if not hasattr(sys.stdin, "buffer"):  # a notebook's, say
        yield list(sys.stdin)
        return
    utf_8 = codecs.getincrementaldecoder("utf-8-sig")("surrogateescape")
    decoder = io.IncrementalNewlineDecoder(utf_8, translate=True)
    part, rest = True, ""
    while part:
        part = sys.stdin.buffer.read1(1 << 16)
        *lines, rest = (rest + decoder.decode(part, final=not part)).split("\n")
        yield lines if part or not rest else [*lines, rest]


DEFAULT_TERM = {
    "teacher": "logits",
    "student": "logits",
    "loss": "kl",
    "weight": 1.0,
    "temperature": 1.0,
}


def distill(teacher, student, data, losses=({},), collate_fn=None):
    """Train a student of your own on a teacher of your own; return it as in its best epoch.

    teacher, student: modules that take columns of the data, without labels, as named arguments and
        return logits: a tensor, a tuple that begins with them, or a dict with "logits", such as
        the outputs of transformers. Each is given the columns that its forward names; all of them
        if that takes **arguments and the module is not one of transformers.
    data: {"train": rows, "val": rows}, Datasets or lists of dicts: input_ids, labels if there are
        any, and whatever else the models take. Columns of other things than numbers, lists of
        numbers or arrays are for a collate_fn only.
    losses: the terms of the loss, a dict each. What is not given is taken from DEFAULT_TERM.
        teacher, student: the name of an output or of a module ("labels" for the teacher: the hard
        labels); loss: a name in CUSTOM_LOSSES, or a function of the student's tensor, the
        teacher's and the temperature; weight; temperature. The named losses are means over the
        texts or, of tensors (texts, length, size), over the tokens that attention_mask keeps.
    collate_fn: rows → dict of tensors; by default `pad_columns`.

    A second call with the same models, data, losses, collate_fn and settings returns the student of
    the first, and one that was stopped goes on. Functions and classes of the calling script or
    notebook count by their code and by the values that they use; those of other files of the user
    by these files (`own_files`).

    EPOCHS, PATIENCE, LEARNING_RATE and so on are the constants of this file. Raise Problem for
    what does not fit.
    """
    terms = [DEFAULT_TERM | term for term in losses]
    for term in terms:
        is_known_loss = callable(term["loss"]) or term["loss"] in CUSTOM_LOSSES
        if term.keys() != DEFAULT_TERM.keys() or not is_known_loss:
            raise Problem(
                f"losses: {term}: accepted are {', '.join(DEFAULT_TERM)}; as loss "
                f"{', '.join(CUSTOM_LOSSES)} or a function."
            )
    if world_size() > 1:
        raise Problem("distill runs in one process.")
    splits = {split: as_dataset(rows, collate_fn is None) for split, rows in data.items()}
    normalize_paths()

    weights = *teacher.parameters(), *student.parameters()
    is_trained = [weight.requires_grad for weight in weights]
    run_id = hash_of(teacher.eval(), student.train(), is_trained, terms, collate_fn)
    with contextlib.ExitStack() as stack:
        refuse_faults(folder_faults(["CACHE"], stack))
        collate_fn = collate_fn or pad_columns
        training = {"learning_rate": LEARNING_RATE}
        trainer = make_trainer(student, splits, collate_fn, CustomLossTrainer, **training)
        trainer.run_id_parts = [run_id]
        trainer.terms = terms
        trainer.call_teacher = recording(teacher, {term["teacher"] for term in terms}, stack)
        trainer.call_student = recording(student, {term["student"] for term in terms}, stack)
        train(trainer, Path(CACHE, "distill.pt"))
    return student.eval()


def pad_columns(rows):
    """Return rows, dicts of numbers, lists or arrays, as a dict of tensors.

    Lists are padded at the end to the longest of these rows: labels with NO_LABEL, others with 0.
    Rows of input_ids without an attention_mask get one.
    """
    if "input_ids" in rows[0]:
        rows = [{"attention_mask": [1] * len(row["input_ids"]), **row} for row in rows]
    batch = {}
    for name in rows[0]:
        with as_problem(
            f"data: column {name!r} has a value that is no tensor",
            "Give numbers in every row, or a collate_fn",
        ):
            tensors = [torch.as_tensor(row[name]) for row in rows]
        longest = max(tensors, key=torch.numel)  # an empty list has another type
        tensors = [tensor.to(longest.dtype) for tensor in tensors]
        if longest.dim() == 0:
            batch[name] = torch.stack(tensors)
        else:
            padding = NO_LABEL if name == "labels" else 0
            batch[name] = pad_sequence(tensors, batch_first=True, padding_value=padding)
    return batch


def as_dataset(rows, only_numbers):
    """Return rows, a Dataset or a list of dicts, as a Dataset with the column length.

    only_numbers: without columns of anything but numbers, and lists of them.
    """
    if isinstance(rows, list):
        rows = datasets.Dataset.from_list(rows)
    rows = rows.with_format(None)
    if "length" not in rows.column_names:
        has_ids = "input_ids" in rows.column_names
        lengths = list(map(len, rows["input_ids"])) if has_ids else [1] * len(rows)
        rows = rows.add_column("length", lengths)
    columns = []
    for name, kind in rows.features.items():
        while hasattr(kind, "feature"):  # of the members of a list
            kind = kind.feature
        is_number = re.match("u?int|float|bool", str(getattr(kind, "dtype", "")))
        if is_number or not only_numbers:
            columns.append(name)
    return rows.select_columns(columns)


class CustomLossTrainer(CustomTrainer):
    """The loss is the weighted sum of terms, over the outputs of two models.

    `distill` sets its terms, and call_teacher and call_student, functions of `recording`.
    """

    best_by_accuracy = False  # there may be no labels, or labels that the terms do not learn

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        student_outputs = self.call_student(inputs)
        with torch.no_grad():
            teacher_outputs = self.call_teacher(inputs) | {"labels": inputs.get("labels")}
        loss = 0
        for term in self.terms:
            tensors = student_outputs.get(term["student"]), teacher_outputs.get(term["teacher"])
            shapes = [getattr(tensor, "shape", "no tensor") for tensor in tensors]
            needs_same_shape = term["loss"] in ("kl", "mse", "cosine")
            if "no tensor" in shapes or (needs_same_shape and shapes[0] != shapes[1]):
                raise Problem(
                    f"losses: {term}: the student's is {shapes[0]}, the teacher's {shapes[1]}. "
                    "Name outputs, or modules of model.named_modules(), that fit each other, or "
                    "give a function as loss."
                )
            function = term["loss"]
            if isinstance(function, str):
                function = CUSTOM_LOSSES[function]
                tensors = tokens_only(*tensors, inputs.get("attention_mask"))
            loss = loss + term["weight"] * function(*tensors, term["temperature"])
        if return_outputs:
            return loss, SequenceClassifierOutput(logits=student_outputs["logits"])
        return loss


def tokens_only(student, teacher, attention_mask):
    """Return the tensors, (texts, length, size), without padding: (tokens, size).

    teacher: may also be labels, (texts, length). Tensors of other shapes stay as they are.
    """
    shape = student.shape[:2]
    if student.dim() != 3 or teacher.shape[:2] != shape:
        return student, teacher
    if attention_mask is None or attention_mask.shape != shape:
        attention_mask = torch.ones(shape)
    is_token = attention_mask.bool()
    return student[is_token], teacher[is_token]


def kl_loss(student, teacher, temperature):
    student_log_probs = F.log_softmax(student / temperature, -1)
    teacher_probs = F.softmax(teacher / temperature, -1)
    return F.kl_div(student_log_probs, teacher_probs, reduction="batchmean") * temperature**2


def mse_loss(student, teacher, temperature):
    return F.mse_loss(student, teacher)


def cosine_loss(student, teacher, temperature):
    return 1 - F.cosine_similarity(student, teacher, dim=-1).mean()


def ce_loss(student, labels, temperature):
    return F.cross_entropy(student, labels)


# name → a function of the student's tensor, the teacher's and the temperature
CUSTOM_LOSSES = {"kl": kl_loss, "mse": mse_loss, "cosine": cosine_loss, "ce": ce_loss}


def recording(model, names, hooks):
    """Return a function from a batch to {name: tensor}: the model's outputs, and those of modules.

    names: of outputs, or of modules in model.named_modules(). hooks: an ExitStack, whose end
    removes the hooks from the modules.
    """
    modules = dict(model.named_modules())
    parameters = inspect.signature(model.forward).parameters
    takes_any = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values())
    takes_any = takes_any and not isinstance(model, transformers.PreTrainedModel)
    outputs = {}

    def record(name, output):
        outputs[name] = output if isinstance(output, torch.Tensor) else output[0]

    def recorder(name):
        return lambda module, args, output: record(name, output)

    def call(batch):
        outputs.clear()
        arguments = {}
        for name, value in model_inputs(batch).items():
            if name in parameters or (takes_any and name != "length"):
                arguments[name] = value
        output = model(**arguments)
        if isinstance(output, dict):
            outputs.update(output)
        else:
            record("logits", output)
        return outputs

    for name in names & modules.keys():
        hooks.enter_context(modules[name].register_forward_hook(recorder(name)))
    return call


# ── Settings: checks and command line ─────────────────────────────────────────────────────────────


def one_of(values):
    """Return the words for a choice of values, in the form of SETTING_RULES."""
    return " or ".join(map(repr, values))


# settings → what they accept, as messages say it and `is_accepted` reads it: values, ranges of
# numbers or keys of OTHER_RULES, with " or " between them
SETTING_RULES = {
    "TEACHER DATA STUDENT_INIT OUTPUT CACHE": "a path",  # or the name of something in its place
    "TEACHER_BASE TOKENIZER UNLABELED GENERATOR": "a path or None",
    "TEXT_COLUMN LABEL_COLUMN REPORT_TO": "a text",
    "TEXT_PAIR_COLUMN SOFT_LABELS_COLUMN": "a text or None",
    "TEACHER_EPOCHS EPOCHS PATIENCE BATCH_SIZE": "a whole number from 1",
    "GENERATOR_STEPS STUDENT_STEPS": "a whole number from 1",
    "NUM_LAYERS": "a whole number from 1 to 100",
    "BILSTM_EMBEDDING BILSTM_HIDDEN": "a whole number from 1 to 10000",
    "TEACHER_LEARNING_RATE LEARNING_RATE BILSTM_LEARNING_RATE": "a number above 0",
    "GENERATOR_LEARNING_RATE TEMPERATURE MAX_GRAD_NORM": "a number above 0",
    "WARMUP_STEPS WEIGHT_DECAY": "a number from 0",
    "AUGMENT": "a whole number from 0 or None",
    "REFIT_WORDS": "a whole number from 0",
    "MAX_LENGTH": "a whole number from 4",
    "SEED": "a whole number from 0 to 2147483648",
    "DROPOUT": "a number from 0 to 0.999 or None",
    "WORD_DROPOUT": "a number from 0 to 0.999",
    "ALPHA AUGMENT_REPLACE AUGMENT_MASK AUGMENT_NGRAM MASK_RATE": "a number from 0 to 1",
    "TRAIN_FRACTION": "a number above 0 up to 1",
    "CASCADE_KEEPS": "a number above 0 up to 0.999",  # all of it no number of texts could show
    "BASELINE": "True or False",
    "ASK_TEACHER": "None or 'auto' or a number from 0 to 1",
    "METHOD": one_of(METHODS),
    "LOSS_WEIGHTS": "None or a weight for each term of METHOD, CE's and KL's not both 0",
    "STUDENT": one_of(STUDENTS),
    "SCHEDULE": "'linear' or 'constant'",
    "BILSTM_WORDS": "'own' or 'teacher'",
    "EXPORT": one_of([None, *EXPORTS]),
    "INIT_LAYERS": "'first' or 'middle' or 'last' or 'spread' or NUM_LAYERS numbers like (0, 11)",
}
ACCEPTED = {name: words for names, words in SETTING_RULES.items() for name in names.split()}

PATH_SETTINGS = [name for name, words in ACCEPTED.items() if words.startswith("a path")]
COMMAND_LINE_SETTINGS = set()  # the settings that were given on the command line


def is_accepted(value, words):
    """Return whether a value is what these words, in the form of SETTING_RULES, say."""
    if " or " in words:
        return any(is_accepted(value, alternative) for alternative in words.split(" or "))
    if words in OTHER_RULES:
        return OTHER_RULES[words](value)
    number = re.fullmatch(r"a (whole )?number (from|above) (\S+)(?:(?: up)? to (\S+))?", words)
    if number is None:
        return repr(value) == words
    kinds, largest = ([int], sys.maxsize) if number[1] else ([int, float], sys.float_info.max)
    low, high = float(number[3]), float(number[4] or largest)
    is_excluded = number[2] == "above" and value == low
    return type(value) in kinds and low <= value <= high and not is_excluded


def is_name(value):
    return is_text(value) and "\0" not in value


def are_layers(value):
    return is_sequence(value, NUM_LAYERS, "a whole number from 0")


def are_loss_weights(value):
    """Without CE and KL there would be no validation loss."""
    n_terms = len(METHODS[METHOD].terms) if METHOD in METHODS else 0
    return is_sequence(value, n_terms, "a number from 0") and any(value[:2])


def is_sequence(value, length, words):
    has_length = isinstance(value, tuple | list) and len(value) == length
    return has_length and all(is_accepted(item, words) for item in value)


OTHER_RULES = {
    "a path": is_name,
    "a text": is_name,
    "NUM_LAYERS numbers like (0, 11)": are_layers,
    "a weight for each term of METHOD, CE's and KL's not both 0": are_loss_weights,
}


def read_command_line(argv):
    """Return ({setting: value} as given in `argv`, the texts after --predict or None)."""
    parser = argparse.ArgumentParser(
        description=__doc__.split("\nMap ")[0],
        allow_abbrev=False,
        argument_default=argparse.SUPPRESS,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--predict",
        nargs="*",
        action="extend",
        type=unmarked,
        metavar="TEXT",
        help="only run the student in OUTPUT: a label and its probability for each TEXT or, "
        "without any, for each line of standard input",
    )
    for title, comments in documented_settings().items():
        group = parser.add_argument_group(title)
        for name, comment in comments.items():
            group.add_argument(
                "--" + name.lower().replace("_", "-"),
                dest=name,
                type=functools.partial(parse_value, name),
                metavar="…",
                help=f"{comment} [{globals()[name]}]".replace("%", "%%"),
            )
    # argparse would take any text that begins with "-" for an option; a space before it helps
    not_option = r"^(?!(-h|--[a-z][a-z-]*(=.*)?)\Z)"
    argv = sys.argv[1:] if argv is None else argv
    argv = [re.sub(not_option, " ", argument, flags=re.DOTALL) for argument in argv]
    changes = vars(parser.parse_args(argv))
    return changes, changes.pop("predict", None)


def unmarked(argument):
    """Return an argument without the space that `read_command_line` puts before it."""
    return argument.removeprefix(" ")


def documented_settings():
    """Return {group: {name: comment}} for every setting, in the order of this file."""
    groups = defaultdict(dict)
    for line in SOURCE.splitlines():
        setting = re.fullmatch(r"([A-Z_]+) = .+?(?:  # (.+))?", line)
        if line.startswith("# "):
            title = line.strip("#─ ")
        elif setting and setting[1] in ACCEPTED:
            groups[title][setting[1]] = setting[2] or ""
    return groups


def parse_value(name, argument):
    """Return a value from the command line: a Python literal, fractions allowed, or a text."""
    text = value = unmarked(argument)
    with contextlib.suppress(ValueError, SyntaxError, ArithmeticError):
        decimals = re.sub(r"\b(\d+)/(\d+)\b", lambda pair: str(int(pair[1]) / int(pair[2])), text)
        value = ast.literal_eval(decimals)
    words = ACCEPTED[name]
    if is_accepted(text, words) and not is_accepted(value, words):  # a folder by the name of 2024
        return text
    return value


def normalize_paths():
    """Expand ~ in the settings that are paths and take a slash at the end away."""
    for name in PATH_SETTINGS:
        if isinstance(globals()[name], str):
            globals()[name] = normalize_path(globals()[name])


def normalize_path(path):
    path = re.sub(r"(?<=.)(/\.?)+$", "", os.path.expanduser(path))
    # a Mac may have written the name with the same letters in another form
    forms = path, unicodedata.normalize("NFC", path), unicodedata.normalize("NFD", path)
    return next(filter(os.path.exists, forms), path)


def check_settings(locks):
    """Raise one Problem for all faults of the settings and of the folders to write to.

    locks: an ExitStack, see `folder_faults`.
    """
    faults = [
        f"{name} = {globals()[name]!r}: must be {words}"
        for name, words in ACCEPTED.items()
        if not is_accepted(globals()[name], words)
    ]
    # if each is valid: do they go together?
    folders = ["CACHE", "OUTPUT"]
    if TEACHER_BASE is not None and not os.path.exists(str(TEACHER)):  # it will be made
        folders.append("TEACHER")
    refuse_faults(faults or [*folder_faults(folders, locks), *option_faults()])


def refuse_faults(faults):
    """Raise one Problem for all faults of settings, if there are any."""
    if faults:
        raise Problem("\n  ".join(["these settings must be put right:", *faults]))


def check_same_settings():
    """Raise Problem if the processes have different settings. Their folders may lie elsewhere."""
    settings = {name: globals()[name] for name in ACCEPTED}
    for name in PATH_SETTINGS:
        if settings[name] not in ("teacher", "random"):
            settings[name] = settings[name] is None
    check_same_in_all_processes(settings)


def option_faults():
    """Yield the faults of settings that do not go together."""
    columns = [*text_columns(), *soft_label_columns(), LABEL_COLUMN]
    if len({*map(canonical_name, columns)}) < len(columns) or "labels" in text_columns():
        yield (
            f"TEXT_COLUMN = {TEXT_COLUMN!r}, TEXT_PAIR_COLUMN = {TEXT_PAIR_COLUMN!r}, LABEL_COLUMN "
            f"= {LABEL_COLUMN!r}, SOFT_LABELS_COLUMN = {SOFT_LABELS_COLUMN!r}: must be different "
            "columns, and texts not in 'labels', which the script itself uses"
        )
    if STUDENT != "bert" and STUDENT_INIT not in ("teacher", "random"):
        yield f'STUDENT_INIT = {STUDENT_INIT!r}: of a {STUDENT!r} it must be "teacher" or "random"'
    packages = ("onnx", "onnxscript", "onnxruntime") if "onnx" in str(EXPORT) else ()
    missing = [name for name in packages if not importlib.util.find_spec(name)]
    if missing:
        yield f"EXPORT = {EXPORT!r}: needs more packages: pip install {' '.join(missing)}"
    if GENERATOR and "KL′" not in METHODS[METHOD].terms:
        methods = one_of([name for name, trainer in METHODS.items() if "KL′" in trainer.terms])
        yield f"GENERATOR = {GENERATOR!r}: does nothing without a METHOD of {methods}"
    if METHODS[METHOD].terms and (STUDENT != "bert" or world_size() > 1):
        yield f'METHOD = {METHOD!r}: needs STUDENT = "bert" and runs in one process only'
    if WORD_DROPOUT and (STUDENT != "bert" or METHODS[METHOD].terms):
        methods = one_of([name for name, trainer in METHODS.items() if not trainer.terms])
        yield f'WORD_DROPOUT = {WORD_DROPOUT}: needs STUDENT = "bert" and METHOD = {methods}'
    if not METHODS[METHOD].learns_from and (BASELINE or UNLABELED or AUGMENT):
        yield (
            f"METHOD = {METHOD!r}: does without the teacher: it is the BASELINE itself, and cannot "
            "learn from UNLABELED and AUGMENT, which only the teacher labels; leave these out, or "
            "choose another METHOD"
        )
    if SOFT_LABELS_COLUMN and METHODS[METHOD].learns_from == "model":
        yield (
            f"METHOD = {METHOD!r}: needs more of the teacher than the probabilities in "
            'SOFT_LABELS_COLUMN; "kd" and "none" do not'
        )
    if SOFT_LABELS_COLUMN and (AUGMENT or TEACHER_BASE):
        yield (
            "AUGMENT, TEACHER_BASE: with SOFT_LABELS_COLUMN no teacher is run, who would label "
            "the copies, or made"
        )


# ── Errors ────────────────────────────────────────────────────────────────────────────────────────


class Problem(Exception):
    """An error that the user can correct. It says what was found, what is accepted, what to do."""


@contextlib.contextmanager
def as_problem(what, advice):
    """Raise a library's error in this block as a Problem: what failed, the reason, what to do."""
    try:
        yield
    except (Problem, BrokenPipeError):
        raise
    except Exception as error:
        raise Problem(f"{what}: {reason(error)}. {advice}.") from error


def reason(error):
    """Return a library's message in one line, at most 400 characters of it."""
    error = error.__cause__ or error
    text = re.sub(r"\x1b\[[\d;]*m", "", str(error))  # colours
    text = " ".join(text.split()).rstrip(".:") or type(error).__name__
    return text if len(text) <= 400 else f"{text[:400]}…"


# ── Files and locks ───────────────────────────────────────────────────────────────────────────────

CACHE_MARK = """Signature: 8a477f597d28d172789f06886806bc55
# made by distill.py; can be deleted at any time
"""


def folder_faults(names, locks):
    """Return what is wrong with the folders to write to, a list. They, or their parents, are made.

    names: the settings that name them. locks: an ExitStack; until it ends, no other run can use
    these folders. The locks of a process that dies are released.
    """
    faults = []
    for name in names:
        value = globals()[name]
        folder = os.path.realpath(value)
        lock = Path(folder, "lock") if name == "CACHE" else Path(f"{folder}.distill_lock")
        try:
            if value.startswith("~"):
                raise OSError("no user of this name")
            fault = make_cache() if name == "CACHE" else replacement_fault(name)
            if not fault:
                locks.enter_context(filelock.FileLock(lock, blocking=False))
                locks.callback(lock.unlink, missing_ok=True)
        except filelock.Timeout:
            fault = "another run is using it (wait for its end)"
        except OSError as error:
            fault = f"cannot be written ({reason(error)})"
        if fault:
            faults.append(f"{name} = {value!r}: {fault}; name another")
    return faults


def make_cache():
    """Make the folder CACHE, with a mark that backups heed (bford.info/cachedir).

    Return why a folder that is there already cannot be CACHE; None if it can.
    """
    folder = Path(CACHE)
    folder.mkdir(parents=True, exist_ok=True)
    tempfile.TemporaryFile(dir=folder).close()
    mark = folder / "CACHEDIR.TAG"
    saved_mark = mark.read_text("utf-8", "replace") if mark.is_file() else ""
    if "distill.py" in saved_mark:
        return None
    # a run that was killed here may have left an empty mark
    foreign = foreign_files(folder, own_names=() if saved_mark else (mark.name,))
    if not foreign:
        mark.write_text(CACHE_MARK, "utf-8")
    return foreign


def replacement_fault(name):
    """Return why the folder of a setting must not be replaced, or None. Nothing has run so far."""
    folder = Path(os.path.realpath(globals()[name]))
    needed = {other: globals()[other] for other in PATH_SETTINGS if other != name}
    needed["the working folder"] = os.getcwd()
    if STUDENT_INIT in ("teacher", "random"):
        del needed["STUDENT_INIT"]
    inside = [other for other, path in needed.items() if path and is_inside(path, folder)]
    if inside:
        return f"is or contains {', '.join(inside)}"
    # the new folder is made beside it and then renamed
    folder.parent.mkdir(parents=True, exist_ok=True)
    tempfile.TemporaryFile(dir=folder.parent).close()
    if not os.path.exists(folder):  # Path.exists would raise PermissionError
        return None
    tempfile.TemporaryFile(dir=folder).close()
    if os.path.ismount(folder):
        return "is a mount point; a folder in it could be replaced"
    return foreign_files(folder, own_names=saved_report(folder).get("files", ()))


def foreign_files(folder, own_names):
    """Return what is wrong if files of others lie in a folder of distill.py; else None.

    Files that a Mac, a notebook or a killed run leaves everywhere do not count.
    """
    ignored = re.compile(r"\._.*|\.DS_Store|\.ipynb_checkpoints|.*\.distill_new")
    names = {name for name in os.listdir(folder) if not ignored.fullmatch(name)}
    foreign = sorted(names - {*own_names})
    return f"holds {short_list(foreign)}, not written by distill.py" if foreign else None


def is_inside(path, folder):
    """Return whether `path` is `folder` or lies in it.

    Names are not enough: on a Mac's disk, "Model" and "model" are the same folder, and so are "が"
    in one character and in two.
    """
    path, folder = Path(os.path.realpath(path)), Path(os.path.realpath(folder))
    parents = [path, *path.parents]
    if not os.path.exists(folder):
        return folder in parents
    return any(os.path.samefile(parent, folder) for parent in filter(os.path.exists, parents))


def saved_report(folder):
    """Return the report.json of a student, a dict; {} if there is none of distill.py."""
    with contextlib.suppress(OSError, ValueError):
        report = json.loads(Path(folder, "report.json").read_text("utf-8"))
        if isinstance(report, dict) and {"student", "settings"} <= report.keys():
            return report
    return {}


def scratch_folder():
    """Return the folder in CACHE for what only this process of this run needs."""
    folder = Path(CACHE, f"{rank()}-{os.getpid()}.distill_new")
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def clear_folders():
    """Remove what a killed run left half-written."""
    for path in Path(CACHE).glob("*.distill_new"):
        recover(path.with_suffix(""))
    recover(OUTPUT)
    if os.path.exists(TEACHER):  # it is made, and needs no lock any more
        Path(f"{os.path.realpath(TEACHER)}.distill_lock").unlink(missing_ok=True)


@contextlib.contextmanager
def replaced(path):
    """Yield the path of a new file or folder, which then takes the place of `path`.

    A kill leaves the whole old one or the whole new one.
    """
    recover(path)
    path = os.path.realpath(path)  # a link stays; what it points to is replaced
    new = Path(f"{path}.distill_new")
    try:
        yield new
        for written in filter(Path.is_file, [new, *new.rglob("*")]):
            with open(written, "rb") as file:
                os.fsync(file.fileno())
        if os.path.isdir(path):
            os.rename(path, f"{path}.distill_old")
        os.replace(new, path)
    finally:
        recover(path)


def recover(path):
    """Restore what a kill or a full disk inside `replaced` has left."""
    path = os.path.realpath(path)
    new, old = Path(f"{path}.distill_new"), Path(f"{path}.distill_old")
    if old.exists() and not os.path.exists(path):
        old.rename(path)
    for left in new, old:
        if left.is_dir():
            shutil.rmtree(left)
        left.unlink(missing_ok=True)


def save_with_checksum(path, content):
    """Write tensors and plain values with a checksum; a kill leaves the old file or the new one."""
    buffer = io.BytesIO()
    torch.save(content, buffer)
    with replaced(path) as new, open(new, "wb") as file:
        file.write(hashlib.sha256(buffer.getbuffer()).digest())
        file.write(buffer.getbuffer())


def load_with_checksum(path):
    """Return what `save_with_checksum` wrote; None if there is nothing, or it is damaged.

    No code in the file can run. A damaged file is reported.
    """
    if not os.path.isfile(path):
        return None
    content = Path(path).read_bytes()
    checksum, saved = content[:32], content[32:]
    with contextlib.suppress(Exception):  # a pickle of something else, with the right checksum
        if hashlib.sha256(saved).digest() == checksum:
            return torch.load(io.BytesIO(saved), weights_only=True)
    note(f"{path} is damaged: it is not used, and made anew")
    return None


def cached(kind, make, *parts):
    """Return make(), or what it gave in an earlier run. parts: all that it depends on."""
    path = Path(CACHE, f"{kind}-{digest(versions(), *parts)}.pt")
    content = load_with_checksum(path)
    if content is None:
        content = make()
        save_with_checksum(path, content)
    return content


def file_digest(path):
    """Return the SHA-256 of a file; "" if there is none."""
    if not os.path.isfile(path):
        return ""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def save_model(model, tokenizer, folder):
    """Write a model and its tokenizer into a new folder, a Path."""
    advice = "What was saved before is still there; the same command goes on from here"
    with as_problem(f"{folder} cannot be written", advice):
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        # transformers 4 takes a list of tokens by this name only, version 5 by both
        config = folder / "tokenizer_config.json"
        text = config.read_text("utf-8")
        old_name = '"additional_special_tokens": ['
        config.write_text(text.replace('"extra_special_tokens": [', old_name), "utf-8")


def forbid_outside_paths(folder):
    """Raise Problem if an index in `folder`, perhaps a stranger's, names files outside it."""
    for pattern in "*.index.json", "dataset_dict.json", "**/state.json":
        for index in Path(folder).glob(pattern):
            for name in tree_leaves(json.loads(index.read_text("utf-8"))):
                if {"..", "/"} & {*Path(str(name)).parts}:
                    raise Problem(
                        f"{index} names {name!r}, which is not in its folder and is not opened. "
                        "Correct or delete it."
                    )


def digest(*parts):
    """Return a short name for contents.

    Of a module it is the name of its weights and configuration, wherever it was loaded from; of an
    iterator that of all it yields; of any other value that of its repr.
    """
    state = hashlib.sha256()
    for part in parts:
        for content in part if isinstance(part, Iterator) else [part]:
            if isinstance(content, torch.nn.Module):
                for tensor in content.state_dict().values():
                    state.update(tensor.contiguous().flatten().view(torch.uint8).numpy())
                is_pretrained = isinstance(content, transformers.PreTrainedModel)
                content = content.config.to_dict() if is_pretrained else {}
                for name in "transformers_version", "_name_or_path":  # who saved it, and where
                    content.pop(name, None)
            state.update(repr(content).encode("utf-8", "surrogatepass"))
    return state.hexdigest()[:24]


# ── Processes: one, or several that share the work (torchrun, or accelerate with MPI) ─────────────


def join_processes():
    """Join the other processes, if torchrun or accelerate has started any."""
    with as_problem(
        "this process cannot reach the others",
        "If GLOO_SOCKET_IFNAME is set, it must be a network card of this machine (`ip addr` or, "
        "on a Mac, `ifconfig` lists them); --master_addr must be the address of the first machine",
    ):
        PartialState(cpu=True, timeout=timedelta(days=30))


def rank():
    """Return the number of this process. 0 alone reads and writes the caches, and prints."""
    return PartialState(cpu=True).process_index


def world_size():
    return PartialState(cpu=True).num_processes


def shard(items):
    """Return this process's share of a list or an array: every n-th item."""
    return items[rank() :: world_size()]


def on_main_process(function):
    """Return, in every process, what function() returns in process 0."""
    results = [function() if rank() == 0 else None]
    broadcast_object_list(results)
    return results[0]


def sum_over_processes(*values):
    """Return, in every process, a list: the sum of each value over all processes."""
    return [sum(column) for column in zip(*gather_object([values]), strict=True)]


def shares_of_steps(n_texts, batch_size):
    """Yield, for each step of an epoch, (this process's number of texts, the weight of its loss).

    Gradients are averaged over the processes. Weighting each process's loss by its share of the
    step's texts makes every text count equally.
    """
    for start in range(0, n_texts, batch_size):
        n_in_step = min(batch_size, n_texts - start)
        n_own = len(shard(range(n_in_step)))
        yield n_own, n_own * world_size() / n_in_step


def check_same_in_all_processes(contents):
    """Raise Problem if a value of the dict `content_of` differs between processes, by `digest`."""
    if world_size() == 1:
        return
    digests = gather_object([[*map(digest, contents.values())]])
    columns = zip(contents, *digests, strict=True)
    different = [what for what, *of_processes in columns if len({*of_processes}) > 1]
    if different:
        raise Problem(
            f"the processes differ in their {', '.join(different)}. Make them the same on all "
            "machines."
        )


# ── Main ──────────────────────────────────────────────────────────────────────────────────────────


def main(argv=None):
    """Run the command: exit status 0 if a student was saved, else 1 and one message.

    Settings from the command line count for this call only.
    """
    quiet_for_users()
    settings = {name: globals()[name] for name in ACCEPTED}
    program = "distill.py"
    try:
        changes, texts = read_command_line(argv)
        COMMAND_LINE_SETTINGS.update(changes)
        globals().update(changes)  # functions read a setting when they are called
        normalize_paths()
        if texts is not None:
            show_predictions(texts)
            return
        join_processes()
        with contextlib.ExitStack() as stack:
            if rank() > 0:  # only the first process prints
                program = f"distill.py, process {rank()}"
                stack.enter_context(contextlib.redirect_stdout(io.StringIO()))
            on_main_process(functools.partial(check_settings, stack))
            check_same_settings()
            on_main_process(clear_folders)
            log_processes()
            run()
            shutil.rmtree(scratch_folder())
    except Problem as problem:
        sys.exit(f"{program}: {problem}")
    except (KeyboardInterrupt, OSError, RuntimeError) as error:
        is_lost = world_size() > 1 and "onnection" in str(error)  # that to another process
        if isinstance(error, RuntimeError) and not is_lost:
            raise
        if isinstance(error, BrokenPipeError):
            # else Python would fail once more when it flushes standard output at its end
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        cause = "Ctrl-C" if isinstance(error, KeyboardInterrupt) else reason(error)
        sys.exit(
            f"{program}: stopped by {cause}. What was saved before is still there; the same "
            "command goes on from here."
        )
    finally:
        globals().update(settings)
        COMMAND_LINE_SETTINGS.clear()


def quiet_for_users():
    """Leave the console to distill.py: no logs and progress bars of libraries."""
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    datasets.logging.set_verbosity_error()
    datasets.disable_progress_bars()
    datasets.config.HF_UPDATE_DOWNLOAD_COUNTS = False  # it would report local files, too
    for stream in sys.stdout, sys.stderr:
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # for a terminal without Japanese


if __name__ == "__main__":
    main()
