/* Reordering: move blocks within their stages, and see the stored orders that are as far from the trained one. */
mount("reordering", (root, status, data) => {
  const state = { network: 0, order: [], chosen: 1 };
  const network = () => data.networks[state.network];
  const count = () => network().stages.length;
  // where a block may stand: among the blocks of its stage that keep the shape of their input
  const free = (i) => network().stages[i] > 0;
  const stage = (place) => network().stages[place];  // the stages stay where they are, whatever moves in them

  const which = select("Network", data.networks.map((net, i) => [i, net.label]), 0,
    (i) => { state.network = i; reset(); });
  const strip = columns(96, "Place", count, () => state.chosen, choose, words, paint, false);
  strip.style.touchAction = "none";  // a finger that drags a block does not scroll the page
  const left = button("← Move left", () => move(-1)), right = button("Move right →", () => move(1));
  const orders = plot(150, paintOrders);
  root.append(which, strip, html("p", { class: "key" }, "Numbers: where a block was trained to stand. Orange: it stands elsewhere. Hollow: transitions, which stay."),
    html("div", { class: "controls" }, left, right, button("Shuffle every stage", shuffle), button("Trained order", reset)), orders,
    html("p", { class: "key" }, "Test error (per cent) of the stored orders against τ. Line: your τ. Filled: the nearest order."));

  // dragging: hold a block and pull it over its neighbours
  let held = false;
  strip.addEventListener("pointerdown", () => { held = free(state.chosen); });
  window.addEventListener("pointerup", () => { held = false; });
  window.addEventListener("pointercancel", () => { held = false; });

  function reset() {
    state.order = network().stages.map((_, i) => i);
    state.chosen = Math.max(network().stages.findIndex((kind, i) => free(i) && stage(i + 1) === kind), 0);  // one that can move
    update();
  }

  const other = (step) => {
    const to = state.chosen + step;
    return to >= 0 && to < count() && free(state.chosen) && stage(to) === stage(state.chosen) ? to : null;
  };

  function move(step) {
    const to = other(step);
    if (to === null) return;
    [state.order[state.chosen], state.order[to]] = [state.order[to], state.order[state.chosen]];
    state.chosen = to;
    update();
  }

  function shuffle() {
    for (const kind of new Set(network().stages.filter((s) => s > 0))) {
      const places = network().stages.flatMap((s, i) => (s === kind ? [i] : []));
      for (let i = places.length - 1; i > 0; i--) {
        const j = Math.floor(Math.random() * (i + 1)), a = places[i], b = places[j];
        [state.order[a], state.order[b]] = [state.order[b], state.order[a]];
      }
    }
    update();
  }

  /* Kendall's tau over all pairs, or over pairs of movable blocks of one stage. */
  function tau(counts) {
    let pairs = 0, wrong = 0;
    for (let i = 0; i < count(); i++) {
      for (let j = i + 1; j < count(); j++) {
        if (!counts(i, j)) continue;
        pairs++;
        wrong += state.order[i] > state.order[j];
      }
    }
    return 1 - (2 * wrong) / pairs;
  }
  const overall = () => tau(() => true);
  const within = () => tau((i, j) => free(i) && stage(i) === stage(j));

  function nearest() {
    const mine = overall();
    return [...network().orders].sort((a, b) => Math.abs(a[0] - mine) - Math.abs(b[0] - mine)).slice(0, 10);
  }

  const signed = (number) => number.toFixed(3).replace("-", "−");
  function words() {
    return `place ${state.chosen}, unit ${state.order[state.chosen]}${free(state.chosen) ? "" : ", a transition"}`;
  }

  const moved = () => state.order.filter((unit, place) => unit !== place).length;

  function sentence() {
    const here = `${network().label}: ${words()}. ${plural(moved(), "unit")} moved, τ = ${signed(overall())}, within stages ${signed(within())}.`;
    if (!moved()) return `${here} Intact error: ${percent(network().intact / 1000)}.`;
    const near = nearest(), errors = near.map(([, error]) => error / 1000);
    return `${here} Of the stored orders the nearest in τ (${signed(near[0][0])}) has error ${percent(errors[0])}; the ten nearest have ` +
      `${percent(Math.min(...errors))} to ${percent(Math.max(...errors))}. Which of its units moved is not stored.`;
  }

  function paint(x, wide, width) {
    const every = wide > 17 ? 1 : Math.ceil(17 / wide);
    return state.order.flatMap((unit, place) => [
      svg("rect", { class: `unit${free(place) ? "" : " fixed"}${unit === place ? "" : " moved"}${place === state.chosen ? " chosen" : ""}`,
        x: x(place) + 1, y: 22, width: Math.max(wide - 2, 2), height: 44, "data-place": place }),
      (place % every === 0 || place === state.chosen) && svg("text", { x: x(place) + wide / 2, y: place === state.chosen ? 14 : 84,
        "text-anchor": "middle", class: place === state.chosen ? "strong" : "" }, `${unit}`)]);
  }

  function paintOrders(width, tall) {
    const least = Math.min(...network().orders.map(([t]) => t)), near = new Set(moved() ? nearest().slice(0, 1) : []);
    const x = (t) => 40 + ((width - 52) * (1 - t)) / (1 - least), y = (part) => 8 + (tall - 32) * (1 - part);
    const mine = Math.min(Math.max(x(overall()), 40), width - 4);
    return [...percentAxis(y, width),
      ...network().orders.map((order) => svg("circle", { class: near.has(order) ? "point near" : "point", cx: x(order[0]), cy: y(order[1] / 1000),
        r: near.has(order) ? 6 : 3 })),
      svg("line", { class: "dashed", x1: mine, x2: mine, y1: y(1), y2: y(0) }),
      svg("text", { x: 40, y: tall - 4 }, "τ = 1"),
      svg("text", { x: width - 8, y: tall - 4, "text-anchor": "end" }, signed(least))];
  }

  /* A block that is held goes along with the pointer, past its neighbours one by one. */
  function choose(i) {
    if (!held) {
      state.chosen = i;
      return update();
    }
    while (state.chosen !== i && other(Math.sign(i - state.chosen)) !== null) move(Math.sign(i - state.chosen));
    return undefined;
  }

  function update() {
    left.disabled = other(-1) === null;
    right.disabled = other(1) === null;
    status.textContent = sentence();
    strip.update();
    orders.paint();
  }

  reset();
});
