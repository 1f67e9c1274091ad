// The controls of the heatmap: the query that they make, and the caption for it.

import { $, element } from "./dom.js";

const DELAY_MS = 50; // after the last move of the slider

/** Call `changed` when the user changes one of them. */
export function watchControls(changed) {
  for (const id of ["colormap", "versus", "common"]) $(id).addEventListener("change", changed);
  for (const radio of document.querySelectorAll("input[name=score]")) radio.addEventListener("change", changed);
  let timer = 0;
  $("alpha").addEventListener("input", () => {
    showOpacity();
    clearTimeout(timer);
    timer = setTimeout(changed, DELAY_MS);
  });
}

export function showOpacity() {
  $("alpha-value").textContent = `${$("alpha").value} %`;
}

/** Offer the classes to compare with; with `keep`, the selected one stays selected if it is still offered. */
export function offerRivals(predictions, keep) {
  const selected = keep ? $("versus").value : "";
  const options = predictions.map(({ class_id, label }) => element("option", { value: class_id }, label));
  $("versus").replaceChildren(element("option", { value: "" }, "no other class"), ...options);
  $("versus").value = options.some((option) => option.value === selected) ? selected : "";
}

/** The query of the heatmap of a class. */
export function heatmapQuery(prediction) {
  const versus = $("versus").value;
  return new URLSearchParams({
    class: prediction.class_id,
    calibrated: score() === "calibrated",
    ...($("colormap").value && { colormap: $("colormap").value }),
    alpha: $("alpha").value / 100,
    ...($("common").checked && { scale: "image" }),
    ...(versus && Number(versus) !== prediction.class_id && { versus }),
  });
}

/** A sentence on the heatmap of `query`, and a short description for screen readers. */
export function caption(answer, prediction, query) {
  const kind = score();
  const logit = kind === "calibrated" ? "calibrated_logit" : "logit";
  const rival = answer.predictions.find((other) => String(other.class_id) === query.get("versus"));
  const prior = answer.prior === "balanced" ? "" : " The class prior changes probabilities, not scores.";
  if (!rival) {
    const value = prediction[logit].toFixed(2);
    return [
      `Evidence for ${prediction.label}. All positions sum to its ${kind} score, ${value}.${prior}`,
      `Heatmap of ${prediction.label}`,
    ];
  }
  const signed = ["", "coolwarm"].includes($("colormap").value);
  const pair = signed
    ? `${prediction.label} (red) compared with ${rival.label} (blue)`
    : `${prediction.label} compared with ${rival.label}`;
  const difference = (prediction[logit] - rival[logit]).toFixed(2);
  return [
    `Evidence for ${pair}. All positions sum to the difference of their ${kind} scores, ${difference}.${prior}`,
    `Heatmap of ${prediction.label} compared with ${rival.label}`,
  ];
}

const score = () => document.querySelector("input[name=score]:checked").value;
