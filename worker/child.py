"""`python -m worker.child`: the worker process that a supervisor starts, one per device."""

import argparse
import os
import signal
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path

from broker.store import StoreRefusedError
from contract.settings import Settings
from models.weights_io.tensors import WeightsError
from worker.engine.calibration import CalibrationError
from worker.engine.numerics import NumericsError
from worker.main import DeviceError, ModelFolderError, main
from worker.supervisor import CONFIGURATION_ERROR


def run(arguments: Sequence[str] | None = None) -> int:
    """Works until told to stop. Returns the exit status: `CONFIGURATION_ERROR` after an error that another start would
    only repeat. Settings come from the environment."""
    parser = argparse.ArgumentParser(prog="worker.child", description=__doc__)
    parser.add_argument("--models", required=True)
    parser.add_argument("--model-dir", type=Path, required=True)
    parser.add_argument("--device", required=True)
    parser.add_argument("--name", required=True)
    options = parser.parse_args(arguments)
    settings = Settings()
    stop_seconds = settings.drain_seconds + settings.lease_seconds
    threading.Thread(target=_end_with_supervisor, args=(stop_seconds,), name="lifeline", daemon=True).start()
    try:
        main(settings, options.models.split(","), options.model_dir, device=options.device, name=options.name)
    except (CalibrationError, DeviceError, ModelFolderError, NumericsError, StoreRefusedError, WeightsError) as error:
        print(error, file=sys.stderr)
        return CONFIGURATION_ERROR
    return 0


def _end_with_supervisor(stop_seconds: float) -> None:
    """Standard input is a pipe that nobody writes to: it ends when the supervisor does, however that happens."""
    while os.read(0, 1024):
        pass
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(stop_seconds)
    os._exit(1)  # stuck: the leases bring the jobs back


if __name__ == "__main__":
    sys.exit(run())
