"""distill.py: turn a fine-tuned Japanese BERT classifier into a one-layer student, on a laptop CPU.

    python distill.py                            # the settings below; with no teacher yet: the sample
    python distill.py --teacher DIR --data DIR   # any setting can be given for one run
    python distill.py --predict "文章" …          # ask the student; --help tells the rest

Reads   TEACHER, a fine-tuned BertForSequenceClassification, and DATA, labelled texts in train, val and test.
Writes  OUTPUT: the student with its tokenizer, a model card, report.json, history.csv and loss.png;
        CACHE: the teacher's answers and the last checkpoint, so that the same command, stopped at any
        moment, goes on where it was. It can be deleted at any time.
"""

import argparse, ast, contextlib, copy, csv, errno, functools, glob, hashlib, importlib.util, io, itertools, json, logging, math
import mmap, os, platform, re, shutil, sys, tempfile, time, unicodedata, warnings, zlib
from collections import Counter, defaultdict
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path

try:
    import datasets
    import filelock
    import huggingface_hub
    import numpy as np
    import pyarrow
    import pyarrow.parquet
    import torch
    import torch.nn.functional as F
    import transformers
    from accelerate import DistributedDataParallelKwargs, PartialState
    from matplotlib.figure import Figure
    from torch.utils.data import DataLoader
    from tqdm.auto import tqdm
    from transformers import (AutoConfig, AutoTokenizer, BertJapaneseTokenizer, EarlyStoppingCallback, PrinterCallback,
                              Trainer, TrainingArguments)
    from transformers.integrations import get_reporting_integration_callbacks
    from transformers.modeling_outputs import SequenceClassifierOutput
    from transformers.models.auto.tokenization_auto import get_tokenizer_config
    from transformers.models.bert_japanese.tokenization_bert_japanese import MecabTokenizer
except ModuleNotFoundError as error:
    sys.exit(f"distill.py: {error}. Install what it needs: pip install -r requirements.txt")

# ── Settings ────────────────────────────────────────────────────────────────────────────────────────────
# Teacher and data
TEACHER = "./finetuned_bert_japanese"  # the fine-tuned classifier: a folder or a hub name
TEACHER_BASE = None  # no TEACHER yet? fine-tune this into it, e.g. "tohoku-nlp/bert-base-japanese-v3"
TEACHER_EPOCHS = 3  # at most, in that fine-tuning
TEACHER_LEARNING_RATE = 3e-5  # in that fine-tuning
TOKENIZER = None  # None: the one in TEACHER; a folder or hub name if TEACHER holds none
DATA = "tests/sample"  # folder with train/val/test, one file (cut 80/10/10), save_to_disk folder, hub name
TEXT_COLUMN = "text"  # column of the texts
TEXT_PAIR_COLUMN = None  # column of the second texts, for sentence pairs
LABEL_COLUMN = "label"  # column of the labels: the teacher's label names, or their numbers
TRAIN_FRACTION = 1.0  # share of the labelled training texts that is used, each label in proportion
MAX_LENGTH = 128  # tokens; longer texts are cut (and counted). Raise it freely: nothing is padded to it
# Student
STUDENT = "bert"  # or "bilstm", with words of its own; its sizes stand below
NUM_LAYERS = 1  # encoder layers of a "bert"; all else is as in the model that it starts from
STUDENT_INIT = "teacher"  # start from the teacher's weights, from "random" ones, or from a small pretrained model's
INIT_LAYERS = "middle"  # that model's layers to start from: "first", "middle", "last", "spread" or e.g. (0, 11)
REFIT_WORDS = 2  # each word starts as what that many of the teacher's layers make of it; 0: as it stands
DROPOUT = 0.0  # of a "bert" in training: soft labels regularize enough; None: as in the model it starts from
# Loss
METHOD = "kd"  # or "none" (hard labels alone), "rail", "mate", "cilda", "cilda+minild": see below
ALPHA = 0.5  # weight of the soft labels (KL) against the hard labels (CE); 1, with T 1: JCM −1.3, agreement +2.7
TEMPERATURE = 2.0  # softens both distributions in the KL; raise it if the teacher is nearly always certain
LOGIT_LOSS = "kl"  # or "mse": match the logits themselves; TEMPERATURE then plays no part
# Training
EPOCHS = 20  # at most; early stopping usually ends sooner: the best was epoch 1 to 3 on SST-2 and JCM
PATIENCE = 3  # epochs without a lower validation loss before training stops; there, 1 would find the same epoch
BATCH_SIZE = 32  # texts per step
LEARNING_RATE = 1e-4  # more than a 12-layer BERT bears; lower it if the loss jumps
SCHEDULE = "linear"  # of the rate after the warm-up: "linear" (to 0 at EPOCHS) or "constant"
WARMUP_STEPS = 100  # steps until the rate is reached; below 1: this share of all steps
WEIGHT_DECAY = 0.01  # AdamW's, on matrices only
MAX_GRAD_NORM = 1.0  # gradients are clipped to this norm
SEED = 42  # the same seed gives the same student on the same machine
# Output
OUTPUT = "./distilled_model"  # the student's folder
CACHE = "./.distill_cache"  # soft labels and checkpoints
REPORT_TO = "none"  # or "tensorboard", "wandb", … : any tracker that transformers knows
EXPORT = None  # also write the student as a graph for other programs: "pt2" (torch.export) or "onnx"
QUANTIZE = None  # "int8": also write an ONNX graph with 8-bit weights
# More text, labelled by the teacher alone
UNLABELED = None  # texts without labels: a file (.txt: one a line) or a folder of files
AUGMENT = 0  # copies of each training text, with some words masked or left out
AUGMENT_MASK = 0.1  # in a copy, the probability of each word to become [MASK]
AUGMENT_NGRAM = 0.25  # the probability that a copy keeps only 2 to 10 neighbouring words
GENERATOR = None  # masked-language model that fills in the masked words; None: they stay [MASK]; see below, too
# Methods beside "kd", their papers' values. ′: of texts rewritten by GENERATOR; None: one made from the teacher
RAIL_WEIGHTS = (1/3, 1/3, 1/3)  # of CE, KL, RAIL: means of some layers (arXiv:2109.10164)
MATE_WEIGHTS = (1/3, 1/3, 1/3)  # of CE, KL, KL′ (arXiv:2105.05912)
CILDA_WEIGHTS = (0.333, 0.333, 0.222, 0.111)  # of CE, KL, CE′, KL′ (arXiv:2204.07674)
MINILD_WEIGHTS = (2/9, 2/9, 2/9, 1/6, 1/12, 1/12)  # of CE, KL, CRD, CE′, KL′, CRD′; CRD: [CLS] of all layers
PROJECTION = 128  # numbers that the layers of teacher and student are mapped to, to be compared
CRD_TEMPERATURE = 2.0  # softens the comparison of one text's layers with those of the others in its batch
MASK_RATE = 0.3  # the probability of each token to be rewritten
GENERATOR_STEPS = 10  # of the generator, towards texts on which the student errs; then
STUDENT_STEPS = 100  # of the student, and so on
GENERATOR_LEARNING_RATE = 5e-7  # in those steps
GENERATOR_MAX_GRAD_NORM = 5.0  # in those steps
GENERATOR_WEIGHTS = (0.5, 0.5)  # of KL′ and CRD′ in those steps of the two CILDA; "mate" has KL′ alone
# The "bilstm" student
BILSTM_WORDS = "own"  # MeCab's words in the training texts, or "teacher": the teacher's sub-words
BILSTM_EMBEDDING = 300  # size of a word's vector
BILSTM_HIDDEN = 300  # size of the LSTM's state, in each direction
BILSTM_LEARNING_RATE = 1e-3  # instead of LEARNING_RATE

# ── The run ───────────────────────────────────────────────────────────────────────────────────────────

def run():
    """The whole run, as the settings say. Returns the report; None in other processes than the first."""
    seconds, laps = {}, [time.perf_counter()]
    lap = lambda stage: laps.append(time.perf_counter()) or seconds.update({stage: laps[-1] - laps[-2]})
    on_main_process(clear_temporary_files)
    on_main_process(check_output_replaceable)
    if world_size() > 1:
        log("note", f"{world_size()} processes share the teacher's texts and each batch of {BATCH_SIZE}")
    elif "MASTER_PORT" in os.environ and "ACCELERATE_USE_CPU" in os.environ:
        log("note", "accelerate starts one process on a CPU without --mpirun_hostfile; torchrun starts several")
    name, recipe = find_teacher()
    if DATA == "tests/sample" and name == TEACHER:
        log("note", "DATA is still the sample; set it to your teacher's data")
    config = load_config(recipe[0], "TEACHER_BASE") if recipe else load_config(name)
    tokenizer = load_tokenizer(TOKENIZER or config.name_or_path, config)
    check_later_stages(config, tokenizer)
    collate_fn = functools.partial(collate, pad_token_id=tokenizer.pad_token_id)
    data, label2id = load_data(None if recipe else config.label2id)
    data |= load_extra_texts(data["train"], tokenizer)
    student_tokenizer = load_student_tokenizer(tokenizer, data)
    with as_problem("the student's tokenizer cannot be saved", "Save it anew with a current transformers, and name it in TOKENIZER"):
        student_tokenizer.save_pretrained(scratch_folder() / "tokenizer")  # rather than find out after training
    data = tokenize(data, tokenizer, student_tokenizer)
    lap("data")

    if recipe:
        make_teacher(name, recipe, config, tokenizer, label2id, data, collate_fn)
        lap("making the teacher")
    teacher = load_model(name)
    with as_problem(f"TEACHER = {name!r}: its files cannot be listed", "Download it into a folder and name that"):
        teacher_bytes = weight_bytes(name) or 4 * teacher.num_parameters()
    labelled = len(data["train"])
    data = add_soft_labels(merge_extra_texts(data), teacher, collate_fn)
    check_teacher(data["train"], list(label2id), bool(recipe))
    lap("soft labels")

    student = STUDENTS[STUDENT](teacher, student_tokenizer, tokenizer)
    if REFIT_WORDS and (STUDENT, STUDENT_INIT, teacher.config.model_type) == ("bert", "teacher", "bert"):
        refit_words(student, teacher, tokenizer, data["train"], collate_fn)
    if student_tokenizer is not tokenizer:
        tokenizer, data = student_tokenizer, {split: use_student_ids(rows) for split, rows in data.items()}
        collate_fn = functools.partial(collate, pad_token_id=tokenizer.pad_token_id)
    print(student)
    log("student", f"{student.num_parameters():,} parameters on {student.device}; the teacher has "
        f"{teacher.num_parameters():,}")
    learning_rate = LEARNING_RATE if STUDENT == "bert" else BILSTM_LEARNING_RATE
    trainer = make_trainer(student, data, collate_fn, EPOCHS, learning_rate, PATIENCE, METHODS[METHOD])
    if METHOD in METHOD_TERMS:
        trainer.prepare(teacher, tokenizer)
        lap("preparing the method")
    history = train(trainer, Path(CACHE, "checkpoint.pt"))
    lap("training")
    if rank():  # the first evaluates and saves
        return None

    data["train"] = data["train"].select(range(labelled))
    splits = evaluate(trainer, data)
    lap("evaluation")
    report = save_results(trainer, teacher, name, teacher_bytes, tokenizer, splits, history, seconds)
    print(format_report(report))
    if EXPORT:
        export(student, data["test"], collate_fn, report)
    shutil.rmtree(Path(CACHE, "distill_tmp"), ignore_errors=True)
    log("seconds", ", ".join(f"{stage} {value:.1f}" for stage, value in seconds.items()))
    log("saved", f"{OUTPUT}: the student, loss.png, history.csv, report.json")
    return report

# ── Teacher: soft labels ──────────────────────────────────────────────────────────────────────────────

def add_soft_labels(data, teacher, collate_fn):
    """Give every split the columns soft_labels, softmax(z_T / T), and teacher_seconds. T is TEMPERATURE, 1 for METHOD_TERMS.

    The logits are kept in CACHE under the teacher's weights and the token ids (that is, under text, tokenizer
    and MAX_LENGTH at once): no sentence is run twice, in this run or a later one. The seconds are those of the
    pass in which the teacher saw the sentences, each with its share of its batch.
    """
    path, rows = Path(CACHE, f"logits-{digest(teacher)}.pt"), datasets.concatenate_datasets(list(data.values()))
    as_keys = lambda letters: letters.numpy().view("S24")[:, 0]  # keys are kept as (n, 24) letters
    machine = zlib.crc32(hardware().encode())  # seconds are worth something on one machine only
    no_answers = (torch.empty(0, 24, dtype=torch.uint8), torch.empty(0, teacher.config.num_labels), torch.empty(0),
                  torch.empty(0, dtype=torch.int64))
    answers = [on_main_process(lambda: load_checked(path)) or no_answers]  # parts: letters, logits, seconds, machine
    save = lambda: rank() == 0 and save_checked(path, [torch.cat(part) for part in zip(*answers)])
    keys = column_array(rows, "key", "S24")
    different, first = np.unique(keys, return_index=True)
    if len(new := np.sort(first[~np.isin(different, as_keys(answers[0][0]))])):
        loader, saved = inference_loader(rows.select(new), collate_fn, take=shard), time.monotonic()
        next(timed_logits(teacher, loader), None)  # warm-up
        mine = ((numbers, logits, seconds / len(numbers))
                for numbers, (_, logits, seconds) in zip(loader.batch_sampler, timed_logits(teacher, loader)))
        try:
            for _ in progress_bar(range(on_main_process(lambda: len(loader))), desc="teacher"):
                for numbers, logits, seconds in filter(None, gather_from_all(next(mine, None))):
                    letters = torch.from_numpy(keys[new[numbers]].view(np.uint8).reshape(-1, 24))
                    answers.append((letters, logits, torch.full([len(numbers)], seconds), torch.full([len(numbers)], machine)))
                if time.monotonic() - saved > SAVE_SECONDS:
                    save()
                    saved = time.monotonic()
        finally:
            save()
    log("teacher", f"labelled {len(new):,} texts; {len(different) - len(new):,} were in the cache")
    letters, logits, seconds, machines = map(torch.cat, zip(*answers))
    if (machines != machine).any():
        log("note", "the teacher's seconds are from a run with another processor or number of threads, those of the student from "
            f"this one; to compare them, delete {path}")
    order = np.argsort(as_keys(letters), kind="stable")
    soft_labels = (logits if LOGIT_LOSS == "mse" else F.softmax(logits / soft_label_temperature(), -1)).numpy()

    def add(batch):
        at = order[np.searchsorted(as_keys(letters), np.array(batch["key"], "S24"), sorter=order)]
        return {"soft_labels": soft_labels[at], "teacher_seconds": seconds.numpy()[at]}

    return {split: map_to_cache(rows, add) for split, rows in data.items()}

def soft_label_temperature():
    return 1 if METHOD in METHOD_TERMS else TEMPERATURE

@torch.inference_mode()
def timed_logits(model, loader):
    """Run `model` over `loader`; yields (batch, logits (batch, classes), seconds of the forward pass)."""
    model.eval()
    for batch in loader:
        start = time.perf_counter()
        logits = model(**inputs_of(batch)).logits
        yield batch, logits, time.perf_counter() - start

# ── Student ───────────────────────────────────────────────────────────────────────────────────────────

def build_student(teacher):
    """A classifier of NUM_LAYERS layers, like the teacher or the model in STUDENT_INIT, whose family it has."""
    source = teacher if STUDENT_INIT in ("teacher", "random") else load_student_init(teacher.config)
    if STUDENT_INIT == "random":
        return copy_with_layers(source, classifier_class(source.config), range(NUM_LAYERS), {}, DROPOUT)
    return copy_with_layers(source, classifier_class(source.config), layers_to_copy(source.config), source.state_dict(), DROPOUT)

