"""distill.py: distil a fine-tuned Japanese BERT classifier into a one-layer student, on a CPU.

    python distill.py                            # use the settings below
    python distill.py --teacher DIR --data DIR   # change settings for one run
    python distill.py --predict "文章" …          # classify texts with the student
    python distill.py --help                     # list every setting

Reads   TEACHER, a fine-tuned BertForSequenceClassification, and DATA, labelled texts in the splits
        train, val and test. If both have their defaults and the TEACHER folder does not exist, a
        sample teacher is first trained on sample data (and kept in CACHE).
Writes  OUTPUT: the student, its tokenizer, a model card, report.json, predictions.csv, history.csv,
        loss.png and cascade.png.
        CACHE: the teacher's logits and the last checkpoint, from which the same command resumes a
        run that was stopped. CACHE can be deleted at any time.

Map     Settings · The run · Teacher · Student · Loss and trainer · Training · Report
            the whole method, in the order in which it runs
        Report files · Models and tokenizers · Data files · Labels · Token ids and batches ·
        Teacher cache · Trainer and checkpoints · Fast BERT · Copying layers · Word vectors
            supporting code
        Options: making a teacher · a teacher that ran elsewhere · less or more text · other
        students · other methods · what distillation was worth · a cascade · export · calling from
        Python; each section begins with the settings that only it reads
        Settings: checks and command line · Errors · Files and locks · Processes · Main
"""

import argparse
import ast
import codecs
import contextlib
import copy
import csv
import errno
import functools
import glob
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
import sysconfig
import tempfile
import threading
import time
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from types import CodeType, FunctionType, ModuleType

# what runs, read before the slow imports: the file may be edited while it runs
SOURCE = Path(__file__).read_text("utf-8")

if sys.version_info < (3, 11):  # noqa: UP036 (it would fail later, with a worse message)
    sys.exit(f"distill.py: needs Python 3.11 or newer; this is {platform.python_version()}")

try:
    import datasets
    import filelock
    import huggingface_hub
    import numpy as np
    import pyarrow.parquet
    import torch
    import torch.nn.functional as F
    import transformers
    from accelerate import DistributedDataParallelKwargs, PartialState
    from accelerate.utils import broadcast_object_list, gather_object
    from datasets.utils._dill import Pickler
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogFormatter
    from safetensors import safe_open
    from torch.nn.utils.rnn import pad_sequence
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
STUDENT_INIT = "teacher"  # initial weights: "teacher", "random", or a pretrained model's folder
INIT_LAYERS = "middle"  # layers to copy: "first", "middle", "last", "spread" or e.g. (0, 11)
DROPOUT = None  # in training ("bert" only); None: the teacher's. 0.0 was better on one data set
# Loss
METHOD = "kd"  # or "mse", "none" (hard labels only), "rail", "mate", "cilda", "cilda+minild"
ALPHA = 0.5  # weight of the soft labels (KL); the hard labels (CE) get 1 - ALPHA
TEMPERATURE = 2.0  # softens both distributions; raise it for an overconfident teacher
# Training
EPOCHS = 20  # at most; early stopping usually ends training sooner
PATIENCE = 3  # epochs without a lower validation loss before training stops
BATCH_SIZE = 32  # texts per step, over all processes
LEARNING_RATE = 1e-4  # higher than for a 12-layer BERT; lower it if the loss jumps
SCHEDULE = "linear"  # learning rate after the warm-up: "linear" (to 0 at EPOCHS) or "constant"
WARMUP_STEPS = 0.06  # warm-up steps; a value below 1 is a fraction of all steps
WEIGHT_DECAY = 0.01  # of AdamW, applied to weight matrices only
MAX_GRAD_NORM = 1.0  # gradients are clipped to this norm
SEED = 42  # the same seed gives the same student on the same machine
# Output
OUTPUT = "./distilled_model"  # folder of the student; an earlier student in it is replaced
CACHE = "./.distill_cache"  # folder of teacher logits and checkpoints
EXPORT = None  # also write the student as "pt2" (torch.export), "onnx" or "onnx-int8"
REPORT_TO = "none"  # "tensorboard", "wandb" or another tracker that transformers supports


# ── The run ───────────────────────────────────────────────────────────────────────────────────────


def run():
    """Distil the teacher into a student according to the settings, save it and print a comparison.

    Return the report, a dict (see README.md); None in every process but the first.
    """
    prepare_folders()
    log_processes()
    stage_seconds = {}

    with timed_stage("data", stage_seconds):
        teacher_name, teacher_recipe = find_teacher()  # recipe: how to make it; None if it exists
        config, label2id = load_teacher_config(teacher_name, teacher_recipe)
        tokenizer = load_tokenizer(TOKENIZER or config.name_or_path, config)
        preflight_checks(config, tokenizer)
        data, label2id = load_data(label2id)
        data |= load_extra_texts(data["train"], tokenizer)  # splits of their own, until labelled
        test_texts = data["test"]
        student_tokenizer = load_student_tokenizer(tokenizer, data)
        data = tokenize(data, tokenizer, student_tokenizer)
        collate_fn = make_collate_fn(tokenizer)

    if teacher_recipe:
        with timed_stage("making the teacher", stage_seconds):
            make_teacher(
                teacher_name, teacher_recipe, config, tokenizer, label2id, data, collate_fn
            )

    with timed_stage("soft labels", stage_seconds):
        teacher, teacher_info = load_teacher(teacher_name, config, label2id)
        n_labelled = len(data["train"])
        data = append_extra_texts(data)  # to train, after its labelled texts
        data = add_soft_labels(data, teacher, collate_fn)
        check_teacher(data["train"], list(label2id), was_made=bool(teacher_recipe))

    with timed_stage("student", stage_seconds):
        student = STUDENTS[STUDENT](teacher, student_tokenizer, tokenizer)
        refit_word_vectors(student, teacher, tokenizer, data["train"], collate_fn)  # only "bert"
        if student_tokenizer is not tokenizer:  # the teacher needs its token ids no longer
            data = use_student_ids(data)
            collate_fn = make_collate_fn(student_tokenizer)
        log_student(student, teacher)
        untrained = copy.deepcopy(student) if BASELINE else None
        trainer = make_trainer(student, data, collate_fn, METHODS[METHOD])
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
        test, names = predictions["test"], list(label2id)
        warn_if_one_label("student", "test", test["logits"].argmax(-1), test["labels"], names)
        results = {
            "splits": evaluate(predictions),
            "labels": evaluate_labels(test, names),
            "cascade": evaluate_cascade(predictions["val"], test),
            "baseline": baseline,
            "predictions": prediction_rows(test_texts, test, names),
        }
    run_info = {"teacher": teacher_info, "seconds": stage_seconds}
    report = save_results(trainer, student_tokenizer, history, results, run_info)
    print(format_report(report))
    if EXPORT:
        export(student, data["test"], collate_fn, report)
    log_end(stage_seconds)
    return report


# ── Teacher ───────────────────────────────────────────────────────────────────────────────────────


def add_soft_labels(data, teacher, collate_fn):
    """Add the teacher's outputs to every split of `data` and return the new splits.

    The new columns:
        teacher_logits   z_T, (classes,)
        soft_labels      softmax(z_T / T), (classes,). T is TEMPERATURE, or 1 for "rail", "mate"
                         and "cilda" (METHOD_TERMS), as in their papers
        teacher_seconds  this text's share of the time that the teacher took for its batch

    The teacher runs once per distinct text. Texts are identified by the column "key", a hash of
    their token ids; those in the cache, from any earlier run of this teacher, are skipped. With
    SOFT_LABELS_COLUMN it does not run at all.
    """
    if SOFT_LABELS_COLUMN:
        return add_given_soft_labels(data)
    code = code_of("run_teacher", "BertForSequenceClassification", "make_collate_fn")
    teacher_digest = digest(teacher, code)
    # otherwise answers of another teacher, or to other texts, would be cached under these keys
    check_same(
        "teachers, distill.py, or versions of Python, PyTorch or transformers", teacher_digest
    )
    for split, rows in data.items():
        check_same(f"texts or tokenizers (seen in {split})", iter_batches(rows, "key"))
    cache_path = Path(CACHE, f"teacher-{teacher_digest}.pt")  # named after its weights and code
    outputs = load_teacher_outputs(cache_path, n_classes=teacher.config.num_labels)

    # run the teacher on the texts that are not in the cache
    all_rows = datasets.concatenate_datasets(list(data.values()))
    keys, first_rows = np.unique(column_array(all_rows, "key"), return_index=True)
    is_new = ~np.isin(keys, outputs["key"].numpy())
    if is_new.any():
        new_rows = all_rows.select(np.sort(first_rows[is_new]))
        outputs = run_teacher(new_rows, teacher, collate_fn, outputs, cache_path)
    log("teacher", f"labelled {is_new.sum():,} texts; {(~is_new).sum():,} were in the cache")
    warn_if_timed_on_other_hardware(outputs, cache_path)

    # look up the teacher's outputs for every row, by key
    temperature = 1 if METHOD in METHOD_TERMS else TEMPERATURE
    soft_labels = F.softmax(outputs["logits"].double() / temperature, -1).float()
    order = torch.argsort(outputs["key"])
    sorted_keys = outputs["key"][order]

    def new_columns(batch):
        position = order[torch.searchsorted(sorted_keys, torch.tensor(batch["key"]))]
        return {
            "teacher_logits": outputs["logits"][position].numpy(),
            "soft_labels": soft_labels[position].numpy(),
            "teacher_seconds": outputs["seconds"][position].numpy(),
        }

    return {split: map_to_cache(rows, new_columns) for split, rows in data.items()}


@torch.inference_mode()
def timed_logits(model, loader):
    """Run `model` over `loader`; yield (batch, logits (batch, classes), seconds per batch)."""
    model.eval()
    for batch in loader:
        start = time.perf_counter()
        logits = model(**model_inputs(batch)).logits
        yield batch, logits, time.perf_counter() - start


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
    weights, layers = {}, range(NUM_LAYERS)
    if STUDENT_INIT != "random":
        weights, layers = source.state_dict(), layers_to_copy(source.config)
    transformers.set_seed(SEED)  # for weights that are not copied
    return copy_with_layers(source, model_class, layers, weights, DROPOUT)


# ── Loss and trainer ──────────────────────────────────────────────────────────────────────────────


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

    Its loaders keep soft_labels; the stock ones drop what is not an argument of the model. A new
    method overrides compute_loss and is registered in METHODS (and in METHOD_TERMS only if it is a
    MethodTrainer, whose loss is a weighted sum of terms).
    """

    needs_all_embeddings = False  # True: keep the embeddings of tokens that never occur in the data
    run_id_parts = ()  # what training depends on besides constants, data and `extra_state`

    def set_up_method(self, teacher, tokenizer):
        """Hook, called once before training: prepare what the method needs besides the student."""

    def extra_state(self):
        """Hook: what a checkpoint must hold besides the student, {name: module or optimizer}."""
        return {}

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        outputs = model(**model_inputs(inputs))
        loss = distillation_loss(outputs.logits, inputs["labels"], inputs["soft_labels"])
        return (loss, outputs) if return_outputs else loss

    def get_train_dataloader(self):
        """Batches of texts of similar length, in an order that depends on SEED and state.epoch."""
        lengths = column_array(self.train_dataset, "length")
        batch_size = self.args.train_batch_size
        order = length_grouped_order(lengths, batch_size, SEED + int(self.state.epoch or 0))
        batches = batches_of_this_process(order, batch_size)
        return DataLoader(self.train_dataset, batch_sampler=batches, collate_fn=self.data_collator)

    def get_eval_dataloader(self, eval_dataset=None):
        """Batches of validation texts, divided among the processes."""
        rows = self.eval_dataset if eval_dataset is None else eval_dataset
        return inference_loader(rows, self.data_collator, select_batches=shard)

    def get_test_dataloader(self, test_dataset):
        return inference_loader(test_dataset, self.data_collator)


# ── Training ──────────────────────────────────────────────────────────────────────────────────────


def train(trainer, checkpoint_path, use_best_if_stopped=True):
    """Train, and return the history: a list with one dict per epoch (see `train_epoch`).

    Training stops after EPOCHS, after PATIENCE epochs without a lower validation loss, or on Ctrl-C
    (which is re-raised if no epoch has finished, if use_best_if_stopped is False, or if there are
    several processes). trainer.model then has the weights of the epoch with the lowest one.

    Each epoch ends with a checkpoint. A run with the same settings, code, data and weights (its run
    id) resumes from it, with a bit-identical result.
    """
    n_epochs = int(trainer.args.num_train_epochs)
    run_id = training_run_id(trainer)
    with only_used_embeddings(trainer):  # embedding rows of unused tokens are out of the way
        checkpoint = start_or_resume(trainer, checkpoint_path, run_id)
        for epoch_record in checkpoint["history"]:  # replayed, to restore the early stopping
            record_epoch(trainer, epoch_record)

        try:
            while len(checkpoint["history"]) < n_epochs:
                if trainer.control.should_training_stop:  # set by EarlyStoppingCallback
                    log("training", "stopped early: the validation loss no longer improves")
                    break
                epoch_record = train_epoch(trainer, len(checkpoint["history"]) + 1)
                is_best = record_epoch(trainer, epoch_record)
                checkpoint = {  # a new dict: Ctrl-C must not leave it half-updated
                    "run_id": run_id,
                    "history": [*checkpoint["history"], epoch_record],
                    "best": copy_weights(trainer.model) if is_best else checkpoint["best"],
                    **training_state(trainer),  # state of the model, optimizer and schedule
                }
                if rank() == 0:
                    save_with_checksum(checkpoint_path, checkpoint)
        except KeyboardInterrupt:
            if not checkpoint["history"] or not use_best_if_stopped or world_size() > 1:
                raise
            log("training", "stopped by Ctrl-C: the best epoch so far is used; run again to resume")

        end_training(trainer)
        trainer.model.load_state_dict(checkpoint["best"])
        return checkpoint["history"]


def train_epoch(trainer, epoch):
    """Train for one epoch and validate; return its history entry, a dict."""
    # Reseeding in every epoch makes a resumed run identical to one that was never stopped. Each
    # process has its own seed, for its dropout.
    transformers.set_seed(SEED + epoch + 10_007 * rank())
    trainer.state.epoch = epoch
    start = time.perf_counter()
    model = trainer.model_wrapped.train()
    loader = trainer.get_train_dataloader()
    trainer.state.global_step = (epoch - 1) * len(loader)
    n_remaining = len(trainer.train_dataset)
    loss_sum = 0.0

    for batch in progress_bar(loader, desc=f"epoch {epoch}"):
        # Gradients are averaged over processes. Weighting each process's loss by its share of the
        # step's texts makes every text count equally. With one process the weight is 1.
        n_texts = min(n_remaining, trainer.args.train_batch_size)
        n_own_texts = len(shard(range(n_texts)))
        weight = n_own_texts * world_size() / n_texts
        learning_rate = trainer.lr_scheduler.get_last_lr()[0]

        loss = trainer.compute_loss(model, batch)
        trainer.accelerator.backward(loss * weight)
        clip_gradients(trainer.model, trainer.args.max_grad_norm)
        trainer.optimizer.step()
        trainer.lr_scheduler.step()
        trainer.optimizer.zero_grad()

        trainer.state.global_step += 1
        loss_sum += loss.item() * n_own_texts
        n_remaining -= n_texts
        if not math.isfinite(loss_sum) and world_size() == 1:
            break  # reported below; several processes must all take the same number of steps
    seconds = time.perf_counter() - start

    val_loss_sum, n_correct = validate(trainer)
    sums_by_process = gather_from_all((loss_sum, val_loss_sum, n_correct))
    loss_sum, val_loss_sum, n_correct = map(sum, zip(*sums_by_process, strict=True))
    raise_if_not_finite(loss_sum + val_loss_sum, epoch, trainer.args.learning_rate)
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
    loss_sum = 0.0
    n_correct = 0
    for batch in trainer.get_eval_dataloader():
        loss, outputs = trainer.compute_loss(model, batch, return_outputs=True)
        loss_sum += loss.item() * len(outputs.logits)
        labels = batch.get("labels")
        if labels is not None and labels.dim() == 1:
            n_correct += (outputs.logits.argmax(-1) == labels).sum().item()
        else:  # only when `distill` is called from Python: no labels, or one for each token
            n_correct = math.nan
    return loss_sum, n_correct


def record_epoch(trainer, epoch_record):
    """Report an epoch to the callbacks and print it; return whether it is the best so far.

    EarlyStoppingCallback compares the loss with state.best_metric but does not update it. That must
    be done here, after on_evaluate: if it were done before, no epoch would count as better; if it
    were not done, every epoch would, and training would never stop early.
    """
    metrics = {name.replace("val_", "eval_"): value for name, value in epoch_record.items()}
    trainer.state.epoch = epoch_record["epoch"]
    trainer.log(dict(metrics))  # log() adds to its argument
    trainer.control = trainer.callback_handler.on_evaluate(
        trainer.args, trainer.state, trainer.control, metrics
    )
    best_so_far = trainer.state.best_metric
    is_best = best_so_far is None or epoch_record["val_loss"] < best_so_far
    if is_best:
        trainer.state.best_metric = epoch_record["val_loss"]
    print_epoch(epoch_record, is_best)
    return is_best


# ── Report ────────────────────────────────────────────────────────────────────────────────────────


def predict(trainer, rows):
    """Return what both models answer to `rows`, a dict of tensors with one value per text.

    labels; logits and teacher_logits, (texts, classes); seconds and teacher_seconds, each text's
    share of the time for its batch. The student runs once over the rows. The teacher does not: its
    outputs are in the data.
    """
    teacher_logits = torch.tensor(column_array(rows, "teacher_logits"), dtype=torch.float32)
    logits = torch.empty_like(teacher_logits)
    seconds = torch.empty(len(rows))
    loader = trainer.get_test_dataloader(rows)
    next(timed_logits(trainer.model, loader))  # warm-up
    timed_batches = timed_logits(trainer.model, loader)
    for row_numbers, timed_batch in zip(loader.batch_sampler, timed_batches, strict=True):
        _, logits[row_numbers], batch_seconds = timed_batch
        seconds[row_numbers] = batch_seconds / len(row_numbers)
    return {
        "labels": torch.tensor(column_array(rows, "labels")),
        "logits": logits,
        "teacher_logits": teacher_logits,
        "seconds": seconds,
        "teacher_seconds": torch.tensor(column_array(rows, "teacher_seconds")),
    }


def evaluate(predictions):
    """Return {"teacher": {split: metrics}, "student": {split: metrics}}.

    The metrics: accuracy, macro_f1, agreement (share of texts on which a model predicts what the
    teacher does), kl (KL(teacher || model) at T = 1), seconds and texts_per_second.
    """
    metrics = {"teacher": {}, "student": {}}
    for split, outputs in predictions.items():
        labels, teacher_logits = outputs["labels"], outputs["teacher_logits"]
        metrics["teacher"][split] = compute_metrics(
            teacher_logits, labels, teacher_logits, outputs["teacher_seconds"]
        )
        metrics["student"][split] = compute_metrics(
            outputs["logits"], labels, teacher_logits, outputs["seconds"]
        )
    return metrics


def save_results(trainer, tokenizer, history, results, run_info):
    """Write OUTPUT, all of it or nothing, and return the report; results, run_info: see `run`."""
    best_epoch = min(history, key=lambda epoch_record: epoch_record["val_loss"])
    report = make_report(trainer.model, history, best_epoch, results, run_info)

    def write_files(folder):  # next to the model and the tokenizer
        report["student"]["bytes"] = os.path.getsize(folder / "model.safetensors")
        report["files"] = sorted({*os.listdir(folder), *REPORT_FILES})
        write_model_card(report, run_info["teacher"]["name"], splits_words(tokenizer), folder)
        write_history(history, folder)
        write_predictions(results["predictions"], folder)
        plot_losses(history, best_epoch, folder)
        plot_cascade(report, folder)
        write_report(report, folder)

    save_folder(OUTPUT, trainer.model, tokenizer, write_files)
    return report


# ──────────────────── Nothing below is needed to understand the method. ────────────────────


# ── Report files: console, table, plot, model card ────────────────────────────────────────────────

# the files that distill.py adds to a saved model and its tokenizer
REPORT_FILES = (
    "README.md",
    "cascade.png",
    "history.csv",
    "loss.png",
    "predictions.csv",
    "report.json",
)

MODEL_CARD = """---
{language}pipeline_tag: text-classification
library_name: transformers
---
# A small text classifier ({STUDENT}), distilled

Distilled from `{teacher}` on `{DATA}` by distill.py, with METHOD {METHOD}, ALPHA {ALPHA} and
TEMPERATURE {TEMPERATURE}; all settings are in report.json. It has its teacher's faults: measure it
on texts of your own before you rely on it.

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


def progress_bar(steps, **options):
    """Return `steps` with a progress bar on a terminal; only the first process shows it."""
    is_hidden = None if rank() == 0 else True  # None: hidden where there is no terminal
    return tqdm(steps, leave=False, disable=is_hidden, **options)


@contextlib.contextmanager
def timed_stage(name, stage_seconds):
    """Add the seconds that the block takes to `stage_seconds`, under `name`."""
    start = time.perf_counter()
    yield
    stage_seconds[name] = time.perf_counter() - start


def log_processes():
    """Say how many processes there are, and that accelerate needs MPI to start several."""
    if world_size() > 1:
        message = (
            f"{world_size()} processes share the teacher's texts and each batch of {BATCH_SIZE}"
        )
        log("note", message)
    elif "MASTER_PORT" in os.environ and "ACCELERATE_USE_CPU" in os.environ:
        log(
            "note",
            "accelerate starts one process on a CPU without --mpirun_hostfile; "
            "torchrun starts several",
        )


def log_student(student, teacher):
    print(student)
    log(
        "student",
        f"{student.num_parameters():,} parameters on {student.device}; the teacher has "
        f"{teacher.num_parameters():,}",
    )


def log_end(stage_seconds):
    stages = [f"{stage} {seconds:.1f}" for stage, seconds in stage_seconds.items()]
    log("seconds", ", ".join(stages))
    log("saved", f"{OUTPUT}: the student and {', '.join(REPORT_FILES)}")


def print_epoch(epoch_record, is_best):
    columns = (
        "{epoch:6d} {train_loss:12.4f} {val_loss:12.4f} {val_accuracy:14.4f} "
        "{learning_rate:12.1e} {seconds:9.1f}"
    )
    print(columns.format(**epoch_record), "best" if is_best else "", flush=True)


def make_report(student, history, best_epoch, results, run_info):
    """Return the report without what is known only once the student is saved."""
    teacher_info = run_info["teacher"]
    splits = results["splits"]
    teacher_test, student_test = splits["teacher"]["test"], splits["student"]["test"]
    report = {
        "teacher": {
            "parameters": teacher_info["parameters"],
            "bytes": teacher_info["bytes"],
            "splits": splits["teacher"],
            **results["labels"]["teacher"],
        },
        "student": {
            "parameters": student.num_parameters(),
            "bytes": None,  # known once it is saved
            "splits": splits["student"],
            **results["labels"]["student"],
        },
        "kept": ratio(student_test["accuracy"], teacher_test["accuracy"]),
        "speedup": ratio(teacher_test["seconds"], student_test["seconds"]),
        "epochs": len(history),
        "best_epoch": best_epoch["epoch"],
        "seconds": run_info["seconds"],
        "settings": {name: without_folders(globals()[name]) for name in ACCEPTED},
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "datasets": datasets.__version__,
        },
        "hardware": hardware(),
        "cascade": results["cascade"],
    }
    if results["baseline"]:
        report["baseline"] = results["baseline"]
    return report


def compute_metrics(logits, labels, teacher_logits, seconds):
    """Return the metrics of one model on one split, a dict (see `evaluate`). Add new ones here.

    All are written to report.json; `format_report` makes the printed table.
    logits, teacher_logits: (texts, classes); labels and seconds, the time for each: (texts,).
    """
    predicted = logits.argmax(-1)
    n_correct, n_texts, n_predicted = count_labels(labels, predicted, logits.shape[1])
    occurs = n_texts + n_predicted > 0
    f1 = 2 * n_correct[occurs] / (n_texts + n_predicted)[occurs]
    agreement = (predicted == teacher_logits.argmax(-1)).double().mean()
    log_probs, teacher_log_probs = logits.log_softmax(-1), teacher_logits.log_softmax(-1)
    kl = F.kl_div(log_probs, teacher_log_probs, reduction="batchmean", log_target=True)
    seconds = seconds.sum(dtype=torch.float64).item() or None  # 0: the teacher ran elsewhere
    return {
        "examples": len(labels),
        "accuracy": n_correct.sum().item() / len(labels),
        "macro_f1": f1.mean().item(),
        "agreement": agreement.item(),
        "kl": kl.item(),
        "seconds": seconds,
        "texts_per_second": ratio(len(labels), seconds),
    }


def count_labels(labels, predicted, n_classes):
    """Return (texts predicted correctly, texts, predictions) of each class, float64 tensors."""
    parts = labels[labels == predicted], labels, predicted
    return [torch.bincount(part, minlength=n_classes).double() for part in parts]


def ratio(numerator, denominator):
    """Return the quotient, or None where there is none: one of the two is unknown, or by zero."""
    return numerator / denominator if numerator is not None and denominator else None


def confusion_matrix(labels, predicted, n_classes):
    """Return (n_classes, n_classes) counts: row = label, column = prediction, as float64."""
    cells = torch.bincount(labels * n_classes + predicted, minlength=n_classes**2)
    return cells.view(n_classes, n_classes).double()


def evaluate_labels(outputs, names):
    """Return what both models do with each label: {role: {"labels": …, "confusion": …}}.

    outputs: what `predict` returns. names: the label names, by output.
    labels: {name: {precision, recall, f1, support}}. Precision is None if no text was given the
    label, recall if none has it, F1 if neither. confusion: {name: {predicted name: number of
    texts}}, without zeros.
    """
    results = {}
    for role, key in ("teacher", "teacher_logits"), ("student", "logits"):
        predicted = outputs[key].argmax(-1)
        counts = count_labels(outputs["labels"], predicted, len(names))
        labels = {}
        for name, n_correct, n_texts, n_predicted in zip(names, *counts, strict=True):
            labels[name] = {
                "precision": ratio(n_correct.item(), n_predicted.item()),
                "recall": ratio(n_correct.item(), n_texts.item()),
                "f1": ratio(2 * n_correct.item(), (n_texts + n_predicted).item()),
                "support": int(n_texts),
            }
        confusion = defaultdict(dict)
        pairs = Counter(zip(outputs["labels"].tolist(), predicted.tolist(), strict=True))
        for (label, answer), n_texts in sorted(pairs.items()):
            confusion[names[label]][names[answer]] = n_texts
        results[role] = {"labels": labels, "confusion": dict(confusion)}
    return results


def prediction_rows(texts, outputs, names):
    """Yield the lines of predictions.csv, of which the first is the header.

    texts: rows with the texts. outputs: what `predict` returns for them. names: by output.
    """
    header = ["text"]
    if TEXT_PAIR_COLUMN:
        header.append("text_pair")
    yield [*header, "label", "teacher", "teacher_probability", "student", "student_probability"]

    answers = []  # label and probability, of the teacher, then of the student
    for key in "teacher_logits", "logits":
        probabilities, predicted = outputs[key].softmax(-1).max(-1)
        answers += [[names[number] for number in predicted.tolist()]]
        answers += [[f"{probability:.4f}" for probability in probabilities.tolist()]]
    labels = [names[number] for number in outputs["labels"].tolist()]
    first_row = 0
    for part in iter_batches(texts, *text_columns()):
        part_texts = [part[column] for column in text_columns()]
        last_row = first_row + len(part_texts[0])
        rest = [column[first_row:last_row] for column in (labels, *answers)]
        yield from zip(*part_texts, *rest, strict=True)
        first_row = last_row


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


def format_report(report):
    """Return the report as a text table."""
    lines = [
        f"{'':<8} {'split':<6}{'accuracy':>9}{'macro F1':>10}{'agreement':>11}"
        f"{'seconds':>9}{'texts/s':>9}"
    ]
    for role in "teacher", "student":
        for split, metrics in report[role]["splits"].items():
            line = (
                f"{role:<8} {split:<6}{metrics['accuracy']:>9.4f}{metrics['macro_f1']:>10.4f}"
                f"{metrics['agreement']:>11.4f}"
            )
            if metrics["seconds"] is not None:
                line += f"{metrics['seconds']:>9.2f}{metrics['texts_per_second']:>9,.0f}"
            lines.append(line)
    sizes = []
    for role in "teacher", "student":
        if report[role]["parameters"] is not None:
            megabytes = report[role]["bytes"] / 1e6
            sizes.append(f"{role} {report[role]['parameters']:,} parameters, {megabytes:.1f} MB")
    lines.append("; ".join(sizes))
    lines += format_labels(report["student"]["labels"])

    if report["kept"] is None:
        lines.append("The teacher gets no text of test right.")
    else:
        lines.append(f"On test the student keeps {report['kept']:.1%} of the teacher's accuracy.")
    if report["speedup"] is not None:
        lines.append(
            f"The student is {report['speedup']:.1f} times as fast as the teacher (without "
            f"tokenization; {report['hardware']})."
        )
    if report["kept"] is not None:
        lines += format_cascade(report["cascade"])
    if "baseline" in report:
        lines.append(format_baseline(report))
    return "\n".join(lines)


def format_labels(labels):
    """Return the lines of a table of labels, or none if there are more than ten."""
    if len(labels) > 10:
        return []
    lines = ["student on test   precision   recall       F1   texts   label"]
    for name, figures in labels.items():
        cells = []
        for figure, width in ("precision", 27), ("recall", 9), ("f1", 9):
            value = figures[figure]
            cells.append(f"{'–' if value is None else format(value, '.4f'):>{width}}")
        lines.append(f"{''.join(cells)}{figures['support']:>8,}   {name}")
    return lines


