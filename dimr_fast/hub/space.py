"""Write the files that make a folder with a model a Hugging Face Space."""

import sys
from importlib import metadata
from pathlib import Path

import yaml

from dimr_fast.errors import DataUnavailableError

MODEL = "model"
"""Folder of the model within a Space."""

APP = f'''"""Serve the model in the folder {MODEL}/ as a page."""

from pathlib import Path

from dimr_fast.web import WebConfig, web

if __name__ == "__main__":
    # The Hub forwards requests from outside its container to this port.
    web(WebConfig(checkpoint=Path("{MODEL}"), port=7860), address="0.0.0.0")
'''

README = """\
---
{metadata}---

# {title}

A [DiMR](https://arxiv.org/abs/2406.09416) diffusion model that draws images in the browser. The
folder `{model}` holds the model and [its card]({model}/README.md). To run the page on your own
machine, in a copy of this folder:

```sh
pip install -r requirements.txt
python app.py
```
"""


def require_gradio() -> str:
    """Return the version of Gradio; raise DataUnavailableError where it is missing."""
    try:
        return metadata.version("gradio")
    except metadata.PackageNotFoundError as error:
        raise DataUnavailableError("the gradio package", "web") from error


def write_space(folder: Path, title: str, license: str | None = None) -> None:
    """Write `app.py`, `requirements.txt` and `README.md` with the metadata of a Space to `folder`.

    The model is expected in its folder `MODEL`. The Space gets the versions of Python, Gradio and
    dimr_fast that are in use here. Raises DataUnavailableError where Gradio is missing.
    """
    version = metadata.version("dimr_fast")
    values = {
        "title": title,
        "sdk": "gradio",
        "sdk_version": require_gradio(),
        "python_version": f"{sys.version_info.major}.{sys.version_info.minor}",
        "app_file": "app.py",
        "license": license,
        "tags": ["dimr", "diffusion", "image-generation"],
    }
    known = {name: value for name, value in values.items() if value is not None}
    text = yaml.safe_dump(known, sort_keys=False, allow_unicode=True)
    readme = README.format(metadata=text, title=title, model=MODEL)
    (folder / "README.md").write_text(readme, encoding="utf-8")
    (folder / "requirements.txt").write_text(f"dimr_fast[web]=={version}\n")
    (folder / "app.py").write_text(APP)
