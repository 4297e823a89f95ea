"""Try ways to train ("levers"), each on several data sets and seeds, and write a table.

    python tests/tools/grid.py run --folder DIR --name "SST-2, a tenth" --seeds 1 2 3
        [--levers NAME …] -- --teacher DIR --data DIR --train-fraction 0.1
    python tests/tools/grid.py table --folder DIR

`run` makes the data and the untrained student once for each seed, as the script does, and trains a
copy of it with each of LEVERS that has not been tried yet. It can be interrupted; the same command
resumes it. What stands after `--` are settings of distill.py. `table` has a row for each lever and
a column for each name: the mean over the seeds of the accuracy on val in percent, and in brackets
the loss on val.

The accuracy on val is that of an epoch which was chosen on one half of val, on the other half, and
the other way round: so it does not flatter a lever that chooses by accuracy. With TRAIN_FRACTION,
accuracy is also measured on 5,000 of the labelled training texts that are left out ("rest").
"""

import argparse
import contextlib
import copy
import functools
import json
import os
import statistics
import sys
from collections import defaultdict
from pathlib import Path
from unittest import mock

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))
import datasets  # noqa: E402, I001
import numpy as np  # noqa: E402
import torch  # noqa: E402

import distill  # noqa: E402

# {lever: its options}; settings of distill.py are in capitals, the others are those of OPTIONS
LEVERS = {
    "none": {"WORD_DROPOUT": 0, "by_loss": True},  # as it was; all others change this
    **{f"word dropout {share}": {"WORD_DROPOUT": share} for share in (0.1, 0.2, 0.3, 0.5)},
    **{f"rate 0 after {n} epochs": {"schedule_epochs": n} for n in (4, 6, 10)},
    "rate halved after a worse epoch": {"on_plateau": 0.5},
    "warm-up 0.02": {"WARMUP_STEPS": 0.02},
    "warm-up 0.15": {"WARMUP_STEPS": 0.15},
    "learning rate 5e-5": {"LEARNING_RATE": 5e-5},
    "learning rate 2e-4": {"LEARNING_RATE": 2e-4},
    "weights averaged over half an epoch": {"average_over": 0.5},
    "weights averaged over two epochs": {"average_over": 2},
    "validation 4 times an epoch": {"parts": 4},
    "best epoch by accuracy": {"by_loss": False},
    "word dropout 0.3, by accuracy": {"WORD_DROPOUT": 0.3, "by_loss": False},
    "[CLS] beside, weight 1": {"cls_weight": 1.0},
    "[CLS] first, for 2 epochs": {"cls_first": 2},
    "word dropout 0.3, rate 0 after 6": {"WORD_DROPOUT": 0.3, "schedule_epochs": 6},
    "word dropout 0.3, averaged": {"WORD_DROPOUT": 0.3, "average_over": 0.5},
    "word dropout 0.5, averaged": {"WORD_DROPOUT": 0.5, "average_over": 0.5},
    "word dropout 0.3, rate 0 after 6, averaged": {
        "WORD_DROPOUT": 0.3,
        "average_over": 0.5,
        "schedule_epochs": 6,
    },
    "word dropout 0.3, rate 2e-4 to 0 after 6": {
        "WORD_DROPOUT": 0.3,
        "LEARNING_RATE": 2e-4,
        "schedule_epochs": 6,
    },
    **{
        f"{n} copies{name}, by accuracy": {"AUGMENT": n, "by_loss": False} | replacement
        for name, replacement in {
            "": {"AUGMENT_REPLACE": 0},
            ", other words": {"AUGMENT_REPLACE": 0.1},
            ", same part of speech": {"AUGMENT_REPLACE": 0, "by_tag": True},
        }.items()
        for n in (1, 2, 5, 10, 20)
    },
}
OPTIONS = {
    "schedule_epochs": None,  # epochs after which the rate is 0; None: EPOCHS
    "on_plateau": None,  # factor of the rate after an epoch without a lower loss
    "average_over": None,  # epochs over which the weights are averaged, exponentially
    "parts": 1,  # validations in an epoch
    "by_loss": False,  # the best epoch is that of the lowest loss, not of the highest accuracy
    "cls_weight": 0.0,  # weight of the mean squared difference from the teacher's pooled vector
    "cls_first": 0,  # epochs in which this difference is the only loss
    "by_tag": False,  # copies in which words are replaced by others of the same part of speech
}
DATA_OPTIONS = "AUGMENT", "AUGMENT_REPLACE", "by_tag"  # for these the data are made anew
REPLACED_SHARE = 0.1  # of the words of a copy (Tang et al. 2019)
N_REST = 5000


class Done(Exception):
    """Leaves `distill.run` when all levers have been tried."""


# ── Training with a lever ──


