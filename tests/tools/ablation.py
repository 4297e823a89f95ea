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
"""

import argparse
import json
import os
import re
import shlex
import statistics
import subprocess
import sys
import time
from pathlib import Path

SCRIPT = Path(__file__).resolve().parents[2] / "distill.py"
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


def run(options, folder, name, seed):
    """One run of the script: its figures; None, after its last words, if it fails."""
    output, start = folder / f"{re.sub(r'[^A-Za-z0-9]+', '_', name)}_{seed}", time.monotonic()
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


def main(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("settings", type=Path, help="file with a line per row of the table")
    parser.add_argument(
        "--folder", type=Path, required=True, help="for the runs, the cache and the table"
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
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
    sys.exit(f"runs that failed: {failed}; the same command tries them again" if failed else 0)


if __name__ == "__main__":
    main()
