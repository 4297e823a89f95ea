"""Small teachers and data made on the spot; the script run in this process, its settings put back.

python -m pytest tests --hypothesis-profile=long  tries 500 inputs of each property test, not 25.
"""

import csv
import functools
import gc
import importlib.util
import json
import os
import re
import sys
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"  # models as small as these only wait for a second thread

import hypothesis
import numpy as np
import pytest
import torch
from hypothesis import strategies as st
from transformers import (
    AutoConfig,
    AutoTokenizer,
    BertConfig,
    BertForMaskedLM,
    BertForSequenceClassification,
    BertTokenizerFast,
    PreTrainedTokenizerFast,
)

ROOT = Path(__file__).resolve().parents[1]
SAMPLE = ROOT / "tests" / "sample"
sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "tools")]

import distill  # noqa: E402

# What is imported stays, so that the garbage collector need not look at it again and again. (At
# its own threshold, of some hundred new objects, it would take an eighth of a run.)
gc.collect()
gc.freeze()
gc.set_threshold(100_000)

CHECKS = [
    hypothesis.HealthCheck.function_scoped_fixture,
    hypothesis.HealthCheck.too_slow,
    hypothesis.HealthCheck.data_too_large,
    hypothesis.HealthCheck.filter_too_much,
]
for profile, examples in ("short", 25), ("long", 500):  # python -m pytest --hypothesis-profile=long
    hypothesis.settings.register_profile(
        profile,
        max_examples=examples,
        derandomize=profile == "short",
        deadline=None,
        database=None,
        suppress_health_check=CHECKS,
    )
hypothesis.settings.load_profile("short")


VOCABULARY = len((SAMPLE / "base" / "vocab.txt").read_text("utf-8").splitlines())
LABELS = ("negative", "positive")
MODEL = Path("distilled_model/model.safetensors")
FastBert = distill.fast_class(BertForSequenceClassification)
DEFAULTS = {name: getattr(distill, name) for name in distill.ACCEPTED}
SAVE_FIGURE = distill.Figure.savefig
TINY = "--data data --max-length 32 --epochs 3 --batch-size 8 --warmup-steps 2 --augment 0".split()


# ── Data and models ──


def rows(split, n):
    """The first n (text, label) of a split of the sample."""
    with open(SAMPLE / f"{split}.csv", encoding="utf-8", newline="") as file:
        return [(row["text"], row["label"]) for row in csv.DictReader(file)][:n]


def write_csv(path, table, header=("text", "label"), **options):
    """Write rows as a CSV file; returns its path."""
    with open(path, "w", encoding=options.pop("encoding", "utf-8"), newline="") as file:
        csv.writer(file, **options).writerows([header, *table])
    return path


def tiny_model(labels=("negative", "positive"), seed=0, **changes):
    """A random BertForSequenceClassification over the sample's vocabulary.

    Its random weights and biases are large.
    """
    torch.manual_seed(seed)
    config = dict(
        vocab_size=VOCABULARY,
        hidden_size=32,
        num_hidden_layers=3,
        num_attention_heads=2,
        intermediate_size=64,
        max_position_embeddings=64,
        num_labels=len(labels),
        id2label=dict(enumerate(labels)),
        label2id={label: number for number, label in enumerate(labels)},
        initializer_range=0.2,
    )
    model = BertForSequenceClassification(BertConfig(**config | changes))
    for name, tensor in model.named_parameters():
        if "bias" in name:
            torch.nn.init.normal_(tensor, std=0.1)
    return model


def save_model(folder, tokenizer=True, **changes):
    tiny_model(**changes).save_pretrained(folder)
    if tokenizer:
        AutoTokenizer.from_pretrained(SAMPLE / "base").save_pretrained(folder)
    return folder


