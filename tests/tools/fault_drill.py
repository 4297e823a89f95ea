"""Kill the script at random moments, start it again until it ends; compare with a run left alone.

    python tests/tools/fault_drill.py --rounds 100 [--seed 0]

Each round kills (SIGKILL) the whole way from an untrained teacher (TEACHER_BASE) to the saved
student one to three times, at moments drawn over all of a run's time, and then lets it end. Between
the kills it may also cut a file of the cache short, flip a bit in one, set the clock of all files
back or on, or let the disk be full (a limit on the size of files). At the end the model's bytes,
the history and the report (without times) must be those of the undisturbed run, no file may be left
half-written, and no kill may have left an OUTPUT that does not load. The exit status is the number
of rounds that failed.
"""

import argparse
import collections
import json
import multiprocessing
import os
import random
import resource
import shutil
import signal
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
os.environ["OMP_NUM_THREADS"] = "1"

import distill  # noqa: E402

TIMES = "seconds", "texts_per_second", "speedup"
OPTIONS = (
    "--teacher-base base --teacher-epochs 3 --teacher-learning-rate 1e-3 --data data "
    "--max-length 32 --epochs 6 --patience 9 --batch-size 8"
).split()


class Copy:
    """A copy of this process that calls a function; a new process would import for ten seconds."""

    def __init__(self, function, *given):
        self.read_end, write_end = os.pipe()
        context = multiprocessing.get_context("fork")
        self.process = context.Process(target=self.call, args=(write_end, function, *given))
        self.process.start()
        os.close(write_end)

    def call(self, write_end, function, *given):
        os.dup2(write_end, 1)
        os.dup2(write_end, 2)
        sys.stdout, sys.stderr = open(1, "w", buffering=1), open(2, "w", buffering=1)
        function(*given)

    def end(self, timeout=600):
        """Wait for its end, or kill it after `timeout` seconds; return (status, what it said)."""
        self.process.join(timeout)
        self.process.kill()
        self.process.join()
        with open(self.read_end, encoding="utf-8", errors="replace") as said:
            return self.process.exitcode, said.read()


def run_script(folder, limit=None):
    """The script in `folder`.

    `limit`: the size in bytes at which a file cannot grow any more, as on a full disk.
    """
    os.chdir(folder)
    if limit:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    # the teacher's answers are saved every 50 ms and asked for in small batches, so that kills
    # fall between
    distill.SAVE_SECONDS = 0.05
    distill.TOKENS_PER_BATCH = 256
    distill.main(OPTIONS)


def without_times(value):
    if isinstance(value, dict):
        return {name: without_times(one) for name, one in value.items() if name not in TIMES}
    return value


def end_of(folder):
    """What must be the same in the end."""
    output = Path(folder, "distilled_model")
    history = [
        line.rsplit(",", 1)[0] for line in (output / "history.csv").read_text("utf-8").splitlines()
    ]
    return {
        "model": (output / "model.safetensors").read_bytes(),
        "teacher": Path(folder, "finetuned_bert_japanese/model.safetensors").read_bytes(),
        "history": history,
        "plot": (output / "loss.png").read_bytes(),
        "files": sorted(os.listdir(output)),
        "report": without_times(json.loads((output / "report.json").read_text("utf-8"))),
    }


def half_written(folder):
    """Files that a whole run leaves behind only if it did not clear up after a killed one."""
    here = Path(folder)
    return [
        str(path)
        for pattern in (
            "*.distill_[nol]*",
            ".distill_cache/*.distill_new",
            ".distill_cache/distill_tmp",
        )
        for path in here.glob(pattern)
    ]


