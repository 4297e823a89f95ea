"""Fast BERT: every shortcut equals the stock library."""

import contextlib
import copy
import inspect
import json
import pickle
import re
from pathlib import Path
from types import SimpleNamespace

import datasets
import pytest
import torch
import transformers
from conftest import VOCABULARY, family_model, history, relative_error, save_family, tiny_model

import distill


def pair(**changes):
    """A stock model with large random weights and biases, and ours with the same."""
    stock = tiny_model(max_position_embeddings=512, **changes)
    ours = distill.classifier_class(stock.config)(stock.config)
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


def compare(stock, ours, inputs, logits, gradients, is_fast=True):
    """Logits and gradients agree within these relative errors.

    (Of 1 % of the largest gradient, where all is less.) is_fast: whether the fast layer is to run.
    """
    with counted_calls("cls_context") as calls:
        results = [model(**inputs).logits for model in (stock, ours)]
    assert len(calls) == is_fast
    assert relative_error(results[1], results[0]) < logits
    weight = torch.linspace(-1, 2, results[0].numel(), dtype=results[0].dtype).view_as(results[0])
    for result in results:
        (result * weight).sum().backward()
    stock_grads = [one.grad for one in stock.parameters() if one.grad is not None]
    floor = max(grad.abs().max().item() for grad in stock_grads) / 100
    for (name, one), other in zip(stock.named_parameters(), ours.parameters()):
        if other.grad is None and re.search(r"\.(self\.key|k_lin|key_proj)\.bias$", name):
            assert one.grad.abs().max() < floor  # in truth 0: softmax does not see it
        elif one.grad is not None or other.grad is not None:  # not: what nobody reads
            assert relative_error(other.grad, one.grad, floor) < gradients, name


@contextlib.contextmanager
def counted_calls(name):
    """A list with an item for each call of this function of distill.py in the block."""
    function, calls = getattr(distill, name), []
    setattr(distill, name, lambda *given: calls.append(name) or function(*given))
    try:
        yield calls
    finally:
        setattr(distill, name, function)


def last_layer(model):
    body = model.base_model
    return (body.encoder if hasattr(body, "encoder") else body.transformer).layer[-1]


def is_fast_for(variant, layers):
    """Whether the fast layer runs for this of VARIANTS."""
    family, changes = VARIANTS[variant]
    return family != "deberta-v2" or (layers == 1 and "relative_attention" in changes)


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
    for (name, one), other in zip(plain.named_parameters(), saving.parameters()):
        if not name.endswith("key.bias"):  # whose gradient in the stock class is noise
            assert relative_error(other.grad, one.grad) < 1e-5


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


# ── The other families ──

DEBERTA = {"relative_attention": True, "pos_att_type": ["p2c", "c2p"], "position_buckets": 8}
DEBERTA_V3 = DEBERTA | {
    "share_att_key": True,
    "position_biased_input": False,
    "norm_rel_ebd": "layer_norm",
}
VARIANTS = {
    **{family: (family, {}) for family in distill.FAST_FAMILIES if family != "deberta-v2"},
    "roberta with padding 1": ("roberta", {"pad_token_id": 1, "type_vocab_size": 1}),
    "small electra": ("electra", {"embedding_size": 24}),
    "distilbert with sines": ("distilbert", {"sinusoidal_pos_embds": True}),
    "deberta-v2": ("deberta-v2", DEBERTA),
    "deberta-v2 without distances": ("deberta-v2", {}),
    "deberta-v2 of keys": ("deberta-v2", DEBERTA | {"pos_att_type": ["c2p"]}),
    "deberta-v2 of queries": ("deberta-v2", DEBERTA | {"pos_att_type": "p2c"}),
    "deberta-v2 of contents": ("deberta-v2", DEBERTA | {"pos_att_type": []}),
    "deberta-v2 without buckets": ("deberta-v2", DEBERTA | {"position_buckets": -1}),
    "deberta-v2 of small vectors": ("deberta-v2", DEBERTA | {"embedding_size": 24}),
    "deberta-v3": ("deberta-v2", DEBERTA_V3 | {"type_vocab_size": 2}),
    "deberta-v2 with convolution": ("deberta-v2", DEBERTA_V3 | {"conv_kernel_size": 3}),
}


def family_pair(variant, n_layers):
    """A stock model of a family with large random weights and biases in float64, and ours."""
    family, changes = VARIANTS[variant]
    changes = {"max_position_embeddings": 600, "num_hidden_layers": n_layers} | changes
    ours = family_model(family, **changes).double().eval()
    for name, tensor in ours.named_parameters():
        if "bias" in name:
            torch.nn.init.normal_(tensor, std=0.1)
    stock = transformers.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING[type(ours.config)](ours.config)
    stock.double().load_state_dict(ours.state_dict())
    return stock.eval(), ours


