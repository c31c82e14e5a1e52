// A search: with words or with a picture, never with both.
const INLINE = 24;

async function search() {
  const words = $("words").value.trim();
  if (!words && !state.picture) { clear(); return; }
  state.running?.abort();
  const running = (state.running = new AbortController());
  const began = performance.now();
  $("results").classList.add("stale");
  try {
    const where = $("filter").value.trim(), k = Number($("count").value), inline = Math.min(k, INLINE);
    let answer;
    if (state.picture) {
      const query = new URLSearchParams({ k, inline });
      if (where) query.set("where", where);
      const kind = state.picture.type.startsWith("image/") ? state.picture.type : "image/unknown";
      answer = await ask("/v1/search?" + query, { method: "POST", body: state.picture, headers: { "content-type": kind }, signal: running.signal });
    } else {
      const body = JSON.stringify({ text: words, k, inline, where: where || null });
      answer = await ask("/v1/search", { method: "POST", body, headers: { "content-type": "application/json" }, signal: running.signal });
    }
    const found = await answer.json();
    if (state.running !== running) return;
    const all = performance.now() - began;
    $("trouble").textContent = "";
    show(found, all, words);
  } catch (error) {
    if (error.name === "AbortError" || state.running !== running) return;
    $("trouble").textContent = error instanceof Refused ? error.message : "Something went wrong: " + error.message;
    $("status").textContent = "";
  } finally {
    if (state.running === running) $("results").classList.remove("stale");
  }
}

function clear() {
  state.running?.abort();
  state.running = null;
  forgetUrls();
  replaceHits([]);
  $("results").classList.remove("stale");
  $("empty").hidden = false;
  $("status").textContent = $("trouble").textContent = "";
  remember("");
}

function remember(words) {
  const url = new URL(location.href);
  words ? url.searchParams.set("q", words) : url.searchParams.delete("q");
  history.replaceState(null, "", url);
}

async function like(path, name) {
  try {
    take(await (await ask(path)).blob(), name);
  } catch (error) {
    $("trouble").textContent = error.message;
  }
}

function take(blob, name) {
  forget();
  state.picture = blob;
  $("asked-picture").src = URL.createObjectURL(blob);
  $("asked-name").textContent = name || "your picture";
  $("asked").hidden = false;
  $("words").value = "";
  scrollTo({ top: 0 });
  search();
}

function forget() {
  if (!state.picture) return;
  URL.revokeObjectURL($("asked-picture").src);
  $("asked-picture").removeAttribute("src");
  state.picture = null;
  $("asked").hidden = true;
}
