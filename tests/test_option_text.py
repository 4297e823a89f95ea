"""Option: less or more text."""

from pathlib import Path

import numpy as np
import pytest
from conftest import MODEL, SAMPLE, VOCABULARY, history, report, rows, write_csv
from transformers import (
    AutoTokenizer,
    BertConfig,
    BertForMaskedLM,
)

import distill


@pytest.fixture
def japanese():
    return AutoTokenizer.from_pretrained(SAMPLE / "base")


def copies(texts, tokenizer, settings, n=3, mask=0.1, ngram=0.25, seed=42):
    for name, value in (
        ("AUGMENT", n),
        ("AUGMENT_MASK", mask),
        ("AUGMENT_NGRAM", ngram),
        ("SEED", seed),
    ):
        settings.setattr(distill, name, value)
    return distill.augment(
        {"text": texts}, range(len(texts)), distill.make_word_splitter(tokenizer)
    )


TEXTS = [text for text, _ in rows("train", 40)]


# ── TRAIN_FRACTION ──


def test_train_fraction_takes_share_of_each_label(teacher, data, run):
    printed = run("--train-fraction", "0.5")
    assert "train 24 ·" in printed
    counts = [
        sum(label == one for _, label in rows("train", 48)) for one in ("negative", "positive")
    ]
    assert f"train has {round(counts[0] / 2)} negative, {round(counts[1] / 2)} positive" in printed
    first = MODEL.read_bytes()
    assert report()["teacher"]["splits"]["train"]["examples"] == 24
    run("--train-fraction", "0.5")
    assert MODEL.read_bytes() == first
    run("--train-fraction", "0.5", "--seed", "1")
    assert MODEL.read_bytes() != first


def test_train_fraction_refuses_too_small_share(teacher, data, fails):
    assert "TRAIN_FRACTION = 0.001: cannot be taken" in fails("--train-fraction", "0.001")


# ── UNLABELED ──


def test_read_unlabeled_takes_saved_data_sets(teacher, data, run):
    texts = [text for text, _ in rows("train", 70)[50:]]
    parts = {"a": texts[:12], "b": texts[12:]}
    parts = {split: distill.datasets.Dataset.from_dict({"text": t}) for split, t in parts.items()}
    distill.datasets.DatasetDict(parts).save_to_disk("saved")
    assert "48 + 20 unlabeled" in run("--unlabeled", "saved", "--epochs", "1")
    parts["a"].save_to_disk("one")
    assert "48 + 12 unlabeled" in run("--unlabeled", "one", "--epochs", "1")


def test_read_unlabeled_skips_dot_files_and_ignores_case(teacher, data, run):
    Path("more").mkdir()
    texts = [text for text, _ in rows("train", 60)[48:]]
    Path("more/a.txt").write_text("\n".join(texts[:4]), "utf-8")
    Path("more/B.TXT").write_text("\n".join(texts[4:8]), "utf-8")
    Path("more/._a.txt").write_bytes(b"\0\5\26\7" + "雪".encode() + b"\0\2\0\0Mac OS X")
    Path("more/.DS_Store").write_bytes(b"\0\0\0\1Bud1")
    write_csv(Path("more/c.csv"), [(text,) for text in [*texts[8:], " "]], ["text"])
    printed = run("--unlabeled", "more", "--epochs", "2")
    assert (
        "train: 48 + 12 unlabeled" in printed
        and "more: 1 of 13 rows hold no text: left out" in printed
    )


@pytest.mark.parametrize("values", [[1.5, 2.5], [["良", "い"], ["雨"]]])
def test_read_unlabeled_refuses_what_is_no_text(teacher, data, fails, values):
    distill.datasets.Dataset.from_dict({"text": values}).to_parquet("more.parquet")
    message = fails("--unlabeled", "more.parquet")
    assert "'more.parquet': the set: column text holds" in message and "TEXT_COLUMN" in message


def test_read_unlabeled_refuses_file_without_text(teacher, data, fails):
    Path("empty.txt").write_text("\n \n", "utf-8")
    assert "UNLABELED = 'empty.txt': holds no text, only empty lines" in fails(
        "--unlabeled", "empty.txt"
    )


def test_read_unlabeled_reads_csv_texts_over_several_lines(teacher, data, run):
    write_csv(
        "mail.csv", [["御中\nいつも、ありがとう, です\n敬具, 私", "1"], ["雨", "2"]], ["text", "id"]
    )
    assert "train: 48 + 2 unlabeled" in run("--unlabeled", "mail.csv", "--epochs", "1")


def test_load_extra_texts_adds_unlabeled_texts_and_copies(teacher, data, run, settings):
    first = rows("train", 1)[0][0]
    Path("more").mkdir()
    Path("more/a.txt").write_text(
        "\n".join([*(text for text, _ in rows("train", 60)[40:]), first, first, "", " "]), "utf-8"
    )
    write_csv("more/b.csv", [[text] for text, _ in rows("val", 20)], header=["text"])
    out = run("--unlabeled", "more", "--augment", "3")
    assert (
        "train: 48 + 16 unlabeled, which only the teacher labels (26 equal to others left out)"
        in out
    )
    assert "train: 64 + 1" in out and " copies, which only the teacher labels (" in out
    found = report()["student"]["splits"]
    assert [found[split]["examples"] for split in ("train", "val", "test")] == [48, 16, 16]
    again = run("--unlabeled", "more", "--augment", "3")
    assert "labelled 0 texts" in again and "goes on after epoch 3" in again
    lines = history()
    run("--unlabeled", "more/a.txt", "--epochs", "1")
    assert history() != lines


