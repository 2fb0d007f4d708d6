"""Every metric, once: its name, help, labels and unit. Whoever measures builds the prometheus object from these."""

from dataclasses import dataclass
from typing import Final, Literal


@dataclass(frozen=True, slots=True)
class Metric:
    """`name` is what Prometheus shows, unit and `_total` included; `buckets` only for histograms."""

    name: str
    kind: Literal["counter", "gauge", "histogram"]
    help: str
    labels: tuple[str, ...] = ()
    unit: str = ""
    buckets: tuple[float, ...] = ()


_SECONDS: Final = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0)
_STAGES: Final = (*_SECONDS, 1800.0, 7200.0)  # jobs may wait for hours
_ROWS: Final = (1.0, 2.0, 3.0, 4.0, 6.0, 8.0, 12.0, 16.0, 24.0, 32.0, 64.0)

# Counted in Redis by the transaction that does the thing; every gateway exports them (take the max over replicas).
JOBS_SUBMITTED: Final = Metric(
    "darkroom_jobs_submitted_total", "counter", "Jobs accepted into a queue.", ("model", "task", "priority")
)
JOBS_ENDED: Final = Metric(
    "darkroom_jobs_ended_total", "counter", "Jobs ended, by final status.", ("model", "task", "status")
)
JOBS_FAILED: Final = Metric(
    "darkroom_jobs_failed_total", "counter", "Jobs failed, by the code of their error.", ("model", "code")
)
STEPS_SUBMITTED: Final = Metric(
    "darkroom_steps_submitted_total", "counter", "Denoising steps that accepted jobs asked for.", ("model",)
)
STEPS_ENDED: Final = Metric(
    "darkroom_steps_ended_total",
    "counter",
    "Denoising steps that ended jobs had asked for, made or not: what is left of those submitted is still to do.",
    ("model",),
)
PICTURES: Final = Metric("darkroom_pictures_total", "counter", "Pictures finished and stored.", ("model", "task"))
EXECUTIONS_REAPED: Final = Metric(
    "darkroom_executions_reaped_total", "counter", "Executions whose lease ran out and whose job went back.", ("model",)
)
RESULTS_FENCED: Final = Metric(
    "darkroom_results_fenced_total",
    "counter",
    "Results thrown away: the execution had lost its job.",
    ("model",),
)
DENOISING_STEPS: Final = Metric(
    "darkroom_denoising_steps_total", "counter", "Denoising steps in the pictures of succeeded jobs.", ("model",)
)
DENOISING_STEPS_REDONE: Final = Metric(
    "darkroom_denoising_steps_redone_total",
    "counter",
    "Denoising steps that were lost with a worker: done, reported and not saved.",
    ("model",),
)
REDIS_COUNTERS: Final = (
    JOBS_SUBMITTED, JOBS_ENDED, JOBS_FAILED, STEPS_SUBMITTED, STEPS_ENDED, PICTURES, EXECUTIONS_REAPED, RESULTS_FENCED,
    DENOISING_STEPS, DENOISING_STEPS_REDONE,
)  # fmt: skip

# Read from Redis at scrape time.
QUEUE_DEPTH: Final = Metric("darkroom_queue_depth", "gauge", "Jobs waiting in a queue.", ("model", "priority"))
QUEUE_OLDEST: Final = Metric(
    "darkroom_queue_oldest_job_seconds",
    "gauge",
    "Time since the job at the head of a queue was submitted; 0 for an empty queue.",
    ("model", "priority"),
    "seconds",
)
RUNNING: Final = Metric("darkroom_running_executions", "gauge", "Executions that hold a lease.")
WORKERS: Final = Metric("darkroom_workers", "gauge", "Live workers that serve a model.", ("model",))

