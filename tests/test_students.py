"""The options around the main path: students, augmentation, unlabelled text, export, use from Python and the shell."""

import importlib.util
import io
import json
import math
import types
import subprocess
import sys
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from transformers import AutoTokenizer, BertConfig, BertForMaskedLM, BertTokenizerFast, PreTrainedConfig

import distill
from conftest import SAMPLE, VOCABULARY, history, report, rows, save_model, tiny_model, write_csv

LABELS = ("negative", "positive")


def bilstm(**changes):
    torch.manual_seed(0)
    config = dict(vocab_size=50, embedding_size=6, hidden_size=5, dropout=0.0, pad_token_id=0, num_labels=3)
    return distill.BiLSTM(PreTrainedConfig(**config | changes))


def batch(lengths, vocabulary=50):
    mask = (torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]).long()
    return torch.randint(5, vocabulary, mask.shape) * mask, mask


# ── Losses ──


def test_mse_by_hand(settings):
    settings.setattr(distill, "ALPHA", 0.25)
    logits, z = torch.tensor([[1.0, 3.0], [0.0, 0.0]]), torch.tensor([[2.0, 1.0], [0.0, 4.0]])
    cross_entropy = (math.log(1 + math.exp(-2)) + math.log(2)) / 2  # of the labels 1 and 0
    mse = ((1 + 4) / 2 + (0 + 16) / 2) / 2
    outputs = types.SimpleNamespace(logits=logits)
    batch = {"labels": torch.tensor([1, 0]), "teacher_logits": z}
    loss = distill.LogitTrainer.compute_loss(None, lambda **inputs: outputs, batch)
    assert loss.item() == pytest.approx(0.25 * mse + 0.75 * cross_entropy, rel=1e-6)


def test_a_text_without_a_label_counts_by_its_soft_label_alone(settings):
    settings.setattr(distill, "TEMPERATURE", 1.0)
    logits = torch.tensor([[0.0, 0.0], [0.0, 0.0]], requires_grad=True)
    soft = torch.tensor([[0.5, 0.5], [1.0, 0.0]])
    loss = distill.distillation_loss(logits, torch.tensor([0, distill.NO_LABEL]), soft)
    assert loss.item() == pytest.approx((0.5 * 0 + 0.5 * math.log(2) + math.log(2)) / 2, rel=1e-6)
    for alpha in 0, 0.5, 1:
        settings.setattr(distill, "ALPHA", alpha)
        loss = distill.distillation_loss(logits, torch.full((2,), distill.NO_LABEL), soft)
        assert loss.item() == pytest.approx(math.log(2) / 2, rel=1e-6)


def test_the_losses_of_terms_by_hand():
    student, teacher = torch.tensor([[0.0, math.log(3)]]), torch.tensor([[0.0, 0.0]])
    loss = lambda name, t=1.0: distill.CUSTOM_LOSSES[name](student, teacher, t).item()
    kl = 0.5 * math.log(0.5 / 0.25) + 0.5 * math.log(0.5 / 0.75)
    assert loss("kl") == pytest.approx(kl, rel=1e-6)
    low, high = 1 / (1 + math.sqrt(3)), math.sqrt(3) / (1 + math.sqrt(3))
    assert loss("kl", 2.0) == pytest.approx(4 * (0.5 * math.log(0.5 / low) + 0.5 * math.log(0.5 / high)), rel=1e-5)
    assert loss("mse") == pytest.approx(math.log(3) ** 2 / 2, rel=1e-6)
    cosine = distill.CUSTOM_LOSSES["cosine"](torch.tensor([[1.0, 0.0]]), torch.tensor([[1.0, 1.0]]), 1.0)
    assert cosine.item() == pytest.approx(1 - 1 / math.sqrt(2), rel=1e-6)
    ce = distill.CUSTOM_LOSSES["ce"](student, torch.tensor([1]), 1.0)
    assert ce.item() == pytest.approx(-math.log(0.75), rel=1e-6)


# ── The Bi-LSTM ──