class LeverTrainer(distill.CustomTrainer):
    """The script's trainer, with the `options` of a lever."""

    options = OPTIONS
    average = None  # of the weights

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        weight, is_first = self.options["cls_weight"], self.state.epoch <= self.options["cls_first"]
        if not model.training or not (weight or is_first):
            return super().compute_loss(model, inputs, return_outputs)
        pooled = []
        hook = model.bert.pooler.register_forward_hook(lambda *call: pooled.append(call[-1]))
        loss = super().compute_loss(model, inputs)
        hook.remove()
        difference = (pooled[0] - inputs["teacher_layers"]).square().mean()
        return difference if is_first else loss + weight * difference

    def create_optimizer_and_scheduler(self, num_training_steps):
        n_epochs = int(self.args.num_train_epochs)
        steps_per_epoch = num_training_steps * self.options["parts"] // n_epochs
        if self.options["schedule_epochs"]:
            num_training_steps = self.options["schedule_epochs"] * steps_per_epoch
        super().create_optimizer_and_scheduler(num_training_steps)
        if self.options["average_over"]:
            decay = 1 - 1 / (self.options["average_over"] * steps_per_epoch)

            def mix(average, new, n):
                return torch.lerp(new, average, min(decay, float(n + 1) / float(n + 10)))

            self.average = torch.optim.swa_utils.AveragedModel(self.model, avg_fn=mix)
            self.optimizer.register_step_post_hook(
                lambda *_: self.average.update_parameters(self.model)
            )

    def get_train_dataloader(self):
        """All batches of the epoch, or those of one of its parts."""
        parts = self.options["parts"]
        if parts == 1:
            return super().get_train_dataloader()
        now = self.state.epoch
        epoch, part = divmod(max(0, int(now or 1) - 1), parts)
        self.state.epoch = epoch + 1
        loader = super().get_train_dataloader()
        self.state.epoch = now
        batches = list(loader.batch_sampler)
        n_batches = len(batches) // parts
        batches = batches[part * n_batches : (part + 1) * n_batches]
        return torch.utils.data.DataLoader(
            self.train_dataset, batch_sampler=batches, collate_fn=loader.collate_fn
        )


def try_lever(trainer, options, other_rows, stack):
    """Train a copy of the trainer's student; return what it reaches, a dict.

    other_rows: {"test": rows and, with TRAIN_FRACTION, "rest": rows}. stack: an ExitStack, for what
    is replaced in distill.py.
    """
    student, parts = copy.deepcopy(trainer.model), options["parts"]
    lever = distill.make_trainer(
        student,
        {"train": trainer.train_dataset, "val": trainer.eval_dataset},
        trainer.data_collator,
        LeverTrainer,
        hides_words=True,
        epochs=parts * distill.EPOCHS,
        patience=parts * distill.PATIENCE,
    )
    lever.options = options
    epochs = []  # of each: losses and hits of the validation texts
    trained = []  # the weights, while the averaged ones are in their place
    record_epoch, train_epoch = distill.record_epoch, distill.train_epoch

    def validate(_):
        if lever.average is not None:
            trained.append(copy.deepcopy(student.state_dict()))
            student.load_state_dict(lever.average.module.state_dict())
        epochs.append(losses_and_hits(lever))
        return [values.sum().item() for values in epochs[-1]]

    def train_epoch_of_trained(trainer, epoch):
        if trained:
            student.load_state_dict(trained.pop())
        return train_epoch(trainer, epoch)

    def record_and_steer(trainer, record):
        is_best = record_epoch(trainer, record)
        if options["on_plateau"] and not is_best:
            schedule = trainer.lr_scheduler
            schedule.base_lrs = [rate * options["on_plateau"] for rate in schedule.base_lrs]
        return is_best

    replaced = {
        "training_run_id": lambda _: {"lever": os.urandom(8)},  # nothing is resumed
        "save_with_checksum": lambda *_: None,
        "load_with_checksum": lambda *_: None,
        "shares_of_steps": lambda *_: (
            (distill.BATCH_SIZE, 1) for _ in range(len(lever.get_train_dataloader()))
        ),
        "validate": validate,
        "train_epoch": train_epoch_of_trained,
        "record_epoch": record_and_steer,
    }
    if options["by_loss"]:
        replaced["epoch_score"] = lambda record: -record["val_loss"]
    for name, function in replaced.items():
        stack.enter_context(mock.patch.object(distill, name, function))
    history = distill.train(lever, Path("none"))
    accuracies = {}
    for split, rows in other_rows.items():
        metrics = distill.compute_metrics(distill.predict(lever, rows), "student")
        accuracies[split] = metrics["accuracy"]
    best = distill.best_epoch_of(history)
    return {
        "val": accuracy_by_halves(epochs, options["by_loss"]),
        "val_loss": min(record["val_loss"] for record in history),
        **accuracies,
        "best_epoch": best["epoch"],
        "epochs": len(history),
        "seconds": sum(record["seconds"] for record in history),
    }


