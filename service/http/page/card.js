// The model's card: what it knows, how well, and whether its probabilities can be believed.

import { GROUPS, reliabilityDiagram, tailChart } from "./charts.js";
import { $, element, percent } from "./dom.js";

const GROUP_TITLES = { many: "many: over 100", medium: "medium: 20 to 100", few: "few: under 20" };
const STEPS = { trained: "as trained", calibrated: "calibrated" };

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
    `${model.name} ${model.version}: ${counts.length} classes and ${total} training images, those for calibration ` +
    `included: ${counts[0]} of the most frequent class and ${counts.at(-1)} of the rarest. ` +
    `It sees ${size} × ${size} px and explains itself on a grid of ${model.grid.join(" × ")}.`
  );
}

/** What there is of `parts`, one below the other. */
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
  return card("Accuracy on test images", table(columns, element("tbody", {}, ...rows)));
}

/** Confidence and accuracy of the calibrated answers in each group; by rank if a group by count has no class. */
function believed(model) {
  const found = model.by_predicted_group?.calibrated;
  if (!found) return null;
  const ranked = Object.values(model.groups).includes(0);
  const rows = (ranked ? ["head", "middle", "tail"] : GROUPS).map((group) =>
    row(group, ...["share", "confidence", "accuracy"].map((name) => share(found[group]?.[name]))),
  );
  const which = ranked
    ? "one of the commonest 36 %, the next 35 % or the rarest 29 % of the classes"
    : "a many-, medium- or few-shot class";
  return card(
    "Answers by the group they name",
    table(["of all", "confidence", "right"], element("tbody", {}, ...rows)),
    element(
      "p",
      {},
      `Of the calibrated answers that name ${which}: confidence is their mean, and can be believed where as many are right.`,
    ),
  );
}

function tail(model) {
  const words = GROUPS.map((group) => `${model.groups[group]} ${group}`).join(", ");
  const legend = GROUPS.flatMap((group) => [badge(group, GROUP_TITLES[group]), " "]);
  return card(`The long tail: ${words}`, tailChart(model), element("p", {}, ...legend));
}

const badge = (group, text = group) => element("span", { class: `group ${group}` }, text);

function reliability(model, step) {
  const bins = model.reliability?.[step];
  if (!Array.isArray(bins)) return null;
  const ece = model.figures?.[step]?.ece;
  const title = `Reliability ${STEPS[step]}${ece == null ? "" : `, ECE ${percent(ece)}`}`;
  const words =
    step === "trained"
      ? "How many answers are right at each confidence? On the dashed line, confidence can be believed; red is the gap."
      : "The same after calibration. ECE, the expected calibration error, is the mean gap over all answers.";
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
