// The model's card: what it knows, how well, and whether its probabilities can be believed.

import { $, drawn, element, percent } from "./dom.js";

const GROUPS = { many: "many: over 100", medium: "medium: 20 to 100", few: "few: under 20" };
const STEPS = { trained: "as trained", calibrated: "calibrated" };

export function describe(model) {
  const counts = model.classes.map((info) => info.train_count).sort((a, b) => b - a);
  const total = counts.reduce((sum, count) => sum + count, 0);
  const about = element("p", {}, `${model.name} ${model.version}: ${counts.length} classes and ${total.toLocaleString("en")} training images, those for calibration `
    + `included: ${counts[0]} of the most frequent class and ${counts.at(-1)} of the rarest. It sees ${model.preprocessing.input_size} × `
    + `${model.preprocessing.input_size} px and explains itself on a grid of ${model.grid.join(" × ")}.`);
  const cards = element("div", { class: "cards" });
  const stack = (...parts) => (parts.some(Boolean) ? [element("div", { class: "stack" }, ...parts.filter(Boolean))] : []);
  const diagrams = reliability(model);
  const calibrated = diagrams.pop();
  cards.append(...stack(accuracy(model), tail(model)), ...diagrams, ...stack(calibrated, believed(model)), classes(model));
  $("model").replaceChildren($("model-title"), about, cards);
  $("model").hidden = false;
}

function card(title, ...children) {
  return element("div", { class: "card" }, element("h3", {}, title), ...children);
}

function row(cells, cell = "td") {
  return element("tr", {}, element("th", { scope: cell === "th" ? "col" : "row" }, cells[0]),
    ...cells.slice(1).map((text) => element(cell, cell === "th" ? { scope: "col" } : {}, text)));
}

function accuracy(model) {
  const steps = Object.keys(STEPS).filter((step) => model.figures?.[step]?.groups);
  if (!steps.length) return null;
  const body = [["overall", (f) => f.accuracy], ...Object.keys(GROUPS).map((group) => [`${group} (${model.groups[group]})`, (f) => f.groups[group]])]
    .map(([name, of]) => row([name, ...steps.map((step) => share(of(model.figures[step])))]));
  return card("Accuracy on test images", grid(steps.map((step) => STEPS[step]), body));
}

function grid(columns, body) {
  const table = element("table", {}, element("thead", {}, row(["", ...columns], "th")), element("tbody", {}, ...body));
  table.querySelector("thead th").replaceWith(element("td"));
  return table;
}

const share = (value) => (value == null ? "–" : percent(value));

/** How sure and how right the calibrated answers of each group are; by rank where a group by count has no class. */
function believed(model) {
  const found = model.by_predicted_group?.calibrated;
  if (!found) return null;
  const ranked = Object.values(model.groups).includes(0);
  const body = (ranked ? ["head", "middle", "tail"] : Object.keys(GROUPS))
    .map((group) => row([group, ...["share", "confidence", "accuracy"].map((name) => share(found[group]?.[name]))]));
  const which = ranked ? "one of the commonest 36 %, the next 35 % or the rarest 29 % of the classes" : "a many-, medium- or few-shot class";
  return card("Answers by the group they name", grid(["of all", "confidence", "right"], body),
    element("p", {}, `Of the calibrated answers that name ${which}: confidence is their mean, and can be believed where as many are right.`));
}

function tail(model) {
  const sorted = [...model.classes].sort((a, b) => b.train_count - a.train_count);
  const [width, height, base] = [320, 150, 128];
  const top = Math.log10(sorted[0].train_count) || 1;
  const step = width / sorted.length;
  // A path for each group: thousands of classes are no more than three elements.
  const path = (group) => sorted.map((info, place) => {
    if (info.group !== group) return "";
    const size = Math.max(2, ((base - 14) * Math.log10(info.train_count)) / top);
    return `M${(place * step).toFixed(2)} ${base}v${-size.toFixed(1)}h${Math.max(step * 0.8, 0.3).toFixed(2)}v${size.toFixed(1)}z`;
  }).join("");
  const words = Object.keys(GROUPS).map((group) => `${model.groups[group]} ${group}`).join(", ");
  const chart = drawn("svg", { class: "chart", viewBox: `0 0 ${width} ${height}`, role: "img",
    "aria-label": `Training images of each class, from ${sorted[0].train_count} down to ${sorted.at(-1).train_count}` },
    ...Object.keys(GROUPS).map((group) => drawn("path", { class: group, d: path(group) })),
    drawn("text", { x: 2, y: 10 }, String(sorted[0].train_count)),
    drawn("text", { x: width, y: Math.max(20, base - ((base - 14) * Math.log10(sorted.at(-1).train_count)) / top - 5), "text-anchor": "end" }, String(sorted.at(-1).train_count)),
    drawn("text", { x: 0, y: height - 5 }, "training images of each class, logarithmic"));
  const legend = element("p", {}, ...Object.keys(GROUPS).flatMap((group) => [element("span", { class: `group ${group}` }, GROUPS[group]), " "]));
  return card(`The long tail: ${words}`, chart, legend);
}

