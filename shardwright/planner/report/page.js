"use strict";
(() => {
  const plan = JSON.parse(document.getElementById("plan").textContent);
  const cost = plan.cost;
  const ROW = 28;

  // Names are untrusted: everything becomes text through this one function, never markup.
  const make = (tag, attributes = {}, ...children) => {
    const node = document.createElement(tag);
    for (const [key, value] of Object.entries(attributes)) {
      if (value !== null && value !== undefined) node.setAttribute(key, value);
    }
    for (const child of children) node.append(child instanceof Node ? child : document.createTextNode(String(child)));
    return node;
  };
  const exact = (n) => n.toLocaleString("en-US");
  const bytes = (n) => {
    const units = ["B", "KiB", "MiB", "GiB", "TiB", "PiB"];
    let k = 0;
    while (n >= 1024 && k < units.length - 1) { n /= 1024; k += 1; }
    return `${k === 0 ? n : n.toFixed(n < 10 ? 2 : n < 100 ? 1 : 0)} ${units[k]}`;
  };
  const layout = (axes) => {
    const words = Object.entries(axes || {}).filter(([, n]) => n !== null && n !== 1).map(([k, n]) => `${k} ${Array.isArray(n) ? n.join(",") : n}`);
    return words.length ? words.join(" · ") : "one rank";
  };
  const name = (tensors, i) => plan.names[tensors.name[i]];
  const kind = (tensors, i) => plan.kinds[tensors.kind[i]];

  const heading = () => [
    make("h1", {}, cost.source_format, make("span", { class: "arrow", "aria-label": "to" }, "→"), cost.target_format),
    make("p", { class: "lead" }, `${cost.family} · from ${layout(cost.source_layout)} to ${layout(cost.target_layout)}`),
  ];

  const notices = () => {
    if (!cost.warnings.length && !cost.dropped.length) return [make("p", { class: "quiet" }, "No warnings. Nothing is dropped.")];
    const card = make("section", { class: "card notice", "aria-label": "Warnings and dropped items" });
    if (cost.warnings.length) {
      card.append(make("h2", {}, "Warnings", make("span", { class: "count" }, exact(cost.warnings.length))));
      card.append(make("ul", {}, ...cost.warnings.map((text) => make("li", {}, text))));
    }
    if (cost.dropped.length) {
      card.append(make("h2", {}, "Dropped", make("span", { class: "count" }, exact(cost.dropped.length))));
      const shown = cost.dropped.slice(0, 1000);
      const list = make("ul", { tabindex: "0", "aria-label": "Dropped items" });
      for (const item of shown) list.append(make("li", {}, make("code", {}, item.name), ` – ${item.reason}`));
      if (shown.length < cost.dropped.length) list.append(make("li", {}, `… ${exact(cost.dropped.length - shown.length)} more`));
      card.append(list);
    }
    return [card];
  };

  const figures = () => {
    const figure = (label, value, note, title) =>
      make("div", { class: "figure", title }, make("dt", {}, label), make("dd", {}, make("div", { class: "value" }, value), make("div", { class: "note" }, note)));
    const size = (n) => `${exact(n)} bytes`;
    const times = (n) => (n === 1 ? "exactly what is needed" : `${n.toFixed(3)}× of what is needed`);
    const minimum = `at least ${bytes(cost.min_memory_bytes)}, ${bytes(cost.base_bytes)} before it starts`;
    return make("dl", { class: "figures" },
      figure("Read", bytes(cost.bytes_read), times(cost.read_amplification), `${size(cost.bytes_read)}; needed ${size(cost.source_bytes)}`),
      figure("Written", bytes(cost.bytes_written), times(cost.write_amplification), `${size(cost.bytes_written)}; needed ${size(cost.target_bytes)}`),
      figure("Peak memory", bytes(cost.peak_bytes), minimum, `peak ${size(cost.peak_bytes)}, minimum ${size(cost.min_memory_bytes)}, base ${size(cost.base_bytes)}`),
      figure("Target tensors", exact(cost.tensors), `in ${exact(cost.files)} files`),
      figure("Tiles", exact(cost.tiles), `${exact(cost.requests)} requests`),
      figure("Programs", exact(cost.programs), `${exact(cost.pieces)} pieces`));
  };

  const bars = (title, found, kindOf) => {
    const most = Math.max(1, ...found.bytes);
    const list = make("ul", { class: "bars", tabindex: "0", "aria-label": title });
    found.path.forEach((path, i) => {
      const fill = make("div", { class: "fill" });
      fill.style.width = `${(100 * found.bytes[i]) / most}%`;
      list.append(make("li", { title: `${path}: ${exact(found.bytes[i])} bytes` },
        make("span", { class: "label mono" }, path), make("span", { class: "size" }, bytes(found.bytes[i])), make("div", { class: "track", "aria-hidden": "true" }, fill)));
    });
    return make("section", { class: `card ${kindOf}` }, make("h2", {}, title, make("span", { class: "count" }, exact(found.path.length))), list);
  };

  const ranks = () => {
    const { rank, tensors, bytes: sizes } = plan.ranks;
    if (rank.length < 2) return [];
    const most = Math.max(1, ...sizes);
    const chart = make("div", { class: "columns", role: "list", tabindex: "0", "aria-label": "Bytes of each rank" });
    rank.forEach((number, i) => {
      const stem = make("div", { class: "stem" });
      stem.style.height = `${(100 * sizes[i]) / most}%`;
      const words = `rank ${number}: ${bytes(sizes[i])} (${exact(sizes[i])} bytes), ${exact(tensors[i])} tensors`;
      chart.append(make("div", { class: "column", role: "listitem", title: words, "aria-label": words },
        make("div", { class: "room" }, stem), make("div", { class: "tick", "aria-hidden": "true" }, number)));
    });
    const least = Math.min(...sizes);
    const spread = bytes(least) === bytes(most) ? `${bytes(most)} each` : `${bytes(least)} to ${bytes(most)}`;
    return [make("section", { class: "card" }, make("h2", {}, "Ranks", make("span", { class: "count" }, `${exact(rank.length)}, ${spread}`)), chart)];
  };

  // Which (program, row, operand) triples write each target tensor.
  const writers = plan.targets.name.map(() => []);
  plan.bindings.forEach((bound, program) => bound.targets.forEach((rows, operand) => rows.forEach((tensor, row) => {
    if (tensor >= 0 && plan.programs[program].made[operand]) writers[tensor].push([program, row, operand]);
  })));
  const sourcesOf = (tensor) => {
    const found = new Set();
    for (const [program, row, operand] of writers[tensor]) {
      for (const slot of plan.programs[program].made[operand].from) found.add(plan.bindings[program].sources[slot][row]);
    }
    found.delete(-1);
    return [...found];
  };
  const sourceNames = (tensor) => [...new Set(sourcesOf(tensor).map((i) => name(plan.sources, i)))];
  // a.q.w, a.k.w → a.{q,k}.w: what several names share is written once.
  const together = (names) => {
    if (names.length < 2) return names.join("");
    const parts = names.map((text) => text.split("."));
    const shortest = Math.min(...parts.map((part) => part.length));
    let head = 0, tail = 0;
    while (head < shortest - 1 && parts.every((part) => part[head] === parts[0][head])) head += 1;
    while (tail < shortest - 1 - head && parts.every((part) => part[part.length - 1 - tail] === parts[0][parts[0].length - 1 - tail])) tail += 1;
    if (!head && !tail) return names.join(" + ");
    const middle = `{${parts.map((part) => part.slice(head, part.length - tail).join(".")).join(",")}}`;
    return [...parts[0].slice(0, head), middle, ...parts[0].slice(parts[0].length - tail)].join(".");
  };
  const madeOf = (tensor) => together(sourceNames(tensor)) || (writers[tensor].length ? "zeros" : "");

  const columns = [
    { title: "Tensor", path: true, text: (i) => name(plan.targets, i), key: (i) => name(plan.targets, i) },
    { title: "Rank", number: true, text: (i) => plan.targets.rank[i], key: (i) => plan.targets.rank[i] },
    { title: "Dtype", dim: true, text: (i) => kind(plan.targets, i)[0], key: (i) => kind(plan.targets, i)[0] },
    { title: "Shape", text: (i) => kind(plan.targets, i)[1].join(" × ") || "scalar", key: (i) => kind(plan.targets, i)[1].reduce((a, b) => a * b, 1) },
    { title: "Bytes", number: true, text: (i) => bytes(kind(plan.targets, i)[2]), key: (i) => kind(plan.targets, i)[2] },
    { title: "File", dim: true, text: (i) => plan.target_files.path[plan.targets.file[i]], key: (i) => plan.target_files.path[plan.targets.file[i]] },
    { title: "Made of", dim: true, path: true, text: madeOf, key: madeOf, find: (i) => sourceNames(i).join(" ") },
  ];

  const panel = make("aside", { hidden: "", "aria-label": "Lineage of the chosen tensor", tabindex: "-1" });
  const facts = (pairs) => make("dl", { class: "facts" }, ...pairs.flatMap(([label, value]) => [make("dt", {}, label), make("dd", {}, value)]));
  const stored = (i) => `${plan.source_files.path[plan.sources.file[i]]} @ ${exact(plan.sources.offset[i])}`;
  const showLineage = (tensor, close) => {
    const [dtype, shape, size] = kind(plan.targets, tensor);
    const button = make("button", { class: "close", type: "button", "aria-label": "Close" }, "×");
    button.addEventListener("click", close);
    panel.replaceChildren(button, make("h2", {}, name(plan.targets, tensor)), facts([
      ["rank", plan.targets.rank[tensor]], ["dtype", dtype], ["shape", shape.join(" × ") || "scalar"], ["bytes", exact(size)],
      ["file", `${plan.target_files.path[plan.targets.file[tensor]]} @ ${exact(plan.targets.offset[tensor])}`],
    ]));
    if (!writers[tensor].length) panel.append(make("p", { class: "quiet" }, "It holds no elements."));
    for (const [number, row, operand] of writers[tensor]) {
      const program = plan.programs[number], bound = plan.bindings[number], made = program.made[operand];
      panel.append(make("h3", {}, "Through"), facts([
        ["hub", plan.names[bound.names[row]].split("+").join(" + ")], ["pivot", `${program.dtype} ${program.shape.join(" × ")}`], ["value op", program.op || "none, bytes are copied"],
      ]));
      const list = make("ul", { class: "passages" });
      for (const [into, slot, from] of made.passages) {
        const source = bound.sources[slot][row];
        list.append(make("li", {}, make("span", { class: "into" }, into), " ← ", make("span", { class: "whence" }, source < 0 ? "?" : name(plan.sources, source)), ` ${from} `,
          make("span", { class: "where" }, source < 0 ? "" : stored(source))));
      }
      if (made.more) list.append(make("li", {}, `… ${exact(made.more)} more`));
      if (made.zeros) list.append(make("li", {}, make("span", { class: "into" }, made.zeros), " ← zeros (padding)"));
      panel.append(make("h3", {}, "Made of"), list);
      const copies = program.replicas.flat().map((slot) => bound.sources[slot][row]).filter((i) => i >= 0);
      if (copies.length) {
        panel.append(make("h3", {}, "Compared with copies"), make("ul", { class: "passages" },
          ...copies.slice(0, 50).map((i) => make("li", {}, make("span", { class: "whence" }, name(plan.sources, i)), ` rank ${plan.sources.rank[i]} `, make("span", { class: "where" }, stored(i))))));
      }
    }
    panel.hidden = false;
    panel.scrollTop = 0;
  };

  const table = () => {
    const count = plan.targets.name.length;
    let order = Array.from({ length: count }, (_, i) => i), sorted = null, down = false, current = 0, chosen = -1, haystack = null;
    const total = make("span", { class: "count", role: "status" });
    const search = make("input", { type: "search", placeholder: "Search tensors, files, sources", "aria-label": "Search tensors", autocomplete: "off", spellcheck: "false" });
    const head = make("div", { class: "row head", role: "row" });
    const space = make("div", { role: "presentation" });
    const view = make("div", { class: "view", role: "rowgroup", tabindex: "-1" }, space);
    const box = make("div", { class: "table", role: "grid", "aria-label": "Target tensors", "aria-rowcount": count + 1 }, head, view);

    const close = () => { panel.hidden = true; chosen = -1; draw(); focusRow(); };
    const choose = (position) => {
      current = position; chosen = order[position];
      showLineage(chosen, close); draw();
    };
    const focusRow = () => { const row = space.querySelector(`[data-position="${current}"]`); if (row) row.focus({ preventScroll: true }); };
    const draw = () => {
      const from = Math.max(0, Math.floor(view.scrollTop / ROW) - 8), to = Math.min(order.length, from + Math.ceil(view.clientHeight / ROW) + 16);
      const held = document.activeElement && document.activeElement.closest ? document.activeElement.closest(".view .row") : null;
      space.style.height = `${order.length * ROW}px`;
      const rows = [];
      for (let position = from; position < to; position += 1) {
        const i = order[position];
        const row = make("div", {
          class: "row", role: "row", "data-position": position, "aria-rowindex": position + 2, "aria-selected": String(i === chosen), tabindex: position === current ? "0" : "-1",
        });
        row.style.top = `${position * ROW}px`;
        for (const column of columns) {
          const text = String(column.text(i));
          const look = [column.number && "number", column.dim && "dim", column.path && "path"].filter(Boolean).join(" ");
          // The end of a long name tells it from its neighbours, so its beginning is what is cut off.
          row.append(make("div", { role: "gridcell", class: look || null, title: text }, column.path ? make("bdi", { dir: "ltr" }, text) : text));
        }
        rows.push(row);
      }
      if (!rows.length) rows.push(make("div", { class: "empty" }, "No tensor matches."));
      space.replaceChildren(...rows);
      if (held) focusRow();
    };
    const update = () => {
      const words = search.value.toLowerCase().split(/\s+/).filter(Boolean);
      if (words.length && !haystack) haystack = plan.targets.name.map((_, i) => columns.map((c) => (c.find || c.text)(i)).join(" ").toLowerCase());
      order = [];
      for (let i = 0; i < count; i += 1) if (words.every((word) => haystack[i].includes(word))) order.push(i);
      if (sorted) {
        const keys = new Map(order.map((i) => [i, sorted.key(i)])), sign = down ? -1 : 1;
        order.sort((a, b) => { const x = keys.get(a), y = keys.get(b); return x < y ? -sign : x > y ? sign : a - b; });
      }
      current = 0;
      view.scrollTop = 0;
      total.textContent = order.length === count ? exact(count) : `${exact(order.length)} of ${exact(count)}`;
      draw();
    };
    const move = (to) => {
      current = Math.max(0, Math.min(order.length - 1, to));
      const top = current * ROW;
      if (top < view.scrollTop) view.scrollTop = top;
      else if (top + ROW > view.scrollTop + view.clientHeight) view.scrollTop = top + ROW - view.clientHeight;
      draw(); focusRow();
      if (!panel.hidden) choose(current);
    };

    for (const column of columns) {
      const button = make("button", { type: "button" }, column.title);
      const cell = make("div", { role: "columnheader", "aria-sort": "none", class: column.number ? "number" : null }, button);
      button.addEventListener("click", () => {
        down = sorted === column ? !down : false;
        sorted = column;
        for (const other of head.children) other.setAttribute("aria-sort", "none");
        cell.setAttribute("aria-sort", down ? "descending" : "ascending");
        [...head.children].forEach((other, k) => { other.firstChild.textContent = columns[k].title + (other === cell ? (down ? " ↓" : " ↑") : ""); });
        update();
      });
      head.append(cell);
    }
    let waiting = 0;
    search.addEventListener("input", () => { clearTimeout(waiting); waiting = setTimeout(update, 120); });
    view.addEventListener("scroll", () => requestAnimationFrame(draw), { passive: true });
    window.addEventListener("resize", draw);
    view.addEventListener("click", (event) => {
      const row = event.target.closest(".row");
      if (row) { choose(Number(row.dataset.position)); focusRow(); }
    });
    view.addEventListener("keydown", (event) => {
      const page = Math.floor(view.clientHeight / ROW);
      const steps = { ArrowDown: 1, ArrowUp: -1, PageDown: page, PageUp: -page, Home: -Infinity, End: Infinity };
      if (event.key in steps) { event.preventDefault(); move(current + steps[event.key]); }
      if (event.key === "Enter" || event.key === " ") { event.preventDefault(); choose(current); focusRow(); }
    });
    document.addEventListener("keydown", (event) => { if (event.key === "Escape" && !panel.hidden) close(); });
    // A link to #tensor=NAME opens that tensor.
    const linked = new URLSearchParams(location.hash.slice(1)).get("tensor");
    requestAnimationFrame(() => {
      update();
      if (linked !== null) {
        const position = order.findIndex((i) => name(plan.targets, i) === linked);
        if (position >= 0) { move(position); choose(position); }
      }
    });
    return make("section", { class: "card" }, make("div", { class: "tools" }, make("h2", {}, "Target tensors", total), search), box);
  };

  document.body.append(make("main", {},
    ...heading(), ...notices(), figures(),
    make("div", { class: "pair" }, bars("Source files", plan.source_files, "source"), bars("Target files", plan.target_files, "target")),
    ...ranks(), table()), panel);
})();