@pytest.mark.parametrize("lengths", [[1], [7], [3, 9, 1], [4] * 5, list(range(1, 34))])
@pytest.mark.parametrize("dtype, close", [(torch.float32, 1e-5), (torch.float64, 1e-12)])
def test_bilstm_is_torchs_lstm_over_packed_sequences(lengths, dtype, close):
    """Logits and gradients, against torch.nn.LSTM over packed sequences."""
    model = bilstm().to(dtype)
    ids, mask = batch(lengths)

    def packed():
        x = torch.nn.utils.rnn.pack_padded_sequence(model.embedding(ids), torch.tensor(lengths), batch_first=True,
                                                    enforce_sorted=False)
        return model.classifier(model.dense(torch.cat(list(model.lstm(x)[1][0]), -1)).tanh())

    found = []
    for logits in model(ids, mask).logits, packed():
        model.zero_grad()
        logits.square().sum().backward()
        found.append((logits.detach(), [parameter.grad.clone() for parameter in model.parameters()]))
    assert torch.allclose(found[0][0], found[1][0], atol=close)
    for one, other in zip(found[0][1], found[1][1]):
        assert torch.allclose(one, other, atol=close * max(1, other.abs().max().item()))


def test_padding_and_a_missing_mask_change_nothing():
    model = bilstm().eval()
    ids, mask = batch([5, 5])
    assert torch.equal(model(ids).logits, model(ids, mask).logits)
    wide, wide_mask = F.pad(ids, (0, 4), value=3), F.pad(mask, (0, 4))
    assert torch.allclose(model(ids, mask).logits, model(wide, wide_mask).logits, atol=1e-6)
    assert model(ids, labels=torch.tensor([0, 2])).loss.item() == pytest.approx(
        F.cross_entropy(model(ids).logits, torch.tensor([0, 2])).item())


def test_words_of_its_own(settings):
    texts = ["部屋は広い", "部屋は狭い", "海が見える", "ＷｉＦｉが遅い", "部屋 が [MASK] 広い[UNK]", "", "𠮷野家🍣"]
    tokenizer = distill.make_word_tokenizer({"train": {"text": texts[:4]}})
    assert tokenizer.get_vocab().keys() == {"[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "部屋", "は", "が"}
    tokenizer.save_pretrained("words")
    for one in tokenizer, AutoTokenizer.from_pretrained("words"):
        ids = distill.encode([texts], one, 6)["input_ids"]
        assert ids == one(texts, truncation=True, max_length=6)["input_ids"]
        assert one.convert_ids_to_tokens(ids[2]) == ["[CLS]", "[UNK]", "が", "[UNK]", "[SEP]"]


def test_its_word_vectors_start_from_the_teachers(settings):
    """With as many components as the teacher has, PCA is a rotation: distances stay, all by one factor."""
    settings.setattr(distill, "BILSTM_EMBEDDING", 40)
    teacher, tokenizer = tiny_model(), AutoTokenizer.from_pretrained(SAMPLE / "base")
    student = distill.build_bilstm(teacher, tokenizer, tokenizer)
    ids = [tokenizer(word, add_special_tokens=False)["input_ids"] for word in tokenizer.convert_ids_to_tokens(range(20, 60))]
    known = torch.stack([teacher.get_input_embeddings().weight[one].mean(0) for one in ids])
    ratio = torch.pdist(student.embedding.weight[20:60, :32]) / torch.pdist(known)
    assert ratio.isfinite().all() and torch.allclose(ratio, ratio.mean().expand_as(ratio), rtol=1e-3)
    settings.setattr(distill, "STUDENT_INIT", "random")
    assert not torch.equal(distill.build_bilstm(teacher, tokenizer, tokenizer).embedding.weight, student.embedding.weight)


# ── More text ──


@pytest.fixture
def japanese():
    return AutoTokenizer.from_pretrained(SAMPLE / "base")


@pytest.fixture
def rust():
    """An English tokenizer in Rust, as SST-2's teachers have."""
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *"the film is not a good one , n ' t .".split(), "##s", "film2"]
    Path("vocab.txt").write_text("\n".join(dict.fromkeys(words)), "utf-8")
    return BertTokenizerFast("vocab.txt")


def copies(texts, tokenizer, settings, n=3, mask=0.1, ngram=0.25, seed=42):
    for name, value in ("AUGMENT", n), ("AUGMENT_MASK", mask), ("AUGMENT_NGRAM", ngram), ("SEED", seed):
        settings.setattr(distill, name, value)
    return distill.augment({"text": texts}, range(len(texts)), distill.make_word_splitter(tokenizer))


TEXTS = [text for text, _ in rows("train", 40)]


