"use strict";
// A key clicks what names it in aria-keyshortcuts. The page works without any of this.
const root = document.documentElement;
let sent = false;

addEventListener("keydown", (event) => {
  const long = event.key.length > 1;
  if (event.repeat || event.ctrlKey || event.metaKey || event.altKey || (event.shiftKey && long)) return;
  const field = event.target.closest("textarea");
  if (event.key === "Escape") {
    for (const open of field ? [] : document.querySelectorAll("details[open]")) open.open = false;
    field?.blur();
  }
  if (field || (event.key === "ArrowDown" && root.scrollHeight > root.clientHeight)) return;
  const key = CSS.escape(long ? event.key : event.key.toLowerCase());
  const hit = document.querySelector(`[aria-keyshortcuts~="${key}"]`);
  if (!hit) return;
  event.preventDefault();
  hit.click();
  write(hit.closest("details"));  // at once: what is typed next is the note's, not a verdict
});
const write = (details) => details?.open && details.querySelector("textarea")?.focus();
addEventListener("submit", (event) => {
  if (sent) event.preventDefault();
  sent = true;
});
addEventListener("pageshow", () => { sent = false; });
addEventListener("click", (event) => {
  // Of a double click, the second may meet the next page.
  if (event.detail > 1 && event.target.closest("button")) event.preventDefault();
  const summary = event.target.closest("summary");
  if (summary) setTimeout(write, 0, summary.parentElement);
});
const raw = document.querySelector("#raw");
if (raw) {
  raw.checked = sessionStorage.getItem("raw") === "1";
  raw.addEventListener("change", () => sessionStorage.setItem("raw", raw.checked ? "1" : "0"));
}
