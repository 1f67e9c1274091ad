// The model card: classes, accuracy, and the reliability of the probabilities.

import { GROUPS, reliabilityDiagram, tailChart } from "./charts.js";
import { $, element, percent } from "./dom.js";

const GROUP_TITLES = { many: "many: over 100", medium: "medium: 20 to 100", few: "few: under 20" };
const STEPS = { trained: "uncalibrated", calibrated: "calibrated" };
const TITLES = { trained: "Before calibration", calibrated: "After calibration" };

/** Fill the card with the response of `GET /model`. */
export function describe(model) {
  const [trained, calibrated] = ["trained", "calibrated"].map((step) => reliability(model, step));
  const cards = element(
    "div",
    { class: "cards" },
    ...stack(accuracy(model), tail(model)),
    ...[trained].filter(Boolean),
    ...stack(calibrated, believed(model)),
    classTable(model),
  );
  $("model").replaceChildren($("model-title"), element("p", {}, about(model)), cards);
  $("model").hidden = false;
}

function about(model) {
  const counts = model.classes.map((info) => info.train_count).sort((a, b) => b - a);
  const total = counts.reduce((sum, count) => sum + count, 0).toLocaleString("en");
  const size = model.preprocessing.input_size;
  return (
    `${model.name} ${model.version}: ${counts.length} classes and ${total} training images (including those for ` +
    `calibration), from ${counts[0]} of the most frequent class to ${counts.at(-1)} of the rarest. ` +
    `Images are resized to ${size} × ${size} px; heatmaps have ${model.grid.join(" × ")} positions.`
  );
}

/** A column of the parts that are not null. */
function stack(...parts) {
  const present = parts.filter(Boolean);
  return present.length ? [element("div", { class: "stack" }, ...present)] : [];
}

function card(title, ...children) {
  return element("div", { class: "card" }, element("h3", {}, title), ...children);
}

function row(title, ...cells) {
  return element("tr", {}, element("th", { scope: "row" }, title), ...cells.map((cell) => element("td", {}, cell)));
}

function table(columns, body, corner = element("td")) {
  const heads = columns.map((column) => element("th", { scope: "col" }, column));
  return element("table", {}, element("thead", {}, element("tr", {}, corner, ...heads)), body);
}

const share = (value) => (value == null ? "–" : percent(value));

function accuracy(model) {
  const steps = Object.keys(STEPS).filter((step) => model.figures?.[step]?.groups);
  if (!steps.length) return null;
  const cells = (of) => steps.map((step) => share(of(model.figures[step])));
  const rows = [
    row("overall", ...cells((figures) => figures.accuracy)),
    ...GROUPS.map((group) => row(`${group} (${model.groups[group]})`, ...cells((figures) => figures.groups[group]))),
  ];
  const columns = steps.map((step) => STEPS[step]);
  return card("Test accuracy", table(columns, element("tbody", {}, ...rows)));
}

/** Mean confidence and accuracy per group of the predicted class; by rank if a group by count has no class. */
function believed(model) {
  const found = model.by_predicted_group?.calibrated;
  if (!found) return null;
  const ranked = Object.values(model.groups).includes(0);
  const rows = (ranked ? ["head", "middle", "tail"] : GROUPS).map((group) =>
    row(group, ...["share", "confidence", "accuracy"].map((name) => share(found[group]?.[name]))),
  );
  const ranks = "Head, middle and tail are the most frequent 36 %, the next 35 % and the rarest 29 % of the classes.";
  return card(
    "Predictions by group",
    table(["share", "confidence", "accuracy"], element("tbody", {}, ...rows)),
    element(
      "p",
      {},
      "Mean confidence and accuracy of the calibrated predictions, by group of the predicted class. ",
      "They should be equal. ",
      ranked ? ranks : "",
    ),
  );
}

function tail(model) {
  const words = GROUPS.map((group) => `${model.groups[group]} ${group}`).join(", ");
  const legend = GROUPS.flatMap((group) => [badge(group, GROUP_TITLES[group]), " "]);
  return card(`Class frequencies: ${words}`, tailChart(model), element("p", {}, ...legend));
}

const badge = (group, text = group) => element("span", { class: `group ${group}` }, text);

function reliability(model, step) {
  const bins = model.reliability?.[step];
  if (!Array.isArray(bins)) return null;
  const ece = model.figures?.[step]?.ece;
  const title = `${TITLES[step]}${ece == null ? "" : `: ECE ${percent(ece)}`}`;
  const words =
    step === "trained"
      ? "Reliability diagram: accuracy at each confidence. On the dashed line, the two are equal; red is the gap."
      : "The same after calibration. ECE, the expected calibration error, is the mean gap over all predictions.";
  return card(title, reliabilityDiagram(bins, title, step === "trained"), element("p", {}, words));
}

/** All classes, which can be searched; listed when they are unfolded. */
function classTable(model) {
  const search = element("input", { type: "search", placeholder: "find a class", "aria-label": "Find a class" });
  const body = element("tbody");
  const head = element("th", { scope: "col" }, "class");
  const scroll = { class: "scroll", tabindex: "0", role: "region", "aria-label": "Classes" };
  const details = element(
    "details",
    {},
    element("summary", {}, `All ${model.classes.length} classes`),
    search,
    element("div", scroll, table(["group", "training images"], body, head)),
  );
  const list = () => {
    const wanted = search.value.trim().toLowerCase();
    const found = model.classes.filter((info) => info.label.toLowerCase().includes(wanted));
    body.replaceChildren(...found.map((info) => row(info.label, badge(info.group), String(info.train_count))));
  };
  details.addEventListener("toggle", () => details.open && list());
  search.addEventListener("input", list);
  return element("div", { class: "card wide" }, details);
}