INIT = {  # INIT_LAYERS → which n of a teacher's layers 0 to depth - 1
    "first": lambda n, depth: range(n),
    "middle": lambda n, depth: range((depth - n + 1) // 2, (depth - n + 1) // 2 + n),
    "last": lambda n, depth: range(depth - n, depth),
    "spread": lambda n, depth: [round(i * (depth - 1) / max(n - 1, 1)) for i in range(n)],
}

def layers_to_copy(config):
    """The numbers of the layers that the student starts from; a Problem if there are not so many."""
    depth = min(getattr(config, name) for name in DEPTH_KEYS if hasattr(config, name))
    layers = [*(INIT[INIT_LAYERS](NUM_LAYERS, depth) if isinstance(INIT_LAYERS, str) else INIT_LAYERS)]
    if min(layers) < 0 or max(layers) >= depth:
        raise Problem(f"NUM_LAYERS = {NUM_LAYERS}, INIT_LAYERS = {INIT_LAYERS!r}: the {STUDENT_INIT} has layers "
                      f"0 to {depth - 1}.")
    return layers

DEPTH_KEYS = "num_hidden_layers", "encoder_layers", "decoder_layers"  # BART's encoder and decoder are cut alike

def copy_with_layers(source, kind, layers, weights, dropout=None):
    """A `kind` like `source`, with these of its layers. Of `weights` it takes all that it has; the rest starts random."""
    config = copy.deepcopy(source.config)
    for name in DEPTH_KEYS:
        if hasattr(config, name):
            setattr(config, name, len(layers))
    if getattr(config, "layer_types", None):  # ModernBERT's layers look near or far
        config.layer_types = [config.layer_types[layer % len(config.layer_types)] for layer in layers]
    stock = {name: value for name, value in config.to_dict().items() if "dropout" in name and dropout is not None}
    config.update(dict.fromkeys(stock, dropout))  # families name theirs differently
    transformers.set_seed(SEED)
    model = kind(config).to("cpu")
    model.config.update(stock)  # who trains the student on finds what the source had
    there = {name: re.sub(r"(?<=layer\.)\d+|(?<=layers\.)\d+", lambda number: str(layers[int(number[0])]), name)
             for name in model.state_dict()}
    model.load_state_dict({name: weights[other] for name, other in there.items() if other in weights}, strict=False)
    return model

# ── Loss and trainer ──────────────────────────────────────────────────────────────────────────────────

def distillation_loss(logits, hard_labels, soft_labels=None):
    """ALPHA * KL + (1 - ALPHA) * CE, a mean over the batch (Hinton et al. 2015, arXiv:1503.02531).

    logits: the student's, (batch, classes). hard_labels: (batch,), NO_LABEL where there is none: for these texts
    the loss is KL alone. soft_labels: the teacher's softmax(z_T / T), (batch, classes); without them the loss is CE
    alone. T² keeps the gradients of the KL as large as those of the CE whatever T is; the sum over classes, unlike
    a mean, does not shrink it with their number. LOGIT_LOSS = "mse": soft_labels are z_T, and the mean of
    (z_S - z_T)² stands in place of KL (Tang et al. 2019, arXiv:1903.12136).
    """
    cross_entropy = F.cross_entropy(logits, hard_labels, ignore_index=NO_LABEL, reduction="none")
    if soft_labels is None:
        return cross_entropy.mean()
    if LOGIT_LOSS == "mse":
        soft = F.mse_loss(logits, soft_labels, reduction="none").mean(-1)
    else:
        soft = F.kl_div(F.log_softmax(logits / TEMPERATURE, -1), soft_labels, reduction="none").sum(-1) * TEMPERATURE**2
    alpha = torch.where(hard_labels == NO_LABEL, 1, ALPHA)
    return (alpha * soft + (1 - alpha) * cross_entropy).mean()

class CustomTrainer(Trainer):
    """A Trainer with the distillation loss, whose loaders keep soft_labels (the stock ones drop them)."""

    generator, beside = None, {}  # of other methods: what else is trained, {name: module or optimizer}

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        outputs = model(**inputs_of(inputs))
        loss = distillation_loss(outputs.logits, inputs["labels"], inputs.get("soft_labels"))
        return (loss, outputs) if return_outputs else loss

    def get_train_dataloader(self):
        """Batches of like length, in an order that SEED and state.epoch decide; each process has a part of each."""
        lengths, seed = column_array(self.train_dataset, "length"), SEED + int(self.state.epoch or 0)
        order, size = length_grouped_order(lengths, self.args.train_batch_size, seed), self.args.train_batch_size
        batches = [order[start:start + size] for start in range(0, len(order), size)]
        return DataLoader(self.train_dataset, collate_fn=self.data_collator,
                          batch_sampler=[shard(batch) if len(shard(batch)) else batch[:1] for batch in batches])

    def get_eval_dataloader(self, eval_dataset=None):
        """Of the batches each process has every n-th."""
        rows = self.eval_dataset if eval_dataset is None else eval_dataset
        return inference_loader(rows, self.data_collator, take=shard)

    def get_test_dataloader(self, test_dataset):
        return inference_loader(test_dataset, self.data_collator)

def make_trainer(model, data, collate_fn, epochs, learning_rate, patience, kind=CustomTrainer):
    """A trainer on the CPU. Of the stock Trainer it uses optimizer, schedule, callbacks and trackers."""
    with as_problem(f"REPORT_TO = {REPORT_TO!r}", 'Install what is missing, or set "none"'):
        args = TrainingArguments(
            output_dir=CACHE, use_cpu=True, seed=SEED, num_train_epochs=epochs, learning_rate=learning_rate,
            lr_scheduler_type=SCHEDULE, warmup_steps=WARMUP_STEPS, weight_decay=WEIGHT_DECAY,
            max_grad_norm=MAX_GRAD_NORM, per_device_train_batch_size=BATCH_SIZE,
            eval_strategy="epoch", save_strategy="epoch", load_best_model_at_end=True,
            metric_for_best_model="eval_loss", greater_is_better=False, remove_unused_columns=False,
            dataloader_pin_memory=False, report_to=REPORT_TO, disable_tqdm=True, log_level="error")
        trainer = kind(model=model, args=args, data_collator=collate_fn, train_dataset=data["train"],
                       eval_dataset=data["val"], callbacks=[EarlyStoppingCallback(patience)])
    trainer.remove_callback(PrinterCallback)
    return trainer

# ── Training ──────────────────────────────────────────────────────────────────────────────────────────

def train(trainer, checkpoint, use_what_is_there=True, recipe=()):
    """The epoch loop: returns the history, a dict per epoch, and leaves the best epoch's weights in trainer.model.

    The file `checkpoint` holds after each epoch what is needed to go on. Random numbers are drawn anew from SEED
    in each epoch, so that a run which was stopped ends bit for bit like one which was not. Ctrl-C ends training
    in good order, with the best epoch so far; it is passed on if there is none, or without use_what_is_there.
    """
    model, args, callbacks = trainer.model, trainer.args, trainer.callback_handler
    epochs = int(args.num_train_epochs)
    settings = {name: globals()[name] for name in ACCEPTED
                if name not in ("OUTPUT", "CACHE", "REPORT_TO", "EXPORT", "QUANTIZE")}
    data = (batch for rows in (trainer.train_dataset, trainer.eval_dataset)
            for batch in iter_batches(rows, *sorted({*rows.column_names} - {"teacher_seconds", "teacher_layers"})))
    run_name = digest(settings, *recipe, *trainer.beside.values(), epochs, args.learning_rate, model,
                      torch.__version__, data)
    if len({*gather_from_all(run_name)}) > 1:
        raise Problem("the processes have different settings, data or teachers. Give all the same.")
    ours = isinstance(model, (BertForSequenceClassification, BiLSTM))  # others may use their embeddings otherwise
    with only_used_rows(model, trainer.train_dataset, trainer.eval_dataset) if ours and not trainer.generator else \
            contextlib.nullcontext():
        steps = epochs * len(trainer.get_train_dataloader())
        if steps <= WARMUP_STEPS:
            log("note", f"WARMUP_STEPS = {WARMUP_STEPS}, but training has {steps} steps at most: the learning rate is never reached. "
                "Lower it, or BATCH_SIZE")
        trainer.create_optimizer_and_scheduler(num_training_steps=steps)
        parts = {"model": model, "optimizer": trainer.optimizer, "scheduler": trainer.lr_scheduler, **trainer.beside}
        now = on_main_process(lambda: load_checked(checkpoint)) or {"run": run_name, "history": []}
        if now["run"] != run_name:
            log("training", "settings or data differ from those of the last checkpoint: training starts anew")
            now = {"run": run_name, "history": []}
        if now["history"]:
            log("training", f"goes on after epoch {len(now['history'])}")
            for name, part in parts.items():
                part.load_state_dict(now[name])
        if world_size() > 1:  # gradients become the mean over all; of a fast last layer, some parameters need none
            trainer.accelerator.ddp_handler = DistributedDataParallelKwargs(find_unused_parameters=True)
            trainer.model_wrapped = trainer.accelerator.prepare(model)
        trainer.control = callbacks.on_train_begin(args, trainer.state, trainer.control)
        print(" epoch   train loss     val loss   val accuracy         rate   seconds")
        for row in now["history"]:
            record_epoch(trainer, row)
        try:
            while len(now["history"]) < epochs and not trainer.control.should_training_stop:
                row = train_epoch(trainer, len(now["history"]) + 1)
                row = on_main_process(lambda: row)  # so that all stop after the same epoch
                best = copy.deepcopy(model.state_dict()) if record_epoch(trainer, row) else now["best"]
                now = {"run": run_name, "history": now["history"] + [row], "best": best,
                       **{name: part.state_dict() for name, part in parts.items()}}
                if rank() == 0:
                    save_checked(checkpoint, now)
            if trainer.control.should_training_stop:
                log("training", "stopped early: the validation loss no longer improves")
        except KeyboardInterrupt:
            if not now["history"] or not use_what_is_there or world_size() > 1:
                raise
            log("training", "stopped by Ctrl-C: the best epoch so far is used; the same command goes on from here")
        trainer.model_wrapped = model
        callbacks.on_train_end(args, trainer.state, trainer.control)
        model.load_state_dict(now["best"])
        return now["history"]

def train_epoch(trainer, epoch):
    """One pass over the training data and one over the validation data; returns the epoch's row of the history."""
    trainer.state.epoch = epoch
    transformers.set_seed(SEED + epoch + 10_007 * rank())  # the processes' dropout differs
    model, loader, start = trainer.model_wrapped.train(), trainer.get_train_dataloader(), time.perf_counter()
    trainer.state.global_step, total, left = (epoch - 1) * len(loader), 0.0, len(trainer.train_dataset)
    for batch in progress_bar(loader, desc=f"epoch {epoch}"):
        rate = trainer.lr_scheduler.get_last_lr()[0]
        size = min(left, trainer.args.train_batch_size)
        mine = len(shard(range(size)))  # texts for this process; if it is none, it is given one all the same, weighed 0
        total += training_step(trainer, batch, mine * world_size() / size) * mine
        left -= size
        if not math.isfinite(total) and world_size() == 1:  # several must all go on to the end of the epoch
            break
    seconds, val_total, right, model = time.perf_counter() - start, 0.0, 0, trainer.model.eval()
    with torch.inference_mode():
        for batch in trainer.get_eval_dataloader():
            loss, outputs = trainer.compute_loss(model, batch, return_outputs=True)
            val_total += loss.item() * len(outputs.logits)
            right += (outputs.logits.argmax(-1) == batch["labels"]).sum().item() if "labels" in batch else math.nan
    total, val_total, right = map(sum, zip(*gather_from_all((total, val_total, right))))
    if not math.isfinite(total + val_total):
        raise Problem(f"the loss is not a number any more in epoch {epoch}. Lower LEARNING_RATE (now "
                      f"{trainer.args.learning_rate}). What was saved before is still there.")
    texts = len(trainer.eval_dataset)
    return {"epoch": epoch, "train_loss": total / len(trainer.train_dataset), "val_loss": val_total / texts,
            "val_accuracy": right / texts, "learning_rate": rate, "seconds": seconds}

def training_step(trainer, batch, weight=1):
    """One step of the optimizer; returns the loss of the batch, a mean. `weight`: of it, among the processes."""
    loss = trainer.compute_loss(trainer.model_wrapped, batch)
    trainer.accelerator.backward(loss * weight)
    clip_gradients(trainer.model, trainer.args.max_grad_norm)
    trainer.optimizer.step()
    trainer.lr_scheduler.step()
    trainer.optimizer.zero_grad()
    trainer.state.global_step += 1
    return loss.item()

def record_epoch(trainer, row):
    """Show one epoch to the callbacks (early stopping, trackers), then to the user; True if it is the best so far.

    EarlyStoppingCallback compares with state.best_metric, which only its caller updates: before on_evaluate, and
    no epoch is ever seen to improve; never, and training does not stop.
    """
    metrics = {f"eval_{name[4:]}" if name.startswith("val_") else name: value for name, value in row.items()}
    trainer.state.epoch = row["epoch"]
    trainer.log(dict(metrics))
    trainer.control = trainer.callback_handler.on_evaluate(trainer.args, trainer.state, trainer.control, metrics)
    is_best = trainer.state.best_metric is None or row["val_loss"] < trainer.state.best_metric
    if is_best:
        trainer.state.best_metric = row["val_loss"]
    print("{epoch:6d} {train_loss:12.4f} {val_loss:12.4f} {val_accuracy:14.4f} {learning_rate:12.1e} {seconds:9.1f}"
          .format(**row), "best" * is_best, flush=True)
    return is_best

# ── Report ────────────────────────────────────────────────────────────────────────────────────────────

def evaluate(trainer, data):
    """Accuracy and time per split: {"teacher": {split: figures}, "student": …}. The student sees each split once."""
    splits = {"teacher": {}, "student": {}}
    next(timed_logits(trainer.model, trainer.get_test_dataloader(data["test"])))  # warm-up
    for split, rows in data.items():
        answers = timed_logits(trainer.model, trainer.get_test_dataloader(rows))
        answers = ((batch["labels"], batch["soft_labels"], logits, seconds) for batch, logits, seconds in answers)
        labels, soft, logits, seconds = zip(*answers)
        labels, soft = torch.cat(labels), torch.cat(soft)
        teacher = soft if LOGIT_LOSS == "mse" else soft.clamp(min=1e-38).log() * soft_label_temperature()  # but for a constant
        splits["teacher"][split] = compute_metrics(teacher, labels, teacher, column_array(rows, "teacher_seconds").sum().item())
        splits["student"][split] = compute_metrics(torch.cat(logits), labels, teacher, sum(seconds))
    return splits

def compute_metrics(logits, labels, teacher_logits, seconds):
    """Figures of one model on one split; logits are (n, classes), labels (n,), seconds the time of inference."""
    predicted = logits.argmax(-1)
    f1 = [2 * ((predicted == c) & (labels == c)).sum() / ((predicted == c).sum() + (labels == c).sum())
          for c in torch.cat([predicted, labels]).unique()]
    share = lambda hits: hits.double().mean().item()
    return {"examples": len(labels), "accuracy": share(predicted == labels), "macro_f1": share(torch.stack(f1)),
            "agreement": share(predicted == teacher_logits.argmax(-1)),
            "kl": F.kl_div(logits.log_softmax(-1), teacher_logits.log_softmax(-1), reduction="batchmean",
                           log_target=True).item(),
            "seconds": seconds, "texts_per_second": ratio(len(labels), seconds)}

def ratio(above, below):
    """above / below; None where that is no number."""
    return above / below if below else None

def save_results(trainer, teacher, teacher_name, teacher_bytes, tokenizer, splits, history, seconds):
    """Write OUTPUT with all that belongs to it. Returns the report; what its keys mean stands in README.md."""
    test, best = {role: splits[role]["test"] for role in splits}, min(history, key=lambda row: row["val_loss"])
    report = {
        "teacher": {"parameters": teacher.num_parameters(), "bytes": teacher_bytes, "splits": splits["teacher"]},
        "student": {"parameters": trainer.model.num_parameters(), "bytes": None, "splits": splits["student"]},
        "kept": ratio(test["student"]["accuracy"], test["teacher"]["accuracy"]),
        "speedup": ratio(test["teacher"]["seconds"], test["student"]["seconds"]),
        "epochs": len(history), "best_epoch": best["epoch"], "seconds": seconds,
        "settings": {name: without_folders(globals()[name]) for name in ACCEPTED},
        "versions": {"python": platform.python_version(),
                     **{module.__name__: module.__version__ for module in (torch, transformers, datasets)}},
        "hardware": hardware(),
    }

    def more(new):
        report["student"]["bytes"] = weight_bytes(new)
        report["files"] = sorted([*os.listdir(new), "README.md", "history.csv", "loss.png", "report.json"])
        card = CARD.format(**report["settings"], teacher=without_folders(teacher_name), table=format_report(report))
        lines = [",".join(map(str, row)) for row in (best, *(row.values() for row in history))]
        (new / "README.md").write_text(card, "utf-8")
        write_report(report, new)
        (new / "history.csv").write_text("\n".join(lines) + "\n", "utf-8")
        plot_losses(history, best, new / "loss.png")

    save_folder(OUTPUT, trainer.model, tokenizer, more)
    return report

# ──────────────────── Nothing below is needed to understand the method. ────────────────────

# ── Report files: table, plot, model card ─────────────────────────────────────────────────────────────

def format_report(report):
    """The report as text."""
    lines = [f"{'':<8} {'split':<6}{'accuracy':>9}{'macro F1':>10}{'agreement':>11}{'seconds':>9}{'texts/s':>9}"]
    for role in ("teacher", "student"):
        lines += [f"{role:<8} {split:<6}{one['accuracy']:>9.4f}{one['macro_f1']:>10.4f}{one['agreement']:>11.4f}"
                  f"{one['seconds']:>9.2f}{one['texts_per_second'] or math.nan:>9,.0f}"
                  for split, one in report[role]["splits"].items()]
    sizes = [f"{role} {report[role]['parameters']:,} parameters, {report[role]['bytes'] / 1e6:.1f} MB"
             for role in ("teacher", "student")]
    kept = "the teacher is right on no text, so that there is nothing to keep; the student" if report["kept"] is None else \
        f"the student keeps {report['kept']:.1%} of the teacher's accuracy and"
    return "\n".join([*lines, "; ".join(sizes), f"On test {kept} is {report['speedup'] or math.nan:.1f} times as fast",
                      f"(without tokenization; {report['hardware']})."])

def plot_losses(history, best, path):
    """Train and val loss per epoch; colours (Okabe and Ito's) and line styles that colour-blind people can tell."""
    figure = Figure(figsize=(7, 4.2), layout="constrained")
    axes = figure.subplots()
    for name, style, colour in ("train_loss", "o--", "#0072B2"), ("val_loss", "s-", "#D55E00"):
        axes.plot([row["epoch"] for row in history], [row[name] for row in history], style, color=colour,
                  label=name.replace("_", " "))
    axes.plot(best["epoch"], best["val_loss"], "*k", markersize=16, label=f"best: epoch {best['epoch']}")
    kd = f" = {ALPHA:g} {LOGIT_LOSS.upper()} + {1 - ALPHA:g} CE, T = {TEMPERATURE:g}"
    axes.set(xlabel="epoch", ylabel="loss" + (kd if METHOD == "kd" else f" ({METHOD}; val: CE and KL alone)"
                                              if METHOD in METHOD_TERMS else " = CE"))
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=150)

CARD = """---
language: ja
pipeline_tag: text-classification
library_name: transformers
---
# A small text classifier ({STUDENT}), distilled

Distilled from `{teacher}` on `{DATA}` by distill.py, METHOD {METHOD}, ALPHA {ALPHA}, TEMPERATURE {TEMPERATURE}; more is in report.json.
It shares its teacher's faults: measure it on texts of your own before you rely on it.

```
python distill.py --output path/to/this/folder --predict "この店の料理は美味しい。"
```

A "bert" also loads like any model: `pipeline("text-classification", model="path/to/this/folder")`.

```
{table}
```
"""

def write_report(report, folder):
    new = Path(folder, "report.json.distill_new")
    new.write_text(json.dumps(report, indent=2, ensure_ascii=False) + "\n", "utf-8")
    os.replace(new, folder / "report.json")

def weight_bytes(name):
    """Bytes of the weights of the model in a folder or, as far as it was loaded, a hub repository."""
    folder = Path(name if os.path.isdir(name) else huggingface_hub.snapshot_download(name, local_files_only=True))
    for pattern in r"model(-\d+-of-\d+)?\.safetensors", r"pytorch_model(-\d+-of-\d+)?\.bin":
        files = [file for file in folder.iterdir() if re.fullmatch(pattern, file.name)]
        if files:
            return sum(file.stat().st_size for file in files)
    return None

def without_folders(value):
    """A setting as others may see it: of a path to elsewhere only the last name."""
    return Path(value).name if isinstance(value, str) and value.startswith(("~", "..", os.sep)) else value

def hardware():
    """The processor's name, and how many threads torch uses."""
    ask = {"Darwin": "sysctl -n machdep.cpu.brand_string", "Linux": "grep -m1 'model name' /proc/cpuinfo"}
    name = os.popen(ask.get(platform.system(), "")).read().split(":")[-1].strip() or platform.machine()
    return f"{name}, {torch.get_num_threads()} threads"

# ── Models and tokenizers: load and check ─────────────────────────────────────────────────────────────

FAMILIES = {  # a model's family → the METHODs for which its layers can be used
    "bert": ("none", "kd", "rail", "mate", "cilda", "cilda+minild"),
    "roberta": ("none", "kd", "rail", "mate", "cilda", "cilda+minild"),
    "bart": ("none", "kd", "rail", "mate", "cilda"),
    **dict.fromkeys(["electra", "deberta-v2", "modernbert", "distilbert"], ("none", "kd")),
}

def classifier_class(config):
    """The class of a classifier of this family: BERT's is the fast one above."""
    return BertForSequenceClassification if config.model_type == "bert" else \
        transformers.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING[type(config)]

def load_config(name, setting="TEACHER"):
    """The configuration of the model in the folder or hub repository `name`."""
    if os.path.exists(name) and not os.path.isfile(os.path.join(name, "config.json")):
        raise Problem(f"{setting} = {name!r}: holds no model (no config.json in a folder of this name). Save one into "
                      "it with model.save_pretrained, or name another folder.")
    if not os.path.isdir(name) and (name.startswith((".", "~", os.sep)) or name.count("/") > 1):
        advice = {"TEACHER": "Put your fine-tuned model there, name its folder, or set TEACHER_BASE to have a teacher "
                  "fine-tuned", "STUDENT_INIT": 'Accepted are "teacher", "random", a folder or a hub name'}
        raise Problem(f"{setting} = {name!r}: no such folder. {advice.get(setting, 'Name a folder or a hub model')}.")
    with as_problem(f"{setting} = {name!r}: cannot be loaded", "Name a folder of model.save_pretrained, or a hub model"):
        forbid_outside_paths(name)
        config = AutoConfig.from_pretrained(name, trust_remote_code=False)
        kind, outputs = str((config.architectures or ["?ForSequenceClassification"])[0]), config.num_labels
    if setting.startswith("TEACHER") and METHOD not in FAMILIES.get(config.model_type, ()):
        able = ", ".join(family for family in FAMILIES if METHOD in FAMILIES[family])
        raise Problem(f"{setting} = {name!r}: is of the family {config.model_type!r}; METHOD = {METHOD!r} accepts {able}.")
    if setting == "TEACHER" and not kind.endswith("ForSequenceClassification"):
        raise Problem(f"TEACHER = {name!r}: is a {kind}; accepted is a fine-tuned …ForSequenceClassification. To "
                      "fine-tune this model first, name it in TEACHER_BASE.")
    if setting == "TEACHER" and (outputs < 2 or config.problem_type not in (None, "single_label_classification")):
        raise Problem(f"TEACHER = {name!r}: {outputs} output(s), {config.problem_type or 'regression'}; accepted is a "
                      "classifier that chooses one of two or more labels.")
    if setting in ("TEACHER", "OUTPUT"):
        names = checked_label_names(config, f"{setting} = {name!r}: its config.json")
        config.id2label, config.label2id = dict(enumerate(names)), {label: number for number, label in enumerate(names)}
    # How its last user wanted to run a model, not what it is: such flags would slow it down or change what it returns.
    config.return_dict, config.output_hidden_states, config.output_attentions = True, False, False
    return config