def plot_losses(history, best_epoch, folder):
    """Draw the train and validation loss of each epoch into loss.png."""
    figure = Figure(figsize=(7, 4.2), layout="constrained")
    axes = figure.subplots()
    epochs = [epoch_record["epoch"] for epoch_record in history]

    # line styles and colours (Okabe and Ito) that colour-blind readers can tell apart
    for name, style, colour in ("train_loss", "o--", "#0072B2"), ("val_loss", "s-", "#D55E00"):
        losses = [epoch_record[name] for epoch_record in history]
        axes.plot(epochs, losses, style, color=colour, label=name.replace("_", " "))
    label = f"best: epoch {best_epoch['epoch']}"
    axes.plot(best_epoch["epoch"], best_epoch["val_loss"], "*k", markersize=16, label=label)

    axes.set(xlabel="epoch", ylabel=loss_formula())
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(folder / "loss.png", dpi=150)


def loss_formula():
    if METHOD == "kd":
        return f"loss = {ALPHA:g} KL + {1 - ALPHA:g} CE, T = {TEMPERATURE:g}"
    if METHOD == "mse":
        return f"loss = {ALPHA:g} MSE + {1 - ALPHA:g} CE"
    if METHOD == "none":
        return "loss = CE"
    return f"loss ({METHOD}; val: CE and KL only)"


def write_history(history, folder):
    lines = [",".join(history[0])]
    for epoch_record in history:
        lines.append(",".join(map(str, epoch_record.values())))
    (folder / "history.csv").write_text("\n".join(lines) + "\n", "utf-8")


def write_predictions(rows, folder):
    # with the BOM, by which Excel recognises UTF-8
    with open(folder / "predictions.csv", "w", encoding="utf-8-sig", newline="") as file:
        csv.writer(file).writerows(rows)


def write_model_card(report, teacher_name, is_japanese, folder):
    card = MODEL_CARD.format(
        **report["settings"],
        language="language: ja\n" if is_japanese else "",
        teacher=without_folders(teacher_name),
        table=format_report(report),
    )
    (folder / "README.md").write_text(card, "utf-8")


def write_report(report, folder):
    new = Path(folder, "report.json.distill_new")
    new.write_text(json.dumps(report, indent=2, ensure_ascii=False) + "\n", "utf-8")
    os.replace(new, folder / "report.json")


# ── Models and tokenizers: load and check ─────────────────────────────────────────────────────────

# the families of models that can be teachers
FAMILIES = "bert", "roberta", "bart", "electra", "deberta-v2", "modernbert", "distilbert"
# METHOD → the families it works with; a METHOD that is not named here works with all
METHOD_FAMILIES = {
    "rail": ("bert", "roberta", "bart"),
    "mate": ("bert", "roberta", "bart"),
    "cilda": ("bert", "roberta", "bart"),
    "cilda+minild": ("bert", "roberta"),
}


def classifier_class(config):
    """Return the class of a classifier of this family; for BERT the fast one of this file."""
    if config.model_type == "bert":
        return BertForSequenceClassification
    return transformers.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING[type(config)]


def load_teacher_config(teacher_name, teacher_recipe):
    """Return (config, label2id) of the teacher.

    If it is still to be made, or there is none: the config of the model to start from, and None.
    """
    if teacher_recipe:
        return load_config(teacher_recipe["base"], "TEACHER_BASE"), None
    if teacher_name is None:
        return load_config(STUDENT_INIT, "STUDENT_INIT"), None
    config = load_config(teacher_name)
    return config, config.label2id


def load_config(name, setting="TEACHER"):
    """Return the configuration of the model in the folder or hub repository `name`.

    setting: the setting that names the model. It decides what the model must be (Problem if it is
    not) and is named in messages.
    """
    refuse_missing_model(name, setting)
    with as_problem(
        f"{setting} = {name!r}: cannot be loaded",
        "Name a folder of model.save_pretrained, or a hub model",
    ):
        forbid_outside_paths(name)
        refuse_incomplete_config(name, setting)
        config = transformers.AutoConfig.from_pretrained(name, trust_remote_code=False)
        check_architecture(config, name, setting)
    if setting in ("TEACHER", "OUTPUT"):
        names = checked_label_names(config, f"{setting} = {name!r}: its config.json")
        config.id2label = dict(enumerate(names))
        config.label2id = {label: number for number, label in enumerate(names)}

    # Flags of how its last user wanted to run the model. They would slow it down, or change what
    # it returns.
    config.return_dict = True
    config.output_hidden_states = False
    config.output_attentions = False
    return config


def refuse_missing_model(name, setting):
    """Raise Problem if `name` is a path at which there is no model."""
    if os.path.isfile(name):
        raise Problem(
            f"{setting} = {name!r}: is a file; accepted is the folder of a model, such as "
            f"{os.path.dirname(name) or os.curdir!r}."
        )

    # a folder
    has_config = os.path.isfile(os.path.join(name, "config.json"))
    if os.path.exists(name) and not has_config:
        advice = "Save one into it with model.save_pretrained, or name another folder"
        checkpoints = sorted(glob.glob(f"{glob.escape(name)}/checkpoint-*/config.json"))
        if checkpoints:
            folders = [os.path.dirname(path) for path in checkpoints]
            advice = f"Name one of its checkpoints: {short_list(folders)}"
        if os.path.isfile(os.path.join(name, "adapter_config.json")):
            advice = (
                "It is a PEFT adapter: merge it into its base model first, with "
                "model.merge_and_unload().save_pretrained(folder)"
            )
        raise Problem(
            f"{setting} = {name!r}: holds no model (there is no config.json in it). {advice}."
        )
    if os.path.isdir(name):
        return

    # no file or folder: perhaps a hub name
    if looks_like_path(name):
        advice = {
            "TEACHER": "Put your fine-tuned model there, name its folder, or set TEACHER_BASE to "
            "have a teacher fine-tuned",
            "STUDENT_INIT": 'Accepted are "teacher", "random", a folder or a hub name',
        }
        raise Problem(
            f"{setting} = {name!r}: no such folder. "
            f"{advice.get(setting, 'Name a folder or a hub model')}."
        )


def looks_like_path(name):
    """Whether a name can only be a path, not that of a hub repository."""
    return name.startswith((".", "~", os.sep)) or name.count("/") > 1


def refuse_incomplete_config(name, setting):
    """Raise Problem if the config.json in a folder lacks the kind of the model, or its labels."""
    path = os.path.join(name, "config.json")
    if not os.path.isfile(path):  # of a hub model, which others have loaded before
        return
    saved = json.loads(Path(path).read_text("utf-8"))
    if isinstance(saved, dict) and "model_type" not in saved:
        raise Problem(
            f'{setting} = {name!r}: its config.json has no "model_type", as before transformers '
            '2.2. Write "model_type": "bert" into it, if it is a BERT.'
        )
    weights = os.path.join(name, "model.safetensors")
    if setting == "TEACHER" and "id2label" not in saved and os.path.isfile(weights):
        n_outputs = 2  # what transformers assumes
        problem = as_problem(f"{setting} = {name!r}: cannot read {weights}", weights_advice)
        with problem, safe_open(weights, "pt") as file:
            for key in file.keys():  # noqa: SIM118 (it is no dict)
                if key in ("classifier.weight", "classifier.out_proj.weight"):
                    n_outputs = file.get_slice(key).get_shape()[0]
        if n_outputs != 2:
            names = ", ".join(f'"{number}": "…"' for number in range(min(n_outputs, 3)))
            raise Problem(
                f"{setting} = {name!r}: it has {n_outputs} outputs, but its config.json does not "
                f'name its labels. Write "id2label": {{{names}}} into it, with a name for each.'
            )


def check_architecture(config, name, setting):
    """Raise Problem if a model is not what `setting` needs: its family, its head, its outputs."""
    architecture = str((config.architectures or ["?ForSequenceClassification"])[0])
    n_outputs = config.num_labels
    families = METHOD_FAMILIES.get(METHOD, FAMILIES)
    if setting.startswith("TEACHER") and config.model_type not in families:
        raise Problem(
            f"{setting} = {name!r}: is of the family {config.model_type!r}; METHOD = {METHOD!r} "
            f"accepts {', '.join(families)}."
        )
    if setting == "TEACHER" and not architecture.endswith("ForSequenceClassification"):
        raise Problem(
            f"TEACHER = {name!r}: is a {architecture}; accepted is a fine-tuned "
            "…ForSequenceClassification. To fine-tune this model first, name it in TEACHER_BASE."
        )
    chooses_one_label = config.problem_type in (None, "single_label_classification")
    if setting == "TEACHER" and (n_outputs < 2 or not chooses_one_label):
        raise Problem(
            f"TEACHER = {name!r}: {n_outputs} output(s), {config.problem_type or 'regression'}; "
            "accepted is a classifier that chooses one of two or more labels."
        )


def checked_label_names(config, where):
    """Return the label names of a classifier, one for each output: those of id2label.

    Raise Problem if label2id contradicts them. A label2id with other names (LABEL_0, … from before
    the names were set), with its numbers as strings, or from number to name, does not contradict.
    If id2label has only LABEL_0, …, the names of label2id are taken.
    """
    outputs = range(config.num_labels)
    names = [str(config.id2label.get(number)) for number in outputs]
    if set(config.id2label) != set(outputs) or len(set(names)) < len(names):
        entries = short_list([f"{number}: {label}" for number, label in config.id2label.items()])
        raise Problem(
            f"{where} needs a different name in id2label for each of the outputs 0 to "
            f"{len(outputs) - 1}; it has {entries}."
        )
    label2id = {str(name): str(number) for name, number in (config.label2id or {}).items()}

    # only label2id has names
    has_default_names = names == [f"LABEL_{number}" for number in outputs]
    if has_default_names and not label2id.keys() & set(names):
        name_of = {number: name for name, number in label2id.items()}
        if set(name_of) == {str(number) for number in outputs}:
            return [name_of[str(number)] for number in outputs]

    # both have names: every entry must agree, read as name → number or as number → name
    output_of = {name: str(number) for number, name in enumerate(names)}
    straight = [output_of[name] == number for name, number in label2id.items() if name in output_of]
    turned = [output_of[name] == number for number, name in label2id.items() if name in output_of]
    is_consistent = (straight and all(straight)) or (turned and all(turned))
    if (straight or turned) and not is_consistent:
        id2label_entries = short_list([f"{number}: {name}" for number, name in enumerate(names)])
        label2id_entries = short_list([f"{name}: {number}" for name, number in label2id.items()])
        raise Problem(
            f"{where} contradicts itself: id2label has {id2label_entries}, label2id "
            f"{label2id_entries}. Correct the one that is wrong; id2label is what pipelines print."
        )
    return names


def set_labels(config, label2id):
    """Make a model of this config choose one of these labels, whatever it was before."""
    config.problem_type = "single_label_classification"
    config.label2id = label2id
    config.id2label = {number: label for label, number in label2id.items()}


def takes_token_types(config):
    """Whether a model distinguishes the texts of a pair by token types: BERT does, RoBERTa not."""
    return (getattr(config, "type_vocab_size", 0) or 0) > 1


def max_tokens(config):
    """Return the largest number of tokens that a model takes."""
    offset = config.pad_token_id + 1 if config.model_type == "roberta" else 0
    return getattr(config, "max_position_embeddings", 10**9) - offset


# (vocabulary size, hidden size) of a Japanese BERT → the models that may be its base
KNOWN_BASES = {
    (32768, 768): "tohoku-nlp/bert-base-japanese-v3 or -v2 (both need: pip install unidic-lite)",
    (32768, 1024): "tohoku-nlp/bert-large-japanese-v2 or bert-large-japanese (unidic-lite)",
    (32000, 768): "tohoku-nlp/bert-base-japanese-whole-word-masking (needs: pip install ipadic)",
    (7027, 768): "tohoku-nlp/bert-base-japanese-char-v3 (needs: pip install unidic-lite)",
    (6144, 768): "tohoku-nlp/bert-base-japanese-char-v2 (needs: pip install unidic-lite)",
    (4000, 768): "tohoku-nlp/bert-base-japanese-char (needs: pip install ipadic)",
}


def load_tokenizer(name, config, role="teacher", max_length=None):
    """Return the tokenizer in `name`; Problem if it does not fit the model.

    config: of the model whose texts it tokenizes. role: what messages call this model.
    max_length: instead of MAX_LENGTH.
    """
    max_length = max_length or MAX_LENGTH
    advice = "Save the one that the model was made with into its folder"
    if role == "teacher":
        advice = "Set TOKENIZER to the one that the teacher was fine-tuned with"
        base = KNOWN_BASES.get((config.vocab_size, getattr(config, "hidden_size", None)))
        if base and config.model_type == "bert":
            advice += (
                f". With a vocabulary of {config.vocab_size} it may be that of {base}; the "
                "teacher's accuracy on train shows whether it is right"
            )
    if os.path.exists(name) and not has_tokenizer(name):
        # transformers would make an empty one, silently
        base = base_with_tokenizer(name)
        if base is None:
            raise Problem(
                f"{name!r} holds no tokenizer (model.save_pretrained saves none). {advice}."
            )
        log(
            "data",
            f"{name} holds no tokenizer; that of {base} is used, from which the model was made "
            "according to its config.json (_name_or_path)",
        )
        name = base
    with as_problem(
        f"the tokenizer in {name!r} cannot be loaded",
        lambda reason: missing_package_advice(reason) or advice,
    ):
        saved_config = get_tokenizer_config(name)
        forbid_outside_dictionaries(saved_config)
        tokenizer = transformers.AutoTokenizer.from_pretrained(name, trust_remote_code=False)
        fit_to_model(tokenizer, config)
        # encode something now, rather than fail once all data is read
        encode([["晴れ time"]] * len(text_columns()), tokenizer, max_length)
    check_vocabulary(tokenizer, name, config, role, advice)
    limit = max_tokens(config)
    if limit < max_length:
        raise Problem(f"MAX_LENGTH = {max_length}: the {role} takes at most {limit} tokens.")
    tokenizer.model_max_length = max_length
    if role == "teacher":
        warn_if_tokenizer_guessed(tokenizer, name, saved_config, config)
    return tokenizer


def has_tokenizer(folder):
    patterns = "vocab.*", "tokenizer.json", "*.model"
    return any(next(Path(folder).glob(pattern), None) for pattern in patterns)


def base_with_tokenizer(folder):
    """Return what the model in `folder`, which has no tokenizer, was made from; None if unknown.

    transformers 4 wrote this into config.json: a hub name, or the path of a folder. If that folder
    has no tokenizer, its own config.json is asked.
    """
    seen = set()
    while folder not in seen:
        seen.add(folder)
        with contextlib.suppress(OSError, ValueError, LookupError, TypeError):
            # from the file itself: from_pretrained replaces the name by that of the folder
            saved = json.loads(Path(folder, "config.json").read_text("utf-8"))
            folder = normalize_path(saved["_name_or_path"])
        if not os.path.exists(folder):
            return None if looks_like_path(folder) or "/" not in folder else folder
        if has_tokenizer(folder):
            return folder
    return None


# what a library calls a package that a tokenizer needs → what to install
TOKENIZER_PACKAGES = {
    "ipadic": "ipadic",
    "unidic_lite": "unidic-lite",
    "unidic": "unidic",
    "fugashi": "fugashi unidic-lite",
    "sudachi": "sudachipy sudachidict_core",
    "rhoknp": "rhoknp (it calls Juman++: install that, too)",
    "sentencepiece": "sentencepiece",
    "tiktoken": "tiktoken",
    "protobuf": "protobuf",
}


def missing_package_advice(reason):
    """Return what to install, if the error of a library says that a package is missing."""
    if not re.search("install|No module named|not found in your environment", reason):
        return None
    if "unidic dictionary itself" in reason:  # the package is there
        return "python -m unidic download"
    if dictionary := re.search("sudachidict_(small|core|full)", reason.lower()):
        return f"pip install {dictionary[0]}"
    for name, packages in TOKENIZER_PACKAGES.items():
        if name in reason.lower():
            return f"pip install {packages}"
    return None


def fit_to_model(tokenizer, config):
    """Make the tokenizer pad at the end, and return token types exactly if the model takes them."""
    tokenizer.padding_side = "right"
    tokenizer.model_input_names = ["input_ids", "attention_mask"]
    if takes_token_types(config):
        tokenizer.model_input_names.append("token_type_ids")


def forbid_outside_dictionaries(saved_config):
    """Raise ValueError if a tokenizer_config.json, perhaps a stranger's, names files elsewhere."""
    options = [saved_config.get("mecab_kwargs"), saved_config.get("sudachi_kwargs")]
    paths = [value for value in iter_strings(options) if "/" in value]
    if paths:
        raise ValueError(
            f"its tokenizer_config.json names files elsewhere, which are not opened ({paths[0]})"
        )


def check_vocabulary(tokenizer, name, config, role, advice):
    """Raise Problem if the vocabulary is empty, lacks padding, or has ids the model lacks."""
    where = f"the tokenizer in {name!r}"
    if tokenizer.pad_token_id is None:
        raise Problem(f"{where} cannot be loaded: it has no padding token. {advice}.")
    vocabulary = tokenizer.get_vocab()
    if not set(vocabulary) - set(tokenizer.all_special_tokens):
        raise Problem(
            f"{where} cannot be loaded: its vocabulary holds nothing but special tokens. {advice}."
        )
    highest = max(vocabulary.values())
    if highest >= config.vocab_size:
        raise Problem(
            f"{where} has ids up to {highest}, the {role} only 0 to {config.vocab_size - 1}. "
            f"{advice}."
        )
    if highest + 1 < config.vocab_size:
        log(
            "note",
            f"{where} has {highest + 1:,} tokens, the {role} {config.vocab_size:,}. If these are "
            "not just spare rows, it is that of another model, or of another version",
        )


def warn_if_tokenizer_guessed(tokenizer, name, saved_config, config):
    """Say where transformers had to guess what the teacher's tokenizer was."""
    if not saved_config.get("tokenizer_class") and not getattr(config, "tokenizer_class", None):
        log(
            "note",
            f"{name} does not name its tokenizer_class: texts are read by "
            f"{type(tokenizer).__name__}. If the teacher was trained with another, such as "
            '"BertJapaneseTokenizer", write that into its tokenizer_config.json',
        )

    # the default dictionary changed in transformers 4.46
    is_japanese = isinstance(tokenizer, transformers.BertJapaneseTokenizer)
    uses_mecab = is_japanese and tokenizer.word_tokenizer_type == "mecab"
    names_dictionary = (saved_config.get("mecab_kwargs") or {}).get("mecab_dic")
    version = re.match(r"(\d+)\.(\d+)", str(config.transformers_version))
    is_old = not version or (int(version[1]), int(version[2])) < (4, 46)
    if uses_mecab and not names_dictionary and is_old:
        saved_by = version[0] if version else "an unknown version"
        log(
            "note",
            f"{name} does not name its mecab_dic: texts are cut with unidic_lite, today's default. "
            f"Before transformers 4.46 (it was saved by {saved_by}) it was ipadic; if the teacher "
            'was trained with that, write "mecab_kwargs": {"mecab_dic": "ipadic"} into its '
            "tokenizer_config.json and pip install ipadic",
        )


def preflight_checks(config, tokenizer):
    """Load and discard what later stages need, so that its faults are found before slow work."""
    with as_problem(f"REPORT_TO = {REPORT_TO!r}", 'Install what is missing, or set "none"'):
        trackers = [] if REPORT_TO == "none" else [REPORT_TO]
        for callback in get_reporting_integration_callbacks(trackers):
            callback()
    source_config = config
    if STUDENT_INIT not in ("teacher", "random"):
        source_config = load_student_init(config).config
    if STUDENT == "bert" and STUDENT_INIT != "random":
        layers_to_copy(source_config)
    rewrites = "KL′" in METHOD_TERMS.get(METHOD, ())
    if (rewrites or AUGMENT) and tokenizer.mask_token_id is None:
        raise Problem(
            f"METHOD = {METHOD!r}, AUGMENT = {AUGMENT}: the teacher's tokenizer has no mask token, "
            'which AUGMENT and "mate", "cilda" and "cilda+minild" need.'
        )
    if rewrites and GENERATOR is not None:
        load_generator(tokenizer)


def load_teacher(name, config, label2id):
    """Return the frozen teacher and what the report says of it: {name, parameters, bytes}.

    With SOFT_LABELS_COLUMN the model only gives the student its start: it is TEACHER or, where
    there is none (name is None), STUDENT_INIT, whose config is given. Of the teacher that ran
    elsewhere nothing is known.
    """
    if SOFT_LABELS_COLUMN:
        if name is None:
            set_labels(config, label2id)
            model = load_student_init(config)
        else:
            model = load_model(name)
        name = f"the probabilities in the column {SOFT_LABELS_COLUMN}"
        return model, {"name": name, "parameters": None, "bytes": None}
    teacher = load_model(name)
    n_parameters = teacher.num_parameters()
    return teacher, {"name": name, "parameters": n_parameters, "bytes": 4 * n_parameters}


def load_model(name, setting="TEACHER", config=None):
    """Return the classifier in `name`, in eval mode and float32.

    A teacher must be complete and is frozen. Any other model may lack its head, or have one for
    other labels; the head then starts random.
    """
    is_teacher = setting == "TEACHER"
    warn_if_several_weights(name)
    with as_problem(f"{setting} = {name!r}: its weights cannot be loaded", weights_advice):
        config = config or load_config(name, setting)
        model, info = classifier_class(config).from_pretrained(
            name,
            config=config,
            dtype=torch.float32,  # transformers 5 would keep the precision of the file
            ignore_mismatched_sizes=not is_teacher,
            output_loading_info=True,
        )
        # run it once, so that what does not fit fails here
        end_id = getattr(config, "eos_token_id", None) or 0  # BART needs one in its input
        model.eval()(input_ids=torch.full((1, 2), end_id))

    broken = [key for key, weight in model.named_parameters() if not weight.isfinite().all()]
    if broken:
        raise Problem(
            f"{setting} = {name!r}: its weights are NaN or infinite in {short_list(broken)}. Its "
            "training has diverged, or the file is damaged: name another model."
        )
    missing = {*info["missing_keys"]}
    for key, *_ in info["mismatched_keys"]:
        missing.add(key)
    if is_teacher:
        check_teacher_weights(name, model, missing, sorted(info["unexpected_keys"]))
    missing_body = []
    for key in sorted(missing):
        if key.startswith(model.base_model_prefix + ".") and ".pooler." not in key:
            missing_body.append(key)
    if missing_body:
        raise Problem(
            f"{setting} = {name!r}: is no whole model: its file lacks "
            f"{', '.join(missing_body[:4])}."
        )
    return model.requires_grad_(not is_teacher)


def warn_if_several_weights(name):
    """Note which weights are read if a folder holds several files of them."""
    # in the order in which transformers looks for them
    possible = (
        "model.safetensors",
        "model.safetensors.index.json",
        "pytorch_model.bin",
        "pytorch_model.bin.index.json",
    )
    found = [file for file in possible if os.path.isfile(os.path.join(name, file))]
    if len(found) > 1:
        log(
            "note",
            f"{name} holds several sets of weights, {' and '.join(found)}: {found[0]} is read. If "
            "another is the right one, move this one away",
        )


def weights_advice(reason):
    """Return what to do if transformers cannot load a file of weights."""
    if "Weights only load failed" in reason:
        return (
            "The file holds a pickled model, which could run code and is not opened: load it where "
            "you trust it, and save it with model.save_pretrained"
        )
    if "ignore_mismatched_sizes" in reason:
        return (
            "Its config.json does not fit its weights: it may have another number of labels in "
            "id2label. Use the config.json that was saved with these weights"
        )
    if "header" in reason.lower():
        return (
            "The file is damaged, or is only a Git LFS pointer: run git lfs pull, or download it "
            "again"
        )
    return "Copy or save the model again"


def check_teacher_weights(name, model, missing, unused):
    """Raise Problem if the teacher's file lacks weights, or has layers that its config has not.

    transformers would only warn, and go on with random weights or without the layers.
    """
    wrapped = [key for key in unused if key.startswith("module.")]
    if missing and wrapped:
        raise Problem(
            f"TEACHER = {name!r}: the names of its weights begin with module. ({wrapped[0]}), as "
            "DataParallel saves them. Save it anew with model.module.save_pretrained."
        )
    containers = [key for key in unused if key in ("state_dict", "model_state_dict", "model")]
    if missing and containers:
        raise Problem(
            f"TEACHER = {name!r}: its file is a checkpoint that holds {short_list(unused)}, not "
            f"weights alone. Load its {containers[0]!r} into the model, and save that with "
            "model.save_pretrained."
        )
    if missing:
        raise Problem(
            f"TEACHER = {name!r}: not a fine-tuned classifier: its file lacks "
            f"{', '.join(sorted(missing)[:4])}. Name the fine-tuned model; to fine-tune this one "
            "first, name it in TEACHER_BASE."
        )
    unused_layers = [key for key in unused if re.search(r"layers?\.\d+\.", key)]
    if unused_layers:
        raise Problem(
            f"TEACHER = {name!r}: its file holds layers, or parts of layers, that its config.json "
            f"does not know ({', '.join(unused_layers[:3])}). Put the config.json there that was "
            "saved with these weights."
        )
    if unused:
        log(
            "note",
            f"{name} holds weights that a {type(model).__name__} does not use: "
            f"{short_list(unused)}",
        )


def check_teacher(rows, names, was_made):
    """Note where the teacher is worse on the training texts than no model at all.

    rows: the training texts with labels and soft_labels. names: the label names, by output.
    was_made: whether the teacher was fine-tuned by this run.
    """
    labels = column_array(rows, "labels")
    is_labelled = labels != NO_LABEL
    predicted = [np.argmax(batch["soft_labels"], -1) for batch in iter_batches(rows, "soft_labels")]
    predicted = np.concatenate(predicted)[is_labelled]
    labels = labels[is_labelled]
    counts = np.bincount(labels, minlength=len(names))

    accuracy = (predicted == labels).mean()
    majority_share = counts.max() / len(labels)
    if accuracy < majority_share:
        undertrained = ""
        if was_made:
            undertrained = "; it was trained too little (TEACHER_EPOCHS, TEACHER_LEARNING_RATE)"
        log(
            "note",
            f"the teacher is right on {accuracy:.1%} of train; to answer {names[counts.argmax()]} "
            f"always would be right on {majority_share:.1%}. Likely causes: its labels are in "
            "another order than those of the data; its tokenizer or MeCab dictionary is not the "
            "one it was trained with; TEXT_COLUMN or LABEL_COLUMN names another column"
            + undertrained,
        )
    warn_if_one_label("teacher", "train", predicted, labels, names)
    if len(names) <= 1000:  # more would need a large matrix for a rare fault
        warn_if_labels_exchanged(labels, predicted, names)


def warn_if_one_label(role, split, predicted, labels, names):
    """Note if a model answers all texts of a split with one label, though they have several."""
    if len(set(predicted.tolist())) == 1 < len(set(labels.tolist())):
        name = names[predicted[0]]
        log("note", f"the {role} answers all texts of {split} with {name}")


def warn_if_labels_exchanged(labels, predicted, names):
    """Note pairs of labels of which each is mostly predicted as the other."""
    labels, predicted = torch.as_tensor(labels), torch.as_tensor(predicted)
    confusion = confusion_matrix(labels, predicted, len(names)).numpy()
    correct = confusion.diagonal()
    more_as_other = confusion > correct[:, None]
    exchanged = np.argwhere(np.triu(more_as_other & more_as_other.T))
    for first, second in exchanged[:3]:
        log(
            "note",
            f"the teacher answers {names[first]} mostly with {names[second]}, and {names[second]} "
            f"mostly with {names[first]}: are these two labels exchanged?",
        )


# ── Data files ────────────────────────────────────────────────────────────────────────────────────

SPLITS = {
    "train": ["train"],
    "val": ["val", "validation", "valid", "dev"],
    "test": ["test"],
}
SPLIT_OF = {name: split for split, names in SPLITS.items() for name in names}
LABELED_KINDS = ".csv", ".tsv", ".jsonl", ".json", ".parquet"  # a .txt can hold texts only
SPLIT_NAMES = {  # further names of splits in a column
    "training": "train",
    "学習": "train",
    "訓練": "train",
    "development": "val",
    "検証": "val",
    "開発": "val",
    "testing": "test",
    "テスト": "test",
    "評価": "test",
} | SPLIT_OF
NO_LABEL = -100  # hard label of a text that only the teacher has labelled
ROWS_PER_PART = 10_000  # rows that are in memory at once
HEAD_ROWS = 100  # first rows in which a column of split names is looked for


def load_data(label2id=None):
    """Return ({"train", "val", "test"}: texts and `labels`, label2id); Problem for faulty data.

    label2id: of the teacher; None if it is still to be made: then the labels of the data count.
    `labels` are numbers of the teacher's outputs.
    """
    splits = read_splits(known_labels=set(label2id or ()))
    splits = {split: needed_columns(split, rows) for split, rows in splits.items()}

    # what the labels mean, decided over all splits
    names = sorted(label2id, key=label2id.get) if label2id else new_label_names(splits)
    outputs_by_label = match_labels(splits, names)
    for split, rows in splits.items():
        splits[split] = validate_rows(rows, split, outputs_by_label[split], names)
        warn_if_labels_contradict(splits[split], split, names)

    if "the set" in splits:
        splits = split_single_set(splits["the set"], names)
    if TRAIN_FRACTION < 1:
        with as_problem(
            f"TRAIN_FRACTION = {TRAIN_FRACTION}: cannot be taken", "Choose another share, or 1"
        ):
            splits["train"], _ = split_rows(splits["train"], 1 - TRAIN_FRACTION, len(names))
    log_label_counts(splits, names)
    if SOFT_LABELS_COLUMN:
        log("data", f"in {SOFT_LABELS_COLUMN}, the labels have this order: {', '.join(names)}")
    return splits, {name: number for number, name in enumerate(names)}


