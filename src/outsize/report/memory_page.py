"""One self-contained page of a vocabulary's memories: clusters of tokens, drawn and listed, and a search box.
Tokens are texts of strangers: they come as data, and are shown as text."""

from __future__ import annotations

import json
from collections.abc import Sequence

PAGE = """<!doctype html>
<meta charset="utf-8">
<title>Memories of @@TITLE@@</title>
<style>
body { font: 14px system-ui, sans-serif; margin: 1rem; background: #fff; color: #222 }
canvas { border: 1px solid #ccc; max-width: 100% }
#found span, #group span, #all span { display: inline-block; margin: 2px; padding: 0 5px; background: #eee;
  border-radius: 3px; white-space: pre; font-family: monospace; cursor: pointer }
#all div { margin: 4px 0 } #all i { font-style: normal }
#all b { display: inline-block; width: 8em; border-left: 1em solid; padding-left: 5px }
</style>
<h1>Memories of @@TITLE@@</h1>
<p>Each point is a token, by what the feed-forward of layer @@LAYER@@ makes of it; colours are clusters.</p>
<p><input id="search" placeholder="search a token" autofocus> <span id="found"></span></p>
<canvas id="plot" width="900" height="600"></canvas>
<p id="name"></p>
<p id="group"></p>
<h2>Clusters, the largest first</h2>
<div id="all"></div>
<script id="data" type="application/json">@@DATA@@</script>
<script>
const d = JSON.parse(document.getElementById("data").textContent);
const plot = document.getElementById("plot"), c = plot.getContext("2d");
const colour = k => `hsl(${(k * 137.5) % 360} 65% 45%)`;
const at = i => [10 + d.x[i] * 880, 10 + d.y[i] * 580];
function draw(chosen) {
  c.clearRect(0, 0, 900, 600);
  d.tokens.forEach((t, i) => {
    const [x, y] = at(i);
    c.globalAlpha = chosen < 0 || d.cluster[i] === d.cluster[chosen] ? 0.8 : 0.12;
    c.fillStyle = colour(d.cluster[i]);
    c.fillRect(x - 1, y - 1, i === chosen ? 9 : 3, i === chosen ? 9 : 3);
  });
}
function label(box, ids) {
  box.replaceChildren(...ids.map(i => {
    const s = document.createElement("span");
    s.textContent = JSON.stringify(d.tokens[i]).slice(1, -1);
    s.onclick = () => choose(i);
    return s;
  }));
}
function choose(i) {
  const same = d.tokens.map((_, j) => j).filter(j => d.cluster[j] === d.cluster[i]);
  document.getElementById("name").textContent =
    `token ${i}, cluster ${d.cluster[i]} of ${same.length} tokens`;
  label(document.getElementById("group"), same.slice(0, 200));
  draw(i);
}
document.getElementById("search").oninput = e => {
  const q = e.target.value;
  const hits = q ? d.tokens.map((_, i) => i).filter(i => d.tokens[i].includes(q)).slice(0, 40) : [];
  label(document.getElementById("found"), hits);
};
plot.onclick = e => {
  const r = plot.getBoundingClientRect(), k = 900 / r.width;
  const x = (e.clientX - r.left) * k, y = (e.clientY - r.top) * k;
  let best = -1, least = 400;
  d.tokens.forEach((_, i) => {
    const [a, b] = at(i), far = (a - x) ** 2 + (b - y) ** 2;
    if (far < least) { least = far; best = i; }
  });
  if (best >= 0) choose(best);
};
const groups = new Map();
d.cluster.forEach((k, i) => (groups.get(k) || groups.set(k, []).get(k)).push(i));
[...groups].sort((a, b) => b[1].length - a[1].length).forEach(([k, ids]) => {
  const row = document.createElement("div"), name = document.createElement("b");
  const some = document.createElement("i");
  name.textContent = `${ids.length} tokens`;
  name.style.borderColor = colour(k);
  label(some, ids.slice(0, 24));
  row.append(name, some);
  document.getElementById("all").append(row);
});
draw(-1);
</script>
"""


def page(
    name: str,
    layer: int,
    tokens: Sequence[str],
    cluster: Sequence[int],
    places: Sequence[tuple[float, float]],
) -> str:
    """The page. `places`: of each token, from 0 to 1."""
    data = {
        "tokens": list(tokens),
        "cluster": list(cluster),
        "x": [round(x, 4) for x, _ in places],
        "y": [round(y, 4) for _, y in places],
    }
    text = json.dumps(data).replace("<", "\\u003c")  # nothing in it ends the element
    title = name.replace("&", "&amp;").replace("<", "&lt;")
    return (
        PAGE.replace("@@TITLE@@", title).replace("@@LAYER@@", str(layer)).replace("@@DATA@@", text)
    )