def checked_label_names(config, where):
    """The label names of a classifier by output, as pipelines print them: from id2label. A Problem if label2id contradicts.

    A label2id of other names (LABEL_0, … left from before the names were set), with its numbers as texts or turned
    round, number to name, contradicts nothing. Where id2label has only LABEL_0, …, the names of label2id count.
    """
    outputs = range(config.num_labels)
    names = [str(config.id2label.get(number)) for number in outputs]
    if set(config.id2label) != set(outputs) or len(set(names)) < len(names):
        raise Problem(f"{where} needs a different name in id2label for each of the outputs 0 to {len(outputs) - 1}; it has "
                      f"{short_list([f'{number}: {label}' for number, label in config.id2label.items()])}.")
    label2id = {str(name): str(number) for name, number in (config.label2id or {}).items()}
    if names == [f"LABEL_{number}" for number in outputs] and not label2id.keys() & set(names):
        by_number = {number: name for name, number in label2id.items()}
        if set(by_number) == {str(number) for number in outputs}:
            return [by_number[str(number)] for number in outputs]
    output_of = {name: str(number) for number, name in enumerate(names)}
    straight = [output_of[name] == number for name, number in label2id.items() if name in output_of]
    turned = [output_of[name] == number for number, name in label2id.items() if name in output_of]
    if (straight or turned) and not (straight and all(straight)) and not (turned and all(turned)):
        raise Problem(f"{where} contradicts itself: id2label has {short_list([f'{number}: {name}' for number, name in enumerate(names)])}, "
                      f"label2id {short_list([f'{name}: {number}' for name, number in label2id.items()])}. Correct the one that is "
                      "wrong; id2label is what pipelines print.")
    return names

def takes_types(config):
    """Does a model tell the first text of a pair from the second by token types? BERT does, RoBERTa and others do not."""
    return (getattr(config, "type_vocab_size", 0) or 0) > 1

def max_tokens(config):
    """How many tokens a model takes at most."""
    offset = config.pad_token_id + 1 if config.model_type == "roberta" else 0
    return getattr(config, "max_position_embeddings", 10**9) - offset

def load_tokenizer(name, config, role="teacher"):
    """The tokenizer in `name`, which must fit the model's `config`. It cuts texts to MAX_LENGTH, here and later."""
    advice = 'Set TOKENIZER to the one the teacher was made with, e.g. "tohoku-nlp/bert-base-japanese-v3"' \
        if role == "teacher" else "Save the one that the model was made with into its folder"
    files = [file for pattern in ("vocab.*", "tokenizer.json", "*.model") for file in Path(name).glob(pattern)]
    if os.path.exists(name) and not files:  # transformers would make an empty one, and say nothing
        raise Problem(f"{name!r} holds no tokenizer (model.save_pretrained saves none). {advice}.")
    with as_problem(f"the tokenizer in {name!r} cannot be loaded",
                 f"If a package is missing: pip install fugashi unidic-lite. Else: {advice}"):
        given = get_tokenizer_config(name)
        if paths := [one for one in iter_strings([given.get("mecab_kwargs"), given.get("sudachi_kwargs")]) if "/" in one]:
            raise ValueError(f"its tokenizer_config.json names files elsewhere, which are not opened ({paths[0]})")
        tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=False)
        tokenizer.takes_types = takes_types(config)
        encode([["晴れ time"]] * len(text_columns()), tokenizer, MAX_LENGTH)  # now, rather than after the data is read
        if tokenizer.pad_token_id is None:
            raise ValueError("it has no padding token")
        if not set(tokenizer.get_vocab()) - set(tokenizer.all_special_tokens):
            raise ValueError("its vocabulary holds nothing but special tokens")
        highest = max(tokenizer.get_vocab().values())
    if highest >= config.vocab_size:
        raise Problem(f"the tokenizer in {name!r} has ids up to {highest}, the {role} only 0 to "
                      f"{config.vocab_size - 1}. {advice}.")
    if MAX_LENGTH > max_tokens(config):
        raise Problem(f"MAX_LENGTH = {MAX_LENGTH}: the {role} takes at most {max_tokens(config)} tokens.")
    tokenizer.model_max_length = MAX_LENGTH
    if role == "teacher":
        report_guessed_tokenizer(tokenizer, name, given, config)
    return tokenizer

def report_guessed_tokenizer(tokenizer, name, given, config):
    """Say where the library had to guess what the teacher's tokenizer was; `given`: its tokenizer_config.json."""
    if not given.get("tokenizer_class") and not getattr(config, "tokenizer_class", None):
        log("note", f"{name} does not name its tokenizer_class: texts are read by {type(tokenizer).__name__}. If the teacher was "
            'trained with another, such as "BertJapaneseTokenizer", write that into its tokenizer_config.json')
    uses_mecab = isinstance(tokenizer, BertJapaneseTokenizer) and tokenizer.word_tokenizer_type == "mecab"
    saved_by = re.match(r"(\d+)\.(\d+)", str(config.transformers_version))
    if uses_mecab and not (given.get("mecab_kwargs") or {}).get("mecab_dic") and (
            not saved_by or (int(saved_by[1]), int(saved_by[2])) < (4, 46)):
        log("note", f"{name} does not name its mecab_dic: texts are cut with unidic_lite, today's default. Before transformers "
            f"4.46 (it was saved by {saved_by[0] if saved_by else 'an unknown version'}) it was ipadic; if the teacher was trained "
            'with that, write "mecab_kwargs": {"mecab_dic": "ipadic"} into its tokenizer_config.json and pip install ipadic')

def check_later_stages(config, tokenizer):
    """Load and throw away what is needed only after the teacher's pass: what is wrong with it is told before."""
    with as_problem(f"REPORT_TO = {REPORT_TO!r}", 'Install what is missing, or set "none"'):
        for callback in get_reporting_integration_callbacks([] if REPORT_TO == "none" else [REPORT_TO]):
            callback()
    source = config
    if STUDENT_INIT not in ("teacher", "random"):
        source = load_student_init(config).config
    if STUDENT == "bert" and STUDENT_INIT != "random":
        layers_to_copy(source)
    if METHOD in METHOD_TERMS and "KL′" in METHOD_TERMS[METHOD] and GENERATOR is not None:
        load_generator(tokenizer)

def load_model(name, setting="TEACHER", config=None):
    """The classifier in `name`, in eval mode and float32 (transformers 5 otherwise keeps the stored precision).

    A teacher has to be whole, and is frozen. Another model may lack its head, or have one for other labels: the head
    then starts random.
    """
    with as_problem(f"{setting} = {name!r}: its weights cannot be loaded", "Copy or save the model again"):
        config = config or load_config(name, setting)
        model, info = classifier_class(config).from_pretrained(
            name, config=config, dtype=torch.float32, ignore_mismatched_sizes=setting != "TEACHER",
            output_loading_info=True)
        end = getattr(config, "eos_token_id", None) or 0  # without which BART does not run
        model.eval()(input_ids=torch.full((1, 2), end))  # what does not fit is told now
    missing = {*info["missing_keys"], *(key for key, *_ in info["mismatched_keys"])}
    if setting == "TEACHER" and missing:  # transformers would warn and go on with random weights
        raise Problem(f"TEACHER = {name!r}: not a fine-tuned classifier: its file lacks "
                      f"{', '.join(sorted(missing)[:4])}. Name the fine-tuned model; to fine-tune this one first, name it "
                      "in TEACHER_BASE.")
    unused = sorted(info["unexpected_keys"])
    if setting == "TEACHER" and (other := [key for key in unused if re.search(r"layers?\.\d+\.", key)]):
        raise Problem(f"TEACHER = {name!r}: its file holds layers, or parts of layers, that its config.json does not know "
                      f"({', '.join(other[:3])}). Put the config.json there that was saved with these weights.")
    if setting == "TEACHER" and unused:
        log("note", f"{name} holds weights that a {type(model).__name__} does not use: {short_list(unused)}")
    body = model.base_model_prefix + "."
    if missing := sorted(key for key in missing if key.startswith(body) and ".pooler." not in key):
        raise Problem(f"{setting} = {name!r}: is no whole model: its file lacks {', '.join(missing[:4])}.")
    return model.requires_grad_(setting != "TEACHER")

def check_teacher(rows, names, is_made):
    """Say so where the teacher answers the training texts worse than no model at all would, before a student learns it."""
    labels = column_array(rows, "labels")
    answers = np.concatenate([np.argmax(part["soft_labels"], -1) for part in iter_batches(rows, "soft_labels")])[labels != NO_LABEL]
    labels = labels[labels != NO_LABEL]
    counts = np.bincount(labels, minlength=len(names))
    accuracy, share = (answers == labels).mean(), counts.max() / len(labels)
    if accuracy < share:
        log("note", f"the teacher is right on {accuracy:.1%} of train; to answer {names[counts.argmax()]} always would be right on "
            f"{share:.1%}. Likely causes: its labels are in another order than those of the data; its tokenizer or MeCab dictionary "
            "is not the one it was trained with; TEXT_COLUMN or LABEL_COLUMN names another column"
            + ("; it was trained too little (TEACHER_EPOCHS, TEACHER_LEARNING_RATE)" if is_made else ""))
    elif len(set(answers)) == 1 and (counts > 0).sum() > 1:
        log("note", f"the teacher answers all texts of train with {names[answers[0]]}: there is nothing to learn from it")
    if len(names) > 1000:  # too large a table for too little
        return
    confusion = np.bincount(labels * len(names) + answers, minlength=len(names)**2).reshape(len(names), -1)
    own = confusion.diagonal()
    exchanged = np.argwhere(np.triu((confusion > own[:, None]) & (confusion.T > own)))
    for one, other in exchanged[:3]:
        log("note", f"the teacher answers {names[one]} mostly with {names[other]}, and {names[other]} mostly with {names[one]}: are "
            "these two labels exchanged?")

# ── Data: files and splits ────────────────────────────────────────────────────────────────────────────

SPLITS = {"train": ["train"], "val": ["val", "validation", "valid", "dev"], "test": ["test"]}
SPLIT_OF = {name: split for split, names in SPLITS.items() for name in names}  # a file's or a split's name → which it is
LABELED_KINDS = ".csv", ".tsv", ".jsonl", ".json", ".parquet"  # of files; texts without labels may also be a .txt
MAX_CHARACTERS = 30_000  # characters of a text that are looked at: far more than any MAX_LENGTH tokens have
SAVE_SECONDS = 60  # between two savings of the teacher's answers
TARGET_KEYS = "labels", "soft_labels", "teacher_layers"  # the keys of a batch that are for the loss, not for the model
NO_LABEL = -100  # among the labels: of a text that only the teacher has labelled
UNKNOWN_SHARE = 0.03  # of a split's tokens, above which it is said: of a vocabulary that fits, next to none is unknown
TEXTS_PER_PROCESS = 100_000  # to be tokenized: less would not pay for the start of another process
TOKENS_PER_BATCH = 2048  # in a batch of inference: enough to keep the processor busy, few enough for its cache
POOL = 16  # batches whose texts are sorted by length together: more saves little, and makes batches too alike

def load_data(label2id=None):
    """({"train", "val", "test"} with texts and labels, label2id); the latter is read off the data if not given."""
    splits = read_splits(set(label2id or ()))
    for split, rows in splits.items():
        if len(rows) == 0:
            raise Problem(f"DATA = {DATA!r}: {split} has no rows. Add some.")
        refuse_missing_columns(f"DATA = {DATA!r}: {split}", [*text_columns(), LABEL_COLUMN], rows.column_names)
        for name in {*text_columns(), LABEL_COLUMN}:  # pictures and sounds may be paths, which would be opened
            if not isinstance(rows.features[name], (datasets.Value, datasets.ClassLabel)):
                raise Problem(f"DATA = {DATA!r}: column {name} of {split} holds {rows.features[name]}; accepted are texts "
                              "and numbers.")
    names = sorted(label2id, key=label2id.get) if label2id else new_label_names(splits)
    label2id = {name: number for number, name in enumerate(names)}
    lookup = read_labels(splits, names)
    splits = {split: validate_rows(rows, split, lookup[split], names) for split, rows in splits.items()}

    def split_rows(rows, share):
        parts = rows.cast_column("labels", datasets.ClassLabel(len(label2id))).train_test_split(
            share, seed=SEED, stratify_by_column="labels")
        return [part.cast_column("labels", datasets.Value("int64")) for part in parts.values()]

    if "all" in splits:
        with as_problem(f"DATA = {DATA!r}: cannot be cut into train, val and test", "Give more rows of each label"):
            train, rest = split_rows(splits["all"], 0.2)
            splits = dict(zip(SPLITS, (train, *split_rows(rest, 0.5))))
        log("data", f"{DATA} is one set: cut 80/10/10 by SEED = {SEED}, each label in the same proportion")
    if TRAIN_FRACTION < 1:
        with as_problem(f"TRAIN_FRACTION = {TRAIN_FRACTION}: cannot be taken", "Choose another share, or 1"):
            splits["train"] = split_rows(splits["train"], 1 - TRAIN_FRACTION)[0]
    counts = np.bincount(column_array(splits["train"], "labels"), minlength=len(names))
    log("data", f"{DATA}: " + " · ".join(f"{split} {len(rows):,}" for split, rows in splits.items()) + "; train has "
        + ", ".join(f"{count:,} {name}" for name, count in zip(names, counts)))
    absent = [name for name, count in zip(names, counts) if count == 0]
    if len(absent) == len(names) - 1:
        log("note", f"all texts of train have one label, {names[counts.argmax()]}: there is nothing to tell apart")
    elif absent:
        log("note", f"no text of train has the label {short_list(absent)}: of it the student sees the teacher's guesses alone")
    return splits, label2id

def read_splits(known_labels):
    """DATA as it comes: a dict of train, val and test, or {"all": …} for a single set."""
    path = Path(DATA)
    if DATA == "tests/sample" and not path.exists():  # started from another folder
        path = Path(__file__).resolve().parent / DATA
    columns = [*text_columns(), LABEL_COLUMN]
    if path.is_file():
        if path.suffix.lower() == ".txt":
            raise Problem(f"DATA = {DATA!r}: a .txt file has no labels. Accepted are {', '.join(LABELED_KINDS)}; texts "
                          "without labels are named in UNLABELED.")
        return {"all": read_file(path, columns, known_labels)}
    files = labeled_files(path) if path.is_dir() else {}
    if path.is_dir() and not {"state.json", "dataset_dict.json"} & set(os.listdir(path)):
        refuse_duplicate_splits(files)
        report_unread_files(DATA, path, [file for names in files.values() for file in names])
        splits = {split: read_file(*names, columns, known_labels) for split, names in files.items()}
        found = list(splits)
    else:
        if files:
            raise Problem(f"DATA = {DATA!r}: is a save_to_disk folder that also holds "
                          f"{', '.join(file.name for names in files.values() for file in names)}. Keep the one or the other.")
        with as_problem(f"DATA = {DATA!r}: no such file or folder, and no data set to load", "Name a folder with train, "
                     f"val and test files ({', '.join(LABELED_KINDS)}), a single file, or a hub data set"):
            forbid_outside_paths(path)
            loaded = datasets.load_from_disk(DATA) if path.is_dir() else datasets.load_dataset(DATA)
        loaded = loaded.with_format(None)  # arrays and the like were for its last user
        if not isinstance(loaded, dict) or len(loaded) == 1:
            return {"all": loaded if not isinstance(loaded, dict) else next(iter(loaded.values()))}
        names = defaultdict(list)
        for name in loaded:
            if name in SPLIT_OF:
                names[SPLIT_OF[name]].append(name)
        refuse_duplicate_splits(names)
        splits = {split: loaded[name] for split, (name,) in names.items()}
        found = list(loaded)
    if missing := [" or ".join(names) for split, names in SPLITS.items() if split not in splits]:
        raise Problem(f"DATA = {DATA!r}: has no {', no '.join(missing)} (found: {', '.join(found) or 'nothing'}). Add "
                      f"it ({', '.join(LABELED_KINDS)}), or set DATA to one single file, which is cut into the three.")
    return {split: splits[split] for split in SPLITS}

def labeled_files(folder):
    """{split: its files}, as their names tell; a .txt is not among them, for it has no labels."""
    files = defaultdict(list)
    for file in sorted(folder.iterdir()):
        if file.suffix.lower() in LABELED_KINDS and file.stem.lower() in SPLIT_OF:
            files[SPLIT_OF[file.stem.lower()]].append(file)
    return files

def refuse_duplicate_splits(found):
    """A Problem where more than one file, or split of a data set, is for train, val or test."""
    for split, names in found.items():
        if len(names) > 1:
            names = [name.name if isinstance(name, Path) else name for name in names]
            raise Problem(f"DATA = {DATA!r}: {' and '.join(names)} are both for {split}. Keep one of them.")

def report_unread_files(name, folder, files):
    """Say what else is in a folder of data, but for its hidden files."""
    if files and (others := sorted(file.name for file in {*folder.iterdir()} - {*files} if not file.name.startswith("."))):
        log("data", f"{name}: {short_list(others)} {'is' if len(others) == 1 else 'are'} not read")

def text_columns():
    return [TEXT_COLUMN, TEXT_PAIR_COLUMN] if TEXT_PAIR_COLUMN else [TEXT_COLUMN]

def iter_batches(rows, *columns):
    """These columns in parts of 10,000 rows, {name: values}: of a million texts no more is in memory at once."""
    return rows.select_columns([*columns]).with_format(None).iter(10_000)

def column_array(rows, name, kind=None):
    """One column of numbers or keys as an array."""
    found = [np.asarray(part[name], kind) for part in iter_batches(rows, name)]
    return np.concatenate(found) if found else np.array([], kind)

def read_file(path, columns, known_labels=frozenset()):
    """These columns of one file as a Dataset of texts, just as they stand in the file; its rows stay on disk.

    UTF-8 with or without BOM, UTF-16 with one, or CP932 (Japanese Excel). Where it is not certain what the rows and
    fields of a file are, a Problem names the line. known_labels: label names of the teacher, by which a row is told from
    a line of a text.
    """
    kind = path.suffix.lower()
    with as_problem(f"{path}: cannot be read", f"Accepted are {', '.join(LABELED_KINDS)} (for UNLABELED also .txt), with rows, "
                 "in UTF-8 or CP932"):
        if kind == ".parquet":
            if pyarrow.parquet.read_metadata(path).num_rows == 0:
                raise ValueError("it has no rows")
            return datasets.load_dataset("parquet", data_files=glob.escape(str(path)), split="train", cache_dir=str(scratch_folder()))
        if kind not in FILE_READERS:
            raise ValueError(f"its kind, {kind!r}, is not known")
        try:
            return write_rows(FILE_READERS[kind](path, "utf-8-sig", columns, known_labels), columns)
        except UnicodeDecodeError:
            encoding = other_encoding(path)
            log("data", f"{path} is not UTF-8: it is read as {encoding.upper()}")
            return write_rows(FILE_READERS[kind](path, encoding, columns, known_labels), columns)

def write_rows(rows, columns):
    """Rows, a tuple each with a text or None for each of the columns, as a Dataset in a file of its own."""
    path = scratch_folder() / f"rows-{time.monotonic_ns()}.arrow"
    schema = pyarrow.schema([(name, pyarrow.string()) for name in columns])
    count = 0
    with pyarrow.OSFile(str(path), "wb") as file, pyarrow.ipc.new_stream(file, schema) as stream:
        while part := list(itertools.islice(rows, 1000)):
            arrays = [string_array([row[place] for row in part]) for place in range(len(columns))]
            stream.write_batch(pyarrow.record_batch(arrays, schema=schema))
            count += len(part)
    if count == 0:
        raise ValueError("it has no rows")
    return datasets.Dataset.from_file(str(path))

def string_array(values):
    try:
        return pyarrow.array(values, pyarrow.string())
    except UnicodeEncodeError:
        return pyarrow.array([value if value and is_encodable(value) else None for value in values], pyarrow.string())

def other_encoding(path):
    """The encoding of a text file that is not UTF-8. One that may be in either of two is refused, never guessed."""
    content = path.read_bytes()
    if content.startswith((b"\xff\xfe", b"\xfe\xff")):
        return "utf-16"

    # Of UTF-8 with a few damaged characters most characters are whole; of CP932, read as UTF-8, hardly any is.
    as_utf8 = content.decode("utf-8", "replace")
    damaged = as_utf8.count("\ufffd")
    ascii_characters = sum(len(run) for run in re.findall("[\0-\x7f]+", as_utf8))
    if len(as_utf8) - ascii_characters - damaged > damaged:
        line = as_utf8.count("\n", 0, as_utf8.index("\ufffd")) + 1
        raise ValueError(f"it is UTF-8, but line {line} holds bytes that are no character. Correct this line")

    if content.count(b"\0") > len(content) / 10:
        raise ValueError("it is not UTF-8; it may be UTF-16 without its mark (BOM). Save it as UTF-8")

    # Much of EUC-JP can be read as CP932, as other characters; hardly any CP932 can be read as EUC-JP.
    for encoding in "euc_jp", "euc_jis_2004":
        with contextlib.suppress(UnicodeDecodeError):
            content.decode(encoding)
            raise ValueError("it is not UTF-8, and it may be EUC-JP. Save it as UTF-8")
    try:
        content.decode("cp932")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise ValueError(f"it is neither UTF-8 nor CP932: line {line} holds bytes that are no character") from None
    return "cp932"

