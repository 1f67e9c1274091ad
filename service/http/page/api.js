// Requests to the service.

import { $ } from "./dom.js";

/** The response to a request. Throws an Error with a sentence for people, and with the HTTP status if there is one. */
export async function ask(path, options = {}) {
  const key = $("key").value;
  const headers = { ...options.headers, ...(key && { "X-API-Key": key }) };
  let response;
  try {
    response = await fetch(path, { ...options, headers });
  } catch {
    const megabytes = (options.size ?? 0) / 1e6;
    throw new Error(
      megabytes > 1
        ? `The service cannot be reached, or it rejects a file of ${megabytes.toFixed(1)} MB.`
        : "The service cannot be reached.",
    );
  }
  if (response.ok) return response;
  const problem = await response.json().catch(() => ({}));
  if (response.status === 401) $("key-label").hidden = false;
  const wait = response.headers.get("Retry-After");
  const words = `${problem.title ?? "Request failed"}: ${problem.detail ?? response.status}.`;
  throw Object.assign(new Error(wait ? `${words} Try again in ${wait} s.` : words), { status: response.status });
}

/** Classify an image. */
export async function predict(image, query) {
  const form = new FormData();
  form.append("image", image);
  const response = await ask(`predict?${query}`, { method: "POST", body: form, size: image.size });
  return response.json();
}

/** Numbers requests of one kind, so that a late response to an older one can be dropped. */
export class Latest {
  #number = 0;

  /** Start a request. The function returned tells whether it is still the latest. */
  start() {
    const number = ++this.#number;
    return () => number === this.#number;
  }
}
