"""The parts: losses against values worked out by hand, data, batches, start of the student, figures."""

import json
import math
import re
import types
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from transformers import AutoTokenizer, BertForSequenceClassification

import distill
from conftest import DEFAULTS, ROOT, SAMPLE, report, rows, tiny_model, write_csv

# ── Loss ──


def test_loss_by_hand(settings):
    """One text, two classes. Student: softmax(0, ln 3) = (1/4, 3/4), at T = 2 softmax(0, ln √3) = (0.36603, 0.63397)."""
    logits, hard, soft = torch.tensor([[0.0, math.log(3)]]), torch.tensor([1]), torch.tensor([[0.5, 0.5]])
    cross_entropy = -math.log(3 / 4)
    low = 1 / (1 + math.sqrt(3))
    kl = 0.5 * math.log(0.5 / low) + 0.5 * math.log(0.5 / (1 - low))
    settings.setattr(distill, "TEMPERATURE", 2.0)
    for alpha in 0.0, 0.3, 1.0:
        settings.setattr(distill, "ALPHA", alpha)
        value = distill.distillation_loss(logits, hard, soft).item()
        assert value == pytest.approx(alpha * 4 * kl + (1 - alpha) * cross_entropy, rel=1e-6)
    outputs = types.SimpleNamespace(logits=logits)
    hard_only = distill.HardLabelTrainer.compute_loss(None, lambda **inputs: outputs, {"labels": hard})
    assert hard_only.item() == pytest.approx(cross_entropy)


def test_loss_is_a_mean_over_the_batch_and_not_over_the_classes(settings):
    settings.setattr(distill, "ALPHA", 1.0)
    for classes in 2, 5, 50:
        logits = torch.zeros(3, classes)
        logits[:, 0] = 1.0
        soft = torch.full((3, classes), 1 / classes)
        q = torch.softmax(logits[0] / distill.TEMPERATURE, -1).double()
        by_hand = (1 / classes * torch.log(1 / classes / q)).sum().item() * distill.TEMPERATURE**2
        assert distill.distillation_loss(logits, torch.zeros(3).long(), soft).item() == pytest.approx(by_hand, rel=1e-4)


def test_temperature_squared_keeps_the_size_of_the_gradient(settings):
    """For high T the gradient tends to (z_S - z_T) / classes, whatever T is (Hinton et al., equation 4)."""
    settings.setattr(distill, "ALPHA", 1.0)
    z_s, z_t = torch.tensor([[1.0, -1.0]], requires_grad=True), torch.tensor([[0.5, -0.5]])
    for temperature in 50.0, 500.0:
        settings.setattr(distill, "TEMPERATURE", temperature)
        distill.distillation_loss(z_s, torch.tensor([0]), torch.softmax(z_t / temperature, -1)).backward()
        assert z_s.grad.tolist()[0] == pytest.approx([0.25, -0.25], rel=1e-2)
        z_s.grad = None


def test_compute_loss_hands_only_its_inputs_to_the_model(teacher, data, run):
    """Also with num_items_in_batch, which current transformers passes, and return_outputs."""
    run("--epochs", "1")
    model = BertForSequenceClassification.from_pretrained("distilled_model").eval()
    table = [{"input_ids": [2, 9, 3], "length": 3, "labels": 1, "soft_labels": [0.2, 0.8]}]
    trainer = distill.make_trainer(model, {"train": table, "val": table}, distill.collate, distill.CustomTrainer, 1, 1e-4, 3)
    batch = distill.collate(table)
    loss, outputs = trainer.compute_loss(model, batch, return_outputs=True, num_items_in_batch=1)
    assert loss == distill.distillation_loss(outputs.logits, batch["labels"], batch["soft_labels"])


