// A link with words searches at once.
const asked = new URLSearchParams(location.search).get("q");
if (asked) { $("words").value = asked; search(); }
poll();
