"""Fast BERT: every shortcut equals the stock library."""

import contextlib
import copy
import json
from pathlib import Path

import datasets
import pytest
import torch
import transformers
from conftest import VOCABULARY, history, relative_error, tiny_model

import distill


def pair(**changes):
    """A stock model with large random weights and biases, and ours with the same."""
    stock = tiny_model(max_position_embeddings=512, **changes)
    ours = distill.BertForSequenceClassification(stock.config)
    ours.load_state_dict(stock.state_dict())
    return stock, ours


def batch(n, length, padding="some", seed=0):
    """n texts of `length` tokens.

    padding: "none", "some" (random tails), "tails" (each text, by at least one) or "holes" (half
    of the tokens but the first, as word dropout hides them).
    """
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(5, VOCABULARY, (n, length), generator=generator)
    mask = torch.ones_like(ids)
    if padding != "none":
        keep = (
            torch.randint(1, length + (padding == "some"), (n, 1), generator=generator)
            if length > 1
            else length
        )
        mask = (torch.arange(length) < keep).long().expand(n, length)
    if padding == "holes":
        mask = (torch.rand(n, length, generator=generator) < 0.5).long()
        mask[:, 0] = 1
    kinds = torch.randint(0, 2, (n, length), generator=generator)
    return {"input_ids": ids, "attention_mask": mask, "token_type_ids": kinds}


def compare(stock, ours, inputs, logits, gradients):
    """Logits and gradients agree within these relative errors.

    (Of 1 % of the largest gradient, where all is less.)
    """
    results = [model(**inputs).logits for model in (stock, ours)]
    assert relative_error(results[1], results[0]) < logits
    weight = torch.linspace(-1, 2, results[0].numel(), dtype=results[0].dtype).view_as(results[0])
    for result in results:
        (result * weight).sum().backward()
    floor = max(one.grad.abs().max().item() for one in stock.parameters()) / 100
    for (name, one), other in zip(stock.named_parameters(), ours.parameters()):
        if name.endswith(f"{stock.config.num_hidden_layers - 1}.attention.self.key.bias"):
            assert (
                other.grad is None and one.grad.abs().max() < floor
            )  # in truth 0: softmax does not see it
        else:
            assert relative_error(other.grad, one.grad, floor) < gradients, name


# ── BertForSequenceClassification ──


@pytest.mark.parametrize("layers", [1, 2, 12])
@pytest.mark.parametrize(
    "n, length, padding",
    [
        (1, 1, "none"),
        (33, 2, "some"),
        (33, 19, "tails"),
        (1, 512, "none"),
        (2, 512, "tails"),
        (9, 33, "holes"),
    ],
)
def test_bert_for_sequence_classification_equals_stock_model(layers, n, length, padding):
    for dtype, logits, gradients in (torch.float32, 1e-5, 1e-4), (torch.float64, 1e-10, 1e-10):
        stock, ours = (model.to(dtype).eval() for model in pair(num_hidden_layers=layers))
        compare(stock, ours, batch(n, length, padding), logits, gradients)


@pytest.mark.parametrize("missing", ["attention_mask", "token_type_ids"])
def test_bert_for_sequence_classification_without_mask_or_types(missing):
    inputs = batch(5, 9)
    del inputs[missing]
    compare(*(model.eval() for model in pair()), inputs, 1e-5, 1e-4)


def test_bert_for_sequence_classification_accepts_inputs_embeds():
    stock, ours = (model.eval() for model in pair())
    inputs = batch(5, 9)
    inputs["inputs_embeds"] = torch.randn(5, 9, 32, requires_grad=True)
    given = inputs["inputs_embeds"].detach().clone()
    del inputs["input_ids"]
    results = []
    for model in stock, ours:
        logits = model(**inputs).logits
        results.append((logits, *torch.autograd.grad(logits.sum(), inputs["inputs_embeds"])))
    assert (
        relative_error(results[1][0], results[0][0]) < 1e-5
        and relative_error(results[1][1], results[0][1]) < 1e-4
    )
    assert torch.equal(given, inputs["inputs_embeds"])


