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
size = info['shape'][::-1] if info['shape'] else info['scale'] or image.size
if info['keep_ratio']:
    order = list if info['shape'] else sorted
    size = np.multiply(image.size, min(np.divide(order(size), order(image.size))))
size = np.multiply(size, max(1, (info['smallest_side'] or 0) / min(size)))
size = np.int64(size + 0.5).tolist()
padded = Image.new('RGB', (info['shape'] or size[::-1])[::-1], (124, 116, 104))
padded.paste(image.transform(size, Image.EXTENT, (0, 0, *image.size), Image.BILINEAR))
pixels = np.float32(padded)[..., :: -1 if info['channels'] == 'bgr' else 1]
pixels = (pixels - np.float32(info['mean'])) / np.float32(info['std'])
pixels = pixels.transpose(2, 0, 1)[None]
boxes, scores, labels, *masks = session.run(None, {'image': pixels})
draw = ImageDraw.Draw(image)
for i in np.flatnonzero(scores >= 0.3):
    x0, y0, x1, y1 = np.rint(boxes[i] * np.tile(np.divide(image.size, size), 2))
    tag = f'{info["classes"][labels[i]]} {scores[i]:.2f}'
    color = tuple(info['palette'][labels[i]])
    print(f'{tag}  x {x0:.0f}..{x1:.0f}  y {y0:.0f}..{y1:.0f}')
    if masks:  # probabilities inside of the box
        inside = int(max(x1 - x0, 1)), int(max(y1 - y0, 1))
        mask = np.array(Image.fromarray(masks[0][i]).resize(inside, Image.BILINEAR))
        image.paste(color, (int(x0), int(y0)), Image.fromarray(np.uint8(mask >= 0.5) * 128))
    draw.rectangle((x0, y0, x1, y1), outline=color, width=max(2, image.width // 400))
    draw.text((x0, y0), tag, font_size=8 + image.width // 80, stroke_width=2, stroke_fill=0)
image.save(out_path)
