"""Creates the registry, tokens and images that the tests of the service use."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from small_set import ingest_parts, make_bundle, small_config

from focus_ray.bundle.bundle import MANIFEST, manifest_hash
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


def name_data_set(registry: Path, team: str, uri: object) -> None:
    """Writes another data set into the published manifest of a team's gear, as whoever may write its folder can."""
    folder = registry / team / "gear"
    manifest_file, record_file = folder / "v0001" / MANIFEST, folder / "_published" / "v0001.json"
    manifest = json.loads(manifest_file.read_text())
    manifest["data"]["uri"] = uri
    manifest["sha256"] = manifest_hash(manifest)
    manifest_file.write_text(json.dumps(manifest))
    record_file.write_text(json.dumps({**json.loads(record_file.read_text()), "sha256": manifest["sha256"]}))
