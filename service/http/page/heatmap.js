// The heatmap on show.

import { ask, Latest } from "./api.js";
import { caption, heatmapQuery } from "./controls.js";
import { $ } from "./dom.js";
import { nameOf } from "./upload.js";

const PX = 768; // longest side
const RELEASE_MS = 10_000;

/** Fetches heatmaps, keeps them while their prediction is on show, and draws the latest. */
export class Heatmap {
  #pictures = new Map(); // path → promise of a blob URL
  #drawings = new Latest();
  #shownId = ""; // of the last prediction with a heatmap on show: if the service has it no more, it has expired

  /** Show the heatmap of a class, or the image if no heatmap was kept. Resolves to true if the heatmap has expired. */
  async show(answer, prediction, image) {
    const isLatest = this.#drawings.start();
    const query = answer.cam && heatmapQuery(prediction);
    $("view").hidden = !query;
    let url = "";
    try {
      url = await (query ? this.#fetch(answer.id, query) : this.#keep(image, URL.createObjectURL(image)));
    } catch (error) {
      const expired = error.status === 404 && this.#shownId === answer.id;
      if (isLatest() && !expired) showError(error.message);
      return isLatest() && expired;
    }
    if (!isLatest()) return false;
    if (query) {
      this.#shownId = answer.id;
      $("open").href = `cam/${answer.id}?${query}&size=1024&legend=true`;
      $("open").hidden = false;
    }
    const texts = query
      ? caption(answer, prediction, query)
      : ["No heatmap was stored for this prediction.", nameOf(image)];
    await decoded(url);
    if (isLatest()) draw(url, ...texts);
    return false;
  }

  /** Fetch the heatmaps of the other classes one after another, so that each is there when it is looked at. */
  async prefetch(answer, isLatest) {
    try {
      for (const prediction of answer.predictions.slice(1)) {
        if (!isLatest() || !answer.cam) return;
        await this.#fetch(answer.id, heatmapQuery(prediction));
      }
    } catch {} // it is fetched again when it is looked at
  }

  /** Release the pictures of the last prediction, after a while: one may still be on its way to the screen. */
  release() {
    const old = [...this.#pictures.values()];
    this.#pictures.clear();
    setTimeout(() => {
      for (const picture of old) picture.then(URL.revokeObjectURL, () => {});
    }, RELEASE_MS);
  }

  #fetch(id, query) {
    const path = `cam/${id}?${query}&size=${PX}&format=jpeg`;
    if (this.#pictures.has(path)) return this.#pictures.get(path);
    const picture = ask(path)
      .then((response) => response.blob())
      .then((blob) => URL.createObjectURL(blob));
    picture.catch(() => this.#pictures.delete(path));
    return this.#keep(path, picture);
  }

  #keep(key, picture) {
    this.#pictures.set(key, Promise.resolve(picture));
    return this.#pictures.get(key);
  }
}

async function decoded(url) {
  const image = new Image();
  image.src = url;
  await image.decode().catch(() => {});
}

function draw(url, words, alt) {
  $("heatmap").src = url;
  $("heatmap").alt = alt;
  $("caption").textContent = words;
}

function showError(message) {
  $("heatmap").removeAttribute("src");
  $("heatmap").alt = "";
  $("open").hidden = true;
  $("caption").textContent = message;
}
