// The answer: pictures with names and scores, and where the time went.
let shown = 0;
const urls = [];

function show(found, all, words) {
  const hits = found.hits, rows = found.searched.rows;
  forgetUrls();
  $("empty").hidden = true;
  replaceHits(hits.map(card));
  const what = state.picture ? "like your picture" : "for “" + words + "”";
  $("status").textContent = hits.length
    ? `${hits.length} of ${number.format(rows)} pictures ${what} in ${ms(all)}`
    : `Nothing ${what} among ${number.format(rows)} pictures passes the filter.`;
  remember(state.picture ? "" : words);
  const { embed, search: scan } = found.ms, parts = [embed, scan, Math.max(all - embed - scan, 0)];
  $("last").textContent = ms(all);
  [...$("split").children].forEach((part, i) => { part.style.width = (100 * parts[i]) / all + "%"; });
  $("split").setAttribute("aria-label", `Embedding ${ms(parts[0])}, search ${ms(parts[1])}, pictures and way ${ms(parts[2])}`);
  document.documentElement.dataset.shown = ++shown;
  facts(found.edgeglm, found.searched);
}

// Who stands on a result stays there: on the same picture, or else on the same place, or else on the words.
function replaceHits(items) {
  const held = document.activeElement, hits = () => [...$("results").querySelectorAll(".hit")];
  const place = hits().indexOf(held);
  $("results").replaceChildren(...items);
  if (place < 0) return;
  const now = hits();
  (now.find((one) => one.title === held.title) || now[Math.min(place, now.length - 1)] || $("words")).focus({ preventScroll: true });
}

function card(hit) {
  const item = made("li"), button = made("button", "hit"), tile = made("span", "tile");
  button.type = "button";
  const name = hit.text || hit.metadata?.name || hit.id;
  button.title = hit.id;
  if (typeof hit.picture === "string" && hit.picture.startsWith("/v1/pictures/")) {
    const image = made("img");
    image.alt = "";
    image.decoding = "async";
    image.addEventListener("error", () => tile.replaceChildren("no picture"));
    if (typeof hit.data === "string" && hit.data.startsWith("data:image/")) image.src = hit.data;
    else pictureUrl(hit.picture).then((url) => { image.src = url; }, () => tile.replaceChildren("no picture"));
    tile.append(image);
    button.addEventListener("click", () => like(hit.picture, name));
  } else {
    tile.textContent = "no picture";
    button.addEventListener("click", () => { $("words").value = name; forget(); search(); });
  }
  const score = made("span", "score"), meter = made("span", "meter"), bar = made("i");
  bar.style.width = Math.round(100 * Math.min(Math.max(hit.score, 0), 1)) + "%";
  meter.append(bar);
  score.append(meter, made("span", "hidden", "score "), made("span", "", hit.score.toFixed(3)));
  const label = made("span", "name", name);
  button.append(tile, made("span", "hidden", hit.rank + ": "), label, score, made("span", "hidden", "find pictures like it"));
  item.append(button);
  return item;
}

async function pictureUrl(path) {
  if (!state.token) return path;
  const url = URL.createObjectURL(await (await ask(path)).blob());  // an <img> sends no token
  urls.push(url);
  return url;
}

function forgetUrls() {
  urls.splice(0).forEach((url) => URL.revokeObjectURL(url));
}
