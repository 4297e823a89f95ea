"""Option: the student as a graph for other programs."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import report, rows, save_family
from transformers import (
    AutoTokenizer,
)

import distill

FRESH = """
import json, sys, torch
scores = []
for folder, inputs in json.load(open("inputs.json")):
    inputs = {name: torch.tensor(one) for name, one in inputs.items()}
    logits = [torch.export.load(f"{folder}/student.pt2").module()(**inputs)]
    if sys.argv[1:]:
        import onnxruntime
        session = onnxruntime.InferenceSession(f"{folder}_onnx/student.onnx")
        arrays = {name: one.numpy() for name, one in inputs.items()}
        logits.append(torch.from_numpy(session.run(None, arrays)[0]))
    scores.append([one.softmax(-1).max(-1).values.tolist() for one in logits])
print(json.dumps(scores))
"""
BILSTM = "bilstm", "--bilstm-embedding", "64", "--bilstm-hidden", "48"


def test_export_in_fresh_process_equals_predict(teacher, data, run):
    """The scores of predict(), without distill.py, of both kinds of students.

    The numbers of texts and the lengths are others than in the run.
    """
    onnx = all(map(importlib.util.find_spec, ("onnx", "onnxscript", "onnxruntime")))
    texts = [text for text, _ in rows("test", 5)]
    inputs = []
    for folder, student in ("bert", ["bert"]), ("bilstm", BILSTM):
        options = "--epochs", "1", "--student", *student
        check_exports(run, folder, *options, "--export", "pt2")
        if onnx:
            figures = check_exports(run, f"{folder}_onnx", *options, "--export", "onnx-int8")
            assert list(figures) == ["eager", "student.onnx", "student_int8.onnx"]
            assert figures["student_int8.onnx"]["bytes"] < 0.75 * figures["student.onnx"]["bytes"]
        tokenizer = AutoTokenizer.from_pretrained(folder)
        batch = tokenizer(texts, padding=True, return_token_type_ids=False)
        inputs.append((folder, dict(batch)))

    Path("inputs.json").write_text(json.dumps(inputs))
    command = [sys.executable, "-c", FRESH, *["onnx"] * onnx]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    found = json.loads(done.stdout.splitlines()[-1])
    for (folder, _), scores in zip(inputs, found, strict=True):
        expected = [one["score"] for one in distill.load_student(folder)(texts)]
        assert len(scores) == 1 + onnx
        assert all(one == pytest.approx(expected, abs=1e-5) for one in scores)


def check_exports(run, folder, *options):
    """Run with OUTPUT `folder`; returns its report's figures of the exports."""
    printed = run("--output", folder, *options)
    figures = report(folder)["export"]
    assert {*figures} - {"eager"} <= {*os.listdir(folder)}
    for name, one in figures.items():
        assert f"export    {name}" in printed and (one["difference"] < 1e-5 or "int8" in name)
        for size in 1, 32:
            milliseconds = one[f"milliseconds_{size}"]
            assert 0 < milliseconds["median"] <= milliseconds["p95"]
    assert not [file for file in Path(folder).iterdir() if file.is_dir()]
    return figures


@pytest.mark.parametrize(
    "family, changes",
    [
        ("roberta", {}),
        ("electra", {"embedding_size": 24}),
        ("distilbert", {}),
        (
            "deberta-v2",
            {"relative_attention": True, "pos_att_type": ["p2c", "c2p"], "conv_kernel_size": 3},
        ),
    ],
)
def test_export_of_families(data, run, family, changes):
    save_family("finetuned_bert_japanese", family, **changes)
    check_exports(run, "student", "--epochs", "1", "--export", "pt2")


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
