"""The page of the Space: asked through its API, and used in a browser as visitors do."""

import json
import re
import shutil
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from types import SimpleNamespace

import pytest
from hub_server import User
from huggingface_hub import constants
from scripts import EXAMPLES, load_example
from shipped import CNN, VIT, VIT_PETS
from tiny import noise_image

pytest.importorskip("gradio", reason="needs `pip install .[space]`")

from gradio_client import Client, handle_file
from gradio_client.exceptions import AppError
from huggingface_hub.utils import httpx

AXE = Path(sys.prefix) / "node_modules" / "axe-core" / "axe.min.js"  # where `make test-extras` puts it


@pytest.fixture(scope="module")
def served():
    """The page, served by this process: its modules, and its address."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(EXAMPLES / "space")
        patch.setenv("GRADIO_ANALYTICS_ENABLED", "False")
        patch.setattr(constants, "HF_HUB_DISABLE_IMPLICIT_TOKEN", False)  # and so again afterwards
        app = load_example("space/app")
        answers = sys.modules["answers"]
        patch.setattr(answers, "MODELS", answers.Models(2))
        _, address, _ = app.main(prevent_thread_lock=True, quiet=True)
        yield SimpleNamespace(app=app, answers=answers, address=address)
        app.gr.close_all()


@pytest.fixture(scope="module")
def client(served) -> Client:
    return Client(served.address, verbose=False)


@pytest.fixture
def photo(tmp_path) -> str:
    noise_image(3, (96, 64)).save(tmp_path / "photo.png")
    return str(tmp_path / "photo.png")


def ask(client: Client, image, source="A shipped classifier", own=VIT.name, repository="", prompts="", passes=0):
    """The sentence of what went wrong, if anything did, and the choice of classes."""
    return client.predict(image, source, own, repository, prompts, passes, api_name="/explained")[:2]


def test_classes_and_what_they_show(client, served, photo):
    sentence, classes = ask(client, handle_file(photo))
    assert sentence == ""
    assert len(classes["choices"]) == served.answers.TOP_K
    html = client.predict(0, 65, "For and against", True, api_name="/draw")
    assert html.startswith('<img alt="Map of ')
    picture, record = client.predict(0, api_name="/files")
    assert Path(picture).suffix == ".png" and json.loads(Path(record).read_text())["class_idx"] >= 0
    _, _, text = client.predict(0, 30, api_name="/remove")
    assert "Without the most relevant 30 %" in text
    assert "LeGrad: fidelity gap" in client.predict(0, api_name="/compare")[1]


def test_errors_are_sentences_that_name_the_file_and_no_folder(client, served, tmp_path):
    broken = tmp_path / "<b>broken.jpg"
    broken.write_bytes(b"no image")
    sentence, _ = ask(client, handle_file(str(broken)))
    assert re.search(r'role="alert".*broken.jpg&#x27; is corrupt', sentence)
    assert "/tmp" not in sentence and "<b>" not in sentence
    sentence, _ = ask(client, None)
    assert "There is no image" in sentence


def test_the_unforeseen_is_a_sentence_too(client, photo, served, monkeypatch):
    monkeypatch.setattr(served.answers, "_check_size", lambda name: 1 / 0)
    monkeypatch.setattr(served.answers, "MODELS", served.answers.Models(1))
    sentence, _ = ask(client, handle_file(photo))
    assert "not foreseen (ZeroDivisionError)" in sentence


def test_images_are_not_fetched_from_addresses(client):
    asked = []

    class Server(BaseHTTPRequestHandler):
        def do_GET(self):
            asked.append(self.path)

        do_HEAD = do_GET

    with HTTPServer(("127.0.0.1", 0), Server) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        with pytest.raises(AppError, match="Addresses of images are not fetched"):
            ask(client, handle_file(f"http://127.0.0.1:{server.server_port}/secret.png"))
        server.shutdown()
    assert asked == []


def test_files_of_the_machine_are_out_of_reach(served, tmp_path):
    noise_image(0).save(tmp_path / "secret.png")
    address = f"{served.address.rstrip('/')}/gradio_api/call/explained"
    image = {"path": str(tmp_path / "secret.png"), "meta": {"_type": "gradio.FileData"}}
    event = httpx.post(address, json={"data": [image, "A shipped classifier", VIT.name, "", "", 0]}).json()["event_id"]
    assert "event: error" in httpx.get(f"{address}/{event}", timeout=60).text
    found = httpx.get(f"{served.address.rstrip('/')}/gradio_api/file={tmp_path / 'secret.png'}")
    assert found.status_code in (403, 404)


def test_private_repositories_stay_private_though_the_server_has_a_token(client, photo, hub, monkeypatch):
    hub.add("org/private", {path.name: path.read_bytes() for path in VIT.iterdir()}, private=True)
    hub.users["hf_owner"] = User("someone", orgs={"org": "write"})
    monkeypatch.setenv("HF_TOKEN", "hf_owner")
    sentence, _ = ask(client, handle_file(photo), "A name on the Hub", repository="org/private")
    assert "org/private" in sentence


def test_ten_visitors_at_once(served, photo):
    # However slow the machine.
    visitors = [Client(served.address, verbose=False, httpx_kwargs={"timeout": 600}) for _ in range(10)]
    names = [VIT.name, VIT_PETS.name, CNN.name, *[VIT.name, VIT_PETS.name] * 4][:10]
    with ThreadPoolExecutor(10) as pool:
        asked = [
            pool.submit(ask, visitor, handle_file(photo), own=name, passes=8 * (name == CNN.name))
            for visitor, name in zip(visitors, names, strict=True)
        ]
        assert all(len(each.result()[1]["choices"]) >= 2 for each in asked)
    assert len(served.answers.MODELS.kept) <= 2


# --- in a browser ---------------------------------------------------------------------------------------------------


@pytest.fixture
def browser(tmp_path):
    """Headless Chromium, as wide as a desktop: a program of the system, which pip cannot install."""
    webdriver = pytest.importorskip("selenium.webdriver", reason="needs selenium")
    programs = [
        next(filter(None, map(shutil.which, names)), None)
        for names in (("chromium", "google-chrome"), ("chromedriver",))
    ]
    if None in programs:
        pytest.skip("needs chromium and chromedriver")
    options = webdriver.ChromeOptions()
    options.binary_location = programs[0]
    for argument in ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage", "--window-size=1280,1000"):
        options.add_argument(argument)
    options.add_experimental_option("prefs", {"download.default_directory": str(tmp_path / "downloads")})
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(programs[1]))
    driver.set_script_timeout(120)
    driver.downloads = tmp_path / "downloads"
    yield driver
    driver.quit()


def until(browser, condition, seconds: float = 180):
    from selenium.webdriver.support.ui import WebDriverWait

    return WebDriverWait(browser, seconds).until(condition)


def text_of(browser) -> str:
    return browser.find_element("tag name", "body").text


def button(browser, text: str):
    return until(browser, lambda b: next((x for x in b.find_elements("tag name", "button") if x.text == text), None))


def upload(browser, path: str) -> None:
    button(browser, "Explain")
    browser.find_element("css selector", "input[type=file]").send_keys(path)
    until(
        browser,
        lambda b: (
            b.find_elements("css selector", "button[aria-label='Remove Image']")
            or b.find_elements("css selector", "button[aria-label='Clear']")
        ),
    )


def violations(browser) -> list[str]:
    """What axe-core finds, by its rules' names and the elements."""
    browser.execute_script(AXE.read_text())
    found = browser.execute_async_script("axe.run().then(arguments[arguments.length - 1])")["violations"]
    return [f"{rule['id']}: {node['html']}" for rule in found for node in rule["nodes"]]


