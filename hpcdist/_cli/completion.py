"""`hpcdist completion`: what makes a shell complete our commands and options."""

from __future__ import annotations

import argparse
import shlex

from hpcdist._cli.parser import make


def main(options: argparse.Namespace) -> int:
    """Print it."""
    _, commands = make()
    summaries = {a.dest: str(a.help) for a in commands._choices_actions}
    flags = {name: sorted(p._option_string_actions) for name, p in commands.choices.items()}
    made = {"bash": _bash, "zsh": _zsh, "fish": _fish}[options.shell]
    print(made(summaries, flags), end="")
    return 0


def _bash(summaries: dict[str, str], flags: dict[str, list[str]]) -> str:
    cases = "".join(
        f"    {name}) words={shlex.quote(' '.join(f))} ;;\n" for name, f in flags.items()
    )
    return f"""\
_hpcdist() {{
    local cur=${{COMP_WORDS[COMP_CWORD]}} words=
    if [ "$COMP_CWORD" -eq 1 ]; then
        mapfile -t COMPREPLY < <(compgen -W {shlex.quote(" ".join(summaries))} -- "$cur")
        return
    fi
    case ${{COMP_WORDS[1]}} in
{cases}    esac
    case $cur in
    -*) mapfile -t COMPREPLY < <(compgen -W "$words" -- "$cur") ;;
    *) mapfile -t COMPREPLY < <(compgen -f -- "$cur") ;;
    esac
}}
complete -o filenames -F _hpcdist hpcdist
"""


def _zsh(summaries: dict[str, str], flags: dict[str, list[str]]) -> str:
    told = " ".join(shlex.quote(f"{name}:{text}") for name, text in summaries.items())
    cases = "".join(f"    {name}) compadd -- {' '.join(f)} ;;\n" for name, f in flags.items())
    return f"""\
#compdef hpcdist
_hpcdist() {{
    local -a told
    told=({told})
    if (( CURRENT == 2 )); then
        _describe command told
        return
    fi
    if [[ $PREFIX != -* ]]; then
        _files
        return
    fi
    case $words[2] in
{cases}    esac
}}
compdef _hpcdist hpcdist
"""


def _fish(summaries: dict[str, str], flags: dict[str, list[str]]) -> str:
    lines = [
        f"complete -c hpcdist -n __fish_use_subcommand -f -a {name} -d {shlex.quote(text)}"
        for name, text in summaries.items()
    ]
    for name, known in flags.items():
        seen = shlex.quote(f"__fish_seen_subcommand_from {name}")
        for flag in known:
            kind = "-l" if flag.startswith("--") else "-s"
            lines.append(f"complete -c hpcdist -n {seen} {kind} {flag.lstrip('-')}")
    return "\n".join(lines) + "\n"
