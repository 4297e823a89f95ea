"""Student: the layers it starts from, its dropout, its word vectors."""

import re
from pathlib import Path

import datasets
import pytest
import torch
from conftest import SAMPLE, FastBert, rows, tiny_model
from transformers import AutoTokenizer, BertForSequenceClassification

import distill

# ── build_student ──


@pytest.mark.parametrize(
    "layers, chosen",
    [("first", [0, 1]), ("middle", [2, 3]), ("last", [3, 4]), ("spread", [0, 4]), ((3, 1), [3, 1])],
)
def test_build_student_copies_chosen_layers(settings, layers, chosen):
    settings.setattr(distill, "NUM_LAYERS", 2)
    settings.setattr(distill, "INIT_LAYERS", layers)
    teacher = tiny_model(num_hidden_layers=5)
    weights, student = teacher.state_dict(), distill.build_student(teacher)
    assert type(student) is FastBert and student.config.num_hidden_layers == 2
    assert {**student.config.to_dict(), "num_hidden_layers": 5} == teacher.config.to_dict()
    for name, tensor in student.state_dict().items():
        for number, source in enumerate(chosen):
            if f"layer.{number}." in name:
                name = name.replace(f"layer.{number}.", f"layer.{source}.")
                break
        assert torch.equal(tensor, weights[name]), name
    student.classifier.bias.data.add_(1)
    assert torch.equal(
        weights["classifier.bias"], teacher.classifier.bias
    )  # the teacher's weights are its own


def test_build_student_has_structure_of_teacher(teacher, data, run):
    run("--num-layers", "2")
    teacher_text, student_text = (
        re.sub(
            r"\s+\((\d+(-\d+)?|\d+-\d+)\): (\d+ x )?BertLayer",
            "BertLayer",
            str(BertForSequenceClassification.from_pretrained(folder)),
        )
        for folder in (teacher, "distilled_model")
    )
    assert teacher_text == student_text


@pytest.mark.parametrize("dropout, expected", [(None, {0.1, 0.3}), (0.25, {0.25}), (0, {0})])
def test_build_student_sets_dropout_in_training_alone(settings, dropout, expected):
    settings.setattr(distill, "DROPOUT", dropout)
    teacher = tiny_model(attention_probs_dropout_prob=0.3)

    def drops(model):
        return {module.p for module in model.modules() if isinstance(module, torch.nn.Dropout)}

    student = distill.build_student(teacher)
    assert drops(student) == expected and drops(teacher) == {0.1, 0.3}
    student.save_pretrained("student")
    assert drops(BertForSequenceClassification.from_pretrained("student")) == {0.1, 0.3}


def test_build_student_random_ignores_teacher_weights(settings):
    settings.setattr(distill, "STUDENT_INIT", "random")
    first, second = distill.build_student(tiny_model()), distill.build_student(tiny_model(seed=1))
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters()))


def test_load_student_tokenizer_refuses_one_that_cannot_be_saved(
    teacher, data, fails, monkeypatch, capsys
):
    def broken(*given, **more):
        raise ValueError("its vocabulary file is gone")

    monkeypatch.setattr(distill.transformers.BertJapaneseTokenizer, "save_pretrained", broken)
    assert "the student's tokenizer cannot be saved: its vocabulary file is gone" in fails()
    assert "epoch" not in capsys.readouterr().out


# ── layers_to_copy ──


def test_layers_to_copy_refuses_layers_the_teacher_lacks(teacher, data, fails):
    assert "the teacher has layers 0 to 2" in fails("--num-layers", "4")
    assert "the teacher has layers 0 to 2" in fails("--num-layers", "1", "--init-layers", "(3,)")
    assert "the teacher has layers 0 to 2" in fails("--num-layers", "4", "--init-layers", "spread")


# ── refit_word_vectors ──


