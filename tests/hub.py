"""A real JupyterHub on loopback: users log in, start servers, and run cells in kernels."""

from __future__ import annotations

import contextlib
import json
import sys
import uuid
from collections.abc import Iterator
from pathlib import Path

import psutil
import requests
from processes import ROOT, listening, running, wait_until
from websocket import create_connection

from helpers.broker import free_port

# `make test-hub` installs it from npm.
PROXY = Path(sys.prefix) / "node_modules" / ".bin" / "configurable-http-proxy"
PASSWORD = "any user's password"
SECONDS = 300

CONFIG = """
import sys

c.JupyterHub.bind_url = "http://127.0.0.1:{port}"
c.JupyterHub.hub_bind_url = "http://127.0.0.1:{hub_port}"
c.JupyterHub.db_url = "sqlite:///{folder}/hub.sqlite"
c.JupyterHub.cookie_secret_file = "{folder}/cookie_secret"
c.ConfigurableHTTPProxy.command = ["{proxy}"]
c.ConfigurableHTTPProxy.api_url = "http://127.0.0.1:{api_port}"
c.ConfigurableHTTPProxy.pid_file = "{folder}/proxy.pid"
c.JupyterHub.authenticator_class = "dummy"
c.DummyAuthenticator.password = {password!r}
c.Authenticator.allow_all = True
c.JupyterHub.spawner_class = "simple"
c.SimpleLocalProcessSpawner.home_dir_template = "{folder}/home/{{username}}"
c.Spawner.cmd = [sys.executable, "-m", "jupyterhub.singleuser", "--allow-root"]
c.Spawner.notebook_dir = "{root}"
c.Spawner.environment = {environment!r}
c.Spawner.cpu_limit = 1
c.Spawner.mem_limit = "6G"
"""


class User:
    """A user who has logged in with a password, as in a browser, and holds a token for the API."""

    def __init__(self, hub: Hub, name: str) -> None:
        self.name, self._hub = name, hub
        self.prefix = f"/user/{name}/"
        browser = requests.Session()
        page = browser.get(f"{hub.url}/hub/login", timeout=30)
        page.raise_for_status()
        form = {"username": name, "password": PASSWORD, "_xsrf": browser.cookies["_xsrf"]}
        login = browser.post(f"{hub.url}/hub/login", data=form, timeout=30, allow_redirects=False)
        assert login.status_code == 302, login.text
        xsrf = {"X-XSRFToken": next(c.value for c in browser.cookies if c.name == "_xsrf")}
        made = browser.post(f"{hub.url}/hub/api/users/{name}/tokens", headers=xsrf, timeout=30)
        made.raise_for_status()
        self._headers = {"Authorization": f"token {made.json()['token']}"}

    def request(self, method: str, path: str, **options) -> requests.Response:
        """Send a request with the user's token."""
        url, headers = f"{self._hub.url}{path}", self._headers
        return requests.request(method, url, headers=headers, timeout=60, **options)

    def is_running(self) -> bool:
        """Return whether the user's server is ready."""
        model = self.request("GET", f"/hub/api/users/{self.name}").json()
        return any(server["ready"] for server in model["servers"].values())

    def start(self) -> None:
        """Start the user's server, and wait until it is ready."""
        self.request("POST", f"/hub/api/users/{self.name}/server").raise_for_status()
        wait_until(self.is_running, SECONDS)

    def stop(self) -> None:
        """Stop the user's server, and wait until the hub says so."""
        self.request("DELETE", f"/hub/api/users/{self.name}/server").raise_for_status()
        wait_until(lambda: not self.is_running(), SECONDS)

    @contextlib.contextmanager
    def kernel(self, notebook: str) -> Iterator[Kernel]:
        """Open a notebook, as JupyterLab does, and yield its kernel."""
        session = {"path": notebook, "name": "", "type": "notebook", "kernel": {"name": "python3"}}
        answer = self.request("POST", f"{self.prefix}api/sessions", json=session)
        answer.raise_for_status()
        kernel_id = answer.json()["kernel"]["id"]
        address = f"ws{self._hub.url.removeprefix('http')}{self.prefix}api/kernels/{kernel_id}"
        token = [f"{name}: {value}" for name, value in self._headers.items()]
        channel = create_connection(f"{address}/channels", header=token, timeout=SECONDS)
        with contextlib.closing(channel):
            yield Kernel(channel)


