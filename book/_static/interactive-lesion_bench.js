/* The lesion bench: what the deletion of one unit costs, and of several, before and after batch norm collected new
   statistics. */
mount("lesion_bench", (root, status, data) => {
  const state = { dataset: 0, network: 0, many: false, unit: 0, k: 0, draw: 0, fresh: false };
  const dataset = () => data.datasets[state.dataset];
  const network = () => dataset().networks[state.network];
  const numbers = () => [...new Set(network().draws.map((draw) => draw[0]))];
  const draws = () => network().draws.filter((draw) => draw[0] === numbers()[state.k]);
  const deleted = () => [...draws()[state.draw][2]].map((code) => data.codes.indexOf(code));
  const intact = (draw) => draw.slice(5);  // as trained, and with new statistics where that is stored
  const share = (whole) => whole / 100000;  // errors are stored in thousandths of a per cent

  const controls = html("div", { class: "controls" });
  const steps = html("div", { class: "controls" });
  const strip = columns(190, "Unit", () => network().units.length,
    () => state.unit, (i) => { state.unit = i; update(); }, sentence, paint);
  const kept = plot(36, paintKept);
  const bars = plot(62, paintBars);
  const key = html("p", { class: "key" });
  root.append(controls, strip, kept, bars, key, steps);

  function reset() {
    state.unit = 0;
    // ten deletions, or the most below: stale statistics cost most there beside what is really lost
    if (network().draws.length) typical(Math.max(numbers().findLastIndex((k) => k <= 10), 0));
    else state.many = false;
    build();
  }

  /* Of the draws of a number of units, the one whose error is nearest to the median. */
  function typical(k) {
    state.k = k;
    const errors = draws().map((draw) => draw[3]);
    const sorted = [...errors].sort((a, b) => a - b), half = (sorted.length - 1) / 2;
    const median = (sorted[Math.floor(half)] + sorted[Math.ceil(half)]) / 2;
    const distances = errors.map((error) => Math.abs(error - median));
    state.draw = distances.indexOf(Math.min(...distances));
  }

  function build() {
    controls.replaceChildren(
      choice("Images", data.datasets.map((d, i) => [i, d.label]), state.dataset, (i) => {
        const name = network().name;
        state.dataset = i;
        state.network = Math.max(dataset().networks.findIndex((n) => n.name === name), 0);
        reset();
        refocus(0, i);
      }),
      choice("Network", dataset().networks.map((n, i) => [i, n.label]), state.network, (i) => {
        state.network = i;
        reset();
        refocus(1, i);
      }),
      choice("Delete", [[0, "one unit"], ...(network().draws.length ? [[1, "several at random"]] : [])], +state.many,
        (many) => { state.many = Boolean(many); build(); refocus(2, many); }));
    const most = numbers().length - 1;
    steps.replaceChildren(...(state.many ? [
      slider("How many", { min: 0, max: most, value: state.k }, (i) => plural(numbers()[i], "unit"), (i) => {
        typical(i);
        update();
      }),
      button("Previous draw", () => move(-1)),
      button("Next draw", () => move(1)),
      toggle("collect new batch-norm statistics", state.fresh, (on) => { state.fresh = on; update(); })] : []));
    strip.hidden = state.many;
    kept.hidden = bars.hidden = !state.many;
    update();
  }

  const refocus = (field, value) => controls.children[field].querySelector(`[value="${value}"]`).focus();

  function move(step) {
    state.draw = (state.draw + step + draws().length) % draws().length;
    update();
  }

  function sentence() {
    const where = `${network().label} on ${dataset().text}`;
    if (!state.many) {
      const [error, low, high, stage, transition] = network().units[state.unit];
      const range = network().seeds > 1
        ? `mean of ${network().seeds} trainings, which range from ${percent(share(low))} to ${percent(share(high))}`
        : `one training; 95 % interval over the images ${percent(share(low))} to ${percent(share(high))}`;
      const kind = `stage ${stage}${transition ? ", a transition" : ""}`;
      return `${where} without unit ${state.unit} (${kind}): error ${percent(share(error))} (${range}). ` +
        `Intact: ${percent(share(network().intact))}.`;
    }
    const [k, seed, , error, healed] = draws()[state.draw], [whole, anew] = intact(draws()[state.draw]);
    const outcome = state.fresh
      ? `error ${percent(share(healed))} with new batch-norm statistics, after ${percent(share(error))} with the old ones`
      : `error ${percent(share(error))} with the batch-norm statistics of the intact network`;
    return `${where}, seed ${seed}, draw ${state.draw + 1} of ${draws().length}: without ` +
      `${k === 1 ? "unit" : "units"} ${listed(deleted())}, ${outcome}. ` +
      `Intact: ${percent(share(whole))}${anew === undefined ? "" : `, with new statistics ${percent(share(anew))}`}.`;
  }

  const ends = (x, width, y) => [svg("text", { x, y }, "unit 0"),
    svg("text", { x: width - 6, y, "text-anchor": "end" }, `unit ${network().units.length - 1}`)];

  function paint(x, wide, width, tall) {
    const y = (part) => 10 + (tall - 40) * (1 - part);
    const bar = Math.max(wide - 2, 1.5);
    const marks = network().units.flatMap(([error, low, high, stage, transition], i) => {
      const middle = x(i) + wide / 2, gone = i === state.unit;
      return [
        svg("rect", { x: x(i) + 1, y: y(share(error)), width: bar, height: Math.max(y(0) - y(share(error)), 1),
          class: `bar${transition ? " second" : ""}${gone ? " chosen" : ""}` }),
        svg("line", { class: "whisker", x1: middle, x2: middle, y1: y(share(low)), y2: y(share(high)) }),
        svg("rect", { x: x(i) + 1, y: tall - 26, width: bar, height: 10,
          class: gone ? "block gone" : "block", "data-unit": i })];
    });
    const level = (part, style) => svg("line", { class: style, x1: 34, x2: width, y1: y(part), y2: y(part) });
    return [...percentAxis(y, width), ...marks, level(share(network().intact), "dashed"), level(data.chance, "dotted"),
      ...ends(x(0), width, tall - 3)];
  }

  /* A low strip: marks of one size are no errors. */
  function paintKept(width, tall) {
    if (!state.many) return [];
    const gone = new Set(deleted()), wide = (width - 6) / network().units.length, bar = Math.max(wide - 2, 1.5);
    return [...network().units.map((_, i) => svg("rect", { x: i * wide + 1, y: 4, width: bar, height: 12,
      class: gone.has(i) ? "slot gone" : "slot", "data-unit": i })), ...ends(0, width, tall - 3)];
  }

  function paintBars(width) {
    if (!state.many) return [];
    const [, , , error, healed] = draws()[state.draw], whole = intact(draws()[state.draw]);
    const label = 118, x = (part) => label + part * (width - label - 64);
    return [["old statistics", error, !state.fresh], ["new statistics", healed, state.fresh]].flatMap(([name, value, on], i) => {
      const y = 6 + 28 * i, level = whole[i] === undefined ? null : x(share(whole[i]));
      return [
        svg("text", { x: label - 8, y: y + 15, "text-anchor": "end", class: on ? "strong" : "" }, name),
        svg("rect", { x: label, y, width: Math.max(x(share(value)) - label, 1), height: 20,
          class: `bar${i ? " second" : ""}${on ? "" : " faint"}` }),
        level !== null && svg("line", { class: "dashed", x1: level, x2: level, y1: y - 4, y2: y + 24 }),
        on && svg("text", { x: Math.max(x(share(value)), level) + 6, y: y + 15, class: "strong" },
          percent(share(value)))];
    });
  }

  function update() {
    status.textContent = sentence();
    key.textContent = state.many
      ? "Blue: units that are left. Hollow: deleted ones. Bars: test error; the first draw shown is the one " +
        "nearest to the median. Dashed: intact, on the same images; what new statistics change of it is " +
        "measured on all test images."
      : "Test error in per cent. Orange: transitions. Dashed: intact. Dotted: guessing.";
    strip.update();
    kept.paint();
    bars.paint();
  }

  reset();
});
