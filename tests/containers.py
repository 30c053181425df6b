"""A stand-in for apptainer: it makes a mount namespace of its own and runs the command in it.

An image is a file that names the folder of a Python environment. Inside, that lies at /mnt, and
nowhere else has its `bin` on PATH: what is asked in there tells paths that do not exist out here.
"""

import os
import stat
import sys
from pathlib import Path

PREFIX = "/mnt"  # where an image's environment lies inside

# From <sched.h> and <sys/mount.h>. Users other than root get a user namespace of their own too.
_PROGRAM = f"""\
#!{sys.executable} -IS
import ctypes, os, sys

def fail(text):
    sys.exit("FATAL:   " + text)

if sys.argv[1:2] != ["exec"]:
    fail(f"this stand-in has no command {{sys.argv[1:2]}}")
words = sys.argv[2:]
while words and words[0].startswith("-"):
    option, _, value = words.pop(0).partition("=")
    if option not in ("--nv", "--cleanenv", "--bind"):
        fail(f"unknown flag: {{option}}")
    if option == "--bind" and not value:
        words.pop(0)
    if option == "--nv":
        os.environ["STANDIN_NV"] = "1"
image, *command = words
try:
    with open(image) as file:
        folder = file.read().strip()
except OSError as error:
    fail(f"could not open image {{os.path.abspath(image)}}: {{error.strerror}}")

libc = ctypes.CDLL(None, use_errno=True)
def do(result):
    if result != 0:
        fail(os.strerror(ctypes.get_errno()))

user, group, root = os.geteuid(), os.getegid(), os.geteuid() == 0
do(libc.unshare(0x00020000 | (0 if root else 0x10000000)))
if not root:
    for name, text in (("setgroups", "deny"), ("uid_map", f"{{user}} {{user}} 1"),
                       ("gid_map", f"{{group}} {{group}} 1")):
        with open(f"/proc/self/{{name}}", "w") as file:
            file.write(text)
do(libc.mount(b"none", b"/", None, ctypes.c_ulong(16384 | (1 << 18)), None))
do(libc.mount(folder.encode(), b"{PREFIX}", None, ctypes.c_ulong(4096 | 16384), None))
os.environ["PATH"] = "{PREFIX}/bin:/usr/bin:/bin"
os.environ["APPTAINER_CONTAINER"] = os.path.abspath(image)
try:
    os.execvp(command[0], command)
except OSError as error:
    fail(f"stat {{command[0]}}: {{error.strerror}}")
"""


def install(folder: Path, environment: str = sys.prefix) -> Path:
    """Put the stand-in and an image of an environment into a folder; return the image."""
    (folder / "bin").mkdir()
    standin = folder / "bin" / "apptainer"
    standin.write_text(_PROGRAM)
    standin.chmod(standin.stat().st_mode | stat.S_IXUSR | stat.S_IXGRP | stat.S_IXOTH)
    image = folder / "app.sif"
    image.write_text(environment + "\n")
    return image


def path(folder: Path) -> str:
    """Return a PATH with the stand-in first."""
    return os.pathsep.join([str(folder / "bin"), os.environ.get("PATH", os.defpath)])


# Begins a program in a user's folder that sees the stand-in, and an image of its own environment.
PRELUDE = f"""
import os, sys
from pathlib import Path
Path("bin").mkdir(exist_ok=True)
Path("bin/apptainer").write_text({_PROGRAM!r})
Path("bin/apptainer").chmod(0o755)
Path("app.sif").write_text(sys.prefix)
os.environ["PATH"] = os.path.abspath("bin") + ":" + os.environ["PATH"]
image = os.path.abspath("app.sif")

def inside():
    return sys.executable, os.environ.get("APPTAINER_CONTAINER"), os.nice(0)

def expected(nice=0):
    return "{PREFIX}/bin/python3", image, nice
"""
