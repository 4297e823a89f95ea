"""Run a list of settings over seeds on one teacher and its data, and write a table.

    python tests/tools/ablation.py settings.txt --folder ablation --seeds 1 2 3 \\
        -- --teacher DIR --data DIR --epochs 10

settings.txt has a line per row of the table: a name, a colon, and options of distill.py, such as

    hard labels: --method none
    default:
    soft labels alone: --alpha 1 --temperature 1

What follows -- is given to every run. Each run is `python distill.py`, with an OUTPUT of its own
and one CACHE for all, so that the teacher labels each text once. FOLDER gets runs.jsonl, a line per
finished run, and table.md: means and standard deviations over the seeds. Stop it at any moment and
start it again: what is finished is not repeated, and the run that was stopped goes on. The file of
settings may grow in between.

With --picture it then measures how many texts a second each row classifies, from text to label, on
a quiet machine: all rows and the teacher in turns, medians of ROUNDS. FOLDER gets speeds.json,
frontier.md and frontier.png: accuracy against speed, each student's cascade as a line from the
student to its teacher. A row with `--export onnx-int8` also stands there in 8 bits.
"""

import argparse
import csv
import json
import os
import re
import shlex
import statistics
import subprocess
import sys
import time
from pathlib import Path

from matplotlib.figure import Figure

SCRIPT = Path(__file__).resolve().parents[2] / "distill.py"
sys.path.insert(0, str(SCRIPT.parent))

import distill  # noqa: E402

ROUNDS = 5  # of the measurement of speed
N_TEXTS = 1000  # of the test split, in each round
INT8 = ", int8 ONNX"
# figure of a run → its head in the table, factor, digits, whether with its standard deviation
COLUMNS = {
    "accuracy": ("test accuracy", 100, 2, True),
    "macro_f1": ("macro F1", 100, 2, True),
    "agreement": ("agreement", 100, 2, True),
    "kl": ("KL", 1, 4, True),
    "val": ("val accuracy", 100, 2, True),
    "best_epoch": ("best epoch", 1, 1, False),
    "epochs": ("epochs", 1, 1, False),
    "seconds": ("seconds", 1, 0, False),
}


def read_settings(path):
    """{name: options} from the lines of a file.

    Empty lines and those that begin with # are left out.
    """
    try:
        lines = [
            line.partition(":")
            for line in map(str.strip, path.read_text("utf-8").splitlines())
            if line and not line.startswith("#")
        ]
        settings = {name.strip(): shlex.split(options) for name, colon, options in lines if colon}
    except (OSError, ValueError) as error:
        sys.exit(f"{path}: {error}")
    if not lines or len(settings) < len(lines):
        sys.exit(
            f"{path}: needs lines of a name, a colon and options, each with a name of its own."
        )
    return settings


def output_folder(folder, name, seed):
    return folder / f"{re.sub(r'[^A-Za-z0-9]+', '_', name)}_{seed}"


def run(options, folder, name, seed):
    """One run of the script: its figures; None, after its last words, if it fails."""
    output, start = output_folder(folder, name, seed), time.monotonic()
    done = subprocess.run(
        [
            sys.executable,
            str(SCRIPT),
            *options,
            "--seed",
            str(seed),
            "--output",
            str(output),
            "--cache",
            str(folder / "cache"),
        ],
        capture_output=True,
        text=True,
    )
    if done.returncode:
        return print(f"{name}, seed {seed}: {done.stderr.strip()}", flush=True)
    report = json.loads((output / "report.json").read_text("utf-8"))
    test, val = (report["student"]["splits"][split] for split in ("test", "val"))
    return {
        **{figure: test[figure] for figure in ("accuracy", "macro_f1", "agreement", "kl")},
        "val": val["accuracy"],
        **{figure: report[figure] for figure in ("best_epoch", "epochs")},
        "seconds": time.monotonic() - start,
        "teacher": report["teacher"]["splits"]["test"]["accuracy"],
    }


def table(names, runs):
    """Markdown: a row for each of `names` that has runs, and what the teacher reaches."""
    lines = [
        "| | seeds | " + " | ".join(head for head, *_ in COLUMNS.values()) + " |",
        "|---" * (len(COLUMNS) + 2) + "|",
    ]
    for name in names:
        if own := [row for row in runs if row["name"] == name]:
            cells = [name, str(len(own))]
            for figure, (_, factor, digits, spread) in COLUMNS.items():
                values = [row[figure] * factor for row in own]
                cells.append(
                    f"{statistics.mean(values):.{digits}f}"
                    + (
                        f" ± {statistics.stdev(values):.{digits}f}"
                        if spread and len(own) > 1
                        else ""
                    )
                )
            lines.append(f"| {' | '.join(cells)} |")
    teachers = sorted({f"{row['teacher']:.2%}" for row in runs if row["name"] in names})
    return "\n".join([*lines, "", f"The teacher's test accuracy: {', '.join(teachers)}.", ""])


