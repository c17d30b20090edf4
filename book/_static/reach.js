// Whatever scrolls sideways within itself gets a tab stop, so that the keyboard can scroll it; nothing else does.
"use strict";
function reach() {
  for (const part of document.querySelectorAll("article table, article div.math math")) {
    if (part.scrollWidth > part.clientWidth + 1) part.tabIndex = 0;
    else part.removeAttribute("tabindex");
  }
}
addEventListener("load", reach);
addEventListener("resize", reach);

// Solutions and folded results are open on paper, and as they were afterwards.
addEventListener("beforeprint", () => {
  for (const fold of document.querySelectorAll("details:is(.sd-dropdown, .above-output):not([open])")) {
    fold.open = true;
    fold.dataset.printed = "";
  }
});
addEventListener("afterprint", () => {
  for (const fold of document.querySelectorAll("details[data-printed]")) {
    fold.open = false;
    delete fold.dataset.printed;
  }
});
