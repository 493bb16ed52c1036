"""Lists of hosts, as horovodrun takes them: h1:2,h2:2 is two processes on each."""

import re

HOST = r"[A-Za-z0-9][A-Za-z0-9._-]*:[1-9][0-9]*"


def check_hosts(hosts: str, num_processes: int, option: str) -> None:
    """Raises ValueError unless the hosts have room for the processes; none is this host.

    `option`: the one that says how many processes there are.

    >>> check_hosts("h1:2,h2:2", 4, "--ranks")
    """
    if not hosts:
        return
    if not re.fullmatch(f"{HOST}(,{HOST})*", hosts):
        raise ValueError(
            "--hosts lists hosts and how many processes each takes, as in h1:2,h2:2; received"
            f" {hosts!r}."
        )
    if num_processes == 1:
        raise ValueError(
            f"--hosts is for several processes; received {hosts} and one. Set {option}."
        )
    room = sum(int(host.partition(":")[2]) for host in hosts.split(","))
    if room < num_processes:
        raise ValueError(
            f"The hosts must have room for all processes; received --hosts {hosts}, room for"
            f" {room}, and {option} {num_processes}. Lower {option} or name more hosts."
        )
