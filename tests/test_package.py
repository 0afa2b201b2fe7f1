"""The package itself: what is installed, what is promised, what must not be in it."""

from __future__ import annotations

import re
import subprocess
import sys
import zipfile
from configparser import ConfigParser
from importlib import metadata

import pytest

import hf_distill


@pytest.fixture(scope="module")
def root(pytestconfig):
    return pytestconfig.rootpath


def test_every_public_name_exists():
    for package in ("", ".data", ".evaluation", ".losses", ".models", ".retrieval", ".teachers", ".trainers", ".hub"):
        module = __import__(f"hf_distill{package}", fromlist=["*"])
        for name in module.__all__:
            assert getattr(module, name) is not None, f"hf_distill{package}.{name}"


def test_importing_the_package_is_instant():
    code = "import hf_distill, sys; assert not {'torch', 'transformers', 'datasets', 'numpy'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_cpu_machine_does_not_pull_cuda(root):
    """torch is pinned once, in the constraints, which every installation of the Makefile uses."""
    pins = re.findall(r"^torch==(\S+)$", (root / "constraints.txt").read_text(), re.MULTILINE)
    assert pins == ["2.13.0"]
    setup = ConfigParser()
    setup.read(root / "setup.cfg")
    required = setup["options"]["install_requires"].split()
    assert next(line for line in required if line.startswith("torch")) == "torch>=2.6,<3"
    makefile = (root / "Makefile").read_text()
    assert "-c constraints.txt" in re.search(r"^INSTALL = (.*)$", makefile, re.MULTILINE)[1]
    assert not re.search(r"pip install(?!.*constraints)", makefile)
    import torch

    if torch.version.cuda is None:
        names = [distribution.metadata["Name"] or "" for distribution in metadata.distributions()]
        assert not [name for name in names if name.lower().startswith("nvidia-")]


def test_constraints_are_what_is_installed_here(root):
    for line in (root / "constraints.txt").read_text().splitlines():
        if "==" in line and not line.startswith("#"):
            name, _, version = line.partition("==")
            try:
                installed = metadata.version(name)
            except metadata.PackageNotFoundError:
                continue
            assert installed.partition("+")[0] == version, name


def test_nothing_from_outside_is_trusted_and_no_peer_is_imported(root):
    forbidden = {
        r"\bpickle\.load": "unpickles",
        r"trust_remote_code=True": "runs a repository's code",
        r"allow_pickle=True": "unpickles",
        r"^\s*(import|from) sentence_transformers": "imports a peer",
        r"^\s*print\(": "prints",
    }
    for path in [*(root / "hf_distill").rglob("*.py"), *(root / "run_scripts").rglob("*.py")]:
        text = path.read_text()
        for pattern, what in forbidden.items():
            assert not re.search(pattern, text, re.MULTILINE), f"{path} {what}"
        assert len(text.splitlines()) <= 600, path


def test_the_wheel_holds_every_file_of_the_package(root, tmp_path):
    """Also launch configurations and other data, which setup.cfg names one folder at a time."""
    words = ["-q", "egg_info", "--egg-base", tmp_path, "build", "--build-base", tmp_path / "build"]
    words += ["bdist_wheel", "--dist-dir", tmp_path]
    command = [sys.executable, "-c", "import setuptools; setuptools.setup()", *map(str, words)]
    subprocess.run(command, cwd=root, check=True, capture_output=True)
    with zipfile.ZipFile(next(tmp_path.glob("*.whl"))) as wheel:
        held = set(wheel.namelist())
    package = root / "hf_distill"
    there = {path.relative_to(root).as_posix() for path in package.rglob("*") if path.is_file()}
    assert not {name for name in there if "__pycache__" not in name} - held
    assert "hf_distill/configs/zero3.yaml" in held
    cards = {path.name for path in (root / "model_cards").glob("*.md")}
    assert {"student.md", "rows.md"} <= cards
    assert not cards - {name.rpartition("/")[2] for name in held if "/share/hf_distill/model_cards/" in name}


def test_version_is_one(root):
    assert metadata.version("hf_distill") == hf_distill.__version__
