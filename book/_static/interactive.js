/* What the figures that answer back share. interactive.py wraps it and the script of one figure, interactive-*.js, into a
   function, and puts them beside the data into the output, so that the figure works in the pages, in Jupyter and in Colab,
   without a network or a kernel.

   No library: what is drawn is rows of bars and cells, and the browser brings the controls, keyboard included. A
   charting library would weigh more than the data of all figures. */
let numbered = 0;

// -- making elements -----------------------------------------------------------------------------------------

function fill(node, attributes, children) {
  for (const [name, value] of Object.entries(attributes)) {
    if (name.startsWith("on")) node.addEventListener(name.slice(2), value);
    else if (value !== false && value !== null) node.setAttribute(name, value === true ? "" : value);
  }
  node.append(...children);
  return node;
}

const html = (tag, attributes = {}, ...children) => fill(document.createElement(tag), attributes, children);
const svg = (tag, attributes = {}, ...children) =>
  fill(document.createElementNS("http://www.w3.org/2000/svg", tag), attributes, children);

/* Radio buttons: [[value, label], ...]. Arrow keys come with them. */
function choice(legend, options, chosen, act) {
  const name = `unravelling-${numbered++}`;
  return html("fieldset", {}, html("legend", {}, legend), ...options.map(([value, label]) =>
    html("label", {}, html("input", { type: "radio", name, value, checked: value === chosen, onchange: () => act(value) }),
      ` ${label}`)));
}

/* The same as a list that opens, for choices that would fill a phone's screen. */
function select(label, options, chosen, act) {
  const list = html("select", { onchange: () => act(options[list.selectedIndex][0]) },
    ...options.map(([value, text]) => html("option", { selected: value === chosen }, text)));
  return html("label", {}, `${label} `, list);
}

function toggle(label, checked, act) {
  const box = html("input", { type: "checkbox", checked, onchange: () => act(box.checked) });
  return html("label", {}, box, ` ${label}`);
}

function button(label, act, attributes = {}) {
  return html("button", { type: "button", onclick: act, ...attributes }, label);
}

/* A slider that shows its value as `say` words it. */
function slider(label, { min, max, value, step = 1 }, say, act) {
  const output = html("span", {}, say(value));
  const input = html("input", { type: "range", min, max, step, value, "aria-valuetext": say(value), oninput: () => {
    input.set(+input.value);
    act(+input.value);
  } });
  input.set = (number) => {
    input.value = number;
    output.textContent = say(number);
    input.setAttribute("aria-valuetext", say(number));
  };
  const node = html("label", { class: "slider" }, html("span", {}, label), input, output);
  node.input = input;
  return node;
}

/* A drawing in CSS pixels, drawn again when its width changes: letters keep their size on a phone. */
function plot(height, paint, attributes = {}) {
  const node = svg("svg", { height, "aria-hidden": "true" });
  const host = html("div", { class: "plot", ...attributes }, node);
  host.paint = () => {
    const width = host.clientWidth;
    if (!width) return;
    node.setAttribute("width", width);
    node.setAttribute("viewBox", `0 0 ${width} ${height}`);
    node.replaceChildren(...paint(width, height).filter(Boolean));
  };
  new ResizeObserver(host.paint).observe(host);
  return host;
}

/* A plot of n columns, one of them chosen: by touch, arrow keys or pointer, which chooses where it hovers or is pressed. */
function columns(height, label, count, chosen, choose, say, paint, hover = true) {
  const margin = 34;
  const left = (width) => (i) => margin + (i * (width - margin - 6)) / count();
  const host = plot(height, (width, tall) => paint(left(width), (width - margin - 6) / count(), width, tall),
    { tabindex: 0, role: "slider", "aria-label": label, "aria-valuemin": 0 });
  const point = (event) => {
    const { left: start, width } = host.getBoundingClientRect();
    const i = Math.floor(((event.clientX - start - margin) / (width - margin - 6)) * count());
    if (i >= 0 && i < count() && i !== chosen()) choose(i);
  };
  host.addEventListener("pointermove", (event) => { if (hover || event.buttons) point(event); });
  host.addEventListener("pointerdown", point);
  host.addEventListener("keydown", (event) => {
    const steps = { ArrowRight: 1, ArrowUp: 1, ArrowLeft: -1, ArrowDown: -1, PageUp: 10, PageDown: -10,
      Home: -count(), End: count() };
    if (!(event.key in steps)) return;
    event.preventDefault();
    choose(Math.min(Math.max(chosen() + steps[event.key], 0), count() - 1));
  });
  host.update = () => {
    host.setAttribute("aria-valuemax", count() - 1);
    host.setAttribute("aria-valuenow", chosen());
    host.setAttribute("aria-valuetext", say());
    host.paint();
  };
  return host;
}

/* The axis of a share, 0 to 100 %, at the left of a plot. */
function percentAxis(y, width) {
  return [0, 50, 100].flatMap((p) => [
    svg("line", { class: "grid", x1: 34, x2: width, y1: y(p / 100), y2: y(p / 100) }),
    svg("text", { x: 28, y: y(p / 100) + 4, "text-anchor": "end" }, `${p}`)]);
}

// -- wording -------------------------------------------------------------------------------------------------

const percent = (part) => `${(100 * part).toFixed(1)} %`;
const listed = (items) => items.length < 2 ? items.join("") : `${items.slice(0, -1).join(", ")} and ${items.at(-1)}`;
const plural = (count, noun) => `${count} ${noun}${count === 1 ? "" : "s"}`;

// -- setting up ------------------------------------------------------------------------------------------------

/* Build every figure of this name that has not been built yet: an output may be shown twice. */
function mount(name, build) {
  for (const figure of document.querySelectorAll(`.unravelling[data-figure="${name}"]:not([data-ready])`)) {
    figure.dataset.ready = "";
    const root = html("div"), status = html("p", { role: "status" });
    figure.querySelector(".unravelling-fallback").before(html("p", { class: "hint" }, figure.dataset.hint), root, status);
    build(root, status, JSON.parse(figure.querySelector('script[type="application/json"]').textContent));
  }
}
