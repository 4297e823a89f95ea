"""distill.py beside TextBrewer 0.2.1, on one teacher and its data: seconds and accuracy of both.

    pip install textbrewer==0.2.1
    python tests/tools/peer.py --teacher DIR --data DIR --epochs 5 --json peer.json

TextBrewer's GeneralDistiller trains a stock one-layer BERT that starts from the teacher's
embeddings, first layer, pooler and classifier. Both sides have the same temperature, weights of the
two losses, batch size, optimizer, schedule, epochs and seed, pad a batch to its longest text, and
keep the epoch with the highest validation accuracy. TextBrewer's seconds are those of tokenizing,
training and validation; distill.py's are those of the whole command, with an empty CACHE. One side
runs after the other. A side that stands in the JSON file is not run again.
"""

import argparse
import copy
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
import transformers

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

import distill  # noqa: E402


def with_textbrewer(given):
    """Return {seconds, accuracy, agreement} of a student of TextBrewer."""
    from textbrewer import DistillationConfig, GeneralDistiller, TrainingConfig

    teacher = transformers.BertForSequenceClassification.from_pretrained(
        given.teacher, dtype=torch.float32
    ).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(given.teacher)
    vars(distill).update({"DATA": given.data, "CACHE": tempfile.mkdtemp(), "SEED": given.seed})
    data, _ = distill.load_data([*teacher.config.label2id])

    start = time.perf_counter()
    splits = {
        split: [
            {"input_ids": ids, "labels": label}
            for ids, label in zip(
                tokenizer(rows["text"][:], truncation=True, max_length=128)["input_ids"],
                rows["labels"][:],
                strict=True,
            )
        ]
        for split, rows in data.items()
    }

    def batches(split, shuffle=False):
        return torch.utils.data.DataLoader(
            splits[split], given.batch_size, shuffle=shuffle, collate_fn=distill.collate
        )

    # the student: the stock class, one layer, from the first of the teacher
    transformers.set_seed(given.seed)
    random.seed(given.seed)
    config = copy.deepcopy(teacher.config)
    config.num_hidden_layers = 1
    student = transformers.BertForSequenceClassification(config)
    student.load_state_dict(teacher.state_dict(), strict=False)

    # AdamW as the Trainer makes it: no decay for biases and norms
    spared = [p for name, p in student.named_parameters() if "bias" in name or "LayerNorm" in name]
    decayed = [p for p in student.parameters() if not any(p is other for other in spared)]
    groups = [{"params": decayed}, {"params": spared, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, distill.LEARNING_RATE, weight_decay=distill.WEIGHT_DECAY)
    loader = batches("train", shuffle=True)
    n_steps = len(loader) * given.epochs

    best = {"accuracy": -1}

    @torch.inference_mode()
    def evaluate(model, split):
        """Accuracy and agreement with the teacher."""
        model.eval()
        n_right = n_agreeing = 0
        for batch in batches(split):
            labels = batch.pop("labels")
            logits, teacher_logits = model(**batch).logits, teacher(**batch).logits
            n_right += (logits.argmax(-1) == labels).sum().item()
            n_agreeing += (logits.argmax(-1) == teacher_logits.argmax(-1)).sum().item()
        n_texts = len(splits[split])
        return n_right / n_texts, n_agreeing / n_texts

    def after_epoch(model, step):
        accuracy, _ = evaluate(model, "val")
        print(f"TextBrewer, step {step}: {accuracy:.4f} on val", flush=True)
        if accuracy > best["accuracy"]:
            best.update(accuracy=accuracy, weights=copy.deepcopy(model.state_dict()))

    def adaptor(batch, outputs):
        found = {"logits": outputs.logits}
        return found | ({"losses": outputs.loss} if outputs.loss is not None else {})

    distiller = GeneralDistiller(
        TrainingConfig(device="cpu", output_dir=tempfile.mkdtemp()),
        DistillationConfig(
            temperature=distill.TEMPERATURE,
            kd_loss_weight=distill.ALPHA,
            hard_label_weight=1 - distill.ALPHA,
        ),
        teacher,
        student,
        adaptor,
        adaptor,
    )
    with distiller:
        distiller.train(
            optimizer,
            loader,
            given.epochs,
            scheduler_class=transformers.get_linear_schedule_with_warmup,
            scheduler_args={
                "num_warmup_steps": int(distill.WARMUP_STEPS * n_steps),
                "num_training_steps": n_steps,
            },
            max_grad_norm=distill.MAX_GRAD_NORM,
            callback=after_epoch,
        )
    seconds = time.perf_counter() - start
    student.load_state_dict(best["weights"])
    accuracy, agreement = evaluate(student, "test")
    return {"seconds": seconds, "accuracy": accuracy, "agreement": agreement}


def with_distill(given):
    """Return {seconds, accuracy, agreement} of a run of distill.py."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, str(ROOT / "distill.py"), "--teacher", given.teacher]
        command += ["--data", given.data, "--epochs", str(given.epochs)]
        command += ["--patience", str(given.epochs), "--batch-size", str(given.batch_size)]
        command += ["--seed", str(given.seed), "--augment", "0", "--output", f"{folder}/student"]
        start = time.perf_counter()
        subprocess.run([*command, "--cache", f"{folder}/cache"], check=True)
        seconds = time.perf_counter() - start
        report = json.loads(Path(folder, "student", "report.json").read_text("utf-8"))
    test = report["student"]["splits"]["test"]
    return {"seconds": seconds, "accuracy": test["accuracy"], "agreement": test["agreement"]}


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--teacher", required=True)
    parser.add_argument("--data", required=True)
    parser.add_argument("--epochs", type=int, default=5)
    parser.add_argument("--batch-size", type=int, default=distill.BATCH_SIZE)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--json", type=Path, required=True, help="for the results")
    given = parser.parse_args()
    results = json.loads(given.json.read_text("utf-8")) if given.json.exists() else {}
    for name, side in ("distill.py", with_distill), ("TextBrewer", with_textbrewer):
        if name not in results:
            results[name] = side(given) | {"threads": torch.get_num_threads()}
            new = given.json.with_suffix(".new")
            new.write_text(json.dumps(results, indent=2), "utf-8")
            os.replace(new, given.json)
    for name, figures in results.items():
        print(f"{name}: {figures}")


if __name__ == "__main__":
    main()
