"""distill.py: turn a fine-tuned Japanese BERT classifier into a one-layer student, on a laptop CPU.

    python distill.py                            # the settings below; with no teacher yet: the sample
    python distill.py --teacher DIR --data DIR   # any setting can be given for one run
    python distill.py --help                     # all of them

Reads   TEACHER, a fine-tuned BertForSequenceClassification, and DATA, labelled texts in train, val and test.
Writes  OUTPUT: the student with its tokenizer, a model card, report.json, history.csv and loss.png;
        CACHE: the teacher's answers and the last checkpoint, so that the same command, stopped at any
        moment, goes on where it was. It can be deleted at any time.
"""

import argparse
import ast
import contextlib
import copy
import functools
import hashlib
import io
import itertools
import json
import math
import os
import platform
import re
import shutil
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

try:
    import datasets
    import huggingface_hub
    import numpy as np
    import torch
    import torch.nn.functional as F
    import transformers
    from matplotlib.figure import Figure
    from torch.utils.data import DataLoader
    from tqdm.auto import tqdm
    from transformers import (AutoConfig, AutoTokenizer, BertJapaneseTokenizer, EarlyStoppingCallback, PrinterCallback,
                              Trainer, TrainingArguments)
    from transformers.modeling_outputs import SequenceClassifierOutput
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
MAX_LENGTH = 128  # tokens; longer texts are cut (and counted). Raise it freely: nothing is padded to it
# Student
NUM_LAYERS = 1  # encoder layers of the student; all else is as in the teacher
STUDENT_INIT = "teacher"  # start from the teacher's weights, or from "random" ones
INIT_LAYERS = "first"  # the teacher's layers to start from: "first", "last", "spread" or e.g. (0, 11)
# Loss
ALPHA = 0.5  # weight of the soft labels (KL) against the hard labels (CE); 1: soft labels alone
TEMPERATURE = 2.0  # softens both distributions in the KL; raise it if the teacher is nearly always certain
# Training
EPOCHS = 20  # at most; early stopping usually ends sooner
PATIENCE = 3  # epochs without a lower validation loss before training stops
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

# ── Settings: checks and command line ───────────────────────────────────────────────────────────────────

class Problem(Exception):
    """Something the user can put right; the message says what is wrong, what is accepted and what to do."""

def text(value):
    return isinstance(value, str) and value.strip() != ""

def number(low, high=sys.float_info.max, kinds=(int, float)):
    """A test: is a value a number of these kinds, low <= value <= high? NaN and infinity are not."""
    return lambda value: type(value) in kinds and low <= value <= high

ACCEPTED = {name: (test, words) for names, words, test in [  # setting → its test, and what it accepts in words
    ("TEACHER DATA TEXT_COLUMN LABEL_COLUMN OUTPUT CACHE REPORT_TO", "a text", text),
    ("TEACHER_BASE TOKENIZER TEXT_PAIR_COLUMN", "a text or None", lambda value: value is None or text(value)),
    ("TEACHER_EPOCHS NUM_LAYERS EPOCHS PATIENCE BATCH_SIZE", "a whole number from 1", number(1, kinds=[int])),
    ("TEACHER_LEARNING_RATE LEARNING_RATE TEMPERATURE MAX_GRAD_NORM", "a number above 0", number(sys.float_info.min)),
    ("WARMUP_STEPS WEIGHT_DECAY", "a number from 0", number(0)),
    ("MAX_LENGTH", "a whole number from 4", number(4, kinds=[int])),
    ("SEED", "a whole number from 0 to 2147483648", number(0, 2**31, [int])),
    ("ALPHA", "a number from 0 to 1", number(0, 1)),
    ("SCHEDULE", '"linear" or "constant"', lambda value: value in ("linear", "constant")),
    ("STUDENT_INIT", '"teacher" or "random"', lambda value: value in ("teacher", "random")),
    ("INIT_LAYERS", '"first", "last", "spread" or NUM_LAYERS numbers such as (0, 11)', lambda value: (
        value in INIT if isinstance(value, str) else isinstance(value, (tuple, list)) and len(value) == NUM_LAYERS
        and all(map(number(0, kinds=[int]), value)))),
] for name in names.split()}

@contextlib.contextmanager
def explain(what, advice):
    """Turn whatever a library raises inside the block into a Problem: what failed, why, and what to do."""
    try:
        yield
    except Exception as error:
        if isinstance(error, Problem):
            raise
        reason = str(error.__cause__ or error).strip() or type(error).__name__
        raise Problem(f"{what}: {reason.splitlines()[0].rstrip('.:')}. {advice}.") from error

def read_command_line(argv):
    """Change the settings that are given in `argv`. Names, groups and help come from the block above."""
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    group = parser
    for line in re.split("\n# ── .*\n", Path(__file__).read_text("utf-8"))[1].splitlines():
        if line.startswith("# "):
            group = parser.add_argument_group(line[2:])
        elif (setting := re.match(r"([A-Z_]+) = .+?(?:  # (.*))?$", line)) and setting[1] in ACCEPTED:
            group.add_argument("--" + setting[1].lower().replace("_", "-"), default=argparse.SUPPRESS, metavar="…",
                               help=f"{setting[2] or ''} [{globals()[setting[1]]}]".replace("%", "%%"))
    for name, given in vars(parser.parse_args(argv)).items():
        value, accepts = given, ACCEPTED[name.upper()][0]
        with contextlib.suppress(ValueError, SyntaxError):
            value = ast.literal_eval(given)
        globals()[name.upper()] = given if accepts(given) and not accepts(value) else value

def check_settings():
    """Find every fault of the settings, and outputs that cannot be written, before anything slow begins."""
    faults = [f"{name} = {globals()[name]!r}: must be {words}"
              for name, (accepts, words) in ACCEPTED.items() if not accepts(globals()[name])]
    if not faults:
        output = Path(OUTPUT)
        if output.resolve() in [Path(other).resolve() for other in (TEACHER, DATA, CACHE)]:
            faults.append(f"OUTPUT = {OUTPUT!r}: must not be the folder of TEACHER, DATA or CACHE")
        elif output.is_file() or output.is_dir() and any(output.iterdir()) and not (output / "report.json").exists():
            faults.append(f"OUTPUT = {OUTPUT!r}: was not written by distill.py and is not overwritten; name another")
        for name, folder in ("OUTPUT", output.absolute().parent), ("CACHE", Path(CACHE)):
            try:
                folder.mkdir(parents=True, exist_ok=True)
                tempfile.TemporaryFile(dir=folder).close()
            except OSError as error:
                faults.append(f"{name} = {globals()[name]!r}: cannot be written ({error.strerror}); name another")
    if faults:
        raise Problem("\n  ".join(["these settings must be put right:", *faults]))


