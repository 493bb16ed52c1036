"""Two hosts on one machine: network namespaces joined by a cable (veth), each with its own name,
addresses and ssh.

Needs root. Nothing of the machine's own network or ssh is touched: what a host finds in /etc/hosts
and /etc/ssh lies in /etc/netns/NAMESPACE, which `ip netns exec` puts over /etc, and goes with the
host.
"""

import contextlib
import json
import os
import shlex
import shutil
import signal
import subprocess
import time
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Self

import psutil

from shared.processes import ProcessGroup

ADDRESSES = {"h0": "192.0.2.1", "h1": "192.0.2.2"}  # for documentation only (RFC 5737): nobody's
SYSTEM_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
PROGRAMS = {
    "ip": "iproute2",
    "unshare": "util-linux",
    "ssh-keygen": "openssh-client",
    "sshd": "openssh-server",
}
SSH_CONFIG = "IdentityFile /etc/ssh/identity\nUserKnownHostsFile /dev/null\nBatchMode yes\n"
SSHD_CONFIG = """
HostKey /etc/ssh/host_key
AuthorizedKeysFile /etc/ssh/authorized_keys
PasswordAuthentication no
PermitRootLogin prohibit-password
UsePAM no
PidFile none
"""


class NoHosts(Exception):
    """This machine cannot play two hosts; the text says why."""


