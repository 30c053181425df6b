"""ssh without a host: machines as people write them, command lines, what its words mean."""

import shlex
import subprocess
import sys
from pathlib import Path

import pytest

import hpcdist
from hpcdist._cli.machines import MachineFileError, read_file
from hpcdist._managers.ssh import SSHManager
from hpcdist._managers.ssh_link import Options, SSHConnection, command, keeper_command
from hpcdist._managers.ssh_machines import Machine, parse, read
from hpcdist._runtime.node import Node

# --- machines


@pytest.mark.parametrize(
    ("text", "machine"),
    [
        ("node1", Machine("node1")),
        (" node1.site.org ", Machine("node1.site.org")),
        ("ada@node1", Machine("node1", "ada")),
        ("ada.l-2@node_1:2222", Machine("node_1", "ada.l-2", 2222)),
        ("node1:22 10.0.0.7", Machine("node1", None, 22, "10.0.0.7")),
        ("ada@10.0.0.1\tfd00::7", Machine("10.0.0.1", "ada", None, "fd00::7")),
        ("[fd00::1]:22 [fd00::7]", Machine("fd00::1", None, 22, "fd00::7")),
    ],
)
def test_a_machine_is_read(text: str, machine: Machine) -> None:
    assert parse(text) == machine


WRONG = """
@node1; ada@; -oProxyCommand=x; -x@node1; a b@node1; node1:; node1:x; node1:0; node1:65536; fd00::1;
node1 eth 0; node1 eth0; node1 1.2.3.4:9; 2*a
"""


@pytest.mark.parametrize("text", ["", *map(str.strip, WRONG.split(";"))])
def test_what_is_no_machine_is_refused_by_name(text: str) -> None:
    with pytest.raises(ValueError) as caught:
        parse(text)
    assert repr(text) in str(caught.value)


def test_machines_named_twice_are_one() -> None:
    found = read(["a", ("b", "auto"), ("a", 2), ("ada@a", 1), "a:2222", "a 10.0.0.1"])
    assert [(str(m), m.bind, m.count) for m in found] == [
        ("a", None, 3),
        ("b", None, None),
        ("ada@a", None, 1),
        ("a port 2222", None, 1),
        ("a", "10.0.0.1", 1),
    ]


@pytest.mark.parametrize(
    ("machines", "kind"),
    [
        ([("a", 0)], ValueError),
        ([("a", True)], ValueError),
        ([("a", "all")], ValueError),
        (["a", ("a", "auto")], ValueError),
        ([3], TypeError),
        ([("a", 1, 2)], TypeError),
        ("a", TypeError),
        ([], ValueError),
    ],
)
def test_wrong_lists_of_machines(machines: object, kind: type[Exception]) -> None:
    with pytest.raises(kind):
        SSHManager(machines)  # type: ignore[arg-type]


# --- machine files


def test_a_machine_file_is_divided_into_here_and_elsewhere(tmp_path: Path) -> None:
    path = tmp_path / "machines"
    path.write_text(
        "localhost\n3 * 127.0.0.1 # here\n\n2*a\nauto*b 10.0.0.2\n0*c\na:22\nlocalhost:9\n"
    )
    here, elsewhere = read_file(str(path))
    assert here == 4
    assert [(str(m), m.bind, m.count) for m in elsewhere] == [
        ("a", None, 2),
        ("b", "10.0.0.2", None),
        ("a port 22", None, 1),
        ("localhost port 9", None, 1),
    ]


@pytest.mark.parametrize("line", ["*a", "x*a", "2*", "2*3*a", "-1*a", "two words", "a b c"])
def test_a_line_that_is_not_understood_is_shown(tmp_path: Path, line: str) -> None:
    path = tmp_path / "machines"
    path.write_text(f"a\n{line}\n")
    with pytest.raises(MachineFileError) as caught:
        read_file(str(path))
    assert f"{path}: '{line}' is not of the form [count*][user@]host" in str(caught.value)


# --- command lines


def test_the_command_line() -> None:
    argv = command(Machine("node1", "ada", 2222), Options(flags=("-i", "my key")), "exec it", None)
    assert shlex.join(argv) == (
        "ssh -i 'my key' -o BatchMode=yes -o ConnectTimeout=20 -o ServerAliveInterval=2 "
        "-o ServerAliveCountMax=5 -o ControlMaster=no -o RemoteCommand=none -o RequestTTY=no "
        "-o ClearAllForwardings=yes -o LogLevel=ERROR -p 2222 -- ada@node1 'exec it'"
    )