def refuse_jis(file):
    """JIS (ISO-2022-JP) is made of ASCII bytes and would pass for UTF-8: raise a ValueError."""
    if os.fstat(file.fileno()).st_size:
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
            if content.find(b"\x1b$") >= 0 or content.find(b"\x1b(") >= 0:
                raise ValueError("it is JIS (ISO-2022-JP). Save it as UTF-8")

def csv_rows(path, encoding, columns, known_labels):
    """The rows of a .csv or .tsv file, as the csv module reads them in its strict form.

    A row that has not as many fields as the header is refused. So is a quotation mark that seems to open a text by
    mistake: it would take all rows up to the next such mark into its own text.
    """
    separator = "\t" if path.suffix.lower() == ".tsv" else ","
    character = "tab" if separator == "\t" else "comma"
    advice = f'A text with a {character}, a line break or a " in it must stand in quotes, and a " in it be written twice'
    csv.field_size_limit(sys.maxsize)
    labels, spanning = set(), []  # labels that were seen; rows over several lines: (first line, what they hold)
    with open(path, encoding=encoding, newline="") as file:
        refuse_jis(file)
        reader = csv.reader(file, delimiter=separator, strict=True)
        try:
            header = next(reader, None)
            if header is None:
                raise ValueError("it has no rows")
            places = column_places(path, header, columns)
            has_labels = columns[-1] == LABEL_COLUMN
            line = reader.line_num  # the last line of the row before
            for fields in reader:
                first_line, line = line + 1, reader.line_num
                if not fields:  # an empty line
                    continue
                if fields == header:
                    raise Problem(f"{path}, line {first_line}: the header once more. Remove it.")
                if len(fields) != len(header):
                    raise Problem(f"{path}, line {first_line}: {len(fields)} fields, but the header has {len(header)}. {advice}.")
                if line > first_line:
                    spanning.append((first_line, separator.join(fields)))
                row = [fields[place] for place in places]
                if has_labels:
                    labels.add(row[-1])
                yield row
        except csv.Error:
            raise Problem(f"{path}, line {line + 1}: a quote opens here that does not close at the end of a field. {advice}.") from None

    # Of a row over several lines one line, its first or its last, looks like a row by itself. Where more do, and where it
    # is not just a comma in a text, for they have labels, too, they are rows.
    def is_row(text):
        fields = text.split(separator)
        if len(fields) != len(header) or len(header) == 1:
            return False
        return separator == "\t" or has_labels and (fields[places[-1]].strip() in labels or len(labels) < 2)

    labels |= known_labels
    for first_line, content in spanning:
        if sum(is_row(text) for text in re.split("[\r\n]+", content)) > 1:
            raise Problem(f"{path}, line {first_line}: a quote opens here and takes the rows below into its text. {advice}; if this "
                          "text does go over these lines, save the file as .jsonl.")
    if spanning:
        log("data", f"{path}: {len(spanning):,} rows go over several lines, in quotes; the first from line {spanning[0][0]}")

def column_places(path, header, columns):
    """Where these columns stand among those of a file; a Problem if one is not there, or there twice."""
    for name in columns:
        if header.count(name) > 1:
            raise Problem(f"{path} has more than one column {name!r}. Rename or remove all but one.")
    refuse_missing_columns(path, columns, header)
    return [header.index(name) for name in columns]

def refuse_missing_columns(where, columns, found):
    if missing := [name for name in columns if name not in found]:
        names = ", ".join(name if name and name == name.strip() else repr(name) for name in map(str, found))
        names = names if len(names) <= 300 else f"{names[:300]}…"
        hint = "Set TEXT_COLUMN, TEXT_PAIR_COLUMN and LABEL_COLUMN"
        if len(found) == 1 and re.search("[,;\t]", str(*found)):
            hint = "The fields of a .csv are separated by commas, those of a .tsv by tabs"
        raise Problem(f"{where} has no column {', '.join(missing)}; its columns are {names}. {hint}.")

def json_rows(path, encoding, columns, known_labels):
    """The rows of a .json or .jsonl file: a list of objects, or an object a line."""
    with open(path, encoding=encoding) as file:
        refuse_jis(file)
        first = next((line.strip() for line in file if line.strip()), "")
        file.seek(0)
        place, objects = ("row", enumerate(json.load(file), 1)) if first.startswith("[") else ("line", json_lines(path, file))
        missing, names = set(columns), ()
        for number, row in objects:
            if not isinstance(row, dict):
                fields = ", ".join(f'"{name}": …' for name in columns)
                raise Problem(f"{path}, {place} {number}: no object. Accepted is one such as {{{fields}}}.")
            if missing:
                missing, names = missing - row.keys(), names or row.keys()
            values = [row.get(name) for name in columns]
            for value in values:
                if type(value) is not str:
                    values = [text_value(path, f"{place} {number}", row, name) for name in columns]
                    break
            yield values
        if names:
            refuse_missing_columns(path, [name for name in columns if name in missing], names)

def json_lines(path, file):
    """(line, value) of each line that is not empty."""
    decode = json.JSONDecoder().raw_decode
    for number, line in enumerate(file, 1):
        line = line.strip(" \t\r\n")
        if line:
            try:
                value, end = decode(line)
            except json.JSONDecodeError as error:
                raise Problem(f"{path}, line {number}: not a whole JSON object ({error.msg}). Accepted are an object a line, or a "
                              "list of objects.") from None
            if end < len(line):
                raise Problem(f"{path}, line {number}: more than one JSON object. Write each on a line of its own.")
            yield number, value

def text_value(path, place, row, name):
    """The text in a field of a JSON object, or its label written out; None if there is neither."""
    value = row.get(name)
    if isinstance(value, (dict, list)):
        raise Problem(f"{path}, {place}: many values in {name}, where one is accepted. Write an object for each row; with pandas: "
                      "to_json(path, orient='records', lines=True).")
    if isinstance(value, str) or value is None:
        return value
    return label_text(value) if name == LABEL_COLUMN else None

def text_rows(path, encoding, columns, known_labels):
    """The rows of a .txt file: a text a line."""
    refuse_missing_columns(path, columns[1:], ["its lines"])
    with open(path, encoding=encoding) as file:
        refuse_jis(file)
        for line in file:
            yield [line.rstrip("\n")]

FILE_READERS = {".csv": csv_rows, ".tsv": csv_rows, ".json": json_rows, ".jsonl": json_rows, ".txt": text_rows}

def validate_rows(rows, split, lookup, names):
    """The texts of one split and `labels`, the teacher's numbers; a Problem that counts all faulty rows."""
    labels, found = [], {f"{column} empty or not a text": [] for column in text_columns()}
    for part in iter_batches(rows, *text_columns(), LABEL_COLUMN):
        row = len(labels)
        for name in text_columns():
            faulty = [row + n for n, value in enumerate(part[name], 1) if not is_text(value)]
            found[f"{name} empty or not a text"] += faulty
        for n, label in enumerate(part[LABEL_COLUMN], 1):
            written = label if isinstance(label, str) else label_text(label)
            number = lookup.get(written)
            if number is None:
                unknown = f"label {written[:60]!r}, which the teacher does not have ({short_list(names)}),"
                found.setdefault(unknown if written else "no label", []).append(row + n)
            labels.append(NO_LABEL if number is None else number)
    if faults := [f"{split}: {what} in {len(at)} rows: {', '.join(map(str, at[:5]))}{', …' * (len(at) > 5)}"
                  for what, at in found.items() if at]:
        hint = "DATA is still the sample; set it to your teacher's data." if DATA == "tests/sample" else \
            "correct or remove these rows, counted from 1; labels are the teacher's names or numbers."
        raise Problem("\n  ".join([f"DATA = {DATA!r}: {hint}", *faults[:9]]))
    return rows.select_columns(text_columns()).add_column("labels", np.array(labels))

def short_list(names):
    """Names in a row; of many, the first few."""
    return ", ".join(names[:10]) + (", …" if len(names) > 10 else "")

# ── Data: labels, names or numbers ────────────────────────────────────────────────────────────────────

def new_label_names(splits):
    """The label names of a teacher still to be made, in the order of its outputs."""
    given = getattr(next(iter(splits.values())).features[LABEL_COLUMN], "names", None)
    found = {without_trailing_zero(label_text(label)) for rows in splits.values() for label in rows.unique(LABEL_COLUMN)} - {""}
    names = given or sorted(found)
    if not 2 <= len(names) <= 1000:
        raise Problem(f"LABEL_COLUMN = {LABEL_COLUMN!r}: {len(names)} different labels; 2 to 1000 are accepted.")
    alike = defaultdict(list)
    for name in names:
        alike[unicodedata.normalize("NFKC", name).casefold().strip()].append(name)
    for spellings in alike.values():
        if len(spellings) > 1:
            raise Problem(f"LABEL_COLUMN = {LABEL_COLUMN!r}: {' and '.join(map(repr, spellings))} look like one label. Write them alike.")
    if not given and found == {str(number) for number in range(len(found))}:
        return [f"LABEL_{number}" for number in range(len(found))]
    if not given and all(re.fullmatch(r"-?\d+(\.\d+)?", label) for label in found):
        names = sorted(found, key=float)
    return names

def read_labels(splits, names):
    """What the labels of all splits mean: {split: {label as written: number of the teacher's output, None if unknown}}.

    They are all names of the teacher's labels or else all numbers of its outputs; a mixture is refused. The class
    labels of a data set have a number of its own and a name: the name counts first, here too.
    """
    as_name, as_number = {}, {}  # (split, label as written) → output, by the one reading and the other
    own_names = {}  # (split, label as written) → the name that a data set gives to the number of its class label
    by_name, by_number = label_lookup(names), label_lookup([str(number) for number in range(len(names))])
    for split, rows in splits.items():
        own = getattr(rows.features[LABEL_COLUMN], "names", None)
        for label in rows.unique(LABEL_COLUMN):
            written = label_text(label)
            if written == "":
                continue
            name = own[label] if own and 0 <= label < len(own) else written
            if name != written:
                own_names[split, written] = name
            as_name[split, written] = by_name(name)
            as_number[split, written] = by_number(written)

    if None not in as_name.values():
        meant = as_name
        if None not in as_number.values() and as_number != as_name:
            log("note", f"the labels of the data are taken as the teacher's names ({short_list(names)}), not as the numbers of "
                "its outputs")
    elif None not in as_number.values():
        meant = as_number
        refuse_other_class_labels(own_names, as_number, names)
    else:
        meant = {key: as_number[key] if number is None else number for key, number in as_name.items()}
        if None not in meant.values():
            name = next(key for key in as_name if as_number[key] is None)
            number = next(key for key in as_name if as_name[key] is None)
            raise Problem(f"LABEL_COLUMN = {LABEL_COLUMN!r}: {name[1]!r} in {name[0]} is a name of the teacher's labels "
                          f"({short_list(names)}), {number[1]!r} in {number[0]} can only be a number of its outputs. Write all "
                          "as names, or all as numbers from 0.")
    lookup = {split: {} for split in splits}
    for (split, written), number in meant.items():
        lookup[split][written] = number
    return lookup

def refuse_other_class_labels(own_names, as_number, names):
    """Where the numbers of class labels are taken as those of the teacher's outputs: a Problem if their names object."""
    known = {name.casefold(): number for number, name in enumerate(names)}
    pairs = {}
    for (split, written), name in own_names.items():
        number = as_number[split, written]
        if known.get(name.casefold(), number) != number or pairs.setdefault(name, number) != number:
            raise Problem(f"DATA = {DATA!r}: the class label {written} of {split} is named {name!r}, but the teacher's output {number} "
                          f"{names[number]!r}, and not all of the labels are names of the teacher's ({short_list(names)}). Name or number "
                          "them as the teacher does, in all splits alike.")
    if pairs:
        log("note", "the class labels of the data have other names than the teacher's and are taken by their numbers: "
            + short_list([f"{name} is {names[number]}" for name, number in sorted(pairs.items(), key=lambda pair: pair[1])]))

def label_lookup(names):
    """A function: a label as it is written → its place in `names`, None if it is not there.

    It is looked up just as it is written; then by its value: 1 and 1.0 are one number, and 1 is True where the names are
    True and False.
    """
    exact = {name: number for number, name in enumerate(names)}
    by_value = {without_trailing_zero(name): number for number, name in enumerate(names)}
    truth = {name.casefold(): number for number, name in enumerate(names)}
    if truth.keys() == {"true", "false"}:
        by_value |= {"1": truth["true"], "0": truth["false"]}
    return lambda label: exact.get(label, by_value.get(without_trailing_zero(label)))

def label_text(label):
    """A label as text, "" if there is none."""
    return "" if label is None or label != label else str(label)

def without_trailing_zero(label):
    """A whole number without the .0 that pandas gives it where another is missing; any other text as it is."""
    return re.sub(r"^(-?\d+)\.0+$", r"\1", label)

# ── Data: token ids and batches ───────────────────────────────────────────────────────────────────────