@pytest.mark.parametrize(
    "activation, heads, hidden", [("gelu", 4, 64), ("relu", 1, 24), ("gelu_new", 12, 768)]
)
def test_bert_for_sequence_classification_equals_stock_in_shapes(activation, heads, hidden):
    models = pair(
        hidden_act=activation,
        num_attention_heads=heads,
        hidden_size=hidden,
        num_hidden_layers=1,
        initializer_range=0.05,
    )
    compare(*(model.eval() for model in models), batch(4, 7), 1e-5, 1e-4)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_bert_for_sequence_classification_with_sdpa_and_eager(attention):
    stock, ours = (model.eval() for model in pair())
    for model in stock, ours:
        model.set_attn_implementation(attention)
    compare(stock, ours, batch(4, 7), 1e-5, 1e-4)


@pytest.mark.parametrize("labels", [torch.tensor([0, 1, 1]), torch.tensor([[0], [1], [1]])])
def test_bert_for_sequence_classification_gives_stock_loss(labels):
    stock, ours = (model.eval() for model in pair())
    for _ in range(2):  # the first call sets problem_type
        one, other = (model(**batch(3, 5), labels=labels) for model in (stock, ours))
        assert (
            relative_error(other.loss, one.loss) < 1e-5
            and relative_error(other.logits, one.logits) < 1e-5
        )
    for model in stock, ours:
        model.config.problem_type = "multi_label_classification"
    one, other = (model(**batch(3, 5), labels=torch.ones(3, 2)).loss for model in (stock, ours))
    assert relative_error(other, one) < 1e-5


@pytest.mark.parametrize(
    "more",
    [
        {"output_hidden_states": True},
        {"output_attentions": True},
        {"return_dict": False},
        {"position_ids": torch.arange(5)[None] + 3},
    ],
)
def test_bert_for_sequence_classification_falls_back_to_stock(more):
    stock, ours = (model.eval() for model in pair())
    if "output_attentions" in more:
        stock.set_attn_implementation("eager"), ours.set_attn_implementation("eager")
    one, other = (model(**batch(3, 5), **more) for model in (stock, ours))
    assert type(one) is type(other) and len(one) == len(other)

    def flat(value):
        return (
            [value] if torch.is_tensor(value) else [leaf for part in value for leaf in flat(part)]
        )

    values = [
        flat(result.to_tuple() if hasattr(result, "to_tuple") else result)
        for result in (one, other)
    ]
    assert all(relative_error(other, one) < 1e-5 for one, other in zip(*values))


def test_bert_for_sequence_classification_falls_back_for_pair_mask():
    stock, ours = (model.eval() for model in pair())
    inputs = batch(3, 5)
    inputs["attention_mask"] = torch.tril(torch.ones(3, 5, 5)).bool()[:, None]
    assert relative_error(*(model(**inputs).logits for model in (ours, stock))) < 1e-5
    for model in stock, ours:
        model.config.output_hidden_states = True
    assert len(ours(**batch(3, 5)).hidden_states) == 4
    with pytest.raises(ValueError, match="exactly one of input_ids or inputs_embeds"):
        ours()


def test_bert_for_sequence_classification_with_checkpointing():
    _, plain = pair(num_hidden_layers=4)
    saving = copy.deepcopy(plain)
    saving.gradient_checkpointing_enable()
    plain.eval(), saving.train()
    for module in saving.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    assert saving.is_gradient_checkpointing
    for model in plain, saving:
        model(**batch(3, 7)).logits.square().sum().backward()
    for one, other in zip(plain.parameters(), saving.parameters()):
        assert one.grad is other.grad is None or relative_error(other.grad, one.grad) < 1e-5


