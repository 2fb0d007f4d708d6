"""`python -m tests.deploy.helm_template CHART < VALUES.JSON`: what `helm template` and `helm lint` say, as JSON.

In a process of its own, since Helm's library brings Go's runtime with it."""

import json
import sys
from typing import Final

import helm_python

RELEASE: Final = "prod"
NAMESPACE: Final = "pictures"


def main(chart: str) -> None:
    values = json.load(sys.stdin)
    try:
        with helm_python.Chart.load(chart) as loaded:
            rendered = loaded.render(values, name=RELEASE, namespace=NAMESPACE)
    except helm_python.HelmError as error:
        sys.exit(str(error))
    json.dump({"rendered": rendered, "errors": helm_python.lint(chart, values, strict=True)["errors"]}, sys.stdout)


if __name__ == "__main__":
    main(sys.argv[1])
