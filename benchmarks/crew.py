"""Worker processes over a Valkey of their own, for commands and tests that do them harm."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Self

from broker.embedded import EmbeddedValkey
from broker.worker_side import worker_name
from contract.settings import Settings
from worker.supervisor import Supervisor

_START_SECONDS: Final = 60.0
_STOP_SECONDS: Final = 30.0
_ROOT: Final = Path(__file__).resolve().parents[1]


class CrewError(RuntimeError):
    """A process did not do what it should; the text ends with its log."""


@dataclass(frozen=True)
class CrewMember:
    """A worker, or a supervisor with its workers, and the log of both."""

    name: str
    process: subprocess.Popen[bytes]
    log: Path

    def send(self, number: signal.Signals) -> None:
        self.process.send_signal(number)

    def said(self, words: str, times: int = 1) -> bool:
        return self.log.read_text(errors="replace").count(words) >= times

    def wait_for(self, words: str, times: int = 1) -> None:
        """Until the log holds `words` so often. Raises `CrewError`."""
        deadline = time.monotonic() + _START_SECONDS
        while not self.said(words, times):
            if time.monotonic() > deadline:
                raise CrewError(f"{self.name} did not say {words!r}:\n{self.log.read_text(errors='replace')[-4000:]}")
            time.sleep(0.02)

    def wait(self) -> int:
        """The exit status."""
        return self.process.wait(_STOP_SECONDS)


class Crew:
    """Use as a context manager: inside, Valkey runs, with an append-only file; afterwards no process is left.

    `command` starts a worker and takes --device and --name, as `worker.supervisor.worker_command` gives it. `settings`
    are those of every process, one thread per worker unless they say otherwise; `environment` is what else they find.
    """

    def __init__(
        self, folder: Path, command: Sequence[str], environment: Mapping[str, str] | None = None, **settings: Any
    ) -> None:
        self.folder = folder
        self.valkey = EmbeddedValkey(folder / "valkey")
        self._command = tuple(command)
        self._environment = dict(environment or {})
        self._chosen = {
            "store_url": f"file:{folder / 'store'}", "worker_threads": 1, "log_format": "text", **settings,
        }  # fmt: skip
        self._members: list[CrewMember] = []

    def __enter__(self) -> Self:
        self.valkey.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for member in self._members:
            if member.process.poll() is None:
                member.process.kill()  # the children of a supervisor end with it
            member.process.wait()
            if member.process.stdin is not None:
                member.process.stdin.close()
        self.valkey.stop()

    @property
    def settings(self) -> Settings:
        return Settings(redis_url=self.valkey.url, **self._chosen)

    @property
    def environment(self) -> dict[str, str]:
        chosen = {"redis_url": self.valkey.url, **self._chosen}
        return (
            os.environ | self._environment | {f"DARKROOM_{name.upper()}": str(value) for name, value in chosen.items()}
        )

    def start(self, *prefix: str) -> CrewMember:
        """A worker without a supervisor. `prefix` goes before its command."""
        name = worker_name()
        return self._start(name, [*prefix, *self._command, "--device", "cpu", "--name", name])

    def supervise(self, workers: int, healthy_seconds: float = 60.0) -> CrewMember:
        """That many workers under one supervisor; `healthy_seconds` is `Supervisor`'s."""
        program = (
            "import sys; from contract.settings import Settings; from contract.log import configure_log; "
            f"from {Supervisor.__module__} import Supervisor; configure_log('text'); "
            f"supervisor = Supervisor(Settings(), {('cpu',) * workers!r}, {self._command!r}, {healthy_seconds!r}); "
            "sys.exit(not supervisor.run())"
        )
        return self._start(f"supervisor-{len(self._members)}", [sys.executable, "-c", program])

    def _start(self, name: str, command: Sequence[str]) -> CrewMember:
        log = self.folder / f"{name}.log"
        with log.open("ab") as out:
            process = subprocess.Popen(
                command, env=self.environment, cwd=_ROOT, stdin=subprocess.PIPE, stdout=out, stderr=out
            )
        member = CrewMember(name, process, log)
        self._members.append(member)
        return member
