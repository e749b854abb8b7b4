"""The page in a real browser: from the token to a finding, by mouse and by keyboard, at a desk and on a phone, by its camera."""

from __future__ import annotations

import io
import json
import shutil
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image
from serving_set import PRESS, TwoTeams, create_open_settings, create_service, create_settings, run_server
from waiting import wait_for

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
DRIVER = shutil.which("chromedriver")
pytestmark = [
    pytest.mark.cluster,
    pytest.mark.skipif(not (CHROMIUM and DRIVER), reason="there is no chromium with chromedriver here"),
]


@pytest.fixture(scope="module")
def url(plant: TwoTeams) -> Iterator[str]:
    with run_server(create_service(create_settings(plant, examples={PRESS: [plant.data]}))) as place:
        yield place


DESK, PHONE = (1280, 1000), (390, 844)
IN_USE = "return document.getElementById('video').srcObject.getVideoTracks()[0].label"
WORD = "return document.querySelector('#sign b')?.textContent"
WIDTH_OUTSIDE = "return document.documentElement.scrollWidth - window.innerWidth"
FAKE_CAMERA = ("--use-fake-ui-for-media-stream", "--use-fake-device-for-media-stream")
TWO_CAMERAS = (FAKE_CAMERA[0], f"{FAKE_CAMERA[1]}=device-count=2")


def start_browser(profile: Path, width: int, height: int, camera: Sequence[str], **prefs: Any) -> Any:
    """Starts chromium with a window of this size; `open_page` explains the other arguments."""
    from selenium import webdriver

    options = webdriver.ChromeOptions()
    options.binary_location = str(CHROMIUM)
    flags = "headless=new no-sandbox disable-gpu no-first-run disable-background-networking disable-component-update"
    for flag in (*flags.split(), "disable-sync", f"user-data-dir={profile}", f"window-size={width},{height}"):
        options.add_argument(f"--{flag}")
    for flag in camera:
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    preferences = {name.replace("__", "."): value for name, value in prefs.items()}
    options.add_experimental_option("prefs", {"download.default_directory": str(profile / "downloads"), **preferences})
    if width < 500:
        metrics = {"width": width, "height": height, "pixelRatio": 2.0, "touch": True}
        options.add_experimental_option("mobileEmulation", {"deviceMetrics": metrics})
    return webdriver.Chrome(options=options, service=webdriver.ChromeService(str(DRIVER)))


def wait_until(claim: Any, event: str) -> None:
    wait_for(claim, 60.0, event, 0.05)


@contextmanager
def open_page(place: str, folder: Path, size: tuple[int, int], camera: Sequence[str], **prefs: Any) -> Iterator[Any]:
    """A browser that shows the page. Args: camera: flags of chromium. prefs: its preferences, with __ for a dot."""
    browser = start_browser(folder / "profile", *size, camera, **prefs)
    try:
        browser.get(place)
        yield browser
    finally:
        browser.quit()


def test_a_service_that_is_open_to_all_opens_without_a_token(plant: TwoTeams, tmp_path: Path) -> None:
    (tmp_path / "part.png").write_bytes(plant.images[0])
    service = create_service(create_open_settings(plant))
    with run_server(service) as place, open_page(place, tmp_path, DESK, FAKE_CAMERA) as browser:
        wait_until(lambda: browser.find_elements("css selector", "#category option"), "the categories are there")
        assert not browser.find_element("id", "token-row").is_displayed()
        wait_until(lambda: "latest" in browser.find_element("id", "version").text, "the version is shown")
        browser.find_element("id", "files").send_keys(str(tmp_path / "part.png"))
        wait_until(lambda: "score" in browser.find_element("id", "list").text, "the image is inspected")


