// Charts: the last minute, one sample a second, while somebody looks.
const POLL_MS = 1000, SAMPLES = 60, OVER = 5;  // a rate is over so many polls: a lone query is no spike
const samples = [];
let counts = [];

function drawn(svg, series, top) {
  const x = (i, n) => ((300 * (i + SAMPLES - n)) / (SAMPLES - 1)).toFixed(1), y = (value) => (74 - (70 * value) / top).toFixed(1);
  const lines = svg.querySelectorAll(".line");
  series.forEach((values, s) => {
    const points = values.map((value, i) => (value === null ? null : `${x(i, values.length)} ${y(value)}`)).filter(Boolean);
    lines[s].setAttribute("d", points.length > 1 ? "M" + points.join("L") : "");
    if (s === 0) svg.querySelector(".area").setAttribute("d", points.length > 1 ? `M${points.join("L")}L${points.at(-1).split(" ")[0]} 76L${points[0].split(" ")[0]} 76Z` : "");
  });
}

const rounded = (value) => { const unit = 10 ** Math.floor(Math.log10(value)); return [1, 2, 5, 10].find((n) => n * unit >= value) * unit; };

function charts() {
  const median = samples.map((one) => one.p50), late = samples.map((one) => one.p99), rate = samples.map((one) => one.rate);
  const now = samples.at(-1);
  const highest = rounded(Math.max(1, ...late.filter((value) => value !== null))), most = rounded(Math.max(1, ...rate));
  drawn($("latency"), [median, late], highest);
  drawn($("rate"), [rate], most);
  $("latency-scale").textContent = "top " + number.format(highest) + " ms";
  $("rate-scale").textContent = "top " + number.format(most) + "/s";
  $("rate-now").textContent = `${number.format(now.rate < 10 ? Math.round(10 * now.rate) / 10 : Math.round(now.rate))}/s`;
  if (now.p50 !== null) {
    $("latency-now").textContent = `${ms(now.p50)}, 99 % in ${ms(now.p99)}`;
    $("latency").setAttribute("aria-label", `Latency over the last minute: median ${ms(now.p50)}, 99th percentile ${ms(now.p99)}`);
  }
  $("rate").setAttribute("aria-label", `Answers per second over the last minute: now ${Math.round(now.rate)}`);
}

async function poll() {
  if (document.visibilityState === "visible" && !$("login").open) {
    try {
      const stats = await (await ask("/v1/stats")).json(), at = performance.now(), { answered, latency_ms: latency } = stats.runner;
      counts = counts.filter((one) => one.answered <= answered).slice(-OVER);  // a server that began anew counts anew
      const from = counts[0], rate = from ? (1000 * (answered - from.answered)) / (at - from.at) : 0;
      counts.push({ answered, at });
      samples.push({ p50: latency.p50 ?? null, p99: latency.p99 ?? null, rate });
      if (samples.length > SAMPLES) samples.shift();
      charts();
      facts(stats.edgeglm, stats.searched);
    } catch { /* the next one may come through; a search says what is wrong */ }
  }
  setTimeout(poll, POLL_MS);
}