def needed_columns(split, rows):
    """Return the columns of texts and labels; Problem if a split lacks one, or has no rows."""
    if len(rows) == 0:
        raise Problem(f"DATA = {DATA!r}: {split} has no rows. Add some.")
    columns = [*text_columns(), *soft_label_columns(), LABEL_COLUMN]
    rows = take_columns(f"DATA = {DATA!r}: {split}", columns, rows)
    for name in columns:
        kind = rows.features[name]
        if name == SOFT_LABELS_COLUMN:
            kind = getattr(kind, "feature", kind)  # of the members of a list
        # pictures and sounds may be paths, which datasets would open
        is_value = isinstance(kind, datasets.Value | datasets.ClassLabel)
        if not is_value or "binary" in kind.dtype:
            accepted = "texts and numbers"
            if name == SOFT_LABELS_COLUMN:
                accepted = "lists of probabilities such as [0.1, 0.9], in the order of the labels"
            raise Problem(
                f"DATA = {DATA!r}: column {name} of {split} holds {kind}; accepted are {accepted}."
            )
    return rows


def split_single_set(rows, names):
    """Split one data set 80/10/10 into train, val and test; names: the label names, by number.

    Each label is split in the same proportion, by the order of hashes of its texts: not by SEED, so
    that a teacher made of the same set has not seen test. A text that occurs several times is in
    one split only. If texts are added, a few others move from one split to another.
    """
    keys, first_rows, text_of_row = np.unique(
        text_hashes(rows), return_index=True, return_inverse=True
    )
    labels = column_array(rows, "labels")[first_rows]
    rare = []
    split_of_text = np.full(len(keys), "train", dtype="<U5")
    for label, name in enumerate(names):
        of_label = np.flatnonzero(labels == label)  # in the order of their hashes
        n_tenth = round(len(of_label) / 10)
        split_of_text[of_label[:n_tenth]] = "val"
        split_of_text[of_label[n_tenth : 2 * n_tenth]] = "test"
        if 0 < len(of_label) < 10:
            rare.append(f"{name} {len(of_label)}")
    if rare:
        raise Problem(
            f"DATA = {DATA!r}: cannot be cut into train, val and test: of {len(keys):,} different "
            f"texts, these labels have fewer than ten: {short_list(rare)}. Give ten or more of "
            "each label, or files of your own for train, val and test."
        )
    log("data", f"{DATA} is one set: its texts are cut 80/10/10, each label in proportion")
    split_of_row = split_of_text[text_of_row]
    return {split: rows.select(np.flatnonzero(split_of_row == split)) for split in SPLITS}


def text_hashes(rows):
    """Return an integer for each text (or pair of texts), the same for texts that look the same."""
    hashes = []
    for part in iter_batches(rows, *text_columns()):
        for texts in zip(*part.values(), strict=True):
            hashes.append(text_key([unicodedata.normalize("NFKC", text).strip() for text in texts]))
    return np.array(hashes, np.int64)


def warn_if_labels_contradict(rows, split, names):
    """Note texts that occur more than once, with different labels."""
    hashes = text_hashes(rows)
    labels = column_array(rows, "labels")
    order = np.argsort(hashes, kind="stable")  # rows with the same text come one after the other
    has_same_text = hashes[order][1:] == hashes[order][:-1]
    is_contradiction = has_same_text & (labels[order][1:] != labels[order][:-1])
    if not is_contradiction.any():
        return
    n_texts = len(np.unique(hashes[order][1:][is_contradiction]))
    n_pairs = is_contradiction.sum()
    pairs = []
    for position in np.flatnonzero(is_contradiction)[:3]:
        row, other = order[position], order[position + 1]
        pairs.append(f"{row + 1} {names[labels[row]]} and {other + 1} {names[labels[other]]}")
    log(
        "note",
        f"texts that occur in {split} more than once, with different labels: {n_texts:,}; rows "
        f"{'; '.join(pairs)}{'; …' if n_pairs > 3 else ''}",
    )


def split_rows(rows, second_share, n_classes):
    """Split rows at random into two parts, each label in the same proportion in both."""
    rows = rows.cast_column("labels", datasets.ClassLabel(n_classes))
    parts = rows.train_test_split(second_share, seed=SEED, stratify_by_column="labels")
    return [part.cast_column("labels", datasets.Value("int64")) for part in parts.values()]


def log_label_counts(splits, names):
    """Say how many texts there are, and note labels that no training text has."""
    counts = np.bincount(column_array(splits["train"], "labels"), minlength=len(names))
    sizes = " · ".join(f"{split} {len(rows):,}" for split, rows in splits.items())
    by_label = [f"{count:,} {name}" for name, count in zip(names, counts, strict=True)]
    if len(names) > 10:  # the most and the least frequent are enough
        order = np.argsort(-counts, kind="stable")
        by_label = [by_label[number] for number in order]
        by_label = [f"{len(names)} labels: {', '.join(by_label[:3])}, …", *by_label[-3:]]
    log("data", f"{DATA}: {sizes}; train has {', '.join(by_label)}")

    absent = [name for name, count in zip(names, counts, strict=True) if count == 0]
    if len(absent) == len(names) - 1:
        log(
            "note",
            f"all texts of train have one label, {names[counts.argmax()]}: there is nothing to "
            "tell apart",
        )
    elif absent:
        log(
            "note",
            f"no text of train has the label {short_list(absent)}: of it the student sees the "
            "teacher's guesses alone",
        )


def read_splits(known_labels):
    """Return the splits of DATA as they are stored: train, val and test, or "the set" alone."""
    path = Path(DATA)
    if DATA == "tests/sample" and not path.exists():  # started from another folder
        path = Path(__file__).resolve().parent / DATA
    columns = [*text_columns(), *soft_label_columns(), LABEL_COLUMN]

    # one file
    if path.is_file():
        if file_kind(path) == ".txt":
            raise Problem(
                f"DATA = {DATA!r}: a .txt file has no labels. Accepted are "
                f"{', '.join(LABELED_KINDS)}; texts without labels are named in UNLABELED."
            )
        rows = read_file(path, columns, known_labels, with_split_column=True)
        return split_by_column(rows, columns) or {"the set": rows}

    # a folder of files, or a data set of the datasets library
    files = labeled_files(path) if path.is_dir() else {}
    is_saved_dataset = path.is_dir() and {"state.json", "dataset_dict.json"} & set(os.listdir(path))
    if path.is_dir() and not is_saved_dataset:
        if not files and (path / "data").is_dir():  # as the hub lays it out
            path = path / "data"
            files = labeled_files(path)
        refuse_duplicate_splits(files)
        if DATA != "tests/sample":
            report_unread_files(DATA, path, [file for group in files.values() for file in group])
        splits = {}
        for split, group in files.items():
            splits[split] = read_files(group, columns, known_labels)
        return all_splits(splits, list(files) or sorted(os.listdir(path)))

    loaded = load_dataset_from_library(path, files)
    if isinstance(loaded, dict) and len(loaded) == 1:
        loaded = next(iter(loaded.values()))
    if not isinstance(loaded, dict):
        return split_by_column(loaded, columns) or {"the set": loaded}
    groups = defaultdict(list)
    for name in loaded:
        if name in SPLIT_OF:
            groups[SPLIT_OF[name]].append(name)
    refuse_duplicate_splits(groups)
    return all_splits({split: loaded[group[0]] for split, group in groups.items()}, [*loaded])


def all_splits(splits, found):
    """Return train, val and test, in this order; Problem if one is missing among those found."""
    missing = [" or ".join(names) for split, names in SPLITS.items() if split not in splits]
    if missing:
        raise Problem(
            f"DATA = {DATA!r}: has no {', no '.join(missing)} (found: "
            f"{short_list(found) or 'nothing'}). Add it ({', '.join(LABELED_KINDS)}), or set DATA "
            "to one single file, which is cut into the three."
        )
    return {split: splits[split] for split in SPLITS}


def split_by_column(rows, columns):
    """Return {split: rows} if a column of one data set names the split of each row; else None.

    columns: those that are something else. Raise Problem if a split is missing.
    """
    # only columns of texts and of classes are looked at: pictures may be paths to other files
    readable = []
    for name, kind in rows.features.items():
        if getattr(kind, "dtype", None) in TEXT_TYPES or isinstance(kind, datasets.ClassLabel):
            readable.append(name)
    if not readable:
        return None
    head = rows.select(range(min(len(rows), HEAD_ROWS))).select_columns(readable).to_list()
    for name in split_candidates(with_class_names(head, rows.features), columns):
        row_numbers = defaultdict(list)
        n_rows = 0
        for part in iter_batches(rows, name):
            for row in with_class_names([{name: value} for value in part[name]], rows.features):
                value = row[name]
                split = SPLIT_NAMES[canonical_split(value)] if is_split_name(value) else None
                row_numbers[split].append(n_rows)
                n_rows += 1
        if None in row_numbers:
            others = row_numbers[None]
            log(
                "note",
                f"column {show_name(name)} is not used: {len(others):,} of its values name no "
                f"split, the first in row {others[0] + 1}",
            )
        elif len(row_numbers) > 1:  # a column that says train everywhere splits nothing
            missing = [split for split in SPLITS if split not in row_numbers]
            if missing:
                raise Problem(
                    f"DATA = {DATA!r}: column {show_name(name)} names {', '.join(row_numbers)}, "
                    f"but no {', no '.join(missing)}. Add them, or remove this column to have the "
                    "set cut into the three."
                )
            log("data", f"{DATA}: the split of each row is that in column {show_name(name)}")
            return {split: rows.select(row_numbers[split]) for split in SPLITS}
    return None


def split_candidates(head, columns):
    """Return the columns of some rows, dicts, that name a split in one of them at least."""
    others = {canonical_name(column) for column in columns}
    candidates = []
    for row in head:
        for name, value in row.items():
            is_new = name not in candidates and canonical_name(str(name)) not in others
            if is_new and is_split_name(value):
                candidates.append(name)
    return candidates


def with_class_names(rows, features):
    """Return rows, dicts, with the names of ClassLabels in place of their numbers."""
    named_rows = []
    for row in rows:
        named = dict(row)
        for name, value in row.items():
            names = getattr(features[name], "names", None)
            if names and value is not None:  # -1: none of them
                named[name] = names[value] if 0 <= value < len(names) else None
        named_rows.append(named)
    return named_rows


def is_split_name(value):
    return isinstance(value, str) and canonical_split(value) in SPLIT_NAMES


def canonical_split(value):
    return canonical_name(value).casefold()


def read_files(files, columns, known_labels):
    """Return what `read_file` returns for one file, or the rows of all shards of a set."""
    if len(files) == 1:
        return read_file(files[0], columns, known_labels)
    parts = [take_columns(file, columns, read_file(file, columns, known_labels)) for file in files]
    with as_problem(
        f"DATA = {DATA!r}: {short_list([file.name for file in files])} do not fit together",
        "Write the columns of all parts in one type",
    ):
        return datasets.concatenate_datasets(parts)


def load_dataset_from_library(path, files):
    """Return the Dataset or DatasetDict in a save_to_disk folder, or of a hub name.

    files: data files in the same folder, by split. There must be none.
    """
    if files:
        names = ", ".join(file.name for group in files.values() for file in group)
        raise Problem(
            f"DATA = {DATA!r}: is a save_to_disk folder that also holds {names}. Keep the one or "
            "the other."
        )
    advice = (
        f"Name a folder with train, val and test files ({', '.join(LABELED_KINDS)}), a single "
        "file, or a hub data set (with a configuration: org/name:configuration)"
    )
    is_file_name = "/" not in DATA and file_kind(path) in LABELED_KINDS
    if not path.is_dir() and (looks_like_path(DATA) or is_file_name):
        raise Problem(f"DATA = {DATA!r}: no such file or folder. {advice}.")
    with as_problem(f"DATA = {DATA!r}: no such file or folder, and no data set to load", advice):
        forbid_outside_paths(path)
        if path.is_dir():
            loaded = datasets.load_from_disk(DATA)
        else:
            name, _, configuration = DATA.partition(":")
            loaded = datasets.load_dataset(name, configuration or None)
    return loaded.with_format(None)  # a format such as "torch" was for its last user


def labeled_files(folder):
    """Return {split: its files} by their names; more than one only if they are shards.

    Names are those of the splits. Where no file has such a name, those that begin with one count:
    train-v1.1.json, or train-00000-of-00002.parquet, a shard of a hub data set.
    """
    exact, longer = defaultdict(list), defaultdict(list)
    for file in sorted(folder.iterdir()):
        if file_kind(file) not in LABELED_KINDS or file.name.startswith("."):
            continue
        stem = file.name.lower().removesuffix(".gz").removesuffix(file_kind(file))
        if stem in SPLIT_OF:
            exact[SPLIT_OF[stem]].append(file)
        elif (first_word := re.split(r"[-_.]", stem)[0]) in SPLIT_OF:
            longer[SPLIT_OF[first_word]].append(file)
    if not exact:
        for split, group in longer.items():
            log("data", f"{split} is {short_list([file.name for file in group])}")
    for split in exact and longer.keys() - exact.keys():
        raise Problem(
            f"DATA = {DATA!r}: {longer[split][0].name} would be {split}, but is not read beside "
            f"{next(iter(exact.values()))[0].name}, which has the exact name of a split. Name all "
            "files alike."
        )
    return exact or longer


def are_shards(files):
    """Whether files are all the shards of one set, each once; Problem if one is missing."""
    pattern = r"(.+)-(\d{5})-of-(\d{5})(-\w+)?\.\w+(\.gz)?"  # older names end in a hash
    matches = [re.fullmatch(pattern, file.name) for file in files]
    if not all(matches):
        return False
    if len({(match[1], match[3]) for match in matches}) > 1:  # name, number of shards
        return False
    name, n_shards = matches[0][1], int(matches[0][3])
    numbers = [int(match[2]) for match in matches]
    missing = sorted({*range(n_shards)} - {*numbers})
    if missing:
        raise Problem(
            f"DATA = {DATA!r}: {name} has the parts 0 to {n_shards - 1}; missing: "
            f"{short_list(list(map(str, missing)))}. Add what is missing."
        )
    return len(numbers) == n_shards


def report_unread_files(name, folder, files):
    """Say which files of a data folder are not read; hidden files do not count."""
    unread = sorted(file.name for file in {*folder.iterdir()} - {*files})
    unread = [file_name for file_name in unread if not file_name.startswith(".")]
    if files and unread:
        verb = "is" if len(unread) == 1 else "are"
        log("data", f"{name}: {short_list(unread)} {verb} not read")


def refuse_duplicate_splits(groups):
    """Raise Problem if more than one file, or split of a data set, is for train, val or test."""
    for split, members in groups.items():
        is_one_set = isinstance(members[0], Path) and are_shards(members)
        if len(members) > 1 and not is_one_set:
            names = [member.name if isinstance(member, Path) else member for member in members]
            raise Problem(
                f"DATA = {DATA!r}: {' and '.join(names)} are both for {split}. Keep one of them."
            )


def text_columns():
    return [TEXT_COLUMN, TEXT_PAIR_COLUMN] if TEXT_PAIR_COLUMN else [TEXT_COLUMN]


def iter_batches(rows, *columns):
    """Yield {column: values} for ROWS_PER_PART rows at a time: a large data set stays on disk."""
    return rows.select_columns([*columns]).with_format(None).iter(ROWS_PER_PART)


def column_array(rows, name):
    """Return a column of numbers as one array."""
    parts = [np.asarray(part[name]) for part in iter_batches(rows, name)]
    return np.concatenate(parts) if parts else np.array([], int)


def read_file(path, columns, known_labels=frozenset(), with_split_column=False):
    """Return a data file as a Dataset: these columns, strings exactly as the file has them.

    Columns of a .parquet keep their own names and types; `take_columns` renames them. If
    with_split_column, columns that may name splits are read, too (see `split_by_column`).

    The file is UTF-8 with or without BOM, UTF-16 with BOM, or CP932 (Japanese Excel). Problem,
    with the line, where it is not certain what the rows and fields are.
    known_labels: the teacher's label names, by which a row is told from a line of a text.
    """
    kind = file_kind(path)
    with as_problem(f"{path}: cannot be read", read_advice):
        if kind == ".parquet" and path.suffix.lower() == ".gz":
            raise Problem(f"{path}: a .parquet is not read as .gz. Unpack it.")
        if kind == ".parquet":
            return read_parquet(path, columns, with_split_column)
        if kind not in ROW_READERS:
            raise ValueError(f"its kind, {kind!r}, is not known")

        def read(encoding):
            names = columns
            if with_split_column:
                names = [*columns, *split_candidates(read_head(path, encoding), columns)]
            return write_rows(ROW_READERS[kind](path, encoding, names, known_labels), names)

        try:
            return read("utf-8-sig")
        except UnicodeDecodeError:
            encoding = other_encoding(path)
            log("data", f"{path} is not UTF-8: it is read as {encoding.upper()}")
            return read(encoding)


def read_head(path, encoding):
    """Return the first rows of a .csv, .tsv, .json or .jsonl, dicts, as far as they can be read."""
    kind = file_kind(path)
    rows = []
    with open_text(path, encoding, newline="") as file, contextlib.suppress(csv.Error, Problem):
        if kind in (".csv", ".tsv"):
            reader = csv.DictReader(file, delimiter="\t" if kind == ".tsv" else ",")
            unique = {
                name for name in reader.fieldnames or () if reader.fieldnames.count(name) == 1
            }
            for row in itertools.islice(reader, HEAD_ROWS):
                rows.append({name: value for name, value in row.items() if name in unique})
            return rows
        first_line = next((line.strip() for line in file if line.strip()), "")
        file.seek(0)
        values = json_lines(path, file)
        if first_line.startswith("["):
            values = enumerate(json_list(path, file), 1)
        for _, row in itertools.islice(values, HEAD_ROWS):
            if isinstance(row, dict):
                rows.append(row)
    return rows


def read_parquet(path, columns, with_split_column):
    """Return these columns of a .parquet, under their names in the file; no others are read."""
    file = pyarrow.parquet.ParquetFile(path)
    if file.metadata.num_rows == 0:
        raise ValueError("it has no rows")
    schema = file.schema_arrow
    names = [*find_columns(path, columns, schema.names).values()]
    if with_split_column:
        readable = []
        for field in schema:
            if str(field.type) in TEXT_TYPES or pyarrow.types.is_dictionary(field.type):
                readable.append(field.name)
        head = next(file.iter_batches(HEAD_ROWS, columns=readable)).to_pylist()
        names += split_candidates(head, names)
    needed = pyarrow.schema([schema.field(name) for name in names], metadata=schema.metadata)
    return datasets.load_dataset(
        "parquet",
        data_files=glob.escape(str(path)),
        columns=names,
        features=datasets.Features.from_arrow_schema(needed),
        split="train",
        cache_dir=str(scratch_folder()),
    )


def read_advice(reason):
    """Return what to do if a data file cannot be read."""
    if "Not a gzipped file" in reason:
        return "Its name ends in .gz, but it is not compressed: remove .gz from its name"
    return (
        f"Accepted are {', '.join(LABELED_KINDS)}, for UNLABELED also .txt; all but .parquet also "
        "as .gz; with at least one row; in UTF-8, UTF-16 with BOM or CP932"
    )


def write_rows(rows, columns):
    """Write rows, an iterator over lists of strings or None, to a file; return it as a Dataset."""
    path = scratch_folder() / f"rows-{time.monotonic_ns()}.arrow"
    schema = pyarrow.schema([(name, pyarrow.string()) for name in columns])
    n_rows = 0
    with (
        pyarrow.OSFile(str(path), "wb") as file,
        pyarrow.ipc.new_stream(file, schema) as stream,
    ):
        while part := list(itertools.islice(rows, 1000)):
            arrays = [string_array(values) for values in zip(*part, strict=True)]
            stream.write_batch(pyarrow.record_batch(arrays, schema=schema))
            n_rows += len(part)
    if n_rows == 0:
        raise ValueError("it has no rows")
    return datasets.Dataset.from_file(str(path))


def string_array(values):
    """Return an Arrow array; strings that UTF-8 cannot hold become None, and are refused later."""
    try:
        return pyarrow.array(values, pyarrow.string())
    except UnicodeEncodeError:
        valid = [value if value and is_encodable(value) else None for value in values]
        return pyarrow.array(valid, pyarrow.string())


def other_encoding(path):
    """Return the encoding of a file that is not UTF-8; Problem where it might be another."""

    def suspect(encoding):
        return Problem(
            f"{path}: cannot be read: it is not UTF-8; it may be {encoding}. Save it as UTF-8."
        )

    with open_bytes(path) as file:
        content = file.read()
    if content.startswith((b"\xff\xfe", b"\xfe\xff")):
        return "utf-16"

    # UTF-8 with a few damaged characters: most of its other characters decode. If CP932 is decoded
    # as UTF-8, hardly any does.
    as_utf8 = content.decode("utf-8", "replace")
    n_damaged = as_utf8.count("\ufffd")
    n_ascii = sum(len(part) for part in re.findall("[\0-\x7f]+", as_utf8))
    if len(as_utf8) - n_ascii - n_damaged > n_damaged:
        line = as_utf8.count("\n", 0, as_utf8.index("\ufffd")) + 1
        raise Problem(
            f"{path}: cannot be read: it is UTF-8, but line {line} holds bytes that are no "
            "character. Correct this line."
        )

    if content.count(b"\0") > len(content) / 10:
        raise suspect("UTF-16 without its mark (BOM)")

    # Much EUC-JP decodes as CP932, to other characters; hardly any CP932 decodes as EUC-JP.
    for encoding in "euc_jp", "euc_jis_2004":
        with contextlib.suppress(UnicodeDecodeError):
            content.decode(encoding)
            raise suspect("EUC-JP")
    try:
        text = content.decode("cp932")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise Problem(
            f"{path}: cannot be read: it is neither UTF-8 nor CP932: line {line} holds bytes that "
            "are no character. Save it as UTF-8."
        ) from None

    # English from Windows may decode as CP932, too: the apostrophe of "don't" and the letter after
    # it become one kanji. In Japanese hardly any character stands alone after a Latin letter.
    n_words = len(re.findall(r"[^\x00-\x7f]+", text))
    lone_characters = rb"(?<=[A-Za-z])[\x81-\x9f\xe0-\xfc][A-Za-z](?![\x80-\xff])"
    if len(re.findall(lone_characters, content)) > n_words / 2:
        raise suspect("Windows-1252")
    return "cp932"


def file_kind(path):
    """Return the kind of a data file: its suffix, in small letters, without that of gzip."""
    return Path(path.name.lower().removesuffix(".gz")).suffix


def open_bytes(path):
    """Open a file, or what gzip has packed in a .gz, to read bytes."""
    return gzip.open(path) if path.suffix.lower() == ".gz" else open(path, "rb")


def open_text(path, encoding, newline=None):
    """Open a file as `open` does, also a .gz.

    Problem for JIS (ISO-2022-JP), which is all ASCII and would pass for UTF-8.
    """
    with open_bytes(path) as file:
        end = b""
        while part := file.read(1 << 20):
            # the marks before kanji and kana; the mark of the way back, "\x1b(B", also occurs in
            # what a terminal has printed
            if re.search(rb"\x1b(\$[@B(]|\([IJ])", end + part):
                raise Problem(f"{path}: cannot be read: it is JIS (ISO-2022-JP). Save it as UTF-8.")
            end = part[-2:]
    return io.TextIOWrapper(open_bytes(path), encoding, newline=newline)


def csv_rows(path, encoding, columns, known_labels):
    """Yield the rows of a .csv or .tsv file, as the csv module reads them in strict mode.

    Problem for a row with more or fewer fields than the header, and for a quotation mark that
    seems to open a field by mistake: every row up to the next mark would end up in that field.
    """
    separator = "\t" if file_kind(path) == ".tsv" else ","
    character = "tab" if separator == "\t" else "comma"
    advice = (
        f'A text with a {character}, a line break or a " in it must stand in quotes, and a " in it '
        "be written twice"
    )
    csv.field_size_limit(sys.maxsize)
    seen_labels = set()
    spanning = []  # of each row over several lines: (its first line, its content)
    with open_text(path, encoding, newline="") as file:
        reader = csv.reader(file, delimiter=separator, strict=True)
        try:
            header = next(reader, None)
            if header is None:
                raise ValueError("it has no rows")
            has_labels = LABEL_COLUMN in columns
            positions = column_positions(path, header, columns)
            label_position = positions[columns.index(LABEL_COLUMN)] if has_labels else None
            last_line = reader.line_num
            for fields in reader:
                first_line, last_line = last_line + 1, reader.line_num
                if not fields:  # an empty line
                    continue
                if fields == header:
                    raise Problem(f"{path}, line {first_line}: the header once more. Remove it.")
                if len(fields) != len(header):
                    raise Problem(
                        f"{path}, line {first_line}: {len(fields)} fields, but the header has "
                        f"{len(header)}. {advice}."
                    )
                if last_line > first_line:
                    spanning.append((first_line, separator.join(fields)))
                if has_labels:
                    seen_labels.add(fields[label_position])
                yield [fields[position] for position in positions]
        except csv.Error:
            raise Problem(
                f"{path}, line {last_line + 1}: a quote opens here that does not close at the end "
                f"of a field. {advice}."
            ) from None

    # One line of a row over several lines, its first or its last, looks like a row by itself. If
    # more lines do, with labels in the right place, they are rows that a quote has swallowed.
    def is_row(line):
        fields = line.split(separator)
        if len(fields) != len(header):
            return False
        if separator == "\t" or not has_labels:
            return True
        label = fields[label_position].strip()
        return label in labels or len(labels) < 2

    labels = seen_labels | known_labels
    for first_line, content in spanning:
        if sum(is_row(line) for line in re.split("[\r\n]+", content)) > 1:
            raise Problem(
                f"{path}, line {first_line}: a quote opens here and takes the rows below into its "
                f"text. {advice}; if this text does go over these lines, save the file as .jsonl."
            )
    if spanning:
        log(
            "data",
            f"{path}: {len(spanning):,} rows go over several lines, in quotes; the first from line "
            f"{spanning[0][0]}",
        )


def column_positions(path, header, columns):
    """Return the positions of these columns in a header; Problem if one is missing or doubled."""
    for name in columns:
        if header.count(name) > 1:
            raise Problem(
                f"{path} has more than one column {name!r}. Rename or remove all but one."
            )
    spelled = find_columns(path, columns, header)
    return [header.index(spelled[name]) for name in columns]


def take_columns(where, columns, rows):
    """Return these columns of a data set, under the names of the settings."""
    spelled = find_columns(where, columns, rows.column_names)
    rows = rows.select_columns([*spelled.values()])
    return rows.rename_columns({name: column for column, name in spelled.items() if name != column})


def find_columns(where, columns, found):
    """Return {column: its name among those found}; Problem if one is missing.

    A name is looked up as it is written, then without spaces around it and in one Unicode form.
    """
    spelled = {}
    for column in columns:
        alike = [name for name in found if canonical_name(str(name)) == canonical_name(column)]
        if column in found:
            spelled[column] = column
        elif len(alike) == 1:
            spelled[column] = alike[0]
        elif alike:
            raise Problem(
                f"{where} has the columns {' and '.join(map(show_name, alike))}, which differ only "
                f"in spaces or in Unicode form; {column} may be either. Rename one."
            )
    refuse_missing_columns(where, [name for name in columns if name not in spelled], found)
    return spelled


def show_name(name):
    """Return the name of a column as a message shows it: quoted if one would not see all of it."""
    name = str(name)
    is_plain = name and name == name.strip() and name.isprintable()
    return name if is_plain else repr(name)


def refuse_missing_columns(where, missing, found):
    """Raise Problem, with the columns that were found, if there are missing ones."""
    if not missing:
        return
    names = ", ".join(map(show_name, found))
    if len(names) > 300:
        names = f"{names[:300]}…"
    hint = "Set TEXT_COLUMN, TEXT_PAIR_COLUMN, LABEL_COLUMN and SOFT_LABELS_COLUMN"
    if isinstance(where, Path) and file_kind(where) in (".csv", ".tsv"):
        hint += ". The first line of the file must hold the names of its columns"
    if len(found) == 1 and re.search("[,;\t]", str(*found)):
        hint = "The fields of a .csv are separated by commas, those of a .tsv by tabs"
    what = f"its columns are {names}" if names else "its first line is empty"
    raise Problem(f"{where} has no column {', '.join(missing)}; {what}. {hint}.")


def json_rows(path, encoding, columns, known_labels):
    """Yield the rows of a .json or .jsonl file: a list of objects, or one object per line."""
    with open_text(path, encoding) as file:
        first_line = next((line.strip() for line in file if line.strip()), "")
        file.seek(0)
        if first_line.startswith("["):
            unit, objects = "row", enumerate(json_list(path, file), 1)
        else:
            unit, objects = "line", json_lines(path, file)

        unseen = set(columns)  # columns that no row has had so far
        keys = {name: name for name in columns}  # column → its name in the file
        first_names = ()
        for number, row in objects:
            where = f"{path}, {unit} {number}"
            if not isinstance(row, dict):
                fields = ", ".join(f'"{name}": …' for name in columns)
                raise Problem(f"{where}: no object. Accepted is one such as {{{fields}}}.")
            absent = [name for name in columns if name not in row and keys[name] not in row]
            if unseen or absent:
                for name in absent:
                    matches = [key for key in row if canonical_name(key) == canonical_name(name)]
                    if len(matches) == 1:
                        keys[name] = matches[0]
                unseen = {name for name in unseen if keys[name] not in row}
                first_names = first_names or row.keys()
            values = [row.get(name, row.get(keys[name])) for name in columns]
            for value in values:
                if type(value) is not str:  # the rare case, kept out of the common one
                    pairs = zip(values, columns, strict=True)
                    values = [json_text(where, value, name) for value, name in pairs]
                    break
            yield values
        if first_names:
            missing = [name for name in columns if name in unseen]
            refuse_rows_in_a_field(path, row, missing)
            find_columns(path, missing, list(first_names))