@torch.inference_mode()
def losses_and_hits(trainer):
    """Return the loss of each validation text, and whether the student is right."""
    model = trainer.model.eval()
    losses, hits = torch.empty(2, len(trainer.eval_dataset))
    loader = trainer.get_eval_dataloader()
    for numbers, batch in zip(loader.batch_sampler, loader, strict=True):
        logits = model(**distill.model_inputs(batch)).logits
        for row, number in enumerate(numbers):
            text = {name: values[row : row + 1] for name, values in batch.items()}
            losses[number] = trainer.batch_loss(logits[row : row + 1], text)
        hits[numbers] = (logits.argmax(-1) == batch["labels"]).float()
    return losses, hits


def accuracy_by_halves(epochs, by_loss):
    """Return the accuracy on each half of val, at the epoch that is best on the other half."""
    n_texts = len(epochs[0][0])
    halves = torch.randperm(n_texts, generator=torch.Generator().manual_seed(0)).chunk(2)
    n_right = 0
    for chosen_on, measured_on in halves, halves[::-1]:
        scores = [
            -losses[chosen_on].mean() if by_loss else hits[chosen_on].mean()
            for losses, hits in epochs
        ]
        best = max(range(len(epochs)), key=scores.__getitem__)
        n_right += epochs[best][1][measured_on].sum().item()
    return n_right / n_texts


@torch.inference_mode()
def with_teacher_pooled(rows, teacher, collate_fn):
    """Add the teacher's pooled vectors, in a column that is an input of the loss only."""
    vectors = torch.empty(len(rows), teacher.config.hidden_size)
    loader = distill.inference_loader(rows, collate_fn)
    for numbers, batch in zip(loader.batch_sampler, loader, strict=True):
        vectors[numbers] = teacher.eval().bert(**distill.model_inputs(batch)).pooler_output
    return rows.add_column("teacher_layers", list(vectors.numpy()))


# ── Copies with words of the same part of speech ──


@functools.cache
def tagger():
    import fugashi
    import unidic_lite

    return fugashi.GenericTagger(f"-d {unidic_lite.DICDIR} -r {unidic_lite.DICDIR}/mecabrc")


def tagged_words(text):
    """Return [(word, part of speech)] of a Japanese text, with the tags of UniDic."""
    return [(node.surface, node.feature[:2]) for node in tagger()(text)]


def augment_by_tag(words_of_tag, batch, row_numbers, split_words, n):
    """Do what `distill.augment` does; before, replace some words by others of their tag."""
    column = distill.TEXT_COLUMN
    copies = defaultdict(list)
    for text, row_number in zip(batch[column], row_numbers, strict=True):
        generator = np.random.default_rng([distill.SEED, row_number, 1])
        words = tagged_words(text)
        for copy_number in range(n):
            changed = [
                words_of_tag[tag][generator.integers(len(words_of_tag[tag]))]
                if generator.random() < REPLACED_SHARE
                else word
                for word, tag in words
            ]
            row = {column: [text]}
            made = AUGMENT(row, [row_number * 100 + copy_number], lambda _, words=changed: words, 1)
            for name, values in made.items():
                copies[name] += values
    return dict(copies)


AUGMENT = distill.augment


# ── Runs and rows ──


def run(folder, name, seed, levers, settings):
    """Try the levers on one data set with one seed; those with the same data in one call."""
    rows_path = folder / f"{name} {seed}.jsonl"
    tried = {row["lever"] for row in read_rows(rows_path)}
    groups = defaultdict(list)
    for lever in levers:
        if lever not in tried:
            groups[tuple(LEVERS[lever].get(option) for option in DATA_OPTIONS)].append(lever)
    for (n_copies, replaced_share, by_tag), group in groups.items():
        own_settings = [*settings, "--augment", str(n_copies or 0), "--seed", str(seed)]
        own_settings += ["--augment-replace", str(replaced_share or 0)]
        places = [
            "--output",
            str(folder / name / "student"),
            "--cache",
            str(folder / name / "cache"),
        ]
        run_group(group, rows_path, by_tag, [*own_settings, *places])


