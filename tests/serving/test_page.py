"""The page in a real browser: from the token to a finding, by mouse and by keyboard, at a desk and on a phone."""

from __future__ import annotations

import json
import os
import shutil
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import uvicorn
from serving_set import Plant, make_plant
from waiting import wait_for

from focus_ray.serving.api import create_api
from focus_ray.serving.scorer import Scorer
from focus_ray.serving.service import Service
from focus_ray.serving.settings import parse_settings

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
DRIVER = shutil.which("chromedriver")
pytestmark = [
    pytest.mark.cluster,
    pytest.mark.skipif(not (CHROMIUM and DRIVER), reason="there is no chromium with chromedriver here"),
]


@pytest.fixture(scope="module")
def plant(tmp_path_factory: pytest.TempPathFactory) -> Plant:
    return make_plant(tmp_path_factory.mktemp("plant"))


@pytest.fixture(scope="module")
def url(plant: Plant) -> Iterator[str]:
    settings = parse_settings({"registry": plant.registry, "tokens": plant.tokens, "examples": True})
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        server = uvicorn.Server(
            uvicorn.Config(create_api(Service(settings, Scorer(settings.pool, "cpu"))), log_level="warning")
        )
        thread = threading.Thread(target=server.run, args=([listener],))
        thread.start()
        try:
            yield f"http://127.0.0.1:{listener.getsockname()[1]}"
        finally:
            server.should_exit = True
            thread.join()


def start_browser(profile: Path, width: int, height: int) -> Any:
    from selenium import webdriver

    options = webdriver.ChromeOptions()
    options.binary_location = str(CHROMIUM)
    flags = "headless=new no-sandbox disable-gpu no-first-run disable-background-networking disable-component-update"
    for flag in (*flags.split(), "disable-sync", f"user-data-dir={profile}", f"window-size={width},{height}"):
        options.add_argument(f"--{flag}")
    options.add_argument("--use-fake-ui-for-media-stream")
    options.add_argument("--use-fake-device-for-media-stream")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    options.add_experimental_option("prefs", {"download.default_directory": str(profile / "downloads")})
    if width < 500:
        metrics = {"width": width, "height": height, "pixelRatio": 2.0, "touch": True}
        options.add_experimental_option("mobileEmulation", {"deviceMetrics": metrics})
    return webdriver.Chrome(options=options, service=webdriver.ChromeService(str(DRIVER)))


def until(claim: Any, what: str) -> None:
    wait_for(claim, 30.0, what, 0.05)


@pytest.mark.parametrize(("name", "width", "height"), [("desk", 1280, 1000), ("phone", 390, 844)])
def test_from_the_token_to_a_finding(
    url: str, plant: Plant, tmp_path: Path, name: str, width: int, height: int
) -> None:
    from selenium.webdriver.common.keys import Keys

    paths = []
    for number, content in enumerate([*plant.images[:2], b"no image"]):
        paths.append(tmp_path / f"part{number}.png")
        paths[-1].write_bytes(content)
    browser = start_browser(tmp_path / "profile", width, height)

    def find(selector: str) -> Any:
        return browser.find_element("css selector", selector)

    def all_of(selector: str) -> list[Any]:
        return list(browser.find_elements("css selector", selector))

    try:
        browser.get(url)
        until(lambda: "Enter your team's token" in find("#status").text, "the page asks for a token")
        find("#token").send_keys("frs_wrong", Keys.ENTER)
        until(lambda: "401" in find("#status").text, "a wrong token is told")
        find("#token").clear()
        find("#token").send_keys(plant.press, Keys.ENTER)
        until(lambda: "2 categories" in find("#status").text, "the right token opens")
        assert [option.text for option in all_of("#category option")] == ["board", "gear"]
        find("#category").send_keys("gear")
        until(lambda: "latest (v0001)" in find("#version").text, "the versions of gear are shown")
        time.sleep(0.3)  # its card
        find("#files").send_keys("\n".join(str(path) for path in paths))
        until(lambda: "422" in find("#list").text, "the last one is told to be no image")
        assert all("score" in find(f"#list li:nth-child({number})").text for number in (1, 2))
        # by keyboard: back to the first image, then the threshold down to nothing
        find("#list li:nth-child(3) button").send_keys(Keys.ARROW_UP)
        find("#list li:nth-child(2) button").send_keys(Keys.ARROW_UP)
        until(lambda: find("#verdict").text.startswith("part0.png"), "arrow keys walk through the list")
        above = int(find("#overlay").get_attribute("data-above"))
        find("#threshold").send_keys(Keys.HOME)
        until(lambda: int(find("#overlay").get_attribute("data-above")) > above, "a lower threshold marks more")
        find("#reset").send_keys(Keys.ENTER)
        until(lambda: int(find("#overlay").get_attribute("data-above")) == above, "the calibrated threshold is back")
        assert "calibration scores" in find("#histogram").get_attribute("aria-label")
        until(lambda: len(all_of("#examples img")) == 6, "good examples are shown")
        find("#save-json").send_keys(Keys.ENTER)
        saved = tmp_path / "profile" / "downloads" / "part0.png.json"
        until(saved.is_file, "the finding is saved")
        assert json.loads(saved.read_text())["version"] == "v0001"
        find("#save-png").send_keys(Keys.ENTER)
        until((saved.parent / "part0.png.overlay.png").is_file, "the overlay is saved")
        wide = browser.execute_script("return document.documentElement.scrollWidth - window.innerWidth")
        assert wide <= 0, "nothing sticks out sideways"
        find("#camera").click()
        until(lambda: find("#capture").is_displayed(), "the camera opens")
        until(lambda: browser.execute_script("return document.getElementById('video').videoWidth") > 0, "it sees")
        find("#capture").click()
        until(lambda: "score" in all_of("#list li")[-1].text, "its picture is inspected")
        find("#camera-off").click()
        folder = os.environ.get("FOCUS_RAY_SCREENSHOTS")
        if folder:
            browser.execute_script("document.querySelector('#list li button').click(); window.scrollTo(0, 0)")
            full = browser.execute_script("return document.documentElement.scrollHeight")
            clip = {"x": 0, "y": 0, "width": width, "height": full, "scale": 1}
            shot = browser.execute_cdp_cmd("Page.captureScreenshot", {"captureBeyondViewport": True, "clip": clip})
            import base64

            (Path(folder) / f"{name}.png").write_bytes(base64.b64decode(shot["data"]))
        broken = [
            line for line in browser.get_log("browser") if "401" not in line["message"] and "422" not in line["message"]
        ]
        assert broken == []  # no error of a script, nothing that the content policy refused
    finally:
        browser.quit()