def test_score_by_hand():
    def half(chosen):  # logits of 1/2 for these classes, 1/4 for the two others
        return (torch.full((6, 3), 0.25) + torch.eye(3)[chosen] / 4).log() + 7

    figures = distill.compute_metrics(half([0, 0, 1, 1, 0, 0]), torch.tensor([0, 0, 0, 1, 1, 2]), half([0, 1, 0, 1, 1, 2]), 2.0)
    # F1: class 0 = 2·2 / (4 + 3); class 1 = 2·1 / (2 + 2); class 2 = 0, for it stands in the labels but is never chosen
    assert figures == {"examples": 6, "accuracy": 0.5, "macro_f1": pytest.approx((4 / 7 + 1 / 2 + 0) / 3),
                       "agreement": 2 / 6, "seconds": 2.0, "texts_per_second": 3.0,
                       # where they differ, 1/2 ln (1/2 : 1/4) + 1/4 ln (1/4 : 1/2)
                       "kl": pytest.approx(4 / 6 * 0.25 * math.log(2))}


def test_the_reported_kl_is_that_of_the_plain_distributions(teacher, data, run):
    """Whatever the soft labels are made with: ALPHA 0 leaves the student as it is, so that only the report could differ."""
    kl = set()
    for options in (), ("--temperature", "7"), ("--method", "mse"):
        run("--epochs", "1", "--alpha", "0", *options)
        kl.add(round(report()["student"]["splits"]["test"]["kl"], 5))
    assert len(kl) == 1 and kl.pop() > 0
    model = BertForSequenceClassification.from_pretrained(teacher)
    model.classifier.weight.data *= 1e4  # so certain that its soft labels are 0 and 1 in 32 bits
    model.save_pretrained(teacher)
    run("--epochs", "1", "--method", "rail")
    assert math.isfinite(report()["student"]["splits"]["test"]["kl"])


# ── Teacher and student ──


def test_the_teacher_is_frozen_in_eval_mode_and_float32():
    tiny_model().half().save_pretrained("half")
    assert json.loads(Path("half/config.json").read_text())["dtype"] == "float16"
    teacher = distill.load_model("half")
    assert teacher.dtype == torch.float32 and not teacher.training
    assert not any(tensor.requires_grad for tensor in teacher.parameters())


def test_soft_labels_are_those_of_the_stock_model(teacher, data, settings):
    settings.setattr(distill, "DATA", "data")
    settings.setattr(distill, "TEMPERATURE", 3.0)
    model, tokenizer = distill.load_model(teacher), AutoTokenizer.from_pretrained(teacher)
    Path(distill.CACHE).mkdir()
    table = distill.tokenize(distill.load_data(model.config.label2id)[0], tokenizer)
    table = distill.add_soft_labels(table, model, distill.collate)
    for split in table:
        for (text, _), soft in zip(rows(split, 100), table[split]["soft_labels"]):
            logits = model(**tokenizer(text, return_tensors="pt")).logits[0]
            assert soft == pytest.approx(torch.softmax(logits / 3, -1).tolist(), abs=1e-5)
        assert min(table[split]["teacher_seconds"]) > 0


@pytest.mark.parametrize("layers, chosen", [("first", [0, 1]), ("middle", [2, 3]), ("last", [3, 4]), ("spread", [0, 4]),
                                            ((3, 1), [3, 1])])
def test_the_student_starts_from_the_chosen_layers(settings, layers, chosen):
    settings.setattr(distill, "NUM_LAYERS", 2)
    settings.setattr(distill, "INIT_LAYERS", layers)
    teacher = tiny_model(num_hidden_layers=5)
    weights, student = teacher.state_dict(), distill.build_student(teacher)
    assert type(student) is distill.BertForSequenceClassification and student.config.num_hidden_layers == 2
    assert {**student.config.to_dict(), "num_hidden_layers": 5} == teacher.config.to_dict()
    for name, tensor in student.state_dict().items():
        for number, source in enumerate(chosen):
            if f"layer.{number}." in name:
                name = name.replace(f"layer.{number}.", f"layer.{source}.")
                break
        assert torch.equal(tensor, weights[name]), name
    student.classifier.bias.data.add_(1)
    assert torch.equal(weights["classifier.bias"], teacher.classifier.bias)  # the teacher's weights are its own


