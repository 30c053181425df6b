"""From a JobSpec to a job script, through a template. Nothing is read but templates."""

from __future__ import annotations

import os
import re
import shlex
from collections.abc import Sequence
from typing import TYPE_CHECKING

from hpcdist import _config, _resources
from hpcdist._schedulers.job import FOLDER, JobSpec

if TYPE_CHECKING:
    import jinja2

# From the nearest to the widest; those of a scheduler's package and the built-in ones come last,
# and also under `builtin/`, so that a template of the same name can extend the one it replaces.
_PLACES = (
    "$XDG_CONFIG_HOME/hpcdist/templates",
    "./hpcdist-templates",
    "./templates",
    "/etc/hpcdist/templates",
)


class TemplateError(ValueError):
    """A template is missing, or asks for what there is not."""


def render(spec: JobSpec) -> str:
    """Return the job script.

    Raises:
        TemplateError: It names the file, and the variable where one is undefined.
    """
    import jinja2

    environment, name = _environment(spec.template, spec.template_folders)
    try:
        return environment.get_template(name).render({**vars(spec), "spec": spec})
    except jinja2.TemplateNotFound as exc:
        raise TemplateError(
            f"there is no template {exc.name!r}; looked for in: {', '.join(_places(spec))}"
        ) from exc
    except jinja2.TemplateSyntaxError as exc:
        where = f"{exc.filename or exc.name}, line {exc.lineno}"
        raise TemplateError(f"{where}: {exc.message}") from exc
    except jinja2.UndefinedError as exc:
        raise TemplateError(f"{_where(exc, name)}: {exc.message}") from exc


def _environment(template: str, brought: Sequence[str]) -> tuple[jinja2.Environment, str]:
    import jinja2

    built_in = jinja2.FileSystemLoader([*brought, str(_resources.templates())])
    folders, name = list(_PLACES), template
    if os.sep in template or os.path.isfile(template):
        folder, name = os.path.split(os.path.abspath(os.path.expanduser(template)))
        folders.insert(0, folder)
    loaders: list[jinja2.BaseLoader] = [
        jinja2.FileSystemLoader(os.path.abspath(_config.config_home(folder))) for folder in folders
    ]
    environment = jinja2.Environment(
        loader=jinja2.ChoiceLoader(
            [*loaders, built_in, jinja2.PrefixLoader({"builtin": built_in})]
        ),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        autoescape=False,  # it makes shell scripts, which have the filters below
    )
    environment.filters["quote"] = quote
    environment.filters["command"] = command
    environment.filters["remote"] = remote
    environment.filters["comment"] = comment
    return environment, name


def _places(spec: JobSpec) -> list[str]:
    template = spec.template
    first = [os.path.dirname(os.path.abspath(template))] if os.sep in template else []
    last = (*spec.template_folders, str(_resources.templates()))
    return [*first, *map(_config.config_home, _PLACES), *last]


def _where(exc: BaseException, name: str) -> str:
    """Name the file and line of a template in which an error arose."""
    where, trace = name, exc.__traceback__
    while trace is not None:
        file = trace.tb_frame.f_code.co_filename
        if file.endswith(".j2") or os.path.basename(file) == name:
            where = f"{file}, line {trace.tb_lineno}"
        trace = trace.tb_next
    return where


def quote(value: object) -> str:
    """Quote for the shell.

    >>> print(quote("it's $HOME"))
    'it'"'"'s $HOME'
    """
    return shlex.quote(str(value))


def command(argv: Sequence[str]) -> str:
    """Join an argv for the shell; the folder's mark becomes the script's own variable.

    >>> print(command(["cat", "@folder@/join", "a b"]))
    cat "$folder"/join 'a b'
    """
    return " ".join(_argument(argument) for argument in argv)


def _argument(argument: str) -> str:
    if not argument.startswith(FOLDER):
        return quote(argument)
    rest = argument.removeprefix(FOLDER)
    return '"$folder"' + (quote(rest) if rest else "")


def remote(argv: Sequence[str]) -> str:
    """Join an argv for a shell script that has `$host` and `$command`.

    >>> print(remote(["pbs_tmrsh", "{host}", "sh", "-c", "{command}"]))
    pbs_tmrsh "$host" sh -c "$command"
    """
    marks = {"{host}": '"$host"', "{command}": '"$command"'}
    return " ".join(marks.get(word) or quote(word) for word in argv)


def comment(value: object) -> str:
    """Make a text fit for a comment: on one line."""
    return re.sub(r"[\r\n]+", " ", str(value))
