"""A silo owner's settings for its workers, and the mistakes in them."""

import argparse
from pathlib import Path

import pytest

from fl_app.silo.__main__ import main
from fl_app.silo.settings import (
    Cluster,
    add_cluster_arguments,
    arguments_from_file,
    check_address,
    check_silo_name,
    cluster_of,
    with_config,
)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_workers": 0}, r"needs a worker; received --num-workers 0\. Choose 1 or more"),
        ({"on_loss": "retry"}, r"--on-loss is one of restart, drop; received 'retry'"),
        ({"hosts": "h1"}, r"as in h1:2,h2:2; received 'h1'"),
        ({"hosts": "h1:2;reboot"}, "--hosts lists hosts"),
        ({"hosts": "-oProxyCommand=x:1"}, "--hosts lists hosts"),
        ({"hosts": "h1:0", "num_workers": 1}, "--hosts lists hosts"),
        ({"hosts": "h1:2"}, r"for several processes; received h1:2 and one\. Set --num-workers"),
        ({"hosts": "h1:1,h2:2", "num_workers": 4}, r"room for 3, and --num-workers 4\. Lower"),
    ],
)
def test_clusters_that_cannot_be_started_are_refused(changes: dict, message: str):
    Cluster(4, "h1:2,h2:2", "drop")
    with pytest.raises(ValueError, match=message):
        Cluster(**changes)


@pytest.mark.parametrize("cluster", [Cluster(), Cluster(3), Cluster(4, "h1:2,h2:2", "drop")])
def test_a_cluster_is_handed_on_by_its_arguments(cluster: Cluster):
    parser = argparse.ArgumentParser()
    add_cluster_arguments(parser)
    assert cluster_of(parser.parse_args(cluster.arguments())) == cluster


def test_options_from_a_file_come_before_those_of_the_command_line(tmp_path: Path):
    path = tmp_path / "silo.toml"
    lines = (
        "num-workers = 4",
        "insecure = true",
        "stock-waits = false",
        'allow = ["a:b", "c:d"]',
        'data = "x y.csv"',
    )
    path.write_text("\n".join(lines))
    options = ["--num-workers=4", "--insecure", "--allow=a:b", "--allow=c:d", "--data=x y.csv"]
    assert arguments_from_file(path) == options

    arguments = with_config(["--silo", "a", "--config", str(path), "--num-workers", "2"])
    assert arguments == [*options, "--silo", "a", "--num-workers", "2"]
    assert with_config(["--silo", "a"]) == ["--silo", "a"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("num-workers: 4", "must be TOML, such as: num-workers = 4; received something else"),
        ("[silo]\nname = 1", r"received the table [silo]"),
        (f"hosts = {'[' * 5000}", "its brackets are nested too deeply"),
        (None, "No such file"),
    ],
)
def test_mistakes_in_the_file_end_with_one_line(
    tmp_path: Path, capsys, text: str | None, message: str
):
    path = tmp_path / "silo.toml"
    if text is not None:
        path.write_text(text)
    assert main(["--config", str(path)]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert message in error
    assert error.count("\n") == 1


def test_a_file_with_a_byte_order_mark_is_read(tmp_path: Path):
    path = tmp_path / "silo.toml"
    path.write_text("\ufeffnum-workers = 4", encoding="utf-8")
    assert arguments_from_file(path) == ["--num-workers=4"]


def test_a_name_that_is_too_long_for_files_is_refused():
    check_silo_name("a" * 100)
    with pytest.raises(ValueError, match=r"at most 100 characters; received 101, in 'aaa"):
        check_silo_name("a" * 101)


@pytest.mark.parametrize(
    "address",
    ["coordinator", ":8000", "coordinator:", "h:0", "h:99999", "h:abc", "http://h:8000/", "h:1\n"],
)
def test_an_address_that_is_none_is_refused_before_anything_is_started(capsys, address: str):
    silo = ["--insecure", "--silo", "a", "--data", "wine"]
    assert main([*silo, "--superlink", address]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: --superlink names the coordinator as HOST:PORT")
    assert error.count("\n") == 1


@pytest.mark.parametrize("address", ["coordinator.example.org:8000", "10.0.0.1:1", "[::1]:65535"])
def test_an_address_is_a_host_and_a_port(address: str):
    check_address(address)


def test_a_cluster_that_cannot_be_started_is_refused_before_anything_is(capsys):
    silo = ["--superlink", "127.0.0.1:1", "--insecure", "--silo", "a", "--data", "wine"]
    assert main([*silo, "--num-workers", "3", "--hosts", "h1:1"]) == 2
    assert "room for 1, and --num-workers 3" in capsys.readouterr().err
