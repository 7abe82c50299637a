// The calculator of the HTML report. ATTENTION, which report/calculator.py writes, holds the laws; here they are asked.
"use strict";

// into how many parts FlashAttention-2 cuts the keys of each row: Splits in attnlib/variants/sdpa_laws.py
function splits(tiles, seqLen, headDim, units) {
  const f32 = Math.fround;
  const blocks = Math.ceil(seqLen / (headDim <= 64 ? 256 : headDim <= 128 ? 128 : 64));
  if (f32(tiles) >= f32(f32(0.8) * f32(2 * units))) return 1;
  const counts = new Map();
  for (let n = Math.min(128, 2 * units, blocks); n > 0; n--) counts.set(Math.ceil(blocks / n), n);
  const parts = [...counts.values()].sort((a, b) => a - b);
  const filled = parts.map((n) => {
    const wave = f32(f32(tiles * n) / f32(2 * units));
    return f32(wave / Math.ceil(wave));
  });
  const most = Math.max(...filled);
  return parts[filled.findIndex((share) => share >= 0.85 * most)];
}

const sum = (terms) => Object.values(terms).reduce((total, bytes) => total + bytes, 0);

// all that a variant's law says of a shape {batch, heads, seqLen, headDim, dtype, causal}, in bytes, and the least ms it can take
function bill(name, shape) {
  const {formulas, rates} = ATTENTION.variants[name];
  const [gpu, threads, multiprocessors] = ATTENTION.units;
  const {batch, heads, seqLen, headDim, dtype, causal} = shape;
  const size = ATTENTION.sizes[dtype];
  const switches = [Number(causal), gpu, Number(dtype !== "float32")];
  const found = formulas(batch, heads, seqLen, headDim, size, ...switches, threads, multiprocessors);
  const highest = (moments) =>
    Object.entries(moments).map(([at, terms]) => ({at, terms, bytes: sum(terms)})).reduce((a, b) => (b.bytes > a.bytes ? b : a));
  const [saved, forward, backward] = [found.saved, found.forward_peak, found.backward_peak].map(highest);
  const inputs = 3 * batch * heads * seqLen * headDim * size;
  const fastest = (phase) => Math.max(found.work[phase] / rates[dtype] / 1e9, found.moved[phase] / ATTENTION.copy / 1e6);
  return {
    saved: saved.bytes, forward: forward.bytes, backward: backward.bytes, inputs,
    top: backward.bytes > forward.bytes ? backward : forward,
    inference: inputs + forward.bytes, training: inputs + Math.max(forward.bytes, backward.bytes),
    fastest: {forward: fastest("forward"), backward: fastest("backward")},
  };
}

// the largest N for which "inference" or "training" needs at most so many bytes: attnlib.memory.fit
function largest(name, shape, use, memory) {
  let [low, high] = [0, 1e12 - 1];
  while (low < high) {
    const middle = Math.floor((low + high) / 2);
    if (memory < bill(name, {...shape, seqLen: middle + 1})[use]) high = middle;
    else low = middle + 1;
  }
  return low;
}

const whole = (n) => n.toLocaleString("en");
const bytes = (n) => {
  const power = n < 1024 ? 0 : Math.min(4, Math.floor(Math.log2(n) / 10));
  return `${(n / 1024 ** power).toLocaleString("en", {maximumSignificantDigits: 4})} ${["B", "KiB", "MiB", "GiB", "TiB"][power]}`;
};
const ms = (n) => (Number.isFinite(n) ? `${n.toLocaleString("en", {maximumSignificantDigits: 3})} ms` : "–");

