// Small helpers that the page's modules share.

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

/** The answer to a request, or an Error with a sentence for people and the status, if there is one. */
export async function ask(path, options = {}) {
  const key = $("key").value;
  const headers = { ...options.headers, ...(key && { "X-API-Key": key }) };
  let response;
  try {
    response = await fetch(path, { ...options, headers });
  } catch {
    const megabytes = (options.size ?? 0) / 1e6;
    throw new Error(megabytes > 1
      ? `The service cannot be reached, or it refuses a file of ${megabytes.toFixed(1)} MB.`
      : "The service cannot be reached.");
  }
  if (response.ok) return response;
  const problem = await response.json().catch(() => ({}));
  if (response.status === 401) $("key-label").hidden = false;
  const wait = response.headers.get("Retry-After");
  const words = `${problem.title ?? "The service failed"}: ${problem.detail ?? response.status}.${wait ? ` Try again in ${wait} s.` : ""}`;
  throw Object.assign(new Error(words), { status: response.status });
}