@pytest.mark.parametrize("size", [DESK, PHONE])
def test_a_user_gets_from_the_token_to_a_result(
    url: str, plant: TwoTeams, tmp_path: Path, size: tuple[int, int]
) -> None:
    from selenium.webdriver.common.keys import Keys

    paths = []
    for number, content in enumerate([*plant.images[:2], b"no image"]):
        paths.append(tmp_path / f"part{number}.png")
        paths[-1].write_bytes(content)

    def find(selector: str) -> Any:
        return browser.find_element("css selector", selector)

    def all_of(selector: str) -> list[Any]:
        return list(browser.find_elements("css selector", selector))

    with open_page(url, tmp_path, size, FAKE_CAMERA) as browser:
        wait_until(lambda: "Enter your team's token" in find("#status").text, "the page asks for a token")
        find("#token").send_keys("frs_wrong", Keys.ENTER)
        wait_until(lambda: "401" in find("#status").text, "a wrong token is told")
        find("#token").clear()
        find("#token").send_keys(plant.press, Keys.ENTER)
        wait_until(lambda: "2 categories" in find("#status").text, "the right token opens")
        assert [option.text for option in all_of("#category option")] == ["board", "gear"]
        find("#category").send_keys("gear")
        wait_until(lambda: "latest (v0001)" in find("#version").text, "the versions of gear are shown")
        time.sleep(0.3)  # its card
        find("#files").send_keys("\n".join(str(path) for path in paths))
        wait_until(lambda: "422" in find("#list").text, "the last one is told to be no image")
        assert all("score" in find(f"#list li:nth-child({number})").text for number in (1, 2))
        # by keyboard: back to the first image, then the threshold down to nothing
        find("#list li:nth-child(3) button").send_keys(Keys.ARROW_UP)
        find("#list li:nth-child(2) button").send_keys(Keys.ARROW_UP)
        wait_until(lambda: find("#verdict").text.startswith("part0.png"), "arrow keys walk through the list")
        above = int(find("#overlay").get_attribute("data-above"))
        find("#threshold").send_keys(Keys.HOME)
        wait_until(lambda: int(find("#overlay").get_attribute("data-above")) > above, "a lower threshold marks more")
        find("#reset").send_keys(Keys.ENTER)
        wait_until(
            lambda: int(find("#overlay").get_attribute("data-above")) == above, "the calibrated threshold is back"
        )
        assert "calibration scores" in find("#histogram").get_attribute("aria-label")
        wait_until(lambda: len(all_of("#examples img")) == 6, "good examples are shown")
        find("#save-json").send_keys(Keys.ENTER)
        saved = tmp_path / "profile" / "downloads" / "part0.png.json"
        wait_until(saved.is_file, "the finding is saved")
        assert json.loads(saved.read_text())["version"] == "v0001"
        find("#save-png").send_keys(Keys.ENTER)
        wait_until((saved.parent / "part0.png.overlay.png").is_file, "the overlay is saved")
        assert browser.execute_script(WIDTH_OUTSIDE) <= 0
        open_camera(browser)
        find("#capture").click()
        wait_until(lambda: "score" in all_of("#list li")[-1].text, "its picture is inspected")
        find("#camera-off").click()
        browser.execute_script("document.querySelector('#list li button').click(); window.scrollTo(0, 0)")
        messages = [line["message"] for line in browser.get_log("browser")]
        # no error of a script, and nothing that the content policy refused
        assert [message for message in messages if "401" not in message and "422" not in message] == []


# the camera, as a file that chromium plays in a loop


def draw_good_part(plant: TwoTeams) -> NDArray[np.uint8]:
    """(480, 480, 3)"""
    picture = Image.open(io.BytesIO(plant.images[0])).convert("RGB")
    return np.asarray(picture.resize((480, 480), Image.Resampling.BICUBIC))


