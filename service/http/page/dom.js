// Helpers for the document.

export const $ = (id) => document.getElementById(id);

export const percent = (share) => (share > 0 && share < 0.0005 ? "<0.1\u00a0%" : `${(100 * share).toFixed(1)}\u00a0%`);

/** An element with attributes; children are elements or text. */
export function element(tag, attributes = {}, ...children) {
  return fill(document.createElement(tag), attributes, children);
}

/** The same for SVG. */
export function drawn(tag, attributes = {}, ...children) {
  return fill(document.createElementNS("http://www.w3.org/2000/svg", tag), attributes, children);
}

function fill(node, attributes, children) {
  for (const [name, value] of Object.entries(attributes)) node.setAttribute(name, value);
  node.append(...children);
  return node;
}

/** Show a status line, or an error. */
export function say(status, error = "") {
  $("status").textContent = status;
  $("error").textContent = error;
  $("error").hidden = !error;
}
