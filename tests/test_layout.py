"""The house holds its plan: every module has its test, and imports between rooms point down.

The rooms stand on floors; a room may use its own floor's and lower ones'. Steps use no other step.
"""

import ast
import itertools
import re

import pytest

from tests.helpers.running import ROOT

FLOORS = (
    (
        "utils.settings",
        "utils.whole_files",
        "utils.seeding",
        "utils.strict_json",
        "utils.errors",
        "utils.terminal",
        "utils.pretrained",
        "utils.launch",
        "utils.provenance",
        "utils.tracking",
    ),
    ("utils.distributed", "utils.data", "utils.rewards"),
    ("utils.kernels", "utils.models"),
    ("utils.generation", "utils.checkpoints"),
    (
        "utils.planner",
        "utils.run",
        "utils.report",
        "utils.metrics",
        "utils.confidence",
        "utils.verdicts",
    ),
    ("step1_sft", "step2_reward", "step3_ppo", "step3_preference"),
    ("evaluation",),
)
HEIGHT = {room: height for height, rooms in enumerate(FLOORS) for room in rooms}
STEPS = FLOORS[-2]


def sources() -> dict[str, ast.Module]:
    """Dotted names of the modules, and what they say."""
    found = {}
    for top in (*STEPS, "utils", "evaluation"):
        for path in sorted((ROOT / top).rglob("*.py")):
            name = ".".join(path.relative_to(ROOT).with_suffix("").parts)
            found[name.removesuffix(".__init__")] = ast.parse(path.read_text())
    return found


SOURCES = sources()


def room_of(module: str) -> str | None:
    """The longest name of a room that a dotted name begins with."""
    rooms = [room for room in HEIGHT if module == room or module.startswith(room + ".")]
    return max(rooms, key=len, default=None)


def imported(tree: ast.Module) -> set[str]:
    """Dotted names that a module imports anywhere: from a import b gives a.b."""
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def test_every_module_is_in_a_room():
    homeless = [name for name in SOURCES if name != "utils" and room_of(name) is None]
    assert not homeless, f"add a room to FLOORS, or move them: {homeless}"


def test_imports_point_down():
    wrong = []
    for module, tree in SOURCES.items():
        own = room_of(module)
        for name in sorted(imported(tree)):
            other = room_of(name)
            if own is None or other in (None, own):
                continue
            if HEIGHT[other] > HEIGHT[own] or {own, other} <= set(STEPS):
                wrong.append(f"{module} imports {name}")
    assert not wrong, "\n".join(wrong)


def test_rooms_of_one_floor_do_not_import_each_other_both_ways():
    edges = {
        (room_of(module), room_of(name))
        for module, tree in SOURCES.items()
        for name in imported(tree)
    }
    rooms = [pair for floor in FLOORS[:-2] for pair in itertools.combinations(floor, 2)]
    both = [pair for pair in rooms if {pair, pair[::-1]} <= edges]
    assert not both, f"one of each must go: {both}"


def test_no_file_of_utils_names_an_upper_room_by_string():
    """Messages may: the name alone is what an import at run time would be given."""
    upper = re.compile(r"(step1_sft|step2_reward|step3_ppo|step3_preference|evaluation)[./][\w./]+")
    wrong = []
    for module, tree in SOURCES.items():
        if not module.startswith("utils"):
            continue
        texts = [n.value for n in ast.walk(tree) if isinstance(n, ast.Constant)]
        named = [text for text in texts if isinstance(text, str) and upper.fullmatch(text)]
        wrong += [f"{module}: {text!r}" for text in named]
    assert not wrong, "\n".join(wrong)


def elsewhere() -> dict[str, str]:
    """Module → its test, as paths, by the table of CONTRIBUTING.md."""
    text = (ROOT / "CONTRIBUTING.md").read_text()
    rows = re.findall(r"^\| (`.+`) \| `(tests/\S+)` \|", text, re.M)
    return {module: test for cell, test in rows for module in re.findall(r"`([^`]+)`", cell)}


MODULES = [name.replace(".", "/") + ".py" for name in SOURCES]


@pytest.mark.parametrize("module", [m for m in MODULES if (ROOT / m).exists()])
def test_every_module_has_its_test(module):
    folder, name = module.rsplit("/", 1)
    own, listed = f"tests/{folder}/test_{name}", elsewhere().get(module)
    if (ROOT / own).exists():
        assert listed is None, f"{own} exists: take {module} out of CONTRIBUTING.md's table"
    else:
        assert listed, f"write {own}, or say in CONTRIBUTING.md where {module} is tested and why"


def test_the_table_names_what_exists():
    for module, test in elsewhere().items():
        assert (ROOT / module).exists() and (ROOT / test).exists(), (module, test)


def test_a_test_in_a_rooms_folder_begins_with_the_modules_name():
    """test_MODULE.py, or test_MODULE_SUBJECT.py where that would be too long."""
    wrong = []
    for path in sorted((ROOT / "tests").rglob("test_*.py")):
        folder = str(path.parent.relative_to(ROOT / "tests"))
        names = [m.rsplit("/", 1)[1][:-3] for m in MODULES if m.rsplit("/", 1)[0] == folder]
        if names and not any(path.stem.startswith(f"test_{name}") for name in names):
            wrong.append(str(path.relative_to(ROOT)))
    assert not wrong, f"name the module that they test, or move them to tests/whole: {wrong}"