def refuse_rows_in_a_field(path, row, missing):
    """Raise Problem if a JSON object without the columns has a field that is a list of rows."""
    for key, value in row.items():
        if missing and isinstance(value, list) and value and isinstance(value[0], dict):
            raise Problem(
                f"{path} has no column {', '.join(missing)}, but a field {key!r} that is a list of "
                "objects. Write this list alone into the file."
            )


def json_text(where, value, name):
    """Return a field of a JSON object: a text, or a label as text; None if it is neither."""
    if name == SOFT_LABELS_COLUMN and isinstance(value, list):
        return json.dumps(value)
    if name == SOFT_LABELS_COLUMN and isinstance(value, dict):
        raise Problem(
            f"{where}: {name} is an object; accepted is a list of probabilities such as [0.1, "
            "0.9], in the order of the labels."
        )
    is_needed = name in (*text_columns(), LABEL_COLUMN)
    if isinstance(value, dict | list) and is_needed:
        raise Problem(
            f"{where}: many values in {name}, where one is accepted. Write an object for each row; "
            "with pandas: to_json(path, orient='records', lines=True)."
        )
    if isinstance(value, str) or value is None:
        return value
    return label_text(value) if name == LABEL_COLUMN else None


def json_list(path, file):
    """Return the list that a .json file holds."""
    try:
        return json.load(file)
    except json.JSONDecodeError as error:
        raise Problem(
            f"{path}, line {error.lineno}: not JSON ({error.msg}). Accepted are one object per "
            "line, or a list of objects with a comma between them and none after the last."
        ) from None


def json_lines(path, file):
    """Yield (line number, value) for each line that is not empty."""
    decode = json.JSONDecoder().raw_decode
    for number, line in enumerate(file, 1):
        line = line.strip(" \t\r\n")
        if not line:
            continue
        try:
            value, end = decode(line)
        except json.JSONDecodeError as error:
            raise Problem(
                f"{path}, line {number}: not a whole JSON object ({error.msg}). Accepted are one "
                "object per line, or a list of objects."
            ) from None
        if end < len(line):
            raise Problem(
                f"{path}, line {number}: after the object there is more, {line[end:]!r:.40}. Write "
                "one object per line and nothing else."
            )
        yield number, value


def text_rows(path, encoding, columns, known_labels):
    """Yield the rows of a .txt file: one text per line."""
    if len(columns) > 1:
        raise Problem(
            f"{path} holds one text per line, so it has no column {', '.join(columns[1:])}. Write "
            "the columns into a .csv or .jsonl file."
        )
    with open_text(path, encoding) as file:
        for line in file:
            yield [line.rstrip("\n")]


# suffix → a generator of rows, each a list of strings or None, one for each of the columns
ROW_READERS = {
    ".csv": csv_rows,
    ".tsv": csv_rows,
    ".json": json_rows,
    ".jsonl": json_rows,
    ".txt": text_rows,
}


def validate_rows(rows, split, output_by_label, names):
    """Return the texts of a split with `labels`, the numbers of the teacher's outputs.

    With SOFT_LABELS_COLUMN also `teacher_probabilities`. Raise Problem, with the numbers of the
    faulty rows, if a text, a label or a soft label is missing or unknown.
    """
    labels = []
    faults = {f"{name} empty or not a text": [] for name in text_columns()}
    valid_columns = text_columns()
    if SOFT_LABELS_COLUMN:
        rows, soft_label_faults = parse_soft_labels(rows, len(names))
        faults |= soft_label_faults
        valid_columns.append("teacher_probabilities")
    for part in iter_batches(rows, *text_columns(), LABEL_COLUMN):
        first_row = len(labels) + 1
        for name in text_columns():
            for row_number, value in enumerate(part[name], first_row):
                if not is_text(value):
                    faults[f"{name} empty or not a text"].append(row_number)
        for row_number, label in enumerate(part[LABEL_COLUMN], first_row):
            written = label if isinstance(label, str) else label_text(label)
            output = output_by_label.get(written)
            if output is None:
                fault = "no label"
                if written:
                    known = short_list(names)
                    fault = f"label {written[:60]!r}, which the teacher does not have ({known}),"
                faults.setdefault(fault, []).append(row_number)
                output = NO_LABEL
            labels.append(output)

    refuse_faulty_rows(f"DATA = {DATA!r}", split, faults)
    return rows.select_columns(valid_columns).add_column("labels", np.array(labels))


def refuse_faulty_rows(where, name, faults):
    """Raise Problem if there are faults: {fault: numbers of the rows that have it}.

    name: that of the split or file whose rows they are.
    """
    lines = []
    for fault, row_numbers in faults.items():
        if row_numbers:
            more = ", …" if len(row_numbers) > 5 else ""
            first_rows = ", ".join(map(str, row_numbers[:5])) + more
            unit = "row" if len(row_numbers) == 1 else "rows"
            lines.append(f"{name}: {fault} in {len(row_numbers)} {unit}: {first_rows}")
    if lines:
        hint = (
            "correct or remove these rows, counted from 1; labels are the teacher's names or "
            "numbers."
        )
        if any("label '-1'" in line for line in lines):  # how the hub marks withheld labels
            hint += " A split with -1 for every label has none: use one that has them."
        if DATA == "tests/sample" and where.startswith("DATA"):
            hint = "DATA is still the sample; set it to your teacher's data."
        raise Problem("\n  ".join([f"{where}: {hint}", *lines[:9]]))


def is_text(value):
    """Whether a value is a string that is not blank and that UTF-8 can hold."""
    return isinstance(value, str) and value.strip() != "" and is_encodable(value)


def is_encodable(value):
    """Whether UTF-8 can hold a string: it has no half of a character (a lone surrogate)."""
    return re.search("[\ud800-\udfff]", value) is None


def short_list(names):
    """Return names separated by commas; of many, the first ten."""
    return ", ".join(names[:10]) + (", …" if len(names) > 10 else "")


# ── Labels: names or numbers ──────────────────────────────────────────────────────────────────────


def label_text(label):
    """Return a label as text; "" for None and NaN."""
    return "" if label is None or label != label else str(label)


def canonical_label(label):
    """Return a label without what does not tell labels apart.

    That is white space around it; its Unicode form, which is another in names of a Mac's folders;
    and the ".0" of a number, which pandas writes where another label is missing.
    """
    return re.sub(r"^(-?\d+)\.0+$", r"\1", canonical_name(label))


def canonical_name(name):
    """Return a name without white space around it, in the Unicode form NFC."""
    return unicodedata.normalize("NFC", name).strip()


def label_lookup(names):
    """Return a function from a label, as it is written, to its position in `names`, or None.

    A label is looked up exactly as it is written, then by its value (see `canonical_label`): "1"
    and "1.0" are the same number, and "1" is "True" where the names are True and False.
    """
    exact = {}
    by_value = {}
    by_lower_case = {}
    for position, name in enumerate(names):
        exact[name] = position
        by_value[canonical_label(name)] = position
        by_lower_case[name.casefold()] = position
    if by_lower_case.keys() == {"true", "false"}:
        by_value |= {"1": by_lower_case["true"], "0": by_lower_case["false"]}

    def find(label):
        return exact.get(label, by_value.get(canonical_label(label)))

    return find


def new_label_names(splits):
    """Return the label names of a teacher that is still to be made, in the order of its outputs."""
    class_names = getattr(next(iter(splits.values())).features[LABEL_COLUMN], "names", None)
    found = set()
    for rows in splits.values():
        for label in rows.unique(LABEL_COLUMN):
            found.add(canonical_label(label_text(label)))
    found.discard("")
    names = class_names or sorted_labels(found)
    scores = [label for label in names if is_fraction(label)]
    if scores and not class_names:
        raise Problem(
            f"LABEL_COLUMN = {LABEL_COLUMN!r}: holds fractional numbers ({short_list(scores)}), "
            "which are scores, not classes. Write a class for each text."
        )
    if not 2 <= len(names) <= 1000:
        raise Problem(
            f"LABEL_COLUMN = {LABEL_COLUMN!r}: {len(names)} different labels; 2 to 1000 are "
            "accepted."
        )

    spellings_of = defaultdict(list)
    for name in names:
        spellings_of[unicodedata.normalize("NFKC", name).casefold().strip()].append(name)
    for spellings in spellings_of.values():
        if len(spellings) > 1:
            raise Problem(
                f"LABEL_COLUMN = {LABEL_COLUMN!r}: {' and '.join(map(repr, spellings))} look like "
                "one label. Write them alike."
            )

    if not class_names and found == {str(number) for number in range(len(found))}:
        return [f"LABEL_{number}" for number in range(len(found))]
    return names


def is_fraction(label):
    """Whether a label is a number, but not a whole one."""
    with contextlib.suppress(ValueError):
        return label[-1].isdigit() and not float(label).is_integer()
    return False


def match_labels(splits, names):
    """Return {split: {label as written: number of the teacher's output, None if unknown}}.

    The labels of all splits are all names of the teacher's labels, or all numbers of its outputs; a
    mixture is a Problem. A ClassLabel of a data set has a number and a name: its name counts first.
    """
    # both readings of every label
    as_name = {}  # (split, label as written) → output
    as_number = {}
    class_names = {}  # (split, label as written) → the name that a ClassLabel gives to it
    find_name = label_lookup(names)
    find_number = label_lookup([str(number) for number in range(len(names))])
    for split, rows in splits.items():
        own_names = getattr(rows.features[LABEL_COLUMN], "names", None)
        for label in rows.unique(LABEL_COLUMN):
            written = label_text(label)
            if written == "":
                continue
            name = written
            if own_names and 0 <= label < len(own_names):
                name = own_names[label]
                class_names[split, written] = name
            as_name[split, written] = find_name(name)
            as_number[split, written] = find_number(written)

    # the one that fits all of them
    if None not in as_name.values():
        meaning = as_name
        if None not in as_number.values() and as_number != as_name:
            log(
                "note",
                f"the labels of the data are taken as the teacher's names ({short_list(names)}), "
                "not as the numbers of its outputs",
            )
    elif None not in as_number.values():
        meaning = as_number
        check_class_labels(class_names, as_number, names)
    else:
        meaning = either_reading(as_name, as_number, names)

    has_default_names = names == [f"LABEL_{number}" for number in range(len(names))]
    if has_default_names and set(as_name.values()) == {None} and None in meaning.values():
        refuse_unnamed_labels([class_names.get(key, key[1]) for key in as_name], names)

    outputs_by_label = {split: {} for split in splits}
    for (split, written), output in meaning.items():
        outputs_by_label[split][written] = output
    return outputs_by_label


def refuse_unnamed_labels(labels, names):
    """Raise Problem if the data could name the teacher's labels, which have no names yet."""
    found = sorted_labels({canonical_label(label) for label in labels})
    if len(found) == len(names):
        id2label = json.dumps(dict(enumerate(found)), ensure_ascii=False)
        raise Problem(
            f"LABEL_COLUMN = {LABEL_COLUMN!r}: the labels of the data are {short_list(found)}; the "
            f"teacher's have no names of their own, only {short_list(names)}. Write the names into "
            f'its config.json, in the order in which it was trained: "id2label": {id2label} is '
            "the sorted order. With a wrong order its accuracy on train is low."
        )


def sorted_labels(labels):
    """Return labels as a list: numbers by value, others by the alphabet."""
    are_numbers = all(re.fullmatch(r"-?\d+(\.\d+)?", label) for label in labels)
    return sorted(labels, key=float if are_numbers else None)


def either_reading(as_name, as_number, names):
    """Return names where there is one, else numbers; Problem if that would explain all labels.

    Labels that are neither stay None: `validate_rows` names their rows.
    """
    meaning = {}
    for key, output in as_name.items():
        meaning[key] = as_number[key] if output is None else output
    if None in meaning.values():
        return meaning
    name_split, name = next(key for key in as_name if as_number[key] is None)
    number_split, number = next(key for key in as_name if as_name[key] is None)
    raise Problem(
        f"LABEL_COLUMN = {LABEL_COLUMN!r}: {name!r} in {name_split} is a name of the teacher's "
        f"labels ({short_list(names)}), {number!r} in {number_split} can only be a number of its "
        "outputs. Write all as names, or all as numbers from 0."
    )


def check_class_labels(class_names, as_number, names):
    """Raise Problem if ClassLabels that are taken by number have names that contradict it."""
    output_of = {name.casefold(): output for output, name in enumerate(names)}
    output_by_class_name = {}
    for (split, written), class_name in class_names.items():
        output = as_number[split, written]
        has_other_output = output_of.get(class_name.casefold(), output) != output
        differs_between_splits = output_by_class_name.setdefault(class_name, output) != output
        if has_other_output or differs_between_splits:
            raise Problem(
                f"DATA = {DATA!r}: the class label {written} of {split} is named {class_name!r}, "
                f"but the teacher's output {output} {names[output]!r}, and not all of the labels "
                f"are names of the teacher's ({short_list(names)}). Name or number them as the "
                "teacher does, in all splits alike."
            )
    if output_by_class_name:
        pairs = sorted(output_by_class_name.items(), key=lambda pair: pair[1])
        meanings = [f"{class_name} is {names[output]}" for class_name, output in pairs]
        log(
            "note",
            "the class labels of the data have other names than the teacher's and are taken by "
            f"their numbers: {short_list(meanings)}",
        )


# ── Token ids and batches ─────────────────────────────────────────────────────────────────────────

MAX_CHARACTERS = 30_000  # of a text that are read: far more than any MAX_LENGTH tokens have
MAX_UNKNOWN_SHARE = 0.03  # of a split's tokens; a vocabulary that fits the texts knows nearly all
TEXTS_PER_PROCESS = 100_000  # fewer would not pay for starting another process to tokenize
TOKENS_PER_BATCH = 2048  # of inference: enough to keep the processor busy, and they fit its cache
BATCHES_PER_POOL = 16  # batches of training whose texts are sorted by length together
MECAB_LOCK = threading.Lock()  # MeCab answers one thread at a time
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
    arguments = {
        "columns": text_columns(),
        "tokenizers": tokenizers,
        "max_length": MAX_LENGTH,
    }
    for split, rows in data.items():
        n_workers = min(len(rows) // TEXTS_PER_PROCESS, os.cpu_count() // world_size())
        data[split] = map_to_cache(
            rows,
            encode_batch,
            remove_columns=text_columns(),
            num_proc=n_workers or None,
            fn_kwargs=arguments,
        )
    log_tokens(data, tokenizer)
    log_shared_texts(data)
    return data


def encode_batch(batch, columns, tokenizers, max_length):
    """Return the new columns for a batch of texts. It may run in another process."""
    texts = [batch[column] for column in columns]
    new_columns = {}
    for prefix, tokenizer in tokenizers.items():
        for name, values in encode(texts, tokenizer, max_length).items():
            new_columns[prefix + name] = values
    id_columns = [
        new_columns[name] for name in ("input_ids", "token_type_ids") if name in new_columns
    ]
    new_columns["key"] = [text_key(row) for row in zip(*id_columns, strict=True)]
    return new_columns


def text_key(ids):
    """Return a 64-bit integer that names token ids.

    Of a million texts, two share a key with a probability of 3e-8.
    """
    hashed = hashlib.blake2b(repr(ids).encode(), digest_size=8).digest()
    return int.from_bytes(hashed, "little", signed=True)


def log_tokens(data, tokenizer):
    """Say how long the texts are, and note if many of their tokens are unknown."""
    lengths = np.concatenate([column_array(rows, "length") for rows in data.values()])
    truncated = np.concatenate([column_array(rows, "truncated") for rows in data.values()])
    log(
        "data",
        f"{lengths.mean():.1f} tokens per text, at most {lengths.max()}; {truncated.sum():,} of "
        f"{len(truncated):,} texts cut to MAX_LENGTH = {MAX_LENGTH}",
    )
    unknown_shares = []
    for split, rows in data.items():
        share = column_array(rows, "unknown").sum() / max(1, column_array(rows, "length").sum())
        if share > MAX_UNKNOWN_SHARE:
            unknown_shares.append(f"{share:.1%} of {split}")
    if unknown_shares:
        log(
            "note",
            f"the vocabulary does not know many tokens ([UNK]): {', '.join(unknown_shares)}. Are "
            "these texts of the teacher's language, and is the tokenizer, with its dictionary, the "
            "one that the teacher was trained with?",
        )
    first_ids = data["train"][0]["input_ids"][:30]
    log("data", "the first: " + " ".join(tokenizer.convert_ids_to_tokens(first_ids)))


def log_shared_texts(data):
    """Say how many texts of a split are in another, too: such a split flatters a model."""
    keys = {split: column_array(data[split], "key") for split in SPLITS}
    for split, other in ("val", "train"), ("test", "train"), ("test", "val"):
        n_shared = np.isin(keys[split], keys[other]).sum()
        if n_shared:
            log(
                "data",
                f"{n_shared:,} of {len(data[split]):,} texts of {split} also stand in {other}: "
                f"{split} is flattered",
            )


def encode(texts, tokenizer, max_length):
    """Return the token ids of texts, exactly as the stock tokenizer gives them, without padding.

    texts: [texts], or [first texts, second texts] for pairs. A text is a string, or a list of its
    words, each with the white space before it, None for a masked word.
    Returns lists, one value per text: input_ids; for pairs token_type_ids, if the model takes them;
    length; unknown, the number of [UNK]; truncated, whether max_length truncated the text.
    """
    with_types = len(texts) > 1 and "token_type_ids" in tokenizer.model_input_names
    options = {"return_attention_mask": False, "return_token_type_ids": with_types}
    if tokenizer.is_fast:
        rows = [[join_words(text, tokenizer) for text in column] for column in texts]
        columns = dict(tokenizer(*rows, verbose=False, **options))
        encode_row = truncating_copy(tokenizer, max_length)
    else:
        with MECAB_LOCK:
            rows = [list(map(make_encoder(tokenizer), column)) for column in texts]
        columns = join_ids(list(zip(*rows, strict=True)), tokenizer, with_types)
        encode_row = tokenizer.prepare_for_model

    # the stock tokenizer truncates the few that are too long
    is_too_long = [len(ids) > max_length for ids in columns["input_ids"]]
    for row_number, row in enumerate(zip(*rows, strict=True)):
        if is_too_long[row_number]:
            encoded = encode_row(*row, truncation=True, max_length=max_length, **options)
            for name in columns:
                columns[name][row_number] = encoded[name]

    columns["length"] = [len(ids) for ids in columns["input_ids"]]
    columns["unknown"] = [ids.count(tokenizer.unk_token_id) for ids in columns["input_ids"]]
    columns["truncated"] = []
    for row_number, row_texts in enumerate(zip(*texts, strict=True)):
        is_clipped = any(len(text) > MAX_CHARACTERS for text in row_texts)
        columns["truncated"].append(is_too_long[row_number] or is_clipped)
    return columns


@functools.lru_cache(2)
def truncating_copy(tokenizer, max_length):
    """Return a copy of a fast tokenizer for texts that are too long.

    A fast tokenizer keeps the options of its last call, and a call that changes them would disturb
    those of other threads. The original never truncates, its copy always does.
    """
    truncating = copy.deepcopy(tokenizer)
    truncating("", truncation=True, max_length=max_length)
    return truncating


def join_ids(rows, tokenizer, with_types):
    """Put special tokens around the ids of each row, a tuple of one or two id lists."""
    # Ask the tokenizer once where the ids go. Negative numbers take their place.
    n_texts = len(rows[0]) if rows else 1
    template = tokenizer.build_inputs_with_special_tokens(*([-1 - i] for i in range(n_texts)))
    input_ids = []
    for row in rows:
        ids = []
        for token_id in template:
            if token_id < 0:
                ids += row[-1 - token_id]
            else:
                ids.append(token_id)
        input_ids.append(ids)
    columns = {"input_ids": input_ids}
    if with_types:
        columns["token_type_ids"] = [
            tokenizer.create_token_type_ids_from_sequences(*row) for row in rows
        ]
    return columns


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
        if not splits_words(tokenizer):
            tokens = tokenizer.tokenize(join_words(text, tokenizer))
            return tokenizer.convert_tokens_to_ids(tokens)
        if isinstance(text, str):
            if special_tokens.search(text):
                tokens = tokenizer.tokenize(limit_characters(text))
                return tokenizer.convert_tokens_to_ids(tokens)
            text = tokenizer.word_tokenizer.tokenize(
                limit_characters(text), never_split=never_split
            )
        else:
            text = [word and word.strip() for word in text]
        ids = []
        for word in text:
            ids += word_ids(word)
        return ids

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


def map_to_cache(rows, function, **options):
    """Dataset.map into a new file in CACHE: it never reuses a result, and writes nowhere else."""
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


def model_inputs(batch):
    return {name: tensor for name, tensor in batch.items() if name not in TARGETS}


def token_budget_batches(lengths, n_tokens):
    """Yield batches of row numbers, longest texts first: at most n_tokens with the padding."""
    order = np.argsort(-np.asarray(lengths), kind="stable")
    start = 0
    while start < len(order):
        longest = max(1, lengths[order[start]])
        batch_size = max(1, n_tokens // longest)
        yield order[start : start + batch_size]
        start += batch_size


def inference_loader(rows, collate_fn, n_tokens=None, select_batches=list):
    """Return a loader of batches for inference; select_batches chooses among them."""
    lengths = column_array(rows, "length")
    batches = list(token_budget_batches(lengths, n_tokens or TOKENS_PER_BATCH))
    return DataLoader(rows, batch_sampler=select_batches(batches), collate_fn=collate_fn)


def length_grouped_order(lengths, batch_size, seed):
    """Return the row numbers of one epoch: batches of similar length, in random order.

    A last batch that is not full comes last.
    """
    generator = np.random.default_rng(seed)
    order = generator.permutation(len(lengths))
    pool_size = BATCHES_PER_POOL * batch_size
    pools = []
    for start in range(0, len(order), pool_size):
        pool = order[start : start + pool_size]
        pools.append(pool[np.argsort(lengths[pool], kind="stable")])
    order = np.concatenate(pools)
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


def classify_encoded(model, tokenizer, columns, n_tokens=None):
    """Return the logits (texts, classes) of what `encode` returned, in its order."""
    rows = [
        dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)
    ]
    batches = []
    for batch in token_budget_batches(columns["length"], n_tokens or TOKENS_PER_BATCH):
        batches.append(batch.tolist())
    loader = (collate([rows[row] for row in batch], tokenizer.pad_token_id) for batch in batches)
    sorted_logits = torch.cat([logits for _, logits, _ in timed_logits(model, loader)])
    order = torch.tensor(list(itertools.chain.from_iterable(batches)))
    return torch.empty_like(sorted_logits).index_copy_(0, order, sorted_logits)


# ── Teacher cache ─────────────────────────────────────────────────────────────────────────────────

SAVE_SECONDS = 60  # between two savings of the teacher's outputs


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

    def load():
        saved = load_with_checksum(path)
        is_usable = isinstance(saved, dict) and saved.keys() == empty.keys()
        if is_usable and saved["logits"].shape[1:] == empty["logits"].shape[1:]:
            return saved
        return empty

    return on_main_process(load)


def run_teacher(rows, teacher, collate_fn, outputs, path):
    """Run the teacher on `rows`; return `outputs` with the new ones appended, and save them.

    With several processes each runs the teacher on a part of the batches.
    """
    keys = torch.from_numpy(column_array(rows, "key"))
    own_machine = machine_number()
    parts = [outputs]

    def joined():
        return {name: torch.cat([part[name] for part in parts]) for name in outputs}

    def save():
        if rank() == 0:
            save_with_checksum(path, joined())

    loader = inference_loader(rows, collate_fn, select_batches=shard)
    next(timed_logits(teacher, loader), None)  # warm-up
    own_outputs = zip(loader.batch_sampler, timed_logits(teacher, loader), strict=True)
    n_rounds = on_main_process(lambda: len(loader))  # other processes may have one batch less
    last_save = time.monotonic()
    try:
        for _ in progress_bar(range(n_rounds), desc="teacher"):
            own_output = next(own_outputs, None)
            if own_output is not None:
                row_numbers, (_, logits, seconds) = own_output
                own_output = row_numbers, logits, seconds, own_machine
            for output in gather_from_all(own_output):
                if output is not None:
                    row_numbers, logits, seconds, machine = output
                    n_texts = len(row_numbers)
                    part = {
                        "key": keys[row_numbers],
                        "logits": logits,
                        "seconds": torch.full([n_texts], seconds / n_texts),
                        "machine": torch.full([n_texts], machine),
                    }
                    parts.append(part)
            if time.monotonic() - last_save > SAVE_SECONDS:
                save()
                last_save = time.monotonic()
    finally:  # what a stopped run has labelled is not lost
        save()
    return joined()


def machine_number():
    """Return a number for this hardware: times are comparable on one machine only."""
    return int(digest(hardware())[:8], 16)


def warn_if_timed_on_other_hardware(outputs, path):
    """Note if some of the teacher's times were measured on other hardware than this."""
    if (outputs["machine"] != machine_number()).any():
        log(
            "note",
            "the teacher's seconds are from a run with another processor or number of threads, "
            f"those of the student from this one; to compare them, delete {path}",
        )


# ── Trainer and checkpoints ───────────────────────────────────────────────────────────────────────

# what training does not depend on: settings of what comes after it, texts that only describe, and
# what records the command line (PATH_SETTINGS are left out, too)
NOT_IN_RUN_ID = (
    "REPORT_TO",
    "EXPORT",
    "BASELINE",
    "CASCADE_KEEPS",
    "ASK_TEACHER",
    "SAVE_SECONDS",
    "MODEL_CARD",
    "REPORT_FILES",
    "CACHE_MARK",
    "SOURCE",
    "COMMAND_LINE_SETTINGS",
)


def make_trainer(
    model, data, collate_fn, trainer_class, epochs=None, learning_rate=None, patience=None
):
    """Return a trainer on the CPU. It provides AdamW, the schedule, callbacks and trackers.

    epochs, learning_rate, patience: instead of those in the settings.
    """
    with as_problem(f"REPORT_TO = {REPORT_TO!r}", 'Install what is missing, or set "none"'):
        args = TrainingArguments(
            output_dir=CACHE,
            use_cpu=True,
            seed=SEED,
            num_train_epochs=epochs or EPOCHS,
            per_device_train_batch_size=BATCH_SIZE,
            learning_rate=learning_rate or student_learning_rate(),
            lr_scheduler_type=SCHEDULE,
            warmup_steps=WARMUP_STEPS,
            weight_decay=WEIGHT_DECAY,
            max_grad_norm=MAX_GRAD_NORM,
            eval_strategy="epoch",
            save_strategy="epoch",
            load_best_model_at_end=True,
            metric_for_best_model="eval_loss",
            greater_is_better=False,
            remove_unused_columns=False,  # True would remove soft_labels
            dataloader_pin_memory=False,
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
            callbacks=[EarlyStoppingCallback(patience or PATIENCE)],
        )
    trainer.remove_callback(PrinterCallback)
    return trainer


def training_run_id(trainer):
    """Return what training depends on, {name: value or hash}: constants, code, data, weights.

    What files and folders hold is in the data and the weights; where they lie does not count, so
    that a run resumes after it was moved. Raise Problem if the processes differ.
    """
    run_id = {}
    for name, value in plain_constants().items():
        if name not in (*NOT_IN_RUN_ID, *PATH_SETTINGS):
            run_id[name] = repr(value)
    run_id["the number of epochs"] = trainer.args.num_train_epochs
    run_id["the learning rate"] = trainer.args.learning_rate
    run_id["the code"] = digest(code_of())
    run_id["the versions"] = versions()
    # Computed numbers may differ in the last bit from one processor to another. Weights are those
    # of the first process in any case (DDP), and soft labels as good as equal.
    check_same("settings, distill.py, or versions of Python, PyTorch or transformers", run_id)
    check_same("data", training_data(trainer, without={"soft_labels", "teacher_logits"}))

    def with_hashes():
        models = [*trainer.run_id_parts, *trainer.extra_state().values(), trainer.model]
        return run_id | {
            "the data": digest(training_data(trainer)),
            "the models and losses": digest(*models),
        }

    return on_main_process(with_hashes)


def plain_constants():
    """Return {name: value} for the constants of this file that are settings, numbers or texts."""
    constants = {}
    for name, value in globals().items():
        is_constant = name.isupper() and isinstance(value, str | int | float | tuple | None)
        if is_constant or name in ACCEPTED or name in ("METHOD_TERMS", "GENERATOR_WEIGHTS"):
            constants[name] = value
    return constants


def versions():
    python = ".".join(platform.python_version_tuple()[:2])
    libraries = f"PyTorch {torch.__version__}, transformers {transformers.__version__}"
    return f"Python {python}, {libraries}"


def code_of(*names):
    """Return the code of these functions, classes and Class.methods, and of what they use by name.

    It is a text: syntax trees without comments and docstrings, the values of the constants that are
    used, the versions of the libraries, and hashes of the modules that belong to no installed
    package and of what a script has put in the place of ours. A method that is called on an object,
    self.x(), is not followed: name it, too.

    Without names: all code of this file, without the settings and the versions.
    """
    definitions = parse_definitions()
    assert {*names} <= definitions.keys(), names
    settings = plain_constants()
    code = {"versions": versions()} if names else {}
    # never part of the code; code_of mentions every setting, but what calls it depends on none
    ignored = {"code_of", "ORIGINAL_OBJECTS", *NOT_IN_RUN_ID, *PATH_SETTINGS}
    used = set()
    remaining = list(names or definitions)
    while remaining:
        name = remaining.pop()
        if name in used | ignored:
            continue
        used.add(name)
        if name in definitions and name not in settings:
            code[name], used_names = definitions[name]
            remaining += used_names
            remaining += [other for other in definitions if other.startswith(f"{name}.")]
    values = {
        name: value
        for name, value in globals().items()
        if name in used and is_plain_value(value) and (names or name not in settings)
    }
    replaced = {
        name: without_name(value)
        for name, value in named_objects().items()
        if {name, name.split(".")[0]} & used and ORIGINAL_OBJECTS.get(name) is not value
    }
    code["values"] = hash_of(sorted(values.items()))
    code["replaced"] = hash_of(sorted(replaced.items()), own_modules())
    return repr(sorted(code.items()))


def named_objects():
    """Return {name: object} for functions and classes here, and for what classes and dicts hold."""
    objects = {}
    for name, value in globals().items():
        members = {}
        if isinstance(value, type):
            members = vars(value)
        elif isinstance(value, dict) and name != "ORIGINAL_OBJECTS":
            members = value
        if callable(value):
            objects[name] = value
        is_own_class = getattr(value, "__module__", None) == __name__
        for key, member in members.items():
            if is_own_class or callable(member):
                objects[f"{name}.{key}"] = member
    return objects


def without_name(value):
    """Return a function without its name, so that it is pickled by its code."""
    if not inspect.isfunction(value):
        return value
    nameless = FunctionType(
        value.__code__, value.__globals__, "nameless", value.__defaults__, value.__closure__
    )
    nameless.__kwdefaults__ = value.__kwdefaults__
    nameless.__dict__.update(value.__dict__)
    return nameless


@functools.cache
def parse_definitions():
    """Return {name: (its syntax tree as text, the names in it)} for what this file defines."""
    definitions = {}
    for statement in ast.parse(SOURCE).body:
        if isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Constant):
            continue  # the docstring of the file
        for node in ast.walk(statement):
            can_have_docstring = isinstance(node, ast.FunctionDef | ast.ClassDef)
            if can_have_docstring and ast.get_docstring(node) is not None:
                node.body = node.body[1:]

        if isinstance(statement, ast.FunctionDef | ast.ClassDef):
            named = {statement.name: statement}
        else:  # what it assigns, also within a with or an if; an import, say, assigns no Name
            names = [part.id for part in ast.walk(statement) if is_global_name(part)]
            named = dict.fromkeys(names or [ast.dump(statement)], statement)
        if isinstance(statement, ast.ClassDef):
            for method in statement.body:
                if isinstance(method, ast.FunctionDef):
                    named[f"{statement.name}.{method.name}"] = method
        for name, node in named.items():
            used_names = {part.id for part in ast.walk(node) if isinstance(part, ast.Name)}
            code, more_names = definitions.get(name, ("", []))  # a name may be defined twice
            definitions[name] = code + ast.dump(node), sorted({*used_names, *more_names})
    return definitions


