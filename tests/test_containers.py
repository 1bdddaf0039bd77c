"""The files for containers, Binder and Codespaces: they fit the kit, and each other."""

import json
import os
import re

import nbformat
from processes import ROOT

DOCKERFILE = (ROOT / "Dockerfile").read_text()
README = (ROOT / "README.md").read_text()


def test_the_image_is_set_up_like_any_machine():
    """The image runs setup.sh, and starts Jupyter from the environment that it makes."""
    assert "RUN ./setup.sh" in DOCKERFILE
    (folder,) = re.findall(r"^WORKDIR (.*)$", DOCKERFILE, re.MULTILINE)
    assert f'ENV PATH="{folder}/.venv/bin:$PATH"' in DOCKERFILE


def test_nothing_private_or_generated_gets_into_the_image():
    """The environment, the history and executed notebooks of this machine stay out."""
    ignored = (ROOT / ".dockerignore").read_text().split()
    assert {".venv", ".git", "build"} <= set(ignored)


def test_codespaces_builds_on_the_same_dockerfile():
    """The development container is a stage of the Dockerfile, with a user that it has."""
    container = json.loads((ROOT / ".devcontainer" / "devcontainer.json").read_text())
    build = container["build"]
    assert (ROOT / ".devcontainer" / build["dockerfile"]).resolve() == ROOT / "Dockerfile"
    assert f" AS {build['target']}\n" in DOCKERFILE
    assert f"{container['remoteUser']} \\\n" in DOCKERFILE
    assert os.access(ROOT / container["postCreateCommand"], os.X_OK)


def test_binder_takes_a_python_and_a_java_that_the_kit_supports():
    """Binder's versions are among those that setup.sh accepts, and it runs setup.sh."""
    version = (ROOT / "binder" / "runtime.txt").read_text().strip().removeprefix("python-")
    setup = (ROOT / "setup.sh").read_text()
    assert f"python{version}" in setup
    assert (ROOT / "binder" / "apt.txt").read_text().strip() in setup
    assert os.access(ROOT / "binder" / "postBuild", os.X_OK)
    assert "\n./setup.sh\n" in (ROOT / "binder" / "postBuild").read_text()


def test_the_notebooks_ask_for_the_kernel_that_binder_gets():
    """The kit's environment replaces the kernel `python3`, which the notebooks name."""
    for path in (ROOT / "notebooks").glob("*.ipynb"):
        assert nbformat.read(path, as_version=4).metadata.kernelspec.name == "python3"


def test_all_badges_lead_to_the_same_repository():
    """The repository's address is the same in the four links, and each has a badge."""
    links = dict(re.findall(r"^\[(\w+)\]: (https://\S+)$", README, re.MULTILINE))
    assert set(links) == {"binder", "codespaces", "colab", "swan"}
    repositories = {re.search(r"\w+/kafka-spark-keras", link)[0] for link in links.values()}
    assert len(repositories) == 1
    for name in links:
        assert f"[{name}-badge]][{name}]" in README
        assert f"\n[{name}-badge]: https://" in README
    notebooks = {path for link in links.values() for path in re.findall(r"notebooks/.*", link)}
    assert notebooks and all((ROOT / path).exists() for path in notebooks)
