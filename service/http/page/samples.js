// Photographs in samples/, offered for models that know their class.

import { ask } from "./api.js";
import { $, element } from "./dom.js";

const SAMPLES = ["Leopards", "ketch", "metronome"];

/** List the samples of the model's classes; `take` is called with the name of the one that is chosen. */
export function offerSamples(model, take) {
  const known = new Set(model.classes.map((info) => info.label));
  const offered = SAMPLES.filter((name) => known.has(name)).map((name) => {
    const button = element(
      "button",
      { type: "button", "aria-label": `Sample: ${name}` },
      element("img", { src: `samples/${name}.jpg`, alt: "", width: 120, height: 84 }),
      element("span", { class: "label" }, name),
    );
    button.addEventListener("click", () => take(name));
    return element("li", {}, button);
  });
  $("samples")
    .querySelector("ul")
    .replaceChildren(...offered);
  $("samples").hidden = !offered.length;
}

/** The sample as a file. */
export async function loadSample(name) {
  const photograph = await (await ask(`samples/${name}.jpg`)).blob();
  return new File([photograph], `${name}.jpg`, { type: "image/jpeg" });
}