@pytest.mark.parametrize("dropout, expected", [(None, {0.1, 0.3}), (0.25, {0.25}), (0, {0})])
def test_dropout_of_the_student_in_training_and_of_nobody_else(settings, dropout, expected):
    settings.setattr(distill, "DROPOUT", dropout)
    teacher = tiny_model(attention_probs_dropout_prob=0.3)
    drops = lambda model: {module.p for module in model.modules() if isinstance(module, torch.nn.Dropout)}
    student = distill.build_student(teacher)
    assert drops(student) == expected and drops(teacher) == {0.1, 0.3}
    student.save_pretrained("student")
    assert drops(BertForSequenceClassification.from_pretrained("student")) == {0.1, 0.3}


def test_a_random_student_owes_nothing_to_the_teacher(settings):
    settings.setattr(distill, "STUDENT_INIT", "random")
    first, second = distill.build_student(tiny_model()), distill.build_student(tiny_model(seed=1))
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters()))


@pytest.mark.parametrize("pairs", [False, True])
def test_word_vectors_refitted_against_stock_hidden_states(settings, pairs):
    """By the definition, text by text: LayerNorm(word + mean place) is the mean of the word's states, LayerNorm undone."""
    tokenizer = AutoTokenizer.from_pretrained(SAMPLE / "base")
    stock = tiny_model(num_hidden_layers=4).eval()
    torch.nn.init.uniform_(stock.bert.embeddings.LayerNorm.weight, 0.9, 1.1)
    student, texts = distill.build_student(stock), [text for text, _ in rows("train", 24)]
    given = [tokenizer(text, text[:5] if pairs else None, return_token_type_ids=True) for text in texts]
    table = datasets.Dataset.from_dict({
        "input_ids": [one["input_ids"] for one in given], "length": [len(one["input_ids"]) for one in given],
        "key": texts, **({"token_type_ids": [one["token_type_ids"] for one in given]} if pairs else {})})
    Path(distill.CACHE).mkdir()
    before = student.get_input_embeddings().weight.detach().clone()
    distill.refit_word_vectors(student, stock, tokenizer, table, distill.collate)
    after = student.get_input_embeddings().weight.detach()

    special = {*tokenizer.all_special_ids}
    alone = [{"input_ids": tokenizer.build_inputs_with_special_tokens([number])}
             for number in range(len(tokenizer)) if number not in special]
    embeddings, states, places = stock.bert.embeddings, {}, {}
    with torch.no_grad():
        for one in [*given, *alone]:
            ids = torch.tensor([one["input_ids"]])
            types = torch.tensor([one.get("token_type_ids", [0] * len(one["input_ids"]))])
            hidden = stock.bert(ids, token_type_ids=types, output_hidden_states=True).hidden_states[distill.REFIT_WORDS][0]
            undone = (hidden - embeddings.LayerNorm.bias) / embeddings.LayerNorm.weight
            place = embeddings.position_embeddings.weight[:len(ids[0])] + embeddings.token_type_embeddings(types[0])
            for number, state, where in zip(ids[0].tolist(), undone, place):
                states.setdefault(number, []).append(state)
                places.setdefault(number, []).append(where)
    normal = lambda x: torch.nn.functional.layer_norm(x, x.shape)
    for number in states:
        mean, place = torch.stack(states[number]).mean(0), torch.stack(places[number]).mean(0)
        torch.testing.assert_close(normal(after[number] + place), normal(mean), atol=1e-3, rtol=1e-3)
        old, new = ((table[number] + place).std(correction=0).item() for table in (before, after))
        assert new == pytest.approx(old, rel=1e-4)
    unseen = [number for number in special if number not in states]
    assert unseen and torch.equal(after[unseen], before[unseen]) and after.isfinite().all()


def test_refitted_once_and_only_where_it_can_be(teacher, data, run):
    note = "once more, for the student's word vectors"
    assert "its first 2 layers" in (out := run()) and note in out and note not in run("--alpha", "0.9")
    assert note not in run("--refit-words", "0") and note not in run("--student-init", "random")
    assert "its first 3 layers" in run("--refit-words", "7")  # of a teacher that has no more


# ── Data ──


def load(settings, **changes):
    for name, value in {"DATA": "data", **changes}.items():
        settings.setattr(distill, name, value)
    Path(distill.CACHE).mkdir(exist_ok=True)
    return distill.load_data({"negative": 0, "positive": 1})[0]


