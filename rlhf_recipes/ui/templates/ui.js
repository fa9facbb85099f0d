// Asks what has changed, and puts it in its place. The pages work without any of this.
const main = document.querySelector("main[data-now]");

async function look() {
  if (document.hidden) return;
  const answer = await fetch(main.dataset.now, { cache: "no-store" });
  if (!answer.ok) return;
  const { parts, reload } = await answer.json();
  if (reload) return location.reload();
  for (const [id, html] of Object.entries(parts)) put(document.getElementById(id), html);
}

function put(place, html) {
  if (!place || place.was === html) return;
  const ticked = new Set([...place.querySelectorAll("input:checked")].map((one) => one.value));
  const held = place.contains(document.activeElement) && document.activeElement;
  const key = held && (held.href || held.value);
  const low = place.scrollHeight - place.scrollTop - place.clientHeight < 8;
  place.innerHTML = place.was = html;
  for (const one of place.querySelectorAll("input")) one.checked = ticked.has(one.value);
  if (key) [...place.querySelectorAll("a, input")].find((one) => (one.href || one.value) === key)?.focus();
  if (low) place.scrollTop = place.scrollHeight;
  const details = place.parentElement.closest("details");
  if (details && html) details.hidden = false;
}

addEventListener("keydown", (event) => {
  const field = event.target.closest("textarea[data-enter]");
  if (!field || event.key !== "Enter" || event.shiftKey || event.isComposing) return;
  event.preventDefault();
  if (field.value.trim()) field.form.requestSubmit();
});

if (main) {
  const every = 1000 * main.dataset.every;
  const next = () => setTimeout(() => look().catch(() => {}).finally(next), every);
  next();
}
