"""`python -m deploy.dashboards [FOLDER]`, or `make dashboards`: writes what Grafana is provisioned with."""

import sys
from pathlib import Path
from typing import Final

from deploy.dashboards.health import HEALTH
from deploy.dashboards.panels import to_json
from deploy.dashboards.throughput import THROUGHPUT

FOLDER: Final = Path(__file__).parents[1] / "grafana" / "dashboards"
PAGES: Final = (THROUGHPUT, HEALTH)


def write(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for page in PAGES:
        (folder / page.file_name).write_text(to_json(page), encoding="utf-8")


if __name__ == "__main__":
    write(Path(sys.argv[1]) if len(sys.argv) > 1 else FOLDER)
