"""tve-hf explain."""

import argparse
import logging
import signal
import sys
import threading
import time
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from pathlib import PurePath
from typing import Any, NoReturn

from ..bulk.ahead import num_workers
from ..compatibility import quality_in_words
from ..files import Unwritable, dumps
from ..messages import message, verified
from .ahead import Item, batches, decoded, explained
from .data_sets import DataSetRun
from .inputs import Source, sources_of
from .models import load_pipeline, without_warnings
from .options import PIPELINE_OPTIONS, options_of
from .outputs import check_folder, places_of, save
from .parser import INTERRUPTED, TERMINATED


def explain(arguments: list[str]) -> int:
    """Explain images, by a picture for each class and a JSON with the raw maps; or a data set, by shards of maps."""
    args = options_of(explain).parse_args(arguments)
    start = time.perf_counter()
    if args.batch_size < 1:
        raise ValueError(f"--batch-size is {args.batch_size}; give at least 1.")
    check_folder(args.output)
    options = {name: getattr(args, name) for name in PIPELINE_OPTIONS if getattr(args, name) is not None}
    options |= ({"smooth": False} if args.blocky else {}) | ({"max_size": None} if args.full_size else {})
    with _hushed(args.quiet), _stopped_by_terminate():
        run = DataSetRun(args) if args.dataset_name or args.data_files else PictureRun(args)
        with _without_bars():
            explainer = load_pipeline(args.model, args.classifier, args.device, args.dtype, options)
        if explainer.has_explainer and not (args.json or args.quiet or args.method):
            print(quality_in_words(explainer.quality))
        try:
            with without_warnings("transformers.pipelines"):  # asks for one call on a GPU, where batches are as fast
                run.go(explainer)
        except Unwritable as error:
            print(message(error, full=args.traceback), file=sys.stderr)
            return run.stopped(1)
        except KeyboardInterrupt as stop:
            print("tve-hf: interrupted.", file=sys.stderr)
            return run.stopped(TERMINATED if isinstance(stop, _Terminated) else INTERRUPTED)
    return run.ended(time.perf_counter() - start)


def _example() -> Source:
    try:
        from skimage import data
    except ImportError:
        raise ValueError(
            "No image was given, and the example photograph of scikit-image is not installed; "
            "pass an image, or run `pip install tve_hf[demo]`."
        ) from None
    # A cat, CC0.
    return Source("chelsea.png", data.chelsea(), PurePath("chelsea.png"), "skimage.data.chelsea")


@contextmanager
def _hushed(quiet: bool) -> Iterator[None]:
    """If quiet, without any warning and without bars; without bars too where nobody looks at them."""
    names = ("tve_hf", "transformers") if quiet else ()
    levels = {name: logging.getLogger(name).level for name in names}
    for name in names:
        logging.getLogger(name).setLevel(logging.ERROR)
    try:
        with _without_bars() if quiet or not sys.stderr.isatty() else nullcontext():
            yield
    finally:
        for name, level in levels.items():
            logging.getLogger(name).setLevel(level)


@contextmanager
def _without_bars() -> Iterator[None]:
    """Without the bars of transformers, of which some show how weights are loaded."""
    from transformers.utils import logging as transformers_logging

    had_bars = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        if had_bars:
            transformers_logging.enable_progress_bar()


class _Terminated(KeyboardInterrupt):
    """SIGTERM, as `timeout` and batch systems send it."""


@contextmanager
def _stopped_by_terminate() -> Iterator[None]:
    """Let SIGTERM end a run as Ctrl-C does, after what is being written."""

    def stop(*_: Any) -> NoReturn:
        raise _Terminated

    if threading.current_thread() is not threading.main_thread():  # the only one to which signals come
        yield
        return
    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


class PictureRun:
    """Explain all images, and say what became of each, in their order."""

    def __init__(self, args: argparse.Namespace):
        self.args = args
        self.sources = sources_of(args.images, args.images_from) or [_example()]
        self.places = places_of(args.output, self.sources)
        self.finished = 0
        self._behind: deque[tuple[Item, Future | Exception]] = deque()

    def go(self, explainer: Any) -> None:
        """Raise Unwritable, KeyboardInterrupt or BrokenPipeError where that ends the run before its last image."""
        from tqdm.auto import tqdm

        size = min(self.args.batch_size, len(self.sources))
        hidden = self.args.quiet or len(self.sources) == 1 or not sys.stderr.isatty()
        pool = ThreadPoolExecutor(num_workers())
        # On a CPU the model already takes all cores: drawing beside it slows both by more than it saves.
        waiting = 0 if explainer.device.type == "cpu" else size
        try:
            with tqdm(total=len(self.sources), unit="image", disable=hidden) as self._bar:
                for batch in batches(decoded(pool, self.sources, 2 * size), size):
                    for item, outcome in zip(batch, explained(explainer, batch), strict=True):
                        self._behind.append((item, self._saving(pool, item, outcome)))
                    self._report(waiting)
                self._report(0)
        finally:
            # What is being written is finished, and nothing more begun.
            pool.shutdown(cancel_futures=True)

    def _saving(self, pool: ThreadPoolExecutor, item: Item, outcome: Any) -> Future | Exception:
        if isinstance(outcome, Exception):
            return outcome
        return pool.submit(save, item.source, outcome, self.places[item.index], self.args.plain)

    def _report(self, number: int) -> None:
        """Report images in order until no more than a number of them wait, and on, as long as one is done."""
        while self._behind:
            item, outcome = self._behind[0]
            if len(self._behind) <= number and isinstance(outcome, Future) and not outcome.done():
                return
            self._behind.popleft()
            error = outcome if isinstance(outcome, Exception) else outcome.exception()
            if isinstance(outcome, Future) and error is None:
                self.finished += 1
                self._say(outcome.result())
            elif isinstance(error, Exception) and not isinstance(error, Unwritable):  # the others are still explained
                self._bar.write(message(error, item.source.name, self.args.traceback), file=sys.stderr)
            elif error is not None:
                raise error
            self._bar.update()

    def _say(self, record: dict[str, Any]) -> None:
        if self.args.json:
            lines = [dumps(record)]
        elif self.args.quiet:
            return
        else:
            lines = []
            for result in record["explanations"]:
                method, rule = result.get("method", self.args.method), result.get("rule")
                how = ", ".join(([method] if method not in (None, "tve") else []) + ([f"rule {rule}"] if rule else []))
                lines.append(
                    f"{record['image']}: {result['label']} ({result['score']:.1%}) -> {result['picture']} [{how}]"
                )
                if "verification" in result:
                    lines.append(verified(result))
        self._bar.write("\n".join(lines))
        sys.stdout.flush()  # whoever reads it need not wait for the last image

    def stopped(self, code: int) -> int:
        """Say how far the run came, and return the exit code."""
        print(f"{self.finished} of {len(self.sources)} images are done; their files are whole.", file=sys.stderr)
        return code

    def ended(self, seconds: float) -> int:
        """Say how many images are explained, and return the exit code."""
        if not (self.args.json or self.args.quiet):
            print(f"{self.finished} of {len(self.sources)} images in {seconds:.2f} s, loading the models included")
        return 0 if self.finished == len(self.sources) else 1
