"""Token ids: those of the stock tokenizer, in less time."""

import importlib.util
import pickle
import re
from pathlib import Path

import datasets
import pytest
import transformers
from conftest import ODD_TEXTS, SAMPLE, load_splits, notes, rows, tiny_model, write_csv
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from transformers import (
    AutoTokenizer,
)

import distill


@pytest.fixture(scope="module")
def japanese():
    return AutoTokenizer.from_pretrained(SAMPLE / "base")


def same(tokenizer, texts, max_length, pairs=None):
    """Ids, token types and number of cut texts are those of the stock tokenizer.

    Its own ids are returned.
    """
    tokenizer.model_input_names = ["input_ids", "attention_mask", "token_type_ids"]
    columns = distill.encode([texts] + ([pairs] if pairs else []), tokenizer, max_length)
    expected = tokenizer(
        texts, pairs, truncation=True, max_length=max_length, return_token_type_ids=True
    )
    assert columns["input_ids"] == expected["input_ids"]
    assert not pairs or columns["token_type_ids"] == expected["token_type_ids"]
    lengths = [len(ids) for ids in tokenizer(texts, pairs, verbose=False)["input_ids"]]
    assert columns["truncated"] == [length > max_length for length in lengths]
    assert columns["length"] == list(map(len, columns["input_ids"]))
    return columns["input_ids"]


# ── encode ──


def test_encode_equals_stock_tokenizer(japanese):
    texts = ODD_TEXTS + [text for split in ("train", "val", "test") for text, _ in rows(split, 150)]
    for max_length in 512, 16, 4:
        same(japanese, texts, max_length)
    assert max(map(len, same(japanese, texts, 512))) > 200


@pytest.mark.parametrize("max_length", [512, 24, 5])
def test_encode_equals_stock_for_pairs(japanese, max_length):
    same(japanese, ODD_TEXTS, max_length, ODD_TEXTS[::-1])
    same(japanese, ODD_TEXTS, max_length, ["部屋は広い"] * len(ODD_TEXTS))


@given(st.text(max_size=80))
@hypothesis_settings(max_examples=200, deadline=None, derandomize=True)
def test_encode_equals_stock_for_any_text(japanese, text):
    same(japanese, [text], 32)


@pytest.mark.parametrize(
    "options",
    [
        {"word_tokenizer_type": "basic"},
        {"subword_tokenizer_type": "character"},
        {"do_lower_case": True},
        {"do_word_tokenize": False},
        {"do_subword_tokenize": False},
        {"truncation_side": "left"},
        {"additional_special_tokens": ["<料理>"]},
    ],
)
def test_encode_equals_stock_for_other_japanese_tokenizers(options):
    tokenizer = AutoTokenizer.from_pretrained(SAMPLE / "base", **options)
    texts = ODD_TEXTS + ["<料理>が美味しい", "ABC Abc", *(text for text, _ in rows("test", 50))]
    same(tokenizer, texts, 12)
    same(tokenizer, texts, 12, texts[::-1])


def test_encode_equals_stock_for_fast_tokenizer(japanese):
    japanese.save_pretrained("vocabulary")
    tokenizer = transformers.BertTokenizerFast(vocab="vocabulary/vocab.txt")
    texts = ["hello world", "部屋は広い", "a " * 50]
    same(tokenizer, texts, 16)
    same(tokenizer, texts, 16, texts[::-1])


# ── tokenize ──


def test_tokenize_with_more_processes_gives_same_rows(teacher, data, settings, monkeypatch):
    """Many texts are tokenized by several processes; here from 20 on."""
    settings.setattr(distill, "DATA", "data")
    tokenizer = AutoTokenizer.from_pretrained(teacher)
    Path(distill.CACHE).mkdir()
    one = distill.tokenize(distill.load_data(["negative", "positive"])[0], tokenizer)
    monkeypatch.setattr(distill, "TEXTS_PER_PROCESS", 20)
    monkeypatch.setattr(distill.os, "cpu_count", lambda: 2)
    two = distill.tokenize(distill.load_data(["negative", "positive"])[0], tokenizer)
    assert {split: table.to_dict() for split, table in one.items()} == {
        split: table.to_dict() for split, table in two.items()
    }


def test_encode_batch_depends_on_no_setting(teacher, settings):
    """On a Mac another process imports distill.py anew, and has the settings at its top."""
    settings.setattr(distill, "MAX_LENGTH", 8)
    settings.setattr(distill, "TEXT_COLUMN", "sentence")
    seen = []
    settings.setattr(distill, "map_on_disk", lambda rows, *_, **options: seen.append(options))
    settings.setattr(distill, "log_tokens", lambda *_: None)
    settings.setattr(distill, "log_shared_texts", lambda *_: None)
    tokenizer = AutoTokenizer.from_pretrained(teacher)
    texts = {"sentence": [text for text, _ in rows("train", 20)]}
    distill.tokenize({"train": datasets.Dataset.from_dict(texts)}, tokenizer)
    arguments = pickle.loads(pickle.dumps(seen[0]["fn_kwargs"]))
    spec = importlib.util.spec_from_file_location("imported_anew", distill.__file__)
    anew = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(anew)
    assert anew.MAX_LENGTH == 128
    columns = anew.encode_batch(texts, **arguments)
    assert max(columns["length"]) == 8
    assert columns == distill.encode_batch(texts, **seen[0]["fn_kwargs"])