class TwoHosts:
    """As a context manager: hosts h0 and h1; h0 may log in to h1. Everything is removed on the way
    out.

    Both see this machine's files, but `own_folder` is empty on h1 and its own.
    """

    def __init__(self, folder: Path, own_folder: Path) -> None:
        self.folder, self.own_folder = folder, own_folder
        self.log = folder / "h0.log"  # what the last script has printed
        self.namespaces = {host: f"archipelago-{os.getpid()}-{host}" for host in ADDRESSES}

    def __enter__(self) -> Self:
        require_root_and_programs()
        self.processes = ProcessGroup().__enter__()
        try:
            self._join_namespaces()
            self._write_etc()
            self._start_sshd()
        except BaseException:
            self.__exit__(None, None, None)
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        try:
            self.processes.__exit__(kind, error, trace)
        finally:
            for namespace in self.namespaces.values():
                for left in run("ip", "netns", "pids", namespace, check=False).split():
                    with contextlib.suppress(ProcessLookupError):
                        os.kill(int(left), signal.SIGKILL)
                run("ip", "netns", "delete", namespace, check=False)
                shutil.rmtree(etc(namespace), ignore_errors=True)
            run("rmdir", "--ignore-fail-on-non-empty", "/etc/netns", check=False)

    def run_on_h0(
        self, script: str, cwd: Path, environment: Mapping[str, str], timeout_s: float
    ) -> tuple[int, str]:
        """Runs a bash script on h0 and returns its exit status and what it printed. Raises
        TimeoutError.
        """
        bash = f"cd {shlex.quote(str(cwd))} && exec bash -e -c {shlex.quote(script)}"
        process = self.processes.start("h0", self._on("h0", bash), environment, self.log)
        try:
            status = process.wait(timeout_s)
        except subprocess.TimeoutExpired as error:
            printed = self.log.read_text(errors="replace")
            raise TimeoutError(
                f"not done after {timeout_s:g} s: {script}It printed: {printed[-3000:]}"
            ) from error
        return status, self.log.read_text(errors="replace")

    def bytes_through_the_cable(self) -> tuple[int, int]:
        """Bytes that h1 has received and sent."""
        [link] = json.loads(
            run("ip", "-json", "-stats", "-n", self.namespaces["h1"], "link", "show", "eth0")
        )
        return link["stats64"]["rx"]["bytes"], link["stats64"]["tx"]["bytes"]

    def files_on_h1(self) -> list[str]:
        """What lies in h1's own folder."""
        as_h1_sees_it = Path(f"/proc/{self.processes.processes['sshd'].pid}/root{self.own_folder}")
        return sorted(path.name for path in as_h1_sees_it.iterdir())

    def unplug(self) -> None:
        """Pulls the cable, for good."""
        run("ip", "-n", self.namespaces["h0"], "link", "set", "eth0", "down")

    def commands_on_h1(self, word: str) -> list[str]:
        """The commands of the processes there that hold this word."""
        pids = run("ip", "netns", "pids", self.namespaces["h1"]).split()
        with contextlib.suppress(psutil.NoSuchProcess):
            commands = [" ".join(psutil.Process(int(pid)).cmdline()) for pid in pids]
            return [command for command in commands if word in command]
        return self.commands_on_h1(word)

    def _on(self, host: str, script: str) -> list[str]:
        """A command that runs a shell script on a host: in its network, with its name and its
        /etc.
        """
        named = f"echo {host} > /proc/sys/kernel/hostname && {script}"
        return [
            program("ip"),
            "netns",
            "exec",
            self.namespaces[host],
            program("unshare"),
            "--uts",
            "sh",
            "-c",
            named,
        ]

    def _join_namespaces(self) -> None:
        h0, h1 = self.namespaces.values()
        try:
            for namespace in (h0, h1):
                run("ip", "netns", "add", namespace)
            run(
                "ip",
                "link",
                "add",
                "eth0",
                "netns",
                h0,
                "type",
                "veth",
                "peer",
                "name",
                "eth0",
                "netns",
                h1,
            )
        except subprocess.CalledProcessError as error:
            raise NoHosts(
                f"network namespaces cannot be made here: {error.stderr.strip()}"
            ) from error
        for host, address in ADDRESSES.items():
            run("ip", "-n", self.namespaces[host], "address", "add", f"{address}/24", "dev", "eth0")
            for link in ("lo", "eth0"):
                run("ip", "-n", self.namespaces[host], "link", "set", link, "up")

    def _write_etc(self) -> None:
        hosts = "127.0.0.1 localhost\n" + "".join(
            f"{address} {host}\n" for host, address in ADDRESSES.items()
        )
        for namespace in self.namespaces.values():
            (etc(namespace) / "ssh").mkdir(parents=True)
            (etc(namespace) / "hosts").write_text(hosts)
        h0, h1 = map(etc, self.namespaces.values())
        for key in (h0 / "ssh" / "identity", h1 / "ssh" / "host_key"):
            run("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(key))
        (h0 / "ssh" / "ssh_config").write_text(SSH_CONFIG)
        (h0 / "ssh" / "ssh_known_hosts").write_text(
            "h1 " + (h1 / "ssh" / "host_key.pub").read_text()
        )
        (h1 / "ssh" / "sshd_config").write_text(SSHD_CONFIG)
        (h1 / "ssh" / "authorized_keys").write_text((h0 / "ssh" / "identity.pub").read_text())
        (h1 / "shadow").write_text(
            "root:*:::::::\n"
        )  # without a password, but not locked, which sshd would refuse

    def _start_sshd(self, timeout_s: float = 20.0) -> None:
        log = self.folder / "sshd.log"
        own = shlex.quote(str(self.own_folder))
        script = (
            f"mount -t tmpfs h1 /run && mkdir /run/sshd && mount -t tmpfs h1 {own} && exec"
            f" {program('sshd')} -D -e"
        )
        sshd = self.processes.start("sshd", self._on("h1", script), {"PATH": SYSTEM_PATH}, log)
        deadline = time.monotonic() + timeout_s
        while "Server listening" not in log.read_text():
            if sshd.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"sshd did not start: {log.read_text()}")
            time.sleep(0.05)


def require_root_and_programs() -> None:
    """Raises NoHosts with what is missing."""
    if os.geteuid() != 0:
        raise NoHosts("network namespaces need root")
    if missing := [name for name in PROGRAMS if program(name) is None]:
        raise NoHosts(
            f"no {', '.join(missing)} here: run apt-get install"
            f" {' '.join(PROGRAMS[name] for name in missing)}"
        )


def program(name: str) -> str | None:
    return shutil.which(name, path=SYSTEM_PATH)


def etc(namespace: str) -> Path:
    """What `ip netns exec` puts over /etc in this namespace."""
    return Path("/etc/netns") / namespace


def run(*command: str, check: bool = True) -> str:
    done = subprocess.run(
        command, env={"PATH": SYSTEM_PATH}, capture_output=True, text=True, check=check, timeout=30
    )
    return done.stdout
