// onnxruntime-web does not give the metadata of a model, so read them from the file:
// field 14 of ONNX's ModelProto holds pairs of a key (field 1) and a value (field 2).
// https://protobuf.dev/programming-guides/encoding/

/** The metadata of an ONNX file: an object of values, which `overlock export` wrote as JSON. */
export function readMetadata(bytes) {
  const text = new TextDecoder();
  const metadata = {};
  for (const [number, entry] of fields(bytes)) {
    if (number != 14) continue;
    const { 1: key, 2: value } = Object.fromEntries(fields(entry));
    try {
      metadata[text.decode(key)] = JSON.parse(text.decode(value));
    } catch {} // of another program
  }
  return metadata;
}

function* fields(bytes) {
  let place = 0;
  const readNumber = () => {
    for (let number = 0, unit = 1; place < bytes.length; unit *= 128) {
      const byte = bytes[place++];
      number += (byte % 128) * unit;
      if (byte < 128) return number;
    }
    throw Error('This is not all of the ONNX file.');
  };
  while (place < bytes.length) {
    const key = readNumber();
    const kind = key % 8;
    if (kind == 0) readNumber();
    else if (kind == 1) place += 8;
    else if (kind == 5) place += 4;
    else if (kind == 2) {
      const size = readNumber();
      yield [Math.floor(key / 8), bytes.subarray(place, (place += size))];
    } else throw Error('This is not an ONNX file.');
  }
  if (place > bytes.length) throw Error('This is not all of the ONNX file.');
}
