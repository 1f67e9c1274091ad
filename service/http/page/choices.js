// What a prediction depends on besides the image, and the curl command for the same request.

import { $ } from "./dom.js";

const CONTROLS = ["prior", "top-k"];

/** The class prior and the number of classes. */
export class Choices {
  #classCount = Infinity; // of the model; more cannot be asked for

  /** Call `changed` when the user changes one of them. */
  constructor(changed) {
    for (const id of CONTROLS) {
      $(id).addEventListener("change", () => {
        this.showCommand();
        changed();
      });
    }
    $("copy").addEventListener("click", copyCommand);
  }

  /** Offer what the model has. */
  fit(model) {
    this.#classCount = model.classes.length;
    const given = $("prior").querySelector("[value=given]");
    given.hidden = given.disabled = !model.calibration.priors.includes("given");
  }

  get values() {
    return CONTROLS.map((id) => $(id).value);
  }

  set values(values) {
    CONTROLS.forEach((id, k) => {
      $(id).value = values[k];
    });
    this.showCommand();
  }

  /** The query of `/predict`. */
  get query() {
    const prior = $("prior").value;
    return new URLSearchParams({
      top_k: Math.min($("top-k").value, this.#classCount),
      ...(prior !== "balanced" && { prior }),
    });
  }

  showCommand() {
    const key = $("key-label").hidden ? "" : " -H 'X-API-Key: …'";
    $("curl").textContent = `curl${key} -F image=@photo.jpg '${new URL(`predict?${this.query}`, document.baseURI)}'`;
  }
}

async function copyCommand() {
  try {
    await navigator.clipboard.writeText($("curl").textContent);
    $("copy").textContent = "Copied";
  } catch {
    // Without HTTPS there is no clipboard: select the command for the reader.
    getSelection().selectAllChildren($("curl"));
    $("copy").textContent = "Selected";
  }
  setTimeout(() => {
    $("copy").textContent = "Copy";
  }, 1500);
}
