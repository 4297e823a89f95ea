"""Every shortcut equals the stock library: the last layer for one token, the rows in use, the tokenizer."""

import contextlib
import copy
import json
from pathlib import Path

import datasets
import pytest
import torch
import torch.nn.functional as F
import transformers
from hypothesis import given, settings as hypothesis_settings, strategies
from transformers import AutoTokenizer

import distill
from conftest import SAMPLE, VOCABULARY, history, rows, tiny_model, write_csv

# ── The last layer ──


def pair(**changes):
    """A stock model with large random weights and biases, and ours with the same."""
    stock = tiny_model(max_position_embeddings=512, **changes)
    ours = distill.BertForSequenceClassification(stock.config)
    ours.load_state_dict(stock.state_dict())
    return stock, ours


def batch(n, length, padding="some", seed=0):
    """n texts of `length` tokens; padding: "none", "some" (random tails) or "tails" (each text, by at least one)."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(5, VOCABULARY, (n, length), generator=generator)
    mask = torch.ones_like(ids)
    if padding != "none":
        keep = torch.randint(1, length + (padding == "some"), (n, 1), generator=generator) if length > 1 else length
        mask = (torch.arange(length) < keep).long().expand(n, length)
    kinds = torch.randint(0, 2, (n, length), generator=generator)
    return {"input_ids": ids, "attention_mask": mask, "token_type_ids": kinds}


def error(ours, stock, floor=1e-30):
    """The largest difference, relative to the largest value."""
    return ((ours - stock).abs().max() / stock.abs().max().clamp_min(floor)).item()


def compare(stock, ours, inputs, logits, gradients):
    """Logits and gradients agree within these relative errors (of 1 % of the largest gradient, where all is less)."""
    results = [model(**inputs).logits for model in (stock, ours)]
    assert error(results[1], results[0]) < logits
    weight = torch.linspace(-1, 2, results[0].numel(), dtype=results[0].dtype).view_as(results[0])
    for result in results:
        (result * weight).sum().backward()
    floor = max(one.grad.abs().max().item() for one in stock.parameters()) / 100
    for (name, one), other in zip(stock.named_parameters(), ours.parameters()):
        if name.endswith(f"{stock.config.num_hidden_layers - 1}.attention.self.key.bias"):
            assert other.grad is None and one.grad.abs().max() < floor  # in truth 0: softmax does not see it
        else:
            assert error(other.grad, one.grad, floor) < gradients, name


@pytest.mark.parametrize("layers", [1, 2, 12])
@pytest.mark.parametrize("n, length, padding", [(1, 1, "none"), (33, 2, "some"), (33, 19, "tails"), (1, 512, "none"),
                                                (2, 512, "tails")])
def test_logits_and_gradients_are_those_of_the_stock_model(layers, n, length, padding):
    for dtype, logits, gradients in (torch.float32, 1e-5, 1e-4), (torch.float64, 1e-10, 1e-10):
        stock, ours = (model.to(dtype).eval() for model in pair(num_hidden_layers=layers))
        compare(stock, ours, batch(n, length, padding), logits, gradients)


@pytest.mark.parametrize("missing", ["attention_mask", "token_type_ids"])
def test_what_may_be_left_out(missing):
    inputs = batch(5, 9)
    del inputs[missing]
    compare(*(model.eval() for model in pair()), inputs, 1e-5, 1e-4)


def test_embeddings_can_be_given_instead_of_ids():
    stock, ours = (model.eval() for model in pair())
    inputs = batch(5, 9)
    inputs["inputs_embeds"] = torch.randn(5, 9, 32, requires_grad=True)
    given = inputs["inputs_embeds"].detach().clone()
    del inputs["input_ids"]
    results = []
    for model in stock, ours:
        logits = model(**inputs).logits
        results.append((logits, *torch.autograd.grad(logits.sum(), inputs["inputs_embeds"])))
    assert error(results[1][0], results[0][0]) < 1e-5 and error(results[1][1], results[0][1]) < 1e-4
    assert torch.equal(given, inputs["inputs_embeds"])


@pytest.mark.parametrize("activation, heads, hidden", [("gelu", 4, 64), ("relu", 1, 24), ("gelu_new", 12, 768)])
def test_other_shapes(activation, heads, hidden):
    models = pair(hidden_act=activation, num_attention_heads=heads, hidden_size=hidden, num_hidden_layers=1, initializer_range=0.05)
    compare(*(model.eval() for model in models), batch(4, 7), 1e-5, 1e-4)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_both_kinds_of_attention_in_the_other_layers(attention):
    stock, ours = (model.eval() for model in pair())
    for model in stock, ours:
        model.set_attn_implementation(attention)
    compare(stock, ours, batch(4, 7), 1e-5, 1e-4)


def test_dropout_falls_in_the_same_places(monkeypatch):
    """With a fixed mask in place of the random one: per head and key in the attention, per unit elsewhere."""
    generator = torch.Generator().manual_seed(0)
    by_unit = (torch.rand(5, 32, generator=generator) > 0.3) / 0.7
    by_key = (torch.rand(5, 2, 9, generator=generator) > 0.3) / 0.7
    seen = []

    def dropout(x, p=0.5, training=True, inplace=False):
        if not training or p == 0:
            return x
        seen.append(p)
        kind = by_key if x.shape[-1] == 9 else by_unit  # (5, 2, 9, 9) or (5, 2, 9); (5, 9, 32) or (5, 32)
        return x * (kind if x.dim() == kind.dim() else kind.unsqueeze(-2))
    monkeypatch.setattr(torch.nn.functional, "dropout", dropout)
    monkeypatch.setattr(distill.FastDropout, "forward", torch.nn.Dropout.forward)
    stock, ours = pair(num_hidden_layers=1, attention_probs_dropout_prob=0.3, hidden_dropout_prob=0.2, classifier_dropout=0.4)
    stock.set_attn_implementation("eager")
    for model in stock, ours:
        model.train()
        model.bert.embeddings.dropout.p = 0.0  # below
    compare(stock, ours, batch(5, 9), 1e-5, 1e-4)
    assert seen == [0.3, 0.2, 0.2, 0.4] * 2


@pytest.mark.parametrize("p, shape", [(0.1, (64, 50, 32)), (0.5, (100_000,)), (0.01, (10, 100_000)), (0.9, (300, 300))])
def test_dropout_keeps_its_distribution(p, shape):
    """What stays is x / (1 - p); each unit falls out with probability p, independent of its neighbours and of last time."""
    torch.manual_seed(0)
    dropout, x = distill.FastDropout(p), torch.randn(shape).requires_grad_()
    y, again = dropout(x), dropout(x)
    out = y == 0
    assert torch.allclose(y, torch.where(out, 0, x / (1 - p)))
    y.sum().backward()
    assert torch.allclose(x.grad, torch.where(out, 0, 1 / (1 - p)))
    flat = out.flatten()
    for share, expected in ((flat, p), (flat & (again == 0).flatten(), p**2), (flat[1:] & flat[:-1], p**2), (flat[7:] & flat[:-7], p**2),
                            (flat[:99], p), (flat[-99:], p)):
        assert abs(share.double().mean() - expected) < 5 * (expected * (1 - expected) / len(share)) ** 0.5
    assert dropout.eval()(x) is x and not (distill.FastDropout(0.0)(x) == 0).any()


def test_every_dropout_of_the_model_is_the_fast_one():
    _, ours = pair()
    kinds = [type(module) for module in ours.modules() if isinstance(module, torch.nn.Dropout)]
    assert kinds == [distill.FastDropout] * (1 + 3 * 3 + 1)


@pytest.mark.parametrize("labels", [torch.tensor([0, 1, 1]), torch.tensor([[0], [1], [1]])])
def test_labels_give_the_stock_loss(labels):
    stock, ours = (model.eval() for model in pair())
    for _ in range(2):  # the first call sets problem_type
        one, other = (model(**batch(3, 5), labels=labels) for model in (stock, ours))
        assert error(other.loss, one.loss) < 1e-5 and error(other.logits, one.logits) < 1e-5
    for model in stock, ours:
        model.config.problem_type = "multi_label_classification"
    one, other = (model(**batch(3, 5), labels=torch.ones(3, 2)).loss for model in (stock, ours))
    assert error(other, one) < 1e-5


@pytest.mark.parametrize("more", [{"output_hidden_states": True}, {"output_attentions": True}, {"return_dict": False},
                                  {"position_ids": torch.arange(5)[None] + 3}])
def test_what_needs_every_token_gets_the_stock_forward(more):
    stock, ours = (model.eval() for model in pair())
    if "output_attentions" in more:
        stock.set_attn_implementation("eager"), ours.set_attn_implementation("eager")
    one, other = (model(**batch(3, 5), **more) for model in (stock, ours))
    assert type(one) is type(other) and len(one) == len(other)
    flat = lambda value: [value] if torch.is_tensor(value) else [leaf for part in value for leaf in flat(part)]
    values = [flat(result.to_tuple() if hasattr(result, "to_tuple") else result) for result in (one, other)]
    assert all(error(other, one) < 1e-5 for one, other in zip(*values))


def test_configured_outputs_and_a_mask_by_pairs_of_tokens_get_the_stock_forward():
    stock, ours = (model.eval() for model in pair())
    inputs = batch(3, 5)
    inputs["attention_mask"] = torch.tril(torch.ones(3, 5, 5)).bool()[:, None]
    assert error(*(model(**inputs).logits for model in (ours, stock))) < 1e-5
    for model in stock, ours:
        model.config.output_hidden_states = True
    assert len(ours(**batch(3, 5)).hidden_states) == 4
    with pytest.raises(ValueError, match="exactly one of input_ids or inputs_embeds"):
        ours()


def test_gradient_checkpointing_changes_nothing():
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
        assert one.grad is other.grad is None or error(other.grad, one.grad) < 1e-5


def test_the_gradient_written_by_hand_by_finite_differences():
    generator = torch.Generator().manual_seed(0)
    draw = lambda *shape: torch.randn(*shape, dtype=torch.float64, generator=generator).requires_grad_()
    mask = torch.zeros(2, 1, 5, dtype=torch.float64)
    mask[1, 0, 3:] = torch.finfo(torch.float64).min
    keep = (torch.rand(2, 3, 5, generator=generator) > 0.3).double() / 0.7
    for given in (None, None), (mask, None), (mask, keep):
        assert torch.autograd.gradcheck(lambda x, score: distill.ClsAttention.apply(x, score, *given), (draw(2, 5, 4), draw(2, 3, 4)))


def test_it_looks_and_is_saved_like_the_stock_class():
    stock, ours = pair(num_hidden_layers=1)
    assert repr(ours) == repr(stock) and "(0): BertLayer(" in repr(ours)
    ours.save_pretrained("ours")
    config = json.loads(Path("ours/config.json").read_text())
    assert config["architectures"] == ["BertForSequenceClassification"] and "auto_map" not in config
    loaded = transformers.AutoModelForSequenceClassification.from_pretrained("ours").eval()
    assert type(loaded) is transformers.BertForSequenceClassification
    assert all(map(torch.equal, stock.state_dict().values(), loaded.state_dict().values()))
    assert error(loaded(**batch(3, 7)).logits, ours.eval()(**batch(3, 7)).logits) < 1e-5


# ── The rows in use ──


def dataset(ids):
    return datasets.Dataset.from_dict({"input_ids": ids})


def test_used_rows_look_up_the_same_vectors_and_are_put_back():
    model = tiny_model()
    before, ids = copy.deepcopy(model.state_dict()), torch.tensor([[2, 190, 77, 3, 0]])
    expected = model.eval()(ids).logits
    with distill.used_embedding_rows(model, dataset([[2, 190]]), dataset([[77, 3]])):
        assert model.get_input_embeddings().weight.shape == (5 + 1, 32)  # 0, the padding, among them
        assert torch.equal(model(ids).logits, expected)
    assert all(map(torch.equal, before.values(), model.state_dict().values())) and model.state_dict().keys() == before.keys()


def steps(model, n, used):
    """n steps of AdamW with decay; the batches use 4 to 40, of which 40 alone is in a second set."""
    with distill.used_embedding_rows(model, dataset([list(range(4, 40))]), dataset([[40]])) if used else contextlib.nullcontext():
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
def test_steps_on_the_used_rows_are_those_on_all(ours):
    plain = pair()[ours]
    start = plain.get_input_embeddings().weight.detach().clone()
    used = steps(copy.deepcopy(plain), 12, used=True)
    plain = steps(plain, 12, used=False)
    for (name, one), other in zip(plain.named_parameters(), used.parameters()):
        if not name.endswith("self.key.bias"):  # its gradient is rounding alone
            assert error(other, one) < 1e-4, name
    for row in 0, 3, 40, VOCABULARY - 1:  # never learnt: only decayed
        end = used.get_input_embeddings().weight[row]
        assert error(end, start[row] * (1 - 1e-2 * 0.3) ** 12) < 1e-5
        assert error(end, plain.get_input_embeddings().weight[row]) < 1e-5


def test_the_script_ends_with_the_weights_of_the_plain_run(teacher, data, run, monkeypatch):
    settings = ["--patience", "9", "--weight-decay", "0.5", "--learning-rate", "0.003"]
    run(*settings)
    monkeypatch.setattr(distill, "used_embedding_rows", lambda *all: contextlib.nullcontext())
    run(*settings, "--output", "plain", "--cache", "other")
    load = transformers.BertForSequenceClassification.from_pretrained
    for (name, one), other in zip(load("plain").named_parameters(), load("distilled_model").parameters()):
        assert error(other, one) < 1e-3, name
    for one, other in zip(history()[1:], history("plain")[1:]):
        assert [float(x) for x in one.split(",")] == pytest.approx([float(x) for x in other.split(",")], rel=1e-4)


# ── The tokenizer ──

ODD = ["", " ", "　", "\n\t", "ＡＢＣ１２３ｶﾞｷﾞ", "①㌔㍿", "😀👨‍👩‍👧🇯🇵", "食べ 物 が  美味しい", "あ" * 300, "x" * 101, "x" * 100, "漢" * 99 + "字",
       "[CLS]", "これは[MASK]です", "[PAD][SEP] [UNK]", "[mask]", "##です", "مرحبا بالعالم", "가나다", "e\u0301 が", "\u200b\ufeff", "𠮷野家で𩸽",
       "a_b-c/d@e.f", "3.14%", "。。。！？", "Hello, World!", "ﷺ", "\u3000前後\u3000", "「『【】』」", "\x01制御\x7f", "ぱ゜か゛"]


@pytest.fixture(scope="module")
def japanese():
    return AutoTokenizer.from_pretrained(SAMPLE / "base")


def same(tokenizer, texts, max_length, pairs=None):
    """Ids, token types and number of cut texts are those of the stock tokenizer; its own ids are returned."""
    tokenizer.model_input_names = ["input_ids", "attention_mask", "token_type_ids"]
    columns = distill.encode([texts] + ([pairs] if pairs else []), tokenizer, max_length)
    expected = tokenizer(texts, pairs, truncation=True, max_length=max_length, return_token_type_ids=True)
    assert columns["input_ids"] == expected["input_ids"]
    assert not pairs or columns["token_type_ids"] == expected["token_type_ids"]
    lengths = [len(ids) for ids in tokenizer(texts, pairs, verbose=False)["input_ids"]]
    assert columns["truncated"] == [length > max_length for length in lengths]
    assert columns["length"] == list(map(len, columns["input_ids"]))
    return columns["input_ids"]


def test_ids_are_those_of_the_stock_tokenizer(japanese):
    texts = ODD + [text for split in ("train", "val", "test") for text, _ in rows(split, 500)]
    for max_length in 512, 16, 4:
        same(japanese, texts, max_length)
    assert max(map(len, same(japanese, texts, 512))) > 200


@pytest.mark.parametrize("max_length", [512, 24, 5])
def test_ids_of_pairs(japanese, max_length):
    same(japanese, ODD, max_length, ODD[::-1])
    same(japanese, ODD, max_length, ["部屋は広い"] * len(ODD))


@given(strategies.text(max_size=80))
@hypothesis_settings(max_examples=200, deadline=None, derandomize=True)
def test_ids_of_any_text(japanese, text):
    same(japanese, [text], 32)


@pytest.mark.parametrize("options", [{"word_tokenizer_type": "basic"}, {"subword_tokenizer_type": "character"}, {"do_lower_case": True},
                                     {"do_word_tokenize": False}, {"do_subword_tokenize": False}, {"truncation_side": "left"},
                                     {"additional_special_tokens": ["<料理>"]}])
def test_ids_of_other_japanese_tokenizers(options):
    tokenizer = AutoTokenizer.from_pretrained(SAMPLE / "base", **options)
    texts = ODD + ["<料理>が美味しい", "ABC Abc", *(text for text, _ in rows("test", 50))]
    same(tokenizer, texts, 12)
    same(tokenizer, texts, 12, texts[::-1])


def test_ids_of_a_tokenizer_that_is_fast_already(japanese):
    japanese.save_pretrained("vocabulary")
    tokenizer = transformers.BertTokenizerFast(vocab="vocabulary/vocab.txt")
    texts = ["hello world", "部屋は広い", "a " * 50]
    same(tokenizer, texts, 16)
    same(tokenizer, texts, 16, texts[::-1])


def test_more_processes_give_the_same_rows(teacher, data, settings, monkeypatch):
    """Many texts are tokenized by several processes; here from 20 on."""
    settings.setattr(distill, "DATA", "data")
    tokenizer = AutoTokenizer.from_pretrained(teacher)
    Path(distill.CACHE).mkdir()
    one = distill.tokenize(distill.load_data({"negative": 0, "positive": 1})[0], tokenizer)
    monkeypatch.setattr(distill, "TEXTS_PER_PROCESS", 20)
    monkeypatch.setattr(distill.os, "cpu_count", lambda: 2)
    two = distill.tokenize(distill.load_data({"negative": 0, "positive": 1})[0], tokenizer)
    assert {split: table.to_dict() for split, table in one.items()} == {split: table.to_dict() for split, table in two.items()}


# ── Batches by tokens ──


def test_text_to_logits_is_that_of_the_stock_way(teacher):
    """In the order of the texts, whatever their lengths."""
    stock = transformers.BertForSequenceClassification.from_pretrained(teacher).eval()
    tokenizer, texts = AutoTokenizer.from_pretrained(teacher), [text for text, _ in rows("test", 40)] + ODD
    model = distill.BertForSequenceClassification.from_pretrained(teacher)
    for max_length in 64, 12:
        tokenizer.model_max_length = max_length
        expected = stock(**tokenizer(texts, truncation=True, max_length=max_length, padding=True, return_tensors="pt")).logits
        for tokens in 1, 100, 5000:
            assert error(distill.classify_encoded(model, tokenizer, distill.encode([texts], tokenizer, tokenizer.model_max_length), tokens), expected.detach()) < 1e-5


def test_gradients_are_clipped_as_torch_does():
    models = [tiny_model(), tiny_model()]
    for norm in 1e9, 0.5:
        for model in models:
            model.zero_grad()
            model.eval()(torch.tensor([[2, 9, 3]])).logits.square().sum().backward()
        torch.nn.utils.clip_grad_norm_(models[0].parameters(), norm)
        distill.clip_gradients(models[1], norm)
        for one, other in zip(*(model.parameters() for model in models)):
            assert error(other.grad, one.grad) < 1e-4


def test_batches_of_inference_hold_each_row_once_and_few_tokens():
    lengths = [int(x) for x in torch.randint(3, 200, (500,), generator=torch.Generator().manual_seed(0))] + [5000]
    batches = list(distill.token_budget_batches(lengths, 1024))
    assert sorted(row for batch in batches for row in batch) == list(range(501))
    sizes = [max(lengths[row] for row in batch) * len(batch) for batch in batches]
    assert sizes[0] == 5000 and max(sizes[1:]) <= 1024 and batches[0] == [500]