def test_tokenize_reads_pairs_in_columns_of_other_names(settings, teacher):
    Path("data").mkdir()
    for split in "train", "val", "test":
        write_csv(
            Path("data", f"{split}.csv"),
            [("部屋は広い", "風呂は狭い", "negative", "x")],
            ("文1", "文2", "評価", "memo"),
        )
    tokenizer = AutoTokenizer.from_pretrained(teacher)
    distill.fit_to_model(tokenizer, tiny_model().config)
    table = load_splits(settings, TEXT_COLUMN="文1", TEXT_PAIR_COLUMN="文2", LABEL_COLUMN="評価")
    for max_length in 64, 6:
        settings.setattr(distill, "MAX_LENGTH", max_length)
        row = distill.tokenize(dict(table), tokenizer)["train"][0]
        expected = tokenizer(
            "部屋は広い",
            "風呂は狭い",
            truncation=True,
            max_length=max_length,
            return_token_type_ids=True,
        )
        assert (row["input_ids"], row["token_type_ids"]) == (
            expected["input_ids"],
            expected["token_type_ids"],
        )
        assert 1 in row["token_type_ids"] and row["labels"] == 0


def test_tokenize_truncates_like_stock_and_counts(data, settings, capsys, teacher):
    tokenizer = AutoTokenizer.from_pretrained(teacher)
    settings.setattr(distill, "MAX_LENGTH", 16)
    table = distill.tokenize(load_splits(settings), tokenizer)
    texts = [text for split in table for text, _ in rows(split, len(table[split]))]
    ids = [one for split in table.values() for one in split["input_ids"]]
    assert ids == tokenizer(texts, truncation=True, max_length=16)["input_ids"]
    long = sum(len(one) > 16 for one in tokenizer(texts)["input_ids"])
    assert (
        0 < long < len(texts)
        and f"{long} of {len(texts)} texts cut to MAX_LENGTH = 16" in capsys.readouterr().out
    )


def test_log_shared_texts_counts_texts_of_two_splits(data, settings, capsys, teacher):
    write_csv(data / "test.csv", rows("test", 4) + rows("train", 3))
    distill.tokenize(load_splits(settings), AutoTokenizer.from_pretrained(teacher))
    printed = capsys.readouterr().out
    assert "3 of 7 texts of test also occur in train" in printed and "scores on val" not in printed


def test_log_tokens_reports_unknown_tokens(teacher, data, run):
    assert "vocabulary" not in notes(run("--epochs", "2"))
    write_csv(data / "val.csv", [(f"囁嚶{text}", label) for text, label in rows("val", 16)])
    assert " of val. Are these texts of the teacher's language" in notes(run("--epochs", "2"))
    assert "% of train" not in notes(run("--epochs", "2"))


class SpacedWords:
    """A word tokenizer that keeps white space, as a user dictionary or another tool may."""

    def tokenize(self, text, **options):
        return [part for part in re.split("( |と)", text) if part]


@pytest.mark.parametrize("subwords", ["wordpiece", "character"])
def test_make_encoder_of_words_with_white_space_equals_stock(subwords):
    tokenizer = AutoTokenizer.from_pretrained(SAMPLE / "base", subword_tokenizer_type=subwords)
    tokenizer.word_tokenizer = SpacedWords()
    for text in "良い と 悪い", " 店 ", "料理と店", "  ":
        expected = tokenizer(text)["input_ids"]
        assert distill.encode([[text]], tokenizer, 64)["input_ids"] == [expected]


def test_token_budget_batches_takes_rows_without_tokens(monkeypatch):
    monkeypatch.setattr(distill, "TOKENS_PER_BATCH", 6)
    batches = [batch.tolist() for batch in distill.token_budget_batches([0, 3, 0, 5])]
    assert sorted(sum(batches, [])) == [0, 1, 2, 3]
    assert list(distill.token_budget_batches([0, 0]))


def test_encode_truncates_fast_tokenizer_as_stock_and_leaves_it_alone(rust):
    texts = ["the film is " * n for n in range(12)] + [""]
    expected = rust(texts, truncation=True, max_length=16)["input_ids"]
    lengths = [len(ids) for ids in rust(texts)["input_ids"]]
    columns = distill.encode([texts], rust, 16)
    assert columns["input_ids"] == expected
    assert columns["truncated"] == [length > 16 for length in lengths]
    state = str(rust._tokenizer.truncation)
    distill.encode([texts[:3]], rust, 16)
    assert str(rust._tokenizer.truncation) == state
