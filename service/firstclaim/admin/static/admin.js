// Refreshes the page in place: the only script. Without it, everything works except the refresh and the copy buttons.
//
// The page is fetched again, and only what differs is changed, so that scroll, focus, selected text, ticked boxes and
// open details stay. Nothing is fetched while the tab is hidden, while text is selected, or while it is paused.
"use strict";

const live = document.querySelector("main [data-refresh]");
const bar = document.getElementById("live");
const PAUSED = "firstclaim-paused";

/** Make `old` like `fresh`, with as few changes as possible. Elements with an id keep their identity when they move. */
function morph(old, fresh) {
  if (old.nodeType !== Node.ELEMENT_NODE) {
    if (old.data !== fresh.data) old.data = fresh.data;
    return;
  }
  for (const { name } of [...old.attributes]) {
    if (!fresh.hasAttribute(name) && name !== "open") old.removeAttribute(name);
  }
  for (const { name, value } of [...fresh.attributes]) {
    if (name !== "open" && old.getAttribute(name) !== value) old.setAttribute(name, value);
  }
  const known = new Map([...old.children].filter((each) => each.id).map((each) => [each.id, each]));
  const kept = new Set();
  let next = old.firstChild;
  for (const child of [...fresh.childNodes]) {
    let match = child.id ? known.get(child.id) : next;
    if (!match || kept.has(match) || match.nodeName !== child.nodeName || (match.id || "") !== (child.id || "")) match = null;
    if (match === null) {
      kept.add(old.insertBefore(document.adoptNode(child), next));
      continue;
    }
    if (match === next) next = next.nextSibling;
    else old.insertBefore(match, next);
    kept.add(match);
    morph(match, child);
  }
  // A ticked row that newer ones have pushed off the page stays: what was chosen is not dropped unseen.
  for (const child of [...old.childNodes]) {
    if (!kept.has(child) && !(child.querySelector && child.querySelector("input:checked"))) child.remove();
  }
}

function isBusy() {
  const selection = document.getSelection();
  return document.hidden || (selection !== null && !selection.isCollapsed);
}

function say(text, state) {
  bar.hidden = !Number(live.dataset.refresh); // 0: nothing more will change, or all rows are ticked
  bar.querySelector("[data-state]").textContent = text;
  bar.className = `live ${state}`;
}

async function refresh() {
  let response;
  try {
    response = await fetch(location.href, { headers: { "X-Firstclaim-Refresh": "1" }, redirect: "manual" });
  } catch {
    return say("Not reachable", "lost");
  }
  if (response.type === "opaqueredirect") return location.reload(); // the session has ended: show the login
  if (!response.ok) return say(`Not refreshed (${response.status})`, "lost");
  const page = new DOMParser().parseFromString(await response.text(), "text/html");
  const fresh = page.querySelector("main [data-refresh]");
  if (fresh === null || isPaused() || isBusy()) return;
  morph(live, fresh);
  say("Live", "on");
}

function isPaused() {
  return sessionStorage.getItem(PAUSED) === "yes";
}

function showPaused() {
  bar.querySelector("button").textContent = isPaused() ? "Resume" : "Pause";
  say(isPaused() ? "Paused" : "Live", isPaused() ? "off" : "on");
}

async function loop() {
  for (;;) {
    await new Promise((done) => setTimeout(done, Number(live.dataset.refresh) * 1000 || 5000));
    if (!isPaused() && !isBusy() && Number(live.dataset.refresh)) await refresh();
  }
}

if (live !== null && bar !== null) {
  bar.querySelector("button").addEventListener("click", () => {
    sessionStorage.setItem(PAUSED, isPaused() ? "no" : "yes");
    showPaused();
    if (!isPaused()) refresh();
  });
  showPaused();
  loop();
}

for (const button of document.querySelectorAll("button[data-copy]")) {
  button.hidden = false;
  button.addEventListener("click", async () => {
    await navigator.clipboard.writeText(document.getElementById(button.dataset.copy).textContent);
    button.textContent = "Copied";
  });
}
