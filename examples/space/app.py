"""A page on which visitors see why an image classifier decided as it did; made for a Space of the Hub.

pip install -r requirements.txt && python app.py
"""

import logging
from collections.abc import Callable
from functools import wraps
from html import escape
from pathlib import Path
from typing import Any

import gradio as gr
from answers import (
    CLIP,
    FROM_HUB,
    PROMPTS,
    SHIPPED,
    SIGNS,
    Answer,
    compare,
    draw,
    explain,
    files,
    remove,
    shipped,
    trust,
)
from gradio_client.utils import is_http_url_like
from huggingface_hub import constants
from PIL import Image
from skimage import data

from tve_hf.messages import is_expected, sentence

MAX_FILE = 20 * 2**20  # bytes of an image
MAX_WAITING, MAX_VISITORS, KEPT_SECONDS = 20, 100, 3600  # in the queue; whose answers are kept, and how long

TITLE, DROP = "Why did this classifier say that?", "Drop an image file here to upload"
# They come with scikit-image: the first two are CC0, the third is in the public domain.
EXAMPLES = {"A cat": data.chelsea, "A coffee": data.coffee, "An astronaut": data.astronaut}

ALERT = "color: #991b1b; background: #fef2f2; padding: 8px 12px; border-radius: 6px; overflow-wrap: anywhere"
# The colours of Gradio's own theme have too little contrast for many.
_SUBDUED = ("body_text_color_subdued", "block_info_text_color", "block_label_text_color", "block_title_text_color")
THEME = gr.themes.Default().set(
    **{f"{name}{mode}": f"*neutral_{shade}" for name in _SUBDUED for mode, shade in (("", 600), ("_dark", 300))},
    button_primary_background_fill="*primary_700",
    button_primary_background_fill_hover="*primary_800",
    button_primary_background_fill_dark="*primary_700",
    button_primary_background_fill_hover_dark="*primary_800",
)

logger = logging.getLogger(__name__)


def upload() -> gr.Image:
    """A place for an image that is opened by `answers.photograph` alone, and not fetched from an address."""
    image = gr.Image(type="filepath", label="Image", sources=["upload", "clipboard"], height=300, placeholder=DROP)
    move = image.async_move_resource_to_block_cache

    async def move_files_alone(path: Any) -> str | None:
        if is_http_url_like(str(path)):
            raise gr.Error("Addresses of images are not fetched; save the image and drop its file.")
        return await move(path)

    # On this one component: a subclass makes Gradio write a stub beside this file.
    image.preprocess = lambda payload: None if payload is None else payload.path
    image.async_move_resource_to_block_cache = move_files_alone
    return image


def said(function: Callable, number: int) -> Callable:
    """Let what goes wrong be a sentence on the page: an output before the `number` of the function's own."""

    @wraps(function)
    def speaking(first: Any, *others: Any) -> tuple:
        path = first.path if isinstance(first, Answer) else first
        try:
            found = function(first, *others)
        except Exception as error:  # a stranger's model may raise anything; what is unforeseen is logged in full
            text = sentence(error)
            if not is_expected(error):
                logger.exception("unexpected")
                text = f"This model failed in a way that was not foreseen ({type(error).__name__}); try another."
            # A visitor knows the file by its name only.
            text = escape(text.replace(str(path), Path(str(path)).name))
            return f'<p role="alert" style="{ALERT}">{text}</p>', *[gr.skip()] * number
        return "", *(found if number > 1 else [found])

    return speaking


def explained(*asked: Any) -> tuple[Answer, Any, Any]:
    """`answers.explain`, and what the choice of a class shows then."""
    answer = explain(*asked)
    choices = [(f"{one['label']}: {one['score']:.1%}", k) for k, one in enumerate(answer.explanations)]
    return answer, gr.Radio(choices, value=0, visible=True), gr.Column(visible=True)