def family_model(family, seed=0, **changes):
    """A small random classifier of a family, over the sample's vocabulary, without dropout."""
    torch.manual_seed(seed)
    sizes = dict(
        vocab_size=VOCABULARY,
        num_labels=2,
        id2label={0: "negative", 1: "positive"},
        label2id={"negative": 0, "positive": 1},
        pad_token_id=0,
        initializer_range=0.2,
        init_std=0.2,
    )
    for name in "hidden_size", "embedding_size", "dim", "d_model":
        sizes[name] = 32
    for name in "intermediate_size", "hidden_dim", "encoder_ffn_dim", "decoder_ffn_dim":
        sizes[name] = 64
    for name in (
        "num_attention_heads",
        "n_heads",
        "encoder_attention_heads",
        "decoder_attention_heads",
    ):
        sizes[name] = 2
    for name in "num_hidden_layers", "encoder_layers", "decoder_layers":
        sizes[name] = 3
    for name in (
        "dropout",
        "attention_dropout",
        "hidden_dropout_prob",
        "attention_probs_dropout_prob",
        "seq_classif_dropout",
    ):
        sizes[name] = 0.0
    sizes["entity_vocab_size"] = 9  # LUKE's
    if family == "bart":
        sizes |= dict(
            eos_token_id=3, bos_token_id=2, decoder_start_token_id=3, forced_eos_token_id=None
        )
    if family == "modernbert":
        sizes |= dict(cls_token_id=2, sep_token_id=3, bos_token_id=2, eos_token_id=3)
    known = AutoConfig.for_model(family)
    sizes = {name: value for name, value in sizes.items() if hasattr(known, name)}
    config = AutoConfig.for_model(family, **sizes | changes)
    return distill.classifier_class(config)(config)


def save_family(folder, family, **changes):
    family_model(family, **changes).save_pretrained(folder)
    if family == "modernbert":  # for which transformers loads Rust tokenizers only
        names = {
            f"{name}_token": f"[{name.upper()}]" for name in ("unk", "sep", "pad", "cls", "mask")
        }
        rust = BertTokenizerFast(vocab=str(SAMPLE / "base" / "vocab.txt"))
        PreTrainedTokenizerFast(tokenizer_object=rust.backend_tokenizer, **names).save_pretrained(
            folder
        )
    else:
        AutoTokenizer.from_pretrained(SAMPLE / "base").save_pretrained(folder)
    return Path(folder)


def save_generator(folder):
    """A random masked-language model over the sample's vocabulary."""
    torch.manual_seed(0)
    BertForMaskedLM(
        BertConfig(
            vocab_size=VOCABULARY,
            hidden_size=24,
            num_hidden_layers=1,
            num_attention_heads=2,
            intermediate_size=32,
            max_position_embeddings=64,
        )
    ).save_pretrained(folder)
    AutoTokenizer.from_pretrained(SAMPLE / "base").save_pretrained(folder)


def load_splits(settings, **changes):
    for name, value in {"DATA": "data", **changes}.items():
        settings.setattr(distill, name, value)
    Path(distill.CACHE).mkdir(exist_ok=True)
    return distill.load_data(["negative", "positive"])[0]


@pytest.fixture
def rust():
    """An English tokenizer in Rust, as SST-2's teachers have."""
    words = [
        "[PAD]",
        "[UNK]",
        "[CLS]",
        "[SEP]",
        "[MASK]",
        *"the film is not a good one , n ' t .".split(),
        "##s",
        "film2",
    ]
    Path("vocab.txt").write_text("\n".join(dict.fromkeys(words)), "utf-8")
    return BertTokenizerFast("vocab.txt")


def edit_json(path, **changes):
    """Change a JSON file; None takes a key away."""
    content = json.loads(Path(path).read_text("utf-8")) | changes
    Path(path).write_text(
        json.dumps({name: value for name, value in content.items() if value is not None}), "utf-8"
    )


# ── Fixtures: a folder of its own for each test, a teacher, data ──


@pytest.fixture(autouse=True)
def settings(monkeypatch, tmp_path):
    """Every test works in a folder of its own; what it changes of the settings is put back."""
    for name in distill.ACCEPTED:
        monkeypatch.setattr(distill, name, getattr(distill, name))
    monkeypatch.chdir(tmp_path)
    # drawing takes two fifths of the time of such a small run
    monkeypatch.setattr(distill.Figure, "savefig", lambda figure, path, **more: Path(path).touch())
    return monkeypatch


