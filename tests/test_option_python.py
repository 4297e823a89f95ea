"""Option: from Python and from the shell: load_student, --predict and distill()."""

import contextlib
import io
import json
import math
import multiprocessing
import os
import re
import runpy
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from conftest import (
    ANY_TEXT,
    DEFAULTS,
    LABELS,
    ROOT,
    SAMPLE,
    SAVE_FIGURE,
    VOCABULARY,
    FastBert,
    edit_json,
    outcome,
    rows,
    save_generator,
    save_model,
    tiny_model,
    write_csv,
)
from fault_drill import Copy
from hypothesis import given
from hypothesis import strategies as st
from transformers import (
    AutoTokenizer,
)

import distill

# ── load_student ──


def test_load_student_knows_whether_it_was_trained_on_pairs(teacher, data, run, capsys):
    run("--epochs", "1")
    with pytest.raises(distill.Problem, match="text 1 is .*must be a single text"):
        distill.load_student("distilled_model")([("良い", "悪い")])
    for split, n in ("train", 48), ("val", 16), ("test", 16):
        table = [(text, label, text) for text, label in rows(split, n)]
        write_csv(data / f"{split}.csv", table, ("text", "label", "second"))
    run("--epochs", "1", "--text-pair-column", "second")
    predict = distill.load_student("distilled_model")
    with pytest.raises(distill.Problem, match="text 1 is .*must be a pair of texts"):
        predict(["良い"])
    answer = predict([("良い", "悪い")])[0]
    capsys.readouterr()
    distill.main(["--text-pair-column", "None", "--predict", "良い\t悪い"])  # it knows by itself
    assert capsys.readouterr().out == f"{answer['label']}\t{answer['score']:.4f}\n"
    with pytest.raises(SystemExit, match="text 2 is '良い': each must be a pair of texts"):
        distill.main(["--text-pair-column", "None", "--predict", "良い\t悪い", "良い"])


def test_stdin_lines_drops_the_mark_of_windows(teacher, monkeypatch, capsys):
    told = []
    for content in "良い。\n悪い。\n".encode(), "\ufeff良い。\r\n悪い。\r\n".encode():
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(content), "ascii"))
        distill.main(["--output", str(teacher), "--predict"])
        told.append(capsys.readouterr())
    assert told[0].out.count("\n") == 2 and told[1] == told[0]


@pytest.fixture(scope="module")
def student(tmp_path_factory):
    folder = save_model(tmp_path_factory.mktemp("student"))
    return distill.load_student(str(folder))


def test_load_student_equals_stock_and_command_line(teacher, data, run, capsys, settings):
    run("--epochs", "1")
    predict = distill.load_student("distilled_model")
    texts = [text for text, _ in rows("test", 16)] + ["", "🍣" * 100]
    found = predict(texts)
    model = distill.transformers.BertForSequenceClassification.from_pretrained(
        "distilled_model"
    ).eval()
    tokenizer = AutoTokenizer.from_pretrained("distilled_model")
    for text, one in zip(texts, found):
        score, number = (
            model(**tokenizer(text, truncation=True, return_tensors="pt"))
            .logits.softmax(-1)
            .max(-1)
        )
        assert one == {
            "label": LABELS[number.item()],
            "score": pytest.approx(score.item(), abs=1e-5),
        }
    assert predict(texts[0])[0]["score"] == pytest.approx(found[0]["score"]) and predict([]) == []
    for bad in [1], [None], [("a", 1)]:
        with pytest.raises(distill.Problem, match=r"text \d is .*: each must be a"):
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


def test_load_student_takes_texts_and_pairs_alone(teacher, monkeypatch):
    for texts in [["a", "b", "c"]], [[]], [["a"], ["a", "b"]], [3]:
        with pytest.raises(distill.Problem, match=r"text \d is .*: each must be a"):
            distill.load_student(teacher)(texts)
    monkeypatch.setattr(sys, "stdin", None)  # as Python has it where the shell closed it
    with pytest.raises(SystemExit, match="no standard input to read them from"):
        distill.main(["--output", str(teacher), "--predict"])


