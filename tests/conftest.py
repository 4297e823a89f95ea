"""Small teachers and data made on the spot, and the script run in this process with its settings put back after."""

import csv
import json
import os
import sys
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"  # models as small as these only wait for a second thread

import hypothesis
import pytest
import torch
from transformers import AutoTokenizer, BertConfig, BertForMaskedLM, BertForSequenceClassification

ROOT = Path(__file__).resolve().parents[1]
SAMPLE = ROOT / "tests" / "sample"
sys.path.insert(0, str(ROOT))

import distill  # noqa: E402

CHECKS = [hypothesis.HealthCheck.function_scoped_fixture, hypothesis.HealthCheck.too_slow, hypothesis.HealthCheck.data_too_large,
          hypothesis.HealthCheck.filter_too_much]
for profile, examples in ("short", 25), ("long", 500):  # python -m pytest --hypothesis-profile=long
    hypothesis.settings.register_profile(profile, max_examples=examples, derandomize=profile == "short", deadline=None,
                                         database=None, suppress_health_check=CHECKS)
hypothesis.settings.load_profile("short")

VOCABULARY = len((SAMPLE / "base" / "vocab.txt").read_text("utf-8").splitlines())


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
    """A random BertForSequenceClassification over the sample's vocabulary; large random weights and biases."""
    torch.manual_seed(seed)
    config = dict(vocab_size=VOCABULARY, hidden_size=32, num_hidden_layers=3, num_attention_heads=2, intermediate_size=64,
                  max_position_embeddings=64, num_labels=len(labels), id2label=dict(enumerate(labels)),
                  label2id={label: number for number, label in enumerate(labels)}, initializer_range=0.2)
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


def save_generator(folder):
    """A random masked-language model over the sample's vocabulary."""
    torch.manual_seed(0)
    BertForMaskedLM(BertConfig(vocab_size=VOCABULARY, hidden_size=24, num_hidden_layers=1, num_attention_heads=2,
                               intermediate_size=32, max_position_embeddings=64)).save_pretrained(folder)
    AutoTokenizer.from_pretrained(SAMPLE / "base").save_pretrained(folder)


@pytest.fixture(autouse=True)
def settings(monkeypatch, tmp_path):
    """Every test works in a folder of its own; what it changes of the settings is put back."""
    for name in distill.ACCEPTED:
        monkeypatch.setattr(distill, name, getattr(distill, name))
    monkeypatch.chdir(tmp_path)
    return monkeypatch


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


DEFAULTS = {name: getattr(distill, name) for name in distill.ACCEPTED}


def command(*more):
    """main() as in a process of its own: from the settings as they stand in the file."""
    for name, value in DEFAULTS.items():
        setattr(distill, name, value)
    distill.main([*TINY, *more])


TINY = ["--data", "data", "--max-length", "32", "--epochs", "3", "--batch-size", "8", "--warmup-steps", "2"]


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


def training_step(trainer, batch):
    """One step of the epoch loop on a batch of one's own; returns the loss."""
    loss = trainer.compute_loss(trainer.model, batch)
    trainer.accelerator.backward(loss)
    distill.clip_gradients(trainer.model, trainer.args.max_grad_norm)
    trainer.optimizer.step()
    trainer.optimizer.zero_grad()
    return loss.item()


def report(folder="distilled_model"):
    return json.loads(Path(folder, "report.json").read_text("utf-8"))


def history(folder="distilled_model"):
    """history.csv without the column of the seconds."""
    lines = Path(folder, "history.csv").read_text("utf-8").splitlines()
    return [line.rsplit(",", 1)[0] for line in lines]
