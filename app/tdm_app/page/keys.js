// Keys beyond what the controls have by themselves: Escape cancels, 1 to 4 rate the group on show (Shift: bad).
(() => {
  const seen = (element) => element && element.offsetParent !== null && !element.disabled;
  const click = (selector) => {
    const found = [...document.querySelectorAll(selector)].find(seen);
    if (found) found.click();
    return Boolean(found);
  };
  const typing = (target) => target.closest("input, textarea, select, [contenteditable]");
  document.addEventListener("keydown", (event) => {
    if (event.ctrlKey || event.altKey || event.metaKey) return;
    if (event.key === "Escape" && click("button.calls-off")) return;
    const digit = /^Digit([1-4])$/.exec(event.code);
    if (digit && !typing(event.target) && click(`#rate-${digit[1] - 1}-${event.shiftKey ? "down" : "up"}`)) {
      event.preventDefault();
    }
  });
  // Screen readers announce what happens here; the lines are replaced at every change, their frames stay.
  const announce = () => document.querySelectorAll("[id$=-status]").forEach((line) => {
    line.setAttribute("role", "status");
    line.setAttribute("aria-live", "polite");
  });
  new MutationObserver(announce).observe(document.documentElement, { childList: true, subtree: true });
})();