def test_word_vectors_refitted_with_a_tokenizer_in_rust(rust):
    teacher, text = tiny_model(vocab_size=len(rust)), "the film is not good"
    student, ids = distill.build_student(teacher), rust(text)["input_ids"]
    before = student.get_input_embeddings().weight.detach().clone()
    Path(distill.CACHE).mkdir()
    table = datasets.Dataset.from_dict({"input_ids": [ids], "length": [len(ids)], "key": [text]})
    distill.refit_word_vectors(student, teacher, rust, table, distill.collate)
    changed = (student.get_input_embeddings().weight != before).any(-1).nonzero().flatten().tolist()
    assert changed == sorted({*range(len(rust))} - {rust.pad_token_id, rust.unk_token_id, rust.mask_token_id})


def test_words_tokenize_like_their_text(japanese, rust, settings):
    for tokenizer, texts in (japanese, TEXTS), (rust, ["the film is n't good .", " a  film, the\tone", "film2 goods", ""]):
        made = copies(texts, tokenizer, settings, n=1, mask=0, ngram=0)["text"]
        assert distill.encode([made], tokenizer, 32)["input_ids"] == distill.encode([texts], tokenizer, 32)["input_ids"]
        masked = copies(texts, tokenizer, settings, n=1, mask=1, ngram=0)["text"]
        assert [len(text) for text in masked] == [len(text) for text in made]
        for ids, text in zip(distill.encode([masked], tokenizer, 512)["input_ids"], masked):
            assert ids == [tokenizer.cls_token_id, *[tokenizer.mask_token_id] * len(text), tokenizer.sep_token_id]


def test_copies_follow_their_probabilities_and_the_seed(japanese, settings):
    made = copies(TEXTS, japanese, settings, n=50)
    assert made["labels"] == [distill.NO_LABEL] * 50 * len(TEXTS)
    words = [word for text in made["text"] for word in text]
    assert np.mean([word is None for word in words]) == pytest.approx(0.1, abs=0.01)
    whole = [len(japanese.word_tokenizer.tokenize(text)) for text in TEXTS for _ in range(50)]
    shorter = [len(text) for text, length in zip(made["text"], whole) if len(text) < length]
    assert set(range(2, 11)) <= set(shorter) and max(shorter) == 10 and len(shorter) / len(whole) == pytest.approx(0.25, abs=0.03)
    assert copies(TEXTS, japanese, settings, n=50) == made != copies(TEXTS, japanese, settings, n=50, seed=1)
    assert copies(TEXTS[:1], japanese, settings, n=50)["text"] == made["text"][:50]


def test_a_text_is_cut_into_words_once(japanese, settings):
    seen = []
    words = distill.make_word_splitter(japanese)
    settings.setattr(distill, "AUGMENT", 7)
    made = distill.augment({"text": TEXTS}, range(len(TEXTS)), lambda text: seen.append(text) or words(text))["text"]
    settings.setattr(japanese.word_tokenizer, "tokenize", lambda *a, **b: pytest.fail("MeCab was asked again"))
    distill.encode([made], japanese, 32)
    assert seen == TEXTS


def test_copies_and_unlabelled_texts_in_a_run(teacher, data, run, settings):
    first = rows("train", 1)[0][0]
    Path("more").mkdir()
    Path("more/a.txt").write_text("\n".join([*(text for text, _ in rows("train", 60)[40:]), first, first, "", " "]), "utf-8")
    write_csv("more/b.csv", [[text] for text, _ in rows("val", 20)], header=["text"])
    out = run("--unlabeled", "more", "--augment", "3")
    assert "train: 48 + 16 unlabeled, which only the teacher labels (26 equal to others left out)" in out
    assert "train: 64 + 1" in out and " copies, which only the teacher labels (" in out
    found = report()["student"]["splits"]
    assert [found[split]["examples"] for split in ("train", "val", "test")] == [48, 16, 16]
    again = run("--unlabeled", "more", "--augment", "3")
    assert "labelled 0 texts" in again and "goes on after epoch 3" in again
    lines = history()
    run("--unlabeled", "more/a.txt", "--epochs", "1")
    assert history() != lines


def test_masked_words_filled_in(teacher, data, run, settings):
    config = BertConfig(vocab_size=VOCABULARY, hidden_size=16, num_hidden_layers=1, num_attention_heads=1, intermediate_size=16)
    BertForMaskedLM(config).save_pretrained("generator")
    AutoTokenizer.from_pretrained(SAMPLE / "base").save_pretrained("generator")
    seen, add_soft_labels = [], distill.add_soft_labels
    settings.setattr(distill, "add_soft_labels", lambda data, *more: seen.append(data["train"]) or add_soft_labels(data, *more))
    for generator in [], ["--generator", "generator"], ["--generator", "generator"]:
        run("--augment", "2", "--augment-mask", "0.5", "--epochs", "1", *generator)
    mask = AutoTokenizer.from_pretrained(SAMPLE / "base").mask_token_id
    masked = [sum(ids.count(mask) for ids in one["input_ids"]) for one in seen]
    assert masked[0] > 100 and masked[1] == 0 and len(seen[1]) > 130
    assert seen[1]["input_ids"][:] == seen[2]["input_ids"][:]