@pytest.fixture
def draws(settings):
    """A test that asks for this has its plots drawn."""
    settings.setattr(distill.Figure, "savefig", SAVE_FIGURE)


@pytest.fixture
def teacher():
    return save_model(Path("finetuned_bert_japanese"))


@pytest.fixture
def data():
    folder = Path("data")
    folder.mkdir()
    for split, n in ("train", 48), ("val", 16), ("test", 16):
        write_csv(folder / f"{split}.csv", rows(split, n))
    return folder


# ── Runs ──


def command(*more):
    """main() as in a process of its own: from the settings as they stand in the file."""
    for name, value in DEFAULTS.items():
        setattr(distill, name, value)
    distill.main([*TINY, *more])


@pytest.fixture
def run(capsys):
    """Run the command with TINY settings and `more`; returns what it printed."""

    def run(*more):
        command(*more)
        return capsys.readouterr().out

    return run


@pytest.fixture
def fails(capsys):
    """Run the command, which must end with exit status 1 and one message; returns the message."""

    def fails(*more):
        with pytest.raises(SystemExit) as exit:
            command(*more)
        assert isinstance(exit.value.code, str) and exit.value.code.startswith("distill.py: ")
        assert "Traceback" not in capsys.readouterr().err
        return exit.value.code

    return fails


def script(*more):
    return [sys.executable, str(ROOT / "distill.py"), *TINY, *more]


def in_child(function):
    """Call a function in a copy of this process; returns its exit status (-9: killed).

    A process of its own would first import for some ten seconds.
    """
    child = os.fork()
    if child == 0:
        status = 1
        try:
            function()
            status = 0
        finally:
            os._exit(status)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


@functools.lru_cache(maxsize=8)
def compiled(source):
    return compile(source, "edited.py", "exec")