# Measured in the gateway.
HTTP_REQUESTS: Final = Metric(
    "darkroom_http_requests_total", "counter", "HTTP requests answered.", ("method", "route", "status")
)
HTTP_SECONDS: Final = Metric(
    "darkroom_http_request_seconds",
    "histogram",
    "Time to the headers.",
    ("method", "route"),
    "seconds",
    _SECONDS,
)
HTTP_PROBLEMS: Final = Metric(
    "darkroom_http_problems_total", "counter", "HTTP requests refused or failed, by the code of the problem.", ("code",)
)
SSE_CLIENTS: Final = Metric("darkroom_sse_clients", "gauge", "Clients that follow a job's events.")
REDIS_UP: Final = Metric("darkroom_redis_up", "gauge", "Whether Redis answered at this scrape.")

# Measured in gateway and worker alike.
STORE_ERRORS: Final = Metric(
    "darkroom_store_errors_total", "counter", "Calls of the picture store that failed.", ("operation",)
)
# The names of prometheus_client's own collector of what the system knows of a process.
PROCESS_NAMESPACE: Final = "darkroom"
PROCESS_MEMORY: Final = Metric(
    "darkroom_process_resident_memory_bytes", "gauge", "Resident memory size in bytes.", unit="bytes"
)
PROCESS_CPU: Final = Metric(
    "darkroom_process_cpu_seconds_total", "counter", "Total user and system CPU time spent in seconds.", unit="seconds"
)

# Measured in the worker.
TICKS: Final = Metric("darkroom_engine_ticks_total", "counter", "Forward passes of the denoiser.", ("model", "lane"))
ROWS_PER_TICK: Final = Metric(
    "darkroom_engine_rows_per_tick", "histogram", "Occupied rows in one forward pass.", ("model", "lane"), "rows", _ROWS
)
TICK_SLOTS: Final = Metric(
    "darkroom_engine_tick_slots_total",
    "counter",
    "Slots in the batches of forward passes, occupied or not.",
    ("model", "lane"),
)
TICK_SECONDS: Final = Metric(
    "darkroom_engine_tick_seconds", "histogram", "Time of one tick.", ("model", "lane"), "seconds", _SECONDS
)
STAGE_SECONDS: Final = Metric(
    "darkroom_stage_seconds", "histogram", "Time of a job's stages: queued, denoise, decode, store.",
    ("model", "task", "stage"), "seconds", _STAGES,
)  # fmt: skip
OUT_OF_MEMORY: Final = Metric(
    "darkroom_out_of_memory_total", "counter", "Times that memory ran out, whether a picture failed or not.", ("model",)
)
DEVICE_MEMORY: Final = Metric(
    "darkroom_device_memory_bytes",
    "gauge",
    "Memory of the worker's GPU: allocated to tensors, reserved by the allocator, total.",
    ("device", "kind"),
    "bytes",
)
WORKER_INFO: Final = Metric(
    "darkroom_worker_info",
    "gauge",
    "1 for every model that a worker serves; equal fingerprints make equal pictures.",
    ("model", "fingerprint", "dtype", "device"),
)

# Measured in the supervisor, which also passes on its workers' metrics, each with the label WORKER_LABEL.
WORKER_LABEL: Final = "worker"
WORKER_RESTARTS: Final = Metric(
    "darkroom_worker_restarts_total", "counter", "Times that a worker process was started again.", (WORKER_LABEL,)
)

ALL: Final = (
    *REDIS_COUNTERS, QUEUE_DEPTH, QUEUE_OLDEST, RUNNING, WORKERS,
    HTTP_REQUESTS, HTTP_SECONDS, HTTP_PROBLEMS, SSE_CLIENTS, REDIS_UP, STORE_ERRORS, PROCESS_MEMORY, PROCESS_CPU,
    TICKS, ROWS_PER_TICK, TICK_SLOTS, TICK_SECONDS, STAGE_SECONDS, OUT_OF_MEMORY, DEVICE_MEMORY, WORKER_INFO,
    WORKER_RESTARTS,
)  # fmt: skip


def sample_names(metric: Metric) -> tuple[str, ...]:
    """The names of the series that Prometheus keeps of a metric."""
    if metric.kind != "histogram":
        return (metric.name,)
    return tuple(f"{metric.name}_{part}" for part in ("bucket", "sum", "count"))
