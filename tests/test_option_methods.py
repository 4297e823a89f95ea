"""Option: other methods and families: losses by hand, schedule, masks, resume, whole runs."""

import json
import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
import transformers
from conftest import (
    MODEL,
    SAMPLE,
    TINY,
    VOCABULARY,
    family_model,
    history,
    interrupt_in,
    load_edited,
    report,
    rows,
    save_family,
    save_generator,
    training_step,
    write_csv,
)

import distill


def methods_of(family):
    return [
        method
        for method, trainer in distill.METHODS.items()
        if family in (trainer.families or distill.FAMILIES)
    ]


FAMILIES = {family: methods_of(family) for family in distill.FAMILIES if family != "bert"}


METHODS = [name for name, trainer in distill.METHODS.items() if trainer.terms]


def write_pairs(n):
    """Pairs of texts in data: n for training, half as many in val and test."""
    Path("data").mkdir()
    for split, many in ("train", n), ("val", n // 2), ("test", n // 2):
        write_csv(
            Path("data", f"{split}.csv"),
            [(text, text[:5], label) for text, label in rows(split, many)],
            header=("text", "other", "label"),
        )


@pytest.fixture
def make(settings, tmp_path):
    """A function: method, family → a prepared trainer on 24 texts of the sample."""

    def make(method, family="bert", texts=24, layers=1, **options):
        for name, value in dict(
            METHOD=method,
            BATCH_SIZE=8,
            WARM_START_STEPS=3,
            CACHE=str(tmp_path / "cache"),
            NUM_LAYERS=layers,
            WARMUP_STEPS=0,
            MAX_LENGTH=32,
            **options,
        ).items():
            settings.setattr(distill, name, value)
        Path(distill.CACHE).mkdir(exist_ok=True)
        teacher = family_model(family).eval().requires_grad_(False)
        tokenizer = distill.load_tokenizer(str(SAMPLE / "base"), teacher.config)
        names = dict(zip(("negative", "positive"), (0, 1)))
        data = {
            split: distill.datasets.Dataset.from_list(
                [{"text": text, "labels": names[label]} for text, label in rows(split, texts)]
            )
            for split in distill.SPLITS
        }
        data = distill.add_soft_labels(distill.tokenize(data, tokenizer), teacher, distill.collate)
        trainer = distill.make_trainer(
            distill.build_student(teacher),
            data,
            distill.collate,
            distill.METHODS[method],
            epochs=2,
            learning_rate=1e-3,
            patience=9,
        )
        if method in METHODS:
            trainer.set_up_method(teacher, tokenizer)
        trainer.state.epoch = 1
        trainer.create_optimizer_and_scheduler(100)
        return trainer

    return make


def first_batch(trainer, size=6):
    return trainer.data_collator([trainer.train_dataset[number] for number in range(size)])


def wider(batch, more=5):
    """The same batch, padded further."""
    return {
        name: F.pad(tensor, (0, more)) if name in ("input_ids", "attention_mask") else tensor
        for name, tensor in batch.items()
    }


# ── Losses by hand ──


def test_logit_trainer_loss_by_hand(settings):
    settings.setattr(distill, "ALPHA", 0.25)
    logits, z = torch.tensor([[1.0, 3.0], [0.0, 0.0]]), torch.tensor([[2.0, 1.0], [0.0, 4.0]])
    cross_entropy = (math.log(1 + math.exp(-2)) + math.log(2)) / 2  # of the labels 1 and 0
    mse = ((1 + 4) / 2 + (0 + 16) / 2) / 2
    batch = {"labels": torch.tensor([1, 0]), "teacher_logits": z}
    loss = distill.LogitTrainer.batch_loss(None, logits, batch)
    assert loss.item() == pytest.approx(0.25 * mse + 0.75 * cross_entropy, rel=1e-6)


def test_hard_label_trainer_equals_kd_of_alpha_0(teacher, data, run):
    run("--method", "none", "--temperature", "7")
    hard, lines = MODEL.read_bytes(), history()
    run("--alpha", "0")
    assert (
        history() == lines and MODEL.read_bytes() == hard and report()["settings"]["METHOD"] == "kd"
    )


def test_rail_loss_by_hand():
    teacher, student = (
        torch.tensor([[3.0, 4.0], [0.0, 2.0]]),
        torch.tensor([[6.0, 8.0], [5.0, 0.0]]),
    )
    loss = distill.RailTrainer.layer_loss(None, teacher, student)
    assert loss.item() == pytest.approx((0 + math.sqrt(2)) / 2, abs=1e-6)


@pytest.mark.parametrize("method, divisor", [("cilda", 1), ("cilda+minild", math.log(2))])
def test_contrastive_loss_by_hand(settings, method, divisor):
    trainer_class = distill.METHODS[method]
    trainer = trainer_class.__new__(trainer_class)
    teacher, student = (
        torch.tensor([[2.0, 0.0], [0.0, 1.0]]),
        torch.tensor([[3.0, 0.0], [1.0, 1.0]]),
    )
    half = math.sqrt(
        0.5
    )  # cosines: 1 and half for the first teacher's, 0 and half for the second's; each / 2
    expected = (math.log(1 + math.exp((half - 1) / 2)) + math.log(1 + math.exp((0 - half) / 2))) / 2
    loss = trainer.layer_loss(teacher, student)
    assert loss.item() == pytest.approx(expected / divisor, rel=1e-6)
    assert trainer.layer_loss(teacher[:1], student[:1]).item() == 0  # nothing to tell it from


@pytest.mark.parametrize("method", METHODS)
def test_method_trainer_loss_by_hand(make, settings, method):
    """The loss of a batch from its parts.

    Each is worked out with stock transformers and plain sums.
    """
    trainer = make(method, layers=2)
    trainer.state.global_step = 1  # no generator steps before it
    batch, student, teacher = (
        first_batch(trainer),
        trainer.model.train(),
        getattr(trainer, "teacher", None),
    )
    trainer.model.train()
    torch.manual_seed(5)
    found = trainer.compute_loss(student, batch).item()
    torch.manual_seed(5)
    texts = {"": batch["input_ids"]}
    if hasattr(trainer, "generator"):
        places, words = trainer.rewrite(batch)
        texts["′"] = batch["input_ids"].clone()
        texts["′"][places] = words
        assert (texts["′"] != texts[""]).any()
    losses, mask = {}, batch["attention_mask"]
    for mark, ids in texts.items():
        (z_t, h_t), (z_s, h_s) = (
            (out.logits, [h for h in out.hidden_states[1:]])
            for out in (
                model(ids, attention_mask=mask, output_hidden_states=True)
                for model in (teacher, student)
            )
        )
        log_t, log_s = z_t.log_softmax(-1), z_s.log_softmax(-1)
        losses["CE" + mark] = -sum(
            log_s[row, label] for row, label in enumerate(batch["labels"])
        ) / len(ids)
        losses["KL" + mark] = (log_t.exp() * (log_t - log_s)).sum() / len(ids)
        if method == "rail":
            chosen = sorted(
                distill.np.random.default_rng([distill.SEED, 1]).choice(3, 2, replace=False)
            )

            def mean(layers):
                return torch.stack(
                    [
                        torch.cat(
                            [
                                torch.stack(
                                    [
                                        h[row, at]
                                        for at in range(ids.shape[1])
                                        if mask[row, at] and ids[row, at] > 4
                                    ]
                                ).mean(0)
                                for h in layers
                            ]
                        )
                        for row in range(len(ids))
                    ]
                )

            pair = (
                trainer.projections[0](mean([h_t[layer] for layer in chosen])),
                trainer.projections[1](mean(h_s)),
            )
            losses["RAIL"] = trainer.layer_loss(*pair)
        elif method != "mate":
            pair = [
                project(torch.cat([h[:, 0] for h in layers], -1))
                for project, layers in zip(trainer.projections, (h_t, h_s))
            ]
            losses["CRD" + mark] = trainer.layer_loss(*pair)
    weights = {
        "rail": {"CE": 1 / 3, "KL": 1 / 3, "RAIL": 1 / 3},
        "mate": {"CE": 1 / 3, "KL": 1 / 3, "KL′": 1 / 3},
        "cilda": {"CE": 0.333, "KL": 0.333, "CE′": 0.222, "KL′": 0.111},
        "cilda+minild": {
            "CE": 2 / 9,
            "KL": 2 / 9,
            "CRD": 2 / 9,
            "CE′": 1 / 6,
            "KL′": 1 / 12,
            "CRD′": 1 / 12,
        },
    }[method]
    assert found == pytest.approx(
        sum(weight * losses[term].item() for term, weight in weights.items()), rel=1e-5
    )
    student.eval()
    assert trainer.compute_loss(student, batch).item() == pytest.approx(
        weights["CE"] * losses["CE"].item() + weights["KL"] * losses["KL"].item(), rel=1e-5
    )


# ── Schedule and direction ──


def test_mate_trainer_takes_10_generator_then_100_student_steps(make, settings):
    trainer, trace = make("mate", texts=59, MASK_RATE=0.1), []
    settings.setattr(distill, "BATCH_SIZE", 1)
    trainer.args.per_device_train_batch_size = 1
    trainer._train_batch_size = 1
    settings.setattr(trainer, "generator_step", lambda batch: trace.append("G"))
    compute_loss = trainer.compute_loss

    def traced(model, batch, **more):
        loss = compute_loss(model, batch, **more)
        if model.training:
            trace.append("S")
        return loss

    settings.setattr(trainer, "compute_loss", traced)
    for epoch in 1, 2:
        distill.train_epoch(trainer, epoch)
    assert "".join(trace) == "G" * 10 + "S" * 100 + "G" * 10 + "S" * 18


@pytest.mark.parametrize("method", METHODS)
def test_method_trainer_sees_every_text_in_an_epoch(make, settings, method):
    trainer, seen = make(method, texts=21, GENERATOR_STEPS=1), []
    compute_loss = trainer.compute_loss

    def seeing(model, batch, **more):
        if model.training:
            seen.extend(batch["input_ids"])
        return compute_loss(model, batch, **more)

    settings.setattr(trainer, "compute_loss", seeing)
    distill.train_epoch(trainer, 1)
    assert len(seen) == 21  # 8 + 8 + 5


@pytest.mark.parametrize("method", ["mate", "cilda", "cilda+minild"])
def test_mate_trainer_generator_raises_what_student_lowers(make, method):
    weights = {"mate": (0, 0.1, 1), "cilda": (0, 0.1, 0, 1), "cilda+minild": (0, 0.1, 0, 0, 1, 0)}[
        method
    ]  # KL′ above all
    trainer = make(method, GENERATOR_LEARNING_RATE=3e-3, MASK_RATE=0.5, LOSS_WEIGHTS=weights)
    trainer.model.train()
    batch = first_batch(trainer, 16)

    def d():
        """D′ on the fixed batch: a mean over 30 drawings, always the same random numbers."""
        torch.manual_seed(0)
        with torch.no_grad():
            return (
                sum(
                    trainer.losses(trainer.model, batch, False, trainer.rewrite(batch))[0][
                        "KL"
                    ].item()
                    for _ in range(30)
                )
                / 30
            )

    before, student = (
        d(),
        {name: tensor.clone() for name, tensor in trainer.model.state_dict().items()},
    )
    for _ in range(10):
        trainer.generator_step(batch)
    raised = d()
    assert raised > before * 1.02
    assert all(
        torch.equal(tensor, student[name]) for name, tensor in trainer.model.state_dict().items()
    )
    generator = {name: tensor.clone() for name, tensor in trainer.generator.state_dict().items()}
    trainer.state.global_step = 1
    for _ in range(5):
        training_step(trainer, batch)
        trainer.state.global_step = 1
    assert d() < raised * 0.98
    assert all(
        torch.equal(tensor, generator[name])
        for name, tensor in trainer.generator.state_dict().items()
    )


@pytest.mark.parametrize(
    "method, by_generator, by_student",
    [("rail", None, True), ("cilda", True, False), ("cilda+minild", True, True)],
)
def test_method_trainer_projections_are_trained_by_method(make, method, by_generator, by_student):
    trainer = make(method)
    batch, weight, seen = first_batch(trainer), trainer.projections[0].weight, []
    trainer.model.train()
    for step in [lambda: trainer.generator_step(batch)] * bool(by_generator) + [
        lambda: training_step(trainer, batch)
    ]:
        before = weight.detach().clone()
        trainer.state.global_step = 1
        step()
        seen.append(not torch.equal(before, weight))
    assert seen == [by_generator] * bool(by_generator) + [by_student]


# ── Masks ──


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("family", ["bert", "roberta", "bart"])
def test_method_trainer_ignores_padding(make, method, family):
    if method not in methods_of(family):
        pytest.skip("not for this family")
    trainer = make(method, family)
    batch, losses = first_batch(trainer), []
    trainer.model.train()
    for one in batch, wider(batch):
        torch.manual_seed(3)
        trainer.state.global_step = 1
        losses.append([trainer.compute_loss(trainer.model, one).item()])
        if hasattr(trainer, "generator"):
            torch.manual_seed(4)
            rewritten = trainer.rewrite(one, differentiable=True)
            found, _ = trainer.losses(trainer.model, one, method != "mate", rewritten)
            losses[-1] += [loss.item() for loss in found.values()]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


def test_mate_trainer_rewrites_and_pools_only_ordinary_tokens(make):
    trainer = make("mate", MASK_RATE=1.0)
    batch = wider(first_batch(trainer))
    ids, (places, words) = batch["input_ids"], trainer.rewrite(batch)
    assert torch.equal(places, (ids > 4) | (ids == 1)) and not set(words.tolist()) & {
        0,
        2,
        3,
        4,
    }  # 1: [UNK], a word
    flow = trainer.rewrite(batch, differentiable=True)[1]
    assert torch.allclose(flow.sum(-1), torch.ones(len(flow))) and not flow[:, [0, 2, 3, 4]].any()
    rail = make("rail")
    states = torch.randn(*ids.shape, 4)
    assert torch.allclose(rail.pool(batch, states)[0], states[0][places[0]].mean(0), atol=1e-6)
    nothing = {"input_ids": torch.tensor([[2, 3, 0]]), "attention_mask": torch.tensor([[1, 1, 0]])}
    assert torch.equal(rail.pool(nothing, states[:1, :3]), states[:1, 0])


@pytest.mark.parametrize("flow", [False, True])
@pytest.mark.parametrize("family", ["bert", "roberta", "bart"])
def test_forward_with_layers_equals_stock_on_rewritten_ids(make, family, flow):
    """inputs_embeds, against the stock forward of the rewritten ids.

    They are made from ids, and from rows over the vocabulary.
    """
    trainer = make("mate", family)
    batch = wider(first_batch(trainer), 2)
    with torch.no_grad():
        places, words = trainer.rewrite(batch, flow)
        ids = batch["input_ids"].clone()
        ids[places] = words.argmax(-1) if flow else words
        for model in trainer.teacher, trainer.model.eval():
            stock = model(ids, attention_mask=batch["attention_mask"], output_hidden_states=True)
            logits, layers = distill.forward_with_layers(
                model, batch, trainer.pool, (places, words)
            )
            assert torch.allclose(logits, stock.logits, atol=1e-5)
            states = (stock.get("encoder_hidden_states") or stock.hidden_states)[1:]
            assert torch.allclose(layers, torch.stack([one[:, 0] for one in states], 1), atol=1e-5)


def test_mate_trainer_rewrite_follows_generator_distribution(make, settings):
    trainer = make("mate", MASK_RATE=1.0)
    batch = {
        "input_ids": torch.full((1, 4001), 9),
        "attention_mask": torch.ones(1, 4001, dtype=torch.long),
    }
    scores = torch.full((VOCABULARY,), -50.0)
    scores[[3, 7, 8, 9]] = torch.tensor(
        [9.0, math.log(5), math.log(3), math.log(2)]
    )  # 3 is a special token
    settings.setattr(
        distill,
        "token_logits",
        lambda generator, inputs, places, mask: scores.repeat(int(places.sum()), 1),
    )
    for flow in False, True:
        torch.manual_seed(0)
        words = trainer.rewrite(batch, flow)[1]
        counts = (words.sum(0) if flow else torch.bincount(words, minlength=VOCABULARY)) / 4001
        assert counts[[7, 8, 9]].tolist() == pytest.approx(
            [0.5, 0.3, 0.2], abs=0.03
        ) and counts.sum() == pytest.approx(1)


def test_mate_trainer_rewrite_never_exceeds_vocabulary(make, settings):
    """Not even where the product of random number and sum is rounded up to the sum itself."""
    trainer = make("mate", MASK_RATE=1.0)
    batch = {
        "input_ids": torch.full((1, 2000), 9),
        "attention_mask": torch.ones(1, 2000, dtype=torch.long),
    }
    scores = torch.randn(2000, VOCABULARY, generator=torch.Generator().manual_seed(0))
    settings.setattr(distill, "token_logits", lambda *given: scores.clone())
    settings.setattr(trainer, "mask", trainer.is_ordinary)
    settings.setattr(torch, "rand", lambda *size: torch.ones(size))
    words = trainer.rewrite(batch)[1]
    assert words.max() < VOCABULARY and not set(words.tolist()) & {0, 2, 3, 4}


# ── Cache and resume ──


def test_rail_trainer_reads_teacher_layers_from_cache(make, settings, capsys):
    trainer = make("rail")
    batch = first_batch(trainer)
    stock = trainer.teacher(
        batch["input_ids"], attention_mask=batch["attention_mask"], output_hidden_states=True
    )
    expected = torch.stack([trainer.pool(batch, one) for one in stock.hidden_states[1:]], 1)
    assert torch.allclose(batch["teacher_layers"], expected, atol=1e-5)
    assert "its layers" in capsys.readouterr().out
    (path,) = Path(distill.CACHE).glob("layers-*.arrow")
    make("rail")
    assert "its layers" not in capsys.readouterr().out
    for harm in (
        lambda content: content[:-9],
        lambda content: content[:999] + bytes([content[999] ^ 1]) + content[1000:],
    ):
        path.write_bytes(harm(path.read_bytes()))
        assert torch.equal(first_batch(make("rail"))["teacher_layers"], batch["teacher_layers"])
        assert "its layers" in capsys.readouterr().out


@pytest.mark.parametrize("method", METHODS)
def test_method_trainer_resumed_equals_undisturbed(teacher, data, run, settings, method):
    settings.setattr(distill, "WARM_START_STEPS", 3)
    options = "--method", method, "--epochs", "2", "--generator-steps", "2", "--student-steps", "4"
    run(*options)
    whole, lines = MODEL.read_bytes(), history()
    with settings.context() as patch:
        interrupt_in(patch, 2, RuntimeError("killed"))
        with pytest.raises(RuntimeError):
            run(*options, "--cache", "other")
    assert "goes on after epoch 1" in run(*options, "--cache", "other")
    assert MODEL.read_bytes() == whole and history() == lines


# ── The generator ──


def test_load_generator_accepts_own_and_refuses_other_models(teacher, data, run, fails):
    save_generator("filler")
    printed = run(
        "--method", "cilda", "--generator", "filler", "--epochs", "1", "--generator-steps", "1"
    )
    assert "no GENERATOR is set" not in printed
    words = (SAMPLE / "base" / "vocab.txt").read_text("utf-8").splitlines()
    Path("filler/vocab.txt").write_text("\n".join([*words[:5], *reversed(words[5:])]), "utf-8")
    assert "which are not the teacher's" in fails("--method", "mate", "--generator", "filler")
    assert "no masked-language model but a BertForSeq" in fails(
        "--method", "mate", "--generator", str(teacher)
    )
    save_family("bart", "bart")  # a classifier whose head for words would be its word embeddings
    assert "no masked-language model but a BartForSeq" in fails(
        "--method", "mate", "--generator", "bart"
    )


def test_make_generator_learns_the_texts_and_is_cached(make, settings, capsys):
    trainer = make("mate", texts=24)
    batch = first_batch(trainer, 24)
    torch.manual_seed(0)
    places = trainer.mask(batch)

    def loss():
        with torch.no_grad():
            return F.cross_entropy(
                distill.token_logits(trainer.generator, batch, places, 4),
                batch["input_ids"][places],
            )

    short = loss()
    capsys.readouterr()
    make("mate", texts=24)
    assert "no GENERATOR is set" not in capsys.readouterr().out  # it is in the cache
    for path in Path(distill.CACHE).glob("generator-*"):
        path.unlink()
    settings.setattr(distill, "WARM_START_STEPS", 60)
    trainer.generator = distill.make_generator(trainer)
    assert "no GENERATOR is set" in capsys.readouterr().out and loss() < short - 1


# ── METHOD, whole runs ──


def test_method_mse_run_end_to_end(teacher, data, run):
    assert "saved" in run("--method", "mse") and report()["settings"]["METHOD"] == "mse"


@pytest.mark.parametrize("method", METHODS)
def test_method_run_end_to_end(teacher, data, run, settings, method):
    settings.setattr(distill, "WARM_START_STEPS", 2)
    run("--method", method, "--epochs", "2", "--generator-steps", "1", "--num-layers", "2")
    assert MODEL.exists() and report()["settings"]["METHOD"] == method
    assert all(math.isfinite(float(number)) for line in history()[1:] for number in line.split(","))


def test_method_run_with_augmented_text_and_pairs(teacher, run, settings):
    settings.setattr(distill, "WARM_START_STEPS", 2)
    write_pairs(20)
    for method in METHODS:
        run(
            "--method",
            method,
            "--text-pair-column",
            "other",
            "--augment",
            "1",
            "--epochs",
            "1",
            "--generator-steps",
            "1",
        )


def test_method_of_a_user_needs_a_subclass_and_one_entry(teacher, data, run):
    """Here one that compares layers of rewritten texts, which "cilda" alone does not."""
    subclass = """class OwnTrainer(MethodTrainer):
    terms = "CE", "KL", "OWN", "KL′", "OWN′"
    paper_weights = 0.2, 0.2, 0.2, 0.2, 0.2
    layer_term = "OWN"

    def layer_loss(self, teacher, student):
        return F.mse_loss(student, teacher)


"""
    module = load_edited(
        ("\n# METHOD → class", f"\n{subclass}# METHOD → class"),
        ("\nMETHODS = {", '\nMETHODS = {\n    "own": OwnTrainer,'),
    )
    module.main([*TINY, "--method", "own", "--epochs", "1", "--generator-steps", "1"])
    assert report()["settings"]["METHOD"] == "own"


# ── FAMILIES ──


@pytest.mark.parametrize("family", FAMILIES)
def test_build_student_with_all_layers_equals_teacher_of_family(settings, family):
    """Where all layers are taken the student answers as its teacher does."""
    teacher = family_model(family).eval()
    settings.setattr(distill, "NUM_LAYERS", 3)
    ids = torch.tensor([[2, 9, 11, 13, 3], [2, 8, 3, 0, 0]])
    given = {"input_ids": ids, "attention_mask": (ids > 0).long()}
    with torch.no_grad():
        student = distill.build_student(teacher).eval()
        assert torch.equal(student(**given).logits, teacher(**given).logits)
        settings.setattr(distill, "STUDENT_INIT", "random")
        assert not torch.allclose(
            distill.build_student(teacher).eval()(**given).logits, teacher(**given).logits
        )


@pytest.mark.parametrize(
    "family, method",
    [
        (family, method)
        for family in FAMILIES
        for method in FAMILIES[family]
        # these two differ from "kd" in the loss of the logits alone, which knows no family
        if family == "roberta" or method not in ("mse", "none")
    ],
)
def test_families_run_end_to_end(data, run, settings, family, method):
    save_family("finetuned_bert_japanese", family)
    settings.setattr(distill, "WARM_START_STEPS", 2)
    run(
        "--method",
        method,
        "--epochs",
        "1",
        "--generator-steps",
        "1",
        "--init-layers",
        "last",
        "--num-layers",
        "2",
    )
    student = transformers.AutoModelForSequenceClassification.from_pretrained("distilled_model")
    assert student.config.model_type == family and student.config.id2label == {
        0: "negative",
        1: "positive",
    }
    layers = {
        name.split(".")[name.split(".").index(part) + 1]
        for name in student.state_dict()
        for part in ("layer", "layers")
        if part in name.split(".")
    }
    assert layers == {"0", "1"}
    texts = [text for text, _ in rows("test", 16)]
    found = [one["label"] for one in distill.load_student("distilled_model")(texts)]
    right = sum(one == label for one, (_, label) in zip(found, rows("test", 16))) / 16
    assert right == report()["student"]["splits"]["test"]["accuracy"]


@pytest.mark.parametrize("family", distill.FAMILIES)
def test_families_run_with_pairs(run, family):
    save_family("finetuned_bert_japanese", family)
    write_pairs(12)
    run("--text-pair-column", "other", "--epochs", "1")
    pairs = [(text, text[:5]) for text, _ in rows("test", 6)]
    found = [one["label"] for one in distill.load_student("distilled_model")(pairs)]
    assert (
        report()["student"]["splits"]["test"]["accuracy"]
        == sum(one == label for one, (_, label) in zip(found, rows("test", 6))) / 6
    )


@pytest.mark.parametrize(
    "family, method", [("bart", "cilda+minild"), ("electra", "mate"), ("modernbert", "rail")]
)
def test_check_architecture_refuses_method_not_for_family(data, fails, family, method):
    save_family("finetuned_bert_japanese", family)
    message = fails("--method", method)
    assert f"is of the family '{family}'; METHOD = '{method}' accepts bert, roberta" in message


def test_preflight_checks_refuse_word_dropout_for_a_decoder(data, fails):
    save_family("finetuned_bert_japanese", "bart")
    assert "WORD_DROPOUT = 0.2: a decoder, as 'bart' has" in fails("--word-dropout", "0.2")


@pytest.mark.parametrize("padding_id", [None, -1, 10**6])
@pytest.mark.parametrize("family", distill.COUNT_FROM_PADDING)
def test_load_config_refuses_no_padding_id_where_positions_count_from_it(
    data, fails, family, padding_id
):
    path = save_family("finetuned_bert_japanese", family) / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"pad_token_id": padding_id}))
    assert f"has pad_token_id {padding_id}, the id of no token" in fails()


def test_check_architecture_refuses_unknown_family(data, fails):
    save_family("finetuned_bert_japanese", "albert")
    assert (
        "is of the family 'albert'; METHOD = 'kd' accepts bert, roberta, xlm-roberta, camembert"
        in fails()
    )
