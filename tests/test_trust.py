"""Nothing lost, nothing let in, and room to grow: faults, strangers' files, the network, several processes."""

import hashlib
import io
import json
import os
import resource
import subprocess
import sys
import time
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import load_file, save_file

import distill
import fault_drill
from conftest import ROOT, SAMPLE, TINY, history, report, rows, save_model, write_csv

MODEL = Path("distilled_model/model.safetensors")


def edit(path, **changes):
    path.write_text(json.dumps(json.loads(path.read_text("utf-8")) | changes), "utf-8")


# ── Faults ──


def test_the_fault_drill_in_short():
    done = subprocess.run([sys.executable, str(ROOT / "tests/fault_drill.py"), "--rounds", "1"], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
    assert done.stdout.count("as undisturbed") == 1


def test_a_second_run_in_the_same_folder_is_refused_and_a_dead_one_is_no_hindrance(teacher, data, run, fails):
    held = f"import filelock, time\nwith filelock.FileLock({{!r}}): print('held', flush=True); time.sleep(600)"
    for path, told in (".distill_cache/lock", "CACHE = './.distill_cache'"), ("distilled_model.distill_lock", "OUTPUT = './distilled_model'"):
        Path(path).parent.mkdir(exist_ok=True)
        process = subprocess.Popen([sys.executable, "-c", held.format(path)], stdout=subprocess.PIPE, text=True)
        assert process.stdout.readline() == "held\n"
        assert f"{told}: another run is using it" in fails()
        process.kill()
        process.communicate()
    run("--epochs", "1")
    assert not list(Path().glob("*.distill_lock"))


@pytest.mark.parametrize("limit", [3_000, 30_000, 100_000])
def test_a_full_disk_is_told_and_the_same_command_goes_on(teacher, data, run, fails, limit):
    run("--output", "whole", "--cache", "other")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
    try:
        message = fails()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert "large" in message.lower() or "too big" in message.lower(), message
    assert not MODEL.exists() and not fault_drill.half_written(".")[1:]  # but for CACHE/tmp, which the next run empties
    run()
    assert MODEL.read_bytes() == Path("whole/model.safetensors").read_bytes()
    assert fault_drill.half_written(".") == []


def test_a_full_disk_while_the_result_is_saved_keeps_the_old_one(teacher, data, run, fails, monkeypatch):
    run("--epochs", "1")
    before = {file.name: file.read_bytes() for file in Path("distilled_model").iterdir()}

    def full(*given, **more):
        raise OSError(28, "No space left on device")
    with monkeypatch.context() as patch:
        patch.setattr(distill, "plot_losses", full)
        assert "No space left on device. What was saved before is still there" in fails("--alpha", "1.0")
    assert {file.name: file.read_bytes() for file in Path("distilled_model").iterdir()} == before
    assert "goes on after epoch 3" in run("--alpha", "1.0")


def test_a_clock_set_back_or_on_changes_nothing(teacher, data, run, monkeypatch):
    run()
    before = MODEL.read_bytes()
    for years in -20, 20:
        moment = time.time() + years * 365 * 86400
        for path in Path().rglob("*"):
            os.utime(path, (moment, moment))
        monkeypatch.setattr(time, "time", lambda: moment - 10**6)
        printed = run()
        assert "labelled 0 texts" in printed and "goes on after epoch" in printed and MODEL.read_bytes() == before


def test_a_damaged_sample_teacher_is_made_anew(monkeypatch, run):
    made = []
    monkeypatch.setattr(distill, "DATA", "tests/sample")
    Path(distill.CACHE).mkdir()
    name, recipe = distill.find_teacher()
    assert recipe
    save_model(Path(name))
    distill.save_with_checksum(f"{name}.sum", distill.file_digest(f"{name}/model.safetensors"))
    assert distill.find_teacher() == (name, None)
    content = bytearray(Path(name, "model.safetensors").read_bytes())
    content[-1] ^= 1
    Path(name, "model.safetensors").write_bytes(content)
    assert distill.find_teacher() == (name, recipe)


# ── What a stranger's files may try ──


class Evil:
    """A pickle that makes a folder when it is loaded."""

    def __reduce__(self):
        return os.mkdir, ("hacked",)


def test_malicious_pickles_do_not_run(teacher, data, run, fails):
    run()
    before = MODEL.read_bytes()
    for path in Path(".distill_cache").glob("*.pt"):  # the teacher's answers, the word vectors, the checkpoint
        buffer = io.BytesIO()
        torch.save({"run": Evil(), "history": [Evil()]}, buffer)
        path.write_bytes(hashlib.sha256(buffer.getvalue()).digest() + buffer.getvalue())  # with the right checksum
    printed = run()
    assert printed.count("is damaged: it is not used, and made anew") == 3 and MODEL.read_bytes() == before
    for name in "pytorch_model.bin", "training_args.bin", "optimizer.pt":  # beside the weights
        torch.save(Evil(), teacher / name)
    run()
    (teacher / "model.safetensors").unlink()  # in place of the weights
    assert "its weights cannot be loaded" in fails()
    assert not Path("hacked").exists()


def test_weights_in_an_older_pytorch_model_bin(teacher, data, run):
    run("--output", "safe", "--cache", "other")
    torch.save(load_file(teacher / "model.safetensors"), teacher / "pytorch_model.bin")
    (teacher / "model.safetensors").unlink()
    run()
    safe, ours = load_file("safe/model.safetensors"), load_file(MODEL)
    for name in safe:
        assert torch.allclose(safe[name], ours[name], atol=1e-6), name


@pytest.mark.parametrize("file", ["config.json", "tokenizer_config.json"])
def test_code_in_a_teachers_folder_does_not_run_and_nobody_is_asked(teacher, data, fails, monkeypatch, file):
    monkeypatch.setattr("builtins.input", lambda *given: pytest.fail("asked whether to run it"))
    (teacher / "evil.py").write_text("import os; os.mkdir('hacked')\nclass Evil: pass")
    changes = {"config.json": {"model_type": "evil", "auto_map": {"AutoConfig": "evil.Evil"}},
               "tokenizer_config.json": {"tokenizer_class": "Evil", "auto_map": {"AutoTokenizer": ["evil.Evil", None]}}}
    edit(teacher / file, **changes[file])
    assert "cannot be loaded" in fails()
    assert not Path("hacked").exists()


def test_no_index_leads_out_of_its_folder(teacher, data, fails):
    weights = load_file(teacher / "model.safetensors")
    save_file(weights, "elsewhere.safetensors", metadata={"format": "pt"})
    (teacher / "model.safetensors").unlink()
    for name in "../elsewhere.safetensors", os.path.abspath("elsewhere.safetensors"):
        (teacher / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": dict.fromkeys(weights, name)}))
        message = fails()
        assert name in message and "is not in its folder and is not opened" in message

    for folder in "ours", "theirs":
        datasets.DatasetDict({split: datasets.Dataset.from_dict({"text": [folder], "label": ["positive"]})
                              for split in ("train", "val", "test")}).save_to_disk(folder)
    state = Path("ours/train/state.json")
    whole = state.read_text()
    edit(state, _data_files=[{"filename": "../../theirs/train/data-00000-of-00001.arrow"}])
    save_model(teacher)
    (teacher / "model.safetensors.index.json").unlink()
    assert "is not in its folder and is not opened" in fails("--data", "ours")
    state.write_text(whole)
    edit(Path("ours/dataset_dict.json"), splits=["../theirs/train", "val", "test"])
    assert "is not in its folder and is not opened" in fails("--data", "ours")


def test_no_dictionary_is_opened_elsewhere(teacher, data, fails):
    edit(teacher / "tokenizer_config.json", mecab_kwargs={"mecab_dic": "unidic_lite", "mecab_option": "-r /etc/passwd"})
    assert "names files elsewhere, which are not opened (-r /etc/passwd)" in fails()


def test_a_vocabulary_elsewhere_is_not_taken(teacher, data, run):
    Path("vocab.txt").write_text("[PAD]\n[UNK]\n[CLS]\n[SEP]\n[MASK]\nx")
    edit(teacher / "tokenizer_config.json", vocab_file=os.path.abspath("vocab.txt"))
    run("--epochs", "1")
    assert Path("distilled_model/vocab.txt").read_bytes() == (SAMPLE / "base/vocab.txt").read_bytes()


def test_a_column_of_pictures_is_not_opened(teacher, data, fails):
    Path("secret.png").write_bytes(b"secret")
    for split in "train", "val", "test":
        (data / f"{split}.csv").unlink()
        kind = pa.struct({"bytes": pa.binary(), "path": pa.string()})
        table = pa.table({"text": ["良い"], "label": pa.array([{"bytes": None, "path": os.path.abspath("secret.png")}], kind)})
        features = {"text": {"dtype": "string", "_type": "Value"}, "label": {"_type": "Image"}}
        pq.write_table(table.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})}), data / f"{split}.parquet")
    assert "column label of train holds" in fails()