TABLE = [("今日は, 晴れ。", "positive"), ("NA", "negative"), ("007", "positive"), ("「雨」\nです", "negative")]
EXPECTED = {"text": [text for text, _ in TABLE], "labels": [1, 0, 1, 0]}


def as_dataset(table, label=str):
    return datasets.Dataset.from_dict({"id": list(range(len(table))), "text": [t for t, _ in table],
                                       "label": [label(one) for _, one in table]})


WRITERS = {
    "csv": lambda path: write_csv(path, TABLE),
    "CSV": lambda path: write_csv(path, TABLE),
    "csv with BOM": lambda path: write_csv(path, TABLE, encoding="utf-8-sig"),
    "csv in CP932": lambda path: write_csv(path, TABLE, encoding="cp932"),
    "csv with CRLF": lambda path: write_csv(path, TABLE, lineterminator="\r\n"),
    "csv in other order": lambda path: write_csv(path, [(label, text) for text, label in TABLE], ("label", "text")),
    "tsv": lambda path: write_csv(path, TABLE, delimiter="\t"),
    "jsonl": lambda path: as_dataset(TABLE).to_json(path, force_ascii=False),
    "json": lambda path: path.write_text(json.dumps([{"text": t, "label": lab} for t, lab in TABLE]), "utf-8"),
    "parquet": lambda path: as_dataset(TABLE).to_parquet(path),
}


@pytest.mark.parametrize("kind", WRITERS)
def test_every_kind_of_file_is_read_to_the_letter(settings, kind, capsys):
    Path("data").mkdir()
    for name in "train", "dev", "test":
        WRITERS[kind](Path("data", f"{name}.{kind.split()[0]}"))
    for table in load(settings).values():
        assert table.to_dict() == EXPECTED
    assert ("CP932" in capsys.readouterr().out) == ("CP932" in kind)


@pytest.mark.parametrize("name", ["val", "validation", "valid", "dev"])
def test_names_of_the_validation_split(settings, name):
    Path("data").mkdir()
    for number, split in enumerate(["train", name, "test"]):
        write_csv(Path("data", f"{split}.csv"), TABLE[number:])
    assert {split: len(table) for split, table in load(settings).items()} == {"train": 4, "val": 3, "test": 2}


def test_a_folder_written_by_save_to_disk(settings):
    datasets.DatasetDict({name: as_dataset(TABLE) for name in ("train", "validation", "test")}).save_to_disk("data")
    before = sorted(Path("data").rglob("*"))
    assert load(settings)["val"].to_dict() == EXPECTED
    assert sorted(Path("data").rglob("*")) == before


@pytest.mark.parametrize("form", ["file", "set"])
def test_a_single_set_is_cut_by_label_and_seed(settings, form, capsys):
    table = [(f"{number}番目", "positive" if number % 4 else "negative") for number in range(200)]
    write_csv(Path("data.csv"), table) if form == "file" else as_dataset(table).save_to_disk("data.csv")
    cuts = [load(settings, DATA="data.csv", SEED=seed) for seed in (1, 1, 2)]
    assert "cut 80/10/10" in capsys.readouterr().out
    for cut in cuts:
        assert {split: (len(rows), sum(rows["labels"])) for split, rows in cut.items()} == {
            "train": (160, 120), "val": (20, 15), "test": (20, 15)}
        assert sorted(text for rows in cut.values() for text in rows["text"]) == sorted(text for text, _ in table)
    texts = [cut["test"]["text"][:] for cut in cuts]
    assert texts[0] == texts[1] != texts[2]


def test_columns_by_other_names_and_sentence_pairs(settings, teacher):
    Path("data").mkdir()
    for split in "train", "val", "test":
        write_csv(Path("data", f"{split}.csv"), [("部屋は広い", "風呂は狭い", "negative", "x")], ("文1", "文2", "評価", "memo"))
    tokenizer = AutoTokenizer.from_pretrained(teacher)
    distill.fit_to_model(tokenizer, tiny_model().config)
    table = load(settings, TEXT_COLUMN="文1", TEXT_PAIR_COLUMN="文2", LABEL_COLUMN="評価")
    for max_length in 64, 6:
        settings.setattr(distill, "MAX_LENGTH", max_length)
        row = distill.tokenize(dict(table), tokenizer)["train"][0]
        expected = tokenizer("部屋は広い", "風呂は狭い", truncation=True, max_length=max_length, return_token_type_ids=True)
        assert (row["input_ids"], row["token_type_ids"]) == (expected["input_ids"], expected["token_type_ids"])
        assert 1 in row["token_type_ids"] and row["labels"] == 0