def test_bert_for_sequence_classification_is_saved_as_stock_class():
    stock, ours = pair(num_hidden_layers=1)
    assert repr(ours) == repr(stock) and "(0): BertLayer(" in repr(ours)
    ours.save_pretrained("ours")
    config = json.loads(Path("ours/config.json").read_text())
    assert config["architectures"] == ["BertForSequenceClassification"] and "auto_map" not in config
    loaded = transformers.AutoModelForSequenceClassification.from_pretrained("ours").eval()
    assert type(loaded) is transformers.BertForSequenceClassification
    assert all(map(torch.equal, stock.state_dict().values(), loaded.state_dict().values()))
    assert relative_error(loaded(**batch(3, 7)).logits, ours.eval()(**batch(3, 7)).logits) < 1e-5


def test_bert_for_sequence_classification_drops_in_stock_places(monkeypatch):
    """With a fixed mask in place of the random one.

    It is drawn per head and key in the attention, per unit elsewhere.
    """
    generator = torch.Generator().manual_seed(0)
    by_unit = (torch.rand(5, 32, generator=generator) > 0.3) / 0.7
    by_key = (torch.rand(5, 2, 9, generator=generator) > 0.3) / 0.7
    seen = []

    def dropout(x, p=0.5, training=True, inplace=False):
        if not training or p == 0:
            return x
        seen.append(p)
        kind = (
            by_key if x.shape[-1] == 9 else by_unit
        )  # (5, 2, 9, 9) or (5, 2, 9); (5, 9, 32) or (5, 32)
        return x * (kind if x.dim() == kind.dim() else kind.unsqueeze(-2))

    monkeypatch.setattr(torch.nn.functional, "dropout", dropout)
    monkeypatch.setattr(distill.FastDropout, "forward", torch.nn.Dropout.forward)
    stock, ours = pair(
        num_hidden_layers=1,
        attention_probs_dropout_prob=0.3,
        hidden_dropout_prob=0.2,
        classifier_dropout=0.4,
    )
    stock.set_attn_implementation("eager")
    for model in stock, ours:
        model.train()
        model.bert.embeddings.dropout.p = 0.0  # below
    compare(stock, ours, batch(5, 9), 1e-5, 1e-4)
    assert seen == [0.3, 0.2, 0.2, 0.4] * 2


# ── FastDropout and ClsAttention ──


@pytest.mark.parametrize(
    "p, shape", [(0.1, (64, 50, 32)), (0.5, (100_000,)), (0.01, (10, 100_000)), (0.9, (300, 300))]
)
def test_fast_dropout_keeps_its_distribution(p, shape):
    """What stays is x / (1 - p); each unit falls out with probability p.

    It does so independent of its neighbours and of last time.
    """
    torch.manual_seed(0)
    dropout, x = distill.FastDropout(p), torch.randn(shape).requires_grad_()
    y, again = dropout(x), dropout(x)
    out = y == 0
    assert torch.allclose(y, torch.where(out, 0, x / (1 - p)))
    y.sum().backward()
    assert torch.allclose(x.grad, torch.where(out, 0, 1 / (1 - p)))
    flat = out.flatten()
    for share, expected in (
        (flat, p),
        (flat & (again == 0).flatten(), p**2),
        (flat[1:] & flat[:-1], p**2),
        (flat[7:] & flat[:-7], p**2),
        (flat[:99], p),
        (flat[-99:], p),
    ):
        assert (
            abs(share.double().mean() - expected)
            < 5 * (expected * (1 - expected) / len(share)) ** 0.5
        )
    assert dropout.eval()(x) is x and not (distill.FastDropout(0.0)(x) == 0).any()


def test_fast_dropout_replaces_every_dropout_of_the_model():
    _, ours = pair()
    kinds = [type(module) for module in ours.modules() if isinstance(module, torch.nn.Dropout)]
    assert kinds == [distill.FastDropout] * (1 + 3 * 3 + 1)