def tokenize(data, tokenizer, student_tokenizer=None):
    """Texts → input_ids (, token_type_ids), length, and key, a name for these ids. Nothing is padded here.

    A student with a tokenizer of its own finds its ids beside them, in columns that begin with student_.
    """
    def add(batch, columns, tokenizers, max_length):  # takes all that it needs: it may run in another process
        made, *others = (encode([batch[column] for column in columns], one, max_length) for one in tokenizers)
        keys = {"key": [digest(*row) for row in zip(*(made[name] for name in made if name.endswith("ids")))]}
        return made | keys | {f"student_{name}": values for other in others for name, values in other.items()}

    tokenizers = [tokenizer] + [student_tokenizer] * (student_tokenizer not in (None, tokenizer))
    given = dict(columns=text_columns(), tokenizers=tokenizers, max_length=MAX_LENGTH)
    for split, rows in data.items():
        helpers = min(len(rows) // TEXTS_PER_PROCESS, os.cpu_count() // world_size()) or None
        data[split] = map_to_cache(rows, add, remove_columns=text_columns(), num_proc=helpers, fn_kwargs=given)
    lengths, cut = (np.concatenate([column_array(rows, name) for rows in data.values()]) for name in ("length", "cut"))
    log("data", f"{lengths.mean():.1f} tokens per text, at most {lengths.max()}; {cut.sum():,} of {len(cut):,} texts "
        f"cut to MAX_LENGTH = {MAX_LENGTH}")
    unknown = {split: column_array(rows, "unknown").sum() / column_array(rows, "length").sum() for split, rows in data.items()}
    if shares := [f"{share:.1%} of {split}" for split, share in unknown.items() if share > UNKNOWN_SHARE]:
        log("note", f"the vocabulary does not know many tokens ([UNK]): {', '.join(shares)}. Are these texts of the teacher's "
            "language, and is the tokenizer, with its dictionary, the one that the teacher was trained with?")
    log("data", "the first: " + " ".join(tokenizer.convert_ids_to_tokens(data["train"][0]["input_ids"][:30])))
    keys = {split: column_array(data[split], "key", "S24") for split in SPLITS}
    for one, other in ("val", "train"), ("test", "train"), ("test", "val"):
        if shared := np.isin(keys[one], keys[other]).sum():
            log("data", f"{shared:,} of {len(data[one]):,} texts of {one} also stand in {other}: {one} is flattered")
    return data

def encode(texts, tokenizer, max_length):
    """The tokenizer's ids for `texts`, a list per text column; nothing is padded.

    A text may also be a list of its words, with the white space before them, None for a masked one.
    Returns lists: input_ids (, token_type_ids, for pairs), length, unknown, how many of the tokens are [UNK], and cut,
    whether max_length cut the text.
    """
    pairs = len(texts) > 1 and getattr(tokenizer, "takes_types", True)
    options = dict(return_attention_mask=False, return_token_type_ids=pairs)
    if splits_words(tokenizer):
        rows = list(zip(*(map(make_encoder(tokenizer), column) for column in texts)))
        numbers = [[-1 - column] for column in range(len(texts))]  # stand for the texts among the special tokens
        frame = tokenizer.build_inputs_with_special_tokens(*numbers)
        part = lambda row, place: row[-1 - place] if place < 0 else [place]
        columns = {"input_ids": [[one for place in frame for one in part(row, place)] for row in rows]}
        if pairs:
            columns["token_type_ids"] = [tokenizer.create_token_type_ids_from_sequences(*row) for row in rows]
        again = tokenizer.prepare_for_model
    else:
        join = lambda text: text if isinstance(text, str) else "".join(word or tokenizer.mask_token for word in text)
        rows = list(zip(*(map(join, column) for column in texts)))
        columns, again = dict(tokenizer(*map(list, zip(*rows)), verbose=False, **options)), tokenizer
    long = [len(ids) > max_length for ids in columns["input_ids"]]
    for row in itertools.compress(range(len(long)), long):
        for name, value in again(*rows[row], truncation=True, max_length=max_length, **options).items():
            columns[name][row] = value
    cut = [one or any(len(text) > MAX_CHARACTERS for text in row) for one, row in zip(long, zip(*texts))]
    unknown = [ids.count(tokenizer.unk_token_id) for ids in columns["input_ids"]]
    return {**columns, "length": list(map(len, columns["input_ids"])), "unknown": unknown, "cut": cut}

@functools.lru_cache(2)
def make_encoder(tokenizer):
    """A function: text → its token ids, without special tokens, exactly as this BertJapaneseTokenizer gives them.

    The stock tokenizer cuts a word into pieces, in Python, each time it meets it. A word is always cut the same way,
    so once is enough; what is left is mostly MeCab's time. Texts that spell out a special token go the stock way.
    """
    special = re.compile("|".join(map(re.escape, tokenizer.get_added_vocab())))
    never_split, words = tokenizer.all_special_tokens, tokenizer.word_tokenizer.tokenize
    split_word = tokenizer.subword_tokenizer.tokenize if tokenizer.do_subword_tokenize else lambda word: [word]

    @functools.lru_cache(1 << 18)
    def pieces(word):
        return (tokenizer.mask_token_id,) if word is None else tuple(tokenizer.convert_tokens_to_ids(split_word(word.strip())))

    def ids(text):
        if isinstance(text, str) and special.search(text):
            return tokenizer.convert_tokens_to_ids(tokenizer.tokenize(limit_characters(text)))
        already_cut = text if isinstance(text, list) else words(limit_characters(text), never_split=never_split)
        return [piece for word in already_cut for piece in pieces(word)]

    return ids

def splits_words(tokenizer):
    return isinstance(tokenizer, BertJapaneseTokenizer) and tokenizer.do_word_tokenize

def limit_characters(text):
    """The text or, if it is very long, as much of it as MeCab takes: at some 100,000 characters it crashes."""
    text = text[:MAX_CHARACTERS]
    while len(text) > 1000 and len(unicodedata.normalize("NFKC", text)) > MAX_CHARACTERS:  # which can make 18 characters of 1
        text = text[:len(text) // 2]
    return text

def map_to_cache(rows, function, **options):
    """Dataset.map into a file of its own in CACHE: it never takes an older result, and writes nothing beside DATA."""
    seen = len(rows) >= TEXTS_PER_PROCESS and sys.stderr.isatty() and rank() == 0  # what takes longer is shown
    (datasets.enable_progress_bars if seen else datasets.disable_progress_bars)()
    name = f"rows-{time.monotonic_ns()}"
    path = str(scratch_folder() / f"{name}.arrow")
    return rows.map(function, batched=True, desc="texts", new_fingerprint=name, cache_file_name=path, **options)

def scratch_folder():
    """The folder for what only this run of this process needs; it is emptied when a run begins and ends."""
    folder = Path(CACHE, "distill_tmp", str(rank()))
    folder.mkdir(parents=True, exist_ok=True)
    return folder

def collate(rows, pad_token_id=0):
    """Rows of tokenize() → tensors, padded to the longest of these rows."""
    lengths = np.array([len(row["input_ids"]) for row in rows])
    mask = np.arange(lengths.max()) < lengths[:, None]

    def padded(name, value):
        table = np.full(mask.shape, value)
        table[mask] = list(itertools.chain.from_iterable(row[name] for row in rows))
        return torch.from_numpy(table)

    batch = {"input_ids": padded("input_ids", pad_token_id), "attention_mask": torch.from_numpy(mask).long()}
    if "token_type_ids" in rows[0]:
        batch["token_type_ids"] = padded("token_type_ids", 0)
    return batch | {name: torch.stack([torch.as_tensor(row[name]) for row in rows])
                    for name in TARGET_KEYS if name in rows[0]}

def inputs_of(batch):
    return {name: tensor for name, tensor in batch.items() if name not in TARGET_KEYS}

def inference_loader(rows, collate_fn, tokens=None, take=list):
    """The rows in batches for inference; `take` chooses among the batches."""
    batches = list(token_budget_batches(column_array(rows, "length"), tokens or TOKENS_PER_BATCH))
    return DataLoader(rows, batch_sampler=take(batches), collate_fn=collate_fn)

def token_budget_batches(lengths, tokens):
    """Row numbers in batches: every row once, like lengths together, at most `tokens` in a batch, padding included."""
    order, start = np.argsort(-np.asarray(lengths), kind="stable"), 0
    while start < len(order):
        size = max(1, tokens // lengths[order[start]])
        yield order[start:start + size]
        start += size

def length_grouped_order(lengths, batch_size, seed):
    """Row numbers for one epoch of training: batches of like length, in random order, the smaller last one last."""
    generator = np.random.default_rng(seed)
    order, pool = generator.permutation(len(lengths)), POOL * batch_size
    pools = [order[start:start + pool] for start in range(0, len(order), pool)]
    order = np.concatenate([rows[np.argsort(lengths[rows], kind="stable")] for rows in pools])
    full = len(order) // batch_size * batch_size
    batches = generator.permutation(order[:full].reshape(-1, batch_size))
    return np.concatenate([batches.ravel(), order[full:]])

def classify(model, tokenizer, texts, tokens=None):
    """Text to logits, (texts, classes), in the order of `texts`, a list per text column."""
    return classify_encoded(model, tokenizer, encode(texts, tokenizer, tokenizer.model_max_length), tokens)

def classify_encoded(model, tokenizer, columns, tokens=None):
    """What encode() gives to logits, (texts, classes), in its order."""
    rows = [dict(zip(columns, row)) for row in zip(*columns.values())]
    batches = [batch.tolist() for batch in token_budget_batches(columns["length"], tokens or TOKENS_PER_BATCH)]
    collated = (collate([rows[row] for row in batch], tokenizer.pad_token_id) for batch in batches)
    logits = torch.cat([logits for _, logits, _ in timed_logits(model, collated)])
    return torch.empty_like(logits).index_copy_(0, torch.tensor([row for batch in batches for row in batch]), logits)

# ── Speed: the same results in less time ──────────────────────────────────────────────────────────────

class BertForSequenceClassification(transformers.BertForSequenceClassification):
    """transformers' class: the same parameters, structure, answers and gradients, but a last layer for one token.

    Of the last layer the classifier reads one place, [CLS]. So the query, the attention's output and the feed-forward
    are computed there only; and keys and values nowhere, for matrix products are associative (h: a head, x: the
    layer's input, 0: [CLS]):

        score    (W_q x_0 + b_q) · (W_k x_j + b_k) = (W_kᵀ q) · x_j + something equal for all j, which softmax drops
        context  Σ_j p_j (W_v x_j + b_v) = W_v (Σ_j p_j x_j) + b_v Σ_j p_j    (with dropout Σ_j p_j is not 1)

    Where more is asked for than logits and the loss, the stock forward runs.
    """

    def __init__(self, config):
        super().__init__(config)
        for module in self.modules():
            module.__class__ = FAST_MODULES.get(type(module), type(module))

    def forward(self, input_ids=None, attention_mask=None, token_type_ids=None, position_ids=None, inputs_embeds=None,
                labels=None, **more):
        """Arguments and result of transformers' forward. logits: (batch, classes)."""
        config, bert = self.config, self.bert
        if (more or position_ids is not None or (input_ids is None) == (inputs_embeds is None) or config.is_decoder
                or config.output_hidden_states or config.output_attentions or not config.return_dict
                or attention_mask is not None and attention_mask.dim() != 2
                or labels is not None and config.problem_type != "single_label_classification"):
            return super().forward(input_ids, attention_mask, token_type_ids, position_ids, inputs_embeds, labels,
                                   **more)
        x, mask = embed(bert.embeddings, input_ids, token_type_ids, inputs_embeds), None
        if attention_mask is not None and (torch.compiler.is_exporting() or not attention_mask.all()):
            mask = (1 - attention_mask[:, None].to(x.dtype)) * torch.finfo(x.dtype).min  # (batch, 1, length)
        for layer in bert.encoder.layer[:-1]:
            x = layer(x, None if mask is None else mask[:, None])

        layer, first = bert.encoder.layer[-1], x[:, 0]
        attention = layer.attention.self
        heads, size = attention.num_attention_heads, attention.attention_head_size
        by_head = lambda linear: linear.weight.view(heads, size, -1)
        query = attention.query(first).view(-1, heads, size).transpose(0, 1) * size**-0.5
        score = torch.bmm(query, by_head(attention.key)).transpose(0, 1)  # W_kᵀ q: (batch, heads, hidden)
        keep = attention.dropout(x.new_ones(*score.shape[:2], x.shape[1])) if self.training else None
        total, mean = ClsAttention.apply(x, score, mask, keep)
        value = torch.bmm(by_head(attention.value), mean.permute(1, 2, 0)).permute(2, 0, 1)
        value = value + attention.value.bias.view(heads, size) * total
        x = layer.feed_forward_chunk(layer.attention.output(value.flatten(1), first))
        logits = self.classifier(self.dropout(bert.pooler(x[:, None])))
        loss = None if labels is None else F.cross_entropy(logits, labels.view(-1))
        return SequenceClassifierOutput(loss=loss, logits=logits)

def embed(embeddings, input_ids, token_type_ids, inputs_embeds):
    """BertEmbeddings in fewer passes over the memory: (batch, length, hidden)."""
    length = (input_ids if inputs_embeds is None else inputs_embeds).shape[1]
    place = embeddings.position_embeddings.weight[:length] + (
        embeddings.token_type_embeddings.weight[0] if token_type_ids is None
        else embeddings.token_type_embeddings(token_type_ids))
    x = embeddings.word_embeddings(input_ids).add_(place) if inputs_embeds is None else inputs_embeds + place
    return embeddings.dropout(embeddings.LayerNorm(x))

class FastDropout(torch.nn.Dropout):
    """The same distribution, drawn faster: stock, random numbers would take a fifth of a training step or more.

    Not each unit's fate is drawn but the gaps between those that fall out: geometric, and 1/p times fewer.
    """

    def _get_name(self):
        return "Dropout"  # printed like the stock class

    def forward(self, x):
        if not self.training or self.p == 0:
            return x
        many = x.numel() * self.p
        gaps = torch.rand(int(many + 10 * many**0.5 + 10), device=x.device)  # ten standard deviations above the mean
        gaps = (gaps.neg_().log1p_() / math.log1p(-self.p)).long() + 1
        dropped = gaps.cumsum(0) - 1
        dropped = dropped[:torch.searchsorted(dropped, x.numel())]
        return (x.flatten().index_fill(0, dropped, 0) / (1 - self.p)).view_as(x)

class FastLinear(torch.nn.Linear):
    """The same sum, as W xᵀ instead of x Wᵀ where x has few rows: a third less time, with MKL."""

    def _get_name(self):
        return "Linear"

    def forward(self, x):
        if x.dim() != 2 or torch.compiler.is_exporting() or len(x) > 64:
            return super().forward(x)
        return torch.addmm(self.bias[:, None], self.weight, x.t()).t().contiguous()

FAST_MODULES = {torch.nn.Dropout: FastDropout, torch.nn.Linear: FastLinear}

class ClsAttention(torch.autograd.Function):
    """x (b, l, h), score (b, heads, h), mask, keep → Σ_j p_j (b, heads, 1), Σ_j p_j x_j (b, heads, h).

    p = softmax(score xᵀ + mask) · keep. The gradient is written by hand so that x's, the one large tensor, is made by
    a single product instead of two and a sum.
    """

    @staticmethod
    def forward(context, x, score, mask, keep):
        weight = torch.bmm(score, x.transpose(1, 2))
        weight = (weight if mask is None else weight + mask).softmax(-1)
        p = weight if keep is None else weight * keep
        context.save_for_backward(x, score, weight, p, keep)
        return p.sum(-1, keepdim=True), torch.bmm(p, x)

    @staticmethod
    def backward(context, grad_total, grad_mean):
        x, score, weight, p, keep = context.saved_tensors
        grad = torch.bmm(grad_mean, x.transpose(1, 2)) + grad_total
        grad = weight * (grad if keep is None else grad * keep)
        grad -= weight * grad.sum(-1, keepdim=True)
        grad_x = torch.bmm(torch.cat([grad, p], 1).transpose(1, 2), torch.cat([score, grad_mean], 1))
        return grad_x, torch.bmm(grad, x), None, None

@contextlib.contextmanager
def only_used_rows(model, *splits):
    """Inside, the model's word embeddings hold only the rows of the tokens in `splits`; at the end all are put back.

    Of a vocabulary of 32768 a training text uses a few thousand, and AdamW's pass over all would take much of a step.
    The result is that of the plain run: the other rows have no gradient, so that AdamW would only decay them, all by
    the same factor; a last row of ones, which nothing looks up, tells at the end which.
    """
    whole = model.get_input_embeddings()
    used = torch.zeros(whole.num_embeddings, dtype=torch.bool)
    used[[] if whole.padding_idx is None else whole.padding_idx] = True
    for rows in splits:
        for batch in rows.select_columns("input_ids").with_format("numpy").iter(10_000):
            used[np.concatenate(batch["input_ids"])] = True
    place = used.cumsum(0) - 1  # of an id among the rows in use
    rows = torch.cat([whole.weight[used], torch.ones_like(whole.weight[:1])]).detach()
    padding_idx = None if whole.padding_idx is None else place[whole.padding_idx].item()
    small = torch.nn.Embedding(*rows.shape, padding_idx, _weight=rows)
    small.register_forward_pre_hook(lambda module, ids: place[ids[0]])
    model.set_input_embeddings(small)
    try:
        yield
    finally:
        with torch.no_grad():
            whole.weight *= small.weight[-1]
            whole.weight[used] = small.weight[:-1]
        model.set_input_embeddings(whole)

def clip_gradients(model, norm):
    """Shorten the gradient, over all parameters, to at most `norm`: clip_grad_norm_, but with a faster norm."""
    grads = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
    found = sum(torch.dot(grad.flatten(), grad.flatten()) for grad in grads).sqrt()
    if found > norm:
        torch._foreach_mul_(grads, norm / found)

# ── Student: word vectors refitted ────────────────────────────────────────────────────────────────────

@torch.inference_mode()
def refit_words(student, teacher, tokenizer, rows, collate_fn):
    """Make each of the student's word vectors what REFIT_WORDS of the teacher's layers make of the word in context.

    One layer sees words as they stand; the teacher's middle one, which it starts from, was used to words that the layers
    below had read in their sentences. So each word gets the vector from which the embeddings' LayerNorm makes the mean
    of the states that the word has in `rows` and by itself (in the manner of Bommasani et al. 2020,
    https://aclanthology.org/2020.acl-main.431). It is an ordinary embedding, and goes on learning.
    """
    depth = min(REFIT_WORDS, teacher.config.num_hidden_layers)
    path = Path(CACHE, f"words-{digest(teacher, depth, iter_batches(rows, 'key'))}.pt")

    def words():
        if (known := load_checked(path)) is None:
            log("teacher", f"its first {depth} layers read the training texts once more, for the student's word vectors")
            known = words_in_context(teacher, depth, tokenizer, rows, collate_fn)
            save_checked(path, known)
        return known

    student.get_input_embeddings().weight.copy_(on_main_process(words))

def words_in_context(teacher, depth, tokenizer, rows, collate_fn):
    """The word vectors for refit_words, (vocabulary, hidden)."""
    few = copy_with_layers(teacher, type(teacher), range(depth), teacher.state_dict()).bert.eval()
    embeddings, norm = few.embeddings, few.embeddings.LayerNorm
    plain = embeddings.word_embeddings.weight
    states, places, counts = torch.zeros_like(plain), torch.zeros_like(plain), torch.zeros(len(plain), 1)
    ordinary = sorted({*range(len(plain))} & {*tokenizer.get_vocab().values()} - {*tokenizer.all_special_ids})
    frame = tokenizer("")["input_ids"]  # [CLS], [SEP]
    single = [[*frame[:1], number, *frame[1:]] for number in ordinary]
    single = datasets.Dataset.from_dict({"input_ids": single, "length": list(map(len, single))})
    loaders = [inference_loader(part, collate_fn) for part in (rows, single)]
    for batch in progress_bar(itertools.chain(*loaders), total=sum(map(len, loaders)), desc="words"):
        ids, there = batch["input_ids"], batch["attention_mask"].bool()
        state = few(**inputs_of(batch)).last_hidden_state
        state = (state - norm.bias) * norm.weight / (norm.weight**2 + 1e-4)  # the LayerNorm undone, without 1/0
        types = embeddings.token_type_embeddings(batch.get("token_type_ids", torch.zeros_like(ids)))
        place = embeddings.position_embeddings.weight[:ids.shape[1]] + types
        for total, one in (states, state), (places, place), (counts, torch.ones(*ids.shape, 1)):
            total.index_add_(0, ids[there], one[there])
    places /= counts.clamp(min=1)
    size = (plain + places).std(-1, correction=0, keepdim=True)  # LayerNorm leaves it open: as it was
    return torch.where(counts > 0, F.layer_norm(states, states.shape[-1:], eps=0) * size - places, plain)

# ── Option: a teacher that is still to be made ────────────────────────────────────────────────────────

def find_teacher():
    """(name, recipe): the teacher's folder or hub name; how to make it if it is not there yet, else None."""
    if os.path.exists(TEACHER):
        if TEACHER_BASE is not None:
            log("note", f"{TEACHER} is there and is used as it is; delete it to have it made anew from {TEACHER_BASE}")
        return TEACHER, None
    if TEACHER_BASE is not None:
        log("teacher", f"no {TEACHER} yet: {TEACHER_BASE} is fine-tuned into it")
        return TEACHER, (TEACHER_BASE, TEACHER_EPOCHS, TEACHER_LEARNING_RATE, PATIENCE)
    if (TEACHER, DATA) == (SAMPLE_TEACHER, "tests/sample") and "TEACHER" not in COMMAND_LINE_SETTINGS:  # nobody has named a teacher
        name = os.path.join(CACHE, "sample_teacher")  # never TEACHER: it must not be mistaken for the user's
        made = load_checked(f"{name}.sum") == file_digest(f"{name}/model.safetensors")
        log("teacher", f"no {TEACHER} here, and DATA is the sample: a small sample teacher stands in"
            + (" (made before)" if made else ", and is trained first (about a minute)"))
        return name, None if made else (str(Path(__file__).resolve().parent / DATA / "base"), 6, 1e-3, 6)
    return TEACHER, None  # a hub name, or missing: load_config will tell

def make_teacher(name, recipe, config, tokenizer, label2id, data, collate_fn):
    """Fine-tune the base model on the hard labels, with the loop of the student, and save it as `name`."""
    base, *how = recipe
    config.label2id, config.id2label = label2id, {number: label for label, number in label2id.items()}
    transformers.set_seed(SEED)
    is_sample = DATA == "tests/sample" and TEACHER_BASE is None  # its base is a configuration without weights
    model = classifier_class(config)(config) if is_sample else load_model(base, "TEACHER_BASE", config)
    checkpoint = Path(CACHE, "teacher_checkpoint.pt")
    train(make_trainer(model, data, collate_fn, *how), checkpoint, use_what_is_there=False)

    def save():
        save_folder(name, model, tokenizer)
        if is_sample:
            save_checked(f"{name}.sum", file_digest(f"{name}/model.safetensors"))
        checkpoint.unlink()

    on_main_process(save)

# ── Option: more text for the teacher to label ────────────────────────────────────────────────────────

def load_extra_texts(rows, tokenizer):
    """{"unlabeled": …, "copies": …}, as far as the settings ask for them; `rows` are the training texts."""
    more = {}
    if UNLABELED:
        path = Path(UNLABELED)
        kinds = *LABELED_KINDS, ".txt"
        files = [path] if path.is_file() else sorted(path.iterdir()) if path.is_dir() else []
        files = [file for file in files if file.suffix.lower() in kinds and not file.name.startswith(".")]  # a Mac's ._ files
        if not files:
            raise Problem(f"UNLABELED = {UNLABELED!r}: no such file or folder, or one without texts. Accepted are "
                          f"{', '.join(kinds)}; .txt has a text a line.")
        if path.is_dir():
            report_unread_files(UNLABELED, path, files)
        found = [read_file(file, text_columns()) for file in files]
        for file, part in zip(files, found):
            refuse_missing_columns(file, text_columns(), part.column_names)
        strings = datasets.Features(dict.fromkeys(text_columns(), datasets.Value("string")))
        found = datasets.concatenate_datasets([one.select_columns(text_columns()).cast(strings) for one in found])
        whole = [number for number, row in enumerate(found) if all(map(is_text, row.values()))]
        if len(whole) < len(found):
            log("data", f"{UNLABELED}: {len(found) - len(whole):,} of {len(found):,} rows hold no text and are left out")
        if not whole:
            raise Problem(f"UNLABELED = {UNLABELED!r}: holds no text, only empty lines. Add some, or set None.")
        found = found.select(whole)
        more["unlabeled"] = found.add_column("labels", [NO_LABEL] * len(found))
    if AUGMENT:
        more["copies"] = map_to_cache(rows, augment, with_indices=True, remove_columns=rows.column_names,
                                  fn_kwargs=dict(words=make_word_splitter(tokenizer)))
        if GENERATOR:
            more["copies"] = fill_masks(more["copies"])
    return more

def make_word_splitter(tokenizer):
    """A function: text → its words; with the white space before them unless the tokenizer itself cuts words."""
    if splits_words(tokenizer):
        return lambda text: tokenizer.word_tokenizer.tokenize(limit_characters(text))
    mecab = MecabTokenizer(mecab_dic="unidic_lite")

    def words(text):
        text, end, found = unicodedata.normalize("NFKC", limit_characters(text)), 0, []
        for word in mecab.tokenize(text):
            start, end = end, text.index(word, end) + len(word)
            found.append(text[start:end])
        return found

    return words

def augment(batch, numbers, words):
    """AUGMENT copies of each text, as lists of words, None where masked; without labels, as they may not hold any more.

    Each word is masked with probability AUGMENT_MASK; then, with AUGMENT_NGRAM, only 2 to 10 neighbouring words are
    kept (Tang et al. 2019, arXiv:1903.12136). A text is cut into words once, and its random numbers are its own.
    """
    made = {column: [] for column in text_columns()}
    for row, number in enumerate(numbers):
        draw = np.random.default_rng([SEED, number])
        for column in made:
            whole = words(batch[column][row])
            for _ in range(AUGMENT):
                copy = [None if masked else word for word, masked in zip(whole, draw.random(len(whole)) < AUGMENT_MASK)]
                if draw.random() < AUGMENT_NGRAM:
                    length = draw.integers(2, 10, endpoint=True)
                    start = draw.integers(max(len(copy) - length, 0), endpoint=True)
                    copy = copy[start:start + length]
                made[column].append(copy)
    return made | {"labels": [NO_LABEL] * (AUGMENT * len(numbers))}

def fill_masks(rows):
    """The masked words of copies drawn from what GENERATOR, a masked-language model, finds likely there."""
    model, tokenizer = load_generator()

    @torch.inference_mode()
    def fill(batch, numbers):
        draw = torch.Generator().manual_seed(SEED + numbers[0])
        for column in text_columns():
            ids = encode([batch[column]], tokenizer, MAX_LENGTH)["input_ids"]
            inputs = collate([{"input_ids": one} for one in ids], tokenizer.pad_token_id)
            masked = inputs["input_ids"] == tokenizer.mask_token_id
            if not masked.any():
                continue
            scores = word_scores(model, inputs, masked, tokenizer.mask_token_id).softmax(-1)
            scores[:, tokenizer.all_special_ids] = 0
            drawn = torch.multinomial(scores, 1, generator=draw).flatten().split(masked.sum(1).tolist())
            for text, ids in zip(batch[column], drawn):
                places = [place for place, word in enumerate(text) if word is None]
                for place, word in zip(places, tokenizer.convert_ids_to_tokens(ids)):
                    text[place] = word.removeprefix("##")
        return batch

    return map_to_cache(rows, fill, batch_size=BATCH_SIZE, with_indices=True)

def merge_extra_texts(data):
    """Put the texts without hard labels behind those of train, each text once and none that has a label."""
    known = np.concatenate([column_array(data[split], "key", "S24") for split in SPLITS])
    for name in "unlabeled", "copies":
        if name in data:
            rows = data.pop(name)
            different, first = np.unique(column_array(rows, "key", "S24"), return_index=True)
            new = np.sort(first[~np.isin(different, known)])
            known = np.concatenate([known, different])
            log("data", f"train: {len(data['train']):,} + {len(new):,} {name}, which only the teacher labels "
                f"({len(rows) - len(new):,} equal to others left out)")
            rows = rows.select(new).cast(data["train"].features)
            data["train"] = datasets.concatenate_datasets([data["train"], rows])
    return data

# ── Option: other students ────────────────────────────────────────────────────────────────────────────

def load_student_init(teacher_config):
    """The small pretrained model in STUDENT_INIT, made a classifier of the teacher's labels (the way of ERNIE-Tiny)."""
    config = load_config(STUDENT_INIT, "STUDENT_INIT")
    if config.model_type != teacher_config.model_type:
        raise Problem(f"STUDENT_INIT = {STUDENT_INIT!r}: is of the family {config.model_type!r}, the teacher of "
                      f"{teacher_config.model_type!r}. Name a model of the teacher's family.")
    config.label2id, config.id2label = teacher_config.label2id, teacher_config.id2label
    return load_model(STUDENT_INIT, "STUDENT_INIT", config)

def load_student_tokenizer(tokenizer, data):
    """The tokenizer of the student: the teacher's, the one beside STUDENT_INIT, or the Bi-LSTM's words of the data."""
    if STUDENT == "bilstm" and BILSTM_WORDS == "own":
        return make_word_tokenizer(data)
    if STUDENT == "bilstm" or STUDENT_INIT in ("teacher", "random"):
        return tokenizer
    own = load_tokenizer(STUDENT_INIT, load_config(STUDENT_INIT, "STUDENT_INIT"), "student")
    if type(own) is type(tokenizer) and own.get_vocab() == tokenizer.get_vocab():
        return tokenizer
    if METHOD in METHOD_TERMS:
        raise Problem(f"STUDENT_INIT = {STUDENT_INIT!r}: its tokens are not the teacher's, as METHOD = {METHOD!r} needs.")
    return own

def use_student_ids(rows):
    """The rows with the ids of the student's own tokenizer in place of the teacher's."""
    own = {name: name.removeprefix("student_") for name in rows.column_names if name.startswith("student_")}
    return rows.remove_columns(list({*own.values()} & {*rows.column_names})).rename_columns(own)

def make_word_tokenizer(data):
    """A BertJapaneseTokenizer whose tokens are MeCab's words, those that occur more than once in the training text.

    The others become [UNK], whose vector is thus trained.
    """
    mecab = MecabTokenizer(mecab_dic="unidic_lite")
    counts = Counter(word for split in ("train", "unlabeled") for column in text_columns()
                     for text in (data[split][column] if split in data else ()) for word in mecab.tokenize(limit_characters(text)))
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *sorted(word for word in counts if counts[word] > 1)]
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "vocab.txt").write_text("\n".join(dict.fromkeys(words)), "utf-8")
        tokenizer = BertJapaneseTokenizer(
            os.path.join(folder, "vocab.txt"), do_subword_tokenize=False, word_tokenizer_type="mecab",
            mecab_kwargs={"mecab_dic": "unidic_lite"}, model_max_length=MAX_LENGTH)
    log("student", f"its vocabulary: {len(tokenizer):,} words of {len(counts):,} in the training text")
    return tokenizer

class BiLSTM(transformers.PreTrainedModel):
    """An LSTM in each direction over the words of a text, then a tanh layer and a classifier (arXiv:1903.12136)."""

    config_class = transformers.PreTrainedConfig

    def __init__(self, config):
        super().__init__(config)
        self.embedding = torch.nn.Embedding(config.vocab_size, config.embedding_size, padding_idx=config.pad_token_id)
        self.lstm = torch.nn.LSTM(config.embedding_size, config.hidden_size, batch_first=True, bidirectional=True)
        self.dense = torch.nn.Linear(2 * config.hidden_size, config.hidden_size)
        self.classifier = torch.nn.Linear(config.hidden_size, config.num_labels)
        self.dropout = torch.nn.Dropout(config.dropout)
        self.post_init()

    def _init_weights(self, module):  # torch's own are used, but for
        if isinstance(module, torch.nn.Embedding):
            torch.nn.init.normal_(module.weight, std=0.1)

    def get_input_embeddings(self):
        return self.embedding

    def set_input_embeddings(self, value):
        self.embedding = value

    def forward(self, input_ids, attention_mask=None, token_type_ids=None, labels=None):
        """input_ids, attention_mask: (batch, length), padded at the end → logits (batch, classes). No token types."""
        x = self.dropout(self.embedding(input_ids)).transpose(0, 1)
        length, rows = x.shape[0], torch.arange(x.shape[1], device=x.device)
        last = torch.full_like(rows, length - 1) if attention_mask is None else attention_mask.sum(1) - 1
        backwards = (last - torch.arange(length, device=x.device)[:, None]).clamp(min=0)  # padding stays behind
        states = [self.lstm_states(one, direction)[last, rows]
                  for one, direction in ((x, ""), (x[backwards, rows], "_reverse"))]
        hidden = self.dense(self.dropout(torch.cat(states, -1))).tanh()
        logits = self.classifier(self.dropout(hidden))
        loss = None if labels is None else F.cross_entropy(logits, labels)
        return SequenceClassifierOutput(loss=loss, logits=logits)

    def lstm_states(self, x, direction):
        """(length, batch, embedding) → (length, batch, hidden), with the weights that self.lstm has for a direction.

        In a training step of 32 texts, one direction of padded texts at a time is 1.7 times as fast as self.lstm over
        packed ones (x86). An exported graph gets a loop: torch.export would write torch.lstm out, step by step, for one
        length.
        """
        names = "weight_ih_l0", "weight_hh_l0", "bias_ih_l0", "bias_hh_l0"
        w_x, w_h, b_x, b_h = weights = [getattr(self.lstm, name + direction) for name in names]
        zero = x.new_zeros(1, x.shape[1], self.config.hidden_size)
        if not torch.compiler.is_exporting():
            return torch.lstm(x, (zero, zero), weights, True, 1, 0.0, self.training, False, False)[0]

        from torch._higher_order_ops.scan import scan

        def step(state, gates):
            into, forget, new, out = (gates + F.linear(state[0], w_h)).chunk(4, -1)
            cell = forget.sigmoid() * state[1] + into.sigmoid() * new.tanh()
            hidden = out.sigmoid() * cell.tanh()
            return (hidden, cell), hidden.clone()

        return scan(step, (zero[0], zero[0].clone()), F.linear(x, w_x, b_x + b_h))[1]

def build_bilstm(teacher, tokenizer, teacher_tokenizer):
    """A BiLSTM for the teacher's labels. STUDENT_INIT = "teacher": its word vectors are the main components of the
    teacher's, those of a word's pieces averaged.
    """
    config = transformers.PreTrainedConfig(
        vocab_size=len(tokenizer), embedding_size=BILSTM_EMBEDDING, hidden_size=BILSTM_HIDDEN, dropout=0.2,
        pad_token_id=tokenizer.pad_token_id, id2label=teacher.config.id2label, label2id=teacher.config.label2id)
    transformers.set_seed(SEED)
    student = BiLSTM(config)
    if STUDENT_INIT == "teacher":
        pieces = [[number] for number in range(len(tokenizer))]
        if tokenizer is not teacher_tokenizer:
            pieces = [teacher_tokenizer(word, add_special_tokens=False)["input_ids"] or [teacher_tokenizer.unk_token_id]
                      for word in tokenizer.convert_ids_to_tokens(range(len(tokenizer)))]
        vectors = torch.stack([teacher.get_input_embeddings().weight[ids].mean(0) for ids in pieces])
        vectors -= vectors.mean(0)
        vectors = (vectors @ torch.linalg.eigh(vectors.T @ vectors)[1].flip(1))[:, :BILSTM_EMBEDDING]
        with torch.no_grad():
            student.embedding.weight[:, :vectors.shape[1]] = vectors * (0.1 / vectors.std())
    return student

STUDENTS = {  # STUDENT → a function: teacher, the student's and the teacher's tokenizer → student
    "bert": lambda teacher, *tokenizers: build_student(teacher),
    "bilstm": build_bilstm,
}

# ── Option: other methods ─────────────────────────────────────────────────────────────────────────────

METHOD_TERMS = {  # METHOD → its terms, in the order of its weights; ′ marks those of the rewritten sentences
    "rail": ("CE", "KL", "RAIL"),
    "mate": ("CE", "KL", "KL′"),
    "cilda": ("CE", "KL", "CE′", "KL′"),
    "cilda+minild": ("CE", "KL", "CRD", "CE′", "KL′", "CRD′"),
}

def rail_loss(teacher, student):
    """Mean distance of the normalized vectors of each text; both are (batch, PROJECTION) (arXiv:2109.10164)."""
    return (F.normalize(teacher) - F.normalize(student)).norm(dim=-1).mean()

def contrastive_loss(teacher, student):
    """CRD: how hard it is to tell by the cosine which of the batch's student vectors belongs to a teacher's vector.

    Both are (batch, PROJECTION). For "cilda+minild" the loss is divided by its value where nothing can be told, log
    of the batch size (arXiv:2204.07674; 言語処理学会 2023 Q3-2).
    """
    cosines = F.normalize(teacher) @ F.normalize(student).T
    loss = F.cross_entropy(cosines / CRD_TEMPERATURE, torch.arange(len(cosines)))
    return loss / math.log(max(len(cosines), 2)) if METHOD == "cilda+minild" else loss

def forward_with_layers(model, inputs, words=None, pool=None):
    """(logits, layers) of a batch or, with `words` (which places, what stands there), of the batch so rewritten.

    What stands there: ids, (places,), or rows over the vocabulary, (places, words), through which gradients flow.
    layers: pool(states), (batch, width), of each encoder layer, (batch, layers, width); None without `pool`.
    """
    given = inputs_of(inputs) | ({"output_hidden_states": True} if pool else {})
    if words:
        places, drawn = words
        ids, embedding = given.pop("input_ids"), model.get_input_embeddings()
        if drawn.dim() == 1:
            embeds = embedding(ids.masked_scatter(places, drawn))
        else:
            embeds = embedding(ids).clone()
            embeds[places] = drawn @ embedding.weight[:drawn.shape[1]] * getattr(embedding, "embed_scale", 1)
        given["inputs_embeds"] = embeds
        if model.config.model_type == "bart":  # takes no inputs_embeds, but what it would make of them
            start, mask = torch.full_like(ids[:, :1], model.config.decoder_start_token_id), given["attention_mask"]
            encoded = model.model.encoder(inputs_embeds=given.pop("inputs_embeds"), attention_mask=mask,
                                          output_hidden_states=True)
            given |= {"input_ids": ids, "encoder_outputs": encoded,
                      "decoder_inputs_embeds": torch.cat([embedding(start), embeds[:, :-1]], 1)}
    outputs = model(**given)
    states = pool and (outputs.get("encoder_hidden_states") or outputs.get("hidden_states"))[1:]
    return outputs.logits, pool and torch.stack([pool(one) for one in states], 1)

class MethodTrainer(CustomTrainer):
    """Its loss is the weighted sum of METHOD_TERMS[METHOD]; in evaluation of CE and KL, which need nothing but the text.

    CE: cross-entropy; KL: KL divergence from the teacher's distribution to the student's, T = 1. For KL′ a generator, a masked
    language model, rewrites masked words: every STUDENT_STEPS it learns for GENERATOR_STEPS where the student errs.
    """

    def prepare(self, teacher, tokenizer):
        """To be called once, before training."""
        self.teacher, self.mask_token_id = teacher, tokenizer.mask_token_id
        rows = self.train_dataset
        self.train_dataset = rows.select(np.argsort(column_array(rows, "length")))  # less padding where they are taken in order
        self.lengths = column_array(self.train_dataset, "length")
        self.special = torch.tensor(sorted({*tokenizer.all_special_ids} - {tokenizer.unk_token_id}))
        self.weights = {"rail": RAIL_WEIGHTS, "mate": MATE_WEIGHTS, "cilda": CILDA_WEIGHTS,
                        "cilda+minild": MINILD_WEIGHTS}[METHOD]
        self.depth = getattr(teacher.config, "encoder_layers", teacher.config.num_hidden_layers)
        self.many = min(NUM_LAYERS, self.depth) if METHOD == "rail" else self.depth  # of the teacher's layers
        transformers.set_seed(SEED)
        self.projections = torch.nn.ModuleList(
            torch.nn.Linear(depth * model.config.hidden_size, PROJECTION, bias=False)
            for depth, model in ((self.many, teacher), (NUM_LAYERS, self.model)))
        self.beside = {"projections": self.projections}
        if "KL′" in METHOD_TERMS[METHOD]:
            if self.mask_token_id is None:
                raise Problem(f"METHOD = {METHOD!r}: the teacher's tokenizer has no mask token.")
            self.vocabulary = max(tokenizer.get_vocab().values()) + 1  # a model may have more rows
            self.generator = make_generator(self) if GENERATOR is None else load_generator(tokenizer)[0]
            self.adversary = torch.nn.ModuleList([self.generator, self.projections])
            self.adversary_optimizer = torch.optim.AdamW(self.adversary.parameters(), GENERATOR_LEARNING_RATE, fused=True)
            self.beside = {"adversary": self.adversary, "adversary_optimizer": self.adversary_optimizer}
        if METHOD in ("rail", "cilda+minild"):  # on the texts themselves the teacher's layers never change
            self.train_dataset = self.with_teacher_layers(self.train_dataset)

    def create_optimizer(self, *given):
        optimizer = super().create_optimizer(*given)
        if METHOD in ("rail", "cilda+minild"):
            optimizer.add_param_group({"params": [*self.projections.parameters()], "weight_decay": WEIGHT_DECAY})
        return optimizer

    def with_teacher_layers(self, rows):
        """The rows with the column teacher_layers, (layers, width) a text, which stays on disk, in CACHE."""
        path = Path(CACHE, f"layers-{digest(self.teacher, METHOD, iter_batches(rows, 'key'))}.arrow")
        part = str(scratch_folder() / path.name)
        if load_checked(f"{path}.sum") != file_digest(path):
            log("teacher", f"one more pass, for METHOD = {METHOD!r}: its layers")

            @torch.inference_mode()
            def layers(batch):
                inputs = self.data_collator([dict(zip(batch, row)) for row in zip(*batch.values())])
                return {"teacher_layers": forward_with_layers(self.teacher, inputs, pool=self.pool(inputs))[1].numpy()}

            columns = [name for name in ("input_ids", "token_type_ids") if name in rows.column_names]
            rows.select_columns(columns).map(layers, batched=True, batch_size=64, remove_columns=columns,
                                             new_fingerprint=path.stem, cache_file_name=part)
            os.replace(part, path)
            save_checked(f"{path}.sum", file_digest(path))
        both = datasets.concatenate_datasets([rows.flatten_indices(), datasets.Dataset.from_file(str(path))], axis=1)
        return both.with_format("numpy", ["teacher_layers"], output_all_columns=True)

    def ordinary(self, inputs):
        """(batch, length): where there is neither padding nor a special token."""
        return inputs["attention_mask"].bool() & ~torch.isin(inputs["input_ids"], self.special)

    def pool(self, inputs):
        """A function: a layer's states, (batch, length, width) → (batch, width): the mean, or the state of [CLS]."""
        if METHOD != "rail":
            return lambda states: states[:, 0]
        counts = self.ordinary(inputs)
        counts[:, 0] |= ~counts.any(1)  # a text of special tokens alone
        share = counts / counts.sum(1, keepdim=True)
        return lambda states: torch.einsum("bl,blw->bw", share, states)

    def random_batch(self):
        """A batch of training texts, of like length as all are."""
        numbers = length_grouped_order(self.lengths, BATCH_SIZE, int(torch.randint(2**31, [])))[:BATCH_SIZE].tolist()
        return self.data_collator([self.train_dataset[number] for number in numbers])

    def mask(self, inputs):
        """(batch, length): the places to rewrite, each ordinary token with probability MASK_RATE."""
        places = self.ordinary(inputs)
        places[places.clone()] = torch.rand(int(places.sum())) < MASK_RATE
        return places

    def rewrite(self, inputs, flow=False):
        """(places, words): what the generator draws there. With `flow`, a straight-through Gumbel-softmax, as rows."""
        places = self.mask(inputs)
        scores = word_scores(self.generator, inputs, places, self.mask_token_id)[:, :self.vocabulary]
        scores[:, self.special] = -math.inf
        if flow:
            return places, F.gumbel_softmax(scores, hard=True)
        up_to = scores.softmax(-1).cumsum(-1)  # the same distribution, with one random number for a place
        drawn = torch.rand(len(up_to), 1) * up_to[:, -1:] * (1 - 1e-6)  # never rounded up to the last sum, past all words
        return places, torch.searchsorted(up_to, drawn, right=True).flatten()

    def losses(self, inputs, layers, words=None):
        """({"CE", "KL" and, with `layers`, "RAIL" or "CRD": loss}, logits) of a batch, rewritten if there are `words`."""
        pool = self.pool(inputs) if layers else None
        logits, student = forward_with_layers(self.model, inputs, words, pool)
        soft_labels, teacher = inputs["soft_labels"], inputs.get("teacher_layers")
        if words:
            teacher_logits, teacher = forward_with_layers(self.teacher, inputs, words, pool)
            soft_labels = F.softmax(teacher_logits, -1)
        cross_entropy = F.cross_entropy(logits, inputs["labels"], ignore_index=NO_LABEL, reduction="sum") / len(logits)
        found = {"CE": cross_entropy,
                 "KL": F.kl_div(F.log_softmax(logits, -1), soft_labels, reduction="batchmean")}
        if layers:
            if METHOD == "rail":  # other layers in each epoch
                draw = np.random.default_rng([SEED, int(self.state.epoch)])
                teacher = teacher[:, np.sort(draw.choice(self.depth, self.many, replace=False))]
            vectors = [project(one.flatten(1)) for project, one in zip(self.projections, (teacher, student))]
            found |= {"RAIL": rail_loss(*vectors)} if METHOD == "rail" else {"CRD": contrastive_loss(*vectors)}
        return found, logits

    def generator_step(self, inputs):
        """One step of the generator, and of the projections, to where the student errs; returns its KL′ before it."""
        found, _ = self.losses(inputs, METHOD != "mate", self.rewrite(inputs, flow=True))
        aim = found["KL"] if METHOD == "mate" else \
            GENERATOR_WEIGHTS[0] * found["KL"] + GENERATOR_WEIGHTS[1] * found["CRD"]
        parameters = [*self.adversary.parameters()]
        for parameter, grad in zip(parameters, torch.autograd.grad(-aim, parameters, allow_unused=True)):
            parameter.grad = grad
        clip_gradients(self.adversary, GENERATOR_MAX_GRAD_NORM)
        self.adversary_optimizer.step()
        self.adversary.zero_grad()
        return found["KL"].item()

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        terms = METHOD_TERMS[METHOD]
        if model.training and self.generator and self.state.global_step % STUDENT_STEPS == 0:
            for _ in range(GENERATOR_STEPS):
                self.generator_step(self.random_batch())
        found, logits = self.losses(inputs, model.training and ("CRD" in terms or "RAIL" in terms))
        if model.training and self.generator:
            with torch.no_grad():
                words = self.rewrite(inputs)
            rewritten, _ = self.losses(inputs, "CRD′" in terms, words)
            found |= {f"{name}′": loss for name, loss in rewritten.items()}
        loss = sum(weight * found[term] for term, weight in zip(terms, self.weights) if term in found)
        return (loss, SequenceClassifierOutput(logits=logits)) if return_outputs else loss

def word_scores(generator, inputs, places, mask_token_id):
    """What a masked-language model finds likely at `places`, (places, vocabulary); the last product runs there alone."""
    masked = inputs_of(inputs) | {"input_ids": inputs["input_ids"].masked_fill(places, mask_token_id)}
    if not takes_types(generator.config):
        masked.pop("token_type_ids", None)
    only_there = lambda module, given: given[0][places]
    with generator.get_output_embeddings().register_forward_pre_hook(only_there):
        return generator(**masked).logits

MLM_STEPS = 100  # in which a generator that is made here learns to fill in words

def make_generator(trainer):
    """A masked-language model of the teacher's embeddings and lowest two layers, which learns from the training texts.

    Without that its head, which starts random, would put random words: 100 steps brought its loss on the masked words
    of 400 of JCM's test texts from 11.9 to 5.0. It is kept in CACHE.
    """
    config = trainer.teacher.config
    generator = copy_with_layers(trainer.teacher, transformers.MODEL_FOR_MASKED_LM_MAPPING[type(config)],
                    range(min(2, trainer.depth)), trainer.teacher.state_dict())
    key = digest(trainer.teacher, SEED, BATCH_SIZE, MASK_RATE, MAX_GRAD_NORM, iter_batches(trainer.train_dataset, "key"))
    path = Path(CACHE, f"generator-{key}.pt")
    if (state := load_checked(path)) is None:
        log("generator", "no GENERATOR is set: one is made of the teacher's embeddings and lowest layers")
        optimizer = torch.optim.AdamW(generator.train().parameters(), 5e-4, fused=True)
        for _ in progress_bar(range(MLM_STEPS), desc="generator"):
            batch = trainer.random_batch()
            places = trainer.mask(batch)
            scores = word_scores(generator, batch, places, trainer.mask_token_id)
            loss = F.cross_entropy(scores, batch["input_ids"][places], reduction="sum") / max(1, len(scores))
            loss.backward()
            clip_gradients(generator, MAX_GRAD_NORM)
            optimizer.step()
            optimizer.zero_grad()
        save_checked(path, state := generator.state_dict())
    generator.load_state_dict(state)
    return generator.eval()

def load_generator(teacher_tokenizer=None):
    """(model, tokenizer): the masked-language model in GENERATOR; with the teacher's vocabulary if that is given."""
    config = load_config(GENERATOR, "GENERATOR")
    tokenizer = load_tokenizer(GENERATOR, config, "GENERATOR")
    if teacher_tokenizer and tokenizer.get_vocab() != teacher_tokenizer.get_vocab():
        raise Problem(f"GENERATOR = {GENERATOR!r}: has {len(tokenizer):,} tokens, which are not the teacher's "
                      f"{len(teacher_tokenizer):,}. For METHOD = {METHOD!r} name a masked-language model of the "
                      "teacher's vocabulary, or None.")
    with as_problem(f"GENERATOR = {GENERATOR!r}: cannot be loaded", "Name a masked-language model"):
        model, info = transformers.AutoModelForMaskedLM.from_pretrained(
            GENERATOR, dtype=torch.float32, output_loading_info=True, trust_remote_code=False)
    kind = str((config.architectures or [""])[0])  # a classifier's head for words would be random or, for BART, forgotten
    if info["missing_keys"] or "Classification" in kind:
        raise Problem(f"GENERATOR = {GENERATOR!r}: is no masked-language model but a {kind or 'part of one'}.")
    return model.eval(), tokenizer

class HardLabelTrainer(CustomTrainer):
    """METHOD = "none": the loss is CE alone; the soft labels serve the report only."""

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        hard = {name: tensor for name, tensor in inputs.items() if name != "soft_labels"}
        return super().compute_loss(model, hard, return_outputs)

METHODS = {"none": HardLabelTrainer, "kd": CustomTrainer, **dict.fromkeys(METHOD_TERMS, MethodTrainer)}  # METHOD → trainer

# ── Option: the student as a graph for other programs ─────────────────────────────────────────────────

class ExportGraph(torch.nn.Module):
    """input_ids, attention_mask (, token_type_ids), each (batch, length) → logits (batch, classes)."""

    def __init__(self, student):
        super().__init__()
        self.student = student

    def forward(self, input_ids, attention_mask, token_type_ids=None):
        types = {} if token_type_ids is None else {"token_type_ids": token_type_ids}  # not all families take them
        return self.student(input_ids=input_ids, attention_mask=attention_mask, **types).logits

def export_graphs(graph, example, folder):
    """Export as EXPORT and QUANTIZE say, with free batch and length → {file name: a function: inputs → logits}."""
    free = {0: torch.export.Dim("batch"), 1: torch.export.Dim("length", max=MAX_LENGTH)}
    how = dict(kwargs=example, dynamic_shapes=dict.fromkeys(example, free))
    path = f"{folder}/student.{EXPORT}"
    if EXPORT == "pt2":
        torch.export.save(torch.export.export(graph, (), **how), path)
        program = torch.export.load(path).module()
        return {"student.pt2": lambda inputs: program(**inputs)}

    import onnx
    import onnxruntime
    from onnxruntime.quantization import quantize_dynamic
    torch.onnx.export(graph, (), **how, input_names=[*example], output_names=["logits"], verbose=False).save(path)
    if QUANTIZE:  # all but the two products with a weight cut by heads, for which ONNX Runtime has no 8-bit kernel
        quantize_dynamic(path, f"{folder}/student_int8.onnx", per_channel=True, extra_options={"EnableSubgraph": True},
                         nodes_to_exclude=[node.name for node in onnx.load(path).graph.node if "bmm" in node.name])
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()

    def load(name):
        session = onnxruntime.InferenceSession(f"{folder}/{name}", options, providers=["CPUExecutionProvider"])
        return lambda inputs: torch.from_numpy(session.run(None, {key: one.numpy() for key, one in inputs.items()})[0])

    return {name: load(name) for name in sorted(os.listdir(folder))}

@torch.no_grad()
def export(student, rows, collate_fn, report):
    """Add the exported student to OUTPUT and, to its report, {"eager" or file name: bytes, accuracy, difference, milliseconds}.

    Each file is loaded again and answers `rows`; none is kept unless the graph gives the student's logits, within 1e-4
    (8-bit weights do not: there the accuracy tells). Milliseconds are per batch of 1 and of 32 texts.
    """
    graph, labels, logits, figures = ExportGraph(student).eval(), torch.tensor(rows["labels"][:]), {}, {}
    with (new_folder() as folder, warnings.catch_warnings(action="ignore"),
          as_problem(f"EXPORT = {EXPORT!r}: failed, but the student is saved", "Choose another format, or None")):
        logging.disable(logging.WARNING)  # of torch.onnx, about packages that are not needed
        example = collate_fn([rows[number % len(rows)] for number in range(8)])
        runs = {"eager": lambda inputs: graph(**inputs)} | export_graphs(graph, inputs_of(example), folder)
        for size, few in (1, rows.select(range(min(len(rows), 40)))), (32, rows):
            for name, run in runs.items():  # one after the other: their threads would be in each other's way
                logits[name], seconds = [], []
                for batch in DataLoader(few, size, collate_fn=collate_fn):
                    start = time.perf_counter()
                    logits[name].append(run(inputs_of(batch)))
                    seconds.append(time.perf_counter() - start)
                times = np.percentile(seconds[1:] or seconds, [50, 95]) * 1000  # the first is a warm-up
                figures.setdefault(name, {})[f"milliseconds_{size}"] = dict(zip(("median", "p95"), times))
        for name, one in figures.items():
            file = f"{OUTPUT}/model.safetensors" if name == "eager" else f"{folder}/{name}"
            answers = torch.cat(logits[name])
            one |= {"bytes": os.path.getsize(file), "accuracy": (answers.argmax(-1) == labels).double().mean().item(),
                    "difference": (answers - torch.cat(logits["eager"])).abs().max().item()}
            log("export", "{:<17}{bytes:11,} bytes, accuracy {accuracy:.4f}, logits within {difference:.0e}; "
                "1 text {milliseconds_1[median]:.2f} ms (p95 {milliseconds_1[p95]:.2f}), "
                "32 texts {milliseconds_32[median]:.2f} ms (p95 {milliseconds_32[p95]:.2f})".format(name, **one))
        if not figures[f"student.{EXPORT}"]["difference"] <= 1e-4:
            raise ValueError("its logits differ from the student's")
        report["export"], report["files"] = figures, sorted({*report["files"], *os.listdir(folder)})
        write_report(report, Path(OUTPUT))  # first, so that no file is ever there that the report does not name
        for name in os.listdir(folder):
            os.replace(f"{folder}/{name}", f"{OUTPUT}/{name}")

@contextlib.contextmanager
def new_folder():
    """A folder beside OUTPUT, on its disk, for what will be moved there; the next run clears it away if this one is killed."""
    folder = f"{os.path.realpath(OUTPUT)}.distill_new"
    os.mkdir(folder)
    try:
        yield folder
    finally:
        shutil.rmtree(folder)

# ── Option: from Python ───────────────────────────────────────────────────────────────────────────────

def load_student(folder):
    """A function predict(texts) → [{"label": name, "score": probability}, …], by the student saved in `folder`.

    texts: a list of texts, or of pairs of texts where the student was trained on pairs; answered in batches of like
    length, returned in their order. A Problem where there is no student or a text is no text.
    """
    model, tokenizer = load_saved(folder)
    return lambda texts: list(label_scores(model, tokenizer, encode_texts(tokenizer, texts)))

def load_saved(folder):
    """(model, tokenizer) of the student in `folder`."""
    folder = normalize_path(os.fspath(folder))
    with as_problem(f"{folder!r}: no student can be loaded from it", "Name the OUTPUT of a run"):
        forbid_outside_paths(folder)
        if json.loads(Path(folder, "config.json").read_text("utf-8"))["architectures"][0] == "BiLSTM":
            model = BiLSTM.from_pretrained(folder, dtype=torch.float32)
        else:
            config = load_config(folder, "OUTPUT")
            model = classifier_class(config).from_pretrained(folder, config=config, dtype=torch.float32)
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
        tokenizer.takes_types = takes_types(model.config)
        tokenizer.model_max_length = min(tokenizer.model_max_length, max_tokens(model.config))
    return model.eval(), tokenizer

def encode_texts(tokenizer, texts):
    """encode() for a text, a list of texts, or a list of pairs; a Problem where one is no text."""
    rows = [[row] if isinstance(row, str) else row for row in ([texts] if isinstance(texts, str) else texts)]
    if not all(isinstance(row, (tuple, list)) and len(row) == len(rows[0]) in (1, 2) for row in rows) or \
            not all(isinstance(one, str) and is_encodable(one) for row in rows for one in row):
        raise Problem("predict takes a list of texts, or of pairs of texts, without half characters (surrogates).")
    return encode(list(zip(*rows)), tokenizer, tokenizer.model_max_length) if rows else {"input_ids": []}

def label_scores(model, tokenizer, encoded):
    """{"label": name, "score": probability} for each of the texts."""
    if encoded["input_ids"]:
        for score, number in zip(*classify_encoded(model, tokenizer, encoded).softmax(-1).max(-1)):
            yield {"label": model.config.id2label[int(number)], "score": float(score)}

def unknown_words(tokenizer, text):
    """The words of a text (characters, if its tokenizer does not cut words) that are not in the vocabulary."""
    parts = tokenizer.word_tokenizer.tokenize(limit_characters(text)) if splits_words(tokenizer) else limit_characters(text)
    return [part for part in dict.fromkeys(parts) if tokenizer.unk_token in tokenizer.tokenize(part)]

def show_predictions(texts):
    """A label and its probability per line, for each of `texts` or, if there are none, each line of standard input."""
    model, tokenizer = load_saved(OUTPUT)
    if not texts and sys.stdin is None:
        raise Problem("--predict: there are no texts, and no standard input to read them from.")
    if not texts and isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(encoding="utf-8", errors="surrogateescape")
    many = 1 if not texts and sys.stdin.isatty() else 1000  # answer at once who types
    count, told = 0, set()
    for lines in [texts] if texts else iter(lambda: list(itertools.islice(sys.stdin, many)), []):
        lines = [line.rstrip("\n") for line in lines]
        whole = list(itertools.takewhile(is_encodable, lines))
        rows = [line.split("\t") if TEXT_PAIR_COLUMN else line for line in whole]
        encoded = encode_texts(tokenizer, rows)
        for row, answer, unknown in zip(rows, label_scores(model, tokenizer, encoded), encoded.get("unknown", ())):
            print(f"{answer['label']}\t{answer['score']:.4f}", flush=True)
            if unknown and len(told) < 100:
                new = set(unknown_words(tokenizer, " ".join(row) if TEXT_PAIR_COLUMN else row)) - told
                told |= new
                if new:
                    print(f"note      the student does not know {', '.join(sorted(new))}", file=sys.stderr, flush=True)
        count += len(whole)
        if len(whole) < len(lines):
            raise Problem(f"--predict: text {count + 1} is not UTF-8. Save the texts as UTF-8.")

DEFAULT_TERM = {"teacher": "logits", "student": "logits", "loss": "kl", "weight": 1.0, "temperature": 1.0}

CUSTOM_LOSSES = {  # name → a function: the student's tensor, the teacher's, temperature → a mean over the batch
    "kl": lambda student, teacher, t: F.kl_div(F.log_softmax(student / t, -1), F.softmax(teacher / t, -1),
                                               reduction="batchmean") * t**2,
    "mse": lambda student, teacher, t: F.mse_loss(student, teacher),
    "cosine": lambda student, teacher, t: 1 - F.cosine_similarity(student, teacher, dim=-1).mean(),
    "ce": lambda student, labels, t: F.cross_entropy(student, labels),
}

class CustomLossTrainer(CustomTrainer):
    """Its loss is the weighted sum of self.terms, over what call_student and call_teacher give."""

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        outputs = {"student": self.call_student(inputs_of(inputs))}
        with torch.no_grad():
            outputs["teacher"] = self.call_teacher(inputs_of(inputs)) | {"labels": inputs.get("labels")}
        loss = 0
        for term in self.terms:
            student, teacher = (outputs[role].get(term[role]) for role in ("student", "teacher"))
            shapes = [tuple(one.shape) if isinstance(one, torch.Tensor) else "no tensor" for one in (student, teacher)]
            if "no tensor" in shapes or len(set(shapes)) > 1 and term["loss"] in ("kl", "mse", "cosine"):
                raise Problem(f"losses: {term}: the student's is {shapes[0]}, the teacher's {shapes[1]}. Name outputs, or "
                              "modules of model.named_modules(), that fit each other, or give a function as loss.")
            function = CUSTOM_LOSSES.get(term["loss"], term["loss"])
            loss = loss + term["weight"] * function(student, teacher, term["temperature"])
        return (loss, SequenceClassifierOutput(logits=outputs["student"]["logits"])) if return_outputs else loss

@contextlib.contextmanager
def record_outputs(model, names):
    """Inside, a function: inputs → all that the model returns, and what its modules of these names give, by name."""
    seen, modules = {}, dict(model.named_modules())
    first = lambda output: output if isinstance(output, torch.Tensor) else output[0]
    keep = lambda name: lambda module, given, output: seen.update({name: first(output)})

    def call(inputs):
        output = model(**inputs)
        return seen | (dict(output) if isinstance(output, dict) else {"logits": first(output)})

    with contextlib.ExitStack() as stack:
        for name in names & modules.keys():
            stack.callback(modules[name].register_forward_hook(keep(name)).remove)
            if isinstance(model, BertForSequenceClassification):  # every part runs in the stock forward only
                stack.callback(setattr, model.config, "output_hidden_states", model.config.output_hidden_states)
                model.config.output_hidden_states = True
        yield call

def with_lengths(rows):
    """Rows, a Dataset or a list of dicts, as a Dataset with the column that batches are made by."""
    rows = datasets.Dataset.from_list(rows) if isinstance(rows, list) else rows
    lengths = [len(row) for row in rows["input_ids"]] if "input_ids" in rows.column_names else [1] * len(rows)
    return rows if "length" in rows.column_names else rows.add_column("length", lengths)

def distill(teacher, student, datasets, losses=({},), collate_fn=None):
    """Train a student of your own on a teacher of your own, by terms of your own; returns it as in its best epoch.

    teacher, student: modules that take the columns of the data, without labels, as named arguments and return logits:
    a tensor, a tuple that begins with them, or a dict (transformers' outputs are) that holds them.
    datasets: {"train": rows, "val": rows}, Datasets or lists of dicts: input_ids, labels if there are, and so on.
    collate_fn: rows → a dict of tensors; by default the rows are padded as this file pads its own.
    losses: a dict per term, of which only what differs from DEFAULT_TERM need be given: teacher and student, the name of an
    output or of a module ("labels" for the teacher: the hard labels); loss, one of CUSTOM_LOSSES or a function of the
    student's tensor, the teacher's and the temperature; weight; temperature. EPOCHS, PATIENCE, LEARNING_RATE and so
    on are the constants of this file. A Problem says what does not fit.
    """
    terms = [DEFAULT_TERM | term for term in losses]
    for term in terms:
        if term.keys() != DEFAULT_TERM.keys() or not callable(term["loss"]) and term["loss"] not in CUSTOM_LOSSES:
            raise Problem(f"losses: {term}: accepted are {', '.join(DEFAULT_TERM)}; as loss {', '.join(CUSTOM_LOSSES)} or a "
                          "function.")
    data = {split: with_lengths(rows) for split, rows in datasets.items()}
    normalize_paths()
    make_cache()
    trainer = make_trainer(student, data, collate_fn or collate, EPOCHS, LEARNING_RATE, PATIENCE, CustomLossTrainer)
    if world_size() > 1:
        raise Problem("distill runs in one process.")
    trainer.terms, names = terms, lambda role: {term[role] for term in terms}
    with (record_outputs(teacher.eval(), names("teacher")) as trainer.call_teacher,
          record_outputs(student, names("student")) as trainer.call_student):
        train(trainer, Path(CACHE, "distill.pt"), recipe=[teacher, *map(repr, terms)])
    return student.eval()

# ── Settings: checks and command line ─────────────────────────────────────────────────────────────────

def check_settings():
    """Find every fault of the settings, and outputs that cannot be written, before anything slow begins."""
    faults = [f"{name} = {globals()[name]!r}: must be {words}"
              for name, (accepts, words) in ACCEPTED.items() if not accepts(globals()[name])]
    if not faults:
        faults += folder_faults()
        names = [TEXT_COLUMN, LABEL_COLUMN] + [TEXT_PAIR_COLUMN] * (TEXT_PAIR_COLUMN is not None)
        if len(set(names)) < len(names):
            faults.append(f"TEXT_COLUMN = {TEXT_COLUMN!r}, TEXT_PAIR_COLUMN = {TEXT_PAIR_COLUMN!r}, LABEL_COLUMN = "
                          f"{LABEL_COLUMN!r}: must be different columns")
        if "labels" in (TEXT_COLUMN, TEXT_PAIR_COLUMN):
            faults.append("TEXT_COLUMN, TEXT_PAIR_COLUMN: must not be 'labels', which the script itself uses; rename this column")
        if STUDENT == "bilstm" and STUDENT_INIT not in ("teacher", "random"):
            faults.append(f'STUDENT_INIT = {STUDENT_INIT!r}: of a "bilstm" it must be "teacher" or "random"')
        if QUANTIZE and EXPORT != "onnx":
            faults.append(f'QUANTIZE = {QUANTIZE!r}: needs EXPORT = "onnx"')
        missing = [name for name in ("onnx", "onnxscript", "onnxruntime") if not importlib.util.find_spec(name)]
        if EXPORT == "onnx" and missing:
            faults.append(f"EXPORT = {EXPORT!r}: needs more packages: pip install {' '.join(missing)}")
        if GENERATOR and not AUGMENT and "KL′" not in METHOD_TERMS.get(METHOD, ()):
            faults.append(f'GENERATOR = {GENERATOR!r}: does nothing without AUGMENT or the METHOD "mate" or "cilda"')
        if METHOD in METHOD_TERMS and STUDENT != "bert":
            faults.append(f'METHOD = {METHOD!r}: needs STUDENT = "bert"')
        if METHOD == "none" and (UNLABELED or AUGMENT):
            faults.append(f"METHOD = {METHOD!r}: does without the teacher, who alone can label UNLABELED and AUGMENT")
        if METHOD != "kd" and LOGIT_LOSS != "kl":
            faults.append(f'LOGIT_LOSS = {LOGIT_LOSS!r}: needs METHOD = "kd"')
        if METHOD in METHOD_TERMS and world_size() > 1:
            faults.append(f'METHOD = {METHOD!r}: runs in one process; several accept "none" and "kd"')
    if faults:
        raise Problem("\n  ".join(["these settings must be put right:", *faults]))
    make_cache()

def folder_faults():
    """What is wrong with OUTPUT, CACHE, and TEACHER where it is still to be made, as folders to write to: a list."""
    output, faults = Path(os.path.realpath(OUTPUT)), []
    kept = {"TEACHER": TEACHER, "DATA": DATA, "CACHE": CACHE, "UNLABELED": UNLABELED, "the working folder": os.getcwd(),
            "distill.py": __file__}
    inside = [name for name, path in kept.items() if path and Path(os.path.realpath(path)).is_relative_to(output)]
    if inside:
        faults.append(f"OUTPUT = {OUTPUT!r}: would replace {', '.join(inside)}; it must not be or contain them. Name another")
    elif os.path.exists(output):
        faults += [f"OUTPUT = {OUTPUT!r}: {fault}" for fault in foreign_files(output)]
    written = {"OUTPUT": output.parent, "CACHE": Path(CACHE)}
    if TEACHER_BASE is not None and not os.path.exists(TEACHER):
        written["TEACHER"] = Path(os.path.realpath(TEACHER)).parent
    for name, folder in written.items():
        try:
            if globals()[name].startswith("~"):
                raise OSError(errno.ENOENT, "no user of this name")
            folder.mkdir(parents=True, exist_ok=True)
            tempfile.TemporaryFile(dir=folder).close()
            if name == "CACHE" and os.listdir(folder) and not {"CACHEDIR.TAG", "lock"} & set(os.listdir(folder)):
                faults.append(f"CACHE = {CACHE!r}: holds files that are not distill.py's, which it might overwrite; name another")
        except OSError as error:
            faults.append(f"{name} = {globals()[name]!r}: cannot be written ({error.strerror}); name another")
    return faults

OUTPUT_FILES = re.compile(r"model.*\.safetensors|model\.safetensors\.index\.json|student.*\.(pt2|onnx)|.*(token|vocab).*\.(json|txt|model)|"
                          r"(config|report)\.json|merges\.txt|.*\.model|README\.md|history\.csv|loss\.png")

def foreign_files(output):
    """Why OUTPUT, which is replaced as a whole, is left alone: a list of one text; empty if all in it is distill.py's."""
    try:
        names = {path.name for path in output.iterdir() if path.name != ".DS_Store" and not path.name.startswith("._")}
        report = json.loads((output / "report.json").read_text("utf-8")) if names else {"student": {}}
        if "student" not in report:
            raise LookupError
        written = set(report.get("files", filter(OUTPUT_FILES.fullmatch, names)))  # earlier versions did not name them
        foreign = sorted(name for name in names - written if not name.endswith(".distill_new"))
    except (OSError, ValueError, TypeError, LookupError, AttributeError):
        return ["was not written by distill.py and is not overwritten; name another"]
    return [f"holds {short_list(foreign)}, not written by distill.py, and is replaced as a whole; move this first, or name "
            "another"] if foreign else []

def make_cache():
    """Make the folder CACHE, with the mark by which backups leave it out (bford.info/cachedir) and distill.py knows it."""
    Path(CACHE).mkdir(parents=True, exist_ok=True)
    mark = Path(CACHE, "CACHEDIR.TAG")
    if not mark.exists():
        mark.write_text("Signature: 8a477f597d28d172789f06886806bc55\n# made by distill.py; can be deleted at any time\n", "utf-8")

class Problem(Exception):
    """Something the user can put right; the message says what is wrong, what is accepted and what to do."""

def is_text(value):
    """Is it a text: neither empty nor with half a character?"""
    return isinstance(value, str) and value.strip() != "" and is_encodable(value)

def is_encodable(value):
    """Whether UTF-8 can hold a text: it has no half character (a lone surrogate)."""
    return re.search("[\ud800-\udfff]", value) is None

def is_name(value):
    return is_text(value) and "\0" not in value

def in_range(low, high=sys.float_info.max, kinds=(int, float)):
    """A test: is a value a number of these kinds, low <= value <= high? NaN and infinity are not."""
    return lambda value: type(value) in kinds and low <= value <= high

def one_of(*values):
    return " or ".join(f'"{value}"' if value else "None" for value in values), values.__contains__

def loss_weights(count):  # with neither CE nor KL there would be no validation loss
    return f"{count} numbers from 0, the first or the second above 0", lambda value: (
        isinstance(value, (tuple, list)) and len(value) == count and all(map(in_range(0), value)) and any(value[:2]))

ACCEPTED = {name: (test, words) for names, words, test in [  # setting → its test, and what it accepts in words
    ("TEACHER DATA TEXT_COLUMN LABEL_COLUMN STUDENT_INIT OUTPUT CACHE REPORT_TO", "a text", is_name),
    ("TEACHER_BASE TOKENIZER TEXT_PAIR_COLUMN UNLABELED GENERATOR", "a text or None",
     lambda value: value is None or is_name(value)),
    ("TEACHER_EPOCHS EPOCHS PATIENCE BATCH_SIZE GENERATOR_STEPS STUDENT_STEPS", "a whole number from 1",
     in_range(1, kinds=[int])),
    ("NUM_LAYERS", "a whole number from 1 to 100", in_range(1, 100, [int])),
    ("BILSTM_EMBEDDING BILSTM_HIDDEN PROJECTION", "a whole number from 1 to 10000", in_range(1, 10_000, [int])),
    ("TEACHER_LEARNING_RATE LEARNING_RATE BILSTM_LEARNING_RATE TEMPERATURE MAX_GRAD_NORM CRD_TEMPERATURE "
     "GENERATOR_LEARNING_RATE GENERATOR_MAX_GRAD_NORM", "a number above 0", in_range(sys.float_info.min)),
    ("WARMUP_STEPS WEIGHT_DECAY", "a number from 0", in_range(0)),
    ("AUGMENT REFIT_WORDS", "a whole number from 0", in_range(0, kinds=[int])),
    ("MAX_LENGTH", "a whole number from 4", in_range(4, kinds=[int])),
    ("SEED", "a whole number from 0 to 2147483648", in_range(0, 2**31, [int])),
    ("DROPOUT", "a number from 0, below 1, or None", lambda value: value is None or in_range(0, 0.999)(value)),
    ("ALPHA AUGMENT_MASK AUGMENT_NGRAM MASK_RATE", "a number from 0 to 1", in_range(0, 1)),
    ("TRAIN_FRACTION", "a number above 0, at most 1", in_range(sys.float_info.min, 1)),
    ("METHOD", *one_of("none", "kd", "rail", "mate", "cilda", "cilda+minild")),
    ("GENERATOR_WEIGHTS", *loss_weights(2)),
    ("RAIL_WEIGHTS MATE_WEIGHTS", *loss_weights(3)),
    ("CILDA_WEIGHTS", *loss_weights(4)),
    ("MINILD_WEIGHTS", *loss_weights(6)),
    ("STUDENT", *one_of("bert", "bilstm")),
    ("LOGIT_LOSS", *one_of("kl", "mse")),
    ("SCHEDULE", *one_of("linear", "constant")),
    ("BILSTM_WORDS", *one_of("own", "teacher")),
    ("EXPORT", *one_of(None, "pt2", "onnx")),
    ("QUANTIZE", *one_of(None, "int8")),
    ("INIT_LAYERS", '"first", "middle", "last", "spread" or NUM_LAYERS numbers such as (0, 11)', lambda value: (
        value in INIT if isinstance(value, str) else isinstance(value, (tuple, list)) and len(value) == NUM_LAYERS
        and all(map(in_range(0, kinds=[int]), value)))),
] for name in names.split()}

def read_command_line(argv):
    """Change the settings that are given in `argv`, whose names, groups and help come from the block above.

    Returns what follows --predict, a list; None without it.
    """
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--predict", nargs="*", metavar="TEXT", help="only run the student in OUTPUT: a label and its "
                        "probability for each TEXT or, without any, for each line of standard input")
    group = parser
    for line in re.split("\n# ── .*\n", Path(__file__).read_text("utf-8"))[1].splitlines():
        if line.startswith("# "):
            group = parser.add_argument_group(line[2:])
        elif (setting := re.match(r"([A-Z_]+) = .+?(?:  # (.*))?$", line)) and setting[1] in ACCEPTED:
            group.add_argument("--" + setting[1].lower().replace("_", "-"), default=argparse.SUPPRESS, metavar="…",
                               help=f"{setting[2] or ''} [{globals()[setting[1]]}]".replace("%", "%%"))
    options = vars(parser.parse_args(argv))
    predict = options.pop("predict")
    COMMAND_LINE_SETTINGS.clear()
    for name, given in options.items():
        COMMAND_LINE_SETTINGS.add(name.upper())
        value, accepts = given, ACCEPTED[name.upper()][0]
        with contextlib.suppress(ValueError, SyntaxError, ArithmeticError):
            value = ast.literal_eval(re.sub(r"\b(\d+)/(\d+)\b", lambda part: str(int(part[1]) / int(part[2])), given))
        globals()[name.upper()] = given if accepts(given) and not accepts(value) else value
    return predict