def run_group(levers, rows_path, by_tag, settings):
    """Run distill.py up to its training; there, try the levers instead."""
    found = {}  # what the levers need besides the trainer
    original = {
        name: getattr(distill, name)
        for name in ("train", "use_student_ids", "take_fraction", "load_extra_texts")
    }

    def take_fraction(rows, n_classes):
        if distill.TRAIN_FRACTION < 1:
            classes = rows.cast_column("labels", datasets.ClassLabel(n_classes))
            rest = classes.train_test_split(
                1 - distill.TRAIN_FRACTION, seed=distill.SEED, stratify_by_column="labels"
            )["test"].cast_column("labels", datasets.Value("int64"))
            found["rest"] = rest.select(range(min(N_REST, len(rest))))
        return original["take_fraction"](rows, n_classes)

    def load_extra_texts(rows, tokenizer):
        if by_tag:
            words_of_tag = defaultdict(list)
            for text in rows[distill.TEXT_COLUMN]:
                for word, tag in tagged_words(text):
                    words_of_tag[tag].append(word)
            augment = functools.partial(augment_by_tag, words_of_tag)
            stack.enter_context(mock.patch.object(distill, "augment", augment))
        extra = original["load_extra_texts"](rows, tokenizer)
        return extra | ({"rest": found["rest"]} if "rest" in found else {})

    def use_student_ids(data):
        data = original["use_student_ids"](data)
        found["other"] = {split: data[split] for split in ("rest", "test") if split in data}
        data.pop("rest", None)
        return data

    def set_up_method(trainer, teacher, tokenizer):
        found["teacher"] = teacher

    def train(trainer, checkpoint_path, **options):
        if checkpoint_path.name != "checkpoint.pt":  # a teacher is made
            return original["train"](trainer, checkpoint_path, **options)
        rows = trainer.train_dataset
        for lever in levers:
            options = LEVERS["none"] | LEVERS[lever]
            with contextlib.ExitStack() as changes:
                changes.enter_context(mock.patch.object(distill, "train", original["train"]))
                for name in options.keys() - OPTIONS.keys():
                    changes.enter_context(mock.patch.object(distill, name, options[name]))
                own = OPTIONS | {name: options[name] for name in options.keys() & OPTIONS.keys()}
                if own["cls_weight"] or own["cls_first"]:
                    trainer.train_dataset = with_teacher_pooled(
                        rows, found["teacher"], trainer.data_collator
                    )
                row = try_lever(trainer, own, found["other"], changes)
                trainer.train_dataset = rows
            append_row(rows_path, {"lever": lever, **row})
            print(f"{rows_path.stem}, {lever}: {row['val']:.4f} on val", flush=True)
        raise Done

    with contextlib.ExitStack() as stack:
        stack.enter_context(contextlib.suppress(Done))
        for function in train, use_student_ids, take_fraction, load_extra_texts:
            stack.enter_context(mock.patch.object(distill, function.__name__, function))
        stack.enter_context(mock.patch.object(distill, "log_student", lambda *_: None))
        stack.enter_context(
            mock.patch.object(distill.CustomTrainer, "set_up_method", set_up_method)
        )
        distill.main(settings)


def read_rows(path):
    return list(map(json.loads, path.read_text("utf-8").splitlines())) if path.exists() else []


def append_row(path, row):
    rows = [*read_rows(path), row]
    path.with_suffix(".new").write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    os.replace(path.with_suffix(".new"), path)


def table(folder):
    """Return the table, in Markdown."""
    found = defaultdict(lambda: defaultdict(list))
    for path in sorted(folder.glob("*.jsonl")):
        for row in read_rows(path):
            found[row["lever"]][path.stem.rpartition(" ")[0]].append(row)
    names = sorted({name for rows in found.values() for name in rows})
    lines = [f"| | {' | '.join(names)} |", "|---" * (len(names) + 1) + "|"]
    for lever in filter(found.get, LEVERS):
        cells = []
        for rows in map(found[lever].get, names):
            if not rows:
                cells.append("")
                continue
            cell = f"{100 * statistics.mean(row['val'] for row in rows):.2f}"
            if all("rest" in row for row in rows):
                cell += f" / {100 * statistics.mean(row['rest'] for row in rows):.2f}"
            loss = statistics.mean(row["val_loss"] for row in rows)
            seeds = f", {len(rows)} seed" if len(rows) == 1 else ""
            cells.append(f"{cell} ({loss:.4f}{seeds})")
        lines.append(f"| {lever} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main():
    cut = sys.argv.index("--") if "--" in sys.argv else len(sys.argv)
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("command", choices=["run", "table"])
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--name", help="of the data set, in the table")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--levers", nargs="+", choices=LEVERS, default=[*LEVERS], metavar="LEVER")
    given = parser.parse_args(sys.argv[1:cut])
    given.folder.mkdir(parents=True, exist_ok=True)
    if given.command == "run":
        for seed in given.seeds:
            run(given.folder, given.name, seed, given.levers, sys.argv[cut + 1 :])
    else:
        print(table(given.folder))


if __name__ == "__main__":
    main()
