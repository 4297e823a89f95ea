"""Loss and trainer: values worked out by hand, and the loaders."""

import math

import pytest
import torch
from transformers import BertForSequenceClassification

import distill

# ── distillation_loss ──


def test_distillation_loss_by_hand(settings):
    """One text, two classes.

    Student: softmax(0, ln 3) = (1/4, 3/4), at T = 2 softmax(0, ln √3) = (0.36603, 0.63397).
    """
    logits, hard, soft = (
        torch.tensor([[0.0, math.log(3)]]),
        torch.tensor([1]),
        torch.tensor([[0.5, 0.5]]),
    )
    cross_entropy = -math.log(3 / 4)
    low = 1 / (1 + math.sqrt(3))
    kl = 0.5 * math.log(0.5 / low) + 0.5 * math.log(0.5 / (1 - low))
    settings.setattr(distill, "TEMPERATURE", 2.0)
    for alpha in 0.0, 0.3, 1.0:
        settings.setattr(distill, "ALPHA", alpha)
        value = distill.distillation_loss(logits, hard, soft).item()
        assert value == pytest.approx(alpha * 4 * kl + (1 - alpha) * cross_entropy, rel=1e-6)
    hard_only = distill.HardLabelTrainer.batch_loss(None, logits, {"labels": hard})
    assert hard_only.item() == pytest.approx(cross_entropy)


def test_distillation_loss_is_mean_over_texts_not_classes(settings):
    settings.setattr(distill, "ALPHA", 1.0)
    for classes in 2, 5, 50:
        logits = torch.zeros(3, classes)
        logits[:, 0] = 1.0
        soft = torch.full((3, classes), 1 / classes)
        q = torch.softmax(logits[0] / distill.TEMPERATURE, -1).double()
        by_hand = (1 / classes * torch.log(1 / classes / q)).sum().item() * distill.TEMPERATURE**2
        assert distill.distillation_loss(
            logits, torch.zeros(3).long(), soft
        ).item() == pytest.approx(by_hand, rel=1e-4)


def test_distillation_loss_gradient_keeps_size_over_temperatures(settings):
    """For high T the gradient tends to (z_S - z_T) / classes, whatever T is.

    See Hinton et al., equation 4.
    """
    settings.setattr(distill, "ALPHA", 1.0)
    z_s, z_t = torch.tensor([[1.0, -1.0]], requires_grad=True), torch.tensor([[0.5, -0.5]])
    for temperature in 50.0, 500.0:
        settings.setattr(distill, "TEMPERATURE", temperature)
        distill.distillation_loss(
            z_s, torch.tensor([0]), torch.softmax(z_t / temperature, -1)
        ).backward()
        assert z_s.grad.tolist()[0] == pytest.approx([0.25, -0.25], rel=1e-2)
        z_s.grad = None


def test_distillation_loss_of_text_without_label_is_soft_alone(settings):
    settings.setattr(distill, "TEMPERATURE", 1.0)
    logits = torch.tensor([[0.0, 0.0], [0.0, 0.0]], requires_grad=True)
    soft = torch.tensor([[0.5, 0.5], [1.0, 0.0]])
    loss = distill.distillation_loss(logits, torch.tensor([0, distill.NO_LABEL]), soft)
    assert loss.item() == pytest.approx((0.5 * 0 + 0.5 * math.log(2) + math.log(2)) / 2, rel=1e-6)
    for alpha in 0, 0.5, 1:
        settings.setattr(distill, "ALPHA", alpha)
        loss = distill.distillation_loss(logits, torch.full((2,), distill.NO_LABEL), soft)
        assert loss.item() == pytest.approx(math.log(2) / 2, rel=1e-6)


# ── CustomTrainer ──


def test_compute_loss_passes_only_inputs_to_the_model(teacher, data, run):
    """Also with num_items_in_batch, which current transformers passes, and return_outputs."""
    run("--epochs", "1")
    model = BertForSequenceClassification.from_pretrained("distilled_model").eval()
    table = [{"input_ids": [2, 9, 3], "length": 3, "labels": 1, "soft_labels": [0.2, 0.8]}]
    trainer = distill.make_trainer(
        model,
        {"train": table, "val": table},
        distill.collate,
        distill.CustomTrainer,
        epochs=1,
        learning_rate=1e-4,
        patience=3,
    )
    batch = distill.collate(table)
    loss, outputs = trainer.compute_loss(model, batch, return_outputs=True, num_items_in_batch=1)
    assert loss == distill.distillation_loss(outputs.logits, batch["labels"], batch["soft_labels"])


def test_custom_trainer_loaders_keep_soft_labels_and_every_row(teacher, data, run, monkeypatch):
    seen = {}
    judge = distill.record_epoch

    def look(trainer, row):
        loaders = {
            "train": trainer.get_train_dataloader(),
            "val": trainer.get_eval_dataloader(),
            "test": trainer.get_test_dataloader(trainer.eval_dataset),
        }
        seen.update({name: [batch for batch in loader] for name, loader in loaders.items()})
        assert {*map(len, loaders["train"].batch_sampler)} <= {
            trainer.args.train_batch_size,
            48 % trainer.args.train_batch_size,
        }
        return judge(trainer, row)

    monkeypatch.setattr(distill, "record_epoch", look)
    run("--epochs", "1", "--batch-size", "5")  # 48 and 16 are no multiples of 5 and 10
    for name, n in ("train", 48), ("val", 16), ("test", 16):
        assert sum(len(batch["labels"]) for batch in seen[name]) == n
        for batch in seen[name]:
            assert torch.allclose(batch["soft_labels"].sum(-1), torch.ones(len(batch["labels"])))
