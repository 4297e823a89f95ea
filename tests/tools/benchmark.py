"""How fast is it? Each comparison side by side in one run, alternating, as a ratio of medians.

    python tests/tools/benchmark.py  # a random 12-layer teacher, the sample's texts
    python tests/tools/benchmark.py --teacher DIR --data DIR --json benchmark.json
    python tests/tools/benchmark.py --only train_step,inference  # some parts
    python tests/tools/benchmark.py --only train_step,inference --family bert roberta --lengths 512

With --json, the parts that are left out stay as they were. Prints a table; FILE of --json is
written anew after each part, so that a run that is stopped loses only one.
"""

import argparse
import contextlib
import copy
import json
import os
import platform
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

import datasets
import torch
import transformers
from transformers import AutoConfig, AutoTokenizer, BertConfig

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

import distill  # noqa: E402

Stock = transformers.BertForSequenceClassification
Fast = distill.fast_class(Stock)
ROUNDS = 5
LENGTHS = 16, 32, 64, 128, 512
SENTENCES = 5_000, 10_000, 20_000
ROWS = 8192  # of the vocabulary, that a training text uses


def seconds(function):
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def medians(*functions, rounds=None):
    """Median seconds of each function over this many rounds, by default ROUNDS.

    They take turns; of a turn's two calls the second counts, as in a run of many.
    """
    return [
        median(times)
        for times in zip(
            *([(one(), seconds(one))[1] for one in functions] for _ in range(rounds or ROUNDS))
        )
    ]


def twice(times):
    return times[0] / times[1]


def make_trainer(model):
    trainer = distill.make_trainer(
        model.train(),
        {"train": [], "val": []},
        distill.collate,
        distill.CustomTrainer,
        epochs=1,
        learning_rate=1e-5,
        patience=1,
    )
    trainer.create_optimizer_and_scheduler(num_training_steps=10_000)
    return trainer


def training_step(trainer, inputs):
    """The step of the script's epoch loop."""
    loss = trainer.compute_loss(trainer.model, inputs)
    trainer.accelerator.backward(loss)
    distill.clip_gradients(trainer.model, trainer.args.max_grad_norm)
    trainer.optimizer.step()
    trainer.lr_scheduler.step()
    trainer.optimizer.zero_grad()
    return loss.item()


def classify(setup, tokens):
    distill.TOKENS_PER_BATCH = tokens
    encoded = distill.encode([setup.texts], setup.tokenizer, distill.MAX_LENGTH)
    return distill.classify_encoded(setup.student, setup.tokenizer, encoded)


# ── One batch of 32 texts, hidden size 768, one layer ──


SIZES = {  # BERT base's
    "vocab_size": 32768,
    "num_hidden_layers": 1,
    "num_attention_heads": 12,
    "hidden_size": 768,
    "embedding_size": 768,
    "intermediate_size": 3072,
    "max_position_embeddings": 520,
}
DEBERTA_V3 = {  # what its base model has
    "relative_attention": True,
    "pos_att_type": ["p2c", "c2p"],
    "position_buckets": 256,
    "share_att_key": True,
    "norm_rel_ebd": "layer_norm",
    "position_biased_input": False,
}


def one_layer(family):
    """(stock, fast): one-layer models of BERT base's size with the same weights."""
    torch.manual_seed(0)
    sizes = SIZES | (DEBERTA_V3 if family == "deberta-v2" else {})
    config = AutoConfig.for_model(family, **sizes)
    stock = transformers.AutoModelForSequenceClassification.from_config(config)
    fast = distill.classifier_class(config)(config)
    fast.load_state_dict(stock.state_dict())
    return stock, fast


def batch(length, n=32):
    ids = torch.randint(5, ROWS, (n, length), generator=torch.Generator().manual_seed(length))
    return {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "labels": torch.arange(n) % 2,
        "soft_labels": torch.full((n, 2), 0.5),
    }


