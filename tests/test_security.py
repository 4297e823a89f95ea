"""Security: strangers' files run no code and lead nowhere else; nothing goes out."""

import hashlib
import io
import json
import os
from pathlib import Path

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from conftest import MODEL, SAMPLE, save_model
from safetensors.torch import load_file, save_file

import distill


def edit(path, **changes):
    path.write_text(json.dumps(json.loads(path.read_text("utf-8")) | changes), "utf-8")


# ── Pickles and code ──


class Evil:
    """A pickle that makes a folder when it is loaded."""

    def __reduce__(self):
        return os.mkdir, ("hacked",)


def test_load_with_checksum_runs_no_pickled_code(capsys):
    """A pickle that would make a folder, with the right checksum."""

    class Evil:
        def __reduce__(self):
            import os

            return os.mkdir, ("hacked",)

    import hashlib
    import io

    buffer = io.BytesIO()
    torch.save(Evil(), buffer)
    Path("a.pt").write_bytes(hashlib.sha256(buffer.getvalue()).digest() + buffer.getvalue())
    assert distill.load_with_checksum(Path("a.pt")) is None and not Path("hacked").exists()
    assert "a.pt is damaged" in capsys.readouterr().out


def test_load_model_runs_no_pickled_code(teacher, data, fails):
    class Evil:
        def __reduce__(self):
            return os.mkdir, ("hacked",)

    (teacher / "model.safetensors").unlink()
    torch.save({"classifier.bias": Evil()}, teacher / "pytorch_model.bin")
    assert "its weights cannot be loaded" in fails() and not Path("hacked").exists()


def test_run_executes_no_pickled_code(teacher, data, run, fails):
    run()
    before = MODEL.read_bytes()
    for path in Path(".distill_cache").glob(
        "*.pt"
    ):  # the teacher's answers, the word vectors, the checkpoint
        buffer = io.BytesIO()
        torch.save({"run": Evil(), "history": [Evil()]}, buffer)
        path.write_bytes(
            hashlib.sha256(buffer.getvalue()).digest() + buffer.getvalue()
        )  # with the right checksum
    printed = run()
    assert (
        printed.count("is damaged: it is not used, and made anew") == 3
        and MODEL.read_bytes() == before
    )
    for name in "pytorch_model.bin", "training_args.bin", "optimizer.pt":  # beside the weights
        torch.save(Evil(), teacher / name)
    run()
    (teacher / "model.safetensors").unlink()  # in place of the weights
    assert "its weights cannot be loaded" in fails()
    assert not Path("hacked").exists()


@pytest.mark.parametrize("file", ["config.json", "tokenizer_config.json"])
def test_load_config_runs_no_code_and_asks_nobody(teacher, data, fails, monkeypatch, file):
    monkeypatch.setattr("builtins.input", lambda *given: pytest.fail("asked whether to run it"))
    (teacher / "evil.py").write_text("import os; os.mkdir('hacked')\nclass Evil: pass")
    changes = {
        "config.json": {"model_type": "evil", "auto_map": {"AutoConfig": "evil.Evil"}},
        "tokenizer_config.json": {
            "tokenizer_class": "Evil",
            "auto_map": {"AutoTokenizer": ["evil.Evil", None]},
        },
    }
    edit(teacher / file, **changes[file])
    assert "cannot be loaded" in fails()
    assert not Path("hacked").exists()


# ── Paths that lead outside ──


def test_forbid_outside_paths_refuses_indexes_that_lead_outside(teacher, data, fails):
    weights = load_file(teacher / "model.safetensors")
    save_file(weights, "elsewhere.safetensors", metadata={"format": "pt"})
    (teacher / "model.safetensors").unlink()
    for name in "../elsewhere.safetensors", os.path.abspath("elsewhere.safetensors"):
        (teacher / "model.safetensors.index.json").write_text(
            json.dumps({"metadata": {}, "weight_map": dict.fromkeys(weights, name)})
        )
        message = fails()
        assert name in message and "is not in its folder and is not opened" in message

    for folder in "ours", "theirs":
        datasets.DatasetDict(
            {
                split: datasets.Dataset.from_dict({"text": [folder], "label": ["positive"]})
                for split in ("train", "val", "test")
            }
        ).save_to_disk(folder)
    state = Path("ours/train/state.json")
    whole = state.read_text()
    edit(state, _data_files=[{"filename": "../../theirs/train/data-00000-of-00001.arrow"}])
    save_model(teacher)
    (teacher / "model.safetensors.index.json").unlink()
    assert "is not in its folder and is not opened" in fails("--data", "ours")
    state.write_text(whole)
    edit(Path("ours/dataset_dict.json"), splits=["../theirs/train", "val", "test"])
    assert "is not in its folder and is not opened" in fails("--data", "ours")


def test_load_tokenizer_opens_no_dictionary_that_a_hub_repository_names(teacher, monkeypatch):
    config = distill.load_config(str(teacher))
    options = {"mecab_kwargs": {"mecab_option": "-r /etc/passwd"}}
    monkeypatch.setattr(distill, "get_tokenizer_config", lambda name: options)
    monkeypatch.setattr(distill.transformers, "AutoTokenizer", None)  # it must not be reached
    with pytest.raises(distill.Problem, match="names files.*-r /etc/passwd"):
        distill.load_tokenizer("someone/teacher", config)


def test_load_tokenizer_ignores_vocabulary_elsewhere(teacher, data, run):
    Path("vocab.txt").write_text("[PAD]\n[UNK]\n[CLS]\n[SEP]\n[MASK]\nx")
    edit(teacher / "tokenizer_config.json", vocab_file=os.path.abspath("vocab.txt"))
    run("--epochs", "1")
    assert (
        Path("distilled_model/vocab.txt").read_bytes() == (SAMPLE / "base/vocab.txt").read_bytes()
    )


def test_check_columns_opens_no_pictures(teacher, data, fails):
    Path("secret.png").write_bytes(b"secret")
    for split in "train", "val", "test":
        (data / f"{split}.csv").unlink()
        kind = pa.struct({"bytes": pa.binary(), "path": pa.string()})
        table = pa.table(
            {
                "text": ["良い"],
                "label": pa.array([{"bytes": None, "path": os.path.abspath("secret.png")}], kind),
            }
        )
        features = {"text": {"dtype": "string", "_type": "Value"}, "label": {"_type": "Image"}}
        pq.write_table(
            table.replace_schema_metadata(
                {"huggingface": json.dumps({"info": {"features": features}})}
            ),
            data / f"{split}.parquet",
        )
    assert "column label holds Image" in fails()


# ── Network and privacy ──


def test_run_writes_no_path_of_the_user(data, run, tmp_path):
    run("--teacher", str(save_model(tmp_path / "somewhere" / "else")))
    for file in Path("distilled_model").iterdir():
        assert str(tmp_path).encode() not in file.read_bytes(), file
