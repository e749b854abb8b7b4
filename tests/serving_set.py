"""Creates the registry, tokens and images that the tests of the service use."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from small_set import ingest_parts, make_bundle, small_config

from focus_ray.bundle.registry import Registry
from focus_ray.data.read import read_rows
from focus_ray.serving.tokens import create_token

PRESS, MILL = "press", "mill"


@dataclass(frozen=True)
class Plant:
    """A registry with small models of two teams, and a token of each kind.

    Team press has the categories gear and board. Team mill has only gear.
    """

    registry: str
    bundles: dict[str, str]
    data: str
    tokens: str
    press: str
    press_inspect_only: str
    press_admin: str
    mill: str
    images: list[bytes]

    def headers(self, token: str) -> dict[str, str]:
        return {"authorization": f"Bearer {token}", "content-type": "image/png"}


def make_plant(folder: Path) -> Plant:
    data = ingest_parts(folder)
    plain = {"image_alignment": {"group": "none"}}
    bundles = {
        "gear": make_bundle(small_config(data, folder / "runs", model=plain), "gear"),
        "board": make_bundle(small_config(data, folder / "runs", data={"categories": ["board"]}), "board"),
    }
    registry = Registry(folder / "registry")
    for bundle in bundles.values():
        registry.publish(bundle, PRESS, aliases=["production"])
    registry.publish(bundles["gear"], MILL)
    tokens = str(folder / "tokens.yaml")
    return Plant(
        registry=registry.root,
        bundles=bundles,
        data=data,
        tokens=tokens,
        press=create_token(tokens, PRESS, ["inspect", "read"])[0],
        press_inspect_only=create_token(tokens, PRESS, ["inspect"])[0],
        press_admin=create_token(tokens, PRESS, ["admin", "read", "inspect"])[0],
        mill=create_token(tokens, MILL, ["inspect", "read"])[0],
        images=[row["image"] for row in read_rows(data, "gear", range(8), ("image",))],
    )