def test_pairs_are_augmented_too(teacher, run):
    Path("data").mkdir()
    for split, n in ("train", 48), ("val", 16), ("test", 16):
        write_csv(f"data/{split}.csv", [(text, text[::-1], label) for text, label in rows(split, n)], ("text", "second", "label"))
    assert "copies" in run("--text-pair-column", "second", "--augment", "1", "--epochs", "1")
    assert len(distill.load_student("distilled_model")([("部屋は広い", "風呂は狭い"), ("海", "山")])) == 2


# ── Students, whole runs ──


@pytest.mark.parametrize("more", [["--bilstm-words", "teacher"], ["--student-init", "random"], ["--method", "mse"]])
def test_a_bilstm_from_end_to_end(teacher, data, run, more):
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


def test_a_bert_by_the_logits_themselves(teacher, data, run):
    assert "saved" in run("--method", "mse") and report()["settings"]["METHOD"] == "mse"


def test_a_small_pretrained_start_with_its_own_tokenizer(teacher, data, run, fails):
    small = tiny_model(hidden_size=16, num_hidden_layers=2, seed=3, vocab_size=VOCABULARY + 3)
    small.bert.save_pretrained("small")  # no classifier, and other words
    words = (SAMPLE / "base" / "vocab.txt").read_text("utf-8").splitlines()
    Path("base").mkdir()
    for file in (SAMPLE / "base").iterdir():
        Path("base", file.name).write_bytes(file.read_bytes())
    Path("base/vocab.txt").write_text("\n".join([*words[:5], "猫", "犬", "鳥", *words[5:]]), "utf-8")
    AutoTokenizer.from_pretrained("base").save_pretrained("small")
    assert "saved" in run("--student-init", "small", "--num-layers", "2", "--augment", "1")
    config = json.loads(Path("distilled_model/config.json").read_text("utf-8"))
    assert config["hidden_size"] == 16 and config["num_hidden_layers"] == 2 and list(config["label2id"]) == list(LABELS)
    assert "猫" in AutoTokenizer.from_pretrained("distilled_model").get_vocab()
    texts, labels = zip(*rows("test", 16))
    right = [one["label"] == label for one, label in zip(distill.load_student("distilled_model")(list(texts)), labels)]
    assert np.mean(right) == pytest.approx(report()["student"]["splits"]["test"]["accuracy"])
    assert "the small has layers 0 to 1" in fails("--student-init", "small", "--num-layers", "3")
    assert "STUDENT_INIT = './nowhere': " in fails("--student-init", "./nowhere")


def test_the_starts_weights_are_used(teacher, settings):
    settings.setattr(distill, "STUDENT_INIT", "small")
    settings.setattr(distill, "INIT_LAYERS", "last")
    save_model("small", num_hidden_layers=2, seed=3)
    student, small = distill.build_student(tiny_model()), tiny_model(num_hidden_layers=2, seed=3)
    expected = {name.replace("layer.1.", "layer.0."): one for name, one in small.state_dict().items() if "layer.0." not in name}
    assert student.state_dict().keys() == expected.keys()
    assert all(torch.equal(one, expected[name]) for name, one in student.state_dict().items())


def test_faults_of_the_new_settings(teacher, data, fails, settings):
    message = fails("--student", "bilstm", "--student-init", "small", "--generator", "x")
    assert 'of a "bilstm" it must be' in message and "without AUGMENT" in message
    settings.setattr(distill.importlib.util, "find_spec", lambda name: None)
    assert "pip install onnx onnxscript onnxruntime" in fails("--export", "onnx")
    assert "UNLABELED = 'nowhere'" in fails("--unlabeled", "nowhere")
    write_csv("other.csv", [["a"]], header=["sentence"])
    assert "other.csv has no column text; its columns are sentence" in fails("--unlabeled", "other.csv")
    assert "GENERATOR = './nowhere'" in fails("--augment", "1", "--generator", "./nowhere")
    assert "is no masked-language model but a BertForSeq" in fails("--augment", "1", "--generator", str(teacher))


# ── Export ──