def test_cls_attention_gradient_by_finite_differences():
    generator = torch.Generator().manual_seed(0)

    def draw(*shape):
        return torch.randn(*shape, dtype=torch.float64, generator=generator).requires_grad_()

    mask = torch.zeros(2, 1, 5, dtype=torch.float64)
    mask[1, 0, 3:] = torch.finfo(torch.float64).min
    keep = (torch.rand(2, 3, 5, generator=generator) > 0.3).double() / 0.7
    for given in (None, None), (mask, None), (mask, keep):
        assert torch.autograd.gradcheck(
            lambda x, score: distill.ClsAttention.apply(x, score, *given),
            (draw(2, 5, 4), draw(2, 3, 4)),
        )


# ── used_embedding_rows ──


def dataset(ids):
    return datasets.Dataset.from_dict({"input_ids": ids})


def test_used_embedding_rows_keep_vectors_and_are_put_back():
    model = tiny_model()
    before, ids = copy.deepcopy(model.state_dict()), torch.tensor([[2, 190, 77, 3, 0]])
    expected = model.eval()(ids).logits
    with distill.used_embedding_rows(model, dataset([[2, 190]]), dataset([[77, 3]])):
        assert model.get_input_embeddings().weight.shape == (
            5 + 1,
            32,
        )  # 0, the padding, among them
        assert torch.equal(model(ids).logits, expected)
    assert (
        all(map(torch.equal, before.values(), model.state_dict().values()))
        and model.state_dict().keys() == before.keys()
    )


def steps(model, n, used):
    """n steps of AdamW with decay.

    The batches use 4 to 40, of which 40 alone is in a second set.
    """
    with (
        distill.used_embedding_rows(model, dataset([list(range(4, 40))]), dataset([[40]]))
        if used
        else contextlib.nullcontext()
    ):
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.3)
        for step in range(n):
            torch.manual_seed(step)
            ids = torch.randint(4, 40, (8, 6))
            ids[0, 3:] = 0  # padding, which must not learn
            model.train()(ids, attention_mask=(ids != 0).long()).logits.square().sum().backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
    return model


@pytest.mark.parametrize("ours", [False, True])
def test_used_embedding_rows_train_like_all_rows(ours):
    plain = pair()[ours]
    start = plain.get_input_embeddings().weight.detach().clone()
    used = steps(copy.deepcopy(plain), 12, used=True)
    plain = steps(plain, 12, used=False)
    for (name, one), other in zip(plain.named_parameters(), used.parameters()):
        if not name.endswith("self.key.bias"):  # its gradient is rounding alone
            assert relative_error(other, one) < 1e-4, name
    for row in 0, 3, 40, VOCABULARY - 1:  # never learnt: only decayed
        end = used.get_input_embeddings().weight[row]
        assert relative_error(end, start[row] * (1 - 1e-2 * 0.3) ** 12) < 1e-5
        assert relative_error(end, plain.get_input_embeddings().weight[row]) < 1e-5


def test_used_embedding_rows_leave_the_run_unchanged(teacher, data, run, monkeypatch):
    settings = ["--patience", "9", "--weight-decay", "0.5", "--learning-rate", "0.003"]
    run(*settings)
    monkeypatch.setattr(distill, "used_embedding_rows", lambda *all: contextlib.nullcontext())
    run(*settings, "--output", "plain", "--cache", "other")
    load = transformers.BertForSequenceClassification.from_pretrained
    for (name, one), other in zip(
        load("plain").named_parameters(), load("distilled_model").parameters()
    ):
        assert relative_error(other, one) < 1e-3, name
    for one, other in zip(history()[1:], history("plain")[1:]):
        assert [float(x) for x in one.split(",")] == pytest.approx(
            [float(x) for x in other.split(",")], rel=1e-4
        )


# ── clip_gradients ──


def test_clip_gradients_equals_torch():
    models = [tiny_model(), tiny_model()]
    for norm in 1e9, 0.5:
        for model in models:
            model.zero_grad()
            model.eval()(torch.tensor([[2, 9, 3]])).logits.square().sum().backward()
        torch.nn.utils.clip_grad_norm_(models[0].parameters(), norm)
        distill.clip_gradients(models[1], norm)
        for one, other in zip(*(model.parameters() for model in models)):
            assert relative_error(other.grad, one.grad) < 1e-4