def is_global_name(node):
    """Whether a node assigns a global name; the variables of comprehensions are none."""
    is_assigned = isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)
    return is_assigned and node.id in globals()


def training_data(trainer, without=frozenset()):
    """Yield the columns that training depends on, part by part."""
    for rows in trainer.train_dataset, trainer.eval_dataset:
        columns = {*rows.column_names} - {"teacher_seconds", "teacher_layers"} - without
        yield from iter_batches(rows, *sorted(columns))


def start_or_resume(trainer, checkpoint_path, run_id):
    """Make optimizer and schedule and load the checkpoint of this run, if there is one; return it.

    A checkpoint is a dict: run_id, history and, after the first epoch, best (weights) and the
    `training_state`.
    """
    args = trainer.args
    n_steps = int(args.num_train_epochs) * len(trainer.get_train_dataloader())
    if n_steps <= WARMUP_STEPS:
        log(
            "note",
            f"WARMUP_STEPS = {WARMUP_STEPS}, but training has {n_steps} steps at most: the "
            "learning rate is never reached. Lower it, or BATCH_SIZE",
        )
    trainer.create_optimizer_and_scheduler(num_training_steps=n_steps)

    checkpoint = on_main_process(lambda: load_with_checksum(checkpoint_path))
    if checkpoint is not None and checkpoint.get("run_id") != run_id:
        saved_id = checkpoint["run_id"] if isinstance(checkpoint.get("run_id"), dict) else {}
        different = [key for key in run_id | saved_id if saved_id.get(key) != run_id.get(key)]
        log(
            "training",
            f"starts anew; changed since the last checkpoint: {short_list(different)}",
        )
        checkpoint = None
    if checkpoint is None:
        checkpoint = {"run_id": run_id, "history": []}
    else:
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


def raise_if_not_finite(loss, epoch, learning_rate):
    """Raise Problem if a loss is infinite or NaN."""
    if not math.isfinite(loss):
        raise Problem(
            f"the loss is not a number any more in epoch {epoch}. Lower LEARNING_RATE (now "
            f"{learning_rate}). What was saved before is still there."
        )


def end_training(trainer):
    trainer.model_wrapped = trainer.model
    trainer.callback_handler.on_train_end(trainer.args, trainer.state, trainer.control)


def training_parts(trainer):
    """Return what changes in training: {name: module, optimizer or schedule}."""
    return {
        "model": trainer.model,
        "optimizer": trainer.optimizer,
        "scheduler": trainer.lr_scheduler,
        **trainer.extra_state(),
    }


def training_state(trainer):
    return {name: part.state_dict() for name, part in training_parts(trainer).items()}


def copy_weights(model):
    return copy.deepcopy(model.state_dict())


# ── Fast BERT: the same results in less time ──────────────────────────────────────────────────────


class BertForSequenceClassification(transformers.BertForSequenceClassification):
    """The stock class with the same parameters, outputs and gradients, and a faster last layer.

    It has the stock name because config.json saves the name, for every program that loads the
    student.

    Of the last layer the classifier reads one position, [CLS]. So the query, the output of the
    attention and the feed-forward are computed for that position only. Keys and values are not
    computed for any, because matrix products are associative (per head; x: input of the layer,
    x_0: of [CLS]):

        score    (W_q x_0 + b_q) · (W_k x_j + b_k) = (W_kᵀ q) · x_j + c
                 c is the same for all j, and softmax drops it
        context  Σ_j p_j (W_v x_j + b_v) = W_v (Σ_j p_j x_j) + b_v Σ_j p_j
                 with dropout Σ_j p_j is not 1

    If a caller asks for more than logits and loss, the stock forward runs.
    """

    def __init__(self, config):
        super().__init__(config)
        for module in self.modules():
            if type(module) is torch.nn.Dropout:
                module.__class__ = FastDropout

    def forward(
        self,
        input_ids=None,
        attention_mask=None,
        token_type_ids=None,
        position_ids=None,
        inputs_embeds=None,
        labels=None,
        **more,
    ):
        """Take the arguments of the stock forward; logits: (batch, classes)."""
        config = self.config
        needs_stock_forward = (
            more
            or position_ids is not None
            or (input_ids is None) == (inputs_embeds is None)
            or (attention_mask is not None and attention_mask.dim() != 2)
            or (labels is not None and config.problem_type != "single_label_classification")
            or config.is_decoder
            or config.output_hidden_states
            or config.output_attentions
            or not config.return_dict
        )
        if needs_stock_forward:
            return super().forward(
                input_ids,
                attention_mask,
                token_type_ids,
                position_ids,
                inputs_embeds,
                labels,
                **more,
            )

        # embeddings, and all layers but the last
        x = embed(self.bert.embeddings, input_ids, token_type_ids, inputs_embeds)
        mask = None
        if attention_mask is not None and (
            torch.compiler.is_exporting() or not attention_mask.all()
        ):
            is_padding = 1 - attention_mask[:, None].to(x.dtype)
            mask = is_padding * torch.finfo(x.dtype).min  # (batch, 1, length)
        *layers, last_layer = self.bert.encoder.layer
        for layer in layers:
            x = layer(x, None if mask is None else mask[:, None])

        # the last layer, for [CLS]
        x = cls_layer(last_layer, x, mask)
        logits = self.classifier(self.dropout(self.bert.pooler(x[:, None])))
        loss = None if labels is None else F.cross_entropy(logits, labels.view(-1))
        return SequenceClassifierOutput(loss=loss, logits=logits)


def cls_layer(layer, x, mask):
    """Return the output of a BertLayer at the first position, (batch, hidden).

    x: (batch, length, hidden). mask: (batch, 1, length), added to the scores; or None.
    """
    attention = layer.attention.self
    n_heads = attention.num_attention_heads
    head_size = attention.attention_head_size
    key_weight = attention.key.weight.view(n_heads, head_size, -1)
    value_weight = attention.value.weight.view(n_heads, head_size, -1)
    value_bias = attention.value.bias.view(n_heads, head_size)
    cls = x[:, 0]

    # W_kᵀ q, for each head: (batch, heads, hidden)
    query = attention.query(cls).view(-1, n_heads, head_size).transpose(0, 1) * head_size**-0.5
    score_vectors = torch.bmm(query, key_weight).transpose(0, 1)

    # Σ p_j x_j and Σ p_j; dropout is applied to ones, so that its mask can be multiplied in
    keep = None
    if layer.training:
        keep = attention.dropout(x.new_ones(*score_vectors.shape[:2], x.shape[1]))
    p_sum, x_mean = ClsAttention.apply(x, score_vectors, mask, keep)

    context = torch.bmm(value_weight, x_mean.permute(1, 2, 0)).permute(2, 0, 1)
    context = context + value_bias * p_sum
    attention_output = layer.attention.output(context.flatten(1), cls)
    return layer.feed_forward_chunk(attention_output)


def embed(embeddings, input_ids, token_type_ids, inputs_embeds):
    """Return what BertEmbeddings returns, (batch, length, hidden).

    Positions and types are added first, which saves one pass over the large tensor: 0 to 14 % of
    the time of inference (one layer, batch 32, 16 and 64 tokens).
    """
    length = (input_ids if inputs_embeds is None else inputs_embeds).shape[1]
    if token_type_ids is None:
        types = embeddings.token_type_embeddings.weight[0]
    else:
        types = embeddings.token_type_embeddings(token_type_ids)
    positions = embeddings.position_embeddings.weight[:length] + types
    if inputs_embeds is None:
        x = embeddings.word_embeddings(input_ids).add_(positions)
    else:
        x = inputs_embeds + positions
    return embeddings.dropout(embeddings.LayerNorm(x))


class FastDropout(torch.nn.Dropout):
    """Dropout with the same distribution, drawn faster.

    It draws the gaps between the units that are dropped, which are geometric and 1/p times fewer
    than the units: 1 to 15 % of the time of a training step (one layer, batch 32, p = 0.1, 16 and
    64 tokens).
    """

    def _get_name(self):
        return "Dropout"  # the structure is printed like the teacher's

    def forward(self, x):
        if not self.training or self.p == 0:
            return x
        expected = x.numel() * self.p
        n_gaps = int(expected + 10 * expected**0.5 + 10)  # ten standard deviations more
        uniform = torch.rand(n_gaps, device=x.device)
        gaps = (uniform.neg_().log1p_() / math.log1p(-self.p)).long() + 1
        dropped = gaps.cumsum(0) - 1
        dropped = dropped[: torch.searchsorted(dropped, x.numel())]
        return (x.flatten().index_fill(0, dropped, 0) / (1 - self.p)).view_as(x)


class ClsAttention(torch.autograd.Function):
    """Attention of one position: returns Σ_j p_j (b, heads, 1) and Σ_j p_j x_j (b, heads, hidden).

    p = softmax(scores · x + mask) * keep, with x (b, length, hidden), scores (b, heads, hidden),
    mask (b, 1, length) or None, keep (b, heads, length) or None. The gradient is written by hand:
    that of x, the one large tensor, is one product instead of two and a sum.
    """

    @staticmethod
    def forward(context, x, scores, mask, keep):
        logits = torch.bmm(scores, x.transpose(1, 2))
        if mask is not None:
            logits = logits + mask
        weights = logits.softmax(-1)
        p = weights if keep is None else weights * keep
        context.save_for_backward(x, scores, weights, p, keep)
        return p.sum(-1, keepdim=True), torch.bmm(p, x)

    @staticmethod
    def backward(context, grad_sum, grad_mean):
        x, scores, weights, p, keep = context.saved_tensors
        grad_p = torch.bmm(grad_mean, x.transpose(1, 2)) + grad_sum
        grad = weights * (grad_p if keep is None else grad_p * keep)
        grad -= weights * grad.sum(-1, keepdim=True)
        left = torch.cat([grad, p], 1).transpose(1, 2)
        grad_x = torch.bmm(left, torch.cat([scores, grad_mean], 1))
        return grad_x, torch.bmm(grad, x), None, None


@contextlib.contextmanager
def only_used_embeddings(trainer):
    """In this block trainer.model has only the embedding rows of tokens that occur in its data."""
    model = trainer.model
    is_ours = isinstance(model, BertForSequenceClassification | BiLSTM)
    if not is_ours or trainer.needs_all_embeddings:  # others may use their embeddings elsewhere
        yield
        return
    with used_embedding_rows(model, trainer.train_dataset, trainer.eval_dataset):
        yield


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

    # an embedding of these rows, which still takes the original token ids
    new_id = is_used.cumsum(0) - 1
    padding_idx = None if full.padding_idx is None else new_id[full.padding_idx].item()
    rows = torch.cat([full.weight[is_used], torch.ones_like(full.weight[:1])]).detach()
    small = torch.nn.Embedding(*rows.shape, padding_idx, _weight=rows)
    small.register_forward_pre_hook(lambda module, inputs: new_id[inputs[0]])
    model.set_input_embeddings(small)
    try:
        yield
    finally:
        with torch.no_grad():
            full.weight *= small.weight[-1]
            full.weight[is_used] = small.weight[:-1]
        model.set_input_embeddings(full)


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
    if INIT_LAYERS == "first":
        layers = range(NUM_LAYERS)
    elif INIT_LAYERS == "middle":
        start = (depth - NUM_LAYERS + 1) // 2
        layers = range(start, start + NUM_LAYERS)
    elif INIT_LAYERS == "last":
        layers = range(depth - NUM_LAYERS, depth)
    elif INIT_LAYERS == "spread":
        step = (depth - 1) / max(NUM_LAYERS - 1, 1)
        layers = [round(number * step) for number in range(NUM_LAYERS)]
    else:
        layers = INIT_LAYERS
    if min(layers) < 0 or max(layers) >= depth:
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
        config.layer_types = [
            config.layer_types[layer % len(config.layer_types)] for layer in layers
        ]

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

REFIT_WORDS = 2  # teacher layers that the word vectors are fitted to; 0: they stay the teacher's


@torch.inference_mode()
def refit_word_vectors(student, teacher, tokenizer, rows, collate_fn):
    """Set each word vector of the student to what the teacher's first layers make of the word.

    The student's layer comes from the middle of the teacher, where it met words that the layers
    below had read in context; in the student it meets bare word vectors. So each of these becomes
    the vector that the embeddings' LayerNorm turns into the mean of the word's states after
    REFIT_WORDS layers, over `rows` and the word by itself (in the manner of Bommasani et al. 2020,
    https://aclanthology.org/2020.acl-main.431). It is an ordinary embedding, and trained further.
    """
    is_bert_of_teacher = (STUDENT, STUDENT_INIT) == ("bert", "teacher")
    if REFIT_WORDS == 0 or not is_bert_of_teacher or teacher.config.model_type != "bert":
        return
    n_layers = min(REFIT_WORDS, teacher.config.num_hidden_layers)

    def make_vectors():
        log(
            "teacher",
            f"its first {n_layers} layers read the training texts once more, for the student's "
            "word vectors",
        )
        return contextual_vectors(teacher, n_layers, tokenizer, rows, collate_fn)

    code = code_of("contextual_vectors", "BertForSequenceClassification", "make_collate_fn")
    vocabulary = sorted(tokenizer.get_vocab().items())
    special_ids = sorted(tokenizer.all_special_ids), tokenizer("")["input_ids"]
    parts = teacher, n_layers, vocabulary, special_ids, code, iter_batches(rows, "key")
    vectors = on_main_process(lambda: cached("words", make_vectors, *parts))
    student.get_input_embeddings().weight.copy_(vectors)


def contextual_vectors(teacher, n_layers, tokenizer, rows, collate_fn):
    """Return the word vectors for `refit_word_vectors`, (vocabulary, hidden)."""
    lower_layers = copy_with_layers(
        teacher, type(teacher), range(n_layers), teacher.state_dict()
    ).bert.eval()
    embeddings = lower_layers.embeddings
    norm = embeddings.LayerNorm
    plain_vectors = embeddings.word_embeddings.weight

    # the training texts, then every word by itself: [CLS] word [SEP]
    word_ids = {*range(len(plain_vectors))} & {*tokenizer.get_vocab().values()}
    word_ids = sorted(word_ids - {*tokenizer.all_special_ids})
    cls_id, *end_ids = tokenizer("")["input_ids"]
    single_words = [[cls_id, word_id, *end_ids] for word_id in word_ids]
    lengths = [len(ids) for ids in single_words]
    single_rows = datasets.Dataset.from_dict({"input_ids": single_words, "length": lengths})
    loaders = [inference_loader(part, collate_fn) for part in (rows, single_rows)]

    # sums over all occurrences of a token
    state_sums = torch.zeros_like(plain_vectors)
    position_sums = torch.zeros_like(plain_vectors)
    counts = torch.zeros(len(plain_vectors), 1)
    n_batches = sum(map(len, loaders))
    for batch in progress_bar(itertools.chain(*loaders), total=n_batches, desc="words"):
        ids = batch["input_ids"]
        is_token = batch["attention_mask"].bool()
        states = lower_layers(**model_inputs(batch)).last_hidden_state
        # undo the LayerNorm; the small constant avoids a division by 0
        states = (states - norm.bias) * norm.weight / (norm.weight**2 + 1e-4)
        token_types = batch.get("token_type_ids", torch.zeros_like(ids))
        types = embeddings.token_type_embeddings(token_types)
        positions = embeddings.position_embeddings.weight[: ids.shape[1]] + types
        state_sums.index_add_(0, ids[is_token], states[is_token])
        position_sums.index_add_(0, ids[is_token], positions[is_token])
        counts.index_add_(0, ids[is_token], torch.ones(len(ids[is_token]), 1))

    # The LayerNorm does not depend on the size of its input: the size stays as it was.
    mean_positions = position_sums / counts.clamp(min=1)
    size = (plain_vectors + mean_positions).std(-1, correction=0, keepdim=True)
    normalized = F.layer_norm(state_sums, state_sums.shape[-1:], eps=0)
    return torch.where(counts > 0, normalized * size - mean_positions, plain_vectors)


# ── Option: a teacher that is still to be made ────────────────────────────────────────────────────

TEACHER_BASE = None  # TEACHER does not exist yet? fine-tune this base model into it
TEACHER_EPOCHS = 3  # at most, in that fine-tuning
TEACHER_LEARNING_RATE = 3e-5  # in that fine-tuning

# as long as there is nothing at this TEACHER, and DATA is the sample, a sample teacher stands in
DEFAULT_TEACHER = "./finetuned_bert_japanese"


def find_teacher():
    """Return (name, teacher_recipe): the teacher's folder or hub name, and how it is to be made.

    teacher_recipe: a dict of base, epochs, learning_rate, patience; None if the teacher is there.
    name: None if there is no teacher, only its answers (SOFT_LABELS_COLUMN) and STUDENT_INIT.
    """
    source = on_main_process(teacher_source)  # the first machine decides: others may have less
    if source == "none":
        return None, None
    if source == "base":
        refuse_teacher_elsewhere()
        return TEACHER, {
            "base": TEACHER_BASE,
            "epochs": TEACHER_EPOCHS,
            "learning_rate": TEACHER_LEARNING_RATE,
            "patience": PATIENCE,
        }
    if source == "sample base":
        base = Path(__file__).resolve().parent / DATA / "base"
        recipe = {"base": str(base), "epochs": 6, "learning_rate": 1e-3, "patience": 6}
        return sample_teacher_folder(), recipe
    name = sample_teacher_folder() if source == "sample" else TEACHER
    share_teacher(name, is_sample=source == "sample")
    return name, None


def teacher_source():
    """Return where the teacher comes from, and log it.

    "none": there is no teacher. "ready": it is TEACHER. "base": it is to be made of TEACHER_BASE.
    "sample", "sample base": it is the sample teacher, which is there, or is to be made.
    """
    if starts_without_teacher():
        return "none"
    if os.path.exists(TEACHER):
        if TEACHER_BASE is not None:
            log(
                "note",
                f"{TEACHER} is there and is used as it is; delete it to have it made anew from "
                f"{TEACHER_BASE}",
            )
        warn_if_sample_data()
        return "ready"
    if TEACHER_BASE is not None:
        log("teacher", f"no {TEACHER} yet: {TEACHER_BASE} is fine-tuned into it")
        warn_if_sample_data()
        return "base"

    if stands_in_for_teacher():
        is_made = has_sample_teacher()
        state = "(made before)" if is_made else "and is trained first (about a minute)"
        separator = " " if is_made else ", "
        log(
            "teacher",
            f"no {TEACHER} here, and DATA is the sample: a small sample teacher stands in"
            f"{separator}{state}",
        )
        return "sample" if is_made else "sample base"
    warn_if_sample_data()
    return "ready"  # a hub name, or missing: `load_config` will tell


def stands_in_for_teacher():
    """Whether the sample teacher stands in: nobody has named a teacher, and DATA is the sample."""
    is_untouched = (TEACHER, DATA) == (DEFAULT_TEACHER, "tests/sample")
    is_named = "TEACHER" in COMMAND_LINE_SETTINGS
    return is_untouched and not is_named and not os.path.exists(TEACHER)


def is_sample_student(folder):
    """Whether the student in `folder` is that of the sample teacher, and nobody names another."""
    if not stands_in_for_teacher():
        return False
    with contextlib.suppress(OSError, ValueError, LookupError, TypeError):
        settings = json.loads(Path(folder, "report.json").read_text("utf-8"))["settings"]
        return (settings["TEACHER"], settings["DATA"]) == (TEACHER, DATA)
    return False


def sample_teacher_folder():
    """Return the folder of the sample teacher: in CACHE, so that nobody takes it for their own."""
    return os.path.join(CACHE, "sample_teacher")


def warn_if_sample_data():
    if DATA == "tests/sample":
        log("note", "DATA is still the sample; set it to your teacher's data")


def has_sample_teacher():
    """Whether the sample teacher is made, and not damaged."""
    name = sample_teacher_folder()
    return load_with_checksum(f"{name}.sum") == file_digest(f"{name}/model.safetensors")


def refuse_teacher_elsewhere():
    """Raise Problem if a machine has the TEACHER that the first one has not and is to make."""
    for number, is_there in enumerate(gather_from_all(os.path.exists(TEACHER))):
        if is_there:
            raise Problem(
                f"TEACHER = {TEACHER!r}: the first machine has none and would make one, but "
                f"process {number} already has one. Copy that to the first machine, or delete it."
            )


def share_teacher(name, is_sample):
    """Copy the teacher's folder from the first machine to those that do not have it.

    name: where it lies, or is to lie, on this machine; a hub name is left to the hub.
    is_sample: whether it is the sample teacher. That one is replaced where it is not the same as on
    the first machine; any other folder that is already there is kept.
    """
    if world_size() == 1:
        return
    weights = f"{name}/model.safetensors"
    if is_sample:
        is_missing = file_digest(weights) != on_main_process(lambda: file_digest(weights))
    else:
        is_missing = not os.path.exists(name)
    files = on_main_process(lambda: file_names(name))
    if not files or not any(gather_from_all(is_missing)):
        return

    log("teacher", f"{name} is copied to the machines that do not have it")
    writes = is_first_in(Path(os.path.realpath(name)).parent, is_candidate=is_missing)
    with replaced_folder(name) if writes else contextlib.nullcontext() as new:
        for file_name in files:
            if writes:
                (new / file_name).parent.mkdir(parents=True, exist_ok=True)
            with open(new / file_name if writes else os.devnull, "wb") as file:
                for part in read_on_main_process(Path(name, file_name)):
                    file.write(part)
    if writes and is_sample:
        save_with_checksum(f"{name}.sum", file_digest(weights))
    wait_for_all()


def make_teacher(name, teacher_recipe, config, tokenizer, label2id, data, collate_fn):
    """Fine-tune a base model on the hard labels, with the epoch loop of the student; save it."""
    set_labels(config, label2id)
    transformers.set_seed(SEED)
    is_sample = TEACHER_BASE is None
    if is_sample:  # its base is a configuration without weights
        model = classifier_class(config)(config)
    else:
        model = load_model(teacher_recipe["base"], "TEACHER_BASE", config)
    trainer = make_trainer(
        model,
        data,
        collate_fn,
        HardLabelTrainer,
        teacher_recipe["epochs"],
        teacher_recipe["learning_rate"],
        teacher_recipe["patience"],
    )
    checkpoint_path = Path(CACHE, "teacher_checkpoint.pt")
    train(trainer, checkpoint_path, use_best_if_stopped=False)

    def save():
        save_folder(name, model, tokenizer)
        if is_sample:
            save_with_checksum(f"{name}.sum", file_digest(f"{name}/model.safetensors"))
        checkpoint_path.unlink()

    on_main_process(save)
    share_teacher(name, is_sample)


# ── Option: a teacher that ran elsewhere ──────────────────────────────────────────────────────────

SOFT_LABELS_COLUMN = None  # column with the teacher's probabilities, lists; it is not asked again


def starts_without_teacher():
    """Whether the student starts from STUDENT_INIT because there is no TEACHER at all."""
    is_named = TEACHER != DEFAULT_TEACHER or "TEACHER" in COMMAND_LINE_SETTINGS
    has_start = STUDENT_INIT not in ("teacher", "random")
    no_teacher = not is_named and not os.path.exists(TEACHER)
    return SOFT_LABELS_COLUMN is not None and has_start and no_teacher


def soft_label_columns():
    return [SOFT_LABELS_COLUMN] if SOFT_LABELS_COLUMN else []


def parse_soft_labels(rows, n_classes):
    """Replace SOFT_LABELS_COLUMN by "teacher_probabilities", lists of n_classes numbers.

    Return (rows, {fault: numbers of the rows that have it, from 1}).
    """
    faults = defaultdict(list)

    def parse(batch, row_numbers):
        parsed = []
        values = batch[SOFT_LABELS_COLUMN]
        for row_number, value in zip(row_numbers, values, strict=True):
            probabilities, fault = parse_probabilities(value, n_classes)
            if fault:
                faults[f"{SOFT_LABELS_COLUMN} {fault}"].append(row_number + 1)
            parsed.append(probabilities)
        return {"teacher_probabilities": parsed}

    features = datasets.Features(rows.features)
    features["teacher_probabilities"] = datasets.List(datasets.Value("float64"))
    return map_to_cache(rows, parse, with_indices=True, features=features), faults


def parse_probabilities(value, n_classes):
    """Return (probabilities, fault), of which one is None.

    value: a list of numbers, or the text of one, also as numpy writes it: "[0.1 0.9]" or
    "[np.float64(0.1), np.float64(0.9)]".
    """
    numbers = value
    if isinstance(value, str):
        numbers = re.sub(r"np\.float\d+|[][(),]", " ", value).split()
    try:
        probabilities = [float(number) for number in numbers]
    except (TypeError, ValueError):
        probabilities = []
    if len(probabilities) != n_classes:
        return None, f"is not a list of {n_classes} numbers, one for each label,"
    if not all(0 <= probability <= 1.001 for probability in probabilities):  # NaN is not
        return None, "has numbers that are no probabilities, from 0 to 1,"
    if abs(sum(probabilities) - 1) > 1e-3:
        return None, "has probabilities that do not add up to 1"
    return probabilities, None


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
            "soft_labels": F.softmax(logits / TEMPERATURE, -1).float().numpy(),
            "teacher_seconds": np.zeros(len(logits), np.float32),  # unknown
        }

    log("teacher", f"its probabilities are read from the column {SOFT_LABELS_COLUMN}")
    return {split: map_to_cache(rows, new_columns) for split, rows in data.items()}


# ── Option: less or more text ─────────────────────────────────────────────────────────────────────

TRAIN_FRACTION = 1.0  # share of the labelled training texts to use, each label in proportion
UNLABELED = None  # texts that only the teacher labels: a file (.txt: one per line) or a folder
AUGMENT = 0  # copies of each training text, with some words masked or left out
AUGMENT_MASK = 0.1  # in a copy, the probability that a word becomes [MASK]
AUGMENT_NGRAM = 0.25  # the probability that a copy keeps only 2 to 10 neighbouring words
GENERATOR = None  # model that fills in masked words (None: they stay [MASK]); see MateTrainer, too

TEXT_TYPES = "string", "large_string", "string_view", "null"  # as Arrow and datasets name them


