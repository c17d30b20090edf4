/* The damage map: one row for each image, one column for each deleted unit; the chosen cell in full. */
mount("damage_map", (root, status, data) => {
  const bytes = (text) => Uint8Array.from(atob(text), (letter) => letter.charCodeAt(0));
  const margins = new Int16Array(bytes(data.margins).buffer);  // a row an image: intact, then without each unit
  const pixels = bytes(data.pixels);
  const healed = data.reestimated, healedDamage = healed && new Int16Array(bytes(healed.damage).buffer);
  const rows = data.labels.length, units = data.units;
  const state = { row: 0, unit: 0, scale: "loss" };
  // images in the order of their classes, as in the static figure
  const order = data.labels.map((_, i) => i).sort((a, b) => data.labels[a] - data.labels[b] || a - b);

  const margin = (image, column) => margins[image * (units + 1) + column] * data.step;
  const loss = (m) => Math.log1p(Math.exp(-Math.abs(m))) + Math.max(-m, 0);  // m is the log odds of the true class
  const damage = {
    loss: (image, unit) => loss(margin(image, unit + 1)) - loss(margin(image, 0)),
    margin: (image, unit) => margin(image, 0) - margin(image, unit + 1),
    reestimated: (image, unit) => {
      const column = healed ? healed.units.indexOf(unit) : -1;
      return column < 0 ? null : healedDamage[image * healed.units.length + column] * data.step;
    },
  };
  const names = { loss: "loss", margin: "margin", reestimated: "margin, statistics re-estimated" };

  const scale = choice("Damage to the", Object.entries(names).filter(([name]) => name !== "reestimated" || healed), "loss",
    (name) => { state.scale = name; draw(); update(); });
  const map = html("canvas", { width: units, height: rows, tabindex: 0, class: "map", role: "slider", "aria-label": "Cell",
    "aria-valuemin": 0, "aria-valuemax": rows * units - 1 });
  const cross = html("div", { class: "cross" });
  const digit = html("canvas", { width: data.side, height: data.side, class: "digit", role: "img" });
  // a finger is wider than a cell
  const within = (value, most) => Math.min(Math.max(value, 0), most - 1);
  const move = (right, down) => go(within(state.unit + right, units), within(state.row + down, rows));
  const steps = html("div", { class: "controls steps" },
    button("Unit −", () => move(-1, 0)), button("Unit +", () => move(1, 0)),
    button("Image −", () => move(0, -1)), button("Image +", () => move(0, 1)));
  // the strength of a colour: logarithmic from a thousandth to ten, as in the static figure
  const strength = (value) => Math.min(Math.log10(1 + Math.abs(value) / 0.001) / 4, 1);
  const ticks = [-10, -1, -0.1, -0.01, 0, 0.01, 0.1, 1, 10].map((value) => html("span",
    { style: `left: ${50 * (1 + Math.sign(value) * strength(value))}%` }, `${value}`.replace("-", "−")));
  const colours = html("div", { class: "colours" },
    html("div", { class: "ramp" }), html("div", { class: "ticks" }, ...ticks));
  root.append(scale, colours,
    html("div", { class: "beside" }, html("div", { class: "frame" }, map, cross), digit), steps,
    html("p", { class: "key" }, "Rows: test images, sorted by class. Columns: deleted units. Scale: damage in nats. " +
      "Orange: the deletion does harm. Blue: it does good. Arrow keys move by a cell, page keys by a class."));

  function draw() {
    const picture = new ImageData(units, rows);
    order.forEach((image, row) => {
      for (let unit = 0; unit < units; unit++) {
        const value = damage[state.scale](image, unit), at = 4 * (row * units + unit);
        picture.data.set(value > 0 ? [200, 112, 26] : [63, 132, 200], at);
        picture.data[at + 3] = 255 * strength(value);  // what is not measured counts as 0
      }
    });
    map.getContext("2d").putImageData(picture, 0, 0);
  }

  function show(image) {
    const picture = new ImageData(data.side, data.side);
    for (let i = 0; i < data.side ** 2; i++) picture.data.set([...Array(3).fill(pixels[image * data.side ** 2 + i]), 255], 4 * i);
    digit.getContext("2d").putImageData(picture, 0, 0);
    digit.setAttribute("aria-label", `the image, a ${data.classes[data.labels[image]]}`);
  }

  const digits = (size) => (size < 0.01 ? 4 : size < 1 ? 3 : 2);
  const number = (value) => value.toFixed(digits(Math.abs(value))).replace("-", "−");

  function sentence() {
    const image = order[state.row], [before, after] = [margin(image, 0), margin(image, state.unit + 1)];
    const other = damage.reestimated(image, state.unit);
    const words = `Image ${image}, a ${data.classes[data.labels[image]]}, in ${data.network}: with unit ${state.unit} its loss is ` +
      `${number(loss(before))} and its margin ${number(before)}; without it, loss ${number(loss(after))} and margin ${number(after)}.`;
    if (other !== null) return `${words} With batch norm re-estimated the margin ${other < 0 ? "gains" : "loses"} ${number(Math.abs(other))}.`;
    if (state.scale !== "reestimated") return words;
    const [noun, verb] = healed.units.length === 1 ? ["unit", "was"] : ["units", "were"];
    return `${words} Only ${noun} ${listed([...healed.units].sort((a, b) => a - b))} ${verb} re-estimated.`;
  }

  function point(event) {
    const { left, top, width, height } = map.getBoundingClientRect();
    const unit = Math.floor(((event.clientX - left) / width) * units), row = Math.floor(((event.clientY - top) / height) * rows);
    if (unit >= 0 && unit < units && row >= 0 && row < rows) go(unit, row);
  }
  map.addEventListener("pointermove", point);
  map.addEventListener("pointerdown", point);

  /* The first row of the next class, or of this one or the one before. */
  function classRow(step) {
    const starts = order.flatMap((image, row) => (row && data.labels[image] === data.labels[order[row - 1]] ? [] : [row]));
    return step > 0 ? starts.find((row) => row > state.row) ?? rows - 1 : starts.findLast((row) => row < state.row) ?? 0;
  }

  map.addEventListener("keydown", (event) => {
    const moves = { ArrowRight: () => [1, 0], ArrowLeft: () => [-1, 0], ArrowDown: () => [0, 1], ArrowUp: () => [0, -1],
      PageDown: () => [0, classRow(1) - state.row], PageUp: () => [0, classRow(-1) - state.row],
      Home: () => [-units, 0], End: () => [units, 0] };
    if (!(event.key in moves)) return;
    event.preventDefault();
    move(...moves[event.key]());
  });

  function go(unit, row) {
    Object.assign(state, { unit, row });
    update();
  }

  function update() {
    show(order[state.row]);
    cross.style.left = `${(100 * (state.unit + 0.5)) / units}%`;
    cross.style.top = `${(100 * (state.row + 0.5)) / rows}%`;
    status.textContent = sentence();
    map.setAttribute("aria-valuenow", state.row * units + state.unit);
    map.setAttribute("aria-valuetext", status.textContent);
  }

  draw();
  update();
});