def test_the_command_line_of_a_tunnel() -> None:
    options = Options(ssh=("/opt/ssh", "-4"), timeout=5.4, tunnel=True)
    argv = command(Machine("node1"), options, "exec it", ("10.0.0.1", 4711))
    assert shlex.join(argv) == (
        "/opt/ssh -4 -o BatchMode=yes -o ConnectTimeout=5 -o ServerAliveInterval=2 "
        "-o ServerAliveCountMax=5 -o ControlMaster=no -o RemoteCommand=none -o RequestTTY=no "
        "-o ControlPath=none -o LogLevel=INFO -R 0:10.0.0.1:4711 -- node1 'exec it'"
    )
    assert "0:[fd00::1]:4711" in command(Machine("a"), options, "it", ("fd00::1", 4711))


@pytest.mark.parametrize("shell", ["sh", "bash", "csh", "tcsh", "zsh", "fish"])
def test_any_shell_passes_the_command_on(shell: str, tmp_path: Path) -> None:
    program = tmp_path / "it's python"
    program.write_text(f'#!/bin/sh\nexec {sys.executable} -S "$@"\n')
    program.chmod(0o755)
    remote = keeper_command([str(program)], ["-X", "dev"], "/nonexistent", {"A": "1 2"})
    assert "\n" not in remote
    try:
        done = subprocess.run([shell, "-c", remote], capture_output=True, text=True, timeout=60)
    except FileNotFoundError:
        pytest.skip(f"there is no {shell} here")
    assert done.returncode == 1
    assert done.stderr.startswith("No module named hpcdist for ")
    assert done.stdout == ""


# --- a connection, with a program of ours in the place of ssh


def connect(script: str, *, tunnel: bool = False) -> SSHConnection:
    options = Options(tunnel=tunnel)
    return SSHConnection(Node(), Machine("node1"), options, ["sh", "-c", script])


def hello(text: str = "{}") -> str:
    """Return what a keeper says first, as printf takes it."""
    body = '{"ev": "hello", "cores": 2}'
    return rf"\0hpcdist keeper\0\{len(body):03o}\0\0\0{body}"


def test_what_login_shells_print_is_passed_over() -> None:
    connection = connect(f"printf 'welcome\\n\\000hpcdist kee'; echo hm >&2; printf '{hello()}'")
    try:
        assert connection.meet()["cores"] == 2
    finally:
        connection.close()
        assert connection.wait(10) == 0
    assert list(connection.said) == ["hm"]


def test_a_tunnel_has_the_port_that_ssh_tells() -> None:
    line = "Allocated port 4711 for remote forward to 10.0.0.1:80"
    connection = connect(f"printf '{hello()}'; echo '{line}' >&2; cat", tunnel=True)
    try:
        assert connection.meet()["cores"] == 2
        assert connection.port == 4711
    finally:
        connection.close()
        assert connection.wait(10) == 0


@pytest.mark.parametrize(
    ("script", "words", "fix"),
    [
        ("echo 'Host key verification failed.' >&2; exit 255", "Host key", "`ssh node1`"),
        ("echo 'x: Permission denied (publickey).' >&2; exit 255", "Permission", "BatchMode"),
        ("echo 'ssh: Could not resolve hostname x: ?' >&2; exit 255", "resolve", "~/.ssh/config"),
        ("echo 'connect to host x: Connection timed out' >&2; exit 255", "timed out", "by hand"),
        ("echo 'sh: no python' >&2; exit 127", "no python", "python="),
        ("echo 'hpcdist needs Python 3.11, this is 3.9' >&2; exit 1", "needs", "python="),
        ("exit 9", "exit code 9", ""),
        ("printf half >&2; kill -9 $$", "half", ""),
    ],
)
def test_a_connection_that_fails_tells_why(script: str, words: str, fix: str) -> None:
    connection = connect(script)
    try:
        with pytest.raises(hpcdist.LaunchError) as caught:
            connection.meet()
    finally:
        connection.close()
    assert str(caught.value).startswith("node1: ")
    assert words in str(caught.value)
    assert fix in caught.value.fix
    assert bool(fix) == bool(caught.value.fix)


def test_an_ssh_that_does_not_leave_is_made_to() -> None:
    connection = connect("exec sleep 600")
    connection.close()
    assert connection.wait(0.01) == -9
