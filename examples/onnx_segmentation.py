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

size = info['scale'] or image.size
if info['keep_ratio']:
    size = np.multiply(image.size, min(np.divide(sorted(size), sorted(image.size))))
size = np.multiply(size, max(1, (info['smallest_side'] or 0) / min(size)))
size = np.ceil(np.floor(size + 0.5) / info['size_divisor']) * info['size_divisor']
height, width = info['shape'] or map(int, size[::-1])
whole = (0, 0, *image.size)  # bilinear as in OpenCV; Image.resize would smooth the image
resized = image.transform((width, height), Image.EXTENT, whole, Image.BILINEAR)
pixels = np.float32(resized)[..., :: -1 if info['channels'] == 'bgr' else 1]
pixels = (pixels - np.float32(info['mean'])) / np.float32(info['std'])
(labels,) = session.run(None, {'image': pixels.transpose(2, 0, 1)[None]})

label_map = Image.fromarray(labels[0]).resize(image.size, Image.NEAREST)
label_map.putpalette(np.uint8(info['palette']).tobytes())
label_map.save(out_path)
shares = np.bincount(np.ravel(label_map)) / (image.width * image.height)
for i in np.argsort(-shares)[: np.count_nonzero(shares)]:
    print(f'{shares[i]:6.1%}  {info["classes"][i]}')
