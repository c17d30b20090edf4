/* The unravelled network: chain, formula and paths of up to six blocks, with branches to switch off. */
mount("unravelled_network", (root, status, data) => {
  const state = { n: data.n, off: new Set(), gradient: false };
  const blocks = () => Array.from({ length: state.n }, (_, i) => i + 1);
  const index = (i) => String(i).replace(/\d/g, (digit) => "₀₁₂₃₄₅₆₇₈₉"[digit]);
  const f = (i) => `f${index(i)}`;
  // every path as the list of the branches on it, the short ones first
  const paths = () => Array.from({ length: 2 ** state.n }, (_, bits) => blocks().filter((i) => bits & (1 << (i - 1))))
    .sort((a, b) => a.length - b.length || (a.join() < b.join() ? -1 : 1));
  const cut = (path) => path.some((i) => state.off.has(i));
  const on = () => state.n - state.off.size;
  // a branch is not linear: as soon as two of them follow each other, the sum over paths misses the output
  const exact = () => state.gradient || on() < 2;

  const size = slider("Blocks", { min: 1, max: data.most, value: state.n }, (n) => `n = ${n}`, (n) => {
    state.n = n;
    state.off = new Set([...state.off].filter((i) => i <= n));
    update();
  });
  const direction = choice("Sum over paths", [[0, "forward"], [1, "gradient"]], 0, (on) => {
    state.gradient = Boolean(on);
    update();
  });
  const switches = html("div", { class: "controls", role: "group", "aria-label": "Branches" });
  const chain = plot(104, paintChain);
  const formula = html("p", { class: "formula" });
  const table = html("table", { class: "counts" });
  const heading = html("p", { class: "key" });
  const list = html("ul", { class: "paths" });
  root.append(html("div", { class: "controls" }, size, direction), switches, chain, formula, table, heading, list);

  function flip(i) {
    if (!state.off.delete(i)) state.off.add(i);
    update();
  }

  function paintChain(width) {
    const edge = 26, wide = (width - 2 * edge) / state.n, low = 80, high = 26;
    const parts = [svg("text", { x: 0, y: low + 4 }, "y₀"), svg("text", { x: width, y: low + 4, "text-anchor": "end" }, `y${index(state.n)}`)];
    for (const i of blocks()) {
      const x = edge + (i - 1) * wide, box = Math.min(wide * 0.5, 60), middle = x + wide / 2 - 4, end = x + wide - 14;
      parts.push(
        svg("path", { class: "wire", d: `M${x} ${low}H${end - 7}M${end + 7} ${low}H${x + wide}` }),
        svg("g", { class: state.off.has(i) ? "branch off" : "branch", "data-block": i, onclick: () => flip(i) },
          svg("path", { class: "wire", d: `M${x + 4} ${low}V${high}H${middle - box / 2}M${middle + box / 2} ${high}H${end}V${low - 7}` }),
          svg("rect", { x: middle - box / 2, y: high - 17, width: box, height: 34, rx: 4 }),
          svg("text", { x: middle, y: high + 5, "text-anchor": "middle" }, f(i))),
        svg("circle", { class: "wire", cx: end, cy: low, r: 7 }),
        svg("path", { class: "wire", d: `M${end - 4} ${low}h8m-4 -4v8` }));
    }
    return parts;
  }

  const part = (i, ...children) => html("span", state.off.has(i) ? { class: "off" } : {}, ...children);

  /* The state after block i in terms of the input, equation (5) of the paper for any number of blocks. */
  function nested(i) {
    return i ? [...nested(i - 1), part(i, ` + ${f(i)}(`, ...nested(i - 1), ")")] : ["y₀"];
  }

  function term(path) {
    if (state.gradient) return [...path.map((i) => `J${index(i)}ᵀ`), `g${index(state.n)}`].join(" ");
    return path.reduce((inner, i) => `${f(i)}(${inner})`, "y₀");
  }

  function sentence() {
    const all = paths(), left = all.filter((path) => !cut(path));
    const lengths = [0, ...blocks()].map((k) => [k, left.filter((path) => path.length === k).length]).filter(([, m]) => m);
    const off = [...state.off].sort().map(f);
    const which = off.length ? `${listed(off)} ${off.length === 1 ? "is" : "are"} off` : "Every branch is on";
    const by = listed(lengths.map(([k, many]) => `${many} of length ${k}`));
    const sum = state.gradient ? "The gradient is exactly the sum over these paths."
      : exact() ? "With at most one branch on, the output is exactly the sum over these paths."
        : "Forward, the nested formula is exact; the sum over these paths is not, for branches are not linear.";
    return `${which}: ${left.length} of ${plural(all.length, "path")} left, ${by}. ${sum}`;
  }

  function update() {
    // the buttons stay in place while they are pressed, and so does the focus
    while (switches.children.length > state.n) switches.lastChild.remove();
    for (const i of blocks().slice(switches.children.length)) switches.append(button(f(i), () => flip(i)));
    blocks().forEach((i) => {
      switches.children[i - 1].setAttribute("aria-pressed", !state.off.has(i));
      switches.children[i - 1].setAttribute("aria-label", `branch ${i}`);
    });
    chain.paint();
    const product = blocks().flatMap((i) => ["(1", part(i, ` + J${index(i)}ᵀ`), ") "]);
    formula.replaceChildren(...(state.gradient ? ["g₀ = ", ...product, `g${index(state.n)}`] : [`y${index(state.n)} = `, ...nested(state.n)]));
    const all = paths(), lengths = [0, ...blocks()];
    const row = (name, cells) => html("tr", {}, html("th", { scope: "row" }, name), ...cells.map((c) => html("td", {}, `${c}`)));
    const many = (k, test) => all.filter((path) => path.length === k && test(path)).length;
    table.replaceChildren(row("length", lengths), row("paths", lengths.map((k) => many(k, () => true))),
      row("left", lengths.map((k) => many(k, (path) => !cut(path)))));
    heading.textContent = `${state.gradient ? "g₀" : `y${index(state.n)}`} ${exact() ? "=" : "≠"} the sum over paths:`;
    list.replaceChildren(...all.map((path) => html("li", cut(path) ? { class: "off" } : {}, term(path))));
    status.textContent = sentence();
  }

  update();
});
