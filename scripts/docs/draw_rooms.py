"""Draw the rooms of the package into docs/rooms.svg: python scripts/docs/draw_rooms.py

The floors are the layers that import-linter checks (pyproject.toml), the arrows are the imports of the source files.
The same source gives the same picture.
"""

import ast
import textwrap
import tomllib
from dataclasses import dataclass, field
from html import escape
from itertools import groupby
from pathlib import Path

ROOT = Path(__file__).parents[2]
PICTURE = ROOT / "docs" / "rooms.svg"
PACKAGE = "jgpt"
GROUND = "ground"  # files that every room may import: arrows to them would say nothing

BOX_WIDTH, GAP, FLOOR_GAP, PADDING = 262, 26, 34, 12  # pixels
MARGIN, LANE = 80, 14  # left and right of the widest floor; between two arrows that go down there
LINE = 16  # height of a line of text
CHARACTERS = 40  # in a line of a box

STYLE = """
text { font: 12px system-ui, -apple-system, "Segoe UI", "DejaVu Sans", sans-serif; fill: #4b4f56 }
.name { font-size: 15px; font-weight: 600; fill: #1c1e21 }
.count { fill: #2f6fb3 }
rect { fill: #f5f5f3; stroke: #c9c9c4 }
path { fill: none; stroke: #8a8f98; stroke-width: 1.2 }
marker path { fill: #8a8f98; stroke: none }
@media (prefers-color-scheme: dark) {
  text { fill: #a9adb5 } .name { fill: #e8e9eb } .count { fill: #7fb2e8 }
  rect { fill: #222427; stroke: #4a4e55 }
}
"""


@dataclass
class Room:
    """A room: a folder of the package, or the files beside the folders that share a floor."""

    name: str
    modules: list[str]  # as import-linter names them
    about: str
    files: list[Path] = field(default_factory=list)
    lines: int = 0
    x: float = 0  # of the left side
    y: float = 0  # of the top
    height: float = 0

    @property
    def text(self) -> list[str]:
        """Return the lines below the name."""
        return textwrap.wrap(self.about, CHARACTERS)

    @property
    def count(self) -> str:
        """Say how large the room is."""
        return f"{len(self.files)} {'file' if len(self.files) == 1 else 'files'}, {self.lines:,} lines"


def read_floors() -> list[list[Room]]:
    """Return the rooms floor by floor, the highest first, from the layers in pyproject.toml."""
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    contracts = settings["tool"]["importlinter"]["contracts"]
    layers = next(contract["layers"] for contract in contracts if contract["type"] == "layers")
    floors = [[name.strip() for name in layer.replace(":", "|").split("|")] for layer in layers]
    rooms: list[list[Room]] = []
    lowest = floors[-1]
    for is_files, floors_of_kind in groupby(floors, lambda floor: all(_path(name).suffix == ".py" for name in floor)):
        group = list(floors_of_kind)
        if not is_files:
            rooms += [[_room(name) for name in floor] for floor in group]
            continue
        names = [name for floor in group for name in floor]  # neighbours, such as all commands, are one box
        short = ", ".join(name.removeprefix(f"{PACKAGE}.") for name in names)
        rooms.append([Room(GROUND if lowest in group else "commands", names, short)])
    for room in (room for floor in rooms for room in floor):
        room.files = sorted(file for name in room.modules for file in _files(name))
        room.lines = sum(len(file.read_text(encoding="utf-8").splitlines()) for file in room.files)
    return rooms


def _room(name: str) -> Room:
    path = _path(name)
    source = path if path.suffix == ".py" else path / "__init__.py"
    doc = ast.get_docstring(ast.parse(source.read_text(encoding="utf-8"))) or ""
    return Room(name.removeprefix(f"{PACKAGE}."), [name], doc.split("\n")[0])


def _path(module: str) -> Path:
    path = ROOT / module.replace(".", "/")
    return path if path.is_dir() else path.with_suffix(".py")


def _files(module: str) -> list[Path]:
    path = _path(module)
    return list(path.rglob("*.py")) if path.is_dir() else [path]


def read_imports(rooms: list[Room]) -> dict[str, set[str]]:
    """Return for each room the names of the rooms that its files import."""
    owners = {module: room.name for room in rooms for module in room.modules}
    found: dict[str, set[str]] = {room.name: set() for room in rooms}
    for room in rooms:
        for file in room.files:
            for module in _imported(file):
                owner = max((m for m in owners if f"{module}.".startswith(f"{m}.")), key=len, default=None)
                if owner and owners[owner] != room.name:
                    found[room.name].add(owners[owner])
    return found