def family_batch(stock, *shape):
    """A batch as a tokenizer of this family makes it: padding has the id of padding."""
    inputs = batch(*shape)
    config = stock.config
    is_tail = inputs["attention_mask"].flip(1).cumsum(1).flip(1) == 0
    inputs["input_ids"][is_tail] = config.pad_token_id
    if not distill.takes_token_types(config):
        del inputs["token_type_ids"]
    return inputs


@pytest.mark.parametrize("layers", [1, 3])
@pytest.mark.parametrize(
    "shape", [(1, 1, "none"), (33, 19, "tails"), (2, 512, "some"), (9, 33, "holes")]
)
@pytest.mark.parametrize("variant", VARIANTS)
def test_fast_class_equals_stock_model_of_family(variant, shape, layers):
    stock, ours = family_pair(variant, layers)
    inputs = family_batch(stock, *shape)
    compare(stock, ours, inputs, 1e-9, 1e-9, is_fast_for(variant, layers))


@pytest.mark.parametrize("variant", VARIANTS)
def test_fast_class_of_family_without_mask_or_with_inputs_embeds(variant):
    stock, ours = family_pair(variant, 1)
    inputs = family_batch(stock, 5, 9, "tails")
    only_ids = {"input_ids": inputs["input_ids"]}
    compare(stock, ours, only_ids, 1e-9, 1e-9, is_fast_for(variant, 1))
    embeds = stock.get_input_embeddings()(inputs.pop("input_ids")).detach()
    stock.zero_grad(), ours.zero_grad()
    results = []
    for model in stock, ours:
        given = embeds.clone().requires_grad_()
        logits = model(inputs_embeds=given, **inputs).logits
        results.append((logits, *torch.autograd.grad(logits.square().sum(), given)))
    assert all(relative_error(mine, theirs) < 1e-9 for theirs, mine in zip(*results))


@pytest.mark.parametrize("layers", [1, 2])
@pytest.mark.parametrize("variant", VARIANTS)
def test_fast_class_of_family_gives_stock_loss_and_states(variant, layers):
    stock, ours = family_pair(variant, layers)
    inputs = family_batch(stock, 3, 9, "tails")
    more = {"labels": torch.tensor([0, 1, 1]), "output_hidden_states": True}
    one, other = (model(**inputs, **more) for model in (stock, ours))
    assert relative_error(other.loss, one.loss) < 1e-12 and len(other.hidden_states) == layers + 1
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    expected = stock(ids, mask).logits
    assert relative_error(ours(ids, mask, None).logits, expected) < 1e-9
    for same_mask in mask.bool(), mask.double(), 2 * mask:
        if "convolution" not in variant or same_mask.dtype != torch.bool:  # stock fails
            expected = stock(ids, same_mask).logits
            assert relative_error(ours(ids, same_mask).logits, expected) < 1e-9
    places = {"position_ids": torch.arange(9)[None] + 3}
    one, other = (model(ids, mask, **places).logits for model in (stock, ours))
    assert relative_error(other, one) < 1e-12
    # transformers leaves hooks behind for the states
    compare(stock, ours, inputs, 1e-9, 1e-9, is_fast_for(variant, layers))


@pytest.mark.parametrize("variant", VARIANTS)
def test_fast_class_of_family_drops_in_stock_places(variant, monkeypatch):
    """With masks that are the same for all texts and heads, in place of the random ones."""
    generator = torch.Generator().manual_seed(0)
    masks = {size: (torch.rand(size, generator=generator) > 0.3) / 0.7 for size in (9, 24, 32)}
    seen = []

    def dropout(x, p=0.5, training=True, inplace=False):
        if not training or p == 0:
            return x
        seen.append(p)
        return x * masks[x.shape[-1]]

    monkeypatch.setattr(torch.nn.functional, "dropout", dropout)
    monkeypatch.setattr(distill.FastDropout, "forward", torch.nn.Dropout.forward)
    stock, ours = family_pair(variant, 1)
    rates = {}
    for model in stock, ours:
        if VARIANTS[variant][0] != "deberta-v2":
            model.set_attn_implementation("eager")
        for name, module in model.named_modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = rates.setdefault(name, 0.1 + len(rates) / 100)
        model.train()
    inputs = family_batch(stock, 5, 9, "tails")
    compare(stock, ours, inputs, 1e-9, 1e-9, is_fast_for(variant, 1))
    half = len(seen) // 2
    assert sorted(seen[:half]) == sorted(seen[half:]) and {*seen} == {*rates.values()}