COMMAND_LINE_SETTINGS = set()  # the settings given on the command line
SAMPLE_TEACHER = "./finetuned_bert_japanese"  # the TEACHER for which, as long as it is not there, a sample teacher stands in
PATH_SETTINGS = "TEACHER", "TEACHER_BASE", "TOKENIZER", "DATA", "STUDENT_INIT", "OUTPUT", "CACHE", "UNLABELED", "GENERATOR"

def normalize_paths():
    """Expand ~ in every setting that may be a path, and drop slashes at its end. A hub name stays as it is."""
    for name in PATH_SETTINGS:
        if isinstance(globals()[name], str):
            globals()[name] = normalize_path(globals()[name])

def normalize_path(path):
    path = os.path.expanduser(path)
    while len(path) > 1 and path.endswith((os.sep, os.sep + ".")):
        path = path[:-1]
    return path

@contextlib.contextmanager
def as_problem(what, advice):
    """Turn whatever a library raises inside the block into a Problem: what failed, why, and what to do."""
    try:
        yield
    except Exception as error:
        if isinstance(error, Problem):
            raise
        if problem := full_disk_problem(error):
            raise problem from error
        reason = str(error.__cause__ or error).strip() or type(error).__name__
        raise Problem(f"{what}: {reason.splitlines()[0].rstrip('.:')}. {advice}.") from error

