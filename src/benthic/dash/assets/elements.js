// Making elements, and writing numbers.

const SVG = "http://www.w3.org/2000/svg";

function fill(element, attributes, children) {
  for (const [name, value] of Object.entries(attributes)) {
    if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
    else if (value === true) element.setAttribute(name, "");
    else if (value !== false && value !== null && value !== undefined) element.setAttribute(name, value);
  }
  element.append(...children);
  return element;
}

export const html = (tag, attributes = {}, ...children) => fill(document.createElement(tag), attributes, children);
export const svg = (tag, attributes = {}, ...children) => fill(document.createElementNS(SVG, tag), attributes, children);

const digits = (value, most) => value.toLocaleString("en", { maximumFractionDigits: most });
const places = (value) => (value >= 100 ? 0 : value >= 10 ? 1 : 2);

export function seconds(value) {
  if (value < 1) return `${digits(value * 1e3, places(value * 1e3))} ms`;
  return `${digits(value, places(value))} s`;
}
export const share = (value) => `${digits(value * 100, value < 0.1 && value > 0 ? 1 : 0)} %`;
export const count = (value) => digits(value, 0);
export const rate = (value) => digits(value, value < 10 ? 1 : 0);
export const bound = (value, low, high) => Math.min(Math.max(value, low), high);

// The tooltip: one for the whole page, placed so that it stays inside the window.
export const tip = {
  show(content, x, y) {
    const box = document.getElementById("tip");
    box.replaceChildren(content);
    box.hidden = false;
    const { width, height } = box.getBoundingClientRect();
    const left = x + 16 + width > innerWidth ? x - 16 - width : x + 16;
    const top = y + 18 + height > innerHeight ? y - 12 - height : y + 18;
    box.style.left = `${bound(left, 4, innerWidth)}px`;
    box.style.top = `${bound(top, 4, innerHeight)}px`;
  },
  hide() {
    document.getElementById("tip").hidden = true;
  },
};