FRESH = """
import json, sys, torch
inputs = {name: torch.tensor(one) for name, one in json.load(open("inputs.json")).items()}
logits = [torch.export.load("distilled_model/student.pt2").module()(**inputs)]
if sys.argv[1:]:
    import onnxruntime
    session = onnxruntime.InferenceSession("other/student.onnx")
    logits.append(torch.from_numpy(session.run(None, {name: one.numpy() for name, one in inputs.items()})[0]))
print(json.dumps([one.softmax(-1).max(-1).values.tolist() for one in logits]))
"""


@pytest.mark.parametrize("student", [["bert"], ["bilstm", "--bilstm-embedding", "64", "--bilstm-hidden", "48"]], ids=lambda x: x[0])
def test_exports_in_a_fresh_process(teacher, data, run, student):
    """Without distill.py, other numbers of texts and lengths than in the run: the scores of predict()."""
    onnx = all(map(importlib.util.find_spec, ("onnx", "onnxscript", "onnxruntime")))
    printed = run("--export", "pt2", "--epochs", "1", "--student", *student)
    figures = report()["export"]
    assert list(figures) == ["eager", "student.pt2"]
    if onnx:
        printed += run("--export", "onnx-int8", "--epochs", "1", "--output", "other", "--student", *student)
        figures |= report("other")["export"]
        assert list(figures) == ["eager", "student.pt2", "student.onnx", "student_int8.onnx"]
        assert figures["student_int8.onnx"]["bytes"] < 0.75 * figures["student.onnx"]["bytes"]
        assert {file.suffix for file in Path("other").iterdir()} >= {".json", ".csv", ".png", ".onnx", ".safetensors"}
    for name, one in figures.items():
        assert f"export    {name}" in printed and (one["difference"] < 1e-5 or "int8" in name)
        assert all(0 < one[f"milliseconds_{size}"]["median"] <= one[f"milliseconds_{size}"]["p95"] for size in (1, 32))
    assert not [file for file in Path("distilled_model").iterdir() if file.is_dir()]

    tokenizer, texts = AutoTokenizer.from_pretrained("distilled_model"), [text for text, _ in rows("test", 5)]
    inputs = dict(tokenizer(texts, padding=True, return_tensors="pt", return_token_type_ids=False))
    Path("inputs.json").write_text(json.dumps({name: one.tolist() for name, one in inputs.items()}))
    done = subprocess.run([sys.executable, "-c", FRESH, *["onnx"] * onnx], capture_output=True, text=True, check=True)
    expected = [one["score"] for one in distill.load_student("distilled_model")(texts)]
    found = json.loads(done.stdout.splitlines()[-1])
    assert len(found) == 1 + onnx and all(one == pytest.approx(expected, abs=1e-5) for one in found)


def test_a_graph_that_answers_otherwise_gets_no_name(teacher, data, fails, settings):
    graphs = distill.export_pt2
    settings.setattr(distill, "export_pt2", lambda *given: {
        name: lambda inputs, run=run: run(inputs) + 0.01 for name, run in graphs(*given).items()})
    message = fails("--export", "pt2", "--epochs", "1")
    assert "EXPORT = 'pt2': failed, but the student is saved" in message and "differ from the student's" in message
    assert Path("distilled_model/model.safetensors").exists() and not list(Path("distilled_model").glob("*.pt2"))


# ── From Python and from the shell ──


def test_load_student_and_predict(teacher, data, run, capsys, settings):
    run("--epochs", "1")
    predict = distill.load_student("distilled_model")
    texts = [text for text, _ in rows("test", 16)] + ["", "🍣" * 100]
    found = predict(texts)
    model = distill.transformers.BertForSequenceClassification.from_pretrained("distilled_model").eval()
    tokenizer = AutoTokenizer.from_pretrained("distilled_model")
    for text, one in zip(texts, found):
        score, number = model(**tokenizer(text, truncation=True, return_tensors="pt")).logits.softmax(-1).max(-1)
        assert one == {"label": LABELS[number.item()], "score": pytest.approx(score.item(), abs=1e-5)}
    assert predict(texts[0])[0]["score"] == pytest.approx(found[0]["score"]) and predict([]) == []
    for bad in [1], [None], [("a", 1)]:
        with pytest.raises(distill.Problem, match="predict takes a list of texts"):
            predict(bad)

    capsys.readouterr()
    distill.main(["--predict", *texts[:3]])
    shown = capsys.readouterr().out.splitlines()
    assert shown == [f"{one['label']}\t{one['score']:.4f}" for one in found[:3]]
    settings.setattr(sys, "stdin", io.StringIO("".join(f"{text}\n" for text in texts)))
    distill.main(["--predict"])
    assert capsys.readouterr().out.splitlines()[:3] == shown
    with pytest.raises(SystemExit, match="'nowhere': no student can be loaded from it"):
        distill.main(["--output", "nowhere", "--predict", "文"])