def full_disk_problem(error):
    """A Problem if an error, or one that led to it, is the system's for a disk, quota or file that cannot grow; else None."""
    while error is not None:
        number = error.errno if isinstance(error, OSError) else None
        found = re.search("No space left on device|File too large|quota exceeded", str(error), re.IGNORECASE)
        if number in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG) or found:  # safetensors and pyarrow only tell it in words
            reason = os.strerror(number) if number else found[0]
            return Problem(f"{reason}. What was saved before is still there. Make room, or name another CACHE and OUTPUT; the "
                           "same command goes on from here.")
        error = error.__cause__ or error.__context__
    return None

# ── Files: written whole or not at all ────────────────────────────────────────────────────────────────

def save_checked(path, content):
    """Write tensors and plain values with a checksum; a kill at any moment leaves the old file or the new."""
    buffer = io.BytesIO()
    torch.save(content, buffer)
    try:
        with open(f"{path}.distill_new", "wb") as file:
            file.write(hashlib.sha256(buffer.getbuffer()).digest())
            file.write(buffer.getbuffer())
            file.flush()
            os.fsync(file.fileno())
        os.replace(f"{path}.distill_new", path)
    finally:  # a disk that is full is not kept full
        Path(f"{path}.distill_new").unlink(missing_ok=True)

