"""Batches: padding, order, and inference by a budget of tokens."""

import math

import numpy as np
import pytest
import torch
import transformers
from conftest import ODD_TEXTS, FastBert, relative_error, report, rows
from transformers import AutoTokenizer

import distill


def test_collate_pads_to_longest_row():
    table = [
        {
            "input_ids": ids,
            "token_type_ids": [0] * (len(ids) - 1) + [1],
            "labels": 1,
            "soft_labels": [0.1, 0.9],
        }
        for ids in ([2, 5, 6, 3], [2, 3])
    ]
    batch = {
        name: tensor.tolist() for name, tensor in distill.collate(table, pad_token_id=7).items()
    }
    assert batch.pop("soft_labels") == pytest.approx(np.array([[0.1, 0.9]] * 2))
    assert batch == {
        "input_ids": [[2, 5, 6, 3], [2, 3, 7, 7]],
        "attention_mask": [[1, 1, 1, 1], [1, 1, 0, 0]],
        "token_type_ids": [[0, 0, 0, 1], [0, 1, 0, 0]],
        "labels": [1, 1],
    }


# ── Word dropout ──

PAIR = [2, 5, 6, 3, 7, 8, 9, 3]  # [CLS] 5 6 [SEP] 7 8 9 [SEP]
SHORT = [2, 10, 3]
EMPTY = [2, 3]


def hidden(share, seed=0):
    torch.manual_seed(seed)
    table = [{"input_ids": ids, "labels": 0} for ids in (PAIR, SHORT, EMPTY)]
    return distill.hide_words(share, distill.collate, table)


def test_hide_words_takes_ordinary_tokens_only():
    """By hand: with a share of nearly 1 only [CLS] and each [SEP] are left."""
    batch = hidden(1 - 1e-7)
    assert batch["attention_mask"].tolist() == [
        [1, 0, 0, 1, 0, 0, 0, 1],
        [1, 0, 1, 0, 0, 0, 0, 0],
        [1, 1, 0, 0, 0, 0, 0, 0],
    ]
    plain = hidden(0)
    assert plain["attention_mask"].sum(1).tolist() == [8, 3, 2]
    for name in "input_ids", "labels":  # all else stays as it is
        assert torch.equal(batch[name], plain[name])


def test_hide_words_takes_each_token_with_the_same_probability():
    masks = torch.stack([hidden(0.3, seed)["attention_mask"][0] for seed in range(2000)])
    shares = 1 - masks.double().mean(0)
    assert shares[[0, 3, 7]].tolist() == [0, 0, 0]
    # four standard deviations
    assert (shares[[1, 2, 4, 5, 6]] - 0.3).abs().max() < 4 * (0.3 * 0.7 / 2000) ** 0.5


def test_run_hides_words_of_the_student_in_training_alone(teacher, data, run, monkeypatch):
    seen = []
    hide = distill.hide_words

    def spy(share, collate_fn, table):
        seen.append(share)
        return hide(share, collate_fn, table)

    monkeypatch.setattr(distill, "hide_words", spy)
    run("--epochs", "1", "--word-dropout", "0.25", "--baseline", "True")
    n_texts = report()["student"]["splits"]["train"]["examples"]
    n_batches = math.ceil(n_texts / report()["settings"]["BATCH_SIZE"])
    assert seen == [0.25] * 2 * n_batches  # an epoch of the student, and one of the baseline


def test_train_hides_no_words_of_a_teacher_to_be_made(teacher, data, run, monkeypatch):
    seen = set()
    hide = distill.hide_words
    monkeypatch.setattr(distill, "hide_words", lambda *args: seen.add(args[0]) or hide(*args))
    base = "--teacher", "new", "--teacher-base", "finetuned_bert_japanese"
    run(*base, "--teacher-epochs", "1", "--epochs", "1", "--word-dropout", "0.25")
    assert seen == {0, 0.25}


@pytest.mark.parametrize("options", [("--student", "bilstm"), ("--method", "mate")])
def test_word_dropout_is_refused_where_it_cannot_apply(teacher, data, fails, options):
    assert "WORD_DROPOUT = 0.2: " in fails(*options, "--word-dropout", "0.2")


@pytest.mark.parametrize("value", ["1", "-0.1", "much"])
def test_word_dropout_is_a_share_below_one(teacher, data, fails, value):
    message = fails("--word-dropout", value)
    assert "WORD_DROPOUT = " in message and "must be a number from 0 to 0.999" in message


# ── Order ──


@pytest.mark.parametrize("n", [1, 31, 32, 33, 5000])
def test_length_grouped_order_holds_each_row_once_by_like_length(n):
    lengths = np.random.default_rng(0).integers(3, 60, n)
    first, second = (distill.length_grouped_order(lengths, 32, seed).tolist() for seed in (1, 2))
    assert (
        sorted(first) == sorted(second) == list(range(n))
        and first == distill.length_grouped_order(lengths, 32, 1).tolist()
    )

    def padded(order):
        return sum(
            max(lengths[order[i : i + 32]]) * len(order[i : i + 32]) for i in range(0, n, 32)
        )

    if n == 5000:
        assert first != second
        assert padded(first) < 1.1 * lengths.sum() < padded(list(range(n)))
        longest = [max(lengths[first[i : i + 32]]) for i in range(0, n, 32)]
        assert abs(np.corrcoef(longest, range(len(longest)))[0, 1]) < 0.3  # not from long to short


def test_token_budget_batches_hold_each_row_once_within_budget(monkeypatch):
    monkeypatch.setattr(distill, "TOKENS_PER_BATCH", 1024)
    lengths = [
        int(x) for x in torch.randint(3, 200, (500,), generator=torch.Generator().manual_seed(0))
    ] + [5000]
    batches = list(distill.token_budget_batches(lengths))
    assert sorted(row for batch in batches for row in batch) == list(range(501))
    sizes = [max(lengths[row] for row in batch) * len(batch) for batch in batches]
    assert sizes[0] == 5000 and max(sizes[1:]) <= 1024 and batches[0] == [500]


def test_classify_encoded_equals_stock_way_in_order_of_texts(teacher, monkeypatch):
    """In the order of the texts, whatever their lengths."""
    stock = transformers.BertForSequenceClassification.from_pretrained(teacher).eval()
    tokenizer, texts = (
        AutoTokenizer.from_pretrained(teacher),
        [text for text, _ in rows("test", 40)] + ODD_TEXTS,
    )
    model = FastBert.from_pretrained(teacher)
    for max_length in 64, 12:
        expected = stock(
            **tokenizer(
                texts, truncation=True, max_length=max_length, padding=True, return_tensors="pt"
            )
        ).logits
        columns = distill.encode([texts], tokenizer, max_length)
        for n_tokens in 1, 100, 5000:
            monkeypatch.setattr(distill, "TOKENS_PER_BATCH", n_tokens)
            logits = distill.classify_encoded(model, tokenizer, columns)
            assert relative_error(logits, expected.detach()) < 1e-5
