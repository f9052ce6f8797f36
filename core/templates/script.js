"use strict";
(() => {
  const root = document.documentElement;
  const remember = (area, key, value) => {
    // A browser may refuse storage to a file; the page works without it.
    try {
      if (value === undefined) return window[area].getItem(key);
      window[area].setItem(key, value);
    } catch { /* nothing to remember with */ }
    return null;
  };
  const isDark = () => root.dataset.theme ? root.dataset.theme === "dark" : matchMedia("(prefers-color-scheme: dark)").matches;

  const saved = remember("localStorage", "tenfold-theme");
  if (saved === "dark" || saved === "light") root.dataset.theme = saved;

  const place = `tenfold:${location.pathname}`;
  const claims = () => [...document.querySelectorAll("details.claim")];

  const keepPlace = () => {
    const row = document.activeElement?.closest?.("details.claim");
    remember("sessionStorage", place, JSON.stringify({
      open: claims().filter((row) => row.open).map((row) => row.id),
      focus: row ? row.id : (document.activeElement?.id ?? ""),
      y: scrollY,
    }));
  };
  const findPlace = () => {
    let kept = null;
    try { kept = JSON.parse(remember("sessionStorage", place)); } catch { /* not ours */ }
    if (!kept || !Array.isArray(kept.open)) return;
    for (const id of kept.open) {
      const row = document.getElementById(id);
      if (row instanceof HTMLDetailsElement) row.open = true;
    }
    const focused = kept.focus ? document.getElementById(kept.focus) : null;
    (focused?.querySelector("summary") ?? focused)?.focus({ preventScroll: true });
    scrollTo({ top: Number(kept.y) || 0, behavior: "instant" });
  };

  const openTarget = () => {
    const row = document.getElementById(decodeURIComponent(location.hash.slice(1)));
    if (row instanceof HTMLDetailsElement) { row.open = true; row.scrollIntoView(); }
  };

  const watch = () => {
    const clock = document.getElementById("elapsed");
    const seconds = Number(root.dataset.refresh);
    if (!(seconds > 0) || !clock) return;
    const span = (s) => s < 60 ? `${s} s` : s < 3600
      ? `${Math.floor(s / 60)} min ${String(s % 60).padStart(2, "0")} s`
      : `${Math.floor(s / 3600)} h ${String(Math.floor(s / 60) % 60).padStart(2, "0")} min`;
    const since = (key) => Math.max(0, Math.floor(Date.now() / 1000) - Number(clock.dataset[key]));
    if (since("written") > 3600) { document.getElementById("stopped").hidden = false; return; }
    setInterval(() => { clock.textContent = span(since("started")); }, 1000);
    setInterval(() => {
      // Never pull the page from under a reader who is selecting text, or reload one that nobody sees.
      if (document.hidden || !getSelection().isCollapsed) return;
      location.reload();
    }, seconds * 1000);
  };

  addEventListener("DOMContentLoaded", () => {
    const theme = document.getElementById("theme");
    const label = () => { theme.textContent = isDark() ? "Light" : "Dark"; theme.setAttribute("aria-label", `Use the ${isDark() ? "light" : "dark"} theme`); };
    theme.hidden = false;
    theme.addEventListener("click", () => {
      root.dataset.theme = isDark() ? "light" : "dark";
      remember("localStorage", "tenfold-theme", root.dataset.theme);
      label();
    });
    matchMedia("(prefers-color-scheme: dark)").addEventListener("change", label);
    label();

    const all = document.getElementById("all");
    if (all && claims().length) {
      const name = () => { all.textContent = claims().every((row) => row.open) ? "Close all" : "Open all"; };
      all.hidden = false;
      all.addEventListener("click", () => {
        const open = !claims().every((row) => row.open);
        for (const row of claims()) row.open = open;
        name();
      });
      document.addEventListener("toggle", name, true);
    }

    // Rows and place survive the page's own reload, the reader's, and the way back from a link.
    history.scrollRestoration = "manual";
    const arrival = performance.getEntriesByType("navigation")[0]?.type;
    if (arrival === "reload" || arrival === "back_forward") findPlace();
    else openTarget();
    addEventListener("pagehide", keepPlace);
    addEventListener("hashchange", openTarget);
    watch();
  });

  // Browsers whose style sheets cannot open a row for the printer.
  let closed = [];
  addEventListener("beforeprint", () => { closed = claims().filter((row) => !row.open); for (const row of closed) row.open = true; });
  addEventListener("afterprint", () => { for (const row of closed) row.open = false; });
})();
