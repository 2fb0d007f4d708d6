"""Fails when the suite skipped a test that tests/skips.txt does not allow: `skips.py JUNIT.XML SKIPS.TXT`."""

import re
import sys
from pathlib import Path
from xml.etree import ElementTree


def allowed_reasons(listing: str) -> list[re.Pattern[str]]:
    """One regular expression a line, matched against the skip's reason; blank lines and # comments are ignored."""
    lines = (line.strip() for line in listing.splitlines())
    return [re.compile(line) for line in lines if line and not line.startswith("#")]


def unexplained(report: ElementTree.Element, allowed: list[re.Pattern[str]]) -> list[str]:
    found = []
    for case in report.iter("testcase"):
        for skip in case.iter("skipped"):
            reason = skip.get("message", "")
            if not any(pattern.search(reason) for pattern in allowed):
                found.append(f"{case.get('classname')}::{case.get('name')}: {reason}")
    return found


def main(junit: str, skips: str) -> int:
    report = ElementTree.parse(junit).getroot()  # noqa: S314 - our own pytest wrote it a moment ago
    found = unexplained(report, allowed_reasons(Path(skips).read_text(encoding="utf-8")))
    for line in found:
        print(f"skipped in CI: {line}", file=sys.stderr)
    if found:
        print(f"{len(found)} skipped; install what they name, or explain the reason in {skips}", file=sys.stderr)
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
