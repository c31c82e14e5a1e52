// What answers, for the reader and for a bug report.
let known = null, knownText = "";

function facts(edgeglm, searched) {
  const rows = [
    ["Bundle", edgeglm.bundle], ["Digest", edgeglm.digest], ["Target", edgeglm.target], ["Precision", edgeglm.precision],
    ["Precision plan", edgeglm.plan], ["Runs on", edgeglm.engine], ["edgeglm", edgeglm.version], ["Space", edgeglm.space],
    ...Object.entries(edgeglm.models || {}).map(([tower, digest]) => [tower + " model", digest]),
  ];
  if (searched) rows.push(["Searches", searched.name], ["Pictures", number.format(searched.rows)]);
  const text = JSON.stringify(rows);
  if (knownText === text) return;
  knownText = text;
  known = { ...edgeglm, searched };
  $("facts").replaceChildren(...rows.filter(([, value]) => value).flatMap(([name, value]) => {
    const digest = /^[0-9a-f]{64}$/.test(value), shown = made("dd", digest ? "digest" : "", digest ? value.slice(0, 12) + "…" : value);
    if (digest) shown.title = value;
    return [made("dt", "", name), shown];
  }));
  $("which").textContent = [edgeglm.bundle, edgeglm.precision, searched ? number.format(searched.rows) + " pictures" : ""].filter(Boolean).join(" · ");
  $("filter-label").hidden = !searched || !searched.filters;
}

$("copy").addEventListener("click", async () => {
  const report = JSON.stringify({ ...known, page: location.origin, browser: navigator.userAgent }, null, 1);
  try {
    await navigator.clipboard.writeText(report);
    $("copy").textContent = "Copied";
  } catch {  // no clipboard outside of a secure context: select it for the reader
    $("trouble").textContent = report;
  }
  setTimeout(() => { $("copy").textContent = "Copy for a bug report"; }, 2000);
});
