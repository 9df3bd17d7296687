"""Explain a photograph by an ONNX file of `tve-hf export`, without torch: red supports the class, blue opposes it."""

import argparse
import json

import numpy as np
import onnxruntime
from PIL import Image


def main(model: str, photo: str, output: str) -> None:
    session = onnxruntime.InferenceSession(model, providers=["CPUExecutionProvider"])
    config = json.loads(session.get_modelmeta().custom_metadata_map["config.json"])
    if config["crop"] == "other":
        raise SystemExit(f"{model} has an image processor that this example does not know; see its config.json.")
    image = Image.open(photo).convert("RGB")
    (height, width), (left, top, right, bottom) = config["image_size"], (0.0, 0.0, *map(float, image.size))
    if config["crop"]:  # a share of the largest box of the model's shape in the middle
        scale = config["crop"] * min(image.width / width, image.height / height)
        left, right = (image.width - scale * width) / 2, (image.width + scale * width) / 2
        top, bottom = (image.height - scale * height) / 2, (image.height + scale * height) / 2
    resample = Image.Resampling(config["image_processor"].get("resample", Image.Resampling.BILINEAR))
    pixels = np.asarray(image.resize((width, height), resample, (left, top, right, bottom)), np.float32) / 255
    pixels = (pixels - np.float32(config["image_mean"])) / np.float32(config["image_std"])
    _, classes, scores, maps = session.run(config["outputs"], {"pixel_values": pixels.transpose(2, 0, 1)[None]})

    scaled = maps[0, 0] / max(np.abs(maps[0, 0]).max(), 1e-12)  # (rows, cols) within -1 and 1
    box = tuple(map(round, (left, top, right, bottom)))
    size = box[2] - box[0], box[3] - box[1]
    strength = np.asarray(Image.fromarray(scaled).resize(size, Image.Resampling.BILINEAR))[..., None]
    grey = np.asarray(image.convert("L").crop(box), np.float32)[..., None]
    color = np.where(strength > 0, np.float32([214, 47, 39]), np.float32([33, 102, 172]))
    image.paste(Image.fromarray((grey + np.abs(strength) * (color - grey)).astype(np.uint8)), box[:2])
    image.save(output)
    print(f"{config['labels'][classes[0, 0]]} ({scores[0, 0]:.1%}) -> {output}, {config['unit']}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    for name in ("model", "photo", "output"):
        parser.add_argument(name)
    main(**vars(parser.parse_args()))