# ── Files: written whole or not at all ──────────────────────────────────────────────────────────────────

def save_whole(path, content):
    """Write tensors and plain values with a checksum; a kill at any moment leaves the old file or the new."""
    buffer = io.BytesIO()
    torch.save(content, buffer)
    with open(f"{path}.new", "wb") as file:
        file.write(hashlib.sha256(buffer.getbuffer()).digest())
        file.write(buffer.getbuffer())
        file.flush()
        os.fsync(file.fileno())
    os.replace(f"{path}.new", path)

def load_whole(path):
    """What save_whole wrote; None if there is nothing, or (said) if it is damaged. No code in it can run."""
    content = Path(path).read_bytes() if os.path.isfile(path) else None
    try:
        if content and hashlib.sha256(content[32:]).digest() == content[:32]:
            return torch.load(io.BytesIO(content[32:]), weights_only=True)
    except Exception:  # a pickle of something else, with the right checksum
        pass
    if content is not None:
        say("note", f"{path} is damaged: it is not used, and made anew")

def save_folder(folder, model, tokenizer, more=lambda new: None):
    """Write a model, its tokenizer and what more(new) adds; a kill at any moment leaves a whole old or new folder."""
    new, old = Path(f"{folder}.distill_new"), Path(f"{folder}.distill_old")
    shutil.rmtree(new, ignore_errors=True)
    model.save_pretrained(new)
    tokenizer.save_pretrained(new)
    more(new)
    if os.path.exists(folder):
        shutil.rmtree(old, ignore_errors=True)
        os.rename(folder, old)
    os.rename(new, folder)
    shutil.rmtree(old, ignore_errors=True)

def digest(*parts):
    """A short name for contents: a model's configuration and weights, or any value by its repr."""
    state = hashlib.sha256()
    for part in parts:
        if isinstance(part, torch.nn.Module):
            for tensor in part.state_dict().values():
                state.update(tensor.contiguous().numpy())
            part = {name: value for name, value in part.config.to_dict().items() if name != "transformers_version"}
        state.update(repr(part).encode("utf-8", "surrogatepass"))
    return state.hexdigest()[:24]

def say(stage, message):
    print(f"{stage:<9} {message}", flush=True)


# ── Data ────────────────────────────────────────────────────────────────────────────────────────────────

SPLITS = {"train": ["train"], "val": ["val", "validation", "valid", "dev"], "test": ["test"]}
READERS = {".csv": "csv", ".tsv": "csv", ".jsonl": "json", ".json": "json", ".parquet": "parquet"}
TARGETS = "labels", "soft_labels"  # the keys of a batch that are for the loss; the others are for the model
TEXTS_PER_PROCESS = 100_000  # to be tokenized: less would not pay for the start of another process
TOKENS = 2048  # in a batch of inference: enough to keep the processor busy, few enough for its cache
POOL = 16  # batches whose texts are sorted by length together: more saves little, and makes batches too alike

def text_columns():
    return [TEXT_COLUMN, TEXT_PAIR_COLUMN] if TEXT_PAIR_COLUMN else [TEXT_COLUMN]

def read_file(path):
    """One file as a Dataset whose rows stay on disk. UTF-8 with or without BOM, or CP932 (Japanese Excel)."""
    kind, options = path.suffix.lower(), {}
    if kind in (".csv", ".tsv"):  # texts such as NA and labels such as 01 stay as they are written
        options = dict(sep="\t" if kind == ".tsv" else ",", keep_default_na=False,
                       converters=dict.fromkeys([*text_columns(), LABEL_COLUMN], str))
    with explain(f"{path}: cannot be read", f"Accepted are {', '.join(READERS)}, with rows, in UTF-8 or CP932"):
        if kind != ".parquet":
            try:
                options["encoding"] = "utf-8-sig"
                with open(path, encoding="utf-8") as file:
                    sum(1 for _ in file)
            except UnicodeDecodeError:
                options["encoding"] = "cp932"
                say("data", f"{path} is not UTF-8: it is read as CP932 (Shift_JIS)")
        return datasets.load_dataset(READERS[kind], data_files=str(path), split="train",
                                     cache_dir=str(Path(CACHE, "tmp")), **options)

def read_splits():
    """DATA as it comes: a dict of train, val and test, or {"all": …} for a single set."""
    path = Path(DATA)
    if DATA == "tests/sample" and not path.exists():  # started from another folder
        path = Path(__file__).resolve().parent / DATA
    if path.is_file():
        return {"all": read_file(path)}
    if path.is_dir() and not {"state.json", "dataset_dict.json"} & set(os.listdir(path)):
        found = {file.stem.lower(): read_file(file) for file in sorted(path.iterdir())
                 if file.suffix.lower() in READERS and file.stem.lower() in sum(SPLITS.values(), [])}
    else:
        with explain(f"DATA = {DATA!r}: no such file or folder, and no data set to load", "Name a folder with train, "
                     f"val and test files ({', '.join(READERS)}), a single file, or a hub data set"):
            found = datasets.load_from_disk(DATA) if path.is_dir() else datasets.load_dataset(DATA)
        if not isinstance(found, dict) or len(found) == 1:
            return {"all": found if not isinstance(found, dict) else next(iter(found.values()))}
    splits = {split: found[name] for split, names in SPLITS.items() for name in names if name in found}
    if missing := [" or ".join(names) for split, names in SPLITS.items() if split not in splits]:
        raise Problem(f"DATA = {DATA!r}: has no {', no '.join(missing)} (found: {', '.join(found) or 'nothing'}). Add "
                      f"it ({', '.join(READERS)}), or set DATA to one single file, which is cut into the three.")
    return splits