def load_checked(path):
    """What save_checked wrote; None if there is nothing, or (said) if it is damaged. No code in it can run."""
    if not os.path.isfile(path):
        return None
    content = Path(path).read_bytes()
    with contextlib.suppress(Exception):  # a pickle of something else, with the right checksum
        if hashlib.sha256(content[32:]).digest() == content[:32]:
            return torch.load(io.BytesIO(content[32:]), weights_only=True)
    log("note", f"{path} is damaged: it is not used, and made anew")

def file_digest(path):
    state = hashlib.sha256()
    with contextlib.suppress(FileNotFoundError), open(path, "rb") as file:
        while block := file.read(1 << 20):
            state.update(block)
    return state.hexdigest()

def save_folder(folder, model, tokenizer, more=lambda new: None):
    """Write a model, its tokenizer and what more(new) adds; a kill at any moment leaves a whole old or new folder."""
    name, folder = folder, os.path.realpath(folder)  # of a link, what it points to is replaced
    new, old = Path(f"{folder}.distill_new"), Path(f"{folder}.distill_old")
    recover_folder(folder)
    try:
        with as_problem(f"{name} cannot be written", "What was saved before is still there; the same command goes on from here"):
            model.save_pretrained(new)
            tokenizer.save_pretrained(new)
            more(new)
            for file in new.iterdir():
                with open(file, "rb") as written:
                    os.fsync(written.fileno())
            if os.path.exists(folder):
                os.rename(folder, old)
            os.rename(new, folder)
    finally:
        recover_folder(folder)

def recover_folder(folder):
    """Put right what a kill or a full disk inside save_folder left."""
    folder = os.path.realpath(folder)
    if os.path.exists(f"{folder}.distill_old") and not os.path.exists(folder):
        os.rename(f"{folder}.distill_old", folder)
    for left in ".distill_new", ".distill_old":
        shutil.rmtree(f"{folder}{left}", ignore_errors=True)

def clear_temporary_files():
    """Remove what a run that was killed left half-written."""
    shutil.rmtree(Path(CACHE, "distill_tmp"), ignore_errors=True)
    for left in Path(CACHE).glob("*.distill_new"):
        if left.is_file():
            left.unlink()
    recover_folder(OUTPUT)
    if os.path.exists(TEACHER):  # it is made, and needs no lock any more
        Path(f"{os.path.realpath(TEACHER)}.distill_lock").unlink(missing_ok=True)

def check_output_replaceable():
    """Rename OUTPUT away and back, as saving it will: what cannot be renamed, a mount point say, is told before any work."""
    output = os.path.realpath(OUTPUT)
    if left := [path for path in (f"{output}.distill_old", f"{output}.distill_new") if os.path.exists(path)]:
        raise Problem(f"OUTPUT = {OUTPUT!r}: {left[0]}, left by an earlier run, cannot be deleted. Delete it, or name another.")
    if os.path.exists(output):
        if not os.access(output, os.W_OK | os.X_OK):
            raise Problem(f"OUTPUT = {OUTPUT!r}: is write-protected and cannot be replaced. Make it writable, or name another.")
        with as_problem(f"OUTPUT = {OUTPUT!r}: cannot be replaced as a whole",
                     f"Name a new folder inside it, such as {os.path.join(OUTPUT, 'student')!r}, or another one"):
            os.rename(output, f"{output}.distill_old")
            os.rename(f"{output}.distill_old", output)

@contextlib.contextmanager
def run_lock():
    """Inside, this run alone uses CACHE and OUTPUT: another would take its files. The locks die with their owner."""
    locks = {"CACHE": Path(CACHE, "lock"), "OUTPUT": Path(f"{os.path.realpath(OUTPUT)}.distill_lock")}
    if TEACHER_BASE is not None and not os.path.exists(TEACHER):
        locks["TEACHER"] = Path(f"{os.path.realpath(TEACHER)}.distill_lock")
    with contextlib.ExitStack() as stack:
        for name, path in locks.items():
            try:
                stack.enter_context(filelock.FileLock(path, blocking=False))
            except filelock.Timeout:
                raise Problem(f"{name} = {globals()[name]!r}: another run is using it. Wait for its end, or name "
                              "another CACHE and another OUTPUT.") from None
        for name in locks.keys() - {"CACHE"}:
            stack.callback(locks[name].unlink, missing_ok=True)
        yield

def iter_strings(value):
    """All texts among the values of what json.loads gave."""
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return [value] if isinstance(value, str) else [one for part in inner for one in iter_strings(part)]

def forbid_outside_paths(folder):
    """A Problem if an index of files in `folder`, which may come from a stranger, names one outside it."""
    patterns = "*.index.json", "dataset_dict.json", "**/state.json"
    for index in itertools.chain.from_iterable(map(Path(folder).glob, patterns)):
        if out := [one for one in iter_strings(json.loads(index.read_text("utf-8"))) if {"..", "/"} & {*Path(one).parts}]:
            raise Problem(f"{index} names {out[0]!r}, which is not in its folder and is not opened. Correct or "
                          "delete it.")

def digest(*parts):
    """A short name for contents: a model's configuration and weights, what an iterator gives, any value by its repr."""
    state = hashlib.sha256()
    for part in itertools.chain.from_iterable(part if isinstance(part, Iterator) else [part] for part in parts):
        if isinstance(part, torch.nn.Module):
            for tensor in part.state_dict().values():
                state.update(tensor.contiguous().flatten().view(torch.uint8).numpy())
            config = part.config.to_dict() if isinstance(part, transformers.PreTrainedModel) else {}
            part = {name: value for name, value in config.items() if name != "transformers_version"}
        state.update(repr(part).encode("utf-8", "surrogatepass"))
    return state.hexdigest()[:24]

def log(stage, message):
    print(f"{stage:<9} {message}", flush=True)

def progress_bar(steps, **options):
    """`steps`, with a bar on a terminal that tells the time that remains."""
    return tqdm(steps, leave=False, disable=None if rank() == 0 else True, **options)

# ── Processes: one, or several that share the work (torchrun, or accelerate with mpirun) ──────────────

def rank():
    """The number of this process; 0 is the one that reads the caches, writes and speaks."""
    return torch.distributed.get_rank() if torch.distributed.is_initialized() else 0

def world_size():
    return torch.distributed.get_world_size() if torch.distributed.is_initialized() else 1

def shard(things):
    """This process's share of a list or an array: every n-th."""
    return things[rank()::world_size()]

def on_main_process(make):
    """What make() gives in process 0, for all; the others wait for it."""
    made = [make() if rank() == 0 else None]
    if world_size() > 1:
        torch.distributed.broadcast_object_list(made)
    return made[0]

def gather_from_all(thing):
    """[thing of process 0, of process 1, …], for all."""
    things = [thing] * world_size()
    if world_size() > 1:
        torch.distributed.all_gather_object(things, thing)
    return things

# ── Main ──────────────────────────────────────────────────────────────────────────────────────────────

def main(argv=None):
    """The command: exit status 0 if a student was saved; else 1 and one message that says what to do."""
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    datasets.logging.set_verbosity_error()
    datasets.disable_progress_bars()
    datasets.config.HF_UPDATE_DOWNLOAD_COUNTS = False  # else every local file would be counted over the network
    for stream in sys.stdout, sys.stderr:
        if isinstance(stream, io.TextIOWrapper):  # a terminal that has no character for a label ends no run
            stream.reconfigure(errors="backslashreplace")
    try:
        texts = read_command_line(argv)
        normalize_paths()
        if texts is not None:
            return show_predictions(texts)
        PartialState(cpu=True, timeout=timedelta(days=30))  # finds the other processes, if there are any
        on_main_process(check_settings)
        with contextlib.ExitStack() as stack:
            if rank():
                stack.enter_context(contextlib.redirect_stdout(stack.enter_context(open(os.devnull, "w"))))
            else:
                stack.enter_context(run_lock())
            run()
    except Problem as problem:
        sys.exit(f"distill.py: {problem}" if rank() == 0 else f"distill.py, process {rank()}: {problem}")
    except KeyboardInterrupt:
        sys.exit("distill.py: stopped by Ctrl-C; the same command goes on from here")
    except RuntimeError as error:
        if world_size() == 1 or "onnection" not in str(error):
            raise
        sys.exit(f"distill.py, process {rank()}: stops, for another process has; that one's message tells why")
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # else Python fails again where it flushes at its end
        sys.exit("distill.py: the program that read its output has ended, so that it stops, too; the same command goes on from here")
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        problem = full_disk_problem(error) or (f"{where}{error.strerror or error}. What was saved before is still there; once this is put "
                                       "right, the same command goes on from here.")
        sys.exit(f"distill.py: {problem}")

if __name__ == "__main__":
    main()
