"""A real JupyterHub: two users run the walkthrough at the same time, and leave nothing behind."""

import ast
import re
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import nbformat
import pytest
from hub import User, running_hub
from processes import ROOT, beyond_loopback, wait_until

pytestmark = pytest.mark.hub

WALKTHROUGH = ROOT / "notebooks" / "1_walkthrough.ipynb"
FEW = "events, sample_events, memory = 2_000, 500, '1g'"
LOOK = """{
    "broker": bootstrap_servers, "group": consumer_name, "folder": str(scratch_folder()),
    "results": sink.path, "page": sc.uiWebUrl, "master": sc.master,
    "table": monitor.contents()["text/html"],
}"""


@pytest.fixture(scope="module")
def hub(tmp_path_factory):
    """A hub whose users' servers run on this machine."""
    with running_hub(tmp_path_factory.mktemp("hub")) as running:
        yield running


@pytest.fixture(scope="module")
def users(hub):
    """Two users, each with a running server."""
    names = [User(hub, name) for name in ("ada", "bohr")]
    for user in names:
        user.start()
    return names


def walk_through(user):
    """Run the walkthrough with few events in a user's kernel, and return what the user sees."""
    cells = [cell for cell in nbformat.read(WALKTHROUGH, as_version=4).cells
             if cell.cell_type == "code"]  # fmt: skip
    with user.kernel(str(WALKTHROUGH.relative_to(ROOT))) as kernel:
        for cell in cells:
            outputs = kernel.execute(cell.source)
            if "parameters" in cell.metadata.get("tags", []):
                kernel.execute(FEW)
        record = ast.literal_eval(outputs[-1]["data"]["text/plain"])
        return record, ast.literal_eval(kernel.value(LOOK))


@pytest.fixture(scope="module")
def walks(users):
    """What each user sees after both have run the walkthrough at the same time."""
    with ThreadPoolExecutor(2) as pool:
        runs = [pool.submit(walk_through, user) for user in users]
        return [run.result(900) for run in runs]


def test_two_users_get_the_same_results_at_the_same_time(walks):
    """Both walkthroughs score all events, with the same number of signal events."""
    (first, _), (second, _) = walks
    assert first["events"] == second["events"] == 2_000
    assert first["signal"] == second["signal"] > 0


def test_two_users_share_no_port_no_folder_and_no_consumer_group(walks):
    """Each user has another broker, consumer group, folder and page of Spark."""
    (_, first), (_, second) = walks
    for name in ("broker", "group", "folder", "results", "page"):
        assert first[name] != second[name], name


def test_spark_takes_the_cores_that_the_hub_allows(walks):
    """The hub's limit of one core is what Spark runs with, whatever the machine has."""
    assert {seen["master"] for _, seen in walks} == {"local[1,4]"}


def test_the_monitor_links_to_sparks_page(users, walks):
    """The link below the table leads each user to Spark's page, with its styles and its jobs."""
    for user, (_, seen) in zip(users, walks, strict=True):
        (link,) = re.findall(r'href="([^"]*)"', seen["table"])
        assert link.startswith(f"{user.prefix}proxy/")
        page = user.request("GET", link)
        assert "Completed Jobs" in page.text
        (style, *_) = re.findall(r'href="([^"]*webui.css[^"]*)"', page.text)
        (job, *_) = re.findall(r'href="([^"]*/jobs/job/[^"]*)"', page.text)
        for address in (style, job):
            assert address.startswith(user.prefix)
            assert user.request("GET", address).ok, address


def test_sparks_page_is_not_shown_to_others(users, walks):
    """Another user of the hub gets no page through the link."""
    (link,) = re.findall(r'href="([^"]*)"', walks[0][1]["table"])
    answer = users[1].request("GET", link)
    assert answer.status_code == 403 and "Completed Jobs" not in answer.text


def test_all_listen_on_loopback_only(hub, users, walks):
    """Other machines reach neither the users' servers nor what they started."""
    addresses = {found for user in users for found in hub.addresses_of(user)}
    assert len(addresses) >= 8 and beyond_loopback(addresses) == []


def test_a_stopped_server_leaves_nothing_behind(hub, users, walks):
    """With a user's server end its kernels, Java and workers; their folders are removed."""
    for user, (_, seen) in zip(users, walks, strict=True):
        assert any("java" in process.name() for process in hub.processes_of(user))
        assert Path(seen["folder"]).is_dir()
        user.stop()
        wait_until(lambda user=user: not hub.processes_of(user), 60)
    wait_until(lambda: hub.leftovers() == [], 60)
