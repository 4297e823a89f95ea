"""Option: the student as a graph for other programs."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import report, rows
from transformers import (
    AutoTokenizer,
)

import distill

FRESH = """
import json, sys, torch
inputs = {name: torch.tensor(one) for name, one in json.load(open("inputs.json")).items()}
logits = [torch.export.load("distilled_model/student.pt2").module()(**inputs)]
if sys.argv[1:]:
    import onnxruntime
    session = onnxruntime.InferenceSession("other/student.onnx")
    arrays = {name: one.numpy() for name, one in inputs.items()}
    logits.append(torch.from_numpy(session.run(None, arrays)[0]))
print(json.dumps([one.softmax(-1).max(-1).values.tolist() for one in logits]))
"""


@pytest.mark.parametrize(
    "student",
    [["bert"], ["bilstm", "--bilstm-embedding", "64", "--bilstm-hidden", "48"]],
    ids=lambda x: x[0],
)
def test_export_in_fresh_process_equals_predict(teacher, data, run, student):
    """The scores of predict(), without distill.py.

    The numbers of texts and the lengths are others than in the run.
    """
    onnx = all(map(importlib.util.find_spec, ("onnx", "onnxscript", "onnxruntime")))
    printed = run("--export", "pt2", "--epochs", "1", "--student", *student)
    figures = report()["export"]
    assert list(figures) == ["eager", "student.pt2"]
    if onnx:
        printed += run(
            "--export", "onnx-int8", "--epochs", "1", "--output", "other", "--student", *student
        )
        figures |= report("other")["export"]
        assert list(figures) == ["eager", "student.pt2", "student.onnx", "student_int8.onnx"]
        assert figures["student_int8.onnx"]["bytes"] < 0.75 * figures["student.onnx"]["bytes"]
        assert {file.suffix for file in Path("other").iterdir()} >= {
            ".json",
            ".csv",
            ".png",
            ".onnx",
            ".safetensors",
        }
    for name, one in figures.items():
        assert f"export    {name}" in printed and (one["difference"] < 1e-5 or "int8" in name)
        assert all(
            0 < one[f"milliseconds_{size}"]["median"] <= one[f"milliseconds_{size}"]["p95"]
            for size in (1, 32)
        )
    assert not [file for file in Path("distilled_model").iterdir() if file.is_dir()]

    tokenizer, texts = (
        AutoTokenizer.from_pretrained("distilled_model"),
        [text for text, _ in rows("test", 5)],
    )
    inputs = dict(tokenizer(texts, padding=True, return_tensors="pt", return_token_type_ids=False))
    Path("inputs.json").write_text(json.dumps({name: one.tolist() for name, one in inputs.items()}))
    done = subprocess.run(
        [sys.executable, "-c", FRESH, *["onnx"] * onnx], capture_output=True, text=True, check=True
    )
    expected = [one["score"] for one in distill.load_student("distilled_model")(texts)]
    found = json.loads(done.stdout.splitlines()[-1])
    assert len(found) == 1 + onnx and all(one == pytest.approx(expected, abs=1e-5) for one in found)


def test_export_refuses_graph_with_other_answers(teacher, data, fails, settings):
    graphs = distill.export_pt2
    settings.setattr(
        distill,
        "export_pt2",
        lambda *given: {
            name: lambda inputs, run=run: run(inputs) + 0.01 for name, run in graphs(*given).items()
        },
    )
    message = fails("--export", "pt2", "--epochs", "1")
    assert (
        "EXPORT = 'pt2': failed, but the student is saved" in message
        and "differ from the student's" in message
    )
    assert Path("distilled_model/model.safetensors").exists() and not list(
        Path("distilled_model").glob("*.pt2")
    )


def test_export_killed_leaves_nothing_in_the_way(teacher, data, run, monkeypatch):
    def killed(graph, options, folder):
        Path(folder, "student.pt2").write_text("half")
        raise SystemExit("killed")

    with monkeypatch.context() as patch, pytest.raises(SystemExit, match="killed"):
        patch.setattr(distill, "export_pt2", killed)
        patch.setattr(distill.shutil, "rmtree", lambda *given, **more: None)  # nothing is cleared
        run("--epochs", "1", "--export", "pt2")
    run("--epochs", "1", "--export", "pt2", "--output", str(Path("distilled_model").absolute()))
    files = os.listdir("distilled_model")
    assert sorted(report()["files"]) == sorted(files) and "student.pt2" in files
    assert not Path("distilled_model.distill_new").exists()