@pytest.mark.parametrize("family", distill.FAST_FAMILIES)
def test_fast_class_of_family_is_saved_as_stock_class(family):
    folder = save_family("ours", family)
    config = json.loads((folder / "config.json").read_text())
    loaded = transformers.AutoModelForSequenceClassification.from_pretrained(folder)
    assert config["architectures"] == [type(loaded).__name__] and "auto_map" not in config
    assert not isinstance(loaded, distill.FastClassifier)
    ours = distill.load_model(str(folder))
    assert isinstance(ours, distill.FastClassifier)
    assert repr(ours.eval()) == repr(loaded.eval())
    again = pickle.loads(pickle.dumps(ours))  # as between processes
    assert type(again) is type(ours)
    assert all(map(torch.equal, again.parameters(), ours.parameters()))


EACH_CLASS = "bert", "roberta", "small electra", "distilbert", "deberta-v3"


@pytest.mark.parametrize("variant", EACH_CLASS)
def test_fast_class_of_family_runs_hooks(variant):
    """The hook of any module is called as in the stock class, and its answer counts."""
    stock, ours = family_pair(variant, 1)
    inputs = family_batch(stock, 3, 9, "tails")
    expected = stock(**inputs).logits

    def shapes(model):
        found = {}
        for name, module in model.named_modules():

            def listen(module, given, output, name=name):
                found[name] = [value.shape for value in given if torch.is_tensor(value)]

            with module.register_forward_hook(listen):
                assert relative_error(model(**inputs).logits, expected) < 1e-9
        return found

    assert shapes(ours) == shapes(stock) and {"", "classifier"} <= shapes(ours).keys()

    def double(module, given, output):  # DeBERTa's layer returns a tuple
        return (2 * output[0], *output[1:]) if isinstance(output, tuple) else 2 * output

    for model in stock, ours:
        last_layer(model).register_forward_hook(double)
    assert relative_error(stock(**inputs).logits, expected) > 1e-3
    compare(stock, ours, inputs, 1e-9, 1e-9, is_fast=False)


class Plus(torch.nn.Linear):
    def forward(self, x):
        return super().forward(x) + x.sin()


class MeanHead(torch.nn.Module):
    def __init__(self, linear):
        super().__init__()
        self.linear = linear

    def forward(self, x):
        return self.linear(x.mean(1) if x.dim() == 3 else x)


def put_in_projection(model):
    attention = last_layer(model).attention
    attention = getattr(attention, "self", attention)
    name = next(name for name in ("value", "v_lin", "value_proj") if hasattr(attention, name))
    getattr(attention, name).__class__ = Plus


def put_in_pair(model):
    """Of torch's own classes: as for a product of low rank."""
    attention = last_layer(model).attention
    attention = getattr(attention, "self", attention)
    name = next(name for name in ("key", "k_lin", "key_proj") if hasattr(attention, name))
    torch.manual_seed(0)
    pair = torch.nn.Sequential(torch.nn.Linear(32, 4), torch.nn.Linear(4, 32))
    setattr(attention, name, pair.double().eval())


def put_in_head(model):
    torch.manual_seed(0)
    model.classifier = MeanHead(torch.nn.Linear(32, 2)).double().eval()


def put_in_forward(model):
    layer = last_layer(model)
    forward = layer.forward

    def changed(*given, **more):
        result = forward(*given, **more)
        return (2 * result[0], *result[1:]) if isinstance(result, tuple) else 2 * result

    layer.forward = changed


def put_in_dropout(model):
    """Dropout alone is on; its rate is 0."""
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.train()


CHANGES = put_in_projection, put_in_pair, put_in_head, put_in_forward, put_in_dropout


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("variant", EACH_CLASS)
def test_fast_class_of_family_runs_what_others_put_in(variant, change):
    stock, ours = family_pair(variant, 1)
    inputs = family_batch(stock, 3, 9, "tails")
    before = stock(**inputs).logits
    change(stock), change(ours)
    if change is not put_in_dropout:
        assert relative_error(stock(**inputs).logits, before) > 1e-3
    compare(stock, ours, inputs, 1e-9, 1e-9, is_fast=False)