def damage(folder, draw):
    """Do one of the things that happen to laptops; returns its name."""
    files = [path for path in Path(folder, ".distill_cache").glob("*.pt") if path.stat().st_size]
    kind = draw.choice(["nothing", "truncate", "flip", "clock", "read-only output"])
    if kind in ("truncate", "flip") and files:
        path = draw.choice(files)
        content = bytearray(path.read_bytes())
        place = draw.randrange(len(content))
        content = (
            content[:place]
            if kind == "truncate"
            else content[:place]
            + bytes([content[place] ^ 1 << draw.randrange(8)])
            + content[place + 1 :]
        )
        path.write_bytes(content)
    if kind == "clock":
        moment = time.time() + draw.choice([-1, 1]) * 10 * 365 * 86400
        for path in Path(folder).rglob("*"):
            os.utime(path, (moment, moment))
    if (
        kind == "read-only output"
    ):  # a file stands where the folder should be written: refused at once, nothing is touched
        Path(folder, "distilled_model").mkdir(exist_ok=True)
        if not (Path(folder, "distilled_model/report.json")).exists():
            Path(folder, "distilled_model/mine").write_text("x")
            status, told = Copy(run_script, folder).end()
            assert status == 1 and "not written by distill.py" in told, told
            shutil.rmtree(Path(folder, "distilled_model"))
    return kind


def prepare(folder):
    from conftest import rows, save_model, write_csv

    save_model(Path(folder, "base"))
    Path(folder, "data").mkdir()
    for split, n in ("train", 100), ("val", 20), ("test", 20):
        write_csv(Path(folder, "data", f"{split}.csv"), rows(split, n))


def stage(printed):
    """The last word of the script before it died."""
    words = [line.split()[0] for line in printed.splitlines() if line[:1].isalpha()]
    return words[-1] if words else "start"


def one_round(template, whole, seconds, draw, seen):
    """One round; returns what went wrong, a list."""
    with tempfile.TemporaryDirectory() as folder:
        shutil.copytree(template, folder, dirs_exist_ok=True)
        for _ in range(draw.randint(1, 3)):
            limit = draw.choice([None] * 6 + [20_000, 60_000, 150_000, 400_000])
            status, printed = Copy(run_script, folder, limit).end(draw.uniform(0, seconds))
            if status == -signal.SIGKILL:
                seen["killed at: " + stage(printed)] += 1
            elif status and (
                status != 1 or "distill.py: " not in printed or "Traceback" in printed
            ):
                return [f"limit {limit}: ended with {status}: {printed[-800:]}"]
            else:
                seen["ended by a full disk" if status else "ended before its kill"] += 1
            for name in (
                "finetuned_bert_japanese",
                "distilled_model",
            ):  # there as a whole, or not at all
                if Path(folder, name).exists() and not Path(folder, name, "vocab.txt").exists():
                    return [f"{name} is half-written"]
            seen[damage(folder, draw)] += 1
        status, printed = Copy(run_script, folder).end()
        if status:
            return [f"the last run ended with {status}: {printed[-800:]}"]
        end = end_of(folder)
        return [f"{name} differs" for name in whole if end[name] != whole[name]] + half_written(
            folder
        )


def main(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args(argv)
    failed, seen = 0, collections.Counter()
    with tempfile.TemporaryDirectory() as template:
        prepare(template)
        with tempfile.TemporaryDirectory() as folder:
            shutil.copytree(template, folder, dirs_exist_ok=True)
            before = time.monotonic()
            status, printed = Copy(run_script, folder).end()
            assert status == 0, printed
            seconds, whole = time.monotonic() - before, end_of(folder)
        for number in range(given.rounds):
            wrong = one_round(
                template, whole, seconds, random.Random(f"{given.seed}-{number}"), seen
            )
            failed += bool(wrong)
            print(
                f"round {number + 1} of {given.rounds}: {'; '.join(wrong) or 'as undisturbed'}",
                flush=True,
            )
    print(
        f"{failed} of {given.rounds} rounds failed. "
        + ", ".join(f"{name}: {count}" for name, count in seen.most_common())
    )
    sys.exit(min(failed, 100))


if __name__ == "__main__":
    main()
