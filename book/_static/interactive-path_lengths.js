/* Exponential against binomial: how many paths of each length, what one of them carries, and the product. */
mount("path_lengths", (root, status, data) => {
  const state = { n: data.n, decay: data.decay, exact: 0, stop: 0 };
  const [shortest, longest] = data.band;
  const measured = () => (state.exact ? data.exact[state.exact - 1] : null);
  const lengths = () => Array.from({ length: state.n + 1 }, (_, k) => k);
  const sum = (values) => values.reduce((a, b) => a + b, 0);

  // the binomial law with probability p: its logarithm, since 2^100 paths are many; p = 1/2 counts the paths
  function binomial(p) {
    let logarithm = state.n * Math.log(1 - p);
    return lengths().map((k) => {
      if (k) logarithm += Math.log((state.n - k + 1) / k) + Math.log(p / (1 - p));
      return Math.exp(logarithm);
    });
  }
  const counts = () => binomial(0.5);
  const single = () => lengths().map((k) => state.decay ** k);
  const shares = () => binomial(state.decay / (1 + state.decay));  // number times decay^k, divided by the sum
  const inside = (values) => sum(values.slice(shortest, longest + 1));

  const n = slider("Blocks n", { min: 1, max: 100, value: state.n }, String, (value) => { state.n = value; update(); });
  const decay = slider("Decay per block", { min: 0.02, max: 1, step: 0.02, value: state.decay }, (r) => `× ${r.toFixed(2)}`,
    (value) => { state.decay = value; update(); });
  const which = choice("Exact spectrum", [[0, "none"], ...data.exact.map((set, i) => [i + 1, `ResNet-110, ${set.label}`])], 0, (i) => {
    state.exact = i;
    build();
  });
  const training = html("div", { class: "controls" });
  const panels = [
    ["How many paths (share)", counts, "grey"], ["One path carries", single, "bar"], ["Both together (share)", shares, "bar second"],
  ].map(([title, values, style], i) => plot(112, (width, tall) => paint(title, values(), style, i === 2, width, tall)));
  root.append(html("div", { class: "controls" }, n, decay), which, training, ...panels,
    html("p", { class: "key" }, `Shaded: lengths ${shortest} to ${longest}, which the paper calls effective. Line: exact spectrum.`));

  function build() {
    const set = measured();
    training.replaceChildren();
    if (set) {
      state.n = set.n;
      n.input.set(state.n);
      state.stop = set.stops.length - 1;
      training.append(slider("Epoch", { min: 0, max: state.stop, value: state.stop }, (i) => String(set.stops[i][0]), (i) => {
        state.stop = i;
        update();
      }));
    }
    n.input.disabled = Boolean(set);  // the exact spectrum is of a network of its own depth
    update();
  }

  function paint(title, values, style, last, width, tall) {
    const exact = last && measured() ? measured().stops[state.stop][1] : [];
    const left = 8, right = 8, top = 20, bottom = tall - 18, wide = (width - left - right) / values.length;
    const most = Math.max(...values, ...exact), least = Math.min(0, ...exact);
    const x = (k) => left + k * wide, y = (value) => top + (bottom - top) * (1 - (value - least) / (most - least));
    const to = Math.min(longest, state.n);
    return [
      shortest <= to && svg("rect", { class: "band", x: x(shortest), y: top, width: (to - shortest + 1) * wide, height: bottom - top }),
      svg("text", { x: left, y: 13, class: "strong" }, title),
      ...values.map((value, k) => svg("rect", { class: style, x: x(k) + 0.5, width: Math.max(wide - 1, 1), y: y(value),
        height: Math.max(y(0) - y(value), 0) })),
      svg("line", { class: "grid", x1: left, x2: width - right, y1: y(0), y2: y(0) }),
      exact.length > 0 && svg("path", { class: "wire exact", d: exact.map((value, k) => `${k ? "L" : "M"}${x(k) + wide / 2} ${y(value)}`).join("") }),
      svg("text", { x: x(0), y: tall - 4 }, "0"),
      svg("text", { x: width - right, y: tall - 4, "text-anchor": "end" }, `${state.n} branches`)];
  }

  const mean = (values) => sum(values.map((value, k) => k * value));

  function update() {
    const all = counts(), both = shares(), set = measured();
    let text = `${plural(state.n, "block")}, decay × ${state.decay.toFixed(2)}: the paths have ${mean(all).toFixed(1)} branches on average, ` +
      `weighted with what they carry ${mean(both).toFixed(1)}. Lengths ${shortest} to ${longest} hold ${percent(inside(all))} of the paths ` +
      `and ${percent(inside(both))} of the product.`;
    if (set) {
      const [epoch, exact] = set.stops[state.stop];
      text += ` Exact, on validation images of ${set.text} after ${plural(epoch, "epoch")} (${set.seeds === 1 ? "one seed" : `mean of ${set.seeds} seeds`}): ` +
        `${percent(inside(exact))} of the gradient, mean length ${mean(exact).toFixed(1)}.`;
    }
    status.textContent = text;
    panels.forEach((panel) => panel.paint());
  }

  build();
});
