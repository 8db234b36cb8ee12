"""
Measure webhooks per second with 1, 2 and 4 service hosts on one PostgreSQL server.

    python -m tests.benchmarks.hosts [--hosts 1 2 4] [--seconds 5] [--connections 16]

Each host is a gunicorn with two workers in its own network namespace. A bridge connects the hosts
with PostgreSQL and the load generator, which run outside the namespaces. The database's limit is
measured by executing the same statement without the service. The benchmark needs Linux, root, and
``ip`` (iproute2).
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from itertools import islice
from pathlib import Path

import psutil  # type: ignore[import-untyped]

from clerkhooks.clerk.fake import FakeClerk
from tests.benchmarks.database import Statements
from tests.benchmarks.load import Result, apply_load, webhooks
from tests.benchmarks.processes import cpu_seconds
from tests.conftest import migrate
from tests.replication import Node, get_server  # type: ignore[attr-defined]
from tests.server import Server, serving, web_command
from tests.support import ThreadPool

CLERK = FakeClerk()
SUBNET = "198.18.0."  # for benchmarks: RFC 2544
BRIDGE, OUTSIDE = "clerkhooks0", f"{SUBNET}254"
MAX_RATE = 4000  # requests to prepare for each second of load


def ip(command: str) -> None:
    """Run ``ip``."""
    subprocess.run(["ip", *command.split()], check=True, timeout=30)


@contextmanager
def network(hosts: int) -> Iterator[list[str]]:
    """Create one bridge, and a namespace for each host; yield the namespaces' names."""
    names = [f"clerkhooks{number}" for number in range(1, hosts + 1)]
    with ExitStack() as stack:
        ip(f"link add {BRIDGE} type bridge")
        stack.callback(ip, f"link del {BRIDGE}")
        ip(f"addr add {OUTSIDE}/24 dev {BRIDGE}")
        ip(f"link set {BRIDGE} up")
        for number, name in enumerate(names, 1):
            ip(f"netns add {name}")
            stack.callback(ip, f"netns del {name}")
            ip(f"link add {name} type veth peer name eth0 netns {name}")
            ip(f"link set {name} master {BRIDGE} up")
            ip(f"-n {name} addr add {SUBNET}{number}/24 dev eth0")
            ip(f"-n {name} link set lo up")
            ip(f"-n {name} link set eth0 up")
        yield names


@contextmanager
def postgresql() -> Iterator[tuple[str, int]]:
    """Run PostgreSQL on the bridge; yield its URL and process id."""
    home = Path(tempfile.mkdtemp(prefix="clerkhooks-pg-"))
    first = get_server(home)
    try:
        with (home / "pg_hba.conf").open("a") as file:
            file.write(f"host all all {SUBNET}0/24 trust\n")
        node = Node(home, Path(str(first.bin_path)), first.system_user, OUTSIDE)
        node.stop("fast")
        node.start()
        pid = int((home / "postmaster.pid").read_text().split()[0])
        yield f"postgresql://postgres@{OUTSIDE}/postgres", pid
    finally:
        first.cleanup()
        shutil.rmtree(home, ignore_errors=True)


def load_hosts(
    servers: Sequence[Server], prepared: Sequence[bytes], connections: int, seconds: float
) -> float:
    """Send deliveries to all *servers* at once; return the successful deliveries per second."""

    def send(number: int) -> Result:
        requests = iter(prepared[number :: len(servers)])
        own = servers[number]
        return apply_load(own.port, requests, seconds, connections // len(servers), own.host)

    with ThreadPool(len(servers)) as pool:
        results = list(pool.map(send, range(len(servers))))
    assert not any(result.errors for result in results), [each.statuses for each in results]
    return sum(result.rate for result in results)


def measure(name: str, work: Callable[[], float], groups: dict[str, list[int]]) -> float:
    """Print the rate of *work* and the cores used by each group of processes; return the rate."""
    before, began = _cpu_times(groups), time.monotonic()
    rate = work()
    seconds = time.monotonic() - began
    cores = {group: (now - before[group]) / seconds for group, now in _cpu_times(groups).items()}
    machine = cores.pop("machine")
    cores["others"] = machine - sum(cores.values())
    shares = ", ".join(f"{group} {used:.2f}" for group, used in cores.items())
    print(f"{name:38} {rate:7,.0f} /s   cores used: {shares}", flush=True)
    return rate


def _cpu_times(groups: dict[str, list[int]]) -> dict[str, float]:
    """Return the CPU seconds of the machine, of each group, and of this process."""
    machine = psutil.cpu_times()
    used = {group: sum(map(cpu_seconds, pids)) for group, pids in groups.items()}
    busy = sum(machine[:8]) - machine.idle - machine.iowait  # user and nice include guest time
    return {"machine": busy, **used, "load": time.process_time()}


def measure_hosts(
    names: Sequence[str], url: str, postmaster: int, options: argparse.Namespace
) -> float:
    """Start a service in each of the namespaces, and measure them together."""
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        servers = []
        for number, name in enumerate(names, 1):
            command, address = ["ip", "netns", "exec", name, *web_command()], f"{SUBNET}{number}"
            service = serving(url, CLERK, folder / name, command=command, host=address)
            servers.append(stack.enter_context(service))
        groups = {
            "database": [postmaster],
            "service": [server.process.pid for server in servers],
        }
        prepared = list(islice(webhooks(CLERK), int(options.seconds * MAX_RATE)))
        work = partial(load_hosts, servers, prepared, options.connections, options.seconds)
        return measure(f"{len(names)} host(s)", work, groups)


def run(options: argparse.Namespace) -> None:
    """Measure the database alone, then the service on each number of hosts."""
    with ExitStack() as stack:
        names = stack.enter_context(network(max(options.hosts)))
        url, postmaster = stack.enter_context(postgresql())
        migrate(url, CLERK)
        limits = []
        for batch in (1, 16):
            count = int(options.seconds * 2 * MAX_RATE / batch)
            statements = Statements(url, CLERK, batch, count)
            work = partial(statements.execute, options.connections, options.seconds)
            limits.append(
                measure(f"database alone, {batch} per statement", work, {"database": [postmaster]})
            )
        for count in options.hosts:
            rate = measure_hosts(names[:count], url, postmaster, options)
            ratios = " and ".join(f"{rate / limit:.2f}" for limit in limits)
            print(f"{'':38} {ratios} of the database alone")
    print(f"This machine has {os.cpu_count()} cores for service, database and load together.")


def main(argv: Sequence[str] | None = None) -> None:
    """Print a line for the database alone and for each number of hosts."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--hosts", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--seconds", type=float, default=5)
    parser.add_argument("--connections", type=int, default=16, help="in total")
    options = parser.parse_args(argv)
    if os.geteuid() != 0 or shutil.which("ip") is None:
        print("Skipped: network namespaces need Linux, root, and ip (iproute2).")
        return
    run(options)


if __name__ == "__main__":
    main()
