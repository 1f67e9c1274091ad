// The list of predicted classes.

import { $, element, percent } from "./dom.js";

/** One class is chosen by a click; while the pointer or the keyboard's focus is on another, that one is shown. */
export class ClassList {
  #predictions = [];
  #chosen = 0; // place in the list
  #hovered = null;
  #changed;

  /** `changed` is called when another class is to be shown. */
  constructor(changed) {
    this.#changed = changed;
  }

  /** The prediction of the class to show. */
  get shown() {
    return this.#predictions[this.#shownPlace];
  }

  /** List new predictions; with `keep`, the chosen and the focused class stay so if they are still in the list. */
  update(predictions, keep) {
    const idAt = (place) => (keep ? this.#predictions[place]?.class_id : undefined);
    const placeOf = (id) => predictions.findIndex((prediction) => prediction.class_id === id);
    const focused = placeOf(idAt(this.#buttons.indexOf(document.activeElement)));
    // Whoever has not chosen another class sees the best one.
    this.#chosen = this.#chosen ? Math.max(0, placeOf(idAt(this.#chosen))) : 0;
    this.#hovered = null;
    this.#predictions = predictions;
    $("classes").replaceChildren(...predictions.map((prediction, place) => this.#item(prediction, place)));
    this.#buttons[focused]?.focus({ preventScroll: true });
  }

  /** Mark the class that is chosen and the one that is shown. */
  mark() {
    this.#buttons.forEach((button, place) => {
      button.setAttribute("aria-pressed", place === this.#chosen);
      button.classList.toggle("shown", place === this.#shownPlace);
    });
  }

  get #buttons() {
    return [...$("classes").querySelectorAll("button")];
  }

  get #shownPlace() {
    return this.#hovered ?? this.#chosen;
  }

  #item(prediction, place) {
    const title = element(
      "span",
      { class: "top" },
      element("span", { class: "name" }, prediction.label),
      element("span", { class: `group ${prediction.group}` }, prediction.group),
      element("span", { class: "count" }, `${prediction.train_count} training images`),
    );
    const button = element("button", { type: "button" }, title, bars(prediction));
    button.addEventListener("click", () => {
      this.#chosen = place;
      this.#hover(null);
    });
    for (const event of ["pointerenter", "focus"]) button.addEventListener(event, () => this.#hover(place));
    for (const event of ["pointerleave", "blur"]) button.addEventListener(event, () => this.#hover(null));
    return element("li", {}, button);
  }

  #hover(place) {
    this.#hovered = place;
    this.#changed();
  }
}

/** Both probabilities as bars, and their difference. */
function bars(prediction) {
  const shift = 100 * (prediction.calibrated_probability - prediction.probability);
  const grid = element("span", { class: "bars" });
  const shares = { calibrated: prediction.calibrated_probability, plain: prediction.probability };
  for (const [kind, share] of Object.entries(shares)) {
    const fill = element("i", { class: kind });
    const spoken = element("span", { class: "unseen" }, `${kind} `);
    grid.append(element("b", { class: kind }, fill), element("em", { class: kind }, spoken, percent(share)));
    requestAnimationFrame(() => fill.style.setProperty("width", `${100 * share}%`));
  }
  const words = Math.abs(shift) < 0.05 ? "±0" : `${shift > 0 ? "+" : "−"}${Math.abs(shift).toFixed(1)}`;
  grid.append(element("span", { class: "shift" }, element("strong", {}, words), "points"));
  return grid;
}