def load_extra_texts(train_rows, tokenizer):
    """Return {"unlabeled": …, "copies": …}, as far as the settings ask for them."""
    extra = {}
    if UNLABELED:
        n_classes = None
        if SOFT_LABELS_COLUMN:
            n_classes = len(train_rows[0]["teacher_probabilities"])
        extra["unlabeled"] = read_unlabeled(n_classes)
    if AUGMENT:
        copies = map_to_cache(
            train_rows,
            augment,
            with_indices=True,
            remove_columns=train_rows.column_names,
            fn_kwargs={"split_words": make_word_splitter(tokenizer)},
        )
        extra["copies"] = fill_masks(copies) if GENERATOR else copies
    return extra


def read_unlabeled(n_classes=None):
    """Return the texts of UNLABELED, with NO_LABEL as their label.

    n_classes: the number of soft labels of each, with SOFT_LABELS_COLUMN.
    """
    parts = []
    columns = [*text_columns(), *soft_label_columns()]
    for name, rows in unlabeled_parts(columns):
        part = take_columns(name, columns, rows)
        for column in text_columns():
            kind = part.features[column]
            if getattr(kind, "dtype", None) not in TEXT_TYPES:
                raise Problem(
                    f"UNLABELED = {UNLABELED!r}: column {column} of {name} holds {kind}; accepted "
                    "are texts. Set TEXT_COLUMN to the column with the texts."
                )
        if SOFT_LABELS_COLUMN:
            part, faults = parse_soft_labels(part, n_classes)
            refuse_faulty_rows(f"UNLABELED = {UNLABELED!r}", name, faults)
            part = part.select_columns([*text_columns(), "teacher_probabilities"])
        for column in text_columns():
            part = part.cast_column(column, datasets.Value("string"))
        parts.append(part)
    rows = datasets.concatenate_datasets(parts)

    valid = []
    for part in iter_batches(rows, *text_columns()):
        valid += [all(map(is_text, texts)) for texts in zip(*part.values(), strict=True)]
    valid = [number for number, is_valid in enumerate(valid) if is_valid]
    if not valid:
        raise Problem(
            f"UNLABELED = {UNLABELED!r}: holds no text, only empty lines. Add some, or set None."
        )
    if len(valid) < len(rows):
        log(
            "data",
            f"{UNLABELED}: {len(rows) - len(valid):,} of {len(rows):,} rows hold no text and are "
            "left out",
        )
    rows = rows.select(valid)
    return rows.add_column("labels", [NO_LABEL] * len(rows))


def unlabeled_parts(columns):
    """Yield (name, rows) for each file of UNLABELED, or each split of a save_to_disk folder."""
    path = Path(UNLABELED)
    if path.is_dir() and {"state.json", "dataset_dict.json"} & set(os.listdir(path)):
        with as_problem(f"UNLABELED = {UNLABELED!r}: cannot be read", "Save it again"):
            forbid_outside_paths(path)
            loaded = datasets.load_from_disk(UNLABELED).with_format(None)
        yield from loaded.items() if isinstance(loaded, dict) else [("the set", loaded)]
        return

    kinds = *LABELED_KINDS, ".txt"
    files = []
    if path.is_file():
        files = [path]
    elif path.is_dir():
        for file in sorted(path.iterdir()):
            if file_kind(file) in kinds and not file.name.startswith("."):  # ._x of a Mac
                files.append(file)
    if not files:
        raise Problem(
            f"UNLABELED = {UNLABELED!r}: no such file or folder, or one without texts. Accepted "
            f"are {', '.join(kinds)}; .txt has one text per line."
        )
    if path.is_dir():
        report_unread_files(UNLABELED, path, files)
    for file in files:
        yield file.name, read_file(file, columns)


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
            start = end
            end = text.index(word, start) + len(word)
            words.append(text[start:end])
        return words

    return split_words


def augment(batch, row_numbers, split_words):
    """Return AUGMENT copies of each text, as lists of words, None for a masked word.

    Each word is masked with the probability AUGMENT_MASK; then, with AUGMENT_NGRAM, only 2 to 10
    neighbouring words are kept (Tang et al. 2019, arXiv:1903.12136). Copies have no hard label, as
    it may not hold for them. The random numbers of a text depend on SEED and its row.
    """
    copies = {column: [] for column in text_columns()}
    for position, row_number in enumerate(row_numbers):
        generator = np.random.default_rng([SEED, row_number])
        for column, column_copies in copies.items():
            words = split_words(batch[column][position])
            for _ in range(AUGMENT):
                is_masked = generator.random(len(words)) < AUGMENT_MASK
                new_words = []
                for word, masked in zip(words, is_masked, strict=True):
                    new_words.append(None if masked else word)
                if generator.random() < AUGMENT_NGRAM:
                    length = generator.integers(2, 10, endpoint=True)
                    start = generator.integers(max(len(new_words) - length, 0), endpoint=True)
                    new_words = new_words[start : start + length]
                column_copies.append(new_words)
    return copies | {"labels": [NO_LABEL] * (AUGMENT * len(row_numbers))}


def fill_masks(rows):
    """Fill in the masked words of copies with words drawn from GENERATOR's distribution."""
    model, tokenizer = load_generator()

    @torch.inference_mode()
    def fill(batch, row_numbers):
        generator = torch.Generator().manual_seed(SEED + row_numbers[0])
        for column in text_columns():
            id_lists = encode([batch[column]], tokenizer, MAX_LENGTH)["input_ids"]
            inputs = collate([{"input_ids": ids} for ids in id_lists], tokenizer.pad_token_id)
            is_masked = inputs["input_ids"] == tokenizer.mask_token_id
            if not is_masked.any():
                continue
            logits = token_logits(model, inputs, is_masked, tokenizer.mask_token_id)
            probabilities = logits.softmax(-1)
            probabilities[:, tokenizer.all_special_ids] = 0
            drawn = torch.multinomial(probabilities, 1, generator=generator).flatten()
            drawn_by_text = drawn.split(is_masked.sum(1).tolist())
            for words, token_ids in zip(batch[column], drawn_by_text, strict=True):
                masked_positions = [i for i, word in enumerate(words) if word is None]
                tokens = tokenizer.convert_ids_to_tokens(token_ids)
                # a truncated text has fewer tokens than masked words
                for position, token in zip(masked_positions, tokens, strict=False):
                    words[position] = token.removeprefix("##")
        return batch

    return map_to_cache(rows, fill, batch_size=BATCH_SIZE, with_indices=True)


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
    if STUDENT == "bilstm" and BILSTM_WORDS == "own":
        student_tokenizer = make_word_tokenizer(data)
    elif STUDENT == "bilstm" or STUDENT_INIT in ("teacher", "random"):
        student_tokenizer = tokenizer
    else:
        student_tokenizer = load_init_tokenizer(tokenizer)
    with as_problem(
        "the student's tokenizer cannot be saved",
        "Save it anew with a current transformers, and name it in TOKENIZER",
    ):
        student_tokenizer.save_pretrained(scratch_folder() / "tokenizer")
    return student_tokenizer


def load_init_tokenizer(tokenizer):
    """Return the tokenizer of STUDENT_INIT, or `tokenizer` itself if the two are the same."""
    config = load_config(STUDENT_INIT, "STUDENT_INIT")
    init_tokenizer = load_tokenizer(STUDENT_INIT, config, "student")
    has_same_type = type(init_tokenizer) is type(tokenizer)
    if has_same_type and init_tokenizer.get_vocab() == tokenizer.get_vocab():
        return tokenizer
    if METHOD in METHOD_TERMS:
        raise Problem(
            f"STUDENT_INIT = {STUDENT_INIT!r}: its tokens are not the teacher's, as METHOD = "
            f"{METHOD!r} needs."
        )
    return init_tokenizer


def use_student_ids(data):
    """Return the splits with the ids of the student's tokenizer in place of the teacher's."""
    new_data = {}
    for split, rows in data.items():
        new_names = {}
        for name in rows.column_names:
            if name.startswith("student_"):
                new_names[name] = name.removeprefix("student_")
        # token types go with the teacher's ids, even if the student's tokenizer makes none
        replaced = {*new_names.values(), "token_type_ids"} & {*rows.column_names}
        new_data[split] = rows.remove_columns([*replaced]).rename_columns(new_names)
    return new_data


def make_word_tokenizer(data):
    """Return a BertJapaneseTokenizer whose tokens are MeCab's words.

    They are those that occur more than once in the training texts. The others become [UNK], whose
    vector is thus trained.
    """
    mecab = MecabTokenizer(mecab_dic="unidic_lite")
    counts = Counter()
    for split in "train", "unlabeled":
        if split not in data:
            continue
        for column in text_columns():
            for text in data[split][column]:
                counts.update(mecab.tokenize(limit_characters(text)))
    frequent = sorted(word for word, count in counts.items() if count > 1)
    vocabulary = dict.fromkeys(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *frequent])

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "vocab.txt")
        path.write_text("\n".join(vocabulary), "utf-8")
        tokenizer = transformers.BertJapaneseTokenizer(
            str(path),
            do_subword_tokenize=False,
            word_tokenizer_type="mecab",
            mecab_kwargs={"mecab_dic": "unidic_lite"},
            model_max_length=MAX_LENGTH,
        )
    log(
        "student",
        f"its vocabulary: {len(tokenizer):,} words of {len(counts):,} in the training text",
    )
    return tokenizer


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
        x = self.dropout(self.embedding(input_ids)).transpose(0, 1)  # (length, batch, embedding)
        length, batch_size = x.shape[:2]
        rows = torch.arange(batch_size, device=x.device)
        last = torch.full_like(rows, length - 1)
        if attention_mask is not None:
            last = attention_mask.sum(1) - 1

        # both directions end at the last word of a text; the padding stays behind it
        backwards = (last - torch.arange(length, device=x.device)[:, None]).clamp(min=0)
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
            return torch.lstm(x, (zero, zero), weights, True, 1, 0.0, self.training, False, False)[
                0
            ]

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


# STUDENT → a function of the teacher, the student's tokenizer and the teacher's
STUDENTS = {"bert": build_student, "bilstm": build_bilstm}


def student_learning_rate():
    return BILSTM_LEARNING_RATE if STUDENT == "bilstm" else LEARNING_RATE


# ── Option: other methods ─────────────────────────────────────────────────────────────────────────

LOSS_WEIGHTS = None  # of the terms of a METHOD, in the order of METHOD_TERMS; None: the paper's
MASK_RATE = 0.3  # the probability that a token of a rewritten text is replaced
GENERATOR_STEPS = 10  # steps of the generator, towards texts on which the student errs; then
STUDENT_STEPS = 100  # steps of the student; and so on
GENERATOR_LEARNING_RATE = 5e-7  # in the steps of the generator

# METHOD → the terms of its loss and their weights. ′ marks a term of the rewritten texts.
METHOD_TERMS = {
    "rail": {"CE": 1 / 3, "KL": 1 / 3, "RAIL": 1 / 3},  # arXiv:2109.10164
    "mate": {"CE": 1 / 3, "KL": 1 / 3, "KL′": 1 / 3},  # arXiv:2105.05912
    "cilda": {"CE": 0.333, "KL": 0.333, "CE′": 0.222, "KL′": 0.111},  # arXiv:2204.07674
    "cilda+minild": {  # 言語処理学会 2023 Q3-2
        "CE": 2 / 9,
        "KL": 2 / 9,
        "CRD": 2 / 9,
        "CE′": 1 / 6,
        "KL′": 1 / 12,
        "CRD′": 1 / 12,
    },
}
PROJECTION_SIZE = 128  # of the vectors by which layers of teacher and student are compared
CRD_TEMPERATURE = 2.0  # of the contrast between the texts of a batch
GENERATOR_MAX_GRAD_NORM = 5.0
GENERATOR_WEIGHTS = {"KL": 0.5, "CRD": 0.5}  # of what the generator of CILDA maximizes
WARM_START_STEPS = 100  # in which a generator that is made here learns to fill in words
WARM_START_LEARNING_RATE = 5e-4


class HardLabelTrainer(CustomTrainer):
    """The loss is CE alone: METHOD "none", and the fine-tuning of a teacher."""

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        outputs = model(**model_inputs(inputs))
        loss = F.cross_entropy(outputs.logits, inputs["labels"], reduction="none").mean()
        return (loss, outputs) if return_outputs else loss


class LogitTrainer(CustomTrainer):
    """METHOD "mse": ALPHA * mean((z_S - z_T)²) + (1 - ALPHA) * CE (arXiv:1903.12136)."""

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        outputs = model(**model_inputs(inputs))
        squares = F.mse_loss(outputs.logits, inputs["teacher_logits"], reduction="none")
        loss = combine_with_cross_entropy(squares.mean(-1), outputs.logits, inputs["labels"])
        return (loss, outputs) if return_outputs else loss


class MethodTrainer(CustomTrainer):
    """Base of the methods whose loss is a weighted sum of terms, METHOD_TERMS[METHOD].

    CE: cross-entropy with the hard labels. KL: from the teacher's probabilities to the student's,
    at T = 1. In evaluation the loss has these two only, as they need nothing but the text.
    """

    layer_term = None  # the term that compares layers: "RAIL" or "CRD"

    def set_up_method(self, teacher, tokenizer):
        self.teacher = teacher
        self.mask_token_id = tokenizer.mask_token_id
        special_ids = {*tokenizer.all_special_ids} - {tokenizer.unk_token_id}
        self.special_ids = torch.tensor(sorted(special_ids))
        self.terms = METHOD_TERMS[METHOD]
        if LOSS_WEIGHTS is not None:
            self.terms = dict(zip(self.terms, LOSS_WEIGHTS, strict=True))
        self.n_tokens = max(tokenizer.get_vocab().values()) + 1  # a model may have more rows
        self.run_id_parts = teacher, self.mask_token_id, sorted(special_ids), self.n_tokens

        # sorted by length: less padding where texts are taken in order
        rows = self.train_dataset
        self.train_dataset = rows.select(np.argsort(column_array(rows, "length")))
        self.lengths = column_array(self.train_dataset, "length")

        # layers are compared as vectors of the same size
        config = teacher.config
        self.teacher_depth = getattr(config, "encoder_layers", config.num_hidden_layers)
        transformers.set_seed(SEED)
        teacher_width = self.n_teacher_layers() * config.hidden_size
        student_width = NUM_LAYERS * self.model.config.hidden_size
        self.projections = torch.nn.ModuleList(
            torch.nn.Linear(width, PROJECTION_SIZE, bias=False)
            for width in (teacher_width, student_width)
        )
        if self.layer_term in self.terms:  # on the texts themselves the teacher never changes
            self.train_dataset = self.with_teacher_layers(self.train_dataset)

    def extra_state(self):
        return {"projections": self.projections}

    def create_optimizer(self, *args):
        optimizer = super().create_optimizer(*args)
        if self.layer_term in self.terms:
            projection_weights = [*self.projections.parameters()]
            group = {"params": projection_weights, "weight_decay": WEIGHT_DECAY}
            optimizer.add_param_group(group)
        return optimizer

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        if model.training:
            self.before_step()
        with_layers = model.training and self.layer_term in self.terms
        losses, logits = self.losses(inputs, with_layers)
        if model.training:
            losses |= self.rewritten_losses(inputs)
        loss = 0
        for term, weight in self.terms.items():
            if term in losses:
                loss = loss + weight * losses[term]
        return (loss, SequenceClassifierOutput(logits=logits)) if return_outputs else loss

    def before_step(self):
        """What is trained besides the student, before each of its steps."""

    def rewritten_losses(self, inputs):
        """Return the terms of the rewritten texts: {"KL′": loss, …}."""
        return {}

    def losses(self, inputs, with_layers, rewritten=None):
        """Return ({"CE": loss, "KL": loss, with_layers also layer_term: loss}, logits) of a batch.

        rewritten: see `MateTrainer.rewrite`; None: the texts as they are.
        """
        pool = self.make_pooling(inputs) if with_layers else None
        logits, student_layers = forward_with_layers(self.model, inputs, rewritten, pool)
        if rewritten is None:
            soft_labels = inputs["soft_labels"]
            teacher_layers = inputs.get("teacher_layers")
        else:
            teacher_logits, teacher_layers = forward_with_layers(
                self.teacher, inputs, rewritten, pool
            )
            soft_labels = F.softmax(teacher_logits, -1)

        labels = inputs["labels"]
        cross_entropy = F.cross_entropy(logits, labels, ignore_index=NO_LABEL, reduction="sum")
        kl = F.kl_div(F.log_softmax(logits, -1), soft_labels, reduction="batchmean")
        losses = {"CE": cross_entropy / len(logits), "KL": kl}
        if with_layers:
            layers = self.select_teacher_layers(teacher_layers), student_layers
            vectors = []
            for project, states in zip(self.projections, layers, strict=True):
                vectors.append(project(states.flatten(1)))
            losses[self.layer_term] = self.layer_loss(*vectors)
        return losses, logits

    def layer_loss(self, teacher, student):
        """Return the loss between projected layers, both (batch, PROJECTION_SIZE)."""
        raise NotImplementedError

    def n_teacher_layers(self):
        """Return how many of the teacher's layers are compared in a step."""
        return self.teacher_depth

    def select_teacher_layers(self, teacher_layers):
        """Return those of the teacher's layers that are compared; (batch, layers, hidden)."""
        return teacher_layers

    def make_pooling(self, inputs):
        """Return a function from a layer's states, (batch, length, hidden), to (batch, hidden).

        Here it takes the state of [CLS].
        """
        return lambda states: states[:, 0]

    def with_teacher_layers(self, rows):
        """Add the column teacher_layers, (layers, hidden) per text. It stays on disk, in CACHE."""
        keys = iter_batches(rows, "key")
        parts = self.teacher, METHOD, self.special_ids.tolist(), code_of(), versions(), keys
        path = Path(CACHE, f"layers-{digest(*parts)}.arrow")
        temporary = str(scratch_folder() / path.name)
        if load_with_checksum(f"{path}.sum") != file_digest(path):
            log("teacher", f"one more pass, for METHOD = {METHOD!r}: its layers")

            @torch.inference_mode()
            def pooled_layers(batch):
                batch_rows = [
                    dict(zip(batch, values, strict=True))
                    for values in zip(*batch.values(), strict=True)
                ]
                inputs = self.data_collator(batch_rows)
                pool = self.make_pooling(inputs)
                _, layers = forward_with_layers(self.teacher, inputs, pool=pool)
                return {"teacher_layers": layers.numpy()}

            columns = [
                name for name in ("input_ids", "token_type_ids") if name in rows.column_names
            ]
            rows.select_columns(columns).map(
                pooled_layers,
                batched=True,
                batch_size=64,
                remove_columns=columns,
                new_fingerprint=path.stem,
                cache_file_name=temporary,
            )
            os.replace(temporary, path)
            save_with_checksum(f"{path}.sum", file_digest(path))
        layer_rows = datasets.Dataset.from_file(str(path))
        joined = datasets.concatenate_datasets([rows.flatten_indices(), layer_rows], axis=1)
        return joined.with_format("numpy", ["teacher_layers"], output_all_columns=True)

    def is_ordinary(self, inputs):
        """Return (batch, length): where there is neither padding nor a special token."""
        is_special = torch.isin(inputs["input_ids"], self.special_ids)
        return inputs["attention_mask"].bool() & ~is_special


class RailTrainer(MethodTrainer):
    """METHOD "rail": the student also learns the mean states of some layers (arXiv:2109.10164).

    Which of the teacher's layers these are is drawn at random in each epoch.
    """

    layer_term = "RAIL"

    def n_teacher_layers(self):
        return min(NUM_LAYERS, self.teacher_depth)

    def select_teacher_layers(self, teacher_layers):
        generator = np.random.default_rng([SEED, int(self.state.epoch)])
        drawn = generator.choice(self.teacher_depth, self.n_teacher_layers(), replace=False)
        return teacher_layers[:, np.sort(drawn)]

    def make_pooling(self, inputs):
        """Mean over the ordinary tokens."""
        is_counted = self.is_ordinary(inputs)
        is_counted[:, 0] |= ~is_counted.any(1)  # a text of special tokens only
        weights = is_counted / is_counted.sum(1, keepdim=True)
        return lambda states: torch.einsum("bl,blh->bh", weights, states)

    def layer_loss(self, teacher, student):
        return rail_loss(teacher, student)


class MateTrainer(MethodTrainer):
    """METHOD "mate": the student also learns the teacher's answers on rewritten texts.

    A masked-language model, GENERATOR or one made of the teacher, rewrites masked tokens. Every
    STUDENT_STEPS it is trained for GENERATOR_STEPS to rewrite them so that the student errs
    (arXiv:2105.05912).
    """

    needs_all_embeddings = True  # it writes tokens that the texts do not have
    generator_needs_layers = False

    def set_up_method(self, teacher, tokenizer):
        super().set_up_method(teacher, tokenizer)
        if GENERATOR is None:
            self.generator = make_generator(self)
        else:
            self.generator, _ = load_generator(tokenizer)
        self.adversary = torch.nn.ModuleList([self.generator, self.projections])
        self.generator_optimizer = torch.optim.AdamW(
            self.adversary.parameters(), GENERATOR_LEARNING_RATE, fused=True
        )

    def extra_state(self):
        return {"adversary": self.adversary, "generator_optimizer": self.generator_optimizer}

    def before_step(self):
        if self.state.global_step % STUDENT_STEPS == 0:
            for _ in range(GENERATOR_STEPS):
                self.generator_step(self.random_batch())

    def rewritten_losses(self, inputs):
        with torch.no_grad():
            rewritten = self.rewrite(inputs)
        losses, _ = self.losses(inputs, "CRD′" in self.terms, rewritten)
        return {f"{term}′": loss for term, loss in losses.items()}

    def generator_step(self, inputs):
        """Train the generator (and the projections) for one step; return KL′ before it."""
        rewritten = self.rewrite(inputs, differentiable=True)
        losses, _ = self.losses(inputs, self.generator_needs_layers, rewritten)
        parameters = [*self.adversary.parameters()]
        objective = self.generator_objective(losses)
        gradients = torch.autograd.grad(-objective, parameters, allow_unused=True)  # maximize
        for parameter, gradient in zip(parameters, gradients, strict=True):
            parameter.grad = gradient
        clip_gradients(self.adversary, GENERATOR_MAX_GRAD_NORM)
        self.generator_optimizer.step()
        self.adversary.zero_grad()
        return losses["KL"].item()

    def generator_objective(self, losses):
        return losses["KL"]

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
        return self.data_collator([self.train_dataset[row_number] for row_number in row_numbers])


class CildaTrainer(MateTrainer):
    """METHOD "cilda": the rewritten texts keep their hard labels, and the generator also looks for
    texts whose layers are hard to tell apart (CRD; arXiv:2204.07674).
    """

    layer_term = "CRD"
    generator_needs_layers = True

    def generator_objective(self, losses):
        return sum(weight * losses[term] for term, weight in GENERATOR_WEIGHTS.items())

    def layer_loss(self, teacher, student):
        return contrastive_loss(teacher, student)


class CildaMinildTrainer(CildaTrainer):
    """METHOD "cilda+minild": the student also minimizes CRD (言語処理学会 2023 Q3-2).

    CRD is divided by its value where nothing can be told apart, the logarithm of the batch size.
    """

    def layer_loss(self, teacher, student):
        return contrastive_loss(teacher, student) / math.log(max(len(teacher), 2))


# METHOD → class of its trainer
METHODS = {
    "none": HardLabelTrainer,
    "kd": CustomTrainer,
    "mse": LogitTrainer,
    "rail": RailTrainer,
    "mate": MateTrainer,
    "cilda": CildaTrainer,
    "cilda+minild": CildaMinildTrainer,
}


def rail_loss(teacher, student):
    """Return the mean distance of normalized vectors; both are (batch, PROJECTION_SIZE)."""
    return (F.normalize(teacher) - F.normalize(student)).norm(dim=-1).mean()


def contrastive_loss(teacher, student):
    """Return CRD: how hard it is to find, by the cosine, the student vector of the same text.

    Both are (batch, PROJECTION_SIZE) (arXiv:2204.07674).
    """
    cosines = F.normalize(teacher) @ F.normalize(student).T
    return F.cross_entropy(cosines / CRD_TEMPERATURE, torch.arange(len(cosines)))


def forward_with_layers(model, inputs, rewritten=None, pool=None):
    """Return (logits, layers) of a batch, of which some tokens may be rewritten.

    rewritten: see `MateTrainer.rewrite`. pool: a function from the states of a layer to (batch,
    hidden). layers: pooled states of each encoder layer, (batch, layers, hidden), or None.
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
    layers = [pool(layer_states) for layer_states in states[1:]]  # 0: the embeddings
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
    code = code_of(
        "make_generator",
        "MateTrainer.mask",
        "MateTrainer.random_batch",
        "MethodTrainer.is_ordinary",
        "make_collate_fn",
    )
    parts = teacher, SEED, trainer.mask_token_id, trainer.special_ids.tolist(), code
    keys = iter_batches(trainer.train_dataset, "key")
    weights = cached("generator", lambda: warm_start(generator, trainer), *parts, keys)
    generator.load_state_dict(weights)
    return generator.eval()


def warm_start(generator, trainer):
    """Train a generator to fill in masked words; return its weights."""
    log(
        "generator",
        "no GENERATOR is set: one is made of the teacher's embeddings and lowest layers",
    )
    optimizer = torch.optim.AdamW(
        generator.train().parameters(), WARM_START_LEARNING_RATE, fused=True
    )
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


def load_generator(teacher_tokenizer=None):
    """Return (model, tokenizer) of GENERATOR, a masked-language model.

    teacher_tokenizer: if given, both must have the same vocabulary.
    """
    config = load_config(GENERATOR, "GENERATOR")
    tokenizer = load_tokenizer(GENERATOR, config, "GENERATOR")
    if teacher_tokenizer and tokenizer.get_vocab() != teacher_tokenizer.get_vocab():
        raise Problem(
            f"GENERATOR = {GENERATOR!r}: has {len(tokenizer):,} tokens, which are not the "
            f"teacher's {len(teacher_tokenizer):,}. For METHOD = {METHOD!r} name a masked-language "
            "model of the teacher's vocabulary, or None."
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
    return model.eval(), tokenizer


# ── Option: what distillation was worth ───────────────────────────────────────────────────────────

BASELINE = False  # True: also train the same student on the hard labels alone, and compare


def train_baseline(student, data, collate_fn):
    """Train the student on the hard labels alone; return its metrics, a dict.

    Return None if Ctrl-C stops it, and in every process but the first.
    student: as it was before its distillation. It becomes what METHOD "none" gives, but for the
    word vectors, which are fitted to the texts of UNLABELED and AUGMENT, too.
    """
    log("baseline", "the same student, from the same start, is trained on the hard labels alone")
    trainer = make_trainer(student, data, collate_fn, HardLabelTrainer)
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
    best_epoch = min(history, key=lambda epoch_record: epoch_record["val_loss"])
    return {
        "splits": evaluate(predictions)["student"],
        "epochs": len(history),
        "best_epoch": best_epoch["epoch"],
    }


def format_baseline(report):
    baseline = report["baseline"]["splits"]["test"]
    gain = report["student"]["splits"]["test"]["accuracy"] - baseline["accuracy"]
    return (
        f"Hard labels alone: accuracy {baseline['accuracy']:.4f}, agreement "
        f"{baseline['agreement']:.4f}; distillation is worth {100 * gain:+.1f} points of accuracy."
    )


# ── Option: a cascade, in which the teacher answers where the student is unsure ───────────────────

CASCADE_KEEPS = 0.99  # share of the teacher's accuracy on val that the two together must keep
ASK_TEACHER = None  # in --predict: the probability up to which TEACHER is asked; "auto": as chosen


def evaluate_cascade(val, test):
    """Return how good and how fast student and teacher are together, a dict.

    The student answers every text. Where its probability is at most a threshold, the teacher
    answers instead. The threshold is chosen on val: the lowest that keeps CASCADE_KEEPS of the
    teacher's accuracy; 0 if the student keeps it alone.

    val, test: what `predict` returns. The dict: threshold; on test, share (of the texts that the
    teacher is asked), accuracy, agreement and speedup (over the teacher alone); and curve, lists of
    share, accuracy and speedup at every hundredth of the share. A speedup that is unknown is None.
    """
    threshold = choose_threshold(val)
    curve = cascade_curve(test)
    n_texts = len(test["labels"])
    n_asked = int((curve["probability"] <= threshold).sum())
    n_points = min(n_texts, 100) + 1
    points = [round(n_texts * number / (n_points - 1)) for number in range(n_points)]
    return {
        "threshold": threshold,
        "share": n_asked / n_texts,
        "accuracy": curve["accuracy"][n_asked],
        "agreement": curve["agreement"][n_asked],
        "speedup": curve["speedup"][n_asked],
        "curve": {
            "share": [point / n_texts for point in points],
            "accuracy": [curve["accuracy"][point] for point in points],
            "speedup": [curve["speedup"][point] for point in points],
        },
    }


def cascade_curve(outputs):
    """Return lists of accuracy, agreement and speedup if the teacher is asked 0, 1, … all texts.

    Those of which the student is least sure come first. probability: the student's, in this order.
    outputs: what `predict` returns.
    """
    probability, predicted = outputs["logits"].softmax(-1).max(-1)
    probability, order = probability.sort(stable=True)
    labels, predicted = outputs["labels"][order], predicted[order]
    teacher_predicted = outputs["teacher_logits"].argmax(-1)[order]
    teacher_seconds = outputs["teacher_seconds"][order].double()

    def running_sum(values):  # of the first 0, 1, … all
        return F.pad(values.double().cumsum(0), (1, 0))

    is_correct, teacher_is_correct = predicted == labels, teacher_predicted == labels
    n_correct = is_correct.sum() + running_sum(teacher_is_correct) - running_sum(is_correct)
    agrees = predicted == teacher_predicted
    n_agreeing = agrees.sum() + running_sum(~agrees)
    seconds = outputs["seconds"].double().sum() + running_sum(teacher_seconds)
    speedup = teacher_seconds.sum() / seconds
    is_known = teacher_seconds.sum() > 0  # it is not if the teacher ran elsewhere
    return {
        "probability": probability,
        "accuracy": (n_correct / len(labels)).tolist(),
        "agreement": (n_agreeing / len(labels)).tolist(),
        "speedup": speedup.tolist() if is_known else [None] * len(speedup),
    }


def choose_threshold(val):
    """Return the lowest threshold that keeps CASCADE_KEEPS of the teacher's accuracy on val."""
    curve = cascade_curve(val)
    target = CASCADE_KEEPS * curve["accuracy"][-1] - 1e-9  # all asked: the teacher's accuracy
    probabilities = curve["probability"].tolist()
    for n_asked, accuracy in enumerate(curve["accuracy"]):
        threshold = probabilities[n_asked - 1] if n_asked > 0 else 0.0
        next_probability = probabilities[n_asked] if n_asked < len(probabilities) else None
        # a threshold cannot separate texts of the same probability
        if accuracy >= target and threshold != next_probability:
            break
    return threshold  # at the latest the one that asks all