@pytest.mark.slow
def test_upload_and_result(browser, served, photo):
    browser.get(served.address)
    upload(browser, photo)
    button(browser, "Explain").click()
    until(browser, lambda b: "the probability of" in text_of(b))
    pictures = {image.get_attribute("alt"): image for image in browser.find_elements("css selector", "img[alt]")}
    (drawn,) = (image for text, image in pictures.items() if text.startswith("Map of "))
    assert drawn.size["width"] > 90
    assert "held-out images" in text_of(browser)
    for name, file in (("Download the picture", "explanation.png"), ("Download the map", "explanation.json")):
        button(browser, name).click()
        until(browser, lambda b, file=file: (browser.downloads / file).exists())


@pytest.mark.slow
def test_a_broken_file_is_a_sentence_and_the_next_one_is_explained(browser, served, photo, tmp_path):
    (tmp_path / "broken.png").write_bytes(b"no image")
    browser.get(served.address)
    upload(browser, str(tmp_path / "broken.png"))
    button(browser, "Explain").click()
    until(browser, lambda b: "'broken.png' is corrupt" in text_of(b))
    assert "is corrupt" in browser.find_element("css selector", "[role=alert]").text
    assert AXE.exists() is False or violations(browser) == []
    browser.get(served.address)
    upload(browser, photo)
    button(browser, "Explain").click()
    until(browser, lambda b: "the probability of" in text_of(b))


@pytest.mark.slow
def test_keys_alone_suffice(browser, served):
    from selenium.webdriver.common.action_chains import ActionChains
    from selenium.webdriver.common.keys import Keys

    def press(*keys: str) -> None:
        ActionChains(browser).send_keys(*keys).perform()

    def go_to(name: str) -> None:
        for _ in range(60):
            press(Keys.TAB)
            if browser.switch_to.active_element.accessible_name == name:
                return
        pytest.fail(f"no way to {name!r} by the tabulator")

    browser.get(served.address)
    button(browser, "Explain")
    go_to("A cat")
    press(Keys.ENTER)
    until(browser, lambda b: b.find_elements("css selector", "img[src*=gradio_api]"))
    go_to("Explain")
    press(Keys.ENTER)
    until(browser, lambda b: "Without the most relevant 20 %" in text_of(b))
    go_to("range slider for Percent of the patches to remove, most relevant first")
    press(Keys.ARROW_RIGHT)
    until(browser, lambda b: "Without the most relevant 30 %" in text_of(b))


@pytest.mark.slow
@pytest.mark.parametrize("theme", ["light", "dark"])
@pytest.mark.parametrize("width", [1280, 390])
def test_nothing_stands_in_the_way_of_people(browser, served, photo, theme, width):
    phone = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 500}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", phone)
    browser.get(f"{served.address}?__theme={theme}")
    button(browser, "Explain")
    assert violations(browser) == []
    upload(browser, photo)
    button(browser, "Explain").click()
    until(browser, lambda b: "the probability of" in text_of(b))
    button(browser, "Compare").click()
    until(browser, lambda b: "Grad-CAM: fidelity gap" in text_of(b))
    assert violations(browser) == []
    assert browser.execute_script("return document.documentElement.scrollWidth") <= width