@given(texts=st.lists(ANY_TEXT, max_size=4))
def test_load_student_answers_or_refuses_any_texts(student, texts):
    answers = outcome(student, texts)
    if isinstance(answers, distill.Problem):
        assert "in valid UTF-8" in str(answers) and any(
            "\ud800" <= character <= "\udfff" for text in texts for character in text
        )
    else:
        assert len(answers) == len(texts)
        assert all(
            answer["label"] in ("negative", "positive") and 0.5 <= answer["score"] <= 1
            for answer in answers
        )


@pytest.mark.parametrize(
    "text",
    ["とても良い。", "a", "あ", "。", " ", "a ", "\0", "𠮷", "😀", "\ufdfa", "か\u3099", "[CLS]"],
)
def test_load_student_reads_texts_of_a_megabyte(student, text):
    """MeCab itself crashes on 200,000 letters without a space.

    The command would end without a word.
    """
    assert student([text * (1_000_000 // len(text.encode()))])[0]["score"] >= 0.5


def test_load_student_reads_long_text_from_its_beginning(student):
    beginning = "料理は美味しいが接客は最悪だった。" * 100
    assert student([beginning + "良い" * 400_000])[0] == pytest.approx(student([beginning])[0])


def test_load_saved_refuses_model_without_classifier():
    save_generator("generator")  # a masked-language model
    with pytest.raises(distill.Problem, match=r"classifier\.weight"):
        distill.load_saved("generator")


def test_recording_forgets_the_outputs_of_the_last_batch():
    class Changing(torch.nn.Module):
        def forward(self, x):
            return {"logits": x, "extra": x} if x.sum() > 0 else {"logits": x}

    with contextlib.ExitStack() as stack:
        call = distill.recording(Changing(), {"logits"}, stack)
        assert {*call({"x": torch.ones(1)})} == {"logits", "extra"}
        assert {*call({"x": torch.zeros(1)})} == {"logits"}


def test_load_saved_ignores_run_time_flags(teacher):
    edit_json(teacher / "config.json", output_hidden_states=True, return_dict=False)
    model, _ = distill.load_saved(str(teacher))
    assert not model.config.output_hidden_states and model.config.return_dict
    assert distill.load_student(str(teacher))(["良い"])[0]["score"] >= 0.5


# ── --predict ──


def test_show_predictions_names_unknown_words(teacher, monkeypatch, capsys):
    distill.main(
        [
            "--output",
            str(teacher),
            "--predict",
            "この店の料理は美味しい。",
            "接客は最悪だった。",
            "接客は最悪だった。",
            "😀",
        ]
    )
    printed = capsys.readouterr()
    assert len(printed.out.splitlines()) == 4 and all(
        re.fullmatch(r"\w+\t[01]\.\d{4}", line) for line in printed.out.splitlines()
    )
    assert printed.err.splitlines() == [
        "note      the student does not know 最悪",
        "note      the student does not know 😀",
    ]


def test_stdin_lines_refuses_lines_that_are_not_utf_8(teacher, monkeypatch, capsys):
    content = io.BytesIO("良い\n".encode() + "悪い\n".encode("cp932"))
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(content, "utf-8"))
    with pytest.raises(SystemExit, match="text 2 is .*in valid UTF-8"):
        distill.main(["--output", str(teacher), "--predict"])
    assert len(capsys.readouterr().out.splitlines()) == 1  # what came before is answered


def test_unknown_words_are_none_in_readme_examples():
    tokenizer = distill.transformers.AutoTokenizer.from_pretrained(SAMPLE / "base")
    readme = (ROOT / "README.md").read_text("utf-8")
    commands = re.findall(r"(?:--predict |^predict\(|^print\(classify\()(.*)$", readme, re.M)
    texts = [text for command in commands for text in re.findall(r'"([^"]*。)"', command)]
    assert len(texts) >= 6
    for text in texts:
        assert distill.unknown_words(tokenizer, text) == [], text


# ── distill() ──


def test_custom_losses_by_hand():
    student, teacher = torch.tensor([[0.0, math.log(3)]]), torch.tensor([[0.0, 0.0]])

    def loss(name, t=1.0):
        return distill.CUSTOM_LOSSES[name](student, teacher, t).item()

    kl = 0.5 * math.log(0.5 / 0.25) + 0.5 * math.log(0.5 / 0.75)
    assert loss("kl") == pytest.approx(kl, rel=1e-6)
    low, high = 1 / (1 + math.sqrt(3)), math.sqrt(3) / (1 + math.sqrt(3))
    assert loss("kl", 2.0) == pytest.approx(
        4 * (0.5 * math.log(0.5 / low) + 0.5 * math.log(0.5 / high)), rel=1e-5
    )
    assert loss("mse") == pytest.approx(math.log(3) ** 2 / 2, rel=1e-6)
    cosine = distill.CUSTOM_LOSSES["cosine"](
        torch.tensor([[1.0, 0.0]]), torch.tensor([[1.0, 1.0]]), 1.0
    )
    assert cosine.item() == pytest.approx(1 - 1 / math.sqrt(2), rel=1e-6)
    ce = distill.CUSTOM_LOSSES["ce"](student, torch.tensor([1]), 1.0)
    assert ce.item() == pytest.approx(-math.log(0.75), rel=1e-6)


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
    return {
        split: [
            dict(input_ids=ids, labels=LABELS.index(label))
            for ids, (_, label) in zip(
                tokenizer([text for text, _ in rows(split, n)])["input_ids"], rows(split, n)
            )
        ]
        for split, n in (("train", 48), ("val", 16))
    }


def test_distill_trains_own_models(splits, settings):
    settings.setattr(distill, "LEARNING_RATE", 0.05)
    teacher, before = tiny_model(), Bag().state_dict()
    student = distill.distill(teacher, Bag(), splits)
    assert not torch.equal(student.state_dict()["out.weight"], before["out.weight"])
    again = distill.distill(teacher, Bag(), splits)
    assert all(
        torch.equal(one, again.state_dict()[name]) for name, one in student.state_dict().items()
    )
    unlabelled = {
        split: [{"input_ids": row["input_ids"]} for row in rows] for split, rows in splits.items()
    }
    assert isinstance(distill.distill(teacher, Bag(), unlabelled, [{"loss": "mse"}]), Bag)


@pytest.mark.parametrize("kind", ["torch", "numpy"])
def test_distill_takes_datasets_with_a_format(splits, settings, kind):
    plain = {split: distill.datasets.Dataset.from_list(rows) for split, rows in splits.items()}
    formatted = {split: rows.with_format(kind) for split, rows in plain.items()}
    found = [distill.distill(tiny_model(), Bag(), data) for data in (plain, formatted)]
    assert torch.equal(found[0].out.weight, found[1].out.weight)


@pytest.mark.parametrize("fast", [True, False])
def test_recording_gives_the_arguments_that_the_stock_forward_names(fast):
    model = tiny_model()
    if fast:
        model = FastBert(model.config)
        model.load_state_dict(tiny_model().state_dict())
    ids = torch.tensor([[2, 9, 11, 13, 3]])
    batch = {"input_ids": ids, "position_ids": torch.arange(5)[None] + 7, "length": ids}
    with contextlib.ExitStack() as hooks:
        logits = distill.recording(model.eval(), {"logits"}, hooks)(batch)["logits"]
    batch.pop("length")
    assert torch.allclose(logits, tiny_model().eval()(**batch).logits, atol=1e-6)


@pytest.mark.parametrize("fast", [True, False])
def test_distill_loss_of_logits_labels_and_layers_by_hand(splits, settings, fast):
    """The loss of terms over logits, labels and layers is their weighted sum.

    It is the same with our class and the stock one.
    """
    import transformers

    teacher, losses = tiny_model(), []
    kind = FastBert if fast else transformers.BertForSequenceClassification
    student = kind.from_pretrained(save_model("student", num_hidden_layers=1, seed=1))
    terms = [
        {"temperature": 3.0},
        {"teacher": "labels", "loss": "ce", "weight": 0.5},
        {
            "teacher": "bert.encoder.layer.2",
            "student": "bert.encoder.layer.0",
            "weight": 0.1,
            "loss": lambda one, other, t: (one[:, 0] - other[:, 0]).abs().mean(),
        },
    ]
    inputs = distill.collate(splits["train"][:4])
    given = {name: inputs[name] for name in ("input_ids", "attention_mask")}
    stock = transformers.BertForSequenceClassification.from_pretrained("student").eval()
    s, t = (
        stock(**given, output_hidden_states=True),
        teacher.eval()(**given, output_hidden_states=True),
    )
    kl = (
        F.kl_div((s.logits / 3).log_softmax(-1), (t.logits / 3).softmax(-1), reduction="batchmean")
        * 9
    )
    expected = (
        kl
        + 0.5 * F.cross_entropy(s.logits, inputs["labels"])
        + 0.1 * (s.hidden_states[1] - t.hidden_states[3])[:, 0].abs().mean()
    )

    def look(trainer, *more, **others):
        losses.append(trainer.compute_loss(trainer.model.eval(), inputs).item())

    settings.setattr(distill, "train", look)
    distill.distill(teacher, student, splits, terms)
    assert losses == [pytest.approx(expected.item(), rel=1e-4)]
    hooks = [
        hook
        for model in (teacher, student)
        for module in model.modules()
        for hook in module._forward_hooks.values()
    ]
    assert not [hook for hook in hooks if hook.__module__ == "distill"]
    assert (
        torch.allclose(student(**given).logits, s.logits, atol=1e-5)
        and not student.config.output_hidden_states
    )


@pytest.mark.parametrize(
    "term, told",
    [
        ({"student": "nothing"}, "the student's is no tensor"),
        ({"los": "kl"}, "accepted are teacher"),
        ({"loss": "l2"}, "as loss kl, mse"),
        ({"teacher": "bert.pooler"}, "8, 32"),
    ],
)
def test_distill_refuses_terms_that_do_not_fit(splits, settings, term, told):
    settings.setattr(distill, "BATCH_SIZE", 8)
    with pytest.raises(distill.Problem, match=told):
        distill.distill(tiny_model(), Bag(), splits, [term])


# ── distill(): what a second call may reuse ──


def distance(power):
    def loss(student, teacher, temperature):
        return ((student - teacher).abs() ** power).mean()

    return loss


class DropoutBag(Bag):
    def __init__(self, p, scale=1.0):
        super().__init__()
        self.dropout, self.scale = torch.nn.Dropout(p), scale

    def forward(self, input_ids, attention_mask):
        return self.dropout(super().forward(input_ids, attention_mask)) * self.scale


class NegativeBag(DropoutBag):
    def forward(self, input_ids, attention_mask):
        return -super().forward(input_ids, attention_mask)


def test_hash_of_tells_losses_and_models_apart(splits, settings, capsys):
    """Equal calls give the finished student; another function, or model of equal weights, not."""
    calls = [
        (DropoutBag(0.0), [{"loss": distance(1)}], None),
        (DropoutBag(0.0), [{"loss": distance(2)}], None),
        (DropoutBag(0.9), [{"loss": distance(1)}], None),
        (DropoutBag(0.0, scale=2.0), [{"loss": distance(1)}], None),
        (NegativeBag(0.0), [{"loss": distance(1)}], None),
        (DropoutBag(0.0), [{"loss": distance(1)}], lambda rows: distill.pad_columns(rows[::-1])),
        (DropoutBag(0.0), [{"loss": "mse"}], None),
        (DropoutBag(0.0).requires_grad_(False), [{"loss": "mse"}], None),
    ]
    calls[-1][0].out.bias.requires_grad_(True)
    students = []
    for student, terms, collate_fn in calls:
        start = {name: weight.clone() for name, weight in student.state_dict().items()}
        made = distill.distill(tiny_model(), student, splits, terms, collate_fn)
        assert "goes on after epoch" not in capsys.readouterr().out
        student.load_state_dict(start)
        again = distill.distill(tiny_model(), student, splits, terms, collate_fn)
        assert "goes on after epoch 2" in capsys.readouterr().out
        assert torch.equal(again.out.weight, made.out.weight)
        students.append(again.out.weight.detach().clone())
    different = {tuple(weight.flatten().tolist()) for weight in students[:5]}
    assert len(different) == 5


def test_hash_of_is_the_same_in_another_process(splits, tmp_path):
    """A function counts by its code and what it uses, in the script or in a file beside it."""
    (tmp_path / "rows.json").write_text(json.dumps(splits), "utf-8")
    theirs = """
import torch
class Parent: pass
class Child: parent = Parent
Parent.child = Child  # a circle
itself = {}
itself["me"] = itself
class Kind:
    square = property(lambda kind: 2)
SCALES = torch.ones(2)
def theirs(student, teacher, temperature):
    return (student - teacher).norm() * SCALES.sum() * Kind().square
"""
    script = f"""
import importlib, json, sys
sys.path[:0] = [{str(ROOT)!r}, {str(ROOT / "tests")!r}, "."]
sys.dont_write_bytecode = True
import torch
import distill
from conftest import tiny_model
import my_losses
SCALE = 1
def mine(student, teacher, temperature):
    assert temperature not in {{"a", "b", "c", "d"}}  # its order differs between processes
    return SCALE * (student - teacher).abs().mean()
class Words(torch.nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.bag, self.dropout = torch.nn.EmbeddingBag({VOCABULARY}, 2), torch.nn.Dropout(0.1)
    def forward(self, input_ids):
        return self.dropout(self.bag(input_ids))
def change(find, replacement):
    with open("my_losses.py") as file:
        content = file.read()
    with open("my_losses.py", "w") as file:
        file.write(content.replace(find, replacement))
    importlib.invalidate_caches()
    importlib.reload(my_losses)
distill.EPOCHS, distill.WARMUP_STEPS = 1, 0
for step in sys.argv[1:]:
    print("step", flush=True)
    exec(step)
    student = Words()
    if step == "pass # dropout":
        student.dropout.p = 0.2
    terms = [{{"loss": mine}}, {{"loss": my_losses.theirs}}]
    distill.distill(tiny_model(), student, json.load(open("rows.json")), terms)
"""
    (tmp_path / "my_losses.py").write_text(theirs, "utf-8")
    (tmp_path / "mine.py").write_text(script, "utf-8")

    def run_as_script():
        """In a copy of this process, which differs from a new one by the tests it has loaded."""
        for name, module in [*sys.modules.items()]:
            file = str(getattr(module, "__file__", ""))
            if name not in ("distill", "conftest") and distill.is_own_file(file):
                del sys.modules[name]
        for name, value in DEFAULTS.items():
            setattr(distill, name, value)
        distill.Figure.savefig = SAVE_FIGURE
        sys.argv = ["mine.py", "pass"]
        runpy.run_path("mine.py", run_name="__main__")

    def resumed(printed):
        return ["goes on after epoch 1" in part for part in printed.split("step\n")[1:]]

    status, printed = Copy(run_as_script).end()
    assert status == 0 and resumed(printed) == [False], printed
    steps = [
        ("pass", True),
        ("SCALE = 2", False),
        ("pass # dropout", False),
        ("pass", False),
        ("change('norm()', 'norm() ** 2')", False),
        ("pass", True),
        ("change('kind: 2', 'kind: 3')", False),
        ("my_losses.theirs.__defaults__ = (1,)", False),  # in memory only, as is the next
        ("my_losses.SCALES[0] = 3", False),
        ("pass", True),
    ]
    command = [sys.executable, "mine.py", *(step for step, _ in steps)]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    assert resumed(done.stdout) == [expected for _, expected in steps], done.stdout


def test_hash_of_without_a_hash_never_resumes(splits, capsys):
    scales = (scale for scale in [1.0] * 100)  # a generator cannot be pickled

    def loss(student, teacher, temperature):
        return next(scales) * F.mse_loss(student, teacher)

    for _ in range(2):
        distill.distill(tiny_model(), Bag(), splits, [{"loss": loss}])
        printed = capsys.readouterr().out
        assert "cannot be resumed" in printed and "goes on" not in printed


def test_distill_takes_the_lock_of_its_cache(splits):
    with contextlib.ExitStack() as locks:
        assert not distill.folder_faults(["CACHE"], locks)
        with pytest.raises(distill.Problem, match="CACHE.*another run is using it"):
            distill.distill(tiny_model(), Bag(), splits)


# ── distill(): batches and losses over tokens ──


def padded(row, length):
    more = length - len(row["input_ids"])
    mask = [1] * len(row["input_ids"]) + [0] * more
    return row | {"input_ids": row["input_ids"] + [0] * more, "attention_mask": mask}


def first_loss(settings, teacher, student, splits, terms, batch_size=6):
    """The loss of the first texts, without dropout."""
    losses = []

    def look(trainer, *more, **others):
        batch = trainer.data_collator([trainer.train_dataset[n] for n in range(batch_size)])
        losses.append(trainer.compute_loss(trainer.model.eval(), batch).item())

    with settings.context() as changed:
        changed.setattr(distill, "train", look)
        distill.distill(teacher, student, splits, terms)
    return losses[0]


LAYERS = {"teacher": "bert.encoder.layer.2", "student": "bert.encoder.layer.0"}


@pytest.mark.parametrize("loss", ["kl", "mse", "cosine"])
def test_tokens_only_leaves_padding_out(splits, settings, loss):
    """Rows that are padded already give the loss of the same rows without padding."""
    models = tiny_model().eval(), tiny_model(num_hidden_layers=1, seed=1).eval()
    terms = [{}, LAYERS | {"loss": loss}]
    plain = first_loss(settings, *models, splits, terms)
    longer = {split: [padded(row, 60) for row in table] for split, table in splits.items()}
    assert first_loss(settings, *models, longer, terms) == pytest.approx(plain, rel=1e-5)

    # by hand, text by text
    values = []
    for row in splits["train"][:6]:
        ids = torch.tensor([row["input_ids"]])
        states = [model(ids, output_hidden_states=True).hidden_states for model in models]
        teacher, student = states[0][3][0], states[1][1][0]
        if loss == "kl":
            teacher, student = teacher.log_softmax(-1), student.log_softmax(-1)
            values += (teacher.exp() * (teacher - student)).sum(-1).tolist()
        elif loss == "mse":
            values += (teacher - student).square().mean(-1).tolist()
        else:
            values += (1 - F.cosine_similarity(teacher, student, dim=-1)).tolist()
    only_layers = first_loss(settings, *models, splits, [LAYERS | {"loss": loss}])
    assert only_layers == pytest.approx(sum(values) / len(values), rel=1e-4)


class Tagger(torch.nn.Module):
    """It gives each token a label, and takes a column that only it knows."""

    def __init__(self, seed):
        super().__init__()
        torch.manual_seed(seed)
        self.words, self.out = torch.nn.Embedding(VOCABULARY, 8), torch.nn.Linear(8, 3)

    def forward(self, input_ids, attention_mask, weights, **more):
        assert weights.shape == input_ids.shape and "offset" in more and "length" not in more
        return self.out(self.words(input_ids) * weights[..., None])


def test_distill_of_token_labels_with_columns_of_its_own(splits, settings, capsys):
    tagged = {}
    for split, table in splits.items():
        tagged[split] = []
        for row in table:
            weights = [float(token % 3) for token in row["input_ids"]]
            labels = [-100, *(token % 3 for token in row["input_ids"][1:])]
            others = {"weights": weights, "offset": 7, "text": "文", "note": None}
            tagged[split].append(row | {"labels": labels} | others)
    terms = [{}, {"teacher": "labels", "loss": "ce"}]
    teacher, student = Tagger(0).eval(), Tagger(1).eval()
    found = first_loss(settings, teacher, student, tagged, terms)
    kl, ce = [], []
    for row in tagged["train"][:6]:
        inputs = {name: torch.tensor([row[name]]) for name in ("input_ids", "weights")}
        outputs = [m(**inputs, attention_mask=None, offset=7)[0] for m in (teacher, student)]
        teacher_logs, student_logs = (logits.log_softmax(-1) for logits in outputs)
        kl += (teacher_logs.exp() * (teacher_logs - student_logs)).sum(-1).tolist()
        ce += (-student_logs[range(1, len(row["labels"])), row["labels"][1:]]).tolist()
    assert found == pytest.approx(sum(kl) / len(kl) + sum(ce) / len(ce), rel=1e-4)
    distill.distill(teacher, student, tagged, terms)
    assert "nan" in capsys.readouterr().out  # one label a text is what accuracy is for


def test_pad_columns_pads_each_column():
    rows = [
        {"input_ids": [], "labels": [1, 2], "x": [[1.0, 2.0]], "n": 3, "text": "a", "w": [None]},
        {"input_ids": [7, 8], "labels": [0], "x": [[3.0, 4.0], [5.0, 6.0]], "n": 4, "text": "b"},
    ]
    rows = list(distill.as_dataset(rows, only_numbers=True))
    batch = distill.pad_columns(rows)
    assert batch["input_ids"].tolist() == [[0, 0], [7, 8]]
    assert batch["labels"].tolist() == [[1, 2], [0, -100]]
    assert batch["attention_mask"].tolist() == [[0, 0], [1, 1]]
    assert batch["x"].shape == (2, 2, 2) and batch["x"][0, 1].tolist() == [0, 0]
    assert batch["n"].tolist() == [3, 4] and batch.keys().isdisjoint({"text", "w"})


# ── load_student, --predict: threads, pipes ──


@pytest.mark.parametrize("kind", ["japanese", "rust"])
def test_load_student_answers_several_threads_as_one(rust, kind, monkeypatch):
    from concurrent.futures import ThreadPoolExecutor

    folder = save_model("student", tokenizer=kind == "japanese")
    if kind == "rust":
        rust.save_pretrained(folder)
    predict = distill.load_student(folder)
    words = "the film is not a good one , n ' t . この店の料理は美味しい。".split()
    batches = []
    for number in range(40):  # of all lengths, many of them truncated
        texts = [" ".join(words[(number + k) % 12 :] * (1 + (k * number) % 9)) for k in range(4)]
        batches.append(texts)
    expected = [predict(texts) for texts in batches]
    monkeypatch.setattr(sys, "setswitchinterval", sys.setswitchinterval)
    sys.setswitchinterval(1e-5)
    try:
        with ThreadPoolExecutor(8) as pool:
            answers = list(pool.map(predict, batches * 6))
    finally:
        sys.setswitchinterval(0.005)
    assert answers == expected * 6


def test_stdin_lines_answers_each_line_of_a_pipe_as_it_comes(teacher):
    read_end, questions = os.pipe()
    answers, write_end = os.pipe()

    def predict():  # in a copy of this process, with streams as Python opens them on pipes
        os.close(questions), os.close(answers)
        sys.stdin, sys.stdout = open(read_end), open(write_end, "w")
        distill.main(["--output", str(teacher), "--predict"])

    process = multiprocessing.get_context("fork").Process(target=predict)
    process.start()
    os.close(read_end), os.close(write_end)
    found = []
    with open(answers, "rb") as answers:
        for text in "良い。\n", "悪い。\r\n", "三行目":
            os.write(questions, text.encode()[:2])
            os.write(questions, text.encode()[2:])
            if text.endswith("\n"):  # the pipe is still open
                found.append(answers.readline())
        os.close(questions)
        found.append(answers.readline())
        assert answers.read() == b""
    assert all(re.fullmatch(rb"(negative|positive)\t0\.\d{4}\n", answer) for answer in found)
    process.join()
    assert process.exitcode == 0