# ── AUGMENT ──


def test_make_word_splitter_words_tokenize_like_their_text(japanese, rust, settings):
    for tokenizer, texts in (
        (japanese, TEXTS),
        (rust, ["the film is n't good .", " a  film, the\tone", "film2 goods", ""]),
    ):
        made = copies(texts, tokenizer, settings, n=1, mask=0, ngram=0)["text"]
        assert (
            distill.encode([made], tokenizer, 32)["input_ids"]
            == distill.encode([texts], tokenizer, 32)["input_ids"]
        )
        masked = copies(texts, tokenizer, settings, n=1, mask=1, ngram=0)["text"]
        assert [len(text) for text in masked] == [len(text) for text in made]
        for ids, text in zip(distill.encode([masked], tokenizer, 512)["input_ids"], masked):
            assert ids == [
                tokenizer.cls_token_id,
                *[tokenizer.mask_token_id] * len(text),
                tokenizer.sep_token_id,
            ]


def test_augment_follows_probabilities_and_seed(japanese, settings):
    made = copies(TEXTS, japanese, settings, n=50)
    assert made["labels"] == [distill.NO_LABEL] * 50 * len(TEXTS)
    words = [word for text in made["text"] for word in text]
    assert np.mean([word is None for word in words]) == pytest.approx(0.1, abs=0.01)
    whole = [len(japanese.word_tokenizer.tokenize(text)) for text in TEXTS for _ in range(50)]
    shorter = [len(text) for text, length in zip(made["text"], whole) if len(text) < length]
    assert (
        set(range(2, 11)) <= set(shorter)
        and max(shorter) == 10
        and len(shorter) / len(whole) == pytest.approx(0.25, abs=0.03)
    )
    assert (
        copies(TEXTS, japanese, settings, n=50)
        == made
        != copies(TEXTS, japanese, settings, n=50, seed=1)
    )
    assert copies(TEXTS[:1], japanese, settings, n=50)["text"] == made["text"][:50]


def test_augment_splits_each_text_once(japanese, settings):
    seen = []
    words = distill.make_word_splitter(japanese)
    settings.setattr(distill, "AUGMENT", 7)
    made = distill.augment(
        {"text": TEXTS}, range(len(TEXTS)), lambda text: seen.append(text) or words(text)
    )["text"]
    settings.setattr(
        japanese.word_tokenizer, "tokenize", lambda *a, **b: pytest.fail("MeCab was asked again")
    )
    distill.encode([made], japanese, 32)
    assert seen == TEXTS


def test_augment_copies_pairs(teacher, run):
    Path("data").mkdir()
    for split, n in ("train", 48), ("val", 16), ("test", 16):
        write_csv(
            f"data/{split}.csv",
            [(text, text[::-1], label) for text, label in rows(split, n)],
            ("text", "second", "label"),
        )
    assert "copies" in run("--text-pair-column", "second", "--augment", "1", "--epochs", "1")
    assert (
        len(distill.load_student("distilled_model")([("部屋は広い", "風呂は狭い"), ("海", "山")]))
        == 2
    )


# ── GENERATOR ──


def test_fill_masks_replaces_every_mask(teacher, data, run, settings):
    config = BertConfig(
        vocab_size=VOCABULARY,
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=1,
        intermediate_size=16,
    )
    BertForMaskedLM(config).save_pretrained("generator")
    AutoTokenizer.from_pretrained(SAMPLE / "base").save_pretrained("generator")
    seen, add_soft_labels = [], distill.add_soft_labels
    settings.setattr(
        distill,
        "add_soft_labels",
        lambda data, *more: seen.append(data["train"]) or add_soft_labels(data, *more),
    )
    for generator in [], ["--generator", "generator"], ["--generator", "generator"]:
        run("--augment", "2", "--augment-mask", "0.5", "--epochs", "1", *generator)
    mask = AutoTokenizer.from_pretrained(SAMPLE / "base").mask_token_id
    masked = [sum(ids.count(mask) for ids in one["input_ids"]) for one in seen]
    assert masked[0] > 100 and masked[1] == 0 and len(seen[1]) > 130
    assert seen[1]["input_ids"][:] == seen[2]["input_ids"][:]


@pytest.mark.parametrize("header", [["text"], ["id", "text"]])
def test_read_unlabeled_refuses_rows_that_a_quote_swallows(settings, header):
    """A quote that opens by mistake takes the texts below with it."""
    Path(distill.CACHE).mkdir(exist_ok=True)
    lines = ["一つ目です。", '"二つ目と', "三つ目と", '四つ目"', "五つ目です。"]
    if len(header) == 2:
        lines = [f"{number},{line}" for number, line in enumerate(lines)]
    Path("more.csv").write_text("\n".join([",".join(header), *lines]), "utf-8")
    settings.setattr(distill, "UNLABELED", "more.csv")
    with pytest.raises(distill.Problem, match="more.csv, line 3: a quote opens here"):
        distill.read_unlabeled()