def test_names_that_look_like_patterns_or_addresses_are_names(run):
    for name in "a[1]", "b*c", "f{1,2}", "~x", "http:x":
        Path(name).mkdir()
        write_csv(Path(name, "train.csv"), rows("train", 3))
        Path(distill.CACHE).mkdir(exist_ok=True)
        assert len(distill.read_file(Path(name, "train.csv"), ["text", "label"])) == 3


GUARD = """
import socket, sys
def refuse(*given, **more):
    open("network", "a").write(repr(given))
    raise OSError("no network in this test")
socket.socket.connect = socket.socket.connect_ex = socket.getaddrinfo = socket.create_connection = refuse
sys.path.insert(0, {root!r})
import distill
distill.main({arguments!r})
"""


def test_a_local_run_opens_no_connection_and_writes_nothing_personal(data, tmp_path):
    home = tmp_path / "users" / "taro-yamada"
    save_model(home / "models" / "mine")
    arguments = [*TINY, "--teacher", str(home / "models/mine"), "--data", str(data.resolve()), "--output", str(home / "out"),
                 "--cache", str(home / "cache")]
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "TRANSFORMERS_"))}
    environment |= {"HOME": str(home), "USER": "taro-yamada", "LOGNAME": "taro-yamada"}
    done = subprocess.run([sys.executable, "-c", GUARD.format(root=str(ROOT), arguments=arguments)], env=environment,
                          capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert not Path("network").exists()
    written = [path for folder in ("out", "cache") for path in (home / folder).rglob("*") if path.is_file()]
    assert len(written) > 10
    for path in written:
        assert b"taro-yamada" not in path.read_bytes(), path


# ── Scale ──


def test_memory_does_not_grow_with_the_texts(teacher, tmp_path):
    """Of 20,000 texts more, of 30 tokens each, a run holds no more than 400 bytes a text: numbers and keys, not the texts."""
    texts = [text for split in ("train", "val", "test") for text, _ in rows(split, None)]
    peaks = []
    for n in 2_000, 22_000:
        draw, folder = np.random.default_rng(0), tmp_path / str(n)
        folder.mkdir()
        for split, size in ("train", n), ("val", 500), ("test", 500):
            pairs = draw.integers(len(texts), size=(size, 2))
            write_csv(folder / f"{split}.csv", [(texts[a] + texts[b], a % 2) for a, b in pairs])
        watch = ("import sys, threading, time; sys.path.insert(0, sys.argv.pop(1)); import distill\n"
                 "peak = [0]\n"
                 "def look():\n"
                 "    while True:\n"
                 "        peak[0] = max(peak[0], int(open('/proc/self/status').read().split('RssAnon:')[1].split()[0])); time.sleep(0.01)\n"
                 "threading.Thread(target=look, daemon=True).start()\n"
                 "distill.main(); print('peak', peak[0])")
        done = subprocess.run([sys.executable, "-c", watch, str(ROOT), *TINY, "--data", str(folder), "--epochs", "1", "--cache", f"cache{n}",
                               "--batch-size", "128"], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        peaks.append(int(done.stdout.split()[-1]) * 1024)
    assert peaks[1] - peaks[0] < 20_000 * 400 + 30e6  # the latter: MeCab's and torch's own


if not Path("/proc/self/status").exists():
    test_memory_does_not_grow_with_the_texts = pytest.mark.skip("needs /proc")(test_memory_does_not_grow_with_the_texts)


# ── Several processes ──


def torchrun(n, *more):
    return subprocess.run([sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", str(n), str(ROOT / "distill.py"), *TINY, *more],
                          capture_output=True, text=True)


def losses(folder):
    return np.array([list(map(float, line.split(",")[1:4])) for line in history(folder)[1:]])


def test_several_processes_have_the_loss_curve_of_one(teacher, data, run):
    """49 texts in batches of 12: of the last batch, of one text, two of three processes have nothing."""
    write_csv(data / "train.csv", rows("train", 49))
    options = ["--batch-size", "12", "--epochs", "4", "--patience", "1", "--learning-rate", "1e-2"]
    run(*options, "--output", "one", "--cache", "cache1")
    done = torchrun(3, *options, "--output", "three", "--cache", "cache3")
    assert done.returncode == 0, done.stderr
    assert losses("one") == pytest.approx(losses("three"), rel=1e-4, abs=1e-5)
    assert [line.split(",")[0] for line in history("one")] == [line.split(",")[0] for line in history("three")]
    assert done.stdout.count("labelled 81 texts") == 1 and done.stdout.count(" best\n") >= 1  # one process speaks
    one, three = (load_file(f"{folder}/model.safetensors") for folder in ("one", "three"))
    for name in one:
        assert torch.allclose(one[name], three[name], rtol=1e-3, atol=1e-4), name
    assert report("three")["epochs"] == report("one")["epochs"]
    again = torchrun(2, *options, "--output", "three", "--cache", "cache3")  # the same checkpoint, with fewer processes
    assert "labelled 0 texts" in again.stdout and "goes on after epoch" in again.stdout, again.stderr


def test_faults_of_the_settings_are_told_once_by_several_processes(teacher, data):
    done = torchrun(2, "--alpha", "7")
    assert done.returncode and done.stderr.count("ALPHA = 7.0: must be") + done.stderr.count("ALPHA = 7: must be") == 1
    assert 'METHOD = \'rail\': runs in one process' in torchrun(2, "--method", "rail").stderr


# ── Reproducible ──


def test_same_bytes_in_another_process_and_threads_are_recorded(teacher, data, run):
    run("--output", "here", "--cache", "cache1")
    subprocess.run([sys.executable, str(ROOT / "distill.py"), *TINY, "--output", "there", "--cache", "cache2"], check=True, capture_output=True)
    assert Path("here/model.safetensors").read_bytes() == Path("there/model.safetensors").read_bytes()
    assert history("here") == history("there")
    assert report("there")["hardware"].endswith(", 1 threads")
