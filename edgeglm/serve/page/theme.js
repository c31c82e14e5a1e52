// Theme: the system's, until somebody chooses.
const dark = matchMedia("(prefers-color-scheme: dark)");
const kept = { get() { try { return localStorage.getItem("theme"); } catch { return null; } },
  set(value) { try { localStorage.setItem("theme", value); } catch { /* private window */ } } };
function showTheme() {
  const chosen = kept.get() || "auto";
  document.documentElement.dataset.theme = chosen === "auto" ? (dark.matches ? "dark" : "light") : chosen;
  $("theme").textContent = "Theme: " + chosen;
}
$("theme").addEventListener("click", () => {
  const order = ["auto", "light", "dark"];
  kept.set(order[(order.indexOf(kept.get() || "auto") + 1) % 3]);
  showTheme();
});
dark.addEventListener("change", showTheme);
showTheme();