def measure_speeds(folder, names, seed, teacher):
    """Return {row: texts per second from text to label}; also of "teacher" and of int8 exports.

    What stands in speeds.json is not measured again.
    """
    path = folder / "speeds.json"
    speeds = json.loads(path.read_text("utf-8")) if path.exists() else {}
    distill.quiet_for_users()
    students = {name: output_folder(folder, name, seed) for name in names}
    classifiers = {"teacher": distill.load_student(teacher)}
    for name, student in students.items():
        classifiers[name] = distill.load_student(student)
        if (student / "student_int8.onnx").exists():
            classifiers[name + INT8] = int8_classifier(student)
    if classifiers.keys() <= speeds.keys():
        return speeds

    with open(students[names[0]] / "predictions.csv", encoding="utf-8-sig", newline="") as file:
        rows = [
            (row["text"], row["text_pair"]) if "text_pair" in row else row["text"]
            for row in csv.DictReader(file)
        ]
    texts, seconds = rows[:N_TEXTS], {name: [] for name in classifiers}
    for number in range(ROUNDS + 1):
        for name, classify in classifiers.items():
            forget_words()
            start = time.perf_counter()
            classify(texts)
            if number:  # the first round warms up
                seconds[name].append(time.perf_counter() - start)
    speeds = {name: len(texts) / statistics.median(values) for name, values in seconds.items()}
    path.write_text(json.dumps(speeds, indent=2), "utf-8")
    return speeds


def forget_words():
    """Texts that come for the first time: no tokenizer remembers their words."""
    distill.make_encoder.cache_clear()


def int8_classifier(student):
    """A function that classifies texts with the 8-bit ONNX file of a student."""
    import numpy
    import onnxruntime
    import torch

    _, tokenizer = distill.load_saved(student)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(
        student / "student_int8.onnx", options, providers=["CPUExecutionProvider"]
    )
    names = [one.name for one in session.get_inputs()]

    def classify(texts):
        encoded = distill.encode_texts(tokenizer, texts)
        rows = [{"input_ids": ids} for ids in encoded["input_ids"]]
        if "token_type_ids" in names:
            types = encoded.get("token_type_ids") or [[0] * len(row["input_ids"]) for row in rows]
            rows = [{**row, "token_type_ids": one} for row, one in zip(rows, types)]
        labels = numpy.empty(len(rows), int)
        for batch in distill.token_budget_batches(encoded["length"]):
            inputs = distill.collate([rows[number] for number in batch], tokenizer.pad_token_id)
            arrays = {name: inputs[name].numpy() for name in names}
            labels[batch] = session.run(None, arrays)[0].argmax(-1)
        return labels

    return classify


def frontier(folder, names, seeds, speeds):
    """Return a list of dicts, one for each row of names: what the picture and its table show."""
    found = []
    for name in names:
        reports = []
        for seed in seeds:
            path = output_folder(folder, name, seed) / "report.json"
            if path.exists():
                reports.append(json.loads(path.read_text("utf-8")))
        if not reports:
            continue
        teacher = reports[0]["teacher"]
        tests = [report["student"]["splits"]["test"] for report in reports]
        cascades = [report["cascade"] for report in reports]
        shares = cascades[0]["curve"]["share"]
        curves = zip(*(cascade["curve"]["accuracy"] for cascade in cascades), strict=True)

        def speed_at(share, name=name):
            return 1 / (1 / speeds[name] + share / speeds["teacher"])

        found.append(
            {
                "name": name,
                "seeds": len(reports),
                "teacher": teacher["splits"]["test"]["accuracy"],
                "teacher_bytes": teacher["bytes"],
                "accuracy": [test["accuracy"] for test in tests],
                "agreement": statistics.mean(test["agreement"] for test in tests),
                "bytes": reports[0]["student"]["bytes"],
                "speed": speeds[name],
                "cascade": {
                    "share": [cascade["share"] for cascade in cascades],
                    "accuracy": [cascade["accuracy"] for cascade in cascades],
                    "speed": [speed_at(cascade["share"]) for cascade in cascades],
                    "curve": [
                        (speed_at(share), statistics.mean(values))
                        for share, values in zip(shares, curves, strict=True)
                    ],
                },
            }
        )
        int8 = [report.get("export", {}).get("student_int8.onnx") for report in reports]
        if name + INT8 in speeds and all(int8):
            found.append(
                {
                    **found[-1],
                    "name": name + INT8,
                    "accuracy": [one["accuracy"] for one in int8],
                    "agreement": None,
                    "bytes": int8[0]["bytes"],
                    "speed": speeds[name + INT8],
                    "cascade": None,
                }
            )
    return found


