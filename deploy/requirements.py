"""Writes what each image installs beside our own code: `requirements.py PYPROJECT FOLDER`. Needs Python alone."""

import sys
import tomllib
from pathlib import Path


def main(pyproject: str, folder: str) -> None:
    """gateway.txt, torch.txt (large, so a layer of its own) and worker.txt."""
    project = tomllib.loads(Path(pyproject).read_text(encoding="utf-8"))["project"]
    gateway, extra = project["dependencies"], project["optional-dependencies"]["worker"]
    torch = [line for line in extra if line.startswith("torch>")]
    target = Path(folder)
    target.mkdir()
    for name, lines in {"gateway": gateway, "torch": torch, "worker": [*gateway, *extra]}.items():
        (target / f"{name}.txt").write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")


if __name__ == "__main__":
    main(*sys.argv[1:])