def label_names(splits):
    """Label → number for a teacher still to be made: the names in order, or LABEL_0 … where they are numbers."""
    names = getattr(next(iter(splits.values())).features[LABEL_COLUMN], "names", None)
    found = names or {str(label) for rows in splits.values() for label in rows.unique(LABEL_COLUMN)} - {"", "None"}
    if not 2 <= len(found) <= 1000:
        raise Problem(f"LABEL_COLUMN = {LABEL_COLUMN!r}: {len(found)} different labels; 2 to 1000 are accepted.")
    if not names and all(label.isdecimal() for label in found):
        names = [f"LABEL_{number}" for number in range(max(map(int, found)) + 1)]
    return {label: number for number, label in enumerate(names or sorted(found))}

def clean(rows, split, label2id):
    """The texts of one split and `labels`, the teacher's numbers; a Problem that counts all faulty rows."""
    lookup = {str(number): number for number in label2id.values()} | label2id
    names = getattr(rows.features[LABEL_COLUMN], "names", [])  # a data set's own numbering is not the teacher's
    lookup |= {str(number): label2id[name] for number, name in enumerate(names) if name in label2id}
    labels = [re.sub(r"\.0$", "", str(label)) for label in rows[LABEL_COLUMN]]
    found = {f"{column} empty or not a text": [row for row, value in enumerate(rows[column], 1) if not text(value)]
             for column in text_columns()}
    for row, label in enumerate(labels, 1):
        if label not in lookup:
            unknown = f"label {label!r}, which the teacher does not have ({', '.join(label2id)}),"
            found.setdefault("no label" if label in ("", "None", "nan") else unknown, []).append(row)
    if faults := [f"{split}: {what} in {len(at)} rows: {', '.join(map(str, at[:5]))}{', …' * (len(at) > 5)}"
                  for what, at in found.items() if at]:
        hint = "DATA is still the sample; set it to your teacher's data." if DATA == "tests/sample" else \
            "correct or remove these rows, counted from 1; labels are the teacher's names or numbers."
        raise Problem("\n  ".join([f"DATA = {DATA!r}: {hint}", *faults[:9]]))
    return rows.select_columns(text_columns()).add_column("labels", [lookup[label] for label in labels])

def load_data(label2id=None):
    """({"train", "val", "test"} with texts and labels, label2id); the latter is read off the data if not given."""
    splits = read_splits()
    for split, rows in splits.items():
        if missing := {*text_columns(), LABEL_COLUMN} - set(rows.column_names):
            raise Problem(f"DATA = {DATA!r}: {split} has no column {', '.join(sorted(missing))}; its columns are "
                          f"{', '.join(rows.column_names)}. Set TEXT_COLUMN, TEXT_PAIR_COLUMN and LABEL_COLUMN.")
    label2id = label2id or label_names(splits)
    splits = {split: clean(rows, split, label2id) for split, rows in splits.items()}
    if "all" in splits:
        cut = lambda rows, share: rows.train_test_split(share, seed=SEED, stratify_by_column="labels").values()
        with explain(f"DATA = {DATA!r}: cannot be cut into train, val and test", "Give more rows of each label"):
            train, rest = cut(splits["all"].cast_column("labels", datasets.ClassLabel(len(label2id))), 0.2)
            splits = dict(zip(SPLITS, (train, *cut(rest, 0.5))))
        say("data", f"{DATA} is one set: cut 80/10/10 by SEED = {SEED}, each label in the same proportion")
    shares = Counter(splits["train"]["labels"])
    say("data", f"{DATA}: " + " · ".join(f"{split} {len(rows):,}" for split, rows in splits.items()) + "; train has "
        + ", ".join(f"{shares[number]:,} {label}" for label, number in label2id.items()))
    return splits, label2id

@functools.lru_cache(1)
def token_ids(tokenizer):
    """A function: text → its token ids, without special tokens, exactly as this BertJapaneseTokenizer gives them.

    The stock tokenizer cuts a word into pieces, in Python, each time it meets it. A word is always cut the same way,
    so once is enough; what is left is mostly MeCab's time. Texts that spell out a special token go the stock way.
    """
    special = re.compile("|".join(map(re.escape, tokenizer.get_added_vocab())))
    never_split = tokenizer.all_special_tokens
    words, cut = tokenizer.word_tokenizer.tokenize, tokenizer.subword_tokenizer.tokenize
    pieces = functools.lru_cache(1 << 18)(lambda word: tuple(tokenizer.convert_tokens_to_ids(cut(word))))

    def ids(text):
        if special.search(text):
            return tokenizer.convert_tokens_to_ids(tokenizer.tokenize(text))
        return [piece for word in words(text, never_split=never_split) for piece in pieces(word)]

    return ids

def encode(texts, tokenizer, max_length):
    """The tokenizer's ids for `texts`, a list per text column; nothing is padded.

    Returns lists: input_ids (, token_type_ids, for pairs), length, and cut, whether max_length cut the text.
    """
    options = dict(return_attention_mask=False, return_token_type_ids=len(texts) > 1)
    cutting = dict(options, truncation=True, max_length=max_length)
    if isinstance(tokenizer, BertJapaneseTokenizer) and tokenizer.do_word_tokenize and tokenizer.do_subword_tokenize:
        rows = list(zip(*(map(token_ids(tokenizer), column) for column in texts)))
        numbers = [[-1 - column] for column in range(len(texts))]  # stand for the texts among the special tokens
        frame = tokenizer.build_inputs_with_special_tokens(*numbers)
        part = lambda row, place: row[-1 - place] if place < 0 else [place]
        columns = {"input_ids": [[one for place in frame for one in part(row, place)] for row in rows]}
        if len(texts) > 1:
            columns["token_type_ids"] = [tokenizer.create_token_type_ids_from_sequences(*row) for row in rows]
        shorter = lambda row: tokenizer.prepare_for_model(*rows[row], **cutting)
    else:
        columns = dict(tokenizer(*texts, verbose=False, **options))
        shorter = lambda row: tokenizer(*(column[row] for column in texts), **cutting)
    cut = [len(ids) > max_length for ids in columns["input_ids"]]
    for row in itertools.compress(range(len(cut)), cut):
        for name, value in shorter(row).items():
            columns[name][row] = value
    return {**columns, "length": list(map(len, columns["input_ids"])), "cut": cut}

