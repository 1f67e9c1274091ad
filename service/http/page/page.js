// One image at a time: send it, list its classes, show the heatmap of the one looked at.

import { describe } from "./card.js";
import { $, ask, element, percent } from "./dom.js";

const SAMPLES = ["Leopards", "ketch", "metronome"]; // photographs in samples/, offered to models that know the class
const PX = 768; // longest side of a heatmap
const CHOICES = ["prior", "top-k"]; // what an answer depends on, beside the image

let file = null; // the image on show
let answer = null; // the service's answer to it
let pinned = 0; // place of the class that was chosen
let looked = null; // place of the class under the pointer or the keyboard's focus, if any
let asked = 0; // number of the latest question: late answers to older ones are dropped
let drawn = 0; // the same for heatmaps
let kept = ""; // id of the last answer that had a heatmap to show: when it has none any more, its life is over
let count = Infinity; // the model's classes
const pictures = new Map(); // query → promise of a blob URL

function say(status, error = "") {
  $("status").textContent = status;
  $("error").textContent = error;
  $("error").hidden = !error;
}

const named = (image) => image.name || "The pasted image";

/** Ask about the image on show. Of a new one the best class is chosen; what was chosen before of the same one is kept. */
async function predict() {
  if (!file) return;
  const [question, image, choices] = [++asked, file, CHOICES.map((id) => $(id).value)];
  say(`Looking at ${named(image)} …`);
  $("result").setAttribute("aria-busy", "true");
  const form = new FormData();
  form.append("image", image);
  try {
    const found = await (await ask(`predict?${options()}`, { method: "POST", body: form, size: image.size })).json();
    if (question !== asked) return;
    const same = answer?.image.file === image;
    const chosen = same && pinned ? answer.predictions[pinned].class_id : null;
    const focused = same ? answer.predictions[buttons().indexOf(document.activeElement)]?.class_id : null;
    answer = { ...found, image: { ...found.image, file: image }, choices };
    const place = (id) => answer.predictions.findIndex((prediction) => prediction.class_id === id);
    [pinned, looked] = [Math.max(0, place(chosen)), null];
    forget();
    list(same ? $("versus").value : "");
    buttons()[place(focused)]?.focus({ preventScroll: true });
    const best = answer.predictions[0];
    say(`${named(image)}, ${answer.image.width} × ${answer.image.height} px: ${best.label}, ${percent(best.calibrated_probability)} sure`
      + ` (${percent(best.probability)} before calibration)`);
    document.body.classList.add("done");
    $("result").hidden = false;
    await show();
    prefetch(question);
  } catch (error) {
    if (question !== asked) return;
    say("", error.message);
    if (answer?.image.file !== image) $("result").hidden = true;
    else { CHOICES.forEach((id, k) => { $(id).value = answer.choices[k]; }); shell(); } // what is on show was asked for so
  } finally {
    if (question === asked) $("result").removeAttribute("aria-busy");
  }
}

const buttons = () => [...$("classes").querySelectorAll("button")];

function options() {
  return new URLSearchParams({ top_k: Math.min($("top-k").value, count), prior: $("prior").value });
}

/** The classes, each with its bars, and those that `versus` can be; it is kept if it is still among them. */
function list(versus) {
  $("classes").replaceChildren(...answer.predictions.map((prediction, place) => {
    const button = element("button", { type: "button" },
      element("span", { class: "top" }, element("span", { class: "name" }, prediction.label),
        element("span", { class: `group ${prediction.group}` }, prediction.group),
        element("span", { class: "count" }, `${prediction.train_count} training images`)),
      bars(prediction));
    button.addEventListener("click", () => { pinned = place; looked = null; show(); });
    for (const event of ["pointerenter", "focus"]) button.addEventListener(event, () => look(place));
    for (const event of ["pointerleave", "blur"]) button.addEventListener(event, () => look(null));
    return element("li", {}, button);
  }));
  $("versus").replaceChildren(element("option", { value: "" }, "nothing: this class alone"),
    ...answer.predictions.map((prediction) => element("option", { value: prediction.class_id }, prediction.label)));
  if (answer.predictions.some((prediction) => String(prediction.class_id) === versus)) $("versus").value = versus;
}

