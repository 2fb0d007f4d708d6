"""What Darkroom makes, and what makes it wait."""

from typing import Final

from contract import metrics
from deploy.dashboards.panels import Page, Panel, mean, quantile, replicated, selected, summed

_LANE: Final = ("model", "lane")
_LANE_LEGEND: Final = "{{model}} {{lane}}"
_STAGE: Final = ("task", "stage")
_STAGE_LEGEND: Final = "{{task}} {{stage}}"
_QUEUE: Final = ("model", "priority")
_QUEUE_LEGEND: Final = "{{model}} {{priority}}"

_PICTURES: Final = (
    Panel(
        "Pictures per second",
        "Finished and stored.",
        replicated(metrics.PICTURES, ("model", "task")),
        "{{model}} {{task}}",
    ),
    Panel(
        "Jobs submitted per second",
        "Accepted into a queue.",
        replicated(metrics.JOBS_SUBMITTED, _QUEUE),
        _QUEUE_LEGEND,
    ),
    Panel("Jobs ended per second", "By how they ended.", replicated(metrics.JOBS_ENDED, ("status",)), "{{status}}"),
    Panel(
        "Denoising steps per second",
        "In the pictures of succeeded jobs.",
        replicated(metrics.DENOISING_STEPS, ("model",)),
        "{{model}}",
    ),
)
_WAITING: Final = (
    Panel("Jobs waiting", "In the queues.", replicated(metrics.QUEUE_DEPTH, _QUEUE), _QUEUE_LEGEND),
    Panel(
        "Age of the oldest waiting job",
        "Since it was submitted.",
        replicated(metrics.QUEUE_OLDEST, _QUEUE),
        _QUEUE_LEGEND,
        "s",
    ),
    Panel(
        "Denoising steps to do",
        "By the jobs that wait or run: what workers are scaled by.",
        " - ".join(f"max by (model) ({selected(one)})" for one in (metrics.STEPS_SUBMITTED, metrics.STEPS_ENDED)),
        "{{model}}",
    ),
    Panel("Jobs running", "Executions that hold a lease.", f"max({metrics.RUNNING.name})", "running"),
    Panel(
        "Time waited, 95 %",
        "By jobs that have succeeded, from submit to their last start.",
        quantile(0.95, metrics.STAGE_SECONDS, ("model",), 'stage="queued"'),
        "{{model}}",
        "s",
    ),
)
_STAGES: Final = (
    Panel("Time per stage, mean", "Of all pictures of a job.", mean(metrics.STAGE_SECONDS, _STAGE), _STAGE_LEGEND, "s"),
    Panel(
        "Time per stage, 95 %",
        "Of all pictures of a job.",
        quantile(0.95, metrics.STAGE_SECONDS, _STAGE),
        _STAGE_LEGEND,
        "s",
    ),
)
_BATCHES: Final = (
    Panel("Pictures per tick", "Rows of one forward pass.", mean(metrics.ROWS_PER_TICK, _LANE), _LANE_LEGEND),
    Panel(
        "Share of slots used",
        "Of the batches of forward passes; the others are computed for nothing.",
        f"{summed(metrics.ROWS_PER_TICK, _LANE, 'sum')} / {summed(metrics.TICK_SLOTS, _LANE)}",
        _LANE_LEGEND,
        "percentunit",
        maximum=1,
    ),
    Panel(
        "Tick time, median",
        "One denoising step of all rows of a lane.",
        quantile(0.5, metrics.TICK_SECONDS, _LANE),
        _LANE_LEGEND,
        "s",
    ),
    Panel(
        "Tick time, 95 %",
        "One denoising step of all rows of a lane.",
        quantile(0.95, metrics.TICK_SECONDS, _LANE),
        _LANE_LEGEND,
        "s",
    ),
    Panel("Ticks per second", "Forward passes.", summed(metrics.TICKS, _LANE), _LANE_LEGEND),
)

THROUGHPUT: Final = Page(
    "Throughput",
    "What Darkroom makes, and what makes it wait.",
    {"Pictures": _PICTURES, "Queue": _WAITING, "Stages": _STAGES, "Batches": _BATCHES},
)
