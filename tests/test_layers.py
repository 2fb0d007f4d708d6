"""The rooms' import rules hold, and would be noticed if they did not: a violation planted in a copy is caught."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
ROOMS = ("contract", "broker", "service", "models", "worker", "training", "cli", "benchmarks")


def lint_imports(root: Path) -> subprocess.CompletedProcess[str]:
    program = "import sys; from importlinter.cli import lint_imports; sys.exit(lint_imports(cache_dir=None))"
    return subprocess.run(
        [sys.executable, "-c", f"import sys; sys.path.insert(0, {str(root)!r}); {program}"],
        cwd=root,
        env=os.environ | {"COLUMNS": "200"},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


@pytest.fixture
def copy_of_rooms(tmp_path: Path) -> Path:
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    for room in ROOMS:
        shutil.copytree(ROOT / room, tmp_path / room, ignore=shutil.ignore_patterns("__pycache__"))
    return tmp_path


def test_import_rules_hold() -> None:
    done = lint_imports(ROOT)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize(
    ("module", "line", "rule"),
    [
        ("contract/spec.py", "import broker", "Rooms import downwards only"),
        ("service/app.py", "import worker", "Rooms import downwards only"),
        ("service/app.py", "import torch", "never reach torch"),
        ("models/unet.py", "import redis", "reach no server and no other room"),
        ("models/unet.py", "import contract", "reach no server and no other room"),
        ("worker/engine/runner.py", "import pydantic", "reach no server and no other room"),
        ("worker/engine/runner.py", "import worker.main", "worker.engine imports models only"),
        ("training/losses.py", "import broker", "reach no server and no other room"),
        ("worker/main.py", "import cli", "Rooms import downwards only"),
        ("models/unet.py", "import diffusers", "diffusers and peft are oracles"),
    ],
)
def test_planted_violation_is_caught(copy_of_rooms: Path, module: str, line: str, rule: str) -> None:
    path = copy_of_rooms / module
    path.write_text(path.read_text(encoding="utf-8") + f"\n{line}\n", encoding="utf-8")
    done = lint_imports(copy_of_rooms)
    assert done.returncode == 1, done.stdout + done.stderr
    broken = [row for row in done.stdout.splitlines() if row.endswith("BROKEN")]
    assert any(rule in row for row in broken), done.stdout


@pytest.mark.parametrize("module", ["cli.main", "service.app", "worker.supervisor", "broker", "contract"])
def test_gateway_side_runs_without_torch(module: str) -> None:
    """The bare install has no torch, and a supervisor must stay light: importing these must not load it, however
    indirectly."""
    program = f"import sys, {module}; sys.exit('torch' in sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stderr or f"{module} imports torch"


def test_models_and_engine_need_few_packages() -> None:
    """GPU machines often hold torch, transformers, safetensors, numpy and pillow, and no more."""
    import grimp

    graph = grimp.build_graph("models", "worker", include_external_packages=True, cache_dir=None)
    outside = {
        imported
        for module in graph.modules
        if module.split(".")[0] == "models" or module.startswith("worker.engine")
        for imported in graph.find_modules_directly_imported_by(module)
        if imported.split(".")[0] not in {"models", "worker", *sys.stdlib_module_names}
    }
    assert outside <= {"torch", "transformers", "safetensors", "numpy", "PIL", "tokenizers"}, sorted(outside)