def format_cascade(cascade):
    """Return the lines of the report about the cascade."""
    keeps = f"{100 * CASCADE_KEEPS:.4g}% of the teacher's accuracy on val"
    if cascade["threshold"] == 0:
        return [f"Cascade: the student alone keeps {keeps}; it needs no teacher."]
    line = (
        f"({cascade['share']:.1%} of test): accuracy {cascade['accuracy']:.4f}, agreement "
        f"{cascade['agreement']:.4f}"
    )
    if cascade["speedup"] is not None:
        line += f", {cascade['speedup']:.1f} times as fast as the teacher"
    return [
        f"Cascade: the teacher answers where the student's probability is at most "
        f"{cascade['threshold']:.6g}",
        line + ".",
        f"This threshold was chosen to keep {keeps}.",
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
    the teacher has other labels.
    """
    if threshold is None:
        threshold = saved_threshold(folder)
    is_number = isinstance(threshold, int | float) and not isinstance(threshold, bool)
    if not is_number or not 0 <= threshold <= 1:
        raise Problem(
            f"threshold (ASK_TEACHER) = {threshold!r}: must be a number from 0 to 1; without one "
            '(ASK_TEACHER = "auto") it is taken from report.json.'
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


def saved_threshold(folder):
    """Return the threshold in the report of a student; Problem if it is of another teacher."""
    with as_problem(
        f"{folder!r}: its report.json holds no threshold of a cascade", "Give one, from 0 to 1"
    ):
        report = json.loads(Path(folder, "report.json").read_text("utf-8"))
        threshold = report["cascade"]["threshold"]
        column = report["settings"].get("SOFT_LABELS_COLUMN")
    if column is not None:
        raise Problem(
            f"{folder!r}: the threshold in its report.json is for the teacher of the column "
            f"{column}, which ran elsewhere. Give one for this teacher, from 0 to 1."
        )
    return threshold


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

EXPORT_FILES = {  # EXPORT → the file that must give the student's logits
    "pt2": "student.pt2",
    "onnx": "student.onnx",
    "onnx-int8": "student.onnx",
}


class ExportGraph(torch.nn.Module):
    """The student as a function of tensors only, each (batch, length), to (batch, classes)."""

    def __init__(self, student):
        super().__init__()
        self.student = student

    def forward(self, input_ids, attention_mask, token_type_ids=None):
        arguments = {"input_ids": input_ids, "attention_mask": attention_mask}
        if token_type_ids is not None:  # not all families take them
            arguments["token_type_ids"] = token_type_ids
        return self.student(**arguments).logits


@torch.no_grad()
def export(student, rows, collate_fn, report):
    """Write the student as EXPORT says into OUTPUT, and what was measured into its report.

    Each file is loaded again and classifies `rows`. No file is kept unless the graph's logits are
    within 1e-4 of the student's; those of 8-bit weights are not, and their accuracy is reported.
    """
    with (
        new_folder() as folder,
        quiet_libraries(),
        as_problem(
            f"EXPORT = {EXPORT!r}: failed, but the student is saved",
            "Choose another format, or None",
        ),
    ):
        graph = ExportGraph(student).eval()
        example_rows = [rows[number % len(rows)] for number in range(8)]
        example = model_inputs(collate_fn(example_rows))
        programs = {"eager": lambda inputs: graph(**inputs)}
        if EXPORT == "pt2":
            programs |= export_pt2(graph, example, folder)
        else:
            programs |= export_onnx(graph, example, folder)

        figures = measure_programs(programs, rows, collate_fn, folder)
        for name, program_figures in figures.items():
            log_program(name, program_figures)
        if not figures[EXPORT_FILES[EXPORT]]["difference"] <= 1e-4:  # NaN, too, is a fault
            raise ValueError("its logits differ from the student's")

        # the report first: a file that it does not name would look like somebody else's
        report["export"] = figures
        report["files"] = sorted({*report["files"], *os.listdir(folder)})
        write_report(report, Path(OUTPUT))
        for name in os.listdir(folder):
            os.replace(f"{folder}/{name}", f"{OUTPUT}/{name}")


def export_options(example):
    """Return the options of torch's exporters for inputs with any batch size and length."""
    free = {0: torch.export.Dim("batch"), 1: torch.export.Dim("length", max=MAX_LENGTH)}
    return {"kwargs": example, "dynamic_shapes": dict.fromkeys(example, free)}


def export_pt2(graph, example, folder):
    """Write student.pt2; return {file name: function from inputs to logits}."""
    path = f"{folder}/student.pt2"
    torch.export.save(torch.export.export(graph, (), **export_options(example)), path)
    program = torch.export.load(path).module()
    return {"student.pt2": lambda inputs: program(**inputs)}


def export_onnx(graph, example, folder):
    """Write student.onnx and, for "onnx-int8", student_int8.onnx; return as `export_pt2` does."""
    import onnx
    import onnxruntime
    from onnxruntime.quantization import quantize_dynamic

    path = f"{folder}/student.onnx"
    program = torch.onnx.export(
        graph,
        (),
        **export_options(example),
        input_names=[*example],
        output_names=["logits"],
        dynamo=True,  # the default from PyTorch 2.9 on
        verbose=False,
    )
    program.save(path)
    if EXPORT == "onnx-int8":
        # ONNX Runtime has no 8-bit kernel for the two products with weights viewed by heads
        excluded = [node.name for node in onnx.load(path).graph.node if "bmm" in node.name]
        quantize_dynamic(
            path,
            f"{folder}/student_int8.onnx",
            per_channel=True,
            extra_options={"EnableSubgraph": True},
            nodes_to_exclude=excluded,
        )

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()

    def load(name):
        session = onnxruntime.InferenceSession(
            f"{folder}/{name}", options, providers=["CPUExecutionProvider"]
        )

        def run_session(inputs):
            arrays = {key: tensor.numpy() for key, tensor in inputs.items()}
            return torch.from_numpy(session.run(None, arrays)[0])

        return run_session

    return {name: load(name) for name in sorted(os.listdir(folder))}


def measure_programs(programs, rows, collate_fn, folder):
    """Return {program: bytes, accuracy, difference (of logits), milliseconds_1, milliseconds_32}.

    Milliseconds are median and p95 per batch, of 1 and of 32 texts.
    """
    figures = {name: {} for name in programs}
    few_rows = rows.select(range(min(len(rows), 40)))
    logits = {}
    for batch_size, measured_rows in (1, few_rows), (32, rows):
        for name, program in programs.items():  # in turn: their threads would compete
            parts = []
            seconds = []
            for batch in DataLoader(measured_rows, batch_size, collate_fn=collate_fn):
                start = time.perf_counter()
                parts.append(program(model_inputs(batch)))
                seconds.append(time.perf_counter() - start)
            logits[name] = torch.cat(parts)
            milliseconds = np.array(seconds[1:] or seconds) * 1000  # the first is a warm-up
            median, p95 = np.percentile(milliseconds, [50, 95])
            figures[name][f"milliseconds_{batch_size}"] = {"median": median, "p95": p95}

    labels = torch.tensor(rows["labels"][:])
    for name, program_figures in figures.items():
        file = f"{OUTPUT}/model.safetensors" if name == "eager" else f"{folder}/{name}"
        is_correct = logits[name].argmax(-1) == labels
        program_figures["bytes"] = os.path.getsize(file)
        program_figures["accuracy"] = is_correct.double().mean().item()
        program_figures["difference"] = (logits[name] - logits["eager"]).abs().max().item()
    return figures


def log_program(name, figures):
    one_text, many_texts = figures["milliseconds_1"], figures["milliseconds_32"]
    log(
        "export",
        f"{name:<17}{figures['bytes']:11,} bytes, accuracy {figures['accuracy']:.4f}, "
        f"logits within {figures['difference']:.0e}; "
        f"1 text {one_text['median']:.2f} ms (p95 {one_text['p95']:.2f}), "
        f"32 texts {many_texts['median']:.2f} ms (p95 {many_texts['p95']:.2f})",
    )


@contextlib.contextmanager
def quiet_libraries():
    """Silence warnings and logs, here of torch.onnx about packages that are not needed."""
    import logging
    import warnings

    level = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(level)


# ── Option: from Python ───────────────────────────────────────────────────────────────────────────


def load_student(folder, teacher=None, threshold=None):
    """Return a function from texts to answers: [{"label": name, "score": probability}, …].

    folder: OUTPUT of a run. texts: a list of texts, or of pairs if the student was trained on
    pairs; the answers are in their order. Raise Problem if there is no student, or a text is none.

    teacher: the folder or hub name of the teacher, who then answers where the student's score is
    at most `threshold`: from 0 to 1, or None for the one in report.json, which was chosen on val.
    Each answer then says who gave it: "by": "student" or "teacher".
    """
    folder = normalize_path(os.fspath(folder))
    model, tokenizer = load_saved(folder)
    n_texts = texts_per_row(folder)
    asked_teacher = None
    if teacher is not None:
        asked_teacher = load_asked_teacher(teacher, threshold, folder, model, tokenizer)
    elif threshold is not None:
        raise Problem(f"threshold = {threshold!r}: needs a teacher to be asked; name it, too.")

    def classify(texts):
        texts = [texts] if isinstance(texts, str) else list(texts)
        answers = list(label_scores(model, tokenizer, encode_texts(tokenizer, texts, n_texts)))
        return ask_teacher(answers, texts, *asked_teacher) if asked_teacher else answers

    return classify


def load_saved(folder):
    """Return (model, tokenizer) of the student in `folder`."""
    folder = normalize_path(os.fspath(folder))
    with as_problem(f"{folder!r}: no student can be loaded from it", "Name the OUTPUT of a run"):
        forbid_outside_paths(folder)
        saved_config = json.loads(Path(folder, "config.json").read_text("utf-8"))
        if saved_config["architectures"][0] == "BiLSTM":
            model = BiLSTM.from_pretrained(folder, dtype=torch.float32)
        else:
            config = load_config(folder, "OUTPUT")
            model = classifier_class(config).from_pretrained(
                folder, config=config, dtype=torch.float32
            )
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
        fit_to_model(tokenizer, model.config)
        tokenizer.model_max_length = min(tokenizer.model_max_length, max_tokens(model.config))
        # a first text, before several threads use it, puts away options saved in tokenizer.json
        encode([["晴れ"]], tokenizer, tokenizer.model_max_length)
    return model.eval(), tokenizer


def texts_per_row(folder):
    """Return 2 if a student was trained on pairs of texts, 1 if not, None if it is unknown."""
    with contextlib.suppress(OSError, ValueError, LookupError, TypeError):
        settings = json.loads(Path(folder, "report.json").read_text("utf-8"))["settings"]
        return 1 if settings["TEXT_PAIR_COLUMN"] is None else 2
    return None


def encode_texts(tokenizer, texts, n_texts=None):
    """Return `encode` of a text, a list of texts, or a list of pairs; Problem for anything else.

    n_texts: 1 or 2, if only texts or only pairs are accepted.
    """
    if isinstance(texts, str):
        texts = [texts]
    rows = [[row] if isinstance(row, str) else row for row in texts]
    if not rows:
        return {"input_ids": []}
    for number, row in enumerate(rows):
        is_row = isinstance(row, tuple | list) and len(row) == len(rows[0]) in (1, 2)
        if not is_row or not all(isinstance(text, str) and is_encodable(text) for text in row):
            raise Problem(
                f"texts[{number}] is {row!r:.60}; each must be a text or, in all rows alike, a "
                "pair of texts, without lone surrogates."
            )
    if len(rows[0]) != (n_texts or len(rows[0])):
        raise Problem(
            "the student was trained on pairs of texts: give both, in --predict with a tab between "
            "them."
            if n_texts == 2
            else "the student was trained on single texts: give no pairs."
        )
    columns = list(zip(*rows, strict=True))
    return encode(columns, tokenizer, tokenizer.model_max_length)


def label_scores(model, tokenizer, encoded):
    """Yield {"label": name, "score": probability} for each of the texts."""
    if not encoded["input_ids"]:
        return
    probabilities = classify_encoded(model, tokenizer, encoded).softmax(-1)
    scores, outputs = probabilities.max(-1)
    for score, output in zip(scores.tolist(), outputs.tolist(), strict=True):
        yield {"label": model.config.id2label[output], "score": score}


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
    model, tokenizer = load_saved(OUTPUT)
    asked_teacher = None
    if ASK_TEACHER is not None:
        name = sample_teacher_folder() if is_sample_student(OUTPUT) else TEACHER
        threshold = None if ASK_TEACHER == "auto" else ASK_TEACHER
        with contextlib.redirect_stdout(sys.stderr):  # notes are not answers
            asked_teacher = load_asked_teacher(name, threshold, OUTPUT, model, tokenizer)
    n_texts = texts_per_row(OUTPUT)
    is_pair = n_texts == 2 or TEXT_PAIR_COLUMN is not None
    n_answered = 0
    named_words = set()
    for lines in [texts] if texts else stdin_lines():
        lines = [line.rstrip("\n") for line in lines]
        valid_lines = list(itertools.takewhile(is_encodable, lines))
        rows = [line.split("\t") if is_pair else line for line in valid_lines]
        for number, row in enumerate(rows, n_answered + 1):
            if is_pair and n_texts != 1 and len(row) != 2:
                raise Problem(
                    f"--predict: text {number} has {len(row) - 1} tabs; a pair is two texts with "
                    "one tab between them."
                )
        encoded = encode_texts(tokenizer, rows, n_texts)
        answers = label_scores(model, tokenizer, encoded)
        if asked_teacher:
            answers = ask_teacher(answers, rows, *asked_teacher)
        n_unknown = encoded.get("unknown", ())
        for line, answer, has_unknown in zip(valid_lines, answers, n_unknown, strict=True):
            columns = [answer["label"], f"{answer['score']:.4f}"]
            if asked_teacher:
                columns.append(answer["by"])
            print(*columns, sep="\t", flush=True)
            if has_unknown and len(named_words) < 100:
                text = line.replace("\t", " ") if is_pair else line
                new_words = set(unknown_words(tokenizer, text)) - named_words
                named_words |= new_words
                if new_words:
                    message = f"the student does not know {', '.join(sorted(new_words))}"
                    print(f"note      {message}", file=sys.stderr, flush=True)
        n_answered += len(valid_lines)
        if len(valid_lines) < len(lines):
            raise Problem(
                f"--predict: text {n_answered + 1} is not UTF-8. Save the texts as UTF-8."
            )


def stdin_lines():
    """Yield lists of the lines of standard input: as many as have come, and at least one."""
    if sys.stdin is None:
        raise Problem("--predict: there are no texts, and no standard input to read them from.")
    stream = getattr(sys.stdin, "buffer", None)
    if stream is None:  # a notebook's, say
        yield list(sys.stdin)
        return
    utf_8 = codecs.getincrementaldecoder("utf-8-sig")("surrogateescape")
    decoder = io.IncrementalNewlineDecoder(utf_8, translate=True)
    rest = ""
    while part := stream.read1(1 << 16):
        *lines, rest = (rest + decoder.decode(part)).split("\n")
        if lines:
            yield lines
    rest = (rest + decoder.decode(b"", final=True)).removesuffix("\n")
    if rest:
        yield [rest]


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
    the first, and one that was stopped goes on.

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
    splits = {split: with_lengths(rows) for split, rows in data.items()}
    if collate_fn is None:
        splits = {split: numeric_columns(rows) for split, rows in splits.items()}
    apply_settings(normalized_paths())
    refuse_faults(folder_faults({"CACHE": Path(CACHE)}))
    make_cache()

    run_id_parts = [teacher, definition_of(teacher.eval(), student.train(), terms, collate_fn)]
    teacher_names = {term["teacher"] for term in terms}
    student_names = {term["student"] for term in terms}
    with (
        run_lock(["CACHE"]),
        record_outputs(teacher, teacher_names) as call_teacher,
        record_outputs(student, student_names) as call_student,
    ):
        trainer_class = functools.partial(
            CustomLossTrainer, terms=terms, call_teacher=call_teacher, call_student=call_student
        )
        trainer = make_trainer(
            student, splits, collate_fn or pad_columns, trainer_class, learning_rate=LEARNING_RATE
        )
        trainer.run_id_parts = run_id_parts
        train(trainer, Path(CACHE, "distill.pt"))
    return student.eval()


def definition_of(teacher, student, terms, collate_fn):
    """Return a hash of what `distill` was called with: code, and what state_dict leaves out.

    Functions and classes of the calling script or notebook count by their code and by the values
    that they use; those that it imports from files of its own by all of these files. What cannot be
    hashed gets a new hash in each call, so that nothing is reused.
    """
    parts = [collate_fn, own_modules()]
    for term in terms:
        loss = term["loss"]
        parts.append(term | {"loss": CUSTOM_LOSSES[loss] if isinstance(loss, str) else loss})
    for model in teacher, student:
        for name, module in model.named_modules():
            attributes = dict(vars(module))
            del attributes["_parameters"], attributes["_modules"]
            parts.append((name, type(module), attributes))
        for name, weight in model.named_parameters():  # each shared weight once
            parts.append((name, weight.requires_grad))
    return hash_of(parts)


def hash_of(*parts):
    """Return a hash of functions, classes and values, or a new one if they cannot be pickled."""
    pickled = io.BytesIO()
    try:
        NamingPickler(pickled).dump(parts)
    except Exception as error:
        log("note", f"a stopped run cannot be resumed: what it depends on has no hash ({error})")
        return os.urandom(8).hex()
    return hashlib.sha256(pickled.getbuffer()).hexdigest()


class NamingPickler(Pickler):
    """The pickler by which datasets hashes functions; of modules and of ours it takes the name.

    The order of a set differs from one process to the next: it is sorted.
    """

    def __init__(self, file):
        super().__init__(file, recurse=True)
        self.names = {id(value): name for name, value in ORIGINAL_OBJECTS.items()}

    def persistent_id(self, value):
        if isinstance(value, ModuleType):
            return value.__name__
        if isinstance(value, set | frozenset):
            return "set", *sorted(map(repr, value))
        return self.names.get(id(value)) if callable(value) else None


def own_modules():
    """Return [(module, {name: code or value}, hash of its file)] for modules of the user's own.

    These belong to no installed package. It is what is in memory, as their files may have been
    edited since, and the files themselves. Of those that are to be imported later, the file alone.
    """
    contents = []
    for name, module in sorted(sys.modules.items()):
        path = getattr(module, "__file__", None)
        is_script = module is sys.modules["__main__"] or name == __name__
        if is_script or not is_own_file(path):
            continue
        values = {}
        for key, value in vars(module).items():
            if getattr(value, "__module__", None) == name:
                values[key] = code_in_memory(value)
            elif is_plain_value(value):
                values[key] = value
        values = {key: value for key, value in values.items() if not key.startswith("__")}
        contents.append((name, values, file_digest(path)))
    for name in sorted(imported_names() - sys.modules.keys()):
        spec = importlib.util.find_spec(name)
        if spec and is_own_file(spec.origin):
            contents.append((name, {}, file_digest(spec.origin)))
    return contents


def is_own_file(path):
    """Whether this is a Python file that belongs to no installed package."""
    is_file = str(path).endswith(".py") and os.path.isabs(path)
    return is_file and not any(Path(path).is_relative_to(folder) for folder in package_folders())


@functools.cache
def package_folders():
    keys = "stdlib", "platstdlib", "purelib", "platlib"
    return {sysconfig.get_path(key) for key in keys} | {site.getusersitepackages()}


@functools.cache
def imported_names():
    """Return the first parts of the names of all modules that this file imports anywhere."""
    names = set()
    for node in ast.walk(ast.parse(SOURCE)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names.add(node.module)
    return {name.split(".")[0] for name in names}


PLAIN_TYPES = str | bytes | int | float | torch.Tensor | np.ndarray | np.generic | None


def is_plain_value(value):
    """Whether a value is a number, a text, a tensor or None, or consists of them."""
    with contextlib.suppress(RecursionError):  # of a value that holds itself
        if isinstance(value, dict):
            return all(map(is_plain_value, [*value, *value.values()]))
        if isinstance(value, tuple | list | set | frozenset):
            return all(map(is_plain_value, value))
        return isinstance(value, PLAIN_TYPES)
    return False


def code_in_memory(value):
    """Return the code of a function or class, without the numbers of its lines."""
    if isinstance(value, type):
        members = []
        for name, member in sorted(vars(value).items()):
            own_name = f"{value.__qualname__}.{name}"
            if isinstance(member, type) and member.__qualname__ != own_name:
                continue  # another class; two may name each other
            members.append((name, code_in_memory(member)))
        return members
    code = value if isinstance(value, CodeType) else getattr(value, "__code__", None)
    if code is None:
        return None
    constants = []
    for constant in code.co_consts:
        nested = isinstance(constant, CodeType)
        constants.append(code_in_memory(constant) if nested else constant)
    defaults = getattr(value, "__defaults__", None), getattr(value, "__kwdefaults__", None)
    return code.co_code, code.co_names, code.co_varnames, constants, defaults


def pad_columns(rows):
    """Return rows, dicts of numbers, lists or arrays, as a dict of tensors.

    Lists are padded at the end to the longest of these rows: labels with NO_LABEL, others with 0.
    Rows of input_ids without an attention_mask get one.
    """
    batch = {}
    for name in rows[0]:
        with as_problem(
            f"data: column {name!r} has a value that is no tensor",
            "Give numbers in every row, or a collate_fn",
        ):
            tensors = [torch.as_tensor(row[name]) for row in rows]
        if tensors[0].dim() == 0:
            batch[name] = torch.stack(tensors)
            continue
        longest = max(tensors, key=torch.numel)  # an empty list has another type
        tensors = [tensor.to(longest.dtype) for tensor in tensors]
        padding = NO_LABEL if name == "labels" else 0
        batch[name] = pad_sequence(tensors, batch_first=True, padding_value=padding)
    if "input_ids" in batch and "attention_mask" not in batch:
        tokens = [torch.ones(len(row["input_ids"]), dtype=torch.long) for row in rows]
        batch["attention_mask"] = pad_sequence(tokens, batch_first=True)
    return batch


def numeric_columns(rows):
    """Return a Dataset with those of its columns that hold numbers, or lists of numbers."""
    numeric = []
    for name, kind in rows.features.items():
        while hasattr(kind, "feature"):  # of the members of a list
            kind = kind.feature
        dtype = str(getattr(kind, "dtype", ""))
        if re.match("u?int|float|bool", dtype):
            numeric.append(name)
    return rows.select_columns(numeric)


class CustomLossTrainer(CustomTrainer):
    """The loss is the weighted sum of `terms`, over the outputs of two functions of the inputs."""

    def __init__(self, *args, terms, call_teacher, call_student, **options):
        super().__init__(*args, **options)
        self.terms = terms
        self.call_teacher = call_teacher
        self.call_student = call_student

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        student_outputs = self.call_student(model_inputs(inputs))
        with torch.no_grad():
            teacher_outputs = self.call_teacher(model_inputs(inputs))
        teacher_outputs = teacher_outputs | {"labels": inputs.get("labels")}
        loss = 0
        for term in self.terms:
            student_tensor = student_outputs.get(term["student"])
            teacher_tensor = teacher_outputs.get(term["teacher"])
            check_shapes(term, student_tensor, teacher_tensor)
            function = term["loss"]
            if isinstance(function, str):
                function = CUSTOM_LOSSES[function]
                tensors = student_tensor, teacher_tensor
                student_tensor, teacher_tensor = tokens_only(*tensors, inputs.get("attention_mask"))
            value = function(student_tensor, teacher_tensor, term["temperature"])
            loss = loss + term["weight"] * value
        if return_outputs:
            return loss, SequenceClassifierOutput(logits=student_outputs["logits"])
        return loss


def check_shapes(term, student_tensor, teacher_tensor):
    """Raise Problem if a term lacks a tensor, or its two tensors have different shapes."""
    shapes = []
    for tensor in student_tensor, teacher_tensor:
        shapes.append(tuple(tensor.shape) if isinstance(tensor, torch.Tensor) else "no tensor")
    needs_same_shape = term["loss"] in ("kl", "mse", "cosine")
    if "no tensor" in shapes or (needs_same_shape and shapes[0] != shapes[1]):
        raise Problem(
            f"losses: {term}: the student's is {shapes[0]}, the teacher's {shapes[1]}. Name "
            "outputs, or modules of model.named_modules(), that fit each other, or give a function "
            "as loss."
        )


def tokens_only(student, teacher, attention_mask):
    """Return the tensors, (texts, length, size), without padding: (tokens, size).

    teacher: may also be labels, (texts, length). Tensors of other shapes stay as they are.
    """
    if student.dim() != 3:
        return student, teacher
    is_token = torch.ones(student.shape[:2], dtype=torch.bool)
    if attention_mask is not None and attention_mask.shape == is_token.shape:
        is_token = attention_mask.bool()
    if teacher.shape[:2] != is_token.shape:
        return student, teacher
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


@contextlib.contextmanager
def record_outputs(model, names):
    """Yield a function from inputs to {name: tensor}: the model's outputs, and those of modules.

    names: of outputs, or of modules in model.named_modules().
    """
    module_outputs = {}
    modules = dict(model.named_modules())
    parameters = inspect.signature(model.forward).parameters
    takes_any = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values())
    takes_any = takes_any and not isinstance(model, transformers.PreTrainedModel)

    def first_tensor(output):
        return output if isinstance(output, torch.Tensor) else output[0]

    def call(inputs):
        arguments = {}
        for name, value in inputs.items():
            if name in parameters or (takes_any and name != "length"):
                arguments[name] = value
        output = model(**arguments)
        outputs = dict(output) if isinstance(output, dict) else {"logits": first_tensor(output)}
        return module_outputs | outputs

    def make_hook(name):
        def hook(module, args, output):
            module_outputs[name] = first_tensor(output)

        return hook

    module_names = names & modules.keys()
    hooks = [modules[name].register_forward_hook(make_hook(name)) for name in module_names]
    needs_stock_forward = module_names and isinstance(model, BertForSequenceClassification)
    if needs_stock_forward:  # the fast one does not run every module
        output_hidden_states = model.config.output_hidden_states
        model.config.output_hidden_states = True
    try:
        yield call
    finally:
        for hook in hooks:
            hook.remove()
        if needs_stock_forward:
            model.config.output_hidden_states = output_hidden_states


def with_lengths(rows):
    """Return rows, a Dataset or a list of dicts, as a Dataset with the column length."""
    if isinstance(rows, list):
        rows = datasets.Dataset.from_list(rows)
    rows = rows.with_format(None)
    if "length" in rows.column_names:
        return rows
    lengths = [1] * len(rows)
    if "input_ids" in rows.column_names:
        lengths = [len(ids) for ids in rows["input_ids"]]
    return rows.add_column("length", lengths)


# ── Settings: checks and command line ─────────────────────────────────────────────────────────────


def is_name(value):
    return is_text(value) and "\0" not in value


def optional(test):
    """Return a test that accepts None, too."""
    return lambda value: value is None or test(value)


def in_range(low, high=sys.float_info.max, kinds=(int, float)):
    """Return a test: is a value a number of these types, low <= value <= high? NaN is not."""
    return lambda value: type(value) in kinds and low <= value <= high


def whole_number(low, high=sys.maxsize):
    return in_range(low, high, kinds=(int,))


def one_of(*values):
    """Return (what is accepted, in words; its test) for a choice of values."""
    words = " or ".join(f'"{value}"' if value else "None" for value in values)
    return words, lambda value: value in values


def is_layer_choice(value):
    if isinstance(value, str):
        return value in ("first", "middle", "last", "spread")
    is_sequence = isinstance(value, tuple | list) and len(value) == NUM_LAYERS
    return is_sequence and all(map(whole_number(0), value))


def are_loss_weights(value):
    """Whether a value has a weight for each term of METHOD.

    CE or KL must count: without them there would be no validation loss.
    """
    n_terms = len(METHOD_TERMS.get(METHOD, ()))
    is_sequence = isinstance(value, tuple | list) and len(value) == n_terms
    return is_sequence and all(map(in_range(0), value)) and any(value[:2])


POSITIVE = sys.float_info.min
SETTING_RULES = [  # (settings, what they accept, in words; the test)
    (
        "TEACHER DATA TEXT_COLUMN LABEL_COLUMN STUDENT_INIT OUTPUT CACHE REPORT_TO",
        "a text",
        is_name,
    ),
    (
        "TEACHER_BASE TOKENIZER TEXT_PAIR_COLUMN SOFT_LABELS_COLUMN UNLABELED GENERATOR",
        "a text or None",
        optional(is_name),
    ),
    (
        "TEACHER_EPOCHS EPOCHS PATIENCE BATCH_SIZE GENERATOR_STEPS STUDENT_STEPS",
        "a whole number from 1",
        whole_number(1),
    ),
    ("NUM_LAYERS", "a whole number from 1 to 100", whole_number(1, 100)),
    (
        "BILSTM_EMBEDDING BILSTM_HIDDEN",
        "a whole number from 1 to 10000",
        whole_number(1, 10_000),
    ),
    (
        "TEACHER_LEARNING_RATE LEARNING_RATE BILSTM_LEARNING_RATE TEMPERATURE MAX_GRAD_NORM "
        "GENERATOR_LEARNING_RATE",
        "a number above 0",
        in_range(POSITIVE),
    ),
    ("WARMUP_STEPS WEIGHT_DECAY", "a number from 0", in_range(0)),
    ("AUGMENT REFIT_WORDS", "a whole number from 0", whole_number(0)),
    ("MAX_LENGTH", "a whole number from 4", whole_number(4)),
    ("SEED", "a whole number from 0 to 2147483648", whole_number(0, 2**31)),
    ("DROPOUT", "a number from 0, below 1, or None", optional(in_range(0, 0.999))),
    ("ALPHA AUGMENT_MASK AUGMENT_NGRAM MASK_RATE", "a number from 0 to 1", in_range(0, 1)),
    ("TRAIN_FRACTION CASCADE_KEEPS", "a number above 0, at most 1", in_range(POSITIVE, 1)),
    ("BASELINE", "True or False", in_range(False, True, kinds=(bool,))),
    (
        "ASK_TEACHER",
        'None, "auto" or a number from 0 to 1',
        lambda value: value in (None, "auto") or in_range(0, 1)(value),
    ),
    ("METHOD", *one_of(*METHODS)),
    (
        "LOSS_WEIGHTS",
        "None or, for a METHOD in METHOD_TERMS, a number from 0 for each of its terms, the first "
        "or the second above 0",
        optional(are_loss_weights),
    ),
    ("STUDENT", *one_of(*STUDENTS)),
    ("SCHEDULE", *one_of("linear", "constant")),
    ("BILSTM_WORDS", *one_of("own", "teacher")),
    ("EXPORT", *one_of(None, *EXPORT_FILES)),
    (
        "INIT_LAYERS",
        '"first", "middle", "last", "spread" or NUM_LAYERS numbers such as (0, 11)',
        is_layer_choice,
    ),
]
# setting → (its test; what it accepts, in words)
ACCEPTED = {name: (test, words) for names, words, test in SETTING_RULES for name in names.split()}

# settings that may be paths
PATH_SETTINGS = (
    "TEACHER",
    "TEACHER_BASE",
    "TOKENIZER",
    "DATA",
    "STUDENT_INIT",
    "OUTPUT",
    "CACHE",
    "UNLABELED",
    "GENERATOR",
)
COMMAND_LINE_SETTINGS = set()  # the settings that were given on the command line


def read_command_line(argv):
    """Return ({setting: value} as given in `argv`, the list after --predict or None)."""
    parser = argparse.ArgumentParser(
        description=__doc__.split("\nMap ")[0],
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--predict",
        nargs="*",
        metavar="TEXT",
        help="only run the student in OUTPUT: a label and its probability for each TEXT or, "
        "without any, for each line of standard input",
    )
    groups = {}
    for title, name, comment in documented_settings():
        if title not in groups:
            groups[title] = parser.add_argument_group(title)
        groups[title].add_argument(
            "--" + name.lower().replace("_", "-"),
            default=argparse.SUPPRESS,
            metavar="…",
            help=f"{comment} [{globals()[name]}]".replace("%", "%%"),
        )
    argv, texts = take_texts(sys.argv[1:] if argv is None else argv)
    options = vars(parser.parse_args(argv))
    options.pop("predict")
    changes = {name.upper(): parse_value(name.upper(), given) for name, given in options.items()}
    return changes, texts


def take_texts(argv):
    """Take the texts after --predict out of `argv`; return (the rest, texts).

    They end at the next option. argparse would take a text that begins with "-" for one.
    """
    others, texts = [], None
    after_predict = False
    for argument in argv:
        if re.fullmatch(r"-h|--[a-z][a-z-]*(=.*)?", argument, re.DOTALL):
            after_predict = False
        if argument == "--predict":
            after_predict = True
            texts = texts or []
        elif argument.startswith("--predict="):
            texts = [*(texts or []), argument.removeprefix("--predict=")]
        elif after_predict:
            texts.append(argument)
        else:
            others.append(argument)
    return others, texts


def documented_settings():
    """Yield (group, name, comment) for every setting, in the order of this file."""
    section = group = ""
    for line in SOURCE.splitlines():
        heading = re.fullmatch(r"# ── (.+?) ─+", line)
        setting = re.fullmatch(r"([A-Z_]+) = .+?(?:  # (.+))?", line)
        if heading:
            section = group = heading[1]
        elif section == "Settings" and line.startswith("# "):
            group = line[2:]
        elif setting and setting[1] in ACCEPTED:
            yield group, setting[1], setting[2] or ""


def parse_value(name, given):
    """Return a value from the command line: a Python literal, fractions allowed, or a text."""
    test, _ = ACCEPTED[name]
    value = given
    with contextlib.suppress(ValueError, SyntaxError, ArithmeticError):
        decimals = re.sub(
            r"\b(\d+)/(\d+)\b", lambda match: str(int(match[1]) / int(match[2])), given
        )
        value = ast.literal_eval(decimals)
    if test(given) and not test(value):  # a folder by the name of 2024, say
        return given
    return value


def apply_settings(changes):
    """Change settings: constants of this module, which functions read when they are called."""
    globals().update(changes)


def normalized_paths():
    """Return {setting: path} with ~ expanded and without a slash at the end; hub names as is."""
    paths = {}
    for name in PATH_SETTINGS:
        value = globals()[name]
        if isinstance(value, str):
            paths[name] = normalize_path(value)
    return paths


def normalize_path(path):
    path = os.path.expanduser(path)
    while len(path) > 1 and path.endswith((os.sep, os.sep + ".")):
        path = path[:-1]
    if not os.path.exists(path):
        for form in "NFC", "NFD":  # a Mac may have written the name in the other one
            if os.path.exists(unicodedata.normalize(form, path)):
                return unicodedata.normalize(form, path)
    return path


def check_settings():
    """Raise one Problem for all faults of the settings and of the folders to write to."""
    faults = []
    for name, (test, words) in ACCEPTED.items():
        if not test(globals()[name]):
            faults.append(f"{name} = {globals()[name]!r}: must be {words}")
    if not faults:  # each is valid; do they go together?
        faults = [*folder_faults(written_folders()), *column_faults(), *option_faults()]
    refuse_faults(faults)
    make_cache()


def refuse_faults(faults):
    """Raise one Problem for all faults of settings, if there are any."""
    if faults:
        raise Problem("\n  ".join(["these settings must be put right:", *faults]))


def check_same_settings():
    """Raise Problem if the processes have different settings. Their folders may lie elsewhere."""
    own = {name: globals()[name] for name in ACCEPTED}
    own |= {name: own[name] is None for name in PATH_SETTINGS}
    # not only a path, but also a word that decides what the processes do together
    own["STUDENT_INIT"] = STUDENT_INIT if STUDENT_INIT in ("teacher", "random") else "a model"
    settings = gather_from_all(own)
    different = [name for name in own if any(other[name] != own[name] for other in settings)]
    if different:
        raise Problem(
            f"the processes have different settings: {', '.join(different)}. Give all the same; "
            "only folders and files may lie elsewhere."
        )


def column_faults():
    """Return the faults of the column names, a list."""
    faults = []
    columns = [*text_columns(), *soft_label_columns(), LABEL_COLUMN]
    if len(set(map(canonical_name, columns))) < len(columns):
        faults.append(
            f"TEXT_COLUMN = {TEXT_COLUMN!r}, TEXT_PAIR_COLUMN = {TEXT_PAIR_COLUMN!r}, LABEL_COLUMN "
            f"= {LABEL_COLUMN!r}, SOFT_LABELS_COLUMN = {SOFT_LABELS_COLUMN!r}: must be different "
            "columns"
        )
    if "labels" in text_columns():
        faults.append(
            "TEXT_COLUMN, TEXT_PAIR_COLUMN: must not be 'labels', which the script itself uses; "
            "rename this column"
        )
    return faults


def option_faults():
    """Return the faults of options that do not go together, a list."""
    faults = []
    if STUDENT == "bilstm" and STUDENT_INIT not in ("teacher", "random"):
        faults.append(
            f'STUDENT_INIT = {STUDENT_INIT!r}: of a "bilstm" it must be "teacher" or "random"'
        )
    if EXPORT in ("onnx", "onnx-int8"):
        packages = "onnx", "onnxscript", "onnxruntime"
        missing = [name for name in packages if not importlib.util.find_spec(name)]
        if missing:
            faults.append(
                f"EXPORT = {EXPORT!r}: needs more packages: pip install {' '.join(missing)}"
            )
    if GENERATOR and not AUGMENT and "KL′" not in METHOD_TERMS.get(METHOD, ()):
        faults.append(
            f'GENERATOR = {GENERATOR!r}: does nothing without AUGMENT or the METHOD "mate" or '
            '"cilda"'
        )
    if METHOD in METHOD_TERMS and STUDENT != "bert":
        faults.append(f'METHOD = {METHOD!r}: needs STUDENT = "bert"')
    if METHOD in METHOD_TERMS and world_size() > 1:
        faults.append(
            f'METHOD = {METHOD!r}: runs in one process; several accept "none", "kd" and "mse"'
        )
    if BASELINE and METHOD == "none":
        faults.append(
            f"BASELINE = {BASELINE!r}: METHOD = 'none' is the baseline itself; choose one of the "
            "two"
        )
    if SOFT_LABELS_COLUMN and METHOD not in ("kd", "none"):
        faults.append(
            f"METHOD = {METHOD!r}: needs more of the teacher than the probabilities in "
            'SOFT_LABELS_COLUMN; accepted are "kd" and "none"'
        )
    if SOFT_LABELS_COLUMN and (AUGMENT or TEACHER_BASE):
        faults.append(
            "AUGMENT, TEACHER_BASE: with SOFT_LABELS_COLUMN no teacher is run, who would label "
            "the copies, or made"
        )
    if METHOD == "none" and (UNLABELED or AUGMENT):
        faults.append(
            f"METHOD = {METHOD!r}: does without the teacher, who alone can label UNLABELED and "
            "AUGMENT"
        )
    return faults


# ── Errors ────────────────────────────────────────────────────────────────────────────────────────


class Problem(Exception):
    """An error that the user can correct. It says what is wrong, what is accepted, what to do."""


@contextlib.contextmanager
def as_problem(what, advice):
    """Raise a library's error in this block as a Problem: what failed, why, and what to do.

    advice: a text, or a function from the reason, as the library gives it, to a text.
    """
    try:
        yield
    except (Problem, BrokenPipeError):
        raise
    except Exception as error:
        problem = full_disk_problem(error)
        if problem is None:
            reason = str(error.__cause__ or error).strip() or type(error).__name__
            reason = re.sub(r"\x1b\[[\d;]*m", "", reason)  # colours
            if is_no_connection(error):
                reason = "it is not on this machine, and there is no connection to the hub"
            first_line = reason.splitlines()[0].rstrip(".:")
            if len(first_line) > 300:
                first_line = f"{first_line[:300]}…"
            told = advice if isinstance(advice, str) else advice(reason)
            problem = Problem(f"{what}: {first_line}. {told}.")
        raise problem from error


def is_no_connection(error):
    """Whether a library could not, or must not (HF_HUB_OFFLINE), ask the hub for what it lacks."""
    kinds = (
        ConnectionError,  # by datasets
        huggingface_hub.errors.LocalEntryNotFoundError,
        huggingface_hub.errors.OfflineModeIsEnabled,
    )
    while error is not None:
        if type(error) in kinds:
            return True
        error = error.__cause__
    return False


def causes(error):
    """Yield an error, the one that led to it, and so on."""
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def full_disk_problem(error):
    """Return a Problem if an error, or one that led to it, is a full disk or quota; else None."""
    codes = errno.ENOSPC, errno.EDQUOT, errno.EFBIG
    for cause in causes(error):
        code = getattr(cause, "errno", None)
        # safetensors and pyarrow give the number in their message only
        told = re.search(r"\b(?:os error|errno) (\d+)\b", str(cause), re.IGNORECASE)
        if code not in codes and told:
            code = int(told[1])
        if code in codes:
            return Problem(
                f"{os.strerror(code)}. What was saved before is still there. Make room, or name "
                "another CACHE and OUTPUT; the same command goes on from here."
            )
    return None


# ── Files and locks ───────────────────────────────────────────────────────────────────────────────

# what versions before report.json named its files can have written
OUTPUT_FILES = re.compile(
    r"model.*\.safetensors|model\.safetensors\.index\.json|student.*\.(pt2|onnx)|"
    r".*(token|vocab).*\.(json|txt|model)|(config|report)\.json|merges\.txt|.*\.model|README\.md|"
    r"history\.csv|loss\.png"
)
CACHE_MARK = """Signature: 8a477f597d28d172789f06886806bc55
# made by distill.py; can be deleted at any time
"""


def written_folders():
    """Return {setting: folder to write to}; for OUTPUT and a TEACHER to be made, the parent."""
    written = {"CACHE": Path(CACHE)}
    if rank() == 0:  # no other process writes OUTPUT
        written["OUTPUT"] = Path(os.path.realpath(OUTPUT)).parent
    if TEACHER_BASE is not None and not os.path.exists(TEACHER):
        written["TEACHER"] = Path(os.path.realpath(TEACHER)).parent
    return written


def folder_faults(written):
    """Return what is wrong with the folders to write to, a list; written: see `written_folders`."""
    faults = []
    for name, folder in written.items():
        value = globals()[name]
        try:
            if value.startswith("~"):
                raise OSError(errno.ENOENT, "no user of this name")
            folder.mkdir(parents=True, exist_ok=True)
            tempfile.TemporaryFile(dir=folder).close()
            is_own = name != "CACHE" or is_own_cache(folder)
        except OSError as error:
            faults.append(f"{name} = {value!r}: cannot be written ({error.strerror}); name another")
            continue
        if not is_own:
            faults.append(
                f"CACHE = {CACHE!r}: holds files that are not distill.py's, which it might "
                "overwrite; name another"
            )
    if "OUTPUT" in written:  # the loop has made CACHE, and `is_inside` compares folders that exist
        faults += output_faults()
    return faults


def is_own_cache(folder):
    """Whether a folder is empty, or has the mark that distill.py gives to its CACHE."""
    names = [name for name in os.listdir(folder) if not name.endswith(".distill_new")]
    mark = folder / "CACHEDIR.TAG"
    return not names or (mark.is_file() and "distill.py" in mark.read_text("utf-8", "replace"))


def output_faults():
    """Return why OUTPUT, which is replaced as a whole, must not be replaced: a list."""
    output = os.path.realpath(OUTPUT)
    needed = {
        **{name: globals()[name] for name in PATH_SETTINGS},
        "OUTPUT": None,
        "STUDENT_INIT": None if STUDENT_INIT in ("teacher", "random") else STUDENT_INIT,
        "the working folder": os.getcwd(),
        "distill.py": __file__,
    }
    inside = []
    for name, path in needed.items():
        if path and is_inside(path, output):
            inside.append(name)
    if inside:
        return [
            f"OUTPUT = {OUTPUT!r}: would replace {', '.join(inside)}; it must not be or contain "
            "them. Name another"
        ]
    if not os.path.exists(output):  # output.exists() would raise PermissionError
        return []
    try:
        foreign = foreign_files(Path(output))
    except (OSError, ValueError, TypeError, LookupError, AttributeError):
        return [
            f"OUTPUT = {OUTPUT!r}: was not written by distill.py and is not overwritten; name "
            "another"
        ]
    if foreign:
        return [
            f"OUTPUT = {OUTPUT!r}: holds {short_list(foreign)}, not written by distill.py, and is "
            "replaced as a whole; move this first, or name another"
        ]
    return []


def is_inside(path, folder):
    """Return whether `path` is `folder` or lies in it.

    Names are not enough: on a Mac's disk, "Model" and "model" are the same folder, and so are "が"
    in one character and in two.
    """
    path, folder = Path(os.path.realpath(path)), Path(os.path.realpath(folder))
    if path.is_relative_to(folder):
        return True
    if not os.path.exists(folder):
        return False
    existing = filter(os.path.exists, [path, *path.parents])
    return any(os.path.samefile(parent, folder) for parent in existing)


def foreign_files(output):
    """Return the names of files in a folder of distill.py that it did not write.

    Raises one of several errors if the folder has no report of distill.py.
    """
    names = set()
    for path in output.iterdir():
        if path.name != ".DS_Store" and not path.name.startswith("._"):  # a Mac's
            names.add(path.name)
    if not names:
        return []
    report = json.loads((output / "report.json").read_text("utf-8"))
    if "student" not in report:
        raise LookupError
    written = set(report.get("files", filter(OUTPUT_FILES.fullmatch, names)))
    return sorted(name for name in names - written if not name.endswith(".distill_new"))


def make_cache():
    """Make the folder CACHE, with a mark that backups heed (bford.info/cachedir)."""
    Path(CACHE).mkdir(parents=True, exist_ok=True)
    mark = Path(CACHE, "CACHEDIR.TAG")
    if not mark.exists():
        new = Path(f"{mark}.{os.getpid()}.distill_new")
        new.write_text(CACHE_MARK, "utf-8")
        os.replace(new, mark)


def scratch_folder():
    """Return the folder for what only this process of this run needs."""
    folder = Path(CACHE, "distill_tmp", str(rank()))
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def remove_scratch_folder():
    folder = scratch_folder()
    shutil.rmtree(folder, ignore_errors=True)
    with contextlib.suppress(OSError):  # those of other processes are in it
        folder.parent.rmdir()


def prepare_folders():
    """Clear up after a run that was killed; refuse an OUTPUT that cannot be replaced."""
    if is_first_in(CACHE):
        clear_cache()
    wait_for_all()
    on_main_process(clear_output)
    on_main_process(check_output_replaceable)


def clear_cache():
    """Remove what a killed run left half-written in CACHE."""
    shutil.rmtree(Path(CACHE, "distill_tmp"), ignore_errors=True)
    for path in Path(CACHE).glob("*.distill_new"):
        if path.is_file():
            path.unlink()


def clear_output():
    """Remove what a killed run left half-written elsewhere."""
    recover_folder(OUTPUT)
    if os.path.exists(TEACHER):  # it is made, and needs no lock any more
        Path(f"{os.path.realpath(TEACHER)}.distill_lock").unlink(missing_ok=True)


def check_output_replaceable():
    """Raise Problem if OUTPUT, which is replaced as a whole, cannot be."""
    output = os.path.realpath(OUTPUT)
    for path in f"{output}.distill_old", f"{output}.distill_new":
        if os.path.exists(path):
            raise Problem(
                f"OUTPUT = {OUTPUT!r}: {path}, left by an earlier run, cannot be deleted. Delete "
                "it, or name another."
            )
    if not os.path.exists(output):
        return
    if not os.access(output, os.W_OK | os.X_OK):
        raise Problem(
            f"OUTPUT = {OUTPUT!r}: is write-protected and cannot be replaced. Make it writable, or "
            "name another."
        )
    if os.path.ismount(output):
        raise Problem(
            f"OUTPUT = {OUTPUT!r}: is a mount point and cannot be replaced as a whole. Name a new "
            f"folder inside it, such as {os.path.join(OUTPUT, 'student')!r}, or another one."
        )


@contextlib.contextmanager
def run_lock(names):
    """In this block no other run can use the folders of these settings; CACHE is one of them.

    The locks of a process that dies are released. Only the first process makes OUTPUT and TEACHER.
    """
    locks = {}
    for name in names:
        folder = globals()[name]
        locks[name] = Path(f"{os.path.realpath(folder)}.distill_lock")
    locks["CACHE"] = Path(CACHE, "lock")
    with contextlib.ExitStack() as stack:
        for name, path in locks.items():
            try:
                stack.enter_context(filelock.FileLock(path, blocking=False))
            except filelock.Timeout:
                raise Problem(
                    f"{name} = {globals()[name]!r}: another run is using it. Wait for its end, or "
                    "name another CACHE and another OUTPUT."
                ) from None
        for name, path in locks.items():
            if name != "CACHE":
                stack.callback(path.unlink, missing_ok=True)
        yield


def save_with_checksum(path, content):
    """Write tensors and plain values with a checksum; a kill leaves the old file or the new one."""
    buffer = io.BytesIO()
    torch.save(content, buffer)
    new = Path(f"{path}.distill_new")
    try:
        with open(new, "wb") as file:
            file.write(hashlib.sha256(buffer.getbuffer()).digest())
            file.write(buffer.getbuffer())
            file.flush()
            os.fsync(file.fileno())
        os.replace(new, path)
    finally:
        new.unlink(missing_ok=True)  # on a full disk, half a file would be in the way


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
    log("note", f"{path} is damaged: it is not used, and made anew")
    return None


def cached(kind, make, *parts):
    """Return make(), or what it gave in an earlier run. parts: all that it depends on."""
    path = Path(CACHE, f"{kind}-{digest(*parts)}.pt")
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


def file_names(folder):
    """Return the names of the files in a folder and in those within it, relative to it."""
    paths = [path for path in Path(folder).rglob("*") if path.is_file()]
    return sorted(str(path.relative_to(folder)) for path in paths)


def save_folder(folder, model, tokenizer, write_more=None):
    """Write a model and its tokenizer, as `replaced_folder` does.

    write_more: a function of the new folder, a Path, that adds files to it.
    """
    with (
        as_problem(
            f"{folder} cannot be written",
            "What was saved before is still there; the same command goes on from here",
        ),
        replaced_folder(folder) as new,
    ):
        model.save_pretrained(new)
        tokenizer.save_pretrained(new)
        rename_extra_tokens(new)
        if write_more:
            write_more(new)


def rename_extra_tokens(folder):
    """Rename the list of additional special tokens to the key that transformers 4 and 5 both read.

    Version 5 writes extra_special_tokens, which version 4 expects to be a dict, and fails.
    """
    path = folder / "tokenizer_config.json"
    config = json.loads(path.read_text("utf-8"))
    if isinstance(config.get("extra_special_tokens"), list):
        config["additional_special_tokens"] = config.pop("extra_special_tokens")
        text = json.dumps(config, indent=2, sort_keys=True, ensure_ascii=False)
        path.write_text(f"{text}\n", "utf-8")


@contextlib.contextmanager
def replaced_folder(folder):
    """Yield a new folder, a Path, that then takes the place of `folder`.

    A kill leaves the whole old folder or the whole new one.
    """
    real_folder = os.path.realpath(folder)  # a link stays; what it points to is replaced
    new, old = Path(f"{real_folder}.distill_new"), Path(f"{real_folder}.distill_old")
    recover_folder(folder)
    try:
        new.mkdir()
        yield new
        for file_name in file_names(new):
            with open(new / file_name, "rb") as file:
                os.fsync(file.fileno())
        if os.path.exists(real_folder):
            os.rename(real_folder, old)
        os.rename(new, real_folder)
    finally:
        recover_folder(folder)


def recover_folder(folder):
    """Restore what a kill or a full disk inside `save_folder` has left."""
    folder = os.path.realpath(folder)
    if os.path.exists(f"{folder}.distill_old") and not os.path.exists(folder):
        os.rename(f"{folder}.distill_old", folder)
    for suffix in ".distill_new", ".distill_old":
        shutil.rmtree(folder + suffix, ignore_errors=True)


@contextlib.contextmanager
def new_folder():
    """Yield a new folder next to OUTPUT, on its disk, for files that will be moved into OUTPUT."""
    folder = f"{os.path.realpath(OUTPUT)}.distill_new"
    os.mkdir(folder)
    try:
        yield folder
    finally:
        shutil.rmtree(folder)


def iter_strings(value):
    """Yield all strings among the values of nested dicts and lists."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for member in value.values():
            yield from iter_strings(member)
    elif isinstance(value, list):
        for member in value:
            yield from iter_strings(member)


def forbid_outside_paths(folder):
    """Raise Problem if an index in `folder`, perhaps a stranger's, names files outside it."""
    for pattern in "*.index.json", "dataset_dict.json", "**/state.json":
        for index in Path(folder).glob(pattern):
            for name in iter_strings(json.loads(index.read_text("utf-8"))):
                if {"..", "/"} & {*Path(name).parts}:
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
                config = {}
                if isinstance(content, transformers.PreTrainedModel):
                    config = content.config.to_dict()
                    for name in "transformers_version", "_name_or_path":  # who saved it, and where
                        config.pop(name, None)
                content = config
            state.update(repr(content).encode("utf-8", "surrogatepass"))
    return state.hexdigest()[:24]


# ── Processes: one, or several that share the work (torchrun, or accelerate with MPI) ─────────────

BYTES_PER_PART = 2**24  # of a file that is sent to other machines


def join_processes():
    """Join the other processes, if torchrun or accelerate has started any."""
    try:
        with as_problem(
            "this process cannot reach the others",
            "If GLOO_SOCKET_IFNAME is set, it must be a network card of this machine (`ip addr` "
            "or, on a Mac, `ifconfig` lists them); --master_addr must be the address of the first "
            "machine",
        ):
            PartialState(cpu=True, timeout=timedelta(days=30))
    except Problem as problem:  # `main` would ask for the rank, which fails in the same way
        sys.exit(f"distill.py: {problem}")


def rank():
    """Return the number of this process. 0 reads the caches, writes and prints."""
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


def gather_from_all(value):
    """Return, in every process, the list of the values of all processes."""
    return gather_object([value])


def wait_for_all():
    """Return once every process has come here."""
    PartialState(cpu=True).wait_for_everyone()


def check_same(what, *parts):
    """Raise Problem if `digest(*parts)` is not the same in all processes. what: what that means."""
    if world_size() > 1 and len(set(gather_from_all(digest(*parts)))) > 1:
        raise Problem(f"the processes differ in their {what}. Make them the same on all machines.")


def read_on_main_process(path):
    """Yield, in every process, what the file has in process 0, part by part."""
    with open(path, "rb") if rank() == 0 else contextlib.nullcontext() as file:
        while part := on_main_process(lambda: file.read(BYTES_PER_PART)):
            yield part


def is_first_in(folder, is_candidate=True):
    """Return whether this is the first of the processes that have the same folder on the same disk.

    These may be all processes, or only those of a machine. All must call this at the same time.
    is_candidate: whether this process may be the one.
    """
    if world_size() == 1:
        return is_candidate
    # A process sees the marks of those that write to the same disk. One name after the other is
    # looked up, as lists of files on a shared disk may be out of date.
    token = on_main_process(lambda: os.urandom(8).hex())
    marks = [Path(folder, f"{token}-{number}.distill_new") for number in range(world_size())]
    if is_candidate:
        Path(folder).mkdir(parents=True, exist_ok=True)
        marks[rank()].touch()
    wait_for_all()
    is_first = is_candidate and not any(mark.exists() for mark in marks[: rank()])
    wait_for_all()
    if is_candidate:
        marks[rank()].unlink(missing_ok=True)
    wait_for_all()
    return is_first


# ── Main ──────────────────────────────────────────────────────────────────────────────────────────


def main(argv=None):
    """Run the command: exit status 0 if a student was saved, else 1 and one message.

    Settings from the command line count for this call only.
    """
    quiet_for_users()
    settings = {name: globals()[name] for name in ACCEPTED}
    try:
        changes, texts = read_command_line(argv)
        COMMAND_LINE_SETTINGS.update(changes)
        apply_settings(changes)
        apply_settings(normalized_paths())
        if texts is not None:
            show_predictions(texts)
            return
        join_processes()
        on_main_process(check_settings)
        check_same_settings()
        run_locked()
    except Problem as problem:
        where = "" if rank() == 0 else f", process {rank()}"
        sys.exit(f"distill.py{where}: {problem}")
    except KeyboardInterrupt:
        sys.exit("distill.py: stopped by Ctrl-C; the same command goes on from here")
    except RuntimeError as error:
        if world_size() == 1 or "onnection" not in str(error):
            raise
        sys.exit(
            f"distill.py, process {rank()}: lost its connection to another process. That process "
            "says why; if no process does, check the network and GLOO_SOCKET_IFNAME"
        )
    except BrokenPipeError:
        # else Python would fail once more when it flushes standard output at its end
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(
            "distill.py: the program that read its output has ended, so that it stops, too; the "
            "same command goes on from here"
        )
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        message = full_disk_problem(error) or (
            f"{where}{error.strerror or error}. What was saved before is still there; once this is "
            "put right, the same command goes on from here."
        )
        sys.exit(f"distill.py: {message}")
    finally:
        apply_settings(settings)
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


def run_locked():
    """`run`, with the locks in the first process of each disk; only the first of all prints."""
    is_first = is_first_in(CACHE)
    if is_first and rank() != 0:  # `check_settings` has seen the disk of the first process only
        refuse_faults(folder_faults(written_folders()))
        make_cache()
    with contextlib.ExitStack() as stack:
        if is_first:
            written = written_folders()
            if rank() != 0:
                written.pop("TEACHER", None)
            stack.enter_context(run_lock(written))
        if rank() != 0:
            nowhere = stack.enter_context(open(os.devnull, "w"))
            stack.enter_context(contextlib.redirect_stdout(nowhere))
        run()
        remove_scratch_folder()


# the last statement, when everything is defined and no script has changed anything yet
ORIGINAL_OBJECTS = named_objects()

if __name__ == "__main__":
    main()
