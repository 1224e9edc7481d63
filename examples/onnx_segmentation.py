"""Segment an image with an exported model; needs onnxruntime, numpy and Pillow.

python onnx_segmentation.py MODEL.onnx IMAGE LABELS.png
"""

import json
import sys

import numpy as np
import onnxruntime
from PIL import Image, ImageOps

model_path, image_path, out_path = sys.argv[1:]
session = onnxruntime.InferenceSession(model_path)
info = {k: json.loads(v) for k, v in session.get_modelmeta().custom_metadata_map.items()}
if info.get('outputs') != ['labels']:
    sys.exit(f'{model_path} has the outputs {info.get("outputs")}, not label maps')
image = ImageOps.exif_transpose(Image.open(image_path))
if image.mode.startswith(('I', 'F')):
    sys.exit(f'{image_path} has more than 8 bits per channel; save it with 8')
image = image.convert('RGB')

factor = min(np.divide(sorted(info['scale'] or image.size), sorted(image.size)))
factor = max(factor, (info['smallest_side'] or 0) / min(image.size))
height, width = info['shape'] or (int(s * factor + 0.5) for s in image.size[::-1])
# bilinear as in OpenCV; Image.resize would smooth the image
whole = (0, 0, *image.size)
resized = image.transform((width, height), Image.EXTENT, whole, Image.BILINEAR)
order = [2, 1, 0] if info['channels'] == 'bgr' else [0, 1, 2]
pixels = np.float32(resized)[..., order] - np.float32(info['mean'])
pixels = (pixels / np.float32(info['std'])).transpose(2, 0, 1)
(labels,) = session.run(None, {'image': pixels[None]})

label_map = Image.fromarray(labels[0]).resize(image.size, Image.NEAREST)
label_map.putpalette(np.uint8(info['palette']).tobytes())
label_map.save(out_path)
shares = np.bincount(np.ravel(label_map)) / (image.width * image.height)
for i in np.argsort(-shares)[: np.count_nonzero(shares)]:
    print(f'{shares[i]:6.1%}  {info["classes"][i]}')
