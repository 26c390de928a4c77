// Values under the pointer, or under the arrow keys; and the folded parts unfold for printing.
for (const figure of document.querySelectorAll("figure.chart")) {
  const source = figure.querySelector("script");
  if (!source) continue;
  const data = JSON.parse(source.textContent);
  if (!data.series.length) continue;
  const svg = figure.querySelector("svg"), cursor = figure.querySelector(".cursor"), tip = figure.querySelector(".tip");
  const [low, high, left, right] = data.x;
  const longest = data.series.reduce((a, b) => (b.points.length > a.points.length ? b : a));
  let at = longest.points.length - 1;

  const nearest = (points, x) => {
    let a = 0, b = points.length - 1;
    while (b - a > 1) { const mid = (a + b) >> 1; if (points[mid][0] < x) a = mid; else b = mid; }
    return Math.abs(points[a][0] - x) <= Math.abs(points[b][0] - x) ? a : b;
  };
  const show = (index) => {
    at = Math.max(0, Math.min(longest.points.length - 1, index));
    const step = longest.points[at][0];
    const x = left + ((step - low) / (high - low)) * (right - left);
    cursor.setAttribute("x1", x); cursor.setAttribute("x2", x); cursor.removeAttribute("hidden");
    tip.replaceChildren(Object.assign(document.createElement("div"), { textContent: data.axis + " " + step.toLocaleString("en") }));
    for (const one of data.series) {
      const point = one.points[nearest(one.points, step)];
      const line = document.createElement("div"), key = document.createElement("i");
      key.className = "key " + one.style;
      const where = point[0] === step ? "" : " (" + data.axis + " " + point[0].toLocaleString("en") + ")";
      const value = Math.abs(point[1]) >= 1000 ? Math.round(point[1]).toLocaleString("en") : String(point[1]);
      line.append(key, one.label + " " + value + data.unit + where);
      tip.append(line);
    }
    tip.hidden = false;
    const share = x / svg.viewBox.baseVal.width;
    tip.style.left = share < 0.55 ? "calc(" + share * 100 + "% + 10px)" : "auto";
    tip.style.right = share < 0.55 ? "auto" : "calc(" + (1 - share) * 100 + "% + 10px)";
  };
  const hide = () => { cursor.setAttribute("hidden", ""); tip.hidden = true; };
  svg.addEventListener("pointermove", (event) => {
    const box = svg.getBoundingClientRect();
    const x = ((event.clientX - box.left) / box.width) * svg.viewBox.baseVal.width;
    show(nearest(longest.points, low + ((x - left) / (right - left)) * (high - low)));
  });
  svg.addEventListener("pointerleave", hide);
  svg.addEventListener("blur", hide);
  svg.addEventListener("keydown", (event) => {
    const move = { ArrowLeft: -1, ArrowRight: 1, Home: -Infinity, End: Infinity }[event.key];
    if (move === undefined) return;
    event.preventDefault();
    show(at + move);
  });
}
addEventListener("beforeprint", () => document.querySelectorAll("details").forEach((part) => { part.open = true; }));
