// From a model file and an image file to colours over the image.
import * as ort from './node_modules/onnxruntime-web/dist/ort.wasm.min.mjs';
import { readMetadata } from './metadata.js';

ort.env.wasm.proxy = true; // in a worker: the page stays usable while the model runs

const find = (selector) => document.querySelector(selector);
const canvas = find('canvas');
let session, info, bitmap, overlay;

async function loadModel(file) {
  session?.release();
  session = null;
  say(`Loading ${file.name} ...`);
  const bytes = new Uint8Array(await file.arrayBuffer());
  info = readMetadata(bytes);
  if (String(info.outputs) != 'labels') {
    throw Error(`${file.name} is no segmentor that overlock export wrote without --logits.`);
  }
  session = await ort.InferenceSession.create(bytes);
  say(`${file.name}: ${info.classes.length} classes. Choose an image.`);
}

async function loadImage(file) {
  bitmap = overlay = null;
  find('main').hidden = true;
  // turned as the camera says, and with the values of the file
  bitmap = await createImageBitmap(file, { colorSpaceConversion: 'none' }).catch(() => {
    throw Error(`${file.name} is not an image that this browser can read.`);
  });
  find('main').hidden = false;
  find('ul').replaceChildren();
  draw();
  say(`${file.name}: ${bitmap.width} x ${bitmap.height}. Choose a model.`);
}

async function predict() {
  if (!session || !bitmap) return;
  say('Predicting ...');
  const start = performance.now();
  const [height, width] = inputSize();
  const input = new ort.Tensor('float32', inputValues(height, width), [1, 3, height, width]);
  const { labels } = await session.run({ image: input });
  show(labels.data, height, width);
  say(`Predicted in ${((performance.now() - start) / 1000).toFixed(1)} s.`);
}

// The size in which the model sees the image, as in onnx_segmentation.py.
function inputSize() {
  if (info.shape) return info.shape;
  let [width, height] = info.scale ?? [bitmap.width, bitmap.height];
  if (info.keep_ratio) {
    const [long, short] = [bitmap.width, bitmap.height].sort((a, b) => b - a);
    const factor = Math.min(Math.max(width, height) / long, Math.min(width, height) / short);
    [width, height] = [bitmap.width * factor, bitmap.height * factor];
  }
  const factor = Math.max(1, info.smallest_side / Math.min(width, height));
  const multiple = info.size_divisor;
  return [height, width].map(
    (side) => Math.ceil(Math.floor(side * factor + 0.5) / multiple) * multiple);
}

// The image in the size of the model, normalised: all of a channel, then the next one.
function inputValues(height, width) {
  const context = new OffscreenCanvas(bitmap.width, bitmap.height).getContext('2d');
  context.drawImage(bitmap, 0, 0);
  const pixels = context.getImageData(0, 0, bitmap.width, bitmap.height).data;
  const values = new Float32Array(3 * height * width);
  const rows = places(height, bitmap.height), columns = places(width, bitmap.width);
  for (let channel = 0, i = 0; channel < 3; channel++) {
    const source = info.channels == 'bgr' ? 2 - channel : channel;
    const mean = info.mean[channel], std = info.std[channel];
    const at = (y, x) => pixels[4 * (y * bitmap.width + x) + source];
    for (const [y0, y1, down] of rows) {
      for (const [x0, x1, right] of columns) {
        const above = at(y0, x0) * (1 - right) + at(y0, x1) * right;
        const below = at(y1, x0) * (1 - right) + at(y1, x1) * right;
        values[i++] = (Math.round(above * (1 - down) + below * down) - mean) / std;
      }
    }
  }
  return values;
}

// For bilinear interpolation: the two neighbours of each new pixel, and the second's weight.
function places(count, size) {
  return Array.from({ length: count }, (_, i) => {
    const place = Math.min(Math.max(((i + 0.5) * size) / count - 0.5, 0), size - 1);
    const first = Math.floor(place);
    return [first, Math.min(first + 1, size - 1), place - first];
  });
}

// Colour the image by its labels, which are resized to it, and list the classes.
function show(labels, height, width) {
  const picture = new ImageData(bitmap.width, bitmap.height);
  const counts = new Map();
  for (let y = 0, i = 0; y < bitmap.height; y++) {
    const row = Math.floor(((y + 0.5) * height) / bitmap.height) * width;
    for (let x = 0; x < bitmap.width; x++, i += 4) {
      const label = labels[row + Math.floor(((x + 0.5) * width) / bitmap.width)];
      picture.data.set(info.palette[label], i);
      picture.data[i + 3] = 255;
      counts.set(label, (counts.get(label) ?? 0) + 1);
    }
  }
  overlay = new OffscreenCanvas(bitmap.width, bitmap.height);
  overlay.getContext('2d').putImageData(picture, 0, 0);
  draw();
  const found = [...counts].sort((a, b) => b[1] - a[1]);
  find('ul').replaceChildren(...found.map(([label, count]) => {
    const item = document.createElement('li'), share = document.createElement('b');
    const swatch = document.createElement('i');
    swatch.style.background = `rgb(${info.palette[label]})`;
    share.textContent = `${((100 * count) / (bitmap.width * bitmap.height)).toFixed(1)} %`;
    item.append(swatch, info.classes[label], share);
    return item;
  }));
}

function draw() {
  canvas.width = bitmap.width;
  canvas.height = bitmap.height;
  const context = canvas.getContext('2d');
  context.drawImage(bitmap, 0, 0);
  context.globalAlpha = find('#opacity').value;
  if (overlay) context.drawImage(overlay, 0, 0);
}

function say(text, isError = false) {
  find('#status').textContent = text;
  find('#status').className = isError ? 'error' : '';
}

// One after the other, in the order in which files are chosen.
let last = Promise.resolve();
function whenChosen(selector, load) {
  find(selector).addEventListener('change', ({ target }) => {
    const [file] = target.files;
    if (!file) return;
    last = last.then(() => load(file)).then(predict).catch((error) => say(error.message, true));
  });
}

whenChosen('#model', loadModel);
whenChosen('#image', loadImage);
find('#opacity').addEventListener('input', () => bitmap && draw());
say('Choose a model and an image.');
