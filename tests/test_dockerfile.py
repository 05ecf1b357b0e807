"""The Dockerfile, which is not built here: what it copies is there and enough, and no version stands in it twice."""

import re
import tomllib
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
TEXT = (ROOT / "Dockerfile").read_text("utf-8")
COPIED = [word for line in re.findall(r"^COPY (.+) \S+$", TEXT, re.MULTILINE) for word in line.split()]


def test_what_is_copied_exists_and_is_let_through():
    allowed = {line[1:] for line in (ROOT / ".dockerignore").read_text("utf-8").splitlines() if line.startswith("!")}
    assert allowed == set(COPIED)
    assert all((ROOT / name).exists() for name in COPIED)


def test_it_is_what_the_wheel_is_made_of():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))
    wheel = project["tool"]["hatch"]["build"]["targets"]["wheel"]
    needed = {*wheel["packages"], *wheel["force-include"], project["project"]["readme"], "pyproject.toml"}
    needed |= set(project["project"]["license-files"])
    assert needed - {name for name in needed if name in COPIED or name.split("/")[0] in COPIED} == set()


def test_pins_stand_in_the_constraints_alone():
    assert "--constraint constraints.txt ." in TEXT
    assert not re.findall(r"[=<>~]=\s*\d", TEXT)
    (python,) = re.findall(r"^FROM python:(\d+\.\d+)-slim$", TEXT, re.MULTILINE)
    minimum = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]["requires-python"]
    assert python == minimum.removeprefix(">=")