def train_step(families):
    """A step of the script's own loop: loss, gradients, clipping, AdamW.

    Stock: the stock class with its whole vocabulary; fast: with ROWS of it, as `train` has it.
    """
    used = datasets.Dataset.from_dict({"input_ids": [list(range(ROWS))]})
    trainers = []
    with contextlib.ExitStack() as stack:
        for family in families:
            stock, fast = one_layer(family)
            stack.enter_context(distill.used_embedding_rows(fast, used))
            trainers += map(make_trainer, (stock, fast))
        return family_ratios(families, trainers, training_step, ROUNDS)


def inference(families):
    @torch.inference_mode()
    def run(model, inputs):
        model(inputs["input_ids"], inputs["attention_mask"])

    models = [model.eval() for family in families for model in one_layer(family)]
    return family_ratios(families, models, run, 3 * ROUNDS)


def family_ratios(families, runners, run, rounds):
    """{family: {length: seconds of the stock class over those of ours}}; all take turns.

    runners: of each family that of the stock class, then ours.
    """
    ratios = {family: {} for family in families}
    for length in LENGTHS:
        inputs = batch(length)
        turns = [lambda runner=runner: run(runner, inputs) for runner in runners]
        times = medians(*turns, rounds=rounds)
        for number, family in enumerate(families):
            ratios[family][str(length)] = times[2 * number] / times[2 * number + 1]
    return ratios


# ── A teacher and its data ──


def forward_seconds(model, rows, tokens, collate_fn):
    """Of the forward passes alone, over all rows, as the script's report counts them."""
    distill.TOKENS_PER_BATCH = tokens
    loader = distill.inference_loader(rows, collate_fn)
    return sum(one for _, one in distill.timed_logits(model, loader))