function reliability(model) {
  return Object.keys(STEPS).filter((step) => Array.isArray(model.reliability?.[step])).map((step) => {
    const ece = model.figures?.[step]?.ece;
    const title = `Reliability ${STEPS[step]}${ece == null ? "" : `, ECE ${percent(ece)}`}`;
    return card(title, diagram(model.reliability[step], title, step === "trained"), element("p", {}, step === "trained"
      ? "How many answers are right at each confidence? On the dashed line, confidence can be believed; red is the gap."
      : "The same after calibration. ECE, the expected calibration error, is the mean gap over all answers."));
  });
}

/** Bars of accuracy over confidence; the gap between the two is shaded. */
function diagram(bins, title, before) {
  const [left, top, size] = [34, 8, 250];
  const x = (share) => left + share * size;
  const y = (share) => top + (1 - share) * size;
  const bars = bins.filter((bin) => bin.accuracy != null).flatMap((bin) => {
    const [from, width] = [x(bin.low) + 1, (bin.high - bin.low) * size - 2];
    const [low, high] = [bin.accuracy, bin.confidence].sort((a, b) => a - b);
    const words = `confidence ${percent(bin.confidence)}, right ${percent(bin.accuracy)}, ${percent(bin.share)} of the answers`;
    return [
      drawn("rect", { class: `accuracy${before ? " before" : ""}`, x: from, width, y: y(bin.accuracy), height: Math.max(1, bin.accuracy * size) }, drawn("title", {}, words)),
      drawn("rect", { class: "gap", x: from, width, y: y(high), height: (high - low) * size }, drawn("title", {}, words)),
    ];
  });
  const ticks = [0, 0.5, 1].flatMap((share) => [
    drawn("text", { x: left - 5, y: y(share) + 4, "text-anchor": "end" }, `${100 * share}`),
    drawn("text", { x: x(share), y: top + size + 15, "text-anchor": "middle" }, `${100 * share}`),
  ]);
  return drawn("svg", { class: "chart", viewBox: "0 0 300 292", role: "img", "aria-label": title },
    drawn("rect", { class: "axis", x: left, y: top, width: size, height: size }), ...bars,
    drawn("line", { class: "ideal", x1: left, y1: top + size, x2: left + size, y2: top }), ...ticks,
    drawn("text", { x: x(0.5), y: top + size + 30, "text-anchor": "middle" }, "confidence, %"),
    drawn("text", { x: 12, y: y(0.5), "text-anchor": "middle", transform: `rotate(-90 10 ${y(0.5)})` }, "right, %"));
}

function classes(model) {
  const search = element("input", { type: "search", placeholder: "find a class", "aria-label": "Find a class" });
  const body = element("tbody");
  const table = element("table", {}, element("thead", {}, row(["class", "group", "training images"], "th")), body);
  const details = element("details", {}, element("summary", {}, `All ${model.classes.length} classes`), search,
    element("div", { class: "scroll", tabindex: "0", role: "region", "aria-label": "Classes" }, table));
  const list = () => body.replaceChildren(...model.classes
    .filter((info) => info.label.toLowerCase().includes(search.value.trim().toLowerCase()))
    .map((info) => element("tr", {}, element("th", { scope: "row" }, info.label), element("td", {}, element("span", { class: `group ${info.group}` }, info.group)), element("td", {}, String(info.train_count)))));
  details.addEventListener("toggle", () => details.open && list());
  search.addEventListener("input", list);
  return element("div", { class: "card wide" }, details);
}
