"""A process that has transformers, but neither this package nor what only it needs."""

import os
import subprocess
import sys
from importlib import metadata
from pathlib import Path

from packaging.requirements import Requirement

STRANGER = """
import json
import sys
import numpy as np
from PIL import Image
from transformers import pipeline
model, classifier, image, trust = sys.argv[1:]
kwargs = {"trust_remote_code": True} if trust == "trust" else {}
explain = pipeline("transferable-attribution", model=model, classifier=classifier, **kwargs)
(result,) = explain(Image.open(image), verify=8)
print(json.dumps({"attribution": result["attribution"].tolist(), "module": type(explain).__module__}))
"""


def link_packages(folder: Path) -> Path:
    """Make an environment of transformers, torch, pillow and what they require: links to the installed packages."""
    wanted, seen = ["transformers", "torch", "pillow"], set()
    while wanted:
        name = wanted.pop()
        try:
            distribution = metadata.distribution(name)
        except metadata.PackageNotFoundError:
            continue  # required on other platforms
        if distribution.name in seen:
            continue
        seen.add(distribution.name)
        for text in distribution.requires or []:
            requirement = Requirement(text)
            if requirement.marker is None or requirement.marker.evaluate({"extra": ""}):
                wanted.append(requirement.name)
        for top in {file.parts[0] for file in distribution.files or []} - {"..", "__pycache__"}:
            link = folder / top
            if not link.exists():
                link.symlink_to(distribution.locate_file(top))
    assert {"transformers", "torch", "PIL"} <= {path.name for path in folder.iterdir()}
    assert not {"tve_hf", "accelerate", "datasets", "scipy"} & {path.name for path in folder.iterdir()}
    return folder


def explain_elsewhere(
    site: Path, model: object, classifier: Path, image: Path, cache: Path, trust: bool = True, **environment: str
) -> subprocess.CompletedProcess:
    """Explain an image there; the last line printed is JSON with the attribution and the pipeline's module."""
    environment = {
        "PATH": os.environ["PATH"],
        "PYTHONPATH": str(site),
        "HF_HOME": str(cache),
        "HF_MODULES_CACHE": str(cache / "modules"),
        "HF_HUB_OFFLINE": "1",
    } | environment
    arguments = [str(model), str(classifier), str(image), "trust" if trust else ""]
    return subprocess.run(
        [sys.executable, "-S", "-c", STRANGER, *arguments], capture_output=True, text=True, env=environment, cwd=cache
    )