@pytest.mark.parametrize("labels", [("negative", "positive"), ("0", "1"), (0, 1), (0.0, 1.0)])
def test_labels_by_name_or_number(settings, labels):
    Path("data").mkdir()
    for split in "train", "val", "test":
        datasets.Dataset.from_dict({"text": ["良い", "悪い"], "label": [labels[1], labels[0]]}).to_parquet(f"data/{split}.parquet")
    assert load(settings)["train"]["labels"][:] == [1, 0]


@pytest.mark.parametrize("names, expected", [(["positive", "negative"], [1, 0]), (["a", "b"], [0, 1])])
def test_a_data_sets_own_numbering_does_not_permute_the_teachers(settings, names, expected):
    """A ClassLabel whose names the teacher knows goes by name; with names that it does not know, by number."""
    table = datasets.Dataset.from_dict({"text": ["一", "二"], "label": [0, 1]}).cast_column("label", datasets.ClassLabel(names=names))
    datasets.DatasetDict(train=table, val=table, test=table).save_to_disk("data")
    assert load(settings)["train"]["labels"][:] == expected


def test_texts_that_stand_in_two_splits_are_counted(data, settings, capsys, teacher):
    write_csv(data / "test.csv", rows("test", 4) + rows("train", 3))
    distill.tokenize(load(settings), AutoTokenizer.from_pretrained(teacher))
    printed = capsys.readouterr().out
    assert "3 of 7 texts of test also stand in train" in printed and "val is flattered" not in printed


def test_truncation_is_the_tokenizers_and_is_counted(data, settings, capsys, teacher):
    tokenizer = AutoTokenizer.from_pretrained(teacher)
    settings.setattr(distill, "MAX_LENGTH", 16)
    table = distill.tokenize(load(settings), tokenizer)
    texts = [text for split in table for text, _ in rows(split, len(table[split]))]
    ids = [one for split in table.values() for one in split["input_ids"]]
    assert ids == tokenizer(texts, truncation=True, max_length=16)["input_ids"]
    long = sum(len(one) > 16 for one in tokenizer(texts)["input_ids"])
    assert 0 < long < len(texts) and f"{long} of {len(texts)} texts cut to MAX_LENGTH = 16" in capsys.readouterr().out


# ── Batches ──


def test_a_batch_is_padded_to_its_own_longest_row():
    table = [{"input_ids": ids, "token_type_ids": [0] * (len(ids) - 1) + [1], "labels": 1, "soft_labels": [0.1, 0.9]}
             for ids in ([2, 5, 6, 3], [2, 3])]
    batch = {name: tensor.tolist() for name, tensor in distill.collate(table, pad_token_id=7).items()}
    assert batch.pop("soft_labels") == pytest.approx(np.array([[0.1, 0.9]] * 2))
    assert batch == {"input_ids": [[2, 5, 6, 3], [2, 3, 7, 7]], "attention_mask": [[1, 1, 1, 1], [1, 1, 0, 0]],
                     "token_type_ids": [[0, 0, 0, 1], [0, 1, 0, 0]], "labels": [1, 1]}


@pytest.mark.parametrize("n", [1, 31, 32, 33, 5000])
def test_each_epoch_sees_each_row_once_in_batches_of_like_length(n):
    lengths = np.random.default_rng(0).integers(3, 60, n)
    first, second = (distill.length_grouped_order(lengths, 32, seed).tolist() for seed in (1, 2))
    assert sorted(first) == sorted(second) == list(range(n)) and first == distill.length_grouped_order(lengths, 32, 1).tolist()
    padded = lambda order: sum(max(lengths[order[i:i + 32]]) * len(order[i:i + 32]) for i in range(0, n, 32))
    if n == 5000:
        assert first != second
        assert padded(first) < 1.1 * lengths.sum() < padded(list(range(n)))
        longest = [max(lengths[first[i:i + 32]]) for i in range(0, n, 32)]
        assert abs(np.corrcoef(longest, range(len(longest)))[0, 1]) < 0.3  # not from long to short


