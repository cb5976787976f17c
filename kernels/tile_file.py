"""Measured tiles in a JSON file, a section for each GPU, release of Triton and state of these kernels.

{"format": 1, "sections": [{"device": "…", "triton": "3.8.0", "kernels": "<digest>", "tiles": {SITE: TILE, …}}, …]}
"""

import functools
import hashlib
import json
import os
import uuid
from pathlib import Path
from typing import Any

import torch
import triton

from anomem.kernels.tiles import Tile

FORMAT = 1


def read(path: Path, device: torch.device) -> dict[str, Tile]:
    """The tiles of a GPU, by the site's name.

    Raises:
        OSError: the file cannot be read.
        ValueError: it is no file of tiles.
        LookupError: it was measured elsewhere.
    """
    sections, wanted = _sections(path), identity(device)
    for section in sections:
        if _measured_for(section, wanted):
            return {name: _tile(values) for name, values in section["tiles"].items()}
    held = " and ".join(map(_described, sections)) or "nothing"
    raise LookupError(f"{path} has tiles for {held}, none for {_described(wanted)}")


def write(path: Path, device: torch.device, name: str, tile: Tile, milliseconds: float) -> None:
    """Add a tile to a file, which is either whole or not there; sections of others stay.

    Of two processes that write at the same time one may lose its addition, which is measured again some other time.

    Args:
        path: of the file.
        device: on which it was measured.
        name: of the site.
        tile: the fastest.
        milliseconds: its median.

    Raises:
        OSError: it cannot be written.
        ValueError: what stands there is no file of tiles, which is not overwritten.
    """
    wanted = identity(device)
    sections = _sections(path) if path.exists() else []
    mine = next((section for section in sections if _measured_for(section, wanted)), None)
    if mine is None:
        mine = {**wanted, "tiles": {}}
        # Another state of the kernels does not come back; another GPU or release of Triton may share the file.
        place = wanted["device"], wanted["triton"]
        sections = [*(other for other in sections if (other["device"], other["triton"]) != place), mine]
    mine["tiles"][name] = {**tile._asdict(), "milliseconds": milliseconds}
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
    try:
        temporary.write_text(json.dumps({"format": FORMAT, "sections": sections}, indent=1) + "\n", encoding="utf-8")
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def _measured_for(section: dict[str, Any], wanted: dict[str, str]) -> bool:
    return all(section[field] == value for field, value in wanted.items())


def _described(where: dict[str, Any]) -> str:
    return f"{where['device']} with Triton {where['triton']} and kernels {where['kernels']}"


def _sections(path: Path) -> list[dict[str, Any]]:
    """What a file holds; ValueError says what is wrong with it."""
    try:
        held = json.loads(path.read_text(encoding="utf-8"))
        if held["format"] != FORMAT:
            raise ValueError(f"format {FORMAT} expected, not {held['format']!r}")
        for section in held["sections"]:
            _described(section)
            for values in section["tiles"].values():
                _tile(values)
    except (AttributeError, KeyError, TypeError, ValueError) as error:  # JSON's and UTF-8's are ValueErrors
        raise ValueError(f"{path} is no file of tiles ({type(error).__name__}: {error})") from None
    return held["sections"]


def _tile(values: dict[str, Any]) -> Tile:
    tile = Tile(**{field: values[field] for field in Tile._fields})
    if tile.stages < 1 or any(size < 1 or size & (size - 1) for size in (tile.rows, tile.columns, tile.warps)):
        raise ValueError(f"{values} is no tile")
    return tile


@functools.cache
def identity(device: torch.device) -> dict[str, str]:
    """What tiles are measured for."""
    name = "Triton's interpreter" if device.type == "cpu" else torch.cuda.get_device_name(device)
    return {"device": name, "triton": triton.__version__, "kernels": _state_of_kernels()}


def _state_of_kernels() -> str:
    """Changes with every change of the kernels' source: a tile may spill tomorrow that does not today."""
    state = hashlib.sha256()
    for path in sorted(Path(__file__).parent.glob("*.py")):
        state.update(path.read_bytes())
    return state.hexdigest()[:12]
