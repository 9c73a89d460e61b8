"""Bar charts as SVG text, without a drawing library. Pure; called by `bench.report` and `bench.page`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

from bench.measure import HIGHER_IS_BETTER, Result

COLOURS = {
    "pillion": "#c2410c",
    "pillion-ebpf": "#f59e0b",
    "envoy": "#7c3aed",
    "envoy-h2": "#a78bfa",
    "haproxy": "#2563eb",
    "none": "#9ca3af",
    "nftables": "#9ca3af",
    "nftables+sockmap": "#fdba74",
    "connect": "#fbbf24",
    "connect+sockmap": "#f59e0b",
    "direct": "#d1d5db",
}
_WIDTH, _LEFT, _RIGHT, _BAR, _GAP = 760, 250, 110, 16, 14


@dataclass(frozen=True)
class Picture:
    """A chart of one metric of a row. works: how the names of its works end; empty: all. each: every work has a scale of its own."""

    row: str
    metric: str
    works: str = ""
    each: bool = False

    @property
    def file(self) -> str:
        """Its name in docs/performance."""
        return "-".join([self.row, self.metric, *self.works.split()]) + ".svg"

    def shown(self, rows: Sequence[Result]) -> list[Result]:
        """What has a bar. The contestant without proxy has none: it would make all others short."""
        return [
            one
            for one in rows
            if (one.row, one.metric) == (self.row, self.metric)
            and one.work.endswith(self.works)
            and one.median is not None
            and one.contestant != "none"
        ]


CHARTS = (
    Picture("P1", "throughput"),
    Picture("P1", "cpu_per_request"),
    Picture("P2", "latency_mean"),
    Picture("P3", "throughput"),
    Picture("P4", "bandwidth"),
    Picture("P5", "connections_per_cpu_s"),
    Picture("P6", "pss_idle"),
    Picture("P7", "bytes_per_connection"),
    Picture("P8", "latency_p50", "one processor", each=True),
    Picture("P8", "latency_p50", "sidecar pair", each=True),
    Picture("P8", "bandwidth"),
    Picture("P8", "throughput"),
    Picture("P9", "added_p99"),
    Picture("P12", "growth"),
)


def chart(rows: Sequence[Result], picture: Picture) -> str | None:
    """A group of bars for each work, a bar for each contestant; None when there is nothing to show."""
    shown = picture.shown(rows)
    if not shown:
        return None
    top = {work: max(one.median or 0.0 for one in shown if one.work == work or not picture.each) or 1.0 for work in _works(shown)}
    better = "more is better" if picture.metric in HIGHER_IS_BETTER else "less is better"
    title = f"{picture.row}: {picture.metric.replace('_', ' ')}, {shown[0].unit} ({better})"
    body, y = [f'<text x="10" y="22" font-weight="600">{escape(title)}</text>'], 44
    for work in _works(shown):
        body.append(f'<text x="10" y="{y + 12}">{escape(work)}</text>')
        y += _BAR  # a line of its own: names are longer than the margin is wide
        for one in (one for one in shown if one.work == work):
            value = max(0.0, one.median or 0.0)
            length = round((_WIDTH - _LEFT - _RIGHT) * value / top[work], 1)
            body.append(
                f'<text x="{_LEFT - 6}" y="{y + 12}" text-anchor="end" fill="#555">{escape(one.contestant)}</text>'
                f'<rect x="{_LEFT}" y="{y}" width="{length}" height="{_BAR - 2}" fill="{COLOURS.get(one.contestant, "#444")}"/>'
                f'<text x="{_LEFT + length + 5}" y="{y + 12}" fill="#333">{number(one.median)}</text>'
            )
            y += _BAR
        y += _GAP
    head = (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{_WIDTH}" height="{y}" viewBox="0 0 {_WIDTH} {y}" role="img" '
        f'aria-label="{escape(title)}" font-family="system-ui, sans-serif" font-size="12">'
    )
    return "\n".join([head, f'<rect width="{_WIDTH}" height="{y}" fill="#fff"/>', *body, "</svg>", ""])


def _works(rows: Sequence[Result]) -> list[str]:
    return list(dict.fromkeys(one.work for one in rows))


def number(value: float | None) -> str:
    """Three or four significant digits, thousands separated: 12,345 / 1.234 / empty for None."""
    if value is None:
        return ""
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"