def student_vs_teacher(setup):
    """texts/s of the student, fast class, over those of the teacher, stock and fast.

    Each with its best batches.
    """
    rows, collate_fn = setup.rows, setup.collate_fn
    few = rows.select(range(0, len(rows), max(1, len(rows) // 400)))
    models = {
        "teacher": (setup.stock_teacher, few),
        "fast teacher": (setup.teacher, few),
        "student": (setup.student, rows),
    }
    best = {
        name: min(
            (forward_seconds(model, table, tokens, collate_fn), tokens)
            for tokens in (512, 1024, 2048, 4096, 8192)
        )[1]
        for name, (model, table) in models.items()
    }
    times = [
        [
            forward_seconds(model, table, best[name], collate_fn) / len(table)
            for name, (model, table) in models.items()
        ]
        for _ in range(ROUNDS)
    ]
    speed = dict(zip(models, (1 / median(one) for one in zip(*times))))
    return {
        "student_vs_teacher": speed["student"] / speed["teacher"],
        "student_vs_fast_teacher": speed["student"] / speed["fast teacher"],
        "texts_per_second": speed,
        "tokens_per_batch": best,
    }


def share_of_products(setup, model, n):
    """Operations per second of the script's pass over about n texts, over those of a plain product.

    The plain product is 2048 x 2048. Counted are the products of real tokens that are computed: of
    the last layer, those of one token a text.
    """
    config, rows = (
        model.config,
        setup.rows.select(range(0, len(setup.rows), max(1, len(setup.rows) // n))),
    )
    hidden, linear = (
        config.hidden_size,
        2 * (4 * config.hidden_size**2 + 2 * config.hidden_size * config.intermediate_size),
    )

    def operations(length):
        return (
            (config.num_hidden_layers - 1) * (length * linear + 4 * length**2 * hidden)
            + linear
            + 4 * length * hidden * config.num_attention_heads
            + 2 * hidden**2
        )

    loader, lengths = distill.inference_loader(rows, setup.collate_fn), rows["length"][:]
    a, b = torch.randn(2, 2048, 2048)
    rates = []  # batch by batch, each beside a plain product of about its size
    for batch, (_, time_of_batch) in zip(loader.batch_sampler, distill.timed_logits(model, loader)):
        work = sum(operations(lengths[row]) for row in batch)
        times = max(1, round(work / (2 * 2048**3)))
        rates.append(
            (
                work / time_of_batch,
                times * 2 * 2048**3 / seconds(lambda: [a @ b for _ in range(times)]),
            )
        )
    return [median(rates) for rates in zip(*rates[1:])]


def soft_labels(setup):
    """The share for the given teacher, and for one of BERT base's size.

    The latter has random weights: they do not change the speed.
    """
    base = Fast(BertConfig(vocab_size=setup.teacher.config.vocab_size)).eval()
    rates = {
        "teacher": share_of_products(setup, setup.teacher, 2000),
        "BERT base": share_of_products(setup, base, 1000),
    }
    return {
        "soft_labels": twice(rates["teacher"]),
        "soft_labels_bert_base": twice(rates["BERT base"]),
        "gflops": {
            name: {"pass": ours / 1e9, "plain product": plain / 1e9}
            for name, (ours, plain) in rates.items()
        },
    }


def tokenize(setup):
    """BertJapaneseTokenizer as it comes, over the script's tokenization.

    The script's starts with an empty memory.
    """

    def ours():
        distill.make_encoder.cache_clear()
        distill.encode([setup.texts], setup.tokenizer, distill.MAX_LENGTH)

    def stock():
        return setup.tokenizer(setup.texts, truncation=True, max_length=distill.MAX_LENGTH)

    times = medians(stock, ours)
    return {
        "tokenize": twice(times),
        "tokenized_per_second": {
            name: len(setup.texts) / one for name, one in zip(("stock", "fast"), times)
        },
    }


def end_to_end(setup):
    """From text to label: ours, over stock tokenizer and stock one-layer model.

    Stock pads to MAX_LENGTH, in batches of 32.
    """
    few = setup.texts[:256]

    @torch.inference_mode()
    def stock():
        for start in range(0, len(few), 32):
            inputs = setup.tokenizer(
                few[start : start + 32],
                truncation=True,
                max_length=distill.MAX_LENGTH,
                padding="max_length",
                return_tensors="pt",
            )
            setup.stock_student(**inputs).logits.argmax(-1)

    times = medians(stock, lambda: classify(setup, 4096).argmax(-1))
    return {
        "end_to_end": times[0] / len(few) / (times[1] / len(setup.texts)),
        "texts_per_second_end_to_end": {
            "stock": len(few) / times[0],
            "fast": len(setup.texts) / times[1],
        },
    }


def script(arguments, folder):
    """Run distill.py in `folder`. Returns (its report, wall seconds, peak megabytes)."""
    start = time.perf_counter()
    watch = (
        "import resource, subprocess, sys; "
        "subprocess.run(sys.argv[1:], check=True, stdout=subprocess.DEVNULL); "
        "print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)"
    )  # a large parent would count as its child's
    peak = subprocess.run(
        [sys.executable, "-c", watch, sys.executable, ROOT / "distill.py", *arguments],
        cwd=folder,
        check=True,
        stdout=subprocess.PIPE,
    ).stdout
    wall = time.perf_counter() - start
    return (
        json.loads(Path(folder, "distilled_model/report.json").read_text("utf-8")),
        wall,
        int(peak) / (1e6 if platform.system() == "Darwin" else 1e3),
    )


def whole_run(setup):
    """The script against the textbook way, with as many epochs, on the same data.

    The textbook way: texts padded when they are tokenized, a stock student, the teacher run in
    compute_loss for each batch of each epoch, no grouping by length; then both evaluated on all
    splits. Of it, 5 batches of each kind are timed and scaled to the whole. Padding is to
    MAX_LENGTH, or to the longest text of a batch.
    """
    with tempfile.TemporaryDirectory() as folder:
        report, ours, _ = script(setup.arguments, folder)
    sizes = {split: one["examples"] for split, one in report["teacher"]["splits"].items()}
    size, result = (
        report["settings"]["BATCH_SIZE"],
        {"stages": report["seconds"] | {"whole run": ours}},
    )
    generator = random.Random(0)
    for name, padding in ("whole_run", "max_length"), ("whole_run_padded_to_longest", "longest"):
        student = copy.deepcopy(setup.stock_student)
        trainer = make_trainer(student)

        def inputs():
            return setup.tokenizer(
                generator.sample(setup.texts, min(size, len(setup.texts))),
                truncation=True,
                padding=padding,
                max_length=distill.MAX_LENGTH,
                return_tensors="pt",
            )

        def train_one(made):
            with torch.no_grad():
                soft = setup.stock_teacher(**made).logits.softmax(-1)
            training_step(
                trainer,
                {**made, "labels": torch.zeros(len(soft), dtype=torch.long), "soft_labels": soft},
            )

        @torch.no_grad()
        def evaluate_one(made):
            setup.stock_teacher(**made), student(**made)

        made = [inputs() for _ in range(6)]
        tokenizing = median(seconds(inputs) for _ in range(5))
        step, look = (
            median([seconds(lambda: one(batch)) for batch in made][1:])
            for one in (train_one, evaluate_one)
        )
        batches = {split: n / size for split, n in sizes.items()}
        whole = sum(batches.values()) * (tokenizing + look) + report["epochs"] * (
            batches["train"] * step + batches["val"] * look
        )
        result |= {name: whole / ours, f"{name}_seconds": whole}
    return result


def growth(setup):
    """Seconds (start of Python left out) and peak memory of the script at N, 2N, 4N sentences.

    The models are small; one epoch.
    """
    generator, texts, runs = random.Random(0), setup.texts, []
    with tempfile.TemporaryDirectory() as folder:
        config = BertConfig(
            **{
                **setup.teacher.config.to_dict(),
                "num_hidden_layers": 2,
                "hidden_size": 64,
                "num_attention_heads": 2,
                "intermediate_size": 128,
            }
        )
        Stock(config).save_pretrained(Path(folder, "teacher"))
        setup.tokenizer.save_pretrained(Path(folder, "teacher"))
        labels = list(config.label2id)
        for n in SENTENCES:
            for split, rows in ("train", n), ("val", n // 20), ("test", n // 20):
                made = [
                    generator.choice(texts) + str(generator.randrange(10**6)) for _ in range(rows)
                ]
                Path(folder, str(n)).mkdir(exist_ok=True)
                datasets.Dataset.from_dict(
                    {"text": made, "label": generator.choices(labels, k=rows)}
                ).to_parquet(Path(folder, str(n), f"{split}.parquet"))
        for _ in range(ROUNDS):
            for n in SENTENCES:
                report, _, peak = script(
                    [
                        "--teacher",
                        "teacher",
                        "--data",
                        str(n),
                        "--epochs",
                        "1",
                        "--cache",
                        tempfile.mkdtemp(dir=folder),
                    ],
                    folder,
                )
                runs.append((n, sum(report["seconds"].values()), peak))

    def of(column):
        return [median(run[column] for run in runs if run[0] == n) for n in SENTENCES]

    return {"growth": {"sentences": SENTENCES, "seconds": of(1), "peak_mb": of(2)}}


# ── Main ──


class Setup:
    """The teacher, its data and its students: stock and fast."""

    def __init__(self, teacher, data, folder):
        if teacher is None:  # random weights: they do not change the speed
            teacher = Path(folder, "teacher")
            tokenizer = AutoTokenizer.from_pretrained(ROOT / "tests/sample/base")
            names = {"negative": 0, "positive": 1}
            Stock(
                BertConfig(
                    vocab_size=len(tokenizer),
                    hidden_size=384,
                    num_hidden_layers=12,
                    num_attention_heads=12,
                    intermediate_size=1536,
                    label2id=names,
                    id2label={number: name for name, number in names.items()},
                )
            ).save_pretrained(teacher)
            tokenizer.save_pretrained(teacher)
        self.arguments = [
            "--teacher",
            str(Path(teacher).resolve()),
            "--data",
            str(Path(data).resolve()),
        ]
        distill.DATA, distill.CACHE = str(data), str(folder)
        self.tokenizer = distill.load_tokenizer(str(teacher), distill.load_config(str(teacher)))
        self.teacher = distill.load_model(str(teacher))
        self.stock_teacher = Stock.from_pretrained(teacher, dtype=torch.float32).eval()
        self.student = distill.build_student(self.teacher).eval()
        self.stock_student = Stock(self.student.config).eval()
        self.stock_student.load_state_dict(self.student.state_dict())
        splits, _ = distill.load_data([*self.teacher.config.label2id])
        self.texts = splits["test"]["text"][:4000]
        self.collate_fn = lambda rows: distill.collate(rows, self.tokenizer.pad_token_id)
        self.rows = distill.tokenize(splits, self.tokenizer)["test"].select(range(len(self.texts)))


PARTS = {
    "train_step": train_step,
    "inference": inference,
    "tokenize": tokenize,
    "end_to_end": end_to_end,
    "student_vs_teacher": student_vs_teacher,
    "soft_labels": soft_labels,
    "whole_run": whole_run,
    "growth": growth,
}


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--teacher", help="folder of a fine-tuned BERT")
    parser.add_argument(
        "--data", default=str(ROOT / "tests/sample"), help="folder with train, val and test"
    )
    parser.add_argument("--json", metavar="FILE")
    parser.add_argument(
        "--only", metavar="PARTS", default=",".join(PARTS), help="of " + ", ".join(PARTS)
    )
    parser.add_argument(
        "--family",
        nargs="+",
        default=["bert"],
        choices=distill.FAST_FAMILIES,
        help="of the models of train_step and inference",
    )
    parser.add_argument(
        "--lengths", nargs="+", type=int, default=LENGTHS, help="tokens per text in these two"
    )
    parser.add_argument("--rounds", type=int, default=ROUNDS, help="three times as many: inference")
    given = parser.parse_args()
    globals().update(LENGTHS=given.lengths, ROUNDS=given.rounds)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    datasets.disable_progress_bars()
    results = (
        json.loads(Path(given.json).read_text())
        if given.json and os.path.exists(given.json)
        else {}
    )
    with tempfile.TemporaryDirectory() as folder:
        setup = Setup(given.teacher, given.data, folder)
        for name in given.only.split(","):
            alone = name in ("train_step", "inference")
            results |= {name: PARTS[name](given.family)} if alone else PARTS[name](setup)
            results["hardware"] = distill.hardware()
            print(
                f"{name:<20}",
                json.dumps(
                    {
                        key: value
                        for key, value in results.items()
                        if name in key or key == "stages" and name == "whole_run"
                    }
                ),
                flush=True,
            )
            if given.json:
                Path(given.json + ".new").write_text(json.dumps(results, indent=2) + "\n")
                os.replace(given.json + ".new", given.json)
    print(table(results))


def table(results):
    """The results as Markdown."""

    def line(what, *values):
        return "| " + " | ".join([what, *values]) + " |"

    def ratio(value):
        return f"{value:.1f} ×"

    lines = [line("", "ratio"), line("---", "---")]
    for name, what in ("train_step", "training step"), ("inference", "inference"):
        for family, ratios in results.get(name, {}).items():
            for length, value in ratios.items():
                lines.append(line(f"{family}, {what}, {length} tokens", ratio(value)))
    for name, what in (
        ("student_vs_teacher", "student over its teacher, stock"),
        ("student_vs_fast_teacher", "student over its teacher, fast"),
        ("tokenize", "tokenizer over BertJapaneseTokenizer"),
        ("end_to_end", "from text to label"),
        ("soft_labels", "teacher's pass over a plain matrix product"),
        ("soft_labels_bert_base", "the same, a teacher of BERT base's size"),
        ("whole_run", "whole run, the textbook way padded to MAX_LENGTH"),
        ("whole_run_padded_to_longest", "whole run, the textbook way padded to the longest"),
    ):
        if name in results:
            lines.append(
                line(
                    what, f"{results[name]:.2f}" if "soft_labels" in name else ratio(results[name])
                )
            )
    if "growth" in results:
        lines.append(
            line(
                "5,000 / 10,000 / 20,000 sentences",
                ", ".join(
                    f"{one:.0f} s {mb:.0f} MB"
                    for one, mb in zip(results["growth"]["seconds"], results["growth"]["peak_mb"])
                ),
            )
        )
    return "\n".join([*lines, "", results.get("hardware", "")])


if __name__ == "__main__":
    main()
