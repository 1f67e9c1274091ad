// One image at a time: send it, list its classes, show the heatmap of the one chosen.

const $ = (id) => document.getElementById(id);
const percent = (share) => (share < 0.0005 ? "<0.1 %" : `${(100 * share).toFixed(1)} %`);

let file = null; // the image on show
let answer = null; // the service's answer to it
let chosen = 0; // place of the class on show
let asked = 0; // number of the latest question: late answers to older ones are dropped
let count = Infinity; // the model's classes
const urls = []; // blob URLs of the picture on show

async function ask(path, options = {}) {
  const key = $("key").value;
  const headers = { ...options.headers, ...(key && { "X-API-Key": key }) };
  let response;
  try {
    response = await fetch(path, { ...options, headers });
  } catch {
    throw new Error("The service cannot be reached.");
  }
  if (response.ok) return response;
  const problem = await response.json().catch(() => ({}));
  if (response.status === 401) $("key-label").hidden = false;
  const wait = response.headers.get("Retry-After");
  throw new Error(`${problem.title ?? "The service failed"}: ${problem.detail ?? response.status}.${wait ? ` Try again in ${wait} s.` : ""}`);
}

function say(status, error = "") {
  $("status").textContent = status;
  $("error").textContent = error;
  $("error").hidden = !error;
}

async function predict() {
  if (!file) return;
  const question = ++asked;
  say(`Looking at ${file.name || "the pasted image"} …`);
  const form = new FormData();
  form.append("image", file);
  const query = new URLSearchParams({ top_k: Math.min($("top-k").value, count), prior: $("prior").value });
  try {
    const found = await (await ask(`predict?${query}`, { method: "POST", body: form })).json();
    if (question !== asked) return;
    answer = found;
    chosen = 0;
    list();
    $("result").hidden = false;
    say(`${file.name || "Pasted image"}, ${answer.image.width} × ${answer.image.height} px`);
    await show();
  } catch (error) {
    if (question === asked) { $("result").hidden = true; say("", error.message); }
  }
}

function list() {
  $("classes").replaceChildren(...answer.predictions.map((prediction, place) => {
    const button = document.createElement("button");
    button.type = "button";
    button.append(
      part("span", "about", `${prediction.group} · ${prediction.train_count} training images`),
      part("span", "name", prediction.label),
      bar("calibrated", prediction.calibrated_probability),
      bar("plain", prediction.probability),
    );
    button.addEventListener("click", () => { chosen = place; show(); });
    const item = document.createElement("li");
    item.append(button);
    return item;
  }));
}

function part(tag, name, text = "") {
  const element = document.createElement(tag);
  element.className = name;
  element.textContent = text;
  return element;
}

function bar(kind, share) {
  const row = part("span", `bar ${kind}`);
  const fill = document.createElement("i");
  const track = document.createElement("b");
  track.append(fill);
  row.append(track, part("em", "", percent(share)));
  row.title = `${kind} probability`;
  requestAnimationFrame(() => fill.style.setProperty("width", `${100 * share}%`));
  return row;
}

async function show() {
  const question = asked;
  const prediction = answer.predictions[chosen];
  const view = document.querySelector("input[name=view]:checked").value;
  document.querySelectorAll("#classes button").forEach((button, place) => button.setAttribute("aria-pressed", place === chosen));
  if (!answer.cam || view === "none") {
    picture(file, file.name || "the image");
    $("caption").textContent = answer.cam ? "" : "No heatmap was kept for this prediction.";
    return;
  }
  const calibrated = view === "calibrated";
  const score = calibrated ? prediction.calibrated_logit : prediction.logit;
  const query = new URLSearchParams({ class: prediction.class_id, calibrated, size: 640, format: "webp" });
  try {
    const drawn = await (await ask(`cam/${answer.id}?${query}`)).blob();
    const now = document.querySelector("input[name=view]:checked").value;
    if (question !== asked || prediction !== answer.predictions[chosen] || view !== now) return;
    picture(drawn, `Heatmap of ${prediction.label}`);
    $("caption").textContent = `Evidence for ${prediction.label}. The map sums to its ${view} score, ${score.toFixed(2)}.`;
  } catch (error) {
    say("", error.message);
  }
}

function picture(blob, description) {
  const url = URL.createObjectURL(blob);
  $("heatmap").src = url;
  $("heatmap").alt = description;
  urls.push(url);
  while (urls.length > 1) URL.revokeObjectURL(urls.shift());
}

function take(files) {
  const image = [...files].find((candidate) => candidate.type.startsWith("image/")) ?? files[0];
  $("file").value = ""; // so that the same file can be chosen again
  if (image) { file = image; predict(); }
}

async function describe() {
  try {
    const model = await (await ask("model")).json();
    count = model.classes.length;
    $("model").textContent = `${model.name} ${model.version}: ${count} classes, ${model.groups.few} of them seen fewer than 20 times in training.`;
  } catch (error) {
    say("", error.message);
  }
}

$("file").addEventListener("change", () => take($("file").files));
$("top-k").addEventListener("change", predict);
$("prior").addEventListener("change", predict);
$("key").addEventListener("change", () => { say(""); describe(); predict(); });
$("form").addEventListener("submit", (event) => event.preventDefault());
document.querySelectorAll("input[name=view]").forEach((radio) => radio.addEventListener("change", () => answer && show()));
addEventListener("paste", (event) => take(event.clipboardData.files));
addEventListener("dragover", (event) => { event.preventDefault(); $("drop").classList.add("over"); });
addEventListener("dragleave", () => $("drop").classList.remove("over"));
addEventListener("drop", (event) => { event.preventDefault(); $("drop").classList.remove("over"); take(event.dataTransfer.files); });
describe();