def page() -> gr.Blocks:
    """Lay out the page: what is asked on the left, what is found on the right, or below it on a phone."""
    own = shipped()
    with gr.Blocks(title=TITLE, delete_cache=(600, KEPT_SECONDS)) as blocks:
        gr.Markdown(f"# {TITLE}\nThe map shows which patches speak for a class (red) and which against it (blue).")
        answer = gr.State(time_to_live=KEPT_SECONDS)
        with gr.Row():
            with gr.Column(min_width=300):
                image = upload()
                gr.Examples(
                    [[Image.fromarray(photo())] for photo in EXAMPLES.values()], image, example_labels=[*EXAMPLES]
                )
                source = gr.Radio([SHIPPED, FROM_HUB, PROMPTS], value=SHIPPED, label="Classifier")
                shipped_name = gr.Dropdown(own, value=own[0], label="Name of the shipped classifier")
                repository = gr.Textbox(CLIP, label="Name on the Hub", max_length=200, visible=False)
                prompts = gr.Textbox("a cat\na dog", label="Prompts, one a line", lines=3, visible=False)
                passes = gr.Slider(0, 200, 0, step=8, label="Masked passes that refine the map")
                unexplained, ask = gr.HTML(padding=False), gr.Button("Explain", variant="primary")
            with gr.Column(min_width=300, scale=2):
                chosen = gr.Radio([("none yet", 0)], value=0, label="Class to explain", visible=False)
                with gr.Column(visible=False) as found:
                    picture = gr.HTML()
                    with gr.Row():
                        opacity = gr.Slider(0, 100, 65, step=5, label="Opacity in percent")
                        sign = gr.Radio([*SIGNS], value=next(iter(SIGNS)), label="Patches that are coloured")
                        smooth = gr.Checkbox(True, label="Smooth")
                    words = gr.Markdown()
                    with gr.Row():
                        as_picture, as_map = (
                            gr.DownloadButton("Download the picture"),
                            gr.DownloadButton("Download the map"),
                        )
                    gr.Markdown("## Does it matter to the classifier?")
                    percent = gr.Slider(
                        0, 100, 20, step=10, label="Percent of the patches to remove, most relevant first"
                    )
                    unremoved, fall, removed = gr.HTML(padding=False), gr.Markdown(), gr.HTML()
                    gr.Markdown(
                        "## What do other methods say?\nThe fidelity gap says how much more the probability falls "
                        "without the most relevant patches than with nothing else; higher is better."
                    )
                    rivals, uncompared, others = gr.Button("Compare"), gr.HTML(padding=False), gr.HTML()

        boxes = [shipped_name, repository, prompts]
        source.change(
            lambda chosen: [
                gr.update(visible=chosen in shown) for shown in ([SHIPPED], [FROM_HUB, PROMPTS], [PROMPTS])
            ],
            source,
            boxes,
            queue=False,
        )
        one_at_a_time: dict[str, Any] = {"concurrency_id": "model", "concurrency_limit": 1}
        asked = [image, source, *boxes, passes]
        gr.on(
            [ask.click, repository.submit],
            said(explained, 3),
            asked,
            [unexplained, answer, chosen, found],
            **one_at_a_time,
        )
        changes = [answer.change, chosen.input]
        looks = [answer, chosen, opacity, sign, smooth]
        latest: dict[str, Any] = {"trigger_mode": "always_last"}  # of a slider's moves, of which keys release none
        gr.on([*changes, opacity.input, sign.input, smooth.input], draw, looks, picture, **latest)
        gr.on(changes, trust, [answer, chosen], words)
        gr.on(changes, files, [answer, chosen], [as_picture, as_map])
        gr.on(changes, lambda: ("", ""), outputs=[uncompared, others], queue=False)
        gr.on(
            [*changes, percent.input],
            said(remove, 2),
            [answer, chosen, percent],
            [unremoved, removed, fall],
            **one_at_a_time,
            **latest,
        )
        rivals.click(said(compare, 1), [answer, chosen], [uncompared, others], **one_at_a_time)
    return blocks.queue(max_size=MAX_WAITING)


def main(**launching: Any) -> Any:
    """Serve the page; what `launch` returns."""
    constants.HF_HUB_DISABLE_IMPLICIT_TOKEN = True  # a secret of the Space opens nothing for its visitors
    return page().launch(
        max_file_size=MAX_FILE,
        state_session_capacity=MAX_VISITORS,
        show_error=False,
        theme=THEME,
        footer_links=[],
        run_history=False,
        **launching,
    )


if __name__ == "__main__":
    main()
