// A digit ranks the first answer that has no rank yet; Enter goes on. Not while somebody types.
addEventListener("keydown", (event) => {
  const typing = event.target.matches("textarea, input:not([type=radio])");
  if (typing || event.ctrlKey || event.altKey || event.metaKey) return;
  const answers = [...document.querySelectorAll("[id^=rank]")].filter((e) => e.offsetParent);
  const open = answers.find((e) => !e.querySelector("input:checked"));
  const choice = open && [...open.querySelectorAll("input")][Number(event.key) - 1];
  if (/^[1-9]$/.test(event.key) && choice) { event.preventDefault(); choice.click(); }
  if (event.key === "Enter" && !event.target.matches("button")) {
    event.preventDefault();
    document.querySelector("#next").click();
  }
});

// An answer of the list is dragged by pointer events, which fingers have too. What the list then says
// is clicked below it, so that one way saves; and the list follows each click.
const choices = (item) => [...document.querySelectorAll(`#rank${item.dataset.place} input`)];
function followRanks() {
  const items = [...document.querySelectorAll("#order li")];
  for (const item of items) item.dataset.rank = choices(item).find((e) => e.checked)?.value ?? "";
  const key = (item) => Number(item.dataset.rank || 1e6);
  items.sort((a, b) => key(a) - key(b) || a.dataset.place - b.dataset.place);
  items[0]?.parentNode.append(...items);
}
addEventListener("change", (event) => {
  if (event.target.closest("[id^=rank]")) followRanks();
});

let dragged = null, moved = false;
addEventListener("pointerdown", (event) => {
  const item = event.target.closest("#order li");
  // Elsewhere than at the handle a finger scrolls.
  if (!item || event.button || (event.pointerType === "touch" && !event.target.matches(".handle")))
    return;
  [dragged, moved] = [item, false];
  item.classList.add("dragged");
});
addEventListener("pointermove", (event) => {
  if (!dragged) return;
  const below = [...dragged.parentNode.children].find((item) => {
    const { top, height } = item.getBoundingClientRect();
    return item !== dragged && event.clientY < top + height / 2;
  }) ?? null;
  if (below === dragged.nextElementSibling) return;
  dragged.parentNode.insertBefore(dragged, below);
  moved = true;
});
for (const end of ["pointerup", "pointercancel"]) addEventListener(end, (event) => {
  if (!dragged) return;
  dragged.classList.remove("dragged");
  const items = [...dragged.parentNode.children];
  const dropped = event.type === "pointerup" && moved && dragged.isConnected;
  dragged = null;
  if (dropped) items.forEach((item, rank) => choices(item)[rank].click());
  followRanks();
});
