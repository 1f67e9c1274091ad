// The charts of the model card.

import { drawn, percent } from "./dom.js";

export const GROUPS = ["many", "medium", "few"];

/** Training images of each class as bars, from the most frequent to the rarest, on a logarithmic scale. */
export function tailChart(model) {
  const sorted = [...model.classes].sort((a, b) => b.train_count - a.train_count);
  const [most, fewest] = [sorted[0].train_count, sorted.at(-1).train_count];
  const [width, height, base] = [320, 150, 128];
  const step = width / sorted.length;
  const barHeight = (count) => ((base - 14) * Math.log10(count)) / (Math.log10(most) || 1);
  const bar = (info, place) => {
    const size = Math.max(2, barHeight(info.train_count)).toFixed(1);
    return `M${(place * step).toFixed(2)} ${base}v${-size}h${Math.max(step * 0.8, 0.3).toFixed(2)}v${size}z`;
  };
  // One path per group: thousands of classes are three elements.
  const path = (group) => sorted.map((info, place) => (info.group === group ? bar(info, place) : "")).join("");
  const label = `Training images per class, from ${most} down to ${fewest}`;
  return drawn(
    "svg",
    { class: "chart", viewBox: `0 0 ${width} ${height}`, role: "img", "aria-label": label },
    ...GROUPS.map((group) => drawn("path", { class: group, d: path(group) })),
    drawn("text", { x: 2, y: 10 }, String(most)),
    drawn("text", { x: width, y: Math.max(20, base - barHeight(fewest) - 5), "text-anchor": "end" }, String(fewest)),
    drawn("text", { x: 0, y: height - 5 }, "training images per class, logarithmic"),
  );
}

/** Bars of accuracy over confidence; the gap between the two is shaded. */
export function reliabilityDiagram(bins, title, before) {
  const [left, top, size] = [34, 8, 250];
  const x = (share) => left + share * size;
  const y = (share) => top + (1 - share) * size;
  const rect = (bin, kind, low, high) => {
    const words =
      `mean confidence ${percent(bin.confidence)}, accuracy ${percent(bin.accuracy)}, ` +
      `${percent(bin.share)} of the predictions`;
    const box = { x: x(bin.low) + 1, width: (bin.high - bin.low) * size - 2, y: y(high), height: (high - low) * size };
    return drawn("rect", { class: kind, ...box }, drawn("title", {}, words));
  };
  const bars = bins
    .filter((bin) => bin.accuracy != null)
    .flatMap((bin) => [
      rect(bin, before ? "accuracy before" : "accuracy", 0, Math.max(1 / size, bin.accuracy)),
      rect(bin, "gap", Math.min(bin.accuracy, bin.confidence), Math.max(bin.accuracy, bin.confidence)),
    ]);
  const ticks = [0, 0.5, 1].flatMap((share) => [
    drawn("text", { x: left - 5, y: y(share) + 4, "text-anchor": "end" }, `${100 * share}`),
    drawn("text", { x: x(share), y: top + size + 15, "text-anchor": "middle" }, `${100 * share}`),
  ]);
  const upwards = { "text-anchor": "middle", transform: `rotate(-90 10 ${y(0.5)})` };
  return drawn(
    "svg",
    { class: "chart", viewBox: "0 0 300 292", role: "img", "aria-label": title },
    drawn("rect", { class: "axis", x: left, y: top, width: size, height: size }),
    ...bars,
    drawn("line", { class: "ideal", x1: left, y1: top + size, x2: left + size, y2: top }),
    ...ticks,
    drawn("text", { x: x(0.5), y: top + size + 30, "text-anchor": "middle" }, "confidence, %"),
    drawn("text", { x: 12, y: y(0.5), ...upwards }, "accuracy, %"),
  );
}