function calculator(place) {
  const options = (values, chosen) =>
    values.map((one) => `<option${one === chosen ? " selected" : ""}>${one}</option>`).join("");
  const integer = (name, label, value, least, most) =>
    `<label>${label}<input type="number" name="${name}" value="${value}" min="${least}" max="${most}" step="1" inputmode="numeric" required></label>`;
  const memory = Math.floor(ATTENTION.memory / 2 ** 30 * 10) / 10;
  const form = document.createElement("form");
  form.setAttribute("aria-label", "Calculator: what attention needs, by the laws");
  form.innerHTML = `<div class="asked">
    ${integer("batch", "batch B", 8, 1, 4096)}${integer("heads", "heads H", 1, 1, 4096)}
    ${integer("seqLen", "sequence length N", 16384, 2, 1e9)}
    <label>head dimension D<select name="headDim">${options(ATTENTION.headDims, 64)}</select></label>
    <label>type<select name="dtype">${options(Object.keys(ATTENTION.sizes), "float32")}</select></label>
    <label>memory, GiB<input type="number" name="memory" value="${memory}" min="0.1" max="1048576" step="any" inputmode="decimal" required></label>
    <label class="tick"><input type="checkbox" name="causal"> causal</label></div>
    <output></output>
    <div class="wide"><table><thead><tr><th scope="col">variant</th><th scope="col">saved</th><th scope="col">forward peak</th>
    <th scope="col">backward peak</th><th scope="col">in all, training</th><th scope="col">largest N, training</th>
    <th scope="col">largest N, inference</th><th scope="col">forward, lower bound</th><th scope="col">backward, lower bound</th></tr></thead>
    <tbody></tbody></table></div>
    <p class="moment">In all: the inputs q, k, v and the higher peak. A lower bound is weaker than chapter 1’s floor: the larger
    of two times, of all products of the pass at the fastest rate, and of all its bytes at the fastest copy of any size, that
    ${ATTENTION.name} has shown; a dash where no law counts what a program writes. Dilated attention is not in this table.</p>
    <p class="refused"></p>
    <label class="of">What fills the memory of <select name="variant">${options(Object.keys(ATTENTION.variants), "naive")}</select></label>
    <ul class="terms"></ul>
    <p class="moment summed"></p>`;
  const find = (selector) => form.querySelector(selector);

  function show() {
    if (!form.checkValidity()) {
      find("output").textContent = "Whole numbers above zero, please.";
      for (const place of ["tbody", ".refused", ".terms", ".summed"]) find(place).textContent = "";
      return;
    }
    const field = (name) => form.elements[name];
    const shape = {dtype: field("dtype").value, causal: field("causal").checked};
    for (const name of ["batch", "heads", "seqLen", "headDim"]) shape[name] = Number(field(name).value);
    // what is shown is rounded: as long as nobody changes it, it means the machine's own
    const room = Number(field("memory").value) === memory ? ATTENTION.memory : Number(field("memory").value) * 2 ** 30;
    const refusal = (name) => ATTENTION.variants[name].refused[shape.dtype][shape.headDim];
    const names = Object.keys(ATTENTION.variants);
    const able = names.filter((name) => !refusal(name));
    const rows = able.map((name) => {
      const [need, training, inference] =
        [bill(name, shape), ...["training", "inference"].map((use) => largest(name, shape, use, room))];
      return {name, need, training, inference};
    });
    find("tbody").innerHTML = rows.map(({name, need, training, inference}) =>
      `<tr${need.training > room ? ' class="over"' : ""}><th scope="row"><code>${name}</code></th>` +
      [bytes(need.saved), bytes(need.forward), bytes(need.backward), bytes(need.training), whole(training),
       whole(inference), ms(need.fastest.forward), ms(need.fastest.backward)]
        .map((text) => `<td>${text}</td>`).join("") + "</tr>").join("");
    const fits = rows.filter((row) => row.need.training <= room).length;
    const best = rows.filter(({name}) => name !== "tiled" || rows.length === 1).reduce((a, b) => (b.training > a.training ? b : a));
    find("output").textContent = `${fits} of ${rows.length} train at N = ${whole(shape.seqLen)} in ` +
      `${whole(Number(field("memory").value))} GiB; ${best.name} gets furthest, to N = ${whole(best.training)}.`;
    find(".refused").textContent = names.filter(refusal).map((name) => `${name}: ${refusal(name)}.`).join(" ");

    const name = field("variant").value;
    const {top, inputs, training} = bill(name, shape);
    const terms = Object.entries({"q, k, v": inputs, ...top.terms}).filter(([, held]) => held);
    find(".terms").innerHTML = refusal(name) ? "" : terms.map(([term, held]) =>
      `<li><span>${term}</span><span>${bytes(held)}</span><i style="width: ${100 * held / training}%"></i></li>`).join("");
    find(".summed").textContent = refusal(name) ? `${name} cannot be asked: ${refusal(name)}.` :
      `${bytes(training)} in all, at the moment of “${top.at}”.`;
  }
  form.addEventListener("input", show);
  form.addEventListener("submit", (event) => event.preventDefault());
  place.prepend(form);
  place.classList.add("live");
  show();
}

if (typeof document !== "undefined") document.querySelectorAll(".calculator").forEach(calculator);