def _imported(file: Path) -> list[str]:
    modules = []
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            modules += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            modules += [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
    return modules


def drop_shortcuts(imports: dict[str, set[str]]) -> dict[str, set[str]]:
    """Leave out an arrow where a longer way through other rooms leads to the same room."""

    def reached(room: str) -> set[str]:
        return imports[room].union(*(reached(other) for other in imports[room]))

    return {room: {to for to in there if not any(to in reached(other) for other in there - {to})}
            for room, there in imports.items()}  # fmt: skip


def arrange(floors: list[list[Room]]) -> tuple[float, float]:
    """Give every room its place; return the width and the height of the picture."""
    width = 2 * MARGIN + max(map(_floor_width, floors))
    y = float(PADDING)
    for floor in floors:
        height = max(len(room.text) for room in floor) * LINE + 2 * LINE + 2 * PADDING
        x = (width - _floor_width(floor)) / 2
        for room in floor:
            room.x, room.y, room.height = x, y, height
            x += BOX_WIDTH + GAP
        y += height + FLOOR_GAP
    return width, y - FLOOR_GAP + PADDING


def _floor_width(floor: list[Room]) -> float:
    return len(floor) * (BOX_WIDTH + GAP) - GAP


def draw(floors: list[list[Room]]) -> str:
    """Return the picture as SVG."""
    rooms = [room for floor in floors for room in floor]
    width, height = arrange(floors)
    imports = {room: there - {GROUND} for room, there in read_imports(rooms).items()}
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width:g} {height:g}" width="{width:g}" role="img">',
        "<title>The rooms of jgpt: each imports only from the floors below it</title>",
        f"<style>{STYLE}</style>",
        '<marker id="tip" viewBox="0 0 8 8" refX="8" refY="4" markerWidth="8" markerHeight="8" orient="auto">'
        '<path d="M0 0L8 4L0 8z"/></marker>',
        *_arrows(floors, drop_shortcuts(imports), width),
        *(part for room in rooms for part in _box(room)),
        "</svg>",
    ]
    return "\n".join(parts) + "\n"


def _arrows(floors: list[list[Room]], imports: dict[str, set[str]], width: float) -> list[str]:
    """Draw an arrow to the next floor as a curve, and one that goes further down around the rooms between."""
    places = {room.name: (level, room) for level, floor in enumerate(floors) for room in floor}
    edges = sorted((places[b][0] - places[a][0], places[a][0], a, b) for a, there in imports.items() for b in there)
    parts = []
    lanes: dict[str, list[list[range]]] = {"left": [], "right": []}  # the floors that each lane is taken on
    for floors_down, upper, a, b in edges:  # the short ones first: they get the inner lanes
        start, end = places[a][1], places[b][1]
        if floors_down == 1:
            parts.append(_curve(start, end))
            continue
        side = _side(start, width, lanes)
        taken = range(upper, upper + floors_down + 1)
        lane = next((lane for lane in lanes[side] if not any(set(taken) & set(other) for other in lane)), None)
        if lane is None:
            lanes[side].append(lane := [])
        lane.append(taken)
        index = lanes[side].index(lane)
        x = MARGIN - LANE * (index + 1)
        parts.append(_detour(start, end, floors, side, index, x if side == "left" else width - x))
    return parts


def _side(start: Room, width: float, lanes: dict[str, list[list[range]]]) -> str:
    off_center = start.x + BOX_WIDTH / 2 - width / 2
    if off_center:
        return "left" if off_center < 0 else "right"
    return min(lanes, key=lambda side: sum(map(len, lanes[side])))


def _curve(start: Room, end: Room) -> str:
    x1, y1, x2 = start.x + BOX_WIDTH / 2, start.y + start.height, end.x + BOX_WIDTH / 2
    middle = y1 + FLOOR_GAP / 2
    return f'<path d="M{x1:g} {y1:g}C{x1:g} {middle:g} {x2:g} {middle:g} {x2:g} {end.y:g}" {TIP}/>'


def _detour(start: Room, end: Room, floors: list[list[Room]], side: str, lane: int, x: float) -> str:
    """Draw an arrow down the side of the picture, at `x`. Where another room is in the way it enters from above."""
    outermost = next(floor for floor in floors if end in floor)[0 if side == "left" else -1]
    x1, x2 = (room.x if side == "left" else room.x + BOX_WIDTH for room in (start, end))
    y1, y2 = start.y + start.height / 2 + 6 * lane, end.y + end.height / 2 - 6 * lane
    if end is outermost:
        return f'<path d="M{x1:g} {y1:g}H{x:g}V{y2:g}H{x2:g}" {TIP}/>'
    x2 = end.x + BOX_WIDTH / 2 + (-40 if side == "left" else 40)
    return f'<path d="M{x1:g} {y1:g}H{x:g}V{end.y - FLOOR_GAP / 2:g}H{x2:g}V{end.y:g}" {TIP}/>'


TIP = 'marker-end="url(#tip)"'


def _box(room: Room) -> list[str]:
    x, y = room.x + PADDING, room.y + PADDING + LINE - 3
    lines = [
        f'<text x="{x:g}" y="{y + (i + 1) * LINE + 2:g}">{escape(line)}</text>' for i, line in enumerate(room.text)
    ]
    return [
        f'<rect x="{room.x:g}" y="{room.y:g}" width="{BOX_WIDTH}" height="{room.height:g}" rx="7"/>',
        f'<text class="name" x="{x:g}" y="{y:g}">{escape(room.name)}</text>',
        *lines,
        f'<text class="count" x="{x:g}" y="{room.y + room.height - PADDING:g}">{room.count}</text>',
    ]


if __name__ == "__main__":
    PICTURE.write_text(draw(read_floors()), encoding="utf-8")
    print(f"wrote {PICTURE.relative_to(ROOT)}")
