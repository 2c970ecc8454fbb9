"""The page of a comparison: the videos of a prompt side by side in step, and the tables. One file, no network."""

import html
import json
import math
from collections.abc import Sequence
from string import Template
from typing import Any
from urllib.parse import quote

from evaluation.study.summary import Row
from metrics.bootstrap import Estimate


def write_page(
    *,
    title: str,
    notes: Sequence[str],
    videos: dict[str, Any],
    rows: Sequence[Row],
    times: dict[str, dict[str, Any]],
    plots: Sequence[tuple[str, str]],
) -> str:
    """The HTML text.

    Args:
        title: heading.
        notes: paragraphs beneath it.
        videos: {fps, prompts: [{text, events, seeds: [{seed, videos: [{label, file}]}]}]}, files relative to the page; `events` of a
            timeline are {text, start, stop}, in frames.
        rows: of the table of measures.
        times: of the table of times.
        plots: (file relative to the page, caption).
    """
    # A closing tag inside a prompt would end the script element.
    data = json.dumps(videos, ensure_ascii=False).replace("<", "\\u003c")
    return _PAGE.substitute(
        title=html.escape(title),
        notes="\n".join(f"<p>{html.escape(note)}</p>" for note in notes),
        data=data,
        metrics=_metric_table(rows),
        times=_time_table(times),
        plots="\n".join(
            f'<figure class="plot"><img src="{html.escape(quote(file))}" alt="{html.escape(text)}">'
            f"<figcaption>{html.escape(text)}</figcaption></figure>"
            for file, text in plots
        ),
    )


def number(value: float) -> str:
    """A number with three significant digits, without exponents where they can be done without."""
    if math.isnan(value):
        return "–"
    if abs(value) < 1e-12:  # what rounding leaves of a sum that cancels
        return "0"
    return f"{value:.0f}" if abs(value) >= 1000 else f"{value:.3g}"


def interval(estimate: Estimate, *, signed: bool = False) -> str:
    """`mean [low, high]`, or the mean alone where there is no interval."""
    sign = "+" if signed and estimate.mean > 0 else ""
    mean = sign + number(estimate.mean)
    return mean if math.isnan(estimate.low) else f"{mean} [{number(estimate.low)}, {number(estimate.high)}]"


def _metric_table(rows: Sequence[Row]) -> str:
    labels = list(dict.fromkeys(row.label for row in rows))
    lines = [
        "<tr><th>measure</th><th>unit</th>" + "".join(f"<th>{html.escape(label)}</th>" for label in labels) + "</tr>"
    ]
    for metric, unit in dict.fromkeys((row.metric, row.unit) for row in rows):
        cells = [
            _metric_cell(next(row for row in rows if (row.metric, row.label) == (metric, label))) for label in labels
        ]
        lines.append(f"<tr><td>{html.escape(metric)}</td><td>{html.escape(unit)}</td>{''.join(cells)}</tr>")
    return "<table>\n" + "\n".join(lines) + "\n</table>"


def _metric_cell(row: Row) -> str:
    difference = ""
    if row.difference is not None:
        difference = f'<br><span class="difference">{html.escape(interval(row.difference, signed=True))}</span>'
    css = ' class="differs"' if row.differs else ""
    return f"<td{css}>{html.escape(interval(row.mean))}{difference}</td>"


def _time_table(times: dict[str, dict[str, Any]]) -> str:
    kinds = list(dict.fromkeys(kind for found in times.values() for kind in found["steps"]))
    head = "".join(f"<th>{html.escape(kind)} step, s</th>" for kind in kinds)
    lines = [f"<tr><th>method</th><th>denoising, s</th><th>runs</th>{head}<th>decoding, s</th></tr>"]
    for label, found in times.items():
        cells = []
        for kind in kinds:
            step = found["steps"].get(kind)
            often = "" if step is None or step["per_run"] is None else f" x {step['per_run']}"
            cells.append("<td>–</td>" if step is None else f"<td>{number(step['median'])}{often}</td>")
        denoise, decode = (number(found[key]) if found[key] is not None else "–" for key in ("denoise", "decode"))
        lines.append(
            f"<tr><td>{html.escape(label)}</td><td>{denoise}</td><td>{found['runs']}</td>"
            f"{''.join(cells)}<td>{decode}</td></tr>"
        )
    return "<table>\n" + "\n".join(lines) + "\n</table>"


