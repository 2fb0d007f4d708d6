"""What a job's caller is told when the worker could not make a picture; the log has the traceback."""

from typing import Final

import structlog

from broker.store import StoreError
from contract.errors import ErrorCode
from contract.spec import JobError
from worker.engine.events import NotFiniteError, RowFailed
from worker.engine.memory import is_out_of_memory
from worker.requests import BadJobError
from worker.store_outage import store_unavailable

_OUT_OF_MEMORY: Final = JobError(
    code=ErrorCode.OUT_OF_MEMORY,
    detail="the picture does not fit into the worker's memory; ask for a smaller one",
)

_log = structlog.get_logger("darkroom.worker")


def begin_error(error: Exception) -> JobError:
    if isinstance(error, BadJobError):
        return error.error
    if isinstance(error, ValueError):
        return JobError(code=ErrorCode.VALIDATION_FAILED, detail=str(error))
    if is_out_of_memory(error):
        return _OUT_OF_MEMORY
    _log.error("job not begun", exc_info=error)
    return JobError(code=ErrorCode.INTERNAL, detail="the worker met an unexpected error (prepare)")


def row_error(event: RowFailed) -> JobError:
    error = event.error
    if is_out_of_memory(error):
        return _OUT_OF_MEMORY
    if isinstance(error, NotFiniteError):
        return JobError(code=ErrorCode.VALIDATION_FAILED, detail=f"{error}; ask for less guidance")
    if isinstance(error, ValueError) and event.stage == "prepare":
        return JobError(code=ErrorCode.VALIDATION_FAILED, detail=str(error))
    return JobError(code=ErrorCode.INTERNAL, detail=f"the worker met an unexpected error ({event.stage})")


def store_error(error: Exception) -> JobError:
    if isinstance(error, StoreError):
        return store_unavailable("a finished picture could not be stored", error)
    _log.error("picture not encoded", exc_info=error)
    return JobError(code=ErrorCode.INTERNAL, detail="the worker could not encode a finished picture")