@pytest.mark.parametrize("pairs", [False, True])
def test_refit_word_vectors_equals_definition_on_stock_states(settings, pairs):
    """By the definition, text by text.

    LayerNorm(word + mean place) is the mean of the word's states, LayerNorm undone.
    """
    tokenizer = AutoTokenizer.from_pretrained(SAMPLE / "base")
    stock = tiny_model(num_hidden_layers=4).eval()
    torch.nn.init.uniform_(stock.bert.embeddings.LayerNorm.weight, 0.9, 1.1)
    student, texts = distill.build_student(stock), [text for text, _ in rows("train", 24)]
    given = [
        tokenizer(text, text[:5] if pairs else None, return_token_type_ids=True) for text in texts
    ]
    table = datasets.Dataset.from_dict(
        {
            "input_ids": [one["input_ids"] for one in given],
            "length": [len(one["input_ids"]) for one in given],
            "key": texts,
            **({"token_type_ids": [one["token_type_ids"] for one in given]} if pairs else {}),
        }
    )
    Path(distill.CACHE).mkdir()
    before = student.get_input_embeddings().weight.detach().clone()
    distill.refit_word_vectors(student, stock, tokenizer, table, distill.collate)
    after = student.get_input_embeddings().weight.detach()

    special = {*tokenizer.all_special_ids}
    alone = [
        {"input_ids": tokenizer.build_inputs_with_special_tokens([number])}
        for number in range(len(tokenizer))
        if number not in special
    ]
    embeddings, states, places = stock.bert.embeddings, {}, {}
    with torch.no_grad():
        for one in [*given, *alone]:
            ids = torch.tensor([one["input_ids"]])
            types = torch.tensor([one.get("token_type_ids", [0] * len(one["input_ids"]))])
            hidden = stock.bert(ids, token_type_ids=types, output_hidden_states=True).hidden_states[
                distill.REFIT_WORDS
            ][0]
            undone = (hidden - embeddings.LayerNorm.bias) / embeddings.LayerNorm.weight
            place = embeddings.position_embeddings.weight[
                : len(ids[0])
            ] + embeddings.token_type_embeddings(types[0])
            for number, state, where in zip(ids[0].tolist(), undone, place):
                states.setdefault(number, []).append(state)
                places.setdefault(number, []).append(where)

    def normal(x):
        return torch.nn.functional.layer_norm(x, x.shape)

    for number in states:
        mean, place = torch.stack(states[number]).mean(0), torch.stack(places[number]).mean(0)
        torch.testing.assert_close(
            normal(after[number] + place), normal(mean), atol=1e-3, rtol=1e-3
        )
        old, new = ((table[number] + place).std(correction=0).item() for table in (before, after))
        assert new == pytest.approx(old, rel=1e-4)
    unseen = [number for number in special if number not in states]
    assert unseen and torch.equal(after[unseen], before[unseen]) and after.isfinite().all()


def test_refit_word_vectors_with_fast_tokenizer(rust):
    teacher, text = tiny_model(vocab_size=len(rust)), "the film is not good"
    student, ids = distill.build_student(teacher), rust(text)["input_ids"]
    before = student.get_input_embeddings().weight.detach().clone()
    Path(distill.CACHE).mkdir()
    table = datasets.Dataset.from_dict({"input_ids": [ids], "length": [len(ids)], "key": [text]})
    distill.refit_word_vectors(student, teacher, rust, table, distill.collate)
    changed = (student.get_input_embeddings().weight != before).any(-1).nonzero().flatten().tolist()
    assert changed == sorted(
        {*range(len(rust))} - {rust.pad_token_id, rust.unk_token_id, rust.mask_token_id}
    )


def test_refit_word_vectors_runs_once_and_where_it_can(teacher, data, run):
    note = "to refit word vectors"
    assert (
        "its first 2 layers" in (out := run()) and note in out and note not in run("--alpha", "0.9")
    )
    assert note not in run("--refit-words", "0") and note not in run("--student-init", "random")
    assert "its first 3 layers" in run("--refit-words", "7")  # of a teacher that has no more

    # the same ids of the texts, but one of the words is read by itself no longer
    tokenizer = AutoTokenizer.from_pretrained(teacher)
    tokenizer.add_special_tokens({"additional_special_tokens": ["。"]})
    tokenizer.save_pretrained(teacher)
    printed = run()
    assert note in printed and "labelled 0 texts" in printed
