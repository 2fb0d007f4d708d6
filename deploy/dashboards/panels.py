"""Panels and PromQL for the dashboards, in terms of `contract.metrics`: no metric is named by hand.

The classic schema, which every Grafana provisions from files; the SDK prefers a newer one, which older Grafanas lack.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import ceil
from typing import Final, Literal

from grafana_foundation_sdk.builders import dashboard, prometheus, stat, table, timeseries
from grafana_foundation_sdk.builders.common import ReduceDataOptions, VizLegendOptions, VizTooltipOptions
from grafana_foundation_sdk.cog.encoder import JSONEncoder
from grafana_foundation_sdk.models import common
from grafana_foundation_sdk.models.dashboard import (
    DashboardCursorSync,
    DashboardLinkType,
    DataTransformerConfig,
    VariableRefresh,
)
from grafana_foundation_sdk.models.prometheus import PromQueryFormat

from contract import metrics
from contract.metrics import Metric

SOURCE: Final = common.DataSourceRef("prometheus", "${source}")
"""A variable of the dashboard: Grafana's default Prometheus, until somebody chooses another."""

Kind = Literal["lines", "events", "stat", "table"]

_MODEL: Final = 'model=~"$model"'
_COLUMNS, _HEIGHT = 24, 8
_IN_A_LINE: Final = 3
_STAT_WIDTH, _STAT_HEIGHT = 4, 6
_TABLE_HIDES: Final = {"excludeByName": {"Time": True, "Value": True}}


@dataclass(frozen=True)
class Panel:
    """`legend` in Grafana's way, {{label}}; `unit` as Grafana names it. "events" draws bars of whole numbers, for what
    should be rare; "table" shows the labels."""

    title: str
    description: str
    expr: str
    legend: str
    unit: str = "short"
    kind: Kind = "lines"
    maximum: float | None = None


@dataclass(frozen=True)
class Page:
    """A dashboard: its panels by the headings under which they stand."""

    title: str
    description: str
    rows: Mapping[str, Sequence[Panel]]

    @property
    def file_name(self) -> str:
        return f"{self.title.lower()}.json"


def selected(metric: Metric, name: str = "", where: str = "") -> str:
    """A metric's series, those of the chosen models where it has that label; `name` is that of a histogram's part."""
    conditions = [part for part in (_MODEL if "model" in metric.labels else "", where) if part]
    return (name or metric.name) + (f"{{{','.join(conditions)}}}" if conditions else "")


def replicated(metric: Metric, by: Sequence[str], function: str = "rate") -> str:
    """What every gateway exports alike: the max over replicas, then the sum over what is not asked for."""
    series = selected(metric)
    inner = f"{function}({series}[$__rate_interval])" if metric.kind == "counter" else series
    inner = f"max by ({', '.join(metric.labels)}) ({inner})"
    return inner if tuple(by) == metric.labels else f"sum by ({', '.join(by)}) ({inner})"


def summed(metric: Metric, by: Sequence[str], part: str = "", function: str = "rate", where: str = "") -> str:
    """What every process counts by itself; `part` "sum" or "count" of a histogram."""
    series = selected(metric, f"{metric.name}_{part}" if part else "", where)
    return f"sum by ({', '.join(by)}) ({function}({series}[$__rate_interval]))"


def mean(metric: Metric, by: Sequence[str]) -> str:
    """Of a histogram."""
    return f"{summed(metric, by, 'sum')} / {summed(metric, by, 'count')}"


def quantile(share: float, metric: Metric, by: Sequence[str], where: str = "") -> str:
    """Of a histogram."""
    return f"histogram_quantile({share}, {summed(metric, (*by, 'le'), 'bucket', where=where)})"


def to_json(page: Page) -> str:
    """The same text every time."""
    link = dashboard.DashboardLink("Darkroom").type(DashboardLinkType.DASHBOARDS).tags(["darkroom"]).keep_time(True)
    model = (
        dashboard.QueryVariable("model")
        .query(f"label_values({metrics.WORKERS.name}, model)")
        .datasource(SOURCE)
        .refresh(VariableRefresh.ON_TIME_RANGE_CHANGED)
        .multi(True)
        .include_all(True)
        .all_value(".*")
    )
    built = (
        dashboard.Dashboard(page.title)
        .uid(f"darkroom-{page.title.lower()}")
        .description(page.description)
        .tags(["darkroom"])
        .readonly()
        .tooltip(DashboardCursorSync.CROSSHAIR)
        .refresh("10s")
        .time("now-1h", "now")
        .timezone("browser")
        .link(link)
        .with_variable(dashboard.DatasourceVariable("source").type("prometheus"))
        .with_variable(model)
    )
    for heading, panels in page.rows.items():
        built.with_row(dashboard.Row(heading))
        for panel, width, height in _laid_out(panels):
            built.with_panel(_built(panel).span(width).height(height))
    return JSONEncoder(sort_keys=True, indent=2).encode(built.build()) + "\n"


def _laid_out(panels: Sequence[Panel]) -> Iterator[tuple[Panel, int, int]]:
    """With widths that fill every line. Beside stats stands at most one table."""
    stats = sum(panel.kind == "stat" for panel in panels)
    if stats:
        for panel in panels:
            yield panel, _STAT_WIDTH if panel.kind == "stat" else _COLUMNS - stats * _STAT_WIDTH, _STAT_HEIGHT
        return
    lines = ceil(len(panels) / _IN_A_LINE)
    in_a_line = ceil(len(panels) / lines)
    for start in range(0, len(panels), in_a_line):
        line = panels[start : start + in_a_line]
        yield from ((panel, _COLUMNS // len(line), _HEIGHT) for panel in line)


def _built(panel: Panel) -> stat.Panel | table.Panel | timeseries.Panel:
    target = prometheus.Dataquery().expr(panel.expr).legend_format(panel.legend)
    made = _empty(panel.kind)
    made.title(panel.title).description(panel.description).datasource(SOURCE).unit(panel.unit).min(0)
    if panel.maximum is not None:
        made.max(panel.maximum)
    if isinstance(made, timeseries.Panel):
        return made.with_target(target.range())
    return made.with_target(
        target.instant().format(PromQueryFormat.TABLE if panel.kind == "table" else PromQueryFormat.TIME_SERIES)
    )


def _empty(kind: Kind) -> stat.Panel | table.Panel | timeseries.Panel:
    match kind:
        case "stat":
            latest = ReduceDataOptions().calcs(["lastNotNull"])
            return stat.Panel().reduce_options(latest).graph_mode(common.BigValueGraphMode.NONE)
        case "table":
            return table.Panel().with_transformation(DataTransformerConfig("organize", options=_TABLE_HIDES))
    legend = VizLegendOptions().show_legend(True).placement(common.LegendPlacement.BOTTOM)
    tooltip = VizTooltipOptions().mode(common.TooltipDisplayMode.MULTI).sort(common.SortOrder.DESCENDING)
    made = timeseries.Panel().legend(legend).tooltip(tooltip)
    if kind == "events":
        # Bars of a minute and more: with shorter ones the intervals of increases overlap, and one event stands in many.
        return made.draw_style(common.GraphDrawStyle.BARS).fill_opacity(60).decimals(0).interval("1m")
    return made.fill_opacity(10).show_points(common.VisibilityMode.NEVER)