function bars(prediction) {
  const shift = 100 * (prediction.calibrated_probability - prediction.probability);
  const grid = element("span", { class: "bars" });
  for (const [kind, share] of [["calibrated", prediction.calibrated_probability], ["plain", prediction.probability]]) {
    const fill = element("i", { class: kind });
    grid.append(element("b", { class: kind }, fill), element("em", { class: kind }, element("span", { class: "unseen" }, `${kind} `), percent(share)));
    requestAnimationFrame(() => fill.style.setProperty("width", `${100 * share}%`));
  }
  const words = Math.abs(shift) < 0.05 ? "±0" : `${shift > 0 ? "+" : "−"}${Math.abs(shift).toFixed(1)}`;
  grid.append(element("span", { class: "shift" }, element("strong", {}, words), "points"));
  return grid;
}

function look(place) {
  looked = place;
  show();
}

/** The query of the heatmap of the class at `place`, as the controls say. */
function wanted(place) {
  const prediction = answer.predictions[place];
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

const score = () => document.querySelector("input[name=score]:checked").value;

function heatmap(query) {
  const path = `cam/${answer.id}?${query}&size=${PX}&format=jpeg`;
  if (!pictures.has(path)) {
    const picture = ask(path).then((response) => response.blob()).then((blob) => URL.createObjectURL(blob));
    picture.catch(() => pictures.delete(path));
    pictures.set(path, picture);
  }
  return pictures.get(path);
}

/** Give back the pictures of the last answer, but not at once: one of them may still be on its way to the screen. */
function forget() {
  const old = [...pictures.values()];
  pictures.clear();
  setTimeout(() => { for (const picture of old) picture.then(URL.revokeObjectURL, () => {}); }, 10_000);
}

/** Fetch the heatmaps of the other classes, one at a time, so that looking at one shows it at once. */
async function prefetch(question) {
  try {
    for (let place = 1; place < answer.predictions.length && question === asked && answer.cam; place++) await heatmap(wanted(place));
  } catch {} // then it is asked for again when it is looked at
}

async function show() {
  if (!answer) return;
  const drawing = ++drawn;
  const place = looked ?? pinned;
  const prediction = answer.predictions[place];
  buttons().forEach((button, k) => {
    button.setAttribute("aria-pressed", k === pinned);
    button.classList.toggle("shown", k === place);
  });
  $("alpha-value").textContent = `${$("alpha").value} %`;
  $("view").hidden = !answer.cam;
  let [url, words, alt] = ["", "No heatmap was kept for this prediction.", named(answer.image.file)];
  if (answer.cam) {
    const query = wanted(place);
    try {
      url = await heatmap(query);
    } catch (error) {
      if (drawing !== drawn) return;
      if (error.status === 404 && kept === answer.id) return predict();
      $("heatmap").removeAttribute("src");
      $("heatmap").alt = "";
      $("open").hidden = true;
      $("caption").textContent = error.message;
      return;
    }
    if (drawing !== drawn) return;
    kept = answer.id;
    $("open").hidden = false;
    [words, alt] = caption(prediction, query);
    $("open").href = `cam/${answer.id}?${query}&size=1024&legend=true`;
  } else {
    url = URL.createObjectURL(answer.image.file);
    pictures.set(url, Promise.resolve(url));
  }
  const next = new Image();
  next.src = url;
  await next.decode().catch(() => {});
  if (drawing !== drawn) return;
  $("heatmap").src = url;
  $("heatmap").alt = alt;
  $("caption").textContent = words;
}

/** A sentence on the heatmap of `query`, and its description for those who do not see it. */
function caption(prediction, query) {
  const kind = score();
  const logit = kind === "calibrated" ? "calibrated_logit" : "logit";
  const rival = answer.predictions.find((other) => String(other.class_id) === query.get("versus"));
  const prior = answer.prior === "balanced" ? "" : " The class prior weighs on probabilities alone.";
  if (!rival) {
    return [`Where the evidence for ${prediction.label} is: all positions sum to its ${kind} score, ${prediction[logit].toFixed(2)}.${prior}`,
      `Heatmap of ${prediction.label}`];
  }
  const difference = (prediction[logit] - rival[logit]).toFixed(2);
  const [red, blue] = ["", "coolwarm"].includes($("colormap").value) ? [" (red)", " (blue)"] : ["", ""];
  return [`What speaks for ${prediction.label}${red} rather than ${rival.label}${blue}: all positions sum to the difference of their ${kind} scores, ${difference}.${prior}`,
    `Heatmap of ${prediction.label} rather than ${rival.label}`];
}

let timer = 0;
function later() {
  $("alpha-value").textContent = `${$("alpha").value} %`;
  clearTimeout(timer);
  timer = setTimeout(show, 50);
}

/** Take the first image of what was chosen, dropped or pasted. */
function take(files) {
  const all = [...files];
  const image = all.find((candidate) => candidate.type.startsWith("image/")) ?? all[0];
  $("file").value = ""; // so that the same file can be chosen again
  if (image) { file = image; predict(); }
}

function dropped(transfer) {
  const entry = [...transfer.items].find((item) => item.kind === "file")?.webkitGetAsEntry();
  if (entry?.isDirectory) say("", `${entry.name} is a folder: drop one image of it.`);
  else if (transfer.files.length) take(transfer.files);
  else say("", "No file was dropped: save the image first, or copy and paste it.");
}

async function sample(name) {
  const question = ++asked;
  try {
    const photograph = await (await ask(`samples/${name}.jpg`)).blob();
    if (question !== asked) return;
    file = new File([photograph], `${name}.jpg`, { type: "image/jpeg" });
    await predict();
  } catch (error) {
    if (question === asked) say("", error.message);
  }
}

function offer(model) {
  const known = new Set(model.classes.map((info) => info.label));
  const offered = SAMPLES.filter((name) => known.has(name)).map((name) => {
    const button = element("button", { type: "button" },
      element("img", { src: `samples/${name}.jpg`, alt: "", width: 120, height: 84 }), element("span", { class: "label" }, name));
    button.setAttribute("aria-label", `Sample: ${name}`);
    button.addEventListener("click", () => sample(name));
    return element("li", {}, button);
  });
  $("samples").querySelector("ul").replaceChildren(...offered);
  $("samples").hidden = !offered.length;
}

function shell() {
  const query = new URLSearchParams({ top_k: Math.min($("top-k").value, count), ...($("prior").value !== "balanced" && { prior: $("prior").value }) });
  const key = $("key-label").hidden ? "" : " -H 'X-API-Key: …'";
  $("curl").textContent = `curl${key} -F image=@photo.jpg '${new URL(`predict?${query}`, document.baseURI)}'`;
}

async function copy() {
  try {
    await navigator.clipboard.writeText($("curl").textContent);
    $("copy").textContent = "Copied";
  } catch { // no clipboard on plain HTTP from another machine: select it for the reader
    getSelection().selectAllChildren($("curl"));
    $("copy").textContent = "Selected";
  }
  setTimeout(() => { $("copy").textContent = "Copy"; }, 1500);
}

async function start() {
  try {
    const model = await (await ask("model")).json();
    count = model.classes.length;
    describe(model);
    const given = $("prior").querySelector("[value=given]");
    given.hidden = given.disabled = !model.calibration.priors.includes("given");
    offer(model);
  } catch (error) {
    say("", error.message);
  }
  shell();
}

/** In a narrow window the controls follow the classes, for the keyboard too. */
const narrow = matchMedia("(max-width: 46rem)");
function arrange() {
  $(narrow.matches ? "result" : "side").append($("view"));
}
narrow.addEventListener("change", arrange);
arrange();

$("file").addEventListener("change", () => take($("file").files));
for (const id of ["top-k", "prior"]) $(id).addEventListener("change", () => { shell(); predict(); });
for (const id of ["colormap", "versus", "common"]) $(id).addEventListener("change", show);
document.querySelectorAll("input[name=score]").forEach((radio) => radio.addEventListener("change", show));
$("alpha").addEventListener("input", later);
// Following a link sends no key.
for (const link of document.querySelectorAll("a.keyed")) {
  link.addEventListener("click", async (event) => {
    if (!$("key").value) return;
    event.preventDefault();
    try {
      window.open(URL.createObjectURL(await (await ask(link.getAttribute("href"))).blob()));
    } catch (error) {
      say("", error.message);
    }
  });
}
$("key").addEventListener("change", () => { say(""); start(); predict(); });
$("form").addEventListener("submit", (event) => event.preventDefault());
$("copy").addEventListener("click", copy);
addEventListener("paste", (event) => event.clipboardData.files.length && take(event.clipboardData.files));
addEventListener("dragover", (event) => { event.preventDefault(); $("drop").classList.add("over"); });
addEventListener("dragleave", () => $("drop").classList.remove("over"));
addEventListener("drop", (event) => { event.preventDefault(); $("drop").classList.remove("over"); dropped(event.dataTransfer); });
start();
