// One image at a time: classify it, list its classes, show the heatmap of one of them.

import { ask, Latest, predict } from "./api.js";
import { describe } from "./card.js";
import { Choices } from "./choices.js";
import { ClassList } from "./classes.js";
import { offerRivals, showOpacity, watchControls } from "./controls.js";
import { $, percent, say } from "./dom.js";
import { Heatmap } from "./heatmap.js";
import { loadSample, offerSamples } from "./samples.js";
import { acceptImages, nameOf } from "./upload.js";

const requests = new Latest();
const choices = new Choices(classify);
const classes = new ClassList(show);
const heatmap = new Heatmap();

let image = null; // the one to classify
let shown = null; // { answer, image, choices } of the last prediction

/** Classify the image. For the same image as before, the chosen classes stay chosen. */
async function classify() {
  if (!image) return;
  const isLatest = requests.start();
  const question = { image, choices: choices.values };
  const same = shown?.image === image;
  say(`Classifying ${nameOf(image)} …`);
  $("result").setAttribute("aria-busy", "true");
  try {
    const answer = await predict(image, choices.query);
    if (!isLatest()) return;
    shown = { ...question, answer };
    heatmap.release();
    offerRivals(answer.predictions, same);
    classes.update(answer.predictions, same);
    say(summary());
    document.body.classList.add("done");
    $("result").hidden = false;
    await show();
    heatmap.prefetch(answer, isLatest);
  } catch (error) {
    if (!isLatest()) return;
    say("", error.message);
    if (same) choices.values = shown.choices;
    else $("result").hidden = true;
  } finally {
    if (isLatest()) $("result").removeAttribute("aria-busy");
  }
}

function summary() {
  const { answer, image } = shown;
  const best = answer.predictions[0];
  return (
    `${nameOf(image)}, ${answer.image.width} × ${answer.image.height} px: ${best.label}, ` +
    `${percent(best.calibrated_probability)} (${percent(best.probability)} before calibration)`
  );
}

/** Show the heatmap of the class that is looked at; if it has expired, classify the image again. */
async function show() {
  if (!shown) return;
  classes.mark();
  showOpacity();
  if (await heatmap.show(shown.answer, classes.shown, shown.image)) await classify();
}

/** Classify a sample, unless another image is chosen while it loads. */
async function classifySample(name) {
  const isLatest = requests.start();
  try {
    const sample = await loadSample(name);
    if (!isLatest()) return;
    image = sample;
    await classify();
  } catch (error) {
    if (isLatest()) say("", error.message);
  }
}

async function describeModel() {
  try {
    const model = await (await ask("model")).json();
    choices.fit(model);
    describe(model);
    offerSamples(model, classifySample);
  } catch (error) {
    say("", error.message);
  }
  choices.showCommand();
}

/** Open a link that needs the API key, which the browser would not send. */
async function openWithKey(event) {
  if (!$("key").value) return;
  event.preventDefault();
  try {
    const response = await ask(event.currentTarget.getAttribute("href"));
    window.open(URL.createObjectURL(await response.blob()));
  } catch (error) {
    say("", error.message);
  }
}

const narrow = matchMedia("(max-width: 46rem)");

/** In a narrow window the controls follow the classes, in the order of the keyboard too. */
function arrange() {
  $(narrow.matches ? "result" : "side").append($("view"));
}

narrow.addEventListener("change", arrange);
arrange();
acceptImages((chosen) => {
  image = chosen;
  classify();
});
watchControls(show);
for (const link of document.querySelectorAll("a.keyed")) link.addEventListener("click", openWithKey);
$("key").addEventListener("change", () => {
  say("");
  describeModel();
  classify();
});
$("form").addEventListener("submit", (event) => event.preventDefault());
describeModel();