def frontier_table(rows, speeds):
    """Markdown: a line for the teacher and one for each of the rows of `frontier`."""
    heads = "", "seeds", "test accuracy", "kept", "agreement", "texts/s", "MB", "asked", "accuracy"
    lines = [
        f"| {' | '.join([*heads, 'texts/s'])} |",
        "|---" * (len(heads) + 1) + "|",
        f"| teacher | | {rows[0]['teacher']:.2%} | | | {speeds['teacher']:,.0f} | "
        f"{rows[0]['teacher_bytes'] / 1e6:.1f} | | | |",
    ]
    for row in rows:
        mean = statistics.mean(row["accuracy"])
        agreement = "" if row["agreement"] is None else f"{row['agreement']:.2%}"
        cells = [
            row["name"],
            str(row["seeds"]),
            percent(row["accuracy"]),
            f"{mean / row['teacher']:.1%}",
            agreement,
            f"{row['speed']:,.0f}",
            f"{row['bytes'] / 1e6:.1f}",
        ]
        if row["cascade"]:
            cascade = row["cascade"]
            cells.append(percent(cascade["share"], 1))
            cells.append(percent(cascade["accuracy"]))
            cells.append(f"{statistics.mean(cascade['speed']):,.0f}")
        else:
            cells += ["", "", ""]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def percent(values, digits=2):
    """Mean and standard deviation of shares, in percent."""
    values = [100 * value for value in values]
    spread = f" ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.{digits}f}{spread} %"


def draw_frontier(rows, speeds, path):
    """Accuracy against speed: a mark for each student, a line for its cascade."""
    figure = Figure(figsize=(7.5, 4.8), layout="constrained")
    axes = figure.subplots()
    # colours (Okabe and Ito), marks and line styles that colour-blind readers can tell apart
    styles = zip(
        ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000"),
        "osD^vPX",
        ("-", "--", "-.", ":", (0, (5, 1)), (0, (1, 1)), (0, (3, 1, 1, 1))),
    )
    teacher = 100 * rows[0]["teacher"]
    axes.axhline(teacher, color="grey", linewidth=0.8)
    axes.plot(speeds["teacher"], teacher, "*k", markersize=16, label="teacher")
    for row, (colour, mark, line) in zip(rows, styles):
        accuracy = [100 * value for value in row["accuracy"]]
        mean = statistics.mean(accuracy)
        spread = statistics.stdev(accuracy) if len(accuracy) > 1 else None
        axes.errorbar(
            row["speed"], mean, spread, fmt=mark, color=colour, markersize=8, label=row["name"]
        )
        if cascade := row["cascade"]:
            speed, curve = zip(*cascade["curve"], strict=True)
            axes.plot(speed, [100 * value for value in curve], linestyle=line, color=colour)
            chosen = statistics.mean(cascade["speed"]), 100 * statistics.mean(cascade["accuracy"])
            axes.plot(*chosen, mark, color=colour, fillstyle="none", markersize=12)
    axes.set(xlabel="texts per second, from text to label", ylabel="test accuracy, %", xscale="log")
    axes.xaxis.set_major_formatter("{x:,g}")
    axes.grid(alpha=0.3, which="both")
    axes.legend(loc="best", fontsize=9)
    figure.savefig(path, dpi=150)


def main(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("settings", type=Path, help="file with a line per row of the table")
    parser.add_argument(
        "--folder", type=Path, required=True, help="for the runs, the cache and the table"
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--picture", action="store_true", help="also measure speed, and draw it")
    argv = sys.argv[1:] if argv is None else argv
    cut = argv.index("--") if "--" in argv else len(argv)
    given, common = parser.parse_args(argv[:cut]), argv[cut + 1 :]
    settings = read_settings(given.settings)
    given.folder.mkdir(parents=True, exist_ok=True)
    path, failed = given.folder / "runs.jsonl", 0
    runs = list(map(json.loads, path.read_text("utf-8").splitlines())) if path.exists() else []
    for seed in (
        given.seeds
    ):  # all settings of a seed first, so that an early table compares like with like
        for name, options in settings.items():
            what = {"name": name, "seed": seed, "options": [*common, *options]}
            if not any(what.items() <= row.items() for row in runs):
                figures = run(what["options"], given.folder, name, seed)
                if figures is None:
                    failed += 1
                    continue
                runs.append(what | figures)
                path.with_suffix(".new").write_text(
                    "".join(json.dumps(row) + "\n" for row in runs), "utf-8"
                )
                os.replace(path.with_suffix(".new"), path)
                print(
                    f"{name}, seed {seed}: {figures['accuracy']:.4f} on test, "
                    f"{figures['val']:.4f} on val, "
                    f"best epoch {figures['best_epoch']} of {figures['epochs']}, "
                    f"{figures['seconds']:.0f} s",
                    flush=True,
                )
            current = [
                row
                for row in runs
                if row["options"] == [*common, *settings.get(row["name"], ["?"])]
            ]
            (given.folder / "table.md").write_text(table(settings, current), "utf-8")
    if (given.folder / "table.md").exists():
        print((given.folder / "table.md").read_text("utf-8"))
    if given.picture and not failed:
        teacher = given.folder / "cache" / "sample_teacher"
        if "--teacher" in common:
            teacher = common[common.index("--teacher") + 1]
        speeds = measure_speeds(given.folder, [*settings], given.seeds[0], teacher)
        rows = frontier(given.folder, settings, given.seeds, speeds)
        (given.folder / "frontier.md").write_text(frontier_table(rows, speeds), "utf-8")
        draw_frontier(rows, speeds, given.folder / "frontier.png")
        print(frontier_table(rows, speeds))
    sys.exit(f"runs that failed: {failed}; the same command tries them again" if failed else 0)


if __name__ == "__main__":
    main()