def load_edited(*changes):
    """distill.py with some of its text replaced, as a module of its own."""
    source = (ROOT / "distill.py").read_text("utf-8")
    for old, new in changes:
        assert source.count(old) == 1, old
        source = source.replace(old, new)
    Path("edited.py").write_text(source, "utf-8")
    spec = importlib.util.spec_from_file_location("edited", "edited.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules["edited"] = module  # where its classes are looked up
    exec(compiled(source), vars(module))
    return module


def stand_in(monkeypatch, name, function):
    """Replace a function of distill as if the file had defined it: run ids stay the same."""
    stock, stock_content = getattr(distill, name), distill.content_of

    def content_of(value, ignored):
        replaced = {id(function): stock, id(content_of): stock_content}
        return stock_content(replaced.get(id(value), value), ignored)

    monkeypatch.setattr(distill, "content_of", content_of)
    monkeypatch.setattr(distill, name, function)


def interrupt_in(monkeypatch, epoch, error):
    """From now on the given epoch of training breaks off with `error`, once."""
    train_epoch = distill.train_epoch

    def broken(trainer, number):
        if number == epoch:
            stand_in(monkeypatch, "train_epoch", train_epoch)
            train_epoch(trainer, number)  # the weights have moved on
            raise error
        return train_epoch(trainer, number)

    stand_in(monkeypatch, "train_epoch", broken)


def answer_with(monkeypatch, answer):
    """The teacher answers each text with the label answer(text, label)."""
    known = {text: label for split in distill.SPLITS for text, label in rows(split, 48)}
    add_soft_labels = distill.add_soft_labels

    def add(data, *more):
        def change(batch):
            texts = [
                "".join(tokens)
                for tokens in map(tokenizer.convert_ids_to_tokens, batch["input_ids"])
            ]
            found = [
                answer(known.get(text.removeprefix("[CLS]").removesuffix("[SEP]"), "negative"))
                for text in texts
            ]
            soft_labels = [[0.9, 0.1] if label == "negative" else [0.1, 0.9] for label in found]
            return {"soft_labels": soft_labels, "teacher_logits": np.log(soft_labels)}

        return {
            split: table.map(change, batched=True)
            for split, table in add_soft_labels(data, *more).items()
        }

    tokenizer = distill.transformers.AutoTokenizer.from_pretrained("finetuned_bert_japanese")
    monkeypatch.setattr(distill, "add_soft_labels", add)


def training_step(trainer, batch):
    """One step of the epoch loop on a batch of one's own; returns the loss."""
    loss = trainer.compute_loss(trainer.model, batch)
    trainer.accelerator.backward(loss)
    distill.clip_gradients(trainer.model, trainer.args.max_grad_norm)
    trainer.optimizer.step()
    trainer.optimizer.zero_grad()
    return loss.item()


# ── What a run wrote and said ──


def report(folder="distilled_model"):
    return json.loads(Path(folder, "report.json").read_text("utf-8"))


def history(folder="distilled_model"):
    """history.csv without the column of the seconds."""
    lines = Path(folder, "history.csv").read_text("utf-8").splitlines()
    return [line.rsplit(",", 1)[0] for line in lines]


def notes(printed):
    return "\n".join(line for line in printed.splitlines() if line.startswith("note "))


def labelled(printed):
    return tuple(
        map(int, re.search(r"labelled (\d+) texts; (\d+) were in the cache", printed).groups())
    )


def relative_error(ours, stock, floor=1e-30):
    """The largest difference, relative to the largest value."""
    return ((ours - stock).abs().max() / stock.abs().max().clamp_min(floor)).item()


# ── Strange inputs ──


ODD_TEXTS = [
    "",
    " ",
    "　",
    "\n\t",
    "ＡＢＣ１２３ｶﾞｷﾞ",
    "①㌔㍿",
    "😀👨‍👩‍👧🇯🇵",
    "食べ 物 が  美味しい",
    "あ" * 300,
    "x" * 101,
    "x" * 100,
    "漢" * 99 + "字",
    "[CLS]",
    "これは[MASK]です",
    "[PAD][SEP] [UNK]",
    "[mask]",
    "##です",
    "مرحبا بالعالم",
    "가나다",
    "e\u0301 が",
    "\u200b\ufeff",
    "𠮷野家で𩸽",
    "a_b-c/d@e.f",
    "3.14%",
    "。。。！？",
    "Hello, World!",
    "ﷺ",
    "\u3000前後\u3000",
    "「『【】』」",
    "\x01制御\x7f",
    "ぱ゜か゛",
]


STRANGE = [
    "",
    " ",
    "　\t",
    "\0",
    "雨\0雪",
    "\ud800",
    "雨\udfff雪",
    "שלום",
    "مرحبا",
    "👨‍👩‍👧‍👦",
    "か\u3099",
    "\u202e逆",
    "\ufeff",
    "\u2028",
    "𠮷鱻麤",
    "[CLS]",
    "[MASK][SEP]",
    "##",
    "\x01\x7f\x9f",
    "\ufdfa" * 3000,
    "NA",
    "null",
    "1e400",
    "=1+1",
    "../../etc/passwd",
]
ANY_TEXT = st.one_of(
    st.text(max_size=80),
    st.sampled_from(STRANGE),
    st.text(st.characters(categories=["Lo", "Lm", "Cs", "Cc", "Cf", "So", "Zs"]), max_size=80),
    st.lists(st.sampled_from([*STRANGE, "良い", "悪い。"]), max_size=6).map("".join),
)
ANY_JSON = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), ANY_TEXT),
    lambda inner: st.one_of(
        st.lists(inner, max_size=3), st.dictionaries(ANY_TEXT, inner, max_size=3)
    ),
    max_leaves=4,
)


def outcome(function, *given):
    """What a function returns, or the Problem that it raises, which says something.

    Nothing else may be raised.
    """
    try:
        return function(*given)
    except distill.Problem as problem:
        assert len(str(problem)) > 20 and "Traceback" not in str(problem)
        return problem