def test_fast_class_runs_attention_function_of_others():
    def attention(module, query, key, value, *given, **more):
        return value.transpose(1, 2), None

    transformers.AttentionInterface.register("values alone", attention)
    models = family_pair("bert", 1)
    for model in models:
        model.set_attn_implementation("values alone")
    inputs = batch(3, 5, "none")
    assert relative_error(*(model(**inputs).logits for model in models)) < 1e-9


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("variant", EACH_CLASS)
def test_fast_class_of_family_can_be_traced(variant):
    """The graph of a batch without padding holds for one with padding."""
    _, ours = family_pair(variant, 1)
    batches = [family_batch(ours, 5, 9, padding) for padding in ("none", "tails")]
    names = [*batches[0]]

    class Graph(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.model = ours

        def forward(self, *tensors):
            return self.model(**dict(zip(names, tensors))).logits

    traced = torch.jit.trace(Graph(), tuple(batches[0].values()))
    for inputs in batches:
        assert relative_error(traced(*inputs.values()), ours(**inputs).logits) < 1e-9


@pytest.mark.parametrize("variant", EACH_CLASS)
def test_fast_class_of_family_has_stock_arguments(variant):
    stock, ours = family_pair(variant, 1)
    assert inspect.signature(ours.forward) == inspect.signature(stock.forward)
    assert transformers.utils.find_labels(type(ours)) == ["labels"]


def test_fast_classes_are_those_of_fast_families_only():
    assert distill.BertForSequenceClassification is distill.fast_class(
        transformers.BertForSequenceClassification
    )
    for name in "RobertaPreLayerNormForSequenceClassification", "NoForSequenceClassification", "No":
        assert not hasattr(distill, name)


@pytest.mark.parametrize("variant", EACH_CLASS)
def test_fast_class_of_family_trains_with_frozen_embeddings_and_autocast(variant):
    stock, ours = family_pair(variant, 1)
    inputs = family_batch(stock, 3, 9, "tails")
    for model in stock, ours:
        model.float().get_input_embeddings().requires_grad_(False)
    compare(stock, ours, inputs, 1e-5, 1e-3)
    with torch.autocast("cpu", torch.bfloat16):
        compare(stock, ours, inputs, 1e-2, 1e-1, is_fast=False)
    for model in stock, ours:
        model.enable_input_require_grads()
    compare(stock, ours, inputs, 1e-5, 1e-3, is_fast=False)


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
    assert (distill.FastDropout(1.0)(x) == 0).all()


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
    for given in (None, None), (mask, None), (mask, keep), (draw(2, 3, 5), keep):
        assert torch.autograd.gradcheck(
            lambda x, score, mask, keep: distill.ClsAttention.apply(x, score, mask, keep),
            (draw(2, 5, 4), draw(2, 3, 4), *given),
        )


def test_cls_attention_refuses_second_derivatives():
    """They would be wrong: its gradient takes the weights for constants."""
    x, vectors = torch.randn(2, 5, 4), torch.randn(2, 3, 4, requires_grad=True)
    total = distill.ClsAttention.apply(x, vectors, None, None)[1].sum()
    with pytest.raises(RuntimeError, match="second derivatives"):
        torch.autograd.grad(total, vectors, create_graph=True)


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


def test_used_embedding_rows_take_any_id_at_masked_positions():
    """As where RoBERTa's texts are padded with 0, which none of them has."""
    model = family_model("roberta", pad_token_id=1).eval()
    ids, mask = torch.tensor([[9, 8, 7], [9, 5, 0]]), torch.tensor([[1, 1, 1], [1, 1, 0]])
    expected = model(ids, mask).logits
    with distill.used_embedding_rows(model, dataset([[9, 8, 7], [9, 5]])):
        assert torch.equal(model(ids, mask).logits, expected)


def test_used_embedding_rows_can_be_copied():
    model = tiny_model().eval()
    ids = torch.tensor([[2, 190, 77, 3]])
    with distill.used_embedding_rows(model, dataset([[2, 190, 77, 3]])):
        expected = model(ids).logits
        again = copy.deepcopy(model)
        with torch.no_grad():
            model.get_input_embeddings().weight.zero_()
        assert torch.equal(again(ids).logits, expected)
        model.train()
    assert model.get_input_embeddings().training


@pytest.mark.parametrize("change", ["frozen", "hooked", "of another class"])
def test_only_used_embeddings_leaves_changed_embeddings_alone(change):
    _, model = family_pair("bert", 1)
    ids = dataset([[2, 190, 77, 3]])
    trainer = SimpleNamespace(
        model=model, needs_all_embeddings=False, train_dataset=ids, eval_dataset=ids
    )
    embedding = model.get_input_embeddings()
    with distill.only_used_embeddings(trainer):
        assert model.get_input_embeddings() is not embedding
    if change == "frozen":
        embedding.requires_grad_(False)
    elif change == "hooked":
        embedding.register_forward_hook(lambda *given: None)
    else:
        embedding.__class__ = type("Mine", (torch.nn.Embedding,), {})
    with distill.only_used_embeddings(trainer):
        assert model.get_input_embeddings() is embedding


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