def draw_defective_part(plant: TwoTeams) -> NDArray[np.uint8]:
    """The good part, with stripes on a quarter of it."""
    picture = draw_good_part(plant).copy()
    picture[120:360, 120:360] = np.where(np.arange(240)[:, None, None] // 30 % 2, 255, 0)
    return picture


def write_film(path: Path, frames: Sequence[NDArray[np.uint8]], a_second: int) -> Path:
    """Frames (H, W, 3) of RGB as uncompressed video: Y4M, 4:2:0, BT.601 in its narrow range."""
    height, width = frames[0].shape[:2]
    with path.open("wb") as stream:
        stream.write(f"YUV4MPEG2 W{width} H{height} F{a_second}:1 Ip A1:1 C420\n".encode())
        for frame in frames:
            red, green, blue = np.moveaxis(frame / 255, 2, 0)
            luma = 0.299 * red + 0.587 * green + 0.114 * blue
            planes = [16 + 219 * luma]
            for colour, scale in ((blue, 1.772), (red, 1.402)):
                small = ((colour - luma) / scale).reshape(height // 2, 2, width // 2, 2).mean(axis=(1, 3))
                planes.append(128 + 224 * small)
            stream.write(b"FRAME\n" + b"".join(plane.round().astype(np.uint8).tobytes() for plane in planes))
    return path


@contextmanager
def open_gear_page(
    url: str, plant: TwoTeams, folder: Path, size: tuple[int, int], camera: Sequence[str], **prefs: Any
) -> Iterator[Any]:
    """A browser in which the service is opened, and gear chosen."""
    from selenium.webdriver.common.keys import Keys

    with open_page(url, folder, size, camera, **prefs) as browser:
        token = browser.find_element("id", "token")
        wait_until(token.is_displayed, "the page asks for a token")
        token.send_keys(plant.press, Keys.ENTER)
        wait_until(lambda: "2 categories" in browser.find_element("id", "status").text, "the token opens")
        browser.find_element("id", "category").send_keys("gear")
        wait_until(lambda: "latest" in browser.find_element("id", "version").text, "gear is shown")
        time.sleep(0.3)  # its card
        yield browser


def open_camera(browser: Any) -> None:
    browser.find_element("id", "camera").click()
    wait_until(
        lambda: browser.execute_script("return document.getElementById('video').videoWidth") > 0, "the camera sees"
    )


@pytest.mark.parametrize(("part", "word"), [(draw_good_part, "OK"), (draw_defective_part, "NG")])
@pytest.mark.parametrize("size", [DESK, PHONE])
def test_a_picture_of_a_good_part_is_ok_and_of_a_bad_one_is_not(
    url: str, plant: TwoTeams, tmp_path: Path, part: Any, word: str, size: tuple[int, int]
) -> None:
    film = write_film(tmp_path / "part.y4m", [part(plant)] * 4, 4)
    camera = (*FAKE_CAMERA, f"--use-file-for-fake-video-capture={film}")
    with open_gear_page(url, plant, tmp_path, size, camera) as browser:
        open_camera(browser)
        browser.find_element("id", "capture").click()
        sign = browser.find_element("id", "sign")
        wait_until(sign.is_displayed, "there is a verdict")
        assert sign.find_element("css selector", "b").text == word
        assert ("anomalous" in browser.find_element("id", "verdict").text) == (word == "NG")
        assert "480 x 480" in browser.find_element("id", "facts").text
        assert browser.execute_script(WIDTH_OUTSIDE) <= 0


def test_a_picture_every_half_second_shows_both_verdicts_and_lists_the_anomalous_ones(
    url: str, plant: TwoTeams, tmp_path: Path
) -> None:
    film = write_film(tmp_path / "parts.y4m", [draw_good_part(plant)] * 6 + [draw_defective_part(plant)] * 6, 2)
    camera = (*FAKE_CAMERA, f"--use-file-for-fake-video-capture={film}")
    with open_gear_page(url, plant, tmp_path, PHONE, camera) as browser:
        open_camera(browser)
        browser.execute_script("document.getElementById('again-s').value = 0.5")
        browser.find_element("id", "again").click()
        for expected in ("OK", "NG", "OK", "NG"):
            wait_until(lambda expected=expected: browser.execute_script(WORD) == expected, f"the sign says {expected}")
        browser.find_element("id", "again").click()
        time.sleep(1.5)
        listed = browser.find_elements("css selector", "#list .anomalous")
        assert listed
        assert browser.find_elements("css selector", "#list .normal") == []
        time.sleep(1.0)
        assert len(browser.find_elements("css selector", "#list li")) == len(listed), "it has ended"
        browser.find_element("id", "camera-off").click()
        assert not browser.find_element("id", "sign").is_displayed()


def test_the_user_can_choose_a_camera(url: str, plant: TwoTeams, tmp_path: Path) -> None:
    with open_gear_page(url, plant, tmp_path, PHONE, TWO_CAMERAS) as browser:
        open_camera(browser)
        names = [option.text for option in browser.find_elements("css selector", "#camera-choice option")]
        assert len(set(names)) == 2
        other = next(name for name in names if name != browser.execute_script(IN_USE))
        browser.find_element("xpath", f"//option[text()='{other}']").click()
        wait_until(lambda: browser.execute_script(IN_USE) == other, "the other one is in use")
        assert browser.find_element("id", "camera-choice").get_attribute("value")


def test_pictures_continue_after_a_change_to_a_slow_camera(url: str, plant: TwoTeams, tmp_path: Path) -> None:
    with open_gear_page(url, plant, tmp_path, PHONE, TWO_CAMERAS) as browser:
        open_camera(browser)
        browser.execute_script(
            "const devices = navigator.mediaDevices, open = devices.getUserMedia.bind(devices);"
            "devices.getUserMedia = (asked) => new Promise((done) => setTimeout(done, 1500)).then(() => open(asked));"
            "document.getElementById('again-s').value = 0.5"
        )
        browser.find_element("id", "again").click()
        wait_until(lambda: browser.execute_script(WORD), "there is a verdict")
        before = browser.execute_script(IN_USE)
        other = browser.execute_script(
            "const choice = document.getElementById('camera-choice');"
            "choice.value = [...choice.options].find((one) => !one.selected).value;"
            "choice.dispatchEvent(new Event('change')); return choice.selectedOptions[0].text"
        )
        wait_until(lambda: browser.execute_script(IN_USE) == other != before, "the other one is in use")
        browser.execute_script("document.getElementById('sign').replaceChildren()")
        wait_until(lambda: browser.execute_script(WORD), "pictures are taken with it")


@pytest.mark.parametrize(
    ("camera", "prefs", "message"),
    [
        (
            FAKE_CAMERA[1:],
            {"profile__default_content_setting_values__media_stream_camera": 2},
            "may not use the camera: allow",
        ),
        (FAKE_CAMERA[:1], {}, "There is no camera here: plug one in"),
    ],
)
def test_a_camera_that_does_not_open_says_what_to_do(
    url: str, plant: TwoTeams, tmp_path: Path, camera: Sequence[str], prefs: dict[str, Any], message: str
) -> None:
    with open_gear_page(url, plant, tmp_path, PHONE, camera, **prefs) as browser:
        browser.find_element("id", "camera").click()
        wait_until(lambda: message in browser.find_element("id", "status").text, f"{message!r} is said")
        assert browser.find_element("id", "camera").is_displayed()
        assert not browser.find_element("id", "capture").is_displayed()
