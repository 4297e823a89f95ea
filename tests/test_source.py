"""distill.py as a text: names that a reader can rely on."""

import ast
from pathlib import Path

import distill


def local_names(function):
    """Names of the arguments and variables of a function."""
    names = set()
    for node in ast.walk(function):
        if isinstance(node, ast.arg):
            names.add(node.arg)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            names.add(node.id)
    return names


def test_source_has_no_local_named_like_a_function_class_or_module():
    tree = ast.parse(Path(distill.__file__).read_text("utf-8"))
    definitions = ast.FunctionDef | ast.ClassDef
    reserved = {node.name for node in tree.body if isinstance(node, definitions)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import | ast.ImportFrom):
            reserved |= {(alias.asname or alias.name).split(".")[0] for alias in node.names}
    assert {"run", "train", "torch", "F"} <= reserved
    for function in ast.walk(tree):
        if isinstance(function, ast.FunctionDef):
            assert not local_names(function) & reserved, function.name
