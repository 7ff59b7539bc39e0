// What the page does beyond gradio: more keys, refusals as sentences, and names for screen readers.
(() => {
  // Escape cancels; 1 to 4 rate the group on show, with Shift for bad.
  const seen = (element) => element.offsetParent !== null && !element.disabled;
  const click = (selector) => {
    const found = [...document.querySelectorAll(selector)].find(seen);
    if (found) found.click();
    return Boolean(found);
  };
  document.addEventListener("keydown", (event) => {
    if (event.ctrlKey || event.altKey || event.metaKey) return;
    if (event.key === "Escape" && click("button.calls-off")) return;
    const digit = /^Digit([1-4])$/.exec(event.code);
    const typing = event.target.closest("input, textarea, select, [contenteditable]");
    if (digit && !typing && click(`#rate-${digit[1] - 1}-${event.shiftKey ? "down" : "up"}`)) event.preventDefault();
  });

  // What is refused before it gets to the page's own handlers, such as one request too many, has no other place to go.
  let timer;
  const say = (sentence) => {
    const note = document.getElementById("refused") || document.body.appendChild(document.createElement("p"));
    note.id = "refused";
    note.setAttribute("role", "alert");
    note.textContent = sentence;
    clearTimeout(timer);
    timer = setTimeout(() => note.remove(), 12000);
  };
  const explain = async (answer) => {
    const body = await answer.clone().json().catch(() => ({}));
    const reason = body.error?.message ?? (typeof body.detail === "string" ? body.detail : `status ${answer.status}`);
    say(`The server did not take that: ${reason.replace(/\.$/, "")}.`);
  };
  const plain = window.fetch;
  window.fetch = async (...request) => {
    const ours = String(request[0]?.url ?? request[0]).includes("/gradio_api/");
    try {
      const answer = await plain(...request);
      if (ours && answer.status >= 400) await explain(answer);
      return answer;
    } catch (error) {
      if (ours && error.name !== "AbortError") say("The server cannot be reached. Please reload the page in a moment.");
      throw error;
    }
  };

  // The lines are replaced at every change; their frames stay, so that changes are announced.
  const announce = () => document.querySelectorAll("[id$=-status]:not([aria-live])").forEach((line) => {
    line.setAttribute("role", "status");
    line.setAttribute("aria-live", "polite");
  });
  new MutationObserver(announce).observe(document.documentElement, { childList: true, subtree: true });
})();
