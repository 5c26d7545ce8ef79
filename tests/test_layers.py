"""Who may import whom: a unit imports only units on rows above its own."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1] / "lamina"

LAYERS = [
    {"errors", "text"},
    {"machine", "storage"},
    {"config", "registry", "seeds", "schedules"},
    {"audit", "results"},
    {"backbones", "data"},
    {"lookback", "prompts"},
    {"heads", "modelfile"},
    {"confidence", "model"},
    {"protections"},
    {"drift", "learner"},
    {"methods", "training"},
    {"runs"},
    {"continual", "selection"},
    {"lessons", "predictions", "estimator", "explain", "export"},
    {"catalogue", "console"},
    {"cli"},
]
RANK = {unit: rank for rank, units in enumerate(LAYERS) for unit in units}
FILES = sorted(path for path in ROOT.rglob("*.py") if path.name != "__init__.py")

#: libraries that only these files may import
ALONE = {
    "timm": {"backbones/timm_vit.py", "backbones/load.py", "backbones/checkpoints.py", "machine.py"},
    "open_clip": {f"backbones/{name}.py" for name in ("clip", "clip_text", "clip_blocks", "clip_load", "load")}
    | {"heads/templates.py"},
    "lightning_fabric": {
        "training/trainer.py",
        "training/feed.py",
        "training/evaluation.py",
        "training/launch.py",
        "continual.py",
    },
    "typer": {f"cli/{name}.py" for name in ("shared", "streams", "models", "lists", "explain", "transfer", "data")},
    "rich": {"cli/shared.py", "console.py"},
}


def imported(path):
    """Every module that a file imports, wherever in the file the import stands."""
    for node in ast.walk(ast.parse(path.read_text())):
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import | ast.ImportFrom) else []
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path.name}, line {node.lineno}: write imports in full, without dots"
            names = [f"{node.module}.{name}" for name in names]
        yield from names


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_point_up_the_table(path):
    here = path.relative_to(ROOT).with_suffix("").parts[0]
    assert here in RANK, f"give '{here}' a row in LAYERS"
    for name in imported(path):
        there = name.split(".")[1] if name.startswith("lamina.") else here
        if there in RANK:  # else a name of the package itself, such as its version
            assert there == here or RANK[there] < RANK[here], f"'{here}' may not import '{there}'; see LAYERS"


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_outside_libraries_are_imported_in_their_own_places_only(path):
    where = path.relative_to(ROOT).as_posix()
    for name in imported(path):
        allowed = ALONE.get(name.split(".")[0])
        assert allowed is None or where in allowed, f"{where} may not import {name}; see ALONE"


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_files_stay_short(path):
    limit = 120 if path.parent.name == "methods" else 400
    assert len(path.read_text().splitlines()) <= limit


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_public_names_say_what_they_are(path):
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_"):
            assert ast.get_docstring(node), f"{path.name}: {node.name} has no docstring"


@pytest.mark.parametrize("module", ["lamina", "lamina.cli"])
def test_the_command_line_starts_without_torch(module):
    code = f"import sys, {module}; sys.exit(any(name in sys.modules for name in ('torch', 'timm', 'numpy')))"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_help_works_without_a_network():
    code = (
        "import socket, sys\n"
        "def refuse(*arguments): raise OSError('no network in this test')\n"
        "socket.socket.connect = socket.getaddrinfo = refuse\n"
        "sys.argv = ['lamina', '--help']\n"
        "from lamina.cli import main\n"
        "main()"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0 and "resume" in done.stdout
