"""One number for all weights of a model folder."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path
from typing import Final

_CHUNK: Final = 2**22


def weights_digest(folder: Path) -> str:
    """SHA-256 in hex over the names and bytes of the safetensors files, through links too. Adapters are not among them:
    they come and go while the model stays."""
    found = [
        path
        for parent, _, names in os.walk(folder, followlinks=True)
        for path in (Path(parent) / name for name in names)
        if path.suffix == ".safetensors" and path.relative_to(folder).parts[0] != "loras"
    ]
    digest = hashlib.sha256()
    for path in sorted(found):
        digest.update(path.relative_to(folder).as_posix().encode())
        with path.open("rb") as file:
            while chunk := file.read(_CHUNK):
                digest.update(chunk)
    return digest.hexdigest()