_PAGE = Template("""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>$title</title>
<style>
body { font: 15px/1.5 system-ui, sans-serif; color: #1c1e22; max-width: 1400px; margin: 2em auto; padding: 0 1.5em; }
h1 { font-size: 1.5em; } h2 { font-size: 1.15em; margin-top: 2em; }
p { max-width: 60em; margin: .4em 0; color: #565a63; }
.bar { display: flex; flex-wrap: wrap; gap: .6em; align-items: center; margin: 1em 0; }
.bar select { max-width: min(40em, 100%); } .bar input[type=range] { flex: 1; min-width: min(12em, 100%); }
h1, h2, p, figcaption { overflow-wrap: anywhere; }
#grid { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(190px, 45%), 1fr)); gap: 14px; }
#grid figure { margin: 0; } #grid video { width: 100%; display: block; background: #eee; }
#grid video.small { image-rendering: pixelated; }
figcaption { font-size: .85em; color: #565a63; padding-top: .3em; }
table { border-collapse: collapse; font-size: .85em; display: block; overflow-x: auto; }
td, th { padding: .25em .8em .25em 0; text-align: left; white-space: nowrap; vertical-align: top; }
td, th { border-bottom: 1px solid #e3e5e9; }
td:first-child, th:first-child { position: sticky; left: 0; background: #fff; }
.difference { color: #8b909b; } .differs .difference { color: #b3390e; font-weight: 600; }
.plot { margin: 1.5em 0; overflow-x: auto; } .plot img { max-width: 100%; }
#missing { color: #b3390e; } #missing:empty { display: none; }
@media (max-width: 600px) { body { margin: 1em auto; padding: 0 1em; } .plot img { max-width: none; height: auto; width: 800px; } }
</style>
</head>
<body>
<h1>$title</h1>
$notes
<h2>Videos</h2>
<div id="player">
<div class="bar">
  <select id="prompt" aria-label="prompt"></select>
  <select id="seed" aria-label="seed"></select>
</div>
<div class="bar">
  <button id="play">play all</button>
  <button id="back" title="one frame back">&lsaquo;</button>
  <button id="forth" title="one frame on">&rsaquo;</button>
  <input id="seek" type="range" min="0" max="1" step="any" value="0" aria-label="time">
  <span id="time">0.00 s</span>
  <select id="rate" aria-label="speed">
    <option value="0.25">x 0.25</option><option value="0.5">x 0.5</option>
    <option value="1" selected>x 1</option><option value="2">x 2</option>
  </select>
</div>
<p id="missing" role="status"></p>
<div id="grid"></div>
</div>
<h2>Measures</h2>
<p>Mean over prompts with its 95 % bootstrap interval; beneath it the paired difference from the baseline, coloured
where its interval leaves out 0. Many measures are compared at once: one coloured cell in twenty is to be expected by
chance alone.</p>
$metrics
<h2>Time</h2>
$times
<h2>Plots</h2>
$plots
<script type="application/json" id="data">$data</script>
<script>
"use strict";
const data = JSON.parse(document.getElementById("data").textContent);
const element = name => document.getElementById(name);
let videos = [], playing = false, loop = 0;

function options(select, texts) {
  select.replaceChildren(...texts.map((text, index) => new Option(text, index)));
}
function chosen() { return data.prompts[element("prompt").value].seeds[element("seed").value]; }
function show() {
  setPlaying(false);
  const cells = chosen().videos.map(each => {
    const [figure, video, text] = ["figure", "video", "figcaption"].map(name => document.createElement(name));
    video.setAttribute("src", each.file.split("/").map(encodeURIComponent).join("/"));
    video.muted = video.playsInline = true;
    video.preload = "auto";
    video.addEventListener("error", () => { video.failed = true; tellMissing(); });
    video.addEventListener("loadedmetadata", () => video.classList.toggle("small", video.videoWidth < 200));
    text.textContent = each.label;
    figure.append(video, text);
    return [figure, video];
  });
  element("grid").replaceChildren(...cells.map(cell => cell[0]));
  videos = cells.map(cell => cell[1]);
  tellMissing();
  seek(0);
}
// Those that can be played: a file that is not here takes no part.
function there() { return videos.filter(video => !video.failed); }
function tellMissing() {
  const gone = videos.filter(video => video.failed), some = there().length > 0;
  element("missing").textContent = gone.length
    ? gone.length + " of " + videos.length + " videos cannot be played, such as " + gone[0].getAttribute("src") + ": they are files beside this page, and move with it."
    : "";
  ["play", "back", "forth", "seek"].forEach(name => { element(name).disabled = !some; });
  if (!some) { setPlaying(false); }
}
function length() { return there().length ? Math.min(...there().map(video => video.duration || 0)) : 0; }
function seek(time) {
  const end = length();
  time = Math.max(0, Math.min(time, end ? end - 0.5 / data.fps : 0));
  there().forEach(video => { video.currentTime = time; });
  tell(time);
}
function tell(time) {
  element("seek").value = length() ? time / length() : 0;
  const frame = Math.floor(time * data.fps + 0.001);
  const event = data.prompts[element("prompt").value].events.find(each => each.start <= frame && frame < each.stop);
  element("time").textContent = time.toFixed(2) + " s, frame " + frame + (event ? ": " + event.text : "");
}
function setPlaying(on) {
  playing = on;
  element("play").textContent = on ? "pause all" : "play all";
  const rate = Number(element("rate").value);
  there().forEach(video => {
    video.playbackRate = rate;
    // What cannot be played says so in its error event; a pause that comes before the start is no fault.
    if (on) { video.play().catch(() => {}); } else { video.pause(); }
  });
  cancelAnimationFrame(loop);
  if (on) { loop = requestAnimationFrame(keepStep); }
}
function keepStep() {
  const [leader, ...others] = there();
  if (!playing || !leader) { return; }
  if (leader.ended || (length() && leader.currentTime >= length() - 0.5 / data.fps)) { seek(0); setPlaying(true); return; }
  // A video that has drifted by more than a frame and a half is put back in step with the first.
  others.forEach(video => {
    if (Math.abs(video.currentTime - leader.currentTime) > 1.5 / data.fps) { video.currentTime = leader.currentTime; }
  });
  tell(leader.currentTime);
  loop = requestAnimationFrame(keepStep);
}
function step(by) {
  setPlaying(false);
  // The middle of a frame, so that rounding never shows the one before.
  seek((Math.floor(there()[0].currentTime * data.fps) + by + 0.5) / data.fps);
}
options(element("prompt"), data.prompts.map(each => each.text));
function newPrompt() {
  options(element("seed"), data.prompts[element("prompt").value].seeds.map(each => "seed " + each.seed));
  show();
}
element("prompt").onchange = newPrompt;
element("seed").onchange = show;
element("play").onclick = () => setPlaying(!playing);
element("back").onclick = () => step(-1);
element("forth").onclick = () => step(1);
element("rate").onchange = () => setPlaying(playing);
element("seek").oninput = () => { setPlaying(false); seek(element("seek").value * length()); };
if (data.prompts.length) { newPrompt(); } else { element("player").replaceChildren("No video of this report is here."); }
</script>
</body>
</html>
""")
