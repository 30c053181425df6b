"""The page that `hpcdist trace` makes: one file, which needs nothing from elsewhere."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from html import escape

from hpcdist._cli.top_page import size
from hpcdist._cli.trace_summary import Slice, Summary

_MATRIX_MOST = 24  # processes: beyond, a table of pairs says more
_PAIRS_MOST = 40


def page(summary: Summary, title: str) -> str:
    """Write the page."""
    parts = [
        _head(summary, title),
        "<h2>Timeline</h2>",
        _timeline(summary),
        "<h2>How busy was each process?</h2>",
        _uses(summary),
        "<h2>Which calls were longest?</h2>",
        _longest(summary),
        "<h2>Which functions took the time?</h2>",
        _table(
            ("function", "times", "in all", "longest"),
            ((t.name, t.times, time(t.total), time(t.longest)) for t in summary.functions),
        ),
        "<h2>What was waited for?</h2>",
        _table(
            ("process", "what", "times", "in all", "longest"),
            ((t.pid, t.name, t.times, time(t.total), time(t.longest)) for t in summary.waits),
        ),
        "<h2>Which calls were queued?</h2>",
        _table(
            ("process", "function", "times", "in all", "longest"),
            ((t.pid, t.name, t.times, time(t.total), time(t.longest)) for t in summary.queued),
        ),
        "<h2>What was sent where?</h2>",
        _pairs(summary),
    ]
    body = "\n".join(parts)
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8">\n'
        f"<title>{escape(title)}</title>\n<style>{_STYLE}</style></head>\n"
        f"<body>\n{body}\n<script>{_SCRIPT}</script>\n</body></html>\n"
    )


def time(microseconds: float) -> str:
    """Write a time.

    >>> time(3), time(4200), time(5e6), time(7.2e9)
    ('3 µs', '4.2 ms', '5.00 s', '2.0 h')
    """
    if microseconds < 1000:
        return f"{microseconds:.0f} µs"
    if microseconds < 1e6:
        return f"{microseconds / 1e3:.1f} ms"
    if microseconds < 3.6e9:
        return f"{microseconds / 1e6:.2f} s"
    return f"{microseconds / 3.6e9:.1f} h"


def _head(summary: Summary, title: str) -> str:
    calls = sum(use.calls for use in summary.uses)
    sent = sum(pair.size for pair in summary.pairs)
    lines = [
        f"<h1>{escape(title)}</h1>",
        f"<p>{time(summary.span)}, {len(summary.names)} processes, {calls} calls, "
        f"{size(sent)}B sent.</p>",
    ]
    lines += [
        f'<p class="warn">Process {pid} was lost after {time(at)}: {escape(why)}</p>'
        for pid, at, why in summary.lost
    ]
    if summary.left_out:
        lines.append(
            f'<p class="warn">{summary.left_out} records did not fit: sums are too small.</p>'
        )
    return "\n".join(lines)


def _table(head: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    lines = [
        "<tr>" + "".join(f"<td>{escape(str(cell))}</td>" for cell in row) + "</tr>" for row in rows
    ]
    if not lines:
        return "<p>Nothing.</p>"
    titles = "".join(f"<th>{escape(each)}</th>" for each in head)
    return f"<table><tr>{titles}</tr>\n" + "\n".join(lines) + "</table>"


def _uses(summary: Summary) -> str:
    lines = [
        f"<tr><td>{escape(use.name)}</td><td>{use.calls}</td>"
        f'<td><div class="bar"><div style="width:{100 * use.share:.1f}%"></div></div></td>'
        f"<td>{100 * use.share:.0f} %</td><td>{time(use.busy)}</td>"
        f"<td>{time(use.waiting)}</td></tr>"
        for use in summary.uses
    ]
    head = "<tr><th>process</th><th>calls</th><th></th><th>busy</th><th></th><th>waiting</th></tr>"
    return f"<table>{head}\n" + "\n".join(lines) + "</table>"


def _longest(summary: Summary) -> str:
    return _table(
        ("function", "process", "took", "began at"),
        ((s.name, s.pid, time(s.dur), time(s.ts)) for s in summary.longest),
    )


def _pairs(summary: Summary) -> str:
    pids = sorted({pid for pair in summary.pairs for pid in (pair.origin, pair.to)})
    table = _table(
        ("from", "to", "messages", "bytes"),
        ((p.origin, p.to, p.messages, size(p.size)) for p in summary.pairs[:_PAIRS_MOST]),
    )
    if not 0 < len(pids) <= _MATRIX_MOST:
        return table
    sizes = {(pair.origin, pair.to): pair.size for pair in summary.pairs}
    most = max(sizes.values())
    head = "".join(f"<th>{pid}</th>" for pid in pids)
    lines = [f"<tr><th>from \\ to</th>{head}</tr>"]
    for origin in pids:
        cells = "".join(_cell(sizes.get((origin, to), 0), most) for to in pids)
        lines.append(f"<tr><th>{origin}</th>{cells}</tr>")
    return f'<table class="matrix">{"".join(lines)}</table>{table}'


def _cell(count: int, most: int) -> str:
    shade = round(0.8 * count / most, 2) if most else 0
    return f'<td style="background:rgba(70,130,220,{shade})">{size(count) if count else ""}</td>'


def _timeline(summary: Summary) -> str:
    names = sorted({each.name for each in summary.slices})
    numbers = {name: k for k, name in enumerate(names)}
    lanes = sorted({(each.pid, each.tid) for each in summary.slices})
    places = {lane: k for k, lane in enumerate(lanes)}
    data = {
        "span": summary.span,
        "names": names,
        "lanes": [f"{pid}" if tid == 1 else f"{pid}.{tid}" for pid, tid in lanes],
        "slices": [_drawn(each, places, numbers) for each in summary.slices],
    }
    text = json.dumps(data, separators=(",", ":")).replace("<", "\\u003c")
    hidden = f"<p>The {summary.hidden} shortest slices are not drawn.</p>" if summary.hidden else ""
    return (
        '<p class="hint">Wheel: zoom. Drag: move. Double click: all of it. One lane for each '
        'thread: process, or process.thread.</p><canvas id="timeline"></canvas>'
        f'<p id="tip">&nbsp;</p>{hidden}\n'
        f'<script type="application/json" id="data">{text}</script>'
    )


def _drawn(
    each: Slice, places: dict[tuple[int, int], int], numbers: dict[str, int]
) -> list[float | int]:
    kind = {"call": 0, "map": 1, "wait": 2}.get(each.category, 0)
    lane = places[each.pid, each.tid]
    return [lane, round(each.ts, 1), round(each.dur, 1), numbers[each.name], kind]


_STYLE = """
:root{color-scheme:light dark;--fg:#1b1f24;--bg:#fff;--line:#d5dae0;--soft:#f3f5f8;--bar:#3b82c4}
@media(prefers-color-scheme:dark){
:root{--fg:#e4e8ee;--bg:#14171b;--line:#343b45;--soft:#1d2229;--bar:#5b9fdd}}
body{font:14px/1.45 system-ui,sans-serif;color:var(--fg);background:var(--bg);
max-width:1200px;margin:2em auto;padding:0 1em}
h1{font-size:1.5em}h2{font-size:1.15em;margin-top:2em}
table{border-collapse:collapse;margin:.5em 0}
td,th{padding:.2em .7em;border-bottom:1px solid var(--line);text-align:left;
font-variant-numeric:tabular-nums;overflow-wrap:anywhere}
th{background:var(--soft)}
.matrix td{text-align:right;min-width:3em}
.bar{width:12em;height:.8em;background:var(--soft)}.bar div{height:100%;background:var(--bar)}
.warn{background:#e8a33d33;padding:.4em .7em}.hint{opacity:.7}
canvas{width:100%;border:1px solid var(--line);display:block;cursor:crosshair}
#tip{min-height:1.5em;overflow-wrap:anywhere}
"""

_SCRIPT = """
(function () {
  const data = JSON.parse(document.getElementById("data").textContent);
  const canvas = document.getElementById("timeline"), tip = document.getElementById("tip");
  const ctx = canvas.getContext("2d"), left = 60, top = 18;
  const lane = Math.max(4, Math.min(18, 900 / Math.max(1, data.lanes.length)));
  let from = 0, to = Math.max(1, data.span), width = 0, drag = null;
  const dark = matchMedia("(prefers-color-scheme: dark)");
  function write(us) {
    if (us < 1e3) return us.toFixed(0) + " µs";
    return us < 1e6 ? (us / 1e3).toFixed(2) + " ms" : (us / 1e6).toFixed(3) + " s";
  }
  function hue(k) { return (k * 137.508) % 360; }
  function draw() {
    const ratio = devicePixelRatio || 1, height = top + lane * data.lanes.length + 4;
    width = canvas.clientWidth;
    canvas.style.height = height + "px";
    canvas.width = width * ratio; canvas.height = height * ratio;
    ctx.setTransform(ratio, 0, 0, ratio, 0, 0);
    ctx.clearRect(0, 0, width, height);
    ctx.font = "10px sans-serif"; ctx.fillStyle = dark.matches ? "#aab" : "#556";
    const scale = (width - left) / (to - from);
    for (let k = 0; k <= 5; k++)
      ctx.fillText(write(from + k * (to - from) / 5), left + k * (width - left - 60) / 5, 11);
    if (lane >= 9)
      data.lanes.forEach((name, k) => ctx.fillText(name, 2, top + k * lane + lane - 3));
    const light = dark.matches ? 55 : 60;
    for (const [at, ts, dur, name, kind] of data.slices) {
      if (ts + dur < from || ts > to) continue;
      const x = Math.max(left, left + (ts - from) * scale);
      const end = Math.min(width, left + (ts + dur - from) * scale);
      const inset = kind ? lane * 0.25 : 0;
      ctx.fillStyle = kind === 2 ? "rgba(128,128,128,.65)" : `hsl(${hue(name)},60%,${light}%)`;
      ctx.fillRect(x, top + at * lane + inset, Math.max(1, end - x), lane - 1 - inset);
    }
  }
  function place(event) {
    const box = canvas.getBoundingClientRect();
    const x = event.clientX - box.left, y = event.clientY - box.top;
    return [from + (x - left) / (width - left) * (to - from), Math.floor((y - top) / lane)];
  }
  canvas.onwheel = (event) => {
    event.preventDefault();
    const [at] = place(event), factor = event.deltaY > 0 ? 1.25 : 0.8;
    from = Math.max(0, at - (at - from) * factor);
    to = Math.min(data.span, at + (to - at) * factor);
    if (to - from < 1) to = from + 1;
    draw();
  };
  canvas.ondblclick = () => { from = 0; to = Math.max(1, data.span); draw(); };
  canvas.onmousedown = (event) => { drag = [event.clientX, from, to]; };
  window.onmouseup = () => { drag = null; };
  canvas.onmousemove = (event) => {
    if (drag) {
      let by = (drag[0] - event.clientX) / (width - left) * (drag[2] - drag[1]);
      by = Math.max(-drag[1], Math.min(data.span - drag[2], by));
      from = drag[1] + by; to = drag[2] + by; draw();
      return;
    }
    const [at, k] = place(event);
    let best = null;
    for (const slice of data.slices)
      if (slice[0] === k && slice[1] <= at && at <= slice[1] + slice[2])
        if (!best || slice[2] < best[2]) best = slice;
    tip.textContent = best
      ? `${data.lanes[k]}: ${data.names[best[3]]}, ${write(best[2])}, from ${write(best[1])}`
      : "\\u00a0";
  };
  window.onresize = draw; dark.onchange = draw; draw();
})();
"""