def tokenize(data, tokenizer):
    """Texts → input_ids (, token_type_ids), length, and key, a name for these ids. Nothing is padded here."""
    def add(batch, columns, tokenizer, max_length):  # takes all that it needs: it may run in another process
        made = encode([batch[column] for column in columns], tokenizer, max_length)
        return made | {"key": [digest(*row) for row in zip(*(made[name] for name in made if name.endswith("ids")))]}

    Path(CACHE, "tmp").mkdir(exist_ok=True)
    for split, rows in data.items():
        name = f"{split}-{time.monotonic_ns()}"
        data[split] = rows.map(
            add, batched=True, remove_columns=text_columns(), new_fingerprint=name,
            num_proc=min(len(rows) // TEXTS_PER_PROCESS, os.cpu_count()) or None,
            fn_kwargs=dict(columns=text_columns(), tokenizer=tokenizer, max_length=MAX_LENGTH),
            cache_file_name=str(Path(CACHE, "tmp", f"{name}.arrow")))
    lengths, cut = (np.concatenate([rows[name] for rows in data.values()]) for name in ("length", "cut"))
    say("data", f"{lengths.mean():.1f} tokens per text, at most {lengths.max()}; {cut.sum():,} of {len(cut):,} texts "
        f"cut to MAX_LENGTH = {MAX_LENGTH}")
    say("data", "the first: " + " ".join(tokenizer.convert_ids_to_tokens(data["train"][0]["input_ids"][:30])))
    for one, other in ("val", "train"), ("test", "train"), ("test", "val"):
        known = set(data[other]["key"])
        if shared := sum(key in known for key in data[one]["key"]):
            say("data", f"{shared:,} of {len(data[one]):,} texts of {one} also stand in {other}: {one} is flattered")
    return data

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
    return batch | {name: torch.tensor([row[name] for row in rows]) for name in TARGETS if name in rows[0]}

def longest_first(lengths, tokens):
    """Row numbers in batches: every row once, like lengths together, at most `tokens` in a batch, padding included."""
    order, start = np.argsort(-np.array(lengths), kind="stable").tolist(), 0
    while start < len(order):
        size = max(1, tokens // lengths[order[start]])
        yield order[start:start + size]
        start += size

def inference_loader(rows, collate_fn, tokens=None):
    return DataLoader(rows, batch_sampler=list(longest_first(rows["length"][:], tokens or TOKENS)),
                      collate_fn=collate_fn)

def shuffled(lengths, batch_size, seed):
    """Row numbers for one epoch of training: batches of like length, in random order, the smaller last one last."""
    generator = np.random.default_rng(seed)
    order, pool = generator.permutation(len(lengths)), POOL * batch_size
    pools = [order[start:start + pool] for start in range(0, len(order), pool)]
    order = np.concatenate([rows[np.argsort(lengths[rows], kind="stable")] for rows in pools])
    full = len(order) // batch_size * batch_size
    batches = generator.permutation(order[:full].reshape(-1, batch_size))
    return np.concatenate([batches.ravel(), order[full:]]).tolist()


# ── Model ───────────────────────────────────────────────────────────────────────────────────────────────

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
            module.__class__ = FASTER.get(type(module), type(module))

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
        if attention_mask is not None and not attention_mask.all():
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
        total, mean = Attend.apply(x, score, mask, keep)
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

class Dropout(torch.nn.Dropout):
    """The same distribution, drawn faster: stock, random numbers would take a fifth of a training step or more.

    Not each unit's fate is drawn but the gaps between those that fall out: geometric, and 1/p times fewer.
    """

    def forward(self, x):
        if not self.training or self.p == 0:
            return x
        many = x.numel() * self.p
        gaps = torch.rand(int(many + 10 * many**0.5 + 10), device=x.device)  # ten standard deviations above the mean
        gaps = (gaps.neg_().log1p_() / math.log1p(-self.p)).long() + 1
        dropped = gaps.cumsum(0) - 1
        dropped = dropped[:torch.searchsorted(dropped, x.numel())]
        return (x.flatten().index_fill(0, dropped, 0) / (1 - self.p)).view_as(x)

class Linear(torch.nn.Linear):
    """The same sum, as W xᵀ instead of x Wᵀ where x has few rows: a third less time, with MKL."""

    def forward(self, x):
        if x.dim() != 2 or len(x) > 64:
            return super().forward(x)
        return torch.addmm(self.bias[:, None], self.weight, x.t()).t().contiguous()

FASTER = {torch.nn.Dropout: Dropout, torch.nn.Linear: Linear}

class Attend(torch.autograd.Function):
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


# ── Teacher ─────────────────────────────────────────────────────────────────────────────────────────────

def load_config(name, setting="TEACHER"):
    """The configuration of the model in the folder or hub repository `name`."""
    if os.path.exists(name) and not os.path.isfile(os.path.join(name, "config.json")):
        raise Problem(f"{setting} = {name!r}: holds no model (no config.json in a folder of this name). Save one into "
                      "it with model.save_pretrained, or name another folder.")
    if not os.path.isdir(name) and (name.startswith((".", "~", os.sep)) or name.count("/") > 1):
        raise Problem(f"{setting} = {name!r}: no such folder. Put your fine-tuned model there, name its folder, or set "
                      "TEACHER_BASE to have a teacher fine-tuned.")
    with explain(f"{setting} = {name!r}: cannot be loaded", "Name a folder of model.save_pretrained, or a hub model"):
        config = AutoConfig.from_pretrained(name)
    kind, outputs = (config.architectures or ["?ForSequenceClassification"])[0], config.num_labels
    if setting == "TEACHER" and (not kind.endswith("ForSequenceClassification") or config.model_type != "bert"):
        raise Problem(f"TEACHER = {name!r}: is a {kind} of the family {config.model_type!r}; accepted is a fine-tuned "
                      "BertForSequenceClassification. To fine-tune a BERT first, name it in TEACHER_BASE.")
    if setting == "TEACHER" and (outputs < 2 or config.problem_type not in (None, "single_label_classification")):
        raise Problem(f"TEACHER = {name!r}: {outputs} output(s), {config.problem_type or 'regression'}; accepted is a "
                      "classifier that chooses one of two or more labels.")
    return config

def load_tokenizer(name, config):
    """The tokenizer in `name`, which must fit the model's `config`."""
    advice = 'Set TOKENIZER to the one the teacher was made with, e.g. "tohoku-nlp/bert-base-japanese-v3"'
    files = [file for pattern in ("vocab.*", "tokenizer.json", "*.model") for file in Path(name).glob(pattern)]
    if os.path.exists(name) and not files:  # transformers would make an empty one, and say nothing
        raise Problem(f"{name!r} holds no tokenizer (model.save_pretrained saves none). {advice}.")
    with explain(f"the tokenizer in {name!r} cannot be loaded",
                 f"If a package is missing: pip install fugashi unidic-lite. Else: {advice}"):
        tokenizer = AutoTokenizer.from_pretrained(name)
    if (highest := max(tokenizer.get_vocab().values())) >= config.vocab_size:
        raise Problem(f"the tokenizer in {name!r} has ids up to {highest}, the teacher only 0 to "
                      f"{config.vocab_size - 1}. {advice}.")
    if MAX_LENGTH > config.max_position_embeddings:
        raise Problem(f"MAX_LENGTH = {MAX_LENGTH}: the teacher takes at most {config.max_position_embeddings} tokens.")
    tokenizer.model_max_length = min(tokenizer.model_max_length, config.max_position_embeddings)
    return tokenizer

def load_teacher(name):
    """The teacher: frozen, in eval mode, in float32 (transformers 5 otherwise keeps the stored precision)."""
    with explain(f"TEACHER = {name!r}: its weights cannot be loaded", "Copy or save the model again"):
        teacher, info = BertForSequenceClassification.from_pretrained(
            name, dtype=torch.float32, output_loading_info=True)
    if missing := sorted(info["missing_keys"]):  # transformers would warn and go on with random weights
        raise Problem(f"TEACHER = {name!r}: not a fine-tuned classifier: its file lacks {', '.join(missing[:4])}. Name "
                      "the fine-tuned model, or fine-tune this one first: name it in TEACHER_BASE.")
    return teacher.eval().requires_grad_(False)

@torch.inference_mode()
def predict(model, loader):
    """Run `model` over `loader`; yields (batch, logits (batch, classes), seconds of the forward pass)."""
    model.eval()
    for batch in loader:
        start = time.perf_counter()
        logits = model(**{name: tensor for name, tensor in batch.items() if name not in TARGETS}).logits
        yield batch, logits, time.perf_counter() - start

def classify(model, tokenizer, texts, tokens=None):
    """Text to logits, (texts, classes), in the order of `texts`, a list per text column."""
    columns = encode(texts, tokenizer, MAX_LENGTH)
    rows = [dict(zip(columns, row)) for row in zip(*columns.values())]
    batches = list(longest_first(columns["length"], tokens or TOKENS))
    collated = (collate([rows[row] for row in batch], tokenizer.pad_token_id) for batch in batches)
    logits = torch.cat([logits for _, logits, _ in predict(model, collated)])
    return torch.empty_like(logits).index_copy_(0, torch.tensor([row for batch in batches for row in batch]), logits)

def add_soft_labels(data, teacher, collate_fn):
    """Give every split the column soft_labels, softmax(z_T / TEMPERATURE). Returns (data, seconds per split).

    The logits are kept in CACHE under the teacher's weights and the token ids (that is, under text, tokenizer
    and MAX_LENGTH at once): no sentence is run twice, in this run or a later one. The seconds are those of the
    pass in which the teacher saw the sentences, each with its share of its batch.
    """
    path = Path(CACHE, f"teacher-{digest(teacher)}.pt")
    known = load_whole(path) or {}  # key → (logits, seconds)
    rows = datasets.concatenate_datasets(list(data.values()))
    new = {key: row for row, key in enumerate(rows["key"]) if key not in known}
    if new:
        loader = inference_loader(rows.select(list(new.values())), collate_fn)
        names, saved = list(new), time.monotonic()
        keys = (names[row] for batch in loader.batch_sampler for row in batch)
        next(predict(teacher, loader))  # warm-up
        try:
            with tqdm(total=len(new), desc="teacher", leave=False, disable=None) as bar:
                for _, logits, seconds in predict(teacher, loader):
                    known |= {next(keys): (row, seconds / len(logits)) for row in logits.tolist()}
                    bar.update(len(logits))
                    if time.monotonic() - saved > 60:
                        save_whole(path, known)
                        saved = time.monotonic()
        finally:
            save_whole(path, known)
    say("teacher", f"labelled {len(new):,} texts; {len(set(rows['key'])) - len(new):,} were in the cache")
    for split, rows in data.items():
        logits = torch.tensor([known[key][0] for key in rows["key"]])
        data[split] = rows.add_column("soft_labels", F.softmax(logits / TEMPERATURE, dim=-1).tolist())
    return data, {split: sum(known[key][1] for key in rows["key"]) for split, rows in data.items()}


# ── Student ─────────────────────────────────────────────────────────────────────────────────────────────

INIT = {  # INIT_LAYERS → which n of a teacher's layers 0 to depth - 1
    "first": lambda n, depth: range(n),
    "last": lambda n, depth: range(depth - n, depth),
    "spread": lambda n, depth: [round(i * (depth - 1) / max(n - 1, 1)) for i in range(n)],
}

def build_student(teacher):
    """A BertForSequenceClassification like the teacher but with NUM_LAYERS layers, on the CPU."""
    config = copy.deepcopy(teacher.config)
    config.num_hidden_layers = NUM_LAYERS
    transformers.set_seed(SEED)
    student = BertForSequenceClassification(config).to("cpu")
    if STUDENT_INIT == "teacher":  # embeddings, pooler and classifier too
        depth = teacher.config.num_hidden_layers
        layers = [*(INIT[INIT_LAYERS](NUM_LAYERS, depth) if isinstance(INIT_LAYERS, str) else INIT_LAYERS)]
        if min(layers) < 0 or max(layers) >= depth:
            raise Problem(f"NUM_LAYERS = {NUM_LAYERS}, INIT_LAYERS = {INIT_LAYERS!r}: the teacher has layers 0 to "
                          f"{depth - 1}.")
        weights = teacher.state_dict()
        source = lambda name: re.sub(r"(?<=encoder\.layer\.)\d+", lambda number: str(layers[int(number[0])]), name)
        student.load_state_dict({name: weights[source(name)] for name in student.state_dict()})
    return student

def count(model):
    return sum(tensor.numel() for tensor in model.parameters())


# ── Loss and trainer ────────────────────────────────────────────────────────────────────────────────────

def distillation_loss(logits, hard_labels, soft_labels=None):
    """ALPHA * KL + (1 - ALPHA) * CE, a mean over the batch (Hinton et al. 2015, arXiv:1503.02531).

    logits: the student's, (batch, classes). hard_labels: (batch,). soft_labels: the teacher's softmax(z_T / T),
    (batch, classes); without them the loss is CE alone. T² keeps the gradients of the KL as large as those of
    the CE whatever T is; batchmean, unlike mean, does not shrink it with the number of classes.
    """
    cross_entropy = F.cross_entropy(logits, hard_labels)
    if soft_labels is None:
        return cross_entropy
    kl = F.kl_div(F.log_softmax(logits / TEMPERATURE, dim=-1), soft_labels, reduction="batchmean") * TEMPERATURE**2
    return ALPHA * kl + (1 - ALPHA) * cross_entropy

class CustomTrainer(Trainer):
    """A Trainer with the distillation loss, whose loaders keep soft_labels (the stock ones drop them)."""

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        outputs = model(**{name: tensor for name, tensor in inputs.items() if name not in TARGETS})
        loss = distillation_loss(outputs.logits, inputs["labels"], inputs.get("soft_labels"))
        return (loss, outputs) if return_outputs else loss

    def get_train_dataloader(self):
        """Batches of like length, in an order that SEED and the epoch (state.epoch) decide."""
        lengths, seed = np.array(self.train_dataset["length"]), SEED + int(self.state.epoch or 0)
        return DataLoader(self.train_dataset, batch_size=self.args.train_batch_size, collate_fn=self.data_collator,
                          sampler=shuffled(lengths, self.args.train_batch_size, seed))

    def get_eval_dataloader(self, eval_dataset=None):
        return self.get_test_dataloader(self.eval_dataset if eval_dataset is None else eval_dataset)

    def get_test_dataloader(self, test_dataset):
        return inference_loader(test_dataset, self.data_collator)

def make_trainer(model, data, collate_fn, epochs, learning_rate, patience):
    """A CustomTrainer on the CPU. Of the stock Trainer it uses optimizer, schedule, callbacks and trackers."""
    with explain(f"REPORT_TO = {REPORT_TO!r}", 'Install what is missing, or set "none"'):
        args = TrainingArguments(
            output_dir=CACHE, use_cpu=True, seed=SEED, num_train_epochs=epochs, learning_rate=learning_rate,
            lr_scheduler_type=SCHEDULE, warmup_steps=WARMUP_STEPS, weight_decay=WEIGHT_DECAY,
            max_grad_norm=MAX_GRAD_NORM, per_device_train_batch_size=BATCH_SIZE,
            eval_strategy="epoch", save_strategy="epoch", load_best_model_at_end=True,
            metric_for_best_model="eval_loss", greater_is_better=False, remove_unused_columns=False,
            dataloader_pin_memory=False, report_to=REPORT_TO, disable_tqdm=True, log_level="error")
        trainer = CustomTrainer(model=model, args=args, data_collator=collate_fn, train_dataset=data["train"],
                                eval_dataset=data["val"], callbacks=[EarlyStoppingCallback(patience)])
    trainer.remove_callback(PrinterCallback)
    return trainer


# ── Training ────────────────────────────────────────────────────────────────────────────────────────────

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

def train(trainer, checkpoint, use_what_is_there=True):
    """The epoch loop: returns the history, a dict per epoch, and leaves the best epoch's weights in trainer.model.

    The file `checkpoint` holds after each epoch what is needed to go on. Random numbers are drawn anew from SEED
    in each epoch, so that a run which was stopped ends bit for bit like one which was not. Ctrl-C ends training
    in good order, with the best epoch so far; it is passed on if there is none, or without use_what_is_there.
    """
    model, args, callbacks = trainer.model, trainer.args, trainer.callback_handler
    epochs = int(args.num_train_epochs)
    recipe = {name: globals()[name] for name in ACCEPTED if name not in ("OUTPUT", "CACHE", "REPORT_TO")}
    run_name = digest(recipe, epochs, args.learning_rate, model, torch.__version__,
                      *(rows for split in (trainer.train_dataset, trainer.eval_dataset) for rows in split.iter(1000)))
    with only_used_rows(model, trainer.train_dataset, trainer.eval_dataset):
        trainer.create_optimizer_and_scheduler(num_training_steps=epochs * len(trainer.get_train_dataloader()))
        now = load_whole(checkpoint) or {"run": run_name, "history": []}
        if now["run"] != run_name:
            say("training", "settings or data differ from those of the last checkpoint: training starts anew")
            now = {"run": run_name, "history": []}
        if now["history"]:
            say("training", f"goes on after epoch {len(now['history'])}")
            for part, state in (model, "model"), (trainer.optimizer, "optimizer"), (trainer.lr_scheduler, "scheduler"):
                part.load_state_dict(now[state])
        trainer.control = callbacks.on_train_begin(args, trainer.state, trainer.control)
        print(" epoch   train loss     val loss   val accuracy         rate   seconds")
        for row in now["history"]:
            judge(trainer, row)
        try:
            while len(now["history"]) < epochs and not trainer.control.should_training_stop:
                row = train_epoch(trainer, len(now["history"]) + 1)
                best = copy.deepcopy(model.state_dict()) if judge(trainer, row) else now["best"]
                now = {"run": run_name, "history": now["history"] + [row], "best": best, "model": model.state_dict(),
                       "optimizer": trainer.optimizer.state_dict(), "scheduler": trainer.lr_scheduler.state_dict()}
                save_whole(checkpoint, now)
            if trainer.control.should_training_stop:
                say("training", "stopped early: the validation loss no longer improves")
        except KeyboardInterrupt:
            if not now["history"] or not use_what_is_there:
                raise
            say("training", "stopped by Ctrl-C: the best epoch so far is used; the same command goes on from here")
        callbacks.on_train_end(args, trainer.state, trainer.control)
        model.load_state_dict(now["best"])
        return now["history"]

def clip_gradients(model, norm):
    """Shorten the gradient, over all parameters, to at most `norm`: clip_grad_norm_, but with a faster norm."""
    grads = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
    found = sum(torch.dot(grad.flatten(), grad.flatten()) for grad in grads).sqrt()
    if found > norm:
        torch._foreach_mul_(grads, norm / found)

def training_step(trainer, batch):
    """One step of the optimizer; returns the loss of the batch, a mean over its texts."""
    loss = trainer.compute_loss(trainer.model, batch)
    trainer.accelerator.backward(loss)
    clip_gradients(trainer.model, trainer.args.max_grad_norm)
    trainer.optimizer.step()
    trainer.lr_scheduler.step()
    trainer.optimizer.zero_grad()
    trainer.state.global_step += 1
    return loss.item()

def train_epoch(trainer, epoch):
    """One pass over the training data and one over the validation data; returns the epoch's row of the history."""
    trainer.state.epoch = epoch
    transformers.set_seed(SEED + epoch)
    model, total, start = trainer.model.train(), 0.0, time.perf_counter()
    for batch in tqdm(trainer.get_train_dataloader(), desc=f"epoch {epoch}", leave=False, disable=None):
        rate = trainer.lr_scheduler.get_last_lr()[0]
        total += training_step(trainer, batch) * len(batch["labels"])
        if not math.isfinite(total):
            break
    seconds, val_total, right = time.perf_counter() - start, 0.0, 0
    for batch, logits, _ in predict(model, trainer.get_eval_dataloader()):
        val_total += distillation_loss(logits, *map(batch.get, TARGETS)).item() * len(logits)
        right += (logits.argmax(-1) == batch["labels"]).sum().item()
    if not math.isfinite(total + val_total):
        raise Problem(f"the loss is not a number any more in epoch {epoch}. Lower LEARNING_RATE (now "
                      f"{trainer.args.learning_rate}). What was saved before is still there.")
    texts = len(trainer.eval_dataset)
    return {"epoch": epoch, "train_loss": total / len(trainer.train_dataset), "val_loss": val_total / texts,
            "val_accuracy": right / texts, "learning_rate": rate, "seconds": seconds}

def judge(trainer, row):
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


# ── Plot, report, save ──────────────────────────────────────────────────────────────────────────────────

def plot(history, best, path):
    """Train and val loss per epoch; colours (Okabe and Ito's) and line styles that colour-blind people can tell."""
    figure = Figure(figsize=(7, 4.2), layout="constrained")
    axes = figure.subplots()
    for name, style, colour in ("train_loss", "o--", "#0072B2"), ("val_loss", "s-", "#D55E00"):
        axes.plot([row["epoch"] for row in history], [row[name] for row in history], style, color=colour,
                  label=name.replace("_", " "))
    axes.plot(best["epoch"], best["val_loss"], "*k", markersize=16, label=f"best: epoch {best['epoch']}")
    axes.set(xlabel="epoch", ylabel=f"loss = {ALPHA:g} KL + {1 - ALPHA:g} CE, T = {TEMPERATURE:g}")
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=150)

def score(predicted, labels, teacher_predicted, seconds):
    """Figures of one model on one split; the first three are label numbers, (n,), the last is inference time."""
    f1 = [2 * ((predicted == c) & (labels == c)).sum() / ((predicted == c).sum() + (labels == c).sum())
          for c in torch.cat([predicted, labels]).unique()]
    share = lambda hits: hits.double().mean().item()
    return {"examples": len(labels), "accuracy": share(predicted == labels), "macro_f1": share(torch.stack(f1)),
            "agreement": share(predicted == teacher_predicted), "seconds": seconds,
            "texts_per_second": len(labels) / max(seconds, 1e-9)}

def evaluate(trainer, data, teacher_seconds):
    """Accuracy and time per split: {"teacher": {split: figures}, "student": …}. The student sees each split once."""
    splits = {"teacher": {}, "student": {}}
    next(predict(trainer.model, trainer.get_test_dataloader(data["test"])))  # warm-up
    for split, rows in data.items():
        batches, logits, seconds = zip(*predict(trainer.model, trainer.get_test_dataloader(rows)))
        labels, soft = (torch.cat([batch[name] for batch in batches]) for name in TARGETS)
        splits["teacher"][split] = score(soft.argmax(-1), labels, soft.argmax(-1), teacher_seconds[split])
        splits["student"][split] = score(torch.cat(logits).argmax(-1), labels, soft.argmax(-1), sum(seconds))
    return splits

def hardware():
    """The processor's name, and how many threads torch uses."""
    ask = {"Darwin": "sysctl -n machdep.cpu.brand_string", "Linux": "grep -m1 'model name' /proc/cpuinfo"}
    name = os.popen(ask.get(platform.system(), "")).read().split(":")[-1].strip() or platform.machine()
    return f"{name}, {torch.get_num_threads()} threads"

def public(value):
    """A setting as others may see it: of a path to elsewhere only the last name."""
    return Path(value).name if isinstance(value, str) and value.startswith(("~", "..", os.sep)) else value

def table(report):
    """The report as text."""
    lines = [f"{'':<8} {'split':<6}{'accuracy':>9}{'macro F1':>10}{'agreement':>11}{'seconds':>9}{'texts/s':>9}"]
    for role in ("teacher", "student"):
        lines += [f"{role:<8} {split:<6}{one['accuracy']:>9.4f}{one['macro_f1']:>10.4f}{one['agreement']:>11.4f}"
                  f"{one['seconds']:>9.2f}{one['texts_per_second']:>9,.0f}"
                  for split, one in report[role]["splits"].items()]
    sizes = [f"{role} {report[role]['parameters']:,} parameters, {report[role]['bytes'] / 1e6:.1f} MB"
             for role in ("teacher", "student")]
    return "\n".join([*lines, "; ".join(sizes), f"On test the student keeps {report['kept']:.1%} of the teacher's "
                      f"accuracy and is {report['speedup']:.1f} times as fast",
                      f"(without tokenization; {report['hardware']})."])

CARD = """---
language: ja
pipeline_tag: text-classification
library_name: transformers
---
# A BERT classifier of {NUM_LAYERS} layer(s), distilled

Distilled from `{teacher}` on `{DATA}` by distill.py, ALPHA {ALPHA}, TEMPERATURE {TEMPERATURE}; more is in report.json.
It shares its teacher's faults: measure it on texts of your own before you rely on it.

```python
from transformers import pipeline
print(pipeline("text-classification", model="path/to/this/folder")("この店の料理は美味しい。"))
```

```
{table}
```
"""

def save_results(trainer, teacher, teacher_name, tokenizer, splits, history, seconds):
    """Write OUTPUT with all that belongs to it. Returns the report; what its keys mean stands in README.md."""
    test, best = {role: splits[role]["test"] for role in splits}, min(history, key=lambda row: row["val_loss"])
    folder = teacher_name if os.path.isdir(teacher_name) else \
        huggingface_hub.snapshot_download(teacher_name, local_files_only=True)
    files = lambda folder, pattern: list(Path(folder).glob(pattern))
    size = lambda folder: sum(file.stat().st_size for file in files(folder, "model*.safetensors")
                              or files(folder, "pytorch_model*.bin"))
    report = {
        "teacher": {"parameters": count(teacher), "bytes": size(folder), "splits": splits["teacher"]},
        "student": {"parameters": count(trainer.model), "bytes": None, "splits": splits["student"]},
        "kept": test["student"]["accuracy"] / max(test["teacher"]["accuracy"], 1e-9),
        "speedup": test["teacher"]["seconds"] / max(test["student"]["seconds"], 1e-9),
        "epochs": len(history), "best_epoch": best["epoch"], "seconds": seconds,
        "settings": {name: public(globals()[name]) for name in ACCEPTED},
        "versions": {"python": platform.python_version(),
                     **{module.__name__: module.__version__ for module in (torch, transformers, datasets)}},
        "hardware": hardware(),
    }

    def more(new):
        report["student"]["bytes"] = size(new)
        card = CARD.format(**report["settings"], teacher=public(teacher_name), table=table(report))
        lines = [",".join(map(str, row)) for row in (best, *(row.values() for row in history))]
        (new / "README.md").write_text(card, "utf-8")
        (new / "report.json").write_text(json.dumps(report, indent=2, ensure_ascii=False) + "\n", "utf-8")
        (new / "history.csv").write_text("\n".join(lines) + "\n", "utf-8")
        plot(history, best, new / "loss.png")

    save_folder(OUTPUT, trainer.model, tokenizer, more)
    return report


# ── Main ────────────────────────────────────────────────────────────────────────────────────────────────

def run():
    """The whole run, as the settings say. Returns the report."""
    seconds, laps = {}, [time.perf_counter()]
    lap = lambda stage: laps.append(time.perf_counter()) or seconds.update({stage: laps[-1] - laps[-2]})
    shutil.rmtree(Path(CACHE, "tmp"), ignore_errors=True)
    if os.path.exists(f"{OUTPUT}.distill_old") and not os.path.exists(OUTPUT):  # killed inside save_folder
        os.rename(f"{OUTPUT}.distill_old", OUTPUT)

    name, recipe = find_teacher()
    config = load_config(recipe[0], "TEACHER_BASE") if recipe else load_config(name)
    tokenizer = load_tokenizer(TOKENIZER or config.name_or_path, config)
    collate_fn = functools.partial(collate, pad_token_id=tokenizer.pad_token_id)
    data, label2id = load_data(None if recipe else config.label2id)
    data = tokenize(data, tokenizer)
    lap("data")

    if recipe:
        make_teacher(name, recipe, config, tokenizer, label2id, data, collate_fn)
        lap("making the teacher")
    teacher = load_teacher(name)
    data, teacher_seconds = add_soft_labels(data, teacher, collate_fn)
    lap("soft labels")

    student = build_student(teacher)
    print(student)
    say("student", f"{count(student):,} parameters on {student.device}; the teacher has {count(teacher):,}")
    trainer = make_trainer(student, data, collate_fn, EPOCHS, LEARNING_RATE, PATIENCE)
    history = train(trainer, Path(CACHE, "checkpoint.pt"))
    lap("training")

    splits = evaluate(trainer, data, teacher_seconds)
    lap("evaluation")
    report = save_results(trainer, teacher, name, tokenizer, splits, history, seconds)
    shutil.rmtree(Path(CACHE, "tmp"), ignore_errors=True)
    print(table(report))
    say("seconds", ", ".join(f"{stage} {value:.1f}" for stage, value in seconds.items()))
    say("saved", f"{OUTPUT}: the student, loss.png, history.csv, report.json")
    return report

def main(argv=None):
    """The command: exit status 0 if a student was saved; else 1 and one message that says what to do."""
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    datasets.logging.set_verbosity_error()
    datasets.disable_progress_bars()
    try:
        read_command_line(argv)
        check_settings()
        run()
    except Problem as problem:
        sys.exit(f"distill.py: {problem}")
    except KeyboardInterrupt:
        sys.exit("distill.py: stopped by Ctrl-C; the same command goes on from here")


# ── Option: a teacher that is still to be made ──────────────────────────────────────────────────────────

def find_teacher():
    """(name, recipe): the teacher's folder or hub name; how to make it if it is not there yet, else None."""
    if os.path.exists(TEACHER):
        return TEACHER, None
    if TEACHER_BASE is not None:
        say("teacher", f"no {TEACHER} yet: {TEACHER_BASE} is fine-tuned into it")
        return TEACHER, (TEACHER_BASE, TEACHER_EPOCHS, TEACHER_LEARNING_RATE, PATIENCE)
    if DATA == "tests/sample":
        name = os.path.join(CACHE, "sample_teacher")  # never TEACHER: it must not be mistaken for the user's
        made = os.path.isdir(name)
        say("teacher", f"no {TEACHER} here, and DATA is the sample: a small sample teacher stands in"
            + (" (made before)" if made else ", and is trained first (about a minute)"))
        return name, None if made else (str(Path(__file__).resolve().parent / DATA / "base"), 6, 1e-3, 6)
    return TEACHER, None  # a hub name, or missing: load_config will tell

def make_teacher(name, recipe, config, tokenizer, label2id, data, collate_fn):
    """Fine-tune the base model on the hard labels, with the loop of the student, and save it as `name`."""
    base, *how = recipe
    config.label2id, config.id2label = label2id, {number: label for label, number in label2id.items()}
    transformers.set_seed(SEED)
    if DATA == "tests/sample" and TEACHER_BASE is None:  # the sample's base is a configuration without weights
        model = BertForSequenceClassification(config)
    else:
        with explain(f"TEACHER_BASE = {base!r}: cannot be loaded", "Name a pretrained BERT (without a classifier, or "
                     "with one for as many labels as the data has)"):
            model = BertForSequenceClassification.from_pretrained(base, config=config, dtype=torch.float32)
    checkpoint = Path(CACHE, "teacher_checkpoint.pt")
    train(make_trainer(model, data, collate_fn, *how), checkpoint, use_what_is_there=False)
    save_folder(name, model, tokenizer)
    checkpoint.unlink()

if __name__ == "__main__":
    main()