class Kernel:
    """A kernel at the other end of a websocket."""

    def __init__(self, channel) -> None:
        self._channel = channel

    def execute(self, source: str) -> list[dict]:
        """Run a cell to its end, and return its outputs; fail if it raises an error."""
        cell = uuid.uuid4().hex
        header = {"msg_id": cell, "msg_type": "execute_request", "session": "test",
                  "username": "", "version": "5.3", "date": ""}  # fmt: skip
        content = {"code": source, "silent": False, "store_history": True,
                   "user_expressions": {}, "allow_stdin": False, "stop_on_error": True}  # fmt: skip
        message = {"header": header, "content": content, "channel": "shell",
                   "parent_header": {}, "metadata": {}, "buffers": []}  # fmt: skip
        self._channel.send(json.dumps(message))
        outputs = []
        while True:
            answer = json.loads(self._channel.recv())
            kind, content = answer["header"]["msg_type"], answer["content"]
            if answer["parent_header"].get("msg_id") != cell:
                continue
            assert kind != "error", f"{source}\n{content['ename']}: {content['evalue']}"
            if kind in ("execute_result", "display_data"):
                outputs.append({"output_type": kind, "data": content["data"]})
            if kind == "status" and content["execution_state"] == "idle":
                return outputs

    def value(self, expression: str) -> str:
        """Return the text of an expression's value."""
        return self.execute(expression)[-1]["data"]["text/plain"]


class Hub:
    """A JupyterHub whose users may have one core and 6 GB each."""

    def __init__(self, url: str, folder: Path, mark: str) -> None:
        self.url, self.temporary_folder, self._mark = url, folder / "tmp", mark

    def is_up(self) -> bool:
        """Return whether the hub answers through its proxy."""
        with contextlib.suppress(requests.ConnectionError):
            return requests.get(f"{self.url}/hub/api", timeout=30).ok
        return False

    def processes_of(self, user: User) -> list[psutil.Process]:
        """Return a user's processes: server, kernels, Java, workers."""
        wanted = {"KIT_TEST_HUB": self._mark, "JUPYTERHUB_USER": user.name}.items()
        found = []
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error):
                if wanted <= process.environ().items():
                    found.append(process)
        return found

    def addresses_of(self, user: User) -> set[tuple[str, str, int]]:
        """Return name, IP and port of the listening sockets of a user's processes."""
        return {found for process in self.processes_of(user) for found in listening(process)}

    def leftovers(self) -> list[str]:
        """Return what users' processes have left in their temporary folder."""
        return [path.name for path in self.temporary_folder.glob("*")
                if not path.name.startswith("hsperfdata")]  # fmt: skip


@contextlib.contextmanager
def running_hub(folder: Path) -> Iterator[Hub]:
    """Run a hub with its files in a folder; at the end, it stops its proxy and its servers."""
    ports = {name: free_port() for name in ("port", "hub_port", "api_port")}
    (folder / "tmp").mkdir()
    mark = uuid.uuid4().hex
    environment = {"KIT_TEST_HUB": mark, "TMPDIR": str(folder / "tmp")}
    text = CONFIG.format(
        folder=folder, proxy=PROXY, password=PASSWORD, root=ROOT, environment=environment, **ports
    )
    (folder / "jupyterhub_config.py").write_text(text)
    command = ["sh", "-c", 'exec "$@" > hub.log 2>&1', "sh", sys.executable, "-m", "jupyterhub"]
    hub = Hub(f"http://127.0.0.1:{ports['port']}", folder, mark)
    with running(command, cwd=folder):  # which has the settings in jupyterhub_config.py
        wait_until(hub.is_up, SECONDS)
        yield hub
