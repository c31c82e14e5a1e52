// Words, files, pasted and dropped pictures, and keys.
const TYPING_MS = 220;

function firstPicture(items) {
  return [...(items || [])].find((file) => file.type.startsWith("image/")) || null;
}

let typing = 0;
$("words").addEventListener("input", () => {
  if ($("words").value.trim()) forget();
  clearTimeout(typing);
  typing = setTimeout(search, TYPING_MS);
});
$("search").addEventListener("submit", (event) => { event.preventDefault(); clearTimeout(typing); search(); });
$("count").addEventListener("change", search);
$("filter").addEventListener("change", search);
$("forget").addEventListener("click", () => { forget(); clear(); $("words").focus(); });
$("file").addEventListener("change", () => {
  const file = $("file").files[0];
  if (file) take(file, file.name);
  $("file").value = "";
});
addEventListener("paste", (event) => {
  const file = firstPicture(event.clipboardData?.files);
  if (file) { event.preventDefault(); take(file, "pasted picture"); }
});
let depth = 0;
const carriesFile = (event) => [...(event.dataTransfer?.types || [])].includes("Files");
addEventListener("dragenter", (event) => { if (carriesFile(event)) { depth++; $("drop").hidden = false; event.preventDefault(); } });
addEventListener("dragover", (event) => { if (carriesFile(event)) event.preventDefault(); });
addEventListener("dragleave", () => { depth = Math.max(depth - 1, 0); if (!depth) $("drop").hidden = true; });
addEventListener("drop", (event) => {
  depth = 0;
  $("drop").hidden = true;
  if (!carriesFile(event)) return;
  event.preventDefault();
  const file = firstPicture(event.dataTransfer.files);
  if (file) take(file, file.name);
  else $("trouble").textContent = "That is no picture; drop a PNG, JPEG or WebP file.";
});

// Arrows walk through the results; "/" goes to the words.
addEventListener("keydown", (event) => {
  if (event.key === "/" && !/^(INPUT|SELECT|TEXTAREA)$/.test(document.activeElement.tagName)) {
    event.preventDefault();
    $("words").focus();
    return;
  }
  const buttons = [...$("results").querySelectorAll(".hit")];
  const at = buttons.indexOf(document.activeElement);
  if (!buttons.length || (at < 0 && !(event.key === "ArrowDown" && document.activeElement === $("words")))) return;
  const top = buttons[0].offsetTop, across = Math.max(buttons.findIndex((one) => one.offsetTop > top), 1);
  const step = { ArrowRight: 1, ArrowLeft: -1, ArrowDown: at < 0 ? 1 : across, ArrowUp: -across }[event.key];
  if (step === undefined) return;
  event.preventDefault();
  if (at + step < 0) $("words").focus();
  else buttons[Math.min(at + step, buttons.length - 1)].focus();
});
