"""Draw the objects in an image: python onnx_detection.py MODEL.onnx IMAGE OUT.png"""

import json
import sys

import numpy as np
import onnxruntime
from PIL import Image, ImageDraw, ImageOps

model_path, image_path, out_path = sys.argv[1:]
session = onnxruntime.InferenceSession(model_path)
info = {k: json.loads(v) for k, v in session.get_modelmeta().custom_metadata_map.items()}
if 'boxes' not in info.get('outputs', ()):
    sys.exit(f'{model_path} has the outputs {info.get("outputs")}, not boxes')
image = ImageOps.exif_transpose(Image.open(image_path)).convert('RGB')
longest, shortest = info['scale'] or (max(image.size), min(image.size))
factor = min(longest / max(image.size), shortest / min(image.size))
factor = max(factor, (info['smallest_side'] or 0) / min(image.size))
if info['shape']:  # the image fills it in one direction, the rest is black
    factor = min(np.divide(info['shape'], image.size[::-1]))
height, width = info['shape'] or (int(s * factor + 0.5) for s in image.size[::-1])
seen = np.divide((width, height), factor) if info['shape'] else np.array(image.size)
resized = image.transform((width, height), Image.EXTENT, (0, 0, *seen), Image.BILINEAR)
pixels = np.float32(resized)[..., :: -1 if info['channels'] == 'bgr' else 1]
pixels = (pixels - np.float32(info['mean'])) / np.float32(info['std'])
results = session.run(None, {'image': pixels.transpose(2, 0, 1)[None]})
found = dict(zip(info['outputs'], results, strict=True))
draw = ImageDraw.Draw(image)
for i in np.flatnonzero(found['scores'] >= 0.3):
    x0, y0, x1, y1 = np.rint(found['boxes'][i] * np.tile(seen / (width, height), 2))
    tag = f'{info["classes"][found["labels"][i]]} {found["scores"][i]:.2f}'
    color = tuple(info['palette'][found['labels'][i]])
    print(f'{tag}  x {x0:.0f}..{x1:.0f}  y {y0:.0f}..{y1:.0f}')
    if 'masks' in found:  # probabilities inside of the box
        size = int(max(x1 - x0, 1)), int(max(y1 - y0, 1))
        mask = np.array(Image.fromarray(found['masks'][i]).resize(size, Image.BILINEAR))
        image.paste(color, (int(x0), int(y0)), Image.fromarray(np.uint8(mask >= 0.5) * 128))
    draw.rectangle((x0, y0, x1, y1), outline=color, width=max(2, image.width // 400))
    draw.text((x0, y0), tag, font_size=8 + image.width // 80, stroke_width=2, stroke_fill=0)
image.save(out_path)
