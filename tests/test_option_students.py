"""Option: other students, a Bi-LSTM and a pretrained start."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import (
    LABELS,
    SAMPLE,
    VOCABULARY,
    history,
    report,
    rows,
    save_model,
    tiny_model,
    write_csv,
)
from transformers import (
    AutoTokenizer,
    PreTrainedConfig,
)

import distill


def bilstm(**changes):
    torch.manual_seed(0)
    config = dict(
        vocab_size=50, embedding_size=6, hidden_size=5, dropout=0.0, pad_token_id=0, num_labels=3
    )
    return distill.BiLSTM(PreTrainedConfig(**config | changes))


def batch(lengths, vocabulary=50):
    mask = (torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]).long()
    return torch.randint(5, vocabulary, mask.shape) * mask, mask


# ── BiLSTM ──


@pytest.mark.parametrize("lengths", [[1], [7], [3, 9, 1], [4] * 5, list(range(1, 34))])
@pytest.mark.parametrize("dtype, close", [(torch.float32, 1e-5), (torch.float64, 1e-12)])
def test_bilstm_equals_torch_lstm_over_packed_sequences(lengths, dtype, close):
    """Logits and gradients, against torch.nn.LSTM over packed sequences."""
    model = bilstm().to(dtype)
    ids, mask = batch(lengths)

    def packed():
        x = torch.nn.utils.rnn.pack_padded_sequence(
            model.embedding(ids), torch.tensor(lengths), batch_first=True, enforce_sorted=False
        )
        return model.classifier(model.dense(torch.cat(list(model.lstm(x)[1][0]), -1)).tanh())

    found = []
    for logits in model(ids, mask).logits, packed():
        model.zero_grad()
        logits.square().sum().backward()
        found.append(
            (logits.detach(), [parameter.grad.clone() for parameter in model.parameters()])
        )
    assert torch.allclose(found[0][0], found[1][0], atol=close)
    for one, other in zip(found[0][1], found[1][1]):
        assert torch.allclose(one, other, atol=close * max(1, other.abs().max().item()))


def test_bilstm_ignores_padding_and_missing_mask():
    model = bilstm().eval()
    ids, mask = batch([5, 5])
    assert torch.equal(model(ids).logits, model(ids, mask).logits)
    wide, wide_mask = F.pad(ids, (0, 4), value=3), F.pad(mask, (0, 4))
    assert torch.allclose(model(ids, mask).logits, model(wide, wide_mask).logits, atol=1e-6)
    assert model(ids, labels=torch.tensor([0, 2])).loss.item() == pytest.approx(
        F.cross_entropy(model(ids).logits, torch.tensor([0, 2])).item()
    )


def test_make_word_tokenizer_counts_words_and_equals_stock(settings):
    texts = [
        "部屋は広い",
        "部屋は狭い",
        "海が見える",
        "ＷｉＦｉが遅い",
        "部屋 が [MASK] 広い[UNK]",
        "",
        "𠮷野家🍣",
    ]
    tokenizer = distill.make_word_tokenizer({"train": {"text": texts[:4]}})
    assert tokenizer.get_vocab().keys() == {
        "[PAD]",
        "[UNK]",
        "[CLS]",
        "[SEP]",
        "[MASK]",
        "部屋",
        "は",
        "が",
    }
    tokenizer.save_pretrained("words")
    for one in tokenizer, AutoTokenizer.from_pretrained("words"):
        ids = distill.encode([texts], one, 6)["input_ids"]
        assert ids == one(texts, truncation=True, max_length=6)["input_ids"]
        assert one.convert_ids_to_tokens(ids[2]) == ["[CLS]", "[UNK]", "が", "[UNK]", "[SEP]"]


def test_build_bilstm_starts_from_teacher_word_vectors(settings):
    """With as many components as the teacher has, PCA is a rotation.

    Distances stay, all by one factor.
    """
    settings.setattr(distill, "BILSTM_EMBEDDING", 40)
    teacher, tokenizer = tiny_model(), AutoTokenizer.from_pretrained(SAMPLE / "base")
    student = distill.build_bilstm(teacher, tokenizer, tokenizer)
    ids = [
        tokenizer(word, add_special_tokens=False)["input_ids"]
        for word in tokenizer.convert_ids_to_tokens(range(20, 60))
    ]
    known = torch.stack([teacher.get_input_embeddings().weight[one].mean(0) for one in ids])
    ratio = torch.pdist(student.embedding.weight[20:60, :32]) / torch.pdist(known)
    assert ratio.isfinite().all() and torch.allclose(
        ratio, ratio.mean().expand_as(ratio), rtol=1e-3
    )
    settings.setattr(distill, "STUDENT_INIT", "random")
    assert not torch.equal(
        distill.build_bilstm(teacher, tokenizer, tokenizer).embedding.weight,
        student.embedding.weight,
    )


@pytest.mark.parametrize(
    "more", [["--bilstm-words", "teacher"], ["--student-init", "random"], ["--method", "mse"]]
)
def test_bilstm_run_end_to_end(teacher, data, run, more):
    out = run("--student", "bilstm", "--bilstm-embedding", "12", "--bilstm-hidden", "8", *more)
    assert ("its vocabulary" in out) == ("teacher" not in more)
    lines = history()
    config = json.loads(Path("distilled_model/config.json").read_text("utf-8"))
    assert config["architectures"] == ["BiLSTM"] and list(config["label2id"]) == list(LABELS)
    texts, labels = zip(*rows("test", 16))
    found = distill.load_student("distilled_model")(list(texts))
    right = np.mean([one["label"] == label for one, label in zip(found, labels)])
    assert right == pytest.approx(report()["student"]["splits"]["test"]["accuracy"])
    Path("distilled_model/report.json").touch()
    run("--student", "bilstm", "--bilstm-embedding", "12", "--bilstm-hidden", "8", *more)
    assert history() == lines


# ── STUDENT_INIT ──


def test_load_student_init_weights_are_used(teacher, settings):
    settings.setattr(distill, "STUDENT_INIT", "small")
    settings.setattr(distill, "INIT_LAYERS", "last")
    save_model("small", num_hidden_layers=2, seed=3)
    student, small = distill.build_student(tiny_model()), tiny_model(num_hidden_layers=2, seed=3)
    expected = {
        name.replace("layer.1.", "layer.0."): one
        for name, one in small.state_dict().items()
        if "layer.0." not in name
    }
    assert student.state_dict().keys() == expected.keys()
    assert all(torch.equal(one, expected[name]) for name, one in student.state_dict().items())


def test_student_init_accepts_pretrained_with_own_tokenizer(teacher, data, run, fails):
    small = tiny_model(hidden_size=16, num_hidden_layers=2, seed=3, vocab_size=VOCABULARY + 3)
    small.bert.save_pretrained("small")  # no classifier, and other words
    words = (SAMPLE / "base" / "vocab.txt").read_text("utf-8").splitlines()
    Path("base").mkdir()
    for file in (SAMPLE / "base").iterdir():
        Path("base", file.name).write_bytes(file.read_bytes())
    Path("base/vocab.txt").write_text(
        "\n".join([*words[:5], "猫", "犬", "鳥", *words[5:]]), "utf-8"
    )
    AutoTokenizer.from_pretrained("base").save_pretrained("small")
    assert "saved" in run("--student-init", "small", "--num-layers", "2", "--augment", "1")
    config = json.loads(Path("distilled_model/config.json").read_text("utf-8"))
    assert (
        config["hidden_size"] == 16
        and config["num_hidden_layers"] == 2
        and list(config["label2id"]) == list(LABELS)
    )
    assert "猫" in AutoTokenizer.from_pretrained("distilled_model").get_vocab()
    texts, labels = zip(*rows("test", 16))
    right = [
        one["label"] == label
        for one, label in zip(distill.load_student("distilled_model")(list(texts)), labels)
    ]
    assert np.mean(right) == pytest.approx(report()["student"]["splits"]["test"]["accuracy"])
    assert "the small has layers 0 to 1" in fails("--student-init", "small", "--num-layers", "3")
    assert "STUDENT_INIT = './nowhere': " in fails("--student-init", "./nowhere")


def test_bilstm_run_with_pairs(teacher, run):
    """The teacher's token types go with the teacher's token ids."""
    Path("data").mkdir()
    for split, n in ("train", 40), ("val", 16), ("test", 16):
        table = [(text, label, text[:5] + "！") for text, label in rows(split, n)]
        write_csv(f"data/{split}.csv", table, ("text", "label", "second"))
    run("--student", "bilstm", "--text-pair-column", "second", "--epochs", "1")
    pairs = [(text, text[:5] + "！") for text, _ in rows("test", 16)]
    found = distill.load_student("distilled_model")(pairs)
    labels = [label for _, label in rows("test", 16)]
    n_right = sum(answer["label"] == label for answer, label in zip(found, labels))
    assert n_right / 16 == report()["student"]["splits"]["test"]["accuracy"]