class Bag(torch.nn.Module):
    """A student of the user's own: it returns a bare tensor."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.words, self.out = torch.nn.EmbeddingBag(VOCABULARY, 8), torch.nn.Linear(8, 2)

    def forward(self, input_ids, attention_mask):
        return self.out(self.words(input_ids, per_sample_weights=None))


@pytest.fixture
def splits(settings):
    settings.setattr(distill, "EPOCHS", 2)
    settings.setattr(distill, "WARMUP_STEPS", 0)
    tokenizer = AutoTokenizer.from_pretrained(SAMPLE / "base")
    return {split: [dict(input_ids=ids, labels=LABELS.index(label)) for ids, (_, label) in
                    zip(tokenizer([text for text, _ in rows(split, n)])["input_ids"], rows(split, n))]
            for split, n in (("train", 48), ("val", 16))}


def test_distill_ones_own_models(splits, settings):
    settings.setattr(distill, "LEARNING_RATE", 0.05)
    teacher, before = tiny_model(), Bag().state_dict()
    student = distill.distill(teacher, Bag(), splits)
    assert not torch.equal(student.state_dict()["out.weight"], before["out.weight"])
    again = distill.distill(teacher, Bag(), splits)
    assert all(torch.equal(one, again.state_dict()[name]) for name, one in student.state_dict().items())
    unlabelled = {split: [{"input_ids": row["input_ids"]} for row in rows] for split, rows in splits.items()}
    assert isinstance(distill.distill(teacher, Bag(), unlabelled, [{"loss": "mse"}]), Bag)


@pytest.mark.parametrize("fast", [True, False])
def test_distill_by_layers(splits, settings, fast):
    """The loss of terms over logits, labels and layers is their weighted sum; the same with our class and the stock one."""
    import transformers
    teacher, losses = tiny_model(), []
    kind = distill.BertForSequenceClassification if fast else transformers.BertForSequenceClassification
    student = kind.from_pretrained(save_model("student", num_hidden_layers=1, seed=1))
    terms = [{"temperature": 3.0}, {"teacher": "labels", "loss": "ce", "weight": 0.5},
             {"teacher": "bert.encoder.layer.2", "student": "bert.encoder.layer.0", "weight": 0.1,
              "loss": lambda one, other, t: (one[:, 0] - other[:, 0]).abs().mean()}]
    inputs = distill.collate(splits["train"][:4])
    given = {name: inputs[name] for name in ("input_ids", "attention_mask")}
    stock = transformers.BertForSequenceClassification.from_pretrained("student").eval()
    s, t = stock(**given, output_hidden_states=True), teacher.eval()(**given, output_hidden_states=True)
    kl = F.kl_div((s.logits / 3).log_softmax(-1), (t.logits / 3).softmax(-1), reduction="batchmean") * 9
    expected = (kl + 0.5 * F.cross_entropy(s.logits, inputs["labels"])
                + 0.1 * (s.hidden_states[1] - t.hidden_states[3])[:, 0].abs().mean())

    def look(trainer, *more, **others):
        losses.append(trainer.compute_loss(trainer.model.eval(), inputs).item())
    settings.setattr(distill, "train", look)
    distill.distill(teacher, student, splits, terms)
    assert losses == [pytest.approx(expected.item(), rel=1e-4)]
    hooks = [hook for model in (teacher, student) for module in model.modules() for hook in module._forward_hooks.values()]
    assert not [hook for hook in hooks if hook.__module__ == "distill"]
    assert torch.allclose(student(**given).logits, s.logits, atol=1e-5) and not student.config.output_hidden_states


@pytest.mark.parametrize("term, told", [({"student": "nothing"}, "the student's is no tensor"), ({"los": "kl"}, "accepted are teacher"),
                                        ({"loss": "l2"}, "as loss kl, mse"), ({"teacher": "bert.pooler"}, r"\(8, 32\)")])
def test_terms_that_do_not_fit(splits, settings, term, told):
    settings.setattr(distill, "BATCH_SIZE", 8)
    with pytest.raises(distill.Problem, match=told):
        distill.distill(tiny_model(), Bag(), splits, [term])
