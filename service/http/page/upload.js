// Images that the user chooses, drops or pastes.

import { $, say } from "./dom.js";

/** Call `take` with each image. */
export function acceptImages(take) {
  const first = (files) => {
    const all = [...files];
    const image = all.find((file) => file.type.startsWith("image/")) ?? all[0];
    $("file").value = ""; // so that the same file can be chosen again
    if (image) take(image);
  };
  const highlight = (on) => $("drop").classList.toggle("over", on);
  $("file").addEventListener("change", () => first($("file").files));
  addEventListener("paste", (event) => first(event.clipboardData.files));
  addEventListener("dragover", (event) => {
    event.preventDefault();
    highlight(true);
  });
  addEventListener("dragleave", () => highlight(false));
  addEventListener("drop", (event) => {
    event.preventDefault();
    highlight(false);
    const entry = [...event.dataTransfer.items].find((item) => item.kind === "file")?.webkitGetAsEntry();
    if (entry?.isDirectory) say("", `${entry.name} is a folder; drop an image instead.`);
    else if (event.dataTransfer.files.length) first(event.dataTransfer.files);
    else say("", "No file was dropped; save the image first, or copy and paste it.");
  });
}

export const nameOf = (image) => image.name || "The pasted image";