def test_the_loaders_of_the_trainer_keep_soft_labels_and_every_row(teacher, data, run, monkeypatch):
    seen = {}
    judge = distill.record_epoch

    def look(trainer, row):
        loaders = {"train": trainer.get_train_dataloader(), "val": trainer.get_eval_dataloader(),
                   "test": trainer.get_test_dataloader(trainer.eval_dataset)}
        seen.update({name: [batch for batch in loader] for name, loader in loaders.items()})
        assert {*map(len, loaders["train"].batch_sampler)} <= {trainer.args.train_batch_size, 48 % trainer.args.train_batch_size}
        return judge(trainer, row)
    monkeypatch.setattr(distill, "record_epoch", look)
    run("--epochs", "1", "--batch-size", "5")  # 48 and 16 are no multiples of 5 and 10
    for name, n in ("train", 48), ("val", 16), ("test", 16):
        assert sum(len(batch["labels"]) for batch in seen[name]) == n
        for batch in seen[name]:
            assert torch.allclose(batch["soft_labels"].sum(-1), torch.ones(len(batch["labels"])))


def test_validation_loss_and_accuracy_are_means_over_texts_and_not_over_batches(teacher, data, run):
    run("--epochs", "1", "--batch-size", "5")
    with open("distilled_model/history.csv", encoding="utf-8") as file:
        header, row = (line.strip().split(",") for line in file)
    row = dict(zip(header, map(float, row)))
    student, full = (BertForSequenceClassification.from_pretrained(folder).eval() for folder in ("distilled_model", teacher))
    tokenizer, losses, right = AutoTokenizer.from_pretrained(teacher), [], 0
    for text, label in rows("val", 16):
        inputs, hard = tokenizer(text, return_tensors="pt"), torch.tensor([int(label == "positive")])
        with torch.no_grad():
            logits, soft = student(**inputs).logits, torch.softmax(full(**inputs).logits / 2, -1)
        losses.append(distill.distillation_loss(logits, hard, soft).item())
        right += logits.argmax().item() == hard.item()
    assert row["val_loss"] == pytest.approx(np.mean(losses), rel=1e-4) and row["val_accuracy"] == right / 16


# ── Settings ──


def test_help_names_every_setting_with_its_comment(capsys):
    with pytest.raises(SystemExit) as exit:
        distill.main(["--help"])
    text = " ".join(capsys.readouterr().out.split())
    assert exit.value.code == 0
    for name in distill.ACCEPTED:
        assert f"--{name.lower().replace('_', '-')} " in text, name
    assert "higher than for a 12-layer BERT; lower it if the loss jumps [0.0001]" in text


def test_every_setting_in_the_block_is_checked_and_explained():
    names = [name for _, name, comment in distill.documented_settings() if comment]
    assert sorted(names) == sorted(distill.ACCEPTED)
    block = Path(distill.__file__).read_text("utf-8").split("# ── Settings ")[1].split("\n\n")[0]
    assert re.findall("^([A-Z_]+) = ", block, re.M) == names[:block.count(" = ")]


def test_values_on_the_command_line(settings):
    found, texts = distill.read_command_line(["--alpha", "1", "--init-layers", "(0, 2)", "--num-layers", "2", "--teacher", "2024",
                               "--tokenizer", "None", "--learning-rate", "3e-4", "--data", "日本語/データ.csv",
                               "--loss-weights", "(1/3, 1/3, 1/3)", "--cache", "1/2", "--alpha", "1/0"])
    assert texts is None and found == {"ALPHA": "1/0", "LOSS_WEIGHTS": (1 / 3, 1 / 3, 1 / 3), "CACHE": "1/2",
                     "INIT_LAYERS": (0, 2), "NUM_LAYERS": 2, "TEACHER": "2024", "TOKENIZER": None, "LEARNING_RATE": 3e-4,
                     "DATA": "日本語/データ.csv"}
    assert distill.ALPHA == DEFAULTS["ALPHA"]  # not changed yet
    distill.apply_settings(found | {"ALPHA": 1, "METHOD": "mate"})
    assert not distill.check_settings()


