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

// Paper is white: on it the theme is the light one, and solutions and folded results are open; afterwards all is as it
// was. Without scripts the theme is never dark. Of event and medium either may come first, and an emulated print has no
// event.
const folds = "details:is(.sd-dropdown, .above-output, .below-input)";
function paper(printing) {
  const page = document.documentElement;
  if (printing && page.dataset.theme === "dark") {
    page.dataset.theme = "light";
    page.dataset.printed = "";
  } else if (!printing && "printed" in page.dataset) {
    page.dataset.theme = "dark";
    delete page.dataset.printed;
  }
  for (const fold of document.querySelectorAll(printing ? `${folds}:not([open])` : `${folds}[data-printed]`)) {
    fold.open = printing;
    fold.toggleAttribute("data-printed", printing);
  }
}
addEventListener("beforeprint", () => paper(true));
addEventListener("afterprint", () => paper(false));
matchMedia("print").addEventListener("change", (medium) => paper(medium.matches));
