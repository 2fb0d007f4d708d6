"""What goes wrong, and where."""

from typing import Final

from contract import metrics
from deploy.dashboards.panels import Page, Panel, quantile, replicated, selected, summed

_PROCESS_LEGEND: Final = "{{job}} {{instance}} {{worker}}"
_BY_CLASS: Final = (
    f'label_replace(rate({metrics.HTTP_REQUESTS.name}[$__rate_interval]), "class", "$1", "status", "(.)..")'
)
_ALERTED: Final = ("alertname", "severity", "model", "job", "instance", "worker")
_SERVED_BY: Final = ("instance", metrics.WORKER_LABEL, *metrics.WORKER_INFO.labels)

_NOW: Final = (
    Panel(
        "Gateways", "That Prometheus reaches.", f"count({metrics.REDIS_UP.name}) or vector(0)", "gateways", kind="stat"
    ),
    Panel("Workers", "Live, by model.", replicated(metrics.WORKERS, ("model",)), "{{model}}", kind="stat"),
    Panel("Redis", "1 where every gateway reaches it.", f"min({metrics.REDIS_UP.name})", "up", kind="stat"),
    Panel(
        "Clients that follow events",
        "Server-sent events, on all gateways.",
        f"sum({metrics.SSE_CLIENTS.name})",
        "clients",
        kind="stat",
    ),
    Panel(
        "Alerts firing",
        "Runbooks in docs/operations.md tell what to do.",
        f'max by ({", ".join(_ALERTED)}) (ALERTS{{alertname=~"Darkroom.+",alertstate="firing"}})',
        "",
        kind="table",
    ),
)
_HTTP: Final = (
    Panel("Answers per second", "By class of status.", f"sum by (class) ({_BY_CLASS})", "{{class}}xx", "reqps"),
    Panel(
        "Errors per second",
        "4xx and 5xx by route and status.",
        summed(metrics.HTTP_REQUESTS, ("route", "status"), where='status=~"[45].."'),
        "{{status}} {{route}}",
        "reqps",
    ),
    Panel(
        "Refused, by reason",
        "By the code of the problem.",
        f"{summed(metrics.HTTP_PROBLEMS, ('code',), function='increase')} > 0",
        "{{code}}",
        kind="events",
    ),
    Panel("Time to the headers, 99 %", "By route.", quantile(0.99, metrics.HTTP_SECONDS, ("route",)), "{{route}}", "s"),
)
_JOBS: Final = (
    Panel(
        "Jobs failed, by reason",
        "By the code of the error.",
        f"{replicated(metrics.JOBS_FAILED, ('model', 'code'), 'increase')} > 0",
        "{{model}} {{code}}",
        kind="events",
    ),
    Panel(
        "Takeovers",
        "Executions put back after their worker died or fell silent.",
        replicated(metrics.EXECUTIONS_REAPED, ("model",), "increase"),
        "{{model}}",
        kind="events",
    ),
    Panel(
        "Late results thrown away",
        "Their execution had lost the job.",
        replicated(metrics.RESULTS_FENCED, ("model",), "increase"),
        "{{model}}",
        kind="events",
    ),
    Panel(
        "Share of steps redone",
        "Denoising steps lost with workers, beside those in finished pictures.",
        " / ".join(replicated(one, ("model",)) for one in (metrics.DENOISING_STEPS_REDONE, metrics.DENOISING_STEPS)),
        "{{model}}",
        "percentunit",
    ),
    Panel(
        "Store errors",
        "Calls of the picture store that failed.",
        summed(metrics.STORE_ERRORS, ("job", "operation"), function="increase"),
        "{{job}} {{operation}}",
        kind="events",
    ),
)
_PROCESSES: Final = (
    Panel(
        "Out of memory",
        "Whether a picture failed or not.",
        summed(metrics.OUT_OF_MEMORY, ("model",), function="increase"),
        "{{model}}",
        kind="events",
    ),
    Panel(
        "Workers started again",
        "By their supervisors.",
        summed(metrics.WORKER_RESTARTS, ("instance", metrics.WORKER_LABEL), function="increase"),
        "{{instance}} {{worker}}",
        kind="events",
    ),
    Panel("Memory of processes", "In RAM.", metrics.PROCESS_MEMORY.name, _PROCESS_LEGEND, "bytes"),
    Panel("CPU of processes", "Cores in use.", f"rate({metrics.PROCESS_CPU.name}[$__rate_interval])", _PROCESS_LEGEND),
    Panel(
        "Memory of GPUs",
        "Allocated to tensors, reserved by the allocator, in all.",
        metrics.DEVICE_MEMORY.name,
        "{{instance}} {{worker}} {{device}} {{kind}}",
        "bytes",
    ),
)
_SERVING: Final = (
    Panel(
        "What workers serve",
        "Workers of equal fingerprint make equal pictures.",
        f"max by ({', '.join(_SERVED_BY)}) ({selected(metrics.WORKER_INFO)})",
        "",
        kind="table",
    ),
)

HEALTH: Final = Page(
    "Health",
    "What goes wrong, and where.",
    {"Now": _NOW, "HTTP": _HTTP, "Jobs": _JOBS, "Processes": _PROCESSES, "Models": _SERVING},
)