def test_the_rate_follows_the_schedule(teacher, data, run):
    rates = {}
    for schedule in "linear", "constant":
        run("--schedule", schedule, "--patience", "9", "--learning-rate", "0.001", "--cache", schedule)
        lines = Path("distilled_model/history.csv").read_text().splitlines()[1:]
        rates[schedule] = [float(line.split(",")[4]) for line in lines]
    assert rates["constant"] == [0.001] * 3
    assert rates["linear"] == pytest.approx([0.001 * (18 - step) / 16 for step in (5, 11, 17)])  # 6 steps an epoch, 2 warm


def test_weight_decay_leaves_biases_and_norms_alone(settings):
    model = tiny_model()
    table = [{"input_ids": [2, 9, 3], "length": 3, "labels": 1}]
    trainer = distill.make_trainer(model, {"train": table, "val": table}, distill.collate, distill.CustomTrainer, 1, 1e-4, 3)
    decayed, spared = trainer.create_optimizer().param_groups
    assert decayed["weight_decay"] == distill.WEIGHT_DECAY and spared["weight_decay"] == 0
    names = {id(tensor): name for name, tensor in model.named_parameters()}
    assert all("bias" in names[id(p)] or "LayerNorm" in names[id(p)] for p in spared["params"])
    assert all(p.dim() == 2 for p in decayed["params"])


def test_metrics_reach_any_tracker(teacher, data, run, monkeypatch):
    logged = []
    log = distill.Trainer.log
    monkeypatch.setattr(distill.Trainer, "log", lambda self, logs, *rest: logged.append(dict(logs)) or log(self, logs, *rest))
    run("--epochs", "2")
    assert [set(one) for one in logged] == [
        {"epoch", "train_loss", "eval_loss", "eval_accuracy", "learning_rate", "seconds"}] * 2


def test_importing_runs_nothing_and_leaves_settings_to_call_time(settings):
    settings.setattr(distill, "TEMPERATURE", 7.0)
    assert not Path(".distill_cache").exists() and (SAMPLE / "train.csv").exists()
    z = torch.tensor([[1.0, 0.0]])
    settings.setattr(distill, "ALPHA", 1.0)
    assert distill.distillation_loss(z, torch.tensor([0]), torch.softmax(z / 7, -1)).item() == pytest.approx(0, abs=1e-5)


def test_a_saved_file_is_whole_or_not_there(settings, monkeypatch):
    distill.save_with_checksum("a.pt", {"x": torch.arange(3)})
    monkeypatch.setattr(distill.os, "fsync", lambda handle: (_ for _ in ()).throw(OSError("no space left")))
    with pytest.raises(OSError):
        distill.save_with_checksum("a.pt", {"x": torch.arange(4)})
    assert distill.load_with_checksum("a.pt")["x"].tolist() == [0, 1, 2]


def test_no_code_in_a_saved_file_runs(capsys):
    """A pickle that would make a folder, with the right checksum."""
    class Evil:
        def __reduce__(self):
            import os
            return os.mkdir, ("hacked",)
    import hashlib
    import io
    buffer = io.BytesIO()
    torch.save(Evil(), buffer)
    Path("a.pt").write_bytes(hashlib.sha256(buffer.getvalue()).digest() + buffer.getvalue())
    assert distill.load_with_checksum(Path("a.pt")) is None and not Path("hacked").exists()
    assert "a.pt is damaged" in capsys.readouterr().out


def test_the_readme_names_every_setting_and_its_default_in_both_languages():
    text = (ROOT / "README.md").read_text("utf-8")
    for name, value in DEFAULTS.items():
        lines = [line for line in text.splitlines() if line.startswith(f"| `{name}` |")]
        assert len(lines) == 2
        for line in lines:
            assert eval(line.split("|")[2].strip(" `"), {"__builtins__": {}}) == value
