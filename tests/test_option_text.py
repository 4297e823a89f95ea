"""Option: less or more text."""

import re
from collections import Counter
from pathlib import Path

import datasets
import numpy as np
import pytest
from conftest import MODEL, SAMPLE, history, report, rows, write_csv
from transformers import (
    AutoTokenizer,
)

import distill


@pytest.fixture
def japanese():
    return AutoTokenizer.from_pretrained(SAMPLE / "base")


def copies(texts, tokenizer, settings, n=3, replace=0, mask=0.1, ngram=0.25, seed=42):
    for name, value in (
        ("AUGMENT_REPLACE", replace),
        ("AUGMENT_MASK", mask),
        ("AUGMENT_NGRAM", ngram),
        ("SEED", seed),
    ):
        settings.setattr(distill, name, value)
    return distill.augment(
        {"text": texts}, range(len(texts)), distill.make_word_splitter(tokenizer), n
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
    assert "UNLABELED = 'empty.txt': holds only empty lines" in fails("--unlabeled", "empty.txt")


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


def test_augment_replaces_words_by_others_of_the_texts(japanese, settings):
    split = japanese.word_tokenizer.tokenize
    made = copies(TEXTS, japanese, settings, n=50, replace=0.3, mask=0, ngram=0)["text"]
    originals = [split(text) for text in TEXTS for _ in range(50)]
    assert [*map(len, made)] == [*map(len, originals)]
    pairs = [pair for copy, words in zip(made, originals) for pair in zip(copy, words)]
    counts = Counter(words for text in TEXTS for words in split(text))
    n_words = counts.total()
    changed = [new for new, old in pairs if new != old]
    by_chance = sum((count / n_words) ** 2 for count in counts.values())  # the same word again
    assert len(changed) / len(pairs) == pytest.approx(0.3 * (1 - by_chance), abs=0.01)
    assert {*changed} <= counts.keys()
    rare, frequent = counts.most_common()[-1], counts.most_common(1)[0]
    assert changed.count(frequent[0]) > 3 * changed.count(rare[0])  # as frequent as in the texts


def test_augment_keeps_white_space_before_a_replaced_word(rust, settings):
    texts = ["the film is not a good one", "it isn't, the film."]
    made = copies(texts, rust, settings, n=50, replace=0.5, mask=0, ngram=0)["text"]
    spaces = [[word != word.lstrip() for word in words] for words in made]
    split = distill.make_word_splitter(rust)
    originals = [[word != word.lstrip() for word in split(text)] for text in texts]
    assert spaces == [one for one in originals for _ in range(50)]
    assert "".join(made[0]) != texts[0]


def test_augment_takes_words_of_all_texts_by_default(teacher, settings):
    """Of 1,001 texts, too, which datasets would cut into 1,000 and one."""
    texts = ["雨"] * 1000 + ["雪"]
    settings.setattr(distill, "AUGMENT_REPLACE", 1.0)
    Path(distill.CACHE).mkdir()
    tokenizer = AutoTokenizer.from_pretrained(teacher)
    made = distill.load_extra_texts(datasets.Dataset.from_dict({"text": texts}), tokenizer)
    assert {word for text in made["copies"][-9:]["text"] for word in text} - {None} == {"雨"}


def test_augment_masks_and_replaces_each_word_of_a_pair_by_itself(japanese, settings):
    settings.setattr(distill, "TEXT_PAIR_COLUMN", "other")
    settings.setattr(distill, "AUGMENT_NGRAM", 0)
    made = distill.augment(
        {"text": TEXTS, "other": TEXTS},
        range(len(TEXTS)),
        distill.make_word_splitter(japanese),
        5,
    )
    assert made["text"] != made["other"] and len(made["text"]) == len(made["other"])


def test_augment_splits_each_text_once(japanese, settings):
    seen = []
    words = distill.make_word_splitter(japanese)
    made = distill.augment(
        {"text": TEXTS}, range(len(TEXTS)), lambda text: seen.append(text) or words(text), 7
    )["text"]
    settings.setattr(
        japanese.word_tokenizer, "tokenize", lambda *a, **b: pytest.fail("MeCab was asked again")
    )
    distill.encode([made], japanese, 32)
    assert seen == TEXTS


@pytest.mark.parametrize(
    "n_texts, expected",
    [(1, 10), (3000, 10), (3001, 9), (6000, 5), (9999, 3), (10_000, 0), (50_000, 0)],
)
def test_n_copies_are_more_for_fewer_texts(japanese, settings, n_texts, expected):
    assert distill.n_copies(n_texts, japanese) == expected
    settings.setattr(distill, "AUGMENT", 3)
    assert distill.n_copies(n_texts, japanese) == 3


@pytest.mark.parametrize(
    "setting, value",
    [("METHOD", "none"), ("METHOD", "mate"), ("ALPHA", 0.0), ("SOFT_LABELS_COLUMN", "soft")],
)
def test_n_copies_are_none_where_they_would_not_be_labelled(japanese, settings, setting, value):
    settings.setattr(distill, setting, value)
    assert distill.n_copies(100, japanese) == 0


def test_n_copies_need_a_mask_token(japanese):
    japanese.mask_token = None
    assert distill.n_copies(100, japanese) == 0


def test_few_texts_get_copies_by_default(teacher, data, run):
    printed = run("--augment", "None", "--epochs", "1")
    n_copies = int(re.search(r"train: 48 \+ (\d+) copies", printed)[1])
    assert 300 < n_copies <= 480
    assert report()["teacher"]["splits"]["train"]["examples"] == 48
    assert report()["settings"]["AUGMENT"] is None


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
